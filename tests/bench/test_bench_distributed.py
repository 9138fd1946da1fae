"""Two processes that share a batch: the same runs, to rounding; and their checkpoints, to the bit."""

import errno
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import DONE, FAILED, USAGE, main
from bench.loops import share
from bench.pool import workshop
from bench.protocol import Protocol
from bench.store import Store
from bench.sweep import open_sweep

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

SWEEP = [
    "run",
    "--tasks",
    "digits-mlp",
    "--ruleset",
    "one-shot",
    "--seeds",
    "1",
    "--budget",
    "0.05x",
    "--progress",
    "none",
    "--workers",
    "1",
]


def member(rank: int, port: int, command: list[str], die_after: int, full: str) -> None:
    """One of two processes, as torchrun would start it; it may die after so many checkpoints.

    A part of theirs may find no space in the second process.
    """
    import bench.distributed
    from bench.__main__ import main

    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    save, saved = bench.distributed.Sharded._save, []

    def save_and_die(self: Any) -> None:
        save(self)
        saved.append(True)
        if len(saved) == die_after:
            os._exit(9)

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    bench.distributed.Sharded._save = save_and_die
    if full and rank == 1:
        if full == "place":
            bench.distributed.dump = no_space
        else:
            torch.distributed.checkpoint.FileSystemWriter.write_data = no_space
    sys.exit(main(command))


def together(out: Path, *options: str, die_after: int = 0, full: str = "") -> set[int | None]:
    """The exit codes of two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [*SWEEP, "--out", str(out), *options]
    crew = [workshop().Process(target=member, args=(rank, port, command, die_after, full)) for rank in range(2)]
    for process in crew:
        process.start()
    for process in crew:
        process.join()
    return {process.exitcode for process in crew}


def lines(out: Path) -> dict[str, dict[str, Any]]:
    records = map(json.loads, (out / "runs.jsonl").read_text().splitlines())
    return {record["settings"]["method"]: record for record in records}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does_and_go_on_where_they_stopped(parallel: str, tmp_path: Path) -> None:
    methods = ["--methods", "sgd,diffgrad,torch.optim:LBFGS,broken:Raises", "--parallel", parallel]
    cut, whole, alone = tmp_path / "cut", tmp_path / "whole", tmp_path / "alone"
    assert together(cut, *methods, "--checkpoint-every", "0s", die_after=3) == {9}
    assert not (cut / "runs.jsonl").exists()
    assert [(folder / ".metadata").exists() for folder in (cut / "ckpt").iterdir()].count(True) >= 1
    assert together(cut, *methods) == together(whole, *methods) == {FAILED}  # of the method that raises
    assert main([*SWEEP, *methods, "--out", str(alone)]) == FAILED
    for method, record in lines(whole).items():
        if method == "broken:Raises":
            assert record["status"] == "error"
            continue
        assert record["status"] == "ok"
        assert lines(cut)[method]["weights"] == record["weights"]
        other = lines(alone)[method]
        assert other["id"] != record["id"]
        assert other["counts"] == record["counts"] or method == "torch.optim:LBFGS"  # which stops by a tolerance
        assert other["metrics"]["train_loss"] == pytest.approx(record["metrics"]["train_loss"], rel=1e-3)
        assert other["parameters"] == record["parameters"]
    assert list((cut / "ckpt").iterdir()) == []


def test_a_folder_of_other_rules_ends_all_processes_in_2(tmp_path: Path) -> None:
    Store(tmp_path).create()
    open_sweep(Store(tmp_path), ["digits-mlp"], ["sgd"], Protocol("one-shot", seeds=1, budget=0.05))
    assert together(tmp_path, "--methods", "sgd") == {USAGE}


@pytest.mark.parametrize("place", [True, False])
def test_processes_without_space_for_their_checkpoint_go_on(place: bool, tmp_path: Path) -> None:
    whole, full = tmp_path / "whole", tmp_path / "full"
    methods = ["--methods", "sgd", "--checkpoint-every", "0s"]
    assert together(whole, *methods) == together(full, *methods, full="place" if place else "weights") == {DONE}
    (without,), (record,) = lines(whole).values(), lines(full).values()
    assert record["weights"] == without["weights"]
    assert "no checkpoint" in record["error"]
    assert list((full / "ckpt").iterdir()) == []


def test_shares_of_a_batch_have_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(10.0) ** 2
    for world in (2, 3, 4):
        for count in (1, 2, 5, 10):
            total = 0.0
            for rank in range(world):
                monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
                weight, mine = share(torch.arange(count), world)
                total += weight * values[mine].mean().item() / world
            assert total == pytest.approx(values[:count].mean().item())


def test_what_is_for_one_process_alone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "--methods", "cbo", "--out", str(tmp_path / "x")]) == USAGE
    assert "cbo needs forward_only, model, which is for one process alone" in capsys.readouterr().err
