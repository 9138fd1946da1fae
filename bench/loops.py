"""How a step of training is taken by what the method needs, and what several processes that share a batch do together.

A step takes the ``Training``, draws its batch, counts what it spends and returns the loss before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from bench.methods import OptSpec
    from bench.run import Settings, Training
    from bench.store import Store


def by_gradient(run: Training) -> Tensor:
    """The gradient of the batch, and a step."""
    run.optimizer.zero_grad()
    loss = run.backward(run.batch())
    run.timed_step()
    return loss


def by_closure(run: Training) -> Tensor:
    """A step that takes gradients as often as it likes."""
    batch, losses = run.batch(), []

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        losses.append(run.backward(batch))
        return losses[-1]

    run.optimizer.step(closure)
    return losses[0]


def by_loss(run: Training) -> Any:
    """A step that takes losses alone."""
    batch = run.batch()

    def closure() -> Tensor:
        run.count(forwards=len(batch[1]))
        return run.loss(batch)

    with torch.no_grad():
        return run.optimizer.step(closure)


def by_targets(run: Training) -> Tensor:
    """A step on a surrogate of the loss in the outputs; a pass that goes back counts as a gradient."""
    batch, before = run.batch(), dict(run.optimizer.counts)

    def closure() -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return run.net(batch[0]), lambda outputs: run.loss(batch, lambda inputs: outputs)

    loss: Tensor = run.optimizer.step(closure)
    spent = {name: count - before[name] for name, count in run.optimizer.counts.items()}
    samples, backwards = len(batch[1]), spent["backwards"]
    run.count(grads=samples * backwards, forwards=samples * max(0, spent["forwards"] - backwards))
    return loss


def by_layers(run: Training) -> Tensor:
    """Gradients of the layers from a forward pass within ``targets``; it counts as a gradient."""
    batch = run.batch()
    run.optimizer.zero_grad()
    with run.optimizer.targets(batch[1], lambda outputs, labels: run.loss(batch, lambda inputs: outputs)):
        run.net(batch[0])
    run.count(grads=len(batch[1]))
    run.timed_step()
    return run.optimizer.loss


def by_looks(run: Training) -> Tensor:
    """The gradient of the batch and a step, then a look at the curvature of the same loss."""
    batch = run.batch()
    run.optimizer.zero_grad()
    loss = run.backward(batch)
    run.optimizer.step()

    def closure() -> Tensor:
        run.count(grads=len(batch[1]))
        return run.loss(batch)

    run.optimizer.factor = run.factor
    run.count(hvps=len(batch[1]) * run.optimizer.look(closure))
    return loss


def by_samples(run: Training) -> Tensor:
    """The gradient of each sample, and a step."""
    run.optimizer.zero_grad()
    loss = run.backward(run.batch())
    run.optimizer.step()
    return loss


def by_growing(run: Training) -> Tensor:
    """A batch of the size that the method chose, in micro-batches, and a step."""
    schedule, total = run.optimizer.schedule, 0.0
    run.optimizer.zero_grad()
    for part in itertools.count():
        rows = torch.tensor(run.optimizer.rows())
        weight = schedule.weight
        loss = run.backward(run.take(rows, run.optimizer.sampler.epoch, part), weight)
        total += weight * float(loss)
        if not schedule.remaining:
            break
    run.optimizer.step()
    schedule.step()
    return torch.tensor(total)


STEPS: dict[str, Callable[[Training], Any]] = {
    "closure": by_closure,
    "forward_only": by_loss,
    "targets": by_targets,
    "layers": by_layers,
    "hvp": by_looks,
    "per_sample": by_samples,
    "batch_control": by_growing,
}
SHARED = frozenset({"closure", "two_groups"})  # the needs that several processes can meet


def stepper(method: OptSpec, world: int) -> Callable[[Training], Any]:
    """How this method steps.

    Raises:
        NotImplementedError: it needs what several processes do not give.
    """
    if world > 1 and (missing := method.needs - SHARED):
        raise NotImplementedError(f"{method.name} needs {', '.join(sorted(missing))}, which is for one process alone")
    return next((step for need, step in STEPS.items() if need in method.needs), by_gradient)


# Several processes


def share(rows: Tensor, world: int) -> tuple[float, Tensor]:
    """This process's rows of a batch, and what the weight of their mean loss is to that of equal shares.

    A batch with fewer rows than processes gives the others a row of no weight, so that all of them take part.
    """
    if world == 1:
        return 1.0, rows
    mine = rows[dist.get_rank() :: world]
    return (len(mine) * world / len(rows), mine) if len(mine) else (0.0, rows[:1])


def mean(value: Any) -> Tensor:
    """The mean over all processes."""
    total = torch.as_tensor(value).detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def rank(world: int) -> int:
    """Of this process."""
    return 0 if world == 1 else dist.get_rank()


def ask_every(world: int) -> int:
    """Steps from one agreement to the next: it costs several processes a wait for each other."""
    return 1 if world == 1 else 8


def agreed(world: int, *flags: bool) -> list[bool]:
    """Which flags are up in some process, so that all of them act alike."""
    if world == 1:
        return list(flags)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return (mean(torch.tensor(flags, dtype=torch.float32, device=device)) > 0).tolist()


def distributed(model: nn.Module, settings: Settings) -> nn.Module:
    """The network that shares its gradients, or also its weights, with the other processes."""
    if settings.parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sharded: nn.Module = fully_shard(model, mesh=init_device_mesh(device, (settings.world,)))
    return sharded


def evaluate(run: Training) -> dict[str, float]:
    """The held-out metrics. Processes with all weights evaluate a part each where the metrics are means."""
    world = run.settings.world
    if world == 1 or run.settings.parallel == "fsdp" or not run.spec.rate or run.streamed:
        return run.task.evaluate(run.model, run.held_out)
    for buffer in run.model.buffers():  # those of the first process are the model's
        dist.broadcast(buffer, 0)
    weight, rows = share(torch.arange(run.cases), world)
    metrics = run.task.evaluate(run.model, (run.held_out[0][rows], run.held_out[1][rows]))
    values = mean(torch.tensor([weight * value for value in metrics.values()], dtype=torch.float64))
    return dict(zip(metrics, values.tolist(), strict=True))


# Checkpoints


class Whole:
    """The checkpoint of a run in one process."""

    def __init__(self, run: Training, store: Store) -> None:
        self.run, self.store = run, store
        self.error: str | None = None  # why the last could not be written

    def load(self) -> None:
        if state := self.store.checkpoint(self.run.settings.id):
            self.run.load_state_dict(state)

    def save(self) -> None:
        """Writes it; a run without a place for its checkpoint goes on without one."""
        try:
            self._save()
            self.error = None
        except OSError as error:
            self.error = f"no checkpoint: {error}"

    def _save(self) -> None:
        self.store.save_checkpoint(self.run.settings.id, self.run.state_dict())

    def weights(self) -> dict[str, Tensor]:
        """All parameters and buffers, whole."""
        return self.run.model.state_dict()


def checkpoints(run: Training, store: Store) -> Whole:
    """How this run keeps its place."""
    if run.settings.world == 1:
        return Whole(run, store)
    from bench.distributed import Sharded

    return Sharded(run, store)
