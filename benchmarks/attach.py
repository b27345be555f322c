"""How long until an adapter sits on 448 linears (64 layers of 7)?

Issue 2: a quarter of PEFT's time. Narrow layers measure the bookkeeping, wide ones the initial values too. Every call gets
a model of its own, made outside the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import lora_lite as ll
from benchmarks.measure import Row, Setup, Step, ratio_row, time_fresh
from benchmarks.models import ALPHA, R, llama, tree

LAYERS, WIDTHS = 64, (64, 512)


def rows(setup: Setup) -> Iterator[Row]:
    for d in WIDTHS:
        model = llama(layers=LAYERS, d=d, device=setup.device)
        makers: dict[str, Callable[[], Step]] = {"lora_lite": partial(attaching, model), "PEFT": partial(wrapping, model)}
        seconds = time_fresh(makers, setup, rounds=10, warmup=2)
        yield ratio_row("attach", f"{LAYERS * 7} linears, d={d}", seconds, "lora_lite", "PEFT", 0.25)


def attaching(model: LlamaForCausalLM) -> Step:
    return partial(ll.attach, tree(model), ll.LoRAConfig(r=R, alpha=ALPHA))


def wrapping(model: LlamaForCausalLM) -> Step:
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear")
    return partial(get_peft_model, tree(model), config)  # type: ignore[arg-type]
