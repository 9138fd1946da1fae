"""The command line: exit codes, messages, a sweep with failures."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import OPTIONS

from bench import __main__ as cli
from bench.__main__ import main
from bench.protocol import Protocol
from bench.store import Store
from bench.sweep import open_sweep
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
        ("run --suite embeded", "invalid choice: 'embeded'"),
        ("run --suite quick --tasks fm14", "--suite and --tasks exclude each other"),
        ("run --preset cifar10/airbench49", "did you mean cifar10/airbench9"),
        ("run --preset imagenet/torchvision-v1 --methods sgd", "--preset has its method"),
        *(
            (f"run --preset imagenet/torchvision-v1 {rule}", f"--preset has its own rules: leave {named} out")
            for rule, named in (
                ("--ruleset tuned", "--ruleset"),
                ("--trials 14", "--trials"),
                ("--sampler grid", "--sampler"),
                ("--select best --tune-seeds 2", "--select and --tune-seeds"),
                ("--schedule cosine", "--schedule"),
                ("--amp bf16", "--amp"),
            )
        ),
        ("run --schedule cosinus", "'cosinus' is not a schedule"),
        ("run --budget 0.0001x --tasks fm14", "leaves fm14 less than one batch of 128"),
        ("run --trials 1 --methods adamw", "--trials 1 is less than the 2 choices adamw has at each rate"),
        ("run --conf sweep.toml", "unrecognized arguments: --conf"),
        ("run --shard 4/4", "'4/4' is not a part such as 0/4"),
        ("run --device tpu", "--device tpu"),
        ("run --config nowhere.toml", "nowhere.toml"),
        ("run --download --tasks cifar10-resnet18", "--download needs --data-root"),
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
    rules = ["--ruleset", "lr-only", "--trials", "5", "--tune-seeds", "1", "--methods", "sgd", "--tasks", "fm14"]
    assert main(["run", "--dry-run", *rules, "--out", str(tmp_path / "x")]) == cli.DONE
    assert "15 runs at most" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()
    assert main(["run", "--dry-run", *rules, "--shard", "1/2", "--out", str(tmp_path / "x")]) == cli.DONE
    assert "0 runs at most" in capsys.readouterr().out


def test_a_dry_run_refuses_what_a_run_would(swept: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run", *OPTIONS, "--budget", "2x", "--out", str(swept[0])]) == cli.USAGE
    assert "holds a sweep with budget 0.05" in capsys.readouterr().err


def test_paths_that_are_none_are_wrong_requests(
    swept: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for wrong in (file, file / "below"):
        short = ["--tasks", "digits-mlp", "--methods", "sgd", "--budget", "0.05x"]
        assert main(["run", *short, "--out", str(wrong)]) == cli.USAGE
        assert "--out" in capsys.readouterr().err
    assert main(["report", str(swept[0]), "--html", str(tmp_path)]) == cli.USAGE
    assert str(tmp_path) in capsys.readouterr().err


def test_a_manifest_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[]", "{", ""):
        (tmp_path / "manifest.json").write_text(text)
        for command in ("report", "status", "verify"):
            assert main([command, str(tmp_path)]) == cli.USAGE
            assert "manifest.json is not the manifest of a sweep" in capsys.readouterr().err


def test_a_folder_whose_methods_are_not_here_says_which(
    swept: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = (swept[0] / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest.replace("broken:Raises", "elsewhere:Best"))
    for command in ("report", "status", "verify"):
        assert main([command, str(tmp_path)]) == cli.USAGE
        assert "no method 'elsewhere:Best'" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text(manifest.replace('"digits-mlp"', '"digits-old"'))
    assert main(["report", str(tmp_path)]) == cli.USAGE
    assert "no task called 'digits-old'" in capsys.readouterr().err


def test_a_module_that_cannot_be_read_is_a_wrong_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half_written.py").write_text("def (")
    (tmp_path / "half_done.py").write_text("raise RuntimeError('not now')")
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (("half_written", "SyntaxError"), ("half_done", "RuntimeError: not now")):
        assert main(["run", "--methods", f"{name}:Best", "--out", str(tmp_path / "x")]) == cli.USAGE
        assert message in capsys.readouterr().err


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
    methods = ["--methods", "sgd,adamw", "--tasks", "digits-mlp", "--budget", "0.05x", "--max-time", "0s"]
    # No time is left, so that the runs that raised are not tried again; the rest is there already.
    assert main(["run", *methods, *OPTIONS, "--out", str(out)]) == cli.INTERRUPTED
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


def test_status_has_the_diagnostic_tasks_too(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    open_sweep(store, ["rotated"], ["sgd"], Protocol("one-shot", seeds=2))
    assert main(["status", str(store.folder)]) == cli.DONE
    assert "rotated      sgd              0 done,   2 left" in capsys.readouterr().out


def test_ctrl_c_ends_in_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "list", interrupt)
    assert main(["list"]) == cli.INTERRUPTED


def test_a_configuration_file_is_checked_like_arguments_and_these_win(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(
        """tasks = ["digits-mlp"]
        methods = ["sgd", "adamw"]
        ruleset = "one-shot"
        tune-seeds = 3
        seeds = 4
        budget = "0.05x"
        dry_run = true
        """
    )
    out = ["--out", str(tmp_path / "x")]
    assert main(["run", "--config", str(file), *out]) == cli.DONE
    assert "8 runs at most" in capsys.readouterr().out
    assert main(["run", "--config", str(file), "--seeds", "1", "--methods", "sgd", *out]) == cli.DONE
    assert "1 runs at most" in capsys.readouterr().out
    file.write_text("seedz = 3")
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--config", str(file), *out])
    assert "unrecognized arguments: --seedz=3" in capsys.readouterr().err
    file.write_text("seeds = ")
    assert main(["run", "--config", str(file), *out]) == cli.USAGE


def test_a_sampler_that_is_not_installed_is_a_wrong_request(
    swept: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["run", "--sampler", "tpe", "--tasks", "digits-mlp", "--out", str(tmp_path / "x")]) == cli.USAGE
    assert "--sampler tpe needs optuna" in capsys.readouterr().err


def test_data_that_are_not_embedded_are_asked_for_with_their_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--data-root", str(tmp_path)]):
        assert main(["run", "--preset", "cifar10/resnet18", "--out", str(tmp_path / "x"), *more]) == cli.NO_DATA
        assert "cifar-10-batches-py/" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_progress_in_json_is_a_line_for_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "run",
        "--tasks",
        "digits-mlp",
        "--methods",
        "sgd",
        "--budget",
        "0.05x",
        "--ruleset",
        "one-shot",
        "--seeds",
        "2",
        "--workers",
        "1",
    ]
    assert main([*command, "--progress", "json", "--out", str(tmp_path)]) == cli.DONE
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["task"], row["seed"], row["status"], row["left"]) for row in rows] == [
        ("digits-mlp", 1000, "ok", 1), ("digits-mlp", 1001, "ok", 0)]  # fmt: skip


def test_verify_finds_the_same_bits_and_what_was_changed(
    swept: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = swept
    assert main(["verify", str(out), "-n", "4"]) == cli.DONE
    shown = capsys.readouterr().out
    assert shown.count("the same bits") == 4
    assert all(method in shown for method in ("sgd", "adamw"))  # the methods in turn
    (tmp_path / "manifest.json").write_bytes((out / "manifest.json").read_bytes())
    record = next(record for record in Store(out).records().values() if record["status"] == "ok")
    (tmp_path / "runs.jsonl").write_text(json.dumps({**record, "weights": "0" * 16}) + "\n")
    assert main(["verify", str(tmp_path)]) == cli.FAILED
    assert "other bits on the same machine" in capsys.readouterr().out
    elsewhere = {**record, "weights": "0" * 16, "env": {**record["env"], "cpu": "abacus"}}
    (tmp_path / "runs.jsonl").write_text(json.dumps(elsewhere) + "\n")
    assert main(["verify", str(tmp_path)]) == cli.DONE
    assert "other bits (cpu abacus before)" in capsys.readouterr().out


def test_folders_are_compared_seed_by_seed(
    swept: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = swept
    (tmp_path / "manifest.json").write_bytes((out / "manifest.json").read_bytes())
    worse = []
    for record in Store(out).records().values():
        if record["status"] == "ok":
            final = record["phase"] == "final" and record["settings"]["method"] == "sgd"
            record["metrics"]["accuracy"] -= 0.05 * final
            worse.append(json.dumps(record) + "\n")
    (tmp_path / "runs.jsonl").write_text("".join(worse))
    assert main(["compare", str(out), str(tmp_path)]) == cli.DONE
    rows = {line.split("|")[2].strip(): line for line in capsys.readouterr().out.splitlines() if "digits" in line}
    assert "| 5 |" in rows["sgd"]
    assert "-5 [-5, -5]" in rows["sgd"]
    assert rows["sgd"].rstrip("| ").endswith("0.00")  # no verdict of five seeds
    assert "+0 [+0, +0]" in rows["adamw"]
    assert main(["compare", str(out), str(tmp_path / "nowhere")]) == cli.NO_DATA


def test_compared_folders_get_verdicts_from_enough_seeds_and_differences_of_their_rules(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = store, Store(tmp_path / "now")
    for side, budget, metric in zip(sides, (1.0, 0.5), (0.9, 0.8), strict=True):
        (cell,) = open_sweep(side, ["fm14"], ["sgd"], Protocol("one-shot", seeds=8, budget=budget))
        for settings in cell.finals():
            metrics = {"accuracy": metric, "loss": 0.1, "train_loss": 0.1}
            side.append({"id": settings.id, "status": "ok", "settings": asdict(settings), "metrics": metrics})
    assert main(["compare", *(str(side.folder) for side in sides)]) == cli.DONE
    shown = capsys.readouterr().out
    assert "| 8 | 90 % | 80 % | -10 [-10, -10] | 0.00 | worse |" in shown
    assert "The folders have different rules: budget 1.0 and 0.5." in shown


def test_targets_are_printed_with_and_without_a_folder(
    swept: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ([], [str(swept[0])]):
        assert main(["targets", *folder]) == cli.DONE
        assert "no published value obtained" in capsys.readouterr().out
