"""Synthetic test functions of points (..., d), and scenes: a function in a dimension, with what it takes to show a run.

Values are exact in the dtype of the points and have gradients by autograd.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optimzoo.optimizer import check_int, check_number
from optimzoo.random import normal

_PART = 2**16
"""Numbers that stay in a cache together with what a function makes of them."""


def _in_parts(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """On the CPU, fresh memory of the size of the points costs half as much as their cosines."""

    @functools.wraps(function)
    def evaluate(x: Tensor) -> Tensor:
        if x.numel() <= _PART or not x.is_cpu:
            return function(x)
        parts = torch.split(x.reshape(-1, x.shape[-1]), max(1, _PART // x.shape[-1]))
        return torch.cat([function(part) for part in parts]).view(x.shape[:-1])

    return evaluate


@_in_parts
def rastrigin(x: Tensor) -> Tensor:
    """sum(x^2 + 10 (1 - cos 2 pi x)): a parabola with a dent at every whole number."""
    waves = (x * (2 * math.pi)).cos_().sum(-1)
    squares: Tensor = torch.linalg.vecdot(x, x)
    return squares - 10 * waves + 10 * x.shape[-1]


@_in_parts
def ackley(x: Tensor) -> Tensor:
    """Flat outside, a funnel in the middle, dents everywhere."""
    far = (x.square().mean(-1).sqrt() * -0.2).exp() * -20
    return far - (x * (2 * math.pi)).cos().mean(-1).exp() + (20 + math.e)


def canyon(x: Tensor) -> Tensor:
    """The canyon of Riedl et al. (2023, figure 1), d = 2: the global minimum lies behind a ridge of its floor.

    Formula and constants are those of the authors' code.
    """
    a, b = x.unbind(-1)
    v = b - ((a - 1) * (a - 4) ** 2 / 8 + 2)
    u = -a - 1.6 * b
    walls = 25 * (1 - (-1.4 * v.square() * (-0.002 * a**4).exp()).exp())
    floor = 0.4 * a.square() + 0.2 * b.square()
    dents = 1.1625 * ((1 - (0.75 * math.pi * a).cos()) + (1 - (0.75 * math.pi * b).cos()))
    ridge = 4 * (1 - 2 * v**4).exp() * ((1 - (-9 * u.square()).exp()) * u.sign()).clamp_min(0)
    return walls + floor + dents + ridge


class Function(NamedTuple):
    """A function, its value at the minimum, the coordinate of its minimum in every dimension, the box to start in."""

    value: Callable[[Tensor], Tensor]
    least: float
    minimum: float
    box: tuple[float, float]

    def shifted(self, by: float) -> Function:
        """The same with the minimum moved by ``by`` in every coordinate; the box stays."""
        return Function(lambda x: self.value(x - by), self.least, self.minimum + by, self.box)

    def found(self, x: Tensor, within: float = 0.25) -> Tensor:
        """Whether every coordinate is within a distance of the minimum."""
        return (x - self.minimum).abs().amax(-1) < within

    def start(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """Uniform float64 points in the box."""
        low, high = self.box
        return torch.rand(shape, dtype=torch.float64, generator=generator) * (high - low) + low


FUNCTIONS = {
    "rastrigin": Function(rastrigin, 0.0, 0.0, (-3.0, 3.0)),
    "ackley": Function(ackley, 0.0, 0.0, (-3.0, 3.0)),
    "canyon": Function(canyon, 0.0, 0.0, (-2.0, 8.0)),
}


def rosenbrock(x: Tensor) -> Tensor:
    """A curved valley: sum(100 (x[i+1] - x[i]^2)^2 + (1 - x[i])^2)."""
    here, after = x[..., :-1], x[..., 1:]
    return (100 * (after - here.square()).square() + (1 - here).square()).sum(-1)


def beale(x: Tensor) -> Tensor:
    """Steep corners around a long flat valley, d = 2."""
    a, b = x.unbind(-1)
    terms = [c - a * (1 - b**k) for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))]
    return torch.stack(terms).square().sum(0)


def himmelblau(x: Tensor) -> Tensor:
    """Four equal minima around a hill, d = 2."""
    a, b = x.unbind(-1)
    return (a.square() + b - 11).square() + (a + b.square() - 7).square()


def styblinski_tang(x: Tensor) -> Tensor:
    """sum(x^4 - 16 x^2 + 5 x) / 2: two basins in each coordinate, the left one deeper."""
    return (x**4 - 16 * x.square() + 5 * x).sum(-1) / 2


def levy(x: Tensor) -> Tensor:
    """Ridges across a bowl."""
    w = 1 + (x - 1) / 4
    head, tail = w[..., :-1], w[..., -1]
    ridges = ((head - 1).square() * (1 + 10 * (math.pi * head + 1).sin().square())).sum(-1)
    edge = (tail - 1).square() * (1 + (2 * math.pi * tail).sin().square())
    return (math.pi * w[..., 0]).sin().square() + ridges + edge


def griewank(x: Tensor) -> Tensor:
    """A wide parabola with dents that are coupled: 1 + sum(x^2) / 4000 - prod(cos(x[i] / sqrt(i)))."""
    root = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device).sqrt()
    return 1 + x.square().sum(-1) / 4000 - (x / root).cos().prod(-1)


def quadratic(x: Tensor, condition: float = 100.0) -> Tensor:
    """Half the sum of squares, each weighted by its curvature: 1 in the first coordinate, ``condition`` in the last."""
    curvature = torch.logspace(0, math.log10(condition), x.shape[-1], dtype=x.dtype, device=x.device)
    return (curvature * x.square()).sum(-1) / 2


def saddle(x: Tensor) -> Tensor:
    """x^2 + (y^2 - 2)^2 / 4, d = 2: the valley floor along x leads to a saddle, and past it to one of two minima."""
    a, b = x.unbind(-1)
    return a.square() + (b.square() - 2).square() / 4


def two_basins(x: Tensor) -> Tensor:
    """The lower of a narrow bowl that ends at 0.3 and a wide one that ends at 0, d = 2."""
    a, b = x.unbind(-1)
    narrow, wide = (a + 1.2).square() + b.square(), (a - 1.2).square() + b.square()
    return torch.minimum(6 * narrow + 0.3, wide)


def plateau(x: Tensor) -> Tensor:
    """1 - exp(-sum(x^2) / 0.98): a hole in a plain, where gradients vanish."""
    return 1 - (-x.square().sum(-1) / 0.98).exp()


def f1(x: Tensor) -> Tensor:
    """diffGrad's first function (Dubey et al., 2019), d = 1: two parabolas, of which the left one is lower."""
    x = x[..., 0]
    return torch.where(x <= 0, (x + 0.3).square(), (x - 0.2).square() + 0.05)


def f2(x: Tensor) -> Tensor:
    """diffGrad's second function, d = 1: a slope to three minima."""
    x = x[..., 0]
    return torch.where(x <= -0.9, -40 * x - 35.15, x**3 + x * (8 * x).sin() + 0.85)


def f3(x: Tensor) -> Tensor:
    """diffGrad's third function, d = 1: a notch of constant slopes within a parabola."""
    size = x[..., 0].abs()
    return torch.where(size <= 0.4, 7 * size / 8, torch.where(size <= 0.5, 0.75 - size, size.square()))


# Scenes


@dataclass(frozen=True)
class Scene:
    """A function in a certain dimension with what it takes to show a run on it. Everything is float64.

    Args:
        name: what it is called.
        value: of points (..., d), with a gradient by autograd.
        minima: the global ones, (number, d).
        least: the value there.
        box: what to show, (d, 2): low and high.
        start: a point from which there is something to see, (d,).
        steps: how many are worth showing.
        noise: deviation of the noise in each coordinate of the gradient, absolute and relative to the coordinate.
        seed: of the noise.

    The wrappers return a new scene: :meth:`shifted`, :meth:`rotated`, :meth:`stretched`, :meth:`scaled`, :meth:`noisy`.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    minima: Tensor
    least: float
    box: Tensor
    start: Tensor
    steps: int = 200
    noise: tuple[float, float] = (0.0, 0.0)
    seed: int = 0

    @property
    def dim(self) -> int:
        """How many coordinates a point has."""
        return self.start.shape[0]

    def sample(self, x: Tensor, step: int) -> Tensor:
        """The value with the gradient that step ``step`` sees, which has the noise of the scene.

        The values themselves have none. Points (..., n, d) see n different draws, the same in all other dimensions, and
        the same whenever the step is the same: methods that are compared meet the same noise.
        """
        value = self.value(x)
        if self.noise == (0.0, 0.0):
            return value
        absolute, relative = self.noise
        draws = torch.empty(2, x.shape[-2] if x.dim() > 1 else 1, self.dim, dtype=torch.float64)
        one, two = normal(draws, seed=self.seed, draw=step).to(x.device)
        wrong: Tensor = absolute * one
        if relative:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.value(leaf).sum(), leaf)
            wrong = wrong + relative * two * slope
        return value + ((x - x.detach()) * wrong.reshape(wrong.shape if x.dim() > 1 else x.shape)).sum(-1)

    def gradient(self, x: Tensor, step: int | None = None) -> Tensor:
        """The gradient at points (..., d); that which step ``step`` sees, if one is given."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            value = self.value(leaf) if step is None else self.sample(leaf, step)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return slope

    def distance(self, x: Tensor) -> Tensor:
        """The distance of points (..., d) to the nearest global minimum, in the largest coordinate."""
        apart: Tensor = x[..., None, :] - self.minima
        return apart.abs().amax(-1).amin(-1)

    def _moved(self, matrix: Tensor, offset: Tensor) -> Scene:
        """Every point x becomes matrix x + offset."""
        back = torch.linalg.inv(matrix)

        def forth(x: Tensor) -> Tensor:
            return x @ matrix.T + offset

        middle, half = forth(self.box.mean(1)), matrix.abs() @ (self.box[:, 1] - self.box[:, 0]) / 2
        return dataclasses.replace(
            self,
            value=lambda x: self.value((x - offset) @ back.T),
            minima=forth(self.minima),
            start=forth(self.start),
            box=torch.stack([middle - half, middle + half], 1),
        )

    def shifted(self, by: Tensor | float) -> Scene:
        """The same somewhere else."""
        return self._moved(torch.eye(self.dim, dtype=torch.float64), torch.zeros(self.dim, dtype=torch.float64) + by)

    def rotated(self, by: Tensor | float) -> Scene:
        """Turned about the middle of the box: by an angle in degrees, in the first plane, or by an orthogonal matrix.

        Raises:
            ValueError: the matrix is not orthogonal, or there is no plane.
        """
        if isinstance(by, Tensor):
            matrix, unit = by.double(), torch.eye(self.dim, dtype=torch.float64)
            if matrix.shape != unit.shape or (matrix @ matrix.T - unit).abs().max() > 1e-8:
                raise ValueError(f"by must be an orthogonal matrix of {self.dim} rows, got {by!r}")
        else:
            if self.dim < 2:
                raise ValueError(f"{self.name} has one coordinate and cannot be rotated")
            matrix = torch.eye(self.dim, dtype=torch.float64)
            cosine, sine = math.cos(math.radians(by)), math.sin(math.radians(by))
            matrix[:2, :2] = torch.tensor([[cosine, -sine], [sine, cosine]])
        middle = self.box.mean(1)
        return self._moved(matrix, middle - matrix @ middle)

    def stretched(self, condition: float) -> Scene:
        """Coordinates in units of their own: second derivatives grow up to ``condition``-fold from first to last."""
        check_number("condition", condition, 0.0, math.inf, "finite and > 0", above=True)
        units = torch.logspace(0, -math.log10(condition) / 2, self.dim, dtype=torch.float64)
        return self._moved(torch.diag(units), torch.zeros(self.dim, dtype=torch.float64))

    def scaled(self, by: float) -> Scene:
        """Values, and so gradients, multiplied by a number > 0."""
        check_number("by", by, 0.0, math.inf, "finite and > 0", above=True)
        return dataclasses.replace(self, value=lambda x: self.value(x) * by, least=self.least * by)

    def noisy(self, absolute: float = 0.0, relative: float = 0.0, *, seed: int = 0) -> Scene:
        """With Gaussian noise in the gradient; see ``noise``."""
        for name, size in (("absolute", absolute), ("relative", relative)):
            check_number(name, size, 0.0, math.inf, "finite and >= 0")
        return dataclasses.replace(self, noise=(float(absolute), float(relative)), seed=seed)


class _Any(NamedTuple):
    """A scene of any dimension; starts alternate."""

    value: Callable[[Tensor], Tensor]
    minimum: float
    least: float  # per coordinate
    box: tuple[float, float]
    start: tuple[float, float]
    steps: int
    fewest: int = 1


class _Fixed(NamedTuple):
    """A scene of one dimension only."""

    value: Callable[[Tensor], Tensor]
    minima: list[list[float]]
    least: float
    box: list[list[float]]
    start: list[float]
    steps: int


_HIMMELBLAU = [[3.0, 2.0], [-2.805118086952745, 3.131312518250573],
               [-3.779310253377747, -3.283185991286169], [3.5844283403304917, -1.8481265269644034]]  # fmt: skip
_F2 = -0.6429185989152617

SCENES: dict[str, _Any | _Fixed] = {
    "rosenbrock": _Any(rosenbrock, 1.0, 0.0, (-2.0, 2.0), (-1.5, -0.6), 400, 2),
    "beale": _Fixed(beale, [[3.0, 0.5]], 0.0, [[-1.0, 4.5], [-1.5, 2.2]], [0.7, 1.6], 300),
    "himmelblau": _Fixed(himmelblau, _HIMMELBLAU, 0.0, [[-5.5, 5.5], [-5.5, 5.5]], [-0.2, -1.1], 150),
    "quadratic": _Any(quadratic, 0.0, 0.0, (-2.0, 2.0), (-1.7, 1.4), 200),
    "saddle": _Fixed(saddle, [[0.0, 2**0.5], [0.0, -(2**0.5)]], 0.0, [[-2.2, 2.2], [-2.2, 2.2]], [-1.9, 0.02], 150),
    "two_basins": _Fixed(two_basins, [[1.2, 0.0]], 0.0, [[-2.5, 2.5], [-2.0, 2.0]], [-2.1, 1.2], 150),
    "plateau": _Any(plateau, 0.0, 0.0, (-2.6, 2.6), (-1.7, 1.3), 200),
    "styblinski_tang": _Any(styblinski_tang, -2.9035340277711770, -39.166165703771415, (-4.5, 4.5), (0.05, -0.3), 150),
    "levy": _Any(levy, 1.0, 0.0, (-6.0, 6.0), (4.5, -3.2), 250),
    "griewank": _Any(griewank, 0.0, 0.0, (-8.0, 8.0), (-2.0, 5.0), 250),
    "ackley": _Any(ackley, 0.0, 0.0, (-3.0, 3.0), (-2.6, 2.3), 200),
    "rastrigin": _Any(rastrigin, 0.0, 0.0, (-3.0, 3.0), (-1.4, 1.3), 200),
    "canyon": _Fixed(canyon, [[0.0, 0.0]], 0.0, [[-2.0, 8.0], [-2.0, 8.0]], [7.0, 6.0], 300),
    "f1": _Fixed(f1, [[-0.3]], 0.0, [[-1.0, 1.0]], [-1.0], 300),
    "f2": _Fixed(f2, [[_F2]], 0.00011977146994468502, [[-1.1, 1.0]], [-1.0], 300),
    "f3": _Fixed(f3, [[0.0]], 0.0, [[-1.0, 1.0]], [-1.0], 300),
}


def scene(name: str, dim: int | None = None) -> Scene:
    """The scene of a name, in two dimensions or ``dim``.

    Raises:
        ValueError: there is no such scene, or not in that dimension; the message says what there is.
    """
    if name not in SCENES:
        near = difflib.get_close_matches(str(name), SCENES, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        raise ValueError(f"there is no scene {name!r}{hint} Scenes: {', '.join(SCENES)}")
    entry = SCENES[name]
    if isinstance(entry, _Fixed):
        if dim not in (None, len(entry.start)):
            raise ValueError(f"the scene {name!r} has dimension {len(entry.start)}, got dim={dim!r}")
        tensors = [torch.tensor(part, dtype=torch.float64) for part in (entry.minima, entry.box, entry.start)]
        return Scene(name, entry.value, tensors[0], entry.least, tensors[1], tensors[2], entry.steps)
    dim = 2 if dim is None else dim
    check_int(f"dim of the scene {name!r}", dim, entry.fewest)
    minima = torch.full((1, dim), entry.minimum, dtype=torch.float64)
    start = torch.tensor(entry.start, dtype=torch.float64).repeat(dim)[:dim]
    box = torch.tensor([entry.box], dtype=torch.float64).expand(dim, 2).clone()
    return Scene(name, entry.value, minima, entry.least * dim, box, start, entry.steps)


def rotation(dim: int, seed: int) -> Tensor:
    """A random orthogonal matrix without reflection."""
    draw = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=draw))
    turned: Tensor = q * r.diagonal().sign()
    turned[:, 0] *= torch.linalg.det(turned).sign()
    return turned
