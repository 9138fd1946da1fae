"""What methods that call a closure share: a look at its loss, the random numbers it sees, many copies of it at once."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimzoo.consensus import best_of

# What the intermediate results of the copies that run together may take. It bounds memory: a larger chunk is as fast or
# a little faster, as bench/cbo.py measures ("chunks").
CHUNK_BYTES = 32 * 2**20
# After so many calls they are measured again, for an evaluation of one copy: the data may have another size.
MEASURED_EVERY = 32


def check_loss(loss: Any, shape: tuple[int, ...] | None = None) -> Tensor:
    """The loss as a float64 tensor; raises if it is not one real number, or of ``shape`` where that is given."""
    if isinstance(loss, int | float) and shape is None:
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
def uninterrupted() -> Iterator[None]:
    """Holds an interrupt from the keyboard back until the end of a block that must be done whole or not at all."""
    held: list[Any] = []
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # it ends the process, is ignored, or comes from outside of Python: no exception here
        yield
        return
    try:
        signal.signal(signal.SIGINT, lambda *args: held.append(args))
    except ValueError:  # interrupts come to the main thread alone
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[-1])


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
        chunk_size: how many copies run together. By default as many as keep their intermediate results within 32 MiB,
            which bounds memory: more are as fast or a little faster. An evaluation of one copy measures the results, in
            the first of every 32 calls and where the shapes of the parameters change. For data whose size changes much
            from call to call, give a number.

    Returns:
        A function of stacked parameters, each with leading dimensions for the copies, that returns their losses.

    All copies see the same random numbers. What vmap cannot do (``.item()``, BatchNorm that updates running
    statistics) raises, with a hint.
    """

    measured, calls, known = 0, 0, None

    def closure(stacked: Sequence[Tensor]) -> Tensor:
        nonlocal measured, calls, known
        lead = stacked[0].shape[:2]
        flat = [tensor.flatten(0, 1) for tensor in stacked]
        copies = flat[0].shape[0]
        try:
            shapes = [tensor.shape[1:] for tensor in flat]
            if chunk_size is None and (calls % MEASURED_EVERY == 0 or shapes != known):
                with torch.random.fork_rng(devices=[]):
                    measured = max(1, CHUNK_BYTES // max(1, _traffic(loss, [tensor[0] for tensor in flat])))
                calls, known = 0, shapes
            calls += 1
            chunk = min(measured if chunk_size is None else chunk_size, copies)
            every = torch.func.vmap(loss, randomness="same", chunk_size=chunk)
            return every(flat).reshape(lead)
        except RuntimeError as error:
            if "vmap" not in str(error) and "batched tensor" not in str(error):
                raise
            raise RuntimeError(
                f"{error}\nA loss for vmap cannot call .item() or write to buffers: set track_running_stats=False on "
                "BatchNorm layers, or use a closure that evaluates the live parameters"
            ) from error

    return closure


class _Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch 2.14
    """Adds up what operations return."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def _traffic(loss: Callable[[list[Tensor]], Tensor], params: list[Tensor]) -> int:
    counted = _Bytes()  # type: ignore[no-untyped-call]  # untyped in torch 2.14
    with counted, torch.no_grad():
        loss(params)
    return counted.total


class Evaluation:
    """The closure of one step over many points; while it runs, parameters, buffers and generators are its to use.

    They come back at the end, whatever happens, and after an error ``.grad`` does too. Every call sees the same random
    numbers and the same buffers. ``best`` and ``best_loss`` are the best of all points of each run.

    Args:
        closure: returns the loss of the live parameters; or, if ``batched``, the losses of stacked ones.
        params: the live parameters.
        views: cuts a tensor (..., coordinates) into the shapes of the parameters.
        batched: which kind of closure it is.
        seed: what torch's generators are seeded with before each call.
        buffers: what a forward pass of the closure changes.
        best: the best point of each run so far, (runs, coordinates).
        best_loss: its loss, (runs,).
    """

    def __init__(
        self,
        closure: Callable[..., Any],
        params: list[Tensor],
        views: Callable[[Tensor], list[Tensor]],
        batched: bool,
        seed: int,
        buffers: list[Tensor],
        best: Tensor,
        best_loss: Tensor,
    ) -> None:
        self.closure, self.params, self.views, self.batched = closure, params, views, batched
        self.seed, self.buffers = seed, buffers
        self.best, self.best_loss = best, best_loss
        self.kept = [] if batched else [param.detach().clone() for param in params]
        self.grads = [] if batched else [_Grad(param) for param in params]
        self.clean = [buffer.clone() for buffer in buffers]
        self.after: dict[int, list[Tensor]] = {}

    def __enter__(self) -> Evaluation:
        self.stack = contextlib.ExitStack()
        self.reseed = self.stack.enter_context(repeatable(self.params[0].device))
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        with uninterrupted():
            self.stack.close()
            if self.kept:
                torch._foreach_copy_(self.params, self.kept)
            self._restore(self.clean)
            if failed:
                for grad in self.grads:
                    grad.restore()

    def commit(self, run: int) -> None:
        """Leave the buffers as the consensus of a run left them; as they were, if its loss was not finite."""
        self._restore(self.after.get(run, self.clean))

    def _write(self, row: Tensor) -> None:
        torch._foreach_copy_(self.params, self.views(row))

    def _restore(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.copy_(value)

    def losses(self, points: Tensor, keep_buffers: bool = False) -> Tensor:
        """Float64 losses of points (runs, n, coordinates), infinite where they are not finite."""
        runs, count, _ = points.shape
        if count == 0:  # a process that no particle of a mini-batch belongs to
            return torch.empty(runs, 0, dtype=torch.float64, device=points.device)
        if self.batched:
            version = _version(points)
            losses = check_loss(self._call(self.views(points)), (runs, count)).to(points.device)
            if _version(points) != version:
                raise RuntimeError("the closure wrote to the particles that it was given; let it work on a copy")
            return self._compare(points, losses.detach())
        rows = []
        for run in range(runs):
            rows += [self._one(points[run, i]) for i in range(count)]
            if keep_buffers and rows[-1].isfinite():
                self.after[run] = [buffer.clone() for buffer in self.buffers]
        return self._compare(points, torch.stack(rows).to(points.device).view(runs, count))

    def _compare(self, points: Tensor, losses: Tensor) -> Tensor:
        losses = losses.nan_to_num(math.inf, math.inf, math.inf)
        found, lowest = best_of(points, losses)
        better = lowest < self.best_loss
        if better.any():
            self.best = torch.where(better[:, None], found, self.best)
            self.best_loss = torch.where(better, lowest, self.best_loss)
        return losses

    def gradients(self, points: Tensor, wanted: Tensor | None) -> Tensor:
        """The gradient of the loss at each point that is wanted; zero or anything elsewhere."""
        losses = points.new_full(points.shape[:2], math.inf, dtype=torch.float64)
        if self.batched:
            leaf = points.detach().clone().requires_grad_()
            with torch.enable_grad():
                every = check_loss(self._call(self.views(leaf)), tuple(points.shape[:2]))
                _check_graph(every)
                (result,) = torch.autograd.grad(every.sum(), leaf)
            every = every.detach().to(points.device)
            self._compare(points, every if wanted is None else every.where(wanted, math.inf))
            return result
        result = torch.zeros_like(points)
        wanted = torch.ones(points.shape[:2]) if wanted is None else wanted
        for run, i in wanted.nonzero().tolist():
            self._write(points[run, i])
            self._restore(self.clean)
            with torch.enable_grad():
                loss = check_loss(self._call())
                _check_graph(loss)
                grads = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
            losses[run, i] = loss.detach()
            result[run, i] = torch.cat([grad.reshape(-1).to(points.dtype) for grad in grads])
        self._compare(points, losses)
        return result

    def _one(self, row: Tensor) -> Tensor:
        self._write(row)
        self._restore(self.clean)
        return check_loss(self._call()).detach()

    def _call(self, *args: Any) -> Any:
        self.reseed(self.seed)
        try:
            loss = self.closure(*args)
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise RuntimeError(
                    "the closure called backward(): no gradients are needed; remove the call and return the loss alone"
                ) from error
            raise
        if any(grad.written for grad in self.grads):
            raise RuntimeError("the closure called backward(): no gradients are needed; return the loss alone")
        return loss


def _version(tensor: Tensor | None) -> int:
    """Changes when a tensor is written to; inference tensors have none."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


class _Grad:
    """A parameter's ``.grad`` as it was."""

    def __init__(self, param: Tensor) -> None:
        self.param, self.grad = param, param.grad
        self.copy = None if param.grad is None else param.grad.clone()
        self.version = _version(self.grad)

    @property
    def written(self) -> bool:
        """Whether there is a gradient that was not there."""
        now = self.param.grad
        return now is not None and not (now is self.grad and _version(now) == self.version)

    def restore(self) -> None:
        if self.grad is not None and self.copy is not None and _version(self.grad) != self.version:
            self.grad.copy_(self.copy)
        self.param.grad = self.grad


def _check_graph(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise RuntimeError("grad_drift needs a closure whose loss autograd can follow; this one has no graph")
