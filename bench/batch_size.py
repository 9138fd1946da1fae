"""Batch sizes that grow with the gradient's noise: beside constant ones and a fixed ramp, and what the test costs.

Without ``--preset``: the embedded tasks, the time of the test, and its memory. With one: a training run of the paper's
settings on data in ``--data-root``, in one process or under ``torchrun``.
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from bench.markdown import source, table
from bench.step import memory_changes
from bench.store import Store, identity
from bench.tasks import TASKS, stream
from optimzoo import AdaptiveBatchSampler, AdaptiveBatchSize, SamplesLR

LRS = {"Adagrad": (0.01, 0.03, 0.1, 0.3)}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"Adagrad": torch.optim.Adagrad}
RUNS = (("fm14", "Adagrad", 1.0), ("mnist1d", "Adagrad", 0.5))  # task, optimizer, and how much of its epochs
WARMUP = 0.1  # of the samples
MICRO = 256  # the most samples of a backward pass


@dataclass(frozen=True)
class Policy:
    """How the batch size of a run is chosen, from ``first`` on and up to ``last``."""

    name: str
    first: int
    last: int
    ramp: bool = False
    options: tuple[tuple[str, Any], ...] = ()  # of the schedule; none: the size is not tested


def policies(small: int, large: int) -> list[Policy]:
    """What is compared: both ends, the same growth by plan, and growth by test."""
    return [
        Policy("constant, small", small, small),
        Policy("constant, large", large, large),
        Policy("ramp, doubled", small, large, ramp=True),
        Policy("adaptive, eta 0.5", small, large, options=(("eta", 0.5), ("ema", 0.9))),
        Policy("adaptive, eta 1", small, large, options=(("eta", 1.0), ("ema", 0.9))),
    ]


SIZES = {"fm14": (32, 2048), "mnist1d": (32, 1024)}


@dataclass
class Outcome:
    """The end of a run, and the sizes of its batches by the samples before them."""

    accuracy: float  # %
    steps: int
    seconds: float
    path: list[tuple[int, int]]
    lr: float = math.nan


def train(task: str, policy: Policy, optimizer: str, lr: float, seed: int, budget: float, final: bool) -> Outcome:
    """One run over the same samples whatever the policy; its seed determines initial weights and order."""
    spec, data = TASKS[task].spec, TASKS[task].data()
    parts = (data.train, data.validation) if final else (data.train,)
    inputs, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    model = TASKS[task].model(seed)
    sampler = AdaptiveBatchSampler(
        labels,
        policy.first,
        max_batch_size=policy.last,
        max_micro_batch_size=MICRO,
        min_accumulation_steps=4 if policy.options else 1,
        generator=torch.Generator().manual_seed(stream("order", seed)),
    )
    built = OPTIMIZERS[optimizer](model.parameters(), lr=lr)
    # Where nothing is tested the schedule counts samples.
    schedule = AdaptiveBatchSize(built, sampler, **dict(policy.options), test_interval=1 if policy.options else 10**9)
    total = round(budget * spec.epochs * len(labels))
    lrs = SamplesLR(schedule, total, WARMUP * total)
    doublings = max(1, round(math.log2(policy.last / policy.first)))
    path, start = [], time.process_time()
    while schedule.samples < total:
        for rows in sampler:
            (schedule.weight * TASKS[task].loss(model, (inputs[rows], labels[rows]))).backward()
            if schedule.remaining:
                continue
            if not path or path[-1][1] != schedule.batch_size:
                path.append((schedule.samples, schedule.batch_size))
            built.step()
            schedule.step()
            lrs.step()
            built.zero_grad()
            if policy.ramp:
                stage = schedule.samples * (doublings + 1) // total
                sampler.batch_size = min(policy.last, policy.first * 2**stage)
            if schedule.samples >= total:
                break
    seconds = time.process_time() - start
    held_out = data.test if final else data.validation
    accuracy = 100 * TASKS[task].evaluate(model, held_out)["accuracy"]
    path.append((total, schedule.batch_size))
    return Outcome(accuracy, schedule.steps, seconds, path, lr)


def kept(store: Store | None, *settings: Any) -> Outcome:
    """The run with these settings, from the store if it has finished before."""
    task, policy, *others = settings
    name = identity({"run": [task, asdict(policy), *others], "version": 1})
    if store is not None and (record := store.records().get(name)):
        return Outcome(**{key: value for key, value in record.items() if key != "id"})
    outcome = train(*settings)
    if store is not None:
        store.append({"id": name, **asdict(outcome)})
    return outcome


def evidence(
    task: str, optimizer: str, seeds: int, budget: float, store: Store | None
) -> tuple[list[list[str]], dict[str, list[Outcome]]]:
    """The rows of a task, and the runs by their policy."""
    rows, runs = [], {}
    for policy in policies(*SIZES[task]):
        tried = [kept(store, task, policy, optimizer, lr, 0, budget, False) for lr in LRS[optimizer]]
        best = max(tried, key=lambda run: run.accuracy)
        runs[policy.name] = [
            kept(store, task, policy, optimizer, best.lr, 1000 + seed, budget, True) for seed in range(seeds)
        ]
    base = [run.seconds for run in runs["constant, small"]]
    for policy in policies(*SIZES[task]):
        found = runs[policy.name]
        ratios = [run.seconds / other for run, other in zip(found, base, strict=True)]
        rows.append([
            f"{task}, {optimizer}, {budget:g}x",
            policy.name,
            f"{policy.first}" if policy.first == policy.last else f"{policy.first} to {policy.last}",
            f"{found[0].lr:g}",
            middle([run.accuracy for run in found], 1),
            middle([run.steps for run in found], 0),
            middle(ratios, 2),
            f"{statistics.median(run.seconds for run in found):.1f}",
            middle([run.path[-1][1] for run in found], 0),
        ])  # fmt: skip
    return rows, runs


def middle(values: list[float], digits: int) -> str:
    """Median, and the range where there is one."""
    low, mid, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return mid if low == high else f"{mid} [{low}, {high}]"


def plot(runs: dict[str, dict[str, list[Outcome]]], file: Path) -> None:
    """Batch size over the samples processed, a panel a task, a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure((11, 3.8), layout="constrained")
    axes = figure.subplots(1, len(runs), squeeze=False)
    styles = {"constant, small": ("#777777", ":"), "constant, large": ("#777777", "--")}
    styles |= {"ramp, doubled": ("#D55E00", "-")}
    styles |= {"adaptive, eta 0.5": ("#0072B2", "-"), "adaptive, eta 1": ("#009E73", "-")}
    for axis, (title, found) in zip(axes[0], runs.items(), strict=True):
        for name, (colour, line) in styles.items():
            for i, run in enumerate(found[name]):
                samples, sizes = zip(*run.path, strict=True)
                label = name if i == 0 else None
                axis.step(samples, sizes, line, where="post", color=colour, label=label, linewidth=1.2, alpha=0.8)
        axis.set(title=title, xlabel="samples processed", yscale="log")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("batch size")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, dpi=90)


def grouped(model: nn.Module) -> nn.Module:
    """The network with group in place of batch normalisation, for gradients of single samples."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, nn.GroupNorm(4, child.num_features))
    return model


def training_step(task: str, kind: str, test: str | None, batch: int, passes: int) -> Callable[[], None]:
    """A whole training step on a batch, with a schedule that tests each or none."""
    data, model = TASKS[task].data(), TASKS[task].model(0)
    samples = kind == "per_sample"
    model = grouped(model) if samples else model
    sampler = AdaptiveBatchSampler(data.train[1], batch, min_accumulation_steps=1 if samples else passes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    schedule = AdaptiveBatchSize(
        optimizer, sampler, test or "norm", 1e6, 1e6, 1e6, test_interval=1 if test else 10**9, quantile=0.9
    )

    def forever() -> Iterator[list[int]]:
        while True:
            yield from sampler

    rows = forever()
    params = dict(model.named_parameters())
    buffers = dict(model.named_buffers())

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (values, buffers), (x[None],)), y[None])

    gradients = vmap(grad(loss), (None, 0, 0))

    def step() -> None:
        while True:
            chosen = next(rows)
            x, y = data.train[0][chosen], data.train[1][chosen]
            if samples:
                found = gradients({name: param.detach() for name, param in params.items()}, x, y)
                for name, param in params.items():
                    param.grad_sample = found[name]
                    param.grad = found[name].mean(0)
            else:
                (schedule.weight * F.cross_entropy(model(x), y)).backward()
            if samples or schedule.remaining == 0:
                break
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for param in params.values():
            param.grad_sample = None

    return step


def cost(tasks: Iterable[str], rounds: int, repeats: int) -> list[list[str]]:
    """The time of a step with a test in each over that of one without, in interleaved rounds."""
    rows = []
    for task in tasks:
        for kind, passes, tests in (
            ("micro_batch", 4, ("norm", "augmented")),
            ("per_sample", 1, ("norm", "augmented", "coordinatewise")),
        ):
            steps = {test: training_step(task, kind, test, 128, passes) for test in (None, *tests)}
            samples: dict[str | None, list[float]] = {test: [] for test in steps}
            for _ in range(rounds):
                times: dict[str | None, list[float]] = {test: [] for test in steps}
                for _ in range(repeats):
                    for test, step in steps.items():
                        start = time.process_time()
                        step()
                        times[test].append(time.process_time() - start)
                for test in steps:
                    samples[test].append(statistics.median(times[test]))
            for test in tests:
                more = [100 * (a / b - 1) for a, b in zip(samples[test], samples[None], strict=True)]
                plain = 1e3 * statistics.median(samples[None])
                rows.append([f"{task}, {kind}", test, f"{plain:.2f}", middle(more, 1)])
    return rows


LAYERS, WIDTH = 8, 512


def network() -> nn.Module:
    """Linear layers of one size, whose gradient is most of what a small batch needs."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def peak(model: nn.Module, params: list[Tensor], schedule: AdaptiveBatchSize, rows: Iterator[Any]) -> float:
    """The most bytes held beyond those at the start in a training step, in units of the gradient."""
    optimizer = schedule.optimizer

    def step() -> None:
        while True:
            next(rows)
            apart = isinstance(model, DistributedDataParallel) and schedule.remaining > 1
            with model.no_sync() if apart else contextlib.nullcontext():
                (schedule.weight * model(torch.ones(2, WIDTH)).square().mean()).backward()
            if schedule.remaining == 0:
                break
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    step()
    gradient = sum(4 * param.numel() for param in params)
    held = sum(grad.nbytes for grad in getattr(schedule._source, "before", {}).values())  # from step to step
    return (held + max(accumulate(memory_changes(step), initial=0))) / gradient


def one_peak(test: str | None, passes: int, ddp: bool = False) -> float:
    """The peak of a training step with this test, or without one."""
    plain = network()
    model = DistributedDataParallel(plain, gradient_as_bucket_view=True) if ddp else plain
    params = list(plain.parameters())
    ranks = 2 if ddp else 1
    sampler = AdaptiveBatchSampler(range(10**4), 2 * ranks * passes, min_accumulation_steps=passes)
    options = dict(test_interval=1 if test else 10**9, source="ddp" if ddp else "micro_batch")
    schedule = AdaptiveBatchSize(
        torch.optim.SGD(params, lr=1e-9), sampler, test or "norm", 1e6, 1e6, 1e6, model=model, **options
    )
    return peak(model, params, schedule, iter(sampler))


def rank_peaks(rank: int, folder: str) -> None:
    """The peaks of the first of two ranks, written to a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = [one_peak(test, 1, ddp=True) for test in (None, "norm", "augmented")]
    if rank == 0:
        Path(folder, "peaks").write_text(" ".join(map(str, found)))
    dist.destroy_process_group()


def memory(passes: int = 8) -> list[list[str]]:
    """What the sources hold beyond a training step, in gradients."""
    base = one_peak(None, passes)
    rows = [
        [f"micro_batch, {passes} micro-batches", test, f"{base:.2f}", f"{one_peak(test, passes) - base:+.2f}"]
        for test in ("norm", "augmented")
    ]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_peaks, args=(folder,), nprocs=2)
        none, *tested = map(float, Path(folder, "peaks").read_text().split())
    for test, value in zip(("norm", "augmented"), tested, strict=True):
        rows.append(["ddp, two ranks", test, f"{none:.2f}", f"{value - none:+.2f}"])
    return rows


# Training runs of the paper's settings. What torchvision reads is passed in, so that small files of the same formats
# can stand for the data sets.


@dataclass(frozen=True)
class Preset:
    """A row of the recommended settings in the code of Lau et al."""

    data: str  # a class of torchvision.datasets
    model: str
    optimizer: str
    first: int
    last: int
    options: dict[str, Any]
    lr: float
    min_lr: float
    samples: int
    decay: float = 0.0
    warmup: float = 0.1


PRESETS = {
    "mnist-logistic": Preset(
        "MNIST", "logistic", "Adagrad", 2, 60_000, dict(eta=0.1), 8e-3, 8e-3, 6 * 10**6, warmup=0.0
    ),
    "cifar10-resnet18": Preset("CIFAR10", "resnet18", "Adagrad", 8, 50_000, dict(eta=0.5), 0.05, 0.005, 10**7),
    "cifar10-resnet50": Preset("CIFAR10", "resnet50", "SGD", 256, 50_000, dict(eta=0.25), 0.5, 0.05, 10**7, 5e-4),
    "cifar100-resnet50": Preset(
        "CIFAR100", "resnet50", "SGD", 256, 50_000, dict(test="augmented", theta=0.5, nu=1.0), 0.5, 0.05, 10**7, 5e-4
    ),
    "imagenet-resnet101": Preset(
        "ImageFolder", "resnet101", "SGD", 256, 111_360, dict(eta=0.1), 2.5, 0.25, 256_200_000, 1e-4
    ),
}


def read(preset: Preset, root: Path, download: bool, reader: Any = None) -> tuple[Any, Any, int]:
    """Training and test set, and the number of classes."""
    from torchvision import datasets
    from torchvision.transforms import v2

    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    reader = reader or getattr(datasets, preset.data)
    if preset.data == "ImageFolder":
        normal = [*tensor, v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
        crop = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *normal])
        centre = v2.Compose([v2.Resize(256), v2.CenterCrop(224), *normal])
        train, test = reader(root / "train", transform=crop), reader(root / "val", transform=centre)
        return train, test, len(train.classes)
    mean, deviation = ([0.1307], [0.3081]) if preset.data == "MNIST" else ([0.491, 0.482, 0.447], [0.247, 0.243, 0.262])
    normal = [*tensor, v2.Normalize(mean, deviation)]
    moved = [] if preset.data == "MNIST" else [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    train = reader(root, train=True, transform=v2.Compose([*moved, *normal]), download=download)
    test = reader(root, train=False, transform=v2.Compose(normal), download=download)
    return train, test, len(train.classes)


def model_of(preset: Preset, classes: int) -> nn.Module:
    """The network; that of CIFAR has no stride and no pooling before the first block."""
    if preset.model == "logistic":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))
    from torchvision import models

    net = getattr(models, preset.model)(num_classes=classes)
    if preset.data.startswith("CIFAR"):
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def run_preset(args: argparse.Namespace, reader: Any = None) -> Outcome:
    """One run; under torchrun the ranks share each batch, and are the groups of the variance."""
    preset = PRESETS[args.preset]
    preset = replace(preset, samples=args.samples or preset.samples)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    preset = replace(preset, first=max(preset.first, ranks))  # each rank needs a sample
    cuda = torch.cuda.is_available()
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank() if ranks > 1 else 0
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(args.seed)
    if args.download and ranks > 1:  # the first rank fetches, and the others wait for it
        if rank == 0:
            read(preset, args.data_root, True, reader)
        dist.barrier()
    train_set, test_set, classes = read(preset, args.data_root, args.download and ranks == 1, reader)
    model = model_of(preset, classes).to(device)
    sampler = AdaptiveBatchSampler(
        train_set,
        preset.first,
        max_batch_size=min(preset.last, len(train_set)),
        max_micro_batch_size=args.micro,
        min_accumulation_steps=1 if ranks > 1 else max(2, min(8, preset.first // 4)),
        generator=torch.Generator().manual_seed(args.seed),
    )
    loader = DataLoader(train_set, batch_sampler=sampler, num_workers=args.workers, pin_memory=cuda)
    if preset.optimizer == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=preset.lr, momentum=0.9, weight_decay=preset.decay
        )
    else:
        optimizer = torch.optim.Adagrad(model.parameters(), lr=preset.lr)
    parallel = DistributedDataParallel(model) if ranks > 1 else model
    schedule = AdaptiveBatchSize(optimizer, sampler, model=parallel, **preset.options)
    lrs = SamplesLR(schedule, preset.samples, preset.warmup * preset.samples, preset.min_lr)
    path, start, shown = [], time.perf_counter(), 0.0
    while schedule.samples < preset.samples:
        for inputs, labels in loader:
            apart = ranks > 1 and schedule.remaining > 1
            with parallel.no_sync() if apart else contextlib.nullcontext():
                loss = F.cross_entropy(parallel(inputs.to(device, non_blocking=True)), labels.to(device))
                (schedule.weight * loss).backward()
            if schedule.remaining:
                continue
            path.append((schedule.samples, schedule.batch_size))
            optimizer.step()
            schedule.step()
            lrs.step()
            optimizer.zero_grad()
            if rank == 0 and time.perf_counter() - shown > 10:
                shown = time.perf_counter()
                print(f"{schedule.samples} samples, step {schedule.steps}, batch {sampler.batch_size}", file=sys.stderr)
            if schedule.samples >= preset.samples:
                break
    seconds = time.perf_counter() - start
    model.eval()
    right = 0
    with torch.no_grad():
        for inputs, labels in DataLoader(test_set, batch_size=256, num_workers=args.workers):
            right += int((model(inputs.to(device)).argmax(1).cpu() == labels).sum())
    outcome = Outcome(100 * right / len(test_set), schedule.steps, seconds, path, preset.lr)
    if rank == 0:
        print(
            f"{args.preset}: {schedule.samples} samples, {outcome.steps} steps, batch {preset.first} to"
            f" {sampler.batch_size}, accuracy {outcome.accuracy:.2f} %, {seconds:.0f} s, ranks {ranks}"
        )
    if ranks > 1:
        dist.destroy_process_group()
    return outcome


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    parser = argparse.ArgumentParser("bench.batch_size", description=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="default: 5")
    add("--rounds", type=int, default=9, help="of the timings; default: 9")
    add("--quick", action="store_true", help="one seed and a fraction of the budget, to see that all of it runs")
    add("--plot", type=Path, metavar="FILE", help="write the paths of the batch sizes as an image")
    add("--out", type=Path, metavar="DIR", help="keep finished runs there, and take them from there")
    add("--preset", choices=PRESETS, help="train with settings of the paper on data in --data-root")
    add("--data-root", type=Path, metavar="DIR", help="what torchvision.datasets reads; ImageNet: train/ and val/")
    add("--download", action="store_true", help="fetch the data of a preset if it is missing")
    add("--samples", type=int, help="the budget of a preset; default: its own")
    add("--micro", type=int, default=256, help="the most samples in a backward pass of a preset; default: 256")
    add("--workers", type=int, default=0, help="of the loader of a preset; default: 0")
    add("--seed", type=int, default=0, help="of a preset; default: 0")
    args = parser.parse_args(argv)
    if args.preset:
        if args.data_root is None:
            parser.error("--preset needs --data-root")
        try:
            run_preset(args)
        except (FileNotFoundError, RuntimeError) as error:
            if "not found" not in str(error) and not isinstance(error, FileNotFoundError):
                raise
            print(f"no data for {args.preset} in {args.data_root}: {error}", file=sys.stderr)
            return 3
        return 0
    torch.set_num_threads(1)
    seeds, budget, rounds, repeats = (1, 0.005, 1, 1) if args.quick else (args.seeds, 1.0, args.rounds, 20)
    rows, runs = [], {}
    store = None if args.out is None else Store(args.out)
    if store is not None:
        store.create()
    for task, optimizer, part in RUNS[:1] if args.quick else RUNS:
        more, runs[f"{task}, {optimizer}"] = evidence(task, optimizer, seeds, part * budget, store)
        rows += more
    head = ["task, optimizer, samples", "batch size", "from, to", "lr", "test accuracy %", "steps",
            "time, over small's", "s", "last batch"]  # fmt: skip
    print(table(head, rows))
    where = source("bench.batch_size", sys.argv[1:] if argv is None else argv)
    print(
        f"\nMedian [min, max] of {seeds} seeds, the same for all, on training and validation data; learning rate: the"
        " best of four on validation, one seed. The first column has the samples, in units of the task's epochs;"
        f" cosine by samples with {100 * WARMUP:g} % warm-up. Adaptive: norm test, EMA 0.9, in 4 micro-batches or more"
        f" of at most {MICRO};"
        " the others in as few as that allows. Seconds of processor time on one thread, and their ratio to those of"
        f" the first row with the same seed. {where}\n"
    )
    print(
        table(
            ["task, source", "test", "step without, ms", "test adds, %"], cost([*SIZES][args.quick :], rounds, repeats)
        )
    )
    print(
        f"\nA whole training step (AdamW, fused) on 128 samples: 4 micro-batches, or gradients of single samples by"
        f" `torch.func` with GroupNorm in place of batch normalisation. One thread, median [min, max] of {rounds}"
        f" rounds, each the medians of {repeats} interleaved steps. The same run.\n"
    )
    print(table(["source", "test", "peak without, gradients", "test adds"], memory()))
    print(
        f"\nThe most that a step of SGD holds beyond weights, from the profiler's record, in units of the gradient"
        f" ({4 * LAYERS * WIDTH**2 / 2**20:.0f} MiB); {LAYERS} layers of {WIDTH} x {WIDTH}, 2 samples a micro-batch."
        " DDP with gradient_as_bucket_view, the first of two ranks. The same run."
    )
    if args.plot:
        plot(runs, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
