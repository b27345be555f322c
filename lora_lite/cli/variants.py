"""What can each method do? The README's table for a terminal, and both tables as data: `lora-lite variants`."""

from __future__ import annotations

from typing import Any

from lora_lite import table
from lora_lite.variant import REGISTRY

SHOWN = ("variant", "paper", "trained per layer", "site", "reads the weight", "calibration", "low-rank form", "PEFT name", "at init")


def variants() -> list[dict[str, Any]]:
    """A row per variant: what the README's table says, and under `can` the answers of docs/matrix.md, a no with its reason."""
    can = {
        name: {q: {"yes": a.yes, **({} if a.yes else {"why": a.reason})} for q, a in table.answers(v).items()}
        for name, v in REGISTRY.items()
    }
    return [{**row, "can": can[row["variant"]]} for row in table.rows()]


def readable() -> str:
    lines = [SHOWN, *([row[question] for question in SHOWN] for row in table.rows())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(n) for text, n in zip(line, widths, strict=True)).rstrip() for line in lines)
