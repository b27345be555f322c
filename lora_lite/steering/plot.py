"""How does something look against c? Curves with bands, one panel for each thing measured."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

COLORS = ("#1f5fa8", "0.45", "#c25b12")


class Curve(NamedTuple):
    """Values against c, within a band (low, high)."""

    name: str
    c: list[float]
    y: list[float]
    band: tuple[list[float], list[float]]


class Panel(NamedTuple):
    label: str
    curves: Sequence[Curve]
    log: bool = False


def against_c(path: str | os.PathLike[str], panels: Sequence[Panel]) -> None:
    """One panel below the other over one axis of c. Raises ImportError, saying what to install, without matplotlib."""
    try:
        from matplotlib.figure import Figure  # seconds to import; without pyplot no display or global state is touched
    except ImportError as error:
        raise ImportError("a plot needs matplotlib, which is not installed: pip install 'lora_lite[plot]'") from error
    figure = Figure(figsize=(7, 0.8 + 2.4 * len(panels)), layout="constrained", dpi=130)
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        for curve, color in zip(panel.curves, COLORS, strict=False):
            draw(axis, curve, color)
        axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axis.grid(alpha=0.25)
        axis.set_ylabel(panel.label, fontsize=8)
        if panel.log:
            axis.set_yscale("log")
    if len(panels[0].curves) > 1:
        axes[0].legend(fontsize=8, frameon=False)
    axes[-1].set_xlabel("c (0 is the base)")
    figure.savefig(path)


def draw(axis: Any, curve: Curve, color: str) -> None:
    axis.fill_between(curve.c, *curve.band, color=color, alpha=0.2, linewidth=0)
    axis.plot(curve.c, curve.y, marker="o", markersize=3.5, color=color, label=curve.name)


def quartiles(groups: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """The lower and upper quartile of each group; a single value is both."""
    cut = [statistics.quantiles(g, n=4, method="inclusive") if len(g) > 1 else [g[0]] * 3 for g in groups]
    return [q[0] for q in cut], [q[2] for q in cut]
