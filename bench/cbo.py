"""What CBO does and what it costs: success rates and speed beside cbx, the canyon, networks without gradients.

Each experiment is a list of cells. A finished cell is a line of OUT/cbo.jsonl and is not run again; what the cells say
is printed as Markdown. ``python -m bench.cbo all --md`` wrote the tables of the documentation.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import optimzoo
from bench.run import environment
from bench.store import canonical
from bench.tasks import DATA, fm14
from optimzoo.closure import vmapped
from optimzoo.functions import FUNCTIONS

Record = dict[str, Any]
RUNS = 100

# Success rates


def ours(
    function: str, d: int, count: int, steps: int, shift: float, seed: int, runs: int = 0, **settings: Any
) -> Tensor:
    """The best point of each of so many runs; without a number, of ``RUNS``."""
    runs = runs or RUNS
    task = FUNCTIONS[function].shifted(shift)
    param = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))
    settings = dict(lr=0.01, alpha=30.0, alpha_growth=1.05, sigma=10.1, n_runs=runs, seed=seed) | settings
    optimizer = optimzoo.CBO([param], count, **settings)
    start = torch.Generator().manual_seed(seed)
    optimizer.particles[0].copy_(task.start(runs, count, d, generator=start))
    for _ in range(steps):
        optimizer.step(lambda stacked: task.value(stacked[0]), batched=True)
    return optimizer.best[0]


def theirs(
    function: str, d: int, count: int, steps: int, shift: float, seed: int, runs: int = 0, sigma: float = 10.1
) -> Tensor:
    """The same from cbx, from the same start."""
    from cbx.dynamics import CBO
    from cbx.scheduler import multiply

    runs = runs or RUNS
    task = FUNCTIONS[function].shifted(shift)
    start = task.start(runs, count, d, generator=torch.Generator().manual_seed(seed)).numpy()
    dynamics = CBO(
        lambda x: task.value(torch.from_numpy(x)).numpy(),
        f_dim="3D",
        x=start,
        noise="anisotropic",
        sigma=sigma,
        alpha=30.0,
        dt=0.01,
        max_it=steps,
        verbosity=0,
        check_f_dims=False,
        seed=seed,
    )
    schedule = multiply(name="alpha", factor=1.05, maximum=1e5)
    for _ in range(steps):
        dynamics.step()
        schedule.update(dynamics)
    return torch.from_numpy(dynamics.best_particle)


def success(library: str, function: str, d: int, count: int, steps: int, shift: float, **settings: Any) -> Record:
    """How many runs ended within 0.25 of the minimum in every coordinate, and the seconds of processor time."""
    torch.manual_seed(0)
    begin = time.process_time()
    run = ours if library == "optimzoo" else theirs
    best = run(function, d, count, steps, shift, seed=1000 + d, **settings)
    found = FUNCTIONS[function].shifted(shift).found(best)
    return dict(found=int(found.sum()), runs=len(found), seconds=time.process_time() - begin)


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a rate by Wilson's score."""
    rate, center = hits / count, (hits + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(count * rate * (1 - rate) + z * z / 4)
    return max(0.0, center - half), min(1.0, center + half)


# Speed


def speed(d: int, count: int, kept: bool = False, rounds: int = 9) -> Record:
    """Milliseconds of processor time of a step on one thread: interleaved rounds, medians.

    ``kept`` frees a large block first: glibc then keeps freed memory, and temporaries of both cost no page faults.
    """
    from cbx.dynamics import CBO

    torch.set_num_threads(1)
    if kept:
        np.ones(31 * 2**17)
    task = FUNCTIONS["rastrigin"]

    def objective(x: np.ndarray) -> np.ndarray:
        return (x * x - 10 * np.cos(2 * np.pi * x)).sum(-1) + 10 * x.shape[-1]

    start = task.start(RUNS, count, d, generator=torch.Generator().manual_seed(0))
    param = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))
    optimizer = optimzoo.CBO([param], count, lr=0.01, sigma=5.1, alpha=30.0, n_runs=RUNS, seed=0)
    optimizer.particles[0].copy_(start)
    how = dict(f_dim="3D", noise="anisotropic", sigma=5.1, alpha=30.0, dt=0.01, max_it=10**9, verbosity=0)
    steps: dict[str, Callable[[], Any]] = {
        "optimzoo": lambda: optimizer.step(lambda stacked: task.value(stacked[0]), batched=True),
        "cbx": CBO(objective, x=start.numpy().copy(), **how).step,
        "cbx, our function": CBO(lambda x: task.value(torch.from_numpy(x)).numpy(), x=start.numpy().copy(), **how).step,
        "our function alone": lambda: task.value(optimizer.particles[0]),
    }
    return _race(steps, rounds)


def alone(function: Callable[..., Record], **arguments: Any) -> Record:
    """The record of a cell, made in a process of its own: what memory costs depends on what a process did before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, kwds=arguments)


def _race(steps: dict[str, Callable[[], Any]], rounds: int) -> Record:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.process_time()
            for _ in range(3):
                step()
            times[name].append((time.process_time() - begin) / 3e-3)
    ratios = {name: [other / own for other, own in zip(times[name], times["optimzoo"], strict=True)] for name in steps}
    return dict(
        milliseconds={name: statistics.median(values) for name, values in times.items()},
        ratios={name: [min(values), statistics.median(values), max(values)] for name, values in ratios.items()},
    )


def network_speed(width: int, count: int, rounds: int = 9) -> Record:
    """Milliseconds of processor time of a step of a dense network, by one closure under vmap for both libraries."""
    from cbx.dynamics import CBO

    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(60, width, generator=draw), torch.randint(10, (60,), generator=draw)
    params = [torch.nn.Parameter(torch.zeros(10, width)), torch.nn.Parameter(torch.zeros(10))]
    closure = vmapped(lambda copy: F.cross_entropy(F.linear(inputs, *copy), labels))
    optimizer = optimzoo.CBO(params, count, seed=0)
    start = torch.cat([particles.flatten(2) for particles in optimizer.particles], -1).numpy().copy()

    def objective(x: np.ndarray) -> np.ndarray:
        weight, bias = torch.from_numpy(x).split([10 * width, 10], -1)
        return closure([weight.unflatten(-1, (10, width)), bias]).numpy()

    how = dict(f_dim="3D", noise="anisotropic", sigma=0.4**0.5, alpha=50.0, dt=0.1, max_it=10**9, verbosity=0)
    theirs = CBO(objective, x=start, check_f_dims=False, **how)
    steps: dict[str, Callable[[], Any]] = {
        "optimzoo": lambda: optimizer.step(closure, batched=True),
        "cbx": theirs.step,
        "closure alone": lambda: closure(optimizer.particles),
    }
    return _race(steps, rounds)


_PEAK = """
import torch, optimzoo
torch.set_num_threads(1)
def run(d, n, r):
    param = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))
    optimizer = optimzoo.CBO([param], n, lr=0.01, sigma=5.1, n_runs=r, seed=0, init_std=1.0, noise={noise!r})
    energies = torch.rand(r, n, dtype=torch.float64)
    return optimizer, lambda: optimizer.step(lambda stacked: energies, batched=True)
run(10, 4, 2)[1]()
optimizer, step = run({d}, {count}, {runs})
import gc; gc.collect()
with open("/proc/self/clear_refs", "w") as file: file.write("5")
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
for _ in range(5): step()
state = sum(value.nbytes for value in optimizer._swarm.values() if isinstance(value, torch.Tensor))
particles = optimizer._swarm["particles"].nbytes
print(status("VmHWM") - before + state - particles, particles)
"""


def memory(d: int, count: int, runs: int, noise: str) -> Record:
    """What state and steps need at their peak, over the particles, in a process of its own; Linux."""
    code = _PEAK.format(d=d, count=count, runs=runs, noise=noise)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    extra, particles = map(int, done.stdout.split())
    return dict(factor=1 + extra / particles, particles=particles)


# The canyon


def canyon_paths(method: str, runs: int, keep: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Where ``runs`` runs from (8, 8) end, and the paths of the first ``keep``."""
    value = FUNCTIONS["canyon"].value
    draw = torch.Generator().manual_seed(0)
    start = torch.full((runs, 2), 8.0, dtype=torch.float64)
    path = [start[:keep].clone()]
    if method in ("CBO", "consensus hopping"):
        param = torch.nn.Parameter(start[0].clone())
        settings = dict(lr=0.01, alpha=100.0, init_std=0.5, n_runs=runs, seed=1)
        if method == "CBO":
            settings |= dict(noise="isotropic", sigma=1.6)
        else:
            settings |= dict(rule="hopping", sigma=0.7)
        optimizer = optimzoo.CBO([param], 200, **settings)
        for _ in range(250):
            optimizer.step(lambda stacked: value(stacked[0]), batched=True)
            path.append(optimizer.consensus[0][:keep].clone())
        return optimizer.consensus[0].clone(), path
    x = start.clone().requires_grad_()
    for k in range(1, 10_001):
        (gradient,) = torch.autograd.grad(value(x).sum(), x)
        with torch.no_grad():
            x -= 1e-3 * gradient
            if method == "Langevin":
                x += 10 / math.log(k + 1) * 1e-3**0.5 * torch.randn(runs, 2, dtype=torch.float64, generator=draw)
            if k % 10 == 0:
                path.append(x[:keep].detach().clone())
    return x.detach(), path


def canyon(method: str, runs: int) -> Record:
    """The share of runs that end within 0.5 of the global minimum."""
    begin = time.process_time()
    ends, _ = canyon_paths(method, runs)
    found = int((ends.norm(dim=-1) < 0.5).sum())
    first = [round(value, 3) for value in ends[0].tolist()]
    return dict(found=found, runs=runs, first=first, seconds=time.process_time() - begin)


CANYON = ("CBO", "consensus hopping", "gradient descent", "Langevin")


def picture(file: Path) -> None:
    """The canyon from above, with the paths of a few runs of each method."""
    import matplotlib

    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "optimzoo", "axes.spines.top": False})
    axis = torch.linspace(-3, 10, 400, dtype=torch.float64)
    a, b = torch.meshgrid(axis, axis, indexing="xy")
    height = FUNCTIONS["canyon"].value(torch.stack([a, b], -1))
    figure, panels = plt.subplots(2, 2, figsize=(8.2, 8.2), sharex=True, sharey=True, layout="constrained")
    colours = ("#d1495b", "#edae49", "#66c2e0")
    for panel, method in zip(panels.flat, CANYON, strict=True):
        ends, path = canyon_paths(method, 200, keep=3)
        panel.contourf(axis, axis, height, levels=24, cmap="Greys", alpha=0.75)
        panel.plot(8, 8, "s", color="white", markeredgecolor="black", markersize=7)
        panel.plot(0, 0, "*", color="#2a9d8f", markeredgecolor="black", markersize=18)
        for run, colour in enumerate(colours):
            line = torch.stack([point[run] for point in path])
            panel.plot(line[:, 0], line[:, 1], color=colour, linewidth=1.1)
            panel.plot(*line[-1], "o", color=colour, markeredgecolor="black", markersize=6)
        share = (ends.norm(dim=-1) < 0.5).double().mean()
        panel.set_title(f"{method}: {share:.1%} of runs find it", fontsize=10)
        panel.set(xlim=(-3, 10), ylim=(-3, 10), aspect="equal")
    figure.supxlabel("a")
    figure.supylabel("b")
    figure.savefig(file, dpi=90, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


# Networks


def shallow(width: int) -> tuple[list[tuple[int, ...]], Callable[[list[Tensor], Tensor], Tensor]]:
    """Dense, ReLU, normalisation over the batch, as the authors have it: shapes, and the logits of one copy."""

    def logits(params: list[Tensor], inputs: Tensor) -> Tensor:
        return F.batch_norm(F.linear(inputs, *params).relu(), None, None, training=True, eps=1e-4)

    return [(10, width), (10,)], logits


def load(data: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test inputs in [0, 1] with labels."""
    if data == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = np.random.RandomState(seed).permutation(len(labels))
        x, y = torch.from_numpy(images[order] / 16).float(), torch.from_numpy(labels[order]).long()
        return x[:1437], y[:1437], x[1437:], y[1437:]
    with np.load(DATA / "fm14.npz") as archive:
        arrays = dict(archive)
    fm14(DATA)  # says so if it is another file
    parts = [torch.from_numpy(arrays[f"{part}_images"]).float().flatten(1) / 255 for part in ("train", "test")]
    labels = [torch.from_numpy(arrays[f"{part}_labels"]).long() for part in ("train", "test")]
    return parts[0], labels[0], parts[1], labels[1]


def network(
    data: str, epochs: int, seed: int, *, scale: float = 0.1, batch: int | None = 10, cool: bool = True, **settings: Any
) -> Record:
    """Test accuracy of the particle with the lowest loss after training without gradients."""
    torch.set_num_threads(1)
    begin = time.process_time()
    x, y, test_x, test_y = load(data, seed)
    shapes, logits = shallow(x.shape[1])
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    settings = dict(particle_batch=batch, kick_below=1e-3, seed=seed) | settings
    optimizer = optimzoo.CBO(params, 100, **settings)
    draw = torch.Generator().manual_seed(seed)
    for particles in optimizer.particles:
        particles.normal_(generator=draw)
    inputs, labels = x[:60], y[:60]
    closure = vmapped(lambda copy: scale * F.cross_entropy(logits(copy, inputs), labels))
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=draw).split(60):
            inputs, labels = x[index], y[index]
            for _ in range(100 // (batch or 100)):  # every particle once
                optimizer.step(closure, batched=True)
        if cool:
            optimizer.cool()
    with torch.no_grad():
        inputs, labels = x, y  # particles have moved since they were evaluated
        best = [particles[0, int(closure(optimizer.particles).argmin())] for particles in optimizer.particles]
        accuracy = (logits(best, test_x).argmax(1) == test_y).double().mean().item()
    return dict(accuracy=accuracy, seconds=time.process_time() - begin)


def with_gradients(data: str, epochs: int, seed: int, plain: bool) -> Record:
    """The same network trained by Adam; or its dense layer alone, which has no output that can die."""
    torch.set_num_threads(1)
    begin = time.process_time()
    x, y, test_x, test_y = load(data, seed)
    shapes, logits = shallow(x.shape[1])
    if plain:

        def logits(params: list[Tensor], inputs: Tensor) -> Tensor:
            return F.linear(inputs, *params)

    draw = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    optimizer = torch.optim.Adam(params, lr=0.01)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=draw).split(60):
            optimizer.zero_grad()
            F.cross_entropy(logits(params, x[index]), y[index]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (logits(params, test_x).argmax(1) == test_y).double().mean().item()
    return dict(accuracy=accuracy, seconds=time.process_time() - begin)


# How many copies vmap should take at once


def chunks(model: str) -> Record:
    """Milliseconds for 100 particles of a network by chunk size, and what one copy's results take."""
    from optimzoo.closure import _traffic

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, shape = {
        "784-10": lambda: (torch.nn.Linear(784, 10), (60, 784)),
        "784-128-10": lambda: (
            torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)),
            (60, 784),
        ),
        "CNN 8c5-16c5": lambda: (
            torch.nn.Sequential(
                torch.nn.Conv2d(1, 8, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
                torch.nn.Conv2d(8, 16, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
                torch.nn.Flatten(), torch.nn.Linear(256, 10),
            ),
            (60, 1, 28, 28),
        ),
    }[model]()  # fmt: skip
    inputs, labels = torch.randn(shape), torch.randint(10, (60,))
    names = [name for name, _ in net.named_parameters()]

    def loss(copy: list[Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, dict(zip(names, copy, strict=True)), (inputs,)), labels)

    params = list(net.parameters())
    stacked = [torch.randn(1, 100, *param.shape) for param in params]
    optimizer = optimzoo.CBO(params, 100, seed=0)

    def swap() -> None:
        with torch.no_grad():
            for i in range(100):
                torch._foreach_copy_(params, [tensor[0, i] for tensor in stacked])
                F.cross_entropy(net(inputs), labels)

    ways: dict[str, Callable[[], Any]] = {"swap": swap}
    for name, size in {**{str(size): size for size in (2, 5, 10, 20, 50, 100)}, "rule": None}.items():
        ways[name] = functools.partial(vmapped(loss, size), stacked)
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(6):
            for name, way in ways.items():
                begin = time.process_time()
                way()
                times[name].append(1e3 * (time.process_time() - begin))
        traffic = _traffic(loss, [tensor[0, 0] for tensor in stacked])
    del optimizer
    return dict(traffic=traffic, milliseconds={name: statistics.median(values[1:]) for name, values in times.items()})


# The cells of each experiment

Cell = tuple[str, Callable[..., Record], Record]
DIGITS: dict[str, Record] = {
    "20 epochs": dict(epochs=20),
    "20 epochs, partial update": dict(epochs=20, update="partial"),
    "20 epochs, no cooling": dict(epochs=20, cool=False),
    "20 epochs, n = N = 100": dict(epochs=20, batch=None),
    "20 epochs, cross-entropy not divided by 10": dict(epochs=20, scale=1.0),
    "20 epochs, kicks from 1e-5 on, as the authors have it": dict(epochs=20, kick_below=1e-5),
    "100 epochs": dict(epochs=100),
}
SIGMAS = (5.1, 6.0, 7.0, 8.1, 9.0, 10.1, 11.0, 12.0)


def cells(experiment: str) -> Iterator[Cell]:
    """Name, function and arguments of every cell."""
    if experiment == "success":
        target = dict(function="rastrigin", d=20, count=40, steps=5000, shift=0.0)
        for library in ("optimzoo", "cbx"):
            yield experiment, success, dict(library=library, **target)
            for function in ("rastrigin", "ackley"):
                for d in (2, 10, 20):
                    for count in (50, 100):
                        row = dict(function=function, d=d, count=count, steps=2000, shift=1.0)
                        if (function, d, count) == ("rastrigin", 20, 50):
                            row |= dict(runs=1000)  # of 100, some fail with both
                        yield experiment, success, dict(library=library, **row)
    elif experiment == "sigma":
        for library in ("optimzoo", "cbx"):
            for sigma in SIGMAS:
                row = dict(function="rastrigin", d=20, count=100, steps=2000, shift=1.0, sigma=sigma)
                yield experiment, success, dict(library=library, **row)
    elif experiment == "speed":
        for d in (2, 20, 100):
            for kept in (False, True):
                yield experiment, functools.partial(alone, speed), dict(d=d, count=200, kept=kept)
        yield experiment, functools.partial(alone, network_speed), dict(width=784, count=100)
    elif experiment == "memory":
        for noise in ("anisotropic", "isotropic"):
            yield experiment, memory, dict(d=100, count=200, runs=100, noise=noise)
            yield experiment, memory, dict(d=100_000, count=100, runs=1, noise=noise)
    elif experiment == "canyon":
        for method in CANYON:
            yield experiment, canyon, dict(method=method, runs=200)
    elif experiment == "digits":
        for settings in DIGITS.values():
            for seed in range(15 if settings == dict(epochs=20) else 5):  # accuracies have a long tail
                yield experiment, network, dict(data="digits", seed=seed, **settings)
    elif experiment == "images":
        for seed in range(3):
            yield experiment, network, dict(data="fm14", seed=seed, epochs=20)
    elif experiment == "gradients":
        for data, seeds in (("digits", 5), ("fm14", 3)):
            for plain in (False, True):
                for seed in range(seeds):
                    yield experiment, with_gradients, dict(data=data, seed=seed, epochs=20, plain=plain)
    elif experiment == "chunks":
        for model in ("784-10", "784-128-10", "CNN 8c5-16c5"):
            yield experiment, chunks, dict(model=model)


EXPERIMENTS = ("success", "sigma", "speed", "memory", "canyon", "digits", "images", "gradients", "chunks")


class Results:
    """The finished cells of a folder."""

    def __init__(self, folder: Path, name: str = "cbo") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{name}.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows: dict[str, Record] = {}
        for line in lines:
            row = json.loads(line)
            self.rows[row["key"]] = row["record"]

    def get(self, cell: Cell, run: bool = True) -> Record:
        """The record of a cell, run if it is not there."""
        experiment, function, arguments = cell
        key = canonical([experiment, arguments])
        if key not in self.rows and run:
            record = function(**arguments)
            self.rows[key] = record
            with self.file.open("a") as file:
                file.write(canonical(dict(key=key, record=record)) + "\n")
        return self.rows.get(key, {})


# Tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rate(record: Record) -> str:
    """A success rate in per cent with its interval."""
    if not record:
        return "not run"
    low, high = wilson(record["found"], record["runs"])
    digits = 0 if record["runs"] <= 200 else 1
    return f"{100 * record['found'] / record['runs']:.{digits}f} [{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def spread_of(values: list[float]) -> str:
    """Mean and standard deviation in per cent."""
    if len(values) < 2:
        return "not run"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f} (n = {len(values)})"


def tables(results: Results) -> Iterator[str]:
    """What the finished cells say."""

    def found(experiment: str) -> list[tuple[Record, Record]]:
        return [(cell[2], results.get(cell, run=False)) for cell in cells(experiment)]

    pairs: dict[str, dict[str, Record]] = {}
    for arguments, record in found("success"):
        where = {k: v for k, v in arguments.items() if k != "library"}
        pairs.setdefault(canonical(where), {"where": where})[arguments["library"]] = record
    rows = []
    for pair in pairs.values():
        w = pair["where"]
        seconds = [f"{pair[name]['seconds']:.0f}" if pair[name] else "" for name in ("optimzoo", "cbx")]
        setting = [w["function"].capitalize(), str(w["d"]), str(w["count"]), str(w["steps"]), f"{w['shift']:g}"]
        setting += [str(w.get("runs", RUNS))]
        rows.append([*setting, rate(pair["optimzoo"]), rate(pair["cbx"]), *seconds])
    yield "**Success in %, with 95 % intervals**"
    yield table(["function", "d", "N", "steps", "minimum at", "runs", "optimzoo", "cbx", "CPU s", "CPU s, cbx"], rows)
    yield (
        "All runs at once; anisotropic noise, sigma 10.1, lr 0.01, alpha 30 times 1.05 a step up to 1e5, start uniform"
        " in [-3, 3]; success is a best point within 0.25 of the minimum in every coordinate; Wilson's intervals."
    )
    yield "**Success in % on Rastrigin by sigma**"
    sweep = found("sigma")
    by_library = {name: [rate(record) for a, record in sweep if a["library"] == name] for name in ("optimzoo", "cbx")}
    yield table(["library", *(f"{sigma:g}" for sigma in SIGMAS)], [[name, *row] for name, row in by_library.items()])
    yield "d = 20, N = 100, 2,000 steps, minimum at 1; otherwise as above."
    yield "**Time of a step, ms of processor time on one thread**"
    rows, names = [], ("optimzoo", "cbx", "cbx, our function", "our function alone")
    for arguments, record in found("speed"):
        if record and "d" in arguments:
            ms, ratios = record["milliseconds"], record["ratios"]
            rows.append(
                [str(arguments["d"]), "kept" if arguments["kept"] else "fresh", *(f"{ms[name]:.2f}" for name in names)]
            )
            rows[-1] += ["{1:.1f} [{0:.1f}, {2:.1f}]".format(*ratios[name]) for name in ("cbx", "cbx, our function")]
    yield table(
        ["d", "memory", *names, "cbx / optimzoo", "the same, our function"],
        rows,
    )
    yield (
        "Rastrigin, N = 200, 100 runs at once, float64, medians [min, max] of 9 interleaved rounds, each row in a"
        " process of its own. cbx evaluates the function in numpy, or calls ours through a view. Memory: glibc gives"
        " freed blocks back, so that temporaries cost page faults; kept, after one block of 31 MiB has been freed."
    )
    for arguments, record in found("speed"):
        if record and "width" in arguments:
            ms, ratio = record["milliseconds"], "{1:.1f} [{0:.1f}, {2:.1f}]".format(*record["ratios"]["cbx"])
            yield (
                f"A dense network, {arguments['width']}-10, N = {arguments['count']}, float32, a batch of 60, by the"
                f" same vmapped closure: optimzoo {ms['optimzoo']:.1f} ms, cbx {ms['cbx']:.1f} ms, the closure alone"
                f" {ms['closure alone']:.1f} ms; cbx / optimzoo {ratio}."
            )
    yield "**Memory of state and step at the peak, in units of the particles**"
    rows = [
        [a["noise"], f"{a['runs']} x {a['count']} x {a['d']:,}", f"{r['factor']:.3f}"] for a, r in found("memory") if r
    ]
    yield table(["noise", "runs x N x d", "with the particles"], rows)
    yield "float64; the losses are given, so that the memory of an objective does not count."
    yield "**The canyon: runs that end within 0.5 of the minimum, in %**"
    rows = [[a["method"], rate(r), str(tuple(r["first"])), f"{r['seconds']:.0f}"] for a, r in found("canyon") if r]
    yield table(["method", "at the minimum", "first run ends at", "CPU s"], rows)
    yield "**Networks without gradients, test accuracy in %**"
    rows = []
    for name, settings in DIGITS.items():
        mine = [
            r for a, r in found("digits") if r and {k: v for k, v in a.items() if k not in ("data", "seed")} == settings
        ]
        cost = f"{statistics.mean(r['seconds'] for r in mine):.0f}" if mine else ""
        rows.append(["digits, 64-10", name, spread_of([r["accuracy"] for r in mine]), cost])
    adam: dict[Any, list[Record]] = {}
    for arguments, record in found("gradients"):
        adam.setdefault((arguments["data"], arguments["plain"]), []).extend([record] if record else [])
    images, garments = [r for _, r in found("images") if r], "Fashion-MNIST 14 x 14, 196-10"
    for data, what, runs in (
        ("digits, 64-10", "Adam, 20 epochs", adam["digits", False]),
        ("digits, 64-10", "Adam, 20 epochs, dense layer alone", adam["digits", True]),
        (garments, "20 epochs", images),
        (garments, "Adam, 20 epochs", adam["fm14", False]),
        (garments, "Adam, 20 epochs, dense layer alone", adam["fm14", True]),
    ):
        cost = f"{statistics.mean(r['seconds'] for r in runs):.1f}" if runs else ""
        rows.append([data, what, spread_of([r["accuracy"] for r in runs]), cost])
    yield table(["data and network", "what", "mean ± s.d.", "CPU s a run"], rows)
    yield "**Evaluating 100 particles of a network, ms, by how many vmap takes at once**"
    measured = [(a, r) for a, r in found("chunks") if r]
    if measured:
        names = ["swap", "2", "5", "10", "20", "50", "100", "rule"]
        yield table(
            ["network", "results of one copy", *names],
            [
                [a["model"], f"{r['traffic'] / 2**20:.2f} MiB", *(f"{r['milliseconds'][n]:.1f}" for n in names)]
                for a, r in measured
            ],
        )
        yield "Batch 60, one thread, median of 5; rule: as many copies as keep their results within 32 MiB."


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, prints the tables, and returns the exit code."""
    summary, _, detail = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("bench.cbo", description=summary, epilog=detail)
    parser.add_argument("experiments", nargs="*", default=[], help=f"all, picture, {', '.join(EXPERIMENTS)}")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="the folder of the results; default: runs")
    parser.add_argument("--picture", type=Path, default=Path("docs/_static/canyon.png"), help="where picture goes")
    parser.add_argument("--md", action="store_true", help="print the tables")
    args = parser.parse_args(argv)
    wanted = EXPERIMENTS if "all" in args.experiments else args.experiments
    if unknown := set(wanted) - {*EXPERIMENTS, "picture"}:
        parser.error(f"no experiment called {', '.join(sorted(unknown))}")
    results = Results(args.out)
    torch.set_num_threads(1)
    for experiment in wanted:
        if experiment == "picture":
            picture(args.picture)
            continue
        for cell in cells(experiment):
            record = results.get(cell)
            if not args.md:
                print(experiment, cell[2], record, flush=True)
    if "all" in args.experiments:
        picture(args.picture)
    if args.md:
        print("\n\n".join(tables(results)))
        where = environment()
        print(
            f"\n{where['cpu']}, {os.cpu_count()} cores of a shared machine; torch {torch.__version__}, optimzoo"
            f" {optimzoo.__version__}, cbx {version('cbx')}. Command: `python -m bench.cbo all --md`."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
