"""Poisson sampling for private training: each record is in a batch with one probability, whatever the others do."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from optimzoo.batch_sampler import check_entries
from optimzoo.optimizer import check_int, check_number

_HAS_DISTRIBUTED = torch.distributed.is_available()
if _HAS_DISTRIBUTED:
    import torch.distributed as dist

_BLOCK = 2**17  # records whose words are made at once: 1 MiB
_BITS = 53  # of a word, which a float64 holds


class PoissonSampler(Sampler[list[int]]):
    """Draws batches in which each record is with a given probability, independently of all others and all steps.

    This is what the accountants of :mod:`optimzoo.privacy` assume. Batches differ in size and may be empty; an empty
    one is a step like any other, and :func:`poisson_collate` makes it. It goes to ``DataLoader(dataset,
    batch_sampler=sampler)``.

    Args:
        data_source: anything that has a length, or the length.
        sample_rate: probability with which each record is in a batch, in (0, 1]: a constant of yours, which must not
            depend on the data.
        steps: batches of one pass, an int >= 1. There are as many whatever the data.
        generator: draws the secret key, once, for tests: who knows its seed knows the batches. Default: the key is the
            operating system's, and ``torch.manual_seed`` has no say in it.
        num_replicas, rank: how many processes share a batch, and which this is. Default: those of the default process
            group, or one. Each has every ``num_replicas``-th record, and draws from its own at the full rate; together
            that is Poisson sampling of all.

    Raises:
        TypeError: the data source has no length, or the rate is no number.
        ValueError: a number is out of range; the message names it.

    **Which records were in which batch must stay secret**, and so must the sizes of batches. Sampling hides a record
    since nobody knows when it was used; to who does know, the steps that used it leak as much as without sampling, and
    the accountant's claim is void. The batches of a sampler follow from its key by a cryptographic function, SHAKE-256.
    The key is in no ``repr``, and neither in copies nor pickles, which get a key of their own. A forked process has the
    same: it draws the same batches, unless it is of another rank. Two runs need two samplers.

    An iteration goes on where the one before it stopped, and draws anew in every pass. :attr:`step` is how many batches
    were drawn in all. A loader with workers draws ahead: to resume exactly, set it to the steps that the optimizer has
    made.
    """

    def __init__(
        self,
        data_source: Sized | int,
        sample_rate: float,
        steps: int,
        *,
        generator: torch.Generator | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if not isinstance(data_source, int) and not hasattr(data_source, "__len__"):
            raise TypeError(f"data_source must have a length or be one, got {type(data_source).__name__}")
        length = data_source if isinstance(data_source, int) else len(data_source)
        check_int("data_source", length, 0)
        check_number("sample_rate", sample_rate, 0.0, math.nextafter(1.0, 2.0), "in (0, 1]", above=True)
        check_int("steps", steps, 1)
        grouped = _HAS_DISTRIBUTED and dist.is_initialized()
        self.num_replicas = num_replicas if num_replicas is not None else dist.get_world_size() if grouped else 1
        self.rank = rank if rank is not None else dist.get_rank() if grouped else 0
        check_int("num_replicas", self.num_replicas, 1)
        check_int("rank", self.rank, 0, self.num_replicas - 1)
        self.length, self.sample_rate, self.steps = length, float(sample_rate), steps
        self._step = 0
        self._key = os.urandom(32) if generator is None else _bytes_of(generator)

    @property
    def step(self) -> int:
        """Batches that were drawn in all passes; set it to go on elsewhere."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        check_int("step", value, 0)
        self._step = value

    def __len__(self) -> int:
        """Batches of one pass."""
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps - self._step % self.steps):
            step, self._step = self._step, self._step + 1
            yield self._draw(step)

    def _draw(self, step: int) -> list[int]:
        """The records of this rank in a batch: a function of the key, the rank and the step."""
        # Rounded down: a record is in the batch with a probability of at most the rate.
        bound = math.floor(self.sample_rate * 2**_BITS)
        mine = len(range(self.rank, self.length, self.num_replicas))
        drawn = []
        for start in range(0, mine, _BLOCK):
            count = min(_BLOCK, mine - start)
            # Ranks that have the same key draw other words, since each names itself; so does another number of ranks.
            place = b"".join(n.to_bytes(8, "little") for n in (self.num_replicas, self.rank, step, start))
            words = bytearray(hashlib.shake_256(self._key + place).digest(8 * count))
            uniform = torch.frombuffer(words, dtype=torch.int64) & (2**_BITS - 1)
            drawn += [start + at for at in (uniform < bound).nonzero().flatten().tolist()]
        return [self.rank + self.num_replicas * at for at in drawn]

    def state_dict(self, *, export_private_state: bool = False) -> dict[str, Any]:
        """Where the sampler is; the key too if that is asked for by name.

        Without the key the state is public, and a sampler that loads it draws other batches from there on, which are as
        good. With it they are the same, bit for bit, on all ranks that load it (and on those of a run whose ranks had
        each a key of their own, if each loads its state); **such a state has to be guarded like the data**. Released
        batches must not come again: where steps after the checkpoint have been shown to anybody, the run that resumes
        needs a new key, and a history that has those steps too.

        Args:
            export_private_state: have the key in the state. Default ``False``.
        """
        # Not the length: whether there is one record more is what the claim is about.
        state: dict[str, Any] = {"step": self.step, "sample_rate": self.sample_rate}
        return {**state, "key": self._key.hex()} if export_private_state else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken, with its key if it has one, and with a new one otherwise.

        Raises:
            ValueError: the state is that of another rate, or an entry is missing or out of range. Nothing has changed
                then.
        """
        check_entries(state_dict, ("step", "sample_rate"))
        if state_dict["sample_rate"] != self.sample_rate:
            raise ValueError(f"the state has sample_rate={state_dict['sample_rate']!r}, this {self.sample_rate!r}")
        check_int("step", state_dict["step"], 0)
        key = state_dict.get("key")
        try:
            read = os.urandom(32) if key is None else bytes.fromhex(key)
        except (TypeError, ValueError):
            read = b""
        if len(read) != 32:
            raise ValueError("key must be 64 hexadecimal digits")  # and is not shown
        self._step, self._key = state_dict["step"], read

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_key"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._key = os.urandom(32)

    def __repr__(self) -> str:
        return f"PoissonSampler(sample_rate={self.sample_rate}, steps={self.steps})"


def poisson_collate(
    dataset: Dataset[Any] | Sequence[Any], collate_fn: Callable[[list[Any]], Any] = default_collate
) -> Callable[[list[Any]], Any]:
    """A collate function that can make a batch of no records.

    The empty batch has the structure, shapes and dtypes of a batch of one, the dataset's first record, with length 0.
    Nothing of that record is kept. A mean over no records is NaN: losses of single records must be summed.

    Args:
        dataset: has at least one record.
        collate_fn: makes all other batches; samples come first in its tensors, which may stand in mappings, tuples and
            lists. Default: ``torch.utils.data.default_collate``.

    Returns:
        For ``DataLoader(dataset, batch_sampler=PoissonSampler(...), collate_fn=...)``; also with workers.

    Raises:
        ValueError: the dataset is empty, or a tensor of a batch of one record does not begin with a dimension of 1.
        TypeError: such a batch has something else than tensors and strings.
    """
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("dataset must have a record, from which the shapes of an empty batch are read")
    return _Collate(collate_fn, _emptied(collate_fn([dataset[0]])))


class _Collate:
    """A class, so that it can go to a worker that is spawned."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any], empty: Any) -> None:
        self.collate_fn, self.empty = collate_fn, empty

    def __call__(self, samples: list[Any]) -> Any:
        return self.collate_fn(samples) if samples else _emptied(self.empty, of=0)


def _emptied(batch: Any, of: int = 1) -> Any:
    """The same without its records, of which there are so many."""
    if isinstance(batch, Tensor):
        if batch.dim() == 0 or batch.shape[0] != of:
            raise ValueError(
                "collate_fn must give tensors whose first dimension is that of the samples; of one record it gave one"
                f" of shape {tuple(batch.shape)}"
            )
        return batch.new_empty((0, *batch.shape[1:]))
    if isinstance(batch, Mapping):
        return type(batch)({name: _emptied(value, of) for name, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, list | tuple):
        if all(isinstance(item, str | bytes) for item in batch):  # one string a record
            return type(batch)()
        items = [_emptied(item, of) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    raise TypeError(
        f"collate_fn must give tensors or strings, in mappings, tuples and lists, got {type(batch).__name__}; give one"
        " that does, or that makes a batch of no samples itself"
    )


def _bytes_of(generator: torch.Generator) -> bytes:
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    words = torch.randint(256, (32,), generator=generator, device=generator.device)
    return bytes(words.tolist())
