"""How far does something hold, going out from 0 in steps? The answer is a step that was tried, and none before it failed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

Holds = Callable[[list[float]], Sequence[bool]]  # doses, of both signs, tried at once -> whether each holds


def limits(
    holds: Holds, grid: Sequence[float], signs: Sequence[int] = (1, -1), doublings: int = 3, sections: int = 4, rounds: int = 2
) -> dict[int, float | None]:
    """The largest dose by sign, or None where none holds.

    First the whole grid; a sign that holds on all of it goes on to twice the last dose, at most `doublings` times; then the gap
    between what held and the first failure is cut into `sections`, `rounds` times. Each step tries its doses of both signs in
    one call. Whatever the shape of the curve, every dose of the grid below the answer was tried and held: a dose that fails is
    never passed over for one further out that holds again.
    """
    tried: dict[float, bool] = {}

    def attempt(doses: Iterable[float]) -> None:
        if fresh := [c for c in doses if c not in tried]:
            tried.update(zip(fresh, map(bool, holds(fresh)), strict=True))

    attempt(sign * c for sign in signs for c in grid)
    for _ in range(doublings):
        attempt([sign * 2 * held for sign in signs for held, failed in [gap(tried, sign)] if math.isinf(failed)])
    for _ in range(rounds):
        attempt([sign * c for sign in signs for c in cuts(*gap(tried, sign), sections)])
    return {sign: sign * held if (held := gap(tried, sign)[0]) else None for sign in signs}


def gap(tried: Mapping[float, bool], sign: int) -> tuple[float, float]:
    """Up to where it held without a failure, and the first failure: infinite where there is none."""
    held = 0.0
    for c in sorted(abs(c) for c in tried if c * sign > 0):
        if not tried[sign * c]:
            return held, c
        held = c
    return held, math.inf


def cuts(low: float, high: float, sections: int) -> list[float]:
    """The inner ends of equal sections; none where nothing failed."""
    return [low + (high - low) * i / sections for i in range(1, sections)] if math.isfinite(high) else []
