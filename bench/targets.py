"""The numbers of targets.toml, and what the runs of a folder make of them."""

import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.presets import PRESETS
from bench.protocol import score
from bench.store import Record
from bench.tasks import TASKS

FILE = Path(__file__).with_name("targets.toml")
READABLE = sys.version_info >= (3, 11)
NONE_PUBLISHED, NOT_RUN = "no published value obtained", "not run"
REPRODUCED, MISSED = "reproduced", "not reproduced"


@dataclass(frozen=True)
class Target:
    """A row of targets.toml, which says what the fields are."""

    method: str
    setting: str
    source: str
    value: float | None = None
    n: int = 0
    caveat: str = ""
    preset: str = ""
    task: str = ""
    entry: str = ""

    @property
    def on(self) -> str:
        """The task that it is measured on here; empty if there is none."""
        return PRESETS[self.preset].task if self.preset else self.task

    def matches(self, record: Record) -> bool:
        """Whether a run has the recipe of the preset."""
        recipe, settings = PRESETS[self.preset], record["settings"]
        same = all(settings[key] == getattr(recipe, key) for key in ("task", "method", "schedule", "epochs", "batch"))
        return (
            same
            and settings["budget"] == 1
            and record["phase"] == "final"
            and recipe.hp.items() <= settings["hp"].items()
        )


@dataclass(frozen=True)
class Outcome:
    """A target and the final runs that answer it."""

    target: Target
    scores: tuple[float, ...] = ()

    @property
    def median(self) -> float | None:
        return statistics.median(self.scores) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """Median less target; positive is better."""
        if self.median is None or self.target.value is None:
            return None
        return TASKS[self.target.on].spec.sign * (self.median - self.target.value)

    @property
    def verdict(self) -> str:
        """Reproduced: no worse than the number by more than one standard error of a run."""
        if self.target.value is None:
            return NONE_PUBLISHED
        if self.deviation is None:
            return NOT_RUN
        spec = TASKS[self.target.on].spec
        return REPRODUCED if self.deviation >= -spec.error(self.target.value, spec.n_test) else MISSED


def load() -> list[Target]:
    """All targets in the order of the file; none where Python has no reader for it."""
    if not READABLE:
        return []
    import tomllib

    return [Target(**row) for row in tomllib.loads(FILE.read_text())["target"]]


def outcomes(records: Iterable[Record], finals: dict[tuple[str, str], list[Record]]) -> list[Outcome]:
    """Each target with the runs that answer it.

    Args:
        records: all runs, in which presets are looked for.
        finals: the final runs by task and method.
    """
    records = list(records)
    found = []
    for target in load():
        runs = finals.get((target.task, target.entry), [])
        if target.preset:
            runs = [record for record in records if target.matches(record)]
        found.append(Outcome(target, tuple(score(run, TASKS[target.on].spec) for run in runs)))
    return found
