"""Multiplicative updates on scikit-learn's digits, beside what the authors' code reached on them.

An MLP 64-64-10 with torch's initialization, 30 epochs, batch 64. Biases are multiplied as the weights are, as in those
runs: torch's are not zero.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from bench.markdown import source, spread, table
from optimzoo import DaleAdamW, DaleSGD, lognormal_

TRAIN, EPOCHS, BATCH = 1437, 30, 64


@dataclass(frozen=True)
class Row:
    """An optimizer and what the authors' code reached: mean and standard deviation in %, and flipped signs."""

    title: str
    build: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    published: tuple[float, float] | None
    flipped: float | None
    lognormal: bool = False  # the first layer


class Literal(torch.optim.Optimizer):
    """What DaleAdamW computes, written down without its bounds and checks: shows what is due to the data."""

    def __init__(self, params: Iterable[Tensor], **settings: float) -> None:
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates all parameters."""
        for group in self.param_groups:
            lr = group["lr"]
            for param in group["params"]:
                m, v, t = self.state[param].get("mvt", (0.0, 0.0, 0))
                t, m, v = t + 1, 0.9 * m + 0.1 * param.grad, 0.999 * v + 0.001 * param.grad**2
                self.state[param]["mvt"] = m, v, t
                direction = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                param.mul_(1 - lr * group["weight_decay"]).mul_((-lr * param.sign() * direction).exp())


ROWS = [
    Row("SGD .1, momentum .9", torch.optim.SGD, dict(lr=0.1, momentum=0.9), (97.78, 0.77), 0.197),
    Row("DaleSGD .1, momentum .9", DaleSGD, dict(lr=0.1, momentum=0.9), (96.00, 0.87), 0),
    Row("DaleSGD .5, momentum .9, log-normal", DaleSGD, dict(lr=0.5, momentum=0.9), (96.33, 0.89), 0, lognormal=True),
    Row("DaleSGD 1, no momentum", DaleSGD, dict(lr=1.0), (95.78, 1.45), 0),
    Row("DaleSGD 1, momentum .9", DaleSGD, dict(lr=1.0, momentum=0.9), (16.6, math.nan), None),
    Row("the same, exponent_clip 1", DaleSGD, dict(lr=1.0, momentum=0.9, exponent_clip=1.0), None, None),
    Row("the same, exponent_clip .03", DaleSGD, dict(lr=1.0, momentum=0.9, exponent_clip=0.03), None, None),
    Row("DaleAdamW .01, decay .01", DaleAdamW, dict(lr=0.01, weight_decay=0.01), (97.06, 0.76), 0),
    Row("DaleAdamW .1, decay .01", DaleAdamW, dict(lr=0.1, weight_decay=0.01), (90.11, 2.43), 0),
    Row("its formula in five lines", Literal, dict(lr=0.1, weight_decay=0.01), (90.11, 2.43), 0),
]


@dataclass
class Outcome:
    """The end of one run."""

    accuracy: float  # %
    flipped: float  # the share of weights and biases
    finite: bool


def signs(params: Iterable[Tensor]) -> Tensor:
    """Of all coordinates in a row."""
    return torch.cat([p.detach().flatten().sign() for p in params])


def train(row: Row, seed: int, epochs: int) -> Outcome:
    """One run; the seed determines the split, the initial weights and the order of the data."""
    torch.manual_seed(seed)
    images, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(targets))
    inputs, labels = torch.from_numpy(images).float()[order] / 16, torch.from_numpy(targets)[order]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    if row.lognormal:
        lognormal_(model[0].weight, mode="fan_out")
    optimizer = row.build(model.parameters(), **row.options)
    before = signs(model.parameters())
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        right = model(inputs[TRAIN:]).argmax(1) == labels[TRAIN:]
    return Outcome(
        100 * right.double().mean().item(),
        (signs(model.parameters()) != before).double().mean().item(),
        all(bool(p.isfinite().all()) for p in model.parameters()),
    )


def main(argv: list[str] | None = None) -> int:
    """Trains all, prints the table, and returns the exit code."""
    parser = argparse.ArgumentParser("bench.dale", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="default: 5")
    parser.add_argument("--quick", action="store_true", help="one seed and one epoch, to see that all of it runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    seeds, epochs = (1, 1) if args.quick else (args.seeds, EPOCHS)
    rows = []
    for row in ROWS:
        runs = [train(row, seed, epochs) for seed in range(seeds)]
        accuracy = [run.accuracy for run in runs]
        there, deviation = row.published or (math.nan, math.nan)
        distance = (statistics.fmean(accuracy) - there) / deviation
        rows.append([
            row.title,
            spread(accuracy),
            "-" if row.published is None else f"{there:g} ± {deviation:g}" if deviation == deviation else f"{there:g}",
            "-" if distance != distance else f"{distance:+.1f}",
            f"{statistics.fmean(run.flipped for run in runs):.3f}",
            "-" if row.flipped is None else f"{row.flipped:g}",
            f"{sum(run.finite for run in runs)} of {seeds}",
        ])  # fmt: skip
    head = ["optimizer", "test accuracy %", "authors' code", "difference, in its s.d.", "flipped signs",
            "authors' code", "finite"]  # fmt: skip
    print(table(head, rows))
    arguments = sys.argv[1:] if argv is None else argv
    print(
        f"\nMean ± s.d. over {seeds} seeds; {epochs} epochs, batch {BATCH}, no schedule, pixels in [0, 1]; each seed"
        f" splits the 1,797 images anew into {TRAIN} to train on and 360 to test. {source('bench.dale', arguments)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
