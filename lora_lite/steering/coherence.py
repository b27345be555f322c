"""Does what was written still hold together, compared with what c=0 writes?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lite.adapter import Adapter
from lora_lite.steering.arguments import check_rating, is_real, told
from lora_lite.steering.likelihood import nats
from lora_lite.steering.writing import Sample

Rating = Callable[[list[str]], Any]  # texts -> one number each
Coherence = str | Rating | Sequence[str | Rating]

# The least that counts as coherent, relative to c=0. A trait is a style of its own, which the base finds unlikely: perplexity is
# given room, 3 times that of c=0's text.
FLOORS = {"distinct-3": 0.7, "perplexity": 1 / 3}
OWN_FLOOR = 0.8
MOST_NATS = 700.0  # exp of more is no float
BUILT_IN = tuple(FLOORS)


def distinct(ids: Sequence[Sequence[int]], n: int = 3) -> list[float]:
    """Of each text's n-grams, the share that is distinct: 1 without repetition, near 0 in a loop (Li et al., arXiv:1510.03055).

    distinct([[1, 2, 3, 4], [7, 7, 7, 7, 7]]) == [1.0, 1/3]; 1.0 for a text too short to repeat itself.
    """
    found = []
    for tokens in ids:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        found.append(len(set(grams)) / len(grams) if grams else 1.0)
    return found


def perplexity(model: Any, adapter: Adapter, samples: Sequence[Sample], max_rows: int = 64) -> list[float]:
    """exp(nats per token) of what was written, the prompt not counted, under the base: `adapter` at c=0, a gated history shut."""
    with adapter(model, c=0.0):
        found = nats(model, [s.start for s in samples], [s.ids for s in samples], max_rows)
    return [math.exp(min(x, MOST_NATS)) for x in found]


def rate(what: str, function: Rating, texts: list[str]) -> list[float]:
    """What a user's function says of each text, as floats. Raises TypeError or ValueError where that is not one finite number per text."""
    try:
        found = function(texts)
    except Exception as error:
        error.add_note(f"in {what}, which was called with a list of {len(texts)} texts, for one number each")
        raise
    given = found.tolist() if hasattr(found, "tolist") else found
    values = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping) else None
    if values is None or any(isinstance(x, str) or not hasattr(x, "__float__") for x in values):
        raise TypeError(f"{what} must return one number per text; for {len(texts)} texts it returned {told(found)}")
    values = [float(x) for x in values]
    if len(values) != len(texts):
        raise ValueError(f"{what} was given {len(texts)} texts and returned {len(values)} numbers; it must return one for each")
    if wrong := next(((x, t) for x, t in zip(values, texts, strict=True) if not math.isfinite(x)), None):
        raise ValueError(f"{what} must return finite numbers; it returned {wrong[0]} for the text {wrong[1][:80]!r}")
    return values


@dataclass(frozen=True)
class Measure:
    """One way to see whether text holds together. `relative` of a dose is 1 at c=0 and less where it falls apart.

    perplexity   that of c=0's text over that of c's, as geometric means; told the other way round, as `multiple` has it
    others       the mean at c over the mean at c=0; a user's function gives more for better text
    """

    name: str
    floor: float
    function: Rating | None = None

    def of(self, model: Any, adapter: Adapter, samples: Sequence[Sample], max_rows: int) -> list[float]:
        """One number per sample."""
        if self.function is not None:
            return rate(f"coherence {self.name!r}", self.function, [s.text for s in samples])
        if self.name == "perplexity":
            return perplexity(model, adapter, samples, max_rows)
        return distinct([s.ids for s in samples])

    def mean(self, values: Sequence[float]) -> float:
        return statistics.geometric_mean(values) if self.name == "perplexity" else statistics.fmean(values)

    def relative(self, values: Sequence[float], reference: Sequence[float]) -> float:
        here, there = self.mean(values), self.mean(reference)
        if there <= 0:
            raise ValueError(f"coherence {self.name!r} is {there} at c=0 on average: nothing can be compared with that; it must be above 0")
        return there / here if self.name == "perplexity" else here / there

    def multiple(self, relative: float) -> float:
        """How many times c=0's value the value at c is: above 1 for a perplexity that rose, below 1 for a share that fell."""
        if self.name != "perplexity":
            return relative
        return 1 / relative if relative else math.inf

    def times(self, relative: float, form: str = ".2f") -> str:
        """The same in print: 1.14x."""
        return f"{self.multiple(relative):{form}}x"

    def failure(self, relative: float) -> str:
        """Why text like that does not hold together, in words; empty where it does."""
        if relative >= self.floor:
            return ""
        bound = "ceiling" if self.name == "perplexity" else "floor"
        return f"{self.name} {self.times(relative, '.3g')} c=0's, {bound} {self.times(self.floor, '.3g')}"


def measures(coherence: Coherence, floors: Mapping[str, float] | None = None) -> tuple[Measure, ...]:
    """What was asked for, by name. Raises ValueError for an unknown name, the same name twice, a floor for none of them or no number;
    TypeError for what is neither name nor function."""
    alone = isinstance(coherence, str) or callable(coherence) or not isinstance(coherence, Iterable) or isinstance(coherence, Mapping)
    asked: list[Any] = [coherence] if alone else list(coherence)  # type: ignore[arg-type]
    for x in asked:
        if not isinstance(x, str):
            check_rating(f"coherence is {', '.join(map(repr, BUILT_IN))}, or a list of them and functions; a function", x)
    if unknown := [x for x in asked if isinstance(x, str) and x not in BUILT_IN]:
        raise ValueError(f"coherence {unknown} is unknown; there is {', '.join(BUILT_IN)}, or a function of your own: texts -> numbers")
    named = [(x, None) if isinstance(x, str) else (name_of(x), x) for x in asked]
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise ValueError(f"coherence measures share a name: {names}; give each function a __name__ of its own")
    if floors is not None and not isinstance(floors, Mapping):
        raise TypeError(f'floors is a mapping of a measure to its floor, e.g. {{"perplexity": 0.5}}; got {told(floors)}')
    if idle := set(floors or {}) - set(names):
        raise ValueError(f"floors has {sorted(map(str, idle))}, but the coherence measures are {names}")
    if wrong := {name: floor for name, floor in (floors or {}).items() if not is_real(floor)}:
        raise ValueError(f"a floor is a number relative to c=0, e.g. 0.8; got {wrong}")
    floors = FLOORS | dict(floors or {})
    return tuple(Measure(name, floors.get(name, OWN_FLOOR), function) for name, function in named)


def name_of(function: Rating, otherwise: str = "coherence") -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return otherwise if name == "<lambda>" else name
