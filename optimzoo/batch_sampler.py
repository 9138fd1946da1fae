"""A batch sampler whose batch size may change: exact epochs, micro-batches, ranks, and where it was left."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from optimzoo.optimizer import check_int

_HAS_DISTRIBUTED = torch.distributed.is_available()
if _HAS_DISTRIBUTED:
    import torch.distributed as dist


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
        generator: draws the seed, once. Default: torch's own. All ranks of the default process group use the first
            rank's seed; ranks of another group need generators in equal states.
        num_replicas, rank: how many processes share a batch, and which this is. Default: those of the default process
            group, or one.

    Raises:
        TypeError: the dataset has no length.
        ValueError: a number is not an int or out of range; the message names it.

    ``batch_size`` can be set at any time, by a schedule or by hand. It is read when a batch is drawn, and a loader with
    ``num_workers > 0`` draws ``num_workers * prefetch_factor`` micro-batches ahead: so late a new size arrives, and
    never within a batch. What has been drawn counts as used when :meth:`advance` is called, as
    :class:`AdaptiveBatchSize` does in each step. Iteration starts behind the last batch that was used, in the middle of
    an epoch too, and the next epoch begins by itself. Batches that were drawn and not used come again, of the sizes
    that they had. There is one iteration at a time: a new one ends the one before it, after the batch that this is in.

    The state dict has seed, epoch, the position used and the sizes that were drawn ahead: a loader with as many workers
    goes on with the same batches, bit for bit. Where fewer samples than ranks would be left for a last batch, the one
    before it gives up as many as it takes, or has them as well if it is too small for that: the only batch that may
    exceed ``max_batch_size``, by fewer samples than there are ranks, and ``max_micro_batch_size``, by one.
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
        check_int("num_replicas", self.num_replicas, 1, max(1, self.length))
        check_int("rank", self.rank, 0, self.num_replicas - 1)
        self.max_batch_size = self.length if max_batch_size is None else max_batch_size
        check_int("max_batch_size", self.max_batch_size, self.num_replicas, self.length)
        self.max_micro_batch_size = max_micro_batch_size
        if max_micro_batch_size is not None:
            check_int("max_micro_batch_size", max_micro_batch_size, 1)
        check_int("min_accumulation_steps", min_accumulation_steps, 1)
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
        self._planned: deque[int] = deque()  # sizes that an earlier iteration or a loaded state had drawn
        self._at = 0  # samples of this epoch that were drawn
        self._yielded = 0  # micro-batches of the batches that this iteration drew
        self._handed = 0  # micro-batches that came of the batches in _drawn

    @property
    def batch_size(self) -> int:
        """Samples of the next batch that is drawn, over all ranks and micro-batches."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._check_size(value)
        self._batch_size = value

    def _check_size(self, value: int) -> None:
        check_int("batch_size", value, self.num_replicas, self.max_batch_size)
        if self._steps(value) * self.num_replicas > value:
            raise ValueError(
                f"batch_size={value!r} has no sample for each of {self._steps(value)} micro-batches of "
                f"{self.num_replicas} ranks, with max_micro_batch_size={self.max_micro_batch_size} and "
                f"min_accumulation_steps={self.min_accumulation_steps}"
            )

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
        self._planned.extendleft(batch.batch_size for batch in reversed(self._drawn))
        drawn = self._drawn = deque()
        self._at, self._yielded, self._handed = self.position, 0, 0
        order = self._order()
        while drawn is self._drawn:  # a newer iteration, or the next epoch, ends this one
            size = self._next_size
            left = self.length - self._at
            if left < (size if self.drop_last else 1):
                if self.drop_last and not self._planned:
                    self._planned.append(size)  # so that a smaller one does not begin the end of the epoch anew
                break
            if self._planned:
                self._planned.popleft()
            batch = self._cut(left, size)
            drawn.append(batch)
            start = self._at
            self._at, self._yielded = start + batch.samples, self._yielded + len(batch.shares)
            ranks, shares = self.num_replicas, _even(batch.samples, len(batch.shares) * self.num_replicas)
            for i, share in enumerate(shares):
                if i % ranks == self.rank:
                    self._handed += drawn is self._drawn
                    yield order[start : start + share].tolist()
                start += share
        if drawn is self._drawn and not drawn and self._at >= self.position > 0:
            self.set_epoch(self.epoch + 1)

    def __len__(self) -> int:
        """Micro-batches of this epoch: those that this iteration yielded and those that it would yield as things are.

        Before an iteration: those that are left of the epoch.
        """
        count, left = self._yielded, self.length - self._at
        for i, size in enumerate(chain(self._planned, repeat(self.batch_size))):
            if i == len(self._planned):  # from here on they are equal
                skipped = max(0, left // size - 2)
                count, left = count + skipped * self._steps(size), left - skipped * size
            if left < (size if self.drop_last else 1):
                break
            batch = self._cut(left, size)
            count, left = count + len(batch.shares), left - batch.samples
        return count

    @property
    def _next_size(self) -> int:
        return self._planned[0] if self._planned else self.batch_size

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
        self._handed = max(0, self._handed - len(batch.shares))
        if not self._drawn and self.length - self.position < (self._next_size if self.drop_last else 1):
            self.set_epoch(self.epoch + 1)
        return batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; in the epoch that is under way, nothing changes.

        Args:
            epoch: an int >= 0.
        """
        check_int("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch, self.position, self._at, self._yielded, self._handed = epoch, 0, 0, 0, 0
            self._drawn, self._planned = deque(), deque()

    def state_dict(self) -> dict[str, Any]:
        """Seed, epoch, position, batch size, and the sizes of the batches that were drawn ahead."""
        planned = [*(batch.batch_size for batch in self._drawn), *self._planned]
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
            ValueError: the state is that of a dataset of another length, a batch size exceeds the maximum, or an entry
                is missing or out of range. Nothing has changed then.
        """
        check_entries(state_dict, self.state_dict())
        if state_dict["length"] != self.length:
            raise ValueError(f"the state is of a dataset of length {state_dict['length']}, this has {self.length}")
        planned = state_dict["planned"]
        if not isinstance(planned, list | tuple):
            raise ValueError(f"planned must be a list of batch sizes, got {planned!r}")
        for size in (state_dict["batch_size"], *planned):
            self._check_size(size)
        check_int("seed", state_dict["seed"], -math.inf)
        check_int("epoch", state_dict["epoch"], 0)
        check_int("position", state_dict["position"], 0, self.length)
        self.batch_size = state_dict["batch_size"]
        self.seed, self.epoch, self.position = (state_dict[name] for name in ("seed", "epoch", "position"))
        self._drawn, self._planned = deque(), deque(planned)
        self._at, self._yielded, self._handed = self.position, 0, 0


def _even(samples: int, parts: int) -> list[int]:
    """So many parts, whose sizes differ by at most one."""
    each, more = divmod(samples, parts)
    return [each + 1] * more + [each] * (parts - more)


def check_entries(state_dict: dict[str, Any], names: Iterable[str]) -> None:
    """Raise unless a state dict has all of these."""
    if missing := [name for name in names if name not in state_dict]:
        raise ValueError(f"state_dict lacks {', '.join(missing)}")
