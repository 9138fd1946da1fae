"""The table of what works with what names tests that are there, for classes that they are run for."""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path

import pytest
import torch
from cases import REFUSES
from support import COLUMNS, SECTIONS, named_tests

import optimzoo

HERE = Path(__file__).parent
CELLS = [
    pytest.param(name, cell, id=f"{feature}-{name}")
    for rows in SECTIONS.values()
    for feature, line in rows.items()
    for name, cell in line.items()
]


def steps(thing) -> bool:
    kinds = torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler
    return isinstance(thing, type) and (issubclass(thing, kinds) or callable(getattr(thing, "step", None)))


def test_every_public_class_that_steps_has_a_column():
    names = {name for name in optimzoo.__all__ if steps(getattr(optimzoo, name))}
    # SamplesLR is one of torch's schedulers but for its unit; the other is a second name.
    assert names - {"SamplesLR", "TargetSurrogate"} == set(COLUMNS)


@functools.cache
def functions(file: str) -> set[str]:
    return {node.name for node in ast.parse((HERE / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("test", named_tests())
def test_every_test_that_is_named_exists(test):
    file, _, name = test.partition("::")
    assert name in functions(file)


def ids(function) -> list[list[str]]:
    """For each mark of a test, what its rows are called."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    return [[row if isinstance(row, str) else str(getattr(row, "id", "")) for row in mark.args[1]] for mark in marks]


@pytest.mark.parametrize(("name", "cell"), CELLS)
def test_every_cell_has_a_reason_or_a_test_that_is_run_for_its_class(name, cell):
    assert cell.works in ("yes", "partly", "no", "n/a")
    assert bool(cell.why) == (cell.works != "yes")
    assert cell.test or cell.works in ("no", "n/a")
    file, _, test = cell.test.partition("::")
    if not test or file.startswith("integrations"):  # which need packages: integrations/test_cells.py
        return
    rows = ids(getattr(importlib.import_module(file[:-3]), test))
    by_class = [mark for mark in rows if any(row.partition("-")[0] in COLUMNS for row in mark)]
    assert not by_class or any(row.partition("-")[0] == name for mark in by_class for row in mark), cell.test


@pytest.mark.parametrize("feature", ["complex", "sparse", "capturable", "compile"])
def test_what_a_class_refuses_is_a_no(feature):
    words = {"complex": "Complex", "sparse": "Sparse", "capturable": "``capturable``", "compile": "``torch.compile``"}
    lines = [line for rows in SECTIONS.values() for key, line in rows.items() if key.startswith(words[feature])]
    assert len(lines) == 1
    for name, reasons in REFUSES.items():
        assert (lines[0][name].works == "no") == (feature in reasons), name
