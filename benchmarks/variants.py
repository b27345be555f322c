"""What does each method of the family cost beside PEFT's, in time and in tensors kept for the backward?

Issue 4: HRA at least 8x faster with a fifth of the saved bytes; OFT, ROAD, IA3, DeLoRA, VeRA, HiRA and MiSS no slower, each at or
under PEFT's saved bytes. PEFT gets the same numbers through a folder, so both compute the same.

128 tokens, as in dora.py: PEFT's dense product of reflections costs the same however many there are, so that with more of them
both approach the base's own step, which at 256 tokens in float32 is already a ninth of PEFT's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaForCausalLM

import lora_lite as ll
from benchmarks.dora import there_and_back
from benchmarks.measure import Row, Setup, exact, ratio_row, time_rounds
from benchmarks.models import check_same, llama, tokens, tree
from benchmarks.train import saved_bytes, trainable

LAYERS, BATCH, LENGTH = 4, 2, 64


class Case(NamedTuple):
    """A config, and the bounds on our share of PEFT's time and bytes."""

    config: ll.AdapterConfig
    time: float = 1.0
    bytes: float = 1.0
    rounds: int = 24


CASES = {
    "hra": Case(ll.HRAConfig(r=8), 1 / 8, 1 / 5, 6),
    "hra_gs": Case(ll.HRAGSConfig(r=8), 1 / 8, 1 / 5, 6),
    "oft": Case(ll.OFTConfig(block_size=32)),
    "oft neumann": Case(ll.OFTConfig(block_size=32, cayley="neumann")),
    "road": Case(ll.ROADConfig(group_size=32)),  # PEFT has one size for all layers: 1376 is no multiple of 64
    "ia3": Case(ll.IA3Config()),
    "delora": Case(ll.DeLoRAConfig(r=8, init="zeros")),
    "vera": Case(ll.VeRAConfig(r=256)),
    "hira": Case(ll.HiRAConfig(r=16)),
    "miss": Case(ll.MiSSConfig(r=64)),
}


def rows(setup: Setup) -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        model, ids = llama(layers=LAYERS, dtype=dtype, device=setup.device), tokens(BATCH, LENGTH, setup.device)
        for name, case in CASES.items():
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            trained = both(model, case.config)
            check_same(*trained.values(), tokens(2, 8, setup.device), 1e-4 if dtype is torch.float32 else 0.1)
            saved = {who: float(saved_bytes(net.train(), ids)) for who, net in trained.items()}
            share = exact(saved["lora_lite"] / saved["PEFT"])
            yield Row("variants", f"{label} saved bytes: lora_lite / PEFT", share, case.bytes, medians=saved)
            steps = {who: partial(there_and_back, net, trainable(net), ids) for who, net in trained.items()}
            yield ratio_row("variants", label, time_rounds(steps, setup, case.rounds, warmup=2), "lora_lite", "PEFT", case.time)


def both(model: LlamaForCausalLM, config: ll.AdapterConfig) -> dict[str, nn.Module]:
    """Trees over one model with one adapter of random values: ours, and PEFT's of the same numbers."""
    twin, peer = tree(model), tree(model)
    adapter, draw = ll.attach(twin, config, seed=0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=draw).to(p.device))
    with tempfile.TemporaryDirectory() as folder:
        ll.to_peft(adapter, folder)
        wrapped = PeftModel.from_pretrained(peer, folder, is_trainable=True)
    return {"lora_lite": twin, "PEFT": wrapped}
