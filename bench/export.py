"""The results as files for other programs: CSV for tables, TensorBoard's events for curves."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from bench.store import Record

if TYPE_CHECKING:
    from bench.report import Results

COLUMNS = (
    "id", "task", "method", "phase", "status", "seed", "split", "budget", "schedule", "hp", "metric", "value", "loss",
    "train_loss", "to_target", "steps", "grads", "forwards", "hvps", "samples", "wall_s", "cpu_s", "step_ms",
    "state_bytes", "peak_bytes", "parameters", "package", "weights", "error",
)  # fmt: skip


def hyper_parameters(record: Record) -> str:
    """All of a run's, as text."""
    values = record["settings"]["hp"].items()
    return " ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values)


def flat(record: Record, metric: str) -> Record:
    """A run as one row; what it does not have is left empty."""
    metrics = record.get("metrics") or {}
    own = {
        "hp": hyper_parameters(record),
        "metric": metric,
        "value": metrics.get(metric),
        "loss": metrics.get("loss"),
        "train_loss": metrics.get("train_loss"),
    }
    everything = {**record["settings"], **record.get("counts", {}), **record, **own}
    return {column: everything.get(column) for column in COLUMNS}


def to_csv(results: "Results", stream: TextIO) -> None:
    """A line for every run, under a line of names."""
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat(run, results.spec_of(run).metric) for run in results.every_run)


def to_tensorboard(results: "Results", folder: Path, runs: Iterable[Record] | None = None) -> int:
    """Writes the curve of every run, or of these, as scalars by gradients taken; returns how many there were.

    Raises:
        ImportError: tensorboard is not installed.
    """
    from torch.utils.tensorboard import SummaryWriter

    written = 0
    for run in results.every_run if runs is None else runs:
        curve = results.store.curve(run["id"])
        if not curve:
            continue
        settings, metric = run["settings"], results.spec_of(run).metric
        name = f"{settings['method'].replace(':', '.')}/{run['phase']}-{settings['seed']}-{run['id'][:6]}"
        with SummaryWriter(str(folder / settings["task"] / name)) as writer:
            writer.add_text("settings", f"{hyper_parameters(run)}; {run['status']}")
            for point in curve:
                for tag in (metric, "loss", "train_loss"):
                    if point.get(tag) is not None:
                        writer.add_scalar(f"{settings['task']}/{tag}", point[tag], round(point["samples"]))
        written += 1
    return written
