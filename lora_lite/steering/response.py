"""What does each c do? Trait and coherence of generated text against c, with effect sizes and a null control."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.steering import plot
from lora_lite.steering.arguments import check_adapter, check_rating, check_writes, is_real, told
from lora_lite.steering.coherence import Coherence, Measure, Rating, measures, name_of, rate
from lora_lite.steering.writing import Prompt, Writing, as_prompts, check_doses, on_model, write
from lora_lite.target import check_model

BOTH = ("distinct-3", "perplexity")
INSIDE = 3  # doses between the ends of a stretch that is called gradual
CLEAR = 4.0  # standard errors of the difference of its ends


def dose_response(
    model: nn.Module,
    adapter: Adapter,
    cs: Sequence[float] | Tensor,
    prompts: Sequence[str | Sequence[int]],
    *,
    tokenizer: Any,
    score: Rating,
    coherence: Coherence = BOTH,
    null: Adapter | None = None,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    max_rows: int = 256,
    progress: bool = True,
    **generate: Any,
) -> DoseResponse:
    """Generate at every c, and measure what was written.

        found = ll.dose_response(model, adapter, [-1, -0.5, 0.5, 1], prompts, tokenizer=tokenizer, score=smiles)
        print(found); found.plot("response.png")

    score      texts -> one number each: how much of the trait a text has
    coherence  "distinct-3", "perplexity" (under the base: c=0), functions like score (more for better text), or several of these
    null       an adapter trained in the same way on shuffled labels: what an effect must be compared with
    prompts    strings, as the tokenizer reads them, or token lists (of a chat template)

    All doses run in one batched generate, c=0 always among them: a row per (c, prompt, sample), at most max_rows at once. Each row
    is what a run of its own gives, up to the order of sums in floating point; also at a temperature above 0, where all doses of a
    sample share their random numbers. Other keywords go to `model.generate`. Adapters that are not attached are so for the call;
    what else is attached keeps its own c. The model, its flags and the random state come out as they went in.

    Raises ValueError for no doses or prompts, an unknown measure, or a function that does not return one finite number per text.
    """
    check_model(model)
    check_writes(model)
    check_rating("score", score)
    for name, given in (("adapter", adapter), *([("null", null)] if null is not None else [])):
        check_adapter(given, name)
    how = Writing(max_new_tokens, temperature, samples, seed, max_rows, progress, generate)
    asked, named, doses = as_prompts(prompts, tokenizer), measures(coherence), check_doses(cs)
    if null is adapter:
        raise ValueError("null is the adapter itself; give another one, trained in the same way on shuffled labels")
    with ExitStack() as on:
        here = on.enter_context(on_model(model, adapter))
        control = on.enter_context(on_model(model, null, "steering_null")) if null is not None else None
        readings = read(model, here, tokenizer, asked, sorted({0.0, *doses}), score, named, how)
        others = read(model, control, tokenizer, asked, sorted({*doses} - {0.0}), score, named, how) if control is not None else ()
    labels = tuple(p.text for p in asked), name_of(score, "trait"), tuple(m.name for m in named)
    base = tuple(r for r in readings if r.c == 0)  # the null's own c=0 is the same base
    null_readings = tuple(sorted((*base, *others), key=lambda r: r.c))  # stable: prompts and samples stay in their order
    return DoseResponse(*labels, readings, DoseResponse(*labels, null_readings) if control is not None else None)


@dataclass(frozen=True)
class Reading:
    """One text and what was measured of it. `prompt` and `draw` count from 0."""

    c: float
    prompt: int
    draw: int
    text: str
    trait: float
    coherence: Mapping[str, float]


def read(
    model: Any,
    adapter: Adapter,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    cs: Sequence[float],
    score: Rating,
    named: Sequence[Measure],
    how: Writing,
) -> tuple[Reading, ...]:
    """Write, then measure. Inside `on_model`."""
    samples = write(model, adapter, tokenizer, prompts, cs, how)
    traits = rate("score", score, [s.text for s in samples])
    columns = {m.name: m.of(model, adapter, samples, how.max_rows) for m in named}
    return tuple(
        Reading(s.c, s.prompt, s.draw, s.text, trait, {name: column[i] for name, column in columns.items()})
        for i, (s, trait) in enumerate(zip(samples, traits, strict=True))
    )


@dataclass(frozen=True)
class Dose:
    """What the texts at one c say together.

    trait, error     mean over prompts and its standard error (None for one prompt)
    effect           see `effect_size`
    coherence        mean of each measure, geometric for perplexity
    relative         coherence relative to c=0: 1 there, less where text falls apart (0.5 for twice c=0's perplexity; print has 2.00x)
    """

    c: float
    n: int
    trait: float
    error: float | None
    effect: float | None
    coherence: Mapping[str, float]
    relative: Mapping[str, float]


def effect_size(here: Sequence[float], there: Sequence[float]) -> float | None:
    """Cohen's d: (mean(here) - mean(there)) / sqrt((var(here) + var(there)) / 2), variances over prompts with n - 1.

    None for fewer than two prompts; infinite where the prompts do not differ among each other at all, but the means do.
    """
    if len(here) < 2 or len(there) < 2:
        return None
    difference = statistics.fmean(here) - statistics.fmean(there)
    spread = math.sqrt((statistics.variance(here) + statistics.variance(there)) / 2)
    return difference / spread if spread > 0 else math.copysign(math.inf, difference) if difference else 0.0


@dataclass(frozen=True)
class DoseResponse:
    """The table of a sweep: `print` shows it by dose, `to_dict` is JSON, `plot(path)` draws it. Made by `ll.dose_response`.

    readings   one per (c, prompt, sample), by ascending c
    null       the same of the null control, or None
    """

    prompts: tuple[str, ...]
    trait: str
    measures: tuple[str, ...]
    readings: tuple[Reading, ...]
    null: DoseResponse | None = None

    def __post_init__(self) -> None:
        if not any(r.c == 0 for r in self.readings):
            raise ValueError(f"there are no readings at c=0, which every other dose is compared with; there are {self.cs}")

    @property
    def cs(self) -> list[float]:
        return sorted({r.c for r in self.readings})

    @property
    def doses(self) -> list[Dose]:
        """The readings by c, ascending."""
        return [self.at(c) for c in self.cs]

    def at(self, c: float) -> Dose:
        """What was found at one c. Raises KeyError naming the doses there are."""
        if c not in self.cs:
            raise KeyError(f"c={c} was not measured; there is {self.cs}")
        here, there = self.by_prompt(c), self.by_prompt(0.0)
        error = statistics.stdev(here) / len(here) ** 0.5 if len(here) > 1 else None
        raw, relative = {}, {}
        for m in map(Measure, self.measures, [0.0] * len(self.measures)):
            values, reference = ([r.coherence[m.name] for r in self.readings if r.c == at] for at in (c, 0.0))
            raw[m.name], relative[m.name] = m.mean(values), m.relative(values, reference)
        return Dose(c, len(here), statistics.fmean(here), error, effect_size(here, there), raw, relative)

    def by_prompt(self, c: float) -> list[float]:
        """The trait of each prompt, mean over its samples: samples of one prompt are no evidence of their own."""
        return [statistics.fmean(r.trait for r in self.readings if r.c == c and r.prompt == i) for i in range(len(self.prompts))]

    def effects(self) -> dict[float, float | None]:
        """Effect size by c. `found.null.effects()` are those of the null control: what chance and training alone do."""
        return {dose.c: dose.effect for dose in self.doses}

    def gradual(self, least: float = 0.0, share: float = 0.1) -> tuple[float, float] | None:
        """The `stretch` of c where the trait changes gradually, if that is what was measured; None where it is not.

        It takes three doses between the ends (one alone is c=0, which lies in the middle of a switch too), and a change from one
        end to the other of four standard errors (the range of a dozen doses that differ by chance is three).
        """
        found = self.stretch(least, share)
        return found if found and self._clear(found) and self._between(found) >= INSIDE else None

    def way(self, least: float = 0.0) -> str:
        """How the trait moves with c, in a sentence that claims no more than the doses show."""
        if (found := self.stretch(least)) is None:
            return f"{self.trait} hardly moves with c"
        low, high = (f"{c:.3g}" for c in found)
        if self.gradual(least):
            return f"{self.trait} is gradual from c = {low} to {high}"
        why = f"the change of {self.trait} is not clear of its standard errors over the prompts"
        if self._clear(found):
            why = (
                f"{self.trait} changes from c = {low} to {high}, and there are {self._between(found)} doses in between, of {INSIDE} needed"
            )
        return f"no gradual stretch was resolved: {why}"

    def _clear(self, ends: tuple[float, float]) -> bool:
        first, last = map(self.at, ends)
        errors = (first.error, last.error)
        return None not in errors and abs(last.trait - first.trait) > CLEAR * math.hypot(*errors)  # type: ignore[arg-type]

    def _between(self, ends: tuple[float, float]) -> int:
        return sum(ends[0] < c < ends[1] for c in self.cs)

    def stretch(self, least: float = 0.0, share: float = 0.1) -> tuple[float, float] | None:
        """Where the trait makes its way from the level it begins at to the level it ends at, as far as these doses tell.

        It begins at the last dose that is still on the first level: nearer to the mean of the doses on it so far than `share` of the
        trait's whole range. It ends at the first dose that is on the last level, found in the same way from the other side.
        It may be a single step, or chance: a place to look closer, `gradual` is what can be claimed. None where the range is not
        above `least`: a trait that does not move has no way to make.
        """
        if not (is_real(least) and is_real(share) and 0 < share < 0.5):
            raise ValueError(f"least is a number, and share a part of the range, between 0 and 0.5; got {least!r:.60}, {share!r:.60}")
        doses = self.doses
        ends = doses[0].trait, doses[-1].trait
        traits = [d.trait if ends[0] <= ends[1] else -d.trait for d in doses]
        low, high = min(traits), max(traits)
        if not high - low > least:
            return None
        arrived = max(1, len(traits) - 1 - level([-t for t in reversed(traits)], share * (high - low)))
        left = level(traits[:arrived], share * (high - low))
        return doses[left].c, doses[arrived].c

    def joined(self, other: DoseResponse) -> DoseResponse:
        """Both tables as one: a sweep, then a finer one where it was steep. A dose that is in both keeps its readings here.

        Raises ValueError where they do not speak of the same: prompts, trait or measures.
        """
        if not isinstance(other, DoseResponse):
            raise TypeError(f"a DoseResponse is joined with another; got {told(other)}")
        labels = [(x.prompts, x.trait, x.measures, x.null is None) for x in (self, other)]
        if labels[0] != labels[1]:
            raise ValueError("these tables differ in prompts, trait or measures, or only one has a null: measure both in one way")
        more = tuple(r for r in other.readings if r.c not in self.cs)
        null = self.null.joined(other.null) if self.null and other.null else None
        return dataclasses.replace(self, readings=tuple(sorted((*self.readings, *more), key=lambda r: r.c)), null=null)

    def to_dict(self) -> dict[str, Any]:
        """JSON: every reading, and the doses derived from them (an infinite effect is None)."""
        plain = {"prompts": list(self.prompts), "trait": self.trait, "measures": list(self.measures)}
        rows = {"readings": [asdict(r) for r in self.readings], "doses": [finite(asdict(d)) for d in self.doses]}
        return {**plain, **rows, "null": self.null.to_dict() if self.null else None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DoseResponse:
        """What `to_dict` wrote; the doses are derived again. Raises ValueError for anything else."""
        try:
            null = cls.from_dict(data["null"]) if data["null"] else None
            return cls(tuple(data["prompts"]), data["trait"], tuple(data["measures"]), tuple(Reading(**r) for r in data["readings"]), null)
        except (KeyError, TypeError) as error:
            keys = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"that is not what DoseResponse.to_dict wrote: {type(error).__name__} {error}; it has {keys}") from error

    def plot(self, path: str | os.PathLike[str], zoom: tuple[float, float] | None = None, title: str = "") -> None:
        """Trait and coherence against c, with bands over prompts and the null control. The file's ending chooses the format.

        zoom   a stretch of c to shade, and to show once more where that makes it larger: found.gradual(), or one of your own
        Trait: mean and standard error; coherence: quartiles. The folder is made where there is none. Raises ImportError where
        matplotlib is not installed, ValueError for a zoom that is no stretch of the doses.
        """
        panels = [plot.Panel(f"{self.trait}\n(mean ± standard error over {len(self.prompts)} prompts)", self._trait_curves())]
        panels += [coherence_panel(name, self._coherence_curves(name)) for name in self.measures]
        plot.against_c(path, panels, zoom, title, self._moved(zoom) if zoom and zoom == self.gradual() else "")

    def _moved(self, ends: tuple[float, float]) -> str:
        first, last = (self.at(c).trait for c in ends)
        return f"{self.trait} {'rises' if last > first else 'falls'} from {first:.2f} to {last:.2f}"

    def _trait_curves(self) -> list[plot.Curve]:
        def curve(name: str, found: DoseResponse) -> plot.Curve:
            doses = found.doses
            errors = [d.error or 0.0 for d in doses]
            band = [d.trait - e for d, e in zip(doses, errors, strict=True)], [d.trait + e for d, e in zip(doses, errors, strict=True)]
            return plot.Curve(name, [d.c for d in doses], [d.trait for d in doses], band)

        return [curve("adapter", self), *([curve("null control", self.null)] if self.null else [])]

    def _coherence_curves(self, name: str) -> list[plot.Curve]:
        def curve(label: str, found: DoseResponse) -> plot.Curve:
            doses = found.doses
            each = [[r.coherence[name] for r in found.readings if r.c == d.c] for d in doses]
            return plot.Curve(label, [d.c for d in doses], [d.coherence[name] for d in doses], plot.quartiles(each))

        return [curve("adapter", self), *([curve("null control", self.null)] if self.null else [])]

    def __str__(self) -> str:
        null = {d.c: d for d in self.null.doses} if self.null else {}
        head = ["c", self.trait, "effect", *(["null effect"] if null else []), *(f"{name} (x c=0's)" for name in self.measures)]
        rows = [head]
        for d in self.doses:
            of_null = [number(null[d.c].effect, "+.2f")] if null else []
            trait = number(d.trait, ".3f") + (f" ± {d.error:.3f}" if d.error is not None else "")
            coherence = [f"{d.coherence[name]:.3g} ({Measure(name, 0.0).times(d.relative[name])})" for name in self.measures]
            rows.append([f"{d.c:g}", trait, number(d.effect, "+.2f"), *of_null, *coherence])
        n = len(self.prompts)
        said = f"effect: (mean at c - mean at 0) / pooled standard deviation over the prompts (Cohen's d); {n} prompts"
        return "\n".join([*aligned(rows), said])


def level(traits: Sequence[float], near: float) -> int:
    """The last place that is still on the level where they begin."""
    last = 0
    for i, t in enumerate(traits):
        if t - statistics.fmean(traits[: last + 1]) <= near:
            last = i
    return last


def coherence_panel(name: str, curves: list[plot.Curve]) -> plot.Panel:
    if name == "perplexity":
        return plot.Panel("perplexity under the base\n(geometric mean, quartiles)", curves, log=True)
    meaning = " (1: no repeats)" if name == "distinct-3" else ""
    return plot.Panel(f"{name}{meaning}\n(mean, quartiles)", curves, share=name == "distinct-3")


def finite(fields: dict[str, Any]) -> dict[str, Any]:
    """With None for what JSON cannot hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as columns, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
