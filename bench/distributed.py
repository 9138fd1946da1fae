"""A sweep under torchrun: all processes train one run after another together, and the first one keeps the books."""

import argparse
import datetime
import os
import shutil
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from bench.loops import Whole, agreed
from bench.pool import attempt
from bench.progress import Silent, view
from bench.protocol import RAISED, Protocol
from bench.run import Machine, Settings, Stopped
from bench.store import Store, dump
from bench.sweep import Progress, open_sweep

TOGETHER = datetime.timedelta(minutes=2)  # within which all processes end a run, or some hang in it


class Sharded(Whole):
    """The checkpoint that several processes write together: a folder, complete once it has its ``.metadata``."""

    def _folders(self) -> Any:
        return (self.store.folder / "ckpt").glob(f"{self.run.settings.id}.*")

    def load(self) -> None:
        whole = [folder for folder in self._folders() if (folder / ".metadata").exists()]
        newest = max(whole, key=lambda folder: int(folder.suffix[1:]), default=None)
        chosen = [newest]
        dist.broadcast_object_list(chosen, 0)
        if chosen[0] is None:
            return
        run = self.run
        model, optimizer = get_state_dict(run.model, run.optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=chosen[0])
        set_state_dict(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        place = torch.load(chosen[0] / f"place-{dist.get_rank()}.pt", weights_only=True)
        run.take_place(place)

    def _save(self) -> None:
        run = self.run
        folder = self.store.folder / "ckpt" / f"{run.settings.id}.{run.clock['steps']}"
        failed: OSError | None = None
        try:
            folder.mkdir(exist_ok=True)
            with open(folder / f"place-{dist.get_rank()}.pt", "wb") as stream:
                dump(run.place(), stream)
        except OSError as error:
            failed = error
        if not any(agreed(run.settings.world, failed is not None)):  # else some would wait for others in dcp.save
            model, optimizer = get_state_dict(run.model, run.optimizer)
            try:
                dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
            except CheckpointException as error:
                failed = OSError(str(error))
        elif failed is None:
            failed = OSError("another process could not write its part")
        dist.barrier()
        if dist.get_rank() == 0:
            for other in self._folders():
                if (other == folder) == bool(failed):  # the older ones, or what there is of this
                    shutil.rmtree(other, ignore_errors=True)
        if failed:
            raise failed

    def weights(self) -> dict[str, Tensor]:
        options = StateDictOptions(full_state_dict=True)
        return get_model_state_dict(self.run.model, options=options)


def run_together(args: argparse.Namespace, store: Store, protocol: Protocol, machine: Machine) -> int:
    """Trains what the folder lacks; every process calls it, and gets the same exit code."""
    cuda = machine.device.startswith("cuda")
    torch.set_num_threads(machine.threads)
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        machine = Machine(**{**vars(machine), "device": f"cuda:{os.environ['LOCAL_RANK']}"})
    dist.init_process_group("nccl" if cuda else "gloo")
    ends = dist.new_group(backend="gloo")
    stopping = False

    def stop(*_: Any) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    first, begun = dist.get_rank() == 0, time.monotonic()
    shown = view(args.progress) if first else Silent()
    books: Progress | None = None
    answer: list[Any] = [None]
    if first:
        try:
            cells = open_sweep(store, args.tasks, args.methods, protocol, args.presets)
            index, count = args.shard
            books = Progress(store, cells[index::count], shown)
        except (ValueError, OSError) as error:
            print(f"bench: {error}", file=sys.stderr)
            answer = [2]
    dist.broadcast_object_list(answer, 0, ends)
    if answer[0] is not None:
        dist.destroy_process_group()
        return int(answer[0])
    code = 0
    with shown:
        while True:
            if books is not None:
                answer = ["wait"]
                while answer == ["wait"]:  # for another torchrun in this folder, or for space
                    late = stopping or (args.max_time is not None and time.monotonic() - begun > args.max_time)
                    answer = ["late" if late else books.next_run()]
                    time.sleep(answer == ["wait"])
            dist.broadcast_object_list(answer, 0, ends)
            settings = answer[0]
            if not isinstance(settings, Settings):
                complete = settings is None
                break

            def report(progress: float, row: Any, settings: Settings = settings) -> None:
                shown.step(settings, progress)

            shown.step(settings, 0.0)
            try:
                record = attempt(settings, store, machine, on_evaluation=report, stopping=lambda: stopping)
            except Stopped:
                complete = False
                break
            if record["error"]:
                print(f"process {dist.get_rank()}: {record['error']}", file=sys.stderr)
            dist.monitored_barrier(ends, TOGETHER)  # raises where a process failed and others wait for it
            if books is not None:
                books.end(record)
                left = sum(books.pending.values())
                shown.finish(settings, record, len(books.records), left, None)
    if books is not None:
        code = int(any(record["status"] in RAISED for record in books.records.values())) if complete else 130
        try:
            books.close()
        except OSError as error:
            print(f"bench: {error}; the same command goes on from what is saved", file=sys.stderr)
            code = 1
    answer = [code]
    dist.broadcast_object_list(answer, 0, ends)
    dist.destroy_process_group()
    return int(answer[0])
