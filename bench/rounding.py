"""What 16 bits cost in training: MNIST-1D with the state, or the parameters, in bfloat16 and several ways to round.

All runs of a method share its learning rate, chosen in float32, and a seed its initial weights and order of the data.
With bfloat16 parameters the activations and gradients are bfloat16 as well; the loss is taken in float32.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import optimzoo
from bench.markdown import source, spread, table
from bench.methods import Imported, OptSpec, half_decades
from bench.protocol import FINAL_SEEDS, TUNING_SEEDS
from bench.run import Record, Settings, Training, state_bytes
from bench.tasks import TASKS

# By validation of float32 runs on this task: docs/results/bench.md, and for DaleAdamW --tune.
LRS = {"AdaBelief": 0.1, "DiffGrad": 0.03, "DaleAdamW": 0.1}


@dataclass(frozen=True)
class Way:
    """How a parameter and its state are stored."""

    name: str
    dtype: str = "float32"
    options: tuple[tuple[str, Any], ...] = ()
    kahan: bool = False


BF16_STATE = ("state_dtype", torch.bfloat16)
WAYS = [
    Way("float32"),
    Way("float32, bfloat16 state", options=(BF16_STATE,)),
    Way("bfloat16, nearest", "bfloat16", (("rounding", "nearest"),)),
    Way("bfloat16, stochastic", "bfloat16", (("rounding", "stochastic"),)),
    Way("bfloat16, stochastic, bfloat16 state", "bfloat16", (("rounding", "stochastic"), BF16_STATE)),
    Way("bfloat16, Kahan", "bfloat16", kahan=True),
    Way("bfloat16, master", "bfloat16", (("rounding", "master"),)),
]


def build(params: Iterable[Tensor], name: str, **settings: Any) -> torch.optim.Optimizer:
    """One of the zoo's optimizers; biases are no part of Dale's law."""
    params = list(params)
    if name == "DaleAdamW":
        matrices, vectors = ([p for p in params if (p.dim() > 1) is wide] for wide in (True, False))
        params = [{"params": matrices}, {"params": vectors, "dale": False, "lr": settings["lr"] / 10}]
    return getattr(optimzoo, name)(params, **settings)


class Kahan(torch.optim.Optimizer):
    """Compensated summation around another optimizer, for comparison and not for speed.

    The step is taken by a float32 copy of the parameter, and added to the bfloat16 one together with what earlier
    additions lost; what this one loses is kept in bfloat16.
    """

    def __init__(self, params: Iterable[Tensor], **settings: Any) -> None:
        params = list(params)
        self.copies = {param: param.detach().float().requires_grad_() for param in params}
        self.inner = build(self.copies.values(), **settings)
        super().__init__(params, {})
        self.param_groups = [{**group, "params": []} for group in self.inner.param_groups]
        self.state.update({param: {"lost": torch.zeros_like(param)} for param in params})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Adds the step of the copies."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner["lr"] = group["lr"]
        for param, copy in self.copies.items():
            copy.copy_(param)
            copy.grad = param.grad.float()
        self.inner.step()
        for param, copy in self.copies.items():
            old = param.float()
            lost = self.state[param]["lost"]
            move = copy - old + lost
            param.copy_(old + move)
            lost.copy_(move - (param.float() - old))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self.copies:
            param.grad = None


ZOO = OptSpec("zoo", build)
KAHAN = OptSpec("kahan", Imported("bench.rounding:Kahan"))


def run(name: str, way: Way, seed: int, budget: float, lr: float | None = None) -> Record:
    """Trains once, on the training part alone if a learning rate is given to be tried.

    The training loss of a point of the curve is the mean since the last one.
    """
    torch.set_num_threads(1)
    hp = {"name": name, "lr": LRS[name] if lr is None else lr, **dict(way.options)}
    method = f"bench.rounding:{'KAHAN' if way.kahan else 'ZOO'}"
    split = "train+validation" if lr is None else "train"
    training = Training(Settings("mnist1d", 1, method, "optimzoo", hp, seed, split, budget, dtype=way.dtype))
    while training.due or not training.done:
        if training.due:
            training.evaluate()
        else:
            training.advance()
    kept = state_bytes(training.optimizer)
    if way.kahan:
        kept += state_bytes(training.optimizer.inner)
    params = list(training.model.parameters())
    count = sum(p.numel() for p in params)
    return {
        "curve": [(row["samples"] / training.size, row["train_loss"]) for row in training.curve[1:]],
        "loss": training.curve[-1]["train_loss"],
        "accuracy": 100 * training.curve[-1]["accuracy"],
        # Without the step counts, four bytes a tensor.
        "bytes": sum(p.nbytes for p in params) / count + (kept - 4 * len(params)) / count,
    }


def worse(runs: list[Record], base: list[Record], key: str, sign: int) -> bool:
    """Whether the mean is worse than the baseline's by more than two standard errors of the difference."""
    mine, theirs = ([run[key] for run in group] for group in (runs, base))
    error = ((statistics.variance(mine) + statistics.variance(theirs)) / len(mine)) ** 0.5
    return sign * (statistics.fmean(mine) - statistics.fmean(theirs)) > 2 * error


def to_markdown(results: dict[tuple[str, str], list[Record]], seeds: int) -> str:
    """The table, and in words what is worse than float32."""
    rows, verdicts = [], []
    for (name, way), runs in results.items():
        base = results[name, WAYS[0].name]
        cells = [spread([r["loss"] for r in runs], 4), spread([r["accuracy"] for r in runs], 1)]
        if seeds > 1:
            for place, (key, sign, what) in enumerate([("loss", 1, "training loss"), ("accuracy", -1, "accuracy")]):
                if worse(runs, base, key, sign):
                    cells[place] = f"**{cells[place]}**"
                    verdicts.append(f"{name}, {way}: {what}")
        rows.append([name, way, *cells, f"{runs[0]['bytes']:.1f}"])
    head = ["method", "parameters and rounding", "final training loss", "test accuracy %", "bytes a parameter"]
    verdict = "; ".join(verdicts) or "nothing"
    return table(head, rows) + f"\n\nWorse than float32 by more than two standard errors (bold): {verdict}."


def plot(results: dict[tuple[str, str], list[Record]], file: Path) -> None:
    """Mean training loss over the epochs, a panel a method; bands are one standard deviation over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure((11, 4), layout="constrained")
    axes = figure.subplots(1, len(LRS), sharey=True)
    styles = ["-", "--", ":", "-", "-.", "--", "-"]
    colours = ["#000000", "#777777", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7"]
    for axis, name in zip(axes, LRS, strict=True):
        for way, style, colour in zip(WAYS, styles, colours, strict=True):
            curves = torch.tensor([run["curve"] for run in results[name, way.name]])
            epochs, losses = curves[0, :, 0], curves[:, :, 1].log10()
            mean, deviation = losses.mean(0), losses.std(0) if len(losses) > 1 else 0 * losses[0]
            axis.plot(epochs, 10**mean, style, color=colour, label=way.name, linewidth=1.4)
            axis.fill_between(epochs, 10 ** (mean - deviation), 10 ** (mean + deviation), color=colour, alpha=0.12)
        axis.set(title=name, xlabel="epoch", yscale="log")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("training loss (cross-entropy)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=90)


def main(argv: list[str] | None = None) -> int:
    """Trains all, prints the table, and returns the exit code."""
    parser = argparse.ArgumentParser("bench.rounding", description=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="default: 5")
    add("--workers", type=int, default=2, help="processes of one thread; default: 2")
    add("--plot", type=Path, metavar="FILE", help="write the loss curves as an image")
    add("--tune", metavar="METHOD", choices=list(LRS), help="print validation accuracies of learning rates instead")
    add("--quick", action="store_true", help="one seed and half an epoch, to see that all of it runs")
    args = parser.parse_args(argv)
    seeds, budget = (1, 0.5 / TASKS["mnist1d"].spec.epochs) if args.quick else (args.seeds, 1.0)
    if args.tune:
        for lr in half_decades(0.03, 5):
            accuracy = run(args.tune, WAYS[0], TUNING_SEEDS, budget, lr)["accuracy"]
            print(f"{args.tune} lr {lr:g}: {accuracy:.1f} % of the validation part")
        return 0
    jobs = [
        (name, way, seed, budget) for name in LRS for way in WAYS for seed in range(FINAL_SEEDS, FINAL_SEEDS + seeds)
    ]
    if args.workers > 1 and not args.quick:
        with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
            records = list(pool.map(run, *zip(*jobs, strict=True)))
    else:
        records = [run(*job) for job in jobs]
    results: dict[tuple[str, str], list[Record]] = {}
    for (name, way, *_), record in zip(jobs, records, strict=True):
        results.setdefault((name, way.name), []).append(record)
    print(to_markdown(results, seeds))
    rates = ", ".join(f"{name} {lr:g}" for name, lr in LRS.items())
    spec = TASKS["mnist1d"].spec
    arguments = sys.argv[1:] if argv is None else argv
    print(
        f"\nMNIST-1D, {budget * spec.epochs:g} epochs, batch {spec.batch}, cosine schedule, mean ± s.d. over {seeds}"
        f" seeds. Learning rates: {rates} (a tenth of it for biases)."
        " Final training loss: the mean over the last twentieth of the run."
        f" Bytes: parameter and state, without gradient and step count. {source('bench.rounding', arguments)}"
    )
    if args.plot:
        plot(results, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
