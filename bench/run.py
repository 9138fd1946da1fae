"""One training run: a pure function of its settings that may be cut off anywhere and goes on from its checkpoint."""

import functools
import hashlib
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.methods import find
from bench.stats import binomial_se
from bench.store import Record, Store, identity
from bench.tasks import TASKS, Batch, TaskSpec, stream

EVALUATIONS = 20  # points of a learning curve after the first, which is taken before the first step
# The test split is opened by final runs alone, when every choice is made. Nothing is chosen by their curves: the last
# point is the result.
EVALUATED_ON = {"train": "validation", "train+validation": "test"}
PROVIDED = frozenset({"closure"})  # the needs that this loop can meet


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
    budget: float = 1.0  # multiple of the task's epochs
    schedule: str = "cosine"
    dtype: str = "float32"  # of parameters, inputs and activations; the loss is taken in float32

    @property
    def id(self) -> str:
        return identity(asdict(self))

    @property
    def phase(self) -> str:
        return "tune" if self.split == "train" else "final"


def cosine(progress: float) -> float:
    """The factor on the learning rate once a share of the budget is used."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def weights_hash(model: nn.Module) -> str:
    """A hash of every parameter and buffer, bit for bit."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The memory that an optimizer's state holds, storage shared between tensors counted once."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())


class Training:
    """A model, its optimizer and their place in the budget.

    The order of the data is a function of seed and epoch and the learning rate one of the budget used, so that neither
    has a state to save. The budget counts samples whose gradient was taken; evaluation is neither counted nor timed.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.task = TASKS[settings.task]
        method = find(settings.method)
        if missing := method.needs - PROVIDED:
            raise NotImplementedError(f"{method.name} needs {', '.join(sorted(missing))}; this loop has no such thing")
        self.takes_closure = "closure" in method.needs
        data = self.task.data()
        dtype = getattr(torch, settings.dtype)
        inputs, labels = getattr(data, EVALUATED_ON[settings.split])
        self.held_out: Batch = (inputs.to(dtype), labels)
        parts = [getattr(data, part) for part in settings.split.split("+")]
        self.inputs, self.labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self.inputs = self.inputs.to(dtype)
        self.size = len(self.labels)
        self.budget = round(settings.budget * self.task.spec.epochs * self.size)
        self.model = self.task.model(settings.seed).to(dtype)
        self.optimizer = method.build(self.model.parameters(), **settings.hp)
        self.peak_lrs = [group.get("lr", 0.0) for group in self.optimizer.param_groups]
        torch.manual_seed(stream("noise", settings.seed))  # what a method may draw from the global generator
        self.clock: Record = {"steps": 0, "grads": 0, "samples": 0, "wall_s": 0.0, "cpu_s": 0.0, "step_s": 0.0}
        self.epoch, self.order = -1, torch.empty(0)
        self.losses: list[float] = []  # since the last evaluation
        self.curve: list[Record] = []

    @property
    def done(self) -> bool:
        return self.clock["samples"] >= self.budget

    @property
    def due(self) -> bool:
        """Whether the budget used has reached the next point of the learning curve."""
        reached = self.clock["samples"] * EVALUATIONS // self.budget
        return not self.curve or reached > self.curve[-1]["samples"] * EVALUATIONS // self.budget

    def _batch(self) -> Batch:
        size = self.task.spec.batch
        epoch, place = divmod(self.clock["steps"], math.ceil(self.size / size))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(stream("order", self.settings.seed, epoch))
            self.epoch, self.order = epoch, torch.randperm(self.size, generator=generator)
        rows = self.order[place * size : (place + 1) * size]
        return self.inputs[rows], self.labels[rows]

    def advance(self) -> float:
        """Takes one step and returns the loss before it."""
        wall, cpu = time.perf_counter(), time.process_time()
        batch = self._batch()
        for group, lr in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            if "lr" in group:
                group["lr"] = lr * cosine(self.clock["samples"] / self.budget)
        losses = []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model, batch)
            loss.backward()
            losses.append(loss.item())
            return loss

        if self.takes_closure:
            self.optimizer.step(closure)
        else:
            closure()
            start = time.perf_counter()
            self.optimizer.step()
            self.clock["step_s"] += time.perf_counter() - start
        self.clock["steps"] += 1
        self.clock["grads"] += len(losses)
        self.clock["samples"] += len(losses) * len(batch[1])
        self.clock["wall_s"] += time.perf_counter() - wall
        self.clock["cpu_s"] += time.process_time() - cpu
        self.losses.append(losses[0])
        return losses[0]

    def evaluate(self) -> Record:
        """Adds a point to the learning curve: held-out metrics, and the mean training loss since the last point."""
        metrics = self.task.evaluate(self.model, self.held_out)
        train_loss = sum(self.losses) / len(self.losses) if self.losses else None
        self.losses.clear()
        self.curve.append({**self.clock, "train_loss": train_loss, **metrics})
        return self.curve[-1]

    def state_dict(self) -> Record:
        """Where the run stands, to be taken right after an evaluation."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "noise": torch.get_rng_state(),
            "clock": self.clock,
            "curve": self.curve,
        }

    def load_state_dict(self, state: Record) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["noise"])
        self.clock, self.curve = state["clock"], state["curve"]


def failure(spec: TaskSpec, curve: list[Record], cases: int) -> str:
    """How a finished run failed, or "ok".

    A collapse ends at chance with a finite loss, so looking for NaN is not enough.
    """
    first, last = curve[0], curve[-1]
    loss = last["train_loss"]
    if loss is None or not math.isfinite(loss) or not math.isfinite(last["loss"]) or loss > 10 * first["loss"]:
        return "diverged"
    margin = 2 * binomial_se(spec.chance, cases)
    return "chance" if spec.sign * (last[spec.metric] - spec.chance) <= margin else "ok"


def to_target(spec: TaskSpec, curve: list[Record], size: int) -> float | None:
    """The epochs' worth of gradients until the held-out metric first reaches the target, or None."""
    reached = (row["samples"] for row in curve if spec.sign * row[spec.metric] >= spec.sign * spec.target)
    return next((samples / size for samples in reached), None)


def train(
    settings: Settings,
    store: Store,
    checkpoint_every: float = 30.0,
    on_evaluation: Callable[[float, Record], None] = lambda progress, row: None,
) -> Record:
    """Trains to the end of the budget, from the checkpoint if there is one, and returns the record of the run.

    Args:
        settings: the run.
        store: where its checkpoint and curve are kept.
        checkpoint_every: seconds between checkpoints; one is only taken at a point of the learning curve.
        on_evaluation: called with the share of the budget used and the newest point of the curve.
    """
    run = Training(settings)
    spec = run.task.spec
    if state := store.checkpoint(settings.id):
        run.load_state_dict(state)
    saved = time.monotonic()
    while run.due or not run.done:
        if run.due:
            on_evaluation(min(run.clock["samples"] / run.budget, 1), run.evaluate())
            if time.monotonic() - saved >= checkpoint_every and not run.done:
                store.save_checkpoint(settings.id, run.state_dict())
                saved = time.monotonic()
        elif not math.isfinite(run.advance()):
            run.evaluate()
            break
    store.save_curve(settings.id, run.curve)
    last = run.curve[-1]
    return {
        "id": settings.id,
        "status": failure(spec, run.curve, len(run.held_out[1])),
        "phase": settings.phase,
        "settings": asdict(settings),
        "metrics": {spec.metric: last[spec.metric], "loss": last["loss"], "train_loss": last["train_loss"]},
        "cases": len(run.held_out[1]),
        "to_target": to_target(spec, run.curve, run.size),
        "counts": {key: run.clock[key] for key in ("steps", "grads", "samples")},
        "wall_s": run.clock["wall_s"],
        "cpu_s": run.clock["cpu_s"],
        "step_ms": None if run.takes_closure else 1e3 * run.clock["step_s"] / run.clock["steps"],
        "state_bytes": state_bytes(run.optimizer),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "weights": weights_hash(run.model),
        "error": None,
        "env": {**environment(), "load": round(os.getloadavg()[0], 2)},
    }


def error_record(settings: Settings, error: str) -> Record:
    """The record of a run that raised, or whose process died."""
    return {
        "id": settings.id,
        "status": "error",
        "phase": settings.phase,
        "settings": asdict(settings),
        "error": error,
        "env": environment(),
    }


@functools.cache
def environment() -> Record:
    """The machine and the versions that a number was measured with."""
    return {
        "cpu": cpu_model(),
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
