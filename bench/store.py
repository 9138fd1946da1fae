"""The folder of a benchmark: what was planned, what has finished, what is under way.

manifest.json    the sweep, written once and widened by later calls
runs.jsonl       a line for every finished run
curves/ID.jsonl  the learning curve of a run, a line for every evaluation
ckpt/ID.pt       where an unfinished run stands; of several processes ckpt/ID.STEP, a folder
locks/ID         which process has a run in hand, touched as long as it lives

Several processes, on machines that share the folder, may work in it.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

Record = dict[str, Any]
FORMAT = 2  # of the folder
STALE = 60.0  # seconds after which a lock that nobody has written to is nobody's
UNWRITTEN = 2.0  # the same of an empty one, whose process died, or found no space, before it could write its name


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
    try:
        with open(part, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def dump(state: Record, stream: BinaryIO) -> None:
    """Writes tensors; torch hides what a full disk answers behind an error of its own.

    Raises:
        OSError: the stream does.
    """
    try:
        torch.save(state, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class Store:
    """A results folder, as one process sees it.

    Raises:
        ValueError: from whatever reads it, if another version of the benchmark wrote it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.runs = self.folder / "runs.jsonl"
        self.held: set[str] = set()  # the runs whose locks are ours
        self._read, self._lines = 0, 0  # bytes and lines of runs.jsonl that are in _records
        self._records: dict[str, Record] = {}

    def create(self) -> None:
        for name in ("curves", "ckpt", "locks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def manifest(self) -> Record | None:
        file = self.folder / "manifest.json"
        if not file.exists():
            return None
        try:
            manifest: Record = json.loads(file.read_text())
            known = manifest.get("format")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not the manifest of a sweep: {error}") from error
        if known != FORMAT:
            raise ValueError(
                f"{self.folder} has results in format {known}, and this benchmark reads format "
                f"{FORMAT}; use the version that wrote them, or another folder"
            )
        return manifest

    def save_manifest(self, manifest: Record) -> None:
        text = json.dumps({"format": FORMAT, **manifest}, indent=1, allow_nan=False) + "\n"
        replace(self.folder / "manifest.json", lambda stream: stream.write(text.encode()))

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[float]:
        """Keeps the other processes from what is to be done by one at a time; hands out the folder's time."""
        with open(self.folder / "locks" / "folder", "ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            os.utime(stream.fileno())
            yield os.fstat(stream.fileno()).st_mtime

    def append(self, record: Record) -> None:
        """Adds a finished run: its curve as a file and all else as a line, which is on the disk when this returns."""
        line = {key: value for key, value in record.items() if key != "curve"}
        if "curve" in record:
            self.save_curve(record["id"], record["curve"])
        with self.exclusive():
            self._drop_torn_line()
            with open(self.runs, "ab") as stream:
                stream.write((canonical(finite(line)) + "\n").encode())
                stream.flush()
                os.fsync(stream.fileno())

    def _drop_torn_line(self) -> None:
        if not self.runs.exists():
            return
        with open(self.runs, "rb+") as stream:
            end = size = stream.seek(0, os.SEEK_END)
            while end and (stream.seek(end - 1), stream.read(1))[1] != b"\n":
                end -= 1
            if end < size:
                stream.truncate(end)

    def news(self) -> list[Record]:
        """The runs that were added since this, or :meth:`records`, was last asked.

        A last line without its newline was torn by a crash and does not count.

        Raises:
            ValueError: if any other line cannot be read; the message names it.
        """
        if not self.runs.exists():
            return []
        with open(self.runs, "rb") as stream:
            stream.seek(self._read)
            content = stream.read()
        found = []
        for line in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                record = json.loads(line)
                self._records[record["id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.runs}:{self._lines + 1} is not a run: {error}") from error
            self._read, self._lines = self._read + len(line), self._lines + 1
            found.append(record)
        return found

    def records(self) -> dict[str, Record]:
        """The finished runs by id; of several with one id the last."""
        self.news()
        return dict(self._records)

    # Locks

    def claim(self, run: str) -> bool:
        """Takes a run in hand; false if another process that lives has it."""
        file = self.folder / "locks" / run
        with self.exclusive() as now:
            if file.exists():
                if not self._is_stale(file, now):
                    return False
                file.unlink()
            with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "w") as stream:
                stream.write(f"{socket.gethostname()}:{os.getpid()}")
        self.held.add(run)
        return True

    def _is_stale(self, file: Path, now: float) -> bool:
        """Whether the process that made a lock is dead, or has been silent for too long."""
        holder = file.read_text()
        if now - file.stat().st_mtime > (STALE if holder else UNWRITTEN):
            return True
        host, _, process = holder.rpartition(":")
        if host != socket.gethostname():
            return False
        if int(process) == os.getpid():  # of a process before this one, which had its number
            return file.name not in self.held
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def beat(self) -> None:
        """Shows that the runs in hand still are."""
        for run in self.held:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.folder / "locks" / run)

    def release(self, run: str) -> None:
        self.held.discard(run)
        (self.folder / "locks" / run).unlink(missing_ok=True)

    # Curves and checkpoints

    def save_curve(self, run: str, rows: Iterable[Record]) -> None:
        text = "".join(canonical(finite(row)) + "\n" for row in rows)
        replace(self.folder / "curves" / f"{run}.jsonl", lambda stream: stream.write(text.encode()))

    def curve(self, run: str) -> list[Record]:
        file = self.folder / "curves" / f"{run}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def save_checkpoint(self, run: str, state: Record) -> None:
        replace(self.folder / "ckpt" / f"{run}.pt", lambda stream: dump(state, stream))

    def checkpoint(self, run: str) -> Record | None:
        file = self.folder / "ckpt" / f"{run}.pt"
        return torch.load(file, weights_only=True) if file.exists() else None

    def drop_checkpoint(self, run: str) -> None:
        for file in (self.folder / "ckpt").glob(f"{run}.*"):  # of several processes it is a folder
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)

    def unfinished(self) -> list[str]:
        files = (self.folder / "ckpt").glob("*")
        return sorted({file.name.partition(".")[0] for file in files if not file.name.endswith(".part")})
