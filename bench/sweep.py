"""A sweep: every method on every task, planned by the protocol, trained by the pool, kept in the store."""

import time
from collections import defaultdict
from collections.abc import Iterable

from bench.pool import train_all
from bench.progress import Silent
from bench.protocol import Cell, Protocol
from bench.run import Settings, environment
from bench.store import Record, Store


def open_sweep(store: Store, tasks: Iterable[str], methods: Iterable[str], protocol: Protocol) -> list[Cell]:
    """Records the sweep in the folder's manifest and returns its cells.

    A later call may add tasks, methods and seeds; it may not change the rules.

    Raises:
        ValueError: if the folder's sweep has other rules; the message names them.
    """
    rules = protocol.as_record()
    if known := store.manifest():
        differ = [key for key in rules if key != "seeds" and rules[key] != known["protocol"][key]]
        if differ:
            was = ", ".join(f"{key} {known['protocol'][key]}" for key in differ)
            raise ValueError(f"{store.folder} holds a sweep with {was}; give this one another --out")
        tasks = dict.fromkeys([*known["tasks"], *tasks])
        methods = dict.fromkeys([*known["methods"], *methods])
        rules["seeds"] = max(rules["seeds"], known["protocol"]["seeds"])
    store.create()
    manifest = {"format": 1, "tasks": list(tasks), "methods": list(methods), "protocol": rules}
    store.save_manifest({**manifest, "env": environment()})
    return cells(manifest)


def cells(manifest: Record) -> list[Cell]:
    """Every method on every task, task by task, so that a sweep cut short has finished some."""
    protocol = Protocol(**manifest["protocol"])
    return [Cell(task, method, protocol) for task in manifest["tasks"] for method in manifest["methods"]]


class Pace:
    """Guesses the time left from the runs of the same task that have ended."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}
        self.lasted: dict[str, list[float]] = defaultdict(list)

    def start(self, settings: Settings) -> None:
        self.started.setdefault(settings.id, time.monotonic())

    def end(self, settings: Settings) -> None:
        self.lasted[settings.task].append(time.monotonic() - self.started.pop(settings.id))

    def left(self, pending: dict[str, int], workers: int) -> float:
        every = [seconds for runs in self.lasted.values() for seconds in runs]

        def mean(task: str) -> float:
            runs = self.lasted.get(task) or every
            return sum(runs) / len(runs)

        return sum(count * mean(task) for task, count in pending.items()) / workers


def run_sweep(
    store: Store, cells: list[Cell], workers: int, max_time: float | None, checkpoint_every: float, view: Silent
) -> tuple[dict[str, Record], bool]:
    """Trains what the cells want; returns the records and whether time allowed all of it.

    Runs that ended in an error before are tried again.
    """
    records = {run: record for run, record in store.records().items() if record["status"] != "error"}
    under_way: set[str] = set()
    begun = time.monotonic()
    pace = Pace()
    by_task = {task: [cell for cell in cells if cell.task == task] for task in {cell.task for cell in cells}}

    def next_run() -> Settings | None:
        if max_time is not None and time.monotonic() - begun > max_time:
            return None
        for cell in cells:
            for settings in cell.plan(records).wanted:
                if settings.id not in under_way:
                    under_way.add(settings.id)
                    return settings
        return None

    for settings, share, record in train_all(next_run, store, workers, checkpoint_every):
        if record is None:
            pace.start(settings)
            view.step(settings, share)
            continue
        store.append(record)
        store.drop_checkpoint(settings.id)
        records[settings.id] = record
        under_way.discard(settings.id)
        pace.end(settings)
        pending = {task: sum(cell.plan(records).left for cell in group) for task, group in by_task.items()}
        view.finish(settings, record, len(records), sum(pending.values()), pace.left(pending, workers))
    return records, not any(cell.plan(records).left for cell in cells)
