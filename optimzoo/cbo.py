"""CBO: consensus-based optimization (Pinnau et al., 2017; Riedl et al., 2023, https://arxiv.org/abs/2306.09778).

The dynamics, the noise and the schedules are pure functions of particles, shape (runs, particles, coordinates), and
energies, shape (runs, particles). The class below them is bookkeeping.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from optimzoo import ops, random
from optimzoo.closure import check_loss, repeatable
from optimzoo.optimizer import Group, _check_number, check_flags, warn

Column: TypeAlias = float | Tensor
"""A setting: a number, or a tensor over the coordinates where groups differ."""

# Consensus


def weights(energies: Tensor, alpha: Tensor, reduce: Callable[[Tensor, str], Tensor] | None = None) -> Tensor:
    """softmax(-alpha energies) in float64; what is infinite weighs nothing, and if all is, all weights are zero.

    Args:
        energies: float64, shape (runs, particles), not NaN.
        alpha: shape (runs,).
        reduce: combines a tensor with those of other processes that hold other particles, by "min" or "sum".
    """
    lowest = energies.amin(-1, keepdim=True)
    if reduce is not None:
        lowest = reduce(lowest, "min")
    # Shifted before it is scaled: at alpha |e| of 1e4 the digits of e would be gone.
    exponent = (lowest - energies).mul_(alpha[:, None])
    if reduce is None:
        return exponent.softmax(-1).nan_to_num_(0.0)
    weight = exponent.exp_().nan_to_num_(0.0)
    return weight / reduce(weight.sum(-1, keepdim=True), "sum").clamp_min(1.0)


def mean(weight: Tensor, points: Tensor) -> Tensor:
    """The weighted mean, shape (runs, coordinates); a point without weight may be infinite."""
    counted = torch.where(weight[..., None] > 0, points, 0)
    return (weight[..., None, :].to(points.dtype) @ counted).squeeze(-2)


def polarised_means(
    points: Tensor, energies: Tensor, alpha: Tensor, *, kernel: str, kappa: float, kernel_alpha: bool
) -> Tensor:
    """A mean for each particle, of those near it; a particle that nobody is near is its own."""
    r = torch.linalg.vector_norm(points[:, :, None] - points[:, None], dim=-1).double()
    if kernel == "gaussian":
        distance = r.square() / (2 * kappa**2)
    elif kernel == "laplace":
        distance = r / kappa
    elif kernel == "inverse_quadratic":
        distance = (r.square() / kappa**2).log1p()
    else:
        distance = torch.where(r <= kappa, 0.0, math.inf)
    factor = alpha[:, None, None]
    shifted = energies - energies.amin(-1, keepdim=True)  # before it is scaled, as above
    exponent = -(factor if kernel_alpha else 1) * distance - factor * shifted[:, None]
    weight = exponent.softmax(-1).nan_to_num(0.0).to(points.dtype)
    lonely = (weight == 0).all(-1, keepdim=True)
    counted = torch.where(energies[..., None] < math.inf, points, 0)
    return torch.where(lonely, points, weight @ counted)


# Dynamics


def gate(energies: Tensor, at_consensus: Tensor, correction: str, eps: float) -> Tensor:
    """What share of a move is made: none by a particle that is better than the consensus, shape (runs,)."""
    worse = energies - at_consensus[:, None]
    if correction == "heaviside":
        return (worse > 0).double()
    return torch.where(energies == math.inf, 1.0, (1 + (worse / eps).tanh()) / 2)


def shaken(difference: Tensor, z: Tensor, *, noise: str, clip: float | None) -> Tensor:
    """Normal numbers times the distance, of each coordinate or of the whole particle, which ``clip`` truncates."""
    if noise == "anisotropic":
        return (difference if clip is None else difference.clamp(-clip, clip)) * z
    norm = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    return (norm if clip is None else norm.clamp_max(clip)) * z


def moved(
    points: Tensor,
    towards: Tensor,
    z: Tensor,
    drift: Column,
    diffusion: Column,
    drift_gate: Tensor | None = None,
    noise_gate: Tensor | None = None,
    *,
    noise: str,
    clip: float | None,
    seen_from: Tensor | None = None,
) -> Tensor:
    """One Euler-Maruyama step towards a point; ``seen_from`` are positions whose distances count instead."""
    difference = (points if seen_from is None else seen_from) - towards
    step, shake = drift * difference, diffusion * shaken(difference, z, noise=noise, clip=clip)
    if drift_gate is not None:
        step = step * drift_gate[..., None].to(step.dtype)
    if noise_gate is not None:
        shake = shake * noise_gate[..., None].to(shake.dtype)
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


# Schedules


def effective_alpha(energies: Tensor, share: float, alpha: Tensor, alpha_max: float) -> Tensor:
    """The alpha at which the effective sample size is ``share`` of the particles; of equal ones, the alpha it was."""
    finite = energies < math.inf
    shifted = energies - energies.amin(-1, keepdim=True)
    spread = torch.where(finite, shifted, 0.0).amax(-1)
    low, high = (torch.log(bound / spread) for bound in (1e-9, 1e9))
    for _ in range(60):
        middle = (low + high) / 2
        weight = torch.where(finite, (-middle.exp()[:, None] * shifted).exp(), 0.0)
        large = weight.sum(-1).square() / weight.square().sum(-1) > share * finite.sum(-1)
        low, high = torch.where(large, middle, low), torch.where(large, high, middle)
    return torch.where(spread > 0, ((low + high) / 2).exp().clamp_max(alpha_max), alpha)


def batch_indices(count: int, size: int, number: int, *, seed: int, since: int, leftover: str) -> Tensor:
    """The particles of mini-batch ``number``: consecutive parts of a permutation that is drawn once per pass."""

    def order(number_of_pass: int) -> Tensor:
        return random.permutation(count, seed=seed, draw=_draw(since + number_of_pass, _ORDER))

    if leftover == "drop":
        number_of_pass, place = divmod(number, count // size)
        return order(number_of_pass)[place * size : (place + 1) * size]
    number_of_pass, place = divmod(number * size, count)
    chosen = order(number_of_pass)[place : place + size]
    if len(chosen) < size:
        chosen = torch.cat([chosen, order(number_of_pass + 1)[: size - len(chosen)]])
    return chosen.unique()


def spread(points: Tensor) -> Tensor:
    """The norm of the variances of the coordinates, float64, shape (runs,)."""
    return torch.linalg.vector_norm(points.var(1, correction=0), dim=-1).double()


def survivors(count: int, ratio: float, mu: float, size: int) -> int:
    """How many particles stay when their spread has changed by a factor; whole mini-batches."""
    factor = min(max(1 - mu + mu * ratio, 1 - mu), 1.0)
    return min(count, math.ceil(factor * count / size) * size)


def expected_log_ratio(drift: float, diffusion: float, dim: int = 1) -> float:
    """By how much the log of the distance to a fixed consensus grows in a step, on average; contraction is below 0.

    It is E log \\|(1 - drift) e + diffusion xi\\| for a unit vector e in ``dim`` dimensions and normal xi (``dim`` is 1
    for anisotropic noise), half the expected log of a noncentral chi-square.
    """
    if diffusion == 0:
        return math.log(abs(1 - drift)) if drift != 1 else -math.inf
    half = ((1 - drift) / diffusion) ** 2 / 2  # of the noncentrality
    if half > 500:
        expected = dim + 2 * half  # two terms of the delta method
        log_mean = math.log(expected) - (dim + 4 * half) / expected**2
    else:
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


# Every step has eight draws of random numbers.
_NOISE, _MEMORY_NOISE, _KICK, _ORDER, _INIT, _SURVIVORS, _CLOSURE = range(7)


def _draw(step: int, purpose: int) -> int:
    return (8 * step + purpose) % 2**32


# What the settings may be: lower bound, upper bound (excluded), how to say it.
_TINY = math.nextafter(0.0, 1.0)
_ANY, _POSITIVE = (0.0, math.inf, "finite and >= 0"), (_TINY, math.inf, "finite and > 0")
_RANGES = dict(
    lr=_ANY,
    lamda=_ANY,
    sigma=_ANY,
    alpha=_POSITIVE,
    init_std=_ANY,
    correction_eps=_POSITIVE,
    noise_clip=_POSITIVE,
    lamda_memory=_ANY,
    sigma_memory=_ANY,
    grad_drift=_ANY,
    kappa=_POSITIVE,
    alpha_growth=_POSITIVE,
    alpha_max=_POSITIVE,
    sigma_decay=(_TINY, 1 + 1e-9, "in (0, 1]"),
    ess=(_TINY, 1.0, "in (0, 1)"),
    kick_below=_POSITIVE,
)
_OPTIONAL = ("noise_clip", "sigma_memory", "ess", "kick_below")
_CHOICES: dict[str, tuple[str | None, ...]] = dict(
    noise=("anisotropic", "isotropic"),
    update=("full", "partial"),
    leftover=("drop", "carry"),
    rule=("drift", "hopping", "adam"),
    correction=(None, "heaviside", "regularised"),
    correction_on=("both", "drift"),
    memory=(None, "fixed", "reevaluated"),
    memory_order=("sequential", "euler"),
    kernel=(None, "gaussian", "laplace", "inverse_quadratic", "bounded"),
)
_COUNTS = dict(n_particles=2, n_runs=1, particle_batch=2, patience=1)
# What each group has its own of, and what is one for all.
_PER_GROUP = ("lr", "lamda", "sigma")
_GLOBAL = ("seed", "alpha", "init_std", "betas", "correction_eps", "noise_clip", "lamda_memory", "sigma_memory",
           "grad_drift", "kappa", "kernel_alpha", "alpha_growth", "alpha_max", "sigma_decay", "ess", "kick_below",
           "bounds", "evaluate_consensus", *_CHOICES, *_COUNTS)  # fmt: skip


class CBO(Optimizer):
    r"""Minimises without gradients: copies of the weights drift to their loss-weighted mean, shaken by noise.

    .. math::
        c &= \frac{\sum_i e^{-\alpha f(x_i)}\, x_i}{\sum_i e^{-\alpha f(x_i)}} \\
        x_i &\leftarrow x_i - \lambda\gamma\, (x_i - c) + \sigma\sqrt{\gamma}\, (x_i - c) \odot \xi_i,
            \qquad \xi_i \sim N(0, 1)

    Isotropic noise has :math:`\|x_i - c\|_2\, \xi_i`, with the norm over all parameters. After a step the parameters
    hold the consensus :math:`c`.

    ``step(closure)`` needs a closure that returns the loss of what is in the live parameters and does not call
    ``backward``; it is called for each particle. With ``step(closure, batched=True)`` it is called once, with a list
    that has a tensor of shape (n_runs, n_particles, \*p.shape) for each parameter, in the order of the groups, and
    returns losses of shape (n_runs, n_particles); :func:`optimzoo.closure.vmapped` makes such a closure from the loss
    of one copy. (Mini-batches and the consensus come with other numbers of particles.) ``step`` returns the loss of the
    consensus where that was evaluated, else the lowest of the particles; a tensor of shape (n_runs,) for several runs.

    Args:
        params: tensors or parameter groups, floating-point and on one device. Groups may have their own ``lr``,
            ``lamda`` and ``sigma``.
        n_particles: copies of the weights, at least 2; each needs the memory of the weights. Default 100.
        lr: the time step :math:`\gamma`, so that a scheduler cools drift and noise. Default 0.1.
        lamda: drift, :math:`\lambda`, per unit of time. Default 1.
        sigma: noise, :math:`\sigma`, per root of the unit of time. Only :math:`\lambda\gamma` and
            :math:`\sigma\sqrt\gamma` matter. Default :math:`\sqrt{0.4}`.
        alpha: how sharply the weights prefer low losses, :math:`\alpha > 0`, in units of 1 / loss. Default 50, which
            the authors use with a cross-entropy divided by 10.
        noise: ``"anisotropic"`` or ``"isotropic"``. Isotropic noise contracts only for sigma below about
            :math:`\sqrt{2\lambda/d}`: not for networks. Default anisotropic.
        n_runs: independent runs at once; the parameters hold the consensus of the run that has seen the lowest loss.
            Default 1.
        particle_batch: evaluate this many particles a step, drawn without replacement until all had their turn; the
            consensus comes from them alone. Default all.
        update: what a step with ``particle_batch`` moves: ``"full"``, all, or ``"partial"``, those evaluated.
        leftover: particles left over at the end of a pass: ``"drop"``, or ``"carry"`` into the next pass.
        init_std: particle 0 starts at the parameters, the others at a normal distance of this deviation. Write to
            ``particles`` for another start. Default 1.
        seed: an integer; by default one is drawn from torch's generator.
        rule: ``"drift"``; ``"hopping"``, :math:`x_i \leftarrow c + \sigma \xi_i` (consensus hopping, no ``lr``);
            ``"adam"``, with Adam's direction along :math:`x_i - c`, scaled by ``lamda`` and not by ``lr``, in place
            of the drift.
        betas: weights of the past in the averages of ``"adam"``. Default (0.9, 0.99).
        correction: let particles that are better than the consensus rest: ``"heaviside"``
            (:math:`H = 1[f(x_i) > f(c)]`), ``"regularised"`` (:math:`H = (1 + \tanh((f(x_i) - f(c))/\epsilon))/2`), or
            ``None``. Costs an evaluation. Default ``None``.
        correction_on: :math:`H` on ``"both"`` drift and noise, or on the ``"drift"`` alone.
        correction_eps: :math:`\epsilon`, in units of the loss. Default 1e-3.
        noise_clip: distances enter the noise truncated to this. Default ``None``.
        memory: ``"fixed"``: the consensus is that of the personal bests :math:`y_i`, and particles are drawn to theirs;
            ``"reevaluated"``: personal bests are evaluated in every step, as a loss of mini-batches needs, at twice the
            cost. Default ``None``.
        lamda_memory, sigma_memory: drift and noise towards :math:`y_i`. Default 0.4 and ``lamda_memory * sigma``.
        memory_order: ``"sequential"``: the move towards :math:`y_i` starts where the other ended; ``"euler"``: both
            start from the same place.
        grad_drift: then move by ``-grad_drift * lr`` times the gradient at the particle, which costs a forward and a
            backward pass each. ``p.grad`` is not touched. Default 0.
        kernel: polarised consensus: each particle has its own, with weights that fall with the distance :math:`r`:
            ``"gaussian"`` (:math:`r^2 / 2\kappa^2`), ``"laplace"`` (:math:`r / \kappa`), ``"inverse_quadratic"``
            (:math:`\log(1 + r^2 / \kappa^2)`), ``"bounded"`` (:math:`r \le \kappa`). The parameters then hold that of
            the best particle. Costs :math:`N^2 d`. Default ``None``.
        kappa: the reach of the kernel, in units of the parameters. Default 1.
        kernel_alpha: multiply the kernel's exponent by ``alpha``. Default ``True``.
        alpha_growth, alpha_max: ``alpha`` is multiplied by the first after each step, up to the second. Default 1, 1e5.
        sigma_decay: ``sigma`` is multiplied by it after each step. Default 1.
        ess: choose ``alpha`` in each step so that the effective sample size is this share of the particles.
        kick_below: where no coordinate of the consensus has moved by this, add normal numbers times
            :math:`\sigma\sqrt\gamma` to all particles. Default ``None``.
        patience: after this many steps without a better loss, add normal numbers times :math:`0.1\sqrt\gamma`.
        bounds: (low, high), to which coordinates are clamped. Default ``None``.
        evaluate_consensus: evaluate the loss of the consensus in each step. Default ``False``.
        module: the network, if it has buffers that a forward pass changes (BatchNorm's running statistics): each
            evaluation then starts from the same, and what stays is the change by one evaluation of the consensus.
        process_group: particles are sharded over its ranks, each of which evaluates its own on the same data; give all
            the same ``seed``. The results do not depend on the number of ranks, up to rounding.

    Raises:
        TypeError, ValueError: a setting, parameter or loss is not one that the method can work with.
        RuntimeError: from ``step``, without a closure, or if it calls ``backward``.

    Warns:
        UserWarning: settings under which particles spread; all losses of a step are infinite or NaN, so that nothing
            moved.

    Every evaluation of a step sees the same random numbers (Dropout); torch's generators are left as they were. A
    particle with a loss that is not finite weighs nothing. The noise is a function of seed, step, particle and
    coordinate: results depend neither on threads nor, up to rounding, on processes, and there is no generator to save.
    Particles are float32 for 16-bit parameters. If the closure raises, nothing has changed.
    """

    def __init__(
        self,
        params: ParamsT,
        n_particles: int = 100,
        lr: float = 0.1,
        lamda: float = 1.0,
        sigma: float = 0.4**0.5,
        alpha: float = 50.0,
        *,
        noise: str = "anisotropic",
        n_runs: int = 1,
        particle_batch: int | None = None,
        update: str = "full",
        leftover: str = "drop",
        init_std: float = 1.0,
        seed: int | None = None,
        rule: str = "drift",
        betas: tuple[float, float] = (0.9, 0.99),
        correction: str | None = None,
        correction_on: str = "both",
        correction_eps: float = 1e-3,
        noise_clip: float | None = None,
        memory: str | None = None,
        lamda_memory: float = 0.4,
        sigma_memory: float | None = None,
        memory_order: str = "sequential",
        grad_drift: float = 0.0,
        kernel: str | None = None,
        kappa: float = 1.0,
        kernel_alpha: bool = True,
        alpha_growth: float = 1.0,
        alpha_max: float = 1e5,
        sigma_decay: float = 1.0,
        ess: float | None = None,
        kick_below: float | None = None,
        patience: int | None = None,
        bounds: tuple[float, float] | None = None,
        evaluate_consensus: bool = False,
        module: torch.nn.Module | None = None,
        process_group: Any = None,
    ) -> None:
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        self.module, self.process_group = module, process_group
        defaults = dict(
            n_particles=n_particles,
            lr=lr,
            lamda=lamda,
            sigma=sigma,
            alpha=alpha,
            noise=noise,
            n_runs=n_runs,
            particle_batch=particle_batch,
            update=update,
            leftover=leftover,
            init_std=init_std,
            seed=seed,
            rule=rule,
            betas=betas,
            correction=correction,
            correction_on=correction_on,
            correction_eps=correction_eps,
            noise_clip=noise_clip,
            memory=memory,
            lamda_memory=lamda_memory,
            sigma_memory=sigma_memory,
            memory_order=memory_order,
            grad_drift=grad_drift,
            kernel=kernel,
            kappa=kappa,
            kernel_alpha=kernel_alpha,
            alpha_growth=alpha_growth,
            alpha_max=alpha_max,
            sigma_decay=sigma_decay,
            ess=ess,
            kick_below=kick_below,
            patience=patience,
            bounds=bounds,
            evaluate_consensus=evaluate_consensus,
        )
        super().__init__(params, defaults)

    # Groups

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with ``lr``, ``lamda`` and ``sigma`` of their own if they have them.

        Their particles start around them, whatever the others have come to.

        Raises:
            TypeError, ValueError: as the constructor does; the optimizer then has the groups it had.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            _check_uniform(self.param_groups)
            self._grow(group)
        except Exception:
            self.param_groups.pop()
            raise
        drift, diffusion = group["lamda"] * float(group["lr"]), group["sigma"] * float(group["lr"]) ** 0.5
        dim = 1 if group["noise"] == "anisotropic" else sum(self._sizes)
        if group["rule"] == "drift" and group["noise_clip"] is None and drift > 0 and dim > 0:
            growth = expected_log_ratio(drift, diffusion, dim)
            if growth >= 0:
                critical = critical_diffusion(drift, dim) / float(group["lr"]) ** 0.5
                warn(
                    f"particles will spread and not contract: the log of their distance to the consensus grows by "
                    f"{growth:.3g} a step at sigma={group['sigma']:.4g}; it must be negative, for which sigma must be "
                    f"below {critical:.4g} at this lr and lamda"
                )

    def _check_group(self, group: Group) -> None:
        for index, param in enumerate(group["params"]):
            if not param.is_floating_point():
                raise ValueError(f"params[{index}] must have a real floating-point dtype, got {param.dtype}")
            if type(param) not in (torch.Tensor, torch.nn.Parameter) or param.layout is not torch.strided:
                raise ValueError(f"params[{index}] must be a plain strided tensor, got {type(param).__name__}")
            if param.device != self._first.device:
                raise ValueError(f"params[{index}] is on {param.device}, the first one on {self._first.device}")
            if group["grad_drift"] and not param.requires_grad:
                raise ValueError(f"grad_drift needs parameters that require gradients; params[{index}] does not")
        for name, (low, high, allowed) in _RANGES.items():
            if group[name] is not None or name not in _OPTIONAL:
                _check_number(name, group[name], low, high, allowed)
        for name, least in _COUNTS.items():
            value = group[name]
            if value is None and name in ("particle_batch", "patience"):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, choices in _CHOICES.items():
            if group[name] not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {group[name]!r}")
        check_flags(group, "kernel_alpha", "evaluate_consensus")
        seed, betas, bounds = group["seed"], group["betas"], group["bounds"]
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        for beta in betas:
            _check_number("betas", beta, 0.0, 1.0, "in [0, 1)")
        if bounds is not None and (not isinstance(bounds, tuple | list) or len(bounds) != 2 or bounds[0] >= bounds[1]):
            raise ValueError(f"bounds must be (low, high) with low < high, got {bounds!r}")
        if (group["particle_batch"] or 0) > group["n_particles"]:
            raise ValueError(
                f"particle_batch must be at most n_particles={group['n_particles']}, got {group['particle_batch']}"
            )
        self._check_combination(group)

    def _check_combination(self, group: Group) -> None:
        if group["correction"] and group["rule"] != "drift":
            raise ValueError(f"correction goes with rule='drift', got rule={group['rule']!r}")
        if group["memory"] and (group["kernel"] or group["rule"] != "drift"):
            raise ValueError("memory goes with rule='drift' and without a kernel")
        if group["kernel"] and self._world > 1:
            raise ValueError("kernel needs all particles in one process; leave out process_group")
        if group["n_particles"] < 2 * self._world:
            raise ValueError(f"n_particles must be at least two for each of {self._world} processes")

    @property
    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    @property
    def _first(self) -> Tensor:
        return self._params[0]

    @property
    def _sizes(self) -> list[int]:
        return [param.numel() for param in self._params]

    @property
    def _dtype(self) -> torch.dtype:
        """Of the particles."""
        return torch.float64 if any(param.dtype == torch.float64 for param in self._params) else torch.float32

    @property
    def _swarm(self) -> dict[str, Any]:
        """What all parameters share; it is the state of the first one, as in ``torch.optim.LBFGS``."""
        return self.state[self._first]

    def _grow(self, group: Group) -> None:
        """Make particles for the parameters of the last group."""
        if not group["params"]:
            return
        dtype, device = self._dtype, self._first.device
        swarm, runs, count = self._swarm, group["n_runs"], group["n_particles"]
        if not swarm:
            rank, world = self._rank, self._world
            first = rank * (count // world) + min(rank, count % world)
            local = count // world + (rank < count % world)
            energies = torch.full((runs, local), math.inf, dtype=torch.float64, device=device)
            worst = torch.full((runs,), math.inf, dtype=torch.float64, device=device)
            swarm.update(step=0, epoch=0, batches=0, since=0, first=first, count=count)
            swarm.update(energies=energies, best_loss=worst, consensus_loss=worst.clone(), spread=worst.clone())
            swarm.update(alpha=torch.full_like(worst, group["alpha"]))
            swarm.update(waited=torch.zeros(runs, dtype=torch.int64, device=device))
            empty = torch.empty(runs, local, 0, dtype=dtype, device=device)
            swarm.update(particles=empty, consensus=empty[:, 0], best=empty[:, 0])
            if group["memory"]:
                swarm.update(memory=empty, memory_energies=energies.clone())
            if group["rule"] == "adam":
                swarm.update(exp_avg=empty, exp_avg_sq=empty)
        runs, local, old = swarm["particles"].shape
        center = torch.cat([param.detach().reshape(-1).to(dtype) for param in group["params"]])
        # All coordinates are drawn, so that it does not matter how they are split into groups.
        around = torch.empty(runs, local, old + len(center), dtype=dtype, device=device)
        random.normal(around, seed=group["seed"], draw=_draw(swarm["step"], _INIT), first=swarm["first"])
        around = center + group["init_std"] * around[..., old:]
        if swarm["first"] == 0:
            around[:, 0] = center
        fresh = dict(particles=around, memory=around, exp_avg=torch.zeros_like(around))
        fresh.update(consensus=center.expand(runs, -1), best=center.expand(runs, -1), exp_avg_sq=fresh["exp_avg"])
        for name, columns in fresh.items():
            if name in swarm:
                swarm[name] = torch.cat([swarm[name].to(dtype), columns], -1)

    # What can be read

    def _views(self, rows: Tensor) -> list[Tensor]:
        """The parts of a tensor (..., coordinates) that belong to each parameter, in its shape."""
        parts = rows.split(self._sizes, -1)
        return [part.view((*rows.shape[:-1], *p.shape)) for part, p in zip(parts, self._params, strict=True)]

    @property
    def particles(self) -> list[Tensor]:
        r"""For each parameter, its particles of shape (n_runs, n_particles, \*p.shape); write to them in place."""
        return self._views(self._swarm["particles"])

    @property
    def energies(self) -> Tensor:
        """The last known loss of each particle, shape (n_runs, n_particles)."""
        energies: Tensor = self._swarm["energies"]
        return energies

    @property
    def alpha(self) -> Tensor:
        """The present alpha of each run; write to it in place for a schedule of your own."""
        alpha: Tensor = self._swarm["alpha"]
        return alpha

    @property
    def consensus(self) -> list[Tensor]:
        r"""For each parameter, the consensus of each run, shape (n_runs, \*p.shape)."""
        return self._views(self._swarm["consensus"])

    @property
    def consensus_loss(self) -> Tensor:
        """The loss of the consensus of each run; infinite where the last step did not evaluate it."""
        loss: Tensor = self._swarm["consensus_loss"]
        return loss

    @property
    def best(self) -> list[Tensor]:
        r"""For each parameter, the particle of the lowest loss that each run has seen, shape (n_runs, \*p.shape)."""
        return self._views(self._swarm["best"])

    @property
    def best_loss(self) -> Tensor:
        """The lowest loss that each run has seen, on whatever data that was."""
        loss: Tensor = self._swarm["best_loss"]
        return loss

    @contextlib.contextmanager
    def swap_in(self, which: int | str, run: int | None = None) -> Iterator[None]:
        """Put a particle, by its number, or ``"best"`` or ``"consensus"``, into the parameters for a while.

        Args:
            which: what to put in.
            run: of which run; by default the one that has seen the lowest loss.
        """
        run = int(self.best_loss.argmin()) if run is None else run
        if not (isinstance(which, int) or which in ("best", "consensus")):
            raise ValueError(f"which must be a number, 'best' or 'consensus', got {which!r}")
        row = self._swarm["particles"][run, which] if isinstance(which, int) else self._swarm[which][run]
        kept = [param.detach().clone() for param in self._params]
        self._write(row)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._params, kept)

    @torch.no_grad()
    def _write(self, row: Tensor) -> None:
        torch._foreach_copy_(self._params, self._views(row))

    # Schedules that the user calls

    def cool(self) -> None:
        """The authors' cooling, at the end of epoch e = 1, 2, ...: sigma times log2(e+1) / log2(e+2), alpha times 2."""
        self._swarm["epoch"] += 1
        epoch = self._swarm["epoch"]
        for group in self.param_groups:
            group["sigma"] *= math.log2(epoch + 1) / math.log2(epoch + 2)
        self.alpha.mul_(2).clamp_(max=self.param_groups[0]["alpha_max"])

    def reduce(self, mu: float = 0.2) -> int:
        """Drop particles at random as their spread shrinks, at the end of an epoch; returns how many stay.

        The number is multiplied by (1 - mu) + mu times the ratio of spreads since the last call, within [1 - mu, 1],
        and rounded up to whole mini-batches. The spread is the norm of the variances of the coordinates.
        """
        _check_number("mu", mu, 0.0, 1.0, "in [0, 1)")
        if self._world > 1:
            raise RuntimeError("reduce is for particles in one process")
        swarm, options = self._swarm, self.param_groups[0]
        if swarm["step"] == 0:
            return int(swarm["count"])
        size, now = options["particle_batch"] or 1, spread(swarm["particles"])
        # Runs stay together: the one that has shrunk least decides.
        ratio = float((now / swarm["spread"]).nan_to_num(1.0).max())
        count = survivors(swarm["count"], ratio, mu, size)
        swarm["spread"] = now
        if count < swarm["count"]:
            order = random.permutation(
                swarm["count"], seed=options["seed"], draw=_draw(swarm["step"], _SURVIVORS)
            )
            keep = order[:count].sort().values.to(now.device)
            for name in ("particles", "energies", "memory", "memory_energies", "exp_avg", "exp_avg_sq"):
                if name in swarm:
                    swarm[name] = swarm[name][:, keep]
            swarm.update(count=count, batches=0, since=swarm["step"])
        return count

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | Callable[[list[Tensor]], Tensor] | None = None, *, batched: bool = False) -> Tensor:  # type: ignore[override]  # a closure is not optional
        """Evaluate the particles and move them; see the class.

        Args:
            closure: returns the loss of the live parameters, or, with ``batched``, the losses of stacked ones.
            batched: which of the two.

        Returns:
            The loss of the consensus where it is evaluated, else the lowest one of the particles.
        """
        if closure is None:
            raise RuntimeError("CBO needs a closure that returns the loss: optimizer.step(closure)")
        if batched and self.module is not None:
            raise ValueError("module is for closures that evaluate the live parameters, not for batched=True")
        options, swarm = self.param_groups[0], self._swarm
        x, t, seed, first = swarm["particles"], swarm["step"], options["seed"], swarm["first"]
        runs, local, _ = x.shape
        lrs = [float(group["lr"]) for group in self.param_groups]
        sigmas = [group["sigma"] for group in self.param_groups]
        roots = [math.sqrt(lr) for lr in lrs]
        drifts = [group["lamda"] * lr for group, lr in zip(self.param_groups, lrs, strict=True)]
        diffusions = [sigma * root for sigma, root in zip(sigmas, roots, strict=True)]

        def z(purpose: int) -> Tensor:
            return random.normal(torch.empty_like(x), seed=seed, draw=_draw(t, purpose), first=first)

        index = self._batch()
        turn = torch.full((local,), index is None, device=x.device)
        if index is not None:
            turn[index] = True
        plain = options["rule"] == "drift" and not (options["kernel"] or options["memory"] or options["grad_drift"])
        native = ops.native("cbo_", x.device) if plain and x.is_contiguous() else None
        wants_loss = bool(options["correction"] or options["evaluate_consensus"] or self.module is not None)
        started = spread(x) if t == 0 and self._world == 1 else swarm["spread"]

        with _Evaluation(self, closure, batched, random.integer(seed, _draw(t, _CLOSURE))) as evaluation:
            seen = self._energies(evaluation, x, index)
            lowest = self._reduce(seen.amin(-1), "min")
            improved = lowest < swarm["best_loss"]
            best = swarm["best"]
            if improved.any():
                best = torch.where(improved[:, None], self._owned(seen, lowest, x), best)

            points, energies = x, seen
            if options["memory"]:
                points, energies = swarm["memory"], swarm["memory_energies"]
                if options["memory"] == "reevaluated" and t > 0:
                    energies = torch.where(turn, self._energies(evaluation, points, index), energies)
                points = torch.where((seen < energies)[..., None], x, points)
                own_best, own_energies = points, torch.minimum(seen, energies)
                energies = torch.where(turn, own_energies, math.inf)
            alive = (self._reduce(energies.amin(-1), "min") if options["memory"] else lowest) < math.inf
            all_alive = bool(alive.all())

            alpha = swarm["alpha"]
            if options["ess"] is not None:
                alpha = effective_alpha(self._gathered(energies), options["ess"], alpha, options["alpha_max"])
            weight = weights(energies, alpha, self._reduce if self._world > 1 else None)
            # The native step finds the consensus on its way, unless somebody wants to look at it before.
            one_pass = native is not None and all_alive and self._world == 1 and not wants_loss
            c = torch.empty_like(swarm["consensus"]) if one_pass else swarm["consensus"]
            towards = c[:, None]
            if options["kernel"]:
                kernel = {name: options[name] for name in ("kernel", "kappa", "kernel_alpha")}
                towards = polarised_means(x, energies, alpha, **kernel)
                c = torch.where(alive[:, None], towards[torch.arange(runs), energies.argmin(-1)], c)
            elif not one_pass:
                c = torch.where(alive[:, None], self._reduce(mean(weight, points), "sum"), c)
                towards = c[:, None]

            loss = at_consensus = None
            drift_gate = noise_gate = None
            everyone = index is None or options["update"] == "full"
            every = everyone and all_alive
            moves = alive[:, None] & (torch.ones_like(turn) if everyone else turn)
            if wants_loss:
                loss = at_consensus = evaluation.losses(c[:, None], keep_buffers=True)[:, 0]
            known = seen if index is None else torch.where(turn, seen, swarm["energies"])
            if options["correction"]:
                assert at_consensus is not None
                drift_gate = gate(known, at_consensus, options["correction"], options["correction_eps"])
                noise_gate = drift_gate if options["correction_on"] == "both" else torch.ones_like(drift_gate)
            new = x
            averages: dict[str, Tensor] = {}
            if native is None:
                noise = dict(noise=options["noise"], clip=options["noise_clip"])
                drift, diffusion = self._columns(drifts), self._columns(diffusions)
                if options["rule"] == "hopping":
                    new = towards + self._columns(sigmas) * z(_NOISE)
                elif options["rule"] == "adam":
                    lamda = self._columns([group["lamda"] for group in self.param_groups])
                    old = swarm["exp_avg"], swarm["exp_avg_sq"]
                    how = dict(betas=options["betas"], step=t + 1, **noise)
                    new, *two = adam_moved(x, towards, z(_NOISE), *old, lamda, diffusion, **how)
                    for name, average in zip(("exp_avg", "exp_avg_sq"), two, strict=True):
                        averages[name] = torch.where(moves[..., None], average, swarm[name])
                else:
                    new = moved(x, towards, z(_NOISE), drift, diffusion, drift_gate, noise_gate, **noise)
                if options["memory"]:
                    relative, sigma_memory = options["lamda_memory"], options["sigma_memory"]
                    if sigma_memory is None:
                        second = self._columns([relative * diffusion for diffusion in diffusions])
                    else:
                        second = self._columns([sigma_memory * root for root in roots])
                    seen_from = x if options["memory_order"] == "euler" else None
                    first_drift = self._columns([relative * lr for lr in lrs])
                    new = moved(new, own_best, z(_MEMORY_NOISE), first_drift, second, seen_from=seen_from, **noise)
                if options["grad_drift"]:
                    size = self._columns([options["grad_drift"] * lr for lr in lrs])
                    new = new - size * evaluation.gradients(new, moves)
                if not every:
                    new = torch.where(moves[..., None], new, x)

        # Nothing fails from here on.
        if native is not None:
            if not every:
                drift_gate = moves.double() if drift_gate is None else drift_gate * moves
                noise_gate = moves.double() if noise_gate is None else noise_gate * moves
            ends = torch.tensor(self._ends, device="cpu")
            per_group = (torch.tensor(value, dtype=torch.float64, device="cpu") for value in (drifts, diffusions))
            native(
                x,
                c,
                weight if one_pass else None,
                ends,
                *per_group,
                drift_gate,
                noise_gate,
                torch.empty_like(weight) if options["noise"] == "isotropic" else None,
                options["noise_clip"] or math.inf,
                seed,
                _draw(t, _NOISE),
                first,
            )
        else:
            x.copy_(new)

        waited = torch.where(improved, 0, swarm["waited"] + 1)
        if options["kick_below"] is not None and t > 0:
            still = alive & ((c - swarm["consensus"]).abs().amax(-1) < options["kick_below"])
            if still.any():
                x += still[:, None, None] * (self._columns(diffusions) * z(_KICK))
        if options["patience"] is not None:
            stuck = alive & (waited >= options["patience"])
            if stuck.any():
                x += stuck[:, None, None] * (self._columns([0.1 * root for root in roots]) * z(_KICK))
                waited = torch.where(stuck, 0, waited)
        if options["bounds"] is not None:
            x.clamp_(*options["bounds"])

        if loss is None:
            loss = lowest
        if not all_alive:
            warn(f"all losses of {int((~alive).sum())} of {runs} runs are infinite or NaN: their particles stay")
            loss = torch.where(alive, loss, math.inf)
        if options["memory"]:
            swarm.update(memory=own_best, memory_energies=own_energies)
        if options["alpha_growth"] != 1:
            alpha = torch.where(alive, (alpha * options["alpha_growth"]).clamp_max(options["alpha_max"]), alpha)
        if options["sigma_decay"] != 1 and alive.any():
            for group in self.param_groups:
                group["sigma"] *= options["sigma_decay"]
        swarm.update(
            step=t + 1,
            batches=swarm["batches"] + 1,
            spread=started,
            alpha=alpha,
            energies=known,
            best=best,
            best_loss=torch.minimum(lowest, swarm["best_loss"]),
            consensus=c,
            consensus_loss=torch.full_like(lowest, math.inf) if at_consensus is None else at_consensus,
            waited=waited,
            **averages,
        )
        self._write(c[int(swarm["best_loss"].argmin()) if runs > 1 else 0])
        evaluation.commit()
        return loss if runs > 1 else loss[0]

    def _batch(self) -> Tensor | None:
        """Which of the particles here this step evaluates; ``None`` is all."""
        options, swarm = self.param_groups[0], self._swarm
        size, first = options["particle_batch"], swarm["first"]
        if size is None or size >= swarm["count"]:
            return None
        how = dict(seed=options["seed"], since=swarm["since"], leftover=options["leftover"])
        chosen = batch_indices(swarm["count"], size, swarm["batches"], **how).sort().values - first
        here = (chosen >= 0) & (chosen < swarm["particles"].shape[1])
        return chosen[here].to(self._first.device)

    def _energies(self, evaluation: _Evaluation, points: Tensor, index: Tensor | None) -> Tensor:
        """Losses, infinite where there is none or it is not finite."""
        if index is None:
            return evaluation.losses(points)
        energies = torch.full(points.shape[:2], math.inf, dtype=torch.float64, device=points.device)
        energies[:, index] = evaluation.losses(points[:, index])
        return energies

    @property
    def _ends(self) -> list[int]:
        """The coordinate where each group ends."""
        sizes = [sum(param.numel() for param in group["params"]) for group in self.param_groups]
        return [sum(sizes[: i + 1]) for i in range(len(sizes))]

    def _columns(self, values: Sequence[float]) -> Column:
        """Values of the groups as values of the coordinates."""
        if len(set(values)) == 1:
            return values[0]
        like = self._swarm["particles"]
        ends = torch.tensor([0, *self._ends], device=like.device)
        return torch.tensor(values, dtype=like.dtype, device=like.device).repeat_interleave(ends.diff())

    # Processes

    @property
    def _world(self) -> int:
        return 1 if self.process_group is None else torch.distributed.get_world_size(self.process_group)

    @property
    def _rank(self) -> int:
        return 0 if self.process_group is None else torch.distributed.get_rank(self.process_group)

    def _reduce(self, tensor: Tensor, op: str) -> Tensor:
        """Combine with the tensors of the other ranks, by "min" or "sum"."""
        if self._world == 1:
            return tensor
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        ops_ = dict(min=torch.distributed.ReduceOp.MIN, sum=torch.distributed.ReduceOp.SUM)
        torch.distributed.all_reduce(tensor, ops_[op], group=self.process_group)
        return tensor

    def _gathered(self, energies: Tensor) -> Tensor:
        """The energies of the particles of all ranks."""
        if self._world == 1:
            return energies
        swarm = self._swarm
        every = energies.new_full((energies.shape[0], swarm["count"]), math.inf)
        every[:, swarm["first"] : swarm["first"] + energies.shape[1]] = energies
        return self._reduce(every, "min")

    def _owned(self, seen: Tensor, lowest: Tensor, x: Tensor) -> Tensor:
        """The particle of the lowest energy of all ranks."""
        runs, where = torch.arange(x.shape[0], device=x.device), seen.argmin(-1)
        own = x[runs, where]
        if self._world == 1:
            return own
        has = seen[runs, where] == lowest
        owner = self._reduce(torch.where(has, self._rank, self._world), "min")
        return self._reduce(torch.where((owner == self._rank)[:, None], own, 0), "sum")

    # Checkpoints

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "module": self.module, "process_group": self.process_group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("module", None)
        self.__dict__.setdefault("process_group", None)
        for group in self.param_groups:  # a pickle of an older version lacks what has been added since
            for name in (*_PER_GROUP, *_GLOBAL):  # torch puts a setting of its own among the defaults
                group.setdefault(name, self.defaults.get(name))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load particles, schedules and settings; a run that goes on equals one that was not interrupted, bit for bit.

        Args:
            state_dict: what ``state_dict`` returned, on any device; under ``process_group``, on the same rank.

        Raises:
            ValueError: groups, particles or settings that do not fit; nothing has changed then.
        """
        loaded: dict[str, Any] = {}

        def prepare(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            loaded.update(self._complete(state_dict))
            return loaded

        def restore(_: Optimizer) -> None:
            # torch has cast everything to the dtype of the first parameter.
            index = loaded["param_groups"][0]["params"][0]
            device, dtype = self._first.device, self._dtype
            for name, value in loaded["state"][index].items():
                if isinstance(value, Tensor):
                    value = value.to(device, dtype if name in _POINTS else value.dtype, copy=True)
                self._swarm[name] = value

        # After the user's pre-hooks, which may replace the dictionary, and before the user's post-hooks.
        handles = [
            self.register_load_state_dict_pre_hook(prepare),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _complete(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of a state dict with all settings of this optimizer; raises where the two do not fit."""
        for key in ("state", "param_groups"):
            if key not in state_dict:
                raise ValueError(f"state_dict lacks {key!r}; it has {sorted(map(str, state_dict))}")
        saved, own = state_dict["param_groups"], self.param_groups
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in own]:
            return state_dict  # torch has an error for this
        groups = [
            {**{name: group[name] for name in (*_PER_GROUP, *_GLOBAL)}, **saved_group}
            for saved_group, group in zip(saved, own, strict=True)
        ]
        for merged, group in zip(groups, own, strict=True):
            self._check_group({**merged, "params": group["params"]})
        _check_uniform(groups)
        index = next(index for group in saved for index in group["params"])
        swarm = state_dict["state"].get(index, {})
        needs = set(_SHARED)
        needs |= {"memory", "memory_energies"} if groups[0]["memory"] else set()
        needs |= {"exp_avg", "exp_avg_sq"} if groups[0]["rule"] == "adam" else set()
        if not needs <= swarm.keys():
            raise ValueError(f"the state of parameter {index} lacks {', '.join(sorted(needs - swarm.keys()))}")
        shape, rows = tuple(swarm["particles"].shape), tuple(swarm["energies"].shape)
        if len(shape) != 3 or shape[:2] != rows or shape[2] != sum(self._sizes):
            raise ValueError(
                f"particles of parameter {index} must have shape (n_runs, n_particles, {sum(self._sizes)}) "
                f"and energies shape (n_runs, n_particles), got {shape} and {rows}"
            )
        return {**state_dict, "param_groups": groups}


_POINTS = ("particles", "consensus", "best", "memory", "exp_avg", "exp_avg_sq")
_SHARED = ("particles", "consensus", "best", "energies", "best_loss", "consensus_loss", "spread", "alpha", "waited",
           "step", "epoch", "batches", "since", "first", "count")  # fmt: skip


def _check_uniform(groups: Sequence[Group]) -> None:
    for group in groups:
        for name in _GLOBAL:
            if group[name] != groups[0][name]:
                raise ValueError(f"{name} is one for all groups, got {groups[0][name]!r} and {group[name]!r}")


class _Evaluation:
    """The closure of one step; while it runs, parameters, buffers and torch's generators are its to use.

    They come back at the end, whatever happens.
    """

    def __init__(self, optimizer: CBO, closure: Callable[..., Any], batched: bool, seed: int) -> None:
        self.optimizer, self.closure, self.batched, self.seed = optimizer, closure, batched, seed
        self.params = optimizer._params
        self.kept = [] if batched else [param.detach().clone() for param in self.params]
        self.buffers = list(optimizer.module.buffers()) if optimizer.module is not None else []
        self.clean = [buffer.clone() for buffer in self.buffers]
        self.after = self.clean
        self.watched = not batched

    def __enter__(self) -> _Evaluation:
        self.stack = contextlib.ExitStack()
        self.reseed = self.stack.enter_context(repeatable(self.params[0].device))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()
        if self.kept:
            torch._foreach_copy_(self.params, self.kept)
        self._restore(self.clean)

    def commit(self) -> None:
        """Leave the buffers as the consensus left them."""
        self._restore(self.after)

    def _restore(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.copy_(value)

    def losses(self, points: Tensor, keep_buffers: bool = False) -> Tensor:
        """Float64 losses of points (runs, n, coordinates), infinite where they are not finite."""
        runs, count, _ = points.shape
        if count == 0:  # a process that no particle of a mini-batch belongs to
            return torch.empty(runs, 0, dtype=torch.float64, device=points.device)
        if self.batched:
            losses = check_loss(self._call(self.optimizer._views(points)), (runs, count)).to(points.device)
        else:
            rows = [self._one(points[run, i]) for run in range(runs) for i in range(count)]
            losses = torch.stack(rows).to(points.device).view(runs, count)
        if keep_buffers:
            self.after = [buffer.clone() for buffer in self.buffers]
        return losses.nan_to_num(math.inf, math.inf, math.inf)

    def gradients(self, points: Tensor, moves: Tensor) -> Tensor:
        """The gradient of the loss at each point that moves, zero elsewhere."""
        if self.batched:
            leaf = points.detach().clone().requires_grad_()
            with torch.enable_grad():
                losses = check_loss(self._call(self.optimizer._views(leaf)), tuple(points.shape[:2]))
                _check_graph(losses)
                (result,) = torch.autograd.grad(losses.sum(), leaf)
            return result * moves[..., None]
        result = torch.zeros_like(points)
        for run, i in moves.nonzero().tolist():
            self.optimizer._write(points[run, i])
            self._restore(self.clean)
            with torch.enable_grad():
                loss = check_loss(self._call())
                _check_graph(loss)
                grads = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
            result[run, i] = torch.cat([grad.reshape(-1).to(points.dtype) for grad in grads])
        return result

    def _one(self, row: Tensor) -> Tensor:
        self.optimizer._write(row)
        self._restore(self.clean)
        if not self.watched:
            return check_loss(self._call()).detach()
        self.watched = False
        before = [_version(param.grad) for param in self.params]
        loss = check_loss(self._call()).detach()
        if any(param.grad is not None and _version(param.grad) != b for param, b in zip(self.params, before, strict=True)):
            raise RuntimeError("the closure called backward(): CBO needs no gradients; return the loss alone")
        return loss

    def _call(self, *args: Any) -> Any:
        self.reseed(self.seed)
        try:
            return self.closure(*args)
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise RuntimeError(
                    "the closure called backward(): CBO needs no gradients; remove the call and return the loss alone"
                ) from error
            raise


def _check_graph(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise RuntimeError("grad_drift needs a closure whose loss autograd can follow; this one has no graph")


def _version(grad: Tensor | None) -> tuple[int, int] | None:
    return None if grad is None else (id(grad), grad._version)
