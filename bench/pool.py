"""Worker processes that train, one run at a time each. A worker may die without taking the sweep with it."""

import contextlib
import dataclasses
import functools
import io
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from bench.run import Machine, Settings, Stopped, error_record, fate, train
from bench.store import Record, Store

Request = Settings | Literal["wait"] | None
Event = tuple[Settings, float, Record | None]  # the run, the share of its budget used, its record once it has ended

POLL = 0.5  # seconds until limits are looked at, and what other processes did
BEAT = 10.0  # seconds between two signs of life
PATIENCE = 15.0  # seconds that a worker has to write its checkpoint when it is asked to stop


def attempt(settings: Settings, store: Store, machine: Machine, **options: Any) -> Record:
    """The record of a run, whatever happens in it; with what was warned of, once each."""
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("default")
        try:
            record = train(settings, store, machine=machine, **options)
        except Exception as error:
            if isinstance(error, Stopped | BrokenPipeError):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            record = error_record(settings, f"{type(error).__name__}: {error} ({where})", fate(error), machine.device)
    return {**record, "warnings": sorted({str(warning.message) for warning in warned})}


def serve(connection: Connection, folder: Path, machine: Machine) -> None:
    """The life of a worker: receive settings, train, send the record; end when the parent does or says so."""
    import torch

    torch.set_num_threads(machine.threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    busy = stopping = False

    def stop(*_: Any) -> None:
        nonlocal stopping
        stopping = True
        if not busy:
            sys.exit()

    signal.signal(signal.SIGTERM, stop)
    store = Store(folder)
    while True:
        try:
            settings: Settings = connection.recv()
        except EOFError:
            return
        busy = True
        try:
            report = lambda progress, row: connection.send(float(progress))  # noqa: E731
            record = attempt(settings, store, machine, on_evaluation=report, stopping=lambda: stopping)
            connection.send(record)
        except (BrokenPipeError, Stopped):
            return
        busy = False
        if stopping:  # since the record was sent
            return


@functools.cache
def workshop() -> Any:
    """Where workers come from: a server without threads or state that has imported what they need, and forks."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.pool", "bench.zoo", "sklearn.datasets"])
    return context


class Worker:
    """A process and the run it has in hand."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.machine, context = machine, workshop()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, folder, machine))
        self.process.start()
        theirs.close()
        self.begun = 0.0

    def receive(self, run: Settings) -> float | Record:
        """The share of the budget that the run has used, or its record once it has ended, if only by a crash."""
        try:
            message: float | Record = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            killed = f"was killed by signal {-code}" + ", as when memory runs out" * (code == -signal.SIGKILL)
            died = f"its process {killed if code < 0 else f'died with exit code {code}'}"
            return error_record(run, died, device=self.machine.device)
        return message

    def give_up(self, run: Settings, limit: float) -> Record:
        """Ends a run that has taken too long."""
        self.process.kill()
        self.process.join()
        return error_record(run, f"not done after {limit:g} s", "timeout", self.machine.device)


def place(machine: Machine, index: int) -> Machine:
    """The machine of a worker: with several accelerators each has the next."""
    if machine.device != "cuda":
        return machine
    import torch

    return dataclasses.replace(machine, device=f"cuda:{index % torch.cuda.device_count()}")


def train_all(
    next_run: Callable[[], Request], store: Store, workers: int, machine: Machine, run_time: float | None = None
) -> Iterator[Event]:
    """Trains what ``next_run`` hands out until it has no more while nothing is under way; yields what happens.

    Where it says "wait", it is asked again a little later. A run that takes longer than ``run_time`` seconds is ended.
    """
    crew = [Worker(store.folder, place(machine, index)) for index in range(workers)]
    busy: dict[Any, tuple[Worker, Settings]] = {}
    beaten = time.monotonic()
    try:
        while True:
            waiting = False
            for worker in crew:
                if worker.connection in busy:
                    continue
                run = next_run()
                if not isinstance(run, Settings):
                    waiting = run == "wait"
                    break
                busy[worker.connection] = worker, run
                worker.begun = time.monotonic()
                worker.connection.send(run)
                yield run, 0.0, None
            if not busy and not waiting:
                return
            ready = wait(list(busy), timeout=POLL) if busy else []
            if not busy:
                time.sleep(POLL)
            if time.monotonic() - beaten > BEAT:
                store.beat()
                beaten = time.monotonic()
            for connection, (worker, run) in list(busy.items()):
                if connection in ready:
                    message = worker.receive(run)
                elif run_time is not None and time.monotonic() - worker.begun > run_time:
                    message = worker.give_up(run, run_time)
                else:
                    continue
                if isinstance(message, float):
                    yield run, message, None
                    continue
                del busy[connection]
                if not worker.process.is_alive():
                    crew[crew.index(worker)] = Worker(store.folder, worker.machine)
                yield run, 1.0, message
    finally:
        for worker in crew:
            worker.process.terminate()
        for worker in crew:
            worker.process.join(PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
