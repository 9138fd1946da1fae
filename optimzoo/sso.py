"""SSO: target-based surrogates for stochastic optimization (Lavington et al., 2023, https://arxiv.org/abs/2302.02607)."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from optimzoo.optimizer import Group, check_form, check_int, check_number, local, sum_of_products, warn

Targets: TypeAlias = Tensor | tuple[Tensor, ...]
Closure: TypeAlias = Callable[[], tuple[Targets, Callable[[Any], Tensor] | Tensor]]

# Both searches: a trial must fall by this share of what the slope promises, trials shrink by the second, and a search
# starts at the third times the step size that was accepted before.
_SUFFICIENT, _SHRINK, _GROW = 0.5, 0.9, 1.8
_LEAST, _MOST = 1e-4, 1e4  # of a target step size that is searched
_DISTRIBUTED = torch.distributed.is_available()
_POSITIVE = (0.0, math.inf, "finite and > 0")


class Armijo(Optimizer):
    r"""Gradient descent whose step size :math:`a` is back-tracked until it descends enough: SSO's own inner solver.

    .. math::
        h(x - a g) \le h(x) - \tfrac{1}{2} a \|g\|^2

    Trials shrink by 0.9, at most 100 of them and down to 1e-6. Where all fail, parameters are as they were, ``stuck``
    is true and a warning says so. They are as they were also where the closure raises.

    Args:
        params: tensors or parameter groups; they all have one step size.
        lr: the step size that the first search starts from. Default 10, of the authors.
        growth: a later search starts at this multiple of the step size before, up to 1e4 or ``lr``. Default 1.8; the
            authors have 1.8 to the power 1 / (batches in an epoch).

    Raises:
        TypeError, ValueError: a setting is not a number, out of range, or differs between groups.

    ``step(closure)`` calls the closure once with gradients enabled, for value and gradient, and then without gradients
    for the value at each trial. Without gradients it changes nothing.
    """

    stuck = False

    def __init__(self, params: ParamsT, lr: float = 10.0, growth: float = _GROW) -> None:
        super().__init__(params, dict(lr=lr, growth=growth))

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with the step size and growth of the others.

        Raises:
            TypeError, ValueError: a setting is not a number, out of range, or not that of the first group.
        """
        given: Group = dict(param_group)
        for name in ("lr", "growth"):
            first = (self.param_groups or [self.defaults])[0][name]
            self._check(name, given.setdefault(name, first))
            if self.param_groups and given[name] != first:
                raise ValueError(f"{name} is one for all groups, got {first!r} and {given[name]!r}")
        super().add_param_group(given)

    @staticmethod
    def _check(name: str, value: Any) -> None:
        low, allowed = (1.0, "finite and >= 1") if name == "growth" else (0.0, "finite and > 0")
        check_number(name, value, low, math.inf, allowed, above=name != "growth")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim``.

        Raises:
            TypeError, ValueError: a setting or a step size that cannot be one; nothing has changed then.
        """
        check_form(state_dict)
        for group in state_dict["param_groups"]:
            for name in ("lr", "growth"):
                self._check(name, group.get(name))
        for row in state_dict["state"].values():
            if not isinstance(row, dict):
                raise ValueError(f"the state of a parameter must be a dictionary, got {row!r}")
            if "step_size" in row:
                self._check("step_size", row["step_size"])
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]  # the closure is not optional
        """Search a step size and move by it. Returns the value before the step."""
        with torch.enable_grad():
            value = closure()
        first, self.stuck = self.param_groups[0], False
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return value
        grads = [p.grad for p in params]
        square = sum_of_products(grads, grads).item()
        kept = [p.clone() for p in params]
        row, lr = self.state[first["params"][0]], float(first["lr"])
        size = min(first["growth"] * row["step_size"], max(lr, _MOST)) if "step_size" in row else lr
        try:
            for _ in range(100):
                _copy(params, torch._foreach_add(kept, grads, alpha=-size))
                torch.clear_autocast_cache()
                self.stuck = not -math.inf < float(closure()) <= float(value) - _SUFFICIENT * size * square
                if not self.stuck or size * _SHRINK < 1e-6:
                    break
                size *= _SHRINK
        except BaseException:
            _copy(params, kept)
            raise
        if self.stuck:
            _copy(params, kept)
            warn(f"no step size down to {size:.3g} descends enough: the parameters stay where they are")
        else:
            row["step_size"] = size
        return value


class SSO(Optimizer):
    r"""Fits a surrogate of the loss in target space: one costly gradient a step, many cheap updates (not Spectral SSO).

    The loss :math:`\ell` is seen as a function of targets :math:`z = f(\theta)`, the outputs of a model for :math:`n`
    samples. A step asks for its gradient in them once, :math:`G = \nabla\ell(z_t)`, and lowers

    .. math::
        g_t(\theta) = \langle G, f(\theta) - z_t \rangle + \frac{1}{2\eta n} \sum_{i=1}^n \|f_i(\theta) - z_{t,i}\|^2

    by ``inner_steps`` updates of an inner optimizer, which run the model forward and backward and not the loss. For
    :math:`\eta \le 1/L`, with :math:`L` the smoothness of one sample's loss in its outputs (squared error / 2: 1,
    logistic: 1/4, softmax cross-entropy: 1/2), :math:`\ell(z_t) + g_t` is an upper bound of :math:`\ell` that touches
    it at :math:`\theta_t`, so lowering it lowers the loss. The norm is the mean over samples, the first dimension of
    the outputs, and the sum over all others: :math:`\eta` does not depend on the batch size where the loss is a mean.

    ``step(closure)`` needs a closure that returns ``(outputs, loss)`` and does not call ``backward``. ``outputs`` is a
    tensor or a tuple of tensors; ``loss`` is a function of them, which is called once a step, or a tensor computed from
    them, which is then recomputed, and thrown away, for each inner update. (Of such a tensor the gradient is a total
    one: no output may then be computed from another.)

    >>> model = torch.nn.Linear(3, 1)
    >>> inputs, wanted = torch.randn(8, 3), torch.randn(8, 1)
    >>> optimizer = optimzoo.SSO(model.parameters(), inner_steps=10)
    >>> loss = optimizer.step(lambda: (model(inputs), lambda z: (z - wanted).square().mean() / 2))

    Args:
        params: tensors or parameter groups. What a group has besides ``params`` and ``lr`` goes to the inner optimizer.
        lr: the target step size :math:`\eta > 0`, in units of 1 / L; schedulers of this optimizer change it. Default 1.
        inner: what makes the inner optimizer from parameter groups, such as ``functools.partial(torch.optim.SGD,
            lr=0.1)``, or ``"armijo"``, :class:`Armijo`. It is ``optimizer.inner``, for schedulers of its own. Default
            ``"armijo"``.
        inner_steps: updates of the parameters a step, at least 1. Default 10.
        divergence: what stands in place of half the squared distance: ``"euclidean"``; ``"kl"``,
            :math:`\mathrm{KL}(f_i(\theta) \| z_{t,i})` of outputs that are probabilities, mirror descent in policy
            space; or a function of new and old outputs that returns a Bregman divergence for each sample.
        target_metric: ``"identity"``, or ``"adagrad"``: each output dimension's square is weighted by the root of the
            sum over steps of the squared gradients of a sample's loss in it, averaged over samples.
        line_search: back-track :math:`\eta` in target space, by one evaluation of the loss a trial and no gradient,
            until :math:`\ell(z - \eta n G) \le \ell(z) - \eta n \|G\|^2 / 2`. The first search starts at ``lr``, later
            ones at 1.8 times what was accepted, within [1e-4, 1e4] widened to ``lr``. Where all fail, the least is
            taken and a warning says so. ``loss`` must be a function. Default ``False``.
        reset_inner: forget the inner optimizer's state at the start of each step. Default: for ``"armijo"`` only,
            whose search then starts at its ``lr``.
        tol: a step ends early where the surrogate's gradient has at most this norm. Default 1e-6.
        nonfinite: what a step does where outputs, loss, G, the last trial of ``line_search``, a gradient of the
            surrogate or the parameters it ends with are not finite: ``"raise"``, or ``"skip"``, which leaves everything
            as it was and returns the loss. Default ``"raise"``.
        scaler: a ``torch.amp.GradScaler`` for the inner updates. Default ``None``.
        module: the model, if it has buffers that a forward pass changes, in place or by assignment: the inner updates
            leave no trace in them.
        process_group: where processes have different data (``DistributedDataParallel``), average over it what decisions
            depend on: the values of both searches, accumulators, and what is finite. Without it such processes may
            decide differently, and then wait for each other forever. Default ``None``: one process.

    Raises:
        TypeError, ValueError: a setting, outputs or loss are not ones that the method can work with.
        RuntimeError: from ``step``, if the closure calls ``backward``, outputs have no graph to the parameters or
            change their shape, or under ``GradScaler.step``.
        FloatingPointError: from ``step``, as ``nonfinite`` says.

    Warns:
        UserWarning: the search of :class:`Armijo` fails, which ends a step, or that of ``line_search``; or
            ``torch.distributed`` has several processes and ``process_group`` is not given.

    With one inner update by SGD a step is one of SGD, whatever ``lr`` is. All evaluations of a step see the random
    numbers of the first (Dropout), and ``p.grad`` is left as it was. A step that raises leaves parameters, the buffers
    of ``module``, state, inner optimizer and torch's random numbers as they were, for which it keeps a copy of them.
    ``counts`` has what was spent so far, in steps that failed as well: ``loss_gradients``, ``loss_values`` (one a
    gradient, and the trials), ``forwards`` and ``backwards`` of the model.

    Others call the Spectral Sphere Optimizer SSO; ``TargetSurrogate`` is another name of this class.
    """

    inner: Optimizer
    grad_scale: Tensor  # GradScaler sets these two
    found_inf: Tensor
    _step_supports_amp_scaling = True  # so that GradScaler calls step, which says what to do instead

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        inner: str | Callable[..., Optimizer] = "armijo",
        inner_steps: int = 10,
        *,
        divergence: str | Callable[[Tensor, Tensor], Tensor] = "euclidean",
        target_metric: str = "identity",
        line_search: bool = False,
        reset_inner: bool | None = None,
        tol: float = 1e-6,
        nonfinite: str = "raise",
        scaler: torch.amp.GradScaler | None = None,
        module: torch.nn.Module | None = None,
        process_group: Any = None,
    ) -> None:
        if inner != "armijo" and not callable(inner):
            raise TypeError(f'inner must be "armijo" or a function that makes an optimizer, got {inner!r}')
        check_int("inner_steps", inner_steps, 1)
        if divergence not in ("euclidean", "kl") and not callable(divergence):
            raise ValueError(f"divergence must be 'euclidean', 'kl' or a function, got {divergence!r}")
        for name, value, allowed in (
            ("target_metric", target_metric, ("identity", "adagrad")),
            ("line_search", line_search, (False, True)),
            ("reset_inner", reset_inner, (None, False, True)),
            ("nonfinite", nonfinite, ("raise", "skip")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if divergence != "euclidean" and (line_search or target_metric != "identity"):
            raise ValueError(f"line_search and target_metric need divergence='euclidean', got {divergence!r}")
        for name, given, kinds in (
            ("module", module, torch.nn.Module),
            ("scaler", scaler, torch.amp.GradScaler),
            ("process_group", process_group, torch.distributed.ProcessGroup if _DISTRIBUTED else ()),
        ):
            if given is not None and not isinstance(given, kinds):
                wanted = getattr(kinds, "__qualname__", "ProcessGroup, which this build of torch lacks")
                raise TypeError(f"{name} must be None or a {wanted}, got {given!r}")
        if process_group is None and _processes() > 1:
            warn(
                f"torch.distributed has {_processes()} processes and no process_group was given: where they share a "
                "model but not the data, they decide differently and wait for each other forever"
            )
        check_number("tol", tol, 0.0, math.inf, "finite and >= 0")
        self.inner_steps, self.divergence, self.target_metric = inner_steps, divergence, target_metric
        self.line_search, self.tol, self.nonfinite = line_search, tol, nonfinite
        self.reset_inner = inner == "armijo" if reset_inner is None else reset_inner
        self.scaler, self.module, self.process_group = scaler, module, process_group
        self.counts = dict(loss_gradients=0, loss_values=0, forwards=0, backwards=0)
        self._targets: dict[str, Any] = dict(lr=None, sum_sq=None)  # accepted last; the metric's accumulators
        super().__init__(params, dict(lr=lr))
        make: Any = Armijo if inner == "armijo" else inner
        self.inner = make([{k: v for k, v in group.items() if k != "lr"} for group in self.param_groups])
        if not isinstance(self.inner, Optimizer):
            raise TypeError(f"inner must make a torch.optim.Optimizer, got {type(self.inner).__name__}")

    # Groups and checkpoints

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters; what the group has besides ``params`` and ``lr`` goes to the inner optimizer.

        ``lr``, the one target step size of all groups, is by default what it is at this time.

        Raises:
            TypeError, ValueError: as the constructor does; the optimizer then has the groups it had.
        """
        if "inner" in self.__dict__ and isinstance(param_group, dict):  # a scheduler may have changed the one lr
            param_group = {"lr": self.param_groups[0]["lr"], **param_group}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_number("lr", group["lr"], *_POSITIVE, above=True)
            for index, param in enumerate(group["params"]):
                if not (param.is_floating_point() or param.is_complex()):
                    raise ValueError(f"params[{index}] must be floating-point or complex, got {param.dtype}")
            if group["lr"] != self.param_groups[0]["lr"]:
                raise ValueError(
                    f"lr is one target step size for all groups, got {self.param_groups[0]['lr']!r} and "
                    f"{group['lr']!r}; the parameters' own are those of inner"
                )
            if "inner" in self.__dict__:
                self.inner.add_param_group({k: v for k, v in group.items() if k != "lr"})
        except Exception:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        own = ("inner_steps", "divergence", "target_metric", "line_search", "reset_inner", "tol", "nonfinite", "scaler",
               "module", "process_group", "counts", "_targets", "inner")  # fmt: skip
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def state_dict(self) -> dict[str, Any]:
        """As in ``torch.optim``, with the inner optimizer's under ``inner``."""
        kept = dict(targets=copy.deepcopy(self._targets), counts=dict(self.counts))
        return {**super().state_dict(), "inner": self.inner.state_dict(), **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load both levels; a run that goes on equals one that was not interrupted, bit for bit.

        Raises:
            TypeError, ValueError: groups or values that do not fit, or a dictionary of another class; nothing has
                changed then.
        """
        check_form(state_dict)
        for key in ("inner", "targets", "counts"):
            if key not in state_dict:
                raise ValueError(f"state_dict lacks {key!r}; it has {sorted(map(str, state_dict))}")
        check_form(state_dict["inner"])
        for group in state_dict["param_groups"]:
            check_number("lr", group.get("lr"), *_POSITIVE, above=True)
        targets, counts = state_dict["targets"], state_dict["counts"]
        if not isinstance(targets, dict) or targets.keys() != self._targets.keys():
            raise ValueError(f"state_dict['targets'] must have lr and sum_sq, got {targets!r}")
        if targets["lr"] is not None:
            check_number("state_dict['targets']['lr']", targets["lr"], *_POSITIVE, above=True)
        sums = targets["sum_sq"]
        if sums is not None and not (isinstance(sums, list) and all(isinstance(row, Tensor) for row in sums)):
            raise ValueError(f"state_dict['targets']['sum_sq'] must be None or a list of tensors, got {sums!r}")
        if not isinstance(counts, dict) or counts.keys() != self.counts.keys():
            raise ValueError(f"state_dict['counts'] must have {', '.join(self.counts)}, got {counts!r}")
        for name, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"state_dict['counts'][{name!r}] must be a whole number >= 0, got {count!r}")
        with self._undone_by_errors([]):
            super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
            self.inner.load_state_dict(state_dict["inner"])
            self._targets, self.counts = copy.deepcopy(targets), dict(counts)

    @contextlib.contextmanager
    def _undone_by_errors(self, tensors: list[Tensor], *moments: _Generators | _Buffers) -> Iterator[None]:
        """Put back these tensors and moments, and both optimizers' states and settings, if what follows raises."""

        def copies(groups: list[Group]) -> list[Group]:
            return [{k: v if k == "params" else copy.deepcopy(v) for k, v in group.items()} for group in groups]

        kept = [tensor.detach().clone() for tensor in tensors]
        states = {param: copy.deepcopy(row) for param, row in self.inner.state.items()}
        groups, outer = copies(self.inner.param_groups), copies(self.param_groups)
        targets = dict(self._targets)
        try:
            yield
        except BaseException:
            _copy(tensors, kept)
            for moment in moments:
                moment.restore()
            self.inner.state.clear()
            self.inner.state.update(states)
            for optimizer, old in ((self.inner, groups), (self, outer)):
                for group, values in zip(optimizer.param_groups, old, strict=True):
                    group.clear()
                    group.update(values)
            self._targets = targets
            raise

    # The step

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]  # outputs and loss
        """Ask once for the gradient of the loss in the outputs, and lower the surrogate by the inner optimizer.

        Args:
            closure: runs the model on a batch, chosen outside of it, and returns ``(outputs, loss)``. It is called at
                least once for each inner update. It is not optional.

        Returns:
            The loss at the parameters before the step.
        """
        if "grad_scale" in self.__dict__:  # torch leaves them where the step raises
            del self.grad_scale, self.found_inf
            raise RuntimeError("GradScaler.step cannot take this step: give the scaler to the constructor, scaler=...")
        if not callable(closure):
            raise TypeError(f"step needs a closure that returns (outputs, loss), got {closure!r}")
        rates = {float(group["lr"]) for group in self.param_groups}
        for rate in rates:
            check_number("lr", rate, *_POSITIVE, above=True)
        if len(rates) > 1:
            raise ValueError(f"lr is one target step size for all groups, got {sorted(rates)}")
        params = [param for group in self.param_groups for param in group["params"]]
        before, clean = _Generators(params[0].device), _Buffers(self.module)
        grads = [param.grad for param in params]
        try:
            for param in params:
                param.grad = None
            with self._undone_by_errors(params, before, clean):
                return self._step(closure, rates.pop(), params, before, clean)
        except _NonFiniteError as error:
            if self.nonfinite == "raise":
                raise
            return error.loss
        finally:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad

    def _step(self, closure: Closure, lr: float, params: list[Tensor], before: _Generators, clean: _Buffers) -> Tensor:
        if self.reset_inner:
            self.inner.state.clear()
        self.counts["forwards"] += 1
        torch.clear_autocast_cache()
        with torch.enable_grad():
            outputs, loss = _pair(closure())
        after, used = _Buffers(self.module), _Generators(before.device)
        if any(param.grad is not None for param in params):
            raise RuntimeError("the closure called backward(): remove the call and return (outputs, loss)")
        new = _listed(outputs)
        if not any(output.requires_grad for output in new):
            raise RuntimeError("the closure's outputs have no graph: they must depend on the parameters")
        old = [_wide(output.detach().clone()) for output in new]  # outputs may be parameters, which move
        value, slopes = self._loss_gradient(outputs, old, loss)
        drawn = _Generators(before.device)  # where a step that runs model and loss once would leave them
        if not self._all_finite([value, *old, *slopes]):
            raise _NonFiniteError("outputs, loss or gradient of the loss are not finite", value)
        weights, surrogate = self._metric(old, slopes), self.surrogate
        if self.line_search:
            lr = self._search(lr, outputs, old, slopes, weights, loss, value, used)

        # Not into other parameters' gradients. DistributedDataParallel, though, waits for those of all.
        inputs = [param for param in params if param.requires_grad and not _processes()] or None

        def forward() -> list[Tensor]:
            clean.restore()
            before.restore()
            torch.clear_autocast_cache()  # it has casts of the parameters as they were
            self.counts["forwards"] += 1
            again = _listed(_pair(closure())[0])
            if [output.shape for output in again] != [output.shape for output in old]:
                was, now = ([tuple(output.shape) for output in side] for side in (old, again))
                raise RuntimeError(f"the closure's outputs changed their shapes within a step, from {was} to {now}")
            return again

        def evaluate(new: list[Tensor]) -> Tensor:
            value = surrogate(new, old, slopes, weights, lr)
            if torch.is_grad_enabled():
                for param in params:
                    param.grad = None
                scaled = value if self.scaler is None else self.scaler.scale(value)
                scaled.backward(inputs=inputs)  # type: ignore[no-untyped-call]
                self.counts["backwards"] += 1
            return self._mean(value.detach().double())

        def later(known: list[Tensor], mark: list[tuple[Any, ...]]) -> Tensor:
            if known and mark == _mark(params):
                return known.pop()
            known.clear()
            if self.scaler is not None and torch.is_grad_enabled():
                raise RuntimeError("an inner optimizer that evaluates more than once cannot have a scaler")
            return evaluate(forward())

        try:
            for k in range(self.inner_steps):
                with torch.enable_grad():
                    known = [evaluate(new if k == 0 else forward())]  # the first has its outputs at hand
                if not self._update(later, known, params, value):
                    break
            if not self._all_finite([sum_of_products(params, params)]):
                raise _NonFiniteError("the parameters are not finite: take smaller inner steps", value)
        finally:
            after.restore()
            drawn.restore()
            torch.clear_autocast_cache()
        return value

    def _update(self, closure: Callable[..., Any], known: list[Tensor], params: list[Tensor], loss: Tensor) -> bool:
        """One inner update, from a value and gradients that are at hand; whether another one has something to do."""
        grads = [param.grad for param in params if param.grad is not None]
        if not grads:
            raise RuntimeError(
                "the closure's outputs do not depend on any of the parameters, or only through a checkpoint with "
                "use_reentrant=True: that cannot work, use_reentrant=False does"
            )
        if self.scaler is None:
            norm = sum_of_products(grads, grads).sqrt().item()
            if not math.isfinite(norm):
                raise _NonFiniteError("the surrogate's gradient is not finite: take smaller inner steps", loss)
            if norm > self.tol:
                self.inner.step(functools.partial(closure, known, _mark(params)))
        else:
            self.scaler.unscale_(self.inner)
            try:
                norm = sum_of_products(grads, grads).sqrt().item()
                if not norm <= self.tol:
                    self.scaler.step(self.inner, functools.partial(closure, known, _mark(params)))
            finally:
                self.scaler.update()
        return not norm <= self.tol and not getattr(self.inner, "stuck", False)

    def _loss_gradient(
        self, outputs: Targets, old: list[Tensor], loss: Callable[[Any], Tensor] | Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradient in the outputs, for which no graph to the parameters is walked."""
        self.counts["loss_values"] += 1
        with torch.enable_grad():
            if isinstance(loss, Tensor):
                leaves = _listed(outputs)
                value: Any = loss
            else:
                leaves = [output.clone().requires_grad_() for output in old]
                value = loss(_like(outputs, leaves))
            self.counts["loss_gradients"] += 1
            if not isinstance(value, Tensor):
                raise TypeError(f"the loss must be a tensor, got {value!r}")
            if value.numel() != 1 or value.is_complex():
                raise ValueError(f"the loss must be one real number, got {value.dtype} of shape {tuple(value.shape)}")
            if not value.requires_grad:
                raise RuntimeError("the loss must be computed from the outputs; this one has no graph")
            found = iter(torch.autograd.grad(value, [z for z in leaves if z.requires_grad], allow_unused=True))
            slopes = [next(found) if z.requires_grad else None for z in leaves]  # the others do not move
        if all(slope is None for slope in slopes):
            raise RuntimeError("the loss does not depend on the outputs that the closure returned")
        pairs = zip(slopes, old, strict=True)
        return value.detach(), [torch.zeros_like(z) if slope is None else _wide(slope) for slope, z in pairs]

    def _metric(self, old: list[Tensor], slopes: list[Tensor]) -> list[Tensor | float]:
        """What the square of each output dimension is weighted by."""
        if self.target_metric == "identity":
            return [1.0] * len(old)
        squares = [(_samples(z) * slope).square() for z, slope in zip(old, slopes, strict=True)]
        rows = [self._mean(square.mean(0) if square.dim() else square) for square in squares]
        known = self._targets["sum_sq"]
        if known is not None:
            if [row.shape for row in known] != [row.shape for row in rows]:
                raise RuntimeError("target_metric='adagrad' needs outputs of the same dimensions in each step")
            rows = [row + past.to(row) for row, past in zip(rows, known, strict=True)]
        self._targets["sum_sq"] = rows
        return [row.sqrt() + 1e-10 for row in rows]

    def _search(
        self,
        lr: float,
        outputs: Targets,
        old: list[Tensor],
        slopes: list[Tensor],
        weights: list[Tensor | float],
        loss: Callable[[Any], Tensor] | Tensor,
        value: Tensor,
        generators: _Generators,
    ) -> float:
        """The largest trial step size whose step in target space lowers the loss enough."""
        if isinstance(loss, Tensor):
            raise TypeError("line_search needs a closure that returns (outputs, function), got a tensor for the loss")
        ways = [_samples(z) * slope / w for z, slope, w in zip(old, slopes, weights, strict=True)]
        promise = self._mean(_total([(slope * way).sum() for slope, way in zip(slopes, ways, strict=True)]))
        last = self._targets["lr"]
        least, most = min(_LEAST, lr), max(_MOST, lr)
        lr = min(max(lr if last is None else _GROW * last, least), most)
        start = self._mean(value.double())
        while True:
            generators.restore()
            self.counts["loss_values"] += 1
            with torch.no_grad():
                trial = loss(_like(outputs, [z - lr * way for z, way in zip(old, ways, strict=True)]))
            reached = float(self._mean(trial.double()))
            if -math.inf < reached <= float(start - _SUFFICIENT * lr * promise):
                break
            if lr <= least:
                if not math.isfinite(reached):
                    raise _NonFiniteError(f"the loss is not finite at the least trial, {lr:.3g}", value)
                warn(f"no target step size down to {lr:.3g} descends enough: the step is taken with this one")
                break
            lr = max(lr * _SHRINK, least)
        self._targets["lr"] = lr
        return lr

    def surrogate(
        self, new: list[Tensor], old: list[Tensor], slopes: list[Tensor], weights: list[Tensor | float], lr: float
    ) -> Tensor:
        """The surrogate at new outputs, less the loss at the old ones."""
        parts = []
        for output, z, slope, weight in zip(map(_wide, new), old, slopes, weights, strict=True):
            gap = output - z
            if self.divergence == "euclidean":
                penalty = (weight * gap.square()).sum() / 2
            elif self.divergence == "kl":
                penalty = _kl(output, z)
            else:
                each: Any = self.divergence(output, z)  # type: ignore[operator]
                if not isinstance(each, Tensor) or each.shape != output.shape[:1]:
                    got = tuple(each.shape) if isinstance(each, Tensor) else each
                    raise ValueError(f"divergence must return shape {tuple(output.shape[:1])}, got {got}")
                penalty = each.sum()
            parts.append((slope * gap).sum() + penalty / (lr * _samples(z)))
        return _total(parts)

    def _mean(self, value: Tensor) -> Tensor:
        """The mean over the processes that have the same parameters."""
        if self.process_group is None:
            return value
        value = value.clone()
        torch.distributed.all_reduce(value, group=self.process_group)
        return value / torch.distributed.get_world_size(self.process_group)

    def _all_finite(self, tensors: list[Tensor]) -> bool:
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
        return self._mean(finite.double()).item() == 1


TargetSurrogate = SSO


def _processes() -> int:
    """How many there are in torch.distributed; none where it is not in use."""
    return torch.distributed.get_world_size() if _DISTRIBUTED and torch.distributed.is_initialized() else 0


class _NonFiniteError(FloatingPointError):
    """What stops a step, with the loss that a step that is skipped returns."""

    def __init__(self, message: str, loss: Tensor) -> None:
        super().__init__(message)
        self.loss = loss


class _Generators:
    """The states of torch's generators at one moment."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


class _Buffers:
    """The buffers of a module at one moment: which tensors they are, and what is in them."""

    def __init__(self, module: torch.nn.Module | None) -> None:
        owners = [] if module is None else [owner._buffers for owner in module.modules()]
        self.kept = [(buffers, dict(buffers)) for buffers in owners]
        self.tensors = [tensor for _, kept in self.kept for tensor in kept.values() if tensor is not None]
        self.values = [tensor.clone() for tensor in self.tensors]

    def restore(self) -> None:
        for buffers, kept in self.kept:
            buffers.clear()
            buffers.update(kept)
        _copy(self.tensors, self.values)


@torch.no_grad()
def _copy(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _mark(params: list[Tensor]) -> list[tuple[Any, ...]]:
    """What differs once parameters or their gradients were written to, unless through ``.data``."""
    grads = [param.grad for param in params]
    versions = [None if grad is None else (id(grad), grad._version) for grad in grads]
    return [(p._version, local(p).data_ptr(), version) for p, version in zip(params, versions, strict=True)]


def _pair(result: Any) -> tuple[Targets, Callable[[Any], Tensor] | Tensor]:
    if not isinstance(result, tuple) or len(result) != 2 or not (isinstance(result[1], Tensor) or callable(result[1])):
        raise TypeError(f"the closure must return (outputs, loss), with loss a function or a tensor, got {result!r}")
    _listed(result[0])
    return result


def _listed(outputs: Any) -> list[Tensor]:
    row = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not row or not all(isinstance(output, Tensor) and output.is_floating_point() for output in row):
        raise TypeError(f"the closure's outputs must be a floating-point tensor or a tuple of them, got {outputs!r}")
    return row


def _like(outputs: Targets, row: list[Tensor]) -> Targets:
    return tuple(row) if isinstance(outputs, tuple) else row[0]


def _wide(tensor: Tensor) -> Tensor:
    """Float64 as it is, all else in float32: the surrogate's arithmetic."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _samples(outputs: Tensor) -> int:
    return outputs.shape[0] if outputs.dim() else 1


def _total(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _kl(new: Tensor, old: Tensor) -> Tensor:
    """The Bregman divergence of the negative entropy: also its gradient is zero where the two are equal."""
    for probabilities in (new.detach(), old):
        # A sum of half-precision numbers may be off by as much as this.
        if bool((probabilities < 0).any()) or bool(((probabilities.sum(-1) - 1).abs() > 1e-2).any()):
            raise ValueError("divergence='kl' needs outputs that are probabilities over the last dimension (softmax)")
    tiny = torch.finfo(new.dtype).tiny
    p, q = new.clamp_min(tiny), old.clamp_min(tiny)
    return (p * (p / q).log() - p + q).sum()
