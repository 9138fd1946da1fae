"""One training run: a pure function of its settings that may be cut off anywhere and goes on from its checkpoint."""

import errno
import functools
import hashlib
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import loops
from bench.methods import OptSpec, find
from bench.schedule import factor
from bench.store import Record, Store, identity
from bench.tasks import TASKS, Batch, Task, TaskSpec, join, stream

EVALUATIONS = 20  # points of a learning curve after the first, which is taken before the first step
# The test split is opened by final runs alone, when every choice is made. Nothing is chosen by their curves: the last
# point is the result.
EVALUATED_ON = {"train": "validation", "train+validation": "test"}
# What the budget counts, in gradients (one forward and one backward pass of a sample): a forward pass is a third of it,
# a Hessian-vector product two.
COSTS = {"grads": 1.0, "forwards": 1 / 3, "hvps": 2.0}


@dataclass(frozen=True)
class Settings:
    """All that determines a run's result, and so its id.

    The ruleset is not among it: a run at the default learning rate serves every ruleset that asks for one.
    """

    task: str
    task_version: int
    method: str
    package: str
    hp: dict[str, Any]
    seed: int
    split: str  # what it trains on: a key of EVALUATED_ON
    budget: float = 1.0  # multiple of the epochs
    schedule: str = "cosine"
    dtype: str = "float32"  # of parameters, inputs and activations; the loss is taken in float32
    epochs: float = 0.0  # 0: the task's
    batch: int = 0  # 0: the task's
    amp: str = "off"  # or "bf16": activations in bfloat16
    world: int = 1  # processes that share a batch
    parallel: str = "ddp"  # how they do: "ddp", each with all weights, or "fsdp", each with a part

    @functools.cached_property
    def id(self) -> str:
        return identity(asdict(self))

    @property
    def phase(self) -> str:
        return "tune" if self.split == "train" else "final"


@dataclass(frozen=True)
class Machine:
    """What a run runs on; its result may depend on this in the last bits, and the record names it."""

    data_root: Path | None = None  # of tasks that are not embedded
    device: str = "cpu"
    threads: int = 1
    compile: bool = False
    checkpoint_every: float = 30.0  # seconds


class Stopped(Exception):
    """The run was asked to stop; its checkpoint is written."""


def weights_hash(state: dict[str, Tensor]) -> str:
    """A hash of every parameter and buffer, bit for bit."""
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The memory that an optimizer's state holds, storage shared between tensors counted once; of shards, this
    process's."""

    def within(value: Any) -> Iterator[Tensor]:
        """The tensors of a state, of its lists too, such as the history of L-BFGS."""
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                yield from within(item)

    values = [tensor for state in optimizer.state.values() for tensor in within(state)]
    tensors = [value.to_local() if hasattr(value, "to_local") else value for value in values]
    return sum({storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())


class Training:
    """A model, its optimizer and their place in the budget.

    The order of the data is a function of seed and epoch and the learning rate one of the budget used, so that neither
    has a state to save. The budget counts gradients of samples (see ``COSTS``); evaluation is neither counted nor
    timed. How a step is taken is in ``bench.loops``, by what the method needs.
    """

    def __init__(self, settings: Settings, machine: Machine = Machine()) -> None:  # frozen
        self.settings, self.machine = settings, machine
        self.task: Task = TASKS[settings.task]
        self.spec: TaskSpec = self.task.spec
        self.method: OptSpec = find(settings.method)
        self.take_step = loops.stepper(self.method, settings.world)
        self.device = torch.device(machine.device)
        self.dtype = getattr(torch, settings.dtype)
        data = self.task.data(machine.data_root)
        self.held_out: Any = self._placed(getattr(data, EVALUATED_ON[settings.split]))
        self.part: Any = self._placed(join([getattr(data, part) for part in settings.split.split("+")]))
        self.streamed = hasattr(self.task, "batches")
        self.size = len(self.part) if self.streamed else len(self.part[1])
        self.cases = len(self.held_out) if self.streamed else len(self.held_out[1])
        self.batch_size = settings.batch or self.spec.batch
        self.epochs = settings.epochs or self.spec.epochs
        self.budget = round(settings.budget * self.epochs * self.size)
        self.model = self.task.model(settings.seed).to(self.device, self.dtype)
        self.net: nn.Module = loops.distributed(self.model, settings) if settings.world > 1 else self.model
        if machine.compile:
            self.net = torch.compile(self.net)
        # What a method may draw from the global generator.
        torch.manual_seed(stream("noise", settings.seed, loops.rank(settings.world)))
        self.optimizer = self._build()
        self.peak_lrs = [group.get("lr", 0.0) for group in self.optimizer.param_groups]
        self.sets_lr = "hvp" not in self.method.needs
        self.clock: Record = dict.fromkeys(("steps", "drawn", "grads", "forwards", "hvps", "samples"), 0)
        self.clock |= {"wall_s": 0.0, "cpu_s": 0.0, "step_s": 0.0}
        self.epoch, self.order = -1, torch.empty(0)
        self.reader: Iterator[Batch] | None = None  # of streamed data
        self.losses: list[Any] = []  # since the last evaluation
        self.curve: list[Record] = []

    def _placed(self, part: Any) -> Any:
        """Tensors on the device, and of the run's dtype unless they are integers; other data as they are."""
        if not isinstance(part, tuple):
            return part
        inputs, labels = (tensor.to(self.device) for tensor in part)
        return (inputs.to(self.dtype) if inputs.is_floating_point() else inputs), labels

    def _build(self) -> Any:
        """The optimizer, from what the method takes in place of plain parameters."""
        hp, needs = dict(self.settings.hp), self.method.needs
        if "model" in needs:
            given: list[Any] = [self.model]
            if "layers" in needs:
                given.append(self.part[1])
        elif "two_groups" in needs:
            from bench.zoo import two_groups

            given = [two_groups(self.model)]
        elif hasattr(self.task, "groups"):
            given = [[
                {"params": params, **{name: share * hp[name] for name, share in shares.items() if name in hp}}
                for params, shares in self.task.groups(self.model)
            ]]  # fmt: skip
        else:
            given = [self.model.parameters()]
        if "per_sample" in needs:
            from optimzoo import PerSampleGradients

            given += [self.batch_size, self.size]
            self.engine = PerSampleGradients(self.model)
        optimizer = self.method.build(*given, **hp)
        if "batch_control" in needs:
            order = torch.Generator().manual_seed(stream("order", self.settings.seed))
            optimizer.attach(self.size, self.batch_size, order)  # type: ignore[attr-defined]
        return optimizer

    @property
    def progress(self) -> float:
        """The share of the budget that is used."""
        return min(self.clock["samples"] / self.budget, 1.0)

    @property
    def done(self) -> bool:
        return self.clock["samples"] >= self.budget

    @property
    def due(self) -> bool:
        """Whether the budget used has reached the next point of the learning curve."""
        reached = self.clock["samples"] * EVALUATIONS // self.budget
        return not self.curve or reached > self.curve[-1]["samples"] * EVALUATIONS // self.budget

    @property
    def lost(self) -> bool:
        """Whether the last loss is not finite; on an accelerator that is only asked where the curve has a point."""
        asked = self.losses and (self.device.type == "cpu" or self.due)
        return bool(asked) and not math.isfinite(float(self.losses[-1]))

    @property
    def inputs(self) -> Tensor:
        return self.part[0]

    @property
    def labels(self) -> Tensor:
        return self.part[1]

    def count(self, **spent: int) -> None:
        """Adds samples to the counts of gradients, forward passes or Hessian-vector products."""
        for name, samples in spent.items():
            self.clock[name] += samples
        cost = sum(weight * self.clock[name] for name, weight in COSTS.items())
        self.clock["samples"] = round(cost) if abs(cost - round(cost)) < 1e-6 else cost

    def rows(self, epoch: int, place: int) -> Tensor:
        """The rows of the training data from this place in an epoch on."""
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(stream("order", self.settings.seed, epoch))
            self.epoch, self.order = epoch, torch.randperm(self.size, generator=generator)
            self.reader = None
        return self.order[place:]

    def batch(self) -> Batch:
        """The next batch, or this process's share of it."""
        epoch, place = divmod(self.clock["drawn"], self.size)
        size = self.spec.late_batch if self.spec.late_batch and self.progress >= 0.5 else self.batch_size
        rest = self.rows(epoch, place)
        rows = rest[:size]
        self.clock["drawn"] += len(rows)
        self.shared = len(rows)  # samples of the batch, in all processes
        self.share, mine = loops.share(rows, self.settings.world)
        if self.streamed:
            if self.reader is None:
                batches = [loops.share(rows, self.settings.world)[1] for rows in rest.split(size)]
                seed = stream("augment", self.settings.seed, epoch)
                begun = min(epoch * self.size / self.budget, 1.0)  # of the epoch, whether it is gone into again or not
                self.reader = self.task.batches(self.part, batches, seed, begun)  # type: ignore[attr-defined]
            inputs, labels = next(self.reader)
            return inputs.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        return self.take(mine, epoch)

    def take(self, rows: Tensor, epoch: int, part: int = 0) -> Batch:
        """These rows of data in memory, augmented if the task does so; ``part`` tells a step's micro-batches apart."""
        batch = self.part[0][rows], self.part[1][rows]
        if not hasattr(self.task, "augment"):
            return batch
        generator = torch.Generator(self.device)
        generator.manual_seed(stream(f"augment{part or ''}", self.settings.seed, self.clock["steps"]))
        augmented: Batch = self.task.augment(batch, generator, epoch, rows)
        return augmented

    def loss(self, batch: Batch, net: Any = None) -> Tensor:
        """The mean loss of a batch, by the network or by what stands in its place."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp == "bf16"):
            return self.task.loss(self.net if net is None else net, batch)

    def backward(self, batch: Batch, weight: float = 1.0) -> Tensor:
        """Leaves the gradient of ``weight`` times the loss, added to what is there, and returns the loss."""
        self.count(grads=len(batch[1]) if self.settings.world == 1 else self.shared)
        loss = self.loss(batch)
        (loss * (weight * self.share)).backward() if weight * self.share != 1 else loss.backward()
        return loss.detach()

    def advance(self) -> Any:
        """Takes one step and returns the loss before it: a number, or on an accelerator a tensor of it."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.share = 1.0
        self.factor = factor(self.settings.schedule, self.progress)
        for group, lr in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            if "lr" in group and self.sets_lr:
                group["lr"] = lr * self.factor
        loss = self.take_step(self)
        if self.settings.world > 1:
            loss = loops.mean(loss * self.share)
        if self.device.type == "cpu":
            loss = float(loss)
        self.clock["steps"] += 1
        self.clock["wall_s"] += time.perf_counter() - wall
        self.clock["cpu_s"] += time.process_time() - cpu
        self.losses.append(loss)
        return loss

    def timed_step(self) -> None:
        """The optimizer's step alone."""
        start = time.perf_counter()
        self.optimizer.step()
        self.clock["step_s"] += time.perf_counter() - start

    def evaluate(self) -> Record:
        """Adds a point to the learning curve: held-out metrics, and the mean training loss since the last point."""
        if self.device.type == "cuda":
            start = time.perf_counter()
            torch.cuda.synchronize(self.device)
            self.clock["wall_s"] += time.perf_counter() - start
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp == "bf16"):
            metrics = loops.evaluate(self)
        train_loss = float(sum(self.losses)) / len(self.losses) if self.losses else None
        self.losses.clear()
        self.curve.append({**self.clock, "train_loss": train_loss, **metrics})
        return self.curve[-1]

    def place(self) -> Record:
        """Where the run stands between two steps, without model and optimizer."""
        place = {
            "noise": torch.get_rng_state(),
            "clock": self.clock,
            "curve": self.curve,
            "losses": [float(loss) for loss in self.losses],
        }
        return place | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def take_place(self, place: Record) -> None:
        torch.set_rng_state(place["noise"])
        if "cuda" in place:
            torch.cuda.set_rng_state(place["cuda"], self.device)
        self.clock, self.curve, self.losses = place["clock"], place["curve"], place["losses"]

    def state_dict(self) -> Record:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **self.place()}

    def load_state_dict(self, state: Record) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.take_place(state)


def failure(spec: TaskSpec, curve: list[Record], cases: int) -> str:
    """How a finished run failed, or "ok".

    A collapse ends at chance with a finite loss, so looking for NaN is not enough.
    """
    first, last = curve[0], curve[-1]
    loss = last["train_loss"]
    if loss is None or not math.isfinite(loss) or not math.isfinite(last["loss"]) or loss > 10 * first["loss"]:
        return "diverged"
    margin = 2 * spec.error(spec.chance, max(cases, 1))
    return "chance" if spec.sign * (last[spec.metric] - spec.chance) <= margin else "ok"


def to_target(spec: TaskSpec, curve: list[Record], size: int) -> float | None:
    """The epochs' worth of gradients until the held-out metric first reaches the target, or None."""
    reached = (row["samples"] for row in curve if spec.sign * row[spec.metric] >= spec.sign * spec.target)
    return next((samples / size for samples in reached), None)


def train(
    settings: Settings,
    store: Store,
    checkpoint_every: float | None = None,
    on_evaluation: Callable[[float, Record], None] = lambda progress, row: None,
    machine: Machine = Machine(),  # frozen
    stopping: Callable[[], bool] = lambda: False,
) -> Record:
    """Trains to the end of the budget, from the checkpoint if there is one, and returns the record of the run.

    Args:
        settings: the run.
        store: where its checkpoint is kept. The curve is in the record, for :meth:`Store.append` to write.
        checkpoint_every: seconds between checkpoints. Default: the machine's.
        on_evaluation: called with the share of the budget used and the newest point of the curve.
        machine: what it runs on.
        stopping: asked after each step; if true the run writes a checkpoint and stops.

    Raises:
        Stopped: ``stopping`` said so.
    """
    every = machine.checkpoint_every if checkpoint_every is None else checkpoint_every
    peak = Peak(machine.device)
    run = Training(settings, machine)
    spec, checkpoints = run.spec, loops.checkpoints(run, store)
    checkpoints.load()
    saved = time.monotonic()
    while run.due or not run.done:
        if run.due:
            on_evaluation(run.progress, run.evaluate())
        else:
            run.advance()
            if run.lost:
                run.evaluate()
                break
        if run.done or run.clock["steps"] % loops.ask_every(settings.world):
            continue
        stop, late = loops.agreed(settings.world, stopping(), time.monotonic() - saved >= every)
        if stop or late:
            checkpoints.save()
            saved = time.monotonic()
        if stop:
            raise Stopped
    last, counted = run.curve[-1], ("steps", "grads", "forwards", "hvps", "samples")
    plain = not run.method.needs & loops.STEPS.keys() and run.device.type == "cpu"
    return {
        "id": settings.id,
        "status": failure(spec, run.curve, run.cases),
        "phase": settings.phase,
        "settings": asdict(settings),
        "metrics": {spec.metric: last[spec.metric], "loss": last["loss"], "train_loss": last["train_loss"]},
        "cases": run.cases,
        "to_target": to_target(spec, run.curve, run.size),
        "counts": {key: run.clock[key] for key in counted},
        "wall_s": run.clock["wall_s"],
        "cpu_s": run.clock["cpu_s"],
        "step_ms": 1e3 * run.clock["step_s"] / run.clock["steps"] if plain and run.clock["steps"] else None,
        "state_bytes": state_bytes(run.optimizer),
        "peak_bytes": peak.bytes(),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "weights": weights_hash(checkpoints.weights()),
        "error": checkpoints.error,
        "curve": run.curve,
        "env": {
            **environment(machine.device),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 2),
        },
    }


def error_record(settings: Settings, error: str, status: str = "error", device: str = "cpu") -> Record:
    """The record of a run that raised, or whose process died: ``error``, ``oom`` or ``timeout``."""
    return {
        "id": settings.id,
        "status": status,
        "phase": settings.phase,
        "settings": asdict(settings),
        "error": error,
        "env": environment(device),
    }


def fate(error: BaseException) -> str:
    """``oom`` for an error that says that memory ran out, else ``error``."""
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return "oom" if memory or "can't allocate memory" in str(error) else "error"


class Peak:
    """The most memory that the process has held since this was made, where the system tells it."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device) if device.startswith("cuda") else None
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.bytes = lambda: None  # type: ignore[method-assign]

    def bytes(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.cuda)
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


@functools.cache
def environment(device: str = "cpu") -> Record:
    """The machine and the versions that a number was measured with."""
    return {
        "cpu": cpu_model(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git": _git_commit(),
    }


def cpu_model() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_commit() -> str | None:
    """The commit of the benchmark's own folder, "+" after it if files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
