"""The two base classes: everything about an optimizer that its method does not say."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from numbers import Real
from typing import Any, ClassVar, NamedTuple, TypeAlias, cast, overload

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from optimzoo import ops
from optimzoo.rounding import random_key, round_randomly_
from optimzoo.tensorlist import Scalar, TensorList

Group: TypeAlias = dict[str, Any]

_SHARDED: tuple[type[Tensor], ...] = ()
if torch.distributed.is_available():  # some builds of torch are without
    from torch.distributed.tensor import DTensor, Partial, Replicate

    _SHARDED = (DTensor,)

# Half-precision averages stall (a bfloat16 mean of ones with beta 0.999 stops at one half), so their state is wider.
_STATE_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}
_FUSED_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
_PLAIN = {Parameter, Tensor}
_NO_MASTER = torch.empty(0, device="cpu")  # of a parameter that is not rounded, in a list with others that are

# Settings that say how a step is made and not what it is: a checkpoint does not change them.
_HOW = ("foreach", "fused", "capturable", "differentiable", "max_grad_norm", "state_dtype", "rounding")

# What other libraries call a setting in their checkpoints.
_ELSEWHERE = {
    "weight_decouple": "decoupled_weight_decay",
    "decoupled_decay": "decoupled_weight_decay",
    "ams_bound": "amsgrad",
}

# What hyper-parameters of these names may be, for every method: lower bound, upper bound, and how to say it.
_RANGES = {
    "lr": (0.0, math.inf, "finite and >= 0"),
    "eps": (0.0, math.inf, "finite and >= 0"),
    "weight_decay": (0.0, math.inf, "finite and >= 0"),
    "momentum": (0.0, 1.0, "in [0, 1)"),
    "betas": (0.0, 1.0, "in [0, 1)"),
}
_ROUNDINGS = ("nearest", "stochastic", "master")
_ONE_BOUND = "max_grad_norm bounds the gradients of all groups together; it is set for all by the constructor"


class Rule:
    """An update function and what its signature says.

    The parameters after ``param`` and ``grad`` name the state tensors, which are the keys of a checkpoint; the
    keyword-only ones other than ``lr`` and ``step`` name the hyper-parameters (``beta1`` and ``beta2`` come from
    ``betas``).

    Args:
        name: what the native op is called, ``optimzoo::fused_NAME_``, if there is one.
        update: the function; it takes tensors, or :class:`~optimzoo.tensorlist.TensorList` s, and writes to all but the
            gradient.
    """

    def __init__(self, name: str, update: Callable[..., None]) -> None:
        parameters = inspect.signature(update).parameters.values()
        self.name = name
        self.update = update
        self.states = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
        self.hyper = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("lr", "step")]
        # A class of the user's that happens to share a name with one of ours must not get our op.
        self.fused = ops.fused(name) if (update.__module__ or "").startswith("optimzoo.") else None

    def hyper_values(self, group: Group) -> dict[str, Any]:
        """The hyper-parameters of a group's settings by the names that the update function has for them."""
        values = {**group, **{f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), start=1)}}
        return {name: values[name] for name in self.hyper}


class Batch(NamedTuple):
    """What one call of a back-end updates: a parameter, its gradient, step count and states share an index."""

    params: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    states: list[list[Tensor]]  # one list per state name
    master: list[Tensor]  # what 16-bit parameters were before they were rounded; empty where that is not kept

    def pick(self, indices: list[int]) -> Batch:
        """The batch of these indices."""
        if len(indices) == len(self.params):
            return self
        steps = [self.steps[i] for i in indices]
        return self._replace(steps=steps)._with(lambda column: [column[i] for i in indices])

    def map(self, view: Callable[[Tensor], Tensor]) -> Batch:
        """The same with every tensor but the steps seen through ``view``."""
        return self._with(lambda column: [view(tensor) if tensor is not _NO_MASTER else tensor for tensor in column])

    def _with(self, change: Callable[[list[Tensor]], list[Tensor]]) -> Batch:
        params, grads, *states = map(change, (self.params, self.grads, *self.states))
        return Batch(params, grads, self.steps, states, change(self.master) if self.master else [])


class Tensorwise(Optimizer):
    """Base of methods that look at one whole parameter at a time: groups, closure, state, decay, sign.

    A subclass passes its hyper-parameters to ``__init__`` and defines a static method
    ``update(param, grad, *states, *, lr, ..., step)`` that writes the new parameter and states in place; :class:`Rule`
    says how it is read. Weight decay, ``maximize`` and loss scales are applied before it.

    Args:
        params: tensors or parameter groups, as for any ``torch.optim.Optimizer``.
        defaults: the hyper-parameters of a group that does not name its own. ``weight_decay`` (0) and
            ``decoupled_weight_decay`` (``True``) are added where they are missing.
        maximize: ascend instead of descend. Default ``False``.
        capturable: keep the step count on the parameter's device and never read it, so that a CUDA graph can hold the
            step. Default ``False``.
        differentiable: let autograd see the step. Default ``False``.
        max_grad_norm: scale the gradients so that the 2-norm of all of them together is at most this, as
            ``torch.nn.utils.clip_grad_norm_`` does, but within the step: gradients are read once more and not
            written. Under a GradScaler the norm is that of the unscaled gradients. Default ``None``, no bound.

    Raises:
        TypeError: a hyper-parameter is not a number, or there is none of its name.
        ValueError: no parameters, parameters that are not leaves or not floating, a hyper-parameter out of range.
        RuntimeError: from ``step``, if a gradient or state does not fit its parameter; nothing has changed then.

    State and parameters are as they were after a step that raised because of its input. Gradients are never written to.
    Steps are counted per parameter: one that joins late starts at one. The state of 16-bit parameters is float32 unless
    ``state_dtype`` says otherwise. Non-finite gradients make parameters and state non-finite, as in ``torch.optim``,
    where a class does not say otherwise; under ``torch.amp.GradScaler`` the step is skipped instead.
    """

    sparse: ClassVar[bool] = True
    """Whether sparse gradients are taken, row by row as in ``torch.optim.SparseAdam``."""

    how: ClassVar[tuple[str, ...]] = ()
    """Names of settings of the class's own that a checkpoint does not change."""

    drawn: ClassVar[tuple[str, ...]] = ()
    """Those of the rule's states that are made for one step and not kept; :meth:`_prepare` fills them."""

    _rule: ClassVar[Rule]
    update: ClassVar[Callable[..., None]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in cls.__dict__:
            cls._rule = Rule(cls.__name__.lower(), cls.update)

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        max_grad_norm: float | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:  # Python would name this base
            here = f"; it is {_ELSEWHERE[name]} here" if name in _ELSEWHERE else ""
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}{here}")
        flags = dict(maximize=maximize, capturable=capturable, differentiable=differentiable)
        decay = dict(weight_decay=0.0, decoupled_weight_decay=True, max_grad_norm=max_grad_norm)
        super().__init__(params, {**decay, **defaults, **flags})

    def rule(self, group: Group) -> Rule:
        """The rule that a group follows; a flag that changes the state chooses between two."""
        return self._rule

    def settings(self, group: Group) -> Group:
        """What the rule's hyper-parameters are read from: the group."""
        return group

    def init(self, name: str, param: Tensor) -> Tensor:
        """The first value of a state tensor: zeros like the parameter."""
        dtype = _STATE_DTYPE.get(param.dtype, param.dtype)
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler hands over grad_scale and found_inf, and does not wait for them.

        As in ``torch.optim`` only where ``fused=True`` asks for it: who sees this, as Lightning does, takes it for
        a gradient that nobody else may unscale.
        """
        return self.defaults.get("fused") is True

    # Groups

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with settings of their own; the others come from the constructor's.

        Raises:
            TypeError, ValueError: as the constructor does; the optimizer then has the groups it had.
        """
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def check_group(self, group: Group) -> None:
        """Raise if a group's parameters or hyper-parameters are not ones that the method can work with."""
        for index, param in enumerate(group["params"]):
            if not (param.is_floating_point() or param.is_complex()):
                raise ValueError(f"params[{index}] must be floating-point or complex, got {param.dtype}")
        check_flags(
            group, "maximize", "capturable", "differentiable", "decoupled_weight_decay", "fixed_decay", "amsgrad"
        )
        betas = group.get("betas", (0, 0))
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        for name, (low, high, allowed) in _RANGES.items():
            for value in betas if name == "betas" else [group[name]] if name in group else []:
                check_number(name, value, low, high, allowed)
        if group["max_grad_norm"] is not None:
            check_number("max_grad_norm", group["max_grad_norm"], 0.0, math.inf, "> 0, or None", above=True)
        if group["max_grad_norm"] != self.defaults["max_grad_norm"]:
            raise ValueError(_ONE_BOUND)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a pickle of an older version lacks what has been added since
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    # The step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss; it is called once, with gradients enabled.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            RuntimeError: a gradient or state does not fit its parameter; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            calls = self._checked_calls() if not torch.compiler.is_compiling() else self._all_calls()
            scale = self._prepare(calls)
            for group, backend, batch in calls:
                getattr(self, "_" + backend)(group, batch, scale)
        self._finish()
        return loss

    def _finish(self) -> None:
        """Called after a step."""

    def _prepare(self, calls: list[tuple[Group, str, Batch]]) -> Tensor | None:
        """What a step needs to know of all gradients together: by how much they are to be divided."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        scale = None if scale is None else scale.reshape(())  # some hand over a list of one
        bound = self.defaults["max_grad_norm"]
        grads = [grad for _, _, batch in calls for grad in batch.grads]
        if bound is None or not grads:
            return scale
        norm = sum_of_products(grads, grads).clamp_min(1e-300).sqrt()  # whose derivative at zero is infinite
        loss_scale = torch.ones_like(norm) if scale is None else scale.to(norm.device)
        return loss_scale.mul(((norm / loss_scale + 1e-6) / bound).clamp_min(1.0))  # 1e-6 as in clip_grad_norm_

    def _all_calls(self) -> list[tuple[Group, str, Batch]]:
        return [call for group in self.param_groups for call in self._calls(group, self._gather(group))]

    def _checked_calls(self) -> list[tuple[Group, str, Batch]]:
        """All calls of a step, after a look at what they are given; if that raises, no state has been made."""
        for group in self.param_groups:
            lr = group["lr"]
            if not isinstance(lr, int | float) and not (isinstance(lr, Tensor) and lr.numel() == 1):
                raise TypeError(f"lr must be a number or a tensor of one element, got {lr!r}")
            if group["max_grad_norm"] != self.defaults["max_grad_norm"]:
                raise ValueError(_ONE_BOUND)
        known, empty = len(self.state), [row for row in self.state.values() if not row]
        try:
            calls = self._all_calls()
            # A single native call checks its tensors itself, and faster.
            native = len(calls) == 1 and calls[0][1] in ("fused", "held_lists")
            if not native or empty or len(self.state) > known:
                for call in calls:
                    self._check_call(*call)
        except Exception:
            for row in empty:
                row.clear()
            for param in list(self.state)[known:]:
                del self.state[param]
            raise
        return calls

    def _gather(self, group: Group) -> Batch:
        batch = Batch([], [], [], [[] for _ in self.rule(group).states], [])
        masters = group.get("rounding") == "master" and any(p.dtype in _STATE_DTYPE for p in group["params"])
        extra = [batch.master] if masters else []
        self._init_group(group, batch.params, batch.grads, batch.steps, *batch.states, *extra)
        return batch

    def _kept(self, group: Group, param: Tensor) -> list[str]:
        """The names of what is kept of a parameter beside its step count."""
        master = group.get("rounding") == "master" and param.dtype in _STATE_DTYPE
        return [name for name in self.rule(group).states if name not in self.drawn] + ["master"] * master

    def _first(self, group: Group, name: str, param: Tensor) -> Tensor:
        """The first value of what is kept, in the form that it is kept in."""
        if name == "master":
            return param.detach().to(_STATE_DTYPE[param.dtype])
        value = self.init(name, param)
        return value.to(group.get("state_dtype") or value.dtype) if name in self.rule(group).states else value

    def _calls(self, group: Group, batch: Batch) -> list[tuple[Group, str, Batch]]:
        """How a group is updated: batches and the back-ends that take them."""
        buckets: dict[tuple[Any, ...], list[int]] = {}
        for index, row in enumerate(zip(batch.params, batch.grads, batch.steps, *batch.states, strict=True)):
            if not isinstance(row[2], Tensor):
                raise RuntimeError(f"the step of a parameter must be a tensor, got {row[2]!r}")
            buckets.setdefault(self._bucket(group, *row), []).append(index)
        return [(group, bucket[0], batch.pick(indices)) for bucket, indices in buckets.items()]

    # torch.compile runs a method of this name while it traces, and guards on the tensors it put into the lists.
    def _init_group(
        self, group: Group, params: list[Tensor], grads: list[Tensor], steps: list[Tensor], *states: list[Tensor]
    ) -> None:
        """Append the group's parameters that have gradients, with their gradients and (made where missing) state."""
        names = [*self.rule(group).states, "master"][: len(states)]
        params += [param for param in group["params"] if param.grad is not None]
        grads += [cast(Tensor, param.grad) for param in params]
        rows = [self.state[param] for param in params]
        for param, row in zip(params, rows, strict=True):
            if not row:
                row["step"] = torch.zeros((), dtype=torch.float32, device=self._step_device(group, param))
                for name in self._kept(group, param):
                    row[name] = self._first(group, name, param)
        try:
            steps += [row["step"] for row in rows]
            for name, column in zip(names, states, strict=True):
                if name in self.drawn:
                    column += [self.init(name, param) for param in params]
                elif name == "master":
                    for param, row in zip(params, rows, strict=True):
                        if param.dtype in _STATE_DTYPE and name not in row:  # the model was in float32 before
                            row[name] = self._first(group, name, param)
                        column.append(row[name] if param.dtype in _STATE_DTYPE else _NO_MASTER)
                else:
                    column += [row[name] for row in rows]
        except KeyError as error:
            raise RuntimeError(f"the state of a parameter lacks {error}; {type(self).__name__} needs {names}") from None

    def _step_device(self, group: Group, param: Tensor) -> torch.device:
        return param.device if group["capturable"] else torch.device("cpu")

    def _bucket(self, group: Group, param: Tensor, grad: Tensor, *state: Tensor) -> tuple[Any, ...]:
        """Parameters of equal answers are updated by one call; the answer begins with the back-end."""
        return ("single",)

    def _check_call(self, group: Group, backend: str, batch: Batch) -> None:
        """Raise if something does not fit, before anything is written."""
        for param, grad, step, *states in zip(batch.params, batch.grads, batch.steps, *batch.states, strict=True):
            owner = f"a parameter of shape {tuple(param.shape)}"
            if grad.layout is not torch.strided:
                if not self.sparse:
                    raise RuntimeError(f"{type(self).__name__} does not take sparse gradients ({owner} has one)")
                if group["weight_decay"] != 0:
                    raise RuntimeError(f"weight_decay does not go with sparse gradients ({owner} has one)")
            if _overlaps(param):
                raise RuntimeError(f"{owner} is expanded or overlaps itself: its elements share memory; clone it")
            if step.numel() != 1 or step.dtype != torch.float32:
                raise RuntimeError(f"the step of {owner} must be one float32 number, got {step!r}")
            _check_twin("gradient", owner, grad, param, param.dtype)
            self._check_states(group, owner, param, states)
        for param, master in zip(batch.params, batch.master, strict=False):
            if master is not _NO_MASTER:
                owner = f"a parameter of shape {tuple(param.shape)}"
                _check_twin("master", owner, master, param, _STATE_DTYPE[param.dtype])

    def _check_states(self, group: Group, owner: str, param: Tensor, states: list[Tensor]) -> None:
        """Raise if a parameter's state is not what its rule works on; a whole-tensor method knows what its is."""

    # Back-ends

    def _single(self, group: Group, batch: Batch, scale: Tensor | None) -> None:
        """One parameter after the other."""
        for index in range(len(batch.params)):
            row = batch.pick([index])
            if row.grads[0].layout is torch.strided:
                self._update(group, row, scale, wrap=lambda tensors: tensors[0], first=index)
            else:
                self._update_rows(group, row, scale)

    def _update_rows(self, group: Group, batch: Batch, scale: Tensor | None) -> None:
        """A parameter with a sparse gradient: only what the gradient names is touched."""
        grad = batch.grads[0].coalesce()
        index, values = tuple(grad.indices()), grad.values()
        rows = batch._replace(grads=[values]).map(lambda tensor: tensor if tensor is values else tensor[index])
        self._update(group, rows, scale, wrap=lambda tensors: tensors[0])
        written = zip(
            (batch.params, *batch.states, batch.master), (rows.params, *rows.states, rows.master), strict=True
        )
        for columns in written:
            for whole, part in zip(*columns, strict=True):
                whole[index] = part

    def _update(
        self, group: Group, batch: Batch, scale: Tensor | None, wrap: Callable[[list[Tensor]], Any], first: int = 0
    ) -> None:
        """Loss scale, sign and decay, then the rule, on what ``wrap`` makes of a list of tensors."""
        if self._overflowed():
            return
        torch._foreach_add_(batch.steps, 1)
        if self._reads_steps(group):
            step: Any = batch.steps[0].item()
        else:  # in float32 a bias correction of 1 - 0.999**step has four digits
            step = wrap([step.double() for step in batch.steps])
        if _sharded_alike(batch.params[0], batch.grads[0], *(state[0] for state in batch.states)):
            batch = batch.map(local)
        if batch.params[0].is_complex():
            batch = batch.map(torch.view_as_real)
        dtype = batch.params[0].dtype
        wide = _STATE_DTYPE.get(dtype, dtype)
        params = [param.to(wide) for param in batch.params]
        if batch.master and wide is not dtype:
            # Where it is not what the parameter was rounded from, somebody has changed the parameter.
            kept = zip(batch.master, batch.params, params, strict=True)
            params = [torch.where(master.to(dtype) == narrow, master, param) for master, narrow, param in kept]
        stored = [[state.to(wide) for state in column] for column in batch.states]
        param, grad, *states = (wrap(column) for column in (params, [g.to(wide) for g in batch.grads], *stored))

        rule, lr, weight_decay = self.rule(group), self._lr(group), group["weight_decay"]
        if isinstance(lr, Tensor):
            lr = wrap([lr] * len(params))
        if scale is not None:
            grad = grad * wrap([(1 / scale).to(params[0].device, wide)] * len(params))
        if group["maximize"]:
            grad = -grad
        if weight_decay != 0 and group["decoupled_weight_decay"]:
            param *= 1 - (weight_decay if group.get("fixed_decay") else lr * weight_decay)
        elif weight_decay != 0:
            grad = grad + weight_decay * self.pull(group, param)
        # What autograd has saved of one step must not be written to by the next.
        written = [state.clone() for state in states] if group["differentiable"] else states
        rule.update(param, grad, *written, lr=lr, step=step, **rule.hyper_values(self.settings(group)))
        if group["differentiable"]:
            for state, value in zip(states, written, strict=True):
                state.copy_(value)
        for place, (column, values) in enumerate(zip(batch.states, stored, strict=True)):
            if column[0].dtype is not wide:
                self._round(group, batch.steps, column, values, place, first)
        if wide is not dtype and group.get("rounding") == "stochastic":
            self._round(group, batch.steps, batch.params, params, len(stored), first)
        elif wide is not dtype:
            torch._foreach_copy_(batch.params, params)
            if batch.master:
                torch._foreach_copy_(batch.master, params)

    def _round(
        self,
        group: Group,
        steps: list[Tensor],
        targets: list[Tensor],
        values: list[Tensor],
        place: int,
        first: int,
    ) -> None:
        """Write to the ``place``-th array of each parameter by stochastic rounding; they count from ``first``."""
        for index, (step, target, value) in enumerate(zip(steps, targets, values, strict=True), start=first):
            key = random_key(self._seed(group), step, index).to(target.device)
            round_randomly_(target, value, key, place)

    def _seed(self, group: Group) -> int:
        """The seed of a group, for equal ones must not round alike."""
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        return int(group["seed"] ^ number << 48)

    def pull(self, group: Group, param: Any) -> Any:
        """What weight decay that is coupled adds to the gradient, before it is weighted: the parameter."""
        return param

    def _overflowed(self) -> bool:
        """Whether a GradScaler found an infinite gradient, so that this step must not happen."""
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and bool(found_inf.item())

    def _reads_steps(self, group: Group) -> bool:
        """Whether Python may look into step counts and learning rates, which makes them constants of a graph."""
        return not (group["capturable"] or torch.compiler.is_compiling())

    def _rate(self, group: Group) -> Scalar:
        """The learning rate that the rule is given."""
        lr: Scalar = group["lr"]
        return lr

    def _lr(self, group: Group) -> Scalar:
        lr = self._rate(group)
        if isinstance(lr, Tensor):
            if self._reads_steps(group) and not group["differentiable"]:
                return lr.item()
            return lr.reshape(()).double()  # a float32 lr * weight_decay has seven digits
        return lr

    # Checkpoints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state and groups, as ``torch.optim`` does, except that state keeps the dtype it was saved with.

        A checkpoint of another implementation of the same method loads if its state has the same names; settings that
        it does not hold stay as they are in this optimizer. Other libraries' names of ``decoupled_weight_decay`` and
        ``amsgrad`` are understood, and so is a count of steps that is kept once for a group.

        Args:
            state_dict: what ``state_dict`` returned, on any device and from any back-end.

        Raises:
            ValueError: groups, parameters or state that do not fit this optimizer; nothing has changed then.
        """
        load_state(self, state_dict, self._complete, self._restore)

    def _complete(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of a state dict with all settings of this optimizer; raises where the two do not fit."""
        groups, states = [], dict(state_dict["state"])
        for saved_group, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            named = {_ELSEWHERE[name]: value for name, value in saved_group.items() if name in _ELSEWHERE}
            saved_group = {**named, **{name: value for name, value in saved_group.items() if name not in _ELSEWHERE}}
            amsgrad = saved_group.get("amsgrad", False)
            if "amsgrad" not in group and amsgrad is not False and amsgrad is not None:
                raise ValueError(f"the checkpoint is of a run with {amsgrad=}, and {type(self).__name__} has none")
            if "step" in saved_group:
                step = dict(step=saved_group.pop("step"))
                rows = {index: states.get(index) for index in saved_group["params"]}
                states |= {index: {**step, **row} for index, row in rows.items() if isinstance(row, dict) and row}
            settings = {name: group[name] for name in self.defaults}
            how = {name: settings[name] for name in (*_HOW, *self.how) if name in settings}
            groups.append({**settings, **saved_group, **how})
            merged = {**groups[-1], "params": group["params"]}
            self.check_group(merged)
            for index, param in zip(saved_group["params"], group["params"], strict=True):
                state = states.get(index, {})
                if state != {}:
                    self._check_state(f"parameter {index}", state, merged, param)
        return {**state_dict, "state": states, "param_groups": groups}

    def _check_state(self, owner: str, state: dict[str, Any], group: Group, param: Tensor) -> None:
        kept = self._kept(group, param)
        names = [name for name in kept if name != "master"]
        if not isinstance(state, dict) or not {"step", *names} <= state.keys():
            has = ", ".join(map(str, state)) if isinstance(state, dict) else repr(state)
            needs, cls = ", ".join(["step", *names]), type(self).__name__
            raise ValueError(
                f"the state of {owner} has {has}; {cls} needs {needs}. The checkpoint of another method cannot be "
                "continued: load the model's and begin with fresh state"
            )
        for name in (name for name in kept if name in state):
            like, value = self._first(group, name, param), state[name]
            kind = "complex" if like.is_complex() else "floating-point" if like.is_floating_point() else "integer"
            if (
                not isinstance(value, Tensor)
                or value.shape != like.shape
                or value.layout is not torch.strided
                or value.is_meta
                or value.is_complex() != like.is_complex()
                or value.is_floating_point() != like.is_floating_point()
            ):
                got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"{name} of {owner} must be a {kind} tensor of shape {tuple(like.shape)}, got {got}")
        step = state["step"]
        if isinstance(step, Tensor) and step.numel() == 1 and step.layout is torch.strided and not step.is_meta:
            step = step.item()
        if (
            isinstance(step, bool)
            or not isinstance(step, int | float)
            or not (0 <= step < math.inf and step == int(step))
        ):
            raise ValueError(f"step of {owner} must be a whole number >= 0, got {step!r}")

    def _restore(self, loaded: dict[str, Any]) -> None:
        """Undo torch's cast of state to the parameter's dtype, and give it the form that the step works on."""
        indices = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        memory: set[int] = set()  # where the state that is loaded lies: two that share it would be written twice
        for group in self.param_groups:
            for param, index in zip(group["params"], indices):  # noqa: B905  # goes on in the next group
                saved = loaded["state"].get(index)
                if not saved:
                    continue
                state = self.state[param]
                step = torch.as_tensor(saved["step"], dtype=torch.float32, device=self._step_device(group, param))
                state["step"] = step.reshape(()).clone()
                for name in self._kept(group, param):
                    like = self._first(group, name, param)
                    value = saved.get(name, like).to(device=like.device, dtype=like.dtype)
                    place = local(value).data_ptr()
                    alone = value.stride() == like.stride() and place not in memory
                    state[name] = value if alone else like.copy_(value)
                    memory.add(place)


class Elementwise(Tensorwise):
    """Base of methods that treat every coordinate alike: adds the foreach and the fused step.

    ``update`` must use tensor methods and operators only, and its helpers from :mod:`optimzoo.tensorlist` where it
    computes with ``step``; given lists of tensors it is then the foreach step. A functor of the same name in
    ``csrc/rules`` is the fused one.

    Args:
        params, defaults, maximize, capturable, differentiable: as :class:`Tensorwise`.
        foreach: update all parameters by a few calls over lists. ``None``, the default, does so where nothing is fused.
        fused: update all parameters by one native call that makes no temporaries. ``None``, the default, does so
            where there is a native library for the device and the tensors fit: not sparse, without gaps or overlap
            in memory, a gradient of the parameter's strides, not complex within ``torch.compile``. ``True`` makes it an
            error if that cannot be.
        state_dtype: ``torch.bfloat16`` keeps the state in half the memory of float32, of float32, bfloat16 and float16
            parameters, by stochastic rounding. Default ``None``: float32, or float64 for float64 parameters.
        rounding: what becomes of the bits that a 16-bit parameter cannot hold. ``"nearest"``, the default and what
            ``torch.optim`` does, loses steps of less than 0.2 % of a bfloat16 parameter; ``"stochastic"`` rounds
            bfloat16 up or down so that the mean is right; ``"master"`` keeps the unrounded parameter in float32.
        seed: of stochastic rounding, a whole number from 0 to 2**63 - 1. Default 0.

    Raises:
        RuntimeError: ``fused=True`` cannot be met, from the constructor or from ``step``; the message says why.
    """

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        **impl: Any,
    ) -> None:
        if fused is None and foreach is None and ops.missing("cpu"):
            _warn_once(f"no fused steps, they go through foreach: {ops.missing('cpu')}")
        self._held: dict[int, ops.Held] = {}  # by the group's id: what the native side keeps of it
        store = dict(state_dtype=state_dtype, rounding=rounding, seed=seed)
        super().__init__(params, {**store, **defaults, "foreach": foreach, "fused": fused}, **impl)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._held = {}

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        check_flags({name: group[name] for name in ("foreach", "fused") if group[name] is not None}, "foreach", "fused")
        self._check_store(group)
        if not group["fused"]:
            return
        if group["foreach"]:
            raise RuntimeError("fused and foreach cannot both be True")
        if group["differentiable"]:
            raise RuntimeError("fused=True cannot be differentiable=True: autograd does not see a native step")
        for index, param in enumerate(group["params"]):
            reason = self._not_fused(group, param)
            if reason:
                raise RuntimeError(f"fused=True cannot be met for params[{index}]: {reason}")

    def _check_store(self, group: Group) -> None:
        dtype, rounding, seed = group["state_dtype"], group["rounding"], group["seed"]
        if dtype not in (None, torch.bfloat16):
            why = "; float16 cannot hold the square of a small gradient" if dtype is torch.float16 else ""
            raise ValueError(f"state_dtype must be torch.bfloat16 or None, got {dtype!r}{why}")
        if rounding not in _ROUNDINGS:
            raise ValueError(f"rounding must be one of {_ROUNDINGS}, got {rounding!r}")
        check_int("seed", seed, 0, 2**63 - 1)
        if group["differentiable"] and (dtype or rounding == "stochastic"):
            raise ValueError("differentiable=True goes with neither state_dtype nor rounding='stochastic'")
        for index, param in enumerate(group["params"]):
            if dtype and (param.dtype not in _FUSED_DTYPES or param.dtype is torch.float64):
                raise ValueError(f"state_dtype={dtype} cannot hold the state of params[{index}], a {param.dtype}")
            if rounding == "stochastic" and param.dtype is torch.float16:
                raise ValueError(f"rounding='stochastic' is for bfloat16, and params[{index}] is torch.float16")

    def _not_fused(self, group: Group, param: Tensor, *others: Tensor) -> str:
        """Why a parameter's step cannot be fused, or an empty string; ``others`` are its gradient and state."""
        if self.rule(group).fused is None:
            return ops.missing("cpu") or f"{type(self).__name__} has no native step"
        if isinstance(param, _SHARDED):
            if not _sharded_alike(param, *others):
                return "gradient or state are sharded in another way than the parameter"
            param, others = local(param), tuple(local(tensor) for tensor in others)
        elif type(param) not in _PLAIN:
            return f"{type(param).__name__} is a tensor subclass that the native step does not know"
        if ops.missing(param.device.type):
            return ops.missing(param.device.type)
        if param.dtype not in _FUSED_DTYPES | {torch.complex64, torch.complex128}:
            return f"its dtype is {param.dtype}"
        if param.is_complex() and torch.compiler.is_compiling():
            return "torch.compile cannot hand a complex tensor to an operation that writes to its parts"
        if any(tensor.layout is not torch.strided for tensor in others):
            return "its gradient is sparse"
        if any(tensor.device != param.device for tensor in others):
            return "its gradient or state is on another device"
        if not _is_dense(param):
            return "it does not fill its memory without gaps or overlap"
        if any(not _same_strides(tensor, param) for tensor in others):
            return "gradient or state have other strides than the parameter"
        return ""

    def _step_device(self, group: Group, param: Tensor) -> torch.device:
        fuses = self._wants_fused(group) and not ops.missing(param.device.type)
        return param.device if fuses or group["capturable"] else torch.device("cpu")

    def _calls(self, group: Group, batch: Batch) -> list[tuple[Group, str, Batch]]:
        # The usual case, by columns: for a thousand small tensors a look at each would cost more than their step.
        fuses = self._wants_fused(group) and self.rule(group).fused is not None and not group["differentiable"]
        if torch.compiler.is_compiling():
            return super()._calls(group, batch)
        if not fuses or not batch.params:
            self._held.pop(id(group), None)
            return super()._calls(group, batch)
        held = self._held.get(id(group))
        kept = (*batch.states, batch.steps, *([batch.master] if batch.master else []))
        known = held is not None and held.holds(kept)
        looked_at = (batch.params, batch.grads, *(() if known else kept))
        usual = all({*map(type, column)} <= _PLAIN and all(map(Tensor.is_contiguous, column)) for column in looked_at)
        if usual and known:
            return [(group, "held_lists", batch)]
        usual = (
            usual
            and {param.dtype for param in batch.params} <= _FUSED_DTYPES
            and len({tensor.device for column in looked_at for tensor in column}) == 1
            and not ops.missing(batch.params[0].device.type)
        )
        if not usual:
            self._held.pop(id(group), None)
            return super()._calls(group, batch)
        if batch.params[0].is_cpu and not self.drawn:
            self._held[id(group)] = ops.Held(kept)
        return [(group, "fused", batch)]

    def _checked_calls(self) -> list[tuple[Group, str, Batch]]:
        if len(self._held) > len(self.param_groups):  # a group was taken out; let go of its state
            groups = {id(group) for group in self.param_groups}
            self._held = {key: held for key, held in self._held.items() if key in groups}
        return super()._checked_calls()

    def _wants_fused(self, group: Group) -> bool:
        return group["fused"] is not False and not group["foreach"]

    def _bucket(self, group: Group, param: Tensor, grad: Tensor, *state: Tensor) -> tuple[Any, ...]:
        step, *states = state
        if group["differentiable"]:
            return ("single",)
        if self._wants_fused(group):
            reason = self._not_fused(group, param, grad, *states)
            if not reason:
                return ("fused", param.device, param.is_complex(), isinstance(param, _SHARDED))
            if group["fused"]:
                raise RuntimeError(f"fused=True cannot be met for a parameter of shape {tuple(param.shape)}: {reason}")
        if group["foreach"] is False or grad.layout is not torch.strided:
            return ("single",)
        sharded = isinstance(param, _SHARDED)
        if sharded and not _sharded_alike(param, grad, *states):
            return ("single",)
        return ("foreach", param.device, param.dtype, sharded, step.item() if self._reads_steps(group) else None)

    def _check_states(self, group: Group, owner: str, param: Tensor, states: list[Tensor]) -> None:
        for name, state in zip(self.rule(group).states, states, strict=True):
            if name in self.drawn:
                continue
            dtype = group["state_dtype"] or _STATE_DTYPE.get(param.dtype, param.dtype)
            _check_twin(name, owner, state, param, dtype)

    def _check_call(self, group: Group, backend: str, batch: Batch) -> None:
        if backend == "held_lists":
            self._held_lists(group, batch, None, rehearse=True)
        else:
            super()._check_call(group, backend, batch)

    def _foreach(self, group: Group, batch: Batch, scale: Tensor | None) -> None:
        """Parameters of one device, dtype and step count, by calls over lists."""
        self._update(group, batch, scale, wrap=TensorList)

    def _fused(self, group: Group, batch: Batch, scale: Tensor | None) -> None:
        """Parameters of one device, by one native call."""
        params = batch.params
        if isinstance(params[0], _SHARDED):
            batch = batch.map(local)
        if params[0].is_complex():
            batch = batch.map(torch.view_as_real)
        self._call_fused(group, params, batch, scale)

    def _held_lists(self, group: Group, batch: Batch, scale: Tensor | None, rehearse: bool = False) -> None:
        """The same, when the native side has the state already."""
        bare = Batch(batch.params, batch.grads, [], [[] for _ in batch.states], [])
        self._call_fused(group, batch.params, bare, scale, self._held[id(group)].number, rehearse)

    def _call_fused(
        self,
        group: Group,
        params: list[Tensor],
        batch: Batch,
        scale: Tensor | None,
        held: int = 0,
        rehearse: bool = False,
    ) -> None:
        device, lr, rule = params[0].device, self._rate(group), self.rule(group)
        assert rule.fused is not None  # else _bucket had chosen another back-end
        if not isinstance(lr, Tensor) or not lr.is_floating_point():
            lr = torch.as_tensor(lr, dtype=torch.float64, device="cpu")  # wherever tensors are made by default
        # A step with an overflow checks everything and writes nothing, which is what a rehearsal is.
        found_inf = torch.ones((), device="cpu") if rehearse else getattr(self, "found_inf", None)
        rule.fused(
            batch.params,
            batch.grads,
            *batch.states,
            lr=lr if lr.is_cpu else lr.to(device),
            step=batch.steps,
            master=batch.master,
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            fixed_decay=group.get("fixed_decay", False),
            maximize=group["maximize"],
            stochastic=group["rounding"] == "stochastic",
            seed=self._seed(group) if group["state_dtype"] or group["rounding"] == "stochastic" else 0,
            grad_scale=_on(device, scale),
            found_inf=_on(device, found_inf),
            held=held,
            **rule.hyper_values(self.settings(group)),
        )
        # Autograd has to notice a parameter that it had saved for backward.
        if not rehearse and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(params)


def _check_twin(name: str, owner: str, tensor: Tensor, param: Tensor, dtype: torch.dtype) -> None:
    if tensor.shape != param.shape or tensor.dtype != dtype or tensor.device != param.device:
        raise RuntimeError(
            f"the {name} of {owner} must have that shape, dtype {dtype} and device {param.device}, "
            f"got shape {tuple(tensor.shape)}, dtype {tensor.dtype} and device {tensor.device}"
        )


def sum_of_products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """The inner product of two lists of tensors, each list read as one vector, in float64: over shards as well.

    Args:
        left, right: tensors of the same shapes; of complex ones the real and imaginary parts are coordinates.
    """
    columns = [left] if left is right else [left, right]
    dot = ops.native("dot", torch.device("cpu"))
    if dot is not None and all(map(is_native, columns)):
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        dot(left, [] if left is right else right, total)
        return total
    parts: dict[Any, list[Tensor]] = {}  # of each way to shard, so that one collective serves all that share it
    for a, b in zip(map(_dense, left), map(_dense, right), strict=True):
        layout = _layout(a)
        parts.setdefault(layout, []).append(_inner(local(a), local(b)))
    sums = []
    for layout, values in parts.items():
        sums.append(torch.stack(values).sum())
        if isinstance(layout, tuple):
            mesh, placements = layout
            partial = [Partial() if placement.is_shard() else Replicate() for placement in placements]
            sums[-1] = DTensor.from_local(sums[-1], mesh, partial).full_tensor()
    return functools.reduce(lambda total, other: total + other.to(total.device), sums)


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def is_native(column: list[Tensor]) -> bool:
    """Whether the native inner product takes these."""
    return (
        {*map(type, column)} <= _PLAIN
        and all(tensor.is_cpu and tensor.dtype in _FUSED_DTYPES for tensor in column)
        and all(map(Tensor.is_contiguous, column))
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in column))  # it has no derivative
    )


def _layout(tensor: Any) -> Any:
    """The mesh and the placements of a sharded tensor, the device of another."""
    shards: Any = tensor
    return (shards.device_mesh, shards.placements) if isinstance(tensor, _SHARDED) else tensor.device


def _inner(left: Tensor, right: Tensor) -> Tensor:
    if left is right and not torch.is_grad_enabled():
        return cast(Tensor, torch.linalg.vector_norm(left, dtype=torch.float64)).square()
    return torch.sum(left.double() * right.double())


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor."""
    shards: Any = tensor
    return cast(Tensor, shards.to_local() if isinstance(tensor, _SHARDED) else tensor)


def whole(tensor: Any) -> Tensor:
    """A tensor as all processes together hold it."""
    shards: Any = tensor
    return cast(Tensor, shards.full_tensor() if isinstance(tensor, _SHARDED) else tensor)


def shard_number(tensor: Any) -> int:
    """Which of the different parts of a tensor this process holds, counted from zero."""
    if not isinstance(tensor, _SHARDED):
        return 0
    shards: Any = tensor
    number = 0
    for size, place, placement in zip(
        shards.device_mesh.shape, shards.device_mesh.get_coordinate(), shards.placements, strict=True
    ):
        number = number * size + place if placement.is_shard() else number
    return number


def _sharded_alike(*tensors: Any) -> bool:
    """Whether these are DTensors whose local parts can be updated each by itself."""
    if not all(isinstance(tensor, _SHARDED) for tensor in tensors):
        return False
    placements = {tensor.placements for tensor in tensors}
    return len(placements) == 1 and not any(placement.is_partial() for placement in placements.pop())


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device, torch.float64 if device.type == "cpu" else torch.float32)


def warn(message: str) -> None:
    """Warn at the line of the user's that led here."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("optimzoo", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


_warn_once = functools.cache(warn)


def check_flags(group: Group, *names: str) -> None:
    """Raise if one of these settings, where the group has it, is neither true nor false."""
    for name in names:
        if not isinstance(group.get(name, False), bool):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")


def load_state(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    complete: Callable[[dict[str, Any]], dict[str, Any]],
    restore: Callable[[dict[str, Any]], None],
) -> None:
    """``Optimizer.load_state_dict`` with a look before it and a repair behind it.

    Args:
        optimizer: what to load into.
        state_dict: what the user gave.
        complete: gets a dictionary of the right form, after the user's pre-hooks, which may replace it; returns what is
            loaded in its place, or raises.
        restore: gets the same, before the user's post-hooks; undoes torch's cast of state to the parameter's dtype.
    """
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be a dictionary, got {state_dict!r}")
    loaded: dict[str, Any] = {}

    def prepare(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        check_form(state_dict)
        saved, own = state_dict["param_groups"], optimizer.param_groups
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in own]:
            return state_dict  # torch has an error for this
        loaded.update(complete(state_dict))
        return loaded

    handles = [
        optimizer.register_load_state_dict_pre_hook(prepare),
        optimizer.register_load_state_dict_post_hook(lambda _: restore(loaded), prepend=True),
    ]
    try:
        Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        for handle in handles:
            handle.remove()


def check_form(state_dict: Any) -> None:
    """Raise unless this is a dictionary of the form that ``state_dict`` of any optimizer has."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be a dictionary, got {state_dict!r}")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"state_dict lacks {key!r}; it has {sorted(map(str, state_dict))}")
    saved, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(saved, list) or not all(_is_saved_group(group) for group in saved):
        raise ValueError("param_groups of state_dict must be a list of dictionaries, each with a list of names")
    if not isinstance(state, dict):
        raise ValueError(f"state of state_dict must be a dictionary, got {state!r}")
    for group in saved:  # what torch looks at while it loads
        flags = {name: group[name] for name in ("fused", "capturable") if group.get(name) is not None}
        check_flags(flags, "fused", "capturable")


def _is_saved_group(group: Any) -> bool:
    names = group.get("params") if isinstance(group, dict) else None
    return isinstance(names, list) and all(isinstance(name, int | str) for name in names)


def _same_strides(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory; the stride of a dimension of size one means nothing."""
    rows = zip(one.stride(), other.stride(), other.shape, strict=False)
    return one.dim() == other.dim() and all(a == b or size == 1 or other.numel() == 0 for a, b, size in rows)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a block of memory, in whatever order of dimensions."""
    expected = 1
    strides, shape = tensor.stride(), tensor.shape
    dims = [dim for dim in range(tensor.dim()) if shape[dim] > 1 and tensor.numel()]
    while dims:  # not sorted by stride: torch.compile cannot
        innermost = [dim for dim in dims if strides[dim] == expected]
        if len(innermost) != 1:
            return False
        expected *= shape[innermost[0]]
        dims.remove(innermost[0])
    return True


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements share memory."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    reach, offsets = 0, torch.zeros((), dtype=torch.int64, device="cpu")
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    for stride, size in dims:
        if stride == 0:
            return True
        if stride <= reach:  # they may still lie between each other
            for stride_, size_ in dims:
                offsets = offsets[..., None] + stride_ * torch.arange(size_, device="cpu")
            return len(set(offsets.flatten().tolist())) < offsets.numel()
        reach += stride * (size - 1)
    return False


def check_number(name: str, value: Any, low: float, high: float, allowed: str, above: bool = False) -> None:
    """Raise unless a number is at least ``low``, or ``above`` it, and less than ``high``; ``allowed`` says so."""
    if isinstance(value, Tensor) and name == "lr":
        if value.numel() != 1:
            raise ValueError(f"lr must be one number, got a tensor of shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, int) and abs(value) >= 2**63:  # beyond what torch takes beside a tensor
        raise ValueError(f"{name} must be {allowed}, got {value!r}, a whole number of more than 63 bits")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number {allowed}, got {value!r}")
    number = float(value)
    if not low <= number < high or (above and value == low):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_int(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raise unless a value is a whole number from ``low`` to ``high``, both allowed."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        last = f"2**{high.bit_length()} - 1" if isinstance(high, int) and high > 2**32 else high
        allowed = "" if low == -math.inf else f" >= {low}" if high == math.inf else f" from {low} to {last}"
        raise ValueError(f"{name} must be a whole number{allowed}, got {value!r}")


def check_choice(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raise unless a value is one of those that are known."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
