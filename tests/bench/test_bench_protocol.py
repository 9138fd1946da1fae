"""Planning: what is tried, what is chosen, what is run last, all from the records alone."""

import importlib.util
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import optimzoo
from bench.methods import METHODS, PEERS, OptSpec, find, half_decades
from bench.protocol import EXTENSIONS, FINAL_SEEDS, Cell, Plan, Protocol, Study, Trial, choose
from bench.run import Settings
from bench.store import Record
from bench.tasks import TASKS

Score = Callable[[float], float]


def play(cell: Cell, score: Score, status: Callable[[float], str] = lambda lr: "ok") -> tuple[Plan, list[Settings]]:
    """Runs whatever the cell wants, with accuracies made up from the learning rate, until it wants no more."""
    records: dict[str, Record] = {}
    asked: list[Settings] = []
    while (plan := cell.plan(records)).wanted:
        settings = plan.wanted[0]
        lr = settings.hp["lr"]
        asked.append(settings)
        records[settings.id] = {
            "id": settings.id,
            "status": status(lr),
            "metrics": {"accuracy": score(lr)},
            "cases": 288,
            "settings": {"seed": settings.seed},
        }
    assert plan.left == 0
    return plan, asked


def cell(**rules: Any) -> Cell:
    return Cell("digits-mlp", "adamw", Protocol(**{"ruleset": "lr-only", "trials": 5, "tune_seeds": 1, **rules}))


Rank = Callable[[dict[str, Any]], float]


def tuned(score: Rank, method: str = "adamw", task: str = "digits-mlp", **rules: Any) -> tuple[Plan, list[Settings]]:
    """As ``play``, with made-up scores of all hyper-parameters."""
    subject, records, asked = Cell(task, method, Protocol(**rules)), {}, []
    while (plan := subject.plan(records)).wanted:
        settings = plan.wanted[0]
        asked.append(settings)
        records[settings.id] = {
            "status": "ok",
            "metrics": {subject.spec.metric: score(settings.hp) + 1e-3 * (settings.seed % 2)},
            "cases": 288,
            "settings": {"seed": settings.seed},
        }
    assert plan.left == 0
    return plan, asked


def test_half_decades() -> None:
    assert half_decades(3e-3, 5) == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert half_decades(1e-3, 4) == [1e-4, 3e-4, 1e-3, 3e-3]
    assert half_decades(2.9e-2, 1) == [3e-2]


def test_a_peak_inside_the_grid_is_found_without_extension() -> None:
    plan, asked = play(cell(tune_seeds=2), lambda lr: 0.9 if lr == 1e-2 else 0.5)
    assert plan.selected == 1e-2
    assert not plan.edge
    assert sum(settings.phase == "tune" for settings in asked) == 5 * 2
    assert sum(settings.phase == "final" for settings in asked) == 2 * 5  # at the default and at the selected


@pytest.mark.parametrize(("last", "slope"), [(1.0, lambda lr: lr), (1e-5, lambda lr: 1 / (1 + 1e4 * lr))])
def test_a_search_follows_a_slope_so_far_and_then_warns(last: float, slope: Score) -> None:
    plan, _ = play(cell(), slope)
    assert len(plan.scores) == 5 + EXTENSIONS
    assert last in plan.scores
    assert plan.edge


def test_a_search_stops_where_the_slope_ends() -> None:
    plan, _ = play(cell(), lambda lr: 0.9 if lr == 0.1 else lr)
    assert plan.selected == 0.1
    assert max(plan.scores) == 0.3
    assert not plan.edge


def test_a_failed_trial_scores_chance_whatever_its_number() -> None:
    plan, _ = play(cell(), lambda lr: 0.99 if lr == 1e-2 else 0.8, lambda lr: "chance" if lr == 1e-2 else "ok")
    assert plan.scores[1e-2] == 0.1
    assert plan.selected == 3e-4


def test_nothing_is_selected_where_every_trial_raised() -> None:
    plan, _ = play(cell(), lambda lr: 0.0, lambda lr: "error")
    assert plan.selected is None
    assert plan.final == []


def test_final_seeds_chose_nothing() -> None:
    _, asked = play(cell(tune_seeds=3), lambda lr: 0.5)
    seeds = {phase: {settings.seed for settings in asked if settings.phase == phase} for phase in ("tune", "final")}
    assert seeds["tune"] == {0, 1, 2}
    assert seeds["final"] == {FINAL_SEEDS + i for i in range(5)}
    assert {settings.split for settings in asked if settings.phase == "tune"} == {"train"}


def test_a_selected_default_is_run_once() -> None:
    plan, asked = play(cell(), lambda lr: 0.9 if lr == 1e-3 else 0.5)
    assert plan.selected == find("adamw").defaults["lr"]
    assert plan.final == plan.default
    assert len({settings.id for settings in asked}) == len(asked) == 5 + 5


def test_one_shot_searches_nothing() -> None:
    plan, asked = play(cell(ruleset="one-shot", seeds=3), lambda lr: 0.9)
    assert {settings.hp["lr"] for settings in asked} == {1e-3}
    assert len(plan.default) == 3
    assert plan.selected is None


@given(st.lists(st.sampled_from([0.1, 0.5, 0.8, 0.81, 0.9]), min_size=11, max_size=11))
def test_a_plan_ends_for_any_scores_and_never_asks_twice(scores: list[float]) -> None:
    ladder = half_decades(3e-3, 11)
    plan, asked = play(cell(seeds=2), lambda lr: scores[ladder.index(lr)])
    assert len({settings.id for settings in asked}) == len(asked)
    assert plan.selected in plan.scores
    assert len(plan.scores) <= 5 + EXTENSIONS


def test_a_class_is_searched_around_its_own_default_and_asked_what_it_needs() -> None:
    assert find("torch.optim:Adagrad").space == {"lr": 0.01, "weight_decay": (0.0, 5e-4)}
    assert find("torch.optim:LBFGS").needs == {"closure"}
    assert find("torch.optim:NAdam").needs == frozenset()
    assert find("optimzoo:DiffGrad").package.startswith("optimzoo ")
    assert find("broken:HUNGRY").name == "hungry"


def test_a_class_without_a_version_has_that_of_its_source_and_others_have_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    packages = []
    for scale in (1, 22):
        (tmp_path / "made_here.py").write_text(f"import torch\n\nclass Mine(torch.optim.SGD):\n    scale = {scale}\n")
        monkeypatch.delitem(sys.modules, "made_here", raising=False)
        mine = find("made_here:Mine")
        packages.append(mine.package)
        own = OptSpec("mine", mine.built)
        assert own.package == mine.package
    assert len(set(packages)) == 2
    assert all(re.fullmatch("made_here source [0-9a-f]{16}", package) for package in packages)
    versions = {"optimzoo": optimzoo.__version__, "torch": torch.__version__}
    assert all(spec.package == f"{spec.origin} {versions[spec.origin]}" for spec in METHODS.values())
    for path in PEERS:
        name = path.partition(":")[0]
        if importlib.util.find_spec(name):
            assert "source" not in find(path).package


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamq", "did you mean adam"),
        ("torch.optim:AdmW", "did you mean AdamW"),
        ("no.such.module:X", "No module named 'no'"),
        ("math:pi", "neither a torch.optim.Optimizer class nor an OptSpec"),
    ],
)
def test_an_unknown_method_is_answered_with_what_is_near(name: str, message: str) -> None:
    with pytest.raises(LookupError, match=message):
        find(name)


def test_an_unknown_need_is_refused() -> None:
    with pytest.raises(ValueError, match="telepathy"):
        OptSpec("x", find("sgd").build, needs=frozenset({"telepathy"}))


def peak(hp: dict[str, Any]) -> float:
    """Best at 0.01 with weight decay, and the same half a decade below."""
    return 0.9 - 0.1 * abs(math.log10(hp["lr"] / 0.01)) * (hp["lr"] != 3e-3) - 0.05 * (not hp.get("weight_decay"))


@pytest.mark.parametrize("sampler", ["grid", "sobol", "tpe"])
def test_equal_trials_whatever_draws_them(sampler: str) -> None:
    plan, asked = tuned(peak, sampler=sampler, trials=14, tune_seeds=2)
    assert len(plan.trials) == 14
    assert sum(settings.phase == "tune" for settings in asked) == 28
    assert {settings.hp["weight_decay"] for settings in asked if settings.phase == "tune"} == {0.0, 0.05}
    assert plan.chosen is not None
    assert plan.chosen["weight_decay"] == 0.05
    assert 1e-3 < plan.chosen["lr"] < 0.04
    again, _ = tuned(peak, sampler=sampler, trials=14, tune_seeds=2)
    assert [trial.hp for trial in again.trials] == [trial.hp for trial in plan.trials]


def test_tpe_asks_for_one_trial_at_a_time_and_learns_from_it() -> None:
    subject = Cell("digits-mlp", "adamw", Protocol(sampler="tpe", tune_seeds=2))
    first = subject.plan({})
    assert len([s for s in first.wanted if s.phase == "tune"]) == 2
    assert first.left == 14 * 2 + 2 * 5
    slopes = (lambda hp: 0.3 - 0.1 * math.log10(hp["lr"]), lambda hp: 0.7 + 0.1 * math.log10(hp["lr"]))
    plans = [tuned(slope, sampler="tpe", trials=20)[0] for slope in slopes]
    rates = [[trial.lr for trial in plan.trials] for plan in plans]
    assert rates[0][:5] == rates[1][:5]  # drawn before anything is known
    low, high = (statistics.median(row[10:]) for row in rates)
    assert low < high / 10


def test_a_study_that_goes_on_asks_what_one_made_anew_does() -> None:
    pytest.importorskip("optuna")
    spec, scores = TASKS["digits-mlp"].spec, [0.1, 0.5, 0.3, 0.7, 0.2, 0.6, 0.8]
    space = Cell("digits-mlp", "adamw", Protocol()).space
    going = Study(space, spec)
    for told in (scores[:3], scores, scores[:5], [0.9, *scores[:6]], []):  # forth, back, and another history
        assert going.after(told) == Study(space, spec).after(told)


def test_of_settings_within_one_error_the_smallest_rate_wins_or_the_best() -> None:
    careful, _ = tuned(peak)
    bold, _ = tuned(lambda hp: peak(hp) + 1e-4 * (hp["lr"] == 0.01), select="best")
    assert careful.chosen == {"lr": 3e-3, "weight_decay": 0.05}
    assert bold.chosen == {"lr": 0.01, "weight_decay": 0.05}


def test_an_edge_is_extended_with_all_choices_of_the_others() -> None:
    plan, _ = tuned(lambda hp: 0.5 + 0.1 * math.log10(hp["lr"]))
    assert plan.edge
    assert len(plan.trials) == 14 + 2 * EXTENSIONS
    assert len(plan.scores) == 7 + EXTENSIONS


def test_an_error_of_less_is_better_too() -> None:
    spec = TASKS["softmax"].spec
    plan, _ = tuned(lambda hp: abs(math.log10(hp["lr"] / 0.01)) - 3, "sgd", "softmax", select="best")
    assert spec.mode == "min"
    assert plan.chosen is not None
    assert plan.chosen["lr"] == 0.01


def test_seeds_that_differ_widen_the_error_of_a_metric_that_is_no_rate() -> None:
    spec = TASKS["softmax"].spec

    def trial(lr: float, *values: float) -> Trial:
        runs = [{"status": "ok", "metrics": {spec.metric: value}, "cases": 0, "settings": {}} for value in values]
        return Trial({"lr": lr}, runs, sum(values) / len(values))

    alike = [trial(0.01, -1.8, -1.8), trial(0.1, -2.0, -2.0)]
    apart = [trial(0.01, -1.8, -1.8), trial(0.1, -2.4, -1.6)]
    assert choose(alike, spec, "1se") == {"lr": 0.1}
    assert choose(apart, spec, "1se") == {"lr": 0.01}


def test_self_tuning_has_half_as_much_again_and_shows_one_shot() -> None:
    plan, asked = tuned(lambda hp: 0.9, "lanczos", ruleset="self-tuning", seeds=3, budget=0.5)
    assert Counter(settings.budget for settings in asked) == {0.5: 3, 0.75: 3}
    assert (len(plan.default), len(plan.final)) == (3, 3)
    assert not plan.trials


def test_a_method_without_a_rate_searches_what_it_has() -> None:
    spec = OptSpec("x", find("sgd").build, {"momentum": (0.0, 0.9)}, {"lr": 0.1})
    subject = Cell("digits-mlp", "sgd", Protocol(trials=5))
    vars(subject)["optimizer"] = spec
    tuning = [settings for settings in subject.plan({}).wanted if settings.phase == "tune"]
    assert [settings.hp["momentum"] for settings in tuning] == [0, 0, 0.9, 0.9]


def test_a_preset_has_its_recipe() -> None:
    from bench.presets import PRESETS

    recipe = PRESETS["cifar10/airbench94"]
    subject = Cell(recipe.task, recipe.method, Protocol("one-shot", seeds=2), "cifar10/airbench94")
    wanted = subject.plan({}).wanted
    assert [settings.seed for settings in wanted] == [FINAL_SEEDS, FINAL_SEEDS + 1]
    for settings in wanted:
        assert (settings.epochs, settings.batch, settings.schedule, settings.amp) == (
            recipe.epochs, recipe.batch, recipe.schedule, recipe.amp)  # fmt: skip
        assert recipe.hp.items() <= settings.hp.items()
