"""LoRA: y = W x + (alpha/r) B A x.  arXiv:2106.09685; rsLoRA scales by alpha/sqrt(r), arXiv:2312.03732."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lora_lite.config import RankedConfig
from lora_lite.lowrank import LowRank
from lora_lite.variant import Base, Params, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(RankedConfig):
    """`LoRAConfig(r=16, alpha=32)`; rslora=True scales by alpha/sqrt(r) instead of alpha/r."""

    variant: ClassVar[str] = "lora"
    rslora: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@register
class LoRA(Variant):
    name = "lora"
    Config = LoRAConfig
    paper = "2106.09685"
    parameters = "r * (d_in + d_out)"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoRAConfig) -> dict[str, ParamSpec]:
        return {"lora_A": ParamSpec((cfg.r, d_in), "kaiming"), "lora_B": ParamSpec((d_out, cfg.r), "zeros")}

    @staticmethod
    def factors(cfg: LoRAConfig, p: Params, base: Base) -> LowRank:
        return LowRank(p["lora_A"], p["lora_B"], cfg.scaling)
