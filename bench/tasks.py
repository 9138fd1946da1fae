"""The tasks: data, a network, a loss, a metric. Everything follows from the seed."""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DATA = Path(__file__).with_name("data")
# Of the bytes of the four arrays, in the order of the archive.
FM14_SHA256 = "236bf96dbb42837abde09a2aff885f4dc8e8796f4daed4dc39b624dafc51a22f"

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


@dataclass(frozen=True)
class Classification:
    """Cross-entropy on labelled tensors."""

    spec: TaskSpec
    load: Callable[[Path], Splits]
    net: Callable[[], nn.Module]

    def data(self, root: Path | None = None) -> Splits:
        return self.load(DATA)

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream("init", seed))
            return self.net()

    def loss(self, model: nn.Module, batch: Batch, *, reduction: str = "mean") -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(model(inputs).float(), labels, reduction=reduction)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Batch) -> dict[str, float]:
        training = model.training
        model.eval()
        logits = torch.cat([model(inputs) for inputs in split[0].split(500)]).float()
        model.train(training)
        return {
            "accuracy": (logits.argmax(1) == split[1]).double().mean().item(),
            "loss": F.cross_entropy(logits, split[1]).item(),
        }


def _splits(inputs: np.ndarray, labels: np.ndarray, train: int, validation: int, order: np.ndarray) -> Splits:
    """Standardises by the training part and cuts ``order`` into the three parts."""
    x = torch.from_numpy(inputs[order]).float()
    y = torch.from_numpy(labels[order]).long()
    x = (x - x[:train].mean()) / x[:train].std()
    cuts = slice(train), slice(train, train + validation), slice(train + validation, None)
    return Splits(*((x[cut], y[cut]) for cut in cuts))


@functools.cache
def digits(root: Path) -> Splits:
    """The 1,797 8 x 8 digits that scikit-learn carries."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FileNotFoundError("the digits tasks read scikit-learn's data: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    return _splits(images.reshape(-1, 1, 8, 8), labels, 1149, 288, order)


def make_mnist1d(templates: np.ndarray, samples: int = 5000, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """MNIST-1D (Greydanus, 2020, https://arxiv.org/abs/2011.14439) with the published parameters and seed.

    ``RandomState`` draws the published sequence and is frozen by numpy; a ``Generator`` would be neither.
    """
    rng = np.random.RandomState(seed)
    digits = (templates - templates.mean(1, keepdims=True)) / templates.std(1, keepdims=True)
    digits = (digits - digits[:, :1]) / 6
    kernel = np.exp(-0.5 * (np.arange(-8, 9) / 2) ** 2)  # a Gaussian of 2 samples, cut at 4 deviations
    kernel /= kernel.sum()

    def resample(signal: np.ndarray, length: int) -> np.ndarray:
        return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(signal)), signal)

    def draw(digit: np.ndarray) -> np.ndarray:
        blank = np.zeros(36 + int(rng.rand() * 25))
        # The digit's own zeros must not count as blank, hence the offset.
        signal = resample(np.concatenate([digit + 1e-8, blank]), 72) * (1 + 0.4 * (rng.rand() - 0.5))
        signal = np.roll(signal, rng.choice(48))
        background = np.convolve(np.pad(0.25 * rng.randn(72), 8, "symmetric"), kernel, "valid")
        signal = np.where(signal != 0, signal, background) + 0.02 * rng.randn(72)
        return resample(signal - 0.75 * (rng.rand() - 0.5) * np.linspace(-0.5, 0.5, 72), 40)

    labels = np.repeat(np.arange(10), samples // 10)
    signals = np.stack([draw(digits[label]) for label in labels])
    order = rng.permutation(len(labels))
    return ((signals - signals.mean()) / signals.std())[order], labels[order]


@functools.cache
def mnist1d(root: Path) -> Splits:
    """Ten digit-like curves, shifted, scaled, sheared and drowned in correlated noise."""
    signals, labels = make_mnist1d(np.loadtxt(root / "mnist1d_templates.txt"))
    return _splits(signals[:, None], labels, 3200, 800, np.arange(len(labels)))


@functools.cache
def fm14(root: Path) -> Splits:
    """Fashion-MNIST at 14 x 14, 10,000 + 2,000 images; ``data/build_fm14.py`` made the file."""
    file = root / "fm14.npz"
    with np.load(file) as archive:
        arrays = dict(archive)
    if hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest() != FM14_SHA256:
        raise ValueError(f"{file} is not the file this benchmark was made with; bench/data/build_fm14.py rebuilds it")
    images = np.concatenate([arrays["train_images"], arrays["test_images"]])[:, None]
    labels = np.concatenate([arrays["train_labels"], arrays["test_labels"]])
    return _splits(images, labels, 8000, 2000, np.arange(len(labels)))


def digits_mlp() -> nn.Module:
    """Two hidden layers of 128."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def digits_cnn() -> nn.Module:
    """Three convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def mnist1d_cnn() -> nn.Module:
    """The three convolutions of 25 channels that the data were published with."""
    return nn.Sequential(
        nn.Conv1d(1, 25, 5, stride=2, padding=1), nn.ReLU(), nn.Conv1d(25, 25, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv1d(25, 25, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(125, 10),
    )  # fmt: skip


def fm14_cnn() -> nn.Module:
    """Two convolutions with batch normalisation, one hidden layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def _spec(name: str, target: float, epochs: int, batch: int, n_test: int, *tags: str) -> TaskSpec:
    return TaskSpec(name, 1, "accuracy", "max", target, epochs, batch, n_test, 0.1, frozenset(tags))


# Digits separates methods by speed only: all of them end within a point of each other.
TASKS: dict[str, Task] = {
    task.spec.name: task
    for task in (
        Classification(_spec("fm14", 0.86, 8, 128, 2000), fm14, fm14_cnn),
        Classification(_spec("mnist1d", 0.90, 60, 128, 1000), mnist1d, mnist1d_cnn),
        Classification(_spec("digits-cnn", 0.98, 30, 64, 360, "saturated"), digits, digits_cnn),
        Classification(_spec("digits-mlp", 0.96, 40, 64, 360, "saturated"), digits, digits_mlp),
    )
}

SUITES: dict[str, tuple[str, ...]] = {
    "quick": ("digits-mlp",),
    "embedded": ("fm14", "mnist1d", "digits-cnn", "digits-mlp"),
}
