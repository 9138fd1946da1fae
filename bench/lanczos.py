"""Learning rates from curvature: untuned accuracy beside a tuned constant rate, overhead, spectra, and batch laws.

Constant rates of SGD with momentum 0.9 are chosen on the validation part and tested on fresh seeds. LanczosLR has no
choice to make: it runs with its defaults beside the same momentum, and once more with the momentum learnt as well.
"""

import argparse
import contextlib
import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.markdown import source, spread, table
from bench.methods import half_decades
from bench.protocol import FINAL_SEEDS, TUNING_SEEDS
from bench.run import Record, Settings, Training
from bench.store import Store, identity
from bench.tasks import TASKS, Batch
from optimzoo import LanczosLR
from optimzoo.curvature import Hessian, Spectrum, lanczos, noise, quadrature
from optimzoo.stability import batch_eigenvalue, fit_noise

TRIED = half_decades(0.03, 5)
LEARNERS: dict[str, dict[str, Any]] = {"learnt rate": {}, "learnt rate and momentum": {"momentum": "learn"}}
EVERY = inspect.signature(LanczosLR).parameters["every"].default
PICTURED = ("mnist1d", "digits-cnn")


class Run(Training):
    """Training at a constant rate, or, without one, at the learnt rate; no schedule."""

    def __init__(self, task: str, seed: int, split: str, budget: float, lr: float | None, **options: Any) -> None:
        hp = {"lr": 1.0 if lr is None else lr, "momentum": 0.9}
        super().__init__(Settings(task, 1, "sgd", "torch", hp, seed, split, budget, schedule="constant"))
        self.learner = LanczosLR(self.optimizer, module=self.model, **options) if lr is None else None
        self.looking = 0.0
        self.trace: list[tuple[int, float, float, float]] = []  # step, top Ritz value, rate and momentum at each look

    def advance(self) -> float:
        """Takes one step and returns the loss before it; CPU time of looks is kept apart."""
        start = time.process_time()
        batch = self.batch()
        if self.learner is not None:
            looks = self.learner.looks
            self.learner.step(lambda: self.task.loss(self.model, batch))
            if self.learner.looks > looks:
                group = self.optimizer.param_groups[0]
                top = float(self.learner.last_spectrum[0].values[0])
                self.trace.append((self.clock["steps"], top, group["lr"], group["momentum"]))
                self.looking += time.process_time() - start
                start = time.process_time()
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.clock["steps"] += 1
        self.clock["samples"] += len(batch[1])
        self.clock["cpu_s"] += time.process_time() - start
        self.losses.append(loss.item())
        return self.losses[-1]


def run(task: str, seed: int, split: str, budget: float, lr: float | None, options: dict[str, Any]) -> Record:
    """Trains once; what is returned is what the tables need."""
    torch.set_num_threads(1)
    training = Run(task, seed, split, budget, lr, **options)
    while not training.done and math.isfinite(training.advance()):
        pass
    metrics = training.evaluate()
    looks = max(1, len(training.trace))
    step = training.clock["cpu_s"] / training.clock["steps"]
    return {
        "accuracy": 100 * metrics["accuracy"],
        "trace": training.trace,
        "steps": training.clock["steps"],
        "looks": len(training.trace),
        "look": training.looking / looks / step,  # in training steps
        "overhead": 100 * training.looking / training.clock["cpu_s"],
        "skipped": training.learner.skipped if training.learner else 0,
    }


def stored(job: tuple[Any, ...], folder: Path) -> Record:
    """The record of a job, from the folder if it has been run before."""
    store = Store(folder / identity({"job": list(job)}))
    if not store.records():
        store.create()
        store.append({"id": "run", **run(*job)})
    return store.records()["run"]


def accuracy(
    tasks: Sequence[str], folder: Path, seeds: int, budget: float, workers: int
) -> tuple[str, str, dict[str, list[Record]]]:
    """The tables of accuracy and overhead, and the learners' runs by task."""
    with contextlib.ExitStack() as stack:
        run_all: Callable[..., Iterable[Record]] = map
        if workers > 1:
            run_all = stack.enter_context(ProcessPoolExecutor(workers, get_context("spawn"))).map

        def all_of(jobs: list[tuple[Any, ...]]) -> list[Record]:
            return list(run_all(stored, jobs, [folder] * len(jobs)))

        rows, costs, traces = [], [], {}
        finals = range(FINAL_SEEDS, FINAL_SEEDS + seeds)
        for name in tasks:
            tuning = range(TUNING_SEEDS, TUNING_SEEDS + min(2, seeds))
            trials = all_of([(name, seed, "train", budget, lr, {}) for lr in TRIED for seed in tuning])
            score = {
                lr: statistics.fmean(r["accuracy"] for r in trials[i * len(tuning) : (i + 1) * len(tuning)])
                for i, lr in enumerate(TRIED)
            }
            best = max(score, key=lambda lr: score[lr])
            base = all_of([(name, seed, "train+validation", budget, best, {}) for seed in finals])
            cells = [name, f"{best:g}", spread([r["accuracy"] for r in base], 1)]
            for options in LEARNERS.values():
                mine = all_of([(name, seed, "train+validation", budget, None, options) for seed in finals])
                gaps = [a["accuracy"] - b["accuracy"] for a, b in zip(mine, base, strict=True)]
                error = statistics.stdev(gaps) / math.sqrt(seeds) if seeds > 1 else 0.0
                cells += [spread([r["accuracy"] for r in mine], 1), f"{statistics.fmean(gaps):+.1f} ± {error:.1f}"]
                if not options:
                    traces[name] = mine
            rows.append(cells)
            look = statistics.fmean(r["look"] for r in traces[name])
            costs.append(
                [
                    name,
                    str(traces[name][0]["steps"]),
                    spread([r["looks"] for r in traces[name]], 1),
                    f"{look:.1f}",
                    f"{100 * look / EVERY:.1f} %",
                    f"{statistics.fmean(r['overhead'] for r in traces[name]):.1f} %",
                    str(sum(r["skipped"] for r in traces[name])),
                ]
            )
    head = ["task", "best lr", "best constant, %"]
    for learner in LEARNERS:
        head += [f"{learner}, %", "difference ± s.e."]
    first = table(head, rows)
    columns = ["task", "steps", "looks", "a look, in steps", f"at one in {EVERY}", "in these runs", "skipped"]
    return first, table(columns, costs), traces


def trained(task: str, budget: float) -> tuple[nn.Module, nn.Module, Batch]:
    """A network before and after training at 0.03, and some of its training data."""
    training = Run(task, FINAL_SEEDS, "train", budget, 0.03)
    before = TASKS[task].model(FINAL_SEEDS)
    while not training.done:
        training.advance()
    return before, training.model, (training.inputs[:1024], training.labels[:1024])


def hessian(task: str, model: nn.Module, batch: Batch) -> Hessian:
    """The operator of a batch."""
    return Hessian(lambda: TASKS[task].loss(model, batch), list(model.parameters()), module=model)


def laws(model: nn.Module, data: Batch, count: int, seed: int = 0) -> str:
    """The largest eigenvalue of batches of several sizes, measured and by the law of additive noise."""
    task, draw = "digits-mlp", torch.Generator().manual_seed(seed)
    inputs, labels = data

    def batches(size: int, count: int) -> list[Hessian]:
        rows = [torch.randint(len(labels), (size,), generator=draw) for _ in range(count)]
        return [hessian(task, model, (inputs[row], labels[row])) for row in rows]

    top = float(lanczos(hessian(task, model, data), 20).values[0])
    variance = noise(batches(64, 2 * count), 64, starts=4)
    sizes = (8, 16, 32, 64, 128, 256, 512)
    found = {size: [float(lanczos(operator, 12).values[0]) for operator in batches(size, count)] for size in sizes}
    fitted = fit_noise(*((size, statistics.fmean(found[size])) for size in (32, 256)))
    rows = [
        [
            str(size),
            spread(tops, 1),
            f"{batch_eigenvalue(*fitted, size):.1f}",
            f"{batch_eigenvalue(top, variance, size):.1f}",
        ]
        for size, tops in found.items()
    ]
    rows.append(["all", f"{top:.1f}", f"{fitted[0]:.1f}", f"{top:.1f}"])
    return table(["batch", "largest eigenvalue", "law, fitted at 32 and 256", "law, noise of products"], rows) + (
        f"\n\nThe network of digits-mlp after training, {len(labels)} samples; batches drawn with replacement, mean ±"
        f" s.d. of {count}. P s^2 is {fitted[1]:.3g} by the fit and {variance:.3g} by products of {2 * count} batches"
        " of 64 with random vectors."
    )


def plot_density(spectra: dict[str, Spectrum], file: Path) -> None:
    """Densities on a logarithmic axis, a panel each."""
    from matplotlib.figure import Figure

    figure = Figure((10, 3.6), layout="constrained")
    axes = figure.subplots(1, len(spectra))
    for axis, (name, spectrum) in zip(axes, spectra.items(), strict=True):
        low, high = float(spectrum.values[-1]), float(spectrum.values[0])
        sigma = (high - low) / 150
        grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, 1500, dtype=torch.float64)
        axis.semilogy(grid, spectrum.density(grid, sigma).clamp_min(1e-12), color="#0072B2", linewidth=1.2)
        axis.set(title=name, xlabel="eigenvalue", ylim=(1e-7, None))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("spectral density")
    figure.savefig(file, dpi=90)


def plot_rates(traces: dict[str, list[Record]], file: Path) -> None:
    """The learnt rate, and the edges of stability at each look, over the steps of the first seed."""
    from matplotlib.figure import Figure

    names = [name for name in PICTURED if name in traces] or list(traces)[:1]
    figure = Figure((10, 3.8), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        steps, tops, rates, momenta = zip(*traces[name][0]["trace"], strict=True)
        positive = [max(top, 1e-3) for top in tops]
        edges = [2 * (1 + rho) / top for top, rho in zip(positive, momenta, strict=True)]
        axis.semilogy(
            steps, [2 / top for top in positive], "o--", color="#777777", markersize=3, label=r"$2 / \lambda_{\max}$"
        )
        axis.semilogy(steps, edges, "o:", color="#D55E00", markersize=3, label=r"$2 (1 + \rho) / \lambda_{\max}$")
        axis.step(steps, rates, where="post", color="#0072B2", label="learnt lr")
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False)
    figure.savefig(file, dpi=90)


def main(argv: list[str] | None = None) -> int:
    """Runs all, prints the tables, and returns the exit code."""
    parser = argparse.ArgumentParser("bench.lanczos", description=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="default: 5")
    add("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS), help="default: all")
    add("--workers", type=int, default=1, help="processes of one thread; default: 1")
    add("--out", type=Path, default=Path("runs/lanczos"), help="where finished runs are kept; default: runs/lanczos")
    add("--plots", type=Path, metavar="FOLDER", help="write the pictures there")
    add("--quick", action="store_true", help="one seed and a fiftieth of the budget, to see that all of it runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    seeds, budget = (1, 0.02) if args.quick else (args.seeds, 1.0)
    scores, costs, traces = accuracy(args.tasks, args.out, seeds, budget, args.workers)
    before, after, data = trained("digits-mlp", budget)
    arguments = sys.argv[1:] if argv is None else argv
    print(
        f"{scores}\n\nTest accuracy, mean ± s.d. over {seeds} seeds; differences are paired by seed. Constant rates:"
        f" {', '.join(f'{lr:g}' for lr in TRIED)}, chosen by two runs each on the validation part. No schedule."
        f"\n\n{costs}\n\nCPU time of looks over that of the steps between them, for the rate alone; in these runs,"
        f" looks while the rate still moves are included.\n\n{laws(after, data, 2 if args.quick else 8)}"
        f"\n\n{source('bench.lanczos', arguments)}"
    )
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        spectra = {
            name: quadrature(hessian("digits-mlp", model, data), *((12, 1) if args.quick else (60, 4)))
            for name, model in (("before training", before), ("after training", after))
        }
        plot_density(spectra, args.plots / "lanczos-density.png")
        plot_rates(traces, args.plots / "lanczos-rate.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
