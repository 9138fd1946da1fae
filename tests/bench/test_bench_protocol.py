"""Planning: what is tried, what is chosen, what is run last, all from the records alone."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.methods import OptSpec, find, half_decades
from bench.protocol import EXTENSIONS, FINAL_SEEDS, Cell, Plan, Protocol
from bench.run import Settings
from bench.store import Record

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
