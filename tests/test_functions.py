"""Scenes: values against formulas written in numpy, minima, gradients, and the wrappers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimzoo.functions import FUNCTIONS, SCENES, rotation, scene


def _beale(x):
    return (
        (1.5 - x[0] + x[0] * x[1]) ** 2 + (2.25 - x[0] + x[0] * x[1] ** 2) ** 2 + (2.625 - x[0] + x[0] * x[1] ** 3) ** 2
    )


def _levy(x):
    w = [1 + (xi - 1) / 4 for xi in x]
    total = math.sin(math.pi * w[0]) ** 2
    for wi in w[:-1]:
        total += (wi - 1) ** 2 * (1 + 10 * math.sin(math.pi * wi + 1) ** 2)
    return total + (w[-1] - 1) ** 2 * (1 + math.sin(2 * math.pi * w[-1]) ** 2)


def _ackley(x):
    root = math.sqrt(sum(xi * xi for xi in x) / len(x))
    waves = sum(math.cos(2 * math.pi * xi) for xi in x) / len(x)
    return -20 * math.exp(-root / 5) - math.exp(waves) + 20 + math.e


def _griewank(x):
    product = 1.0
    for i, xi in enumerate(x, 1):
        product *= math.cos(xi / math.sqrt(i))
    return 1 + sum(xi * xi for xi in x) / 4000 - product


def _quadratic(x):
    ratio = 100 ** (1 / (len(x) - 1)) if len(x) > 1 else 1.0
    return sum(ratio**i * xi * xi for i, xi in enumerate(x)) / 2


def _canyon(x):
    a, b = x
    v = b - (a - 1) * (a - 4) ** 2 / 8 - 2
    u = -a - 1.6 * b
    value = 25 * (1 - math.exp(-1.4 * v**2 * math.exp(-0.002 * a**4))) + 0.4 * a**2 + 0.2 * b**2
    value += 1.1625 * (2 - math.cos(3 * math.pi * a / 4) - math.cos(3 * math.pi * b / 4))
    return value + 4 * math.exp(1 - 2 * v**4) * max(0.0, math.copysign(1 - math.exp(-9 * u**2), u))


def _f3(x):
    pieces = [(-0.5, x * x), (-0.4, 0.75 + x), (0.0, -7 * x / 8), (0.4, 7 * x / 8), (0.5, 0.75 - x), (math.inf, x * x)]
    return next(value for end, value in pieces if x <= end)


FORMULAS = {
    "rosenbrock": lambda x: sum(100 * (x[i + 1] - x[i] ** 2) ** 2 + (1 - x[i]) ** 2 for i in range(len(x) - 1)),
    "beale": _beale,
    "himmelblau": lambda x: (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2,
    "quadratic": _quadratic,
    "saddle": lambda x: x[0] ** 2 + x[1] ** 4 / 4 - x[1] ** 2 + 1,
    "two_basins": lambda x: min(
        6 * (x[0] + 1.2) ** 2 + 6 * x[1] ** 2 + 0.3, (x[0] - 1.2) ** 2 + x[1] ** 2
    ),
    "plateau": lambda x: 1 - math.exp(-sum(xi * xi for xi in x) / (2 * 0.7**2)),
    "styblinski_tang": lambda x: sum(xi**4 - 16 * xi**2 + 5 * xi for xi in x) / 2,
    "levy": _levy,
    "griewank": _griewank,
    "ackley": _ackley,
    "rastrigin": lambda x: 10 * len(x) + sum(xi**2 - 10 * math.cos(2 * math.pi * xi) for xi in x),
    "canyon": _canyon,
    "f1": lambda x: (x[0] + 0.3) ** 2 if x[0] <= 0 else (x[0] - 0.2) ** 2 + 0.05,
    "f2": lambda x: -40 * x[0] - 35.15 if x[0] <= -0.9 else x[0] ** 3 + x[0] * math.sin(8 * x[0]) + 0.85,
    "f3": lambda x: _f3(x[0]),
}  # fmt: skip

ALL = [(name, dim) for name in SCENES for dim in ([scene(name).dim] if not hasattr(SCENES[name], "fewest") else [2, 5])]
each_scene = pytest.mark.parametrize(("name", "dim"), ALL)


def points(it, count: int = 50, seed: int = 0) -> torch.Tensor:
    share = torch.rand(count, it.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return it.box[:, 0] + share * (it.box[:, 1] - it.box[:, 0])


@each_scene
def test_values_are_those_of_the_formula(name, dim):
    it = scene(name, dim)
    x = points(it)
    expected = [FORMULAS[name](row) for row in x.tolist()]
    np.testing.assert_allclose(it.value(x).numpy(), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(it.value(x.view(5, 10, dim)), it.value(x).view(5, 10), rtol=0, atol=0)


@each_scene
def test_minima_are_minima(name, dim):
    it = scene(name, dim)
    assert ((it.box[:, 0] <= it.minima) & (it.minima <= it.box[:, 1])).all()
    assert ((it.box[:, 0] <= it.start) & (it.start <= it.box[:, 1])).all()
    for minimum in it.minima.tolist():
        assert FORMULAS[name](minimum) == pytest.approx(it.least, abs=1e-12, rel=1e-12)
    size = 1e-3 * torch.randn(200, 1, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (it.value(it.minima + size) >= it.least - 1e-12 * abs(it.least)).all()
    assert (it.value(points(it, 4000)) >= it.least).all()
    assert float(it.value(it.start)) > it.least + 1e-2
    assert it.distance(it.minima).tolist() == [0.0] * len(it.minima)


@each_scene
def test_autograd_is_the_slope_of_the_formula(name, dim):
    it, h = scene(name, dim), 1e-6
    x = points(it, 12, seed=3)
    slopes = it.gradient(x)
    for row, slope in zip(x.numpy(), slopes.numpy(), strict=True):
        for i in range(dim):
            ahead, behind = row.copy(), row.copy()
            ahead[i], behind[i] = row[i] + h, row[i] - h
            expected = (FORMULAS[name](ahead.tolist()) - FORMULAS[name](behind.tolist())) / (2 * h)
            assert slope[i] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), shift=st.floats(-3, 3), factor=st.floats(0.01, 100), condition=st.floats(0.1, 1e4))
@pytest.mark.parametrize(("name", "dim"), [("rosenbrock", 3), ("himmelblau", 2), ("levy", 9)])
def test_wrappers_move_minima_start_and_box_with_the_function(name, dim, seed, shift, factor, condition):
    plain = scene(name, dim)
    moved = plain.rotated(rotation(dim, seed)).stretched(condition).shifted(shift).scaled(factor)
    rtol = 1e-9 * condition
    torch.testing.assert_close(
        moved.value(moved.minima), torch.full((len(plain.minima),), factor * plain.least, dtype=torch.float64),
        rtol=rtol, atol=rtol,
    )  # fmt: skip
    torch.testing.assert_close(moved.value(moved.start), factor * plain.value(plain.start), rtol=rtol, atol=rtol)
    inside = torch.cat([moved.start[None], moved.minima])
    assert ((moved.box[:, 0] <= inside + 1e-9) & (inside <= moved.box[:, 1] + 1e-9)).all() or dim > 2


def test_a_rotation_by_an_angle_is_one_about_the_middle_of_the_box():
    plain = scene("beale")
    turned = plain.rotated(90.0)
    middle = plain.box.mean(1)
    a, b = (plain.minima[0] - middle).tolist()
    torch.testing.assert_close(turned.minima[0], middle + torch.tensor([-b, a], dtype=torch.float64))
    np.testing.assert_allclose(rotation(4, 1) @ rotation(4, 1).T, np.eye(4), atol=1e-14)
    assert float(torch.linalg.det(rotation(5, 2))) == pytest.approx(1.0)


def test_stretching_multiplies_the_condition_of_the_hessian():
    stretched = scene("quadratic", 3).stretched(25.0)
    hessian = torch.autograd.functional.hessian(stretched.value, stretched.minima[0])
    np.testing.assert_allclose(hessian.numpy(), np.diag([1.0, 10 * 5.0, 100 * 25.0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("absolute", "relative"), [(0.5, 0.0), (0.0, 0.3), (0.4, 0.3)])
def test_noise_has_its_deviation_and_leaves_values_alone(absolute, relative):
    plain = scene("quadratic", 2)
    noisy = plain.noisy(absolute, relative, seed=7)
    x = torch.tensor([[0.5, -0.2]], dtype=torch.float64).expand(20000, 2).clone()
    torch.testing.assert_close(noisy.sample(x, 3), plain.value(x), rtol=0, atol=0)
    wrong = (noisy.gradient(x, 3) - plain.gradient(x)).numpy()
    deviation = np.sqrt(absolute**2 + (relative * plain.gradient(x[0]).numpy()) ** 2)
    np.testing.assert_allclose(wrong.std(0), deviation, rtol=0.03)
    assert (np.abs(wrong.mean(0)) < 4 * deviation / math.sqrt(20000)).all()
    assert (noisy.gradient(x, 4) != noisy.gradient(x, 3)).any()
    torch.testing.assert_close(noisy.gradient(x), plain.gradient(x), rtol=0, atol=0)


def test_all_who_are_compared_see_the_same_noise():
    noisy = scene("himmelblau").noisy(1.0, 0.2)
    x = points(noisy, 6)
    stacked = noisy.gradient(x.expand(3, 6, 2), 5)
    for row in stacked:
        torch.testing.assert_close(row, noisy.gradient(x, 5), rtol=0, atol=1e-12)
    torch.testing.assert_close(noisy.gradient(x[0], 5), noisy.gradient(x[:1], 5)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scene("rosenbrok"), "no scene 'rosenbrok'; did you mean rosenbrock"),
        (lambda: scene("zzz"), "Scenes: rosenbrock, beale"),
        (lambda: scene("beale", 3), "'beale' has dimension 2, got dim=3"),
        (lambda: scene("rosenbrock", 1), "must be a whole number >= 2, got 1"),
        (lambda: scene("levy", True), "must be a whole number >= 1, got True"),
        (lambda: scene("f1").rotated(30.0), "f1 has one coordinate"),
        (lambda: scene("beale").rotated(torch.ones(2, 2)), "by must be an orthogonal matrix of 2 rows"),
        (lambda: scene("beale").stretched(0.0), "condition must be finite and > 0, got 0.0"),
        (lambda: scene("beale").scaled(-1.0), "by must be finite and > 0, got -1.0"),
        (lambda: scene("beale").noisy(-1.0), "absolute must be finite and >= 0, got -1.0"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("?", r"\?")):
        call()


def test_functions_of_any_dimension_and_scenes_agree():
    for name, function in FUNCTIONS.items():
        it = scene(name)
        assert it.least == function.least
        assert it.minima[0].tolist() == [function.minimum] * 2
        x = points(it)
        torch.testing.assert_close(it.value(x), function.value(x), rtol=0, atol=0)
