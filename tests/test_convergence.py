"""Methods reach the minimum of functions whose minimum is known, from drawn starts and in drawn coordinates.

Each method has a budget and a tolerance of the solution. What theory says of its coordinates holds step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import BACKENDS, CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import optimzoo
from optimzoo.functions import Scene, scene
from optimzoo.functions import rotation as drawn_rotation
from optimzoo.trajectories import METHODS, paths

# The learning rate that each method starts from; it falls to zero over the run, and with it the size of the last steps.
RATES = {"DiffGrad": dict(lr=0.3), "AdaBelief": dict(lr=0.1, rectify=False, eps=1e-12)}
DEFAULT_RATE = dict(lr=0.1)

each_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])


def minimize(case: Any, function: Callable[[Tensor], Tensor], start: Tensor, steps: int, **options: Any) -> Tensor:
    """Where a run ends whose learning rate falls like a half cosine."""
    x = start.clone().requires_grad_()
    optimizer = case.cls([x], **{**RATES.get(case.name, DEFAULT_RATE), **options})
    schedule = LambdaLR(optimizer, lambda t: 0.5 * (1 + np.cos(np.pi * t / steps)))
    for _ in range(steps):
        optimizer.zero_grad()
        function(x).backward()
        optimizer.step()
        schedule.step()
    return x.detach()


# Methods that keep signs cannot go everywhere; test_dale.py shows where they go.
each_free = pytest.mark.parametrize("case", [case for case in CASES if "zeros" not in case.refuses], ids=repr)
STARTS = st.lists(st.floats(-3, 3), min_size=3, max_size=3).map(lambda x: torch.tensor(x, dtype=torch.float64))


@each_free
@settings(max_examples=6)
@given(start=STARTS, turn=st.integers(0, 1000), log_condition=st.floats(0, 1.5))
def test_a_rotated_quadratic_is_solved(case, start, turn, log_condition):
    basis = drawn_rotation(3, turn)
    curvature = torch.logspace(0, log_condition, 3, dtype=torch.float64)
    minimum = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    end = minimize(case, lambda x: (curvature * (basis @ (x - minimum)) ** 2).sum() / 2, start, 600)
    assert (end - minimum).abs().max() < 1e-3


@each_free
@settings(max_examples=4)
@given(x=st.floats(-1.5, 1.5), y=st.floats(-0.5, 2.0))
def test_the_curved_valley_of_rosenbrock_leads_to_its_minimum(case, x, y):
    def rosenbrock(p: Tensor) -> Tensor:
        return (1 - p[0]) ** 2 + 20 * (p[1] - p[0] ** 2) ** 2

    end = minimize(case, rosenbrock, torch.tensor([x, y], dtype=torch.float64), 2500)
    assert (end - 1).abs().max() < 0.02


@each_free
@settings(max_examples=4)
@given(start=STARTS, turn=st.integers(0, 1000))
def test_noise_in_the_gradient_averages_out(case, start, turn):
    noise = torch.from_numpy(np.random.default_rng(turn).standard_normal((1500, 3)))
    calls = iter(noise)
    end = minimize(case, lambda x: (x**2).sum() / 2 + (x * next(calls)).sum(), start, 1500)
    assert end.abs().max() < 0.3


@each_free
def test_maximizing_climbs_to_the_top(case):
    start = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    end = minimize(case, lambda x: -((x - 1) ** 2).sum(), start, 600, maximize=True)
    assert (end - 1).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["single", "foreach", "fused"])
@each_free
def test_a_linear_regression_is_solved_in_every_back_end(case, name, dtype):
    inputs = torch.from_numpy(np.random.default_rng(5).standard_normal((64, 4))).to(dtype)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=dtype)
    targets = inputs @ weights
    options = BACKENDS[name] if case.elementwise else {}
    start = torch.zeros(4, dtype=dtype)
    end = minimize(case, lambda w: (inputs @ w - targets).square().mean(), start, 400, **options)
    assert (end.float() - weights.float()).abs().max() < (0.01 if dtype is torch.float32 else 0.1)


# The whole zoo on scenes


class Plan(NamedTuple):
    """How a method runs on scenes, and what it must reach: its steps and, of the solution, its tolerance.

    ``noisy`` is the tolerance under noise of deviation 0.3 in each coordinate of the gradient.
    """

    options: dict[str, Any]
    steps: int
    within: float
    noisy: float


# CBO sees values, which have no noise. A learning rate that LanczosLR or a search has found does not fall by itself.
PLANS: dict[str, Plan] = {
    "diffgrad": Plan(dict(lr=0.3), 400, 1e-3, 0.3),
    "adabelief": Plan(dict(lr=0.1, eps=1e-12), 400, 1e-3, 0.3),
    "dalesgd": Plan(dict(lr=0.03), 400, 1e-3, 0.3),
    "daleadamw": Plan(dict(lr=0.1), 400, 1e-3, 0.3),
    "dalelangevin": Plan(dict(lr=0.03, temperature=0.0, s=0.0), 400, 1e-3, 0.3),
    "adagradnorm": Plan(dict(lr=4.0), 400, 1e-3, 0.3),
    "cbo": Plan(dict(n_particles=200, sigma=1.0, alpha=1e4, init_std=2.0), 150, 0.2, 0.2),
    "sso": Plan(dict(lr=0.1), 250, 1e-3, 0.5),
    "lanczos": Plan(dict(lr=1.0), 250, 1e-3, 0.5),
}
each_method = pytest.mark.parametrize("name", PLANS)
POSITIVE = st.lists(st.floats(0.5, 4.0), min_size=3, max_size=3).map(lambda x: torch.tensor(x, dtype=torch.float64))
CONDITION = st.floats(1.0, 20.0)


def bowl(turn: int, condition: float) -> Scene:
    """A rotated quadratic with its minimum at (2, 2, 2): methods that keep signs reach it from positive starts."""
    flat = scene("quadratic", 3).stretched(condition / 100)
    return flat.rotated(drawn_rotation(3, turn)).shifted(2.0)


def ends(name: str, it: Scene, start: Tensor) -> Tensor:
    """Where a method ends, whose learning rate falls like a half cosine if a gradient is all it takes."""
    plan, entry = PLANS[name], METHODS[name]
    if entry.drive is not None:
        return paths(it, name, [plan.options], start, plan.steps).points[0, 0, -1]
    x = start.clone().requires_grad_()
    optimizer = entry.make([x], **{**entry.options, **plan.options})
    schedule = LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / plan.steps)))
    for step in range(plan.steps):
        optimizer.zero_grad()
        it.sample(x, step).sum().backward()
        optimizer.step()
        schedule.step()
    return x.detach()


def test_every_public_optimizer_is_in_the_plan_or_below():
    every = {getattr(optimzoo, name) for name in optimzoo.__all__}
    optimizers = {cls.__name__ for cls in every if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)}
    planned = {METHODS[name].make.__name__ for name in PLANS}
    # Private ones solve least squares in test_dicesgd.py.
    assert optimizers - planned == {"TPSGD", "DPSGD", "DiceSGD"}
    assert planned - optimizers == {"LanczosLR"}


@each_method
@settings(max_examples=3)
@given(start=POSITIVE, turn=st.integers(0, 1000), condition=CONDITION)
def test_the_zoo_solves_rotated_quadratics(name, start, turn, condition):
    it = bowl(turn, condition)
    assert it.distance(ends(name, it, start)) < PLANS[name].within


@each_method
@settings(max_examples=2)
@given(start=POSITIVE, seed=st.integers(0, 1000))
def test_the_zoo_averages_noise_out(name, start, seed):
    it = bowl(seed, 5.0).noisy(0.3, seed=seed)
    assert it.distance(ends(name, it, start)) < PLANS[name].noisy


@each_method
@settings(max_examples=2)
@given(x=st.floats(2.2, 4.5), y=st.floats(0.8, 3.0))
def test_the_zoo_ends_in_the_valley_that_it_starts_in(name, x, y):
    it = scene("himmelblau").scaled(0.1)
    start = torch.tensor([x, y], dtype=torch.float64)
    assert (ends(name, it, start) - it.minima[0]).abs().max() < max(0.02, PLANS[name].within)


@settings(max_examples=4)
@given(seed=st.integers(0, 1000), condition=st.floats(1.0, 10.0))
def test_target_projection_solves_the_layer_that_has_the_true_loss(seed, condition):
    draw = torch.Generator().manual_seed(seed)
    units = torch.logspace(0, math.log10(condition) / 2, 3, dtype=torch.float64)
    inputs = torch.linalg.qr(torch.randn(40, 3, dtype=torch.float64, generator=draw))[0] * 40**0.5 * units
    weights = torch.randn(2, 3, dtype=torch.float64, generator=draw)
    model = torch.nn.Linear(3, 2, bias=False).double()
    optimizer = optimzoo.TPSGD(model, lr=1.0 / condition, target_dim=2)
    for _ in range(200):
        optimizer.zero_grad()
        with optimizer.targets(inputs @ weights.T, loss=lambda y, t: (y - t).square().sum(-1).mean() / 2):
            model(inputs)
        optimizer.step()
    assert (model.weight - weights).abs().max() < 1e-3


@settings(max_examples=3)
@given(seed=st.integers(0, 1000))
def test_growing_batches_end_nearer_than_the_first_batch_size(seed):
    draw = torch.Generator().manual_seed(seed)
    data = torch.randn(512, 2, dtype=torch.float64, generator=draw) + 1.0
    gaps = []
    for eta in (0.5, 1e9):  # the second never grows
        x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=0.3)
        sampler = optimzoo.AdaptiveBatchSampler(range(512), 4, generator=torch.Generator().manual_seed(seed))
        adaptive = optimzoo.AdaptiveBatchSize(optimizer, sampler, eta=eta, max_growth=2.0)
        apart = []
        for _ in range(3):
            for batch in sampler:
                rows = x.detach() - data[list(batch)]
                x.grad, x.grad_sample = rows.mean(0), rows
                optimizer.step()
                adaptive.step()
                apart.append(float((x - data.mean(0)).detach().norm()))
        gaps.append(np.mean(apart[-5:]))
    assert gaps[0] < 0.5 * gaps[1]


# Invariances


def few_steps(name: str, it: Scene, start: Tensor, steps: int = 12, **options: Any) -> Tensor:
    return paths(it, name, [{**PLANS[name].options, **options}], start, steps).points[0, 0]


free = [name for name in PLANS if not name.startswith("dale")]  # zero is a place of its own to those
SHIFTS = st.lists(st.floats(-5, 5), min_size=3, max_size=3).map(lambda x: torch.tensor(x, dtype=torch.float64))


@pytest.mark.parametrize("name", free)
@settings(max_examples=3)
@given(start=STARTS, shift=SHIFTS, turn=st.integers(0, 1000))
def test_a_translation_moves_the_path(name, start, shift, turn):
    it = bowl(turn, 8.0)
    moved = few_steps(name, it.shifted(shift), start + shift)
    torch.testing.assert_close(moved, few_steps(name, it, start) + shift, rtol=1e-6, atol=1e-6)


# With the smallest of what else has the gradient's unit. The factor of LanczosLR's loss is large, since from a flat one
# it learns in several looks.
NORMALISED = {
    "adabelief": (dict(eps=1e-300), 0),
    "daleadamw": (dict(eps=0.0), 0),
    "adagradnorm": (dict(b0=1e-100), 0),
    "lanczos": (dict(), 26),
}


@pytest.mark.parametrize("name", NORMALISED)
@settings(max_examples=4)
@given(start=POSITIVE, exponent=st.integers(-20, 20))
def test_a_factor_of_the_loss_changes_no_path_of_a_normalised_method(name, start, exponent):
    options, more = NORMALISED[name]
    it = bowl(3, 8.0).scaled(2.0**more)
    found = few_steps(name, it.scaled(2.0**exponent), start, **options)
    torch.testing.assert_close(found, few_steps(name, it, start, **options), rtol=1e-6, atol=1e-6)


def test_a_factor_of_the_loss_changes_no_path_of_consensus_with_its_alpha_divided():
    it, start = bowl(1, 5.0), torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    found = few_steps("cbo", it.scaled(8.0), start, alpha=50.0 / 8)
    torch.testing.assert_close(found, few_steps("cbo", it, start, alpha=50.0), rtol=1e-9, atol=1e-9)


def turned(it: Scene, turn: int) -> tuple[Scene, Callable[[Tensor], Tensor]]:
    matrix, middle = drawn_rotation(it.dim, turn), it.box.mean(1)
    return it.rotated(matrix), lambda x: (x - middle) @ matrix.T + middle


@pytest.mark.parametrize("name", ["sgd", "momentum", "adagradnorm", "sso", "lanczos"])
@settings(max_examples=4)
@given(start=STARTS, turn=st.integers(0, 1000))
def test_a_rotation_turns_the_path_of_methods_with_one_step_size(name, start, turn):
    it = scene("quadratic", 3).stretched(0.1)
    rotated, forth = turned(it, turn)
    options = [PLANS[name].options if name in PLANS else dict(lr=0.05)]
    one = paths(it, name, options, start, 15).points[0, 0]
    two = paths(rotated, name, options, forth(start), 15).points[0, 0]
    torch.testing.assert_close(two, forth(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["diffgrad", "adabelief", "daleadamw"])
def test_a_rotation_is_seen_by_methods_with_a_step_size_for_each_coordinate(name):
    it, start = scene("quadratic", 3).shifted(4.0), torch.tensor([5.0, 3.5, 4.5], dtype=torch.float64)
    rotated, forth = turned(it, 1)
    assert (few_steps(name, rotated, forth(start)) - forth(few_steps(name, it, start))).abs().max() > 0.05


@settings(max_examples=3)
@given(turn=st.integers(0, 1000))
def test_isotropic_consensus_does_not_see_a_rotation(turn):
    """In distribution: the noise is drawn in coordinates. Losses of many runs have the same mean logarithm."""
    it = scene("quadratic", 3).stretched(0.2)
    rotated, forth = turned(it, turn)
    means, errors = [], []
    for each, start in ((it, it.start), (rotated, forth(it.start))):
        options = dict(lr=0.2, n_particles=20, noise="isotropic", sigma=0.5, seed=turn + 1)
        found = paths(each, "cbo", [options], start.expand(200, 3), 12).points[0, :, -1]
        logs = each.value(found).log()
        means.append(float(logs.mean()))
        errors.append(float(logs.var() / 200))
    assert abs(means[0] - means[1]) < 5 * math.sqrt(sum(errors))


SIGNS = st.lists(st.sampled_from([-1.0, 1.0]), min_size=3, max_size=3)
COORDINATEWISE = ["diffgrad", "adabelief", "dalesgd", "daleadamw", "dalelangevin"]


@pytest.mark.parametrize("name", COORDINATEWISE)
@settings(max_examples=4)
@given(
    start=POSITIVE,
    order=st.permutations(range(3)),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=3, max_size=3),
)
def test_signs_and_order_of_coordinates_do_not_matter_to_those_with_one_step_size_each(name, start, order, signs):
    it, flip = bowl(5, 10.0), torch.tensor(signs, dtype=torch.float64)

    def there(x: Tensor) -> Tensor:
        return (x * flip)[..., order]

    def back(x: Tensor) -> Tensor:
        return x[..., torch.tensor(order).argsort()] * flip

    other = Scene(it.name, lambda x: it.value(back(x)), there(it.minima), 0.0, it.box, there(it.start))
    found = few_steps(name, other, there(start))
    torch.testing.assert_close(found, there(few_steps(name, it, start)), rtol=1e-9, atol=1e-9)


# Finite input

FINITE = st.floats(-1e30, 1e30, allow_subnormal=False)
ROWS = st.lists(st.lists(FINITE, min_size=3, max_size=3), min_size=1, max_size=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in PLANS if METHODS[name].drive is None])
@settings(max_examples=15)
@given(rows=ROWS)
def test_finite_gradients_never_make_nan(name, dtype, rows):
    x = torch.tensor([1.0, -2.0, 0.5], dtype=dtype, requires_grad=True)
    optimizer = METHODS[name].make([x], **{**METHODS[name].options, **PLANS[name].options})
    for row in rows:
        x.grad = torch.tensor(row, dtype=dtype)
        optimizer.step()
        assert not x.isnan().any(), row


@settings(max_examples=10)
@given(values=st.lists(FINITE, min_size=8, max_size=8))
def test_finite_losses_never_make_nan(values):
    x = torch.zeros(2, requires_grad=True)
    optimizer = optimzoo.CBO([x], n_particles=8, seed=0)
    for _ in range(3):
        optimizer.step(lambda stacked: torch.tensor([values], dtype=torch.float64), batched=True)
        assert not x.isnan().any()
