"""What does a layer hold with one kept adapter more, with one less, and what is it as a plain LoRA?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, marks
from lora_lite.attachment import Reader, fresh_parameter
from lora_lite.baked import Baked, Content, HistoryHook
from lora_lite.config import AdapterConfig
from lora_lite.hooks import HOOKS
from lora_lite.lowrank import LowRank
from lora_lite.target import Target
from lora_lite.variants import LoRAConfig


class Kept(NamedTuple):
    """What a history remembers of an adapter beside its tensors."""

    name: str
    config: AdapterConfig
    sizes: Mapping[str, tuple[int, int]]
    form: str
    marks: tuple[float, ...] = ()  # by which a copy of it is known: beside it, it would count twice


def kept_of(adapter: Adapter) -> Kept:
    return Kept(adapter.name, adapter.config, dict(adapter.sizes), adapter.variant.form, marks(adapter))


class Given(NamedTuple):
    """An adapter to keep. Asked for all layers at once: once per layer costs their square (2.2 s for a PiSSA on 168, not 0.05)."""

    adapter: Adapter
    tensors: Mapping[str, Mapping[str, Tensor]]
    updates: Mapping[str, LowRank]


@torch.no_grad()
def given(adapter: Adapter) -> Given:
    return Given(adapter, adapter.tensors(), adapter.factors() if adapter.variant.form == "low-rank" else {})


@torch.no_grad()
def extended(now: Content, baked: Baked, target: Target, place: int, given: Given) -> Content:
    """What a layer holds with one more adapter: clones, without gradients, on the layer's device."""
    like: Any = target.module.weight
    adapter = given.adapter
    if target.name in given.updates:
        A, B, g = given.updates[target.name]
        pair = {"lora_A": (g[:, None] if isinstance(g, Tensor) else g) * A, "lora_Bt": B.T.contiguous()}
        tensors = {baked.on_layer(f): value.to(like.device) for f, value in pair.items()}
        if now.parts:
            tensors = {name: torch.cat([now.tensors[name], value]) for name, value in tensors.items()}
        new = {name: fresh_parameter(value, like, False) for name, value in tensors.items()}
        return Content((*now.parts, (place, A.shape[0])), now.members, {**now.tensors, **new})
    variant, held = adapter.variant, given.tensors[target.name]
    names = {f: baked.on_layer(f, place) for f in held}
    cfg = adapter.config.at(target.name, target.d_in, target.d_out)
    reader = Reader(target.module, target.d_in, target.d_out, variant.reads_weight == "step")
    member = HOOKS[variant.form_at(cfg)](baked.dial, target.name, names, (), variant, cfg, reader, target.routed, baked)
    member.dropout = 0.0  # what is kept is no longer trained
    new = {names[f]: fresh_parameter(value, like, False) for f, value in held.items()}
    return Content(now.parts, (*now.members, (place, member)), {**now.tensors, **new})


@torch.no_grad()
def without(hook: HistoryHook, layer: nn.Module, place: int) -> Content:
    """What a layer holds without the adapter at `place`, the last one."""
    parts, members, tensors = hook.content(layer)
    gone = {name for i, member in members if i == place for _, name in member.fields}
    kept = {name: value for name, value in tensors.items() if name not in gone}
    if parts and parts[-1][0] == place:
        R = sum(r for _, r in parts[:-1])
        cut = {name: kept.pop(name)[:R] for name in (hook.A, hook.Bt)}
        kept |= {name: fresh_parameter(value, value, False) for name, value in cut.items()} if R else {}
        parts = parts[:-1]
    return Content(parts, tuple(m for m in members if m[0] != place), kept)


@torch.no_grad()
def as_lora(hook: HistoryHook, layer: nn.Module, doses: Sequence[float]) -> dict[str, Tensor]:
    """The additive pair with the doses in B."""
    tensors = hook.content(layer).tensors
    Bt = tensors[hook.Bt]
    gains = torch.tensor([doses[place] for place, r in hook.parts for _ in range(r)], dtype=Bt.dtype, device=Bt.device)
    return {"lora_A": tensors[hook.A].detach().clone(), "lora_B": (Bt * gains[:, None]).T.contiguous()}


def lora_config(ranks: Mapping[str, int], tensors: Mapping[str, Mapping[str, Tensor]]) -> LoRAConfig:
    """A config whose scale is 1 at every layer, whatever its rank."""
    ((r, n),) = Counter(ranks.values()).most_common(1)
    order = sorted(ranks, key=len, reverse=True)  # a pattern matches the end of a path: the longest first
    pattern = {} if n == len(ranks) else {re.escape(target): ranks[target] for target in order}
    dtype = next(iter(tensors.values()))["lora_A"].dtype
    return LoRAConfig(
        targets=tuple(re.escape(target) for target in ranks), r=r, alpha=float(r), dtype=dtype,
        rank_pattern=pattern, alpha_pattern={key: float(value) for key, value in pattern.items()},
    )  # fmt: skip
