"""The report: one file that says what was measured, and nothing that was not."""

import csv
import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import export, figures, report, svg, targets
from bench.__main__ import DONE, main
from bench.methods import METHODS
from bench.presets import PRESETS
from bench.protocol import RULESETS, Protocol
from bench.report import Results, Sample, glance, tabulate, to_html, to_markdown
from bench.run import Settings, environment, error_record
from bench.store import Record, Store, canonical, finite
from bench.sweep import open_sweep
from bench.tasks import TASKS

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
    outside = [entry for entry in found.attributes if entry[1] in {"src", "href", "srcset", "action", "xlink:href"}]
    assert all(value and value.startswith("#") for _, _, value in outside)
    places = {value for _, key, value in found.attributes if key == "id"}
    assert {value[1:] for _, _, value in outside} <= places
    assert not re.search(r"https?://|//\w|@import|url\(|\bfetch\(|XMLHttpRequest|<(link|img|iframe|object)", text)


def test_every_drawing_is_well_formed_and_finite(page: str) -> None:
    drawings = re.findall(r"<svg viewBox=\"0 0.*?</svg>", page, re.S)
    assert len(drawings) == 9
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert not re.search(r"\b(nan|inf)\b", drawing)


def test_the_page_tells_n_failures_and_every_run(page: str, swept: tuple[Path, int]) -> None:
    records = Store(swept[0]).records()
    assert all(run in page for run in records)
    assert "n = 5" in page
    assert "broken:Raises: 5 of 5 final runs on digits-mlp raised an error." in page
    assert "ArithmeticError: no step today" in page


def test_a_name_or_an_error_cannot_break_out_of_the_page(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "</script><script>alert(1)</script>"
    monkeypatch.setitem(METHODS, evil, dataclasses.replace(METHODS["sgd"], name=evil))
    fill(store, ["fm14"], ["adamw", evil], Protocol("one-shot", seeds=2), lambda settings: settings.method == evil)
    assert "<script>alert" not in to_html(Results(store))


def test_a_method_that_could_not_be_trained_at_all_has_no_score(swept: tuple[Path, int]) -> None:
    results = Results(Store(swept[0]))
    row = next(row for row in results.tables[0].rows if row.method == "broken:Raises")
    assert row.failed == len(row.finals) == 5
    assert row.sample is row.default is row.difference is None
    line = next(line for line in tabulate(results.tables[0]) if line[0] == "broken:Raises")
    assert line[2:7] == ["-", "-", "-", "-", "5/5"]


def test_failed_runs_score_chance(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, ["fm14"], ["adamw", "sgd"], Protocol("one-shot", seeds=3), lambda settings: settings.seed == 1001)
    row = Results(store).tables[0].rows[0]
    assert row.failed == 1
    assert row.sample is not None
    assert row.sample.values[1] == 0.1 < min(row.sample.values[0], row.sample.values[2])


def test_the_tables_at_a_glance_mark_what_the_differences_show(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def lost(settings: Settings) -> bool:
        return settings.method == "sgd" and settings.task == "fm14" and settings.seed < 1006

    fill(store, ["fm14", "digits-mlp"], ["adamw", "sgd"], Protocol("one-shot", seeds=8), lost)
    adamw, sgd = glance(Results(store))
    assert sgd[1] == "10.0\u00a0▼, 6\u00a0✗"
    assert not set("▲▼=") & set(adamw[1] + adamw[2] + sgd[2])  # neither the baseline nor a saturated task
    assert to_markdown(Results(store)).startswith("**At a glance**")


def test_the_readme_shows_the_results_that_are_kept() -> None:
    """They are complete, and the table is what the report prints of them."""
    root = Path(__file__).parents[2]
    results = Results(Store(root / "bench" / "results"))
    assert results.left == 0
    assert set(METHODS) <= set(results.methods)
    shown = (root / "README.md").read_text("utf-8").partition("<!-- bench table -->")[2].partition("<!-- end -->")[0]
    assert {f"| {' | '.join(line)} |" for line in glance(results)} <= set(shown.splitlines())
    assert results.rules in shown


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


def made(settings: Settings, fails: bool = False) -> Record:
    """The record of a run that was not trained: better at a middling learning rate, different by seed and method."""
    spec, method = TASKS[settings.task].spec, sorted(METHODS).index(settings.method)
    rng = np.random.default_rng([settings.seed, method])
    gain = 0.8 - 0.1 * abs(math.log10(settings.hp.get("lr", 0.1)) + 2) + 0.02 * rng.standard_normal()
    top = 1.0 if spec.rate else 40.0 if spec.metric == "psnr" else -6.0
    value = spec.chance + (top - spec.chance) * min(max(gain, 0.0), 1.0)
    record = error_record(settings, "MemoryError: none left", "oom") if fails else {"error": None}
    return record if fails else {
        "id": settings.id, "status": "ok", "phase": settings.phase, "settings": dataclasses.asdict(settings),
        "metrics": {spec.metric: value, "loss": 0.1, "train_loss": 0.1}, "cases": spec.n_test, "to_target": 3.0 + gain,
        "counts": {"steps": 100, "grads": 6400, "forwards": 0, "hvps": 0, "samples": 6400}, "wall_s": 0.5, "cpu_s": 0.5,
        "step_ms": 0.1, "state_bytes": 800, "peak_bytes": 10**8, "parameters": 100, "weights": "0" * 16, "error": None,
        "env": {**environment(), "load": 1.0},
    }  # fmt: skip


def fill(
    store: Store,
    tasks: list[str],
    methods: list[str],
    protocol: Protocol,
    fails: Callable[[Settings], bool] = lambda settings: False,
) -> None:
    """A folder as after a sweep, with curves of the final runs."""
    sweep = open_sweep(store, tasks, methods, protocol)
    records: dict[str, Record] = {}
    for cell in sweep:
        while wanted := cell.plan(records).wanted:
            for settings in wanted:
                record = records[settings.id] = made(settings, fails(settings))
                if settings.phase == "final" and record["status"] == "ok":
                    metric, value = cell.spec.metric, record["metrics"][cell.spec.metric]
                    (store.folder / "curves" / f"{settings.id}.jsonl").write_text("".join(
                        json.dumps({"samples": 1000 * i, "wall_s": 0.1 * i, "train_loss": 2.0 ** -i, "loss": 0.1,
                                    metric: cell.spec.chance + (value - cell.spec.chance) * i / 4}) + "\n"
                        for i in range(5)
                    ))  # fmt: skip
            if all(fails(settings) for settings in wanted):
                break
    store.runs.write_text("".join(canonical(finite(record)) + "\n" for record in records.values()))


KINDS = ["fm14", "photo-inr", "softmax", "digits-mlp", "kappa-1e2", "rotated"]


@pytest.mark.parametrize("ruleset", RULESETS)
def test_every_ruleset_and_kind_of_task_is_reported(
    ruleset: str, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = Protocol(ruleset, trials=6, tune_seeds=1, seeds=8)
    fill(store, KINDS, ["adamw", "sgd", "cbo"], protocol, lambda settings: settings.method == "cbo")
    results = Results(store)
    page = to_html(results)
    Page(page)
    for drawing in re.findall(r"<svg viewBox=\"0 0.*?</svg>", page, re.S):
        ElementTree.fromstring(drawing)
        assert not re.search(r"\b(nan|inf)\b", drawing)
    assert f"uleset {ruleset}" in page
    assert page.count(">Difference to adamw<") == 4
    assert (
        page.count(">Learning rate<") == page.count(">Search budget<") == (4 if ruleset in ("lr-only", "tuned") else 0)
    )
    assert page.count(">Defaults and tuned<") == (0 if ruleset == "one-shot" else 4)
    assert ">PSNR<" in page or "Test PSNR" in page
    assert "ran out of memory" in page
    table = next(table for table in results.tables if table.spec.name == "softmax")
    adamw, sgd = table.row("adamw"), table.row("sgd")
    assert adamw is not None and sgd is not None and adamw.sample and sgd.sample and sgd.difference  # noqa: PT018
    better = sgd.sample.median < adamw.sample.median  # less is better
    assert (sgd.difference.median > 0) == better
    markdown = to_markdown(results)
    assert "**diagnostic**" in markdown
    report.to_console(results)
    assert "rotated" in capsys.readouterr().out


def test_diagnostics_pass_at_their_target(store: Store) -> None:
    fill(store, ["kappa-1e2"], ["adamw", "sgd"], Protocol("one-shot", seeds=4))
    results = Results(store)
    assert results.tables == []
    row = results.diagnostics[0].row("sgd")
    assert row is not None
    wanted = sum(run["metrics"]["log_gap"] <= -4 for run in row.finals) / 4
    assert row.passed == wanted
    assert report.pass_rates(results)[1] == ["sgd", f"{100 * wanted:.0f}"]
    assert "Diagnostics" in to_html(results)


def test_the_expected_best_of_k_is_the_mean_over_all_draws(store: Store) -> None:
    for task in ("fm14", "softmax"):
        fill(store, [task], ["adamw"], Protocol("tuned", trials=6, tune_seeds=1, seeds=1))
        row = Results(store).every_table[-1].rows[0]
        scores = [trial.score for trial in row.plan.trials]
        best = max if row.spec.sign > 0 else min
        for k, found in enumerate(row.best_of(), 1):
            draws = [best(draw) for draw in itertools.combinations(scores, k)]
            assert found == pytest.approx(sum(draws) / len(draws))


def test_a_profile_counts_tasks_and_seeds_by_their_ratio_to_the_fewest(store: Store) -> None:
    fill(store, ["fm14", "mnist1d"], ["adamw", "sgd"], Protocol("one-shot", seeds=3))
    records = store.records()
    for record in records.values():
        record["to_target"] = 2.0 if record["settings"]["method"] == "sgd" else 3.0
        if record["settings"]["task"] == "mnist1d" and record["settings"]["method"] == "sgd":
            record["to_target"] = None
    store.runs.write_text("".join(canonical(record) + "\n" for record in records.values()))
    results = Results(Store(store.folder))
    assert results.profile == {"adamw": [1.0] * 3 + [1.5] * 3, "sgd": [1.0] * 3 + [math.inf] * 3}
    ElementTree.fromstring(figures.profile(results))


def test_a_heat_map_counts_standard_errors_behind_the_best(store: Store) -> None:
    fill(store, ["fm14"], ["adamw", "sgd", "adam", "nadam"], Protocol("one-shot", seeds=1))
    records = store.records()
    values = {"adamw": 0.90, "sgd": 0.89, "adam": 0.5, "nadam": 0.1}
    for record in records.values():
        record["metrics"]["accuracy"] = values[record["settings"]["method"]]
        record["status"] = "chance" if record["settings"]["method"] == "nadam" else "ok"
    store.runs.write_text("".join(canonical(record) + "\n" for record in records.values()))
    table = Results(Store(store.folder)).tables[0]
    assert table.error == pytest.approx(math.sqrt(0.9 * 0.1 / 2000))
    assert [table.heat(row) for row in table.rows] == ["h0", "h1", "h3", "h4"]
    table.spec = dataclasses.replace(table.spec, tags=frozenset({"saturated"}))
    assert [table.heat(row) for row in table.rows] == ["", "", "", "h4"]  # only what failed: nothing is ranked


def test_thousands_of_runs_are_one_small_page(store: Store) -> None:
    protocol = Protocol("tuned", trials=14, tune_seeds=2, seeds=10)
    methods = ["adamw", "sgd", "adam", "radam", "nadam", "diffgrad", "adabelief", "muon", "adagradnorm"]
    fill(store, ["fm14", "mnist1d", "photo-inr", "softmax"], methods, protocol)
    results = Results(store)
    assert len(results.records) > 1500
    page = to_html(results)
    assert len(page) < 2_000_000
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data is not None
    assert {row[-1] for row in json.loads(data[1])} == set(results.records)
    assert page.count('aria-pressed="true">') == report.SHOWN


def test_csv_has_a_line_for_every_run(swept: tuple[Path, int], tmp_path: Path) -> None:
    file = tmp_path / "new" / "runs.csv"
    assert main(["report", str(swept[0]), "--csv", str(file)]) == DONE
    with open(file, newline="") as stream:
        rows = {row["id"]: row for row in csv.DictReader(stream)}
    records = Store(swept[0]).records()
    assert set(rows) == set(records)
    for run, record in records.items():
        row = rows[run]
        assert row["status"] == record["status"]
        assert f"lr={record['settings']['hp']['lr']:g}" in row["hp"].split()
        if record["status"] == "ok":
            assert float(row["value"]) == record["metrics"]["accuracy"]
            assert int(row["steps"]) == record["counts"]["steps"]
        else:
            assert "no step today" in row["error"]


def test_events_hold_the_curves(swept: tuple[Path, int], tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    results = Results(Store(swept[0]))
    runs = [run for run in results.every_run if run["status"] == "ok" and run["phase"] == "final"][:2]
    assert export.to_tensorboard(results, tmp_path, runs) == 2
    folders = [file.parent for file in sorted(tmp_path.rglob("events.*"))]
    assert len(folders) == 2
    read = {}
    for folder in folders:
        found = events.EventAccumulator(str(folder))
        found.Reload()
        read[folder.name.rpartition("-")[2]] = found.Scalars("digits-mlp/accuracy")
    for run in runs:
        curve = results.store.curve(run["id"])
        points = read[run["id"][:6]]
        assert [point.step for point in points] == [round(row["samples"]) for row in curve]
        assert [point.value for point in points] == pytest.approx([row["accuracy"] for row in curve])


def test_an_old_python_is_told_why_there_are_no_targets(
    monkeypatch: pytest.MonkeyPatch, swept: tuple[Path, int]
) -> None:
    monkeypatch.setattr(targets, "READABLE", False)
    monkeypatch.setattr(report, "READABLE", False)
    assert "3.11" in report.targets(None)
    assert "from 3.11 on" in to_html(Results(Store(swept[0])))


def test_every_published_preset_is_a_target() -> None:
    rows = {target.preset: target.value for target in targets.load() if target.preset}
    assert {name: rows.get(name) for name in PRESETS} == {name: preset.published for name, preset in PRESETS.items()}


def test_every_target_is_well_formed() -> None:
    for target in targets.load():
        assert target.method
        assert target.source
        assert not target.preset or target.preset in PRESETS
        assert not target.task or (target.task in TASKS and target.entry in METHODS)
        if target.value is not None:
            assert target.on
            assert target.n
            assert TASKS[target.on].spec.chance < target.value < 1
        if target.preset:
            assert target.value == PRESETS[target.preset].published
    assert {preset.published for preset in PRESETS.values()} >= {0.9401, 0.7008}


def test_targets_are_answered_by_final_runs(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    fill(store, ["fm14"], ["adamw", "sgd", "tpsgd"], Protocol("lr-only", trials=3, tune_seeds=1, seeds=3))
    records = store.records()
    for record in records.values():
        value = {"adamw": 0.87, "sgd": 0.80, "tpsgd": 0.85}[record["settings"]["method"]]
        if record["phase"] == "final":  # what was chosen stays so
            record["metrics"]["accuracy"] = value
    store.runs.write_text("".join(canonical(record) + "\n" for record in records.values()))
    found = {(o.target.entry, o.target.task): o for o in Results(Store(store.folder)).outcomes if o.target.entry}
    assert found["adamw", "fm14"].verdict == targets.REPRODUCED  # 0.6 points below 87.6, of which 0.7 are noise
    assert found["sgd", "fm14"].verdict == targets.MISSED
    assert found["sgd", "fm14"].deviation == pytest.approx(-0.072)
    assert found["tpsgd", "fm14"].verdict == targets.REPRODUCED
    assert found["sgd", "mnist1d"].verdict == targets.NOT_RUN
    assert main(["report", str(store.folder), "--targets"]) == DONE
    out = capsys.readouterr().out
    assert targets.NONE_PUBLISHED in out
    assert "-7.20" in out


@pytest.mark.parametrize(
    "rules", [{"ruleset": "one-shot"}, {"ruleset": "self-tuning"}, {"budget": 0.05}, {"budget": 2.0},
              {"schedule": "constant"}]
)  # fmt: skip
def test_runs_under_other_rules_answer_no_target(rules: dict[str, Any], store: Store) -> None:
    fill(
        store,
        ["fm14"],
        ["adamw"],
        Protocol(**{"ruleset": "lr-only", "trials": 3, "tune_seeds": 1, "seeds": 3, **rules}),
    )
    results = Results(store)
    assert results.tables[0].row("adamw").finals
    assert {outcome.verdict for outcome in results.outcomes} == {targets.NOT_RUN, targets.NONE_PUBLISHED}


def test_a_preset_at_a_part_of_its_budget_answers_no_target(store: Store) -> None:
    name = "cifar10/adabelief-paper-vgg11"
    rules = Protocol("one-shot", seeds=2, budget=0.1)
    sweep = open_sweep(store, [PRESETS[name].task], [PRESETS[name].method], rules, [name])
    records = [made(settings) for settings in sweep[0].plan({}).wanted]
    store.runs.write_text("".join(canonical(record) + "\n" for record in records))
    assert {outcome.verdict for outcome in Results(store).outcomes} == {targets.NOT_RUN, targets.NONE_PUBLISHED}


def test_presets_are_reported_by_their_names_and_answer_their_targets(store: Store) -> None:
    name = "cifar10/adabelief-paper-vgg11"
    protocol = Protocol("one-shot", seeds=2)
    sweep = open_sweep(store, [PRESETS[name].task], [PRESETS[name].method], protocol, [name])
    records = [made(settings) for settings in sweep[0].plan({}).wanted]
    for record in records:
        record["metrics"]["accuracy"] = 0.91
    store.runs.write_text("".join(canonical(record) + "\n" for record in records))
    results = Results(store)
    assert results.methods == [name]
    outcome = next(outcome for outcome in results.outcomes if outcome.target.preset == name)
    assert outcome.verdict == targets.REPRODUCED
    assert len(outcome.scores) == 2
    assert name in to_html(results)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a screen."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_the_page_lives(browser: Any, store: Store, tmp_path: Path) -> None:
    fill(store, ["fm14", "photo-inr", "rotated"], list(dict.fromkeys(["adamw", "sgd", *sorted(METHODS)]))[:10],
         Protocol("tuned", trials=4, tune_seeds=1, seeds=8), lambda settings: settings.method == "cbo")  # fmt: skip
    file = tmp_path / "report.html"
    file.write_text(to_html(Results(store)), encoding="utf-8")
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith("file:") else complaints.append(request.url))
    page.goto(file.as_uri())

    def column(table: str, place: int) -> list[str]:
        found: list[str] = page.eval_on_selector_all(
            f"{table} tbody tr", f"rows => rows.map(r => r.cells[{place}].innerText)"
        )
        return found

    def numbers() -> list[float]:
        return [float(text.split()[0]) for text in column("#heat", 1) if text != "-"]

    assert numbers() != sorted(numbers())
    head = page.locator("#heat th.sort").nth(1)
    head.click()
    assert numbers() == sorted(numbers())
    assert head.get_attribute("aria-sort") == "ascending"
    head.press("Enter")
    assert numbers() == sorted(numbers(), reverse=True)
    assert column("#heat", 0) != sorted(column("#heat", 0))

    gradients, seconds = page.locator(".by-gradients").first, page.locator(".by-seconds").first
    assert gradients.is_visible()
    assert not seconds.is_visible()
    page.locator("#axis").click()
    assert page.locator("#axis").inner_text() == "x axis: seconds"
    assert seconds.is_visible()
    assert not gradients.is_visible()

    shown = lambda index: page.locator(f".by-seconds path.line.m{index}:not(.off)").count()  # noqa: E731
    assert shown(0) > 0
    assert shown(9) > 0  # this library's
    assert shown(7) == 0  # others', of which there are too many
    page.locator("[data-method=m0]").click()
    assert shown(0) == 0
    page.locator("#everyone").click()
    assert shown(0) == shown(1) > 0

    page.locator("#all summary").click()
    page.locator("#runs tbody tr").first.wait_for()  # they are drawn after the click
    assert len(column("#runs", 0)) == 300
    page.locator("#filter").fill("sgd final fm14")
    assert set(column("#runs", 0)) == {"fm14"}
    assert "sgd" in column("#runs", 1)
    assert set(column("#runs", 2)) == {"final"}
    page.locator("#runs th.sort").nth(6).click()
    metric = [float(text) for text in column("#runs", 6)]
    assert metric == sorted(metric)

    page.screenshot(path=tmp_path / "wide.png", full_page=True)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing sticks out on a phone
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    assert all((tmp_path / f"{name}.png").stat().st_size > 50_000 for name in ("wide", "phone"))
    assert complaints == []


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
