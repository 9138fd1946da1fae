"""Methods reach the minimum of functions whose minimum is known, from drawn starts and in drawn coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import BACKENDS, CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

# The learning rate that each method starts from; it falls to zero over the run, and with it the size of the last steps.
RATES = {"DiffGrad": dict(lr=0.3), "AdaBelief": dict(lr=0.1, rectify=False, eps=1e-12)}
DEFAULT_RATE = dict(lr=0.1)

each_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])


def minimize(case, function, start: Tensor, steps: int, **options) -> Tensor:
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


def rotation(seed: int, size: int) -> Tensor:
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return torch.from_numpy(q)


# Methods that keep signs cannot go everywhere; test_dale.py shows where they go.
each_free = pytest.mark.parametrize("case", [case for case in CASES if "zeros" not in case.refuses], ids=repr)
STARTS = st.lists(st.floats(-3, 3), min_size=3, max_size=3).map(lambda x: torch.tensor(x, dtype=torch.float64))


@each_free
@settings(max_examples=6)
@given(start=STARTS, turn=st.integers(0, 1000), log_condition=st.floats(0, 1.5))
def test_a_rotated_quadratic_is_solved(case, start, turn, log_condition):
    basis = rotation(turn, 3)
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
