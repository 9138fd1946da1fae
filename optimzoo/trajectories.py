"""Runs on scenes and paths of networks as numbers: what :mod:`optimzoo.viz` draws, without matplotlib.

Runs on scenes are computed together: all starts and learning rates of a method that treats coordinates alike are one
tensor. What is compared is compared fairly: every method is tried at the same learning rates, from the same starts,
and its learning rate chosen by the same rule, from starts that are not shown; baselines are always among them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import optimzoo
from optimzoo.curvature import Hessian, Spectrum, lanczos, quadrature
from optimzoo.functions import Scene, scene
from optimzoo.optimizer import Elementwise, check_number
from optimzoo.sso import Armijo

Options: TypeAlias = dict[str, Any]
Progress: TypeAlias = Callable[[str, int, int], None]
"""Told what is done, how much of it, and of how much."""


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


# Methods


class Method(NamedTuple):
    """A method as it runs on scenes.

    Args:
        label: for legends.
        make: the optimizer's class, or a function like it.
        options: beside the learning rate. None has weight decay: a scene's minimum is that of the loss alone.
        drive: what runs it; by default each step is given a gradient.
        own: for :func:`anatomy`, a quantity that others do not have: its name, and what finds it (steps, d) from the
            rest of the anatomy and the settings of the optimizer's group.
    """

    label: str
    make: Callable[..., Any]
    options: Options = {}  # noqa: RUF012  # never written to
    drive: Drive | None = None
    own: tuple[str, Callable[[Anatomy, Options], Tensor]] | None = None

    @property
    def default_lr(self) -> float | None:
        """The learning rate of whoever does not give one."""
        lr = inspect.signature(self.make).parameters.get("lr")
        return float(lr.default) if lr and isinstance(lr.default, int | float) else None


class Paths(NamedTuple):
    """Points (variants, starts, steps + 1, d), and what they cost in gradients (variants, starts, steps + 1).

    Of a method with particles also those of the first start (variants, steps + 1, particles, d), in float32.
    """

    points: Tensor
    cost: Tensor
    particles: Tensor | None = None


Watch: TypeAlias = Callable[[Any, Tensor, Tensor], None]
"""Told the optimizer, its parameter and the gradient after each step of a single run."""

Drive: TypeAlias = Callable[[Method, list[Options], Scene, Tensor, int, Progress, Watch | None], Paths]

# Of torch's, those that treat every coordinate alike. Of others it is asked.
_ALIKE = {getattr(torch.optim, name) for name in (
    "SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adadelta", "Adamax", "Rprop", "ASGD")}  # fmt: skip


def elementwise(method: Method, options: Options) -> bool:
    """Whether one tensor can hold the points of many runs: no coordinate sees another."""
    make = method.make
    ours = isinstance(make, type) and issubclass(make, Elementwise) and not issubclass(make, optimzoo.AdaGradNorm)
    return (ours or make in _ALIKE) and options.get("max_grad_norm") is None


def by_gradients(
    method: Method,
    variants: list[Options],
    it: Scene,
    starts: Tensor,
    steps: int,
    progress: Progress = silent,
    watch: Watch | None = None,
) -> Paths:
    """Runs a method whose step takes a gradient: all runs in one optimizer, or each in its own."""
    points = starts.expand(len(variants), *starts.shape).clone()
    if all(elementwise(method, options) for options in variants):
        params = [nn.Parameter(block) for block in points]
        groups = [{"params": [param], **options} for param, options in zip(params, variants, strict=True)]
        optimizers = [method.make(groups, **variants[0])]
        slots: list[tuple[int, ...]] = [(v,) for v in range(len(params))]
    else:
        slots = [(v, i) for v in range(len(variants)) for i in range(len(starts))]
        params = [nn.Parameter(points[slot]) for slot in slots]
        optimizers = [method.make([p], **variants[slot[0]]) for p, slot in zip(params, slots, strict=True)]
    path = [points.clone()]
    for step in range(steps):
        slope = it.gradient(points, step)
        for param, slot in zip(params, slots, strict=True):
            param.grad = slope[slot]
        for optimizer in optimizers:
            optimizer.step()
        path.append(points.clone())
        if watch is not None:
            watch(optimizers[0], params[0], slope)
        if step % 20 == 0:
            progress(method.label, step, steps)
    cost = torch.arange(steps + 1, dtype=torch.float64).repeat(*points.shape[:2], 1)
    return Paths(torch.stack(path, 2), cost)


def _singly(run: Callable[..., tuple[list[Tensor], list[float]]]) -> Drive:
    """The drive that makes each run by itself."""

    @functools.wraps(run)
    def drive(
        method: Method,
        variants: list[Options],
        it: Scene,
        starts: Tensor,
        steps: int,
        progress: Progress = silent,
        watch: Watch | None = None,
    ) -> Paths:
        points, costs = [], []
        for v, options in enumerate(variants):
            for i, start in enumerate(starts):
                param = nn.Parameter(start.clone())

                def value(step: int, point: Tensor = param, i: int = i) -> Tensor:
                    if it.noise == (0.0, 0.0):
                        return it.value(point)
                    return it.sample(point.expand(len(starts), -1), step)[i]  # the i-th of n draws

                path, cost = run(method.make, options, value, param, steps)
                points.append(torch.stack(path))
                costs.append(torch.tensor(cost, dtype=torch.float64))
                progress(method.label, v * len(starts) + i + 1, len(variants) * len(starts))
        shape = len(variants), len(starts), steps + 1
        return Paths(torch.stack(points).view(*shape, -1), torch.stack(costs).view(shape))

    return drive


Value: TypeAlias = Callable[..., Tensor]
"""The loss that a step sees, of the parameter or of another point."""


@_singly
def by_closures(
    make: Callable[..., Any], options: Options, value: Value, param: Tensor, steps: int
) -> tuple[list[Tensor], list[float]]:
    """Runs a method whose step evaluates a closure as often as it likes."""
    optimizer, path, cost = make([param], **options), [param.detach().clone()], [0.0]
    for step in range(steps):
        calls = 0

        def closure(step: int = step) -> Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = value(step)
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
            return loss

        optimizer.step(closure)
        path.append(param.detach().clone())
        cost.append(cost[-1] + calls)
    return path, cost


@_singly
def by_surrogates(
    make: Callable[..., Any], options: Options, value: Value, param: Tensor, steps: int
) -> tuple[list[Tensor], list[float]]:
    """Runs SSO on a scene: the point itself is the target."""
    # The surrogate's curvature is 1 / lr here, and Armijo's search ends at lr at most. From its default, 10, 100 trials
    # do not reach 1e-4; at lr itself rounding decides.
    usual = dict(inner=functools.partial(Armijo, lr=0.95 * options["lr"], growth=1.0), nonfinite="skip")
    optimizer, path, cost = make([param], **{**usual, **options}), [param.detach().clone()], [0.0]

    for step in range(steps):
        optimizer.step(lambda step=step: (param[None], lambda z: value(step, z[0])))
        path.append(param.detach().clone())
        counts = optimizer.counts
        cost.append(counts["loss_gradients"] + (counts["loss_values"] - counts["loss_gradients"]) / 3)
    return path, cost


@_singly
def by_curvature(
    make: Callable[..., Any], options: Options, value: Value, param: Tensor, steps: int
) -> tuple[list[Tensor], list[float]]:
    """Runs SGD whose learning rate LanczosLR sets; ``lr`` multiplies it."""
    optimizer, path, cost = torch.optim.SGD([param], lr=options["lr"]), [param.detach().clone()], [0.0]
    scheduler = make(optimizer, **{"every": 10, **{k: v for k, v in options.items() if k != "lr"}})
    for step in range(steps):
        looks = scheduler.looks
        scheduler.step(functools.partial(value, step))
        optimizer.zero_grad()
        value(step).backward()  # type: ignore[no-untyped-call]  # untyped in torch
        optimizer.step()
        path.append(param.detach().clone())
        # A look costs a gradient, and at most d products of two gradients each.
        cost.append(cost[-1] + 1 + (scheduler.looks - looks) * (1 + 2 * min(param.numel(), scheduler.iterations)))
    return path, cost


def by_particles(
    method: Method,
    variants: list[Options],
    it: Scene,
    starts: Tensor,
    steps: int,
    progress: Progress = silent,
    watch: Watch | None = None,
) -> Paths:
    """Runs CBO: a swarm around each start, of which the consensus is recorded. It sees values, which have no noise."""
    points, costs, swarms = [], [], []
    for v, options in enumerate(variants):
        param = nn.Parameter(starts[0].clone())
        optimizer = method.make([param], **{"n_runs": len(starts), "seed": 0, **options})
        optimizer.particles[0].add_((starts - starts[0])[:, None])
        path, cost, swarm = [starts.clone()], [0.0], [optimizer.particles[0][0].float()]
        for _ in range(steps):
            optimizer.step(lambda stacked: it.value(stacked[0]), batched=True)
            path.append(optimizer.consensus[0].detach().clone())
            cost.append(cost[-1] + optimizer.energies.shape[-1] / 3)  # a value is a third of a gradient
            swarm.append(optimizer.particles[0][0].float())
        points.append(torch.stack(path, 1))
        costs.append(torch.tensor(cost, dtype=torch.float64).expand(len(starts), -1))
        swarms.append(torch.stack(swarm))
        progress(method.label, v + 1, len(variants))
    return Paths(torch.stack(points), torch.stack(costs), torch.stack(swarms))


def _friction(found: Anatomy, options: Options) -> Tensor:
    after = found.states["previous_grad"]
    change = torch.cat([torch.zeros_like(after[:1]), after[:-1]]) - after
    if options["variant"] == 2:
        return 9 * (change.abs() / 2).sigmoid() - 4
    return (change if options["variant"] == 1 else change.abs()).sigmoid()


def _denominator(found: Anatomy, options: Options) -> Tensor:
    variance = found.states.get("max_exp_avg_var", found.states["exp_avg_var"])
    step = torch.arange(1, len(variance) + 1, dtype=variance.dtype)[:, None]
    root: Tensor = (variance / (1 - options["betas"][1] ** step)).sqrt() + options["eps"]
    return root


def _weights(found: Anatomy, options: Options) -> Tensor:
    return found.points[1:]


_SIGNED = "Weights, none of which changes its sign", _weights

METHODS: dict[str, Method] = {
    "sgd": Method("SGD", torch.optim.SGD),
    "momentum": Method("SGD + momentum", torch.optim.SGD, dict(momentum=0.9)),
    "adam": Method("Adam", torch.optim.Adam),
    "adamw": Method("AdamW", torch.optim.AdamW, dict(weight_decay=0.0)),
    "rmsprop": Method("RMSprop", torch.optim.RMSprop),
    "adagrad": Method("Adagrad", torch.optim.Adagrad),
    "lbfgs": Method("L-BFGS", torch.optim.LBFGS, dict(max_iter=1), by_closures),
    "diffgrad": Method("diffGrad", optimzoo.DiffGrad, own=("Friction: what Adam's step is multiplied by", _friction)),
    "adabelief": Method(
        "AdaBelief",
        optimzoo.AdaBelief,
        dict(rectify=False),
        own=("Denominator: how far gradients are from their mean", _denominator),
    ),
    "adagradnorm": Method("AdaGradNorm", optimzoo.AdaGradNorm),
    "dalesgd": Method("DaleSGD", optimzoo.DaleSGD, own=_SIGNED),
    "daleadamw": Method("DaleAdamW", optimzoo.DaleAdamW, dict(weight_decay=0.0), own=_SIGNED),
    "dalelangevin": Method("DaleLangevin", optimzoo.DaleLangevin, own=_SIGNED),
    "cbo": Method("CBO, 50 particles", optimzoo.CBO, dict(n_particles=50), by_particles),
    "sso": Method("SSO", optimzoo.SSO, dict(inner_steps=2), by_surrogates),
    "lanczos": Method("SGD, LanczosLR", optimzoo.LanczosLR, {}, by_curvature),
}
"""The methods that run on scenes. TPSGD is none: it needs layers and labels."""

BASELINES = ("momentum", "adamw")
"""Always among those that are compared."""


def method(spec: str | Method | type | tuple[Any, Options]) -> Method:
    """A method by its name in ``METHODS``, ``package.module:Class``, a class, or a class with options.

    Raises:
        ValueError: there is no such name; the message has the nearest ones.
        TypeError: it is nothing that makes an optimizer.
    """
    if isinstance(spec, Method):
        return spec
    if isinstance(spec, str):
        if spec.lower() in METHODS:
            return METHODS[spec.lower()]
        if ":" in spec:
            module, _, name = spec.partition(":")
            try:
                return method(getattr(importlib.import_module(module), name))
            except (ImportError, AttributeError) as error:
                raise ValueError(f"there is no optimizer {spec!r}: {error}") from error
        if spec.lower() == "tpsgd":
            raise ValueError("TPSGD needs layers and labels, and a scene has none")
        near = difflib.get_close_matches(spec.lower(), METHODS, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        raise ValueError(
            f"there is no optimizer {spec!r}{hint} Optimizers: {', '.join(METHODS)}; others as package.module:Class"
        )
    make, options = spec if isinstance(spec, tuple) else (spec, {})
    if not callable(make):
        raise TypeError(f"an optimizer must be a name, a class or (class, options), got {spec!r}")
    known = next((entry for entry in METHODS.values() if entry.make is make), None)
    if known is not None:
        return known._replace(label=known.label.partition(",")[0], options={**known.options, **options})
    step = getattr(make, "step", None)
    closure = inspect.signature(step).parameters.get("closure") if step else None
    needed = closure is not None and closure.default is inspect.Parameter.empty
    return Method(getattr(make, "__name__", repr(make)), make, dict(options), by_closures if needed else None)


def paths(
    it: Scene,
    spec: str | Method | type | tuple[Any, Options],
    variants: Sequence[Options],
    starts: Tensor | None = None,
    steps: int | None = None,
    *,
    progress: Progress = silent,
    watch: Watch | None = None,
) -> Paths:
    """The paths of a method with each of several options, from each of several starts (n, d).

    A path that leaves what numbers can hold goes on as NaN; the others do not notice.
    """
    entry = method(spec)
    steps = whole("steps", it.steps if steps is None else steps)
    starts = it.start[None] if starts is None else torch.as_tensor(starts, dtype=torch.float64).reshape(-1, it.dim)
    drive = entry.drive or by_gradients
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a grid has rates that methods warn of
        return drive(entry, [{**entry.options, **options} for options in variants], it, starts, steps, progress, watch)


def whole(name: str, value: Any, least: int = 1) -> int:
    """The value, if it is a whole number of at least ``least``; else an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return value


# Comparison


@dataclass(frozen=True)
class Tune:
    """How ``"auto"`` chooses a learning rate, for all methods alike.

    Each of ``trials`` rates, equally spaced in their logarithm from ``low`` to ``high``, runs from ``starts`` points
    near the scene's, which are not shown. The rate is chosen whose score is lowest: the mean over steps and starts of
    the logarithm of the gap to the minimum, as a share of the first gap, from 1e-8 to 1e3. A run that leaves the
    scene's box, with a tenth of it on each side, scores as the worst.
    """

    trials: int = 31
    low: float = 1e-5
    high: float = 10.0
    starts: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        whole("trials", self.trials, 2)
        whole("starts", self.starts)
        check_number("low", self.low, 0.0, math.inf, "finite and > 0", above=True)
        check_number("high", self.high, self.low, math.inf, f"finite and > low, {self.low!r}", above=True)

    @property
    def rates(self) -> list[float]:
        """The learning rates, rounded to three digits."""
        ends = math.log10(self.low), math.log10(self.high)
        return [float(f"{10**e:.3g}") for e in torch.linspace(*ends, self.trials, dtype=torch.float64).tolist()]

    def around(self, it: Scene) -> Tensor:
        """The starts that are not shown: the scene's, moved by 5 % of the box."""
        draw = torch.Generator().manual_seed(self.seed)
        moves = torch.randn(self.starts, it.dim, dtype=torch.float64, generator=draw)
        return it.start + moves * 0.05 * (it.box[:, 1] - it.box[:, 0])


def score(it: Scene, points: Tensor) -> Tensor:
    """The scores (variants,) of points (variants, starts, steps + 1, d); see :class:`Tune`."""
    gap = (it.value(points) - it.least).nan_to_num(math.inf, math.inf, math.inf)
    room = 0.1 * (it.box[:, 1] - it.box[:, 0])
    inside = ((points >= it.box[:, 0] - room) & (points <= it.box[:, 1] + room)).all(-1).all(-1)
    return torch.where(inside, _log_share(gap), math.log10(_WORST)).mean(-1)


_BEST, _WORST = 1e-8, 1e3


def _log_share(gap: Tensor) -> Tensor:
    """The mean over the steps of the logarithm of the gap's share."""
    return (gap / gap[..., :1].clamp_min(1e-300)).clamp(_BEST, _WORST).log10().mean(-1)


@dataclass(frozen=True)
class Run:
    """One method on a scene, at each learning rate of the grid: tensors (rates, starts, steps + 1[, d]).

    ``chosen`` is the place of its learning rate in ``rates``; ``tuned`` says whether the rule chose it. ``particles``
    (steps + 1, particles, d) are those of the first start at the chosen rate, of a method that has them; its points are
    the consensus that they have last moved towards.
    """

    name: str
    label: str
    rates: list[float]
    points: Tensor
    cost: Tensor
    losses: Tensor
    slopes: Tensor
    scores: list[float]
    chosen: int
    tuned: bool
    default_lr: float | None
    particles: Tensor | None = None

    @property
    def lr(self) -> float:
        """The learning rate that is shown."""
        return self.rates[self.chosen]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the first or the last that was tried."""
        return self.tuned and self.chosen in (0, len(self.rates) - 1)


@dataclass(frozen=True)
class Trace:
    """Several methods on one scene; the first ``shown`` of the starts are for the eye."""

    scene: Scene
    runs: list[Run]
    shown: int
    tune: Tune

    def __getitem__(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    def path(self, run: Run) -> Tensor:
        """The points (shown, steps + 1, d) at the chosen rate."""
        return run.points[run.chosen, : self.shown]

    def gap(self, run: Run) -> Tensor:
        """How far the loss is above the minimum (shown, steps + 1), never below the rounding of a float64."""
        return (run.losses[run.chosen, : self.shown] - self.scene.least).clamp_min(1e-16)

    def record(self) -> dict[str, Any]:
        """What is shown, but for particles, as JSON has it; what is not finite is None."""

        def plain(value: Tensor) -> Any:
            if value.dim():
                return [plain(part) for part in value]
            return float(value) if value.isfinite() else None

        runs = {
            run.name: dict(
                lr=run.lr, tuned=run.tuned, rates=run.rates, scores=run.scores, points=plain(self.path(run)),
                loss=plain(run.losses[run.chosen, : self.shown]), gradients=plain(run.cost[run.chosen, : self.shown]),
            )
            for run in self.runs
        }  # fmt: skip
        return dict(scene=self.scene.name, noise=self.scene.noise, tune=dataclasses.asdict(self.tune), runs=runs)


Specs: TypeAlias = Mapping[str, Any] | Iterable[Any]


def entries(methods: Specs, baselines: Sequence[str] = BASELINES) -> dict[str, tuple[Method, float | None]]:
    """The methods by name with the learning rate that was given, or None; baselines first where they are missing.

    Args:
        methods: names or classes, or a mapping from names to ``"auto"``, options, or (class, options). Options
            without ``lr``, or with ``lr="auto"``, are tuned.
        baselines: of ``METHODS``.
    """
    if isinstance(methods, str | type | Method):
        raise TypeError(f"methods must be a list or a mapping, got {methods!r}")
    items = list(methods.items()) if isinstance(methods, Mapping) else [(each, "auto") for each in methods]
    found: dict[str, tuple[Method, float | None]] = {}
    for key, spec in items:
        if isinstance(spec, tuple):
            entry = method((spec[0], {}))
            options = dict(spec[1])
        elif isinstance(spec, Mapping) or spec == "auto":
            entry, options = method(key), dict(spec) if isinstance(spec, Mapping) else {}
        else:
            entry, options = method(spec), {}
        lr = options.pop("lr", "auto")
        if lr != "auto":
            check_number(f"lr of {key}", lr, 0.0, math.inf, "finite and > 0, or 'auto'", above=True)
        entry = entry._replace(options={**entry.options, **options})
        if isinstance(spec, tuple):
            entry = entry._replace(label=str(key))
        found[key if isinstance(key, str) else entry.label] = (entry, None if lr == "auto" else float(lr))
    same = [(entry.make, entry.options) for entry, _ in found.values()]
    missing = [name for name in baselines if (method(name).make, method(name).options) not in same]
    return {**{name: (method(name), None) for name in missing if name not in found}, **found}


def trace(
    it: Scene | str,
    methods: Specs,
    *,
    steps: int | None = None,
    starts: Tensor | None = None,
    seeds: int = 1,
    tune: Tune | None = None,
    baselines: Sequence[str] = BASELINES,
    progress: Progress = silent,
) -> Trace:
    """Run methods on a scene, each at every learning rate of one grid.

    Args:
        it: a scene, or its name.
        methods: see :func:`entries`; for instance ``["diffgrad", "adabelief"]`` or
            ``{"AdamW": (torch.optim.AdamW, dict(lr=0.05)), "diffgrad": "auto"}``.
        steps: default: the scene's.
        starts: (n, d); default: the scene's.
        seeds: show every start this many times, each with noise of its own. Default 1.
        tune: the grid and the rule. A learning rate that is given is added to the grid of its method.
        baselines: what is added where it is missing. They are tuned.
        progress: told about it.
    """
    it = scene(it) if isinstance(it, str) else it
    tune = tune or Tune()
    shown = it.start[None] if starts is None else torch.as_tensor(starts, dtype=torch.float64).reshape(-1, it.dim)
    shown = shown.repeat_interleave(whole("seeds", seeds), 0)
    every = torch.cat([shown, tune.around(it)])
    runs = []
    for name, (entry, given) in entries(methods, baselines).items():
        rates = sorted({*tune.rates, given} if given is not None else tune.rates)
        variants: list[Options] = [dict(lr=rate) for rate in rates]
        points, cost, particles = paths(it, entry, variants, every, steps, progress=progress)
        losses, slopes = it.value(points), it.gradient(points).norm(dim=-1)
        scores = score(it, points[:, len(shown) :])
        chosen = int(scores.argmin()) if given is None else rates.index(given)
        swarm = None if particles is None else particles[chosen].clone()
        about = (scores.tolist(), chosen, given is None, entry.default_lr, swarm)
        runs.append(Run(name, entry.label, rates, points, cost, losses, slopes, *about))
    return Trace(it, runs, len(shown), tune)


# Maps over starts and settings


class Basins(NamedTuple):
    """Where runs end: of a grid of starts (rows, columns) the minimum, -1 for none, and the step that reached it."""

    x: Tensor
    y: Tensor
    minimum: Tensor
    step: Tensor
    lr: float
    scene: Scene
    label: str


def tuned_rate(it: Scene, spec: Any, steps: int | None, tune: Tune | None, progress: Progress = silent) -> float:
    """The learning rate that :class:`Tune` chooses."""
    tune = tune or Tune()
    found = paths(it, spec, [dict(lr=rate) for rate in tune.rates], tune.around(it), steps, progress=progress)
    return tune.rates[int(score(it, found.points).argmin())]


def basins(
    it: Scene | str,
    spec: Any,
    *,
    lr: float | None = None,
    grid: int = 80,
    steps: int | None = None,
    within: float = 0.02,
    tune: Tune | None = None,
    progress: Progress = silent,
) -> Basins:
    """Which global minimum runs from a grid of starts reach, and when they come to stay.

    Args:
        it: a scene of two dimensions, or its name.
        spec: a method.
        lr: default: the one that ``tune`` chooses.
        grid: starts a side.
        steps: default: the scene's.
        within: how near is reached, as a share of the box.
        tune: the rule.
        progress: told about it.
    """
    it = scene(it) if isinstance(it, str) else it
    if it.dim != 2:
        raise ValueError(f"a basin map needs a scene of two dimensions, {it.name} has {it.dim}")
    whole("grid", grid, 2)
    lr = tuned_rate(it, spec, steps, tune, progress) if lr is None else lr
    x, y = (torch.linspace(float(low), float(high), grid, dtype=torch.float64) for low, high in it.box)
    starts = torch.cartesian_prod(y, x).flip(1)
    points = paths(it, spec, [dict(lr=lr)], starts, steps, progress=progress).points[0]
    apart: Tensor = ((points[:, :, None] - it.minima) / (it.box[:, 1] - it.box[:, 0])).abs().amax(-1)
    near = apart.nan_to_num(math.inf) < within  # (starts, steps + 1, minima)
    ends = near[:, -1]
    minimum = torch.where(ends.any(-1), ends.int().argmax(-1), -1)
    there = near.gather(2, minimum.clamp_min(0)[:, None, None].expand(-1, near.shape[1], 1))[..., 0]
    stays = there.flip(1).int().cumprod(1).sum(1)
    step = torch.where(minimum >= 0, near.shape[1] - stays, -1)
    return Basins(x, y, minimum.view(grid, grid), step.view(grid, grid), lr, it, method(spec).label)


Axis: TypeAlias = tuple[str, float, float, int]


class Sweep(NamedTuple):
    """Scores (y, x) over two settings, of a method on a scene; ``defaults`` are those of the two."""

    x: list[float]
    y: list[float]
    scores: Tensor
    names: tuple[str, str]
    defaults: tuple[float | None, float | None]
    scene: Scene
    label: str


def _with(options: Options, defaults: Mapping[str, Any], path: str, value: float) -> Options:
    """Options with one set; ``betas.0`` is the first of ``betas``."""
    name, _, index = path.partition(".")
    if not index:
        return {**options, name: value}
    every = options.get(name, defaults.get(name))
    if not isinstance(every, tuple | list) or not index.isdigit() or int(index) >= len(every):
        raise ValueError(f"{path!r} is no setting: {name} is {every!r}")
    return {**options, name: tuple(value if i == int(index) else old for i, old in enumerate(every))}


def _value(options: Mapping[str, Any], path: str) -> float | None:
    name, _, index = path.partition(".")
    value = options[name][int(index)] if index else options[name]
    return float(value) if isinstance(value, int | float) else None


def axis_values(axis: Axis) -> list[float]:
    """The values of an axis (setting, low, high, count): by their logarithm where both ends are > 0 and far apart."""
    name, low, high, count = axis
    whole(f"the number of values of {name}", count, 2)
    if low > 0 and high / low >= 30:
        return [float(10**e) for e in torch.linspace(math.log10(low), math.log10(high), count).tolist()]
    return [float(v) for v in torch.linspace(low, high, count, dtype=torch.float64).tolist()]


def sweep(
    it: Scene | str,
    spec: Any,
    x: Axis,
    y: Axis,
    *,
    steps: int | None = None,
    tune: Tune | None = None,
    progress: Progress = silent,
) -> Sweep:
    """The score of every pair of two settings, such as ``("lr", 1e-4, 1, 25)`` and ``("betas.0", 0, 0.99, 25)``.

    The starts are those of ``tune``, which are near the scene's.
    """
    it = scene(it) if isinstance(it, str) else it
    entry = method(spec)
    known = inspect.signature(entry.make).parameters
    for name, *_ in (x, y):
        if name.partition(".")[0] not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise ValueError(f"{entry.label} has no setting {name!r}" + (f"; nearest: {', '.join(near)}" * bool(near)))
    defaults = {name: parameter.default for name, parameter in known.items()}
    xs, ys = axis_values(x), axis_values(y)
    variants = []
    for b in ys:
        for a in xs:
            options = _with(_with(dict(entry.options), defaults, x[0], a), defaults, y[0], b)
            options.setdefault("lr", entry.default_lr)
            variants.append(options)
    starts = (tune or Tune()).around(it)
    points = paths(it, entry, variants, starts, steps, progress=progress).points
    scores = score(it, points).view(len(ys), len(xs))
    usual = (_value({**defaults, **entry.options}, x[0]), _value({**defaults, **entry.options}, y[0]))
    return Sweep(xs, ys, scores, (x[0], y[0]), usual, it, entry.label)


# What a step does


class Anatomy(NamedTuple):
    """One run step by step; per coordinate (steps, d), or (steps,).

    ``cosine`` is that of the step with the negative gradient, ``rates`` the step over the gradient: what learning rate
    plain descent would have needed. ``states`` are those tensors of the state that have the parameter's shape. ``own``
    is the quantity that the method alone has, with its name, if its :class:`Method` names one.
    """

    points: Tensor
    gradients: Tensor
    updates: Tensor
    cosine: Tensor
    rates: Tensor
    states: dict[str, Tensor]
    lr: float
    label: str
    own: tuple[str, Tensor] | None = None


def anatomy(
    it: Scene | str,
    spec: Any,
    *,
    lr: float | None = None,
    steps: int | None = None,
    tune: Tune | None = None,
    progress: Progress = silent,
) -> Anatomy:
    """What each step of a method does on a scene, coordinate by coordinate."""
    it = scene(it) if isinstance(it, str) else it
    lr = tuned_rate(it, spec, steps, tune, progress) if lr is None else lr
    states: dict[str, list[Tensor]] = {}
    settings: Options = {}

    def watch(optimizer: Any, param: Tensor, slope: Tensor) -> None:
        settings.update(optimizer.param_groups[0])
        for name, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                states.setdefault(name, []).append(value.detach().double().reshape(-1).clone())

    found = paths(it, spec, [dict(lr=lr)], steps=steps, progress=progress, watch=watch).points[0, 0]
    before, updates = found[:-1], found.diff(dim=0)
    gradients = torch.stack([it.gradient(p[None], t)[0] for t, p in enumerate(before)])
    entry = method(spec)
    label = f"{entry.label} on {it.name}"
    lengths = updates.norm(dim=1) * gradients.norm(dim=1)
    cosine = -(updates * gradients).sum(1) / lengths
    kept = {name: torch.stack(rows) for name, rows in states.items() if len(rows) == len(updates)}
    plain = Anatomy(found, gradients, updates, cosine, (updates / gradients).abs(), kept, lr, label)
    return plain if entry.own is None else plain._replace(own=(entry.own[0], entry.own[1](plain, settings)))


class Updates(NamedTuple):
    """Singular values of a method's update of a matrix, at each step (steps, rank), and losses (steps + 1,)."""

    label: str
    values: Tensor
    losses: Tensor
    lr: float


def matrix_updates(
    methods: Sequence[Any] = ("momentum", "adamw", "diffgrad", "adabelief", "muon", "shampoo"),
    shape: tuple[int, int] = (24, 16),
    *,
    steps: int = 60,
    condition: float = 100.0,
    tune: Tune | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Updates]:
    """What methods make of a matrix's gradient: singular values of updates in a least squares problem.

    The loss is half the squared distance of A W to A W*, per row, with A of the given condition. All methods have the
    same grid of learning rates; the rate is chosen whose mean logarithm of the loss is lowest. ``"muon"`` is
    ``torch.optim.Muon``, ``"shampoo"`` :class:`Shampoo`.
    """
    rows, columns = shape
    draw = torch.Generator().manual_seed(seed)

    def gaussian(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=draw)

    left, right = torch.linalg.qr(gaussian(rows, rows))[0], torch.linalg.qr(gaussian(rows, rows))[0]
    a = left * torch.logspace(0, -math.log10(condition), rows, dtype=torch.float64) @ right.T
    wanted, found = gaussian(rows, columns), []
    rates = (tune or Tune()).rates
    for done, spec in enumerate(methods):
        entry = _of_matrices(spec) or method(spec)
        if entry.drive is not None:
            raise ValueError(f"{entry.label} does not step from a gradient")
        tried = []
        for rate in rates:
            weight = nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64))
            optimizer = entry.make([weight], **{**entry.options, "lr": rate})
            losses, values = [], []
            for _ in range(steps):
                apart = a @ (weight.detach() - wanted)
                losses.append(apart.square().sum() / (2 * rows))
                weight.grad, before = a.T @ apart / rows, weight.detach().clone()
                optimizer.step()
                step = (weight.detach() - before).nan_to_num(0.0, 0.0, 0.0)
                values.append(torch.linalg.svdvals(step))
            losses.append((a @ (weight.detach() - wanted)).square().sum() / (2 * rows))
            tried.append((torch.stack(values), torch.stack(losses)))
        gaps = torch.stack([losses for _, losses in tried]).nan_to_num(math.inf)
        best = int(_log_share(gaps).argmin())
        found.append(Updates(entry.label, *tried[best], rates[best]))
        progress("matrices", done + 1, len(methods))
    return found


class Shampoo(torch.optim.Optimizer):
    r"""Shampoo's step for matrices, to draw it beside others: no momentum, no blocks, every root anew.

    .. math::
        L_t = L_{t-1} + G G^T, \quad R_t = R_{t-1} + G^T G, \quad W_t = W_{t-1} - \gamma L_t^{-1/4} G R_t^{-1/4}

    with :math:`L_0 = R_0 = \epsilon I` (Gupta et al., 2018, https://arxiv.org/abs/1802.09568).
    """

    def __init__(self, params: Any, lr: float = 0.1, eps: float = 1e-6) -> None:
        super().__init__(params, dict(lr=lr, eps=eps))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no closure
        """One step, from the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                way, row = weight.grad, self.state[weight]
                for name, gram in (("left", way @ way.mT), ("right", way.mT @ way)):
                    row[name] = row.get(name, group["eps"] * torch.eye(len(gram)).to(gram)) + gram
                weight -= group["lr"] * _fourth_root(row["left"]) @ way @ _fourth_root(row["right"])


def _fourth_root(gram: Tensor) -> Tensor:
    """The inverse of it."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp_min(1e-300) ** -0.25 @ vectors.mT
    return root


def _of_matrices(spec: Any) -> Method | None:
    """The method, if it is one for matrices alone."""
    if spec == "shampoo":
        return Method("Shampoo", Shampoo)
    if spec != "muon":
        return None
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"this torch, {torch.__version__}, has no Muon; torch 2.9 or later has one")
    return Method("Muon", torch.optim.Muon, dict(weight_decay=0.0))


# Networks

Loss: TypeAlias = Callable[[nn.Module], Tensor]
"""The loss of a model on fixed data; it must not depend on random numbers."""


class Recorder:
    """Keeps a network's parameters along its training.

    Args:
        model: its parameters are recorded in float32, flat.
        every: record each so many calls. Default 1.
        max_mb: when this many 10^6 bytes are full, every other record is dropped and ``every`` doubles.

    Call it after each step, or after each epoch. The first call records.
    """

    def __init__(self, model: nn.Module, every: int = 1, max_mb: float = 200.0) -> None:
        self.model, self.every, self.calls = model, whole("every", every), 0
        check_number("max_mb", max_mb, 0.0, math.inf, "finite and > 0", above=True)
        size = 4e-6 * sum(param.numel() for param in model.parameters())
        self._most = int(max_mb / size) if size else 0
        if self._most < 4:
            raise ValueError(f"max_mb must hold four records of {size:.3g} MB, got {max_mb!r}")
        self.steps: list[int] = []
        self.rows: list[Tensor] = []

    def __call__(self) -> None:
        """Record, if it is time to."""
        if self.calls % self.every == 0:
            self.steps.append(self.calls)
            self.rows.append(_flat(self.model))
            if len(self.rows) >= self._most:
                self.every *= 2
                kept = [i for i, step in enumerate(self.steps) if step % self.every == 0]
                self.steps, self.rows = [self.steps[i] for i in kept], [self.rows[i] for i in kept]
        self.calls += 1


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().reshape(-1).float().cpu() for param in model.parameters()])


class _Evaluator:
    """The loss of a model at other parameters; within it they are its to change, and afterwards all is as it was.

    BatchNorm's running statistics belong to the parameters that they were collected with, so that they are collected
    again at each point, from ``statistics``; without these a model that has them is refused.
    """

    def __init__(self, model: nn.Module, loss: Loss, statistics: Iterable[Any] | None) -> None:
        self.model, self.loss, self.statistics = model, loss, statistics
        layers = nn.modules.batchnorm._BatchNorm
        self.normalised = [m for m in model.modules() if isinstance(m, layers) and m.track_running_stats]
        if self.normalised and statistics is None:
            raise ValueError(
                f"the model has {len(self.normalised)} BatchNorm layers, whose running statistics are wrong elsewhere: "
                "pass statistics, batches of inputs to collect them from at each point"
            )
        if isinstance(statistics, Iterable) and iter(statistics) is statistics:
            raise ValueError("statistics must be a list of batches or a loader: an iterator is empty after one point")

    def __enter__(self) -> _Evaluator:
        self.params, self.modes = list(self.model.parameters()), [(m, m.training) for m in self.model.modules()]
        self.kept = [tensor.detach().clone() for tensor in (*self.params, *self.model.buffers())]
        return self

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for tensor, kept in zip((*self.params, *self.model.buffers()), self.kept, strict=True):
                tensor.copy_(kept)
        for module, mode in self.modes:
            module.training = mode

    def write(self, flat: Tensor) -> None:
        """Give the parameters these values."""
        sizes = [param.numel() for param in self.params]
        with torch.no_grad():
            for param, part in zip(self.params, torch.split(flat, sizes), strict=True):
                param.copy_(part.view(param.shape))

    def __call__(self, flat: Tensor) -> float:
        self.write(flat)
        self.model.eval()
        if self.normalised:
            torch.optim.swa_utils.update_bn(self.statistics or [], self.model)
            self.model.eval()
        with torch.no_grad():
            return float(self.loss(self.model))


class Plane(NamedTuple):
    """Losses (b, a) over a plane of parameter space, and what is in it.

    Args:
        a, b: coordinates.
        losses: on the grid; NaN where they are not finite.
        paths: by name, projected points (records, 2).
        explained: share of the paths' variance that the plane holds; 1 if there are none.
        ends: by name, the loss at the true end and at its projection.
    """

    a: list[float]
    b: list[float]
    losses: Tensor
    paths: dict[str, Tensor]
    explained: float
    ends: dict[str, tuple[float, float]]


def _grid(
    evaluate: _Evaluator, origin: Tensor, u: Tensor, v: Tensor, a: list[float], b: list[float], progress: Progress
) -> Tensor:
    losses = torch.empty(len(b), len(a), dtype=torch.float64)
    for j, y in enumerate(b):
        for i, x in enumerate(a):
            value = evaluate(origin + x * u + y * v)
            losses[j, i] = value if math.isfinite(value) else math.nan
        progress("plane", j + 1, len(b))
    return losses


def _spaced(low: float, high: float, n: int) -> list[float]:
    return [float(value) for value in torch.linspace(low, high, n, dtype=torch.float64).tolist()]


def pca_plane(
    records: Mapping[str, Recorder | Sequence[Tensor]],
    model: nn.Module,
    loss: Loss,
    *,
    n: int = 31,
    margin: float = 0.15,
    statistics: Iterable[Any] | None = None,
    least_explained: float = 0.5,
    progress: Progress = silent,
) -> Plane:
    """The loss on the plane of the two largest principal components of several training paths together.

    Args:
        records: by name, recorders or lists of flat parameters.
        model: of the same shapes.
        loss: of the model, on fixed data.
        n: points a side.
        margin: around the paths, as a share of their extent.
        statistics: batches for BatchNorm, which is refused without.
        least_explained: refuse a plane that holds less than this share of the variance. Default 0.5.
        progress: told about it.
    """
    rows = {name: torch.stack(list(r.rows if isinstance(r, Recorder) else r)).double() for name, r in records.items()}
    if not rows or sum(map(len, rows.values())) < 3:
        raise ValueError("records must hold three points or more")
    whole("n", n, 3)
    every = torch.cat(list(rows.values()))
    origin = every.mean(0)
    moved = every - origin
    squares, vectors = torch.linalg.eigh(moved @ moved.T)  # of as many rows as there are records
    explained = float(squares[-2:].clamp_min(0).sum() / squares.clamp_min(0).sum().clamp_min(1e-300))
    if explained < least_explained:
        raise ValueError(
            f"the plane holds {explained:.0%} of the variance of the paths, less than {least_explained:.0%}: "
            "what it shows is not where they went"
        )
    u, v = (nn.functional.normalize(vectors[:, k] @ moved, dim=0) for k in (-1, -2))
    placed = {name: torch.stack([(r - origin) @ u, (r - origin) @ v], 1) for name, r in rows.items()}
    both = torch.cat(list(placed.values()))
    low, high = both.amin(0), both.amax(0)
    room = margin * (high - low).clamp_min(1e-3 * float((high - low).max()))
    a, b = (_spaced(float(low[k] - room[k]), float(high[k] + room[k]), n) for k in (0, 1))
    with _Evaluator(model, loss, statistics) as evaluate:
        losses = _grid(evaluate, origin, u, v, a, b, progress)
        ends = {
            name: (evaluate(r[-1]), evaluate(origin + placed[name][-1, 0] * u + placed[name][-1, 1] * v))
            for name, r in rows.items()
        }
    return Plane(a, b, losses, placed, explained, ends)


def filter_normalised(model: nn.Module, seed: int) -> Tensor:
    """A Gaussian direction, each filter as long as the model's; none in vectors (Li et al., 2018)."""
    draw, parts = torch.Generator().manual_seed(seed), []
    for param in model.parameters():
        direction = torch.randn(param.shape, generator=draw, dtype=torch.float64)
        if param.dim() < 2:
            parts.append(torch.zeros(param.numel(), dtype=torch.float64))
            continue
        rows, own = direction.flatten(1), param.detach().double().cpu().flatten(1)
        parts.append((rows * (own.norm(dim=1) / rows.norm(dim=1).clamp_min(1e-300))[:, None]).reshape(-1))
    return torch.cat(parts)


def plane(
    model: nn.Module,
    loss: Loss,
    *,
    n: int = 31,
    reach: float = 1.0,
    seed: int = 0,
    statistics: Iterable[Any] | None = None,
    progress: Progress = silent,
) -> Plane:
    """The loss around a model on a plane of two random directions, normalised filter by filter.

    ``reach`` is how far it goes to each side, in lengths of the filters. The other arguments are as in
    :func:`pca_plane`.
    """
    whole("n", n, 3)
    check_number("reach", reach, 0.0, math.inf, "finite and > 0", above=True)
    u, v = filter_normalised(model, seed), filter_normalised(model, seed + 1)
    side, here = _spaced(-reach, reach, n), _flat(model).double()
    with _Evaluator(model, loss, statistics) as evaluate:
        losses = _grid(evaluate, here, u, v, side, side, progress)
    return Plane(side, side, losses, {}, 1.0, {})


def interpolate(
    model: nn.Module,
    first: Tensor,
    second: Tensor,
    loss: Loss,
    *,
    n: int = 41,
    margin: float = 0.25,
    statistics: Iterable[Any] | None = None,
) -> tuple[list[float], list[float]]:
    """Losses on the line from one point of parameter space (0) to another (1), and ``margin`` beyond both."""
    shares = _spaced(-margin, 1 + margin, whole("n", n, 2))
    one, two = first.double(), second.double()
    with _Evaluator(model, loss, statistics) as evaluate:
        return shares, [evaluate(one + share * (two - one)) for share in shares]


class Curvature(NamedTuple):
    """The largest eigenvalues of the Hessian along a path (records, k), and the spectrum at its end."""

    steps: list[int]
    values: Tensor
    spectrum: Spectrum


def hessian(
    record: Recorder,
    loss: Loss,
    *,
    k: int = 3,
    at_most: int = 20,
    iterations: int = 24,
    starts: int = 2,
    statistics: Iterable[Any] | None = None,
    progress: Progress = silent,
) -> Curvature:
    """The curvature of a loss along a recorded training.

    Args:
        record: of the training; of its records ``at_most`` are looked at, evenly.
        loss: of the model, on fixed data; with a graph.
        k: eigenvalues.
        at_most: records.
        iterations: products for each record, and for each start of the spectrum.
        starts: random vectors for the spectrum.
        statistics: batches for BatchNorm, which is refused without. It is in evaluation mode.
        progress: told about it.
    """
    whole("k", k)
    places = torch.linspace(0, len(record.rows) - 1, min(whole("at_most", at_most), len(record.rows)))
    chosen, values = sorted({round(float(place)) for place in places}), []
    with _Evaluator(record.model, loss, statistics) as evaluate:
        for done, place in enumerate(chosen):
            evaluate(record.rows[place])
            params = [param for param in record.model.parameters() if param.requires_grad]
            operator = Hessian(lambda: loss(record.model), params)
            top = lanczos(operator, iterations).values[:k]
            values.append(torch.cat([top, top.new_full((k - len(top),), math.nan)]))
            progress("curvature", done + 1, len(chosen))
        spectrum = quadrature(operator, iterations, starts)
    return Curvature([record.steps[place] for place in chosen], torch.stack(values), spectrum)


# Benchmark files


def finished_runs(file: str) -> list[dict[str, Any]]:
    """The runs in a benchmark's ``runs.jsonl``, or in that of a folder, with ``task``, ``method`` and ``lr``."""
    path = Path(file)
    path = path / "runs.jsonl" if path.is_dir() else path
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            how = row["settings"]
            rows.append({**row, "task": how["task"], "method": how["method"], "lr": how["hp"].get("lr")})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is not a run: {error!r}") from error
    return rows
