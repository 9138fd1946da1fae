"""The folder of a benchmark: what was planned, what has finished, what is under way.

manifest.json    the sweep, written once and widened by later calls
runs.jsonl       a line for every finished run
curves/ID.jsonl  the learning curve of a run, a line for every evaluation
ckpt/ID.pt       where an unfinished run stands
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

Record = dict[str, Any]


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def identity(settings: Record) -> str:
    """The 16 hex digits that name the run with these settings."""
    return hashlib.sha256(canonical(settings).encode()).hexdigest()[:16]


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity replaced by None: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def replace(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file in one piece: a reader, or a crash, meets the old content or the new."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    with open(part, "wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)


class Store:
    """A results folder. One process at a time may append; any number may read."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.runs = self.folder / "runs.jsonl"

    def create(self) -> None:
        for name in ("curves", "ckpt"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def manifest(self) -> Record | None:
        file = self.folder / "manifest.json"
        return json.loads(file.read_text()) if file.exists() else None

    def save_manifest(self, manifest: Record) -> None:
        text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
        replace(self.folder / "manifest.json", lambda stream: stream.write(text.encode()))

    def append(self, record: Record) -> None:
        """Adds a finished run; when this returns the line has reached the disk."""
        self._drop_torn_line()
        with open(self.runs, "ab") as stream:
            stream.write((canonical(finite(record)) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())

    def _drop_torn_line(self) -> None:
        if not self.runs.exists():
            return
        with open(self.runs, "rb+") as stream:
            content = stream.read()
            if not content.endswith(b"\n"):
                stream.truncate(content.rfind(b"\n") + 1)

    def records(self) -> dict[str, Record]:
        """The finished runs by id. A last line without its newline was torn by a crash and does not count.

        Raises:
            ValueError: if any other line cannot be read; the message names it.
        """
        if not self.runs.exists():
            return {}
        records = {}
        lines = self.runs.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                records[record["id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.runs}:{number} is not a run: {error}") from error
        return records

    def save_curve(self, run: str, rows: Iterable[Record]) -> None:
        text = "".join(canonical(finite(row)) + "\n" for row in rows)
        replace(self.folder / "curves" / f"{run}.jsonl", lambda stream: stream.write(text.encode()))

    def curve(self, run: str) -> list[Record]:
        file = self.folder / "curves" / f"{run}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def save_checkpoint(self, run: str, state: Record) -> None:
        replace(self.folder / "ckpt" / f"{run}.pt", lambda stream: torch.save(state, stream))

    def checkpoint(self, run: str) -> Record | None:
        file = self.folder / "ckpt" / f"{run}.pt"
        return torch.load(file, weights_only=True) if file.exists() else None

    def drop_checkpoint(self, run: str) -> None:
        (self.folder / "ckpt" / f"{run}.pt").unlink(missing_ok=True)

    def unfinished(self) -> list[str]:
        return [file.stem for file in sorted((self.folder / "ckpt").glob("*.pt"))]
