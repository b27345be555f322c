"""IA3: a learned gate on what a linear puts out, y' = l * y (bias included), or on what it takes in, y' = W (l * x) + b.

arXiv:2205.05638. Stored as the deviation l - 1, zero at init: near 1, bfloat16 would lose half of what was learned.
c moves the gate in a line: 1 + c (l - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_lite.config import AdapterConfig
from lora_lite.variant import Base, Params, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """`IA3Config(targets=("k_proj", "v_proj"))`: one gate per output feature; the paper's choice for keys and values."""

    variant: ClassVar[str] = "ia3"


@dataclass(frozen=True, kw_only=True)
class IA3FFConfig(AdapterConfig):
    """`IA3FFConfig(targets="down_proj")`: one gate per input feature; the paper's choice for feed-forward layers."""

    variant: ClassVar[str] = "ia3_ff"


@register
class IA3(Variant):
    name = "ia3"
    Config = IA3Config
    paper = "2205.05638"
    parameters = "d_out"
    form = "output"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: IA3Config) -> dict[str, ParamSpec]:
        return {"lora_l": ParamSpec((d_out,))}

    @classmethod
    def added(cls, cfg: IA3Config, p: Params, x: Tensor, y: Tensor | None, base: Base, c: float | Tensor) -> Tensor:
        assert y is not None  # form "output"
        return gated(y, p["lora_l"], c)


@register
class IA3FF(Variant):
    name = "ia3_ff"
    Config = IA3FFConfig
    paper = "2205.05638"
    parameters = "d_in"
    form = "input"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: IA3FFConfig) -> dict[str, ParamSpec]:
        return {"lora_l": ParamSpec((d_in,))}

    @classmethod
    def added(cls, cfg: IA3FFConfig, p: Params, x: Tensor, y: Tensor | None, base: Base, c: float | Tensor) -> Tensor:
        return gated(x, p["lora_l"], c)


def gated(x: Tensor, change: Tensor, c: float | Tensor) -> Tensor:
    """(1 + c change) * x in one pass; in half precision a gate near 1 would lose what was learned, and so never is made."""
    if x.dtype.itemsize >= 4:
        return (1 + (change if type(c) is float and c == 1.0 else c * change)) * x
    return torch.addcmul(x, change, x, value=c) if isinstance(c, float) else torch.addcmul(x, c * change, x)
