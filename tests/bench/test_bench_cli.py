"""The command line: exit codes, messages, a sweep with failures."""

from pathlib import Path

import pytest
from conftest import OPTIONS

from bench import __main__ as cli
from bench.__main__ import main
from bench.store import Store
from bench.tasks import TASKS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --tasks digits-mpl", "no task called 'digits-mpl'; did you mean digits-mlp"),
        ("run --methods adamx", "did you mean adam"),
        ("run --methods torch.optim:Adma", "did you mean Adam"),
        ("run --tasks ,", "must name something"),
        ("run --budget 0.1", "'0.1' is not a multiple such as 0.1x"),
        ("run --budget 0x", "not a multiple"),
        ("run --max-time 20", "'20' is not a time such as 90s"),
        ("run --seeds 0", "not a positive whole number"),
        ("run --ruleset tuend", "invalid choice: 'tuend'"),
        ("list everything", "invalid choice: 'everything'"),
        ("", "required"),
    ],
)
def test_a_wrong_request_is_answered_and_ends_in_2(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([*arguments.split(), *(["--out", str(tmp_path / "x")] if "run" in arguments else [])])
    except SystemExit as stop:
        code = stop.code
    assert code == cli.USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_missing_data_end_in_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(self: object, root: Path | None) -> None:
        raise FileNotFoundError("no file bench/data/fm14.npz")

    monkeypatch.setattr(type(TASKS["fm14"]), "data", gone)
    assert main(["run", "--tasks", "fm14", "--out", str(tmp_path)]) == cli.NO_DATA
    assert "fm14.npz" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "status"])
def test_a_folder_without_a_sweep_ends_in_3(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == cli.NO_DATA
    assert "manifest.json" in capsys.readouterr().err


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == cli.DONE
    everything = capsys.readouterr().out
    assert all(name in everything for name in (*TASKS, *cli.methods.METHODS))
    assert main(["list", "tasks"]) == cli.DONE
    assert "adamw" not in capsys.readouterr().out


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "run",
                "--dry-run",
                "--ruleset",
                "lr-only",
                "--trials",
                "5",
                "--tune-seeds",
                "1",
                "--methods",
                "sgd",
                "--tasks",
                "fm14",
                "--out",
                str(tmp_path / "x"),
            ]
        )
        == cli.DONE
    )
    assert "15 runs at most" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


def test_runs_that_raise_are_recorded_and_the_others_go_on(swept: tuple[Path, int]) -> None:
    out, code = swept
    assert code == cli.FAILED
    records = Store(out).records().values()
    errors = {record["error"] for record in records if record["settings"]["method"] == "broken:Raises"}
    assert len(errors) == 1
    assert errors.pop().startswith("ArithmeticError: no step today (broken.py:")
    assert {record["settings"]["method"] for record in records if record["status"] == "ok"} == {"sgd", "adamw"}
    assert Store(out).unfinished() == []


def test_a_worker_that_dies_takes_no_other_run_with_it(tmp_path: Path) -> None:
    methods = ["--methods", "broken:Dies,sgd", "--ruleset", "one-shot", "--seeds", "1", "--workers", "1"]
    sweep = ["--tasks", "digits-mlp", "--budget", "0.05x", "--out", str(tmp_path), "--progress", "none"]
    assert main(["run", *methods, *sweep]) == cli.FAILED
    dead, alive = Store(tmp_path).records().values()
    assert dead["error"] == "its process died with exit code 7"
    assert alive["status"] == "ok"


def test_finished_runs_are_skipped(swept: tuple[Path, int]) -> None:
    out, _ = swept
    before = (out / "runs.jsonl").read_bytes()
    options = [
        "--ruleset",
        "lr-only",
        "--trials",
        "3",
        "--tune-seeds",
        "1",
        "--seeds",
        "5",
        "--out",
        str(out),
        "--progress",
        "none",
        "--workers",
        "1",
    ]
    methods = ["--methods", "sgd,adamw", "--tasks", "digits-mlp", "--budget", "0.05x", "--max-time", "0s"]
    # No time is left, so that the runs that raised are not tried again; the rest is there already.
    assert main(["run", *methods, *options]) == cli.INTERRUPTED
    assert (out / "runs.jsonl").read_bytes() == before


def test_a_folder_refuses_a_sweep_under_other_rules(
    swept: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = swept
    assert main(["run", *OPTIONS, "--budget", "2x", "--out", str(out)]) == cli.USAGE
    assert "holds a sweep with budget 0.05" in capsys.readouterr().err


def test_status_counts(swept: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(swept[0])]) == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["digits-mlp", "broken:Raises"] and "error" in line for line in lines)
    assert lines[-1].endswith("0 with a checkpoint")


def test_ctrl_c_ends_in_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "list", interrupt)
    assert main(["list"]) == cli.INTERRUPTED
