"""The table of what works with what names tests that are run for its classes: of the tests that need packages."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_support import CELLS, COLUMNS, ids

ROWS = [cell for cell in CELLS if cell.values[1].test.startswith("integrations/")]


def classes(module, function) -> set[str]:
    """The classes that a test is run for: its rows', or else those of the tables of its file."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    peers = {
        getattr(value, "ours", "") for mark in marks for row in mark.args[1] for value in getattr(row, "values", ())
    }
    rows = {row.partition("-")[0] for mark in ids(function) for row in mark} | peers
    tables = (value for value in vars(module).values() if isinstance(value, dict))
    return rows & set(COLUMNS) or {key for table in tables for key in table} & set(COLUMNS)


@pytest.mark.parametrize(("name", "cell"), ROWS)
def test_the_test_of_a_cell_is_run_for_its_class(name, cell):
    file, _, test = cell.test.partition("::")
    module = pytest.importorskip(file[:-3].replace("/", "."))
    assert name in classes(module, getattr(module, test))


def test_every_file_here_is_in_the_table():
    others = {Path(__file__).name, "test_examples.py"}  # of the table itself, and of the pages
    here = {f"integrations/{path.name}" for path in Path(__file__).parent.glob("test_*.py") if path.name not in others}
    assert {cell.values[1].test.partition("::")[0] for cell in ROWS} == here
