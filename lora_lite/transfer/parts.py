"""Which part of which layer of one model plays the role of which part of the other? By kind and depth; fused linears by their rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.target import Target, linear_layers

KINDS = {
    "q": "q q_proj wq query query_proj q_lin to_q",
    "k": "k k_proj wk key key_proj k_lin to_k",
    "v": "v v_proj wv value value_proj v_lin to_v",
    "o": """o o_proj wo Wo out_proj out_lin attn_out to_out to_out.0 attn.proj attn.c_proj attention.output.dense attention.dense
            self_attention.dense self_attn.dense""",
    "gate": "gate gate_proj w1 wi_0",
    "up": "up up_proj fc1 fc_in c_fc dense_h_to_4h w3 wi_1 wi lin1 linear1 intermediate.dense",
    "down": "down down_proj fc2 fc_out dense_4h_to_h w2 mlp.c_proj lin2 linear2 output.dense",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
QKV = ("qkv", "qkv_proj", "Wqkv", "wqkv", "W_pack", "c_attn", "query_key_value")
FUSED_OF = dict.fromkeys(QKV, "qkv") | {"gate_up_proj": "gate_up"}
PER_HEAD = ("gpt_neox", "bloom")  # query_key_value holds q, k and v of one head after another; elsewhere all q, then all k, then all v


@dataclass(frozen=True)
class Part:
    """A linear layer, or the rows of a fused one that belong together.

    kind  "q" ... "down" where the name says so, else its path inside the block
    rows  (n,) of its weight, or None for all of them
    """

    target: Target
    kind: str
    rows: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def module(self) -> str:
        return self.target.name

    @property
    def depth(self) -> int:
        return self.target.depth or 0

    @property
    def fused_kind(self) -> str:
        """Its kind where it is only a part of its module, else ""."""
        return "" if self.rows is None else self.kind

    @property
    def d_out(self) -> int:
        return self.target.d_out if self.rows is None else len(self.rows)

    @property
    def name(self) -> str:
        return self.module if self.rows is None else f"{self.module}[{self.kind}]"

    def of(self, rows: Tensor) -> Tensor:
        """This part of what has a fused layer's outputs along its first dimension."""
        return rows if self.rows is None else rows[self.rows.to(rows.device)]


class Anatomy:
    """A model's parts: by module, and by (stack, block, kind)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = {t.name: t for t in linear_layers(model)}
        self.problems: dict[str, str] = {}  # modules that cannot be told apart, and why
        self.parts = {t.name: list(self.parts_of(t)) for t in self.layers.values() if t.depth is not None}
        self.blocks: dict[str, int] = {t.stack: t.blocks or 0 for t in self.layers.values() if t.stack is not None}
        seats = Counter(self.seat(p) for parts in self.parts.values() for p in parts)
        self.at: dict[tuple[str | None, int | None, str], Part] = {}
        for parts in self.parts.values():
            for i, p in enumerate(parts):
                if seats[self.seat(p)] > 1:  # two of a kind in one block, as in an encoder-decoder: their paths tell them apart
                    parts[i] = p = Part(
                        p.target, f"{self.inside(p.target)}[{p.kind}]" if p.rows is not None else self.inside(p.target), p.rows
                    )
                self.at[self.seat(p)] = p

    @staticmethod
    def seat(part: Part) -> tuple[str | None, int | None, str]:
        return part.target.stack, part.target.depth, part.kind

    @staticmethod
    def inside(t: Target) -> str:
        """The path inside the block: "mlp.down_proj"."""
        return t.name.removeprefix(f"{block_of(t)}.")

    def parts_of(self, t: Target) -> Iterator[Part]:
        fused = FUSED_OF.get(t.name.rpartition(".")[2])
        if fused is None:
            yield Part(t, kind_of(t.name) or self.inside(t))
            return
        rows = fused_rows(self.model, t, fused)
        if rows is None:
            self.problems[t.name] = f"fused ({'+'.join(FUSED[fused])}), and how its {t.d_out} rows are laid out is not known"
            return
        yield from (Part(t, kind, index) for kind, index in zip(FUSED[fused], rows, strict=True))

    def down_of(self, part: Part) -> Part | None:
        """The linear that reads what `part` writes, after the activation: down for gate and up."""
        down = self.at.get((part.target.stack, part.target.depth, "down")) if part.kind in FUSED["gate_up"] else None
        return down if down is not None and down.target.d_in == part.d_out else None


def kind_of(path: str) -> str | None:
    """By the longest known end of a path: "mlp.c_proj" before "c_proj"."""
    parts = path.split(".")
    return next((kind for n in (3, 2, 1) if (kind := KIND_OF.get(".".join(parts[-n:])))), None)


def fused_rows(model: nn.Module, t: Target, fused: str) -> list[Tensor] | None:
    """The rows of q, k and v (or gate and up) in a fused weight, or None where the layout is not known."""
    if fused == "gate_up":
        return list(torch.arange(t.d_out).chunk(2)) if t.d_out % 2 == 0 else None
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads: int = getattr(config, "num_attention_heads", None) or 0
    if t.name.endswith("query_key_value"):
        if getattr(config, "model_type", None) not in PER_HEAD or not heads or t.d_out % (3 * heads):
            return None
        index = torch.arange(t.d_out).view(heads, 3, -1)
        return [index[:, i].flatten() for i in range(3)]
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    if not heads or t.d_out % (heads + 2 * kv_heads):
        return list(torch.arange(t.d_out).chunk(3)) if t.d_out == 3 * t.d_in else None
    d = t.d_out // (heads + 2 * kv_heads)
    return list(torch.arange(t.d_out).split([heads * d, kv_heads * d, kv_heads * d]))


def block_of(t: Target) -> str:
    """The path of the block around a linear: "model.layers.3"."""
    return f"{t.stack}.{t.depth}" if t.stack else str(t.depth)


# -- depth ----------------------------------------------------------------------------------------------------------------


def by_depth(n_source: int, n_target: int) -> dict[int, int]:
    """Block i of n goes where it is as deep in the other: first to first, last to last, halves up. A single block goes to the middle."""
    if n_source == 1:
        return {0: (n_target - 1) // 2}
    return {i: math.floor(i * (n_target - 1) / (n_source - 1) + 0.5) for i in range(n_source)}


def by_likeness(likeness: Tensor) -> dict[int, int]:
    """The map that never goes back up and has the largest sum of likeness (n_source, n_target): dynamic programming."""
    n, m = likeness.shape
    best, came = likeness.clone(), torch.zeros(n, m, dtype=torch.long)
    for i in range(1, n):
        highest, where = best[i - 1].cummax(0)
        best[i], came[i] = likeness[i] + highest, where
    path = [int(best[-1].argmax())]
    for i in range(n - 1, 0, -1):
        path.append(int(came[i, path[-1]]))
    return dict(enumerate(reversed(path)))


def partner_stack(source: Anatomy, target: Anatomy, stack: str) -> str | None:
    """The stack of the same path, or the only one where each model has one."""
    if stack in target.blocks:
        return stack
    return next(iter(target.blocks)) if len(source.blocks) == len(target.blocks) == 1 else None


def check_map(given: Any, source: Anatomy, target: Anatomy) -> None:
    """Raises ValueError for what is neither "depth", "cka", blocks to blocks, nor modules to modules."""
    if isinstance(given, str) and given in ("depth", "cka"):
        return
    possible = 'it can be "depth", "cka", {source block: target block} or {source module: target module}'
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"layer_map={given!r}: {possible}")
    for pair in given.items():
        for side, key, anatomy in zip(("source", "target"), pair, (source, target), strict=True):
            known: Sequence[Any] = list(anatomy.layers) if isinstance(key, str) else range(max(anatomy.blocks.values(), default=0))
            if isinstance(key, bool) or key not in known:
                raise ValueError(
                    f"layer_map has {key!r}, of which the {side} has none among {len(known)} ({list(known)[:3]}, ...); {possible}"
                )
