"""An audit of a private optimizer from outside: what it releases for gradients that are given to it.

The loss is linear, so that a row of data is the gradient of a sample, and a step of plain SGD with learning rate one
moves by what was released. Two parameters share the coordinates. Three questions are asked; each answer is a number
that says how bad it is, and tests show that planted bugs are found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

Make = Callable[..., torch.optim.Optimizer]
"""Called with ``params`` and with what a constructor takes; the audit sets learning rate, noise and batch size."""


def releases(optimizer: torch.optim.Optimizer, batches: Sequence[Tensor | None]) -> Tensor:
    """What the weights moved by in each step, times the expected batch size; for ``None`` a batch is declared empty."""
    params = optimizer.param_groups[0]["params"]
    expected = optimizer.expected_batch_size
    moved = []
    for batch in batches:
        before = [param.detach().clone() for param in params]
        if batch is not None:
            write(params, batch)
        optimizer.step(empty=batch is None)
        change = torch.cat([old - param.detach() for old, param in zip(before, params, strict=True)])
        moved.append(change.double() * expected)
        with torch.no_grad():
            for param in params:
                param.zero_()  # the loss is linear: nothing depends on where it is
    return torch.stack(moved)


def write(params: Sequence[Tensor], batch: Tensor) -> None:
    for param, part in zip(params, batch.split([len(param) for param in params], 1), strict=True):
        param.grad_sample = part.to(param.dtype)


def start(make: Make, dim: int, dtype: torch.dtype = torch.float64, **options: Any) -> torch.optim.Optimizer:
    settings = dict(lr=1.0, max_grad_norm=1.0, expected_batch_size=4, sample_rate=1.0)
    params = [torch.zeros(size, dtype=dtype, requires_grad=True) for size in (dim // 2, dim - dim // 2)]
    return make(params, **{**settings, **options})


# How much one record may change


def sensitivity(make: Make, error_norm: float = 0.0, rounds: int = 20, dtype: torch.dtype = torch.float64) -> float:
    """The largest change by one record, over what is allowed; infinite if something that is released is not finite.

    Adjacent data sets differ by a record that is there or zero, of every size, alone and in company, in a first step
    and after others; the noise is the same.
    """
    allowed = 1.0 + 2 * error_norm
    sizes = [1e-30, 1e-6, 0.5, 1.0, 1.1, 30.0, 1e12, 1e30, math.inf, math.nan]
    worst = 0.0
    for seed in range(rounds):
        draw = torch.Generator().manual_seed(seed)
        company = [torch.randn(seed % 4, 3, generator=draw, dtype=torch.float64) * 10.0**seed for _ in range(4)]
        for size in sizes:
            direction = torch.randn(3, generator=draw, dtype=torch.float64)
            record = direction / direction.norm() * size
            worlds = []
            for here in (record, torch.zeros(3, dtype=torch.float64)):
                optimizer = start(make, 3, dtype, noise_std_sum=0.1, generator=torch.Generator().manual_seed(1))
                worlds.append(releases(optimizer, [torch.cat([rows, here[None]]) for rows in company]))
            if not all(world.isfinite().all() for world in worlds):
                return math.inf
            change = (worlds[0] - worlds[1]).norm(dim=1)
            # In the first step there is no error yet; a sum in float32 is rounded.
            bounds = torch.tensor([1.0] + [allowed] * 3) * (1 + 1e-9 if dtype == torch.float64 else 1 + 1e-4)
            worst = max(worst, float((change / bounds).max()), float(change.norm() / (bounds.norm())))
    return worst


def batch_size_shows(make: Make) -> float:
    """How much one release of the same sum depends on how many samples it has: nothing, if all is well."""
    found = []
    for n in (1, 2, 8):
        optimizer = start(make, 3, noise_std_sum=0.1, generator=torch.Generator().manual_seed(1))
        rows = torch.zeros(n, 3, dtype=torch.float64)
        rows[0] = torch.tensor([0.5, 0.0, 0.0])
        found.append(releases(optimizer, [rows]))
    return max(float((other - found[0]).norm() / found[0].norm()) for other in found[1:])


# The law of the noise


def noise_p_value(make: Make, steps: int = 12, dim: int = 60, seeds: int = 6) -> float:
    """The smallest p-value of all tests of the noise, times how many there are: small if the law is another."""
    std = 2.0
    p_values: list[float] = []
    whole = []
    for sizes in ([8] * steps, [1] * steps, [0] * steps, [None] * steps):
        for _ in range(seeds):
            optimizer = start(make, dim, noise_std_sum=std)
            batches = [None if n is None else torch.zeros(n, dim, dtype=torch.float64) for n in sizes]
            noise = releases(optimizer, batches).numpy() / std  # (steps, dim)
            whole.append(noise)
            p_values.append(_variance_p(noise))
            p_values.append(stats.kstest(noise.ravel(), "norm").pvalue)
            p_values += [_variance_p(row) for row in noise]
            p_values.append(_mean_p(noise[1:] * noise[:-1]))  # one step and the next
            p_values.append(_mean_p(noise[:, 1:] * noise[:, :-1]))  # one coordinate and the next
            p_values.append(_mean_p(noise[:, : dim // 2] * noise[:, dim // 2 :]))  # one parameter and the other
    stacked = np.stack(whole)
    p_values += [_variance_p(stacked[:, :, i]) for i in range(dim)]
    p_values += [_mean_p(stacked[:, :, i]) for i in range(dim)]
    p_values.append(_mean_p(stacked[1:] * stacked[:-1]))  # one run and the next
    p_values += [_mean_p(stacked[: len(stacked) // 2] * stacked[len(stacked) // 2 :])]
    return float(min(p_values) * len(p_values))


def _variance_p(values: np.ndarray) -> float:
    """Of a variance of one, from both sides."""
    lower = float(stats.chi2.cdf((values**2).sum(), values.size))
    return 2 * min(lower, 1 - lower)


def _mean_p(values: np.ndarray) -> float:
    """Of a mean of zero and a variance of one, which products of independent normal numbers have as well."""
    return float(2 * stats.norm.sf(abs(values.sum()) / math.sqrt(values.size)))


# Who is in the data

DELTAS = (1e-5, 0.01, 0.1, 0.3, 0.6)


def attack(
    make: Make, runs: int = 400, steps: int = 4, rate: float = 1.0, size: float = 1e6, seed: int = 0, **options: Any
) -> float:
    """How far above the claimed curve an attack gets, in true positive rate: above zero the claim is refuted.

    Many runs with and without a record of a huge gradient, which is sampled at the rate that is claimed, besides one
    that pushes the error state to its other end. Half of the runs choose the score and the threshold; of the others
    come bounds by Clopper and Pearson, at a confidence of 1 - 1e-4 together.
    """
    generator, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    other = torch.tensor([-size / 2, 0.0, 0.0], dtype=torch.float64)
    canary = torch.tensor([size, 0.0, 0.0], dtype=torch.float64)
    claims: list[float] = []
    worlds = []
    for present in (True, False):
        rows = []
        for _ in range(runs):
            optimizer = start(make, 3, sample_rate=rate, generator=noise, **options)
            batches = []
            for _ in range(steps):
                taken = [row for row, here in ((other, True), (canary, present)) if here and generator.random() < rate]
                batches.append(torch.stack(taken) if taken else None)
            rows.append(releases(optimizer, batches)[:, 0].numpy())
        claims = claims or [optimizer.epsilon(delta) for delta in DELTAS]
        worlds.append(_scores(np.stack(rows)))
    return _excess(worlds[0], worlds[1], claims)


def _scores(rows: np.ndarray) -> np.ndarray:
    """Ways to look at what was released: each step, all, those after the first, their size."""
    return np.stack([*rows.T, rows.sum(1), rows[:, 1:].sum(1), np.abs(rows).max(1), np.abs(rows).sum(1)], 1)


def _excess(present: np.ndarray, absent: np.ndarray, claims: Sequence[float]) -> float:
    half = len(present) // 2
    best, chosen = -math.inf, (0, 0.0, 1)
    for column in range(present.shape[1]):
        values = np.concatenate([present[:half, column], absent[:half, column]])
        for threshold in np.quantile(values, np.linspace(0.02, 0.98, 49)):
            for sign in (1, -1):
                rates = [(sign * (world[:half, column] - threshold) > 0).mean() for world in (present, absent)]
                gain = rates[0] - _allowed(rates[1], claims)
                if gain > best:
                    best, chosen = gain, (column, threshold, sign)
    column, threshold, sign = chosen
    hits, alarms = (int((sign * (world[half:, column] - threshold) > 0).sum()) for world in (present, absent))
    n = len(present) - half
    low = stats.beta.ppf(5e-5, hits, n - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1 - 5e-5, alarms + 1, n - alarms) if alarms < n else 1.0
    return float(low - _allowed(high, claims))


def _allowed(false_positive: float, claims: Sequence[float]) -> float:
    """The true positive rate that the claims leave, in both directions of adjacency."""
    allowed = 1.0
    for delta, epsilon in zip(DELTAS, claims, strict=True):
        allowed = min(allowed, math.exp(min(epsilon, 700.0)) * false_positive + delta)
        allowed = min(allowed, 1 - (1 - delta - false_positive) * math.exp(-epsilon))
    return allowed
