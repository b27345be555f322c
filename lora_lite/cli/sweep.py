"""What does each c do? Text generated at many c in one batch, then judged: its trait, and its perplexity under the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

import lora_lite as ll
from lora_lite.cli.texts import logits_of, nats_per_token, pack, pad_id, prompt_ids
from lora_lite.cli.traits import Judge

SCORED_AT_ONCE = 64  # rows; their logits are the largest tensor here


@dataclass(frozen=True)
class Sampling:
    samples: int = 32  # per dose, shared out among the prompts
    length: int = 64  # new tokens at most
    temperature: float = 0.8
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    c: float
    prompt: str
    text: str
    trait: float
    perplexity: float


@dataclass(frozen=True)
class Dose:
    """What the samples of one c say together. trait: mean and its standard error; perplexity: median and quartiles."""

    c: float
    n: int
    trait: float
    trait_error: float
    perplexity: float
    quartiles: tuple[float, float]


def sweep(
    model: Any,
    tokenizer: Any,
    adapter: ll.Adapter,
    judge: Judge,
    doses: Sequence[float],
    prompts: Sequence[str],
    how: Sampling,
) -> list[Sample]:
    """`how.samples` samples for every dose, all of them in one generate with one c per row."""
    if not doses:
        return []
    rows = [(c, prompts[i % len(prompts)]) for c in doses for i in range(how.samples)]
    starts = [prompt_ids(tokenizer, prompt) for _, prompt in rows]
    torch.manual_seed(how.seed)
    written = generate(model, tokenizer, adapter, starts, torch.tensor([c for c, _ in rows]), how)
    perplexity = perplexities(model, tokenizer, adapter, starts, written)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [Sample(c, p, t, judge.probability(t), x) for (c, p), t, x in zip(rows, texts, perplexity, strict=True)]


def generate(model: Any, tokenizer: Any, adapter: ll.Adapter, starts: Sequence[list[int]], c: Tensor, how: Sampling) -> list[list[int]]:
    """What follows each start at that row's c, up to and with the end of text."""
    parts = [torch.arange(len(c))] if adapter.variant.row_c else [(c == value).nonzero()[:, 0] for value in c.unique()]
    found: dict[int, list[int]] = {}
    for part in parts:
        ids, mask = left_padded([starts[i] for i in part.tolist()], pad_id(tokenizer))
        dose = c[part] if adapter.variant.row_c else float(c[part][0])
        with torch.no_grad(), adapter(model, c=dose), tqdm(total=how.length, desc=f"generate {len(part)} rows", unit="token") as bar:
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True, temperature=how.temperature, top_k=0,
                top_p=1.0, max_new_tokens=how.length, pad_token_id=pad_id(tokenizer), streamer=Ticker(bar),
            )  # fmt: skip
        new = out[:, ids.shape[1] :].tolist()
        found.update((row, until_end(tokens, tokenizer.eos_token_id)) for row, tokens in zip(part.tolist(), new, strict=True))
    return [found[i] for i in range(len(c))]


class Ticker:
    """A transformers streamer that only counts: one tick of the bar per step, whatever the number of rows."""

    def __init__(self, bar: tqdm) -> None:
        self.bar, self.prompt_seen = bar, False

    def put(self, value: Any) -> None:
        if self.prompt_seen:
            self.bar.update()
        self.prompt_seen = True

    def end(self) -> None: ...


def left_padded(starts: Sequence[list[int]], pad: int) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
    """Prompts end together, so that all rows continue at the same place: ids and attention mask."""
    width = max(map(len, starts))
    ids = torch.tensor([[pad] * (width - len(s)) + s for s in starts])
    return ids, torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in starts])


def until_end(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@torch.no_grad()
def perplexities(model: Any, tokenizer: Any, adapter: ll.Adapter, starts: Sequence[list[int]], written: Sequence[list[int]]) -> list[float]:
    """exp(nats per token) of what was written, under the base: low is text the base would write itself."""
    found: list[float] = []
    with adapter(model, c=0.0):
        for i in tqdm(range(0, len(written), SCORED_AT_ONCE), desc="score under the base", unit="batch"):
            rows = pack(starts[i : i + SCORED_AT_ONCE], written[i : i + SCORED_AT_ONCE], pad_id(tokenizer), model.device)
            found.extend(nats_per_token(logits_of(model, rows), rows).exp().tolist())
    return found


def doses_of(samples: Sequence[Sample]) -> list[Dose]:
    """Samples by c, ascending."""
    found = []
    for c in sorted({s.c for s in samples}):
        traits, perplexity = (np.array([getattr(s, k) for s in samples if s.c == c]) for k in ("trait", "perplexity"))
        low, middle, high = np.quantile(perplexity, (0.25, 0.5, 0.75))
        error = traits.std() / max(1, len(traits) - 1) ** 0.5
        found.append(Dose(c, len(traits), float(traits.mean()), float(error), float(middle), (float(low), float(high))))
    return found


def gradual(doses: Sequence[Dose], share: float = 0.1) -> tuple[float, float] | None:
    """The stretch of c where the trait makes its way: from 10% to 90% of its range. None where it hardly moves at all."""
    traits = np.array([d.trait for d in doses])
    if np.ptp(traits) < 0.2:
        return None
    if traits[-1] < traits[0]:
        traits = -traits
    position = (traits - traits.min()) / np.ptp(traits)
    end = int(np.argmax(position >= 1 - share))
    start = int(np.flatnonzero(position[: end + 1] <= share).max(initial=0))
    return doses[start].c, doses[end].c
