"""State keeps its precision and its owner through every way of saving and loading it."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import each_backend, each_case, tolerance
from steps import advance, averages, bits, close, copies, gradients, normal, parameters, results, same, saved
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

NARROW = [torch.bfloat16, torch.float16]
each_narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)


def float_state(optimizer):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [value for p in params for value in averages(optimizer, p).values()]


@each_narrow
@each_case
def test_the_state_of_narrow_parameters_is_float32_after_loading_and_has_its_bits(case, dtype):
    for settings in case.settings.values():
        params = parameters(dtype)
        optimizer = advance(case.cls(params, **settings), gradients(params, 3))
        # Small gradients: their averages are below what float16 can hold.
        advance(optimizer, [[1e-4 * g for g in row] for row in gradients(params, 3, seed=2)])
        other = case.cls(copies(params), **settings)
        other.load_state_dict(saved(optimizer))
        assert {value.dtype for value in float_state(other)} <= {torch.float32}
        assert same(optimizer, other), settings


@each_narrow
@each_case
def test_users_load_hooks_see_the_state_in_its_own_dtype(case, dtype):
    params = parameters(dtype)
    optimizer = advance(case.cls(params), gradients(params, 3))
    other = case.cls(copies(params))
    seen = []
    other.register_load_state_dict_pre_hook(lambda opt, state_dict: copy.deepcopy(state_dict["wrapped"]))
    other.register_load_state_dict_post_hook(lambda opt: seen.append({v.dtype for v in float_state(opt)}))
    other.register_load_state_dict_post_hook(lambda opt: seen.append(same(optimizer, opt)), prepend=True)
    other.load_state_dict({"wrapped": saved(optimizer)})
    assert seen == [True, {torch.float32} if case.states else set()]
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1
    assert len(other._optimizer_load_state_dict_post_hooks) == 2


@each_narrow
@each_case
def test_state_that_torch_had_cast_to_the_parameters_dtype_is_widened_again(case, dtype):
    params = parameters(dtype)
    optimizer = advance(case.cls(params), gradients(params, 2))
    state_dict = saved(optimizer)
    for row in state_dict["state"].values():
        row.update({name: row[name].to(dtype) for name in case.states})
    other = case.cls(copies(params))
    other.load_state_dict(state_dict)
    assert {value.dtype for value in float_state(other)} <= {torch.float32}
    for left, right in zip(results(other), results(optimizer), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance(dtype, 1), atol=1e-6)
    advance(other, gradients(params, 1))


@pytest.mark.parametrize("start", [torch.float64, torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("end", [torch.float64, torch.float32, *NARROW], ids=str)
@each_case
def test_a_run_may_go_on_in_another_dtype(case, start, end):
    params = parameters(start)
    optimizer = advance(case.cls(params), gradients(params, 3))
    cast = [p.detach().to(end).requires_grad_() for p in params]
    other = case.cls(cast)
    other.load_state_dict(saved(optimizer))
    wide = torch.float64 if end is torch.float64 else torch.float32
    assert {value.dtype for value in float_state(other)} <= {wide}
    for left, right in zip(float_state(other), float_state(optimizer), strict=True):
        assert torch.equal(left, right.to(wide))
    advance(other, gradients(cast, 1))
    assert all(other.state[p]["step"] == 4 for p in cast)


@each_backend("differentiable")
def test_state_takes_the_memory_layout_of_the_parameter_it_is_loaded_for(case, backend):
    plain = normal(1, 2, 3, 2, 2).requires_grad_()
    turned = normal(1, 2, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    grads = [normal(9 + t, 2, 3, 2, 2) for t in range(6)]
    optimizer = advance(case.cls([plain], **backend), [[g] for g in grads[:3]])
    with torch.no_grad():
        turned.copy_(plain)
    other = case.cls([turned], **backend)
    other.load_state_dict(saved(optimizer))
    assert all(value.stride() == turned.stride() for value in float_state(other))
    advance(optimizer, [[g] for g in grads[3:]])
    advance(other, [[g.to(memory_format=torch.channels_last)] for g in grads[3:]])
    close(other, optimizer, tolerance(torch.float64, 3))


@each_case
def test_a_whole_number_of_steps_becomes_the_tensor_that_the_step_counts_with(case):
    params = parameters()
    optimizer = advance(case.cls(params), gradients(params, 3))
    state_dict = saved(optimizer)
    for row in state_dict["state"].values():
        row["step"] = 3
    other = case.cls(copies(params))
    other.load_state_dict(state_dict)
    assert same(optimizer, other)
    assert all(bits(other.state[p]["step"]) == bits(torch.tensor(3.0)) for p in other.state)


@each_case
def test_settings_that_a_checkpoint_lacks_stay_this_optimizers(case):
    params = parameters()
    state_dict = saved(advance(case.cls(params, lr=0.5), gradients(params, 2)))
    state_dict["param_groups"][0] = {key: state_dict["param_groups"][0][key] for key in ("params", "lr")}
    settings = dict(lr=0.1, weight_decay=0.3, maximize=True)
    other = case.cls(copies(params), **settings)
    other.load_state_dict(state_dict)
    assert other.param_groups[0]["lr"] == 0.5
    assert other.param_groups[0]["weight_decay"] == 0.3
    assert other.param_groups[0]["maximize"] is True
    assert other.param_groups[0].keys() == case.cls(params).param_groups[0].keys()


@each_case
def test_settings_of_a_users_own_come_with_the_checkpoint(case):
    params = parameters()
    optimizer = case.cls([dict(params=params, layer="head")], lr=1e-3)
    schedule = ExponentialLR(optimizer, 0.5)
    advance(optimizer, gradients(params, 1))
    schedule.step()
    other = case.cls(copies(params))
    other.load_state_dict(saved(optimizer))
    assert other.param_groups[0]["layer"] == "head"
    assert other.param_groups[0]["initial_lr"] == 1e-3
    assert other.param_groups[0]["lr"] == 5e-4


@pytest.mark.parametrize("name", ["weight_decouple", "decoupled_decay"])
@each_case
def test_words_and_step_counts_of_other_libraries_are_understood(case, name):
    # tests/integrations has the libraries themselves.
    params = parameters()
    grads = gradients(params, 4)
    grads[0][1] = grads[1][1] = None  # has no state, and gets none
    optimizer = advance(case.cls(params, weight_decay=0.1, decoupled_weight_decay=True), grads[:2])
    theirs = saved(optimizer)
    theirs["param_groups"][0][name] = theirs["param_groups"][0].pop("decoupled_weight_decay")
    theirs["param_groups"][0]["step"] = 2
    for row in theirs["state"].values():
        del row["step"]
    before = bits(theirs)
    other = case.cls(copies(params), decoupled_weight_decay=False)
    other.load_state_dict(theirs)
    assert bits(theirs) == before
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()
    assert same(advance(other, grads[2:]), advance(optimizer, grads[2:]))


@each_case
def test_a_run_with_a_running_maximum_is_not_continued_without(case):
    state_dict = saved(case.cls(parameters()))
    state_dict["param_groups"][0] |= dict(amsgrad=True)  # which AdaBelief has, but not with its default rectify
    with pytest.raises(ValueError, match="amsgrad=True"):
        case.cls(parameters()).load_state_dict(state_dict)


@each_case
def test_parameters_that_never_had_a_gradient_have_no_state_to_load(case):
    params = parameters()
    grads = gradients(params, 4)
    for row in grads[:2]:
        row[1] = None
    optimizer = advance(case.cls(params), grads[:2])
    state_dict = saved(optimizer)
    assert 1 not in state_dict["state"]
    other = case.cls(copies(params))
    other.load_state_dict(state_dict)
    assert same(advance(optimizer, grads[2:]), advance(other, grads[2:]))
    assert other.state[other.param_groups[0]["params"][1]]["step"] == 2


@each_case
def test_loading_replaces_what_had_been_there(case):
    params = parameters()
    fresh = saved(case.cls(params))
    other = advance(case.cls(params), gradients(params, 3))
    other.load_state_dict(fresh)
    assert not any(other.state.values())


@each_case
def test_loading_leaves_the_dictionary_as_it_was(case):
    params = parameters(torch.bfloat16)
    optimizer = advance(case.cls(params), gradients(params, 2))
    state_dict = saved(optimizer)
    del state_dict["param_groups"][0]["maximize"]
    before = bits(state_dict)
    case.cls(copies(params)).load_state_dict(state_dict)
    assert bits(state_dict) == before


@each_case
def test_a_rule_chosen_by_a_flag_follows_the_checkpoint(case):
    params = parameters()
    for settings in case.settings.values():
        optimizer = advance(case.cls(params, **settings), gradients(params, 2))
        other = case.cls(copies(params))
        other.load_state_dict(saved(optimizer))
        assert same(advance(other, gradients(params, 2)), advance(optimizer, gradients(params, 2))), settings


# torch.distributed.checkpoint


class Model(nn.Module):
    """Layers of several dtypes, one of them never used."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(4, 3), nn.Linear(3, 2).to(torch.bfloat16)
        self.unused = nn.Linear(2, 2)
        with torch.no_grad():
            for i, param in enumerate(self.parameters()):
                param.copy_(normal(i, *param.shape))

    def forward(self, x):
        return self.narrow(self.wide(x).to(torch.bfloat16))


def train(model, optimizer, steps, seed=0):
    for t in range(steps):
        optimizer.zero_grad()
        model(normal(seed + t, 8, 4).float()).float().square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*assuming the intent is to (save|load) in a single process:UserWarning")
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@each_backend("differentiable")
def test_a_distributed_checkpoint_resumes_bitwise(case, backend, flatten, tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    api = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = api.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, resumed = Model(), Model()
    for frozen in (*model.unused.parameters(), *resumed.unused.parameters()):
        frozen.requires_grad_(False)  # torch's functions want state for every parameter that requires gradients
    optimizer = case.cls([p for p in model.parameters() if p.requires_grad], lr=0.05, **backend)
    train(model, optimizer, 3)
    state = {"optimizer": api.get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)

    resumed.load_state_dict(model.state_dict())
    other = case.cls([p for p in resumed.parameters() if p.requires_grad], lr=0.5, **backend)
    loaded = {"optimizer": api.get_optimizer_state_dict(resumed, other, options=options)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    api.set_optimizer_state_dict(resumed, other, loaded["optimizer"], options=options)
    assert other.param_groups[0]["lr"] == 0.05
    for m, opt in ((model, optimizer), (resumed, other)):
        train(m, opt, 3, seed=50)
    assert same(optimizer, other)
