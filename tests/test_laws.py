"""Laws that every elementwise step obeys, over drawn shapes, values, options and back-ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import BACKENDS, CASES, Case, each_elementwise, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from steps import advance, bits, results, saved
from torch import Tensor
from torch.optim import Optimizer

# Gradients over the magnitudes that training meets, and zero.
MAGNITUDES = st.one_of(
    st.just(0.0), st.floats(1e-6, 8.0), st.floats(-8.0, -1e-6), st.sampled_from([1e-30, -1e30, 1e4, -1e-12])
)
ROUNDED = tolerance(torch.float64, 6)


def arrays(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, shape, elements=MAGNITUDES)


def weights(case: Case, *shape: int) -> st.SearchStrategy[Tensor]:
    """Parameters; without zeros for a class that does not take them."""
    sizes = st.floats(1e-3, 3) | st.floats(-3, -1e-3) if "zeros" in case.refuses else st.floats(-3, 3)
    return hnp.arrays(np.float64, shape, elements=sizes).map(torch.from_numpy)


@st.composite
def problems(draw: st.DrawFn, case: Case) -> tuple[dict, Tensor, list[Tensor]]:
    """Options, a matrix of parameters, and a few gradients for it."""
    options = draw(st.sampled_from(list(case.settings.values())))
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    steps = draw(st.integers(1, 6))
    return options, draw(weights(case, *shape)), list(torch.from_numpy(draw(arrays(steps, *shape))).unbind())


def backends(case: Case, *without: str) -> st.SearchStrategy[dict]:
    return st.sampled_from([options for name, options in case.backends.items() if name not in without])


def after(case: Case, params: list[Tensor], grads: list[list[Tensor]], **options) -> Optimizer:
    """The optimizer after a step for each row of gradients, on copies of the parameters."""
    leaves = [p.clone().requires_grad_(not options.get("differentiable")) for p in params]
    return advance(case.cls(leaves, **options), grads)


def assert_rounded(left: list[Tensor], right: list[Tensor]) -> None:
    """Equal up to what rounding costs; a drawn gradient of 1e30 makes that a matter of relative error alone."""
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=ROUNDED, atol=ROUNDED)


@each_elementwise
@given(data=st.data())
def test_all_back_ends_are_the_same_step(case, data):
    options, param, grads = data.draw(problems(case))
    rows = [[g] for g in grads]
    single = results(after(case, [param], rows, **options, **BACKENDS["single"]))
    for backend in case.backends.values():
        assert_rounded(results(after(case, [param], rows, **options, **backend)), single)


@each_elementwise
@given(data=st.data())
def test_a_tensor_split_in_two_is_the_whole(case, data):
    options, param, grads = data.draw(problems(case))
    backend = data.draw(backends(case))
    cut = data.draw(st.integers(0, len(param)))
    whole = results(after(case, [param], [[g] for g in grads], **options, **backend))
    parts = after(case, [param[:cut], param[cut:]], [[g[:cut], g[cut:]] for g in grads], **options, **backend)
    (first, second) = parts.param_groups[0]["params"]
    for i, name in enumerate([None, *sorted(parts.state[first])]):
        if name != "step":
            pieces = [p.detach() if name is None else parts.state[p][name] for p in (first, second)]
            assert_rounded([torch.cat(pieces)], [whole[i]])


@each_elementwise
@given(data=st.data())
def test_permuting_and_reshaping_commute_with_a_step(case, data):
    options, param, grads = data.draw(problems(case))
    backend = data.draw(backends(case))
    order = torch.tensor(data.draw(st.permutations(range(param.numel()))))
    moved = after(case, [param.flatten()[order]], [[g.flatten()[order]] for g in grads], **options, **backend)
    plain = after(case, [param], [[g] for g in grads], **options, **backend)
    for left, right in zip(results(moved), results(plain), strict=True):
        assert_rounded([left], [right.flatten()[order] if right.dim() else right])


@each_elementwise
@given(data=st.data())
def test_transposed_memory_commutes_with_a_step(case, data):
    options, param, grads = data.draw(problems(case))
    backend = data.draw(backends(case))
    turned = after(case, [param.t()], [[g.t()] for g in grads], **options, **backend)
    plain = after(case, [param], [[g] for g in grads], **options, **backend)
    assert_rounded([t.t() if t.dim() else t for t in results(turned)], results(plain))


@each_elementwise
@given(data=st.data())
def test_maximizing_is_minimizing_with_the_opposite_gradient(case, data):
    options, param, grads = data.draw(problems(case))
    options = {**options, **data.draw(backends(case))}
    sign = options.pop("maximize", False)
    up = after(case, [param], [[g] for g in grads], maximize=not sign, **options)
    down = after(case, [param], [[-g] for g in grads], maximize=sign, **options)
    # Zero gradients meet here as 0.0 and -0.0, which are equal.
    assert all(torch.equal(left, right) for left, right in zip(results(up), results(down), strict=True))


@each_elementwise
@given(data=st.data())
def test_frozen_and_empty_parameters_change_nothing(case, data):
    options, param, grads = data.draw(problems(case))
    options = {**options, **data.draw(backends(case))}
    frozen, empty = torch.full((3,), 2.0, dtype=torch.float64), torch.empty(0, 4, dtype=torch.float64)
    crowd = after(case, [frozen, param, empty], [[None, g, empty] for g in grads], **options)
    alone = after(case, [param], [[g] for g in grads], **options)
    (kept, stepped, none), (single,) = crowd.param_groups[0]["params"], alone.param_groups[0]["params"]
    assert kept not in crowd.state
    assert (kept == 2).all()
    assert none.shape == (0, 4)
    assert bits(stepped) == bits(single)
    assert bits(dict(crowd.state[stepped])) == bits(dict(alone.state[single]))


@each_elementwise
@given(data=st.data())
def test_saving_and_loading_between_two_steps_leaves_no_trace(case, data):
    options, param, grads = data.draw(problems(case))
    options = {**options, **data.draw(backends(case, "differentiable"))}
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    param, rows = param.to(dtype), [[g.clamp(-1e4, 1e4).to(dtype)] for g in grads]
    cut = data.draw(st.integers(0, len(rows)))
    first = after(case, [param], rows[:cut], **options)
    second = case.cls([first.param_groups[0]["params"][0].detach().clone().requires_grad_()], **options)
    second.load_state_dict(saved(first))
    whole = after(case, [param], rows, **options)
    assert [bits(t) for t in results(advance(second, rows[cut:]))] == [bits(t) for t in results(whole)]


@each_elementwise
@given(data=st.data())
def test_two_groups_of_equal_settings_are_one(case, data):
    options, param, grads = data.draw(problems(case))
    options = {**options, **data.draw(backends(case))}
    requires = not options.get("differentiable")
    pairs = [[g, 2 * g] for g in grads]
    one = after(case, [param, param], pairs, **options)
    leaves = [param.clone().requires_grad_(requires) for _ in range(2)]
    two = advance(case.cls([dict(params=[leaf]) for leaf in leaves], **options), pairs)
    assert [bits(t) for t in results(one)] == [bits(t) for t in results(two)]


@each_elementwise
@given(data=st.data())
def test_a_non_finite_gradient_stays_in_its_element(case, data):
    options, param, grads = data.draw(problems(case))
    options = {**options, **data.draw(backends(case))}
    where = data.draw(st.integers(0, param.numel() - 1))
    bad = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    poisoned = [g.clone() for g in grads]
    poisoned[0].flatten()[where] = bad
    left = results(after(case, [param], [[g] for g in poisoned], **options))
    right = results(after(case, [param], [[g] for g in grads], **options))
    elsewhere = torch.arange(param.numel()) != where
    for a, b in zip(left, right, strict=True):
        assert_rounded([a.flatten()[elsewhere]] if a.dim() else [a], [b.flatten()[elsewhere]] if b.dim() else [b])
    if "non-finite" in case.refuses and options.get("dale", True):
        assert all(t.isfinite().all() for t in left)
    else:
        assert any(t.dim() and not t.flatten()[where].isfinite() for t in left)


@each_elementwise
@given(data=st.data())
def test_a_step_depends_on_a_gradient_and_never_touches_it(case, data):
    options, param, grads = data.draw(problems(case))
    leaf = param.clone().requires_grad_()
    optimizer = case.cls([leaf], **options, **data.draw(backends(case, "differentiable")))
    for grad in grads:
        leaf.grad = grad.clone()
        version = leaf.grad._version
        optimizer.step()
        assert bits(leaf.grad) == bits(grad)
        assert leaf.grad._version == version


@each_elementwise
@given(data=st.data())
def test_steps_of_lists_and_of_numbers_count_alike_per_parameter(case, data):
    # Every parameter has gradients on steps of its own choice, so that a call meets several step counts.
    options, param, grads = data.draw(problems(case))
    present = data.draw(hnp.arrays(bool, (len(grads), 3)))
    rows = [[g if here else None for here in row] for g, row in zip(grads, present, strict=True)]
    reference = None
    for name in {"single", "foreach", "fused", "capturable", "capturable-foreach"} & case.backends.keys():
        optimizer = after(case, [param] * 3, rows, **options, **BACKENDS[name])
        leaves = optimizer.param_groups[0]["params"]
        counts = [int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in leaves]
        assert counts == present.sum(axis=0).tolist()
        reference = reference or results(optimizer)
        assert_rounded(results(optimizer), reference)


@each_elementwise
@settings(max_examples=15)
@given(data=st.data())
def test_decay_alone_is_what_it_says(case, data):
    # With zero gradients a decoupled decay is all that moves a parameter, in every back-end alike.
    lr, decay = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 0.9))
    steps = data.draw(st.integers(1, 8))
    param = data.draw(weights(case, 5))
    options = dict(lr=lr, weight_decay=decay, decoupled_weight_decay=True)
    optimizer = after(case, [param], [[torch.zeros_like(param)]] * steps, **options, **data.draw(backends(case)))
    torch.testing.assert_close(results(optimizer)[0], param * (1 - lr * decay) ** steps, rtol=1e-13, atol=1e-300)


def test_the_laws_cover_every_class_that_claims_a_native_step():
    assert [case for case in CASES if case.elementwise]
    for case in CASES:
        if case.elementwise:
            assert case.cls([torch.ones(1, requires_grad=True)], fused=True)


@pytest.mark.parametrize("name", ["single", "foreach", "fused"])
@each_elementwise
def test_a_thousand_small_tensors_are_one_large_one(case, name):
    size, count = 37, 1000
    whole = torch.linspace(-1, 1, size * count)
    grads = [torch.sin(whole * 9 + t) for t in range(3)]
    large = after(case, [whole], [[g] for g in grads], **BACKENDS[name])
    small = after(case, list(whole.split(size)), [list(g.split(size)) for g in grads], **BACKENDS[name])
    pieces = torch.cat([p.detach() for p in small.param_groups[0]["params"]])
    torch.testing.assert_close(
        pieces, results(large)[0], rtol=tolerance(torch.float32, 3), atol=tolerance(torch.float32, 3)
    )
