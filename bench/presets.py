"""Training runs that somebody published, with their recipe and the number they reached."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A recipe. Batch, epochs and schedule take the place of the task's and the protocol's."""

    task: str
    method: str
    hp: dict[str, Any]
    schedule: str  # as bench/schedule.py reads it
    epochs: float
    batch: int
    published: float | None  # the task's metric on its test split; None: no number was published
    source: str
    seeds: int = 1  # of the published number
    amp: str = "off"  # or "bf16"
    note: str = ""


PRESETS: dict[str, Preset] = {}
