"""A sweep: every method on every task, planned by the protocol, trained by the pool, kept in the store."""

import errno
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from bench.methods import find, nearest
from bench.pool import Request, train_all
from bench.presets import PRESETS
from bench.progress import Silent
from bench.protocol import RAISED, Cell, Plan, Protocol
from bench.run import Machine, Settings, environment
from bench.store import Record, Store
from bench.tasks import TASKS

WIDENED = ("seeds",)  # the rules that a later call may raise: more of the same runs
FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk


def widened(
    store: Store, tasks: Iterable[str], methods: Iterable[str], protocol: Protocol, presets: Iterable[str] = ()
) -> Record:
    """The folder's manifest with this sweep in it. It may add tasks, methods, presets and seeds, and change no rule.

    Raises:
        ValueError: if the folder's sweep has other rules; the message names them.
    """
    rules = protocol.as_record()
    if known := store.manifest():
        differ = [key for key in rules if key not in WIDENED and rules[key] != known["protocol"][key]]
        if bool(known["presets"]) != bool(presets):
            raise ValueError(f"{store.folder} holds {'presets' if known['presets'] else 'no presets'}; give this "
                             "sweep another --out")  # fmt: skip
        if differ:
            was = ", ".join(f"{key} {known['protocol'][key]}" for key in differ)
            raise ValueError(f"{store.folder} holds a sweep with {was}; give this one another --out")
        tasks = dict.fromkeys([*known["tasks"], *tasks])
        methods = dict.fromkeys([*known["methods"], *methods])
        presets = dict.fromkeys([*known["presets"], *presets])
        rules |= {key: max(rules[key], known["protocol"][key]) for key in WIDENED}
    return {"tasks": list(tasks), "methods": list(methods), "presets": list(presets), "protocol": rules}


def open_sweep(
    store: Store, tasks: Iterable[str], methods: Iterable[str], protocol: Protocol, presets: Iterable[str] = ()
) -> list[Cell]:
    """Records the sweep in the folder's manifest and returns its cells.

    Raises:
        ValueError: as :func:`widened` and :func:`cells` do.
    """
    store.create()
    with store.exclusive():
        manifest = widened(store, tasks, methods, protocol, presets)
        found = cells(manifest)
        store.save_manifest({**manifest, "env": environment()})
    return found


def cells(manifest: Record) -> list[Cell]:
    """Every method on every task, task by task, so that a sweep cut short has finished some; or the presets.

    Raises:
        ValueError: if the folder names a task, a method or a preset that is not here.
    """
    protocol = Protocol(**manifest["protocol"])
    try:
        for method in manifest["methods"]:
            find(method)
        for name in manifest["presets"]:
            find_preset(name)
        if strange := [task for task in manifest["tasks"] if task not in TASKS]:
            raise LookupError(f"no task called {strange[0]!r}{nearest(strange[0], TASKS)}")
    except LookupError as error:
        raise ValueError(f"the folder's sweep cannot be planned: {error.args[0]}") from error
    if manifest["presets"]:
        return [Cell(PRESETS[name].task, PRESETS[name].method, protocol, name) for name in manifest["presets"]]
    return [Cell(task, method, protocol) for task in manifest["tasks"] for method in manifest["methods"]]


def find_preset(name: str) -> str:
    """The name of a preset that exists.

    Raises:
        LookupError: there is none; the message names the nearest ones.
    """
    if name not in PRESETS:
        raise LookupError(f"no preset called {name!r}{nearest(name, PRESETS)}")
    return name


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


@dataclass
class Progress:
    """The cells of this process, the runs known so far, and the plan of each cell until one of its runs ends.

    Runs that raised before are not counted, so that they are tried again. A run that has ended is kept until there is
    space for its line, and until then none is begun: what was trained is not lost to a full disk.
    """

    store: Store
    cells: list[Cell]
    view: Silent = field(default_factory=Silent)
    unsaved: list[Record] = field(default_factory=list)
    full: bool = False  # the disk, when it was last written to
    records: dict[str, Record] = field(default_factory=dict)
    plans: dict[Cell, Plan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.records = {run: r for run, r in self.store.records().items() if r["status"] not in RAISED}

    def add(self, record: Record) -> None:
        self.records[record["id"]] = record
        settings = record["settings"]
        for cell in self.cells:
            if (cell.task, cell.method) == (settings["task"], settings["method"]):
                self.plans.pop(cell, None)

    def end(self, record: Record) -> None:
        """Takes a run that has ended; its line is written before another run is begun."""
        self.add(record)
        self.unsaved.append(record)
        self._with_space(self.save)

    def save(self) -> None:
        """Writes the runs that have ended."""
        while self.unsaved:
            record = self.unsaved[0]
            self.store.append(record)
            self.unsaved.pop(0).pop("curve", None)
            self.store.drop_checkpoint(record["id"])
            self.store.release(record["id"])

    def close(self) -> None:
        """Writes the runs that have ended, for the last time, and gives up all claims."""
        try:
            self.save()
        finally:
            for run in list(self.store.held):
                self.store.release(run)

    def refresh(self) -> None:
        """Takes notice of the runs that other processes have ended."""
        for record in self.store.news():
            self.add(record)

    def plan(self, cell: Cell) -> Plan:
        if cell not in self.plans:
            self.plans[cell] = cell.plan(self.records)
        return self.plans[cell]

    @property
    def pending(self) -> dict[str, int]:
        """How many runs each task still wants."""
        left: dict[str, int] = defaultdict(int)
        for cell in self.cells:
            left[cell.task] += self.plan(cell).left
        return left

    def next_run(self) -> Request:
        """A run that nobody has in hand, now ours; None if there is none.

        "wait" if others have all there is, or the disk is full.
        """
        return self._with_space(self._next_run)

    def _with_space(self, act: Callable[[], Request]) -> Request:
        """What ``act`` returns, or "wait" if it finds no space, which the user is told once."""
        try:
            found = act()
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self.full:
                self.view.note(f"{self.store.folder}: {error}; no run is begun until there is space")
            self.full = True
            return "wait"
        self.full = False
        return found

    def _next_run(self) -> Request:
        self.save()
        waiting: Request = None
        for cell in self.cells:
            for settings in list(self.plan(cell).wanted):
                if settings.id in self.store.held:
                    waiting = "wait"
                    continue
                if not self.store.claim(settings.id):
                    waiting = "wait"
                    continue
                self.refresh()  # another process may have ended it just before the claim
                if settings.id not in self.records:
                    return settings
                self.store.release(settings.id)
        if waiting:
            self.refresh()
        return waiting


def run_sweep(
    store: Store,
    cells: list[Cell],
    workers: int,
    max_time: float | None,
    machine: Machine,
    view: Silent,
    run_time: float | None = None,
) -> tuple[dict[str, Record], bool]:
    """Trains what the cells want; returns the records and whether time allowed all of it.

    Runs that other processes have in hand are waited for, and so is space on the disk.

    Raises:
        OSError: the folder cannot be written; for want of space only if time is up, or the user's patience.
    """
    state, pace, begun = Progress(store, cells, view), Pace(), time.monotonic()
    for run in {*store.unfinished()} & state.records.keys():  # of a process that was killed between line and checkpoint
        store.drop_checkpoint(run)

    def next_run() -> Request:
        late = max_time is not None and time.monotonic() - begun > max_time
        return None if late else state.next_run()

    try:
        for settings, share, record in train_all(next_run, store, workers, machine, run_time):
            if record is None:
                pace.start(settings)
                view.step(settings, share)
                continue
            state.end(record)
            pace.end(settings)
            pending = state.pending
            left = sum(pending.values())
            view.finish(settings, record, len(state.records), left, pace.left(pending, workers))
    finally:
        state.close()
    return state.records, not sum(state.pending.values())
