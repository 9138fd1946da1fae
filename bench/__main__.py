"""The command line of the benchmark: list, run, report, status."""

import argparse
import os
import re
import signal
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench import methods, report
from bench.progress import clock, view
from bench.protocol import RULESETS, Cell, Protocol
from bench.store import Store
from bench.sweep import open_sweep, run_sweep
from bench.tasks import TASKS

DONE, FAILED, USAGE, NO_DATA, INTERRUPTED = 0, 1, 2, 3, 130
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


def workers(text: str) -> int:
    """A number of processes, or as many as this process may use cores."""
    if text != "auto":
        return positive(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    rules = Protocol()
    parser = argparse.ArgumentParser("bench", description=__doc__, epilog=EXITS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | run | report | status")

    command = commands.add_parser("list", help="the known tasks and methods")
    command.add_argument("what", nargs="?", choices=["tasks", "methods"])

    command = commands.add_parser("run", help="train; goes on where an earlier call stopped", epilog=EXITS)
    add = command.add_argument
    add("--tasks", type=names, default=list(TASKS), help="comma-separated; default: all")
    add(
        "--methods",
        type=names,
        default=list(methods.METHODS),
        help="also package.module:Class; default: all that are listed",
    )
    add("--ruleset", choices=RULESETS, default=rules.ruleset, help=f"default: {rules.ruleset}")
    add("--trials", type=positive, default=rules.trials, help=f"learning rates tried; default: {rules.trials}")
    add("--tune-seeds", type=positive, default=rules.tune_seeds, help=f"for each; default: {rules.tune_seeds}")
    add("--seeds", type=positive, default=rules.seeds, help=f"final runs; default: {rules.seeds}")
    add("--budget", type=factor, default=rules.budget, metavar="0.1x", help="multiple of each task's epochs")
    add("--max-time", type=duration, metavar="20m", help="start no run after this time")
    add("--workers", type=workers, default="auto", metavar="N|auto", help="processes of one thread; default: auto")
    add("--checkpoint-every", type=duration, default=30.0, metavar="30s", help="default: 30s")
    add("--out", type=Path, default=Path("runs"), help="results folder; default: runs")
    add("--progress", choices=["auto", "plain", "none"], default="auto")
    add("--dry-run", action="store_true", help="say what would run")

    command = commands.add_parser("report", help="tables and figures of a results folder")
    command.add_argument("out", type=Path)
    command.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained HTML file")
    command.add_argument("--md", action="store_true", help="print Markdown in place of the console table")

    command = commands.add_parser("status", help="how far a results folder is")
    command.add_argument("out", type=Path)
    return parser


def list_known(args: argparse.Namespace) -> int:
    """Prints what can be named."""
    if args.what != "methods":
        print("tasks")
        for name, task in TASKS.items():
            spec = task.spec
            print(
                f"  {name:<12} {spec.epochs} epochs, batch {spec.batch}, target {spec.metric} {spec.target:g}"
                + "".join(f", {tag}" for tag in sorted(spec.tags))
            )
    if args.what != "tasks":
        print("methods")
        for name, method in methods.METHODS.items():
            defaults = ", ".join(f"{key}={value:g}" for key, value in method.defaults.items())
            print(f"  {name:<12} {method.package}, {defaults}")
        print("  any other torch optimizer: package.module:Class")
    return DONE


def usage(error: Exception) -> int:
    """Reports a wrong request."""
    print(f"bench: {error}", file=sys.stderr)
    return USAGE


def missing(error: FileNotFoundError) -> int:
    """Reports data that are not where they should be."""
    print(f"bench: data missing: {error}", file=sys.stderr)
    return NO_DATA


def run(args: argparse.Namespace) -> int:
    """Trains what the folder lacks and prints the tables."""
    if not args.tasks or not args.methods:
        return usage(ValueError("--tasks and --methods must name something"))
    for task in args.tasks:
        if task not in TASKS:
            return usage(ValueError(f"no task called {task!r}{methods.nearest(task, TASKS)}"))
    try:
        for method in args.methods:
            methods.find(method)
    except LookupError as error:
        return usage(error)
    try:
        for task in args.tasks:
            TASKS[task].data()
    except FileNotFoundError as error:
        return missing(error)
    store = Store(args.out)
    protocol = Protocol(**{field.name: getattr(args, field.name) for field in fields(Protocol) if field.name in args})
    if args.dry_run:
        return show_plan([Cell(task, method, protocol) for task in args.tasks for method in args.methods], store)
    try:
        sweep = open_sweep(store, args.tasks, args.methods, protocol)
    except ValueError as error:
        return usage(error)
    with view(args.progress) as shown:
        records, complete = run_sweep(store, sweep, args.workers, args.max_time, args.checkpoint_every, shown)
    if args.progress != "none":
        report.to_console(report.Results(store))
    if not complete:
        print(f"Stopped by --max-time; {args.out} keeps what is done and the same command goes on from here.")
        return INTERRUPTED
    return FAILED if any(record["status"] == "error" for record in records.values()) else DONE


def show_plan(sweep: list[Cell], store: Store) -> int:
    """Prints how many runs are wanted, and trains none."""
    records = store.records()
    total = 0
    for cell in sweep:
        plan = cell.plan(records)
        total += plan.left
        count = Counter(settings.phase for settings in plan.wanted)
        print(f"{cell.task:<12} {cell.method:<12} {count['tune']:>3} tuning, {count['final'] + plan.later:>3} final")
    print(f"{total} runs at most, and a few more for a best learning rate at the edge of its grid")
    return DONE


def make_report(args: argparse.Namespace) -> int:
    """Writes or prints the report of a folder."""
    try:
        results = report.Results(Store(args.out))
    except FileNotFoundError as error:
        return missing(error)
    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(report.to_html(results), encoding="utf-8")
    if args.md:
        print(report.to_markdown(results))
    elif not args.html:
        report.to_console(results)
    return DONE


def status(args: argparse.Namespace) -> int:
    """Prints how far each method is on each task."""
    try:
        results = report.Results(Store(args.out))
    except FileNotFoundError as error:
        return missing(error)
    for table in results.tables:
        for row in table.rows:
            runs = {run["id"]: run["status"] for run in [*row.trials, *row.plan.default, *row.finals]}
            bad = Counter(status for status in runs.values() if status != "ok")
            print(
                f"{row.spec.name:<12} {row.method:<12} {len(runs):>3} done, {row.plan.left:>3} left"
                + "".join(f", {count} {status}" for status, count in bad.items())
            )
    unfinished = len(set(results.store.unfinished()) - set(results.records))
    print(f"{len(results.records)} runs, {clock(results.seconds)} of training; {unfinished} with a checkpoint")
    return DONE


COMMANDS = {"list": list_known, "run": run, "report": make_report, "status": status}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = build_parser().parse_args(argv)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        return COMMANDS[args.command](args)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
