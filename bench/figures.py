"""The figures of a report: learning curves, sensitivity to the learning rate, paired differences."""

import math
import statistics
from typing import TYPE_CHECKING

from markupsafe import Markup

from bench import svg

if TYPE_CHECKING:
    from bench.report import Row, Table

MARKERS = ("circle", "square", "triangle", "diamond", "flag", "plus")


def style(index: int) -> str:
    """The classes of the method at a place of the sweep: its colour, and the name that the legend hides it by."""
    return f"c{index % 8} m{index}"


def marker(index: int) -> str:
    """The mark that tells a method from others without colour."""
    return MARKERS[index % len(MARKERS)]


def key(index: int) -> Markup:
    """The mark of a method, for a legend or a table."""
    mark = f'<path class="mark {style(index)}" d="{svg.MARKERS[marker(index)]}"/>'
    return Markup(f'<svg class="key" viewBox="-6 -6 12 12">{mark}</svg>')


def _aligned(row: "Row", field: str, fill: float) -> tuple[list[float], list[list[float]]]:
    """Epochs, and at each the field's value in every final run; a run that stopped early goes on with ``fill``.

    The point before the first step is left out: it is the same for all and would spread the axis.
    """
    curves = [curve for curve in row.curves if curve]
    longest = max(curves, key=len, default=[])
    size = longest[-1]["samples"] / (row.spec.epochs * row.cell.protocol.budget) if longest else 1
    epochs, values = [], []
    for place, point in enumerate(longest[1:], 1):
        reached = [curve[place][field] if place < len(curve) else None for curve in curves]
        epochs.append(point["samples"] / size)
        values.append([fill if value is None else value for value in reached])
    return epochs, values


def curves(table: "Table", field: str) -> Markup:
    """Median and range over the seeds against epochs, for the test metric or the training loss."""
    spec = table.spec
    metric = field == spec.metric
    series = [_aligned(row, field, spec.chance if metric else math.inf) for row in table.rows]
    found = [value for _, values in series for seeds in values for value in seeds if math.isfinite(value)]
    if not found:
        return Markup("")
    y = svg.nines(found, spec.n_test) if metric else svg.log(found)
    last = max(epochs[-1] for epochs, _ in series if epochs)
    panel = svg.Panel(
        f"{spec.name}: {'test ' + field if metric else 'training loss'} by epoch",
        svg.linear([0, last]), y, "epochs of gradients",
    )  # fmt: skip
    panel.frame()
    if metric and y.low < spec.target < y.high:
        panel.rule((0, spec.target), (last, spec.target), "target")
    for index, (epochs, values) in enumerate(series):
        if epochs:
            panel.band(epochs, [min(seeds) for seeds in values], [max(seeds) for seeds in values], style(index))
    for index, (epochs, values) in enumerate(series):
        if epochs:
            panel.line(list(zip(epochs, map(statistics.median, values), strict=True)), style(index))
    return Markup(panel.svg())


def sensitivity(table: "Table") -> Markup:
    """The validation metric against the learning rate; the selected one ringed, failed seeds crossed."""
    spec = table.spec
    searched = [(index, row) for index, row in enumerate(table.rows) if row.plan.scores]
    if not searched:
        return Markup("")
    rates = [lr for _, row in searched for lr in row.plan.scores]
    scores = [value for _, row in searched for value in row.plan.scores.values()]
    panel = svg.Panel(
        f"{spec.name}: validation {spec.metric} by learning rate", svg.log(rates), svg.nines(scores, spec.n_test),
        "learning rate",
    )  # fmt: skip
    panel.frame()
    for index, row in searched:
        panel.line(list(row.plan.scores.items()), style(index))
    for index, row in searched:
        for lr, value in row.plan.scores.items():
            runs = row.plan.tuning[lr]
            failed = sum(run["status"] != "ok" for run in runs)
            note = f"{row.method}, lr {lr:g}: {100 * value:.1f}%, n = {len(runs)}, {failed} failed"
            state = (" failed" if failed else "") + (" chosen" if lr == row.plan.selected else "")
            panel.mark((lr, value), style(index) + state, "cross" if failed else marker(index), note)
    return Markup(panel.svg())


def differences(table: "Table") -> Markup:
    """Every seed's difference to the baseline, with median and interval."""
    shown = [(index, row, row.difference) for index, row in enumerate(table.rows) if row.difference]
    if not shown:
        return Markup("")
    points = [100 * value for _, _, gain in shown for value in gain.values]
    reach = max(1.0, *map(abs, points)) * 1.08
    names = [row.method.rpartition(":")[2] for _, row, _ in reversed(shown)]
    panel = svg.Panel(
        f"{table.spec.name}: paired differences to {table.baseline}",
        svg.linear([-reach, reach], label=lambda value: f"{value:+g}" if value else "0"),
        svg.Scale(-0.6, len(shown) - 0.4, tuple(range(len(shown))), str),
        f"points of test {table.spec.metric}",
        left=16 + 6 * max(map(len, names)),
    )
    panel.frame(names)
    panel.rule((0, -0.6), (0, len(shown) - 0.4), "zero")
    for y, (index, row, gain) in enumerate(reversed(shown)):
        low, high = gain.interval
        panel.rule((100 * low, y), (100 * high, y), f"interval {style(index)}")
        for seed, value in zip(row.scores(), gain.values, strict=False):
            panel.mark(
                (100 * value, y), f"{style(index)} seed", "circle", f"{row.method}, seed {seed}: {100 * value:+.1f}"
            )
        panel.mark((100 * gain.median, y), style(index), "diamond", f"median {100 * gain.median:+.1f}")
    return Markup(panel.svg())
