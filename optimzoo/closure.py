"""What methods that call a closure share: a look at its loss, the random numbers it sees, many copies of it at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What the intermediate results of the copies that run together may take: bench/cbo.py measures it ("chunks").
CHUNK_BYTES = 32 * 2**20


def check_loss(loss: Any, shape: tuple[int, ...] | None = None) -> Tensor:
    """The loss as a float64 tensor; raises if it is not one real number, or of ``shape`` where that is given."""
    if isinstance(loss, Real) and not isinstance(loss, bool) and shape is None:
        return torch.tensor(float(loss), dtype=torch.float64)
    if not isinstance(loss, Tensor):
        raise TypeError(f"the closure must return the loss, got {loss!r}")
    if loss.is_complex():
        raise ValueError(f"the closure's loss must be real, got {loss.dtype}")
    if shape is None and loss.numel() != 1:
        raise ValueError(f"the closure's loss must be one number, got shape {tuple(loss.shape)}")
    if shape is not None and tuple(loss.shape) != shape:
        raise ValueError(f"the closure must return losses of shape {shape}, got {tuple(loss.shape)}")
    return loss.double() if shape is not None else loss.double().reshape(())


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Hands out a function that seeds torch's generators; they continue as if they had not been used."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed, which also goes through all other devices, at each evaluation.
        generators = [torch.default_generator, *(torch.cuda.default_generators[d.index or 0] for d in devices)]

        def seed(value: int) -> None:
            for generator in generators:
                generator.manual_seed(value)

        yield seed


def vmapped(
    loss: Callable[[list[Tensor]], Tensor], chunk_size: int | None = None
) -> Callable[[Sequence[Tensor]], Tensor]:
    """A closure over many copies of the parameters, made from the loss of one copy by ``torch.func.vmap``.

    Args:
        loss: takes a list with a tensor for each parameter and returns a scalar; it must not depend on anything else
            that differs between copies. For a module, call ``torch.func.functional_call`` in it.
        chunk_size: how many copies run together. By default as many as keep their intermediate results, measured by
            one evaluation, within 32 MiB: beyond the caches a larger chunk is slower, and with one copy at a time
            nothing is gained.

    Returns:
        A function of stacked parameters, each with leading dimensions for the copies, that returns their losses.

    All copies see the same random numbers. What vmap cannot do (``.item()``, BatchNorm that updates running
    statistics) raises, with a hint.
    """

    def closure(stacked: Sequence[Tensor]) -> Tensor:
        nonlocal chunk_size
        lead = stacked[0].shape[:2]
        flat = [tensor.flatten(0, 1) for tensor in stacked]
        copies = flat[0].shape[0]
        try:
            if chunk_size is None:
                with torch.random.fork_rng(devices=[]):
                    chunk_size = max(1, CHUNK_BYTES // max(1, _traffic(loss, [tensor[0] for tensor in flat])))
            every = torch.func.vmap(loss, randomness="same", chunk_size=min(chunk_size, copies))
            return every(flat).reshape(lead)
        except RuntimeError as error:
            raise RuntimeError(
                f"{error}\nA loss for vmap cannot call .item() or write to buffers: set track_running_stats=False on "
                "BatchNorm layers, or use a closure that evaluates the live parameters"
            ) from error

    return closure


class _Bytes(TorchDispatchMode):
    """Adds up what operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def _traffic(loss: Callable[[list[Tensor]], Tensor], params: list[Tensor]) -> int:
    with _Bytes() as counted, torch.no_grad():
        loss(params)
    return counted.total
