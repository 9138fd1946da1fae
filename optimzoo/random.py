"""Random numbers that are functions of a counter: Philox4x32-10 (Salmon et al., 2011); twin of ``csrc/random.h``.

There is no generator to save. A number is found by its seed, the draw it belongs to and its place, so that neither
threads nor processes can change it.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from optimzoo import ops

Word = TypeVar("Word", int, Tensor)
"""32 bits, or an int64 tensor of such; that products of tensors wrap at 64 bits makes no difference."""

_LOW = 0xFFFFFFFF


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Four random words for a counter of four words and a key of two."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        one, two = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (two >> 32) & _LOW ^ b ^ k0, two & _LOW, (one >> 32) & _LOW ^ d ^ k1, one & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return a, b, c, d


def integer(seed: int, draw: int) -> int:
    """A number of 63 bits."""
    low, high, _, _ = philox((0, 0, 0, draw), _key(seed))
    return (high << 32 | low) >> 1


def permutation(count: int, *, seed: int, draw: int) -> Tensor:
    """The numbers from 0 to ``count`` - 1 in random order, on the CPU."""
    index = torch.arange(count, device="cpu")
    zero = torch.zeros_like(index)
    low, high, _, _ = philox((index, zero, zero, zero + draw), _key(seed))
    return (high << 31 ^ low).argsort(stable=True)


def normal(out: Tensor, *, seed: int, draw: int, first: int = 0) -> Tensor:
    """Fill a tensor of shape (runs, particles, coordinates) with standard normal numbers.

    A float32 number depends on 32-bit uniforms and reaches 6.7, a float64 number on 52-bit ones and reaches 8.6.

    Args:
        out: float32 or float64; written to.
        seed: 63 bits.
        draw: 32 bits, another for every use of the same seed.
        first: which particle the first of ``out`` is.
    """
    native = ops.native("normal_", out.device)
    if native is not None and out.is_contiguous():
        native(out, seed, draw, first)
        return out
    runs, particles, coordinates = out.shape
    per_block = 2 if out.dtype == torch.float64 else 4

    def arange(start: int, size: int, *shape: int) -> Tensor:
        return torch.arange(start, start + size, device=out.device).view(shape)

    blocks = arange(0, -(-coordinates // per_block), 1, 1, -1)
    row, run = arange(first, particles, 1, -1, 1), arange(0, runs, -1, 1, 1)
    words = philox((blocks + 0 * (row + run), row, run, torch.full_like(run, draw)), _key(seed))
    if per_block == 2:
        pairs = [(words[1] << 20 | words[0] >> 12, words[3] << 20 | words[2] >> 12, words[2] & 1, 52)]
    else:
        pairs = [(one >> 1, two >> 1, two & 1, 31) for one, two in (words[:2], words[2:])]
    columns = []
    for radius, angle, sign, bits in pairs:
        # Box-Muller; half the circle comes from the angle and the other half from a sign. Integers are rounded to the
        # dtype of the result, as in C++, and what follows is exact.
        u, turn = ((k.to(out.dtype) + 0.5).double() * 0.5**bits for k in (radius, angle - 2 ** (bits - 1)))
        length = (-2 * u.log()).sqrt() * (1 - 2 * sign)
        turn = math.pi * turn
        columns += [length * turn.cos(), length * turn.sin()]
    filled = torch.stack(columns, -1).flatten(-2)
    return out.copy_(filled[..., :coordinates])


def _key(seed: int) -> tuple[int, int]:
    return seed & _LOW, seed >> 32 & _LOW
