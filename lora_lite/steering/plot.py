"""How does a measurement look? Against c: curves with bands, and once more where c is gradual. From round to round: marks with whiskers."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

COLORS = BLUE, GRAY, ORANGE = "#1f5fa8", "0.45", "#c25b12"
SHADE = "#f3e3b3"
MARGINS = 0.04, 0.35  # beyond the ends, as a share of what is shown: of the whole, of the zoom
LARGER = 0.4  # of the whole: a wider stretch is no larger in the second column, which is narrower and has those margins


class Curve(NamedTuple):
    """Values against c, within a band (low, high)."""

    name: str
    c: list[float]
    y: list[float]
    band: tuple[list[float], list[float]]

    def within(self, low: float, high: float) -> Curve:
        keep = [i for i, c in enumerate(self.c) if low <= c <= high]
        c, y, *band = ([values[i] for i in keep] for values in (self.c, self.y, *self.band))
        return Curve(self.name, c, y, (band[0], band[1]))


class Panel(NamedTuple):
    """log: for what is a factor; share: from 0 to 1, so that a hundredth looks like one."""

    label: str
    curves: Sequence[Curve]
    log: bool = False
    share: bool = False


class Marks(NamedTuple):
    """One value for each group, and how far it spreads to either side."""

    name: str
    y: list[float]
    spread: list[float]
    color: str


def need_matplotlib() -> Any:
    """Its Figure. Raises ImportError that says what to install: ask before minutes of work, not after."""
    try:
        from matplotlib.figure import Figure  # seconds to import; without pyplot no display or global state is touched
    except ImportError as error:
        raise ImportError("a plot needs matplotlib, which is not installed: pip install 'lora_lite[plot]'") from error
    return Figure


def against_c(path: str | os.PathLike[str], panels: Sequence[Panel], zoom: tuple[float, float] | None = None, title: str = "") -> None:
    """One panel below the other over one axis, the stretch `zoom` shaded; a second column shows it where that makes it larger.

    Raises ImportError without matplotlib.
    """
    every = [c for panel in panels for curve in panel.curves for c in curve.c]
    low, high = min(every), max(every)
    columns = [(low, high), *([zoom] if zoom and zoom[1] - zoom[0] < LARGER * (high - low) else [])]
    figure = need_matplotlib()(figsize=(7 + 4 * (len(columns) - 1), 0.8 + 2.4 * len(panels)), layout="constrained", dpi=130)
    grid = figure.subplots(len(panels), len(columns), sharex="col", sharey="row", squeeze=False, width_ratios=[1.5, 1][: len(columns)])
    for k, ((low, high), margin) in enumerate(zip(columns, MARGINS, strict=False)):
        beyond = margin * ((high - low) or 1.0)
        for axis, panel in zip(grid[:, k], panels, strict=True):
            for curve, color in reversed([*zip(panel.curves, COLORS, strict=False)]):  # the first on top
                draw(axis, curve.within(low - beyond, high + beyond), color)
            furnish(axis, panel, zoom)
        grid[-1][k].set_xlim(low - beyond, high + beyond)
        grid[-1][k].locator_params(axis="x", nbins=(9, 5)[k])
        grid[-1][k].set_xlabel("c (0 is the base)")
    for axis, panel in zip(grid[:, 0], panels, strict=True):
        axis.set_ylabel(panel.label, fontsize=8)
    if zoom:
        grid[0][0].set_title("all of it", fontsize=9)
        which = "where" if len(columns) > 1 else "shaded where"
        grid[0][-1].set_title(f"{which} it is gradual: c from {zoom[0]:.2g} to {zoom[1]:.2g}", fontsize=9)
    if len(panels[0].curves) > 1:
        grid[0][0].legend(fontsize=8, frameon=False, reverse=True)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def side_by_side(path: str | os.PathLike[str], label: str, groups: Sequence[str], marks: Sequence[Marks]) -> None:
    """Every group's marks beside each other, unconnected: groups are not points of a scale. Raises ImportError without matplotlib."""
    figure = need_matplotlib()(figsize=(2.5 + 1.2 * max(3, len(groups)), 3.6), layout="constrained", dpi=130)
    axis = figure.subplots()
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axis.grid(axis="y", alpha=0.25)
    for k, mark in enumerate(marks):
        x = [i + 0.2 * (k - (len(marks) - 1) / 2) for i in range(len(groups))]
        axis.errorbar(x, mark.y, mark.spread, fmt="o", markersize=5, capsize=3, color=mark.color, label=mark.name)
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set_ylabel(label, fontsize=8)
    figure.legend(loc="outside upper center", ncols=len(marks), fontsize=8, frameon=False)
    figure.savefig(path)


def furnish(axis: Any, panel: Panel, zoom: tuple[float, float] | None) -> None:
    axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    axis.grid(alpha=0.25)
    if zoom:
        axis.axvspan(*zoom, color=SHADE, zorder=-1, linewidth=0)
    if panel.share:
        axis.set_ylim(0, 1.05)
    if panel.log:
        axis.set_yscale("log")
        plain_ticks(axis)


def plain_ticks(axis: Any) -> None:
    """20 and 50, not 2 x 10^1: a perplexity is read as a number."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def draw(axis: Any, curve: Curve, color: str) -> None:
    axis.fill_between(curve.c, *curve.band, color=color, alpha=0.2, linewidth=0)
    axis.plot(curve.c, curve.y, marker="o", markersize=3.5, color=color, label=curve.name)


def quartiles(groups: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """The lower and upper quartile of each group; a single value is both."""
    cut = [statistics.quantiles(g, n=4, method="inclusive") if len(g) > 1 else [g[0]] * 3 for g in groups]
    return [q[0] for q in cut], [q[2] for q in cut]
