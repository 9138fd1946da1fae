"""Stochastic rounding to bfloat16, which keeps the mean of what it rounds: the twin of csrc/rule.h.

The random bits are a function of a seed, a step count, the place of a tensor in its call and that of a number in its
tensor, so that a run can be repeated and resumed without a generator to be saved.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_randomly_(target: Tensor, value: Tensor, key: Tensor, place: int) -> None:
    """Write float32 numbers to a bfloat16 tensor, each up or down by chance so that its mean is the number.

    Args:
        target: bfloat16, of any shape; what is exact in bfloat16 is written as it is, as is what is not finite.
        value: float32, of the same shape.
        key: int64, one number: :func:`random_key`.
        place: which of the arrays that share the key it is, 0 or more: each has other bits.
    """
    index = torch.arange(value.numel(), device=value.device)  # in memory, as natively, where that has no gaps
    dense = sorted(value.stride()) == sorted(torch.empty_like(value).stride())
    index = index.as_strided(value.shape, torch.empty_like(value).stride()) if dense else index.reshape(value.shape)
    random = _random_half(key, index, place)
    # A random lower half carries into the upper one as often as what is cut off is large.
    upper = (value.view(torch.int32) + random.to(torch.int32)) >> 16
    target.copy_(torch.where(value.isfinite(), upper.to(torch.int16).view(torch.bfloat16), value.to(torch.bfloat16)))


def random_key(seed: int, step: Tensor, tensor: int) -> Tensor:
    """A 32-bit number, as int64, for a step (a whole number) and a tensor of the call."""
    state = _mix(torch.tensor(_signed(seed), device=step.device)) ^ step.reshape(()).to(torch.int64)
    return _shifted(_mix(_mix(state) ^ tensor), 32)


def _random_half(key: Tensor, index: Tensor, place: int) -> Tensor:
    """Numbers of 16 bits, in int64: half of a scattered word for each of two places, of another for the next two."""
    word = index * 0x9E3779B9 + key & 0xFFFFFFFF
    word = (word ^ word >> 14) * 0xDD973235 & 0xFFFFFFFF
    for _ in range(place // 2):
        word = word * 0x2C1B3C6D & 0xFFFFFFFF
    return (word ^ word >> 16) & 0xFFFF if place % 2 else word >> 16


def _mix(x: Tensor) -> Tensor:
    """One number of SplitMix64 (Steele et al., 2014)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """A shift to the right that brings in zeros."""
    return x >> by & ((1 << 64 - by) - 1)


def _signed(x: int) -> int:
    """The int64 that has the bits of a uint64."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)
