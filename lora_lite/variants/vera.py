"""VeRA: y = W x + l_b * (B (l_d * (A x))): A and B random, frozen and shared by all layers, two vectors trained.  arXiv:2310.11454

Each layer takes its corner of one endless A (r x inf) and B (inf x r), drawn from `projection_seed`: two layers agree wherever
both have entries, whatever else is targeted. (PEFT's depend on the widest targeted layer.) Entries are uniform with
variance 2 / fan_in, fan_in being the layer's own d_in for A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lora_lite.lowrank import LowRank
from lora_lite.mixed import linear
from lora_lite.variant import Base, Params, ParamSpec, Variant, register
from lora_lite.variants.rank import RankDropoutConfig


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(RankDropoutConfig):
    """`VeRAConfig(r=256)`: r + d_out numbers per layer. There is no alpha.

    projection_seed  of A and B, apart from the seed of `attach`
    d_initial        the first value of l_d; l_b starts at zero
    """

    variant: ClassVar[str] = "vera"
    r: int = 256
    projection_seed: int = 0
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.projection_seed, int) or isinstance(self.projection_seed, bool) or not 0 <= self.projection_seed < 2**62:
            raise ValueError(f"projection_seed must be a whole number from 0 to 2^62, got {self.projection_seed!r}")
        if not isinstance(self.d_initial, int | float) or not math.isfinite(self.d_initial):
            raise ValueError(f"d_initial must be a finite number, got {self.d_initial!r}")


@register
class VeRA(Variant):
    name = "vera"
    Config = VeRAConfig
    paper = "2310.11454"
    parameters: ClassVar[str] = "r + d_out"
    narrows = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: VeRAConfig) -> dict[str, ParamSpec]:
        def A(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
            return rows_of(2 * cfg.projection_seed, d_in, cfg.r).T / math.sqrt(d_in)

        def B(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
            return rows_of(2 * cfg.projection_seed + 1, d_out, cfg.r) / math.sqrt(cfg.r)

        def first(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
            return torch.full(shape, float(cfg.d_initial))

        frozen = {"lora_A": ParamSpec((cfg.r, d_in), A, trainable=False), "lora_B": ParamSpec((d_out, cfg.r), B, trainable=False)}
        return {"lora_d": ParamSpec((cfg.r,), first), "lora_b": ParamSpec((d_out,))} | frozen

    @staticmethod
    def factors(cfg: VeRAConfig, p: Params, base: Base) -> LowRank:
        return LowRank(p["lora_A"], p["lora_b"][:, None] * p["lora_B"], p["lora_d"])

    @staticmethod
    def narrowed(cfg: VeRAConfig, p: Params, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """l_b on what comes out: l_b * B would be made, and kept for the backward, at every call."""
        h = linear(x, p["lora_A"])
        return (h * p["lora_d"]).to(h.dtype), p["lora_B"], p["lora_b"]


def rows_of(seed: int, n: int, r: int) -> Tensor:
    """The first n rows (n, r) of an endless matrix: uniform within sqrt 6, variance 2. Row by row, so that n only says how many."""
    return torch.empty(n, r).uniform_(-math.sqrt(6), math.sqrt(6), generator=torch.Generator().manual_seed(seed))
