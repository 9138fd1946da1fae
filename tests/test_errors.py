"""Wrong input gets an error that names the thing, and changes nothing."""

from __future__ import annotations

import copy
import math
import re
import weakref

import pytest
import torch
from cases import CASES, each_backend, each_case, each_elementwise
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import advance, copies, gradients, parameters, saved, snapshot
from torch.optim import SGD, Adam

import optimzoo
from optimzoo.optimizer import Elementwise, Tensorwise

# Hyper-parameters

NUMBERS = {"lr": (-1e-9, -1.0), "eps": (-1e-9,), "weight_decay": (-0.1,), "momentum": (-0.1, 1.0, 2.0)}
NOT_IN_RANGE = [math.nan, math.inf, -math.inf]
NOT_A_NUMBER = ["0.1", None, 1j, True, [0.1], {}]
BAD_BETAS = [
    (-0.1, 0.9),
    (0.9, 1.0),
    (1.0, 0.9),
    (0.9, math.nan),
    (math.inf, 0.9),
    (0.9,),
    (0.9, 0.99, 0.999),
    0.9,
    None,
    "ab",
    (0.9, "0.99"),
    (None, 0.9),
]

WRONG_NUMBERS = [
    pytest.param(case, name, value, id=f"{case.name}-{name}-{value}")
    for case in CASES
    for name, values in NUMBERS.items()
    if name in case.cls([torch.ones(1, requires_grad=True)]).defaults
    for value in [*values, *NOT_IN_RANGE, *NOT_A_NUMBER]
]


def expected_error(value: object) -> type[Exception]:
    return ValueError if isinstance(value, float) else TypeError


@pytest.mark.parametrize(("case", "name", "value"), WRONG_NUMBERS)
def test_a_number_out_of_range_is_named_with_its_value(case, name, value):
    message = rf"{name} must be .*{re.escape(repr(value))}"
    with pytest.raises(expected_error(value), match=message):
        case.cls(parameters(), **{name: value})
    with pytest.raises(expected_error(value), match=message):
        case.cls([{"params": parameters(), name: value}])


@pytest.mark.parametrize("betas", BAD_BETAS, ids=str)
@each_case
def test_betas_out_of_range_are_named(case, betas):
    if "betas" not in case.cls(parameters()).defaults:
        return
    with pytest.raises((ValueError, TypeError), match="betas must be"):
        case.cls(parameters(), betas=betas)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@each_case
def test_a_tensor_learning_rate_is_checked_like_a_number(case, value):
    with pytest.raises(ValueError, match="lr must be"):
        case.cls(parameters(), lr=torch.tensor(value))
    with pytest.raises(ValueError, match=r"lr must be one number.*\(2,\)"):
        case.cls(parameters(), lr=torch.ones(2))


@each_case
def test_an_unknown_option_is_a_type_error(case):
    with pytest.raises(TypeError, match="nesterow"):
        case.cls(parameters(), nesterow=True)


METHOD_ERRORS = {
    "DiffGrad": [
        (dict(variant=3), ValueError, "variant must be 0, 1 or 2, got 3"),
        (dict(variant=-1), ValueError, "variant must be 0, 1 or 2, got -1"),
        (dict(variant="plain"), ValueError, "variant must be 0, 1 or 2, got 'plain'"),
        (dict(variant=None), ValueError, "variant must be 0, 1 or 2, got None"),
    ],
    "AdaBelief": [
        (dict(eps=0), ValueError, "eps must be > 0, got 0"),
        (dict(eps=0.0), ValueError, "eps must be > 0, got 0"),
        (dict(amsgrad=True), ValueError, "rectify=False"),
        (dict(fixed_decay=True, decoupled_weight_decay=False), ValueError, "decoupled_weight_decay=True"),
    ],
}


@pytest.mark.parametrize(
    ("case", "options", "error", "message"),
    [
        pytest.param(case, *row, id=f"{case.name}-{row[0]}")
        for case in CASES
        for row in METHOD_ERRORS.get(case.name, [])
    ],
)
def test_what_a_method_excludes_is_named(case, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        case.cls(parameters(), **options)


# Parameters


@each_case
def test_no_parameters_are_an_error(case):
    with pytest.raises(ValueError, match="empty parameter list"):
        case.cls([])


@each_case
def test_a_tensor_in_place_of_a_list_is_an_error(case):
    with pytest.raises(TypeError, match="iterable"):
        case.cls(torch.ones(3, requires_grad=True))


@each_case
def test_a_parameter_that_is_not_a_leaf_is_an_error(case):
    with pytest.raises(ValueError, match="non-leaf"):
        case.cls([torch.ones(3, requires_grad=True) * 2])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.uint8], ids=str)
@each_case
def test_an_integer_parameter_is_an_error(case, dtype):
    good, bad = torch.ones(3, requires_grad=True), torch.zeros(3, dtype=dtype)
    with pytest.raises(ValueError, match=rf"params\[1\].*{dtype}"):
        case.cls([good, bad])


@each_case
def test_a_parameter_in_two_groups_is_an_error(case):
    param = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="more than one"):
        case.cls([dict(params=[param]), dict(params=[param])])


@pytest.mark.parametrize(
    ("group", "error"),
    [
        (lambda old: dict(params=[torch.ones(2, requires_grad=True)], lr=-1.0), ValueError),
        (lambda old: dict(params=[torch.ones(2, requires_grad=True)], weight_decay="a"), TypeError),
        (lambda old: dict(params=[torch.ones(2, dtype=torch.int32)]), ValueError),
        (lambda old: dict(params=[torch.ones(2, requires_grad=True) * 2]), ValueError),
        (lambda old: dict(params=old), ValueError),
    ],
    ids=["lr", "decay", "integer", "non-leaf", "twice"],
)
@each_case
def test_a_group_that_is_refused_is_not_added(case, group, error):
    params = parameters()
    optimizer = advance(case.cls(params), gradients(params, 2))
    before = snapshot(optimizer)
    with pytest.raises(error):
        optimizer.add_param_group(group(params))
    assert snapshot(optimizer) == before


# fused=True that cannot be met

BIG = dict(requires_grad=True)


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        (dict(foreach=True), lambda: torch.ones(3, **BIG), "fused and foreach"),
        (dict(differentiable=True), lambda: torch.ones(3, **BIG), "differentiable"),
        ({}, lambda: torch.ones(4, 6)[:, ::2].requires_grad_(), "gaps"),
        ({}, lambda: torch.ones(3).expand(2, 3).requires_grad_(), "overlap"),
        ({}, lambda: torch.ones(3, device="meta", **BIG), "meta"),
    ],
    ids=["foreach", "differentiable", "gaps", "overlap", "device"],
)
@each_elementwise
def test_fused_that_cannot_be_met_says_why_at_once(case, options, param, message):
    good = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=message):
        case.cls([good, param()], fused=True, **options)


@each_elementwise
def test_fused_with_a_gradient_of_other_strides_says_why_in_the_step(case):
    good, bad = torch.ones(3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    optimizer = case.cls([good, bad], fused=True)
    good.grad, bad.grad = torch.ones(3), torch.ones(3, 2).t()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"fused=True cannot be met.*\(2, 3\).*strides"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_fused_without_a_native_step_says_so():
    class Plain(Elementwise):
        @staticmethod
        def update(param, grad, *, lr, step):
            param -= lr * grad

    with pytest.raises(RuntimeError, match="Plain has no native step"):
        Plain([torch.ones(2, requires_grad=True)], dict(lr=0.1), fused=True)


# Gradients and state that do not fit their parameter


def row_gradient(param):
    """A sparse gradient of the second row."""
    values = torch.ones(1, *param.shape[1:], dtype=param.dtype)
    return torch.sparse_coo_tensor(torch.tensor([[1]]), values, param.shape, check_invariants=True)


def other_shape(optimizer, bad):
    bad.data = torch.ones(7, dtype=bad.dtype)


def other_dtype(optimizer, bad):
    bad.data = bad.data.to(torch.float32)


def wider_gradient(optimizer, bad):
    # A parameter may be told to take gradients of any dtype.
    bad.grad_dtype = None
    bad.grad = torch.zeros_like(bad, dtype=torch.float32)


def sparse_gradient(optimizer, bad):
    bad.grad = row_gradient(bad)


def state_of_other_shape(optimizer, bad):
    name = optimizer.rule(optimizer.param_groups[0]).states[-1]
    optimizer.state[bad][name] = torch.zeros(2, 2, dtype=bad.dtype)


def state_of_other_dtype(optimizer, bad):
    name = optimizer.rule(optimizer.param_groups[0]).states[0]
    optimizer.state[bad][name] = optimizer.state[bad][name].to(torch.bfloat16)


def state_elsewhere(optimizer, bad):
    name = optimizer.rule(optimizer.param_groups[0]).states[0]
    optimizer.state[bad][name] = optimizer.state[bad][name].to("meta")


def state_missing(optimizer, bad):
    del optimizer.state[bad][optimizer.rule(optimizer.param_groups[0]).states[0]]


def step_missing(optimizer, bad):
    del optimizer.state[bad]["step"]


MISFITS = [
    (other_shape, "shape"),
    (other_dtype, "float32|dtype"),
    (wider_gradient, "float32|dtype"),
    (sparse_gradient, "sparse"),
    (state_of_other_shape, "shape"),
    (state_of_other_dtype, "bfloat16|dtype|of another kind"),
    (state_elsewhere, "meta|device"),
    (state_missing, "lacks"),
    (step_missing, "lacks"),
]


@pytest.mark.parametrize(("misfit", "message"), MISFITS)
@pytest.mark.parametrize("place", ["first", "last", "other-group"])
@each_backend("differentiable")
def test_what_does_not_fit_its_parameter_raises_and_nothing_has_changed(case, backend, misfit, message, place):
    if misfit is sparse_gradient and "sparse" not in case.refuses:
        return
    if misfit.__name__.startswith("state") and not case.states:
        return
    good, bad = parameters(layouts=["transposed", "vector"])
    order = [bad, good] if place == "first" else [good, bad]
    groups = [dict(params=[p]) for p in order] if place == "other-group" else order
    optimizer = advance(case.cls(groups, weight_decay=0.1, **backend), gradients(order, 2))
    misfit(optimizer, bad)
    if any(t.device.type == "meta" for row in optimizer.state.values() for t in row.values()):
        before, take = None, lambda opt: None  # bits of a meta tensor cannot be read
    else:
        before, take = snapshot(optimizer), snapshot
    steps = [optimizer.state[p].get("step", torch.zeros(())).clone() for p in order]
    good_before = good.detach().clone()
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()
    assert take(optimizer) == before
    assert torch.equal(good, good_before)
    assert [optimizer.state[p].get("step", torch.zeros(())) for p in order] == steps


@pytest.mark.parametrize(("misfit", "message"), MISFITS[:4])
@each_backend("differentiable")
def test_a_first_step_that_fails_leaves_no_state_behind(case, backend, misfit, message):
    if misfit is sparse_gradient and "sparse" not in case.refuses:
        return
    good, bad = params = parameters(layouts=["transposed", "vector"])
    optimizer = case.cls(params, **backend)
    good.grad, bad.grad = gradients(params, 1)[0]
    misfit(optimizer, bad)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert snapshot(optimizer) == before
    assert not optimizer.state


@each_backend("differentiable")
def test_a_failed_step_empties_a_row_of_state_that_was_only_looked_at(case, backend):
    good, bad = params = parameters(layouts=["transposed", "vector"])
    optimizer = case.cls(params, **backend)
    assert not optimizer.state[good]  # makes an empty row
    good.grad, bad.grad = gradients(params, 1)[0]
    other_shape(optimizer, bad)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="shape"):
        optimizer.step()
    assert snapshot(optimizer) == before


@each_backend("differentiable")
def test_a_parameter_whose_elements_share_memory_is_an_error(case, backend):
    if backend.get("fused"):
        return  # said by the constructor, above
    param = torch.ones(3).expand(2, 3).requires_grad_()
    param.grad = torch.ones(2, 3)
    optimizer = case.cls([param], **backend)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="expanded"):
        optimizer.step()
    assert snapshot(optimizer) == before


@each_case
def test_sparse_gradients_are_refused_by_name(case):
    if "sparse" not in case.refuses:
        return
    param = torch.ones(4, 2, requires_grad=True)
    param.grad = row_gradient(param)
    optimizer = case.cls([param])
    with pytest.raises(RuntimeError, match=rf"{case.name}.*sparse"):
        optimizer.step()
    assert not optimizer.state


# Checkpoints


def stepped(case, **options):
    params = parameters(layouts=["vector", "transposed"])
    return advance(case.cls(params, **options), gradients(params, 2))


def refused(optimizer, state_dict, error=(ValueError, KeyError, TypeError), match=None):
    before = snapshot(optimizer)
    with pytest.raises(error, match=match):
        optimizer.load_state_dict(state_dict)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("key", ["state", "param_groups"])
@each_case
def test_a_truncated_checkpoint_is_refused_and_the_missing_part_named(case, key):
    state_dict = saved(stepped(case))
    del state_dict[key]
    refused(stepped(case, lr=0.5), state_dict, ValueError, key)


@each_case
def test_a_checkpoint_with_an_entry_of_state_missing_is_refused(case):
    optimizer = stepped(case, lr=0.5)
    for name in saved(optimizer)["state"][1]:
        state_dict = saved(stepped(case))
        del state_dict["state"][1][name]
        refused(optimizer, state_dict, ValueError, rf"parameter 1.*{case.name} needs.*{name}")


@each_case
def test_a_checkpoint_of_other_shapes_is_refused(case):
    optimizer = stepped(case, lr=0.5)
    for name in case.states:
        state_dict = saved(stepped(case))
        state_dict["state"][1][name] = torch.zeros(4, 4)
        refused(optimizer, state_dict, ValueError, rf"{name} of parameter 1.*\(3, 5\).*\(4, 4\)")


@each_case
def test_a_checkpoint_of_another_number_of_parameters_or_groups_is_refused(case):
    params = parameters(layouts=["vector", "transposed"])
    refused(stepped(case), case.cls(params[:1]).state_dict(), ValueError, "group")
    refused(stepped(case), case.cls([dict(params=[p]) for p in params]).state_dict(), ValueError, "group")


@pytest.mark.parametrize("other", [Adam, lambda params: SGD(params, lr=0.1, momentum=0.9)], ids=["Adam", "SGD"])
@each_case
def test_a_checkpoint_of_another_class_is_refused(case, other):
    params = parameters(layouts=["vector", "transposed"])
    foreign = saved(advance(other(params), gradients(params, 2)))
    refused(stepped(case), foreign, ValueError, f"parameter 0.*{case.name} needs")


@each_case
def test_classes_with_other_state_refuse_each_others_checkpoints(case):
    own = stepped(case)
    for other in CASES:
        theirs = saved(stepped(other))
        if not saved(own)["state"][0].keys() <= theirs["state"][0].keys():
            refused(own, theirs, ValueError, "needs")


@pytest.mark.parametrize("setting", ["lr", "weight_decay", "betas", "eps", "momentum"])
@pytest.mark.parametrize("value", [-1.0, math.nan, "a", None], ids=str)
@each_case
def test_a_checkpoint_with_a_setting_out_of_range_is_refused(case, setting, value):
    state_dict = saved(stepped(case))
    if setting in state_dict["param_groups"][0]:
        state_dict["param_groups"][0][setting] = value
        refused(stepped(case), state_dict, (ValueError, TypeError), setting)


@pytest.mark.parametrize("step", [None, "3", [3], torch.ones(2), -1, math.nan], ids=str)
@each_case
def test_a_checkpoint_whose_step_is_no_count_is_refused(case, step):
    state_dict = saved(stepped(case))
    state_dict["state"][0]["step"] = step
    refused(stepped(case), state_dict, ValueError, "step of parameter 0")


@pytest.mark.parametrize("thing", [None, [], "state", 3], ids=str)
@each_case
def test_what_is_no_dictionary_is_refused(case, thing):
    refused(stepped(case), thing, (ValueError, KeyError, TypeError, AttributeError))


def places(tree, path=()):
    """Every place in nested dictionaries and lists, by the keys that lead there."""
    if path:
        yield path
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*path, key))


def inside(tree, path):
    for key in path:
        tree = tree[key]
    return tree


THINGS = [None, "text", -1, 2**70, math.nan, (), [], {}, torch.zeros(2, 2), torch.zeros(()), torch.tensor(math.nan)]


@settings(max_examples=60)  # of one damage at a time test_hostile.py has all
@given(data=st.data())
@each_case
def test_a_damaged_checkpoint_loads_and_steps_or_is_refused_without_a_trace(case, data):
    state_dict = saved(stepped(case))
    for _ in range(2):
        *path, key = data.draw(st.sampled_from(list(places(state_dict))))
        parent = inside(state_dict, path)
        way = data.draw(st.sampled_from(["delete", "replace", "rename", "reshape"]))
        if way == "delete":
            del parent[key]
        elif way == "rename" and isinstance(parent, dict):
            parent[f"{key}s"] = parent.pop(key)
        elif way == "reshape" and isinstance(parent[key], torch.Tensor):
            parent[key] = parent[key].flatten()[:-1] if parent[key].dim() else parent[key].expand(2)
        else:
            parent[key] = copy.deepcopy(data.draw(st.sampled_from(THINGS)))
    optimizer = stepped(case, lr=0.5)
    before = snapshot(optimizer)
    given_dict = copy.deepcopy(state_dict)
    try:
        optimizer.load_state_dict(state_dict)
    except (ValueError, KeyError, TypeError):
        assert snapshot(optimizer) == before
    else:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        advance(optimizer, gradients(params, 2))
        assert all(isinstance(row, dict) and int(row["step"]) >= 2 for row in map(optimizer.state.get, params))
    assert state_dict.keys() == given_dict.keys()


@each_case
def test_refusing_is_no_accident_of_an_empty_optimizer(case):
    # A fresh optimizer has no state to protect; the same checkpoint is refused there as well.
    state_dict = saved(stepped(case))
    del state_dict["state"][0]["step"]
    params = parameters(layouts=["vector", "transposed"])
    refused(case.cls(copies(params)), state_dict, ValueError, "parameter 0")


def test_a_tensorwise_subclass_is_checked_too():
    class Halve(Tensorwise):
        @staticmethod
        def update(param, grad, *, lr, step):
            param *= 1 - lr

    with pytest.raises(ValueError, match="lr must be"):
        Halve([torch.ones(2, requires_grad=True)], dict(lr=-1.0))
    with pytest.raises(ValueError, match=r"params\[0\].*int64"):
        Halve([torch.ones(2, dtype=torch.int64)], dict(lr=0.1))


@pytest.mark.parametrize("wrong", ["step", "lr"])
def test_what_is_wrong_in_the_last_group_is_found_before_the_first_is_updated(wrong):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = optimzoo.DiffGrad([{"params": [param]} for param in params])
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    if wrong == "step":
        optimizer.state[params[1]]["step"] = optimizer.state[params[1]]["step"].double()
    else:
        optimizer.param_groups[1]["lr"] = "fast"
    before = params[0].detach().clone()
    with pytest.raises((RuntimeError, TypeError), match=wrong):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize(
    "average", [torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.int64), torch.ones(3, device="meta")]
)
def test_an_average_that_cannot_be_one_is_refused_before_anything_is_loaded(average):
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = optimzoo.AdaBelief([param])
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["exp_avg"] = average
    state_dict["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match="exp_avg of parameter 0 must be a floating-point tensor"):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_parameters_can_be_swapped_between_steps():
    model = torch.nn.Linear(3, 2)
    optimizer = optimzoo.DiffGrad(model.parameters())
    for _ in range(3):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    other = torch.nn.Parameter(torch.ones(2, 3))
    torch.utils.swap_tensors(model.weight, other)


def test_a_default_device_is_not_where_learning_rates_go():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with torch.device("meta"):
        optimzoo.DiffGrad([param], lr=1.0).step()
    assert not torch.equal(param, torch.ones(3))


def test_a_sparse_gradient_of_a_transposed_parameter_is_named_as_such():
    param = torch.nn.Parameter(torch.ones(3, 4).t())
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        param.grad = torch.eye(4)[:, :3].to_sparse()
    with pytest.raises(RuntimeError, match="does not take sparse gradients"):
        optimzoo.DiffGrad([param]).step()


def test_the_state_of_a_group_that_was_taken_out_is_let_go():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = optimzoo.DiffGrad([{"params": [param]} for param in params])
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    gone = weakref.ref(optimizer.state.pop(params[1])["exp_avg"])
    optimizer.param_groups.pop()
    optimizer.step()
    assert gone() is None


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_an_unknown_argument_is_said_to_be_one_of_the_class_and_by_which_name_it_goes(case):
    params = [torch.ones(2, requires_grad=True)]
    with pytest.raises(
        TypeError, match=rf"^{case.cls.__name__}\(\) got an unexpected keyword argument 'learning_rate'$"
    ):
        case.cls(params, learning_rate=0.1)
    with pytest.raises(TypeError, match="'weight_decouple'; it is decoupled_weight_decay here"):
        case.cls(params, weight_decouple=True)
