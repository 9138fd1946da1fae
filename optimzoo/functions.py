"""Synthetic test functions of points (..., d): value, minimum, box to start in."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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
