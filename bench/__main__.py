"""The command line of the benchmark: list, run, report, status, verify, compare, targets."""

import argparse
import os
import re
import signal
import sys
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import evidence, export, methods, report
from bench.loops import SHARED
from bench.presets import PRESETS
from bench.progress import clock, view
from bench.protocol import RAISED, RULESETS, SAMPLERS, SELECTIONS, Cell, Protocol
from bench.run import Machine
from bench.schedule import factor as schedule_factor
from bench.store import Store
from bench.sweep import cells, find_preset, open_sweep, run_sweep, widened
from bench.tasks import SUITES, TASKS

DONE, FAILED, USAGE, NO_DATA, INTERRUPTED = 0, 1, 2, 3, 130
# Rules that a preset leaves no choice of.
FIXED = ("ruleset", "trials", "sampler", "select", "tune_seeds", "schedule", "amp")
EXITS = "exit codes: 0 done, 1 some runs raised an error, 2 usage, 3 data missing, 130 stopped before the end"


def names(text: str) -> list[str]:
    """A comma-separated list without repetitions."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def factor(text: str) -> float:
    """A multiple such as 0.1x."""
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+)x", text) or not float(text[:-1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple such as 0.1x or 2x")
    return float(text[:-1])


def duration(text: str) -> float:
    """The seconds of a time such as 20m."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 20m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def part(text: str) -> tuple[int, int]:
    """One of several machines, as 0/4."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 0/4, the first of four")
    return int(match[1]), int(match[2])


def schedule(text: str) -> str:
    """A schedule of the learning rate."""
    try:
        schedule_factor(text, 0.0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def workers(text: str) -> int:
    """A number of processes; 0 for as many as there are accelerators, or cores that this process may use."""
    return 0 if text == "auto" else positive(text)


def build_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    rules = Protocol()
    parser = argparse.ArgumentParser("bench", description=__doc__, epilog=EXITS)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("list", help="the known tasks, methods, suites and presets")
    command.add_argument("what", nargs="?", choices=["tasks", "methods", "suites", "presets"])

    # Without abbreviations, so that --config is found by whoever looks for it.
    command = commands.add_parser(
        "run", help="train; goes on where an earlier call stopped", epilog=EXITS, allow_abbrev=False
    )
    add = command.add_argument
    add("--config", type=Path, metavar="FILE", help="TOML with these options as keys; what is given here wins")
    what = command.add_argument_group("what is run").add_argument
    what("--suite", choices=list(SUITES), help="tasks that belong together; default: embedded")
    what("--tasks", type=names, help="comma-separated, in place of a suite")
    what("--methods", type=names, help="also package.module:Class; default: all that are listed")
    what("--preset", type=names, help="published training runs, in place of tasks and methods")
    how = partial(command.add_argument_group("the rules").add_argument, default=argparse.SUPPRESS)  # if not given
    how("--ruleset", choices=RULESETS, help=f"default: {rules.ruleset}")
    how("--trials", type=positive, help=f"settings tried; default: {rules.trials}")
    how("--sampler", choices=SAMPLERS, help=f"of the trials; default: {rules.sampler}")
    how("--select", choices=SELECTIONS, help=f"among the trials; default: {rules.select}")
    how("--tune-seeds", type=positive, help=f"of a trial; default: {rules.tune_seeds}")
    how("--seeds", type=positive, help=f"final runs; default: {rules.seeds}")
    how("--schedule", type=schedule, help="cosine, constant, wsd, step, ..; default: cosine")
    how("--budget", type=factor, metavar="0.1x", help="multiple of each task's epochs")
    how("--amp", choices=["off", "bf16"], help="activations in bfloat16; default: off")
    how("--parallel", choices=["ddp", "fsdp"], help="under torchrun; default: ddp")
    where = command.add_argument_group("the machine").add_argument
    where("--out", type=Path, default=Path("runs"), help="results folder; default: runs")
    where("--data-root", type=Path, metavar="DIR", help="where data lie that are not embedded")
    where("--download", action="store_true", help="fetch what --data-root lacks")
    where("--workers", type=workers, default="auto", metavar="N|auto", help="processes; default: auto")
    where("--threads", type=positive, default=1, help="of a worker; default: 1")
    where("--device", default="auto", help="cpu, cuda or auto, the default")
    where("--compile", action="store_true", help="torch.compile the networks")
    where("--shard", type=part, default=(0, 1), metavar="I/N", help="a part of the cells, for one of N machines")
    where("--max-time", type=duration, metavar="20m", help="start no run after this time")
    where("--max-run-time", type=duration, metavar="20m", help="end a run after this time")
    where("--checkpoint-every", type=duration, default=30.0, metavar="30s", help="default: 30s")
    where("--progress", choices=["auto", "plain", "json", "none"], default="auto")
    where("--dry-run", action="store_true", help="say what would run")

    command = commands.add_parser("report", help="tables and figures of a results folder")
    command.add_argument("out", type=Path)
    command.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained HTML file")
    command.add_argument("--md", action="store_true", help="print Markdown in place of the console table")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write a line for every run")
    command.add_argument("--tensorboard", type=Path, metavar="DIR", help="write the curve of every run as events")
    command.add_argument("--targets", action="store_true", help="print the published numbers, and what came of them")

    command = commands.add_parser("status", help="how far a results folder is")
    command.add_argument("out", type=Path)

    command = commands.add_parser("verify", help="run a sample of finished runs again, and compare", epilog=EXITS)
    command.add_argument("out", type=Path)
    command.add_argument("-n", type=positive, default=5, help="runs; default: 5")
    command.add_argument("--data-root", type=Path, metavar="DIR", help="where data lie that are not embedded")

    command = commands.add_parser("compare", help="the final runs of two folders, seed by seed")
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)

    command = commands.add_parser("targets", help="what was published, and what came of it here")
    command.add_argument("out", type=Path, nargs="?")
    return parser


def configured(argv: list[str]) -> list[str]:
    """The arguments with those of ``--config FILE`` before them, so that they are checked alike and the given ones win.

    Raises:
        ValueError: the file cannot be read.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    file = first.parse_known_args(argv)[0].config
    if file is None or argv[:1] != ["run"]:
        return argv
    try:
        import tomllib
    except ImportError as error:
        raise ValueError("--config needs Python 3.11 or later") from error
    try:
        settings = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--config {file}: {error}") from error
    given = []
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            given += [flag] * value
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            given.append(f"{flag}={text}")
    return ["run", *given, *argv[1:]]


def list_known(args: argparse.Namespace) -> int:
    """Prints what can be named."""
    if args.what in (None, "tasks"):
        print("tasks")
        for name, task in TASKS.items():
            spec = task.spec
            print(
                f"  {name:<12} {spec.epochs:g} epochs, batch {spec.batch}, target {spec.metric} {spec.target:g}"
                + "".join(f", {tag}" for tag in sorted(spec.tags))
            )
    if args.what in (None, "suites"):
        print("suites")
        for name, tasks in SUITES.items():
            print(f"  {name:<12} {', '.join(tasks)}")
    if args.what in (None, "methods"):
        print("methods")
        for name, method in methods.METHODS.items():
            defaults = ", ".join(f"{key}={value}" for key, value in method.defaults.items())
            needs = "".join(f", {need}" for need in sorted(method.needs))
            print(f"  {name:<14} {method.package}, {defaults}{needs}")
        print("  any other torch optimizer: package.module:Class")
    if args.what in (None, "presets"):
        print("presets")
        for name, preset in PRESETS.items():
            print(f"  {name:<26} {preset.task}, {preset.method}, {preset.epochs:g} epochs, batch {preset.batch}")
    return DONE


def usage(error: Exception | str) -> int:
    """Reports a wrong request."""
    print(f"bench: {error}", file=sys.stderr)
    return USAGE


def missing(error: FileNotFoundError) -> int:
    """Reports data that are not where they should be."""
    print(f"bench: data missing: {error}", file=sys.stderr)
    return NO_DATA


def wanted(args: argparse.Namespace) -> Protocol:
    """Fills in tasks and methods, makes sure that all that is named exists and can be run, and returns the rules.

    Raises:
        LookupError, ValueError: it does not.
        FileNotFoundError: data are missing.
    """
    given = [name for name in ("suite", "tasks", "preset") if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"--{' and --'.join(given)} exclude each other")
    args.presets = args.preset or []
    rules = Protocol(**{field.name: getattr(args, field.name) for field in fields(Protocol) if field.name in args})
    if args.presets:
        if own := [f"--{name.replace('_', '-')}" for name in FIXED if name in args]:
            raise ValueError(f"--preset has its own rules: leave {' and '.join(own)} out")
        rules = replace(rules, ruleset="one-shot")
        if args.methods is not None:
            raise ValueError("--preset has its method: leave --methods out")
        found = [PRESETS[find_preset(name)] for name in args.presets]
        args.tasks = list(dict.fromkeys(preset.task for preset in found))
        args.methods = list(dict.fromkeys(preset.method for preset in found))
    if args.tasks is None:
        args.tasks = list(SUITES[args.suite or "embedded"])
    if args.methods is None:
        alone = [m for m in methods.METHODS if args.world > 1 and methods.find(m).needs - SHARED]
        args.methods = [name for name in methods.METHODS if name not in alone]
    if not args.tasks or not args.methods:
        raise ValueError("--tasks and --methods must name something")
    for task in args.tasks:
        if task not in TASKS:
            raise LookupError(f"no task called {task!r}{methods.nearest(task, TASKS)}")
    for method in args.methods:
        if args.world > 1 and (alone := methods.find(method).needs - SHARED):
            raise ValueError(f"{method} needs {', '.join(sorted(alone))}, which is for one process alone")
        space = methods.find(method).space
        choices = [len(values) for values in space.values() if isinstance(values, tuple)]
        if rules.ruleset == "tuned" and rules.sampler == "grid" and rules.trials < max(choices, default=1):
            raise ValueError(
                f"--trials {rules.trials} is less than the {max(choices)} choices {method} has at each rate"
            )
    for task in args.tasks:
        if args.download and hasattr(TASKS[task], "download"):
            if args.data_root is None:
                raise ValueError("--download needs --data-root, where to put the data")
            TASKS[task].download(args.data_root)
        train = TASKS[task].data(args.data_root).train
        size = len(train[1]) if isinstance(train, tuple) else len(train)
        spec = TASKS[task].spec
        if rules.budget * spec.epochs * size < spec.batch:
            raise ValueError(f"--budget {rules.budget:g}x leaves {task} less than one batch of {spec.batch}")
    return rules


def run(args: argparse.Namespace) -> int:
    """Trains what the folder lacks and prints the tables."""
    import torch

    cuda = torch.cuda.is_available()
    try:
        device = str(torch.device(("cuda" if cuda else "cpu") if args.device == "auto" else args.device))
        if device.startswith("cuda") and not cuda:
            raise RuntimeError("torch finds no CUDA device")
    except RuntimeError as error:
        return usage(f"--device {args.device}: {str(error).splitlines()[0]}")
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        protocol = wanted(args)
    except (LookupError, ValueError) as error:
        return usage(str(error.args[0]))
    except FileNotFoundError as error:
        return missing(error)
    machine = Machine(args.data_root, device, args.threads, args.compile, args.checkpoint_every)
    crew = args.workers or (torch.cuda.device_count() if device == "cuda" else evidence.cores())
    store = Store(args.out)
    named, (index, count) = (args.tasks, args.methods, protocol, args.presets), args.shard
    if args.dry_run:
        try:
            return show_plan(cells(widened(store, *named))[index::count], store)
        except (ValueError, OSError) as error:
            return usage(error)
    if args.world > 1:
        from bench.distributed import run_together

        return run_together(args, store, protocol, machine)
    try:
        sweep = open_sweep(store, *named)
    except OSError as error:
        return usage(f"--out: {error}")
    except ValueError as error:
        return usage(error)
    with view(args.progress) as shown:
        try:
            records, complete = run_sweep(
                store, sweep[index::count], crew, args.max_time, machine, shown, args.max_run_time
            )
        except OSError as error:
            print(f"bench: {error}; the same command goes on from what is saved", file=sys.stderr)
            return FAILED
    if args.progress in ("auto", "plain"):
        report.to_console(report.Results(store))
    if not complete:
        print(f"Stopped by --max-time; {args.out} keeps what is done and the same command goes on from here.")
        return INTERRUPTED
    return FAILED if any(record["status"] in RAISED for record in records.values()) else DONE


def show_plan(sweep: list[Cell], store: Store) -> int:
    """Prints how many runs are wanted, and trains none."""
    records = store.records()
    total = 0
    for cell in sweep:
        plan = cell.plan(records)
        total += plan.left
        count = Counter(settings.phase for settings in plan.wanted)
        print(f"{cell.task:<12} {cell.method:<14} {count['tune']:>3} tuning, {plan.left - count['tune']:>3} others")
    print(f"{total} runs at most, and a few more for a best learning rate at the edge of its grid")
    return DONE


def make_report(args: argparse.Namespace) -> int:
    """Writes or prints the report of a folder."""
    results = report.Results(Store(args.out))
    for file in filter(None, (args.html, args.csv)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if args.html:
        args.html.write_text(report.to_html(results), encoding="utf-8")
    if args.csv:
        with open(args.csv, "w", encoding="utf-8", newline="") as stream:
            export.to_csv(results, stream)
    if args.tensorboard:
        try:
            print(f"{export.to_tensorboard(results, args.tensorboard)} curves written")
        except ImportError:
            return usage("--tensorboard needs tensorboard: pip install tensorboard")
    if args.md:
        print(report.to_markdown(results))
    if args.targets:
        print(report.targets(results))
    if not (args.html or args.csv or args.tensorboard or args.md or args.targets):
        report.to_console(results)
    return DONE


def status(args: argparse.Namespace) -> int:
    """Prints how far each method is on each task."""
    results = report.Results(Store(args.out))
    for table in results.every_table:
        for row in table.rows:
            runs = {run["id"]: run["status"] for run in [*row.trials, *row.plan.default, *row.finals]}
            bad = Counter(status for status in runs.values() if status != "ok")
            print(
                f"{row.spec.name:<12} {row.method:<14} {len(runs):>3} done, {row.plan.left:>3} left"
                + "".join(f", {count} {status}" for status, count in bad.items())
            )
    unfinished = len(set(results.store.unfinished()) - set(results.records))
    print(f"{len(results.records)} runs, {clock(results.seconds)} of training; {unfinished} with a checkpoint")
    return DONE


def verify(args: argparse.Namespace) -> int:
    """Runs a sample again and says which came out the same."""
    wrong = 0
    for line, same in evidence.verify(Store(args.out), args.n, args.data_root):
        print(line, flush=True)
        wrong += not same
    print(f"{wrong} of the sample differ" if wrong else "all of the sample are the same")
    return FAILED if wrong else DONE


def compare(args: argparse.Namespace) -> int:
    """Prints the differences between two folders."""
    print("\n".join(evidence.compare(Store(args.old), Store(args.new))))
    return DONE


def targets(args: argparse.Namespace) -> int:
    """Prints the published numbers with those of a folder beside them."""
    print(report.targets(report.Results(Store(args.out)) if args.out else None))
    return DONE


COMMANDS = {
    "list": list_known,
    "run": run,
    "report": make_report,
    "status": status,
    "verify": verify,
    "compare": compare,
    "targets": targets,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        args = build_parser().parse_args(configured(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        return usage(error)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        return COMMANDS[args.command](args)
    except FileNotFoundError as error:
        return missing(error)
    except (ValueError, OSError) as error:
        if args.command == "run":  # what is wrong with a request is known by then
            raise
        return usage(error)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
