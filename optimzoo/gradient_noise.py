"""The noise of a gradient: what the tests compare, and the sources that it is measured from."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from optimzoo import ops
from optimzoo.optimizer import is_native, local, sum_of_products
from optimzoo.per_sample import micro_batches, writes

if torch.distributed.is_available():
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from optimzoo.batch_sampler import Batch
    from optimzoo.batch_size import AdaptiveBatchSize


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
        return self.inner_squares != math.inf

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


class PerSample:
    """Variance from the gradients of single samples in ``p.grad_sample``, pooled over ranks."""

    def __init__(self, schedule: AdaptiveBatchSize) -> None:
        self.schedule = weakref.proxy(schedule)
        self.used: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by id: what was there at the last step

    def end_pass(self, batch: Batch, index: int) -> None:
        """Nothing: they lie where they are until they are read."""

    def clear(self) -> None:
        """Keep in mind what has been used; it belongs to whoever wrote it."""
        every = [chunk for param in self.schedule.params for chunk in micro_batches(param)]
        self.used = {id(chunk): (weakref.ref(chunk), writes(chunk)) for chunk in every}

    def check_new(self) -> None:
        """Raise where a gradient of samples is that of the batch before."""
        for i, param in enumerate(self.schedule.params):
            for chunk in micro_batches(param):
                reference, version = self.used.get(id(chunk), (None, 0))
                if reference is not None and reference() is chunk and version == writes(chunk):
                    raise RuntimeError(
                        f"grad_sample of params[{i}] is still that of the batch before: write the gradients of this "
                        "batch's samples, and set p.grad_sample to None after each step"
                    )

    @torch.no_grad()
    def read(self, batch: Batch) -> Moments:
        schedule = self.schedule
        self.check_new()
        samples = _grad_samples(schedule.params, sum(batch.shares))
        sums, squares = sum_samples(samples)
        for total in (*sums, squares):
            schedule.all_reduce(total)
        means = [total.div_(batch.samples) for total in sums]
        mean_square = float(sum_of_products(means, means))
        moments = Moments(batch.samples, batch.samples, float(squares), mean_square)
        if schedule.test == "coordinatewise":
            variances = [schedule.all_reduce(total) / (batch.samples - 1) for total in sum_samples(samples, means)[0]]
            return moments._replace(worst=float(worst_ratio(variances, means, schedule.quantile)))
        if schedule.test != "norm":
            inner = schedule.all_reduce(project_samples(samples, means).square().sum())
            return moments._replace(inner_squares=float(inner))
        return moments


class MicroBatches:
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
        if not after:
            raise RuntimeError(
                "no gradient is left after backward: AdaptiveBatchSize cannot read one that was freed in it"
            )
        if any(grad.is_sparse for grad in after.values()):
            raise RuntimeError("AdaptiveBatchSize reads no sparse gradients: set sparse=False in the embedding")
        if index == 0:
            self.clear()  # of a batch that was left in the middle
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


class Ranks:
    """Variance from the gradients of the ranks, read by DDP's communication hook before and after the reduction."""

    def __init__(self, schedule: AdaptiveBatchSize, model: DistributedDataParallel) -> None:
        self.schedule = weakref.proxy(schedule)
        self.batch: Batch | None = None  # that the sums are of
        self.params = {
            param
            for name, param in model.module.named_parameters()
            if param.requires_grad and name not in model.parameters_to_ignore
        }
        if problem := self.compare():
            raise ValueError(f"source='ddp' {problem}")
        self.clear()
        own = weakref.ref(self)
        ranks, group = schedule.sampler.num_replicas, schedule._group

        def reduce(state: None, bucket: Any) -> torch.futures.Future[Tensor]:
            buffer, source = bucket.buffer(), own()
            read = source is not None and source.schedule.needs_stats
            mine, before = buffer, None
            if source is not None and read:
                if source.batch is not source.schedule.sampler.current:  # or one was left in the middle
                    source.clear()
                    source.batch = source.schedule.sampler.current
                before = sum_of_products([mine], [mine])
                if source.schedule.test != "norm":
                    mine = buffer.clone()  # freed when the bucket is reduced
                source.calls += bucket.is_last()
            future = dist.all_reduce(buffer.div_(ranks), group=group, async_op=True).get_future()

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

    def compare(self) -> str:
        """What is wrong where the optimizer's parameters are not those that DDP reduces."""
        others = {*self.schedule.params} ^ self.params
        if not others:
            return ""
        shapes = ", ".join(str(tuple(param.shape)) for param in list(others)[:3])
        return (
            "needs an optimizer of all trained parameters of model, and no others: DDP reduces whole buckets. "
            f"{len(others)} are in one of them alone, of shapes {shapes}"
        )

    def clear(self) -> None:
        self.sums: list[Tensor] = []  # of each bucket: |h|^2 of this rank, |mean|^2, <h, mean>
        self.calls = 0

    def end_pass(self, batch: Batch, index: int) -> None:
        """Nothing: the hook sees what the passes added up to."""

    def read(self, batch: Batch) -> Moments:
        schedule = self.schedule
        if problem := self.compare():
            raise RuntimeError(f"source='ddp' {problem}")
        if self.calls != 1:
            raise RuntimeError(
                f"DDP reduced the gradient {self.calls} times for one batch; where schedule.remaining > 1, backward "
                "must run within model.no_sync()"
            )
        squares, norm, inner = torch.stack(self.sums).sum(0).unbind()
        # A rank's gradient is n W / N times that of its samples, so that the mean over ranks is that over samples.
        weight = batch.samples**2 / (sum(batch.shares) * schedule.sampler.num_replicas**2)
        groups = schedule.all_reduce(weight * torch.stack([squares, inner.square()]))
        moments = Moments(schedule.sampler.num_replicas, batch.samples, float(groups[0]), float(norm))
        return moments if schedule.test == "norm" else moments._replace(inner_squares=float(groups[1]))


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
    return ops.native(name, every[0].device) if is_native(every) else None


def compare_gradients(after: list[Tensor], before: list[Tensor], keep: bool) -> Tensor:
    """The squared norm of a list and its inner product with another, which becomes a copy of it if that is to be kept.

    Args:
        after: gradients.
        before: memory of the same layout.
        keep: write ``after`` to ``before``.
    """
    op = ops.native("compare_gradients", after[0].device) if is_native(after) else None
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
        chunks = [_real(chunk.detach()) for chunk in micro_batches(param)]
        if not chunks:
            if param.grad is None:
                continue
            raise RuntimeError(
                f"there is no variance to be found: params[{i}] of shape {tuple(param.shape)} has no grad_sample. Set "
                "p.grad_sample (torch.func, or Opacus' GradSampleModule); or give the sampler min_accumulation_steps=2 "
                "or more, and add up the gradients of its micro-batches; or give the schedule the "
                "DistributedDataParallel model"
            )
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
