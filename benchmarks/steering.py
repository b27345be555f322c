"""What does turning the dial cost, and what a whole sweep of it?

Issue 3: entering a `with` takes at most 5 microseconds, whatever the number of layers; a sweep of 17 doses takes at most three
times as long as one generate of the same length, at the small sizes. The sweep is `ll.dose_response` of greedy text from one
prompt, with a score and distinct-3; and with the perplexity under the base too, as it is when nothing is said.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

import lora_lite as ll
from benchmarks.measure import Row, Setup, Spread, Step, ratio_row, time_rounds
from benchmarks.models import VOCABULARY, llama, ours, tokens

ENTRIES = 500  # in one timed step: a single one is shorter than the clock's tick
DOSES = torch.linspace(-2, 2, 17).tolist()
PROMPT, NEW = 16, 32
SIZES = ((4, 128), (8, 256))  # layers, width


def rows(setup: Setup) -> Iterator[Row]:
    for layers in (1, 64):
        yield from entering(setup, layers)
    for layers, d in SIZES:
        yield from sweeping(setup, layers, d)


def entering(setup: Setup, layers: int) -> Iterator[Row]:
    """Seconds for entering and leaving one block, less an empty one's."""
    config = ll.LoRAConfig(r=1, targets="q_proj$" if layers == 1 else "all-linear")
    model, adapter = ours(llama(layers=layers, d=64, device=setup.device), config)
    per_row = torch.tensor([0.5, 1.0], device=setup.device)
    steps: dict[str, Step] = {
        "empty": empty,
        "number": partial(enter, model, adapter, 0.7),
        "rows": partial(enter, model, adapter, per_row),
    }
    seconds = time_rounds(steps, setup, rounds=60)
    for name, bound in (("number", 5.0), ("rows", None)):
        taken = [1e6 * (a - b) / ENTRIES for a, b in zip(seconds[name], seconds["empty"], strict=True)]
        yield Row("steering", f"with adapter(model, c={name}), {len(adapter.targets)} targets", Spread.of(taken), bound, unit="us")


def empty() -> None:
    context = nullcontext()
    for _ in range(ENTRIES):
        with context:
            pass


def enter(model: Any, adapter: ll.Adapter, c: Any) -> None:
    for _ in range(ENTRIES):
        with adapter(model, c=c):
            pass


def sweeping(setup: Setup, layers: int, d: int) -> Iterator[Row]:
    base = llama(layers=layers, d=d, device=setup.device)
    base.generation_config.eos_token_id = None  # all texts are of one length
    model, adapter = ours(base)
    prompt = tokens(1, PROMPT, setup.device)
    steps: Mapping[str, Step] = {
        "one generate": partial(one, model, adapter, prompt),
        "17 doses": partial(sweep, model, adapter, prompt, ("distinct-3",)),
        "17 doses and perplexity": partial(sweep, model, adapter, prompt, ("distinct-3", "perplexity")),
    }
    seconds = time_rounds(steps, setup, rounds=12, warmup=1)
    for name in ("17 doses", "17 doses and perplexity"):
        yield ratio_row("steering", f"{layers} layers, d={d}, {NEW} tokens", seconds, name, "one generate", 3.0)


@torch.no_grad()
def one(model: Any, adapter: ll.Adapter, prompt: torch.Tensor) -> None:
    with adapter(model, c=1.0):
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, pad_token_id=0, use_cache=True
        )
    assert out.shape[1] == PROMPT + NEW


def sweep(model: Any, adapter: ll.Adapter, prompt: torch.Tensor, coherence: tuple[str, ...]) -> None:
    found = ll.dose_response(
        model, adapter, DOSES, prompt.tolist(), tokenizer=Numbers(), score=lambda texts: list(map(len, texts)), coherence=coherence,
        max_new_tokens=NEW, progress=False, use_cache=True,
    )  # fmt: skip
    assert found.cs == DOSES and statistics.fmean(len(r.text.split()) for r in found.readings) == NEW


class Numbers:
    """The least that a tokenizer is: every token is its number."""

    pad_token_id, eos_token_id, bos_token_id = 0, None, None
    vocab_size = VOCABULARY

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row) for row in rows]
