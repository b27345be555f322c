"""SSVD: the top r right singular directions of W turn among each other and their values move; U stays.  arXiv:2509.02830

    y = U diag(S + c dS) R(c)^T Vh x + W_rest x,  R(c) = (I + cK)(I - cK)^-1,  K skew-symmetric, r (r - 1) / 2 numbers

Inputs are heard differently, what each direction writes keeps its meaning. cayley="first-order" is what the authors' ESPnet code
computes, R = I + 2cK: a rotation only near K = 0. Three things are done otherwise than there: the step of S is dS itself, not
sigmoid(g) times a vector drawn at random, so a fresh adapter is the base; the side of the inputs turns in every layer, there it is
the smaller side; nothing of W is rebuilt (turning.py adds the difference).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Generator, Tensor

from lora_lite.config import RankConfig
from lora_lite.lowrank import LowRank, add_narrow
from lora_lite.variant import Base, Initial, Params, ParamSpec, Variant, register
from lora_lite.variants import turning
from lora_lite.variants.cayley import skew
from lora_lite.variants.spectrum import Spectrum


@dataclass(frozen=True, kw_only=True)
class SSVDConfig(RankConfig):
    """`SSVDConfig(r=32)`: r (r + 1) / 2 numbers per layer, whatever its width. r is clamped to each layer's own rank.

    cayley  "exact": a rotation for every K and c. "first-order": the authors' code, cheaper, a rotation only near K = 0
    """

    variant: ClassVar[str] = "ssvd"
    r: int = 32
    cayley: Literal["exact", "first-order"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cayley not in ("exact", "first-order"):
            raise ValueError(f'cayley must be "exact" or "first-order", got {self.cayley!r}')

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        own = super().at(target, d_in, d_out)
        r = min(own.r, d_in, d_out)
        if r < 2:
            raise ValueError(f"{target} is {d_in} -> {d_out} with r={own.r}: one direction cannot turn; raise r, or exclude it")
        return dataclasses.replace(own, r=r)


@register
class SSVD(Variant):
    name = "ssvd"
    Config = SSVDConfig
    paper = "2509.02830"
    parameters: ClassVar[str] = "r * (r + 1) // 2"
    why_not: ClassVar[Mapping[str, str]] = {"linear_in_c": "c turns by c K: every c is a rotation, a mix of x and its rotation is none"}
    form = "output"
    linear_in_c = False
    reads_weight = "init"
    exact_low_rank: ClassVar[str] = "by itself"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SSVDConfig) -> dict[str, ParamSpec]:
        trained = {"lora_dS": ParamSpec((cfg.r,)), "lora_K": ParamSpec((cfg.r * (cfg.r - 1) // 2,))}
        return trained | turning.frozen_specs(d_in, d_out, cfg.r)

    @staticmethod
    def init(cfg: SSVDConfig, base: Base, observed: Any, generator: Generator | None) -> Initial:
        assert base.weight is not None  # reads_weight is "init"
        spectrum = Spectrum(base.weight)
        return Initial(turning.directions(spectrum, spectrum.choose("s_only", cfg.r)))

    @staticmethod
    def directions(p: Params) -> Tensor:
        return p["lora_Vh"]  # their span, in which they turn

    @staticmethod
    def prepare(cfg: SSVDConfig, p: Params, base: Base, c: float | Tensor) -> Params:
        return turning.prepared(skew(p["lora_K"][None], cfg.r), p, c, first_order=cfg.cayley == "first-order")

    @classmethod
    def added(cls, cfg: SSVDConfig, p: Params, x: Tensor, y: Tensor | None, base: Base, c: float | Tensor) -> Tensor:
        assert y is not None  # form "output"
        return add_narrow(y, turning.cored(p, x, c), p["U"], 1.0)

    @classmethod
    def low_rank_at(cls, cfg: SSVDConfig, p: Params, base: Base, c: float = 1.0) -> LowRank:
        return turning.low_rank(skew(p["lora_K"][None], cfg.r), p, c, first_order=cfg.cayley == "first-order")
