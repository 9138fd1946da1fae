"""Several workers, several processes, and what goes wrong: no run is lost, none is done twice."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as cli
from bench import pool
from bench.__main__ import main
from bench.methods import METHODS
from bench.protocol import Cell, Protocol
from bench.run import Settings
from bench.store import STALE, UNWRITTEN, Store
from bench.sweep import Progress, open_sweep

ROOT = Path(cli.__file__).parents[1]
QUIET = ["--progress", "none", "--workers", "1"]
SHORT = ["--tasks", "digits-mlp", "--budget", "0.05x", "--ruleset", "one-shot", "--seeds", "2"]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def one_shot(store: Store, methods: str = "sgd", **rules: Any) -> list[Cell]:
    return open_sweep(
        store, ["digits-mlp"], methods.split(","), Protocol("one-shot", **{"seeds": 2, "budget": 0.05, **rules})
    )


def test_processes_that_share_a_folder_share_its_runs(tmp_path: Path) -> None:
    command = ["run", *SHORT, *QUIET, "--out", str(tmp_path), "--methods", "sgd,adamw,diffgrad,adabelief"]
    other = subprocess.Popen([sys.executable, "-W", "error", "-m", "bench", *command], cwd=ROOT)
    while not (tmp_path / "runs.jsonl").exists():
        time.sleep(0.01)
    assert main([*command, "--seeds", "5"]) == cli.DONE
    assert other.wait() == cli.DONE
    assert Counter(record["id"] for record in lines(tmp_path)).most_common(1)[0][1] == 1
    assert len(lines(tmp_path)) == 20
    assert [file.name for file in (tmp_path / "locks").iterdir()] == ["folder"]


def test_parts_of_a_sweep_are_disjoint_and_make_the_whole(tmp_path: Path) -> None:
    methods = ["--methods", "sgd,adamw,diffgrad"]
    assert main(["run", *SHORT, *QUIET, *methods, "--out", str(tmp_path), "--shard", "1/2"]) == cli.DONE
    assert {record["settings"]["method"] for record in lines(tmp_path)} == {"adamw"}
    assert main(["run", *SHORT, *QUIET, *methods, "--out", str(tmp_path), "--shard", "0/2"]) == cli.DONE
    assert Counter(record["settings"]["method"] for record in lines(tmp_path)) == dict(sgd=2, adamw=2, diffgrad=2)


def test_a_run_in_hand_elsewhere_is_waited_for(store: Store) -> None:
    cells, other = one_shot(store, seeds=1), Store(store.folder)
    mine = Progress(store, cells)
    (settings,) = cells[0].plan({}).wanted
    lock = store.folder / "locks" / settings.id
    lock.write_text("elsewhere:1")
    assert mine.next_run() == "wait"
    other.append({"id": settings.id, "status": "ok", "settings": {"task": "digits-mlp", "method": "sgd"}})
    lock.unlink()
    assert mine.next_run() is None


def test_a_run_that_ended_just_before_its_claim_is_not_done_again(store: Store) -> None:
    cells, other = one_shot(store, seeds=1), Store(store.folder)
    mine = Progress(store, cells)
    assert mine.plan(cells[0]).left == 1
    settings = Progress(other, cells).next_run()
    other.append({"id": settings.id, "status": "ok", "settings": {"task": "digits-mlp", "method": "sgd"}})
    other.release(settings.id)
    assert mine.next_run() is None
    assert not store.held


def test_the_lock_of_a_dead_process_is_taken_over_at_once_and_a_silent_one_after_a_while(store: Store) -> None:
    lock = store.folder / "locks" / "run"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert store.claim("run")
    host = lock.read_text().partition(":")[0]
    other = Store(store.folder)
    lock.write_text(f"{host}:{dead.pid}")
    assert other.claim("run")
    for holder in (f"{host}:{os.getppid()}", "elsewhere:1"):
        lock.write_text(holder)
        assert not store.claim("run")
        os.utime(lock, (0, time.time() - STALE - 1))
        assert store.claim("run")
        assert lock.read_text() == f"{host}:{os.getpid()}"
    lock.write_text("")  # by a process that died before it had written its name, or is about to
    assert not store.claim("run")
    os.utime(lock, (0, time.time() - UNWRITTEN - 1))
    assert store.claim("run")
    os.utime(lock, (0, time.time() - STALE - 1))
    store.beat()
    lock.write_text("elsewhere:1")
    assert not other.claim("run")


def test_of_many_who_take_over_one_run_one_has_it(tmp_path: Path) -> None:
    Store(tmp_path).create()
    for number in range(20):
        run, won = f"run{number}", []
        lock = tmp_path / "locks" / run
        lock.write_text("elsewhere:1")
        os.utime(lock, (0, 0))
        crew = [Store(tmp_path) for _ in range(8)]
        for store in crew:
            store.held = _Everything()  # so that a lock of this very process counts as one of a process that lives

        def claim(store: Store, run: str = run, won: list[bool] = won) -> None:
            won.append(store.claim(run))

        claims = [threading.Thread(target=claim, args=(store,)) for store in crew]
        for each in claims:
            each.start()
        for each in claims:
            each.join()
        assert sum(won) == 1


class _Everything(set[str]):
    def __contains__(self, run: object) -> bool:
        return True


def test_lines_of_many_writers_stay_whole(tmp_path: Path) -> None:
    Store(tmp_path).create()

    def write(writer: int) -> None:
        store = Store(tmp_path)
        for i in range(20):
            store.append({"id": f"{writer}-{i}", "text": "x" * 5000})

    crew = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for writer in crew:
        writer.start()
    for writer in crew:
        writer.join()
    assert len(Store(tmp_path).records()) == 80


@pytest.mark.parametrize(
    ("method", "options", "status", "message"),
    [
        ("broken:Raises", [], "error", "ArithmeticError: no step today (broken.py:"),
        ("broken:Dies", [], "error", "its process died with exit code 7"),
        ("broken:Hungry", [], "oom", "memory"),
        ("broken:Sleeps", ["--max-run-time", "5s"], "timeout", "not done after 5 s"),
    ],
)
def test_what_ends_a_run_is_recorded_and_the_others_go_on(
    method: str, options: list[str], status: str, message: str, tmp_path: Path
) -> None:
    command = ["run", *SHORT, *QUIET, "--seeds", "1", "--methods", f"{method},sgd", "--out", str(tmp_path), *options]
    assert main(command) == cli.FAILED
    broken, fine = lines(tmp_path)
    assert (broken["status"], fine["status"]) == (status, "ok")
    assert message in broken["error"]
    assert main(["status", str(tmp_path)]) == cli.DONE


def test_what_a_run_warns_of_is_in_its_record(tmp_path: Path) -> None:
    command = ["run", *SHORT, *QUIET, "--seeds", "1", "--methods", "broken:Warns", "--out", str(tmp_path)]
    assert main(command) == cli.DONE
    assert lines(tmp_path)[0]["warnings"] == ["mind the step"]


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_line_that_finds_no_space_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, calls = Store.append, []

    def sometimes(self: Store, record: dict[str, Any]) -> None:
        calls.append(record["id"])
        if len(calls) == 1:
            full()
        append(self, record)

    monkeypatch.setattr(Store, "append", sometimes)
    assert main(["run", *SHORT, *QUIET, "--methods", "sgd", "--out", str(tmp_path)]) == cli.DONE
    assert len(lines(tmp_path)) == 2
    assert len(set(calls)) == 2


@pytest.mark.parametrize("part", ["save_curve", "claim", "append"])
def test_what_was_trained_outlasts_a_full_disk(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, receive = getattr(Store, part), pool.Worker.receive
    calls: list[Any] = []
    trained: list[str] = []

    def late(self: Store, run: Any, *args: Any) -> Any:
        calls.append(run)
        if 1 < len(calls) < 5:
            full()
        return write(self, run, *args)

    monkeypatch.setattr(Store, part, late)

    def noted(self: pool.Worker, run: Settings) -> Any:
        message = receive(self, run)
        if not isinstance(message, float):
            trained.append(run.id)
        return message

    monkeypatch.setattr(pool.Worker, "receive", noted)
    assert main(["run", *SHORT, *QUIET, "--seeds", "3", "--methods", "sgd", "--out", str(tmp_path)]) == cli.DONE
    assert len(calls) >= 6
    records = lines(tmp_path)
    assert [record["status"] for record in records] == ["ok"] * 3
    assert trained == [record["id"] for record in records]
    assert all(len(Store(tmp_path).curve(record["id"])) > 1 for record in records)
    assert Store(tmp_path).unfinished() == []


def test_a_disk_that_stays_full_ends_the_sweep_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Store, "append", full)
    short = ["--methods", "sgd", "--out", str(tmp_path), "--max-time", "2s"]
    assert main(["run", *SHORT, *QUIET, *short]) == cli.FAILED
    shown = capsys.readouterr().err
    assert shown.count("no run is begun until there is space") == 1
    assert "No space left on device; the same command goes on from what is saved" in shown
    assert [file.name for file in (tmp_path / "locks").iterdir()] == ["folder"]
    monkeypatch.undo()
    assert main(["run", *SHORT, *QUIET, "--methods", "sgd", "--out", str(tmp_path)]) == cli.DONE


def test_a_run_without_space_for_its_checkpoint_goes_on_and_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.run import train

    (settings,) = one_shot(store, seeds=1)[0].plan({}).wanted
    whole = train(settings, store)
    monkeypatch.setattr(Store, "save_checkpoint", full)
    record = train(settings, store, 0.0)
    assert record["weights"] == whole["weights"]
    assert "No space left" in record["error"]
    assert record["status"] == "ok"


def test_other_rules_and_other_formats_are_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    one_shot(store)
    with pytest.raises(ValueError, match=r"holds a sweep with budget 0\.05"):
        one_shot(store, budget=1.0)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    (store.folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    for command in (["run", *SHORT], ["report", str(store.folder)], ["status", str(store.folder)]):
        out = ["--out", str(store.folder)] if command[0] == "run" else []
        assert main([*command, *out]) == cli.USAGE
        assert "results in format 1, and this benchmark reads format 2" in capsys.readouterr().err


def test_a_sweep_over_all_methods_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = ["run", *SHORT, *QUIET, "--budget", "0.02x", "--seeds", "1", "--methods", ",".join(METHODS)]
    assert main([*command, "--out", str(whole)]) == cli.DONE
    wanted = {record["id"]: record["weights"] for record in lines(whole)}
    # A checkpoint at every step makes it likely that one is being written.
    command += ["--checkpoint-every", "0s", "--out", str(killed)]
    for share in (0.3, 0.7):
        child = [sys.executable, "-W", "error", "-m", "bench", *command]
        process = subprocess.Popen(child, cwd=ROOT, start_new_session=True)
        while not (killed / "runs.jsonl").exists() or len(Store(killed).records()) < share * len(wanted):
            assert process.poll() is None
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert main(command) == cli.DONE
    assert {record["id"]: record["weights"] for record in lines(killed)} == wanted
    assert len(lines(killed)) == len(wanted)
    assert Store(killed).unfinished() == []


def test_a_run_that_diverged_diverges_again_and_is_the_same(store: Store) -> None:
    from bench.evidence import again
    from bench.run import train

    (settings,) = one_shot(store, "broken:Explodes", seeds=1)[0].plan({}).wanted
    store.append(train(dataclasses.replace(settings, hp={"lr": 1e9}), store))
    (record,) = store.records().values()
    assert record["metrics"]["loss"] is None
    line, same = again(record, None)
    assert same
    assert "the same bits" in line
