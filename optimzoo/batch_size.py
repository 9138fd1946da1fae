"""Batch sizes that grow with the noise of the gradient, and learning rates by the samples that were processed."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Container
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optimzoo.batch_sampler import AdaptiveBatchSampler, Batch, check_entries, split
from optimzoo.gradient_noise import MicroBatches, Moments, PerSample, Ranks
from optimzoo.optimizer import check_choice, check_int, check_number

_HAS_DISTRIBUTED = torch.distributed.is_available()
if _HAS_DISTRIBUTED:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

Test: TypeAlias = Literal["norm", "inner_product", "augmented", "coordinatewise"]
Source: TypeAlias = Literal["per_sample", "micro_batch", "ddp"]
TESTS = ("norm", "inner_product", "augmented", "coordinatewise")
SOURCES = ("per_sample", "micro_batch", "ddp")
_STATE = ("samples", "steps", "tests", "skips", "averages", "wanted", "noise_scale", "lr_factor", "first_batch_size")
_POWERS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


def next_batch_size(
    current: int,
    wanted: float,
    max_batch_size: int,
    *,
    min_batch_size: int | None = None,
    max_growth: float = math.inf,
) -> int:
    """The batch size after a test that asks for ``wanted`` samples.

    Args:
        current: the batch size so far.
        wanted: what the test asks for, which may be infinite. NaN changes nothing.
        max_batch_size: the most there may be.
        min_batch_size: how far it may shrink. Default: not at all.
        max_growth: the largest ratio of the answer to ``current``, but for one sample more, which there may always be.
    """
    if math.isnan(wanted):
        return current
    low = current if min_batch_size is None else min_batch_size
    high: float = max_batch_size
    if max_growth < math.inf:
        high = min(high, max(current + 1, math.floor(max_growth * current)))
    return int(min(max(low, math.ceil(wanted) if wanted < high else high), high))


class AdaptiveBatchSize:
    r"""Lets the batch grow when a test finds too much noise in the gradient.

    With :math:`b` samples whose gradients have the mean :math:`\bar g` and the variance :math:`V` (the trace of their
    covariance), all parameters as one vector, the test and the batch size that would pass it are

    .. math::
        \text{norm:} \quad & V/b \le \eta^2 \|\bar g\|^2, &
        T &= V / (\eta^2 \|\bar g\|^2) \\
        \text{inner product:} \quad & \mathrm{Var}\langle g_i, \bar g\rangle / b \le \vartheta^2 \|\bar g\|^4, &
        T &= \mathrm{Var}\langle g_i, \bar g\rangle / (\vartheta^2 \|\bar g\|^4) \\
        \text{orthogonality:} \quad & V_\perp/b \le \nu^2 \|\bar g\|^2, &
        T &= V_\perp / (\nu^2 \|\bar g\|^2) \\
        \text{coordinates:} \quad & V_j/b \le \eta^2 \bar g_j^2, & T &= \max_j V_j / (\eta^2 \bar g_j^2)

    with :math:`V_\perp = V - \mathrm{Var}\langle g_i, \bar g\rangle / \|\bar g\|^2`. Where :math:`T > b`, the next
    batch has :math:`\lceil T \rceil` samples. ``augmented`` is the inner product and the orthogonality test, and
    takes the larger :math:`T`.

    Args:
        optimizer: any. With ``torch.optim.Adagrad`` the method is AdAdaGrad, with :class:`~optimzoo.AdaGradNorm`
            AdAdaGradNorm.
        sampler: the :class:`AdaptiveBatchSampler` that the loader draws from.
        test: ``"norm"``, ``"inner_product"``, ``"augmented"`` or ``"coordinatewise"``.
        eta: :math:`\eta > 0` of the norm and coordinate tests. Default 0.1. With no gradient but noise the batch grows
            :math:`1/\eta^2`-fold in one test, on average; from 1 on it hardly ever grows.
        theta, nu: :math:`\vartheta > 0` and :math:`\nu > 0`. Default 0.1.
        source: where the variance comes from: ``"per_sample"``, ``p.grad_sample`` of shape (samples, \*p.shape), or a
            list of such for several micro-batches, each the gradient of one sample's own loss; ``"micro_batch"``, the
            gradients of the micro-batches of one batch; ``"ddp"``, those of the ranks. Default: ``"ddp"`` with a DDP
            model, ``"micro_batch"`` if the sampler splits its batches, else ``"per_sample"``.
        model: for ``"ddp"`` the ``DistributedDataParallel`` model, whose communication hook is used; else a module in
            which batch normalisation is looked for.
        test_interval: test each so many steps. Default 1.
        ema: weight of the past in the averages of variance and squared norm, which are smoothed each by itself; in
            [0, 1). Default 0.
        max_growth: the largest factor in one test, > 1, before the batch is rounded up to equal micro-batches.
            Default: none.
        monotone: never shrink. Default ``True``. Otherwise the first batch size is the least.
        unbiased: subtract from :math:`\|\bar g\|^2` the part that is due to noise, :math:`V/b`, where that leaves
            something. Default ``False``.
        quantile: of the coordinates, in place of the maximum; in (0, 1]. One coordinate without a gradient suffices
            for the largest batch, so that the maximum is of little use in a deep network. Default 1.
        lr_coupling: ``"none"``, ``"sqrt"`` or ``"linear"``: multiply the learning rates by that power of the growth of
            the batch. Default ``"none"``, as in the paper.

    Raises:
        TypeError: the sampler is not an :class:`AdaptiveBatchSampler`.
        ValueError: an argument is out of range, or the source cannot be had: ``"ddp"`` with one rank,
            ``"micro_batch"`` with one micro-batch or plain parameters on several ranks, ``"per_sample"`` with one
            sample or batch normalisation.

    Call :meth:`step` after the optimizer's, once for each batch. Statistics are those of the gradients as ``backward``
    leaves them: before clipping, and whatever the optimizer does. A test is skipped, and counted in ``skips``, where
    there are fewer than two groups, or a gradient that is zero or not finite. Papers: Lau, Liu, Kolar, 2024
    (https://arxiv.org/abs/2402.11215); Byrd et al., 2012 (norm test); Bollapragada et al., 2018 (the others).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sampler: AdaptiveBatchSampler,
        test: Test = "norm",
        eta: float = 0.1,
        theta: float = 0.1,
        nu: float = 0.1,
        *,
        source: Source | None = None,
        model: nn.Module | None = None,
        test_interval: int = 1,
        ema: float = 0.0,
        max_growth: float = math.inf,
        monotone: bool = True,
        unbiased: bool = False,
        quantile: float = 1.0,
        lr_coupling: Literal["none", "sqrt", "linear"] = "none",
    ) -> None:
        if not isinstance(sampler, AdaptiveBatchSampler):
            raise TypeError(
                f"sampler must be the AdaptiveBatchSampler that the DataLoader has as batch_sampler, got {sampler!r}"
            )
        check_choice("test", test, TESTS)
        check_choice("lr_coupling", lr_coupling, tuple(_POWERS))
        for name, value in (("eta", eta), ("theta", theta), ("nu", nu)):
            check_number(name, value, 0.0, math.inf, "finite and > 0", above=True)
        check_int("test_interval", test_interval, 1)
        check_number("ema", ema, 0.0, 1.0, "in [0, 1)")
        if max_growth != math.inf:
            check_number("max_growth", max_growth, 1.0, math.inf, "> 1", above=True)
        check_number("quantile", quantile, 0.0, math.nextafter(1.0, 2.0), "in (0, 1]", above=True)
        if test == "coordinatewise" and ema > 0:
            raise ValueError(f"ema must be 0 for the coordinatewise test, which has no sum to smooth, got {ema!r}")
        self.optimizer, self.sampler = optimizer, sampler
        self.test, self.eta, self.theta, self.nu = test, eta, theta, nu
        self.test_interval, self.ema, self.max_growth = test_interval, ema, max_growth
        self.monotone, self.unbiased, self.quantile, self.lr_coupling = monotone, unbiased, quantile, lr_coupling
        self.first_batch_size = sampler.batch_size
        self.samples, self.steps, self.tests, self.skips = 0, 0, 0, 0
        self.averages: list[list[float]] = []  # of each part of the test: variance and bound
        self.wanted = math.nan
        """:math:`T` of the last test: the batch size that would just have passed it."""
        self.noise_scale = math.nan
        """:math:`V / \\|\\bar g\\|^2` at the last test, in samples: the simple gradient noise scale."""
        self.lr_factor = 1.0
        """What ``lr_coupling`` has multiplied the learning rates by."""
        self._batch: Batch | None = None  # that the last backward pass was of
        self._passes = 0  # backward passes of that batch
        self._tested = False  # whether that batch is
        self._task = -1  # the graph task of the backward pass under way
        self._ended = -1  # and of the last that came to its end
        self._watched: dict[Tensor, Any] = {}
        weakref.finalize(self, _forget, self._watched, ()).atexit = False
        self.largest = self._split(sampler.max_batch_size)
        """The largest batch size that the sampler's maximum and the split allow."""
        self.source = self._choose(source, model)
        self._group: Any = None  # the process group of the ranks; None: the default
        if sampler.num_replicas > 1:
            self._group = self._find_group(model)
        self._source: PerSample | MicroBatches | Ranks
        if self.source == "ddp":
            self._source = Ranks(self, cast("DistributedDataParallel", model))
        else:
            self._source = MicroBatches(self) if self.source == "micro_batch" else PerSample(self)
        self._watch()

    def _choose(self, source: Source | None, model: nn.Module | None) -> Source:
        """The source, if it can be had."""
        sampler = self.sampler
        ranks, passes = sampler.num_replicas, sampler.accumulation_steps
        ddp = _HAS_DISTRIBUTED and isinstance(model, DistributedDataParallel)
        sharded = _HAS_DISTRIBUTED and any(isinstance(param, DTensor) for param in self.params)
        if source is None:
            source = "ddp" if ddp else "micro_batch" if passes > 1 else "per_sample"
        check_choice("source", source, SOURCES)
        problem = ""
        if source == "ddp":
            if not ddp:
                problem = "needs model=, a DistributedDataParallel; for FSDP2 use source='micro_batch'"
            elif ranks < 2:
                problem = f"needs two ranks or more, the sampler has num_replicas={ranks}"
        elif source == "micro_batch":
            if passes < 2:
                problem = (
                    "needs two micro-batches or more in a batch, the sampler has "
                    f"min_accumulation_steps={sampler.min_accumulation_steps} for batch_size={sampler.batch_size}"
                )
            elif ranks > 1 and not sharded:
                problem = "needs sharded parameters (FSDP2) on several ranks; for DDP use source='ddp' and model="
        else:
            if sampler.batch_size < 2:
                problem = "needs two samples or more in a batch, the sampler has batch_size=1"
            elif sharded:
                problem = "needs whole parameters; for FSDP2 use source='micro_batch'"
            elif model is not None and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
                problem = (
                    "has no meaning with batch normalisation, where a sample's gradient depends on the others: "
                    "use GroupNorm, or source='micro_batch' or 'ddp'"
                )
        if not problem and self.test == "coordinatewise" and (source == "ddp" or sharded):
            problem = "does not go with test='coordinatewise', which needs whole gradients of every group"
        if problem:
            raise ValueError(f"source={source!r} {problem}")
        return source

    def _find_group(self, model: nn.Module | None) -> Any:
        """The process group of the ranks that share a batch: that of a DDP model, or the default."""
        sampler = self.sampler
        if not (_HAS_DISTRIBUTED and dist.is_initialized()):
            raise ValueError(f"the sampler has num_replicas={sampler.num_replicas}, but there is no process group")
        group = model.process_group if isinstance(model, DistributedDataParallel) else None
        if (size := dist.get_world_size(group)) != sampler.num_replicas:
            which = "the default process group" if group is None else "the process group of model"
            raise ValueError(
                f"{which} has {size} ranks, the sampler has num_replicas={sampler.num_replicas}: they must be the same"
            )
        found: list[Any] = [None] * size
        dist.all_gather_object(found, (sampler.seed, sampler.rank), group)
        seeds, ranks = zip(*found, strict=True)
        if len({*seeds}) > 1 or sorted(ranks) != [*range(size)]:
            raise ValueError(
                f"the samplers of the {size} ranks have seeds {[*seeds]} and rank={[*ranks]}: give them the same seed, "
                "by generators in equal states, and each its own rank"
            )
        return group

    @property
    def params(self) -> list[Tensor]:
        """The optimizer's parameters that are trained."""
        return [param for group in self.optimizer.param_groups for param in group["params"] if param.requires_grad]

    @property
    def batch_size(self) -> int:
        """The size of the batch under way, over all ranks and micro-batches."""
        current = self.sampler.current
        return current.batch_size if current else self.sampler.batch_size

    @property
    def accumulation_steps(self) -> int:
        """How many micro-batches the batch under way has."""
        current = self.sampler.current
        return len(current.shares) if current else self.sampler.accumulation_steps

    @property
    def remaining(self) -> int:
        """How many micro-batches of the batch under way still need their backward pass; 0: step."""
        return self.accumulation_steps - self._index

    @property
    def weight(self) -> float:
        """What to multiply the mean loss of the micro-batch under way by, so that gradients add up to the batch's mean.

        It is ``1 / accumulation_steps`` where micro-batches are equal.
        """
        current = self.sampler.current
        if current is None or self.remaining < 1:
            return 1 / self.accumulation_steps
        return current.shares[self._index] * self.sampler.num_replicas / current.samples

    @property
    def _index(self) -> int:
        """Backward passes of the batch under way; a loop that was left in the middle of one begins another."""
        if torch._C._current_graph_task_id() == -1:
            self._task = -1  # of a pass that failed, if any
        return self._passes if self._batch is self.sampler.current else 0

    @property
    def needs_stats(self) -> bool:
        """Whether the batch under way will be tested; that is settled by its first backward pass."""
        if self._index > 0:
            return self._tested
        return not self.over and (self.steps + 1) % self.test_interval == 0

    @property
    def over(self) -> bool:
        """Whether there will be no more tests, because the batch is as large as it may be."""
        return self.monotone and self.sampler.batch_size >= self.largest

    def step(self) -> None:
        """Count the batch, test it and set the size of the next.

        Raises:
            RuntimeError: nothing was drawn from the sampler, a backward pass is missing, or there is no variance to be
                found. Nothing has changed then.
        """
        batch = self.sampler.current
        if batch is None:
            self.sampler.advance()  # raises
        assert batch is not None
        if self.remaining and not (self.source == "per_sample" and self._index == 0):
            raise RuntimeError(
                f"{self._index} backward passes were seen for a batch of {len(batch.shares)} micro-batches; step only "
                "where schedule.remaining is 0, and call backward once for each micro-batch"
            )
        if self._index == 0 and len(batch.shares) > 1:  # of per_sample alone
            raise RuntimeError(
                f"the batch comes in {len(batch.shares)} micro-batches and no backward pass was seen: torch.func runs "
                "none that could be counted. Leave out max_micro_batch_size and min_accumulation_steps; vmap has a "
                "chunk_size to bound its memory"
            )
        moments = self._source.read(batch) if self.needs_stats else None
        self.sampler.advance()
        self.samples += batch.samples
        self.steps += 1
        if moments is not None:
            self._grow(moments)
        self._source.clear()
        self._couple()
        self._watch()

    def _grow(self, moments: Moments) -> None:
        wanted = self._wanted(moments)
        if math.isnan(wanted):
            self.skips += 1
        else:
            self.tests += 1
            self.wanted, self.noise_scale = wanted, moments.variance / moments.mean_square
        size = self._split(
            next_batch_size(
                self.sampler.batch_size,
                wanted,
                self.sampler.max_batch_size,
                min_batch_size=None if self.monotone else self.first_batch_size,
                max_growth=self.max_growth,
            )
        )
        if self.sampler.num_replicas > 1:  # sums may differ in a last bit between ranks
            answer = torch.tensor(size, device=self.params[0].device)
            dist.broadcast(answer, group=self._group, group_src=0)
            size = int(answer)
        if size > self.sampler.batch_size or not self.monotone:
            self.sampler.batch_size = size

    def _wanted(self, moments: Moments) -> float:
        """The batch size that would just pass the test, NaN where there is none."""
        if not moments.usable:
            return math.nan
        square = moments.mean_square
        if self.unbiased:
            less = square - moments.variance / moments.samples
            square = less if less > 0 else square
        parts = moments.parts(self.test, square)
        if not all(0 < bound < math.inf for _, bound in parts):  # a square that under- or overflows
            return math.nan
        if not self.averages:
            self.averages = [[0.0, 0.0] for _ in parts]
        for average, part in zip(self.averages, parts, strict=True):
            old = average if self.ema > 0 else [0.0, 0.0]  # 0 times an infinite ratio of coordinates is NaN
            average[:] = [self.ema * past + (1 - self.ema) * new for past, new in zip(old, part, strict=True)]
        thresholds = {"inner_product": [self.theta], "augmented": [self.theta, self.nu]}.get(self.test, [self.eta])
        bounds = [bound * bound * g for (_, g), bound in zip(self.averages, thresholds, strict=True)]
        if min(bounds) == 0:
            return math.nan
        return max(v / bound for (v, _), bound in zip(self.averages, bounds, strict=True))

    def _split(self, batch_size: int) -> int:
        sampler = self.sampler
        ranks, limit = sampler.num_replicas, sampler.max_batch_size
        batch_size = min(batch_size, limit // ranks * ranks)
        return split(batch_size, ranks, sampler.max_micro_batch_size, sampler.min_accumulation_steps, limit).batch_size

    def _couple(self) -> None:
        """Bring the learning rates to the size of the batch that comes next, which was drawn some steps ago."""
        factor = (self.batch_size / self.first_batch_size) ** _POWERS[self.lr_coupling]
        if factor != self.lr_factor:
            shared = {id(group["lr"]): group["lr"] for group in self.optimizer.param_groups}
            for lr in shared.values():
                if isinstance(lr, Tensor):  # groups may have the same one
                    lr.mul_(factor / self.lr_factor)
            for group in self.optimizer.param_groups:
                if not isinstance(group["lr"], Tensor):
                    group["lr"] *= factor / self.lr_factor
            self.lr_factor = factor

    def _watch(self) -> None:
        """Count backward passes by hooks on the parameters, those that were added or thawed too."""
        own = weakref.ref(self)

        def seen(param: Tensor) -> None:
            schedule = own()
            if schedule is None or schedule._task != -1:  # seen, or a pass within the one that was
                return
            task = torch._C._current_graph_task_id()
            if task < schedule._ended:
                raise RuntimeError(
                    "a backward pass has ended within this one, before a gradient of its own: AdaptiveBatchSize cannot "
                    "count them. Use checkpoint(..., use_reentrant=False)"
                )
            schedule._task = task
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(schedule._end_pass)

        params = {*self.params}
        _forget(self._watched, params)
        for param in params:
            if param not in self._watched:
                self._watched[param] = param.register_post_accumulate_grad_hook(seen)  # type: ignore[no-untyped-call]

    def _end_pass(self) -> None:
        """What happens when a backward pass has left its gradients."""
        self._task, self._ended = -1, self._task
        batch, index, needed = self.sampler.current, self._index, self.needs_stats
        if batch is None:
            return
        if index >= min(self.sampler._handed, len(batch.shares)):
            raise RuntimeError(
                f"backward pass {index + 1} of a batch of {len(batch.shares)} micro-batches, of which "
                f"{self.sampler._handed} were drawn: call backward once for each micro-batch. A closure that an "
                "optimizer evaluates several times, and checkpoint(..., use_reentrant=True) around all that is "
                "trained, run more"
            )
        self._batch, self._passes, self._tested = batch, index + 1, needed
        if needed:
            self._source.end_pass(batch, index)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on the device of the parameters if there are several."""
        if self.sampler.num_replicas > 1:
            device = self.params[0].device
            moved = tensor.to(device)
            dist.all_reduce(moved, group=self._group)
            if moved is not tensor:
                tensor.copy_(moved)
        return tensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an AdaptiveBatchSize cannot be copied or pickled, as it is tied to its parameters by hooks: "
            "use its state dict"
        )

    def state_dict(self) -> dict[str, Any]:
        """What was counted and averaged; the sampler has a state of its own."""
        return copy.deepcopy({name: getattr(self, name) for name in _STATE})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what a state dict counted and averaged. Load the sampler's and the optimizer's as well.

        Raises:
            ValueError: an entry is missing, out of range, or of another test. Nothing has changed then.
        """
        check_entries(state_dict, _STATE)
        for name in ("samples", "steps", "tests", "skips"):
            check_int(name, state_dict[name], 0)
        check_int("first_batch_size", state_dict["first_batch_size"], 1)
        for name in ("wanted", "noise_scale"):  # infinite or NaN where there was no finite one
            if not isinstance(state_dict[name], float):
                raise ValueError(f"{name} must be a float, got {state_dict[name]!r}")
        check_number("lr_factor", state_dict["lr_factor"], 0.0, math.inf, "finite and > 0", above=True)
        averages, parts = state_dict["averages"], 2 if self.test == "augmented" else 1
        if not (
            isinstance(averages, list)
            and len(averages) in (0, parts)
            and all(isinstance(pair, list) and len(pair) == 2 for pair in averages)
            and all(isinstance(value, float) and value >= 0 for pair in averages for value in pair)
        ):
            raise ValueError(f"averages must be {parts} pairs of numbers >= 0 for test={self.test!r}, got {averages!r}")
        for name in _STATE:
            setattr(self, name, copy.deepcopy(state_dict[name]))
        self._source.clear()
        self._batch = None


class SamplesLR(LRScheduler):
    r"""Learning rates that follow a warm-up and half a cosine by the samples that were processed.

    .. math::
        \gamma(s) = \begin{cases} \gamma\, s / s_w & s < s_w \\
        \gamma_{\min} + (\gamma - \gamma_{\min})
        \left(1 + \cos \pi \frac{s - s_w}{s_\text{end} - s_w}\right) / 2 & s_w \le s < s_\text{end} \\
        \gamma_{\min} & s \ge s_\text{end} \end{cases}

    A schedule by steps would end early or late where the batch grows. The factor of ``lr_coupling`` comes on top.

    Args:
        schedule: the :class:`AdaptiveBatchSize` that counts samples. Step it first.
        total_samples: :math:`s_\text{end}`, > ``warmup_samples``.
        warmup_samples: :math:`s_w \ge 0`. Default 0.
        min_lr: :math:`\gamma_{\min}`, >= 0. Default 0.

    Raises:
        TypeError: the schedule is not an :class:`AdaptiveBatchSize`, or a number is none.
        ValueError: an argument is out of range.
    """

    def __init__(
        self, schedule: AdaptiveBatchSize, total_samples: float, warmup_samples: float = 0, min_lr: float = 0.0
    ) -> None:
        check_number("warmup_samples", warmup_samples, 0.0, math.inf, "finite and >= 0")
        check_number("total_samples", total_samples, warmup_samples, math.inf, "> warmup_samples", above=True)
        check_number("min_lr", min_lr, 0.0, math.inf, "finite and >= 0")
        if not isinstance(schedule, AdaptiveBatchSize):
            raise TypeError(f"schedule must be the AdaptiveBatchSize that counts samples, got {schedule!r}")
        self.schedule = schedule
        self.total_samples, self.warmup_samples, self.min_lr = total_samples, warmup_samples, min_lr
        super().__init__(schedule.optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group."""
        return [self.schedule.lr_factor * self.rate(float(base), self.schedule.samples) for base in self.base_lrs]

    def rate(self, base: float, samples: float) -> float:
        """The learning rate after so many samples where the peak is ``base``."""
        if samples < self.warmup_samples:
            return base * samples / self.warmup_samples
        progress = min(1.0, (samples - self.warmup_samples) / (self.total_samples - self.warmup_samples))
        return self.min_lr + (base - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer and the schedule."""
        return {name: value for name, value in super().state_dict().items() if name != "schedule"}


def _forget(watched: dict[Tensor, Any], keep: Container[Tensor]) -> None:
    """Remove the hooks of parameters that are not to be kept."""
    for param in [param for param in watched if param not in keep]:
        watched.pop(param).remove()
