"""Private training at equal epsilon: DP-SGD, automatic clipping, and DiceSGD over a grid of error bounds.

All claims are of one accountant, optimzoo.privacy's; the noise of each method is what it asks for that epsilon. Rates
are chosen on the validation part, for every method from the same grid and by as many runs, and their cost in privacy is
not counted, for any of them.
"""

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bench.markdown import source, spread, table
from bench.store import Store, identity
from bench.tasks import TASKS, stream
from optimzoo import DPSGD, DiceSGD, PerSampleGradients, PoissonSampler, privacy

DELTA = 1e-5
RATE = 0.05  # of the samples in a batch, on average
STEPS = 400
BOUND = 1.0  # of a sample's gradient
EPSILONS = (2.0, 4.0, 8.0)
ERRORS = (0.001, 0.01, 0.1, 1.0)  # bounds of the error over that of a gradient
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
TASK = "fm14"

Job = tuple[Any, ...]


@functools.cache
def noise(epsilon: float, error: float, steps: int) -> float:
    """The standard deviation on the sum that a method needs; none for an infinite epsilon."""
    if epsilon == float("inf"):
        return 0.0
    return privacy.noise_std_for(
        epsilon, DELTA, max_grad_norm=BOUND, error_norm_sum=error * BOUND, sample_rate=RATE, steps=steps
    )


def network(x: torch.Tensor, seed: int) -> nn.Module:
    """An MLP: those of the tasks may have batch normalisation, which mixes samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("init", seed))
        return nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 64), nn.ReLU(), nn.Linear(64, 10))


def run(
    task: str, seed: int, split: str, clipping: str, error: float, std: float, lr: float, steps: int
) -> dict[str, Any]:
    """Trains once, and tests on the part that goes with the split."""
    torch.set_num_threads(1)
    data = TASKS[task].data()
    x, y = data.train if split == "train" else tuple(map(torch.cat, zip(data.train, data.validation, strict=True)))
    model = network(x, seed)
    size = 100 * round(len(x) / 100)  # a public, round number
    options: dict[str, Any] = dict(
        lr=lr,
        max_grad_norm=BOUND,
        noise_std_sum=std,
        expected_batch_size=RATE * size,
        sample_rate=RATE,
        momentum=0.9,
        clipping=clipping,
        generator=torch.Generator().manual_seed(stream("noise", seed)),  # a benchmark repeats; training should not
    )
    if error > 0:
        optimizer: DPSGD = DiceSGD(model.parameters(), error_norm_sum=error * BOUND, **options)
    else:
        optimizer = DPSGD(model.parameters(), **options)
    draw = torch.Generator().manual_seed(stream("order", seed))
    with PerSampleGradients(model, loss_reduction="sum"):
        for rows in PoissonSampler(len(x), RATE, steps, generator=draw):
            rows = torch.tensor(rows, dtype=torch.long)
            F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
            optimizer.step()
            optimizer.zero_grad()
    metrics = TASKS[task].evaluate(model, data.validation if split == "train" else data.test)
    return {"accuracy": 100 * metrics["accuracy"], "history": optimizer.history}


def stored(job: Job, folder: Path) -> dict[str, Any]:
    """The result of a job, from the folder if it has been run before."""
    store = Store(folder / identity({"job": list(job)}))
    if not store.records():
        store.create()
        store.append({"id": "run", **run(*job)})
    return store.records()["run"]


def methods(errors: Sequence[float]) -> list[tuple[str, str, float]]:
    """A name, the way to clip and the relative bound of the error of each."""
    plain = [("DPSGD", "flat", 0.0), ("DPSGD, automatic clipping", "automatic", 0.0)]
    return plain + [(f"DiceSGD, C2 = {error:g} C1", "flat", error) for error in errors]


def main(argv: list[str] | None = None) -> int:
    """Runs all, prints the table, and returns the exit code."""
    parser = argparse.ArgumentParser("bench.private", description=__doc__)
    add = parser.add_argument
    add("--task", choices=sorted(TASKS), default=TASK, help=f"default: {TASK}")
    add("--seeds", type=int, default=5, help="default: 5")
    add("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    add("--workers", type=int, default=1, help="processes of one thread; default: 1")
    add("--out", type=Path, default=Path("runs/private"), help="where finished runs are kept; default: runs/private")
    add("--quick", action="store_true", help="two methods, one seed, few steps: to see that all of it runs")
    args = parser.parse_args(argv)
    seeds, steps, errors = (1, 20, ERRORS[1:2]) if args.quick else (args.seeds, args.steps, ERRORS)
    epsilons = (*(EPSILONS[-1:] if args.quick else EPSILONS), float("inf"))
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:

        def all_of(jobs: list[Job]) -> list[dict[str, Any]]:
            return list(pool.map(stored, jobs, [args.out] * len(jobs)))

        rows = []
        for name, clipping, error in methods(errors):
            cells = [name]
            for epsilon in epsilons:
                std = noise(epsilon, error, steps)
                cell = (clipping, error, std)
                tried = all_of([(args.task, seed, "train", *cell, lr, steps) for lr in RATES for seed in (0, 1)])
                score = {lr: tried[2 * i]["accuracy"] + tried[2 * i + 1]["accuracy"] for i, lr in enumerate(RATES)}
                best = max(RATES, key=lambda lr: score[lr])
                finals = all_of([(args.task, 1000 + i, "train+validation", *cell, best, steps) for i in range(seeds)])
                if (found := privacy.epsilon(finals[0]["history"], DELTA)) > epsilon:
                    raise AssertionError(f"{name} claims {found}, not {epsilon}")
                cells += [f"{std:.2f}", f"{best:g}", spread([run["accuracy"] for run in finals], 1)]
            rows.append(cells)
    head = ["method"]
    for epsilon in epsilons:
        head += [f"s at ε = {epsilon:g}", "lr", "test %"]
    settings = (
        f"Data of {args.task}, a network with a hidden layer of 64, {steps} steps, q = {RATE:g}, δ = {DELTA:g},"
        f" C1 = {BOUND:g}, momentum 0.9"
    )
    arguments = sys.argv[1:] if argv is None else argv
    print(
        f"{table(head, rows)}\n\n{settings}. s: noise on the sum, by the theorem and numerical composition. Rates from"
        f" {', '.join(f'{lr:g}' for lr in RATES)}, by two runs each on the validation part. Test accuracy, mean ± s.d."
        f" over {seeds} seeds; a binomial standard error is {100 * math.sqrt(0.09 / TASKS[args.task].spec.n_test):.1f}"
        f" at 90 %.\n\n{source('bench.private', arguments)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
