"""Every method of the benchmark: it trains, is counted, and goes on from where it was cut off."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.loops import STEPS
from bench.methods import METHODS, NEEDS, PEERS, find
from bench.run import COSTS, Settings, Stopped, Training, train
from bench.store import Record, Store
from bench.tasks import TASKS

# Some of what a search tries is warned of: CBO's particles spread at its largest rates.
pytestmark = pytest.mark.filterwarnings("ignore:particles will spread")


def settings(method: str, task: str = "digits-mlp", budget: float = 0.05, **hp: Any) -> Settings:
    spec = find(method)
    return Settings(task, TASKS[task].spec.version, method, spec.package, {**spec.defaults, **hp}, 3,
                    "train+validation", budget)  # fmt: skip


def run(store: Store, asked: Settings, **options: Any) -> Record:
    store.create()
    return train(asked, store, **options)


@pytest.mark.parametrize("method", [*METHODS, *PEERS])
def test_a_method_cut_off_at_any_step_goes_on_to_the_same_bits(method: str, tmp_path: Path) -> None:
    if method in PEERS:
        pytest.importorskip(method.partition(":")[0])
    asked = settings(method)
    whole = run(Store(tmp_path / "whole"), asked)
    steps = whole["counts"]["steps"]
    for cut in {1, steps // 2, steps - 1} - {0, steps}:
        store, taken = Store(tmp_path / f"cut{cut}"), 0

        def stopping(cut: int = cut) -> bool:
            nonlocal taken
            taken += 1
            return taken > cut  # it is asked once more at the first point of the curve

        with pytest.raises(Stopped):
            run(store, asked, stopping=stopping)
        assert store.unfinished() == [asked.id]
        again = run(store, asked)
        assert again["weights"] == whole["weights"]
        assert again["counts"] == whole["counts"]
        assert again["metrics"] == whole["metrics"]
        assert again["curve"][-1]["train_loss"] == whole["metrics"]["train_loss"]


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_spends_is_what_its_budget_allows(method: str, store: Store) -> None:
    record = run(store, settings(method, budget=0.1))
    counts = record["counts"]
    assert counts["samples"] == pytest.approx(sum(weight * counts[name] for name, weight in COSTS.items()))
    # A step is not cut: of CBO one is a hundred forward passes of a batch, of SSO even more.
    allowed = 0.1 * TASKS["digits-mlp"].spec.epochs * 1437
    step = counts["samples"] / counts["steps"]
    assert allowed <= counts["samples"] < allowed + 2.5 * step


def test_closures_without_gradients_count_a_third() -> None:
    training = Training(settings("cbo", n_particles=7))
    training.advance()
    assert (training.clock["forwards"], training.clock["grads"]) == (7 * 64, 0)
    assert training.clock["samples"] == pytest.approx(7 * 64 / 3)


def test_inner_updates_are_counted() -> None:
    training = Training(settings("sso", inner_steps=4))
    training.advance()
    counts = training.optimizer.counts
    assert training.clock["grads"] == 64 * counts["backwards"] == 64 * 4
    assert training.clock["forwards"] == 64 * (counts["forwards"] - counts["backwards"]) > 0


def test_looks_at_the_curvature_are_counted() -> None:
    training = Training(settings("lanczos"))
    training.advance()
    spectrum = training.optimizer.learner.last_spectrum[0]
    assert training.clock["hvps"] == 64 * len(spectrum.values) > 0
    assert training.clock["grads"] == 2 * 64


def test_a_learnt_rate_follows_the_schedule() -> None:
    training = Training(settings("lanczos", budget=1.0))
    while not training.done:
        training.advance()
    learner = training.optimizer.learner
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(learner.learnt[0] * training.factor)
    assert training.factor < 0.01
    assert learner.looks > 5


def test_batches_grow_and_show_every_sample_of_an_epoch_once() -> None:
    training = Training(settings("adadagrad", eta=0.2))
    first = training.optimizer.sampler.batch_size
    seen: list[int] = []
    rows = training.optimizer.rows
    training.optimizer.rows = lambda: seen.append(rows()) or seen[-1]
    while training.optimizer.sampler.epoch == 0:
        training.advance()
    assert sorted(i for part in seen for i in part) == list(range(training.size))
    assert training.optimizer.sampler.batch_size > first


def test_signs_of_weights_survive_training_by_dale() -> None:
    training = Training(settings("dalesgd"))
    weights = [p for p in training.model.parameters() if p.dim() > 1]
    signs = [p.detach().sign() for p in weights]
    while not training.done:
        training.advance()
    assert all(torch.equal(p.detach().sign(), sign) for p, sign in zip(weights, signs, strict=True))


def test_muon_steps_matrices_and_adamw_the_rest() -> None:
    training = Training(settings("muon", task="digits-cnn"))
    muon, adamw = training.optimizer.parts
    assert all(p.dim() == 2 for group in muon.param_groups for p in group["params"])
    owned = [id(p) for group in training.optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in training.model.parameters())
    assert any(p.dim() == 4 for group in adamw.param_groups for p in group["params"])


def test_methods_meet_the_same_weights_whatever_they_are_built_from() -> None:
    first = Training(settings("sgd")).model.state_dict()
    for method in METHODS:
        other = Training(settings(method)).model.state_dict()
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_every_need_has_a_step_or_a_way_to_build() -> None:
    assert {*NEEDS} == {*STEPS, "two_groups", "model"}
    assert {need for method in METHODS.values() for need in method.needs} <= {*NEEDS}


@pytest.mark.parametrize("method", METHODS)
def test_a_search_has_fourteen_settings_that_the_method_takes(method: str) -> None:
    from bench.protocol import grid

    spec = find(method)
    found, ladder = grid(spec.space, 14)
    assert len(found) == 14
    assert len(ladder) == 7 + 6
    for hp in (found[0], found[-1]):
        loss = Training(settings(method, **hp)).advance()
        assert math.isfinite(loss)
