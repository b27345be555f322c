"""What does an adapter cost where nothing else hides it: one token through 24 layers, 168 adapted linears?

Issue 2: attached at most 1.16x of the base and 0.90x of PEFT, gated off at most 1.03x, merged 1.00x. Each step is a plain
forward of one token per row without a cache, the same for everyone. The bound against PEFT is for one token; four rows are told.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from benchmarks.measure import Row, Setup, Step, ratio_row, time_rounds
from benchmarks.models import check_same, llama, ours, theirs, tokens, tree

BOUNDS = {
    ("no-op hooks", "base"): None,
    ("attached", "base"): 1.16,
    ("attached", "PEFT"): 0.90,
    ("off in a block", "base"): 1.03,
    ("off at rest", "base"): 1.03,
    ("merged", "own weights"): 1.00,  # merged weights lie elsewhere in memory than the base's, so against a base that was moved too
    ("own weights", "base"): None,
    ("PEFT", "base"): None,
    ("one c per row", "base"): None,
}


def rows(setup: Setup) -> Iterator[Row]:
    model = llama(device=setup.device)
    variants = Variants(model)
    for batch in (1, 4):
        ids = tokens(batch, 1, setup.device)
        seconds = time_rounds(variants.steps(ids), setup, rounds=80)
        for (name, peer), bound in BOUNDS.items():
            yield ratio_row("decode", f"{batch}x1", seconds, name, peer, bound if batch == 1 or peer != "PEFT" else None)


class Variants:
    """One base, seven ways to run it."""

    def __init__(self, model: Any) -> None:
        self.base, self.moved, self.hooked = model, copy.deepcopy(model), with_empty_hooks(tree(model))
        self.attached, self.adapter = ours(model)
        self.off, _ = ours(model, c=0.0)
        self.merged, adapter = ours(model)
        adapter.merge()
        self.peft = theirs(model, like=self.adapter)
        ids = tokens(2, 8, next(model.parameters()).device)
        check_same(self.attached, self.peft, ids, 1e-4)
        check_same(self.merged, self.peft, ids, 1e-4)
        check_same(self.off, self.base, ids, 0.0)

    def steps(self, ids: Tensor) -> Mapping[str, Step]:
        still = {
            "base": self.base, "own weights": self.moved, "no-op hooks": self.hooked, "attached": self.attached,
            "off at rest": self.off, "merged": self.merged, "PEFT": self.peft,
        }  # fmt: skip
        per_row = torch.linspace(0.5, 1.5, ids.shape[0], device=ids.device)
        turned = {"off in a block": 0.0, "one c per row": per_row}
        return {name: partial(forward, model, ids) for name, model in still.items()} | {
            name: partial(forward_at, self.attached, self.adapter, c, ids) for name, c in turned.items()
        }


@torch.no_grad()
def forward(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids)


@torch.no_grad()
def forward_at(model: nn.Module, adapter: ll.Adapter, c: float | Tensor, ids: Tensor) -> None:
    """The block is opened in the timed step, as for a generation of one token: the dearest case."""
    with adapter(model, c=c):
        model(input_ids=ids)


def with_empty_hooks(model: nn.Module) -> nn.Module:
    """The floor: what torch takes for calling a hook on the same layers."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.register_forward_hook(nothing, with_kwargs=True)
    return model


def nothing(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
    return None
