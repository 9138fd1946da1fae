"""Small drawings as inline SVG: axes, lines, bands, marks. Colours are the page's business, through classes."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape

Point = tuple[float, float]

MARKERS = {  # outlines of about equal area around the origin, distinct without colour
    "circle": "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0z",
    "square": "M-3.1,-3.1h6.2v6.2h-6.2z",
    "triangle": "M0,-4.2L4,3H-4z",
    "diamond": "M0,-4.4L4.4,0L0,4.4L-4.4,0z",
    "flag": "M0,4.2L4,-3H-4z",
    "cross": "M-3.5,-3.5L3.5,3.5M-3.5,3.5L3.5,-3.5",
    "plus": "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
}


NINES = (
    0.5,
    0.8,
    0.9,
    0.95,
    0.99,
    0.98,
    0.999,
    0.995,
    0.2,
    0.7,
    0.85,
    0.6,
    0.88,
    0.93,
    0.96,
    0.97,
)  # by merit as ticks


@dataclass(frozen=True)
class Scale:
    """A monotone map from values to [0, 1] between two limits, with the values worth a tick."""

    low: float
    high: float
    ticks: tuple[float, ...]
    label: Callable[[float], str]
    map: Callable[[float], float] = lambda value: value

    def __call__(self, value: float) -> float:
        at, low, high = (self.map(v) for v in (value, self.low, self.high))
        return min(max((at - low) / (high - low), -0.02), 1.02)


def linear(
    values: Iterable[float], count: int = 5, label: Callable[[float], str] = "{:g}".format, padding: float = 0.0
) -> Scale:
    """A linear scale over ``values`` with about ``count`` round ticks, and room at both ends."""
    values = list(values)
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    low, high = low - padding * (high - low), high + padding * (high - low)
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Scale(low, high, ticks, label)


def log(values: Iterable[float]) -> Scale:
    """A logarithmic scale over the positive ``values``, ticked at the powers of ten inside."""
    positive = [value for value in values if value > 0]
    low, high = min(positive) / 1.15, max(positive) * 1.15
    ticks = [10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    if len(ticks) < 2:
        ticks = [m * 10.0**k for k in range(-12, 12) for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    return Scale(low, high, tuple(ticks), power, math.log10)


def power(value: float) -> str:
    """1000 and 0.001 as they are, what is longer as 1e-5."""
    return f"{value:g}" if 1e-4 <= value < 1e4 else f"1e{round(math.log10(value))}"


def nines(rates: Iterable[float], cases: int) -> Scale:
    """A scale for success rates that spaces their error rates logarithmically: 90, 99, 99.9% are equally far apart.

    A rate of 1 over ``cases`` cases is drawn at half an error.
    """
    rates = list(rates)
    least = 0.5 / cases

    def spread(rate: float) -> float:
        return -math.log10(max(1 - rate, least))

    low, high = min(rates), max(rates)
    scale = Scale(low - 0.02, min(high + 0.1 * (1 - high), 1 - least), (), lambda rate: f"{100 * rate:g}%", spread)
    ticks: list[float] = []
    for tick in NINES:
        if scale.low <= tick <= scale.high and all(abs(scale(tick) - scale(other)) > 0.09 for other in ticks):
            ticks.append(tick)
    return replace(scale, ticks=tuple(ticks))


@dataclass
class Panel:
    """One plot. Its coordinates are the pixels of a phone, so that its text stays legible there."""

    title: str
    x: Scale
    y: Scale
    x_label: str
    width: int = 360
    height: int = 230
    left: int = 42
    parts: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> Point:
        right, top, bottom = 10, 12, 34
        return (
            round(self.left + self.x(x) * (self.width - self.left - right), 1),
            round(top + (1 - self.y(y)) * (self.height - top - bottom), 1),
        )

    def _path(self, points: Iterable[Point]) -> str:
        return "L".join(f"{x},{y}" for x, y in (self.at(*point) for point in points))

    def line(self, points: Sequence[Point], style: str) -> None:
        self.parts.append(f'<path class="line {style}" d="M{self._path(points)}"/>')

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], style: str) -> None:
        edge = [*zip(x, high, strict=True), *reversed(list(zip(x, low, strict=True)))]
        self.parts.append(f'<path class="band {style}" d="M{self._path(edge)}z"/>')

    def mark(self, point: Point, style: str, marker: str = "circle", note: str = "") -> None:
        x, y = self.at(*point)
        title = f"<title>{escape(note)}</title>" if note else ""
        self.parts.append(
            f'<path class="mark {style}" transform="translate({x} {y})" d="{MARKERS[marker]}">{title}</path>'
        )

    def text(self, x: float, y: float, text: str, style: str) -> None:
        self.parts.append(f'<text class="{style}" x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def rule(self, start: Point, end: Point, style: str) -> None:
        (x1, y1), (x2, y2) = self.at(*start), self.at(*end)
        self.parts.append(f'<path class="{style}" d="M{x1},{y1}L{x2},{y2}"/>')

    def frame(self, rows: Sequence[str] = (), styles: Sequence[str] = ()) -> None:
        """Draws grid and ticks; ``rows`` name the lines 0, 1, .. of a plot whose y axis is a list."""
        for tick in self.x.ticks:
            self.rule((tick, self.y.low), (tick, self.y.high), "grid")
            x, y = self.at(tick, self.y.low)
            self.text(x, y + 13, self.x.label(tick), "tick middle")
        for tick in self.y.ticks:
            self.rule((self.x.low, tick), (self.x.high, tick), "grid")
            x, y = self.at(self.x.low, tick)
            line = round(tick)
            label, style = (rows[line], f" {styles[line]}") if rows else (self.y.label(tick), "")
            self.text(x - 5, y + 3.5, label, f"tick end{style}")
        middle = (self.left + self.width - 10) / 2
        self.text(middle, self.height - 4, self.x_label, "label middle")

    def svg(self) -> str:
        title = escape(self.title)
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{title}">'
            f"<title>{title}</title>{''.join(self.parts)}</svg>"
        )
