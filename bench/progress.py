"""How a sweep is shown while it runs: a rich bar on a terminal, lines elsewhere, or nothing."""

import json
import sys
import time
from typing import Any, TextIO

from bench.run import Settings
from bench.store import Record, finite


def clock(seconds: float) -> str:
    """A duration as people say it: 45s, 3m05s, 2h10m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    return f"{seconds // 60}m{seconds % 60:02}s" if seconds < 3600 else f"{seconds // 3600}h{seconds % 3600 // 60:02}m"


def title(settings: Settings) -> str:
    """A run in a few words."""
    lr = settings.hp.get("lr")
    return f"{settings.task} {settings.method} {settings.phase} seed {settings.seed}" + (f" lr {lr:g}" if lr else "")


def failure_line(settings: Settings, record: Record) -> str:
    """How a run failed."""
    return f"{record['status']}: {title(settings)}" + (f": {record['error']}" if record["error"] else "")


class Silent:
    """Shows nothing; the base of the others."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exception: Any) -> None: ...

    def step(self, settings: Settings, share: float) -> None:
        """A run has begun or moved on."""

    def finish(self, settings: Settings, record: Record, done: int, left: int, eta: float | None) -> None:
        """A run has ended; ``left`` and the seconds ``eta`` are what the sweep still has to do."""

    def note(self, text: str) -> None:
        """Something that the user should know."""
        print(text, file=sys.stderr)


class Plain(Silent):
    """A line for every failure, and one on how things stand every few seconds."""

    def __init__(self, stream: TextIO | None = None, every: float = 10.0) -> None:
        self.stream, self.every, self.last = stream or sys.stderr, every, 0.0
        self.failed = 0

    def finish(self, settings: Settings, record: Record, done: int, left: int, eta: float | None) -> None:
        if record["status"] != "ok":
            self.failed += 1
            self._line(failure_line(settings, record))
        if time.monotonic() - self.last >= self.every or not left:
            self.last = time.monotonic()
            rest = f", about {clock(eta)} left" if left and eta is not None else ""
            self._line(f"{done} of {done + left} runs, {self.failed} failed{rest}")

    def _line(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()


class Lines(Silent):
    """A line of JSON for every run that ends, for programs."""

    def finish(self, settings: Settings, record: Record, done: int, left: int, eta: float | None) -> None:
        keys = {key: record.get(key) for key in ("id", "status", "phase", "metrics", "error", "wall_s")}
        line = {**keys, "task": settings.task, "method": settings.method, "hp": settings.hp, "seed": settings.seed}
        print(json.dumps(finite({**line, "done": done, "left": left, "eta_s": eta})), flush=True)


class Rich(Silent):
    """One bar for the sweep and one for each run under way."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[note]}")
        self.bars = Progress(*columns, console=Console(stderr=True), transient=True)
        self.total = self.bars.add_task("sweep", note="", total=None)
        self.runs: dict[str, Any] = {}
        self.failed = 0

    def __enter__(self) -> "Rich":
        self.bars.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bars.stop()

    def step(self, settings: Settings, share: float) -> None:
        if settings.id not in self.runs:
            self.runs[settings.id] = self.bars.add_task(f"[dim]{title(settings)}", note="", total=1.0)
        self.bars.update(self.runs[settings.id], completed=share)

    def note(self, text: str) -> None:
        self.bars.console.print(text, style="yellow", markup=False, highlight=False)

    def finish(self, settings: Settings, record: Record, done: int, left: int, eta: float | None) -> None:
        self.bars.remove_task(self.runs.pop(settings.id))
        if record["status"] != "ok":
            self.failed += 1
            self.bars.console.print(failure_line(settings, record), style="yellow", markup=False, highlight=False)
        rest = f"{clock(eta)} left" if left and eta is not None else ""
        note = f"{done}/{done + left} {rest}" + (f" [yellow]{self.failed} failed[/]" if self.failed else "")
        self.bars.update(self.total, completed=done, total=done + left, note=note)


def view(kind: str) -> Silent:
    """``auto``, ``plain``, ``json`` or ``none``; a bar needs a terminal and rich."""
    if kind == "none":
        return Silent()
    if kind == "json":
        return Lines()
    if kind == "auto" and sys.stderr.isatty():
        try:
            return Rich()
        except ImportError:
            pass
    return Plain()
