"""AdaGradNorm: one accumulator for all parameters, in every back-end and through everything that a class promises."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from cases import BACKENDS, ROUNDOFF, tolerance
from reference import adagradnorm
from steps import LAYOUTS, advance, bits, copies, gradients, normal, parameters, same, saved, snapshot

from optimzoo import AdaGradNorm

SETTINGS = {
    "defaults": {},
    "small-b0": dict(b0=1e-3, lr=0.3),
    "decay": dict(weight_decay=0.1),
    "decay-maximize": dict(weight_decay=0.1, maximize=True),
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=list(BACKENDS))
COLLECTED = [name for name in LAYOUTS if name != "empty"]


def value(optimizer: AdaGradNorm) -> float:
    """The accumulator, which must be one number."""
    (number,) = {row["sum_sq"].item() for row in optimizer.state.values()}
    return number


@each_setting
@each_backend
def test_float64_follows_the_reference(settings, backend):
    params = parameters(requires_grad=not backend.get("differentiable"))
    optimizer = AdaGradNorm(params, **settings, **backend)
    states = [dict(param=p.numpy(force=True).copy()) for p in params]
    with torch.no_grad():
        for t, row in enumerate(gradients(params, 50)):
            present = [None if i == 1 and t < 3 else grad for i, grad in enumerate(row)]
            adagradnorm.step(states, [None if g is None else g.numpy() for g in present], **settings)
            for param, grad in zip(params, present, strict=True):
                param.grad = grad
            optimizer.step()
            for param, state in zip(params, states, strict=True):
                np.testing.assert_allclose(param.numpy(force=True), state["param"], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(value(optimizer), states[0]["sum_sq"], rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [BACKENDS[name] for name in ("single", "foreach", "fused")], ids=str)
def test_narrow_parameters_follow_it_to_rounding(dtype, backend):
    params = parameters(dtype)
    optimizer = AdaGradNorm(params, **backend)
    states = [dict(param=None) for _ in params]
    for row in gradients(params, 20):
        for param, state, grad in zip(params, states, row, strict=True):
            state["param"], param.grad = param.detach().double().numpy(), grad
        adagradnorm.step(states, [grad.double().numpy() for grad in row])
        optimizer.step()
        for param, state in zip(params, states, strict=True):
            close = (ROUNDOFF[dtype] if dtype is not torch.float32 else 0) + tolerance(torch.float32, 20)
            np.testing.assert_allclose(param.detach().double().numpy(), state["param"], rtol=close, atol=close)


@each_backend
def test_the_first_step_has_the_length_that_the_formula_says(backend):
    param = normal(1, 10).requires_grad_(not backend.get("differentiable"))
    before, grad = param.detach().clone(), normal(2, 10)
    with torch.no_grad():
        advance(AdaGradNorm([param], lr=2.0, b0=0.5, **backend), [[grad]])
    length = (2 * grad.norm() / (0.25 + grad.square().sum()).sqrt()).item()
    assert (param.detach() - before).norm().item() == pytest.approx(length, rel=1e-13)


def test_a_constant_gradient_gives_steps_like_one_over_the_root_of_time():
    param = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer, positions = AdaGradNorm([param], b0=1e-12), []
    for _ in range(9):
        advance(optimizer, [[torch.ones(1, dtype=torch.float64)]])
        positions.append(param.item())
    steps = np.diff([0.0, *positions])
    np.testing.assert_allclose(steps, [-1 / math.sqrt(t) for t in range(1, 10)], rtol=1e-12)


def test_a_rotation_of_all_coordinates_commutes_with_a_step():
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0])
    start, rows = normal(1, 6), [normal(t, 6) for t in range(2, 6)]
    plain, turned = start.clone().requires_grad_(), (turn @ start).requires_grad_()
    advance(AdaGradNorm([plain], weight_decay=0.1), [[g] for g in rows])
    advance(AdaGradNorm([turned], weight_decay=0.1), [[turn @ g] for g in rows])
    torch.testing.assert_close(turned.detach(), turn @ plain.detach(), rtol=1e-12, atol=1e-12)


def test_a_tensor_split_in_two_and_two_groups_are_the_whole():
    start, rows = normal(1, 6, 4), [normal(t, 6, 4) for t in range(2, 6)]
    whole = start.clone().requires_grad_()
    advance(AdaGradNorm([whole]), [[g] for g in rows])
    for groups in (lambda a, b: [a, b], lambda a, b: [dict(params=[a]), dict(params=[b])]):
        parts = [part.clone().requires_grad_() for part in start.split([2, 4])]
        advance(AdaGradNorm(groups(*parts)), [list(g.split([2, 4])) for g in rows])
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-13, atol=0)


def test_groups_may_have_accumulators_of_their_own():
    params, rows = parameters(), gradients(parameters(), 4)
    groups = [dict(params=params[:2], b0=0.5), dict(params=params[2:], lr=0.1)]
    optimizer = advance(AdaGradNorm(groups, per_group=True), rows)
    alone = parameters()
    first = advance(AdaGradNorm(alone[:2], b0=0.5), [row[:2] for row in rows])
    second = advance(AdaGradNorm(alone[2:], lr=0.1), [row[2:] for row in rows])
    expected = [*first.param_groups[0]["params"], *second.param_groups[0]["params"]]
    assert [bits(p) for p in params] == [bits(p) for p in expected]
    assert value(first) != value(second)
    assert optimizer.state[params[0]]["sum_sq"] == value(first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_backend
def test_a_resumed_copied_or_pickled_run_is_bitwise_the_whole(dtype, backend):
    if backend.get("differentiable"):
        return  # there is no state outside the graph
    start = parameters(dtype)
    rows = gradients(start, 6)
    whole = advance(AdaGradNorm(copies(start), **backend), rows)
    half = advance(AdaGradNorm(copies(start), **backend), rows[:3])
    resumed = AdaGradNorm(copies(half.param_groups[0]["params"]), **backend)
    resumed.load_state_dict(saved(half))
    assert resumed.state[resumed.param_groups[0]["params"][0]]["sum_sq"].dtype is torch.float64
    for other in (resumed, copy.deepcopy(half), pickle.loads(pickle.dumps(half))):
        assert same(advance(other, rows[3:]), whole)


def test_a_parameter_that_joins_late_starts_from_the_common_accumulator():
    first, second = parameters(layouts=["vector", "transposed"])
    optimizer = advance(AdaGradNorm([first]), [[g[0]] for g in gradients([first], 2)])
    known = value(optimizer)
    optimizer.add_param_group(dict(params=[second]))
    advance(optimizer, [[None, torch.ones_like(second)]])
    assert value(optimizer) == pytest.approx(known + 15, rel=1e-15)


@pytest.mark.parametrize("backend", [BACKENDS[name] for name in ("single", "foreach", "fused")], ids=str)
def test_a_complex_parameter_is_its_real_and_imaginary_parts(backend):
    param = torch.view_as_complex(normal(1, 6, 2)).requires_grad_()
    real = torch.view_as_real(param.detach()).clone().requires_grad_()
    one, two = AdaGradNorm([param], weight_decay=0.1, **backend), AdaGradNorm([real], weight_decay=0.1, **backend)
    for t in range(5):
        grad = normal(10 + t, 6, 2)
        advance(one, [[torch.view_as_complex(grad)]])
        advance(two, [[grad]])
    torch.testing.assert_close(torch.view_as_real(param.detach()), real.detach(), rtol=1e-13, atol=1e-13)
    assert value(one) == pytest.approx(value(two), rel=1e-13)


def test_hooks_run_around_the_step():
    params = [torch.ones(3, requires_grad=True)]
    optimizer, seen = AdaGradNorm(params), []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(len(opt.state)))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(float(value(opt)) - 0.01))
    advance(optimizer, [[torch.ones(3)]])
    assert seen == [0, 3.0]


def test_a_scaler_divides_and_skips():
    params, grads = parameters(torch.float32, COLLECTED), gradients(parameters(torch.float32, COLLECTED), 3)
    plain = advance(AdaGradNorm(copies(params)), grads)
    optimizer = AdaGradNorm(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for t, row in enumerate([*grads[:2], [torch.full_like(p, math.inf) for p in params], grads[2]]):
        scale = scaler.get_scale()
        for param, grad in zip(params, row, strict=True):
            param.grad = grad * scale
        scaler.scale(torch.zeros(()))
        before = snapshot(optimizer)[:2] if t == 2 else None
        scaler.step(optimizer)
        scaler.update()
        assert t != 2 or snapshot(optimizer)[:2] == before
    torch.testing.assert_close(params, plain.param_groups[0]["params"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", [BACKENDS[name] for name in ("single", "foreach", "fused")], ids=str)
def test_a_compiled_step_is_one_graph_with_the_eager_numbers(backend):
    torch._dynamo.reset()
    params = parameters(torch.float32, ["scalar", "vector"])
    grads = gradients(params, 4)
    eager = advance(AdaGradNorm(copies(params), weight_decay=0.1, **backend), grads)
    optimizer = AdaGradNorm(params, weight_decay=0.1, lr=torch.tensor(1.0), **backend)
    compiled = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        compiled()
    torch.testing.assert_close(params, eager.param_groups[0]["params"], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_autograd_differentiates_differentiable_steps():
    def after(start, grad, lr):
        param = start.clone()
        optimizer = AdaGradNorm([param], lr=lr, weight_decay=0.1, differentiable=True)
        for factor in (1.0, 1.5):
            param.grad = factor * grad
            optimizer.step()
        return param

    inputs = [normal(1, 3), normal(2, 3), torch.tensor(0.3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(after, [x.requires_grad_() for x in inputs])


def test_a_least_squares_problem_is_solved_whatever_its_scale():
    for scale in (1e-3, 1.0, 1e3):
        inputs = normal(3, 50, 4)
        x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        optimizer = AdaGradNorm([x], lr=3.0, b0=1e-6)
        for _ in range(3000):
            optimizer.zero_grad()
            (scale * (inputs @ x - inputs.sum(1)).square().mean()).backward()
            optimizer.step()
        assert (x - 1).abs().max() < 1e-3


def test_sums_of_squares_do_not_lose_small_gradients_beside_large_ones():
    params = [torch.ones(10_000, requires_grad=True) for _ in range(100)]
    optimizer = AdaGradNorm(params, lr=0.0, b0=1e-20)
    advance(optimizer, [[torch.full((10_000,), 0.1) for _ in params]])
    assert value(optimizer) == pytest.approx(1e6 * float(np.float32(0.1)) ** 2, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(b0=0.0), "b0 must be finite and > 0, got 0.0"),
        (dict(b0=-1.0), "b0 must be"),
        (dict(b0=math.nan), "b0 must be"),
        (dict(lr=-1.0), "lr must be"),
        (dict(decoupled_weight_decay=True), r"unexpected|decoupled_weight_decay must be False"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        AdaGradNorm(parameters(), **options)


def test_settings_of_a_shared_accumulator_are_shared():
    params = parameters()
    with pytest.raises(ValueError, match="b0 must be the same in all groups"):
        AdaGradNorm([dict(params=params[:2]), dict(params=params[2:], b0=1.0)])
    with pytest.raises(ValueError, match="decoupled_weight_decay must be False"):
        AdaGradNorm([dict(params=params, decoupled_weight_decay=True)])
    with pytest.raises(TypeError, match="per_group must be True or False"):
        AdaGradNorm(params, per_group="yes")


def test_a_sparse_gradient_is_refused_before_anything_changes():
    param = torch.ones(4, 2, requires_grad=True)
    optimizer = AdaGradNorm([param])
    param.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="AdaGradNorm does not take sparse gradients"):
        optimizer.step()
    assert not optimizer.state


def test_a_checkpoint_without_the_accumulator_is_refused():
    params = parameters()
    optimizer = advance(AdaGradNorm(params), gradients(params, 1))
    state_dict = saved(optimizer)
    del state_dict["state"][1]["sum_sq"]
    with pytest.raises(ValueError, match=r"parameter 1.*needs step, sum_sq"):
        AdaGradNorm(copies(params)).load_state_dict(state_dict)


def test_groups_with_and_without_an_accumulator_of_their_own_mix():
    a, b = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    groups = [dict(params=[a], per_group=True, b0=100.0), dict(params=[b])]
    optimizer = advance(AdaGradNorm(groups), [[torch.ones(1, dtype=torch.float64)] * 2])
    assert optimizer.state[a]["sum_sq"].item() == 10001
    assert optimizer.state[b]["sum_sq"].item() == pytest.approx(1.01)


@each_backend
def test_a_step_that_fails_leaves_the_accumulator(backend):
    if backend.get("differentiable"):
        return
    params = parameters(torch.float32, COLLECTED)
    optimizer = advance(AdaGradNorm(params, **backend), gradients(params, 1))
    before = value(optimizer)
    params[1].data = torch.ones(3)
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        optimizer.step()
    assert value(optimizer) == before


def test_float16_gradients_do_not_overflow_where_the_sum_is_not_native():
    param = torch.ones(4, dtype=torch.float16, requires_grad=True)
    optimizer = AdaGradNorm([param])
    param.grad = torch.full((1,), 300.0, dtype=torch.float16).expand(4)
    optimizer.step()
    assert value(optimizer) == pytest.approx(360000.01, rel=1e-7)


def test_all_parameters_share_one_accumulator_after_loading_too():
    params = parameters()
    optimizer = advance(AdaGradNorm(params), gradients(params, 1))
    other = AdaGradNorm(copies(params))
    other.load_state_dict(saved(optimizer))
    for one in (optimizer, other):
        assert len({id(row["sum_sq"]) for row in one.state.values()}) == 1
