"""A training run is a function of its settings, cut off or not."""

import dataclasses
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import broken
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.methods import find
from bench.run import EVALUATIONS, Settings, Training, failure, train
from bench.store import Record, Store
from bench.task import Classification
from bench.tasks import TASKS

STEPS = 46  # of digits-mlp at a twentieth of its budget


def short(method: str = "adamw", seed: int = 0, **changes: Any) -> Settings:
    hp = changes.pop("hp", {"lr": 0.01})
    task = changes.pop("task", "digits-mlp")
    split = changes.pop("split", "train+validation")
    return Settings(task, 1, method, find(method).package, hp, seed, split, **{"budget": 0.05, **changes})


def run(settings: Settings, **options: Any) -> Record:
    with TemporaryDirectory() as folder:
        store = Store(folder)
        store.create()
        return train(settings, store, **options)


@pytest.mark.parametrize("method", ["sgd", "adam", "adamw", "diffgrad", "adabelief", "broken:Draws"])
def test_the_same_settings_give_the_same_bits_and_another_seed_gives_others(method: str) -> None:
    first, again, other = (run(short(method, seed)) for seed in (1, 1, 2))
    assert first["status"] == "ok"
    assert first["counts"]["steps"] == STEPS
    assert first["weights"] == again["weights"]
    assert first["metrics"] == again["metrics"]
    assert first["weights"] != other["weights"]


def test_methods_meet_the_same_weights_and_the_same_data() -> None:
    one, other = Training(short("sgd")), Training(short("adabelief"))
    for _ in range(STEPS):
        assert all(torch.equal(a, b) for a, b in zip(one.batch(), other.batch(), strict=True))
        if not one.clock["steps"]:
            pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            assert one.advance() == other.advance()
        else:
            one.advance()
            other.advance()


def test_an_epoch_shows_every_example_once() -> None:
    training = Training(short(split="train"))
    seen = []
    for _ in range(math.ceil(training.size / 64)):
        seen.append(training.batch()[0])
    shown = torch.cat(seen).flatten(1)
    assert torch.equal(shown.sort(0).values, training.inputs.flatten(1).sort(0).values)


@settings(max_examples=8)
@given(st.integers(0, STEPS - 1), st.sampled_from([0.0, 1e9]))
@example(STEPS - 1, 0.0)
def test_a_run_cut_off_at_any_step_goes_on_to_the_same_bits(step: int, checkpoint_every: float) -> None:
    asked = short("broken:Fused", 3, hp={"lr": 0.1, "momentum": 0.9})
    broken.FUSE["steps"] = None
    whole = run(asked)
    with TemporaryDirectory() as folder:
        store = Store(folder)
        store.create()
        broken.FUSE["steps"] = step
        with pytest.raises(broken.Interrupted):
            train(asked, store, checkpoint_every)
        broken.FUSE["steps"] = None
        resumed = train(asked, store, checkpoint_every)
    assert resumed["weights"] == whole["weights"]
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["counts"] == whole["counts"]
    samples = [point["samples"] for point in resumed["curve"]]
    assert samples == sorted(set(samples))


def test_what_a_method_draws_goes_on_from_a_checkpoint(store: Store) -> None:
    asked = short("broken:Draws")
    whole = run(asked)
    half = Training(asked)
    half.evaluate()
    while half.clock["steps"] < STEPS // 2:
        half.advance()
    half.evaluate()
    store.save_checkpoint(asked.id, half.state_dict())
    torch.rand(7)  # whatever else may happen in the process
    assert train(asked, store)["weights"] == whole["weights"]


def test_a_curve_has_its_points_where_the_budget_says() -> None:
    shares: list[float] = []
    curve = run(short(budget=0.2), on_evaluation=lambda share, row: shares.append(share))["curve"]
    assert len(curve) == EVALUATIONS + 1 == len(shares)
    assert curve[0]["samples"] == 0
    assert shares[-1] == 1
    steps = 64 / curve[-1]["samples"]
    assert all(abs(share - i / EVALUATIONS) <= steps for i, share in enumerate(shares))


def test_the_learning_rate_follows_the_cosine() -> None:
    training = Training(short(hp={"lr": 0.5}))
    rates = []
    while not training.done:
        training.advance()
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)
    assert rates[STEPS // 2] == pytest.approx(0.25, rel=0.1)
    assert rates[-1] < 0.01


def test_closures_are_counted_against_the_budget() -> None:
    record = run(short("torch.optim:LBFGS", hp={"lr": 0.1, "max_iter": 5}, budget=0.2))
    plain = run(short("sgd", hp={"lr": 0.1}, budget=0.2))
    assert record["counts"]["grads"] > 3 * record["counts"]["steps"]
    assert record["counts"]["samples"] < 1.1 * plain["counts"]["samples"]
    assert record["step_ms"] is None


@pytest.mark.parametrize(
    ("method", "lr", "fate"),
    [("broken:Explodes", 1e9, "diverged"), ("broken:Explodes", 0.01, "diverged"), ("broken:Forgets", 0.1, "chance")],
)
def test_failures_are_seen(method: str, lr: float, fate: str) -> None:
    record = run(short(method, hp={"lr": lr}))
    assert record["status"] == fate


def test_a_run_that_diverges_stops_at_once(store: Store) -> None:
    record = run(short("broken:Explodes", hp={"lr": 1e9}))
    assert record["counts"]["steps"] < STEPS
    store.append(record)
    assert store.curve(record["id"])[-1]["loss"] is None


def test_a_loss_that_recovers_is_no_failure() -> None:
    spec = TASKS["digits-mlp"].spec

    def point(loss: float, accuracy: float) -> Record:
        return {"train_loss": loss, "loss": loss, "accuracy": accuracy}

    assert failure(spec, [point(2.3, 0.1), point(100, 0.1), point(0.1, 0.97)], 360) == "ok"
    assert failure(spec, [point(2.3, 0.1), point(24, 0.97)], 360) == "diverged"
    assert failure(spec, [point(2.3, 0.1), point(2.3, 0.13)], 360) == "chance"
    assert failure(spec, [point(2.3, 0.1), point(2.3, 0.14)], 360) == "ok"


def test_an_unmet_need_is_an_error_that_names_it() -> None:
    with pytest.raises(NotImplementedError, match="hungry needs hvp, which is for one process alone"):
        Training(dataclasses.replace(short("broken:HUNGRY"), world=2))


@pytest.mark.parametrize(("method", "bytes_each"), [("adamw", 8), ("diffgrad", 12), ("adabelief", 8), ("sgd", 4)])
def test_state_is_weighed(method: str, bytes_each: int) -> None:
    hp = {**find(method).defaults}
    record = run(short(method, hp=hp))
    assert record["state_bytes"] == pytest.approx(bytes_each * record["parameters"], rel=0.01)


def test_state_in_lists_is_weighed_too() -> None:
    record = run(short("torch.optim:LBFGS", hp={"lr": 0.1}))
    # Direction and last gradient, and a history of two vectors for each of many iterations.
    assert record["state_bytes"] > 10 * 4 * record["parameters"]


def test_micro_batches_of_a_step_are_augmented_each_in_its_own_way() -> None:
    seeds: list[int] = []

    class Noted(Classification):
        def augment(self, batch: Any, generator: torch.Generator, epoch: int, rows: torch.Tensor) -> Any:
            seeds.append(generator.initial_seed())
            return batch

    training = Training(short("adadagrad", hp=find("adadagrad").defaults))
    task = training.task
    training.task = Noted(task.spec, task.load, task.net)
    for _ in range(2):
        training.advance()
    assert len(seeds) >= 8
    assert len(set(seeds)) == len(seeds)


def test_every_setting_is_part_of_the_id() -> None:
    base = short()
    changed = {"task": "fm14", "task_version": 2, "method": "sgd", "package": "torch 1", "hp": {"lr": 1.0}, "seed": 9}
    changed |= {"split": "train", "budget": 2.0, "schedule": "constant", "dtype": "float64"}
    changed |= {"epochs": 3.0, "batch": 7, "amp": "bf16", "world": 2, "parallel": "fsdp"}
    assert set(changed) == {field.name for field in dataclasses.fields(Settings)}
    ids = {dataclasses.replace(base, **{key: value}).id for key, value in changed.items()}
    assert len(ids | {base.id}) == len(changed) + 1


def test_tuning_never_opens_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["digits-mlp"]
    test = task.data().test[0]
    seen = []
    monkeypatch.setattr(
        type(task), "evaluate", lambda self, model, split: seen.append(split[0]) or {"accuracy": 1.0, "loss": 0.0}
    )
    run(short(split="train"))
    assert not any(inputs.shape == test.shape and torch.equal(inputs, test) for inputs in seen)
    seen.clear()
    run(short())
    assert all(torch.equal(inputs, test) for inputs in seen)


def test_the_folder_of_a_finished_run_holds_its_curve_and_no_scraps(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create()
    asked = short()
    store.append(train(asked, store))
    store.runs.unlink()
    (tmp_path / "locks" / "folder").unlink()
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == [f"{asked.id}.jsonl"]
