"""What a task is: data, a network, a loss, a metric. Everything follows from the seed."""

import copy
import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DATA = Path(__file__).with_name("data")

Batch = tuple[Tensor, Tensor]


class Splits(NamedTuple):
    """Inputs and labels of the three parts of a dataset."""

    train: Batch
    validation: Batch
    test: Batch


@dataclass(frozen=True)
class TaskSpec:
    """What the protocol and a report have to know of a task.

    Raise ``version`` when a change makes older runs incomparable.
    """

    name: str
    version: int
    metric: str
    mode: str  # "max" or "min": the better direction of the metric
    target: float  # the level that steps-to-target counts towards
    epochs: float
    batch: int
    n_test: int  # 0 where nothing is held out and the objective itself is measured
    chance: float  # the metric of a model that has learnt nothing
    tags: frozenset[str] = frozenset()
    se: float | None = None  # the standard error of one measurement; None: the metric is a rate, and so binomial
    dtype: str = "float32"  # of parameters, inputs and activations
    late_batch: int = 0  # the batch of the second half of the budget; 0: the same

    @property
    def sign(self) -> int:
        """+1 if more of the metric is better, -1 if less is."""
        return 1 if self.mode == "max" else -1

    @property
    def rate(self) -> bool:
        """Whether the metric is a share of cases, which a report shows in %."""
        return self.se is None

    def error(self, value: float, cases: int) -> float:
        """The standard error that one run's metric has from what it was measured on."""
        return math.sqrt(value * (1 - value) / cases) if self.se is None else self.se


class Task(Protocol):
    """The contract between a task and the training loop.

    A task may also have

    ``augment(batch, generator, epoch, rows) -> Batch``
        of the batch with these rows of the training data, on its device, by numbers of ``generator``;
    ``groups(model) -> list[tuple[list[Parameter], dict[str, float]]]``
        parameter groups, each with factors on hyper-parameters such as ``{"weight_decay": 0.0}``;
    ``download(root)``
        fetches what ``data(root)`` reads, for ``--download`` alone;
    ``batches(part, rows, seed, progress) -> Iterator[Batch]``
        for data that do not fit in memory: the parts of ``data`` are then datasets with ``len``, and this reads the
        rows of each batch in turn, augmented if ``seed`` is not None, with what depends on ``progress`` (in 0 .. 1) as
        it is there. ``join`` makes one part of several.

    Inputs of an integer type (pixels, tokens) keep it; the model makes numbers of them. ``evaluate`` takes a part as
    ``data`` gives it, on the device of the model.
    """

    @property
    def spec(self) -> TaskSpec: ...

    def data(self, root: Path | None = None) -> Splits:
        """The three parts. What is not embedded is read from ``root``.

        Raises:
            FileNotFoundError: if it is not there; the message shows the layout that is expected.
        """

    def model(self, seed: int) -> nn.Module: ...

    def loss(self, model: nn.Module, batch: Batch, *, reduction: str = "mean") -> Tensor: ...

    def evaluate(self, model: nn.Module, split: Batch) -> dict[str, float]: ...


def join(parts: list[Any]) -> Any:
    """One part made of several, of tensors or of datasets."""
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return parts[0] if len(parts) == 1 else torch.utils.data.ConcatDataset(parts)


def stream(name: str, seed: int, index: int = 0) -> int:
    """The seed of one named source of randomness, so that no source can shift another."""
    return int.from_bytes(hashlib.sha256(f"{name}/{seed}/{index}".encode()).digest()[:7], "little")


def seeded(net: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network with initial weights drawn for this seed; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("init", seed))
        return net()


@dataclass(frozen=True)
class Classification:
    """Cross-entropy on labelled tensors; the accuracy is the metric."""

    spec: TaskSpec
    load: Callable[[Path], Splits]
    net: Callable[[], nn.Module]

    def data(self, root: Path | None = None) -> Splits:
        return self.load(DATA)

    def model(self, seed: int) -> nn.Module:
        return seeded(self.net, seed)

    def loss(self, model: nn.Module, batch: Batch, *, reduction: str = "mean") -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(model(inputs).float(), labels, reduction=reduction)

    def evaluate(self, model: nn.Module, split: Batch) -> dict[str, float]:
        logits = outputs(model, split[0]).float()
        return {"accuracy": accuracy(logits, split[1]), "loss": F.cross_entropy(logits, split[1]).item()}


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """What the network makes of all inputs, in evaluation mode."""
    training = model.training
    model.eval()
    found = torch.cat([model(part) for part in inputs.split(500)])
    model.train(training)
    return found


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of labels that have the largest output."""
    return (logits.argmax(1) == labels).double().mean().item()


class Regression(Classification):
    """Squared error of values in [0, 1]; the metric is the peak signal-to-noise ratio in dB."""

    def loss(self, model: nn.Module, batch: Batch, *, reduction: str = "mean") -> Tensor:
        inputs, values = batch
        errors = (model(inputs).float() - values).square().mean(1)
        return errors.sum() if reduction == "sum" else errors if reduction == "none" else errors.mean()

    def evaluate(self, model: nn.Module, split: Batch) -> dict[str, float]:
        loss = (outputs(model, split[0]).float() - split[1]).square().mean().item()
        return {"psnr": -10 * math.log10(loss) if loss > 0 else math.inf, "loss": loss}


@dataclass(frozen=True)
class Objective:
    """A function to be minimised: nothing is held out, and the metric is the logarithm of what is left to gain.

    It is log10 of (f - f*) / (f0 - f*), where f is the mean over all rows in float64, f* its minimum, and f0 its value
    at the start of seed 0. Validation and test parts are empty.
    """

    spec: TaskSpec
    load: Callable[[], Batch]
    net: Callable[[], nn.Module]
    value: Callable[[nn.Module, Batch], Tensor]  # of each row
    least: Callable[[], float] = lambda: 0.0

    def data(self, root: Path | None = None) -> Splits:
        inputs, labels = self.load()
        nothing = inputs[:0], labels[:0]
        return Splits((inputs, labels), nothing, nothing)

    def model(self, seed: int) -> nn.Module:
        return seeded(self.net, seed)

    def loss(self, model: nn.Module, batch: Batch, *, reduction: str = "mean") -> Tensor:
        values = self.value(model, batch)
        return values.sum() if reduction == "sum" else values if reduction == "none" else values.mean()

    @torch.no_grad()
    def whole(self, model: nn.Module) -> float:
        """The mean over all rows, in float64."""
        device = next(model.parameters()).device
        inputs, labels = (part.to(device) for part in self.load())
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        return self.loss(copy.deepcopy(model).double(), (inputs, labels)).item()

    def evaluate(self, model: nn.Module, split: Batch) -> dict[str, float]:
        value = self.whole(model)
        least = self.least()
        left = (value - least) / (_start(self) - least)
        return {"log_gap": math.log10(max(left, 1e-12)) if math.isfinite(left) else math.inf, "loss": value - least}


@functools.cache
def _start(task: Objective) -> float:
    return task.whole(task.model(0))
