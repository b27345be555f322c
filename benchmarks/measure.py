"""How much longer does one thing take than another, on a machine that is busy with something else?

Times drift by tens of percent on a shared box, ratios of neighbours far less. So everything that is compared runs once in
each of many short rounds, ratios are taken within a round, and the median and the quartiles of those ratios are reported.
The order is shuffled and then walked backwards in the next round, so that no one always follows the same other.

With one thread on a CPU the clock is the process's own: time spent waiting for others to leave the processor is not counted.
On an idle machine it shows what a wall clock shows; with a load of 4 to 5 on two cores the quartiles of a decode step's ratio
lay 2 % apart instead of 14 %.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

Step = Callable[[], object]
Seconds = dict[str, list[float]]  # by name, one entry per round


@dataclass(frozen=True)
class Setup:
    """Where to measure, and how long: `effort` scales the number of rounds."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    effort: float = 1.0
    threads: int = 1

    @property
    def clock(self) -> str:
        return "processor" if self.device.type == "cpu" and self.threads == 1 else "wall"

    def now(self) -> float:
        return time.process_time() if self.clock == "processor" else time.perf_counter()

    def rounds(self, n: int) -> int:
        return max(4, round(n * self.effort))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles over n rounds."""

    median: float
    q1: float
    q3: float
    n: int

    @property
    def margin(self) -> float:
        """How far the median itself may be off, 1.57 IQR / sqrt n: about 95 % (McGill, Tukey, Larsen 1978)."""
        return 1.57 * (self.q3 - self.q1) / math.sqrt(self.n)

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, len(values))


@dataclass(frozen=True)
class Row:
    """One line of the report: a figure, its spread, and what the issue allows (None where it is told for comparison only)."""

    benchmark: str
    name: str
    spread: Spread
    at_most: float | None = None
    at_least: float = 0.0
    unit: Literal["x", "s", "us"] = "x"
    medians: Mapping[str, float] = field(default_factory=dict)  # of what went into a ratio: seconds, or bytes

    @property
    def allowed(self) -> str:
        """The bound as words: "<= 1.16", "0.99..1.01", ">= 0.95", or nothing."""
        if self.at_most is None:
            return f">= {self.at_least:.2f}" if self.at_least else ""
        return f"{self.at_least:.2f}..{self.at_most:.2f}" if self.at_least else f"<= {self.at_most:.2f}"

    @property
    def verdict(self) -> str:
        """Is the bound kept? "ok", "over", or "unsure" where the median is over, but not by more than it may be off itself."""
        if self.at_most is None and not self.at_least:
            return ""
        if self.allows(self.spread.median):
            return "ok"
        return "unsure" if any(self.allows(self.spread.median + sign * self.spread.margin) for sign in (-1, 1)) else "over"

    def allows(self, value: float) -> bool:
        return self.at_least <= value and (self.at_most is None or value <= self.at_most)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_once(step: Step, setup: Setup) -> float:
    """Seconds for one call, with the device idle before and after it."""
    setup.wait()
    start = setup.now()
    step()
    setup.wait()
    return setup.now() - start


def time_rounds(steps: Mapping[str, Step], setup: Setup, rounds: int, warmup: int = 3) -> Seconds:
    """Time each step once per round. Steps keep their state between rounds; see `time_fresh` for those that use it up."""
    return time_fresh({name: partial(_kept, step) for name, step in steps.items()}, setup, rounds, warmup, collect=False)


def _kept(step: Step) -> Step:
    return step


def time_fresh(makers: Mapping[str, Callable[[], Step]], setup: Setup, rounds: int, warmup: int = 3, collect: bool = True) -> Seconds:
    """The same for steps that are made anew for each call; the making is not timed. `collect` picks up their garbage between."""
    names, shuffle = list(makers), random.Random(0).shuffle
    seconds: Seconds = {name: [] for name in names}
    with no_garbage_collection():
        for number in range(-warmup, setup.rounds(rounds)):
            if number % 2 == 0:
                shuffle(names)
            for name in names if number % 2 == 0 else reversed(names):
                step = makers[name]()
                elapsed = time_once(step, setup)
                del step
                if collect:
                    gc.collect()
                if number >= 0:
                    seconds[name].append(elapsed)
    return seconds


def ratio(seconds: Seconds, name: str, peer: str) -> Spread:
    """How many times as long `name` took as `peer`, each time beside it in the same round."""
    return Spread.of([a / b for a, b in zip(seconds[name], seconds[peer], strict=True)])


def ratio_row(
    benchmark: str, label: str, seconds: Seconds, name: str, peer: str, at_most: float | None = None, at_least: float = 0.0
) -> Row:
    medians = {name: statistics.median(seconds[name]), peer: statistics.median(seconds[peer])}
    return Row(benchmark, f"{label}: {name} / {peer}", ratio(seconds, name, peer), at_most, at_least, medians=medians)


def exact(value: float) -> Spread:
    """A figure that is counted, not timed."""
    return Spread(value, value, value, 1)
