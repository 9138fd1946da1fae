"""Gradients of single samples: their norms and weighted sums, without keeping those of large layers.

The products follow Li et al., `Large language models can be strong differentially private learners
<https://arxiv.org/abs/2110.05679>`__, 2021 (norms from factors), and Bu et al., `Scalable and efficient training of
large convolutional neural networks with differential privacy <https://arxiv.org/abs/2205.10683>`__, 2022 (the mixed
rule).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from optimzoo import ops
from optimzoo.optimizer import is_native

Samples: TypeAlias = Tensor
"""What ``p.grad_sample`` holds of one batch."""

_CHUNK = 2**22
"""Numbers of a tensor that are worked on at once, where that makes copies of them."""


def square_norms(samples: Sequence[Samples | list[Samples]]) -> Tensor:
    """The squared norm of each sample's gradient over all parameters: ``(n,)``, float64.

    Args:
        samples: what ``p.grad_sample`` holds, parameter by parameter. In a list are micro-batches, one after the other.

    That of a sample with a gradient that is not finite is infinite or NaN. Of float64 gradients beyond 1e±150 the
    square is infinite or zero: :func:`norms` tells those apart.
    """
    return torch.cat([_square_norms(batch) for batch in _batches(samples)])


def norms(samples: Sequence[Samples | list[Samples]]) -> Tensor:
    """The norm of each sample's gradient over all parameters, ``(n,)``, float64, at any scale of the numbers.

    Infinite or NaN where a gradient, or its norm, is not finite.
    """
    return torch.cat([_norms(batch) for batch in _batches(samples)])


def weighted_sums(samples: Sequence[Samples | list[Samples]], weights: Tensor) -> list[list[Tensor]]:
    """For each parameter and each row of ``weights`` the sum of the samples' gradients times their weights.

    Args:
        samples: what ``p.grad_sample`` holds, parameter by parameter. In a list are micro-batches, one after the other.
        weights: one or two rows of a weight for each sample, ``(k, n)``. A sample whose weights are all zero is left
            out, whatever its gradient is.

    The sums of tensors are float64, those of factors are accumulated in float32 or wider.
    """
    batches = _batches(samples)
    parts = torch.split(weights.double(), [len(batch[0]) for batch in batches], 1)
    sums = [_weighted_sums(batch, part) for batch, part in zip(batches, parts, strict=True)]
    return [[sum(rows[1:], rows[0]) for rows in zip(*column, strict=True)] for column in zip(*sums, strict=True)]


def _batches(samples: Sequence[Samples | list[Samples]]) -> list[list[Samples]]:
    """Micro-batch by micro-batch, those of all parameters."""
    columns = [entry if isinstance(entry, list) else [entry] for entry in samples]
    sizes = [[len(part) for part in column] for column in columns]
    for index, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(f"samples[{index}] is of {size} samples, samples[0] of {sizes[0]}")
    return [list(batch) for batch in zip(*columns, strict=True)]


def _square_norms(batch: Sequence[Samples]) -> Tensor:
    tensors = [_as_rows(part)[0] for part in batch]
    squares = torch.zeros(len(batch[0]), dtype=_wide(tensors[0]), device=tensors[0].device)
    if op := _native("sample_squares", tensors):
        op(tensors, squares)
        return squares
    for rows in tensors:
        for begin, chunk in _chunks(rows):
            squares[begin : begin + len(chunk)] += _matrix(chunk).to(squares.dtype).square().sum(1)
    return squares


def _norms(batch: Sequence[Samples]) -> Tensor:
    squares = _square_norms(batch)
    if all(part.dtype != torch.float64 for part in batch):
        return squares.sqrt()
    # Far from one the squares of a float64 number leave its range, or the range in which it has all its digits.
    found = squares.sqrt()
    again = (~((squares > 1e-280) & squares.isfinite())).nonzero().flatten()
    if len(again):
        each = torch.stack([_scaled_norms(part[again]) for part in batch])
        scale = _scale(each.T)
        found[again] = scale * (each / scale).square().sum(0).sqrt()
    return found


def _scaled_norms(samples: Samples) -> Tensor:
    rows = _matrix(samples).double()
    scale = _scale(rows)
    return scale * (rows / scale[:, None]).square().sum(1).sqrt()


def _scale(rows: Tensor) -> Tensor:
    """The largest magnitude in each row, or one where that is nothing to divide by."""
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    return torch.where((largest > 0) & largest.isfinite(), largest, 1.0)


def _weighted_sums(batch: Sequence[Samples], weights: Tensor) -> list[list[Tensor]]:
    tensors, undo = zip(*map(_as_rows, batch), strict=True)
    weights = weights.to(tensors[0].device, _wide(tensors[0])).contiguous()
    sums = [weights.new_zeros(len(weights), *rows.shape[1:]) for rows in tensors]
    if op := _native("weighted_sums", list(tensors)):
        op(list(tensors), weights, sums)
    else:
        wanted = (weights != 0).any(0)
        for rows, total in zip(tensors, sums, strict=True):
            for begin, chunk in _chunks(rows):
                of = slice(begin, begin + len(chunk))
                values = torch.where(wanted[of, None], _matrix(chunk).to(weights.dtype), 0.0)
                _matrix(total).add_(weights[:, of] @ values)
    return [[row.permute(order) for row in total] for total, order in zip(sums, undo, strict=True)]


def _as_rows(samples: Tensor) -> tuple[Tensor, list[int]]:
    """The samples with each one's numbers in the order of memory, and how to permute a row's dimensions back."""
    order = sorted(range(1, samples.dim()), key=lambda i: samples.stride(i), reverse=True)
    rows = samples.detach().permute(0, *order)
    if not rows.is_contiguous():
        rows, order = samples.detach().contiguous(), list(range(1, samples.dim()))
    return rows, [order.index(i + 1) for i in range(len(order))]


def _matrix(rows: Tensor) -> Tensor:
    return rows.view(len(rows), rows.shape[1:].numel())


def _chunks(rows: Tensor) -> list[tuple[int, Tensor]]:
    """Some rows at a time, and where they begin."""
    size = max(1, _CHUNK * len(rows) // max(1, rows.numel()))
    return [(begin, rows[begin : begin + size]) for begin in range(0, len(rows), size)]


def _wide(tensor: Tensor) -> torch.dtype:
    """Float64 where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _native(name: str, tensors: list[Tensor]) -> Callable[..., None] | None:
    """The native pass, where it takes these."""
    return ops.native(name, tensors[0].device) if is_native(tensors) else None
