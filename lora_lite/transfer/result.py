"""What came of each module, in numbers that cannot flatter?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lora_lite.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class Moved:
    """One source module, or one part of a fused one. Figures are None where nothing was fitted.

    read_r2     on tokens kept out of the fit: the share of the variance of (what the update reads, weighted by what it does
                with it) that the target's activations give. 0 is what a constant would give; it can be negative
    write_cos   on the same tokens: cosine between the source's activations at the write site, turned, and the target's, both
                less their means
    norm_ratio  |update on the target| / |update on the source|
    """

    source: str
    target: str | None
    action: Literal["moved", "copied", "skipped"]
    why: str = ""
    read_r2: float | None = None
    write_cos: float | None = None
    norm_ratio: float | None = None


@dataclass(frozen=True)
class TransferResult:
    """`result.adapter`, ready for the target; `result.report`, a row per module; printed, a table.

    adapter    detached, variant "lora": `with result.adapter(target): ...` or `ll.attach(target, result.adapter)`
    origin     the source's adapter, as it was given
    tokens     how many pairs of tokens the maps were fitted on
    distilled  the divergence from the teacher (nats per token) at each step of `distill_transfer`; empty before it
    """

    adapter: Adapter
    report: tuple[Moved, ...]
    origin: Adapter
    tokens: int
    distilled: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What is printed, as JSON can hold it."""
        return {"tokens": self.tokens, "modules": [dataclasses.asdict(row) for row in self.report], "distilled": list(self.distilled)}

    def counts(self) -> dict[str, int]:
        return {action: sum(row.action == action for row in self.report) for action in ("moved", "copied", "skipped")}

    def __repr__(self) -> str:
        head = ("source", "target", "action", "read_r2", "write_cos", "norm", "why")
        rows = [head] + [
            (r.source, r.target or "-", r.action, number(r.read_r2), number(r.write_cos), number(r.norm_ratio), r.why) for r in self.report
        ]
        width = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in rows]
        done = ", ".join(f"{n} {action}" for action, n in self.counts().items())
        return "\n".join([*lines, f"{done}; {self.tokens} tokens fitted"])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
