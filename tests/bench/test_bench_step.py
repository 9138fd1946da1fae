"""The step benchmark: a quick run, and the arithmetic behind its ratios."""

import json
import math
from pathlib import Path

import pytest
import torch

from bench import step

CPU = torch.device("cpu")


def test_a_quick_run_measures_everyone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    assert step.main(["--quick", "--shapes", "many", "--rounds", "2", "--json", str(file)]) == 0
    captured = capsys.readouterr()
    assert "optimzoo.AdaBelief" in captured.out
    assert "20 tensors, 0.02M parameters, 1 thread" in captured.out
    (race,) = json.loads(file.read_text())["races"]
    measured = {(result["name"], result["backend"]) for result in race["results"]}
    ours = {(f"optimzoo.{name}", backend) for name in ("DiffGrad", "AdaBelief") for backend in ("single", "foreach")}
    assert ours | {("torch.optim.AdamW", "fused")} <= measured
    assert len(measured) + len(race["absent"]) == len(step.CONTENDERS) + 1
    assert all(len(result["ratios"]) == 2 for result in race["results"][1:])
    assert all(value > 0 for value in race["streams"].values())


def test_markdown_has_a_column_for_each_race(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--quick", "--shapes", "many,flat", "--rounds", "1", "--md"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert "| many, 1t | flat, 1t |" in rows[0]
    second = next(i for i, row in enumerate(rows) if row.startswith("| optimizer | back-end | bytes |"))
    for table in rows[:second], rows[second:]:
        assert len({row.count("|") for row in table}) == 1
    bytes_moved = {tuple(row.split(" | ")[:2]): row.split(" | ")[2] for row in rows[second + 2 :]}
    assert bytes_moved["| `torch.optim.AdamW`", "fused"] == "28"
    assert bytes_moved["| `optimzoo.DiffGrad`", "fused, bfloat16 state"] == "24"
    assert bytes_moved["| `optimzoo.AdaGradNorm`", "fused"] == "16"
    assert f"torch {torch.__version__}" in out
    assert "median [min, max] of 1 interleaved rounds" in out
    assert "`python -m bench.step --quick --shapes many,flat --rounds 1 --md`" in out


@pytest.mark.parametrize("arguments", [["--shapes", "resnet19"], ["--device", "cuda"]])
def test_what_cannot_be_measured_is_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        step.main(arguments)


def test_resnet18_has_the_published_shapes() -> None:
    shapes = step.resnet18()
    assert len(shapes) == 62
    assert sum(math.prod(shape) for shape in shapes) == 11_689_512


def test_resnet18_is_torchvisions() -> None:
    models = pytest.importorskip("torchvision.models")
    expected = sorted(tuple(p.shape) for p in models.resnet18().parameters())
    assert sorted(step.resnet18()) == expected


def test_a_ratio_is_taken_to_the_baseline_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine that slows down steadily: the contender always takes twice the time that the baseline would.
    pace = iter(range(10, 10_000))
    sgd = step.Contender("torch.optim:SGD", "fused")
    monkeypatch.setattr(
        step.Bed, "sample", lambda bed, optimizer, steps: next(pace) * (2 if type(optimizer).__name__ == "SGD" else 1)
    )
    (standard, result), absent = step.race(step.Bed([(10,)], CPU), [sgd], step.Streams(CPU, 10), 9, 0.0)
    assert absent == {}
    assert result.ratios == pytest.approx([2.0] * 9)
    assert len(standard.times) == 9


def test_a_contender_that_cannot_be_built_says_why() -> None:
    missing = step.Contender("no_such_zoo:Adam", "its own")
    refused = step.Contender("torch.optim:LBFGS", "fused")
    _, absent = step.race(step.Bed([(10,)], CPU), [missing, refused], step.Streams(CPU, 10), 1, 0.0)
    assert absent["no_such_zoo.Adam (its own)"] == "not installed (No module named 'no_such_zoo')"
    assert absent["torch.optim.LBFGS (fused)"].startswith("TypeError")


@pytest.mark.parametrize(("backend", "bytes_each"), [("fused", 0), ("foreach", 4), ("single", 8)])
def test_transient_memory_of_adamw(backend: str, bytes_each: int) -> None:
    bed = step.Bed([(100_000,)], CPU)
    _, result = bed.enlist(step.Contender("torch.optim:AdamW", backend))
    assert result.transient_bytes == pytest.approx(bytes_each, abs=0.01)
    assert result.state_bytes == pytest.approx(8, abs=0.01)


def test_gradients_alternate_and_are_left_alone() -> None:
    bed = step.Bed([(5,), (2, 3)], CPU)
    kept = [[grad.clone() for grad in grads] for grads in bed.grads]
    optimizer, _ = bed.enlist(step.BASELINE)
    first = bed.params[0].grad
    bed.time(optimizer)
    assert bed.params[0].grad is not first
    bed.sample(optimizer, 5)
    for grads, old in zip(bed.grads, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(grads, old, strict=True))


def test_traffic_is_what_the_step_cannot_do_without() -> None:
    result = step.Result("x", "fused", "1", 1000, 0.0, 8.0, 0.0)
    result.add(28e-9 * 1000, 14e-9 * 1000)
    assert result.nanoseconds == pytest.approx(28)
    assert result.gigabytes == pytest.approx(1)
    assert result.ratio == pytest.approx(2)
