"""How far can c be turned before the model falls apart?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_lite.adapter import Adapter
from lora_lite.dial import check_float
from lora_lite.steering.arguments import check_adapter, check_list, check_whole, check_writes, is_real, told
from lora_lite.steering.coherence import Coherence, Measure, measures
from lora_lite.steering.likelihood import divergence
from lora_lite.steering.response import BOTH, aligned, finite
from lora_lite.steering.search import gap, limits
from lora_lite.steering.writing import Prompt, Sample, Writing, as_prompts, on_model, write

GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
PROBES = 4  # prompts whose texts are kept, at 0 and at the limits
AGGREGATES = ("mean", "rmse", "p95")


def calibrate_c(
    adapter: Adapter,
    prompts: Sequence[str | Sequence[int]],
    *,
    tokenizer: Any,
    model: nn.Module | None = None,
    mode: str = "largest",
    budget: float | None = None,
    aggregate: str = "mean",
    texts: Sequence[str] | None = None,
    coherence: Coherence = BOTH,
    floors: Mapping[str, float] | None = None,
    grid: Sequence[float] = GRID,
    doublings: int = 3,
    sections: int = 4,
    rounds: int = 2,
    max_new_tokens: int = 48,
    temperature: float = 0.8,
    samples: int = 1,
    seed: int = 0,
    max_rows: int = 256,
    progress: bool = True,
    **generate: Any,
) -> Calibration:
    """The largest |c| that is still all right, for each sign; kept as `adapter.calibrated`.

        found = ll.calibrate_c(adapter, prompts, tokenizer=tokenizer)
        print(found)                                         # the curve and a verdict in words
        with adapter(model, c=found.positive): ...

    mode="largest"   what is written at c is coherent relative to what c=0 writes: every measure of `coherence` (as for
                     `ll.dose_response`) at least its floor, by name in `floors`; distinct-3 0.7, others 0.8, perplexity 1/3 (3x c=0's)
    mode="iso_kl"    KL(p_c || p_0) per token stays within `budget` (nats), over what is written at c or over given `texts`, one
                     that continues each prompt; over tokens as `aggregate` says: the mean hides a short loop, rmse and p95 do not

    Every c of `grid` is tried, with both signs, in one batched generate; where all of it holds its end is doubled, at most
    `doublings` times; then the gap between the last that held and the first that failed is cut into `sections`, `rounds` times.
    The c returned was tried itself, and no smaller one that was tried failed.
    The temperature is above 0 because greedy text loops at c=0 already, and is likelier under the base than any style can be.

    Raises ValueError where a measure is 0 at c=0, or a budget is missing; RuntimeError where the adapter is merged.
    """
    check_adapter(adapter)
    how = Writing(max_new_tokens, temperature, samples, seed, max_rows, progress, generate)
    asked, steps = as_prompts(prompts, tokenizer), check_grid(grid, doublings, sections, rounds)
    model = model if model is not None else adapter.model
    if model is None:
        raise ValueError(f"adapter {adapter.name!r} is not attached; say for which model: calibrate_c(adapter, prompts, model=model, ...)")
    check_writes(model)
    given = as_texts(texts, asked, tokenizer) if texts is not None else None
    rule = rule_of(mode, budget, aggregate, coherence, floors, given is not None)
    with on_model(model, adapter) as here:
        bench = Bench(model, here, tokenizer, asked, how, given, rule)
        found = limits(bench.hold, steps, doublings=doublings, sections=sections, rounds=rounds)
    result = bench.result(mode, found[1], found[-1])
    adapter.calibrated = result.to_dict()
    return result


def check_grid(grid: Sequence[float], doublings: int, sections: int, rounds: int) -> list[float]:
    check_list("grid", grid, "[0.5, 1, 2]")
    check_whole(2, sections=sections)
    check_whole(0, rounds=rounds, doublings=doublings)
    steps = sorted({check_float(c) for c in grid})
    if not steps or steps[0] <= 0:
        raise ValueError(f"grid holds the sizes of c to try, all above 0 (each is tried with both signs); got {list(grid)}")
    return steps


def as_texts(texts: Sequence[str], prompts: Sequence[Prompt], tokenizer: Any) -> list[Sample]:
    """Given continuations, one for each prompt."""
    check_list("texts", texts, '["a continuation"]')
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"texts continue the prompts, in words; among them is {told(wrong[0])}")
    if len(texts) != len(prompts):
        raise ValueError(f"texts continue the prompts, one each: got {len(texts)} for {len(prompts)} prompts")
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    if empty := [i for i, tokens in enumerate(ids) if not tokens]:
        raise ValueError(f"texts {empty} have no tokens: there is nothing to compare")
    return [Sample(0.0, i, 0, p.ids, ids[i], texts[i]) for i, p in enumerate(prompts)]


# -- what must hold -------------------------------------------------------------------------------------------------------


class Coherent:
    """Every measure at least its floor, relative to c=0."""

    def __init__(self, measures: tuple[Measure, ...]) -> None:
        self.measures = measures
        self.reference: dict[str, list[float]] = {}

    def numbers(self, model: Any, adapter: Adapter, samples: Sequence[Sample], how: Writing) -> dict[str, float]:
        values = {m.name: m.of(model, adapter, samples, how.max_rows) for m in self.measures}
        self.reference = self.reference or values  # c=0 comes first
        return {m.name: m.relative(values[m.name], self.reference[m.name]) for m in self.measures}

    def failure(self, numbers: Mapping[str, float]) -> str:
        return ", ".join(said for m in self.measures if (said := m.failure(numbers[m.name])))

    def __str__(self) -> str:
        return "coherent"


class WithinBudget:
    """The divergence from c=0 at most the budget, over all tokens of a dose."""

    def __init__(self, budget: float, aggregate: str) -> None:
        self.budget, self.aggregate = budget, aggregate

    def numbers(self, model: Any, adapter: Adapter, samples: Sequence[Sample], how: Writing) -> dict[str, float]:
        starts, texts = [s.start for s in samples], [s.ids for s in samples]
        return aggregates(divergence(model, adapter, samples[0].c, starts, texts, how.max_rows))

    def failure(self, numbers: Mapping[str, float]) -> str:
        value = numbers[f"kl_{self.aggregate}"]
        return "" if value <= self.budget else f"{self.aggregate} KL {value:.3g} nats, budget {self.budget:.3g}"

    def __str__(self) -> str:
        return f"within {self.budget:g} nats"


Rule = Coherent | WithinBudget


def rule_of(mode: str, budget: float | None, aggregate: str, coherence: Coherence, floors: Mapping[str, float] | None, given: bool) -> Rule:
    """Raises ValueError for what does not go together."""
    if mode == "largest":
        if budget is not None or given:
            raise ValueError('budget and texts belong to mode="iso_kl"; mode="largest" judges its own text by coherence and floors')
        return Coherent(measures(coherence, floors))
    if mode != "iso_kl":
        raise ValueError(f'mode must be "largest" or "iso_kl", got {mode!r}')
    if floors or coherence != BOTH:
        raise ValueError('coherence and floors belong to mode="largest"; mode="iso_kl" looks at the divergence from c=0 alone')
    if budget is None or not (is_real(budget) and budget > 0):
        raise ValueError(f'mode="iso_kl" needs a budget above 0, in nats per token, e.g. 0.2; got {budget!r:.60}')
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate must be one of {AGGREGATES}, got {aggregate!r}")
    return WithinBudget(budget, aggregate)


def aggregates(values: Sequence[float]) -> dict[str, float]:
    """Of a divergence token by token: mean, root mean square, 95th percentile."""
    x = torch.tensor(values, dtype=torch.float64)
    return {"kl_mean": float(x.mean()), "kl_rmse": float(x.square().mean().sqrt()), "kl_p95": float(x.quantile(0.95))}


# -- trying it ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """One c, and what was measured of it. `failure` says why it does not hold; empty where it does.

    numbers   of mode="largest" each measure's coherence relative to c=0, less where it is worse (`Measure.relative`: 1/3 is a
              perplexity of 3x c=0's); of mode="iso_kl" nats
    """

    c: float
    numbers: Mapping[str, float]
    failure: str

    @property
    def holds(self) -> bool:
        return not self.failure


class Bench:
    """Tries doses and remembers them."""

    def __init__(
        self, model: Any, adapter: Adapter, tokenizer: Any, prompts: list[Prompt], how: Writing, given: list[Sample] | None, rule: Rule
    ) -> None:
        self.model, self.adapter, self.tokenizer, self.prompts, self.how = model, adapter, tokenizer, prompts, how
        self.given, self.rule = given, rule
        self.tried: dict[float, Tried] = {}
        self.texts: dict[float, list[Sample]] = {}

    def hold(self, cs: list[float]) -> list[bool]:
        doses = cs if self.tried else [0.0, *cs]
        for c, samples in self.write(doses).items():
            numbers = self.rule.numbers(self.model, self.adapter, samples, self.how)
            self.tried[c] = Tried(c, numbers, self.rule.failure(numbers))
            self.texts[c] = [s for s in samples if s.prompt < PROBES and s.draw == 0]
        return [self.tried[c].holds for c in cs]

    def write(self, cs: list[float]) -> dict[float, list[Sample]]:
        if self.given is not None:
            return {c: [dataclasses.replace(s, c=c) for s in self.given] for c in cs}
        found: dict[float, list[Sample]] = {c: [] for c in cs}
        for sample in write(self.model, self.adapter, self.tokenizer, self.prompts, cs, self.how):
            found[sample.c].append(sample)
        return found

    def result(self, mode: str, positive: float | None, negative: float | None) -> Calibration:
        curve = tuple(self.tried[c] for c in sorted(self.tried))
        ends = [c for c in (negative, 0.0, positive) if c is not None]
        probes = tuple(Probe(c, self.prompts[s.prompt].text, s.text) for c in ends for s in self.texts[c])
        verdict = "; ".join(self.said(sign, name) for sign, name in ((1, "positive"), (-1, "negative")))
        return Calibration(positive, negative, mode, curve, verdict, probes)

    def said(self, sign: int, name: str) -> str:
        """The verdict on one sign, in words."""
        held, failed = gap({c: tried.holds for c, tried in self.tried.items()}, sign)
        if not held:
            return f"no {name} c is {self.rule}: {sign * failed:g} already has {self.tried[sign * failed].failure}"
        if math.isinf(failed):
            return f"every {name} c tried is {self.rule}, up to {sign * held:g}; the limit may lie beyond"
        return f"{name} c is {self.rule} up to {sign * held:g}; {sign * failed:g} has {self.tried[sign * failed].failure}"


# -- the result -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A text to read: numbers do not tell everything."""

    c: float
    prompt: str
    text: str


@dataclass(frozen=True)
class Calibration:
    """How far c goes. `print` shows curve and verdict; `to_dict` is what the adapter keeps. Made by `ll.calibrate_c`.

    positive, negative   the limits, each with its sign: 2.25 and -1.5. None where no c of that sign holds
    curve                every c that was tried, ascending, 0 too: its numbers, and why it fails if it does
    verdict              the same in words
    probes               texts of the first prompts at 0 and at the limits
    """

    positive: float | None
    negative: float | None
    mode: str
    curve: tuple[Tried, ...]
    verdict: str
    probes: tuple[Probe, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON (a number that is not finite is None). Of each c the curve has what is printed, as multiples of what c=0 has."""
        curve = [{"c": t.c, "holds": t.holds, **finite(self.told(t)), "failure": t.failure} for t in self.curve]
        limits = {"positive": self.positive, "negative": self.negative, "mode": self.mode}
        return {**limits, "curve": curve, "verdict": self.verdict, "probes": [dataclasses.asdict(p) for p in self.probes]}

    def __str__(self) -> str:
        times = self.mode == "largest"
        head = [f"{name} (x c=0's)" if times else name for name in self.curve[0].numbers]
        rows = [[f"{x:.3g}{'x' * times}" for x in self.told(t).values()] for t in self.curve]
        shown = [[f"{t.c:g}", *row, "" if t.holds else "fails"] for t, row in zip(self.curve, rows, strict=True)]
        return "\n".join([*aligned([["c", *head, ""], *shown]), self.verdict])

    def told(self, tried: Tried) -> dict[str, float]:
        """What people read: a perplexity that is 3x c=0's as 3, not as a coherence of a third."""
        if self.mode != "largest":
            return dict(tried.numbers)
        return {name: Measure(name, 0.0).multiple(value) for name, value in tried.numbers.items()}
