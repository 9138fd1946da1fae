"""CBO: consensus-based optimization (Pinnau et al., 2017; Riedl et al., 2023, https://arxiv.org/abs/2306.09778)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from optimzoo import ops, random
from optimzoo.closure import Evaluation
from optimzoo.consensus import (
    CLOSURE,
    INIT,
    KICK,
    MEMORY_NOISE,
    NOISE,
    SURVIVORS,
    Column,
    adam_moved,
    batch_indices,
    critical_diffusion,
    draw_of,
    effective_alpha,
    expected_log_ratio,
    gate,
    mean,
    moved,
    polarised_means,
    spread,
    survivors,
    weights,
)
from optimzoo.optimizer import Group, check_flags, check_number, warn

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
            self._check_contraction(group)
            self._grow(group)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_contraction(self, group: Group) -> None:
        """Warn if the distance to a consensus that stays where it is would grow."""
        drift, root = group["lamda"] * float(group["lr"]), math.sqrt(float(group["lr"]))
        dim = 1 if group["noise"] == "anisotropic" else sum(self._sizes)
        if group["rule"] != "drift" or group["noise_clip"] is not None or drift == 0 or dim == 0:
            return
        growth = expected_log_ratio(drift, group["sigma"] * root, dim)
        if growth >= 0:
            warn(
                f"particles will spread and not contract: at sigma={group['sigma']:.4g} the log of their distance to "
                f"the consensus grows by {growth:.3g} a step; to shrink, it needs a sigma below "
                f"{critical_diffusion(drift, dim) / root:.4g} at this lr and lamda"
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
                check_number(name, group[name], low, high, allowed)
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
            check_number("betas", beta, 0.0, 1.0, "in [0, 1)")
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
        swarm: dict[str, Any] = self.state[self._first]
        return swarm

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
        random.normal(around, seed=group["seed"], draw=draw_of(swarm["step"], INIT), first=swarm["first"])
        around = around[..., old:].mul_(group["init_std"]).add_(center)
        if swarm["first"] == 0:
            around[:, 0] = center
        for name in _POINTS:
            if name in swarm:
                average, alone = name.startswith("exp_avg"), name in ("consensus", "best")
                new = torch.zeros_like(around) if average else center.expand(runs, -1) if alone else around
                # The particles of the first group are not copied: there may be memory for them once.
                copied = old > 0 or name != "particles"
                swarm[name] = torch.cat([swarm[name].to(dtype), new], -1) if copied else new

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
        check_number("mu", mu, 0.0, 1.0, "in [0, 1)")
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
            order = random.permutation(swarm["count"], seed=options["seed"], draw=draw_of(swarm["step"], SURVIVORS))
            keep = order[:count].sort().values.to(now.device)
            for name in ("particles", "energies", "memory", "memory_energies", "exp_avg", "exp_avg_sq"):
                if name in swarm:
                    swarm[name] = swarm[name][:, keep]
            swarm.update(count=count, batches=0, since=swarm["step"])
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
        if batched and self.module is not None:
            raise ValueError("module is for closures that evaluate the live parameters, not for batched=True")
        options, swarm, rates = self.param_groups[0], self._swarm, self._rates()
        x, t, old = swarm["particles"], swarm["step"], swarm["consensus"]
        index = self._batch()
        plain = options["rule"] == "drift" and not (options["kernel"] or options["memory"] or options["grad_drift"])
        native = ops.native("cbo_", x.device) if plain and x.is_contiguous() else None
        wants_loss = bool(options["correction"] or options["evaluate_consensus"] or self.module is not None)
        seed = random.integer(options["seed"], draw_of(t, CLOSURE))
        buffers = [] if self.module is None else list(self.module.buffers())
        changes: dict[str, Any] = dict(step=t + 1, batches=swarm["batches"] + 1)
        if t == 0 and self._world == 1:
            changes.update(spread=spread(x))

        with Evaluation(closure, self._params, self._views, batched, seed, buffers) as evaluation:
            seen = self._energies(evaluation, x, index)
            lowest, improved = self._compare(seen, changes)
            changes.update(energies=_at(index, seen, swarm["energies"]))
            points, energies = x, seen
            if options["memory"]:
                points, energies = self._personal_bests(evaluation, seen, index)
                changes.update(memory=points, memory_energies=energies)
                energies = _at(index, energies, torch.full_like(energies, math.inf))
            alive = (self._reduce(energies.amin(-1), "min") if options["memory"] else lowest) < math.inf
            every = bool(alive.all())
            if not every:
                warn(
                    f"all losses of {int((~alive).sum())} of {len(alive)} runs are infinite or NaN: nothing moves there"
                )

            alpha = swarm["alpha"]
            if options["ess"] is not None:
                alpha = effective_alpha(self._gathered(energies), options["ess"], alpha, options["alpha_max"])
            weight: Tensor | None = weights(energies, alpha, self._reduce if self._world > 1 else None)
            if native is not None and every and self._world == 1 and not wants_loss:
                c = torch.empty_like(old)  # the native step finds it on its way
                towards = c[:, None]
            elif options["kernel"]:
                kernel = {name: options[name] for name in ("kernel", "kappa", "kernel_alpha")}
                towards = polarised_means(x, energies, alpha, **kernel)
                c = torch.where(
                    alive[:, None], towards[torch.arange(len(alive), device=x.device), energies.argmin(-1)], old
                )
            else:
                assert weight is not None
                c = torch.where(alive[:, None], self._reduce(mean(weight, points), "sum"), old)
                towards, weight = c[:, None], None

            loss, gates = lowest, None
            if wants_loss:
                loss = evaluation.losses(c[:, None], keep_buffers=True)[:, 0]
            changes.update(consensus=c, consensus_loss=loss if wants_loss else torch.full_like(lowest, math.inf))
            if options["correction"]:
                share = gate(changes["energies"], loss, options["correction"], options["correction_eps"])
                gates = share, share if options["correction_on"] == "both" else torch.ones_like(share)
            moves = None
            if not every or (index is not None and options["update"] == "partial"):
                turn = _at(index if options["update"] == "partial" else None, 1, torch.zeros_like(seen))
                moves = alive[:, None] & (turn > 0)
            if native is None:
                new = self._moved(evaluation, rates, towards, gates, moves, changes)

        # Nothing fails from here on.
        if native is None:
            x.copy_(new)
        else:
            self._move_natively(native, rates, c, weight, gates, moves)
        self._kick(rates, alive, improved, changes)
        if options["bounds"] is not None:
            x.clamp_(*options["bounds"])
        if options["alpha_growth"] != 1:
            alpha = torch.where(alive, (alpha * options["alpha_growth"]).clamp_max(options["alpha_max"]), alpha)
        if options["sigma_decay"] != 1 and alive.any():
            for group in self.param_groups:
                group["sigma"] *= options["sigma_decay"]
        swarm.update(changes, alpha=alpha)
        self._write(c[int(swarm["best_loss"].argmin()) if len(alive) > 1 else 0])
        evaluation.commit()
        loss = loss if every else torch.where(alive, loss, math.inf)
        return loss if len(alive) > 1 else loss[0]

    def _rates(self) -> Rates:
        groups = self.param_groups
        for group in groups:  # a scheduler may have changed them
            check_number("lr", group["lr"], *_ANY)
            check_number("sigma", group["sigma"], *_ANY)
        lr = [float(group["lr"]) for group in groups]
        root = [math.sqrt(value) for value in lr]
        drift = [group["lamda"] * value for group, value in zip(groups, lr, strict=True)]
        diffusion = [group["sigma"] * value for group, value in zip(groups, root, strict=True)]
        return Rates(lr, root, drift, diffusion)

    def _batch(self) -> Tensor | None:
        """Which of the particles here this step evaluates; ``None`` is all."""
        options, swarm = self.param_groups[0], self._swarm
        size, first = options["particle_batch"], swarm["first"]
        if size is None or size >= swarm["count"]:
            return None
        how = dict(seed=options["seed"], since=swarm["since"], leftover=options["leftover"])
        chosen: Tensor = batch_indices(swarm["count"], size, swarm["batches"], **how).sort().values - first
        local: int = swarm["particles"].shape[1]
        return chosen[(chosen >= 0) & (chosen < local)].to(self._first.device)

    def _energies(self, evaluation: Evaluation, points: Tensor, index: Tensor | None) -> Tensor:
        """Losses, infinite where there is none or it is not finite."""
        if index is None:
            return evaluation.losses(points)
        energies = torch.full(points.shape[:2], math.inf, dtype=torch.float64, device=points.device)
        energies[:, index] = evaluation.losses(points[:, index])
        return energies

    def _compare(self, seen: Tensor, changes: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The lowest energy of each run, and whether it is the lowest so far."""
        swarm = self._swarm
        lowest = self._reduce(seen.amin(-1), "min")
        improved = lowest < swarm["best_loss"]
        if improved.any():
            best = torch.where(improved[:, None], self._owned(seen, lowest), swarm["best"])
            changes.update(best=best, best_loss=torch.minimum(lowest, swarm["best_loss"]))
        return lowest, improved

    def _personal_bests(self, evaluation: Evaluation, seen: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where each particle was best, and the energy there."""
        swarm = self._swarm
        # The user may have written to the particles before the first step.
        points = swarm["memory"] if swarm["step"] > 0 else swarm["particles"]
        energies = swarm["memory_energies"]
        if self.param_groups[0]["memory"] == "reevaluated" and swarm["step"] > 0:
            energies = _at(index, self._energies(evaluation, points, index), energies)
        points = torch.where((seen < energies)[..., None], swarm["particles"], points)
        return points, torch.minimum(seen, energies)

    def _noise(self, purpose: int) -> Tensor:
        swarm = self._swarm
        draw = draw_of(swarm["step"], purpose)
        out = torch.empty_like(swarm["particles"])
        return random.normal(out, seed=self.param_groups[0]["seed"], draw=draw, first=swarm["first"])

    def _moved(
        self,
        evaluation: Evaluation,
        rates: Rates,
        towards: Tensor,
        gates: tuple[Tensor, Tensor] | None,
        moves: Tensor | None,
        changes: dict[str, Any],
    ) -> Tensor:
        """Where the particles go, by any of the rules."""
        options, swarm = self.param_groups[0], self._swarm
        x = swarm["particles"]
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
            new = new - size * evaluation.gradients(new, moves)
        return new if moves is None else torch.where(moves[..., None], new, x)

    def _move_natively(
        self,
        native: Callable[..., None],
        rates: Rates,
        c: Tensor,
        weight: Tensor | None,
        gates: tuple[Tensor, Tensor] | None,
        moves: Tensor | None,
    ) -> None:
        """Plain drift and noise, in place; finds the consensus as well where weights are given."""
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
        native(x, c, weight, ends, *per_group, *(gates or (None, None)), norms, clip, *place)

    def _kick(self, rates: Rates, alive: Tensor, improved: Tensor, changes: dict[str, Any]) -> None:
        """Shake all particles of runs that have come to rest, or have waited for too long."""
        options, swarm = self.param_groups[0], self._swarm
        x = swarm["particles"]
        waited = torch.where(improved, 0, swarm["waited"] + 1)
        if options["kick_below"] is not None and swarm["step"] > 0:
            way = (changes["consensus"] - swarm["consensus"]).abs().amax(-1)
            still = alive & (way < options["kick_below"])
            if still.any():
                x += still[:, None, None] * (self._columns(rates.diffusion) * self._noise(KICK))
        if options["patience"] is not None:
            stuck = alive & (waited >= options["patience"])
            if stuck.any():
                x += stuck[:, None, None] * (self._columns([0.1 * r for r in rates.root]) * self._noise(KICK))
                waited = torch.where(stuck, 0, waited)
        changes.update(waited=waited)

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
        reductions = dict(min=torch.distributed.ReduceOp.MIN, sum=torch.distributed.ReduceOp.SUM)
        torch.distributed.all_reduce(tensor, reductions[op], group=self.process_group)
        return tensor

    def _gathered(self, energies: Tensor) -> Tensor:
        """The energies of the particles of all ranks."""
        if self._world == 1:
            return energies
        swarm = self._swarm
        every = energies.new_full((energies.shape[0], swarm["count"]), math.inf)
        every[:, swarm["first"] : swarm["first"] + energies.shape[1]] = energies
        return self._reduce(every, "min")

    def _owned(self, seen: Tensor, lowest: Tensor) -> Tensor:
        """The particle of the lowest energy of all ranks."""
        x = self._swarm["particles"]
        runs, where = torch.arange(x.shape[0], device=x.device), seen.argmin(-1)
        own: Tensor = x[runs, where]
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


def _at(index: Tensor | None, new: Any, old: Tensor) -> Tensor:
    """``new`` in the columns of ``index``, ``old`` elsewhere; ``None`` is everywhere."""
    if index is None and isinstance(new, Tensor):
        return new
    turn = torch.full(old.shape[1:2], index is None, device=old.device)
    if index is not None:
        turn[index] = True
    return torch.where(turn, new, old)


_POINTS = ("particles", "consensus", "best", "memory", "exp_avg", "exp_avg_sq")
_SHARED = ("particles", "consensus", "best", "energies", "best_loss", "consensus_loss", "spread", "alpha", "waited",
           "step", "epoch", "batches", "since", "first", "count")  # fmt: skip


def _check_uniform(groups: Sequence[Group]) -> None:
    for group in groups:
        for name in _GLOBAL:
            if group[name] != groups[0][name]:
                raise ValueError(f"{name} is one for all groups, got {groups[0][name]!r} and {group[name]!r}")
