"""The dynamics, the noise and the schedules of consensus-based optimization, as pure functions.

Particles have the shape (runs, particles, coordinates), energies (runs, particles). :class:`optimzoo.CBO` is the
bookkeeping around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Column: TypeAlias = float | Tensor
"""A setting: a number, or a tensor over the coordinates where groups differ."""

# Every step has eight draws of random numbers.
NOISE, MEMORY_NOISE, KICK, ORDER, INIT, SURVIVORS, CLOSURE = range(7)


def draw_of(step: int, purpose: int) -> int:
    """The draw of a step's random numbers for one purpose."""
    return (8 * step + purpose) % 2**32


# Consensus


def weights(energies: Tensor, alpha: Tensor, reduce: Callable[[Tensor, str], Tensor] | None = None) -> Tensor:
    """softmax(-alpha energies) in float64; what is infinite weighs nothing, and if all is, all weights are zero.

    Args:
        energies: float64, shape (runs, particles), not NaN.
        alpha: shape (runs,).
        reduce: combines a tensor with those of other processes that hold other particles, by "min" or "sum".
    """
    lowest = least(energies)[:, None]
    if reduce is not None:
        lowest = reduce(lowest, "min")
    # Shifted before it is scaled: at alpha |e| of 1e4 the digits of e would be gone.
    exponent = (lowest - energies).mul_(alpha[:, None])
    if reduce is None:
        return exponent.softmax(-1).nan_to_num_(0.0)
    weight = exponent.exp_().nan_to_num_(0.0)
    return weight / reduce(weight.sum(-1, keepdim=True), "sum").clamp_min(1.0)


def least(energies: Tensor) -> Tensor:
    """The lowest of each run; infinite where this process holds none."""
    return energies.amin(-1) if energies.shape[-1] else energies.new_full(energies.shape[:1], math.inf)


def best_of(points: Tensor, energies: Tensor) -> tuple[Tensor, Tensor]:
    """The point of the lowest energy of each run, and that energy; infinite where this process holds none."""
    if not energies.shape[-1]:
        return points.new_zeros(points.shape[0], points.shape[2]), least(energies)
    lowest, where = energies.min(-1)
    return points[torch.arange(len(where), device=where.device), where], lowest


def mean(weight: Tensor, points: Tensor) -> Tensor:
    """The weighted mean, shape (runs, coordinates); a point without weight may be infinite."""
    share = weight[..., None, :].to(points.dtype)
    found = (share @ points).squeeze(-2)
    if not bool(found.isfinite().all()):  # zero times infinity; only then is a copy of all points worth its memory
        found = (share @ torch.where(weight[..., None] > 0, points, 0)).squeeze(-2)
    return found


def polarised_means(
    points: Tensor, others: Tensor, energies: Tensor, alpha: Tensor, *, kernel: str, kappa: float, kernel_alpha: bool
) -> Tensor:
    """For each point a mean of the others near it, which have the energies; one that nobody is near is its own."""
    r = torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist").double()
    if kernel == "gaussian":
        distance = (r / kappa).square() / 2
    elif kernel == "laplace":
        distance = r / kappa
    elif kernel == "inverse_quadratic":
        distance = (r / kappa).square().log1p()
    else:
        distance = torch.where(r <= kappa, 0.0, math.inf)
    factor, counts = alpha[:, None, None], (energies < math.inf)[:, None]
    shifted = energies - energies.amin(-1, keepdim=True)  # before it is scaled, as above
    exponent = -(factor if kernel_alpha else 1) * distance - factor * shifted[:, None]
    # Also where a difference of infinities is NaN.
    weight = exponent.where(counts, -math.inf).softmax(-1).nan_to_num(0.0).to(points.dtype)
    lonely = (weight == 0).all(-1, keepdim=True)
    return torch.where(lonely, points, weight @ others.where(counts.mT, 0))


# Dynamics


def gate(energies: Tensor, at_consensus: Tensor, correction: str, eps: float) -> Tensor:
    """What share of a move is made: none by a particle that is better than the consensus, shape (runs,).

    All move where one of the two losses is not finite: there is nothing to compare.
    """
    worse = energies - at_consensus[:, None]
    share = (worse > 0).double() if correction == "heaviside" else (1 + (worse / eps).tanh()) / 2
    return share.where(worse.isfinite(), 1.0)


def shaken(difference: Tensor, z: Tensor, *, noise: str, clip: float | None) -> Tensor:
    """Normal numbers times the distance, of each coordinate or of the whole particle, which ``clip`` truncates."""
    if noise == "anisotropic":
        return (difference if clip is None else difference.clamp(-clip, clip)) * z
    norm: Tensor = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    return (norm if clip is None else norm.clamp_max(clip)) * z


def moved(
    points: Tensor,
    towards: Tensor,
    z: Tensor,
    drift: Column,
    diffusion: Column,
    gates: tuple[Tensor, Tensor] | None = None,
    *,
    noise: str,
    clip: float | None,
    seen_from: Tensor | None = None,
) -> Tensor:
    """One Euler-Maruyama step towards a point.

    ``gates`` are the shares of drift and noise that each particle makes; ``seen_from`` are positions whose distances
    count in place of those of the points that move.
    """
    difference = (points if seen_from is None else seen_from) - towards
    step, shake = drift * difference, diffusion * shaken(difference, z, noise=noise, clip=clip)
    if gates is not None:
        step, shake = (part * share[..., None].to(part.dtype) for part, share in zip((step, shake), gates, strict=True))
    return points - step + shake


def adam_moved(
    points: Tensor,
    towards: Tensor,
    z: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lamda: Column,
    diffusion: Column,
    *,
    betas: tuple[float, float],
    step: int,
    noise: str,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's step along the distance; no learning rate on it, as in cbx. Returns points and both averages."""
    difference = points - towards
    exp_avg = exp_avg.lerp(difference, 1 - betas[0])
    exp_avg_sq = exp_avg_sq.lerp(difference.square(), 1 - betas[1])
    direction = exp_avg / (1 - betas[0] ** step) / ((exp_avg_sq / (1 - betas[1] ** step)).sqrt() + 1e-8)
    points = points - lamda * direction + diffusion * shaken(difference, z, noise=noise, clip=clip)
    return points, exp_avg, exp_avg_sq


def smoothed(memory: Tensor, points: Tensor, before: Tensor, seen: Tensor, rate: Column, beta: float) -> Tensor:
    """Personal bests moved towards particles, the more of ``rate`` the better a particle is: ``seen`` to ``before``."""
    share = ((1 + (beta * (before - seen)).tanh()) / 2).nan_to_num(0.0)[..., None]
    return torch.where(share > 0, memory + rate * share.to(memory.dtype) * (points - memory), memory)


Bounds: TypeAlias = float | tuple[float, float]
"""The radius of a ball about the origin, or the low and the high side of a box."""


def project_(points: Tensor, bounds: Bounds) -> Tensor:
    """Move points outside of the bounds to the nearest ones inside, in place."""
    if isinstance(bounds, tuple | list):
        return points.clamp_(*bounds)
    norm = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    return points.mul_((bounds / norm).clamp_max_(1.0))


def projected(points: Tensor, bounds: Bounds | None) -> Tensor:
    """The same in a copy; the points themselves if all are inside, to rounding."""
    if bounds is None:
        return points
    if not points.numel():
        return points
    if isinstance(bounds, tuple | list):
        low, high = points.aminmax()  # without temporaries; NaN, of which nothing can be said, is projected
        inside = (low >= bounds[0]) & (high <= bounds[1])
    else:
        inside = (torch.linalg.vector_norm(points, dim=-1) <= bounds * (1 + 1e-6)).all()
    return points if bool(inside) else project_(points.clone(), bounds)


# Schedules


def effective_alpha(energies: Tensor, share: float, alpha: Tensor, alpha_max: float) -> Tensor:
    """The alpha at which the effective sample size is ``share`` of the particles; of equal ones, the alpha it was.

    At most ``alpha_max``, which it is where even that leaves more particles.
    """
    finite = energies < math.inf
    largest = torch.finfo(energies.dtype).max
    shifted = (energies - energies.amin(-1, keepdim=True)).clamp_max(largest)  # a difference of finite ones may not be
    spread = torch.where(finite, shifted, 0.0).amax(-1)
    # From where all weigh alike. The upper end does not depend on the spread, which one outlier decides.
    high = torch.full_like(spread, math.log(alpha_max))
    low = torch.minimum(math.log(1e-9) - spread.log(), high)
    for _ in range(80):
        middle = (low + high) / 2
        weight = torch.where(finite, (-middle.exp()[:, None] * shifted).exp(), 0.0)
        large = weight.sum(-1).square() / weight.square().sum(-1) > share * finite.sum(-1)
        low, high = torch.where(large, middle, low), torch.where(large, high, middle)
    chosen = ((low + high) / 2).exp().clamp(torch.finfo(energies.dtype).tiny, alpha_max)
    return torch.where(spread > 0, chosen, alpha)


def next_batch(queue: Tensor, size: int, order: Tensor, leftover: str) -> tuple[Tensor, Tensor]:
    """The next mini-batch and the queue that is left: in a pass each particle has its turn.

    Args:
        queue: the particles whose turn is still to come.
        size: of the mini-batch.
        order: a permutation of all, which is the next pass if the queue is too short.
        leftover: "drop" what was left, or "carry" it to the front, its own turn in the new pass then being the last.
    """
    if len(queue) < size:
        again = torch.isin(order, queue)
        queue = torch.cat([queue, order[~again], order[again]]) if leftover == "carry" else order
    return queue[:size], queue[size:]


def spread(points: Tensor, count: int, reduce: Callable[[Tensor, str], Tensor]) -> Tensor:
    """The norm of the variances of the coordinates, float64, shape (runs,).

    ``count`` is how many particles there are, and ``reduce`` combines a tensor with those of other processes.
    """
    share, (variance, center) = points.shape[1] / count, torch.var_mean(points, 1, correction=0)
    if share == 0:  # a process without particles
        variance, center = torch.zeros_like(variance), torch.zeros_like(center)
    middle = reduce(share * center, "sum")
    variance = reduce(share * (variance + (center - middle).square()), "sum")
    norm: Tensor = torch.linalg.vector_norm(variance, dim=-1)
    return norm.double()


def survivors(count: int, ratio: float, mu: float, size: int) -> int:
    """How many particles stay when their spread has changed by a factor: whole mini-batches, and at least two."""
    factor = min(max(1 - mu + mu * ratio, 1 - mu), 1.0)
    return min(count, max(2, math.ceil(factor * count / size) * size))


def expected_log_ratio(drift: float, diffusion: float, dim: int = 1) -> float:
    """By how much the log of the distance to a fixed consensus grows in a step, on average; contraction is below 0.

    It is E log \\|(1 - drift) e + diffusion xi\\| for a unit vector e in ``dim`` dimensions and normal xi (``dim`` is 1
    for anisotropic noise), half the expected log of a noncentral chi-square.
    """
    left = abs(1 - drift)
    if diffusion == 0:
        return math.log(left) if left else -math.inf
    half = 0.5 * (left / diffusion) * (left / diffusion)  # of the noncentrality
    if half > 500:  # two terms of the delta method, divided by a square that may overflow
        small = (diffusion / left) * (diffusion / left)
        log_mean = math.log1p(dim * small) - small * (dim * small + 2) / (dim * small + 1) ** 2
        return math.log(left) + log_mean / 2
    j = torch.arange(int(half + 12 * math.sqrt(half) + 40), dtype=torch.float64, device="cpu")
    poisson = torch.exp(j * math.log(half) - half - torch.lgamma(j + 1)) if half > 0 else (j == 0).double()
    log_mean = math.log(2) + float((poisson * torch.special.digamma(j + dim / 2)).sum())
    return math.log(diffusion) + log_mean / 2


def critical_diffusion(drift: float, dim: int = 1) -> float:
    """The diffusion from which on particles spread: the zero of :func:`expected_log_ratio`; 0 where there is none."""
    low, high = 0.0, 4.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_log_ratio(drift, middle, dim) < 0 else (low, middle)
    return low


# Processes


class Ranks:
    """The processes of a group, each with particles of its own; without a group, this one alone.

    All must make the same calls, also those without particles.
    """

    def __init__(self, group: Any) -> None:
        self.group = group

    @property
    def size(self) -> int:
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    @property
    def number(self) -> int:
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    def share(self, count: int) -> tuple[int, int]:
        """Of ``count`` particles, the number of the first one here, and how many are here."""
        each, more = divmod(count, self.size)
        return self.number * each + min(self.number, more), each + (self.number < more)

    def reduce(self, tensor: Tensor, op: str) -> Tensor:
        """Combine with the tensors of the others, by "min" or "sum"."""
        if self.size == 1:
            return tensor
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        reductions = dict(min=torch.distributed.ReduceOp.MIN, sum=torch.distributed.ReduceOp.SUM)
        torch.distributed.all_reduce(tensor, reductions[op], group=self.group)
        return tensor

    def values(self, value: Any) -> list[Any]:
        """A value of each process, a Python object."""
        every = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(every, value, group=self.group)
        return every

    def gathered(self, rows: Tensor, first: int, count: int) -> Tensor:
        """All of ``count`` particles, or their energies, from those that are here, which begin with ``first``."""
        if self.size == 1:
            return rows
        every = rows.new_zeros(rows.shape[0], count, *rows.shape[2:])
        every[:, first : first + rows.shape[1]] = rows
        return self.reduce(every, "sum")

    def best(self, point: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
        """Of a point of each process, the one of the lowest energy, for each run; and that energy."""
        if self.size == 1:
            return point, energy
        lowest = self.reduce(energy, "min")
        owner = self.reduce(torch.where(energy == lowest, self.number, self.size), "min")
        return self.reduce(torch.where((owner == self.number)[:, None], point, 0), "sum"), lowest
