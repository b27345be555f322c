"""How does a dose-response look? Trait and coherence against c, over the whole sweep and over its gradual part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lite.cli.errors import UserError
from lora_lite.cli.sweep import Dose

BLUE, ORANGE, SHADE = "#1f5fa8", "#c25b12", "#f3e3b3"


def need_matplotlib() -> None:
    """Before minutes of training, not after. Raises UserError."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("the dose-response plot needs matplotlib, which is not installed; pip install 'lora_lite[plot]'") from error


def dose_response(path: Path, doses: Sequence[Dose], region: tuple[float, float] | None, trait: str, title: str) -> None:
    """Trait and perplexity against c over the whole sweep (left) and over the gradual region (right)."""
    from matplotlib.figure import Figure  # seconds to import; without pyplot, so that no display or global state is touched

    figure = Figure(figsize=(11, 6.5), layout="constrained", dpi=130)
    wide = (doses[0].c, doses[-1].c)
    columns = [wide, region] if region else [wide]
    grid = figure.subplots(2, len(columns), sharex="col", sharey="row", squeeze=False, width_ratios=[1.5, 1][: len(columns)])
    for k, (low, high) in enumerate(columns):
        margin = 0.04 * (high - low) if k == 0 else 0.35 * (high - low)
        shown = [d for d in doses if low - margin <= d.c <= high + margin]
        draw_trait(grid[0][k], shown)
        draw_perplexity(grid[1][k], shown)
        for axis in (grid[0][k], grid[1][k]):
            axis.set_xlim(low - margin, high + margin)
            axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
            axis.grid(alpha=0.25)
            if region:
                axis.axvspan(*region, color=SHADE, zorder=-1, linewidth=0)
        grid[1][k].locator_params(axis="x", nbins=9 if k == 0 else 6)
        grid[1][k].set_xlabel("c (dimensionless; 0 is the base)")
    grid[0][0].set_title("whole sweep", fontsize=10)
    if region:
        grid[0][1].set_title(f"where it is gradual: c from {region[0]:.2g} to {region[1]:.2g} (shaded)", fontsize=10)
    grid[0][0].set_ylabel(f"trait: {trait}\n(mean ± standard error)")
    grid[1][0].set_ylabel("perplexity under the base\n(median and quartiles)")
    grid[1][0].set_yscale("log")
    plain_ticks(grid[1][0])
    figure.suptitle(title)
    figure.savefig(path)


def draw_trait(axis: Any, doses: Sequence[Dose]) -> None:
    spread = [(d.trait - d.trait_error, d.trait + d.trait_error) for d in doses]
    draw(axis, [d.c for d in doses], [d.trait for d in doses], spread, BLUE)
    axis.set_ylim(-0.04, 1.04)


def draw_perplexity(axis: Any, doses: Sequence[Dose]) -> None:
    draw(axis, [d.c for d in doses], [d.perplexity for d in doses], [d.quartiles for d in doses], ORANGE)


def draw(axis: Any, c: list[float], y: list[float], spread: list[tuple[float, float]], color: str) -> None:
    axis.fill_between(c, *zip(*spread, strict=True), color=color, alpha=0.2, linewidth=0)
    axis.plot(c, y, marker="o", markersize=3.5, color=color)


def plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
