"""Worker processes that train, one run at a time each. A worker may die without taking the sweep with it."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from bench.run import Settings, error_record, train
from bench.store import Record, Store

Event = tuple[Settings, float, Record | None]  # the run, the share of its budget used, its record once it has ended


def serve(connection: Connection, folder: Path, checkpoint_every: float) -> None:
    """The life of a worker: receive settings, train, send the record; end when the parent does."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    store = Store(folder)
    while True:
        try:
            settings: Settings = connection.recv()
        except EOFError:
            return
        try:
            record = train(settings, store, checkpoint_every, lambda progress, row: connection.send(progress))
        except BrokenPipeError:
            return
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            record = error_record(settings, f"{type(error).__name__}: {error} ({where})")
        connection.send(record)


class Worker:
    """A process and the run it has in hand."""

    def __init__(self, folder: Path, checkpoint_every: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, folder, checkpoint_every), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self, run: Settings) -> float | Record:
        """The share of the budget that the run has used, or its record once it has ended, if only by a crash."""
        try:
            message: float | Record = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return error_record(run, f"its process died with exit code {self.process.exitcode}")
        return message


def train_all(
    next_run: Callable[[], Settings | None], store: Store, workers: int, checkpoint_every: float
) -> Iterator[Event]:
    """Trains what ``next_run`` hands out until it has no more while nothing is under way; yields what happens."""
    crew = [Worker(store.folder, checkpoint_every) for _ in range(workers)]
    busy: dict[Any, tuple[Worker, Settings]] = {}
    try:
        while True:
            for worker in crew:
                if worker.connection not in busy and (run := next_run()):
                    busy[worker.connection] = worker, run
                    worker.connection.send(run)
                    yield run, 0.0, None
            if not busy:
                return
            for connection in wait(list(busy)):
                worker, run = busy[connection]
                message = worker.receive(run)
                if isinstance(message, float):
                    yield run, message, None
                    continue
                del busy[connection]
                if not worker.process.is_alive():
                    crew[crew.index(worker)] = Worker(store.folder, checkpoint_every)
                yield run, 1.0, message
    finally:
        for worker in crew:
            worker.process.terminate()
        for worker in crew:
            worker.process.join()
