"""How does a measurement look? Against c: curves with bands, and once more where c is gradual. From round to round: marks with whiskers."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_lite.checkpoint import disk
from lora_lite.steering.arguments import is_real

COLORS = BLUE, GRAY, ORANGE = "#1f5fa8", "0.45", "#c25b12"
SHADE = "#f3e3b3"
MARGINS = 0.04, 0.35  # beyond the ends, as a share of what is shown: of the whole, of the zoom
LARGER = 0.4  # of the whole: a wider stretch is no larger in the second column, which is narrower and has those margins


FLAT = 0.55  # the height of a share's panel: it is at 1 nearly everywhere, and what counts is where it falls
LEAST = 1.5  # times the lowest value a log axis shows, so that rounding does not look like a change
SHARE = 0.6  # its axis goes down to there at least, so that a hundredth looks like one, and further where the values do


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
    """log: for what is a factor; share: of at most 1, mostly there."""

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


def against_c(
    path: str | os.PathLike[str], panels: Sequence[Panel], zoom: tuple[float, float] | None = None, title: str = "", called: str = ""
) -> None:
    """One panel below the other over one axis, the stretch `zoom` shaded; a second column shows it where that makes it larger.

    called  what is seen in the stretch, in place of its range. Raises ImportError without matplotlib, ValueError for a zoom that
            is no stretch of c in what is shown.
    """
    every = [c for panel in panels for curve in panel.curves for c in curve.c]
    whole = min(every), max(every)
    if zoom:
        check_zoom(zoom, whole)
    columns = [whole, *([zoom] if zoom and zoom[1] - zoom[0] < LARGER * (whole[1] - whole[0]) else [])]
    heights = [FLAT if panel.share else 1.0 for panel in panels]
    figure = need_matplotlib()(figsize=(7 + 4 * (len(columns) - 1), 0.8 + 2.4 * sum(heights)), layout="constrained", dpi=130)
    grid = figure.subplots(
        len(panels), len(columns), sharex="col", sharey="row", squeeze=False, width_ratios=[1.5, 1][: len(columns)], height_ratios=heights
    )  # fmt: skip
    for k, (shown, margin) in enumerate(zip(columns, MARGINS, strict=False)):
        low, high = widened(shown, margin, whole)
        for axis, panel in zip(grid[:, k], panels, strict=True):
            for curve, color in reversed([*zip(panel.curves, COLORS, strict=False)]):  # the first on top
                draw(axis, curve, color, (low, high))
            furnish(axis, panel, zoom)
        grid[-1][k].set_xlim(low, high)
        grid[-1][k].locator_params(axis="x", nbins=(9, 5)[k])
        grid[-1][k].set_xlabel("c (0 is the base)")
    for axis, panel in zip(grid[:, 0], panels, strict=True):
        axis.set_ylabel(panel.label, fontsize=8)
        if panel.log:
            plain_ticks(axis)
    if zoom:
        grid[0][0].set_title(f"every dose, c from {whole[0]:.3g} to {whole[1]:.3g}", fontsize=9)
        said = called or f"c from {zoom[0]:.3g} to {zoom[1]:.3g}"
        grid[0][-1].set_title(f"the shaded part, larger: {said}" if len(columns) > 1 else f"shaded: {said}", fontsize=9)
    if len(panels[0].curves) > 1:
        grid[0][0].legend(fontsize=8, frameon=False, reverse=True)
    if title:
        figure.suptitle(title, fontsize=10)
    save(figure, path)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it, such as {Path(path) / 'response.png'}")
    disk.make_folder(Path(path).absolute().parent)
    figure.savefig(path)


def check_zoom(zoom: tuple[float, float], whole: tuple[float, float]) -> None:
    pair = isinstance(zoom, tuple | list) and len(zoom) == 2 and all(map(is_real, zoom))
    if not pair or not zoom[0] < zoom[1] or zoom[1] < whole[0] or zoom[0] > whole[1]:
        raise ValueError(f"zoom is a stretch (low, high) of the doses, which go from {whole[0]:g} to {whole[1]:g}; got {zoom!r:.60}")


def widened(shown: tuple[float, float], margin: float, whole: tuple[float, float]) -> tuple[float, float]:
    """With a margin on either side, but not out into where nothing was measured: there the whole's own margin is enough."""
    beyond, most = margin * ((shown[1] - shown[0]) or 1.0), MARGINS[0] * ((whole[1] - whole[0]) or 1.0)
    edge = min(beyond, most)
    return max(shown[0] - beyond, whole[0] - edge), min(shown[1] + beyond, whole[1] + edge)


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
    save(figure, path)


def furnish(axis: Any, panel: Panel, zoom: tuple[float, float] | None) -> None:
    axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    axis.grid(alpha=0.25)
    if zoom:
        axis.axvspan(*zoom, color=SHADE, zorder=-1, linewidth=0)
    if panel.share:
        lowest = min(value for curve in panel.curves for value in (*curve.y, *curve.band[0]))
        axis.set_ylim(min(SHARE, math.floor(10 * lowest) / 10) - 0.02, 1.03)
    if panel.log:
        axis.set_yscale("log")


def plain_ticks(axis: Any) -> None:
    """Four numbers or more, and 20 rather than 2 x 10^1: a perplexity is read as a number."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

    low, high = axis.get_ylim()
    if high < LEAST * low:  # doses that wrote the same, but for rounding
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(LEAST), middle * math.sqrt(LEAST)
        axis.set_ylim(low, high)
    times = high / low
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if times < 30 else (1.0, 2.0, 5.0) if times < 1e3 else (1.0,)
    axis.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]) if times < 4 else LogLocator(subs=subs))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def draw(axis: Any, curve: Curve, color: str, shown: tuple[float, float]) -> None:
    """The curve runs on through the panel's edge; a marker is whole where its point is inside, the last one too."""
    axis.fill_between(curve.c, *curve.band, color=color, alpha=0.2, linewidth=0)
    axis.plot(curve.c, curve.y, color=color)
    inside = curve.within(*shown)
    axis.plot(inside.c, inside.y, linestyle="", marker="o", markersize=3.5, color=color, clip_on=False, zorder=3)
    axis.plot([], [], marker="o", markersize=3.5, color=color, label=curve.name)  # for the legend


def quartiles(groups: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """The lower and upper quartile of each group; a single value is both."""
    cut = [statistics.quantiles(g, n=4, method="inclusive") if len(g) > 1 else [g[0]] * 3 for g in groups]
    return [q[0] for q in cut], [q[2] for q in cut]
