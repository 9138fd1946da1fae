"""The figures of a report, each a function from its data to inline SVG; empty where there is nothing to draw."""

import bisect
import math
import statistics
from typing import TYPE_CHECKING

from markupsafe import Markup

from bench import svg

if TYPE_CHECKING:
    from bench.report import Results, Row, Table

MARKERS = ("circle", "square", "triangle", "diamond", "flag", "plus")
FARTHEST = 4.0  # ratio to the fewest gradients at which a performance profile ends


def style(index: int) -> str:
    """The classes of the method at a place of the sweep: colour, dashes, and the name that the legend hides it by."""
    return f"c{index % 8} d{index // 8 % 3} m{index}"


def marker(index: int) -> str:
    """The mark that tells a method from others of its colour."""
    return MARKERS[(index + index // 8) % len(MARKERS)]


def key(index: int) -> Markup:
    """The mark of a method, for a legend or a table."""
    mark = f'<path class="mark c{index % 8}" d="{svg.MARKERS[marker(index)]}"/>'
    return Markup(f'<svg class="key" viewBox="-6 -6 12 12">{mark}</svg>')


def _aligned(row: "Row", field: str, fill: float, clock: str) -> tuple[list[float], list[list[float]]]:
    """Epochs or seconds, and at each the field's value in every final run; a run that stopped goes on with ``fill``.

    The point before the first step is left out: it is the same for all and would spread the axis.
    """
    curves = [curve for curve in row.curves if curve]
    longest = max(curves, key=len, default=[])
    if not longest:
        return [], []
    budget = row.finals[0]["settings"]["budget"] * (row.cell.recipe or row.spec).epochs
    epoch = max(longest[-1]["samples"] / budget, 1e-9)
    places, values = [], []
    for place, point in enumerate(longest[1:], 1):
        reached = [curve[place][field] if place < len(curve) else None for curve in curves]
        seconds = [curve[place]["wall_s"] for curve in curves if place < len(curve)]
        places.append(point["samples"] / epoch if clock == "samples" else statistics.median(seconds))
        values.append([fill if value is None else value for value in reached])
    return places, values


def _metric_scale(table: "Table", values: list[float]) -> svg.Scale:
    """Rates by their errors; what is neither rate nor logarithm as it is."""
    finite = [value for value in values if math.isfinite(value)]
    return svg.nines(finite, max(table.spec.n_test, 1)) if table.spec.rate else svg.linear(finite, padding=0.05)


def both_axes(table: "Table", field: str) -> Markup:
    """The curves by gradients and by seconds, of which the page shows one."""
    by_gradients, by_seconds = (curves(table, field, clock) for clock in ("samples", "wall_s"))
    return by_gradients and Markup(
        f'<div class="by-gradients">{by_gradients}</div><div class="by-seconds">{by_seconds}</div>'
    )


def curves(table: "Table", field: str, clock: str) -> Markup:
    """Median and range over the seeds, for the metric or the training loss."""
    spec = table.spec
    metric = field == spec.metric
    series = [
        (table.places[row.method], *_aligned(row, field, spec.chance if metric else math.inf, clock))
        for row in table.rows
    ]
    found = [value for _, _, values in series for seeds in values for value in seeds if math.isfinite(value)]
    if not found or (not metric and min(found) <= 0):  # of an objective with noise the loss may be negative
        return Markup("")
    middles = [value for _, _, values in series for value in map(statistics.median, values) if math.isfinite(value)]
    middles = middles or found  # a seed that diverged shall not press the others together: its band is cut off
    y = _metric_scale(table, found if spec.rate else middles) if metric else svg.log(middles)
    last = max(places[-1] for _, places, _ in series if places)
    name, unit = (
        ("test metric" if metric else "training loss"),
        ("epochs of gradients" if clock == "samples" else "seconds"),
    )
    panel = svg.Panel(f"{spec.name}: {name} by {unit}", svg.linear([0, last]), y, unit)
    panel.frame()
    if metric and y.low < spec.target < y.high:
        panel.rule((0, spec.target), (last, spec.target), "target")
    for index, places, values in series:
        if places:
            panel.band(places, [min(seeds) for seeds in values], [max(seeds) for seeds in values], style(index))
    for index, places, values in series:
        if places:
            panel.line(list(zip(places, map(statistics.median, values), strict=True)), style(index))
    return Markup(panel.svg())


def sensitivity(table: "Table") -> Markup:
    """The best validation metric at each learning rate; the chosen one ringed, failed seeds crossed."""
    spec = table.spec
    searched = [(table.places[row.method], row, row.by_rate) for row in table.rows if row.by_rate]
    if not searched:
        return Markup("")
    rates = [lr for _, _, found in searched for lr in found]
    scores = [trial.score for _, _, found in searched for trial in found.values() if trial.score is not None]
    panel = svg.Panel(
        f"{spec.name}: validation {spec.metric} by learning rate", svg.log(rates), _metric_scale(table, scores),
        "learning rate",
    )  # fmt: skip
    panel.frame()
    for index, _, found in searched:
        panel.line([(lr, trial.score) for lr, trial in found.items() if trial.score is not None], style(index))
    for index, row, found in searched:
        for lr, trial in found.items():
            failed = sum(run["status"] != "ok" for run in trial.runs)
            note = f"{row.method}, lr {lr:g}: {table.show(trial.score)}, n = {len(trial.runs)}, {failed} failed"
            state = (" failed" if failed else "") + (" chosen" if row.plan.chosen == trial.hp else "")
            mark = "cross" if failed else marker(index)
            panel.mark((lr, trial.score or 0.0), style(index) + state, mark, note)
    return Markup(panel.svg())


def budget(table: "Table") -> Markup:
    """The expected best of k trials."""
    found = [(table.places[row.method], row.best_of()) for row in table.rows]
    found = [(index, best) for index, best in found if len(best) > 1]
    if not found:
        return Markup("")
    every = [value for _, best in found for value in best]
    panel = svg.Panel(
        f"{table.spec.name}: expected best of k trials", svg.linear([1, max(len(best) for _, best in found)]),
        _metric_scale(table, every), "k trials",
    )  # fmt: skip
    panel.frame()
    for index, best in found:
        panel.line(list(enumerate(best, 1)), style(index))
    return Markup(panel.svg())


def _list_panel(title: str, methods: list[tuple[int, str]], x: svg.Scale, label: str) -> svg.Panel:
    """A panel with a line for each method, by its place and name, the first on top."""
    names = [name.rpartition(":")[2] for _, name in methods]
    rows = svg.Scale(-0.6, len(names) - 0.4, tuple(range(len(names))), str)
    left = 16 + 6 * max(map(len, names))
    panel = svg.Panel(title, x, rows, label, left=left, height=max(230, 46 + 15 * len(names)))
    panel.frame(names[::-1], [f"m{index}" for index, _ in reversed(methods)])
    return panel


def differences(table: "Table") -> Markup:
    """Every seed's difference to the baseline, with median and interval."""
    shown = [(table.places[row.method], row, row.difference) for row in table.rows if row.difference]
    if not shown:
        return Markup("")
    scale = 100 if table.spec.rate else 1
    medians = [scale * abs(gain.median) for _, _, gain in shown]
    # One failed seed would press all others together: what lies far out is drawn at the edge.
    reach = max(0.01 * scale, min(max(medians), 6 * statistics.median(medians) + 0.01 * scale)) * 1.6
    names = [(index, row.method) for index, row, _ in shown]
    panel = _list_panel(
        f"{table.spec.name}: paired differences to {table.baseline}", names,
        svg.linear([-reach, reach], label=lambda value: f"{value:+g}" if value else "0"),
        "points" if table.spec.rate else table.unit,
    )  # fmt: skip
    panel.rule((0, -0.6), (0, len(shown) - 0.4), "zero")
    for y, (index, row, gain) in enumerate(reversed(shown)):
        low, high = gain.interval
        panel.rule((scale * low, y), (scale * high, y), f"interval {style(index)}")
        for seed, value in zip(row.scores(), gain.values, strict=False):
            note = f"{row.method}, seed {seed}: {table.show(value, '+')}"
            panel.mark((scale * value, y), f"{style(index)} seed", "circle", note)
        panel.mark(
            (scale * gain.median, y), style(index), "diamond", f"{row.method}, median {table.show(gain.median, '+')}"
        )
    return Markup(panel.svg())


def defaults(table: "Table") -> Markup:
    """The median with the defaults and with what was chosen."""
    shown = [(table.places[row.method], row) for row in table.rows if row.tuned and row.sample and row.default]
    if not shown:
        return Markup("")
    medians = [sample.median for _, row in shown for sample in (row.sample, row.default)]
    x = _metric_scale(table, medians)
    names = [(index, row.method) for index, row in shown]
    panel = _list_panel(f"{table.spec.name}: defaults and tuned", names, x, table.axis)
    for y, (index, row) in enumerate(reversed(shown)):
        before, after = row.default.median, row.sample.median
        panel.rule((before, y), (after, y), f"interval {style(index)}")
        panel.mark((before, y), f"{style(index)} hollow", "circle", f"{row.method}, defaults {table.show(before)}")
        panel.mark((after, y), style(index), marker(index), f"{row.method}, {row.chosen}: {table.show(after)}")
    return Markup(panel.svg())


def profile(results: "Results") -> Markup:
    """The share of tasks and seeds on which a method needs no more than a multiple of the fewest gradients."""
    ratios = {results.methods.index(method): found for method, found in results.profile.items()}
    if not ratios:
        return Markup("")
    panel = svg.Panel(
        "Performance profile", svg.linear([1, FARTHEST]), svg.linear([0, 1], label=lambda share: f"{100 * share:g}%"),
        "multiple of the fewest gradients to the target",
    )  # fmt: skip
    panel.frame()
    for index, found in ratios.items():
        corners = [(1.0, bisect.bisect_right(found, 1.0) / len(found))]
        for ratio in dict.fromkeys(ratio for ratio in found if 1 < ratio <= FARTHEST):
            corners += [(ratio, corners[-1][1]), (ratio, bisect.bisect_right(found, ratio) / len(found))]
        panel.line([*corners, (FARTHEST, corners[-1][1])], style(index))
    return Markup(panel.svg())
