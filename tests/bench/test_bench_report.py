"""The report: one file that says what was measured, and nothing that was not."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import svg
from bench.__main__ import DONE, main
from bench.report import Results, Sample, to_html, to_markdown
from bench.store import Store

VOID = {"meta", "input", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """Collects tags and attributes and checks that elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in VOID and not (tag == "path" and self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value) for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(swept: tuple[Path, int]) -> str:
    return to_html(Results(Store(swept[0])))


def test_the_page_is_one_file_without_external_references(swept: tuple[Path, int], tmp_path: Path) -> None:
    file = tmp_path / "new" / "report.html"
    assert main(["report", str(swept[0]), "--html", str(file)]) == DONE
    assert [f.name for f in file.parent.iterdir()] == ["report.html"]
    text = file.read_text()
    found = Page(text)
    assert not [entry for entry in found.attributes if entry[1] in {"src", "href", "srcset", "action", "xlink:href"}]
    assert not re.search(r"https?://|//\w|@import|url\(|\bfetch\(|XMLHttpRequest|<(link|img|iframe|object)", text)


def test_every_drawing_is_well_formed_and_finite(page: str) -> None:
    drawings = re.findall(r"<svg viewBox=\"0 0.*?</svg>", page, re.S)
    assert len(drawings) == 4
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert not re.search(r"\b(nan|inf)\b", drawing)


def test_the_page_tells_n_failures_and_every_run(page: str, swept: tuple[Path, int]) -> None:
    records = Store(swept[0]).records()
    assert all(run in page for run in records)
    assert "n = 5" in page
    assert "broken:Raises on digits-mlp: 5 of 5 final runs raised an error." in page
    assert "ArithmeticError: no step today" in page


def test_a_name_cannot_break_out_of_the_page(swept: tuple[Path, int]) -> None:
    results = Results(Store(swept[0]))
    results.methods = [*results.methods[:2], "<script>alert(1)</script>"]
    for record in results.records.values():
        record["settings"] = {**record["settings"], "method": results.methods[-1]}
    assert "<script>alert" not in to_html(results)


def test_failed_runs_score_chance(swept: tuple[Path, int]) -> None:
    row = next(row for row in Results(Store(swept[0])).tables[0].rows if row.method == "broken:Raises")
    assert row.failed == len(row.finals) == 5
    assert row.sample is not None
    assert row.sample.values == (0.1,) * 5


def test_differences_are_paired_by_seed(swept: tuple[Path, int]) -> None:
    rows = {row.method: row for row in Results(Store(swept[0])).tables[0].rows}
    sgd, adamw = rows["sgd"], rows["adamw"]
    assert adamw.difference is None
    assert sgd.difference is not None
    by_seed = {run["settings"]["seed"]: run["metrics"]["accuracy"] for run in adamw.finals}
    gains = [run["metrics"]["accuracy"] - by_seed[run["settings"]["seed"]] for run in sgd.finals]
    assert sgd.difference.values == pytest.approx(gains)


def test_a_saturated_task_ranks_nothing(swept: tuple[Path, int], page: str) -> None:
    table = Results(Store(swept[0])).tables[0]
    assert {table.verdict(row) for row in table.rows} == {""}
    assert "saturated" in page


def test_markdown_is_a_table(swept: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(Store(swept[0]))
    rows = [line for line in to_markdown(results).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert len({row.count("|") for row in rows}) == 1
    assert main(["report", str(swept[0]), "--md"]) == DONE
    assert rows[0] in capsys.readouterr().out


def test_the_console_shows_every_method(swept: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(swept[0])]) == DONE
    out = capsys.readouterr().out
    assert all(name in out for name in ("sgd", "adamw", "broken:Raises", "n = 5"))


def test_a_sweep_without_runs_still_reports(store: Store, swept: tuple[Path, int]) -> None:
    manifest = Store(swept[0]).manifest()
    assert manifest is not None
    store.save_manifest(manifest)
    results = Results(store)
    assert "not complete" in to_html(results)
    assert to_markdown(results)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.1] * 7, ""),
        ([0.1] * 8, "better"),
        ([-0.1, -0.2, -0.1, -0.3] * 2, "worse"),
        ([0.1, -0.1, 0.1, -0.1] * 2, "tie"),
        ([0.0] * 8, "tie"),
    ],
)
def test_verdicts(values: list[float], verdict: str) -> None:
    assert Sample(tuple(values)).verdict == verdict


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(10, 10_000))
def test_the_scale_of_rates_keeps_their_order_and_room_for_its_ticks(rates: list[float], cases: int) -> None:
    scale = svg.nines(rates, cases)
    places = [scale(rate) for rate in sorted(rates)]
    assert places == sorted(places)
    assert all(-0.02 <= place <= 1.02 for place in places)
    ticks = sorted(scale(tick) for tick in scale.ticks)
    assert all(b - a > 0.09 for a, b in pairwise(ticks))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_linear_ticks_are_few_and_inside(values: list[float]) -> None:
    scale = svg.linear(values)
    assert len(scale.ticks) <= 12
    slack = 1e-6 * (scale.high - scale.low)
    assert all(scale.low - slack <= tick <= scale.high + slack for tick in scale.ticks)


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20))
def test_logarithmic_scales_hold_their_values(values: list[float]) -> None:
    scale = svg.log(values)
    assert all(0 <= scale(value) <= 1 for value in values)
