"""Dale's law in training: multiplicative updates, which never change the sign of a weight."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.optimizer import (
    Batch,
    Elementwise,
    Group,
    Rule,
    check_flags,
    check_number,
    local,
    shard_number,
    warn,
    whole,
)
from optimzoo.tensorlist import Scalar, at_least, finite, sqrt, where

_ZEROS = ("error", "warn", "floor")
_NOISES = ("gbm", "mirrored", "hessian")


class _Dale(Elementwise):
    """What the multiplicative optimizers share: groups that keep signs and groups that do not, bounds, checks."""

    sparse = False
    how = ("zeros", "check_signs")
    _is_built = False

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        exponent_clip: float | None = None,
        min_abs: float | None = None,
        max_abs: float | None = None,
        dale: bool = True,
        zeros: str = "error",
        check_signs: bool | str = True,
        rounding: str = "master",
        **impl: Any,
    ) -> None:
        bounds = dict(exponent_clip=exponent_clip, min_abs=min_abs, max_abs=max_abs)
        signs = dict(dale=dale, zeros=zeros, check_signs=check_signs, rounding=rounding)
        self._seen: list[int] = []  # versions of the parameters whose signs are known to be right
        super().__init__(params, {**defaults, **bounds, **signs}, **impl)
        for group in self.param_groups:  # not before all groups are known to be right
            self._floor_zeros(group)
        self._is_built = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen, self._is_built = [], True

    # Groups

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if not (isinstance(group["dale"], bool) or group["dale"] == "columns"):
            raise ValueError(f"dale must be True, False or 'columns', got {group['dale']!r}")
        for name in ("exponent_clip", "min_abs", "max_abs"):
            if group[name] is not None:
                check_number(name, group[name], 0.0, math.inf, "> 0, or None", above=True)
        dtypes = {param.dtype for param in group["params"] if not param.is_complex()}
        for dtype in dtypes if group["dale"] else ():
            low, high = _smallest(dtype), torch.finfo(dtype).max
            for name in ("min_abs", "max_abs"):
                if group[name] is not None and not low <= group[name] <= high:
                    raise ValueError(f"{name} must be from {low} to {high}, which {dtype} holds, got {group[name]!r}")
        if torch.float16 in dtypes and len(dtypes) > 1 and group["dale"]:
            raise ValueError("float16 parameters have bounds of their own: put them into a group without other dtypes")
        if self.settings(group)["min_abs"] > self.settings(group)["max_abs"]:
            raise ValueError(f"min_abs must be <= max_abs, got {group['min_abs']!r} and {group['max_abs']!r}")
        self._check_decay(group)
        if group["zeros"] not in _ZEROS:
            raise ValueError(f"zeros must be one of {_ZEROS}, got {group['zeros']!r}")
        if group["zeros"] == "floor" and group["min_abs"] is None:
            raise ValueError("zeros='floor' needs min_abs, the size that zeros are given")
        if not (isinstance(group["check_signs"], bool) or group["check_signs"] == "restore"):
            raise ValueError(f"check_signs must be True, False or 'restore', got {group['check_signs']!r}")
        for index, param in enumerate(group["params"] if group["dale"] else ()):
            if param.is_complex():
                raise ValueError(f"params[{index}] is complex and has no sign; put it into a group with dale=False")

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not group["dale"]:
            return
        try:
            self._check_columns(group)
            self._check_zeros(group, len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        if self._is_built:
            self._floor_zeros(group)

    def _check_columns(self, group: Group) -> None:
        for index, param in enumerate(group["params"] if group["dale"] == "columns" else ()):
            if param.dim() < 2:
                raise ValueError(f"dale='columns' is for matrices; params[{index}] has shape {tuple(param.shape)}")
            if param.is_meta:
                continue
            rows = param.detach().transpose(0, 1).flatten(1)
            mixed = whole((rows > 0).any(1) & (rows < 0).any(1)).nonzero().flatten().tolist()
            if mixed:
                raise ValueError(
                    f"dale='columns' needs one sign in each column; {len(mixed)} of params[{index}] mix signs, the "
                    f"first is [:, {mixed[0]}]; optimzoo.dale_columns_ initializes them"
                )

    def _check_zeros(self, group: Group, number: int) -> None:
        for index, param in enumerate(group["params"]):
            count = 0 if param.is_meta else int(whole((param.detach() == 0).sum()))
            if count == 0 or group["zeros"] == "floor":
                continue
            message = (
                f"params[{index}] of group {number}, of shape {tuple(param.shape)}, holds {count} zeros, which a "
                "multiplicative step never moves"
            )
            if group["zeros"] == "error":
                raise ValueError(
                    f"{message}; put it into a group with dale=False (optimzoo.dale_groups does so for vectors), "
                    "initialize it (optimzoo.lognormal_), or pass zeros='warn' or 'floor'"
                )
            warn(message)

    @torch.no_grad()
    def _floor_zeros(self, group: Group) -> None:
        """Give zeros the size ``min_abs``, with random signs, or those of their columns where that is asked for."""
        for param in group["params"] if group["dale"] and group["zeros"] == "floor" else ():
            signs = torch.randint_like(param, 2) * 2 - 1
            if group["dale"] == "columns":
                others = [dim for dim in range(param.dim()) if dim != 1]
                signs = torch.where(param.sum(others, keepdim=True) < 0, -1, 1)
            param.copy_(torch.where(param == 0, group["min_abs"] * signs, param))

    def settings(self, group: Group) -> Group:
        """The bounds as numbers: without others, what the dtypes of the parameters and of the arithmetic can hold."""
        dtypes = {param.dtype for param in group["params"]} or {torch.float32}
        smallest = max(map(_smallest, dtypes))
        clip = 708.0 if dtypes == {torch.float64} else 87.0  # beyond it an exponential is not a normal number
        largest = min(torch.finfo(dtype).max for dtype in dtypes)
        return {
            **group,
            "dale": bool(group["dale"]),
            "exponent_clip": clip if group["exponent_clip"] is None else min(clip, group["exponent_clip"]),
            "min_abs": smallest if group["min_abs"] is None else group["min_abs"],
            "max_abs": largest if group["max_abs"] is None else group["max_abs"],
        }

    def pull(self, group: Group, param: Any) -> Any:
        """In a Dale group the sign: weight decay then shrinks every weight by the same factor."""
        return param.sign() if group["dale"] else param

    # Signs

    def _first(self, group: Group, name: str, param: Tensor) -> Tensor:
        if name == "sign" and group["zeros"] == "error" and not torch.compiler.is_compiling():
            numbers = [i for i, other in enumerate(self.param_groups) if other["params"] is group["params"]]
            self._check_zeros({**group, "params": [param]}, *numbers)
        return super()._first(group, name, param)

    def _kept(self, group: Group, param: Tensor) -> list[str]:
        return super()._kept(group, param) + ["sign"] * bool(group["dale"] and group["check_signs"])

    def init(self, name: str, param: Tensor) -> Tensor:
        """The first value of a state tensor: the parameter's sign, or zeros like the parameter."""
        return param.detach().sign().to(torch.int8) if name == "sign" else super().init(name, param)

    def check_signs(self) -> None:
        """Compare the signs of all weights with those at the first step.

        Every step outside ``torch.compile`` does so if somebody else has written to the parameters since the last one,
        as far as autograd's version counters tell; ``param.data`` has none.

        Raises:
            RuntimeError: signs have changed; with ``check_signs="restore"`` they are put back instead, unless weights
                have become zero.
        """
        self._restore_signs(self._changed_signs())

    @torch.no_grad()
    def _restore_signs(self, changed: list[tuple[Tensor, Tensor]]) -> None:
        for param, sign in changed:
            param.copy_(sign * param.abs())

    def _changed_signs(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters whose signs are to be restored, with them; raises about the others."""
        changed = []
        for group in self.param_groups:
            for param in group["params"]:
                sign = self.state.get(param, {}).get("sign")
                if sign is None or "sign" not in self._kept(group, param):
                    continue
                if not isinstance(sign, Tensor) or sign.shape != param.shape or sign.device != param.device:
                    raise RuntimeError(f"sign of a parameter of shape {tuple(param.shape)} is not its sign: {sign!r}")
                now = param.detach().sign()
                count, dead = (int(whole(flags.sum())) for flags in (now != sign, (now == 0) & (sign != 0)))
                if dead or (count and group["check_signs"] != "restore"):
                    raise RuntimeError(
                        f"{count} signs of a parameter of shape {tuple(param.shape)} are not those of its first step, "
                        f"and {dead} weights are zero: something else than this optimizer has written to it; "
                        "check_signs='restore' puts signs back"
                    )
                if count:
                    changed.append((param, sign))
        return changed

    def _versions(self) -> list[int]:
        groups = [group for group in self.param_groups if group["dale"] and group["check_signs"]]
        return [param._version for group in groups for param in group["params"]]

    def _checked_calls(self) -> list[tuple[Group, str, Batch]]:
        for group in self.param_groups:
            self._check_decay(group)
        changed = self._changed_signs() if self._versions() != self._seen else []
        calls = super()._checked_calls()
        self._restore_signs(changed)  # last, for a step that fails changes nothing
        return calls

    def _check_decay(self, group: Group) -> None:
        """Raise if the decay would reach zero; at every step, for a scheduler may have changed ``lr``."""
        lr, decay = group["lr"], group["weight_decay"]
        if not (group["dale"] and group["decoupled_weight_decay"] and decay != 0):
            return
        if group.get("fixed_decay"):
            lr = 1
        if isinstance(lr, int | float | Tensor) and not torch.as_tensor(lr * decay < 1).all():
            raise ValueError(f"lr * weight_decay must be < 1, got {lr!r} * {decay!r}: it would change every sign")

    def _finish(self) -> None:
        if not torch.compiler.is_compiling():
            self._seen = self._versions()


def _smallest(dtype: torch.dtype) -> float:
    """The smallest size that a parameter can have; float16 has no bits to spare and needs those below the normal."""
    return 2.0**-24 if dtype is torch.float16 else torch.finfo(dtype).tiny


def _move(param: Any, move: Any, dale: bool, exponent_clip: float, min_abs: float, max_abs: float) -> None:
    """Multiply by the exponential of what a plain rule would add, times the sign; or add it."""
    if not dale:
        param += move
        return
    old = param * 1.0  # autograd may have to see it again
    direction = old.sign()
    exponent = direction * move
    size = old.abs() * exponent.clamp_min(-exponent_clip).clamp_max(exponent_clip).exp()
    moved = direction * size.clamp_min(min_abs).clamp_max(max_abs)
    param.copy_(where(finite(exponent), moved, old))


def _steps(move: Any, dale: bool) -> tuple[Any, Any]:
    """Which coordinates take part in the step, and ``move`` with NaN for those that do not; all do in plain groups."""
    if not dale:
        return True, move
    steps = finite(move)  # which it is not where the gradient is not
    return steps, where(steps, move, math.nan)


class DaleSGD(_Dale):
    r"""Exponentiated gradient: gradient descent on the logarithms of the weights, which keep their signs.

    .. math::
        w_t = w_{t-1} \exp(-\gamma\, \mathrm{sign}(w_{t-1})\, d_t)

    where :math:`d_t` is the gradient, with ``weight_decay`` plus :math:`\lambda\,\mathrm{sign}(w)`, or with momentum
    :math:`\mu` what ``torch.optim.SGD`` makes of it. To first order a weight changes by :math:`-\gamma |w| d`, so that
    large weights learn fast and small ones fade: the weights become log-normal. It is mirror descent with the negative
    entropy :math:`\sum |w| \log |w| - |w|`.

    Args:
        params: tensors of any shape, or parameter groups: :func:`dale_groups` makes them for a model.
        lr: :math:`\gamma \ge 0`, relative change of a weight per unit of gradient; about ten times that of ``SGD`` is
            a good start. A float or a tensor of one element. Default 0.1.
        momentum: :math:`\mu \in [0, 1)`, in units of the gradient. Default 0.
        dampening: what the gradient's weight in the momentum lacks of one, from the second step on. Default 0.
        nesterov: look ahead by the momentum; needs momentum and no dampening. Default ``False``.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        decoupled_weight_decay: if true, multiply the weights by :math:`1 - \gamma\lambda` first instead.
            Default ``False``.
        exponent_clip: bound on the size of the exponent. A momentum of 0.9 at lr 1 diverges without; with 1 its numbers
            stay finite, with 0.03 it learns. Default ``None``: what an exponential can hold.
        min_abs: smallest size of a weight, > 0. Default ``None``: the smallest number of its dtype, because a weight
            that is zero stays there.
        max_abs: largest size of a weight. Default ``None``: the largest number of its dtype.
        dale: false for a group, of biases and scales usually, to which ``torch.optim.SGD``'s steps are added as they
            are; ``"columns"`` demands in addition that the weights which leave a neuron (``[:, j]``) share a sign.
            Default ``True``.
        zeros: what to do about weights that are zero when their group is added: ``"error"``; ``"warn"``, and leave them
            where they are for ever; or ``"floor"``, make them ``min_abs`` with signs from torch's random generator.
            Default ``"error"``.
        check_signs: remember the signs of the first step (one byte a weight, in the state) and compare before a step
            when somebody else has written to a parameter: ``True`` raises where they differ, ``"restore"`` puts them
            back, ``False`` does not look. Default ``True``.
        rounding: as in :class:`~optimzoo.optimizer.Elementwise`, but with ``"master"`` for a default: 16-bit weights
            would not see factors within 0.4 % of one.
        **impl: ``maximize``, ``foreach``, ``fused``, ``capturable``, ``differentiable``, ``max_grad_norm``,
            ``state_dtype``, ``seed``: see :class:`~optimzoo.optimizer.Elementwise`.

    Raises:
        ValueError: a hyper-parameter is out of range, a Dale group holds zeros or complex parameters.
        RuntimeError: from ``step``, signs that have changed, or a sparse gradient.

    A coordinate whose gradient or exponent is not finite is left out of the step, with its momentum; decoupled decay
    acts on it all the same. Method: Cornford
    et al., "Brain-like learning with exponentiated gradients", 2024; Kivinen and Warmuth, 1997.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 0.1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **impl: Any,
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, defaults, **impl)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        check_flags(group, "nesterov")
        check_number("dampening", group["dampening"], 0.0, 1.0, "in [0, 1)")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError("nesterov=True needs momentum > 0 and dampening = 0")

    def rule(self, group: Group) -> Rule:
        return _MOMENTUM if group["momentum"] != 0 else super().rule(group)

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        *,
        lr: float,
        dale: bool,
        exponent_clip: float,
        min_abs: float,
        max_abs: float,
        step: float,
    ) -> None:
        _move(param, -lr * grad, dale, exponent_clip, min_abs, max_abs)


def _update_momentum(
    param: Any,
    grad: Any,
    momentum_buffer: Any,
    *,
    lr: float,
    dale: bool,
    exponent_clip: float,
    min_abs: float,
    max_abs: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    step: Any,
) -> None:
    weight = 1 - dampening * (1 - at_least(2 - step, 0.0))  # the first gradient is not dampened
    average = momentum * momentum_buffer + weight * grad
    move = -lr * (grad + momentum * average if nesterov else average)
    steps, move = _steps(move, dale)
    momentum_buffer.copy_(where(steps, average, momentum_buffer))
    _move(param, move, dale, exponent_clip, min_abs, max_abs)


_MOMENTUM = Rule("dalesgd_momentum", _update_momentum)


class DaleAdamW(_Dale):
    r"""AdamW's step in the exponent: weights are multiplied, and keep their signs.

    .. math::
        w_t = w_{t-1} (1 - \gamma\lambda) \exp\left(-\gamma\, \mathrm{sign}(w_{t-1})\,
            \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}\right)

    with Adam's averages :math:`m_t` of the gradient and :math:`v_t` of its square.

    Args:
        params: tensors of any shape, or parameter groups: :func:`dale_groups` makes them for a model.
        lr: :math:`\gamma \ge 0`, the relative change of a weight in a step at most, about; a float or a tensor of one
            element. Default 1e-3.
        betas: weights of the past in the two averages, in [0, 1). Default (0.9, 0.999).
        eps: added to the root after its bias correction, >= 0, in units of the gradient. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`; :math:`\gamma\lambda < 1`. Default 1e-2.
        decoupled_weight_decay: if false, add :math:`\lambda\,\mathrm{sign}(w)` to the gradient instead (in plain
            groups :math:`\lambda w`). Default ``True``.
        **options: ``exponent_clip``, ``min_abs``, ``max_abs``, ``dale`` (plain groups get AdamW's step), ``zeros``,
            ``check_signs``, ``rounding`` and the rest: as :class:`DaleSGD`.

    Raises:
        ValueError: a hyper-parameter is out of range, a Dale group holds zeros or complex parameters.
        RuntimeError: from ``step``, signs that have changed, or a sparse gradient.

    A coordinate whose gradient or exponent is not finite is left out of the step, with its averages; decoupled decay
    acts on it all the same. Method: Cornford
    et al., "Brain-like learning with exponentiated gradients", 2024, and its authors' code.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        decoupled_weight_decay: bool = True,
        **options: Any,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=decoupled_weight_decay
        )
        super().__init__(params, defaults, **options)

    @staticmethod
    def update(
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        *,
        lr: float,
        dale: bool,
        exponent_clip: float,
        min_abs: float,
        max_abs: float,
        beta1: float,
        beta2: float,
        eps: float,
        step: float,
    ) -> None:
        average = exp_avg.lerp(grad, 1 - beta1)
        square = (beta2 * exp_avg_sq).addcmul_(grad, grad, value=1 - beta2)
        denominator = (square.sqrt() / sqrt(1 - beta2**step)).add_(eps)
        steps, move = _steps(-(average / denominator) * (lr / (1 - beta1**step)), dale)
        exp_avg.copy_(where(steps, average, exp_avg))
        exp_avg_sq.copy_(where(steps, square, exp_avg_sq))
        _move(param, move, dale, exponent_clip, min_abs, max_abs)


class DaleLangevin(_Dale):
    r"""Langevin dynamics by multiplication: samples or explores weights that keep their signs.

    With the step :math:`h` (``lr``), temperature :math:`T`, gradient :math:`g` of the energy :math:`U` and standard
    normal :math:`z`, a weight is multiplied by the exponential of

    .. math::
        \text{gbm}: &\quad -h\,\mathrm{sign}(w) g - s^2 h / 2 + s \sqrt{h}\, z \\
        \text{mirrored}: &\quad -h (w g - T) + \sqrt{2 h T}\, z \\
        \text{hessian}: &\quad -h\,\mathrm{sign}(w) g + \sqrt{2 h T / |w|}\, z

    ``"mirrored"`` and ``"hessian"`` sample :math:`\exp(-U/T)` within the weights' signs, as :math:`h \to 0`, if
    :math:`g` estimates the gradient of the total energy (not of a mean loss). ``"gbm"`` does not: its law is
    :math:`w^{-2} \exp(-(2/s^2) \int g/w\, dw)`, heavy-tailed; it is cheap exploration, with ``s`` to be annealed.

    Args:
        params: tensors of any shape, or parameter groups: :func:`dale_groups` makes them for a model.
        lr: :math:`h \ge 0`; a float or a tensor of one element. Default 1e-3.
        temperature: :math:`T \ge 0`, in units of the energy. Default 1.
        noise: which of the three. ``"mirrored"`` is slow where weights are small, the noise of ``"hessian"`` grows
            there: set ``min_abs``, which bounds :math:`|w|` in its root too. Default ``"gbm"``.
        s: strength of the ``"gbm"`` noise, >= 0. Default 1.
        ito: keep the term :math:`-s^2 h/2`, with which the mean factor of the noise is one. Without it the median is
            one, and the mean weight grows. Default ``True``.
        weight_decay: coupled, :math:`\lambda\,\mathrm{sign}(w)` added to the gradient. Default 0.
        seed: of the noise, a whole number. The noise is a function of the seed, of the parameter's place in the
            optimizer and of its step count: the same for all back-ends of a device, and after resuming. Default 0.
        **options: ``exponent_clip``, ``min_abs``, ``max_abs``, ``dale`` (plain groups get
            :math:`w - h g + \sqrt{2hT}\, z`), ``zeros``, ``check_signs``, ``rounding`` and the rest: as
            :class:`DaleSGD`.

    Raises:
        ValueError: a hyper-parameter is out of range, a Dale group holds zeros or complex parameters.
        RuntimeError: from ``step``, signs that have changed, or a sparse gradient.

    A coordinate whose gradient or exponent is not finite is left out of the step. Derived from Shetty et al., "Dale
    meets Langevin", 2025 (https://arxiv.org/abs/2510.02730), whose multiplicative sampler is for data, not weights.
    """

    drawn = ("noise",)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a trace has no generator
    def step(self, closure: Any = None) -> Any:
        """As :meth:`optimzoo.optimizer.Tensorwise.step`; ``torch.compile`` leaves it as it is."""
        return super().step(closure)

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1e-3,
        temperature: float = 1.0,
        noise: str = "gbm",
        *,
        s: float = 1.0,
        ito: bool = True,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **options: Any,
    ) -> None:
        defaults = dict(
            lr=lr,
            temperature=temperature,
            noise=noise,
            s=s,
            ito=ito,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, defaults, **options)

    def check_group(self, group: Group) -> None:
        if group["noise"] not in _NOISES:
            raise ValueError(f"noise must be one of {_NOISES}, got {group['noise']!r}")
        super().check_group(group)
        if any(param.is_complex() for param in group["params"]):
            raise ValueError("params of DaleLangevin must be real, in groups with dale=False too")
        check_flags(group, "ito")
        for name in ("temperature", "s"):
            check_number(name, group[name], 0.0, math.inf, "finite and >= 0")
        if group["capturable"]:
            raise ValueError("capturable must be False: the noise of a step is drawn by the host")

    def settings(self, group: Group) -> Group:
        return {**super().settings(group), "kind": _NOISES.index(group["noise"])}

    def init(self, name: str, param: Tensor) -> Tensor:
        """The first value of a state tensor: room for the noise, or what all Dale classes have."""
        if name == "noise":
            return torch.empty_like(param, dtype=torch.float64 if param.dtype is torch.float64 else torch.float32)
        return super().init(name, param)

    def _prepare(self, calls: list[tuple[Group, str, Batch]]) -> Tensor | None:
        places = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for group, _, batch in calls:
            for i, (param, step) in enumerate(zip(batch.params, batch.steps, strict=True)):
                room = local(batch.states[0][i])
                noise = standard_normal(room, group["seed"], places[param], int(step), shard_number(param))
                if room is batch.states[0][i] and noise.stride() == room.stride():
                    batch.states[0][i] = noise
                else:
                    room.copy_(noise)
        return super()._prepare(calls)

    @staticmethod
    def update(
        param: Any,
        grad: Any,
        noise: Any,
        *,
        lr: float,
        dale: bool,
        exponent_clip: float,
        min_abs: float,
        max_abs: float,
        temperature: float,
        s: float,
        ito: bool,
        kind: int,
        step: float,
    ) -> None:
        if not dale:
            move = -lr * grad + sqrt(2 * temperature) * sqrt(lr) * noise
        elif kind == 0:
            drift = -lr * (s * s / 2 if ito else 0.0)
            move = -lr * grad + param.sign() * (s * sqrt(lr) * noise + drift)
        elif kind == 1:
            old = param * 1.0
            move = -lr * old.abs() * grad + old.sign() * (sqrt(2 * temperature) * sqrt(lr) * noise + lr * temperature)
        else:
            old = param * 1.0
            spread = sqrt(2 * temperature) * sqrt(lr) / old.abs().clamp_min(min_abs).sqrt()
            move = -lr * grad + old.sign() * spread * noise
        _move(param, _steps(move, dale)[1], dale, exponent_clip, min_abs, max_abs)


def standard_normal(like: Tensor, seed: int, place: int, step: int, shard: int = 0) -> Tensor:
    """The noise of a step of :class:`DaleLangevin`: independent standard normal numbers.

    Args:
        like: the parameter; shape, dtype (float32 for 16-bit ones) and device are taken from it.
        seed: the group's.
        place: of the parameter among all of the optimizer's.
        step: how many steps the parameter has made before.
        shard: which part of a sharded parameter this is.
    """
    words = f"{seed} {place} {step} {shard}".encode()
    generator = torch.Generator(like.device).manual_seed(
        int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little", signed=True)
    )
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return torch.randn(like.shape, generator=generator, dtype=dtype, device=like.device)


# Models


def dale_groups(model: torch.nn.Module, **plain: Any) -> list[Group]:
    """The parameters of a model in two groups: matrices and kernels keep their signs, all others do not.

    Biases start at zero, where a multiplicative step leaves them, and scales of normalisation layers have no sign to
    keep: they and all vectors go into a group with ``dale=False``.

    Args:
        model: its parameters that require gradients are taken, each once.
        **plain: settings of the second group; ``lr`` is one to choose, a tenth of the first group's for
            :class:`DaleSGD`.

    Raises:
        ValueError: the model has no weight of two or more dimensions.
    """
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    for module in model.modules():
        norm = isinstance(module, torch.nn.LayerNorm | torch.nn.RMSNorm)
        for name, param in module.named_parameters(recurse=False):
            if param.requires_grad and not any(param is known for known in (*matrices, *vectors)):
                (vectors if norm or param.dim() < 2 or "bias" in name else matrices).append(param)
    if not matrices:
        raise ValueError("model has no weight of two or more dimensions that requires a gradient")
    groups: list[Group] = [{"params": matrices}]
    return [*groups, {"params": vectors, "dale": False, **plain}] if vectors else groups


@torch.no_grad()
def lognormal_(
    tensor: Tensor,
    gain: float = math.sqrt(2.0),
    mode: str = "fan_in",
    mean_std_ratio: float = 1.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill with log-normal sizes and random signs, mean square ``gain**2 / fan``: where multiplicative steps lead to.

    Args:
        tensor: of two or more dimensions, (out, in, ...).
        gain: square root of 2 for ReLU, the default; 1 for linear layers.
        mode: ``"fan_in"``, the default, keeps the variance of what passes forward, ``"fan_out"`` that of gradients.
        mean_std_ratio: of the sizes, > 0. Default 1.5, for which their logarithms have standard deviation 0.61.
        generator: torch's, of the tensor's device. Default ``None``, the global one.

    Returns:
        The tensor.

    Raises:
        ValueError: a tensor of fewer dimensions, without elements in a fan or not real, or an argument out of range.
    """
    fan = _fan(tensor, mode)
    check_number("gain", gain, 0.0, math.inf, "finite and > 0", above=True)
    check_number("mean_std_ratio", mean_std_ratio, 0.0, math.inf, "finite and > 0", above=True)
    std = gain / math.sqrt(fan * (1 + mean_std_ratio**2))
    mean = mean_std_ratio * std
    mu, sigma = math.log(mean**2 / math.hypot(mean, std)), math.sqrt(math.log1p((std / mean) ** 2))
    tensor.normal_(mu, sigma, generator=generator).exp_()
    return tensor.mul_(torch.randint(2, tensor.shape, generator=generator, device=tensor.device) * 2 - 1)


@torch.no_grad()
def dale_columns_(tensor: Tensor, ratio: float = 10.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill with exponential sizes and one sign per column: all weights that leave a neuron excite, or all inhibit.

    The last ``ceil(n / (ratio + 1))`` of ``n`` columns are negative, their sizes such that the mean of a row is
    zero; rectified standard normal inputs give outputs of variance one.

    Args:
        tensor: (out, in).
        ratio: of excitatory to inhibitory neurons, > 0. Default 10.
        generator: torch's, of the tensor's device. Default ``None``, the global one.

    Returns:
        The tensor.

    Raises:
        ValueError: a tensor that is not a real matrix, or with too few columns to hold both kinds.
    """
    if tensor.dim() != 2:
        raise ValueError(f"tensor must have two dimensions, (out, in), got shape {tuple(tensor.shape)}")
    _fan(tensor, "fan_in")
    check_number("ratio", ratio, 0.0, math.inf, "finite and > 0", above=True)
    columns = tensor.shape[1]
    inhibitory = math.ceil(columns / (ratio + 1))
    excitatory = columns - inhibitory
    if excitatory < 1:
        raise ValueError(f"{columns} columns at ratio {ratio} leave none that excite")
    variance = (2 * math.pi - 1) / (2 * math.pi)
    size = 1 / math.sqrt(variance * (excitatory + excitatory**2 / inhibitory))
    tensor.exponential_(generator=generator).clamp_min_(torch.finfo(tensor.dtype).tiny)
    tensor[:, :excitatory] *= size
    tensor[:, excitatory:] *= -size * excitatory / inhibitory
    return tensor


def _fan(tensor: Tensor, mode: str) -> int:
    if tensor.dim() < 2 or not tensor.is_floating_point() or tensor.numel() == 0:
        raise ValueError(
            f"tensor must be real, with elements, of two or more dimensions, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode must be 'fan_in' or 'fan_out', got {mode!r}")
    return tensor.numel() // tensor.shape[0 if mode == "fan_in" else 1]
