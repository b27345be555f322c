"""MiSS: y = W x + M^T (x_1 + x_2 + ...), x cut into blocks of r that share the rows of one shard M (r x d_out).  arXiv:2409.15371

As a low-rank update A is the identity tiled along d_in, and B = M^T. Where r does not divide d_in the last block is short,
as if x ended in zeros (PEFT's padding): A simply ends early. A forward adds the blocks up and makes no A; only their sum is kept for
the backward.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.config import RankDropoutConfig
from lora_lite.lowrank import LowRank
from lora_lite.variant import Base, Params, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class MiSSConfig(RankDropoutConfig):
    """`MiSSConfig(r=64)`: r * d_out numbers per layer. r is clamped to the layer's d_in."""

    variant: ClassVar[str] = "miss"
    r: int = 64

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        own = super().at(target, d_in, d_out)
        return dataclasses.replace(own, r=min(own.r, d_in))


@register
class MiSS(Variant):
    name = "miss"
    Config = MiSSConfig
    paper = "2409.15371"
    parameters: ClassVar[str] = "r * d_out"
    narrows = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MiSSConfig) -> dict[str, ParamSpec]:
        return {"lora_M": ParamSpec((cfg.r, d_out))}

    @staticmethod
    def factors(cfg: MiSSConfig, p: Params, base: Base) -> LowRank:
        M = p["lora_M"]
        blocks = -(-base.d_in // cfg.r)
        tiled = torch.eye(cfg.r, dtype=M.dtype, device=M.device).repeat(1, blocks)[:, : base.d_in]
        return LowRank(tiled, M.T)

    @staticmethod
    def narrowed(cfg: MiSSConfig, p: Params, x: Tensor) -> tuple[Tensor, Tensor, None]:
        return sum_of_blocks(x, cfg.r), p["lora_M"].T, None


def sum_of_blocks(x: Float[Tensor, "*batch d_in"], r: int) -> Float[Tensor, "*batch r"]:
    short = x.shape[-1] % r
    if not short:
        return x.reshape(*x.shape[:-1], -1, r).sum(-2)
    whole, rest = x.split((x.shape[-1] - short, short), -1)  # one pass backward, where two slices would fill x's size with zeros each
    return whole.unflatten(-1, (-1, r)).sum(-2) + F.pad(rest, (0, r - short))
