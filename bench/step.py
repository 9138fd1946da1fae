"""How long an optimizer's step takes, against ``torch.optim.AdamW(fused=True)`` in the same minute.

Each sample of a contender lies between two samples of the baseline; the ratio of its time to their mean is what
travels from one machine, or one load, to another. Gradients are set outside the timed region. The roof of a float32
step that reads parameter, gradient and state and writes parameter and state, 12 + 2 x (state bytes) a parameter, is
the in-place stream ``a += s * b``: unlike copy and triad it reads all that it writes.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

# torch's profiler writes to stderr otherwise.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
from torch import Tensor

from bench.methods import package_version
from bench.run import environment, state_bytes

Shapes = list[tuple[int, ...]]
Step = Callable[[], Any]

LR = 1e-6  # small enough that thousands of steps leave the parameters where they are


def resnet18(shrink: int = 1) -> Shapes:
    """The 62 parameter tensors of ResNet-18 with 1,000 classes, its widths divided by ``shrink``."""

    def convolution(out: int, into: int, size: int) -> Shapes:
        return [(out, into, size, size), (out,), (out,)]  # weights, then scale and shift of the normalisation

    widths = [width // shrink for width in (64, 64, 128, 256, 512)]
    shapes = convolution(widths[0], 3, 7)
    for into, out in pairwise(widths):
        shapes += convolution(out, into, 3) + convolution(out, out, 3)
        shapes += convolution(out, into, 1) if into != out else []
        shapes += convolution(out, out, 3) + convolution(out, out, 3)
    return [*shapes, (1000, widths[-1]), (1000,)]


def work_lists(quick: bool) -> dict[str, Shapes]:
    """The sets of tensors to step on, by name."""
    return {
        "flat": [(200_000 if quick else 20_000_000,)],
        "resnet18": resnet18(16 if quick else 1),
        "many": [(1000,)] * (20 if quick else 1000),
    }


@dataclass(frozen=True)
class Contender:
    """A class, its back-end, and the options that make the arithmetic comparable."""

    path: str
    backend: str
    options: dict[str, Any] = field(default_factory=dict)
    reads_again: int = 0  # bytes a parameter: of gradients whose norm has to be known before the first of them is used

    @property
    def name(self) -> str:
        return self.path.replace(":", ".")

    @property
    def title(self) -> str:
        return f"{self.name} ({self.backend})"

    def build(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Builds the optimizer; peers print banners and warn of their own age, which is no news here."""
        module, _, attribute = self.path.partition(":")
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(importlib.import_module(module), attribute)
            return found(params, lr=LR, **self.options, **BACKENDS[self.backend])


BACKENDS: dict[str, dict[str, Any]] = {
    "single": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "fused, bfloat16 state": {"fused": True, "state_dtype": torch.bfloat16},
    "its own": {},  # of a peer that has no choice, or whose default is meant
}
BASELINE = Contender("torch.optim:AdamW", "fused")
BELIEF = {"rectify": False}
DALE = {"check_signs": False}  # the others change signs in the parameters that all share
OURS = ("single", "foreach", "fused", "fused, bfloat16 state")
CONTENDERS = [
    *(Contender("torch.optim:AdamW", backend) for backend in ("single", "foreach")),
    *(Contender("optimzoo:DiffGrad", backend) for backend in OURS),
    *(Contender("optimzoo:AdaBelief", backend, BELIEF) for backend in OURS),
    Contender("optimzoo:DaleSGD", "fused", {**DALE, "momentum": 0.9}),
    Contender("optimzoo:DaleAdamW", "fused", DALE),
    Contender("optimzoo:AdaGradNorm", "fused", reads_again=4),
    Contender("torch_optimizer:DiffGrad", "its own"),
    Contender("torch_optimizer:AdaBelief", "its own", BELIEF),
    Contender("pytorch_optimizer:DiffGrad", "its own"),
    Contender("pytorch_optimizer:AdaBelief", "its own", BELIEF),
    Contender("adabelief_pytorch:AdaBelief", "its own", {**BELIEF, "print_change_log": False}),
]


class Clock:
    """Times a call on the device that does the work."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Step) -> float:
        """Seconds that ``call`` takes."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


@dataclass
class Result:
    """What was measured of one contender on one work list; times in seconds, one a round."""

    name: str
    backend: str
    version: str
    parameters: int
    first_step: float
    state_bytes: float  # a parameter, as is the next
    transient_bytes: float
    reads_again: int = 0
    times: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def add(self, seconds: float, baseline: float) -> None:
        """Takes in the sample of one round and the baseline's around it."""
        self.times.append(seconds)
        self.ratios.append(seconds / baseline)

    @property
    def nanoseconds(self) -> float:
        """A parameter, the median over the rounds."""
        return 1e9 * statistics.median(self.times) / self.parameters

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def traffic(self) -> float:
        """The bytes a parameter that the step cannot do without."""
        return 12 + 2 * self.state_bytes + self.reads_again

    @property
    def gigabytes(self) -> float:
        """That traffic a second."""
        return self.traffic / self.nanoseconds


class Bed:
    """Parameters shared by all contenders, and two sets of gradients that take turns."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw() -> list[Tensor]:
            return [torch.randn(shape, generator=generator).to(device) for shape in shapes]

        self.params = [tensor.requires_grad_() for tensor in draw()]
        self.grads = [draw(), draw()]
        self.turn = 0
        self.size = sum(tensor.numel() for tensor in self.params)
        self.clock = Clock(device)

    def next_gradients(self) -> None:
        self.turn ^= 1
        for param, grad in zip(self.params, self.grads[self.turn], strict=True):
            param.grad = grad

    def time(self, optimizer: torch.optim.Optimizer) -> float:
        self.next_gradients()
        return self.clock(optimizer.step)

    def sample(self, optimizer: torch.optim.Optimizer, steps: int) -> float:
        """The median of several steps, after one that brings the state back into the caches."""
        self.time(optimizer)
        return statistics.median(self.time(optimizer) for _ in range(steps))

    def enlist(self, contender: Contender) -> tuple[torch.optim.Optimizer, Result]:
        """Builds a contender and takes what is measured once: the first step and the memory."""
        optimizer = contender.build(self.params)
        first = self.time(optimizer)
        self.time(optimizer)
        result = Result(
            contender.name,
            contender.backend,
            package_version(contender.path.partition(":")[0].partition(".")[0]),
            self.size,
            first,
            state_bytes(optimizer) / self.size,
            self._transient(optimizer),
            contender.reads_again,
        )
        return optimizer, result

    def _transient(self, optimizer: torch.optim.Optimizer) -> float:
        """The most memory from torch's allocator that a step holds beyond what it found, in bytes a parameter."""
        self.next_gradients()
        if self.clock.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.step()
            return (torch.cuda.max_memory_allocated() - before) / self.size
        return max(accumulate(memory_changes(optimizer.step), initial=0)) / self.size


def memory_changes(call: Step) -> list[int]:
    """The bytes that torch's CPU allocator gives, or takes back where they are negative, in a call, in their order."""
    # Two calls, so that memory which the second gives back was seen to be taken.
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        call()
        with torch.profiler.record_function("second call"):
            call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    begin = next(event["ts"] for event in events if event["name"] == "second call")
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return [change for at, change in changes if at >= begin]


class Streams:
    """Three float32 streams over vectors that no cache holds, counting the accesses that the program asks for."""

    def __init__(self, device: torch.device, elements: int) -> None:
        a, b, c = (torch.ones(elements, device=device) for _ in range(3))
        self.clock = Clock(device)
        self.calls: dict[str, tuple[int, Step]] = {
            "copy": (8 * elements, lambda: a.copy_(b)),
            "triad": (12 * elements, lambda: torch.add(b, c, alpha=LR, out=a)),
            "in place": (12 * elements, lambda: a.add_(b, alpha=LR)),
        }
        self.rates: dict[str, list[float]] = {name: [] for name in self.calls}
        for _, call in self.calls.values():
            call()

    def sample(self) -> None:
        """Adds a GB/s to the rates of each."""
        for name, (moved, call) in self.calls.items():
            self.rates[name].append(moved / self.clock(call) / 1e9)

    def medians(self) -> dict[str, float]:
        """The GB/s of each."""
        return {name: statistics.median(rates) for name, rates in self.rates.items()}


@dataclass
class Race:
    """All contenders on one work list with one number of threads."""

    shapes: str
    tensors: int
    parameters: int
    threads: int
    streams: dict[str, float]  # GB/s
    results: list[Result]
    absent: dict[str, str]  # who could not be measured, and why


def race(
    bed: Bed, contenders: Sequence[Contender], streams: Streams, rounds: int, seconds: float
) -> tuple[list[Result], dict[str, str]]:
    """Measures the baseline and all contenders in turns; also says who could not be built, and why.

    Args:
        bed: what to step on.
        contenders: whom to measure beside the baseline.
        streams: sampled once a round, to meet the same neighbours on the machine.
        rounds: samples of each.
        seconds: what a sample should last at least, so that quick steps are repeated.
    """
    baseline, standard = bed.enlist(BASELINE)
    entered, absent = [], {}
    for contender in contenders:
        try:
            entered.append(bed.enlist(contender))
        except ImportError as error:
            absent[contender.title] = f"not installed ({error})"
        except (TypeError, ValueError, RuntimeError) as error:
            absent[contender.title] = f"{type(error).__name__}: {error}"

    def steps(optimizer: torch.optim.Optimizer) -> int:
        return min(max(math.ceil(seconds / bed.time(optimizer)), 1), 100)

    repeats = [steps(optimizer) for optimizer, _ in entered]
    often = steps(baseline)
    for _ in range(rounds):
        streams.sample()
        before = bed.sample(baseline, often)
        for (optimizer, result), repeat in zip(entered, repeats, strict=True):
            taken = bed.sample(optimizer, repeat)
            after = bed.sample(baseline, often)
            result.add(taken, (before + after) / 2)
            standard.add(after, (before + after) / 2)
            before = after
    return [standard, *(result for _, result in entered)], absent


def measure(args: argparse.Namespace) -> Iterator[Race]:
    """Races on every work list with every number of threads."""
    device = torch.device(args.device)
    lists = work_lists(args.quick)
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.shapes:
            bed = Bed(lists[name], device)
            streams = Streams(device, 400_000 if args.quick else 20_000_000)
            results, absent = race(bed, args.contenders, streams, args.rounds, 0.002 if args.quick else 0.03)
            yield Race(name, len(lists[name]), bed.size, threads, streams.medians(), results, absent)


COLUMNS = ("optimizer", "back-end", "ratio [min, max]", "ns/param", "% of stream", "first step ms",
           "state B/param", "transient B/param")  # fmt: skip


def share(race: Race, result: Result) -> float:
    """The part of the in-place stream's rate that a step's necessary traffic reaches."""
    return result.gigabytes / race.streams["in place"]


def describe(race: Race) -> str:
    """What was stepped on, and how fast the memory is."""
    streams = ", ".join(f"{name} {rate:.1f}" for name, rate in race.streams.items())
    return (
        f"{race.shapes}: {race.tensors} tensor{'s' * (race.tensors > 1)}, {race.parameters / 1e6:.2f}M parameters,"
        f" {race.threads} thread{'s' * (race.threads > 1)}; GB/s: {streams}"
    )


def rows(race: Race) -> list[list[str]]:
    """The text of a race's table under ``COLUMNS``."""
    return [
        [
            result.name,
            result.backend,
            f"{result.ratio:.2f} [{min(result.ratios):.2f}, {max(result.ratios):.2f}]",
            f"{result.nanoseconds:.2f}",
            f"{100 * share(race, result):.0f}",
            f"{1e3 * result.first_step:.1f}",
            f"{result.state_bytes:.2f}",
            f"{result.transient_bytes:.1f}",
        ]
        for result in race.results
    ]


def to_console(race: Race) -> None:
    """Writes a race as an aligned table."""
    lines = [list(COLUMNS), *rows(race)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{describe(race)}")
    for line in lines:
        cells = zip(line, widths, strict=True)
        print("  ".join(text.ljust(width) if i < 2 else text.rjust(width) for i, (text, width) in enumerate(cells)))
    for title, reason in race.absent.items():
        print(f"{title}: {reason}")


def to_markdown(races: Sequence[Race], where: dict[str, Any], rounds: int, command: Sequence[str]) -> str:
    """One table of ratios over all races, with what a reader needs to repeat it."""
    first = races[0]
    heads = [f"{race.shapes}, {race.threads}t" for race in races]
    lines = [
        ["optimizer", "back-end", *heads, "first step", "state", "transient"],
        ["---", "---", *["--:"] * (len(races) + 3)],
    ]
    for place, result in enumerate(first.results):
        same = [race.results[place] for race in races]
        ratios = [f"{r.ratio:.2f} [{min(r.ratios):.2f}, {max(r.ratios):.2f}], {r.nanoseconds:.2f}" for r in same]
        memory = [f"{result.state_bytes:.1f}", f"{result.transient_bytes:.1f}"]
        lines.append([f"`{result.name}`", result.backend, *ratios, f"{1e3 * result.first_step:.0f} ms", *memory])
    versions = {result.name.partition(".")[0]: result.version for result in first.results}
    machine = where.get("gpu") or f"{where['cpu']}, {where['cores']} cores"
    lists = {race.shapes: f"{race.shapes} = {race.tensors} x {race.parameters / race.tensors:,.0f}" for race in races}
    streams = "; ".join(f"{head} {race.streams['in place']:.0f} GB/s" for head, race in zip(heads, races, strict=True))
    notes = [
        "Time of a step over that of `torch.optim.AdamW(fused=True)` in the same run, median [min, max] of"
        f" {rounds} interleaved rounds, and the median in nanoseconds a parameter."
        " First step (n = 1), state and transient bytes a parameter:"
        f" on {first.shapes}, {first.threads}t.",
        f"{machine}; {', '.join(f'{name} {version}' for name, version in versions.items())}; float32;"
        f" tensors x mean size: {', '.join(lists.values())}; in-place stream: {streams};"
        f" load {where['load_before']:.1f} before, {where['load_after']:.1f} after."
        f" Command: `python -m bench.step {shlex.join(command)}`.",
        *(f"{title}: {reason}." for title, reason in first.absent.items()),
    ]
    traffic = [
        [
            f"`{result.name}`",
            result.backend,
            f"{result.traffic:.0f}",
            *(f"{100 * share(race, race.results[place]):.0f}" for race in races),
        ]
        for place, result in enumerate(first.results)
        if result.backend.startswith("fused")
    ]
    of_stream = [["optimizer", "back-end", "bytes", *heads], ["---", "---", *["--:"] * (len(races) + 1)], *traffic]
    caption = (
        "Bytes a parameter that a fused step moves at least: parameter and gradient read, parameter written, state"
        " read and written, and for AdaGradNorm the gradient read twice. Then the rate at which it moves them, in % of"
        " the in-place stream's in the same run; above 100 is what a cache held."
    )
    return "\n\n".join([as_table(lines), *notes, caption, as_table(of_stream)])


def as_table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    summary, _, detail = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("bench.step", description=summary, epilog=detail)
    add = parser.add_argument
    add("--shapes", type=lambda text: text.split(","), default=list(work_lists(True)), help="default: all three")
    add("--threads", type=lambda text: [int(t) for t in text.split(",")], default=[1, 2], help="default: 1,2")
    add("--methods", type=lambda text: text.split(","), default=[], help="more classes, package.module:Class")
    add("--fused", action="store_true", help="only those that are fused")
    add("--rounds", type=int, default=9, help="samples of each contender; default: 9")
    add("--device", default="cpu", help="cpu or cuda")
    add("--json", type=Path, metavar="FILE", help="write all samples")
    add("--md", action="store_true", help="print one Markdown table in place of the console tables")
    add("--quick", action="store_true", help="small tensors and few rounds, to see that all of it runs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if unknown := set(args.shapes) - set(work_lists(True)):
        parser.error(f"no shapes called {', '.join(sorted(unknown))}; known: {', '.join(work_lists(True))}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    args.contenders = [*CONTENDERS, *(Contender(path, backend) for path in args.methods for backend in BACKENDS)]
    if args.fused:
        args.contenders = [contender for contender in args.contenders if contender.backend.startswith("fused")]
    if args.quick:
        args.rounds, args.threads = min(args.rounds, 3), args.threads[:1]
    cores = os.cpu_count() or 1
    where = {**environment(), "load_before": os.getloadavg()[0]}
    if args.device.startswith("cuda"):
        where["gpu"] = torch.cuda.get_device_name(args.device)
    races = []
    for race in measure(args):
        races.append(race)
        if not args.md:
            to_console(race)
    where["load_after"] = os.getloadavg()[0]
    if args.md:
        print(to_markdown(races, where, args.rounds, sys.argv[1:] if argv is None else argv))
    if max(where["load_before"], where["load_after"] - max(args.threads)) > cores:
        message = "other work kept the cores busy: distrust all times, and with several threads the ratios too"
        print(f"bench.step: load above {cores}; {message}", file=sys.stderr)
    if args.json:
        content = {"environment": where, "rounds": args.rounds, "races": [asdict(race) for race in races]}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
