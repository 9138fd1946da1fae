"""What privacy costs a training step: time and memory of DP-SGD, and of its peers, against SGD without it.

Every contender trains the same network on the same batch. A round times one step of each, in turns; what is reported is
the time of the processor, which other processes disturb less than they do the clock's, over that of plain SGD in the
same round. Memory is the most that torch's allocator holds in two steps from nothing: weights, activations, samples'
gradients and state.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optimzoo
from bench.markdown import source, table
from bench.step import memory_changes

Step = Callable[[], Any]
Batch = tuple[Tensor, Tensor]

BOUND, NOISE, LR = 1.0, 1.0, 1e-3
VOCABULARY, LENGTH = 1000, 64


class Block(nn.Module):
    """Attention and a feed-forward network, each added to what enters it; linear layers that all contenders know."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.projection, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.projection(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in split)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class Transformer(nn.Module):
    """A small language model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        # The positions are the same for all samples; the peers, too, want them once for each.
        place = torch.arange(x.shape[1]).repeat(len(x), 1)
        return self.head(self.norm(self.blocks(self.embed(x) + self.place(place))))


def mlp() -> nn.Module:
    """784 inputs, 10 classes."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def convnet() -> nn.Module:
    """32 x 32 pixels in colour, 10 classes."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def images(*shape: int) -> Callable[[int], Batch]:
    """A batch of a classification task."""
    return lambda n: (torch.randn(n, *shape), torch.randint(10, (n,)))


def texts(n: int) -> Batch:
    """A batch of tokens and of those that follow."""
    tokens = torch.randint(VOCABULARY, (n, LENGTH + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


TASKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "MLP": (mlp, images(784)),
    "ConvNet": (convnet, images(3, 32, 32)),
    "transformer": (lambda: Transformer(256), texts),
    "narrow-transformer": (lambda: Transformer(128), texts),
}


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over samples, and over the positions of each."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def plain(model: nn.Module, batch: Batch) -> Step:
    """SGD without privacy."""
    optimizer = torch.optim.SGD(model.parameters(), LR)

    def step() -> None:
        loss_of(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def private(name: str, tensors: bool = False, **options: Any) -> Callable[[nn.Module, Batch], Step]:
    """One of our optimizers, with samples' gradients as the hooks keep them, or all as tensors."""

    def build(model: nn.Module, batch: Batch) -> Step:
        optimzoo.PerSampleGradients(model)
        n = len(batch[0])
        kind = getattr(optimzoo, name)
        settings = dict(max_grad_norm=BOUND, noise_multiplier=NOISE, expected_batch_size=n, sample_rate=0.01)
        optimizer = kind(model.parameters(), LR, **settings, **options)

        def step() -> None:
            loss_of(model(batch[0]), batch[1]).backward()
            for param in model.parameters() if tensors else ():
                if not isinstance(param.grad_sample, Tensor):
                    param.grad_sample = param.grad_sample.to_tensor()
            optimizer.step()

        return step

    return build


def opacus_hooks(model: nn.Module, batch: Batch) -> Step:
    """Opacus with all samples' gradients."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), LR),
        noise_multiplier=NOISE,
        max_grad_norm=BOUND,
        expected_batch_size=len(batch[0]),
    )

    def step() -> None:
        loss_of(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def opacus_ghost(model: nn.Module, batch: Batch) -> Step:
    """Opacus with ghost clipping: a second backward pass in place of samples' gradients."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    inputs, targets = batch
    module = GradSampleModuleFastGradientClipping(model, max_grad_norm=BOUND)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), LR),
        noise_multiplier=NOISE,
        max_grad_norm=BOUND,
        expected_batch_size=len(inputs),
    )
    criterion = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss())

    def step() -> None:
        outputs = module(inputs)
        shape = outputs.shape if outputs.dim() == 3 else None
        criterion(outputs.flatten(0, -2), targets.flatten(), shape=shape).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


BASELINE = "SGD, not private"
CONTENDERS: dict[str, Callable[[nn.Module, Batch], Step]] = {
    BASELINE: plain,
    "Opacus, hooks": opacus_hooks,
    "Opacus, ghost": opacus_ghost,
    "DPSGD, tensors": private("DPSGD", tensors=True),
    "DPSGD": private("DPSGD"),
    "DiceSGD": private("DiceSGD", error_norm_sum=0.01 * BOUND),
}


def ready(title: str, task: str, n: int) -> Step:
    """A contender's step."""
    torch.manual_seed(0)
    make, draw = TASKS[task]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus of hooks that do not see inputs without a gradient, and of its noise
        return CONTENDERS[title](make(), draw(n))


def peak(title: str, task: str, n: int) -> float:
    """MiB: the most that is held in two steps from nothing."""

    def run() -> None:
        step = ready(title, task, n)
        for _ in range(2):
            step()

    return max(accumulate(memory_changes(run), initial=0)) / 2**20


def race(task: str, n: int, rounds: int, titles: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Seconds of the processor and of the clock for a step of each, in turns."""
    steps = {title: ready(title, task, n) for title in titles}
    samples: dict[str, list[tuple[float, float]]] = {title: [] for title in titles}
    for index in range(rounds + 1):
        for title, step in steps.items():
            start = time.process_time(), time.perf_counter()
            step()
            if index > 0:  # the first warms up
                samples[title].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return samples


def ratio(samples: list[tuple[float, float]], base: list[tuple[float, float]], clock: int) -> str:
    """Of times in the same rounds: median and range."""
    ratios = sorted(mine[clock] / theirs[clock] for mine, theirs in zip(samples, base, strict=True))
    return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    parser = argparse.ArgumentParser("bench.dp", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 512], help="default: 64 512")
    parser.add_argument("--rounds", type=int, default=9, help="default: 9")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--quick", action="store_true", help="one round of batches of 2, to see that all of it runs")
    parser.add_argument("--md", action="store_true", help="write docs/results/dp-speed.md, not to the console")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
    sizes, rounds = ([2], 1) if args.quick else (args.batch, args.rounds)
    titles = [BASELINE, *(title for title in args.contenders if title != BASELINE)]
    head = ["network, batch, step", "processor time [min, max]", "time [min, max]", "ms", "peak MiB", "peak"]
    lines = []
    for task, n in product(args.tasks, sizes):
        samples = race(task, n, rounds, titles)
        peaks = {title: peak(title, task, n) for title in titles}
        for title in titles:
            base = samples[BASELINE]
            lines.append(
                [
                    f"{task}, {n}: {title}",
                    *(ratio(samples[title], base, clock) for clock in range(2)),
                    f"{1e3 * statistics.median(cpu for cpu, _ in samples[title]):.1f}",
                    f"{peaks[title]:.1f}",
                    f"{peaks[title] / peaks[BASELINE]:.2f}",
                ]
            )
    threads = "1 thread" if args.threads == 1 else f"{args.threads} threads"
    text = (
        f"{table(head, lines)}\n\nTimes and peaks over those of the first row of each network and batch, medians of"
        f" {rounds} interleaved rounds, {threads}; ms are of the processor. Float32; Opacus {version('opacus')}."
        f" {source('bench.dp', sys.argv[1:] if argv is None else argv)}\n"
    )
    if args.md:
        (Path(__file__).parents[1] / "docs/results/dp-speed.md").write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
