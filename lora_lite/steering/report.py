"""What did a training do? The loss of each step, and what held-out pairs said of both poles along the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PoleCheck:
    """One pole on the held-out pairs.

    c             the pole
    shift         nats by which the odds between the two texts of a pair moved towards the chosen one since c = 0; mean
    effect        shift over its standard deviation between the pairs; 0.0 for a single pair
    agree         share of the pairs that moved in the pole's own direction
    kl, kl_rmse, kl_p95   nats per completion token from c = 0
    """

    c: float
    shift: float
    effect: float
    agree: float
    kl: float
    kl_rmse: float
    kl_p95: float


@dataclass(frozen=True)
class Check:
    """The held-out pairs after `step` steps: the training's own loss, and each pole."""

    step: int
    loss: float
    poles: tuple[PoleCheck, PoleCheck]


@dataclass(frozen=True)
class TrainingReport:
    """What `train_steering` did. `print(report)` says it in a line; `report.to_dict()` is JSON.

    recipe     the numbers it was made with
    pairs      how many were trained on, and held out
    losses     of each step
    cosines    between the two poles' gradients, of each step; empty without `project`
    checks     of the held-out pairs, from step 0 on; empty without a validation
    best_step  whose weights the adapter has now
    seconds    on the clock; the only field that differs from run to run
    """

    recipe: Mapping[str, Any]
    pairs: tuple[int, int]
    losses: tuple[float, ...]
    cosines: tuple[float, ...]
    checks: tuple[Check, ...]
    best_step: int
    seconds: float = field(compare=False)

    @property
    def best(self) -> Check | None:
        """The held-out check of the weights that were kept, None without a validation."""
        return next((check for check in self.checks if check.step == self.best_step), None)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        ends = f"loss {self.losses[0]:.3g} -> {self.losses[-1]:.3g}" if self.losses else "no steps"
        told = f"{len(self.losses)} steps on {self.pairs[0]} pairs, {ends}, weights of step {self.best_step}"
        if self.best is None:
            return told
        alone = self.pairs[1] == 1  # no spread, so no effect size either
        effects = ["no effect size of one pair" if alone else f"effect {p.effect:+.2f}" for p in self.best.poles]
        poles = [f"c={p.c:g}: odds {p.shift:+.2f} nats ({e}), KL {p.kl:.3g}" for p, e in zip(self.best.poles, effects, strict=True)]
        return f"{told}; on {self.pairs[1]} held-out pair{'s' * (not alone)} {'; '.join(poles)}"
