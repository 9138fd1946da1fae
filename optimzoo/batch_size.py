"""Batch sizes that grow with the noise of the gradient: tests, sampler, schedule, learning rates by samples."""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler

from optimzoo import ops
from optimzoo.optimizer import _is_native, check_number, local, sum_of_products

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


class Moments(NamedTuple):
    r"""Sums over groups of samples, from which all tests follow.

    Group :math:`w` has :math:`n_w` samples and the mean gradient :math:`g_w`; :math:`\bar g` is the mean over all
    samples. A group may be a single sample.
    """

    groups: int
    """:math:`M`, the number of groups."""
    samples: int
    r""":math:`N = \sum_w n_w`."""
    squares: float
    r""":math:`\sum_w n_w \|g_w\|^2`."""
    mean_square: float
    r""":math:`\|\bar g\|^2`."""
    inner_squares: float = math.nan
    r""":math:`\sum_w n_w \langle g_w, \bar g\rangle^2`."""
    worst: float = math.nan
    r"""A quantile over coordinates of the variance over :math:`\bar g_j^2`."""

    @property
    def variance(self) -> float:
        """The trace of the covariance of a sample's gradient."""
        return max(0.0, (self.squares - self.samples * self.mean_square) / (self.groups - 1))

    @property
    def inner_variance(self) -> float:
        """The variance of the inner product of a sample's gradient with the mean."""
        return max(0.0, (self.inner_squares - self.samples * self.mean_square * self.mean_square) / (self.groups - 1))

    @property
    def orthogonal_variance(self) -> float:
        """The part of the variance that is orthogonal to the mean."""
        return max(0.0, self.variance - self.inner_variance / self.mean_square)

    @property
    def usable(self) -> bool:
        """Whether there is a variance and a gradient to compare it with, both finite."""
        if self.groups < 2 or not (0 < self.mean_square < math.inf and self.squares < math.inf):
            return False
        return self.inner_squares != math.inf and 0 < self.mean_square * self.mean_square < math.inf

    def parts(self, test: str, mean_square: float | None = None) -> list[tuple[float, float]]:
        r"""What a test compares: for each of its parts a variance and the square that bounds it.

        Args:
            test: its name.
            mean_square: what stands for :math:`\|\bar g\|^2` in the bound. Default: itself.
        """
        square = self.mean_square if mean_square is None else mean_square
        norm, inner = (self.variance, square), (self.inner_variance, square * square)
        orthogonal = (self.orthogonal_variance, square)
        return {
            "norm": [norm],
            "inner_product": [inner],
            "augmented": [inner, orthogonal],
            "coordinatewise": [(self.worst, 1.0)],
        }[test]


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


class Split(NamedTuple):
    """A batch as equal micro-batches on all ranks."""

    accumulation_steps: int
    micro_batch_size: int
    batch_size: int


def split(
    batch_size: int, ranks: int = 1, max_micro_batch_size: int | None = None, first: int = 1, limit: int | None = None
) -> Split:
    """Round a batch size up to equal micro-batches, or down where it would exceed ``limit``.

    Args:
        batch_size: over all ranks.
        ranks: that share the batch.
        max_micro_batch_size: the most samples in one backward pass of one rank. Default: no bound.
        first: the fewest micro-batches.
        limit: the largest batch over all ranks. Default: no bound.

    Raises:
        ValueError: no batch within the limit has a sample for each micro-batch of each rank.
    """
    steps = first if max_micro_batch_size is None else max(first, -(-batch_size // (ranks * max_micro_batch_size)))
    micro = -(-batch_size // (ranks * steps))
    if limit is not None and ranks * steps * micro > limit:
        micro = limit // (ranks * steps)
    if micro < 1:
        raise ValueError(f"no batch of at most {limit} has a sample for {steps} micro-batches of {ranks} ranks")
    return Split(steps, micro, ranks * steps * micro)


class Batch(NamedTuple):
    """One batch as it was drawn."""

    batch_size: int  # that was in force; the last batch of an epoch may have fewer samples
    shares: tuple[int, ...]  # the samples of this rank's micro-batches
    totals: tuple[int, ...]  # those of all ranks'

    @property
    def samples(self) -> int:
        return sum(self.totals)


class AdaptiveBatchSampler(Sampler[list[int]]):
    """Draws the indices of batches whose size may change between one and the next.

    An epoch is one permutation, which depends on seed and epoch alone: a change of size moves where it is cut. Every
    sample is drawn once per epoch, whatever the sizes. It goes to ``DataLoader(dataset, batch_sampler=sampler)``; each
    batch of the loader is one micro-batch of this rank.

    Args:
        dataset: anything that has a length.
        batch_size: samples of the first batches, over all ranks and micro-batches; an int >= 1.
        max_batch_size: the most that it may become. Default: the length of the dataset.
        max_micro_batch_size: the most samples of one loader's batch. A larger batch comes in as many micro-batches as
            it takes, as equal as can be. Default: no bound.
        min_accumulation_steps: the fewest micro-batches of a batch. Their variance needs two, and is the less noisy the
            more there are. Default 1.
        shuffle: draw in random order. Default ``True``.
        drop_last: leave out what remains of an epoch when it is less than a batch. Default ``False``.
        generator: draws the seed, once. Default: torch's own. All ranks use the first rank's seed.
        num_replicas, rank: how many processes share a batch, and which this is. Default: those of the default process
            group, or one.

    Raises:
        TypeError: the dataset has no length.
        ValueError: a number is not an int or out of range; the message names it.

    ``batch_size`` can be set at any time, by a schedule or by hand. It is read when a batch is drawn, and a loader with
    ``num_workers > 0`` draws ``num_workers * prefetch_factor`` micro-batches ahead: so late a new size arrives, and
    never within a batch. What has been drawn counts as used when :meth:`advance` is called, as
    :class:`AdaptiveBatchSize` does in each step. Iteration starts behind the last batch that was used, in the middle of
    an epoch too, and the next epoch begins by itself.

    The state dict has seed, epoch, the position used and the sizes that were drawn ahead: a loader with as many workers
    goes on with the same batches, bit for bit. Where fewer samples than ranks would be left for a last batch, the one
    before it gives up as many as it takes, or has them as well if it is too small for that: the only batch that may
    exceed ``max_batch_size``, by fewer samples than there are ranks.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        max_batch_size: int | None = None,
        max_micro_batch_size: int | None = None,
        min_accumulation_steps: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset must have a length, got {type(dataset).__name__}")
        self.length = len(dataset)
        grouped = _HAS_DISTRIBUTED and dist.is_initialized()
        self.num_replicas = num_replicas if num_replicas is not None else dist.get_world_size() if grouped else 1
        self.rank = rank if rank is not None else dist.get_rank() if grouped else 0
        _check_int("num_replicas", self.num_replicas, 1, max(1, self.length))
        _check_int("rank", self.rank, 0, self.num_replicas - 1)
        self.max_batch_size = self.length if max_batch_size is None else max_batch_size
        _check_int("max_batch_size", self.max_batch_size, self.num_replicas, self.length)
        self.max_micro_batch_size = max_micro_batch_size
        if max_micro_batch_size is not None:
            _check_int("max_micro_batch_size", max_micro_batch_size, 1, math.inf)
        _check_int("min_accumulation_steps", min_accumulation_steps, 1, math.inf)
        self.min_accumulation_steps = min_accumulation_steps
        self.batch_size = batch_size
        self.shuffle, self.drop_last = shuffle, drop_last
        seed = [int(torch.empty((), dtype=torch.int64).random_(generator=generator))]
        if grouped and self.num_replicas == dist.get_world_size() > 1:
            dist.broadcast_object_list(seed, 0)
        self.seed = seed[0]
        self.epoch = 0
        self.position = 0  # samples of this epoch that were used
        self._drawn: deque[Batch] = deque()  # and not yet used
        self._planned: list[int] = []  # sizes that a loaded state had drawn
        self._at = 0  # samples of this epoch that were drawn
        self._yielded = 0  # micro-batches of the batches that this iteration drew

    @property
    def batch_size(self) -> int:
        """Samples of the next batch that is drawn, over all ranks and micro-batches."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        _check_int("batch_size", value, self.num_replicas, self.max_batch_size)
        if self._steps(value) * self.num_replicas > value:
            raise ValueError(
                f"batch_size={value!r} has no sample for each of {self._steps(value)} micro-batches of "
                f"{self.num_replicas} ranks, with max_micro_batch_size={self.max_micro_batch_size} and "
                f"min_accumulation_steps={self.min_accumulation_steps}"
            )
        self._batch_size = value

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of the next batch that is drawn."""
        return self._steps(self.batch_size)

    def _steps(self, batch_size: int) -> int:
        return split(
            batch_size, self.num_replicas, self.max_micro_batch_size, self.min_accumulation_steps
        ).accumulation_steps

    @property
    def current(self) -> Batch | None:
        """The batch under way: the first that was drawn and not used."""
        return self._drawn[0] if self._drawn else None

    def _cut(self, left: int, batch_size: int) -> Batch:
        """The next batch where so many samples are left."""
        ranks, samples = self.num_replicas, min(batch_size, left)
        if 0 < left - samples < ranks and not self.drop_last:
            samples = left - ranks if left >= 2 * ranks else left
        steps = max(1, min(self._steps(batch_size), samples // ranks))
        shares = _even(samples, steps * ranks)
        mine = tuple(shares[self.rank :: ranks])
        return Batch(batch_size, mine, tuple(sum(shares[i : i + ranks]) for i in range(0, len(shares), ranks)))

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.length)
        mixed = (self.seed * 0x9E3779B97F4A7C15 + self.epoch * 0xD1B54A32D192ED03) % 2**63
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(mixed))

    def __iter__(self) -> Iterator[list[int]]:
        drawn = self._drawn = deque()
        planned, self._planned = deque(self._planned), []
        self._at, self._yielded = self.position, 0
        order = self._order()
        while drawn is self._drawn:  # a newer iteration, or the next epoch, ends this one
            size = planned.popleft() if planned else self.batch_size
            left = self.length - self._at
            if left < (size if self.drop_last else 1):
                break
            batch = self._cut(left, size)
            drawn.append(batch)
            start = self._at
            self._at, self._yielded = start + batch.samples, self._yielded + len(batch.shares)
            ranks, shares = self.num_replicas, _even(batch.samples, len(batch.shares) * self.num_replicas)
            for i, share in enumerate(shares):
                if i % ranks == self.rank:
                    yield order[start : start + share].tolist()
                start += share
        if drawn is self._drawn and not drawn and self._at >= self.position > 0:
            self.set_epoch(self.epoch + 1)

    def __len__(self) -> int:
        """Micro-batches of this epoch: those that this iteration yielded and those that it would yield as things are.

        Before an iteration: those that are left of the epoch.
        """
        count, left = self._yielded, self.length - self._at
        size = self.batch_size
        skipped = max(0, left // size - 2)
        count, left = count + skipped * self._steps(size), left - skipped * size
        while left >= (size if self.drop_last else 1):
            batch = self._cut(left, size)
            count, left = count + len(batch.shares), left - batch.samples
        return count

    def advance(self) -> Batch:
        """Count the batch under way as used, and return it.

        Raises:
            RuntimeError: none has been drawn.
        """
        if not self._drawn:
            raise RuntimeError(
                "no batch has been drawn from the sampler since the last step: the loop must iterate over "
                "DataLoader(dataset, batch_sampler=sampler) with this very sampler, and step once for each batch"
            )
        batch = self._drawn.popleft()
        self.position += batch.samples
        if not self._drawn and self.length - self.position < (self.batch_size if self.drop_last else 1):
            self.set_epoch(self.epoch + 1)
        return batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; in the epoch that is under way, nothing changes.

        Args:
            epoch: an int >= 0.
        """
        _check_int("epoch", epoch, 0, math.inf)
        if epoch != self.epoch:
            self.epoch, self.position, self._at, self._yielded = epoch, 0, 0, 0
            self._drawn, self._planned = deque(), []

    def state_dict(self) -> dict[str, Any]:
        """Seed, epoch, position, batch size, and the sizes of the batches that were drawn ahead."""
        planned = [batch.batch_size for batch in self._drawn] or list(self._planned)
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "batch_size": self.batch_size,
            "planned": planned,
            "length": self.length,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken; an iteration that is under way ends.

        Raises:
            ValueError: the state is that of a dataset of another length, its batch size exceeds the maximum, or an
                entry is missing.
        """
        _check_entries(state_dict, self.state_dict())
        if state_dict["length"] != self.length:
            raise ValueError(f"the state is of a dataset of length {state_dict['length']}, this has {self.length}")
        self.batch_size = state_dict["batch_size"]
        self.seed, self.epoch, self.position = (state_dict[name] for name in ("seed", "epoch", "position"))
        self._drawn, self._planned = deque(), list(state_dict["planned"])
        self._at, self._yielded = self.position, 0


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _check_entries(state_dict: dict[str, Any], names: Iterable[str]) -> None:
    if missing := [name for name in names if name not in state_dict]:
        raise ValueError(f"state_dict lacks {', '.join(missing)}")


def _even(samples: int, parts: int) -> list[int]:
    """So many parts, whose sizes differ by at most one."""
    each, more = divmod(samples, parts)
    return [each + 1] * more + [each] * (parts - more)


def _check_int(name: str, value: Any, low: int, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        bound = "" if high == math.inf else f" and <= {high}"
        raise ValueError(f"{name} must be an int >= {low}{bound}, got {value!r}")


class _PerSample:
    """Variance from the gradients of single samples in ``p.grad_sample``, pooled over ranks."""

    def __init__(self, schedule: AdaptiveBatchSize) -> None:
        self.schedule = weakref.proxy(schedule)

    def end_pass(self, batch: Batch, index: int) -> None:
        """Nothing: they lie where they are until they are read."""

    def clear(self) -> None:
        """Nothing: they belong to whoever wrote them."""

    @torch.no_grad()
    def read(self, batch: Batch) -> Moments:
        schedule = self.schedule
        samples = _grad_samples(schedule.params, sum(batch.shares))
        sums, squares = sum_samples(samples)
        for total in (*sums, squares):
            schedule._all_reduce(total)
        means = [total.div_(batch.samples) for total in sums]
        mean_square = float(sum_of_products(means, means))
        moments = Moments(batch.samples, batch.samples, float(squares), mean_square)
        if schedule.test == "coordinatewise":
            variances = [schedule._all_reduce(total) / (batch.samples - 1) for total in sum_samples(samples, means)[0]]
            return moments._replace(worst=float(worst_ratio(variances, means, schedule.quantile)))
        if schedule.test != "norm":
            inner = schedule._all_reduce(project_samples(samples, means).square().sum())
            return moments._replace(inner_squares=float(inner))
        return moments


class _MicroBatches:
    """Variance from the gradients of the micro-batches, as differences of what ``p.grad`` is after each.

    Of what was before, one copy is kept; for all tests but the norm test one for each micro-batch but the last, as
    their inner products are with a mean that is only known in the end.
    """

    def __init__(self, schedule: AdaptiveBatchSize) -> None:
        self.schedule = weakref.proxy(schedule)
        self.before: dict[Tensor, Tensor] = {}  # gradients after the last pass
        self.earlier: list[dict[Tensor, Tensor]] = []  # and after the passes before it
        self.clear()

    def clear(self) -> None:
        self.sums: list[Tensor] = []  # of each pass: the squared norm of p.grad after it, <p.grad, p.grad before>
        self.products: list[Tensor] = []  # of p.grad after each pass with that after the last
        self.worst = torch.tensor(math.nan)
        self.earlier = []
        if self.schedule.over:
            self.before = {}

    @torch.no_grad()
    def end_pass(self, batch: Batch, index: int) -> None:
        after = {param: param.grad for param in self.schedule.params if param.grad is not None}
        if any(grad.is_sparse for grad in after.values()):
            raise RuntimeError("AdaptiveBatchSize reads no sparse gradients: set sparse=False in the embedding")
        last, norm_only = index + 1 == len(batch.shares), self.schedule.test == "norm"
        if index == 0:  # the memory of the last batch serves again
            self.before = {param: grad for param, grad in self.before.items() if param in after}
        self.before |= {param: torch.zeros_like(grad) for param, grad in after.items() if param not in self.before}
        keep = not last and (norm_only or index == 0)
        self.sums.append(compare_gradients([*after.values()], [self.before[param] for param in after], keep))
        if index > 0 and not norm_only:
            self.earlier.append(self.before)
            self.before = {} if last else {param: grad.clone() for param, grad in after.items()}
        if last and self.schedule.test == "coordinatewise":
            self.worst = self._worst(batch, after)
        elif last and not norm_only:
            self.products = [_inner_product(grads, after) for grads in self.earlier]
        if last:
            self.earlier = []

    def _worst(self, batch: Batch, after: dict[Tensor, Tensor]) -> Tensor:
        """What the coordinatewise test asks about."""
        variances, means = [], []
        for param, grad in after.items():
            zero = torch.zeros_like(grad)
            sums = [zero, *(grads.get(param, zero) for grads in self.earlier), grad]
            parts = [_real(y).double() - _real(x).double() for x, y in pairwise(sums)]
            mean = sum_of(parts)
            rows = zip(parts, batch.totals, strict=True)
            squares = sum_of(n * (part * (batch.samples / n) - mean).square() for part, n in rows)
            means.append(mean)
            variances.append(squares / (len(parts) - 1))
        return worst_ratio(variances, means, self.schedule.quantile)

    def read(self, batch: Batch) -> Moments:
        # The gradient of n samples entered p.grad with the weight n / N.
        weights = [batch.samples**2 / total for total in batch.totals]
        norms, between = zip(*torch.stack(self.sums).tolist(), strict=True)
        parts = [
            norms[0],
            *(new - 2 * both + old for (old, new), both in zip(pairwise(norms), between[1:], strict=True)),
        ]
        squares = sum(weight * max(0.0, part) for weight, part in zip(weights, parts, strict=True))
        moments = Moments(len(parts), batch.samples, squares, norms[-1], worst=float(self.worst))
        if not self.products:
            return moments
        products = [0.0, *torch.stack(self.products).tolist(), norms[-1]]
        inner = sum(weight * (y - x) * (y - x) for weight, (x, y) in zip(weights, pairwise(products), strict=True))
        return moments._replace(inner_squares=inner)


class _Ranks:
    """Variance from the gradients of the ranks, read by DDP's communication hook before and after the reduction."""

    def __init__(self, schedule: AdaptiveBatchSize, model: DistributedDataParallel) -> None:
        self.schedule = weakref.proxy(schedule)
        self.clear()
        own = weakref.ref(self)
        ranks = schedule.sampler.num_replicas

        def reduce(state: None, bucket: Any) -> torch.futures.Future[Tensor]:
            buffer, source = bucket.buffer(), own()
            read = source is not None and source.schedule.needs_stats
            mine, before = buffer, None
            if source is not None and read:
                before = sum_of_products([mine], [mine])
                if source.schedule.test != "norm":
                    mine = buffer.clone()  # freed when the bucket is reduced
                source.calls += bucket.is_last()
            future = dist.all_reduce(buffer.div_(ranks), async_op=True).get_future()

            def after(done: torch.futures.Future[list[Tensor]]) -> Tensor:
                reduced = done.value()[0]
                if source is not None and before is not None:
                    norm = sum_of_products([reduced], [reduced])
                    inner = norm if mine is buffer else sum_of_products([mine], [reduced])
                    source.sums.append(torch.stack([before, norm, inner]))
                return reduced

            return cast("torch.futures.Future[Tensor]", future.then(after))

        reduce.__annotations__ = {}  # DDP compares them with classes, and these are strings
        model.register_comm_hook(None, reduce)

    def clear(self) -> None:
        self.sums: list[Tensor] = []  # of each bucket: |h|^2 of this rank, |mean|^2, <h, mean>
        self.calls = 0

    def end_pass(self, batch: Batch, index: int) -> None:
        """Nothing: the hook sees what the passes added up to."""

    def read(self, batch: Batch) -> Moments:
        schedule = self.schedule
        if self.calls != 1:
            raise RuntimeError(
                f"DDP reduced the gradient {self.calls} times for one batch; where schedule.remaining > 1, backward "
                "must run within model.no_sync()"
            )
        squares, norm, inner = torch.stack(self.sums).sum(0).unbind()
        # A rank's gradient is n W / N times that of its samples, so that the mean over ranks is that over samples.
        weight = batch.samples**2 / (sum(batch.shares) * schedule.sampler.num_replicas**2)
        groups = schedule._all_reduce(weight * torch.stack([squares, inner.square()]))
        moments = Moments(schedule.sampler.num_replicas, batch.samples, float(groups[0]), float(norm))
        return moments if schedule.test == "norm" else moments._replace(inner_squares=float(groups[1]))


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
        max_growth: the largest factor in one test, > 1. Default: none.
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
        _check_choice("test", test, TESTS)
        _check_choice("lr_coupling", lr_coupling, tuple(_POWERS))
        for name, value in (("eta", eta), ("theta", theta), ("nu", nu)):
            check_number(name, value, 0.0, math.inf, "finite and > 0", above=True)
        _check_int("test_interval", test_interval, 1, math.inf)
        check_number("ema", ema, 0.0, 1.0, "in [0, 1)")
        if not max_growth > 1:
            raise ValueError(f"max_growth must be > 1, got {max_growth!r}")
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile must be in (0, 1], got {quantile!r}")
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
        self._passes = 0  # backward passes of the batch under way
        self._task = -1  # the graph task of the last of them
        self._watched: dict[Tensor, Any] = {}
        self.largest = self._split(sampler.max_batch_size)
        """The largest batch size that the sampler's maximum and the split allow."""
        self.source = self._choose(source, model)
        self._source: _PerSample | _MicroBatches | _Ranks
        if self.source == "ddp":
            self._source = _Ranks(self, cast("DistributedDataParallel", model))
        else:
            self._source = _MicroBatches(self) if self.source == "micro_batch" else _PerSample(self)
        self._watch()

    def _choose(self, source: Source | None, model: nn.Module | None) -> Source:
        """The source, if it can be had."""
        sampler = self.sampler
        ranks, passes = sampler.num_replicas, sampler.accumulation_steps
        ddp = _HAS_DISTRIBUTED and isinstance(model, DistributedDataParallel)
        sharded = _HAS_DISTRIBUTED and any(isinstance(param, DTensor) for param in self.params)
        if source is None:
            source = "ddp" if ddp else "micro_batch" if passes > 1 else "per_sample"
        _check_choice("source", source, SOURCES)
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
        return self.accumulation_steps - self._passes

    @property
    def weight(self) -> float:
        """What to multiply the mean loss of the micro-batch under way by, so that gradients add up to the batch's mean.

        It is ``1 / accumulation_steps`` where micro-batches are equal, as all but those of an epoch's last batch are.
        """
        current = self.sampler.current
        if current is None or self._passes >= len(current.shares):
            return 1 / self.accumulation_steps
        return current.shares[self._passes] * self.sampler.num_replicas / current.samples

    @property
    def needs_stats(self) -> bool:
        """Whether the batch under way will be tested."""
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
        if self.remaining and not (self.source == "per_sample" and self._passes == 0):
            raise RuntimeError(
                f"{self._passes} backward passes were seen for a batch of {len(batch.shares)} micro-batches; step only "
                "where schedule.remaining is 0, and call backward once for each micro-batch"
            )
        moments = self._source.read(batch) if self.needs_stats else None
        self.sampler.advance()
        self.samples += batch.samples
        self.steps += 1
        if moments is not None:
            self._grow(moments)
        self._source.clear()
        self._passes, self._task = 0, -1
        self._couple()
        self._watch()

    def _grow(self, moments: Moments) -> None:
        if not moments.usable:
            self.skips += 1
        else:
            self.tests += 1
            self.noise_scale = moments.variance / moments.mean_square
            self.wanted = self._wanted(moments)
        size = self._split(
            next_batch_size(
                self.sampler.batch_size,
                self.wanted if moments.usable else math.nan,
                self.sampler.max_batch_size,
                min_batch_size=None if self.monotone else self.first_batch_size,
                max_growth=self.max_growth,
            )
        )
        if self.sampler.num_replicas > 1:
            answer = torch.tensor(size, device=self.params[0].device)
            dist.broadcast(answer, 0)
            size = int(answer)
        if size > self.sampler.batch_size or not self.monotone:
            self.sampler.batch_size = size

    def _wanted(self, moments: Moments) -> float:
        square = moments.mean_square
        if self.unbiased:
            less = square - moments.variance / moments.samples
            square = less if less > 0 else square
        parts = moments.parts(self.test, square)
        if not self.averages:
            self.averages = [[0.0, 0.0] for _ in parts]
        for average, part in zip(self.averages, parts, strict=True):
            average[:] = [self.ema * old + (1 - self.ema) * new for old, new in zip(average, part, strict=True)]
        thresholds = {"inner_product": [self.theta], "augmented": [self.theta, self.nu]}.get(self.test, [self.eta])
        bounds = [bound**2 * g for (_, g), bound in zip(self.averages, thresholds, strict=True)]
        if min(bounds) == 0:  # an underflow
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
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].mul_(factor / self.lr_factor)
                else:
                    group["lr"] *= factor / self.lr_factor
            self.lr_factor = factor

    def _watch(self) -> None:
        """Count backward passes by hooks on the parameters, those that were added or thawed too."""
        own = weakref.ref(self)

        def seen(param: Tensor) -> None:
            schedule = own()
            task = torch._C._current_graph_task_id()
            if schedule is not None and task != schedule._task:
                schedule._task = task
                engine: Any = torch.autograd.Variable._execution_engine
                engine.queue_callback(schedule._end_pass)

        for param in self.params:
            if param not in self._watched:
                self._watched[param] = param.register_post_accumulate_grad_hook(seen)  # type: ignore[no-untyped-call]

    def _end_pass(self) -> None:
        """What happens when a backward pass has left its gradients."""
        batch, index = self.sampler.current, self._passes
        self._passes += 1
        if batch is not None and index < len(batch.shares) and self.needs_stats:
            self._source.end_pass(batch, index)

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on the device of the parameters if there are several."""
        if self.sampler.num_replicas > 1:
            device = self.params[0].device
            moved = tensor.to(device)
            dist.all_reduce(moved)
            if moved is not tensor:
                tensor.copy_(moved)
        return tensor

    def state_dict(self) -> dict[str, Any]:
        """What was counted and averaged; the sampler has a state of its own."""
        return copy.deepcopy({name: getattr(self, name) for name in _STATE})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what a state dict counted and averaged. Load the sampler's and the optimizer's as well.

        Raises:
            ValueError: an entry is missing.
        """
        _check_entries(state_dict, _STATE)
        for name in _STATE:
            setattr(self, name, copy.deepcopy(state_dict[name]))
        self._source.clear()
        self._passes, self._task = 0, -1


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
        ValueError: an argument is out of range.
    """

    def __init__(
        self, schedule: AdaptiveBatchSize, total_samples: float, warmup_samples: float = 0, min_lr: float = 0.0
    ) -> None:
        check_number("warmup_samples", warmup_samples, 0.0, math.inf, "finite and >= 0")
        check_number("total_samples", total_samples, warmup_samples, math.inf, "> warmup_samples", above=True)
        check_number("min_lr", min_lr, 0.0, math.inf, "finite and >= 0")
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


def sum_samples(samples: list[list[Tensor]], means: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
    """The sums over samples for each parameter, and the sum of all squares, in float64.

    Args:
        samples: for each parameter the gradients of single samples, in one or more matrices with a row for each.
        means: if they are given, sum the squared differences from them.
    """
    device = samples[0][0].device
    sums = [torch.zeros(chunks[0].shape[1], dtype=torch.float64, device=device) for chunks in samples]
    squares = torch.zeros((), dtype=torch.float64, device=device)
    op = _native("sample_sums", samples)
    for k in range(max(map(len, samples))):  # threads share the sums of one call
        rows = [i for i, chunks in enumerate(samples) if k < len(chunks)]
        if op is not None:
            part = torch.zeros_like(squares)
            centres = [] if means is None else [means[i] for i in rows]
            op([samples[i][k] for i in rows], centres, [sums[i] for i in rows], part)
            squares += part
            continue
        for i in rows:
            values = samples[i][k].double() - (0 if means is None else means[i])
            sums[i] += values.sum(0) if means is None else values.square().sum(0)
            squares += values.square().sum()
    return sums, squares


def project_samples(samples: list[list[Tensor]], vectors: list[Tensor]) -> Tensor:
    """The inner product of each sample with the vectors, which are float64 and together one long vector."""
    rows = sum(chunk.shape[0] for chunk in samples[0])
    products = torch.zeros(rows, dtype=torch.float64, device=vectors[0].device)
    if op := _native("sample_dots", samples):
        op([torch.cat(chunks) if len(chunks) > 1 else chunks[0] for chunks in samples], vectors, products)
        return products
    for chunks, vector in zip(samples, vectors, strict=True):
        products += torch.cat([chunk.double() @ vector for chunk in chunks])
    return products


def _native(name: str, samples: list[list[Tensor]]) -> Callable[..., None] | None:
    """The native reduction, where it takes these."""
    every = [chunk for chunks in samples for chunk in chunks]
    return ops.native(name, every[0].device) if _is_native(every) else None


def compare_gradients(after: list[Tensor], before: list[Tensor], keep: bool) -> Tensor:
    """The squared norm of a list and its inner product with another, which becomes a copy of it if that is to be kept.

    Args:
        after: gradients.
        before: memory of the same layout.
        keep: write ``after`` to ``before``.
    """
    op = ops.native("compare_gradients", after[0].device) if _is_native(after) else None
    if op is not None:
        out = torch.empty(2, dtype=torch.float64, device="cpu")
        op(after, before, keep, out)
        return out
    sums = torch.stack([sum_of_products(after, after), sum_of_products(after, before)])
    if keep:
        torch._foreach_copy_([*map(local, before)], [*map(local, after)])
    return sums


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of one tensor or more."""
    return functools.reduce(torch.add, tensors)


def worst_ratio(variances: list[Tensor], means: list[Tensor], quantile: float = 1.0) -> Tensor:
    """A quantile of variance over squared mean, of the coordinates that have a variance; infinite without a mean."""
    ratio = torch.cat([(v / m.square())[v > 0].flatten() for v, m in zip(variances, means, strict=True)])
    if not ratio.numel():
        return ratio.new_zeros(())
    # Not torch.quantile, which takes no more than 16 million numbers.
    place = quantile * (ratio.numel() - 1)
    low = ratio.kthvalue(math.floor(place) + 1).values
    if place == math.floor(place) or low.isinf():
        return low
    return low + (place - math.floor(place)) * (ratio.kthvalue(math.floor(place) + 2).values - low)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _inner_product(left: dict[Tensor, Tensor], right: dict[Tensor, Tensor]) -> Tensor:
    """Of two lists of gradients by their parameters; one that is missing is zero."""
    both = [param for param in left if param in right]
    if not both:
        return torch.zeros((), dtype=torch.float64)
    grads = [left[param] for param in both]
    return sum_of_products(grads, grads if left is right else [right[param] for param in both])


def _grad_samples(params: list[Tensor], count: int) -> list[list[Tensor]]:
    """The gradients of single samples of each parameter that has a gradient, as matrices with a row for each."""
    found = []
    for i, param in enumerate(params):
        value: Any = getattr(param, "grad_sample", None)
        if value is None:
            if param.grad is None:
                continue
            raise RuntimeError(
                f"there is no variance to be found: params[{i}] of shape {tuple(param.shape)} has no grad_sample. Set "
                "p.grad_sample (torch.func, or Opacus' GradSampleModule); or give the sampler min_accumulation_steps=2 "
                "or more, and add up the gradients of its micro-batches; or give the schedule the "
                "DistributedDataParallel model"
            )
        chunks = [_real(chunk.detach()) for chunk in (value if isinstance(value, list | tuple) else [value])]
        rows = sum(len(chunk) for chunk in chunks)
        if rows != count:
            raise RuntimeError(
                f"grad_sample of params[{i}] has gradients of {rows} samples, the batch has {count} on this rank; it "
                "must have shape (samples, *p.shape) and be that of this batch alone"
            )
        if any(chunk.shape[1:].numel() != _real(param).numel() for chunk in chunks):
            raise RuntimeError(
                f"grad_sample of params[{i}] must have shape ({rows}, {', '.join(map(str, param.shape))}), got "
                f"{', '.join(str(tuple(chunk.shape)) for chunk in chunks)}"
            )
        found.append([chunk.reshape(len(chunk), -1).contiguous() for chunk in chunks])
    if not found:
        raise RuntimeError("there is no variance to be found: no parameter has a gradient or a grad_sample")
    return found
