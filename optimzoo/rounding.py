"""Stochastic rounding to bfloat16, which keeps the mean of what it rounds: the twin of csrc/rule.h.

The random bits are a function of a seed, a step count, the place of a tensor in its call and that of a number in its
tensor, so that a run can be repeated and resumed without a generator to be saved.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_randomly_(target: Tensor, value: Tensor, key: Tensor, shift: int) -> None:
    """Write float32 numbers to a bfloat16 tensor, each up or down by chance so that its mean is the number.

    Args:
        target: bfloat16, of any shape; what is exact in bfloat16 is written as it is, as is what is not finite.
        value: float32, of the same shape.
        key: int64, one number: :func:`random_key`.
        shift: which 16 of the 32 random bits to use, 0 or 16, so that two targets can share a key.
    """
    place = torch.arange(value.numel(), device=value.device)  # in memory, as natively, where that has no gaps
    dense = sorted(value.stride()) == sorted(torch.empty_like(value).stride())
    place = place.as_strided(value.shape, torch.empty_like(value).stride()) if dense else place.reshape(value.shape)
    random = _random_bits(key, place) >> shift & 0xFFFF
    # A random lower half carries into the upper one as often as what is cut off is large.
    upper = (value.view(torch.int32) + random.to(torch.int32)) >> 16
    target.copy_(torch.where(value.isfinite(), upper.to(torch.int16).view(torch.bfloat16), value.to(torch.bfloat16)))


def random_key(seed: int, step: Tensor, tensor: int, word: int) -> Tensor:
    """A 32-bit number, as int64, for a step (a whole number), a tensor of the call and a word of random bits."""
    state = _mix(torch.tensor(_signed(seed), device=step.device)) ^ step.reshape(()).to(torch.int64)
    return _shifted(_mix(_mix(state) ^ (8 * tensor + word)), 32)


def _random_bits(key: Tensor, index: Tensor) -> Tensor:
    """Numbers of 32 bits, in int64."""
    x = index * 0x9E3779B9 + key & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    return x ^ x >> 13


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
