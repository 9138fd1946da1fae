"""Pictures of optimizers: races, fans of learning rates, basins, steps, planes, spectra. Needs the extra ``plot``.

Numbers come from :mod:`optimzoo.trajectories`. Every function draws into the axes that it is given, or into those of a
new figure, and returns them; nothing is shown, registered with pyplot or set globally.

``python -m optimzoo.viz race --scene beale --optimizers diffgrad,adabelief -o race.webp``
"""

from __future__ import annotations

import argparse
import base64
import html as html_text
import io
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

try:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import Normal, Stroke
    from matplotlib.ticker import LogLocator, NullLocator
    from PIL import Image, features
except ImportError as error:
    raise ImportError(f"optimzoo.viz needs the extra plot, pip install 'optimzoo[plot]': {error}") from error

from optimzoo import trajectories
from optimzoo.functions import SCENES, Scene, scene
from optimzoo.trajectories import (
    METHODS,
    Anatomy,
    Basins,
    Curvature,
    Plane,
    Progress,
    Recorder,
    Run,
    Sweep,
    Trace,
    Tune,
    Updates,
    entries,
    silent,
    trace,
)

__all__ = [
    "Recorder", "Tune", "anatomy", "basins", "contour", "density", "describe", "eigenvalues", "fan", "figure",
    "gallery", "heatmap", "interpolation", "landscape", "loss", "matrix", "plane", "player", "race", "rates", "runs",
    "save", "scene", "trace",
]  # fmt: skip

# Looks

COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7F6000")
"""Of Okabe and Ito: told apart with any colour vision; each has a line style and a mark as well."""
DASHES: tuple[tuple[float, ...], ...] = (
    (), (6, 1.6), (), (6, 1.4, 1.4, 1.4), (1.6, 1.2), (9, 1.6), (3, 1.2), (5, 1.5, 1.2, 1.5, 1.2, 1.5),
)  # fmt: skip
MARKS = ("o", "s", "^", "D", "v", "P", "X", "h")

_GROUND = LinearSegmentedColormap.from_list("ground", ["#93b0c8", "#c6d6e3", "#e6edf2", "#f9fbfc"])
_INK, _LINE, _FAINT = "#24303c", "#8ea3b5", "#dde3e8"
_RATES = LinearSegmentedColormap.from_list("rates", ["#00204d", "#31446b", "#666970", "#b08a3e", "#e69f00", "#d55e00"])

Points: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


class Look(NamedTuple):
    """How a method is drawn, wherever it is drawn."""

    colour: str
    dashes: tuple[float, ...]
    mark: str

    def line(self, width: float = 1.7) -> dict[str, Any]:
        """Arguments of a line."""
        return dict(color=self.colour, lw=width, ls=(0, self.dashes) if self.dashes else "-")


def look(index: int) -> Look:
    """The look of the method at a place; from the ninth on colours come again, with another style and mark."""
    other = index + index // 8
    return Look(COLOURS[index % 8], DASHES[other % 8], MARKS[other % 8])


def _axes(ax: Axes | None, size: tuple[float, float] = (5.6, 4.6)) -> Axes:
    if ax is not None:
        return ax
    return _figure(size).add_subplot()


def _figure(size: tuple[float, float]) -> Figure:
    made = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made


def _plain(ax: Axes, title: str = "", x: str = "", y: str = "", grid: bool = True) -> Axes:
    """Quiet axes."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(_LINE)
    ax.tick_params(colors=_INK, labelsize=8, length=3)
    ax.tick_params(which="minor", length=0)
    if grid:
        ax.grid(True, color=_FAINT, lw=0.6)
        ax.set_axisbelow(True)
    ax.set_title(title, fontsize=10, color=_INK, loc="left")
    ax.set_xlabel(x, fontsize=9, color=_INK)
    ax.set_ylabel(y, fontsize=9, color=_INK)
    return ax


def _halo(width: float) -> list[Any]:
    return [Stroke(linewidth=width + 1.6, foreground="white", alpha=0.85), Normal()]


def _title(it: Scene) -> str:
    name = it.name.replace("_", " ")
    return name.capitalize() if len(name) > 2 else name.upper()


def _named(run: Run) -> str:
    return f"{run.label}, lr {run.lr:.3g}" + ("" if run.tuned else " (given)")


# Scenes


def levels(gap: Points, count: int = 18) -> Points:
    """Contour levels of values >= 0: between those equally spaced in the logarithm and those of equal areas."""
    positive = gap[np.isfinite(gap) & (gap > 0)]
    low, high = max(np.quantile(positive, 0.004), positive.max() * 1e-7), positive.max()
    spaced = np.linspace(math.log(low), math.log(high), count)
    ranked = np.log(np.quantile(positive, np.linspace(0.002, 1, count)).clip(low, high))
    found: Points = np.unique(np.exp((spaced + ranked) / 2))
    return found


def landscape(it: Scene, ax: Axes | None = None, *, grid: int = 240, steps: int | None = None) -> Axes:
    """The scene by itself: contours, dense where it is low; its global minima as stars.

    A scene of one dimension has the steps as its second axis, up to ``steps``.
    """
    ax = _axes(ax)
    if it.dim > 2:
        raise ValueError(f"only scenes of one or two dimensions can be drawn, {it.name} has {it.dim}; see viz.loss")
    low, high = it.box[:, 0].tolist(), it.box[:, 1].tolist()
    if it.dim == 1:
        low, high = [*low, 0.0], [*high, float(steps or it.steps)]
    x = torch.linspace(low[0], high[0], grid if it.dim == 2 else 800, dtype=torch.float64)
    y = torch.linspace(low[1], high[1], grid if it.dim == 2 else 2, dtype=torch.float64)
    points = torch.cartesian_prod(y, x).flip(1)[:, : it.dim]
    gap = (it.value(points) - it.least).clamp_min(0).view(len(y), len(x)).numpy()
    at = levels(gap)
    ground = np.log(gap.clip(at[0], at[-1]))
    colours = np.linspace(ground.min(), ground.max(), 24)
    ax.contourf(x, y, ground, levels=colours, cmap=_GROUND, extend="both", antialiased=True)
    if it.dim == 2:
        ax.contour(x, y, gap, levels=at, colors=_LINE, linewidths=0.55, alpha=0.9)
    _plain(ax, _title(it), grid=False)
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(low[1], high[1])
    for side in ax.spines.values():
        side.set_visible(True)
        side.set_color(_LINE)
    if it.dim == 2:
        ax.plot(it.minima[:, 0], it.minima[:, 1], ls="", marker="*", ms=19, mfc="#ffd84d", mec=_INK, mew=0.8, zorder=6)
    else:
        ax.set_xlabel("x", fontsize=9, color=_INK)
        ax.set_ylabel("step", fontsize=9, color=_INK)
        for minimum in it.minima[:, 0].tolist():
            ax.axvline(minimum, color=_INK, lw=0.9, ls=(0, (2, 2)))
            ax.plot([minimum], [high[1]], marker="*", ms=14, mfc="#ffd84d", mec=_INK, mew=0.8, clip_on=False, zorder=7)
    return ax


def _drawn(points: Tensor) -> Points:
    """Points (steps + 1, 1 or 2) as they are drawn; a run that diverged ends where it left."""
    if points.shape[-1] == 1:
        points = torch.cat([points, torch.arange(len(points), dtype=points.dtype)[:, None]], 1)
    fine = points.isfinite().all(1) & (points.abs() < 1e6).all(1)
    drawn: Points = points[: int(fine.int().cumprod(0).sum())].numpy()
    return drawn


def _end(index: int, tr: Trace) -> float:
    """The size of a mark at an end: smaller ones lie on larger ones where runs end at one point."""
    return 5.5 + 1.5 * (len(tr.runs) - 1 - index)


def _start(ax: Axes, it: Scene, points: Tensor) -> None:
    for x, y in (_drawn(path)[0] for path in points):
        ax.plot([x], [y], marker="o", ms=8, mfc="white", mec=_INK, mew=1.4, zorder=7, clip_on=False)


def contour(tr: Trace, ax: Axes | None = None) -> Axes:
    """Paths over the landscape: a ring at the start, a dot each tenth of the run, the mark of the method at the end.

    Of a method with particles these are drawn at the start, and, darker each time, where their spread has fallen to a
    half, an eighth and so on.
    """
    steps = tr.runs[0].points.shape[2] - 1
    ax = landscape(tr.scene, ax, steps=steps)
    for index, run in enumerate(tr.runs):
        style = look(index)
        for k, path in enumerate(tr.path(run)):
            line = _drawn(path)
            mark: dict[str, Any] = dict(marker=style.mark, mfc=style.colour, mec="white", mew=0.7, ls="", zorder=8)
            if tr.shown > 1:
                ax.plot(*line.T, color=style.colour, lw=0.7, alpha=0.3, zorder=4)
                mark = dict(mark, ms=5, mew=0.4, alpha=0.8, zorder=5)
            else:
                ax.plot(*line.T, **style.line(1.6), path_effects=_halo(1.6), zorder=4)
                ax.plot(*line[:: max(1, steps // 10)][1:].T, ls="", marker=".", ms=4.5, color=style.colour, zorder=5)
                mark["ms"] = _end(index, tr)
            if len(line) == steps + 1:
                ax.plot(*line[-1], clip_on=tr.scene.dim == 2, **mark)
            if k == 0:
                ax.plot([], [], **style.line(2.0), marker=style.mark, ms=7, mec="white", label=_named(run))
        for k, swarm in enumerate(_contracting(run.particles)):
            _swarm(ax, style, 0.4 + 0.2 * k).set_data(*swarm.T)
    _start(ax, tr.scene, tr.path(tr.runs[0]))
    return ax


def _contracting(particles: Tensor | None) -> list[Tensor]:
    """Of the particles (steps + 1, particles, d) those at the start, and when their spread falls to 1/2, 1/8, 1/32."""
    if particles is None or particles.shape[-1] != 2:
        return []
    spread = particles.std(1).norm(dim=-1)
    falls = {int((spread <= share * spread[0]).int().argmax()) for share in (1 / 2, 1 / 8, 1 / 32)}  # 0: it does not
    return [particles[step] for step in sorted({0, *falls})]


def _swarm(ax: Axes, style: Look, alpha: float, **options: Any) -> Line2D:
    """A line for particles: dots in the colour of the method, under all paths."""
    (line,) = ax.plot([], [], ls="", marker="o", ms=5, mfc=style.colour, mec="white", mew=0.5, alpha=alpha, zorder=3,
                      **options)  # fmt: skip
    return line


def loss(tr: Trace, ax: Axes | None = None) -> Axes:
    """The gap to the minimum against what it cost, in gradients; of several runs median and 10 to 90 % band."""
    ax = _plain(_axes(ax, (5.6, 3.6)), "Loss above the minimum", "gradient evaluations" + _costs(tr))
    tops, floor = [], max(1e-14, 1e-13 * abs(tr.scene.least))
    for index, run in enumerate(tr.runs):
        style, gap = look(index), tr.gap(run).nan_to_num(math.inf)
        x = run.cost[run.chosen, : tr.shown].median(0).values.numpy()
        middle = gap.median(0).values.clamp_min(floor).numpy()
        if tr.shown > 1:
            least, most = (gap.nan_to_num(1e30, 1e30).quantile(q, 0).clamp_min(floor).numpy() for q in (0.1, 0.9))
            ax.fill_between(x, least, most, color=style.colour, alpha=0.16, lw=0)
        fine = np.isfinite(middle)
        ax.plot(x[fine], middle[fine], **style.line(), label=_named(run), zorder=4)
        if fine.all():
            ax.plot([float(x[-1])], [float(middle[-1])], ls="", marker=style.mark, ms=_end(index, tr), mfc=style.colour,
                    mec="white", mew=1, zorder=5, clip_on=False)  # fmt: skip
        tops.append(float(gap[:, 0].median()))
    ax.set_yscale("log")
    low, _ = ax.get_ylim()
    ax.set_ylim(low, 30 * max(tops))
    longest = max(float(run.cost[run.chosen, : tr.shown].max()) for run in tr.runs)
    if longest > 4 * (tr.runs[0].points.shape[2] - 1):
        ax.set_xscale("log")
        ax.set_xlim(1, longest * 1.1)
    else:
        ax.set_xlim(0, longest)
    ax.yaxis.set_major_locator(LogLocator(numticks=7))
    ax.yaxis.set_minor_locator(NullLocator())
    return ax


def _costs(tr: Trace) -> str:
    noise = ""
    if tr.scene.noise != (0.0, 0.0):
        noise = f"; noise {tr.scene.noise[0]:g}" + (f" and {tr.scene.noise[1]:.0%}" if tr.scene.noise[1] else "")
    return noise + (f"; {tr.shown} runs" if tr.shown > 1 else "")


def figure(tr: Trace) -> Figure:
    """Paths, losses and one legend, side by side."""
    made = _figure((10.2, 5.0))
    left, right = made.subplots(1, 2, width_ratios=(1.0, 1.0))
    if tr.scene.dim <= 2:
        contour(tr, left)
    else:
        rates(tr, left)
    loss(tr, right)
    _legend(made, right)
    return made


def _legend(made: Figure, ax: Axes) -> None:
    handles = [
        Line2D([], [], **look(i).line(2.0), marker=look(i).mark, ms=7, mec="white", label=line.get_label())
        for i, line in enumerate(line for line in ax.lines if not str(line.get_label()).startswith("_"))
    ]
    made.legend(
        handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=8.5,
        handlelength=3.4, labelcolor=_INK,
    )  # fmt: skip


# Learning rates and settings


def fan(tr: Trace, name: str, ax: Axes | None = None) -> Axes:
    """The paths of one method at every learning rate of the grid, dark to bright; the chosen one is ringed white."""
    run, steps = tr[name], tr.runs[0].points.shape[2] - 1
    ax = landscape(tr.scene, ax, steps=steps)
    ax.set_title(f"{_title(tr.scene)}: {run.label} by learning rate", fontsize=10, color=_INK, loc="left")
    norm = LogNorm(run.rates[0], run.rates[-1])
    for place, rate in enumerate(run.rates):
        line, colour = _drawn(run.points[place, 0]), _RATES(norm(rate))
        chosen = place == run.chosen
        ax.plot(*line.T, color=colour, lw=2.4 if chosen else 1.0, zorder=5 if chosen else 3,
                path_effects=_halo(2.4) if chosen else None)  # fmt: skip
        ax.plot(*line[-1], marker="o", ms=9 if chosen else 4.5, mfc=colour, mec="white", mew=1.5 if chosen else 0.6,
                zorder=8 if chosen else 6)  # fmt: skip
    _start(ax, tr.scene, tr.path(run)[:1])
    return ax


def rates(tr: Trace, ax: Axes | None = None) -> Axes:
    """The score of every learning rate of every method: chosen rates marked, defaults as open rings."""
    ax = _plain(_axes(ax, (5.6, 3.6)), "Score by learning rate: lower is better; ring: the default", "learning rate")
    for index, run in enumerate(tr.runs):
        style = look(index)
        ax.plot(run.rates, run.scores, **style.line(), label=_named(run))
        mark: dict[str, Any] = dict(ls="", marker=style.mark, ms=8.5, mfc=style.colour, mec="white", mew=1, zorder=5)
        ax.plot([run.lr], [run.scores[run.chosen]], **mark)
        if run.default_lr and run.rates[0] <= run.default_lr <= run.rates[-1]:
            there = np.interp(math.log(run.default_lr), np.log(run.rates), run.scores)
            ax.plot([run.default_lr], [there], ls="", marker="o", ms=7, mfc="none", mec=style.colour, mew=1.4, zorder=6)
    ax.set_xscale("log")
    ax.axhline(0, color=_LINE, lw=0.8, zorder=1)
    return ax


def basins(found: Basins, ax: Axes | None = None) -> Axes:
    """Where runs from each start end: a colour for each global minimum, paler the later it is reached; white, none."""
    ax, it = _axes(ax), found.scene
    colours = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLOURS[2:7]])
    steps = max(1, int(found.step.max()))
    late = (found.step.clamp_min(0).double() / steps).numpy()[..., None]
    image = colours[found.minimum.clamp_min(0).numpy() % 5]
    image = np.where((found.minimum >= 0).numpy()[..., None], image * (1 - 0.75 * late) + 0.75 * late, 1.0)
    x, y = found.x.tolist(), found.y.tolist()
    dx, dy = (x[1] - x[0]) / 2, (y[1] - y[0]) / 2
    box = (x[0] - dx, x[-1] + dx, y[0] - dy, y[-1] + dy)
    ax.imshow(image, origin="lower", extent=box, aspect="auto", interpolation="nearest")
    grid_x, grid_y = (torch.linspace(low, high, 160, dtype=torch.float64) for low, high in (box[:2], box[2:]))
    gap = (it.value(torch.cartesian_prod(grid_y, grid_x).flip(1)) - it.least).clamp_min(0).view(160, 160).numpy()
    ax.contour(grid_x, grid_y, gap, levels=levels(gap, 12), colors=_INK, linewidths=0.35, alpha=0.45)
    share = float((found.minimum >= 0).double().mean())
    _plain(ax, f"{_title(it)}: {found.label}, lr {found.lr:.3g}, reaches a minimum from {share:.0%}", grid=False)
    for k, (a, b) in enumerate(it.minima.tolist()):
        ax.plot([a], [b], marker="*", ms=15, mfc=COLOURS[2:7][k % 5], mec="white", mew=1.2)
    ax.set_xlim(box[:2])
    ax.set_ylim(box[2:])
    return ax


def heatmap(found: Sweep, ax: Axes | None = None) -> Axes:
    """Scores over two settings, dark is good: a star at the best pair, a ring at the defaults."""
    ax = _plain(_axes(ax), f"{found.label} on {_title(found.scene)}", *found.names, grid=False)
    scores = found.scores.clamp(-8, 1).numpy()
    mesh = ax.pcolormesh(found.x, found.y, scores, cmap="cividis", vmin=scores.min(), vmax=0, shading="nearest")
    for axis, values in ((ax.set_xscale, found.x), (ax.set_yscale, found.y)):
        if values[0] > 0 and values[-1] / values[0] >= 30:
            axis("log")
    best = int(found.scores.argmin())
    at = found.x[best % len(found.x)], found.y[best // len(found.x)]
    star: dict[str, Any] = dict(marker="*", ms=15, mfc="#ffd84d", mec="black", mew=0.9, ls="")
    ax.plot([at[0]], [at[1]], **star, label=f"best: {at[0]:.2g}, {at[1]:.2g}")
    a, b = found.defaults
    if a is not None and b is not None and found.x[0] <= a <= found.x[-1] and found.y[0] <= b <= found.y[-1]:
        ring: dict[str, Any] = dict(marker="o", ms=9, mfc="none", mec="white", mew=2, ls="")
        ax.plot([a], [b], **ring, label=f"default: {a:g}, {b:g}")
    dark: dict[str, Any] = dict(facecolor="#3b4654", edgecolor="none", framealpha=0.85, labelcolor="white")
    ax.legend(fontsize=8, loc="best", **dark).set_zorder(9)
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02)
    bar.set_label("score: mean log10 of the gap's share", fontsize=8.5, color=_INK)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return ax


# What a step does


def anatomy(found: Anatomy, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Four panels over the steps: step sizes, direction, effective learning rates, state; a colour for a coordinate.

    A fifth has the quantity of the method's own, if it has one: diffGrad its friction, AdaBelief its denominator, the
    Dale classes their weights. It is left out where four axes are given.
    """
    if axes is None:
        rows = ("01", "23", "44") if found.own else ("01", "23")
        axes = list(_figure((10.2, 3.1 * len(rows))).subplot_mosaic("\n".join(rows)).values())
    axes = list(axes)
    if len(axes) != 4 and not (len(axes) == 5 and found.own):
        raise ValueError(f"the anatomy has four panels{', or five' if found.own else ''}, got {len(axes)} axes")
    steps = np.arange(1, len(found.updates) + 1)
    dim = min(found.updates.shape[1], 8)

    def log(ax: Axes, values: Tensor, **style: Any) -> None:
        shown = values.abs().numpy()
        shown = np.where((shown > 0) & np.isfinite(shown), shown, np.nan)
        ax.plot(steps, shown, **style)

    _plain(axes[0], f"{found.label}, lr {found.lr:.3g}: size of the step", "", "|step|, units of the parameter")
    _plain(axes[1], "Direction: cosine of the step with the negative gradient", "", "")
    _plain(axes[2], "Effective learning rate: |step| / |gradient|", "step", "")
    _plain(axes[3], "State and gradient", "step", "")
    for i in range(dim):
        style = look(i + 2 if dim <= 2 else i)
        log(axes[0], found.updates[:, i], **style.line(1.4), label=f"coordinate {i}")
        log(axes[2], found.rates[:, i], **style.line(1.4))
        log(axes[3], found.gradients[:, i], color=_LINE, lw=1.0, ls=look(i + 2).line()["ls"],
            label="gradient" if i == 0 else None)  # fmt: skip
    axes[1].plot(steps, found.cosine, color=_INK, lw=1.3)
    axes[1].axhline(0, color=_LINE, lw=0.9)
    axes[1].fill_between(steps, -1.05, 0, color="#d55e00", alpha=0.07, lw=0)
    axes[1].text(0.99, 0.03, "uphill", transform=axes[1].transAxes, ha="right", fontsize=8, color="#a84a00")
    axes[1].set_ylim(-1.05, 1.05)
    for k, (name, values) in enumerate(found.states.items()):
        if values.shape[1] == found.updates.shape[1] and not (values == values[0]).all():
            for i in range(min(dim, 2)):
                log(axes[3], values[:, i], color=COLOURS[(4, 5, 1, 6, 7)[k % 5]], lw=1.2, ls=look(i + 2).line()["ls"],
                    label=name if i == 0 else None)  # fmt: skip
    axes[2].axhline(found.lr, color=_LINE, lw=0.9, ls=(0, (2, 2)))
    axes[2].text(
        1.0, found.lr, "lr ", fontsize=8, color=_INK, ha="right", va="bottom", transform=axes[2].get_yaxis_transform()
    )
    if found.own and len(axes) == 5:
        title, own = found.own
        _plain(axes[4], title, "step")
        for i in range(dim):
            axes[4].plot(steps, own[:, i], **look(i + 2 if dim <= 2 else i).line(1.4))
        if own.min() > 0 and own.max() > 30 * own.min():
            axes[4].set_yscale("log")
        elif own.min() < 0:
            axes[4].axhline(0, color=_INK, lw=0.9)
    for ax in (axes[0], axes[2], axes[3]):
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(NullLocator())
    for ax in (axes[0], axes[3]):
        ax.legend(fontsize=8, frameon=False, ncols=2, labelcolor=_INK)
    for ax in axes:
        ax.set_xlim(0, len(steps))
    return axes


def matrix(found: Sequence[Updates], ax: Axes | None = None) -> Axes:
    """Singular values of the updates of a matrix, over the largest: median over the run, band from 10 to 90 %."""
    ax = _plain(_axes(ax), "Singular values of the update of a matrix, as a share of the largest", "place", "")
    for index, each in enumerate(found):
        share = each.values / each.values[:, :1].clamp_min(1e-300)
        share = share[each.values[:, 0] > 0].clamp_min(1e-6)
        places, style = np.arange(1, share.shape[1] + 1), look(index)
        low, middle, high = (share.quantile(q, 0).numpy() for q in (0.1, 0.5, 0.9))
        ax.fill_between(places, low, high, color=style.colour, alpha=0.12, lw=0)
        ax.plot(places, middle, **style.line(), marker=style.mark, ms=5, mec="white", mew=0.6,
                label=f"{each.label}, lr {each.lr:.3g}")  # fmt: skip
    ax.set_yscale("log")
    ax.set_xlim(0.7, len(places) + 0.3)
    ax.legend(fontsize=8, frameon=False, labelcolor=_INK)
    return ax


# Networks


def plane(found: Plane, ax: Axes | None = None, *, title: str = "") -> Axes:
    """The loss over a plane of parameter space and the paths in it; what the plane leaves out stands in the title."""
    ax = _axes(ax)
    loss = np.ma.masked_invalid(found.losses.numpy())
    above = loss - loss.min()
    at = levels(np.asarray(above.filled(np.nan)) + 1e-3 * float(above.max() + 1e-30), 16)
    shown = above + 1e-3 * above.max()
    ax.contourf(found.a, found.b, np.log(shown), 24, cmap=_GROUND)
    lines = ax.contour(found.a, found.b, shown, levels=at, colors=_LINE, linewidths=0.6)
    picked = [float(level) for level in np.asarray(lines.levels)[1::4]]
    offset = float(loss.min() - 1e-3 * above.max())
    ax.clabel(lines, levels=picked, fmt=lambda value: f"{value + offset:.2g}", fontsize=7, colors=_INK)
    explained = f", {found.explained:.0%} of the variance" if found.paths else ""
    _plain(ax, (title or "Loss on a plane") + explained, grid=False)
    for index, (name, path) in enumerate(found.paths.items()):
        style, (true, projected) = look(index), found.ends[name]
        ax.plot(
            *path.T,
            **style.line(1.5),
            path_effects=_halo(1.5),
            label=f"{name}: ends at {true:.3g}, drawn at {projected:.3g}",
        )
        ax.plot(*path[0], marker="o", ms=7, mfc="white", mec=style.colour, mew=1.4, ls="")
        ax.plot(*path[-1], marker=style.mark, ms=9, mfc=style.colour, mec="white", mew=1.1, ls="", zorder=6)
    if found.paths:
        ax.legend(fontsize=8, loc="best", framealpha=0.9, edgecolor="none", labelcolor=_INK)
    else:
        ax.plot([0], [0], marker="*", ms=14, mfc="#ffd84d", mec=_INK, mew=0.8, ls="")
    return ax


def interpolation(line: tuple[Sequence[float], Sequence[float]], ax: Axes | None = None) -> Axes:
    """The loss on the line between two points of parameter space."""
    ax = _plain(_axes(ax, (5.6, 3.4)), "Loss on the line between two solutions", "0: the first, 1: the second", "loss")
    ax.plot(*line, color=COLOURS[2], lw=1.7)
    for end in (0.0, 1.0):
        ax.axvline(end, color=_LINE, lw=0.9, ls=(0, (2, 2)))
    return ax


def eigenvalues(found: Mapping[str, tuple[Curvature, float]], ax: Axes | None = None, *, momentum: float = 0.0) -> Axes:
    """The largest eigenvalues along training, by name with the learning rate, and the line above which it is unstable.

    The line is at (2 + 2 momentum) / lr, for heavy ball; it says nothing of methods that precondition.
    """
    ax = _plain(_axes(ax, (5.6, 3.8)), "Largest eigenvalues of the Hessian", "recorded step")
    for index, (name, (curve, lr)) in enumerate(found.items()):
        style, bound = look(index + 2), (2 + 2 * momentum) / lr
        for k in range(curve.values.shape[1]):
            ax.plot(curve.steps, curve.values[:, k], **style.line(1.8 if k == 0 else 0.9), alpha=1.0 if k == 0 else 0.6,
                    label=f"{name}, lr {lr:g}" if k == 0 else None)  # fmt: skip
        ax.axhline(bound, color=style.colour, lw=1.0, ls=(0, (2, 2)))
        top = "2 / lr" if momentum == 0 else f"{2 + 2 * momentum:g} / lr"
        ax.text(0.995, bound, f"{top} = {bound:.3g}", transform=ax.get_yaxis_transform(), ha="right", va="bottom",
                fontsize=8, color=style.colour)  # fmt: skip
    ax.set_ylim(bottom=0)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 1.08)
    ax.legend(fontsize=8, frameon=False, labelcolor=_INK, loc="best")
    return ax


def density(found: Mapping[str, Curvature], ax: Axes | None = None, *, width: float = 0.01) -> Axes:
    """The density of the Hessian's spectrum at the end of training, smoothed by ``width`` of its range."""
    ax = _plain(_axes(ax, (5.6, 3.4)), "Spectral density of the Hessian", "eigenvalue")
    ends = [float(v) for curve in found.values() for v in (curve.spectrum.values.min(), curve.spectrum.values.max())]
    room = 0.05 * (max(ends) - min(ends)) or 1.0
    grid = torch.linspace(min(ends) - room, max(ends) + room, 800, dtype=torch.float64)
    for index, (name, curve) in enumerate(found.items()):
        density = curve.spectrum.density(grid, width * float(grid[-1] - grid[0]))
        ax.plot(grid, density.clamp_min(1e-5), **look(index + 2).line(1.5), label=name)
        ax.fill_between(grid, 1e-5, density.clamp_min(1e-5), color=look(index + 2).colour, alpha=0.12, lw=0)
    ax.set_yscale("log")
    ax.set_ylim(bottom=1e-5)
    ax.legend(fontsize=8, frameon=False, labelcolor=_INK)
    return ax


# Benchmarks


def runs(rows: Sequence[Mapping[str, Any]], task: str, ax: Axes | None = None, *, metric: str = "loss") -> Axes:
    """Of a benchmark's runs: a metric against the learning rate; the median of the seeds, and each seed as a dot."""
    known = sorted({row["task"] for row in rows})
    if task not in known:
        raise ValueError(f"there is no task {task!r} in these runs; tasks: {', '.join(known)}")
    ax = _plain(_axes(ax), f"{task}: {metric} by learning rate", "learning rate", metric)
    done = [row for row in rows if row["task"] == task and row.get("metrics", {}).get(metric) is not None]
    if not done:
        raise ValueError(f"no run of {task!r} has the metric {metric!r}")
    for index, name in enumerate(sorted({row["method"] for row in done})):
        style, at = look(index), {}  # type: tuple[Look, dict[float, list[float]]]
        for row in done:
            if row["method"] == name and row["lr"]:
                at.setdefault(float(row["lr"]), []).append(float(row["metrics"][metric]))
        rates = sorted(at)
        ax.plot(rates, [statistics.median(at[r]) for r in rates], **style.line(), marker=style.mark, ms=5, label=name)
        ax.plot([r for r in rates for _ in at[r]], [v for r in rates for v in at[r]], ls="", marker=".", ms=4,
                color=style.colour, alpha=0.5)  # fmt: skip
    ax.set_xscale("log")
    ax.legend(fontsize=8, frameon=False, labelcolor=_INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # there are many
    return ax


# Files


def _writers(moving: bool) -> list[str]:
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if not moving:
        return known
    still = [name for name in known if name not in ("gif", "webp")]
    films = [*(["webp"] if features.check("webp") else []), *(["mp4"] if shutil.which("ffmpeg") else [])]
    return [*still, "gif", *films, "html"]


def check_file(file: str | Path, moving: bool = False) -> Path:
    """Raise unless a picture can be written there; before the work is done."""
    path = Path(file)
    kind, known = path.suffix.lstrip(".").lower(), _writers(moving)
    if kind not in known:
        needs = "; mp4 needs ffmpeg on PATH" if moving and kind == "mp4" else ""
        raise ValueError(f"nothing here writes {path.suffix or 'a file without an ending'!r} files, got {str(path)!r}; "
                         f"there is {', '.join(known)}{needs}")  # fmt: skip
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to")
    return path


def save(made: Axes | Sequence[Axes] | Figure, file: str | Path, dpi: int = 150) -> Path:
    """Write a picture; its kind is the ending of its name."""
    path = check_file(file)
    first = made if isinstance(made, Axes | Figure) else made[0]
    whole = first if isinstance(first, Figure) else first.get_figure(root=True)
    if whole is None:
        raise ValueError("the axes belong to no figure")
    whole.savefig(path, dpi=dpi)
    return path


def race(
    tr: Trace,
    file: str | Path,
    *,
    fps: int = 30,
    frames: int = 100,
    dpi: int = 96,
    progress: Progress = silent,
) -> Path:
    """Write a race: an animation (``.gif``, ``.webp``, ``.mp4``), a player (``.html``), or a still picture.

    Args:
        tr: the runs.
        file: what to write.
        fps: frames a second.
        frames: at most so many, evenly over the steps; the last stays for two seconds.
        dpi: pixels an inch; the picture has 10.2 by 5 inches.
        progress: told about it.

    Raises:
        ValueError: a kind of file that nothing here writes; ``.mp4`` needs ``ffmpeg`` on ``PATH``.
        OSError: the file cannot be written, or ffmpeg fails; its own words are in the message.
    """
    path = check_file(file, moving=True)
    kind = path.suffix.lower()
    if kind == ".html":
        path.write_text(player(tr), encoding="utf-8")
        return path
    if kind not in (".gif", ".webp", ".mp4"):
        return save(figure(tr), path, dpi)
    for name, value in (("fps", fps), ("frames", frames), ("dpi", dpi)):
        trajectories.whole(name, value)
    pictures = []
    for done, picture in enumerate(_moving(tr, frames, dpi), 1):
        pictures.append(picture)
        progress("frames", done, frames)
    if kind == ".mp4":
        _film([*pictures, *pictures[-1:] * (2 * fps)], path, fps)
        return path
    last = [round(1000 / fps)] * (len(pictures) - 1) + [2000]
    if kind == ".gif":
        palette = pictures[-1].quantize(128, dither=Image.Dither.NONE)
        pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
        options: dict[str, Any] = dict(optimize=False)
    else:
        options = dict(quality=72, method=2, minimize_size=False)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=last, loop=0, **options)
    return path


def _film(pictures: Sequence[Image.Image], path: Path, fps: int) -> None:
    """Write an MP4 by ffmpeg. Its usual codecs want even sides, and players this format of pixels."""
    width, height = pictures[0].size
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    kept = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    command = ["ffmpeg", "-loglevel", "error", "-y", *raw, *kept, f"file:{path}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as ffmpeg:
        stream: Any = ffmpeg.stdin
        with suppress(BrokenPipeError):  # it has ended, and says why
            for picture in pictures:
                stream.write(picture.tobytes())
        said = ffmpeg.communicate()[1].decode(errors="replace").strip()
    if ffmpeg.returncode:
        raise OSError(f"ffmpeg could not write {str(path)!r}, exit status {ffmpeg.returncode}: {said}")


def _moving(tr: Trace, frames: int, dpi: int) -> Iterator[Image.Image]:
    """The frames. All that stands still is drawn once."""
    made = _figure((10.2, 5.0))
    made.set_dpi(dpi)
    canvas: Any = made.canvas
    left, right = made.subplots(1, 2)
    steps = tr.runs[0].points.shape[2] - 1
    loss(tr, right)
    if tr.scene.dim <= 2:
        landscape(tr.scene, left, steps=steps)
        _start(left, tr.scene, tr.path(tr.runs[0])[:1])
    else:
        rates(tr, left)
    _legend(made, right)
    for line in list(right.lines):
        line.set_alpha(0.13)
    moving: list[tuple[Line2D, Line2D, Points]] = []
    swarms = [(_swarm(left, look(i), 0.55, animated=True), run.particles) for i, run in enumerate(tr.runs)
              if run.particles is not None and tr.scene.dim == 2]  # fmt: skip
    for index, run in enumerate(tr.runs):
        style = look(index)
        gap = tr.gap(run)[0].nan_to_num(math.inf).clamp_min(max(1e-14, 1e-13 * abs(tr.scene.least)))
        curves: list[tuple[Axes, Points]] = [(right, torch.stack([run.cost[run.chosen, 0].double(), gap], 1).numpy())]
        if tr.scene.dim <= 2:
            curves.append((left, _drawn(tr.path(run)[0])))
        for ax, points in curves:
            (line,) = ax.plot([], [], **style.line(1.8), animated=True, zorder=4, path_effects=_halo(1.8))
            (head,) = ax.plot([], [], ls="", marker=style.mark, ms=9, mfc=style.colour, mec="white", mew=1.2, zorder=8,
                              animated=True)  # fmt: skip
            moving.append((line, head, points))
    clock = left.text(0.985, 0.985, "", transform=left.transAxes, ha="right", va="top", fontsize=9, color=_INK,
                      animated=True, bbox=dict(boxstyle="round,pad=0.3", fc="white", ec="none", alpha=0.8))  # fmt: skip
    canvas.draw()
    made.set_layout_engine("none")
    ground = canvas.copy_from_bbox(made.bbox)
    for step in sorted({round(k * steps / max(1, frames - 1)) for k in range(frames)}) if frames > 1 else [steps]:
        canvas.restore_region(ground)
        for dots, swarm in swarms:
            dots.set_data(*swarm[step].T)
            left.draw_artist(dots)
        for line, head, points in moving:
            line.set_data(*points[: step + 1].T)
            head.set_data(*points[min(step, len(points) - 1)][:, None])
            line.axes.draw_artist(line)  # type: ignore[union-attr]  # it has axes
            head.axes.draw_artist(head)  # type: ignore[union-attr]
        clock.set_text(f"step {step}")
        left.draw_artist(clock)
        yield Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


# The player


def _packed(values: Tensor) -> str:
    return base64.b64encode(values.float().contiguous().numpy().astype("<f4").tobytes()).decode()


def player(tr: Trace) -> str:
    """One self-contained page: paths to scrub through, a learning rate to slide for each method, values on hover."""
    it = tr.scene
    if it.dim > 2:
        raise ValueError(f"the player shows scenes of one or two dimensions, {it.name} has {it.dim}")
    steps = tr.runs[0].points.shape[2] - 1
    made = _figure((7.0, 6.0))
    made.set_layout_engine("none")
    ax = made.add_axes((0, 0, 1, 1))
    landscape(it, ax, steps=steps)
    ax.set_axis_off()
    ax.set_title("")
    canvas: Any = made.canvas
    made.set_dpi(160)
    canvas.draw()
    stream = io.BytesIO()
    kind = "webp" if features.check("webp") else "png"
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(stream, kind, quality=82)
    box = [*it.box.tolist(), [0.0, float(steps)]][:2]
    methods = []
    for index, run in enumerate(tr.runs):
        points = run.points[:, 0]
        if it.dim == 1:
            time_ = torch.arange(steps + 1, dtype=points.dtype).expand(len(points), -1)
            points = torch.stack([points[..., 0], time_], -1)
        style = look(index)
        methods.append(
            dict(
                name=run.label, colour=style.colour, dashes=style.dashes, mark=style.mark, rates=run.rates,
                chosen=run.chosen, tuned=run.tuned, initial=run.default_lr, scores=run.scores,
                points=_packed(points), gap=_packed(run.losses[:, 0] - it.least), slope=_packed(run.slopes[:, 0]),
                cost=_packed(run.cost[:, 0]),
                swarm="" if run.particles is None or it.dim == 1 else _packed(run.particles),
            )
        )  # fmt: skip
    data = dict(
        scene=_title(it), dim=it.dim, steps=steps, box=box, start=_drawn(tr.path(tr.runs[0])[0])[0].tolist(),
        image=f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode(), methods=methods,
        noise=it.noise, trials=tr.tune.trials, hidden=tr.tune.starts,
    )  # fmt: skip
    page = resources.files("optimzoo").joinpath("player.html").read_text(encoding="utf-8")
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    rows = "".join(
        f"<tr><th scope=row>{html_text.escape(run.label)}<td>{run.lr:.3g}{'' if run.tuned else ' (given)'}"
        f"<td>{float(tr.gap(run)[0, -1]):.3g}<td>{float(run.cost[run.chosen, 0, -1]):.0f}"
        for run in tr.runs
    )
    return page.replace("{{title}}", html_text.escape(_title(it))).replace("{{rows}}", rows).replace("{{data}}", text)


# Gallery

STILL = ("rosenbrock", "beale", "himmelblau", "quadratic", "saddle", "two_basins", "plateau", "ackley")


def describe(tr: Trace) -> str:
    """What a race shows, in words."""
    ends = "; ".join(f"{run.label} at lr {run.lr:.3g}: {float(tr.gap(run)[:, -1].median()):.2g}" for run in tr.runs)
    steps = tr.runs[0].points.shape[2] - 1
    return f"Paths on {_title(tr.scene)}. Loss above the minimum after {steps} steps: {ends}."


def gallery(
    methods: Any,
    scenes: Sequence[str] = STILL,
    out: str | Path = "gallery",
    *,
    tune: Tune | None = None,
    progress: Progress = silent,
) -> Path:
    """Write a folder: for each scene a picture and a player, the numbers as JSON, and an index with texts for both."""
    folder = Path(out)
    entries(methods)  # before anything is written
    chosen = [scene(name) for name in scenes]
    folder.mkdir(parents=True, exist_ok=True)
    cards = []
    for done, it in enumerate(chosen):
        tr = trace(it, methods, tune=tune)
        save(figure(tr), folder / f"{it.name}.png", dpi=110)
        race(tr, folder / f"{it.name}.html")
        (folder / f"{it.name}.json").write_text(json.dumps(tr.record()))
        text = html_text.escape(describe(tr))
        cards.append(
            f'<figure><a href="{it.name}.html"><img src="{it.name}.png" alt="{text}" loading="lazy"></a>'
            f'<figcaption><a href="{it.name}.html">{_title(it)}: play</a></figcaption></figure>'
        )
        progress("scenes", done + 1, len(chosen))
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;color:#24303c;margin:2rem auto;max-width:75rem;padding:0 1rem}"
        "main{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr))}"
        "figure{margin:0}img{width:100%;height:auto;border:1px solid #dde3e8;border-radius:6px}a{color:#0072B2}"
    )
    (folder / "index.html").write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Gallery</title><style>{style}</style><h1>Gallery</h1>"
        f"<p>Every method has the same {(tune or Tune()).trials} learning rates and the same rule to choose from them."
        f"</p><main>{''.join(cards)}</main></html>",
        encoding="utf-8",
    )
    return folder


# Command line


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar of rich's on a terminal where it is installed; else a line every few seconds, on standard error."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import Progress as Bars
        except ImportError:
            pass
        else:
            with Bars(console=Console(stderr=True), transient=True) as bars:
                tasks: dict[str, Any] = {}

                def show(what: str, done: int, total: int) -> None:
                    if what not in tasks:
                        tasks[what] = bars.add_task(what, total=total)
                    bars.update(tasks[what], completed=done, total=total)

                yield show
            return
    last = time.monotonic()

    def line(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 3:
            last = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    yield line


def _axis(text: str) -> tuple[str, float, float, int]:
    parts = text.split(":")
    try:
        name, low, high, count = parts
        return name, float(low), float(high), int(count)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be setting:low:high:count, as lr:1e-4:1:25") from error


def _given(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be optimizer=rate, as adamw=0.01") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m optimzoo.viz",
        description="Pictures of optimizers on test functions.",
        epilog=f"Scenes: {', '.join(SCENES)}. Optimizers: {', '.join(METHODS)}, or package.module:Class.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, many: bool, default: str, out: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        if name not in ("gallery", "runs", "matrix"):
            one.add_argument("--scene", default="beale", help="default: beale")
            one.add_argument("--steps", type=int, help="default: the scene's")
        if many:
            one.add_argument("--optimizers", "--methods", default=default, help=f"default: {default}")
        elif name != "runs":
            one.add_argument("--optimizer", "--method", default=default, help=f"default: {default}")
        if name not in ("runs",):
            one.add_argument("--trials", type=int, default=Tune.trials, help="learning rates for each optimizer")
        if name != "gallery":
            one.add_argument("--dpi", type=int, default=96, help="pixels an inch; default: 96")
        one.add_argument("-o", "--out", default=out, help=f"default: {out}")
        return one

    text = "the paths of several optimizers; SGD with momentum and AdamW are always among them"
    one = command("race", text, True, "diffgrad,adabelief", "race.webp")
    one.add_argument("--lr", type=_given, action="append", default=[], metavar="OPTIMIZER=RATE",
                     help="a rate that is not tuned; may be repeated")  # fmt: skip
    one.add_argument("--noise", type=float, default=0.0, help="deviation of the noise in the gradient")
    one.add_argument("--seeds", type=int, default=1, help="runs of each, shown as median and band")
    one.add_argument("--dim", type=int, help="default: 2")
    one.add_argument("--fps", type=int, default=30)
    one.add_argument("--frames", type=int, default=100)
    command("fan", "one optimizer at every learning rate", False, "diffgrad", "fan.png")
    one = command("basins", "which minimum is reached from where", False, "diffgrad", "basins.png")
    one.add_argument("--lr", type=float)
    one.add_argument("--grid", type=int, default=80, help="starts a side")
    one = command("heatmap", "the score over two settings", False, "diffgrad", "heatmap.png")
    one.add_argument("--x", type=_axis, default="lr:1e-3:10:33", help="setting:low:high:count")
    one.add_argument("--y", type=_axis, default="betas.0:0:0.99:25", help="setting:low:high:count")
    one = command("anatomy", "what each step does, coordinate by coordinate", False, "diffgrad", "anatomy.png")
    one.add_argument("--lr", type=float)
    several = "momentum,adamw,diffgrad,adabelief,muon,shampoo"
    command("matrix", "what optimizers make of a matrix's gradient", True, several, "matrix.png")
    one = command("runs", "a benchmark's runs", False, "", "runs.png")
    one.add_argument("file", help="runs.jsonl, or its folder")
    one.add_argument("--task", help="default: the first")
    one.add_argument("--metric", default="loss")
    one = command("gallery", "a folder of pictures and players", True, "diffgrad,adabelief,adagradnorm", "gallery")
    one.add_argument("--scenes", default=",".join(STILL), help="default: %(default)s")
    return parser


def _draw(args: argparse.Namespace, progress: Progress) -> Path:
    tune = Tune(trials=args.trials) if "trials" in args else Tune()
    if args.command == "gallery":
        return gallery(args.optimizers.split(","), args.scenes.split(","), args.out, tune=tune, progress=progress)
    trajectories.whole("dpi", args.dpi)
    out = check_file(args.out, moving=args.command == "race")
    if args.command == "matrix":
        return save(
            matrix(trajectories.matrix_updates(args.optimizers.split(","), tune=tune, progress=progress)), out, args.dpi
        )
    if args.command == "runs":
        rows = trajectories.finished_runs(args.file)
        if not rows:
            raise ValueError(f"there are no runs in {args.file!r}")
        return save(runs(rows, args.task or rows[0]["task"], metric=args.metric), out, args.dpi)
    it = scene(args.scene, getattr(args, "dim", None))
    options: dict[str, Any] = dict(steps=args.steps, tune=tune, progress=progress)
    if args.command == "race":
        names: dict[str, Any] = dict.fromkeys(args.optimizers.split(","), "auto")
        names.update({name: dict(lr=value) for name, value in args.lr})
        tr = trace(it.noisy(args.noise) if args.noise else it, names, seeds=args.seeds, **options)
        return race(tr, out, fps=args.fps, frames=args.frames, dpi=args.dpi, progress=progress)
    if args.command == "fan":
        tr = trace(it, [args.optimizer], **options)
        made = _figure((10.2, 4.8))
        left, right = made.subplots(1, 2)
        fan(tr, args.optimizer, left)
        rates(tr, right)
        _legend(made, right)
        return save(made, out, args.dpi)
    if args.command == "basins":
        return save(
            basins(trajectories.basins(it, args.optimizer, lr=args.lr, grid=args.grid, **options)), out, args.dpi
        )
    if args.command == "heatmap":
        return save(heatmap(trajectories.sweep(it, args.optimizer, args.x, args.y, **options)), out, args.dpi)
    return save(anatomy(trajectories.anatomy(it, args.optimizer, lr=args.lr, **options)), out, args.dpi)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0: done, 2: wrong arguments."""
    args = _parser().parse_args(arguments)
    try:
        with progress_bar() as progress:
            print(_draw(args, progress))
    except (ValueError, TypeError, OSError) as error:
        print(f"{_parser().prog} {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
