"""DP-SGD, and DiceSGD, which feeds back what clipping cut off."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from optimzoo import privacy
from optimzoo.optimizer import Group, check_flags, check_number, load_state, local, sum_of_products, warn
from optimzoo.per_sample import FactoredSamples, Samples, micro_batches, norms, weighted_sums, writes
from optimzoo.poisson import PoissonSampler
from optimzoo.tensorlist import Scalar

_SHARDED: tuple[type[Tensor], ...] = ()
if torch.distributed.is_available():
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Partial

    _SHARDED = (DTensor,)

_CLIPPINGS = ("flat", "automatic")
_NOISES = ("default", "secure")
_GAMMA = 0.01  # of automatic clipping
# A sum of float32 products may exceed the norm that was computed; the clipped norm must not exceed its bound.
_MARGIN = {torch.float64: 1 + 2.0**-44}
_LARGEST = {torch.float64: 1e140}  # of an error's coordinate, so that the sum of squares is a number


class DPSGD(Optimizer):
    r"""Differentially private SGD: the samples' gradients are clipped, summed, and noise is added to the sum.

    .. math::
        u_t = \frac1B \Bigl(\sum_{i \in \mathcal{B}_t} g_i \min\bigl(1, C_1 / \|g_i\|\bigr) + s z_t\Bigr),
        \qquad z_t \sim \mathcal{N}(0, I)

    where :math:`g_i` is the gradient of sample :math:`i` of all trained parameters as one vector, and
    :math:`\mathcal{B}_t` holds each example of the dataset with probability :math:`q`, independently
    (:class:`PoissonSampler`). ``p.grad`` becomes :math:`u_t`, and another optimizer makes the step: what is computed
    from :math:`u_t` is as private as :math:`u_t`. Privacy is that of adding or removing one example.

    A step reads ``p.grad_sample``, of shape (samples, \*p.shape), the gradient of each sample's own loss, from
    :class:`PerSampleGradients` or Opacus, and clears it. A list holds the samples of several micro-batches, all of one
    batch; :meth:`accumulate` adds a micro-batch to the sums at once, and frees its memory. A sample with a gradient
    that is not finite counts as zero. Nothing is raised, skipped or said that depends on values.

    Args:
        params: real, dense tensors of any shape, or parameter groups.
        lr: :math:`\gamma > 0`, passed to ``base``; a float or a tensor of one element.
        max_grad_norm: :math:`C_1 > 0`, in units of a sample's gradient.
        noise_multiplier: :math:`s / C_1 \ge 0`. Either this or ``noise_std_sum`` is given.
        noise_std_sum: :math:`s \ge 0`, the noise's standard deviation in units of the sum of gradients;
            :func:`optimzoo.privacy.noise_std_for` finds it from what epsilon is to be.
        expected_batch_size: :math:`B > 0`: a constant of yours, usually :math:`q` times a round size of the dataset.
            It must not be read from a batch or a dataset, whose sizes are secret.
        sample_rate: :math:`q` in (0, 1].
        momentum, weight_decay: passed to ``base`` where given.
        base: makes the optimizer that steps along :math:`u_t`: ``base(params, lr=lr, ...)``. Default
            ``torch.optim.SGD``.
        clipping: ``"flat"``, or ``"automatic"``: :math:`C_1 g_i / (\|g_i\| + 0.01)`, for which the scale of
            :math:`C_1` is part of the learning rate. Default ``"flat"``.
        sampler: the :class:`PoissonSampler` of the batches, or a ``DataLoader`` with one; it is only looked at: its
            rate must be ``sample_rate``. Without it you vouch for that.
        process_group: ranks that together have a batch; the noise is drawn by the first of them. Default: all, if
            ``torch.distributed`` is initialized.
        generator: a CPU generator to draw the noise from, for tests: whoever knows its seed knows the noise. Default:
            one of its own, seeded by the operating system.
        noise_source: ``"default"``, or ``"secure"``: a stream cipher's, from the package ``cryptography``. Default
            ``"default"``, whose numbers are good but could be told from their own past.
        allow_unused: a trained parameter without ``grad_sample`` has gradients of zero, and noise. Default ``False``:
            that is an error.

    Raises:
        ValueError: a number out of its range, a sampler that does not fit, parameters that are complex or sparse.
        RuntimeError: in a step, ``grad_sample`` that is missing, of another shape, of different numbers of samples, or
            of a step before; nothing has changed then.

    There is no ``GradScaler`` for it: that skips steps where gradients overflow, which tells about them. Use bfloat16,
    or scale nothing. Under DistributedDataParallel or FSDP every rank has samples of its own; see the page.
    Paper: Abadi et al., "Deep Learning with Differential Privacy", 2016 (https://arxiv.org/abs/1607.00133); automatic
    clipping: Bu et al., 2022 (https://arxiv.org/abs/2206.07136).
    """

    _step_supports_amp_scaling = True  # so that a GradScaler shows itself, to be refused

    base: Optimizer
    """The optimizer that makes the steps; it shares ``param_groups`` and ``state``."""

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar,
        *,
        max_grad_norm: float,
        noise_multiplier: float | None = None,
        noise_std_sum: float | None = None,
        expected_batch_size: float,
        sample_rate: float,
        momentum: float | None = None,
        weight_decay: float | None = None,
        base: Callable[..., Optimizer] | None = None,
        clipping: str = "flat",
        sampler: Any = None,
        process_group: Any = None,
        generator: torch.Generator | None = None,
        noise_source: str = "default",
        allow_unused: bool = False,
    ) -> None:
        positive = "finite and > 0"
        check_number("lr", lr, 0.0, math.inf, positive, above=True)
        check_number("max_grad_norm", max_grad_norm, 0.0, math.inf, positive, above=True)
        check_number("expected_batch_size", expected_batch_size, 0.0, math.inf, positive, above=True)
        check_number("sample_rate", sample_rate, 0.0, math.nextafter(1.0, 2.0), "in (0, 1]", above=True)
        if (noise_multiplier is None) == (noise_std_sum is None):
            raise ValueError(
                f"give one of noise_multiplier and noise_std_sum, got {noise_multiplier!r} and {noise_std_sum!r}"
            )
        for name, value in (("noise_multiplier", noise_multiplier), ("noise_std_sum", noise_std_sum)):
            if value is not None:
                check_number(name, value, 0.0, math.inf, "finite and >= 0")
        if clipping not in _CLIPPINGS:
            raise ValueError(f"clipping must be one of {', '.join(_CLIPPINGS)}, got {clipping!r}")
        check_flags({"allow_unused": allow_unused}, "allow_unused")
        self._start()
        self.max_grad_norm, self.expected_batch_size = float(max_grad_norm), float(expected_batch_size)
        self.sample_rate = float(sample_rate)
        self.noise_std_sum = self._noise_std(noise_multiplier) if noise_std_sum is None else float(noise_std_sum)
        self._check_constants()
        self.clipping, self.allow_unused = clipping, allow_unused
        self._noise = _noise(noise_source, generator)
        self._error: dict[Tensor, Tensor] = {}
        options = {"momentum": momentum, "weight_decay": weight_decay}
        factory: Callable[..., Optimizer] = torch.optim.SGD if base is None else base
        made = factory(params, lr=lr, **{name: value for name, value in options.items() if value is not None})
        if not isinstance(made, Optimizer):
            raise TypeError(f"base must return a torch.optim.Optimizer, got {made!r}")
        for group in made.param_groups:
            _check_params(group)
        self.process_group = process_group
        self._ranks = self._count_ranks()
        if sampler is not None:
            self._check_sampler(sampler)
        super().__init__(made.param_groups, made.defaults)
        self.base = made
        self._share()
        self.param_groups[0]["history"] = []  # in the group, for there it is in every kind of checkpoint

    def _noise_std(self, multiplier: float | None) -> float:
        return cast(float, multiplier) * self.max_grad_norm

    def _check_constants(self) -> None:
        """Before every step: they are attributes, which may be changed between steps."""
        for name, sign, above in (
            ("max_grad_norm", ">", True),
            ("expected_batch_size", ">", True),
            ("noise_std_sum", ">=", False),
        ):
            check_number(name, getattr(self, name), 0.0, math.inf, f"finite and {sign} 0", above=above)
        check_number("sample_rate", self.sample_rate, 0.0, math.nextafter(1.0, 2.0), "in (0, 1]", above=True)
        if self._sums:
            for name, value in self._constants().items():
                if value != self._begun[name]:
                    raise RuntimeError(
                        f"{name} was changed from {self._begun[name]!r} to {value!r} between micro-batches of one batch"
                    )

    def _start(self) -> None:
        """Forget the samples of a batch under way, and which have been used."""
        self._sums: dict[Tensor, list[Tensor]] = {}  # of earlier micro-batches: clipped, and with an error the rest
        self._begun: dict[str, Any] = {}  # the constants that those were made with
        self._used: dict[int, tuple[weakref.ref[Any], int]] = {}  # by id, with the tensor's version

    def _share(self) -> None:
        self.param_groups, self.state, self.defaults = self.base.param_groups, self.base.state, self.base.defaults

    def _count_ranks(self) -> int:
        if self.process_group is None and not (torch.distributed.is_available() and dist.is_initialized()):
            return 1
        ranks = dist.get_world_size(self.process_group)
        settings: list[Any] = [None] * ranks
        dist.all_gather_object(settings, self._constants(), self.process_group)
        for other in settings:
            if different := [name for name, value in other.items() if value != settings[0][name]]:
                raise ValueError(f"{different[0]} must be the same on all ranks, got {settings}")
        return ranks

    def _constants(self) -> dict[str, Any]:
        names = ("max_grad_norm", "noise_std_sum", "expected_batch_size", "sample_rate", "clipping", "allow_unused")
        return {name: getattr(self, name) for name in names}

    def _check_sampler(self, sampler: Any) -> None:
        if isinstance(sampler, torch.utils.data.DataLoader):
            sampler = sampler.batch_sampler
        if not isinstance(sampler, PoissonSampler):
            raise ValueError(
                f"sampler must be a PoissonSampler or a DataLoader with one, got {type(sampler).__name__}: epsilon is "
                "that of batches that hold each example independently, which shuffled ones do not"
            )
        if sampler.sample_rate != self.sample_rate:
            raise ValueError(f"sample_rate is {self.sample_rate}, the sampler's is {sampler.sample_rate}")
        if sampler.num_replicas != self._ranks:
            raise ValueError(f"the sampler has num_replicas={sampler.num_replicas}, the process group {self._ranks}")

    def __repr__(self) -> str:
        constants = ", ".join(f"{name}={value!r}" for name, value in self._constants().items())
        return f"{type(self).__name__} ({constants})\n{self.base!r}"

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, as ``torch.optim`` does; they are private from the next step on."""
        if not hasattr(self, "base"):  # called by the constructor
            super().add_param_group(param_group)
            return
        params = param_group["params"]
        group = {**param_group, "params": [params] if isinstance(params, Tensor) else params}
        if isinstance(params, Iterator):
            group["params"] = list(params)
        _check_params(group)
        self.base.add_param_group(group)

    # The step

    @overload
    def step(self, closure: None = None, *, empty: bool = False) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, empty: bool = False) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, empty: bool = False) -> float | None:
        """Release a private gradient of the batch, and step along it.

        Args:
            closure: clears the gradients, computes the loss and calls ``backward``; called once.
            empty: the batch is known to have no samples, so that there was no forward pass; it makes a step of noise,
                as a batch of no samples does.

        Returns:
            What the closure returned: a number that is not private.
        """
        check_flags({"empty": empty}, "empty")
        if hasattr(self, "found_inf"):
            del self.found_inf
            raise RuntimeError(
                f"{type(self).__name__} takes no GradScaler: which steps it skips would depend on the data; use "
                "bfloat16 autocast without one"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for _, param in self._trained()]
        samples = self._samples(empty, pending=bool(self._sums) or empty)
        sums = self._add(samples)
        fed_back, kept = self._shares(params)
        grads, rests = [], []
        for param in params:
            clipped, *rest = sums.get(param) or self._zeros(param)
            grads.append(self._release(param, clipped, fed_back))
            rests.append([self._reduce(param, value) for value in rest])
        # Nothing has been changed so far. From here on the gradient counts as released.
        self._record()
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None  # one that was frozen after backward may have that of the batch, without noise
        for param, grad, rest in zip(params, grads, rests, strict=True):
            param.grad = grad
            for value in rest:
                self._keep(param, value, kept)
        self._clear(samples)
        self.base.step()
        return loss

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the samples in ``p.grad_sample`` to the sums of the batch, and free them; :meth:`step` ends the batch.

        Raises:
            RuntimeError: as :meth:`step`.
        """
        samples = self._samples(empty=False, pending=False)
        self._sums, self._begun = self._add(samples), self._constants()
        self._clear(samples, keep_sums=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, those of samples, and the sums of earlier micro-batches."""
        super().zero_grad(set_to_none)
        self._sums = {}
        self._clear_samples()

    def _clear_samples(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if getattr(param, "grad_sample", None) is not None:
                    param.grad_sample = None

    def _trained(self) -> Iterator[tuple[str, Any]]:
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"params[{i}] of group {number}" for i in range(len(group["params"]))]
            yield from ((n, p) for n, p in zip(names, group["params"], strict=True) if p.requires_grad)

    def _samples(self, empty: bool, pending: bool) -> dict[Tensor, list[Samples]]:
        """What is in ``grad_sample``, checked: for each parameter its micro-batches."""
        self._check_constants()
        found = [(name, param, micro_batches(param)) for name, param in self._trained()]
        present = [row for row in found if row[2]]
        if not present:
            if pending or (found and self.allow_unused):
                return {}
            raise RuntimeError(
                "no parameter has a grad_sample: attach PerSampleGradients to the model before its forward pass; for a "
                "batch that has no samples call step(empty=True)"
            )
        if empty:
            raise RuntimeError(f"the batch is said to be empty, but {present[0][0]} has a grad_sample")
        first, _, chunks = present[0]
        for name, param, own in found:
            if not own and not self.allow_unused:
                raise RuntimeError(f"{name} has no grad_sample; where it has no part in the loss, set allow_unused")
            if own and len(own) != len(chunks):
                raise RuntimeError(f"grad_sample of {name} is of {len(own)} micro-batches, of {first} {len(chunks)}")
            if len({*map(id, own)}) < len(own):
                raise RuntimeError(f"grad_sample of {name} has the same samples twice")
            for chunk, like in zip(own, chunks, strict=False):
                self._check(name, param, chunk)
                if chunk.shape[0] != like.shape[0]:  # the numbers are secret
                    raise RuntimeError(f"{name} and {first} have grad_sample of different numbers of samples")
        return {param: own for _, param, own in present}

    def _check(self, name: str, param: Tensor, found: Any) -> None:
        if not isinstance(found, Tensor | FactoredSamples):
            raise RuntimeError(f"grad_sample of {name} must be tensors, got {type(found).__name__}")
        chunk: Samples = found
        if len(chunk.shape) == 0 or chunk.shape[1:] != param.shape:
            raise RuntimeError(
                f"grad_sample of {name} must have shape (samples, {', '.join(map(str, param.shape))}), got one of "
                f"(samples, {', '.join(map(str, chunk.shape[1:]))})"
            )
        if isinstance(chunk, Tensor) and (chunk.layout is not torch.strided or not chunk.is_floating_point()):
            raise RuntimeError(f"grad_sample of {name} must be dense and real, got {chunk.layout}, {chunk.dtype}")
        if chunk.device != local(param).device:
            raise RuntimeError(f"grad_sample of {name} must be on {local(param).device}, got {chunk.device}")
        reference, version = self._used.get(id(chunk), (None, 0))
        if reference is not None and reference() is chunk and version == writes(chunk):
            raise RuntimeError(f"grad_sample of {name} has been used by a step before: it is of an old batch")

    def _add(self, samples: dict[Tensor, list[Samples]]) -> dict[Tensor, list[Tensor]]:
        """The sums with these samples added, in new tensors."""
        sums = dict(self._sums)
        if samples:
            new = weighted_sums([*samples.values()], self._weights([*samples.values()]))
            for param, values in zip(samples, new, strict=True):
                old = sums.get(param)
                sums[param] = values if old is None else [a + b for a, b in zip(values, old, strict=True)]
        return sums

    def _weights(self, samples: list[list[Samples]]) -> Tensor:
        """How much of each sample enters the clipped sum, and below it, with an error state, the rest."""
        sizes = norms(samples)
        margin = max(_MARGIN.get(chunk.dtype, 1 + 1e-6) for chunks in samples for chunk in chunks)
        if self.clipping == "automatic":
            weights = self.max_grad_norm / (sizes * margin + _GAMMA)
        else:
            weights = (self.max_grad_norm / (sizes * margin)).clamp(max=1)
        rows = [weights, 1 - weights] if self._error_norm > 0 else [weights]
        return torch.where(sizes.isfinite(), torch.stack(rows), 0.0)

    def _zeros(self, param: Any) -> list[Tensor]:
        """The sums of no samples."""
        tensor = local(param)
        zeros = torch.zeros(param.shape, dtype=_wide(param), device=tensor.device)
        return [zeros, zeros] if self._error_norm > 0 else [zeros]

    def _release(self, param: Any, clipped: Tensor, fed_back: float) -> Tensor:
        """The private gradient of a parameter: float64 until it is rounded to its dtype, once."""
        if self.noise_std_sum > 0 and self._draws(param):
            total = self._noise.normal(param.shape).to(clipped.device).mul_(self.noise_std_sum).add_(clipped)
        else:
            total = clipped.to(torch.float64, copy=True)
        total = self._reduce(param, total)
        if param in self._error:
            total.add_(local(self._error[param]), alpha=fed_back)
        return _like(param, total.div_(self.expected_batch_size).to(param.dtype))

    def _draws(self, param: Any) -> bool:
        """Whether this rank draws the noise of a parameter: one of those that share it."""
        if isinstance(param, _SHARDED):
            return not any(cast(Any, param).device_mesh.get_coordinate())
        return self._ranks == 1 or dist.get_rank(self.process_group) == 0

    def _reduce(self, param: Any, total: Tensor) -> Tensor:
        """The sum over ranks, as much of it as this rank holds of the parameter."""
        if isinstance(param, _SHARDED):
            mesh, placements = cast(Any, param).device_mesh, cast(Any, param).placements
            partial = DTensor.from_local(total, mesh, [Partial() for _ in placements], run_check=False)
            return partial.redistribute(placements=placements).to_local()
        if self._ranks > 1:
            total = total.clone()
            dist.all_reduce(total, group=self.process_group)
        return total

    # The error state, which only DiceSGD has

    _error_norm: float = 0.0
    windup_cap: bool = False

    def _shares(self, params: list[Tensor]) -> tuple[float, float]:
        """How much of the error state is fed back, and how much of it stays."""
        errors = [self._error[param] for param in params if param in self._error]
        if not errors:
            return 0.0, 1.0
        norm = float(sum_of_products(errors, errors)) ** 0.5
        margin = max(_MARGIN.get(error.dtype, 1 + 1e-6) for error in errors)
        fed_back = min(1.0, self._error_norm / (norm * margin)) if norm > 0 else 1.0
        rest = (1 - fed_back) * norm
        cap = min(1.0, self._error_norm / rest) if self.windup_cap and rest > 0 else 1.0
        return fed_back, (1 - fed_back) * cap

    def _keep(self, param: Any, rest: Tensor, kept: float) -> None:
        """The error state of a parameter after the step."""
        if param in self._error:
            error = local(self._error[param]).mul_(kept).add_(rest)
        else:
            error = rest.to(_wide(param), copy=True)
            self._error[param] = _like(param, error)
        # No bound of privacy rests on its value, but all of them on its being a number.
        largest = _LARGEST.get(error.dtype, torch.finfo(error.dtype).max)
        error.nan_to_num_(0.0, largest, -largest).clamp_(-largest, largest)

    # What is public

    @property
    def history(self) -> list[privacy.Segment]:
        """The steps so far, runs of equal ones together: all that :meth:`epsilon` depends on."""
        return [privacy.Segment(*row) for row in self.param_groups[0]["history"]]

    def epsilon(self, delta: float, *, accountant: str = "pld") -> float:
        r"""The :math:`\varepsilon` that all steps so far have, at this :math:`\delta`.

        Args:
            delta: in (0, 1); less than one over the size of the dataset.
            accountant: ``"pld"`` or ``"rdp"``, see :func:`optimzoo.privacy.epsilon`.

        It holds for batches of Poisson sampling at ``sample_rate``, and for adding or removing one example.
        """
        return privacy.epsilon(self.history, delta, accountant=accountant)

    def _record(self) -> None:
        step = (self.noise_std_sum, self.max_grad_norm, self._error_norm, self.sample_rate)
        *rest, last = self.param_groups[0]["history"] or [None]
        if last is not None and tuple(last[1:]) == step:
            rows = [*rest, (last[0] + 1, *step)]
        else:
            rows = [*self.param_groups[0]["history"], (1, *step)]
        self.param_groups[0]["history"] = rows  # not the old list: a state dict may hold it

    def _clear(self, samples: dict[Tensor, list[Samples]], keep_sums: bool = False) -> None:
        """Let go of the samples, and know them again."""
        used = {id(chunk): (weakref.ref(chunk), writes(chunk)) for chunks in samples.values() for chunk in chunks}
        self._used = {key: entry for key, entry in self._used.items() if entry[0]() is not None} | used
        self._clear_samples()
        if not keep_sums:
            self._sums = {}

    # Copies and checkpoints

    def state_dict(self, *, export_private_state: bool = False) -> dict[str, Any]:
        """What ``torch.optim`` keeps, with the history of steps in the first group.

        Args:
            export_private_state: add the error state, which is made of the data and not private; who gets it knows more
                than ``epsilon`` says. Default ``False``: a run that is resumed starts from an error of zero, and is as
                private.
        """
        state_dict = super().state_dict()
        if export_private_state:
            params = [param for group in self.param_groups for param in group["params"]]
            state_dict["private_error"] = {i: self._error[p] for i, p in enumerate(params) if p in self._error}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state, groups and history.

        Raises:
            ValueError: the dictionary does not fit, or has no history, so that nothing is known of its privacy.
        """
        load_state(self, state_dict, self._complete, self._restore)

    def _complete(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        rows = state_dict["param_groups"][0].get("history")
        if not isinstance(rows, list):
            raise ValueError(f"history of the first group must be a list of steps taken, got {rows!r}")
        privacy.check_history(rows)
        errors, params = state_dict.get("private_error", {}), [p for g in self.param_groups for p in g["params"]]
        if not isinstance(errors, dict):
            raise ValueError(f"private_error must be a dictionary, got {type(errors).__name__}")
        for index, error in errors.items():
            if index not in range(len(params)) or not isinstance(error, Tensor) or error.shape != params[index].shape:
                raise ValueError(f"private_error of parameter {index} does not fit")
        if errors and not any(row[0] for row in rows):
            raise ValueError("private_error is that of steps, and history has none")
        gone = _steps(self.param_groups[0]["history"]) - _steps(rows)
        self.base.load_state_dict(state_dict)
        if gone:
            warn(
                f"{gone.total()} steps that were made here are not in the history that is loaded, and not in epsilon: "
                "it is too small if anything they released has been shown or is used"
            )
        return {**state_dict, **self.base.state_dict()}  # what torch reads of groups is then as the base took it

    def _restore(self, loaded: dict[str, Any]) -> None:
        self._share()
        self._start()
        params = [param for group in self.param_groups for param in group["params"]]
        errors = loaded.get("private_error", {})
        self._error = {params[i]: errors[i].to(local(params[i]).device, _wide(params[i]), copy=True) for i in errors}
        if not errors:
            self._say_error_is_lost()

    def _say_error_is_lost(self) -> None:
        if any(segment.error_norm_sum > 0 for segment in self.history):
            warn("the error state is secret and was not saved: it starts from zero, which changes no privacy")

    def __getstate__(self) -> dict[str, Any]:
        if self._ranks > 1:
            raise TypeError(f"a {type(self).__name__} of several ranks cannot be copied or pickled: use its state dict")
        own = {"base": self.base, "process_group": None, "_ranks": 1, "_noise": self._noise}
        constants = {name: value for name, value in self._constants().items() if name != "error_norm_sum"}
        return {**super().__getstate__(), **constants, "_error_norm": self._error_norm, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "base" in state:
            self._error = {}
            self._start()
            self._share()
            self._say_error_is_lost()


class DiceSGD(DPSGD):
    r"""DP-SGD with error feedback: what clipping cut off is kept, and fed back within a bound of its own.

    .. math::
        u_t &= \frac1B \Bigl(\sum_{i \in \mathcal{B}_t} \mathrm{clip}(g_i, C_1) + \mathrm{clip}(E_t, C_2) + s z_t\Bigr),
        \qquad \mathrm{clip}(v, C) = v \min(1, C / \|v\|) \\
        E_{t+1} &= E_t - \mathrm{clip}(E_t, C_2) + \sum_{i \in \mathcal{B}_t} \bigl(g_i - \mathrm{clip}(g_i, C_1)\bigr),
        \qquad E_0 = 0

    Without noise its fixed points are those of SGD without clipping, if :math:`C_2 / B` is more than the norm of the
    mean clipped gradient there. The price is noise: :math:`E` is made of the data and released through
    :math:`\mathrm{clip}(E, C_2)` at every later step, without the help of sampling. ``docs/privacy`` has the theorem
    that :meth:`~DPSGD.epsilon` computes and what it costs: at :math:`C_2 = 0.01\, C_1` some 35 % more noise than DP-SGD
    for the same epsilon, at :math:`C_2 = C_1` fifty times as much.

    Args:
        params, lr: as in :class:`DPSGD`.
        error_norm_sum: :math:`C_2 \ge 0`, in units of the sum of gradients: :math:`B` times what it is in units of
            the mean. At zero this is DP-SGD.
        windup_cap: clip also what is left of the error by :math:`C_2`, so that it cannot grow. Default ``False``.
        privacy: ``"rigorous"``, or ``"paper"``: ``noise_multiplier`` then means :math:`s / \sqrt{C_1^2 + 2 C_2^2}`, as
            in the paper, and :meth:`epsilon` raises, for the claim behind it needs gradients that are bounded.
            Default ``"rigorous"``.
        **options: those of :class:`DPSGD`, which see also for what is raised.

    The error state is secret. It is not in ``state`` or ``state_dict()`` unless asked for by name, and no copy or
    pickle has it. A run that is resumed without it is as private; it starts to collect anew.
    Paper: Zhang, Bu, Wu, Hong, "Differentially Private SGD Without Clipping Bias: An Error-Feedback Approach", 2023
    (https://arxiv.org/abs/2311.14632).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar,
        *,
        max_grad_norm: float,
        error_norm_sum: float,
        windup_cap: bool = False,
        privacy: str = "rigorous",
        **options: Any,
    ) -> None:
        check_number("error_norm_sum", error_norm_sum, 0.0, math.inf, "finite and >= 0")
        check_flags({"windup_cap": windup_cap}, "windup_cap")
        if privacy not in ("rigorous", "paper"):
            raise ValueError(f"privacy must be rigorous or paper, got {privacy!r}")
        self._error_norm, self.windup_cap, self.privacy = float(error_norm_sum), windup_cap, privacy
        super().__init__(params, lr, max_grad_norm=max_grad_norm, **options)

    @property
    def error_norm_sum(self) -> float:
        """:math:`C_2`."""
        return self._error_norm

    def _noise_std(self, multiplier: float | None) -> float:
        if self.privacy == "rigorous":
            return super()._noise_std(multiplier)
        return cast(float, multiplier) * math.sqrt(self.max_grad_norm**2 + 2 * self._error_norm**2)

    def _constants(self) -> dict[str, Any]:
        own = {"error_norm_sum": self._error_norm, "windup_cap": self.windup_cap, "privacy": self.privacy}
        return {**super()._constants(), **own}

    def epsilon(self, delta: float, *, accountant: str = "pld") -> float:
        if self.privacy == "paper":
            raise RuntimeError(
                'no epsilon is known with privacy="paper": its noise is that of a theorem for gradients that are '
                "bounded, which nothing makes sure of; without that bound an attack finds more than it claims"
            )
        return super().epsilon(delta, accountant=accountant)

    epsilon.__doc__ = DPSGD.epsilon.__doc__


def _steps(history: list[Any]) -> Counter[tuple[float, ...]]:
    """How many steps were made with which settings."""
    counts: Counter[tuple[float, ...]] = Counter()
    for steps, *settings in history:
        counts[tuple(settings)] += steps
    return counts


def _noise(source: str, generator: torch.Generator | None) -> privacy.DefaultNoise | privacy.SecureNoise:
    if source not in _NOISES:
        raise ValueError(f"noise_source must be one of {', '.join(_NOISES)}, got {source!r}")
    if source == "default":
        return privacy.DefaultNoise(generator)
    if generator is not None:
        raise ValueError("noise_source='secure' takes no generator: nobody must know its seed")
    return privacy.SecureNoise()


def _check_params(group: Group) -> None:
    for param in group["params"]:
        if isinstance(param, tuple):
            param = param[1]
        if isinstance(param, Tensor) and (not param.is_floating_point() or param.layout is not torch.strided):
            raise ValueError(f"params must be real and dense, got {param.dtype} with layout {param.layout}")


def _wide(param: Any) -> torch.dtype:
    """The dtype of sums and of the error state."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _like(param: Any, tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, as a tensor that is sharded as the parameter is."""
    if not isinstance(param, _SHARDED):
        return tensor
    return DTensor.from_local(
        tensor,
        cast(Any, param).device_mesh,
        cast(Any, param).placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
