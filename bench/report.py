"""The report of a sweep: a console table, Markdown, or one HTML file that needs no network."""

import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bench import figures, stats
from bench.export import hyper_parameters
from bench.progress import clock
from bench.protocol import FINAL_SEEDS, RAISED, SELF_TUNING, Cell, Plan, Trial, score
from bench.store import Record, Store
from bench.sweep import cells
from bench.targets import READABLE, Outcome, outcomes
from bench.tasks import TASKS, TaskSpec

BASELINE = "adamw"
NOTHING = "-"
UNREADABLE = "The targets are in a TOML file, which Python reads from 3.11 on."
SHORT = {"weight_decay": "wd"}
UNITS = {"psnr": "dB", "log_gap": "powers of ten of what is left to gain"}  # of metrics that are no rates
SHOWN = 8  # methods that the figures show at first
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
        return self.cell.preset or self.cell.method

    @property
    def spec(self) -> TaskSpec:
        return self.cell.spec

    @property
    def tuned(self) -> bool:
        """Whether the final runs are others than those with the defaults."""
        return (self.cell.searches or self.cell.protocol.ruleset == "self-tuning") and not self.plan.hopeless

    @property
    def finals(self) -> list[Record]:
        """The runs that count: with what was chosen, or with the defaults where nothing can be chosen."""
        return self.plan.final if self.tuned else self.plan.default

    @property
    def chosen(self) -> str:
        """The hyper-parameters that were searched, or the learning rate of the defaults."""
        if self.plan.chosen is not None and self.tuned:
            return ", ".join(f"{SHORT.get(name, name)} {short(value)}" for name, value in self.plan.chosen.items())
        if self.cell.searches and not self.plan.hopeless:
            return NOTHING  # not yet
        lr = self.cell.defaults.get("lr")
        return NOTHING if lr is None else f"lr {lr:g}"

    def scores(self, runs: list[Record] | None = None) -> dict[int, float]:
        """The metric by seed."""
        return {run["settings"]["seed"]: score(run, self.spec) for run in (self.finals if runs is None else runs)}

    def sample_of(self, runs: list[Record]) -> Sample | None:
        """Their metric, with failures at chance; None where all raised, for then nothing was trained."""
        trained = any(run["status"] not in RAISED for run in runs)
        return Sample(tuple(self.scores(runs).values())) if trained else None

    @cached_property
    def sample(self) -> Sample | None:
        return self.sample_of(self.finals)

    @cached_property
    def default(self) -> Sample | None:
        return self.sample_of(self.plan.default)

    @property
    def failed(self) -> int:
        return sum(run["status"] != "ok" for run in self.finals)

    @property
    def trials(self) -> list[Record]:
        return [run for trial in self.plan.trials for run in trial.runs]

    @property
    def trials_failed(self) -> int:
        return sum(run["status"] != "ok" for run in self.trials)

    @property
    def passed(self) -> float | None:
        """The share of final runs that end at the target or beyond it."""
        if not self.finals:
            return None
        sign, target = self.spec.sign, self.spec.target
        return sum(r["status"] == "ok" and sign * score(r, self.spec) >= sign * target for r in self.finals) / len(
            self.finals
        )

    @property
    def reached(self) -> list[float]:
        """The epochs to the target of the final runs that reached it and did not fail later."""
        return [epochs for epochs in self.to_target.values() if math.isfinite(epochs)]

    @property
    def to_target(self) -> dict[int, float]:
        """The epochs to the target by seed, infinite for runs that failed or never got there."""
        found = {}
        for run in self.finals:
            epochs = run.get("to_target") if run["status"] == "ok" else None
            found[run["settings"]["seed"]] = math.inf if epochs is None else epochs
        return found

    @property
    def epochs_to_target(self) -> float | None:
        """The median over all final runs; None if half of them or more never got there."""
        middle = statistics.median(self.to_target.values()) if self.finals else math.inf
        return middle if math.isfinite(middle) else None

    def merit(self, trial: Trial) -> float:
        """The score of a trial, more is better."""
        return -math.inf if trial.score is None else self.spec.sign * trial.score

    @cached_property
    def by_rate(self) -> dict[float, Trial]:
        """The best trial at each learning rate."""
        best: dict[float, Trial] = {}
        for trial in sorted(self.plan.trials, key=lambda trial: trial.lr):
            if "lr" in trial.hp and trial.score is not None:
                best[trial.lr] = max(best.get(trial.lr, trial), trial, key=self.merit)
        return best

    def best_of(self) -> list[float]:
        """The expected best validation score of k trials drawn from those there are, for k = 1, 2, .."""
        sign = self.spec.sign
        scores = sorted(sign * trial.score for trial in self.plan.trials if trial.score is not None)
        n = len(scores)
        return [
            sign * sum(value * math.comb(i, k - 1) for i, value in enumerate(scores)) / math.comb(n, k)
            for k in range(1, n + 1)
        ]

    def cost(self, key: str) -> float | None:
        """The median over the final runs, of a field or of a count."""
        values = [value for run in self.finals if (value := run.get(key, run.get("counts", {}).get(key))) is not None]
        return statistics.median(values) if values else None

    @property
    def state_per_parameter(self) -> float | None:
        run = next((run for run in self.finals if run["status"] not in RAISED), None)
        return run["state_bytes"] / run["parameters"] if run else None


def short(value: Any) -> str:
    """A hyper-parameter as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass
class Table:
    """One task and its methods in the order of the sweep, which ranks nothing."""

    spec: TaskSpec
    rows: list[Row]
    baseline: str
    places: dict[str, int] = field(default_factory=dict)  # of all methods of the sweep: their colours and marks

    @property
    def saturated(self) -> bool:
        return "saturated" in self.spec.tags

    @property
    def unit(self) -> str:
        return "%" if self.spec.rate else UNITS.get(self.spec.metric, self.spec.metric)

    @property
    def axis(self) -> str:
        """What an axis of the metric is labelled."""
        return f"{name_of(self.spec.metric)}, %" if self.spec.rate else name_of(self.spec.metric)

    def row(self, method: str) -> Row | None:
        return next((row for row in self.rows if row.method == method), None)

    def show(self, value: float | None, sign: str = "", digits: int | None = None) -> str:
        """A metric or a difference of two, in the unit of the task."""
        if value is None:
            return NOTHING
        return percent(value, 1 if digits is None else digits, sign) if self.spec.rate else f"{value:{sign}.2f}"

    def interval(self, pair: stats.Interval, sign: str = "") -> str:
        return f"[{self.show(pair[0], sign)}, {self.show(pair[1], sign)}]"

    def verdict(self, row: Row) -> str:
        """What the difference of a row to the baseline shows; nothing where all methods reach the top."""
        return row.difference.verdict if row.difference and not self.saturated else ""

    @cached_property
    def best(self) -> float | None:
        """The best median."""
        medians = [row.sample.median for row in self.rows if row.sample]
        return max(medians, key=lambda value: self.spec.sign * value) if medians else None

    @cached_property
    def error(self) -> float | None:
        """The standard error of one run from what it was measured on, at the best median and never zero."""
        if self.best is None:
            return None
        n = max(self.spec.n_test, 1)
        return self.spec.error(min(max(self.best, 0.5 / n), 1 - 0.5 / n) if self.spec.rate else self.best, n)

    def heat(self, row: Row | None) -> str:
        """How many standard errors of a run a median is from the best, as a class of colour; none where that ranks."""
        if row is None or row.sample is None or self.best is None or not self.error:
            return ""
        if row.failed * 2 > len(row.finals):
            return "h4"
        if self.saturated:
            return ""
        behind = self.spec.sign * (self.best - row.sample.median) / self.error
        return f"h{sum(behind > limit for limit in HEAT)}"

    @property
    def panels(self) -> list[tuple[str, str, str]]:
        """Heading, drawing and note of each figure; the drawing is empty where there is nothing to draw."""
        n = max((len(row.finals) for row in self.rows), default=0)
        trials = max((len(trial.runs) for row in self.rows for trial in row.plan.trials), default=0)
        metric, named = self.spec.metric, name_of(self.spec.metric)
        held = "Test " if self.spec.n_test else ""
        nines = " The axis spaces the error logarithmically." if self.spec.rate else ""
        return [
            (f"{held}{named[0].upper() * (not held) or named[0]}{named[1:]}", figures.both_axes(self, metric),
             f"Median and range over n = {n} seeds; dotted: the target.{nines}"),
            ("Training loss", figures.both_axes(self, "train_loss"), f"Median and range over n = {n} seeds."),
            ("Learning rate", figures.sensitivity(self),
             f"Validation {named}, best at each rate, mean of n = {trials} tuning seed(s); outlined: chosen; cross: a"
             " seed failed."),
            ("Search budget", figures.budget(self),
             f"Expected best validation {named} of k trials, drawn from those that there are."),
            (f"Difference to {self.baseline}", figures.differences(self),
             f"{held}{named} seed by seed, n = {n}; diamond and bar: median and its bootstrap interval. Right is"
             " better."),
            ("Defaults and tuned", figures.defaults(self), f"Medians of n = {n} seeds; hollow: with the defaults."),
        ]  # fmt: skip


HEAT = (1, 3, 10)  # standard errors behind the best at which a cell changes its colour


def name_of(metric: str) -> str:
    """A metric in words."""
    return {"psnr": "PSNR", "log_gap": "log10 of the gap"}.get(metric, metric)


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
        self.methods: list[str] = list(dict.fromkeys(cell.preset or cell.method for cell in self.cells))
        self.baseline = BASELINE if BASELINE in self.methods else self.methods[0]
        self.every_table = [self._table(task) for task in dict.fromkeys(cell.task for cell in self.cells)]
        self.tables = [table for table in self.every_table if "diagnostic" not in table.spec.tags]
        self.diagnostics = [table for table in self.every_table if "diagnostic" in table.spec.tags]

    def _table(self, task: str) -> Table:
        rows = []
        for cell in self.cells:
            if cell.task == task:
                row = Row(cell, cell.plan(self.records), [])
                row.curves = [self.store.curve(run["id"]) for run in row.finals]
                rows.append(row)
        base = next((row for row in rows if row.method == self.baseline), rows[0])
        for row in rows:
            shared = [seed for seed in row.scores() if seed in base.scores()]
            if row is not base and shared and row.sample and base.sample:
                gains = (row.spec.sign * (row.scores()[seed] - base.scores()[seed]) for seed in shared)
                row.difference = Sample(tuple(gains))
        return Table(rows[0].spec, rows, base.method, {method: i for i, method in enumerate(self.methods)})

    @property
    def first(self) -> set[int]:
        """The places of the methods that the figures show at first: the baseline, then this library's, then others."""

        def rank(place: int) -> tuple[bool, bool, int]:
            cell = next(cell for cell in self.cells if (cell.preset or cell.method) == self.methods[place])
            return self.methods[place] != self.baseline, not cell.optimizer.package.startswith("optimzoo"), place

        return set(sorted(range(len(self.methods)), key=rank)[:SHOWN])

    def spec_of(self, record: Record) -> TaskSpec:
        return TASKS[record["settings"]["task"]].spec

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """The published numbers and what came of them here."""
        finals = {
            (row.spec.name, row.cell.method): row.finals
            for table in self.every_table
            for row in table.rows
            if row.plan.chosen is not None and (self.protocol.budget, self.protocol.schedule) == (1, "cosine")
        }
        return outcomes(self.records.values(), finals)

    @cached_property
    def profile(self) -> dict[str, list[float]]:
        """For each method the ratio of its gradients to the target to the fewest of all, by task and seed; sorted.

        Only tasks on which two methods have been run and one got to the target are there.
        """
        ratios: dict[str, list[float]] = defaultdict(list)
        for table in self.tables:
            rows = [row for row in table.rows if row.finals]
            seeds = set().union(*(row.to_target for row in rows)) if len(rows) > 1 else set()
            for seed in seeds:
                fewest = min(row.to_target.get(seed, math.inf) for row in rows)
                for row in rows:
                    mine = row.to_target.get(seed, math.inf)
                    if math.isfinite(fewest):
                        ratios[row.method].append(mine / fewest if fewest else math.inf)
        return {method: sorted(found) for method, found in ratios.items()}

    @property
    def fates(self) -> list[tuple[Row, Counter[str]]]:
        """The rows with failed runs, and how many failed in what way while tuning or at the end."""
        found = []
        for table in self.every_table:
            for row in table.rows:
                runs = {run["id"]: run for run in [*row.trials, *row.plan.default, *row.finals]}
                count = Counter(f"{run['phase']} {run['status']}" for run in runs.values() if run["status"] != "ok")
                if count:
                    found.append((row, count))
        return found

    @property
    def errors(self) -> list[tuple[str, int, list[str]]]:
        """What was raised, how often, and by which methods."""
        raised: dict[str, list[str]] = defaultdict(list)
        for record in self.records.values():
            if record["status"] in RAISED:
                raised[str(record["error"])].append(record["settings"]["method"])
        return [(text, len(by), sorted(set(by))) for text, by in sorted(raised.items(), key=lambda item: -len(item[1]))]

    @property
    def runs_json(self) -> str:
        """All runs as rows for the page's script, which shows what is asked for."""
        rows = []
        for run in self.every_run:
            settings, spec = run["settings"], self.spec_of(run)
            metrics, counts = run.get("metrics") or {}, run.get("counts") or {}
            value, loss, step = metrics.get(spec.metric), metrics.get("train_loss"), run.get("step_ms")
            rows.append([
                settings["task"], settings["method"], run["phase"], hyper_parameters(run), settings["seed"],
                run["status"] + (f": {run['error']}" if run["error"] else ""),
                None if value is None else round(100 * value if spec.rate else value, 3),
                None if loss is None else float(f"{loss:.4g}"),
                counts.get("steps"), counts.get("samples") and round(counts["samples"]),
                run.get("wall_s") and round(run["wall_s"], 2), step and round(step, 3),
                settings["package"], run.get("weights"), run["id"],
            ])  # fmt: skip
        return json.dumps(rows, separators=(",", ":")).replace("<", "\\u003c")

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
            order = tasks.get(settings["task"], len(tasks)), methods.get(settings["method"], len(methods))
            return *order, record["phase"] == "final", settings["hp"].get("lr", 0.0), settings["seed"]

        tasks = {table.spec.name: i for i, table in enumerate(self.every_table)}
        methods = {cell.method: i for i, cell in enumerate(self.cells)}

        return sorted(self.records.values(), key=place)

    @property
    def left(self) -> int:
        return sum(row.plan.left for table in self.every_table for row in table.rows)

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
        edges: dict[str, list[str]] = defaultdict(list)
        lost: dict[str, list[str]] = defaultdict(list)
        for table in self.every_table:
            for row in table.rows:
                if row.plan.edge and row.by_rate:
                    best = max(row.by_rate.values(), key=row.merit)
                    edges[row.method].append(f"{row.spec.name} ({best.lr:g})")
                bad = Counter(run["status"] for run in row.finals if run["status"] != "ok")
                for status, count in bad.items():
                    lost[row.method].append(
                        f"{count} of {len(row.finals)} final runs on {row.spec.name} {FATES[status]}"
                    )
        found += [
            f"{method}: the best learning rate tried is the last of its grid on {', '.join(tasks)}."
            for method, tasks in edges.items()
        ]
        found += [f"{method}: {'; '.join(fates)}." for method, fates in lost.items()]
        if self.tables and self.protocol.seeds < ENOUGH and len(self.methods) > 1:
            found.append(f"Differences get no verdict: that needs {ENOUGH} seeds, and there are {self.protocol.seeds}.")
        for env in self.environments:
            if env["load_median"] > 1.25 * (env["cores"] or 1):
                found.append(f"The load was {env['load_median']:g} on {env['cores']} cores: times are inflated.")
        if len({(env["cpu"], env.get("device")) for env in self.environments}) > 1:
            found.append("The runs are from several machines: do not compare their times.")
        return found

    @property
    def rules(self) -> str:
        """The protocol in a sentence."""
        rules = self.protocol
        what = {"lr-only": "learning rate alone", "tuned": "learning rate and one more hyper-parameter"}
        picked = {"1se": "by the one-standard-error rule", "best": "as the best"}
        search = "no search, default hyper-parameters"
        if rules.ruleset in what:
            search = (
                f"{what[rules.ruleset]} searched, k = {rules.trials} trials by {rules.sampler} with {rules.tune_seeds}"
                f" seed(s) each, chosen on validation {picked[rules.select]}"
            )
        elif rules.ruleset == "self-tuning":
            search = f"no search, default hyper-parameters, {SELF_TUNING:g}x the budget"
        extra = f", {rules.amp}" if rules.amp != "off" else ""
        extra += f", {rules.world} processes by {rules.parallel}" if rules.world > 1 else ""
        if self.manifest["presets"]:
            return f"published recipes; n = {rules.seeds} seeds from {FINAL_SEEDS}{extra}"
        return (
            f"ruleset {rules.ruleset} ({search}); {rules.schedule} schedule, {rules.budget:g}x budget{extra};"
            f" n = {rules.seeds} fresh final seeds from {FINAL_SEEDS}, the same for all methods"
        )


FATES = {
    "diverged": "diverged",
    "chance": "ended at chance",
    "error": "raised an error",
    "oom": "ran out of memory",
    "timeout": "ran out of time",
}

COLUMNS = (
    "method",
    "chosen",
    "median [min, max]",
    "bootstrap interval",
    "with defaults",
    "v. baseline [interval]",
    "failed",
    "epochs to target",
    "s/run",
    "B/param",
)
ESSENTIAL = {"method", "chosen", "median [min, max]", "v. baseline [interval]", "failed"}
WIDE = 150  # characters that all columns need


def percent(value: float | None, digits: int = 1, sign: str = "") -> str:
    """A rate as a percentage without its sign."""
    return NOTHING if value is None else f"{100 * value:{sign}.{digits}f}"


def decimals(value: float | None, digits: int) -> str:
    """A number with so many decimals."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def tabulate(table: Table) -> list[list[str]]:
    """The cells of a task's table as text, one row for each method, under ``COLUMNS``."""
    lines = []
    for row in table.rows:
        sample, difference, target = row.sample, row.difference, row.epochs_to_target
        against = "baseline" if row.method == table.baseline else NOTHING
        if difference:
            numbers = table.show(difference.median, "+"), table.interval(difference.interval, "+")
            against = " ".join((*numbers, table.verdict(row))).rstrip()
        lines.append([
            row.method,
            row.chosen,
            f"{table.show(sample.median)} {table.interval((min(sample.values), max(sample.values)))}"
            if sample else NOTHING,
            table.interval(sample.interval) if sample else NOTHING,
            table.show(row.default.median) if row.default else NOTHING,
            against,
            f"{row.failed}/{len(row.finals)}",
            f"{decimals(target, 1)} ({len(row.reached)}/{len(row.finals)})",
            decimals(row.cost("wall_s"), 1),
            decimals(row.state_per_parameter, 1),
        ])  # fmt: skip
    return lines


def caption(table: Table) -> str:
    """What the numbers of a task's table are."""
    spec = table.spec
    n = max((len(row.finals) for row in table.rows), default=0)
    error = f", standard error of a run {table.show(table.error)}" if table.error is not None else ""
    note = "; saturated: shows speed, ranks nothing" if table.saturated else ""
    if not table.saturated and n < ENOUGH:
        note = f"; differences get a verdict from {ENOUGH} seeds on"
    target = f"{table.show(spec.target, '', 0)}{'%' if spec.rate else ''}"
    better = "" if spec.sign > 0 else ", less is better"
    what = f"{'Test ' if spec.n_test else ''}{name_of(spec.metric)}"
    unit = "" if spec.metric == "log_gap" else f" in {table.unit}"
    return f"{what[0].upper()}{what[1:]}{unit}{better}, n = {n} seeds{error}; target {target}{note}"


MARKS = {
    "better": "\u00a0▲",
    "worse": "\u00a0▼",
    "tie": "\u00a0=",
}  # beside a median, what the difference to the baseline shows


def glance(results: Results) -> list[list[str]]:
    """The methods by task: the median, a mark for its verdict, and how many final runs failed."""
    lines = []
    for method in results.methods:
        cells = [method]
        for table in results.tables:
            row = table.row(method)
            if row is None or row.sample is None:
                cells.append(NOTHING)
                continue
            failed = f", {row.failed}\u00a0✗" if row.failed else ""
            cells.append(table.show(row.sample.median) + MARKS.get(table.verdict(row), "") + failed)
        lines.append(cells)
    return lines


def pass_rates(results: Results) -> list[list[str]]:
    """The diagnostic tasks by method: the share of final runs that get to the target."""
    lines = []
    for method in results.methods:
        rows = [table.row(method) for table in results.diagnostics]
        lines.append([method, *(percent(row.passed, 0) if row else NOTHING for row in rows)])
    return lines


def targets(results: Results | None) -> str:
    """The numbers of others, and those of a folder beside them, as Markdown."""
    if not READABLE:
        return UNREADABLE
    found = results.outcomes if results else outcomes((), {})
    rows = [["method", "setting", "value", "n", "here", "n", "deviation", "verdict", "caveat", "source"]]
    rows.append(["---"] * len(rows[0]))
    for outcome in found:
        target = outcome.target
        rows.append([
            target.method, target.setting, percent(target.value, 2), str(target.n or NOTHING),
            percent(outcome.median, 2), str(len(outcome.scores) or NOTHING), percent(outcome.deviation, 2, "+"),
            outcome.verdict, target.caveat or NOTHING, target.source,
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
    if results.diagnostics:
        console.print("\n[bold]diagnostic[/]. Final runs that get to the target, in %", highlight=False)
        grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("task", *results.methods):
            grid.add_column(name, justify="left" if name == "task" else "right")
        rates = [line[1:] for line in pass_rates(results)]
        for table, line in zip(results.diagnostics, zip(*rates, strict=True), strict=True):
            grid.add_row(table.spec.name, *line)
        console.print(grid)
    console.print(
        f"{len(results.records)} runs, {clock(results.seconds)} of training; {results.rules}", highlight=False
    )
    for warning in results.warnings:
        console.print(f"! {warning}", style="yellow", highlight=False)


def to_markdown(results: Results) -> str:
    """The tables as Markdown; before them, where there are several, the medians at a glance."""
    blocks = []
    if len(results.tables) > 1:
        n = max(len(row.finals) for table in results.tables for row in table.rows)
        heads = ["method"]
        for table in results.tables:
            unit = "" if table.spec.metric == "log_gap" else f", {table.unit}"
            heads.append(f"{table.spec.name}{' (saturated)' if table.saturated else ''}{unit}")
        rows = [heads, ["---", *["--:"] * len(results.tables)], *glance(results)]
        blocks.append(
            f"**At a glance**. Medians of n = {n} final runs; ▲ better, ▼ worse than {results.baseline}, = neither, by"
            " the interval of the differences seed by seed; ✗ runs that failed\n\n"
            + "\n".join(f"| {' | '.join(row)} |" for row in rows)
        )
    for table in results.tables:
        rows = [COLUMNS, ["---"] * len(COLUMNS), *tabulate(table)]
        blocks.append(
            f"**{table.spec.name}**. {caption(table)}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)
        )
    if results.diagnostics:
        head = ["method", *(table.spec.name for table in results.diagnostics)]
        rows = [head, ["---"] * len(head), *pass_rates(results)]
        blocks.append(
            "**diagnostic**. Final runs that get to the target, in %\n\n"
            + "\n".join(f"| {' | '.join(row)} |" for row in rows)
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
    environment.filters |= {"percent": percent, "clock": clock, "decimals": decimals, "bytes": size}
    template = environment.get_template("report.html.jinja")
    shown = {
        "figures": figures,
        "caption": caption,
        "name_of": name_of,
        "fates": FATES,
        "heat": HEAT,
        "unreadable": UNREADABLE,
    }
    shown["profile"] = figures.profile(results)
    return template.render(results=results, **shown)


def size(count: float | None) -> str:
    """A number of bytes."""
    if count is None:
        return NOTHING
    unit = next((i for i in range(3) if count < 1024 ** (i + 1)), 3)
    return f"{count / 1024**unit:.{min(unit, 1)}f} {('B', 'KB', 'MB', 'GB')[unit]}"
