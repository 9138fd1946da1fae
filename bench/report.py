"""The report of a sweep: a console table, Markdown, or one HTML file that needs no network."""

import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench import figures, stats
from bench.progress import clock
from bench.protocol import FINAL_SEEDS, Cell, Plan, score
from bench.store import Record, Store
from bench.sweep import cells
from bench.tasks import TaskSpec

BASELINE = "adamw"
NOTHING = "-"
ENOUGH = 8  # seeds: of five, the interval is the range, and differences of one sign happen by chance once in sixteen


@dataclass(frozen=True)
class Sample:
    """The numbers of a few seeds and what may be said of them."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def iqm(self) -> float:
        return stats.iqm(self.values)

    @cached_property
    def interval(self) -> stats.Interval:
        """Of the median."""
        return stats.bootstrap(self.values)

    @property
    def p_improvement(self) -> float:
        return stats.p_improvement(self.values)

    @property
    def verdict(self) -> str:
        """Of differences: better or worse if the interval excludes 0, else tie; nothing where seeds are too few."""
        if self.n < ENOUGH:
            return ""
        low, high = self.interval
        if low <= 0 <= high:
            return "tie"
        return "better" if low > 0 else "worse"


@dataclass
class Row:
    """One method on one task."""

    cell: Cell
    plan: Plan
    curves: list[list[Record]]  # of the final runs
    difference: Sample | None = None  # to the baseline, seed by seed; positive is better

    @property
    def method(self) -> str:
        return self.cell.method

    @property
    def spec(self) -> TaskSpec:
        return self.cell.spec

    @property
    def finals(self) -> list[Record]:
        return final_runs(self.cell, self.plan)

    @property
    def lr(self) -> str:
        lr = (
            self.plan.selected
            if self.cell.searches and not self.plan.hopeless
            else self.cell.optimizer.defaults.get("lr")
        )
        return NOTHING if lr is None else f"{lr:g}"

    def scores(self, runs: list[Record] | None = None) -> dict[int, float]:
        """The metric by seed."""
        return {run["settings"]["seed"]: score(run, self.spec) for run in (self.finals if runs is None else runs)}

    @property
    def sample(self) -> Sample | None:
        return Sample(tuple(self.scores().values())) if self.finals else None

    @property
    def default(self) -> Sample | None:
        return Sample(tuple(self.scores(self.plan.default).values())) if self.plan.default else None

    @property
    def failed(self) -> int:
        return sum(run["status"] != "ok" for run in self.finals)

    @property
    def trials(self) -> list[Record]:
        return [run for runs in self.plan.tuning.values() for run in runs]

    @property
    def trials_failed(self) -> int:
        return sum(run["status"] != "ok" for run in self.trials)

    @property
    def reached(self) -> list[float]:
        """The epochs to the target of the final runs that reached it and did not fail later."""
        runs = (run for run in self.finals if run["status"] == "ok")
        return [run["to_target"] for run in runs if run["to_target"] is not None]

    @property
    def epochs_to_target(self) -> float | None:
        """The median over all final runs; None if half of them or more never got there."""
        missing = [math.inf] * (len(self.finals) - len(self.reached))
        middle = statistics.median([*self.reached, *missing]) if self.finals else math.inf
        return middle if math.isfinite(middle) else None

    def cost(self, key: str) -> float | None:
        values = [run[key] for run in self.finals if run.get(key) is not None]
        return statistics.median(values) if values else None

    @property
    def state_per_parameter(self) -> float | None:
        run = next((run for run in self.finals if run["status"] != "error"), None)
        return run["state_bytes"] / run["parameters"] if run else None


def final_runs(cell: Cell, plan: Plan) -> list[Record]:
    """The runs that count: at the selected learning rate, or at the defaults where nothing can be selected."""
    return plan.final if cell.searches and not plan.hopeless else plan.default


@dataclass
class Table:
    """One task and its methods in the order of the sweep, which ranks nothing."""

    spec: TaskSpec
    rows: list[Row]
    baseline: str

    @property
    def saturated(self) -> bool:
        return "saturated" in self.spec.tags

    def verdict(self, row: Row) -> str:
        """What the difference of a row to the baseline shows; nothing where all methods reach the top."""
        return row.difference.verdict if row.difference and not self.saturated else ""

    @property
    def panels(self) -> list[tuple[str, str, str]]:
        """Heading, drawing and note of each figure; the drawing is empty where there is nothing to draw."""
        n = max((len(row.finals) for row in self.rows), default=0)
        trials = max((len(runs) for row in self.rows for runs in row.plan.tuning.values()), default=0)
        metric = self.spec.metric
        return [
            (f"Test {metric}", figures.curves(self, metric),
             f"Median and range over n = {n} seeds; dotted: the target. The axis spaces the error logarithmically."),
            ("Training loss", figures.curves(self, "train_loss"), f"Median and range over n = {n} seeds."),
            ("Learning rate", figures.sensitivity(self),
             f"Validation {metric}, mean of n = {trials} tuning seed(s); outlined: selected; cross: a seed failed."),
            (f"Difference to {self.baseline}", figures.differences(self),
             f"Test {metric} seed by seed, n = {n}; diamond and bar: median and its bootstrap interval."),
        ]  # fmt: skip

    @property
    def binomial_se(self) -> float | None:
        """The standard error that one run has from its finite test split alone, at the middle of the medians."""
        medians = [row.sample.median for row in self.rows if row.sample]
        return stats.binomial_se(statistics.median(medians), self.spec.n_test) if medians else None


class Results:
    """All that a report shows, computed from a results folder.

    Raises:
        FileNotFoundError: if the folder holds no sweep.
    """

    def __init__(self, store: Store) -> None:
        manifest = store.manifest()
        if manifest is None:
            raise FileNotFoundError(f"no sweep in {store.folder}, which should hold manifest.json and runs.jsonl")
        self.store, self.manifest = store, manifest
        self.records = store.records()
        self.cells = cells(manifest)
        self.protocol = self.cells[0].protocol
        self.methods: list[str] = manifest["methods"]
        self.baseline = BASELINE if BASELINE in self.methods else self.methods[0]
        self.tables = [self._table(task) for task in manifest["tasks"]]

    def _table(self, task: str) -> Table:
        rows = []
        for cell in self.cells:
            if cell.task == task:
                plan = cell.plan(self.records)
                rows.append(Row(cell, plan, [self.store.curve(run["id"]) for run in final_runs(cell, plan)]))
        base = next(row for row in rows if row.method == self.baseline)
        for row in rows:
            shared = [seed for seed in row.scores() if seed in base.scores()]
            if row is not base and shared:
                gains = (row.spec.sign * (row.scores()[seed] - base.scores()[seed]) for seed in shared)
                row.difference = Sample(tuple(gains))
        return Table(rows[0].spec, rows, self.baseline)

    @property
    def failures(self) -> int:
        return sum(record["status"] != "ok" for record in self.records.values())

    @property
    def final_failures(self) -> int:
        return sum(record["status"] != "ok" and record["phase"] == "final" for record in self.records.values())

    @property
    def every_run(self) -> list[Record]:
        """All records by task, method, phase, learning rate and seed."""

        def place(record: Record) -> tuple[Any, ...]:
            settings = record["settings"]
            order = self.manifest["tasks"].index(settings["task"]), self.methods.index(settings["method"])
            return *order, record["phase"] == "final", settings["hp"].get("lr", 0.0), settings["seed"]

        return sorted(self.records.values(), key=place)

    @property
    def left(self) -> int:
        return sum(row.plan.left for table in self.tables for row in table.rows)

    @property
    def seconds(self) -> float:
        return sum(record.get("wall_s", 0) for record in self.records.values())

    @property
    def environments(self) -> list[Record]:
        """The distinct machines and versions of the runs, with how many runs each had and their load."""
        groups: dict[str, Record] = {}
        for record in self.records.values():
            env = {key: value for key, value in record["env"].items() if key != "load"}
            group = groups.setdefault(repr(env), {**env, "runs": 0, "loads": []})
            group["runs"] += 1
            group["loads"].append(record["env"].get("load", 0.0))
        for group in groups.values():
            loads = group.pop("loads")
            group |= {"load_median": statistics.median(loads), "load_max": max(loads)}
        return list(groups.values())

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before believing the tables."""
        found = []
        if self.left:
            found.append(f"The sweep is not complete: {self.left} runs are missing.")
        for table in self.tables:
            for row in table.rows:
                where = f"{row.method} on {row.spec.name}"
                if row.plan.edge:
                    best = max(row.plan.scores, key=row.plan.scores.__getitem__)
                    found.append(f"{where}: the best learning rate tried, {best:g}, is the last of its grid.")
                for status, count in Counter(run["status"] for run in row.finals).items():
                    if status != "ok":
                        found.append(f"{where}: {count} of {len(row.finals)} final runs {FATES[status]}.")
        for env in self.environments:
            if env["load_median"] > 1.25 * env["cores"]:
                found.append(f"The load was {env['load_median']:g} on {env['cores']} cores: times are inflated.")
        return found

    @property
    def rules(self) -> str:
        """The protocol in a sentence."""
        rules = self.protocol
        search = "no search, default hyper-parameters"
        if rules.ruleset == "lr-only":
            search = (
                f"learning rate alone searched, k = {rules.trials} half-decades with {rules.tune_seeds} seed(s) each,"
                " selected on validation by the one-standard-error rule"
            )
        return (
            f"ruleset {rules.ruleset} ({search}); {rules.schedule} schedule, {rules.budget:g}x budget;"
            f" n = {rules.seeds} fresh final seeds from {FINAL_SEEDS}, the same for all methods"
        )


FATES = {"diverged": "diverged", "chance": "ended at chance", "error": "raised an error"}

COLUMNS = (
    "method",
    "lr",
    "median [min, max]",
    "bootstrap interval",
    "at default lr",
    "v. baseline [interval]",
    "failed",
    "epochs to target",
    "s/run",
    "B/param",
)
ESSENTIAL = {"method", "lr", "median [min, max]", "v. baseline [interval]", "failed"}
WIDE = 150  # characters that all columns need


def percent(value: float | None, digits: int = 1, sign: str = "") -> str:
    """A rate as a percentage without its sign."""
    return NOTHING if value is None else f"{100 * value:{sign}.{digits}f}"


def decimals(value: float | None, digits: int) -> str:
    """A number with so many decimals."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def interval(pair: stats.Interval, sign: str = "") -> str:
    """A pair of rates as percentages in brackets."""
    return f"[{100 * pair[0]:{sign}.1f}, {100 * pair[1]:{sign}.1f}]"


def tabulate(table: Table) -> list[list[str]]:
    """The cells of a task's table as text, one row for each method, under ``COLUMNS``."""
    lines = []
    for row in table.rows:
        sample, difference, target = row.sample, row.difference, row.epochs_to_target
        against = "baseline" if row.method == table.baseline else NOTHING
        if difference:
            numbers = percent(difference.median, 1, "+"), interval(difference.interval, "+")
            against = " ".join((*numbers, table.verdict(row))).rstrip()
        seconds, state = row.cost("wall_s"), row.state_per_parameter
        lines.append([
            row.method,
            row.lr,
            f"{percent(sample.median)} {interval((min(sample.values), max(sample.values)))}" if sample else NOTHING,
            interval(sample.interval) if sample else NOTHING,
            percent(row.default.median) if row.default else NOTHING,
            against,
            f"{row.failed}/{len(row.finals)}",
            f"{decimals(target, 1)} ({len(row.reached)}/{len(row.finals)})",
            decimals(seconds, 1),
            decimals(state, 1),
        ])  # fmt: skip
    return lines


def caption(table: Table) -> str:
    """What the numbers of a task's table are."""
    spec = table.spec
    n = max((len(row.finals) for row in table.rows), default=0)
    error = f", binomial SE of a run {percent(table.binomial_se)}" if table.binomial_se is not None else ""
    note = "; saturated: shows speed, ranks nothing" if table.saturated else ""
    if not table.saturated and n < ENOUGH:
        note = f"; differences get a verdict from {ENOUGH} seeds on"
    return f"Test {spec.metric} in %, n = {n} seeds{error}; target {percent(spec.target, 0)}%{note}"


def to_console(results: Results) -> None:
    """Writes the tables to standard output, with rich if it is there."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as Grid
    except ImportError:
        sys.stdout.write(to_markdown(results) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    shown = [i for i, column in enumerate(COLUMNS) if console.width >= WIDE or column in ESSENTIAL]
    for table in results.tables:
        console.print(f"\n[bold]{table.spec.name}[/]. {caption(table)}", highlight=False)
        grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
        for i in shown:
            grid.add_column(COLUMNS[i], justify="right" if i else "left")
        for line in tabulate(table):
            grid.add_row(*(line[i] for i in shown))
        console.print(grid)
    console.print(
        f"{len(results.records)} runs, {clock(results.seconds)} of training; {results.rules}", highlight=False
    )
    for warning in results.warnings:
        console.print(f"! {warning}", style="yellow", highlight=False)


def to_markdown(results: Results) -> str:
    """The tables as Markdown."""
    blocks = []
    for table in results.tables:
        rows = [COLUMNS, ["---"] * len(COLUMNS), *tabulate(table)]
        blocks.append(
            f"**{table.spec.name}**. {caption(table)}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)
        )
    env = results.environments[0] if results.environments else {}
    machine = ", ".join(f"{key} {env[key]}" for key in ("cpu", "cores", "threads", "torch") if key in env)
    blocks.append(f"{len(results.records)} runs; {results.rules}; {machine}.")
    if results.warnings:
        blocks.append("\n".join(f"- {warning}" for warning in results.warnings))
    return "\n\n".join(blocks)


def to_html(results: Results) -> str:
    """The whole report as one HTML page with its style, script and drawings inside."""
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)  # fmt: skip
    environment.filters |= {"percent": percent, "interval": interval, "clock": clock, "decimals": decimals}
    template = environment.get_template("report.html.jinja")
    return template.render(results=results, figures=figures, caption=caption)
