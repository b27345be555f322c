"""What did a round of steering come to, and is it kept? One rule for all rounds, stated with the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_lite.adapter import Adapter
from lora_lite.lifecycle import read
from lora_lite.steering.response import aligned

RULE = (
    "A round is kept when its effect is at least {margin:g} above the size of its null control's (of either sign: that is what chance "
    "does here), and some positive c is coherent; it then acts on at the largest such c, at most {dose:g}. The shift is by how many nats "
    "the odds of held-out pairs move towards the chosen text from the base to c = {up:g}, what earlier rounds kept included; the effect is "
    "what the round adds to the shift there was before it, over the standard deviation between pairs (Cohen's d). The null control was "
    "trained in the same way, beside the same history, on pairs of which exactly half are exchanged."
)


@dataclass(frozen=True)
class Round:
    """One round as the state has it; what is not done yet is None.

    seed       of its start, its batches and its null
    before     the held-out check (steering/report.py: PoleCheck) at the positive pole of what the earlier rounds left
    trained    the same with this round, and the step whose weights were kept
    null       the same with its null control in this round's place
    calibrated what `ll.calibrate_c` found, as its file holds it
    dose       at which it acts on; None where it was dropped
    why        the rule's answer, in words
    """

    number: int
    seed: int
    before: Mapping[str, Any] | None = None
    trained: Mapping[str, Any] | None = None
    null: Mapping[str, Any] | None = None
    calibrated: Mapping[str, Any] | None = None
    dose: float | None = None
    why: str = ""

    @property
    def file(self) -> str:
        return f"round-{self.number}.safetensors"

    @property
    def name(self) -> str:
        return f"round_{self.number}"

    @property
    def effects(self) -> tuple[float, float]:
        """What this round adds, and what its null control does, each as Cohen's d."""
        assert self.before and self.trained and self.null
        return added(self.before, self.trained), added(self.before, self.null)


@dataclass(frozen=True)
class Rounds:
    """What the rounds came to. `print` shows a row per round and the rule; `to_dict` is JSON. Made by `ll.steering_rounds`."""

    folder: Path
    rule: str
    rounds: tuple[Round, ...]

    def kept(self) -> list[tuple[Adapter, float]]:
        """The kept adapters and their doses, read from the folder: `history = ll.HistoryBake(model, found.kept())`."""
        return [(read(self.folder / r.file, r.name), r.dose) for r in self.rounds if r.dose is not None]

    def to_dict(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "kept": [r.number for r in self.rounds if r.dose is not None],
            "rounds": [{**asdict(r), "file": r.file} for r in self.rounds],
        }

    def __str__(self) -> str:
        rows = [["round", "shift before", "after", "effect", "null effect", "c from", "to", "acts on at"]]
        rows += [row(r) for r in self.rounds if r.why]
        return "\n".join([*aligned(rows), *(f"round {r.number}: {r.why}" for r in self.rounds), self.rule])


def row(r: Round) -> list[str]:
    assert r.before and r.trained and r.calibrated
    limits = [r.calibrated[side] for side in ("negative", "positive")]
    shown = [r.before["shift"], r.trained["shift"], *r.effects]
    return [str(r.number), *(f"{x:+.2f}" for x in shown), *("-" if x is None else f"{x:g}" for x in (*limits, r.dose))]


def added(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The difference of two checks' shifts over their pooled spread; 0.0 where there is no spread to compare with."""
    pooled = math.sqrt((spread(before) ** 2 + spread(after) ** 2) / 2)
    return (after["shift"] - before["shift"]) / pooled if pooled else 0.0


def spread(check: Mapping[str, Any]) -> float:
    """The standard deviation of the shift between pairs."""
    return check["shift"] / check["effect"] if check["effect"] else 0.0


def judged(now: Round, margin: float, dose: float) -> Round:
    """The rule's answer. `dose` is the most at which it may act on."""
    assert now.calibrated
    (effect, null), limit = now.effects, now.calibrated["positive"]
    compared = f"effect {effect:+.2f}, the null's {null:+.2f}"
    if not effect >= abs(null) + margin:
        return replace(now, why=f"dropped: {compared}, so {abs(null) + margin:.2f} was needed")
    if limit is None:
        return replace(now, why=f"dropped: {compared}, but {now.calibrated['verdict']}")
    dose = min(dose, limit)
    return replace(now, dose=dose, why=f"kept, and acts on at c = {dose:g}: {compared}; {now.calibrated['verdict']}")
