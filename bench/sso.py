"""What SSO buys where the gradient of the loss is costly: convex problems in libsvm format, and imitation of an expert.

Every method has one number tuned, on eight values and a seed of its own, by the loss at the end; then it runs on five
fresh seeds. All have the same number of loss gradients. A gradient is said to cost k passes of the model, forward and
backward: the time of a run is then the processor time that was measured, and k measured passes for each gradient.
"""

import argparse
import functools
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import dump_svmlight_file, load_breast_cancer, load_svmlight_file
from torch import Tensor, nn
from torch.nn import functional as F

from bench.markdown import source, table
from bench.store import Record, Store, finite, identity
from optimzoo import SSO
from optimzoo.sso import Armijo

SEEDS, TUNING_SEED = range(5), 100
COSTS = (1, 10, 100)

# Data in libsvm format


def mushrooms_like(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Generated: 2,000 rows of 21 categories in one-hot code, 112 columns; a plane separates the classes."""
    sizes = [5] * 14 + [6] * 7
    x = np.concatenate([np.eye(size)[draw.choice(size, 2000, p=draw.dirichlet(np.ones(size)))] for size in sizes], 1)
    score = x @ draw.normal(size=x.shape[1])
    return x, np.where(score > np.median(score), 1, -1)


def ijcnn_like(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Generated: 2,000 rows of 22 dense columns on scales from 1 to 0.1; one in ten positive, and one in ten wrong."""
    x = draw.normal(size=(2000, 22)) * np.logspace(0, -1, 22)
    score = x @ draw.normal(size=22) + np.sin(3 * x[:, 0])
    y = np.where(score > np.quantile(score, 0.9), 1, -1)
    return x, np.where(draw.random(2000) < 0.1, -y, y)


def breast_cancer(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's: 569 rows of 30 standardised columns."""
    x, y = load_breast_cancer(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), 2 * y - 1


DATA: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "breast cancer": breast_cancer,
    "generated, like mushrooms": mushrooms_like,
    "generated, like ijcnn": ijcnn_like,
}


@functools.cache
def load(name: str) -> tuple[Tensor, Tensor]:
    """Inputs and labels -1 and 1 of a set, through a file in libsvm format; or of a file of that format."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(name)
        if name in DATA:
            file = Path(folder) / "data.svm"
            dump_svmlight_file(*DATA[name](np.random.default_rng(0)), str(file))
        x, y = load_svmlight_file(str(file))
    labels = torch.from_numpy(np.where(y == y.max(), 1.0, -1.0))
    return torch.from_numpy(x.toarray()), labels


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logistic": lambda z, y: F.softplus(-y * z).mean(),
    "squared": lambda z, y: (z - y).square().mean() / 2,
}
SMOOTHNESS = {"logistic": 0.25, "squared": 1.0}


class Convex:
    """A linear model of a set of data: each loss gradient is that of a batch, and the target is known."""

    def __init__(self, data: str, loss: str, batch: int | None, seed: int) -> None:
        self.x, self.y = load(data)
        self.model = nn.Linear(self.x.shape[1], 1).double()
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        self.loss_of, self.batch, self.draw = LOSSES[loss], batch, torch.Generator().manual_seed(seed)
        self.smoothness = SMOOTHNESS[loss]

    def next(self) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """The model on the next batch, and the loss of its outputs."""
        index = torch.randint(len(self.x), (self.batch,), generator=self.draw) if self.batch else slice(None)
        x, y = self.x[index], self.y[index]
        return lambda: self.model(x).squeeze(1), lambda z: self.loss_of(z, y)

    def value(self) -> float:
        """The loss over all data."""
        with torch.no_grad():
            return self.loss_of(self.model(self.x).squeeze(1), self.y).item()

    @staticmethod
    @functools.cache
    def minimum(data: str, loss: str) -> float:
        """The lowest loss, by L-BFGS on all data."""
        problem = Convex(data, loss, None, 0)
        inner = torch.optim.LBFGS(problem.model.parameters(), max_iter=2000, tolerance_grad=1e-10,
                                  tolerance_change=0, line_search_fn="strong_wolfe")  # fmt: skip

        def closure() -> Tensor:
            inner.zero_grad()
            value = problem.loss_of(problem.model(problem.x).squeeze(1), problem.y)
            value.backward()
            return value

        inner.step(closure)
        return problem.value()


class Pendulum:
    """An expert swings a pendulum up and holds it there; a policy is asked what it would do where it gets by itself.

    One call of the loss is a run of the policy, 8 pendulums for 50 steps of 0.05 s, and the expert's torques in the
    states that were met. The constants are those of Gymnasium's Pendulum-v1: gravity 10, mass and length 1, torque up
    to 2, speed up to 8. The expert pumps energy and holds by proportional and derivative control. Written for this
    benchmark.
    """

    smoothness = 1.0
    batch, steps = 8, 50

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        self.draw, self.probe = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10_000)

    @staticmethod
    def seen(state: Tensor) -> Tensor:
        """What the policy sees of angle, from the top, and speed."""
        angle, speed = state.unbind(-1)
        return torch.stack([angle.cos(), angle.sin(), speed / 8], -1)

    @staticmethod
    def expert(state: Tensor) -> Tensor:
        """The torque of the expert."""
        angle, speed = state.unbind(-1)
        angle = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        lacking = 10 - (speed.square() / 6 + 5 * angle.cos() + 5)  # energy, and that of standing upright
        pump, hold = lacking * speed.sign(), -15 * angle - 4 * speed
        return torch.where((angle.abs() < 0.4) & (speed.abs() < 2), hold, pump).clamp(-2, 2)

    @torch.no_grad()
    def visited(self, batch: int, draw: torch.Generator) -> Tensor:
        """The states of a run of the policy from random starts."""
        angle = (2 * torch.rand(batch, generator=draw) - 1) * math.pi
        state, states = torch.stack([angle, 2 * torch.rand(batch, generator=draw) - 1], -1), []
        for _ in range(self.steps):
            states.append(state)
            angle, speed = state.unbind(-1)
            torque = self.model(self.seen(state)).squeeze(-1).clamp(-2, 2)
            speed = (speed + (15 * angle.sin() + 3 * torque) * 0.05).clamp(-8, 8)
            state = torch.stack([angle + 0.05 * speed, speed], -1)
        return torch.cat(states)

    def next(self) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """The policy where it gets to, and its loss against the expert."""
        states = self.visited(self.batch, self.draw)
        inputs, wanted = self.seen(states), self.expert(states)
        return lambda: self.model(inputs).squeeze(-1), lambda z: (z - wanted).square().mean() / 2

    def value(self) -> float:
        """The loss over 64 runs of the policy, from the same starts each time."""
        states = self.visited(64, self.probe.manual_seed(10_000))
        with torch.no_grad():
            return ((self.model(self.seen(states)).squeeze(-1) - self.expert(states)).square().mean() / 2).item()


# Methods: what is tuned is a number

Build = Callable[[Any, float], torch.optim.Optimizer]


def going_on(steps: int) -> Build:
    """SSO with an inner search that goes on from the step size before; tuned is the target step size."""

    def build(problem: Any, number: float) -> torch.optim.Optimizer:
        return SSO(problem.model.parameters(), number / problem.smoothness, functools.partial(Armijo, lr=1.0), steps)

    return build


def decaying(steps: int) -> Build:
    """The same with a target step size that falls with the root of the number of steps, as the theory has it."""

    def build(problem: Any, number: float) -> torch.optim.Optimizer:
        optimizer = going_on(steps)(problem, number)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) ** -0.5)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer

    return build


def with_adam(steps: int) -> Build:
    """SSO with a target step size of 1 / L and Adam inside, whose step size is tuned."""

    def build(problem: Any, number: float) -> torch.optim.Optimizer:
        inner = functools.partial(torch.optim.Adam, lr=number)
        return SSO(problem.model.parameters(), 1 / problem.smoothness, inner, steps)

    return build


def half_decades(low: int) -> tuple[float, ...]:
    """Eight values, two in a decade; ``low`` counts half decades from one."""
    return tuple(float(f"{(1, 3)[k % 2]}e{k // 2}") for k in range(low, low + 8))


METHODS: dict[str, tuple[Build, tuple[float, ...]]] = {
    "SGD": (lambda problem, lr: torch.optim.SGD(problem.model.parameters(), lr), half_decades(-4)),
    "Adam": (lambda problem, lr: torch.optim.Adam(problem.model.parameters(), lr), half_decades(-7)),
    "AdaGrad": (lambda problem, lr: torch.optim.Adagrad(problem.model.parameters(), lr), half_decades(-4)),
    "SSO, Armijo, m = 5": (going_on(5), half_decades(-3)),
    "SSO, Armijo, m = 20": (going_on(20), half_decades(-3)),
    "SSO, Armijo, m = 20, 1 / sqrt(t)": (decaying(20), half_decades(-3)),
    "SSO, Adam, m = 5": (with_adam(5), half_decades(-7)),
    "SSO, Adam, m = 20": (with_adam(20), half_decades(-7)),
}
BASELINES = ("SGD", "Adam", "AdaGrad")
PROBLEMS: dict[str, Record] = {
    **{f"{data}, {loss}": dict(data=data, loss=loss, batch=100, calls=100) for data in DATA for loss in LOSSES},
    "breast cancer, logistic, all data at once": dict(data="breast cancer", loss="logistic", batch=None, calls=100),
    "imitation": dict(calls=150),
}


def problem_of(settings: Record, seed: int) -> Any:
    """The problem that these settings describe."""
    if "data" not in settings:
        return Pendulum(seed)
    return Convex(settings["data"], settings["loss"], settings["batch"], seed)


def passes(problem: Any) -> float:
    """Seconds of processor time of one pass, forward and backward: the median of 30."""
    forward, _ = problem.next()
    times = []
    for _ in range(30):
        begin = time.process_time()
        forward().sum().backward()
        times.append(time.process_time() - begin)
    for param in problem.model.parameters():
        param.grad = None
    return statistics.median(times)


def run(settings: Record, method: str, number: float, seed: int, delay: float = 0.0) -> Record:
    """A run: after each loss gradient, the loss and the processor time of the optimizer so far; ``delay`` is slept."""
    unit = passes(problem_of(settings, seed))
    problem = problem_of(settings, seed)
    optimizer = METHODS[method][0](problem, number)
    spent, losses, times = 0.0, [problem.value()], [0.0]
    began = time.perf_counter()
    for _ in range(settings["calls"]):
        forward, loss = problem.next()

        def costly(z: Tensor, loss: Callable[[Tensor], Tensor] = loss) -> Tensor:
            time.sleep(delay)
            return loss(z)

        begin = time.process_time()
        if isinstance(optimizer, SSO):
            optimizer.step(lambda forward=forward, loss=costly: (forward(), loss))
        else:
            optimizer.zero_grad()
            costly(forward()).backward()
            optimizer.step()
        spent += time.process_time() - begin
        losses.append(problem.value() if not delay else 0.0)
        times.append(spent)
        if not math.isfinite(losses[-1]):
            break
    return dict(losses=losses, times=times, unit=unit, wall=time.perf_counter() - began)


class Results:
    """The finished runs of a folder; one that is asked for and missing is run."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.store.create()
        self.known = self.store.records()

    def get(self, **arguments: Any) -> Record:
        """A run's record."""
        name = identity(arguments)
        if name not in self.known:
            self.known[name] = finite(dict(id=name, arguments=arguments, **run(**arguments)))
            self.store.append(self.known[name])
        return self.known[name]


def ending(record: Record) -> float:
    """The loss after each of the last ten gradients, averaged; infinite where a run broke off."""
    tail = record["losses"][-10:]
    return math.inf if None in tail else statistics.fmean(tail)


def tuned(results: Results, settings: Record, method: str) -> float:
    """The number of a method with the lowest loss at the end, on one seed."""

    def score(number: float) -> float:
        return ending(results.get(settings=settings, method=method, number=number, seed=TUNING_SEED))

    return min(METHODS[method][1], key=score)


def short(value: float) -> str:
    """Three digits, or all before the point; of a whole number none after it."""
    if math.isinf(value):
        return "never"
    digits = 0 if value == round(value) else 2 - math.floor(math.log10(max(abs(value), 0.01)))
    return f"{value:,.{max(0, digits)}f}"


def median(values: list[float]) -> str:
    """Median and range, or a dash where most runs have no number."""
    if sum(map(math.isfinite, values)) < len(values) / 2:
        return "-"
    return "{1} [{0}, {2}]".format(*map(short, (min(values), statistics.median(values), max(values))))


def reached(record: Record, target: float) -> float:
    """After how many gradients the loss is at most this, for the first time."""
    losses = record["losses"]
    return next((k for k, value in enumerate(losses) if value is not None and value <= target), math.inf)


def tables(results: Results, names: list[str]) -> Iterator[str]:
    """A table for each problem."""
    for name in names:
        settings = PROBLEMS[name]
        floor = Convex.minimum(settings["data"], settings["loss"]) if "data" in settings else 0.0
        chosen = {method: tuned(results, settings, method) for method in METHODS}
        runs = {
            method: [results.get(settings=settings, method=method, number=number, seed=seed) for seed in SEEDS]
            for method, number in chosen.items()
        }
        ends = {method: [ending(record) for record in records] for method, records in runs.items()}
        target = min(statistics.median(ends[method]) for method in BASELINES)
        rows = []
        for method, records in runs.items():
            gaps = [(end - floor) / (r["losses"][0] - floor) for end, r in zip(ends[method], records, strict=True)]
            calls = [reached(record, target) for record in records]
            row = [method, f"{chosen[method]:g}", median([100 * gap for gap in gaps]), median(calls)]
            for cost in COSTS:
                times = [
                    1e3 * (r["times"][int(k)] + cost * k * r["unit"]) if math.isfinite(k) else math.inf
                    for k, r in zip(calls, records, strict=True)
                ]
                row.append(median(times))
            rows.append(row)
        head = ["method", "tuned", "% of the gap left", "gradients to the target"]
        yield f"**{name[0].upper()}{name[1:]}**, {settings['calls']} loss gradients; target {target:.4g}"
        yield table([*head, *(f"ms there, {cost}x" for cost in COSTS)], rows)


def delays(results: Results) -> str:
    """Runs that sleep for what a loss gradient is said to cost, beside what the tables would say."""
    settings, rows = PROBLEMS["imitation"], []
    for method in ("Adam", "SSO, Adam, m = 20"):
        number = tuned(results, settings, method)
        unit = results.get(settings=settings, method=method, number=number, seed=0)["unit"]
        record = results.get(settings=settings, method=method, number=number, seed=0, delay=100 * unit)
        free = results.get(settings=settings, method=method, number=number, seed=0, delay=1e-9)
        slept = settings["calls"] * 100 * unit
        rows.append([method, f"{free['wall']:.2f}", f"{record['wall']:.2f}", f"{free['wall'] + slept:.2f}"])
    return table(["method", "s, free", "s, 100x, slept", "s, 100x, by the count"], rows)


def picture(results: Results, file: Path, names: list[str]) -> None:
    """Loss against loss gradients, and against time at two costs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure, grid = plt.subplots(len(names), 4, figsize=(11, 2.6 * len(names)), squeeze=False, layout="constrained")
    methods = [*BASELINES, "SSO, Armijo, m = 5", "SSO, Armijo, m = 20", "SSO, Adam, m = 20"]
    for name, row in zip(names, grid, strict=True):
        settings = PROBLEMS[name]
        floor = Convex.minimum(settings["data"], settings["loss"]) if "data" in settings else 0.0
        for index, method in enumerate(methods):
            number = tuned(results, settings, method)
            records = [results.get(settings=settings, method=method, number=number, seed=seed) for seed in SEEDS]
            gaps = np.array([r["losses"] for r in records], float)
            gaps = (gaps - floor) / (gaps[:, :1] - floor)
            count = np.arange(gaps.shape[1])
            for axis, cost in zip(row, (None, *COSTS), strict=True):
                unit = statistics.median(r["unit"] for r in records)
                cpu = np.median([r["times"] for r in records], 0)
                across = count if cost is None else 1e3 * (cpu + cost * unit * count)
                axis.plot(across, np.median(gaps, 0), color=f"C{index}", label=method)
                if cost is None:
                    axis.fill_between(across, gaps.min(0), gaps.max(0), color=f"C{index}", alpha=0.15, lw=0)
        for axis, cost in zip(row, (None, *COSTS), strict=True):
            axis.set(
                yscale="log", xlabel="loss gradients" if cost is None else f"ms, a loss gradient costs {cost}x a pass"
            )
            if cost is not None:
                axis.set(xscale="log")
        row[0].set(ylabel="share of the gap left", title=name)
    grid[0][0].legend(frameon=False, fontsize=7)
    figure.savefig(file, dpi=100, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, prints the tables, and returns the exit code."""
    summary, _, detail = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("bench.sso", description=summary, epilog=detail)
    parser.add_argument("problems", nargs="*", default=[], help=f"all if none is named: {'; '.join(PROBLEMS)}")
    parser.add_argument("--file", type=Path, help="also a file of two classes in libsvm format, by both losses")
    parser.add_argument("--out", type=Path, default=Path("runs/sso"), help="the folder of the results")
    parser.add_argument("--plot", type=Path, help="where a picture goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "no step size")  # at the minimum of a surrogate, which ends a step as it should
    if args.file:
        for loss in LOSSES:
            PROBLEMS[f"{args.file.name}, {loss}"] = dict(data=str(args.file), loss=loss, batch=100, calls=100)
    if unknown := set(args.problems) - set(PROBLEMS):
        parser.error(f"no problem called {', '.join(sorted(unknown))}")
    names = args.problems or list(PROBLEMS)
    results = Results(args.out)
    for text in tables(results, names):
        print(text, end="\n\n", flush=True)
    print(
        "Median [min, max] of five seeds. The gap is from the loss at the start to the minimum, found by L-BFGS; of the"
        " imitation, to zero; what is left is the mean over the last ten gradients. The target is what the best of SGD,"
        " Adam and AdaGrad has left at the end, and counts when it is met first. Tuned: step sizes, for SSO with Armijo"
        " the target step size in units of 1 / L. ms there, kx: processor time of the steps up to there, and k passes"
        " of the model, forward and backward, for each loss gradient. -: most runs do not get there.\n"
    )
    if "imitation" in names:
        print("**Seconds of an imitation run, on the wall**\n")
        print(delays(results), end="\n\n")
    if args.plot:
        chosen = ["breast cancer, logistic, all data at once", "generated, like ijcnn, squared", "imitation"]
        picture(results, args.plot, [name for name in chosen if name in names])
    print(source("bench.sso", argv if argv is not None else sys.argv[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
