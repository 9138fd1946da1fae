"""What becomes of results: a sample of runs done again, and two folders beside each other."""

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np

from bench.pool import attempt
from bench.protocol import RAISED, Cell
from bench.report import ENOUGH, Row, Sample
from bench.run import Machine, Settings, environment
from bench.store import Record, Store, finite
from bench.sweep import cells

CLOSE = 0.02  # of a metric, in parts of it: what a run may differ by where its bits are not those of this machine


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def opened(store: Store) -> list[Cell]:
    """The cells of a folder.

    Raises:
        FileNotFoundError: it holds no sweep.
    """
    manifest = store.manifest()
    if manifest is None:
        raise FileNotFoundError(f"no sweep in {store.folder}, which should hold manifest.json and runs.jsonl")
    return cells(manifest)


def verify(store: Store, count: int, data_root: Path | None = None) -> Iterator[tuple[str, bool]]:
    """Runs finished runs again, a sample drawn anew each time, one method after another; says what came of each.

    On the processor and with the versions of the first time every bit of the weights has to be the same; elsewhere the
    metric has to be close.
    """
    opened(store)
    known = [r for r in store.records().values() if r["status"] not in RAISED and r["settings"]["world"] == 1]
    random.shuffle(known)
    by_method: dict[str, list[Record]] = {}
    for record in known:
        by_method.setdefault(record["settings"]["method"], []).append(record)
    rounds = max(map(len, by_method.values()), default=0)
    sample = [runs[i] for i in range(rounds) for runs in by_method.values() if i < len(runs)][:count]
    for record in sample:
        yield again(record, data_root)


def again(record: Record, data_root: Path | None) -> tuple[str, bool]:
    """One run, once more."""
    import torch

    names = [field.name for field in fields(Settings)]
    settings = Settings(**{name: record["settings"][name] for name in names})
    device = record["env"]["device"]
    machine = Machine(data_root, "cpu" if device == "cpu" else "cuda", record["env"]["threads"])
    threads = torch.get_num_threads()
    torch.set_num_threads(machine.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder)
            store.create()
            new = finite(attempt(settings, store, machine))  # as the store has it
    finally:
        torch.set_num_threads(threads)
    title = f"{settings.id} {settings.task} {settings.method} {settings.phase} seed {settings.seed}"
    if new["status"] in RAISED:
        return f"{title}: {new['status']}, {new['error']}", False
    if new["weights"] == record["weights"] and new["metrics"] == record["metrics"]:
        return f"{title}: the same bits", True
    now = environment(machine.device)
    other = [key for key in ("cpu", "device", "torch", "python") if record["env"].get(key) != now[key]]
    metric = next(iter(record["metrics"]))
    was, got = record["metrics"][metric], new["metrics"][metric]
    change = f"{metric} {was} before, {got} now"
    if device == "cpu" and not other:
        return f"{title}: other bits on the same machine, {change}", False
    where = ", ".join(f"{key} {record['env'].get(key)} before" for key in other) or device
    return f"{title}: other bits ({where}), {change}", was == got or (
        None not in (was, got) and abs(got - was) <= CLOSE * max(abs(was), abs(got))
    )


def compare(old: Store, new: Store) -> list[str]:
    """Lines of a Markdown table: for each method on each task the differences of the final runs, seed by seed."""
    sides = [{(c.task, c.method, c.preset): c for c in opened(store)} for store in (old, new)]
    records = [store.records() for store in (old, new)]
    lines = [
        "| task | method | n | before | now | difference [95 % interval] | P(better) | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in [key for key in sides[0] if key in sides[1]]:
        before, now = (finals(side[key], known) for side, known in zip(sides, records, strict=True))
        seeds = [seed for seed in before if seed in now]
        if not seeds:
            continue
        spec = sides[0][key].spec
        gains = [spec.sign * (now[seed] - before[seed]) for seed in seeds]
        sample = Sample(tuple(gains))
        low, high = sample.interval
        scale, unit = (100, " %") if spec.rate else (1, "")
        medians = [f"{scale * float(np.median([side[s] for s in seeds])):.4g}{unit}" for side in (before, now)]
        gain = f"{scale * sample.median:+.3g} [{scale * low:+.3g}, {scale * high:+.3g}]"
        shown = key[2] or key[0], key[1], len(seeds), *medians, gain, f"{sample.p_improvement:.2f}", sample.verdict
        lines.append(f"| {' | '.join(map(str, shown))} |")
    if len(lines) == 2:
        return ["The folders have no final runs of the same task, method and seed."]
    lines += ["", "Positive differences are better; the interval is of the median, over 2000 bootstrap draws. "
              f"A verdict needs {ENOUGH} seeds."]  # fmt: skip
    rules = [next(iter(side.values())).protocol.as_record() for side in sides]
    if differ := [
        f"{name} {rules[0][name]} and {rules[1][name]}" for name in rules[0] if rules[0][name] != rules[1][name]
    ]:
        lines += ["", f"The folders have different rules: {', '.join(differ)}."]
    return lines


def finals(cell: Cell, records: dict[str, Record]) -> dict[int, float]:
    """The metric of a cell's final runs by seed, those that the report shows."""
    return Row(cell, cell.plan(records), []).scores()
