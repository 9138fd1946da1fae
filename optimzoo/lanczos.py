"""LanczosLR: learning rate and momentum from the spectrum of the batch Hessian, after Granziol, Zohren and Roberts.

JMLR 2022, https://arxiv.org/abs/2006.09092. The learner is built after the paper's abstract and standard theory; no
result of the paper is claimed to be reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optimzoo.curvature import (
    GGN,
    Closure,
    Hessian,
    Preconditioned,
    Spectrum,
    check_params,
    gradients_kept,
    quadrature,
)
from optimzoo.optimizer import check_flags, check_int, check_number, warn
from optimzoo.stability import heavy_ball, stability_bound

Group: TypeAlias = dict[str, Any]

_QUANTILE = 0.1  # of the density, for mu="quantile"
# What an Adam divides by the root of, by order of preference.
_SECOND_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq", "max_exp_avg_var", "exp_avg_var")
# What is saved beside the rates and momenta of the groups.
_SAVED = (
    "last_epoch",
    "due",
    "looks",
    "skipped",
    "settled",
    "seed",
    "largest",
    "learnt",
    "multipliers",
    "written",
    "base_lrs",
)


class LanczosLR(LRScheduler):
    r"""Sets the learning rate, and on request the momentum, from extremal eigenvalues of the batch Hessian.

    With :math:`L` the largest Ritz value plus its error bound and :math:`\rho` the group's momentum, the rate is

    .. math::
        \gamma = s\,\frac{2 (1 + \rho)}{L}

    and without momentum :math:`2 s / (L + \mu)`; the factor at 1 is the edge of stability. A learnt momentum is that
    of heavy ball:

    .. math::
        \sqrt\rho = \min\left(\frac{\sqrt L - \sqrt\mu}{\sqrt L + \sqrt\mu}, \sqrt{\rho_{\max}}\right), \qquad
        \gamma = s\,\frac{(1 + \sqrt\rho)^2}{L}

    With momentum and dampening the rate is divided by one minus the dampening; for ``betas``, by one minus the first.

    Args:
        optimizer: SGD, with or without momentum, or a method with ``betas`` and ``exp_avg_sq``, as Adam. For the second
            kind the curvature is that of :math:`D^{-1/2} H D^{-1/2}`, :math:`D = \sqrt{\hat v} + \epsilon`. **The
            group's own** ``lr`` **multiplies the learnt one**: give the optimizer ``lr=1``.
        every: steps from one look at the curvature to the next. While rates first grow by ``growth``, and after one
            has fallen by as much, the next look comes after a twentieth of it. Default 400.
        iterations: Hessian-vector products in a look, at most. Default 10.
        starts: Lanczos runs in a look, each with ``iterations`` products. Default 1.
        curvature: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix; the closure then returns
            ``(outputs, loss)``. Default ``"hessian"``.
        rule: ``"spectrum"``, or ``"line"``: :math:`\gamma = g^\top g / g^\top H g`, one product, with the momentum
            left alone and none of the guards but the bounds. Default ``"spectrum"``.
        mu: the smallest curvature that matters: ``"abs_min"``, the magnitude of the lowest Ritz value,
            ``"smallest_positive"``, ``"quantile"``, the value that a tenth of the density lies below (0 if that is
            negative), or a number >= 0. Default ``"abs_min"``.
        momentum: ``"fixed"``, or ``"learn"`` to set it, or the first of ``betas``, with the rate. Default ``"fixed"``:
            where a network's lowest eigenvalue flickers, the learnt momentum does.
        damping: added to every eigenvalue, >= 0; so is coupled weight decay. Default 0.
        safety: :math:`s`, in (0, 1]. Default 0.5.
        ema: weight of the past while :math:`\log L` falls, in [0, 1); it follows a rise at once. Default 0.9.
        growth: the most that a rate may grow by from one look to the next, > 1. Default 1.5.
        max_momentum: :math:`\rho_{\max}`, in [0, 1). Default 0.9.
        first_lr: the rate until the first look, and what it may grow from. Default 0.01, with ``betas`` 0.001.
        min_lr, max_lr: bounds of the learnt rate. Default: none.
        schedule: function of the number of steps whose value multiplies the learnt rate. Default ``None``.
        tol: a look ends when the largest value is known to this share of it, as :func:`optimzoo.curvature.lanczos`
            says; ``mu`` is then coarse. Default 0.1.
        per_group: look at each parameter group's own block of the Hessian. Default ``False``.
        seed: of the random starts. Default 0.
        module, process_group: as for :class:`optimzoo.curvature.Hessian`.

    Raises:
        TypeError, ValueError: an argument out of its range, an optimizer that has neither kind of step, parameters
            that are not float32 or float64.
        RuntimeError: from ``step``, as :class:`optimzoo.curvature.Hessian`; nothing has changed then.

    Where the spectrum gives no answer (no positive eigenvalue, non-finite products, zero loss) the values stay,
    ``skipped`` counts it and the first time a warning says so.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        every: int = 400,
        iterations: int = 10,
        starts: int = 1,
        curvature: str = "hessian",
        rule: str = "spectrum",
        mu: str | float = "abs_min",
        momentum: str = "fixed",
        damping: float = 0.0,
        safety: float = 0.5,
        ema: float = 0.9,
        growth: float = 1.5,
        max_momentum: float = 0.9,
        first_lr: float | None = None,
        min_lr: float = 0.0,
        max_lr: float = math.inf,
        schedule: Callable[[int], float] | None = None,
        tol: float = 0.1,
        per_group: bool = False,
        seed: int = 0,
        module: torch.nn.Module | None = None,
        process_group: Any = None,
    ) -> None:
        for name, count in (("every", every), ("iterations", iterations), ("starts", starts)):
            check_int(name, count, 1)
        for name, value, known in (
            ("curvature", curvature, ("hessian", "ggn")),
            ("rule", rule, ("spectrum", "line")),
            ("momentum", momentum, ("learn", "fixed")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if isinstance(mu, str):
            if mu not in ("abs_min", "smallest_positive", "quantile"):
                raise ValueError(f"mu must be 'abs_min', 'smallest_positive', 'quantile' or a number, got {mu!r}")
        else:
            check_number("mu", mu, 0.0, math.inf, "finite and >= 0")
        check_number("damping", damping, 0.0, math.inf, "finite and >= 0")
        check_number("safety", safety, 0.0, math.nextafter(1.0, 2.0), "in (0, 1]", above=True)
        check_number("ema", ema, 0.0, 1.0, "in [0, 1)")
        check_number("max_momentum", max_momentum, 0.0, 1.0, "in [0, 1)")
        if first_lr is not None:
            check_number("first_lr", first_lr, 0.0, math.inf, "finite and > 0", above=True)
        check_number("min_lr", min_lr, 0.0, math.inf, "finite and >= 0")
        check_number("tol", tol, 0.0, math.inf, "finite and >= 0")
        if growth != math.inf:
            check_number("growth", growth, 1.0, math.inf, "> 1", above=True)
        if max_lr != math.inf:
            check_number("max_lr", max_lr, min_lr, math.inf, f"> 0 and at least min_lr, {min_lr!r}", above=min_lr == 0)
        if schedule is not None and not callable(schedule):
            raise TypeError(f"schedule must be a function of the number of steps or None, got {schedule!r}")
        check_flags({"per_group": per_group}, "per_group")
        check_int("seed", seed, 0, 2**62 - 1)
        if module is not None and not isinstance(module, torch.nn.Module):
            raise TypeError(f"module must be a torch.nn.Module or None, got {module!r}")
        if process_group is not None and not (
            torch.distributed.is_available() and isinstance(process_group, torch.distributed.ProcessGroup)
        ):
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {process_group!r}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
        for index, group in enumerate(optimizer.param_groups):
            _check_group(optimizer, index, group)
        check_params([param for own in _trained(optimizer) for param in own])
        self.every, self.iterations, self.starts, self.curvature = every, iterations, starts, curvature
        self.rule, self.mu, self.momentum, self.damping, self.safety = rule, mu, momentum, damping, safety
        self.ema, self.growth, self.max_momentum = ema, growth, max_momentum
        self.min_lr, self.max_lr, self.schedule, self.tol = min_lr, max_lr, schedule, tol
        self.per_group, self.seed, self.module, self.process_group = per_group, seed, module, process_group
        self.last_spectrum: list[Spectrum] = []  # of the last look: one, or one for each group
        self.due, self.looks, self.skipped = 0, 0, 0  # skipped: looks that gave no answer
        self.settled = False  # whether the rate has grown to where the curvature wants it
        groups = optimizer.param_groups
        self.largest: list[float | None] = [None] * len(groups)  # L, smoothed; without per_group the first is for all
        first = [first_lr or (0.001 if "betas" in group else 0.01) for group in groups]
        self.learnt = [min(max(lr, min_lr), max_lr) for lr in first]  # rates before multiplier and schedule
        self.multipliers = [float(group["lr"]) for group in groups]
        self.written: list[float | None] = [None] * len(groups)
        self._factor(0)  # raises before anything is written
        super().__init__(optimizer)  # writes the first rates

    # Steps

    def step(self, closure: Closure | Sequence[Closure] | None = None) -> None:  # type: ignore[override]  # no epoch
        """Count a step, and look at the curvature if it is due and there is a closure.

        Args:
            closure: returns the loss of the batch with its graph, not scaled, and does not call ``backward``; or a
                list of such functions, for micro-batches. It is called when a look is due: at once, and then every
                ``every`` steps; for a method with ``betas``, after its first step.
        """
        if len(self.optimizer.param_groups) != len(self.learnt):
            raise RuntimeError(
                "parameter groups were added after LanczosLR was made: set each group's lr to what is to multiply the "
                "learnt rate, as 1 (it holds the learnt rate now), and make another one"
            )
        factor = self._factor(self.last_epoch + 1)
        if closure is not None and self.last_epoch >= self.due and self._ready():
            before = self.learnt
            answered = self._look(closure)
            pairs = list(zip(before, self.learnt, strict=True))
            rises, falls = (any(b >= self.growth * a for a, b in side) for side in (pairs, [(b, a) for a, b in pairs]))
            # Later rises wait: where the training loss vanishes so does the curvature, and there is no hurry to follow.
            self.settled = self.settled or (answered and not rises)
            soon = falls or not self.settled
            self.due = self.last_epoch + (max(1, self.every // 20) if soon else self.every)
        self.last_epoch += 1
        self._write(factor)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of the groups."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def _factor(self, step: int) -> float:
        value = 1.0 if self.schedule is None else float(self.schedule(step))
        if not 0 <= value < math.inf:
            raise ValueError(f"schedule must return a finite number >= 0, got {value!r} at step {step}")
        return value

    def _write(self, factor: float) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            last = self.written[i]
            if last:  # another scheduler may have multiplied it
                self.multipliers[i] *= float(group["lr"]) / last
            self.written[i] = _set_lr(group, self.multipliers[i] * self.learnt[i] * factor)
        self._last_lr = self.get_lr()

    def _ready(self) -> bool:
        """Whether there is a second moment to precondition with, if the method has one."""
        groups = zip(self.optimizer.param_groups, _trained(self.optimizer), strict=True)
        return all(any(self.optimizer.state.get(p) for p in own) for group, own in groups if "betas" in group and own)

    def _look(self, closure: Closure | Sequence[Closure]) -> bool:
        """Whether the curvature gave a rate to any group."""
        for index, group in enumerate(self.optimizer.param_groups):
            _check_group(self.optimizer, index, group)
        count = len(self.optimizer.param_groups)
        blocks = [[i] for i in range(count)] if self.per_group else [list(range(count))]
        blocks = [block for block in blocks if any(_trained(self.optimizer)[i] for i in block)]
        # All before any is written: a closure that raises leaves everything as it was.
        with gradients_kept([param for own in _trained(self.optimizer) for param in own]):
            answers = [self._answer(closure, block) for block in blocks]
        self.learnt = list(self.learnt)
        self.looks += 1
        self.last_spectrum = [spectrum for spectrum, _ in answers]
        for block, (_, extremes) in zip(blocks, answers, strict=True):
            if extremes is None:
                if not self.skipped:
                    warn(
                        "the curvature gives no learning rate (no positive eigenvalue, a product that is not finite or "
                        "a loss of zero): the last one is kept; `skipped` counts how often"
                    )
                self.skipped += 1
                continue
            largest, smallest = extremes
            last = self.largest[block[0]]
            if last is not None and largest < last and self.rule != "line":
                largest = math.exp(self.ema * math.log(last) + (1 - self.ema) * math.log(largest))
            self.largest[block[0]] = largest
            for i in block:
                self._learn(i, largest, min(smallest, largest))
        return any(extremes is not None for _, extremes in answers)

    def _answer(
        self, closure: Closure | Sequence[Closure], block: list[int]
    ) -> tuple[Spectrum, tuple[float, float] | None]:
        """The Ritz values, and the extremes that a step is made from, if there are any."""
        groups = [self.optimizer.param_groups[i] for i in block]
        owned = [_trained(self.optimizer)[i] for i in block]
        params = [param for own in owned for param in own]
        kind = GGN if self.curvature == "ggn" else Hessian
        plain = kind(closure, params, module=self.module, process_group=self.process_group)
        scale: list[Tensor] = []
        shift: list[Tensor] = []
        pull: list[Tensor] = []  # the gradient of coupled decay
        for group, own in zip(groups, owned, strict=True):
            decay = 0.0 if group.get("decoupled_weight_decay", False) else group.get("weight_decay", 0.0)
            for param in own:
                shift.append(plain.gradient.new_full((param.numel(),), self.damping + decay))
                pull.append(decay * param.detach().reshape(-1))
                scale.append(self._scale(group, param).reshape(-1) if "betas" in group else torch.ones_like(shift[-1]))
        diagonal = torch.cat(scale)
        sign = -1.0 if groups[0].get("maximize", False) else 1.0
        operator = Preconditioned(plain, diagonal, torch.cat(shift), sign)
        if self.rule == "line":
            direction = diagonal * (sign * plain.gradient + torch.cat(pull))
            direction = direction / direction.norm()
            slope = (direction @ (operator @ direction)).double().cpu().reshape(1)
            spectrum = Spectrum(slope, torch.ones_like(slope), torch.zeros_like(slope), operator.shape[0])
        else:
            seed = self.seed + self.looks * self.starts
            spectrum = quadrature(operator, self.iterations, self.starts, seed=seed, tol=self.tol)
        values = spectrum.values
        largest = float(values[0] + spectrum.errors[0])
        loss = float(plain.loss)
        if loss == 0 or not math.isfinite(loss) or not math.isfinite(largest) or values[0] <= 0:
            return spectrum, None
        return spectrum, (largest, self._smallest(spectrum, torch.finfo(operator.dtype).eps))

    def _smallest(self, spectrum: Spectrum, eps: float) -> float:
        values = spectrum.values
        if not isinstance(self.mu, str):
            return float(self.mu)
        if self.mu == "abs_min":
            return abs(float(values[-1]))
        if self.mu == "smallest_positive":
            return float(values[values > 16 * eps * values[0]][-1])
        return max(0.0, float(values.flip(0)[(spectrum.weights.flip(0).cumsum(0) >= _QUANTILE).nonzero()[0, 0]]))

    def _scale(self, group: Group, param: Tensor) -> Tensor:
        r""":math:`D^{-1/2}`; zero for a parameter that has not moved."""
        state = self.optimizer.state.get(param)
        if not state:
            return torch.zeros_like(param)
        name = next((name for name in _SECOND_MOMENTS if name in state), None)
        if name is None:
            raise ValueError(
                f"optimizer must keep the second moment of the gradient ({', '.join(_SECOND_MOMENTS)}); "
                f"{type(self.optimizer).__name__} keeps {', '.join(sorted(state))}"
            )
        correction = 1 - float(group["betas"][1]) ** float(state["step"])
        root: Tensor = (state[name].detach().to(param.dtype) / correction).sqrt() + group["eps"]
        return root.rsqrt()

    def _learn(self, index: int, largest: float, smallest: float) -> None:
        """Sets a group's momentum, if that is learnt, and the rate that :meth:`_write` writes."""
        group = self.optimizer.param_groups[index]
        adaptive, nesterov = "betas" in group, bool(group.get("nesterov", False))
        momentum = float(group["betas"][0] if adaptive else group["momentum"])
        if self.rule == "line":
            self.learnt[index] = min(max(1 / largest, self.min_lr), self.max_lr)
            return
        if self.momentum == "learn":
            lr, momentum = heavy_ball(largest, smallest, nesterov=nesterov, max_momentum=self.max_momentum)
            _set_momentum(group, momentum)
        elif momentum == 0:
            lr = 2 / (largest + smallest)
        else:
            lr = stability_bound(largest, momentum, nesterov=nesterov)
        # Without momentum SGD does not dampen.
        lr *= self.safety / (1 - (momentum if adaptive or momentum == 0 else float(group["dampening"])))
        self.learnt[index] = min(max(min(lr, self.growth * self.learnt[index]), self.min_lr), self.max_lr)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on bit for bit beside the optimizer's state; settings are the constructor's."""
        groups = self.optimizer.param_groups
        state = {name: getattr(self, name) for name in _SAVED}
        state = {name: list(value) if isinstance(value, list) else value for name, value in state.items()}
        momenta = [float(group["betas"][0] if "betas" in group else group["momentum"]) for group in groups]
        return {**state, "lrs": [float(group["lr"]) for group in groups], "momenta": momenta}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; the groups' learning rates and momenta are set as well.

        Raises:
            ValueError: if it is not the state of a LanczosLR over as many groups; nothing has changed then.
        """
        groups = self.optimizer.param_groups
        wanted = {*_SAVED, "lrs", "momenta"}
        if set(state_dict) != wanted:
            raise ValueError(f"state_dict must have the keys {sorted(wanted)}, got {sorted(state_dict)}")
        for name in wanted:
            _check_saved(name, state_dict[name], len(groups))
        for name in _SAVED:
            value = state_dict[name]
            setattr(self, name, list(value) if isinstance(value, list) else value)
        for group, lr, momentum in zip(groups, state_dict["lrs"], state_dict["momenta"], strict=True):
            _set_lr(group, lr)
            _set_momentum(group, momentum)
        self._last_lr = self.get_lr()


def _check_saved(name: str, value: Any, groups: int) -> None:
    """Raise unless a saved value is of its kind."""
    if name == "settled":
        good, allowed = isinstance(value, bool), "True or False"
    elif name in ("last_epoch", "due", "looks", "skipped", "seed"):
        good, allowed = isinstance(value, int) and not isinstance(value, bool) and value >= 0, "a whole number >= 0"
    else:
        if not isinstance(value, list):
            raise ValueError(f"{name} in state_dict must be a list, got {value!r}")
        if len(value) != groups:
            raise ValueError(f"state_dict must be of {groups} parameter groups, got {len(value)} in {name}")
        high = 1.0 if name == "momenta" else math.inf
        optional = name in ("largest", "written")
        good = all(
            optional if each is None else isinstance(each, int | float | Tensor) and 0 <= float(each) < high
            for each in value
        )
        allowed = "numbers in [0, 1)" if name == "momenta" else "finite numbers >= 0"
    if not good:
        raise ValueError(f"{name} in state_dict must be {allowed}, got {value!r}")


def _trained(optimizer: Optimizer) -> list[list[Tensor]]:
    return [[param for param in group["params"] if param.requires_grad] for group in optimizer.param_groups]


def _set_lr(group: Group, lr: float) -> float:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
    return float(group["lr"])


def _set_momentum(group: Group, momentum: float) -> None:
    if "betas" in group:
        first, *rest = group["betas"]
        group["betas"] = (first.fill_(momentum) if isinstance(first, Tensor) else momentum, *rest)
    else:
        group["momentum"] = momentum


def _check_group(optimizer: Optimizer, index: int, group: Group) -> None:
    name = f"{type(optimizer).__name__}'s group {index}"
    if "betas" not in group and not ("momentum" in group and "dampening" in group):
        raise ValueError(
            f"optimizer must have momentum and dampening, as SGD, or betas and a second moment, as Adam; {name} has "
            f"{', '.join(sorted(set(group) - {'params'}))}"
        )
    if group.get("dale"):
        raise ValueError(f"optimizer must add its steps: {name} multiplies (dale=True)")
    if "momentum_decay" in group:
        raise ValueError(f"optimizer must step along its average alone: {name} adds Nesterov's step, as NAdam does")
    if "betas" not in group and not 0 <= float(group["dampening"]) < 1:
        raise ValueError(f"dampening must be in [0, 1), got {group['dampening']!r} in {name}")
    if "betas" not in group:
        check_number(f"momentum in {name}", float(group["momentum"]), 0.0, 1.0, "in [0, 1)")
    if group.get("maximize", False) != optimizer.param_groups[0].get("maximize", False):
        raise ValueError(f"maximize must be the same in all groups, got {group.get('maximize')!r} in {name}")
