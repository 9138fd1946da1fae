"""The results folder: nothing that was reported finished is lost, nothing half-written is believed."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.store import Store, dump, finite, identity

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
settings = st.dictionaries(st.text(), scalars | st.dictionaries(st.text(), scalars), max_size=5)
RECORDS = [{"id": f"run{i}", "status": "ok", "wall_s": i / 3, "note": "æ\n"} for i in range(4)]


@given(settings)
def test_the_order_of_settings_does_not_change_the_id(values: dict[str, Any]) -> None:
    assert identity(dict(reversed(values.items()))) == identity(values)


@given(settings, st.text(), scalars, scalars)
def test_the_value_of_a_setting_changes_the_id(values: dict[str, Any], key: str, a: Any, b: Any) -> None:
    same = type(a) is type(b) and a == b and str(a) == str(b)
    assert (identity({**values, key: a}) == identity({**values, key: b})) == same


def test_records_survive(store: Store) -> None:
    for record in RECORDS:
        store.append(record)
    assert list(store.records().values()) == RECORDS


@pytest.mark.parametrize("keep", range(0, 60, 7))
def test_a_torn_last_line_does_not_count_and_is_overwritten(store: Store, keep: int) -> None:
    store.append(RECORDS[0])
    whole = store.runs.stat().st_size
    store.append(RECORDS[1])
    with open(store.runs, "rb+") as stream:
        stream.truncate(min(whole + keep, store.runs.stat().st_size - 1))
    assert list(store.records()) == ["run0"]
    store.append(RECORDS[2])
    assert list(store.records()) == ["run0", "run2"]


def test_a_bad_line_in_the_middle_is_named(store: Store) -> None:
    store.append(RECORDS[0])
    with open(store.runs, "a") as stream:
        stream.write("{}\n")
    store.append(RECORDS[1])
    with pytest.raises(ValueError, match=r"runs\.jsonl:2 is not a run"):
        store.records()


def test_json_gets_no_nan() -> None:
    assert finite({"a": [float("nan"), (1.5, float("inf"))], "b": "nan"}) == {"a": [None, [1.5, None]], "b": "nan"}


def test_a_checkpoint_is_replaced_in_one_piece(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save_checkpoint("run", {"step": 1, "weights": torch.ones(3)})

    def crash(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        store.save_checkpoint("run", {"step": 2})
    monkeypatch.undo()
    assert store.unfinished() == ["run"]
    checkpoint = store.checkpoint("run")
    assert checkpoint is not None
    assert checkpoint["step"] == 1
    store.drop_checkpoint("run")
    assert store.checkpoint("run") is None


class _Full(io.BytesIO):
    """A disk that has space for little things alone."""

    def write(self, data: Any) -> int:
        if len(data) > 1000:
            raise OSError("No space left")
        return super().write(data)


def test_a_checkpoint_without_space_says_so() -> None:
    with pytest.raises(OSError, match="No space left"):
        dump({"weights": torch.ones(1000)}, _Full())


def test_curves_come_back(store: Store) -> None:
    rows = [{"samples": 0, "loss": 2.5}, {"samples": 8, "loss": float("nan")}]
    store.save_curve("run", rows)
    assert store.curve("run") == [rows[0], {"samples": 8, "loss": None}]
    assert store.curve("other") == []


def test_the_curve_of_a_finished_run_is_no_part_of_its_line(store: Store) -> None:
    store.append({**RECORDS[0], "curve": [{"samples": 0}]})
    assert list(store.records().values()) == RECORDS[:1]
    assert store.curve(RECORDS[0]["id"]) == [{"samples": 0}]


def test_an_empty_folder_has_no_runs(tmp_path: Path) -> None:
    assert Store(tmp_path / "nowhere").records() == {}
    assert Store(tmp_path / "nowhere").manifest() is None
