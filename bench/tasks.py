"""The tasks that need no file of the user's, and all tasks by name."""

import functools
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.diagnostic import DIAGNOSTIC, PLANE
from bench.task import (
    DATA,
    Batch,
    Classification,
    Objective,
    Regression,
    Splits,
    Task,
    TaskSpec,
    accuracy,
    join,
    outputs,
    stream,
)
from bench.vision import CIFAR, FASHION, IMAGENET

__all__ = ["DATA", "SUITES", "TASKS", "Batch", "Splits", "Task", "TaskSpec", "join", "stream"]

# Of the bytes of the four arrays, in the order of the archive.
FM14_SHA256 = "236bf96dbb42837abde09a2aff885f4dc8e8796f4daed4dc39b624dafc51a22f"


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


@functools.cache
def photo() -> Splits:
    """The pixels of a photograph that scikit-learn carries, block means of 6 x 6: place in [-1, 1] and colour.

    flower.jpg is by vultilion (CC BY 2.0), https://www.flickr.com/photos/vultilion/6056698931.
    """
    try:
        from sklearn.datasets import load_sample_image

        image = load_sample_image("flower.jpg")
    except ImportError as error:
        raise FileNotFoundError("photo-inr reads scikit-learn's photograph: pip install scikit-learn pillow") from error
    height, width = (size // 6 for size in image.shape[:2])
    blocks = image[: 6 * height, : 6 * width].reshape(height, 6, width, 6, 3)
    y, x = np.mgrid[:height, :width]
    places = (np.stack([x, y], -1) + 0.5 - [width / 2, height / 2]) * (2 / width)
    order = np.random.RandomState(0).permutation(height * width)
    inputs = torch.from_numpy(places.reshape(-1, 2)[order]).float()
    colours = torch.from_numpy(blocks.mean((1, 3)).reshape(-1, 3)[order] / 255).float()
    return Splits(*zip(inputs.split([4816, 1204, 1506]), colours.split([4816, 1204, 1506]), strict=True))


@functools.cache
def modular_addition() -> Splits:
    """Sequences of 6 numbers modulo 7, labelled with their running sums modulo 7."""
    numbers = np.random.RandomState(0).randint(0, MODULUS, (4000, 6))
    inputs, labels = torch.from_numpy(numbers), torch.from_numpy(numbers.cumsum(1) % MODULUS)
    return Splits(*zip(inputs.split([2000, 500, 1500]), labels.split([2000, 500, 1500]), strict=True))


@functools.cache
def breast_cancer() -> Batch:
    """The 569 cases of 30 measurements and 2 classes that scikit-learn carries, standardised."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise FileNotFoundError("softmax reads scikit-learn's data: pip install scikit-learn") from error
    inputs, labels = load_breast_cancer(return_X_y=True)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    return torch.from_numpy(inputs).float(), torch.from_numpy(labels)


class Fourier(nn.Module):
    """Sines and cosines of 32 fixed random frequencies (Tancik et al., 2020, https://arxiv.org/abs/2006.10739)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("waves", torch.randn(2, 32, generator=generator) * (4 * torch.pi))

    def forward(self, places: Tensor) -> Tensor:
        """(n, 2) to (n, 64)."""
        phases = places @ self.waves
        return torch.cat([phases.sin(), phases.cos()], 1)


def photo_mlp() -> nn.Module:
    """Two hidden layers of 64 on Fourier features."""
    return nn.Sequential(
        Fourier(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )  # fmt: skip


MODULUS = 7


class RunningSum(nn.Module):
    """A recurrent network that says the sum so far after every number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(MODULUS, 16)
        self.memory = nn.GRU(16, 48, batch_first=True)
        self.say = nn.Linear(48, MODULUS)

    def forward(self, numbers: Tensor) -> Tensor:
        """(n, length) to (n, modulus, length)."""
        return self.say(self.memory(self.embed(numbers))[0]).transpose(1, 2)


class Sums(Classification):
    """The accuracy is that of the last sum, which needs all numbers."""

    def evaluate(self, model: nn.Module, split: Batch) -> dict[str, float]:
        logits = outputs(model, split[0]).float()
        return {
            "accuracy": accuracy(logits[..., -1], split[1][:, -1]),
            "loss": F.cross_entropy(logits, split[1]).item(),
        }


SMOOTHING = 0.1  # of the labels: without it the classes can be told apart, and the minimum is at infinity


def softmax_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each row with smoothed labels."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=SMOOTHING)


@functools.cache
def softmax_least() -> float:
    """The minimum, by Newton's method in float64 on the difference of the two outputs."""
    inputs, labels = breast_cancer()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()

    def value(weights: Tensor) -> Tensor:
        difference = inputs @ weights
        logits = torch.stack([torch.zeros_like(difference), difference], 1)
        return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)

    weights = torch.zeros(inputs.shape[1], dtype=torch.float64)
    for _ in range(20):
        gradient = torch.autograd.functional.jacobian(value, weights)
        weights -= torch.linalg.solve(torch.autograd.functional.hessian(value, weights), gradient)
    return value(weights).item()


def _spec(name: str, target: float, epochs: int, batch: int, n_test: int, *tags: str) -> TaskSpec:
    return TaskSpec(name, 1, "accuracy", "max", target, epochs, batch, n_test, 0.1, frozenset(tags))


# Digits separates methods by speed only: all of them end within a point of each other.
EMBEDDED: tuple[Task, ...] = (
    Classification(_spec("fm14", 0.86, 8, 128, 2000), fm14, fm14_cnn),
    Classification(_spec("mnist1d", 0.90, 60, 128, 1000), mnist1d, mnist1d_cnn),
    Classification(_spec("digits-cnn", 0.98, 30, 64, 360, "saturated"), digits, digits_cnn),
    Classification(_spec("digits-mlp", 0.96, 40, 64, 360, "saturated"), digits, digits_mlp),
    Regression(
        TaskSpec("photo-inr", 1, "psnr", "max", 26.0, 40, 128, 1506, 12.7, se=0.1), lambda root: photo(), photo_mlp
    ),
    Sums(
        TaskSpec("modular-addition", 1, "accuracy", "max", 0.95, 24, 64, 1500, 1 / MODULUS),
        lambda root: modular_addition(),
        RunningSum,
    ),
    Objective(
        TaskSpec("softmax", 1, "log_gap", "min", -3.0, 60, 32, 0, 0.0, frozenset({"convex"}), se=0.05),
        breast_cancer,
        lambda: nn.Linear(30, 2),
        softmax_loss,
        softmax_least,
    ),
)
SHORT = Classification(_spec("mnist1d-short", 0.90, 15, 128, 1000), mnist1d, mnist1d_cnn)

TASKS: dict[str, Task] = {
    task.spec.name: task for task in (*EMBEDDED, SHORT, *PLANE, *DIAGNOSTIC, FASHION, *CIFAR, *IMAGENET)
}
SUITES: dict[str, tuple[str, ...]] = {
    "quick": (*(task.spec.name for task in PLANE), "digits-mlp", "mnist1d-short"),
    "embedded": tuple(task.spec.name for task in EMBEDDED),
    "diagnostic": tuple(task.spec.name for task in DIAGNOSTIC),
    "fashion": ("fashion",),
    "cifar": ("cifar10-resnet18", "cifar100-resnet18"),
    "imagenet": ("imagenet-resnet18",),
}
