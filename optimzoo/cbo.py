"""CBO: consensus-based optimization (Pinnau et al., 2017; Riedl et al., 2023, https://arxiv.org/abs/2306.09778)."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from optimzoo import ops, random
from optimzoo.closure import Evaluation, uninterrupted
from optimzoo.consensus import (
    CLOSURE,
    INIT,
    KICK,
    MEMORY_NOISE,
    NOISE,
    ORDER,
    SURVIVORS,
    Bounds,
    Column,
    Ranks,
    adam_moved,
    best_of,
    critical_diffusion,
    draw_of,
    effective_alpha,
    expected_log_ratio,
    gate,
    least,
    mean,
    moved,
    next_batch,
    polarised_means,
    project_,
    projected,
    smoothed,
    spread,
    survivors,
    weights,
)
from optimzoo.optimizer import Group, check_choice, check_flags, check_int, check_number, load_state, warn

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
    memory_kappa=_ANY,
    memory_beta=_POSITIVE,
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
    memory=(None, "fixed", "reevaluated", "smooth"),
    memory_order=("sequential", "euler"),
    kernel=(None, "gaussian", "laplace", "inverse_quadratic", "bounded"),
)
_COUNTS = dict(n_particles=2, n_runs=1, particle_batch=2, patience=1, sigma_decay_every=1)
# What each group has its own of, and what is one for all.
_PER_GROUP = ("lr", "lamda", "sigma")
_GLOBAL = ("seed", "alpha", "init_std", "betas", "correction_eps", "noise_clip", "lamda_memory", "sigma_memory",
           "memory_kappa", "memory_beta", "grad_drift", "kappa", "kernel_alpha", "alpha_growth", "alpha_max",
           "sigma_decay", "ess", "kick_below", "bounds", "evaluate_consensus", *_CHOICES, *_COUNTS)  # fmt: skip

_RARELY_WRITTEN = tuple(name for name in _GLOBAL if name != "alpha")

# What torch and its schedulers keep in a group.
_OF_TORCH = ("params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")

# The state: of which shape each of its tensors is. Those of coordinates have the dtype of the particles.
_SHAPES = dict(
    particles=("runs", "particles", "coordinates"),
    energies=("runs", "particles"),
    consensus=("runs", "coordinates"),
    consensus_loss=("runs",),
    best=("runs", "coordinates"),
    best_loss=("runs",),
    alpha=("runs",),
    spread=("runs",),
    waited=("runs",),
    queue=("waiting",),
    memory=("runs", "particles", "coordinates"),
    memory_energies=("runs", "particles"),
    exp_avg=("runs", "particles", "coordinates"),
    exp_avg_sq=("runs", "particles", "coordinates"),
)
_POINTS = tuple(name for name, shape in _SHAPES.items() if shape[-1] == "coordinates")
_OF_PARTICLES = tuple(name for name, shape in _SHAPES.items() if "particles" in shape)
_NUMBERS = ("step", "epoch", "first", "count")


class Rates(NamedTuple):
    """What a step does to the coordinates of each group."""

    lr: list[float]
    root: list[float]  # of lr
    drift: list[float]
    diffusion: list[float]


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
    of one copy. It must not write to what it is given, which is no copy. (Mini-batches and the consensus come with
    other numbers of particles.) ``step`` returns the loss of the
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
            the authors use with a cross-entropy divided by 10. One for all groups; write to them for a schedule of
            your own.
        noise: ``"anisotropic"`` or ``"isotropic"``. Isotropic noise contracts only for sigma below about
            :math:`\sqrt{2\lambda/d}`: not for networks. Default anisotropic.
        n_runs: independent runs at once; the parameters hold the consensus of the run that has seen the lowest loss.
            Default 1.
        particle_batch: evaluate this many particles a step, drawn without replacement until all had their turn; the
            consensus comes from them alone. Default all.
        update: what a step with ``particle_batch`` moves: ``"full"``, all, or ``"partial"``, those evaluated.
        leftover: particles left over at the end of a pass: ``"drop"``, or ``"carry"`` to the front of the next pass.
        init_std: particle 0 starts at the parameters, the others at a normal distance of this deviation. Write to
            ``particles`` for another start. Default 1.
        seed: an integer; by default one is drawn from torch's generator, under ``process_group`` from that of rank 0.
        rule: ``"drift"``; ``"hopping"``, :math:`x_i \leftarrow c + \sigma \xi_i` (consensus hopping, no ``lr``);
            ``"adam"``, with Adam's direction along :math:`x_i - c`, scaled by ``lamda`` and not by ``lr``, in place
            of the drift.
        betas: weights of the past in the averages of ``"adam"``. Default (0.9, 0.99).
        correction: let particles that are better than the consensus rest: ``"heaviside"``
            (:math:`H = 1[f(x_i) > f(c)]`), ``"regularised"`` (:math:`H = (1 + \tanh((f(x_i) - f(c))/\epsilon))/2`), or
            ``None``. Where :math:`f(c)` is not finite, all move. Costs an evaluation. Default ``None``.
        correction_on: :math:`H` on ``"both"`` drift and noise, or on the ``"drift"`` alone.
        correction_eps: :math:`\epsilon`, in units of the loss. Default 1e-3.
        noise_clip: distances enter the noise truncated to this. Default ``None``.
        memory: ``"fixed"``: the consensus is that of the personal bests :math:`y_i`, and particles are drawn to theirs;
            ``"reevaluated"``: personal bests are evaluated in every step, as a loss of mini-batches needs, at twice the
            cost; ``"smooth"``: so they are, then move by
            :math:`\kappa\gamma\, (x_i - y_i)\, (1 + \tanh(\beta(f(y_i) - f(x_i))))/2`, and are evaluated where they
            are now, at three times the cost. Default ``None``.
        lamda_memory, sigma_memory: drift and noise towards :math:`y_i`. Default 0.4 and ``lamda_memory * sigma``.
        memory_order: ``"sequential"``: the move towards :math:`y_i` starts where the other ended; ``"euler"``: both
            start from the same place.
        memory_kappa, memory_beta: :math:`\kappa` and :math:`\beta` of smooth memory, per unit of time and in units of
            1 / loss. Default 10, which moves all of the way at the default ``lr``, and 30.
        grad_drift: then move by ``-grad_drift * lr`` times the gradient at the particle, which costs a forward and a
            backward pass each; not where that is not finite. ``p.grad`` is not touched. Default 0.
        kernel: polarised consensus: each particle has its own, with weights that fall with the distance :math:`r`:
            ``"gaussian"`` (:math:`r^2 / 2\kappa^2`), ``"laplace"`` (:math:`r / \kappa`), ``"inverse_quadratic"``
            (:math:`\log(1 + r^2 / \kappa^2)`), ``"bounded"`` (:math:`r \le \kappa`). The parameters then hold that of
            the best particle. Costs :math:`N^2 d`. Default ``None``.
        kappa: the reach of the kernel, in units of the parameters. Default 1.
        kernel_alpha: multiply the kernel's exponent by ``alpha``. Default ``True``.
        alpha_growth, alpha_max: ``alpha`` is multiplied by the first after each step, up to the second; an
            ``alpha`` that is above already stays. Default 1, 1e5.
        sigma_decay, sigma_decay_every: ``sigma`` is multiplied by the first after every so many steps. Default 1, 1.
        ess: choose ``alpha`` in each step so that the effective sample size is this share of the particles.
        kick_below: where no coordinate of the consensus has moved by this, add normal numbers times
            :math:`\sigma\sqrt\gamma` to all particles. Default ``None``.
        patience: after this many steps without a better loss, add normal numbers times :math:`0.1\sqrt\gamma`.
        bounds: particles stay in a box, (low, high) for each coordinate, or in the ball of a radius about the origin,
            a number; those outside are moved to the nearest point. Default ``None``.
        evaluate_consensus: evaluate the loss of the consensus in each step. Default ``False``.
        module: the network, if it has buffers that a forward pass changes (BatchNorm's running statistics): each
            evaluation then starts from the same, and what stays is the change by one evaluation of the consensus.
        process_group: particles are sharded over its ranks, each of which evaluates its own on the same data. The
            results do not depend on the number of ranks, up to rounding. It can be neither copied nor pickled.

    Raises:
        TypeError, ValueError: a setting, parameter or loss is not one that the method can work with.
        RuntimeError: from ``step``, without a closure, or if it calls ``backward``.

    Warns:
        UserWarning: settings under which particles spread; all losses of a step are infinite or NaN, so that nothing
            moved.

    Every evaluation of a step sees the same random numbers (Dropout); torch's generators are left as they were. A
    particle with a loss that is not finite weighs nothing. ``best`` is the best of all points that were evaluated. The
    noise is a function of seed, step, particle and
    coordinate: results depend neither on threads nor, up to rounding, on processes, and there is no generator to save.
    Particles are float32 for 16-bit parameters. If the closure raises or is interrupted, nothing has changed; in the
    move, an interrupt waits for its end.
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
        memory_kappa: float = 10.0,
        memory_beta: float = 30.0,
        grad_drift: float = 0.0,
        kernel: str | None = None,
        kappa: float = 1.0,
        kernel_alpha: bool = True,
        alpha_growth: float = 1.0,
        alpha_max: float = 1e5,
        sigma_decay: float = 1.0,
        sigma_decay_every: int = 1,
        ess: float | None = None,
        kick_below: float | None = None,
        patience: int | None = None,
        bounds: Bounds | None = None,
        evaluate_consensus: bool = False,
        module: torch.nn.Module | None = None,
        process_group: Any = None,
    ) -> None:
        arguments = locals()
        if module is not None and not isinstance(module, torch.nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {module!r}")
        if process_group is not None and not isinstance(process_group, torch.distributed.ProcessGroup):
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {process_group!r}")
        self.module, self.process_group, self._ranks = module, process_group, Ranks(process_group)
        seeds = self._ranks.values(seed)
        if any(other != seeds[0] for other in seeds):
            raise ValueError(f"seed must be the same on all ranks, got {seeds}")
        if seed is None:
            seed = self._ranks.values(int(torch.randint(2**63 - 1, (), device="cpu")))[0]
        arguments["seed"] = seed
        super().__init__(params, {name: arguments[name] for name in (*_PER_GROUP, *_GLOBAL)})
        self._complete_groups = True
        self._warn_of_spread()

    # Groups

    _complete_groups = False  # until the constructor has added all of its groups
    _checked: Sequence[Any] = ()  # the settings that were found right

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with ``lr``, ``lamda`` and ``sigma`` of their own if they have them.

        Their particles start around them, whatever the others have come to. Of ``lr``, ``lamda`` and ``sigma`` they
        have what the constructor got, where the group does not say; all else is as it now is in the first group.

        Raises:
            TypeError, ValueError: as the constructor does; the optimizer then has the groups it had.
        """
        if isinstance(param_group, dict):  # torch has an error for what is not
            unknown = param_group.keys() - {*self.defaults, *_OF_TORCH}
            if unknown:
                raise TypeError(f"a parameter group has no setting {min(map(repr, unknown))}")
            now = self.param_groups[0] if self.param_groups else {}
            param_group = {**{name: now[name] for name in _GLOBAL if name in now}, **param_group}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            _check_uniform(self.param_groups, _GLOBAL)
            if self._complete_groups:
                self._warn_of_spread()
            self._grow(group)
        except BaseException:
            self.param_groups.pop()
            raise

    def _warn_of_spread(self) -> None:
        """Warn if the distance to a consensus that stays where it is would grow."""
        options, rates = self.param_groups[0], self._rates()
        dim = 1 if options["noise"] == "anisotropic" else sum(self._sizes)
        if options["rule"] != "drift" or dim == 0:
            return
        for group, root, drift, diffusion in zip(self.param_groups, *rates[1:], strict=True):
            growth = expected_log_ratio(drift, diffusion, dim)
            if root == 0 or growth < 0:
                continue
            if drift >= 2:
                needs = f"lamda * lr must be below 2, and is {drift:.4g}"
            elif drift == 0 and (diffusion == 0 or dim > 1):
                needs = "lamda must be above 0"
            else:
                needs = f"sigma must be below {critical_diffusion(drift, dim) / root:.4g} at this lr and lamda"
            clip = options["noise_clip"]
            warn(
                f"particles will spread and not contract: at sigma={group['sigma']:.4g} the log of their distance to "
                f"the consensus grows by {growth:.3g} a step{'' if clip is None else f' below noise_clip={clip:.4g}'}; "
                f"to shrink, {needs}"
            )

    def _check_group(self, group: Group) -> None:
        for name, (low, high, allowed) in _RANGES.items():
            if group[name] is not None or name not in _OPTIONAL:
                check_number(name, group[name], low, high, allowed)
        for index, param in enumerate(group["params"]):
            if not param.is_floating_point():
                raise ValueError(f"params[{index}] must have a real floating-point dtype, got {param.dtype}")
            if type(param) not in (torch.Tensor, torch.nn.Parameter) or param.layout is not torch.strided:
                got = f"{type(param).__name__} of layout {param.layout}"
                raise ValueError(f"params[{index}] must be a plain strided tensor, got {got}")
            if param.device != self._first.device:
                raise ValueError(f"params[{index}] is on {param.device}, the first one on {self._first.device}")
            if group["grad_drift"] and not param.requires_grad:
                raise ValueError(f"grad_drift needs parameters that require gradients; params[{index}] does not")
        for name, least_count in _COUNTS.items():
            value = group[name]
            if value is None and name in ("particle_batch", "patience"):
                continue
            check_int(name, value, least_count, 2**63 - 1)
        for name, choices in _CHOICES.items():
            check_choice(name, group[name], choices)
        check_flags(group, "kernel_alpha", "evaluate_consensus")
        seed, betas = group["seed"], group["betas"]
        check_int("seed", seed, 0, 2**63 - 1)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        for beta in betas:
            check_number("betas", beta, 0.0, 1.0, "in [0, 1)")
        _check_bounds(group["bounds"])
        if (group["particle_batch"] or 0) > group["n_particles"]:
            raise ValueError(
                f"particle_batch must be at most n_particles={group['n_particles']}, got {group['particle_batch']}"
            )
        if group["correction"] and group["rule"] != "drift":
            raise ValueError(f"correction goes with rule='drift', got rule={group['rule']!r}")
        if group["memory"] and (group["kernel"] or group["rule"] != "drift"):
            raise ValueError("memory goes with rule='drift' and without a kernel")
        if group["n_particles"] < 2 * self._ranks.size:
            raise ValueError(f"n_particles must be at least two for each of {self._ranks.size} processes")

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
        swarm: dict[str, Any] = self.state[self._first]
        return swarm

    def _grow(self, group: Group) -> None:
        """Make particles for the parameters of the last group."""
        if not group["params"]:
            return
        dtype, device, swarm = self._dtype, self._first.device, dict(self._swarm)
        if not swarm:
            runs, (first, local) = group["n_runs"], self._ranks.share(group["n_particles"])
            worst = torch.full((runs,), math.inf, dtype=torch.float64, device=device)
            energies = worst[:, None].repeat(1, local)
            empty = torch.empty(runs, local, 0, dtype=dtype, device=device)
            swarm.update(step=0, epoch=0, first=first, count=group["n_particles"])
            swarm.update(particles=empty, consensus=empty[:, 0], best=empty[:, 0])
            swarm.update(energies=energies, best_loss=worst, consensus_loss=worst.clone(), spread=worst.clone())
            swarm.update(alpha=torch.full_like(worst, group["alpha"]))
            swarm.update(waited=torch.zeros(runs, dtype=torch.int64, device=device))
            swarm.update(queue=torch.empty(0, dtype=torch.int64, device=device))
            if group["memory"]:
                swarm.update(memory=empty, memory_energies=energies.clone())
            if group["rule"] == "adam":
                swarm.update(exp_avg=empty, exp_avg_sq=empty)
        runs, local, old = swarm["particles"].shape
        center = torch.cat([param.detach().reshape(-1).to(dtype) for param in group["params"]])
        # All coordinates are drawn, so that it does not matter how they are split into groups.
        around = torch.empty(runs, local, old + len(center), dtype=dtype, device=device)
        random.normal(around, seed=group["seed"], draw=draw_of(swarm["step"], INIT), first=swarm["first"])
        around = around[..., old:].mul_(group["init_std"]).add_(center)
        if swarm["first"] == 0:
            around[:, :1] = center
        for name in (name for name in _POINTS if name in swarm):
            average, alone = name.startswith("exp_avg"), name in ("consensus", "best")
            new = torch.zeros_like(around) if average else center.repeat(runs, 1) if alone else around
            if name == "memory":  # its losses were those with the parameters as they are
                new = center.expand_as(around)
            # The particles of the first group are not copied: there may be memory for them once.
            copied = old > 0 or name != "particles"
            swarm[name] = torch.cat([swarm[name].to(dtype), new], -1) if copied else new
            if group["bounds"] is not None and not average:
                project_(swarm[name], group["bounds"])
        self._swarm.update(swarm)

    # What can be read

    def _views(self, rows: Tensor) -> list[Tensor]:
        """The parts of a tensor (..., coordinates) that belong to each parameter, in its shape."""
        parts = torch.split(rows, self._sizes, -1)
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
        """The alpha of each run in the last step."""
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
        r"""For each parameter, the point of the lowest loss that each run has seen, shape (n_runs, \*p.shape)."""
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
            which: what to put in; under ``process_group`` particles are numbered by rank, those of this one from 0.
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
            group["alpha"] = _grown(group["alpha"], 2.0, group["alpha_max"])

    @torch.no_grad()
    def reduce(self, mu: float = 0.2) -> int:
        """Drop particles at random as their spread shrinks, at the end of an epoch; returns how many stay.

        The number is multiplied by (1 - mu) + mu times the ratio of spreads since the last call, within [1 - mu, 1],
        and rounded up to whole mini-batches, or two. The spread is the norm of the variances of the coordinates.
        """
        check_number("mu", mu, 0.0, 1.0, "in [0, 1)")
        swarm, options = self._swarm, self.param_groups[0]
        if swarm["step"] == 0:
            return int(swarm["count"])
        size, now = options["particle_batch"] or 1, spread(swarm["particles"], swarm["count"], self._ranks.reduce)
        # Runs stay together: the one that has shrunk least decides.
        ratio = float((now / swarm["spread"]).nan_to_num(1.0).max())
        count = survivors(swarm["count"], ratio, mu, size)
        changes: dict[str, Any] = dict(spread=now, count=count)
        if count < swarm["count"]:
            order = random.permutation(swarm["count"], seed=options["seed"], draw=draw_of(swarm["step"], SURVIVORS))
            keep = order[:count].sort().values - swarm["first"]
            here = keep[(keep >= 0) & (keep < swarm["particles"].shape[1])].to(now.device)
            changes.update({name: swarm[name][:, here] for name in _OF_PARTICLES if name in swarm})
            changes.update(first=int((keep < 0).sum()), queue=swarm["queue"][:0])
        swarm.update(changes)
        return count

    # The step

    @torch.no_grad()
    def step(  # type: ignore[override]  # a closure is not optional, and there are two kinds
        self, closure: Callable[..., Any] | None = None, *, batched: bool = False
    ) -> Tensor:
        """Evaluate the particles and move them; see the class.

        Args:
            closure: returns the loss of the live parameters, or, with ``batched``, the losses of stacked ones.
            batched: which of the two.

        Returns:
            The loss of the consensus where it is evaluated, else the lowest one of the particles.
        """
        if closure is None:
            raise RuntimeError("CBO needs a closure that returns the loss: optimizer.step(closure)")
        if not callable(closure):
            raise TypeError(f"closure must be callable, got {closure!r}")
        if batched and self.module is not None:
            raise ValueError("module is for closures that evaluate the live parameters, not for batched=True")
        options, swarm, rates = self.param_groups[0], self._swarm, self._rates()
        t = swarm["step"]
        x = projected(swarm["particles"], options["bounds"])  # the user may have written to them
        index, queue = self._batch()
        wants_loss = bool(options["correction"] or options["evaluate_consensus"] or self.module is not None)
        plain = options["rule"] == "drift" and not (options["kernel"] or options["memory"] or options["grad_drift"])
        in_place = plain and x is swarm["particles"] and x.is_contiguous()
        native = ops.native("cbo_", x.device) if in_place else None
        seed = random.integer(options["seed"], draw_of(t, CLOSURE))
        buffers = [] if self.module is None else list(self.module.buffers())
        changes: dict[str, Any] = dict(step=t + 1, queue=queue)
        if t == 0:
            changes.update(spread=spread(x, swarm["count"], self._ranks.reduce))

        known = swarm["best"], swarm["best_loss"]
        with Evaluation(closure, self._params, self._views, batched, seed, buffers, *known) as evaluation:
            seen = self._energies(evaluation, x, index)
            lowest = self._ranks.reduce(least(seen), "min")
            changes.update(energies=_at(index, seen, swarm["energies"]))
            points, energies = x, seen
            if options["memory"]:
                points, energies = self._personal_bests(evaluation, rates, x, seen, index)
                changes.update(memory=points, memory_energies=energies)
                energies = _at(index, energies, torch.full_like(energies, math.inf))
            alive = (self._ranks.reduce(least(energies), "min") if options["memory"] else lowest) < math.inf
            every = bool(alive.all())
            if not every:
                warn(
                    f"all losses of {int((~alive).sum())} of {len(alive)} runs are infinite or NaN: nothing moves there"
                )

            alpha = torch.full_like(swarm["alpha"], options["alpha"])
            if options["ess"] is not None:
                every_energy = self._of_all(energies)
                alpha = effective_alpha(every_energy, options["ess"], swarm["alpha"], options["alpha_max"])
            later = native is not None and every and not wants_loss and self._ranks.size == 1
            later = later and options["kick_below"] is None and options["bounds"] is None
            c, towards, weight = self._consensus(x, points, energies, alpha, alive, later)

            loss, gates = lowest, None
            if wants_loss:
                loss = evaluation.losses(c[:, None], keep_buffers=True)[:, 0]
            changes.update(consensus=c, consensus_loss=loss if wants_loss else torch.full_like(lowest, math.inf))
            if options["correction"]:
                share = gate(changes["energies"], loss, options["correction"], options["correction_eps"])
                gates = share, share if options["correction_on"] == "both" else torch.ones_like(share)
            partial = index if options["update"] == "partial" else None
            moves = None
            if not every or partial is not None:
                moves = alive[:, None] & (_at(partial, 1, torch.zeros_like(seen)) > 0)
            if native:
                move = self._native_move(native, rates, c, weight, gates, moves)
            else:
                new = self._moved(evaluation, rates, x, towards, gates, moves, changes)
                move = functools.partial(swarm["particles"].copy_, new)
            best, best_loss = self._ranks.best(evaluation.best, evaluation.best_loss)
            changes.update(best=best, best_loss=best_loss, alpha=alpha)
            kick = self._kick(rates, alive, changes)
            shown = int(best_loss.argmin()) if len(alive) > 1 else 0

        with uninterrupted():  # and nothing fails from here on
            move()
            if kick is not None:
                swarm["particles"].add_(kick)
            if options["bounds"] is not None:
                project_(swarm["particles"], options["bounds"])
            swarm.update(changes)
            if alive.any():
                self._anneal()
            self._write(c[shown])
            if alive[shown]:
                evaluation.commit(shown)
        loss = loss if every else torch.where(alive, loss, math.inf)
        return loss if len(alive) > 1 else loss[0]

    def _rates(self) -> Rates:
        groups = self.param_groups
        for group in groups:  # a scheduler or the user may have changed them
            for name in (*_PER_GROUP, "alpha"):
                check_number(name, group[name], *_RANGES[name])
        _check_uniform(groups, ("alpha",))
        # All others only after a change, of which another object is a sign: a comparison would cost more.
        others = [group[name] for group in groups for name in _RARELY_WRITTEN]
        if len(others) != len(self._checked) or not all(map(operator.is_, others, self._checked)):
            for group in groups:
                self._check_group(group)
            _check_uniform(groups, _GLOBAL)
            self._check_against_swarm(groups[0])
            self._checked = others
        lr = [float(group["lr"]) for group in groups]
        root = [math.sqrt(value) for value in lr]
        drift = [float(group["lamda"]) * value for group, value in zip(groups, lr, strict=True)]
        diffusion = [float(group["sigma"]) * value for group, value in zip(groups, root, strict=True)]
        if max(drift + diffusion) == math.inf:
            raise ValueError(f"lamda * lr and sigma * sqrt(lr) must be finite, got {drift} and {diffusion}")
        return Rates(lr, root, drift, diffusion)

    def _check_against_swarm(self, options: Group) -> None:
        """Raise if a setting was written that wants other tensors than the constructor has made."""
        if not any(self.state.values()):  # no parameter has been added yet
            return
        for name, value, tensor in (("memory", options["memory"], "memory"), ("rule", options["rule"], "exp_avg")):
            if tensor in _needed(options) and tensor not in self._swarm:
                raise ValueError(f"{name}={value!r} must be chosen in the constructor")
        if options["n_runs"] != len(self._swarm["alpha"]):
            raise ValueError(f"n_runs must stay {len(self._swarm['alpha'])}, got {options['n_runs']}")

    def _anneal(self) -> None:
        """What the schedules make of sigma and alpha at the end of a step."""
        options = self.param_groups[0]
        growth, decay = options["alpha_growth"], options["sigma_decay"]
        if growth == 1 and decay == 1:
            return
        cooled = self._swarm["step"] % options["sigma_decay_every"] == 0
        for group in self.param_groups:
            group["sigma"] *= decay if cooled else 1.0
            group["alpha"] = _grown(group["alpha"], growth, group["alpha_max"])

    def _batch(self) -> tuple[Tensor | None, Tensor]:
        """Which of the particles here this step evaluates, ``None`` being all; and whose turn is then still to come."""
        options, swarm = self.param_groups[0], self._swarm
        size, count, queue = options["particle_batch"], swarm["count"], swarm["queue"]
        if size is None or size >= count:
            return None, queue
        order = random.permutation(count, seed=options["seed"], draw=draw_of(swarm["step"], ORDER)).to(queue.device)
        chosen, queue = next_batch(queue, size, order, options["leftover"])
        chosen = chosen.sort().values - swarm["first"]
        return chosen[(chosen >= 0) & (chosen < swarm["particles"].shape[1])], queue

    def _energies(self, evaluation: Evaluation, points: Tensor, index: Tensor | None) -> Tensor:
        """Losses, infinite where there is none or it is not finite."""
        if index is None:
            return evaluation.losses(points)
        energies = torch.full(points.shape[:2], math.inf, dtype=torch.float64, device=points.device)
        energies[:, index] = evaluation.losses(points[:, index])
        return energies

    def _consensus(
        self, x: Tensor, points: Tensor, energies: Tensor, alpha: Tensor, alive: Tensor, later: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The consensus and what each particle moves towards; if the move is to find them ``later``, the weights."""
        options, old = self.param_groups[0], self._swarm["consensus"]
        if options["kernel"]:
            kernel = {name: options[name] for name in ("kernel", "kappa", "kernel_alpha")}
            towards = polarised_means(x, self._of_all(x), self._of_all(energies), alpha, **kernel)
            c, _ = self._ranks.best(*best_of(towards, energies))
            return projected(torch.where(alive[:, None], c, old), options["bounds"]), towards, None
        weight = weights(energies, alpha, self._ranks.reduce if self._ranks.size > 1 else None)
        if later:
            c = torch.empty_like(old)
            return c, c[:, None], weight
        c = self._ranks.reduce(mean(weight, points), "sum")
        c = projected(torch.where(alive[:, None], c, old), options["bounds"])
        return c, c[:, None], None

    def _of_all(self, rows: Tensor) -> Tensor:
        """The particles of all processes, or their energies, from those here."""
        return self._ranks.gathered(rows, self._swarm["first"], self._swarm["count"])

    def _personal_bests(
        self, evaluation: Evaluation, rates: Rates, x: Tensor, seen: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Where each particle was best, and the energy there."""
        options, swarm = self.param_groups[0], self._swarm
        if swarm["step"] == 0:
            return x.clone(), seen
        points, energies = swarm["memory"], swarm["memory_energies"]
        if options["memory"] != "fixed":  # losses of this step's data are compared with each other alone
            energies = _at(index, self._energies(evaluation, points, index), energies)
        if options["memory"] == "smooth":
            rate = self._columns([options["memory_kappa"] * lr for lr in rates.lr])
            # Those whose turn it is not have an infinite loss here, and stay.
            points = smoothed(points, x, energies, seen, rate, options["memory_beta"])
            return points, _at(index, self._energies(evaluation, points, index), energies)
        return torch.where((seen < energies)[..., None], x, points), torch.minimum(seen, energies)

    def _noise(self, purpose: int) -> Tensor:
        swarm = self._swarm
        draw = draw_of(swarm["step"], purpose)
        out = torch.empty_like(swarm["particles"])
        return random.normal(out, seed=self.param_groups[0]["seed"], draw=draw, first=swarm["first"])

    def _moved(
        self,
        evaluation: Evaluation,
        rates: Rates,
        x: Tensor,
        towards: Tensor,
        gates: tuple[Tensor, Tensor] | None,
        moves: Tensor | None,
        changes: dict[str, Any],
    ) -> Tensor:
        """Where the particles go, by any of the rules."""
        options, swarm = self.param_groups[0], self._swarm
        noise = dict(noise=options["noise"], clip=options["noise_clip"])
        diffusion = self._columns(rates.diffusion)
        if options["rule"] == "hopping":
            new = towards + self._columns([group["sigma"] for group in self.param_groups]) * self._noise(NOISE)
        elif options["rule"] == "adam":
            lamda = self._columns([group["lamda"] for group in self.param_groups])
            how = dict(betas=options["betas"], step=swarm["step"] + 1, **noise)
            old = swarm["exp_avg"], swarm["exp_avg_sq"]
            new, *averages = adam_moved(x, towards, self._noise(NOISE), *old, lamda, diffusion, **how)
            if moves is not None:
                averages = [torch.where(moves[..., None], *pair) for pair in zip(averages, old, strict=True)]
            changes.update(exp_avg=averages[0], exp_avg_sq=averages[1])
        else:
            new = moved(x, towards, self._noise(NOISE), self._columns(rates.drift), diffusion, gates, **noise)
        if options["memory"]:
            scale, sigma = options["lamda_memory"], options["sigma_memory"]
            drift = self._columns([scale * lr for lr in rates.lr])
            own = [scale * value for value in rates.diffusion] if sigma is None else [sigma * r for r in rates.root]
            seen_from = x if options["memory_order"] == "euler" else None
            z = self._noise(MEMORY_NOISE)
            new = moved(new, changes["memory"], z, drift, self._columns(own), seen_from=seen_from, **noise)
        if options["grad_drift"]:
            size = self._columns([options["grad_drift"] * lr for lr in rates.lr])
            step = size * evaluation.gradients(new, moves)
            new = new - step.where(step.isfinite().all(-1, keepdim=True), 0.0)
        return new if moves is None else torch.where(moves[..., None], new, x)

    def _native_move(
        self,
        native: Callable[..., None],
        rates: Rates,
        c: Tensor,
        weight: Tensor | None,
        gates: tuple[Tensor, Tensor] | None,
        moves: Tensor | None,
    ) -> Callable[[], None]:
        """Plain drift and noise in place, ready to be called; finds the consensus as well where weights are given."""
        options, swarm = self.param_groups[0], self._swarm
        x = swarm["particles"]
        if moves is not None:
            gates = (moves.double(),) * 2 if gates is None else (gates[0] * moves, gates[1] * moves)
        norms = None
        if options["noise"] == "isotropic":
            norms = torch.empty(x.shape[:2], dtype=torch.float64, device=x.device)
        per_group = [torch.tensor(v, dtype=torch.float64, device="cpu") for v in (rates.drift, rates.diffusion)]
        place = options["seed"], draw_of(swarm["step"], NOISE), swarm["first"]
        clip = math.inf if options["noise_clip"] is None else options["noise_clip"]
        ends = torch.tensor(self._ends, device="cpu")
        return functools.partial(native, x, c, weight, ends, *per_group, *(gates or (None, None)), norms, clip, *place)

    def _kick(self, rates: Rates, alive: Tensor, changes: dict[str, Any]) -> Tensor | None:
        """What shakes all particles of runs that have come to rest, or have waited for too long."""
        options, swarm = self.param_groups[0], self._swarm
        waited = torch.where(changes["best_loss"] < swarm["best_loss"], 0, swarm["waited"] + 1)
        still = stuck = torch.zeros_like(alive)
        if options["kick_below"] is not None and swarm["step"] > 0:
            still = alive & ((changes["consensus"] - swarm["consensus"]).abs().amax(-1) < options["kick_below"])
        if options["patience"] is not None:
            stuck = alive & (waited >= options["patience"])
        changes.update(waited=torch.where(stuck, 0, waited))
        if not (still | stuck).any():
            return None
        sizes = self._columns(rates.diffusion), self._columns([0.1 * root for root in rates.root])
        kick = self._noise(KICK)
        still, stuck = (runs[:, None, None].to(kick.dtype) for runs in (still, stuck))
        return kick.mul_(still * sizes[0] + stuck * sizes[1])

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

    # Checkpoints

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "with a process_group there is no copy and no pickle: save state_dict() on each rank, and load it into "
                "a new optimizer there"
            )
        return {**super().__getstate__(), "module": self.module, "process_group": self.process_group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("module", None)
        self.__dict__.setdefault("process_group", None)
        self._ranks, self._complete_groups = Ranks(self.process_group), True
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
        load_state(self, state_dict, self._complete, self._restore)

    def _restore(self, loaded: dict[str, Any]) -> None:
        device, dtype = self._first.device, self._dtype
        for name, value in loaded["state"][loaded["param_groups"][0]["params"][0]].items():
            if isinstance(value, Tensor):
                value = value.to(device, dtype if name in _POINTS else value.dtype, copy=True)
            self._swarm[name] = value

    def _complete(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of a state dict with all settings of this optimizer; raises where the two do not fit."""
        saved, own = state_dict["param_groups"], self.param_groups
        groups = [
            {**{name: group[name] for name in (*_PER_GROUP, *_GLOBAL)}, **saved_group}
            for saved_group, group in zip(saved, own, strict=True)
        ]
        for merged, group in zip(groups, own, strict=True):
            self._check_group({**merged, "params": group["params"]})
        _check_uniform(groups, _GLOBAL)
        index = next(index for group in saved for index in group["params"])
        self._check_state(f"parameter {index}", state_dict["state"].get(index, {}), groups[0])
        return {**state_dict, "param_groups": groups}

    def _check_state(self, owner: str, state: dict[str, Any], options: Group) -> None:
        needs = _needed(options)
        if not isinstance(state, dict):
            raise ValueError(f"the state of {owner} must be a dictionary, got {state!r}")
        if not needs <= state.keys():
            raise ValueError(f"the state of {owner} lacks {', '.join(sorted(needs - state.keys()))}")
        for name in _NUMBERS:
            check_int(f"{name} of {owner}", state[name], 0)
        sizes = dict(runs=options["n_runs"], coordinates=sum(self._sizes))
        for name in (name for name in _SHAPES if name in needs):
            value, shape = state[name], tuple(getattr(state[name], "shape", ()))
            if len(shape) == len(_SHAPES[name]):  # how many particles are here and how many wait, the first one says
                sizes = {**dict(zip(_SHAPES[name], shape, strict=True)), **sizes}
            floating = name not in ("waited", "queue")
            expected = tuple(sizes.get(size, size) for size in _SHAPES[name])
            plain = (
                isinstance(value, Tensor)
                and value.layout is torch.strided
                and not value.is_meta
                and not value.is_complex()
            )
            if not plain or shape != expected or value.is_floating_point() != floating:
                got = f"{value.dtype} of shape {shape}" if isinstance(value, Tensor) else repr(value)
                kind = "a floating-point" if floating else "an integer"
                raise ValueError(f"{name} of {owner} must be {kind} tensor of shape {expected}, got {got}")
        first, here, count = state["first"], sizes["particles"], state["count"]
        if first + here > count or (self._ranks.size == 1 and here < count):
            raise ValueError(
                f"{owner} has {here} particles, from number {first} on, of {count}; processes: {self._ranks.size}"
            )


def _needed(options: Group) -> set[str]:
    """What the state has under these settings."""
    needs = {*_SHAPES, *_NUMBERS}
    needs -= set() if options["memory"] else {"memory", "memory_energies"}
    needs -= set() if options["rule"] == "adam" else {"exp_avg", "exp_avg_sq"}
    return needs


def _grown(alpha: float, factor: float, limit: float) -> float:
    """Alpha times a factor; growth ends at the limit, and leaves alone what the user has put above it."""
    return alpha * factor if factor <= 1 else max(alpha, min(alpha * factor, limit))


def _check_bounds(bounds: Any) -> None:
    if bounds is None:
        return
    if not isinstance(bounds, tuple | list):
        check_number("bounds", bounds, _TINY, math.inf, "(low, high), or a radius, finite and > 0")
        return
    if len(bounds) != 2:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds!r}")
    for side in bounds:
        if side not in (-math.inf, math.inf):
            check_number("bounds", side, -math.inf, math.inf, "(low, high), two numbers")
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds!r}")


def _at(index: Tensor | None, new: Any, old: Tensor) -> Tensor:
    """``new`` in the columns of ``index``, ``old`` elsewhere; ``None`` is everywhere."""
    if index is None and isinstance(new, Tensor):
        return new
    turn = torch.full(old.shape[1:2], index is None, device=old.device)
    if index is not None:
        turn[index] = True
    return torch.where(turn, new, old)


def _check_uniform(groups: Sequence[Group], names: Sequence[str]) -> None:
    for group in groups[1:]:
        for name in names:
            if group[name] != groups[0][name]:
                raise ValueError(f"{name} is one for all groups, got {groups[0][name]!r} and {group[name]!r}")
