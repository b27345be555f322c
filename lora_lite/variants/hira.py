"""HiRA: y = W x + (W * (B A)) x, * element by element: an update of high rank from a low-rank mask.  ICLR 2025, no arXiv id.

W is read at each step and the adapter belongs to its exact base. One d_out x d_in product in x's dtype lives from a layer's
forward to its backward, as in PEFT, and in a forward without gradients only within the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from lora_lite.config import RankDropoutConfig
from lora_lite.variant import Base, Params, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class HiRAConfig(RankDropoutConfig):
    """`HiRAConfig(r=32)`. There is no alpha: W itself sets the scale of each entry."""

    variant: ClassVar[str] = "hira"
    r: int = 32


@register
class HiRA(Variant):
    name = "hira"
    Config = HiRAConfig
    paper = "ICLR 2025"
    parameters: ClassVar[str] = "r * (d_in + d_out)"
    form = "output"
    reads_weight = "step"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: HiRAConfig) -> dict[str, ParamSpec]:
        return {"lora_A": ParamSpec((cfg.r, d_in), "kaiming"), "lora_B": ParamSpec((d_out, cfg.r), "zeros")}

    @staticmethod
    def delta(cfg: HiRAConfig, p: Params, x: Tensor, y: Tensor | None, base: Base, c: float | Tensor) -> Tensor:
        assert base.weight is not None  # reads_weight is "step"
        mask = p["lora_B"] @ p["lora_A"]
        return c * F.linear(x, base.weight.to(x.dtype) * mask)
