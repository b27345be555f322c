"""VeRA: y = W x + l_b * (B (l_d * (A x))): A and B random, frozen and shared by all layers, two vectors trained.  arXiv:2310.11454

One A (r x widest d_in) and one B (widest d_out x r) serve all layers, each taking its corner; they are on every layer as one
Parameter, and in a file once. Entries are uniform with variance 2 / widest d_in (A) and 2 / r (B), as in PEFT. They are drawn
from `projection_seed`, column by column of A and row by row of B, so that more room leaves the corner what it was but for A's scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor

from lora_lite.config import RankDropoutConfig
from lora_lite.lowrank import LowRank
from lora_lite.mixed import linear
from lora_lite.variant import Base, Group, Params, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(RankDropoutConfig):
    """`VeRAConfig(r=256)`: r + d_out numbers per layer. There is no alpha.

    projection_seed  of A and B, apart from the seed of `attach`
    d_initial        the first value of l_d; l_b starts at zero
    room             (widest d_in, widest d_out): settled when attaching, so that a file tells the shapes of A and B
    """

    variant: ClassVar[str] = "vera"
    r: int = 256
    projection_seed: int = 0
    d_initial: float = 0.1
    room: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.projection_seed, int) or isinstance(self.projection_seed, bool) or not 0 <= self.projection_seed < 2**62:
            raise ValueError(f"projection_seed must be a whole number from 0 to 2^62, got {self.projection_seed!r}")
        if not isinstance(self.d_initial, int | float) or not math.isfinite(self.d_initial):
            raise ValueError(f"d_initial must be a finite number, got {self.d_initial!r}")
        if self.room is not None:
            if len(self.room) != 2 or not all(isinstance(n, int) and n > 0 for n in self.room):
                raise ValueError(f"room must be (widest d_in, widest d_out), got {self.room!r}")
            object.__setattr__(self, "room", tuple(self.room))
        if self.rank_pattern:
            raise ValueError("VeRA's layers share their projections, so they have one r: leave rank_pattern out")

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        if self.room is not None and (self.room[0] < d_in or self.room[1] < d_out):
            raise ValueError(f"{target}: the shared projections have room for {tuple(self.room)}, this layer is {d_in} -> {d_out}")
        return self


@register
class VeRA(Variant):
    name = "vera"
    Config = VeRAConfig
    paper = "2310.11454"
    parameters: ClassVar[str] = "r + d_out"
    narrows = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: VeRAConfig) -> dict[str, ParamSpec]:
        wide, tall = cfg.room or (d_in, d_out)

        def A(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
            return projections(cfg, wide, tall)["lora_A"]

        def B(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
            return projections(cfg, wide, tall)["lora_B"]

        def first(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
            return torch.full(shape, float(cfg.d_initial))

        frozen = {"lora_A": ParamSpec((cfg.r, wide), A, trainable=False), "lora_B": ParamSpec((tall, cfg.r), B, trainable=False)}
        return {"lora_d": ParamSpec((cfg.r,), first), "lora_b": ParamSpec((d_out,))} | frozen

    @staticmethod
    def group_init(cfg: VeRAConfig, sizes: Mapping[str, tuple[int, int]], observed: Mapping[str, Any]) -> Group:
        wide, tall = (max(widths) for widths in zip(*sizes.values(), strict=True))
        shared = projections(cfg, wide, tall)
        return Group(dataclasses.replace(cfg, room=(wide, tall)), dict.fromkeys(sizes, shared))

    @staticmethod
    def factors(cfg: VeRAConfig, p: Params, base: Base) -> LowRank:
        return LowRank(p["lora_A"][:, : base.d_in], p["lora_b"][:, None] * p["lora_B"][: base.d_out], p["lora_d"])

    @staticmethod
    def narrowed(cfg: VeRAConfig, p: Params, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """l_b on what comes out: l_b * B would be made, and kept for the backward, at every call."""
        h = linear(x, p["lora_A"][:, : x.shape[-1]])
        return (h * p["lora_d"]).to(h.dtype), p["lora_B"][: len(p["lora_b"])], p["lora_b"]


def projections(cfg: VeRAConfig, wide: int, tall: int) -> dict[str, Tensor]:
    A = rows_of(2 * cfg.projection_seed, wide, cfg.r).T / math.sqrt(wide)
    return {"lora_A": A, "lora_B": rows_of(2 * cfg.projection_seed + 1, tall, cfg.r) / math.sqrt(cfg.r)}


def rows_of(seed: int, n: int, r: int) -> Tensor:
    """The first n rows (n, r) of an endless matrix: uniform within sqrt 6, variance 2. Row by row, so that n only says how many."""
    return torch.empty(n, r).uniform_(-math.sqrt(6), math.sqrt(6), generator=torch.Generator().manual_seed(seed))
