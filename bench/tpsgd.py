"""What TPSGD learns and what it costs, beside back-propagation and other rules without a backward pass.

``evidence`` trains small networks by every method, ``depth`` adds hidden layers, ``cost`` measures a step, ``vgg``
trains a deep convolutional network on CIFAR-10's binary files in DATA_ROOT. All methods are tuned by the same rule:
the smallest learning rate of a grid whose validation accuracy is within a standard error of the best. A finished run
is a line of OUT/tpsgd.jsonl and is not run again.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cbo import Results
from bench.markdown import source, spread, table
from bench.stats import one_se
from bench.step import memory_changes
from bench.tasks import DATA, Batch, Splits, digits, digits_cnn, fm14, fm14_cnn, mnist1d, mnist1d_cnn, stream
from optimzoo import TPSGD

Record = dict[str, Any]
Step = Callable[[Tensor, Tensor], None]
GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SEEDS = range(1000, 1005)
MOMENTUM = 0.9


class Rows(nn.Module):
    """An image as the sequence of its rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2)


class Last(nn.Module):
    """The output of the last step."""

    def forward(self, x: tuple[Tensor, Any]) -> Tensor:
        return x[0][:, -1]


def mlp(inputs: int, hidden: int, width: int = 128, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Hidden layers of one width, ten classes."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in in [inputs, *[width] * (hidden - 1)]:
        layers += [nn.Linear(fan_in, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def rnn() -> nn.Sequential:
    """An Elman network that reads a digit row by row."""
    return nn.Sequential(Rows(), nn.RNN(8, 64, batch_first=True), Last(), nn.Linear(64, 10))


def vgg(widths: tuple[int, ...] = (64, 64, 128, 128, 256, 256, 512, 512), hidden: int = 512) -> nn.Sequential:
    """3 x 3 convolutions with batch normalisation, halved after each second one, and two dense layers."""
    layers: list[nn.Module] = []
    for i, (fan_in, width) in enumerate(zip((3, *widths[:-1]), widths, strict=True)):
        layers += [nn.Conv2d(fan_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if i % 2 else []
    side = 32 >> len(widths) // 2
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )


def cifar(root: Path) -> Splits:
    """CIFAR-10 from its binary version, each record a label and 3,072 bytes; the last 5,000 to train on validate."""
    folder = root / "cifar-10-batches-bin" if (root / "cifar-10-batches-bin").exists() else root
    parts = []
    for pattern in ("data_batch_*.bin", "test_batch.bin"):
        files = sorted(folder.glob(pattern))
        if not files:
            raise FileNotFoundError(f"{folder} has no {pattern} of CIFAR-10's binary version")
        rows = np.concatenate([np.fromfile(file, np.uint8) for file in files]).reshape(-1, 3073)
        parts.append((torch.from_numpy(rows[:, 1:]).view(-1, 3, 32, 32), torch.from_numpy(rows[:, 0]).long()))
    (x, y), test = parts
    cut = len(y) - len(y) // 10
    channels = x[:cut].float().transpose(0, 1).flatten(1)
    mean, std = (s.view(3, 1, 1) for s in (channels.mean(1), channels.std(1)))
    scaled = [((a.float() - mean) / std, b) for a, b in ((x[:cut], y[:cut]), (x[cut:], y[cut:]), test)]
    return Splits(*scaled)


class Setup(NamedTuple):
    """Data, a network, and how long it is trained."""

    load: Callable[[Path], Splits]
    net: Callable[[], nn.Sequential]
    epochs: int
    batch: int


NETS: dict[str, Setup] = {
    "digits, MLP 1 x 128": Setup(digits, functools.partial(mlp, 64, 1), 30, 64),
    "digits, MLP 2 x 128": Setup(digits, functools.partial(mlp, 64, 2), 30, 64),
    "digits, MLP 4 x 128": Setup(digits, functools.partial(mlp, 64, 4), 30, 64),
    "digits, CNN": Setup(digits, digits_cnn, 20, 64),
    "digits by rows, RNN 64": Setup(digits, rnn, 30, 64),
    "MNIST-1D, MLP 2 x 128": Setup(mnist1d, functools.partial(mlp, 40, 2), 40, 128),
    "MNIST-1D, CNN": Setup(mnist1d, mnist1d_cnn, 30, 128),
    "images 14 x 14, MLP 2 x 128": Setup(fm14, functools.partial(mlp, 196, 2), 8, 128),
    "images 14 x 14, CNN": Setup(fm14, fm14_cnn, 4, 128),
}
DEPTHS = {f"digits, MLP {n} x 128": Setup(digits, functools.partial(mlp, 64, n), 30, 64) for n in (8, 16)}
VGG = {"CIFAR-10, VGG 8 + 2": Setup(cifar, vgg, 30, 128)}


# Methods: each takes a network, a learning rate and a seed, and returns a step and what predicts


class Method(NamedTuple):
    """A step on a batch, what moves its learning rate, and logits of inputs."""

    step: Step
    optimizer: torch.optim.Optimizer
    logits: Callable[[Tensor], Tensor]


def sgd(params: Any, lr: float) -> torch.optim.SGD:
    """The optimizer of every method."""
    return torch.optim.SGD(params, lr, momentum=MOMENTUM)


def backprop(model: nn.Sequential, lr: float, seed: int, head_only: bool = False) -> Method:
    """Back-propagation, of all layers or of the last one."""
    optimizer = sgd((model[-1] if head_only else model).parameters(), lr)

    def step(x: Tensor, y: Tensor) -> None:
        if head_only:
            with torch.no_grad():
                x = model[:-1](x)
        optimizer.zero_grad()
        F.cross_entropy((model[-1] if head_only else model)(x), y).backward()
        optimizer.step()

    return Method(step, optimizer, model)


def projected(model: nn.Sequential, lr: float, seed: int, **settings: Any) -> Method:
    """TPSGD and, by its settings, direct random target projection."""
    optimizer = TPSGD(model, lr, num_classes=10, momentum=MOMENTUM, seed=seed, **settings)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with optimizer.targets(y):
            model(x)
        optimizer.step()

    return Method(step, optimizer, model)


def reachable(model: nn.Sequential, lr: float, seed: int, **settings: Any) -> Method:
    """TPSGD with l1 and targets that the activation can take: of normal numbers, rectified or in (-1, 1)."""
    rectified = any(isinstance(module, nn.ReLU) for module in model)
    return projected(model, lr, seed, local_loss="l1", projection=torch.relu if rectified else torch.tanh, **settings)


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.RNN)


def direct_feedback(model: nn.Sequential, lr: float, seed: int) -> Method:
    """Direct feedback alignment: the output's error, projected to each layer (Nøkland, 2016)."""
    optimizer = sgd(model.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    feedback: dict[nn.Module, Tensor] = {}

    def step(x: Tensor, y: Tensor) -> None:
        made: list[tuple[nn.Module, list[nn.Parameter], Tensor]] = []
        for module in model:
            is_layer = isinstance(module, LAYERS)
            x = module(x.detach() if is_layer else x)
            if is_layer:
                made.append((module, list(module.parameters()), x))
            elif made and not isinstance(module, nn.MaxPool2d | nn.Flatten):
                layer, params, _ = made[-1]
                made[-1] = (layer, [*params, *module.parameters()], x)
        error = (x.detach().softmax(1) - F.one_hot(y, 10)) / len(y)
        for layer, params, output in made:
            if layer is model[-1]:
                grads = torch.autograd.grad(F.cross_entropy(x, y), params)
            else:
                units = output[0].numel()
                if layer not in feedback:
                    feedback[layer] = (2 * torch.rand(10, units, generator=generator) - 1) * math.sqrt(6 / units)
                grads = torch.autograd.grad(output, params, (error @ feedback[layer]).view_as(output))
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        optimizer.step()

    return Method(step, optimizer, model)


class ForwardForward(nn.Module):
    """Layers that tell an input with its label from one with another (Hinton, 2022); label and input side by side."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        hidden = [module for module in model if isinstance(module, nn.Linear)][:-1]
        first = hidden[0]
        self.layers = nn.ModuleList([nn.Linear(first.in_features + 10, first.out_features), *hidden[1:]])

    def goodness(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """The mean square of each layer's outputs; layers see the direction of what is below, not its length."""
        x = torch.cat([x.flatten(1), F.one_hot(y, 10) * x.flatten(1).norm(dim=1, keepdim=True)], 1)
        for layer in self.layers:
            x = x.detach()
            x = layer(x * math.sqrt(x.shape[1]) / (x.norm(dim=1, keepdim=True) + 1e-4)).relu()
            yield x.square().mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """The goodness with each label, without the first layer where there are more."""
        skip = int(len(self.layers) > 1)
        labels = torch.arange(10)[:, None].expand(10, len(x))
        return torch.stack([torch.stack(list(self.goodness(x, y))[skip:]).sum(0) for y in labels], 1)


def forward_forward(model: nn.Sequential, lr: float, seed: int) -> Method:
    """Hinton's rule with a threshold of two."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ForwardForward(model)
    optimizer = sgd(net.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)

    def step(x: Tensor, y: Tensor) -> None:
        wrong = (y + torch.randint(1, 10, y.shape, generator=generator)) % 10
        optimizer.zero_grad()
        for right, other in zip(net.goodness(x, y), net.goodness(x, wrong), strict=True):
            (F.softplus(2 - right) + F.softplus(other - 2)).mean().backward()
        optimizer.step()

    return Method(step, optimizer, net)


METHODS: dict[str, Callable[..., Method]] = {
    "back-propagation": backprop,
    "last layer only": functools.partial(backprop, head_only=True),
    "DRTP": functools.partial(projected, local_loss="drtp", projection="kaiming"),
    "DFA": direct_feedback,
    "forward-forward": forward_forward,
    "TPSGD, l2": projected,
    "TPSGD, l1": functools.partial(projected, local_loss="l1"),
    "TPSGD, l1, reachable": reachable,
    "the same, by channel": functools.partial(reachable, conv_target="channel"),
}
SETUPS = {**NETS, **DEPTHS, **VGG}
ROOT = [DATA]  # where data are read from


def works(net: str, method: str) -> bool:
    """Forward-forward is for dense layers, and channels are those of convolutions."""
    return {"forward-forward": "MLP" in net, "the same, by channel": "CNN" in net or "VGG" in net}.get(method, True)


def accuracy(logits: Callable[[Tensor], Tensor], split: Batch) -> float:
    """In %."""
    with torch.no_grad():
        made = torch.cat([logits(x) for x in split[0].split(500)]).argmax(1)
    return 100 * (made == split[1]).double().mean().item()


def train(net: str, method: str, lr: float, seed: int, epochs: int = 0) -> Record:
    """One run with a cosine schedule; the seed determines weights, projections and the order of the data."""
    setup = SETUPS[net]
    data = setup.load(ROOT[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("init", seed))
        model = setup.net()
    rule = METHODS[method](model, lr, stream("projection", seed))
    epochs = epochs or setup.epochs
    steps = epochs * -(-len(data.train[1]) // setup.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(rule.optimizer, steps)
    order = torch.Generator().manual_seed(stream("order", seed))
    begin = time.process_time()
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(data.train[1]), generator=order).split(setup.batch):
            rule.step(data.train[0][rows], data.train[1][rows])
            schedule.step()
    seconds = time.process_time() - begin
    model.eval()
    return dict(
        validation=accuracy(rule.logits, data.validation), test=accuracy(rule.logits, data.test), seconds=seconds
    )


def chosen(results: Results, net: str, method: str, run: bool, grid: tuple[float, ...] = GRID) -> float | None:
    """The learning rate of a method."""
    scores = {}
    for lr in grid:
        record = results.get(("train", train, dict(net=net, method=method, lr=lr, seed=0)), run)
        if record:
            scores[lr] = record["validation"] / 100
    count = len(SETUPS[net].load(ROOT[0]).validation[1]) if scores else 0
    return one_se(scores, count) if len(scores) == len(grid) else None


def trained(results: Results, net: str, method: str, run: bool, seeds: Any = SEEDS) -> tuple[float, list[float]] | None:
    """Learning rate and test accuracies of a method, or nothing where runs are missing."""
    lr = chosen(results, net, method, run)
    if lr is None:
        return None
    found = [results.get(("train", train, dict(net=net, method=method, lr=lr, seed=seed)), run) for seed in seeds]
    return (lr, [record["test"] for record in found]) if all(found) else None


def accuracies(results: Results, nets: dict[str, Setup], run: bool) -> str:
    """A row for each network, a column for each method."""
    rows = []
    for net in nets:
        row = [net]
        for method in METHODS:
            outcome = trained(results, net, method, run) if works(net, method) else None
            missing = "not run" if works(net, method) else "-"
            row.append(missing if outcome is None else f"{spread(outcome[1], 1)}, {outcome[0]:g}")
        rows.append(row)
    return table(["network", *METHODS], rows)


# Cost


def lstm(layers: int) -> nn.Sequential:
    """Stacked LSTM layers of 128."""
    return nn.Sequential(nn.LSTM(64, 128, layers, batch_first=True), Last(), nn.Linear(128, 10))


COSTS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    **{f"MLP {n} x 512": (functools.partial(mlp, 512, n, 512), (128, 512)) for n in (2, 4, 8, 16, 32)},
    **{f"MLP {n} x 1024, batch 64": (functools.partial(mlp, 1024, n, 1024), (64, 1024)) for n in (16,)},
    "VGG 8 + 2, a quarter of the width": (
        functools.partial(vgg, (16, 16, 32, 32, 64, 64, 128, 128), 128),
        (32, 3, 32, 32),
    ),
    **{f"LSTM {n} x 128, 32 steps": (functools.partial(lstm, n), (32, 32, 64)) for n in (2, 4)},
}


def with_backprop(model: nn.Sequential) -> Step:
    """A step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def step(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_targets(model: nn.Sequential, **settings: Any) -> Step:
    """A step of TPSGD."""
    optimizer = TPSGD(model, 1e-4, num_classes=10, seed=0, **settings)

    def step(x: Tensor, y: Tensor) -> None:
        with optimizer.targets(y):
            model(x)
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS: dict[str, Callable[[nn.Sequential], Step]] = {
    "back-propagation": with_backprop,
    "TPSGD": with_targets,
    "TPSGD, in forward": functools.partial(with_targets, update_in_forward=True),
    "the same, P not stored": functools.partial(with_targets, update_in_forward=True, store_projections=False),
}


def cost(net: str, rounds: int = 9) -> Record:
    """Peak bytes beyond weights and batch, and processor seconds of a step in interleaved rounds, on one thread."""
    make, shape = COSTS[net]
    torch.manual_seed(0)
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    steps = {name: functools.partial(build(make()), x, y) for name, build in STEPS.items()}
    record: Record = {"peak": {}, "seconds": {name: [] for name in steps}}
    for name, step in steps.items():
        step()
        record["peak"][name] = max(accumulate(memory_changes(step), initial=0))
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            begin = time.process_time()
            step()
            record["seconds"][name].append(time.process_time() - begin)
    return record


def costs(results: Results, run: bool) -> str:
    """A row for each network: peaks, times."""
    rows = []
    for net in COSTS:
        record = results.get(("cost", cost, dict(net=net)), run)
        if not record:
            rows.append([net, *["not run"] * (2 * len(STEPS) - 1)])
            continue
        base = record["seconds"]["back-propagation"]
        row = [net, *(f"{record['peak'][name] / 2**20:.2f}" for name in STEPS), f"{1e3 * statistics.median(base):.1f}"]
        for name in list(STEPS)[1:]:
            ratios = [mine / theirs for mine, theirs in zip(record["seconds"][name], base, strict=True)]
            row.append(f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        rows.append(row)
    head = ["network", *(f"MiB, {name}" for name in STEPS), "ms, back-propagation"]
    return table([*head, *(f"time, {name}" for name in list(STEPS)[1:])], rows)


def plot(results: Results, file: Path) -> None:
    """Peak memory over the depth of a chain."""
    from matplotlib.figure import Figure

    depths = {int(net.split()[1]): net for net in COSTS if net.endswith("x 512")}
    records = [results.get(("cost", cost, dict(net=net)), run=True) for net in depths.values()]
    figure = Figure((6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    styles = {
        "back-propagation": ("#777777", "s--"),
        "TPSGD": ("#D55E00", "o:"),
        "TPSGD, in forward": ("#0072B2", "o-"),
    }
    for name, (colour, style) in styles.items():
        peaks = [record["peak"][name] / 2**20 for record in records]
        axis.plot(list(depths), peaks, style, color=colour, markersize=4, label=name)
    axis.set(xscale="log", yscale="log", xlabel="layers of 512", ylabel="peak MiB beyond weights", ylim=(0.7, None))
    axis.set_xticks(list(depths), [str(depth) for depth in depths])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(file, dpi=90)


EXPERIMENTS = ("evidence", "depth", "cost", "vgg")


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, prints the tables, and returns the exit code."""
    summary, _, detail = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("bench.tpsgd", description=summary, epilog=detail)
    parser.add_argument("experiments", nargs="*", default=[], help=f"which to run: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="the folder of the results; default: runs")
    parser.add_argument("--data-root", type=Path, help="where CIFAR-10's binary version lies, for vgg")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the memory by depth as a picture")
    args = parser.parse_args(argv)
    if unknown := set(args.experiments) - {*EXPERIMENTS}:
        parser.error(f"no experiment called {', '.join(sorted(unknown))}")
    if "vgg" in args.experiments and args.data_root is None:
        parser.error("vgg needs --data-root, a folder with CIFAR-10's binary version")
    torch.set_num_threads(1)
    results = Results(args.out, "tpsgd")
    titles = ("Time and memory of a step", "Test accuracy in %, and the learning rate", "With depth", "CIFAR-10")
    parts = [
        costs(results, "cost" in args.experiments),
        accuracies(results, NETS, "evidence" in args.experiments),
        accuracies(results, DEPTHS, "depth" in args.experiments),
    ]
    if args.plot:
        plot(results, args.plot)
    if args.data_root:
        ROOT[0] = args.data_root
        parts.append(accuracies(results, VGG, "vgg" in args.experiments))
    print("\n\n".join(f"**{title}**\n\n{part}" for title, part in zip(titles, parts, strict=False)))
    print(
        f"\nAccuracies: mean ± s.d. over {len(SEEDS)} seeds; SGD with momentum {MOMENTUM}, cosine schedule, the grid of"
        f" learning rates {', '.join(f'{lr:g}' for lr in GRID)} searched with another seed. Steps: plain SGD, one"
        " thread, processor time over that of back-propagation, median [min, max] of 9 interleaved rounds; peak memory"
        " is what is held beyond weights, stored projections and batch."
        f" {source('bench.tpsgd', sys.argv[1:] if argv is None else argv)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
