"""Peak memory of a training step when each parameter is stepped during the backward pass, and the cost of a norm bound.

An MLP of equal layers. The peak is what torch's CPU allocator holds beyond weights, state and batch, from the
profiler's record of every allocation.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

import optimzoo
from bench.markdown import source, table
from bench.step import memory_changes

Call = Callable[[], Any]
BOUND = 1.0


def network(layers: int, width: int) -> tuple[nn.Module, Tensor]:
    """The MLP and a batch of 16."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))), torch.randn(16, width)


def optimizer_of(params: Any, **settings: Any) -> torch.optim.Optimizer:
    """The one that is measured; its learning rate leaves the parameters where they are."""
    return optimzoo.AdaBelief(params, lr=1e-6, fused=True, **settings)


def after_backward(model: nn.Module, batch: Tensor) -> Call:
    """The usual step."""
    optimizer = optimizer_of(model.parameters())

    def step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_backward(model: nn.Module, batch: Tensor) -> Call:
    """One optimizer for each parameter, stepped as soon as its gradient is there, which then goes."""
    optimizers = {param: optimizer_of([param]) for param in model.parameters()}

    def update(param: Tensor) -> None:
        optimizers[param].step()
        param.grad = None

    for param in optimizers:
        param.register_post_accumulate_grad_hook(update)
    return lambda: model(batch).square().mean().backward()


def bounded(model: nn.Module) -> dict[str, Call]:
    """Steps on gradients that are there already."""
    plain, within = (optimizer_of(model.parameters(), max_grad_norm=bound) for bound in (None, BOUND))

    def before() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), BOUND)
        plain.step()

    return {"no bound": plain.step, "`max_grad_norm`": within.step, "`clip_grad_norm_` before": before}


def peak(call: Call) -> int:
    """The most bytes that are held beyond those at the start, in a call that is not the first."""
    return max(accumulate(memory_changes(call), initial=0))


def race(calls: dict[str, Call], before: Call, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns, each after one that is not counted and fresh gradients."""
    samples: dict[str, list[float]] = {title: [] for title in calls}
    for _ in range(rounds):
        for title, call in calls.items():
            before()
            call()
            before()
            start = time.perf_counter()
            call()
            samples[title].append(time.perf_counter() - start)
    return samples


def rows(calls: dict[str, Call], samples: dict[str, list[float]]) -> list[list[str]]:
    """Peak and time of each, the time in terms of the first's."""
    base = next(iter(samples.values()))
    found = []
    for title, times in samples.items():
        ratios = [mine / theirs for mine, theirs in zip(times, base, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        found.append([title, f"{peak(calls[title]) / 2**20:.2f}", ratio, f"{1e3 * statistics.median(times):.1f}"])
    return found


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    parser = argparse.ArgumentParser("bench.memory", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="default: 9")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--quick", action="store_true", help="a small network, to see that all of it runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    layers, width, rounds = (4, 128, 2) if args.quick else (8, 2048, args.rounds)
    head = ["peak MiB", "time [min, max]", "ms"]

    training = {
        "step after backward": after_backward(*network(layers, width)),
        "step in backward": in_backward(*network(layers, width)),
    }
    print(table(["training step", *head], rows(training, race(training, lambda: None, rounds))))

    model, batch = network(layers, width)
    model(batch).square().mean().backward()
    # So large that the bound bites; clip_grad_norm_ writes to them.
    grads = [1e6 * p.grad for p in model.parameters() if p.grad is not None]

    def renew() -> None:
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad.copy_(grad)

    steps = bounded(model)
    print("\n" + table(["optimizer's step", *head], rows(steps, race(steps, renew, rounds))))
    print(
        f"\nAdaBelief, fused, float32; {layers} layers of {width} x {width},"
        f" {4 * layers * width**2 / 2**20:.2f} MiB of weights, batch 16; time over that of the table's first row,"
        f" median [min, max] of {rounds} interleaved rounds, {args.threads} threads."
        f" {source('bench.memory', sys.argv[1:] if argv is None else argv)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
