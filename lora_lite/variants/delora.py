"""DeLoRA: y = W x + (lambda/r) B Xi A (|W_j| * x), Xi_k = 1 / (|a_k| |b_k|): the angle of the update apart from its strength.

arXiv:2503.18225. |W_j| is the norm of each input column of W at the start, a_k a row of A, b_k a column of B, each norm
at least 1e-4; lambda bounds the update's size and is learned.

init="paper" starts A and B at random and takes the first update away again, there by editing W, here by training the
differences A = A0 + dA and B = B0 + dB (twice the rank at run time; zero at init, bit for bit):

    B g A - B0 g0 A0 = (B g - B0 g0) A + B0 g0 dA         g = lambda/r Xi, g0 its first value

so A, B and lambda learn from the first step. init="zeros" is PEFT's: B = 0, divided by the floor of its norm. Its gradient is then
15,000 times that of the paper's start, those of A and lambda are zero, and a first step of any size is stretched to the full bound
lambda: AdamW with lr 1e-3 and lambda = 15 moves a 16 -> 24 layer's output by 2.1 times its norm, from the paper's start by 0.016
(tests/test_family.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from lora_lite.config import RankDropoutConfig
from lora_lite.lowrank import LowRank
from lora_lite.mixed import wide
from lora_lite.variant import Base, Initial, Params, ParamSpec, Variant, register

FLOOR = 1e-4  # PEFT's, on each norm


@dataclass(frozen=True, kw_only=True)
class DeLoRAConfig(RankDropoutConfig):
    """`DeLoRAConfig(r=8, strength=15.0)`; strength is lambda's first value.

    init  "paper": A, B and lambda learn at once. "zeros": PEFT's start and files, see the top of this file
    """

    variant: ClassVar[str] = "delora"
    r: int = 8
    strength: float = 15.0
    init: Literal["paper", "zeros"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in ("paper", "zeros"):
            raise ValueError(f'init must be "paper" or "zeros", got {self.init!r}')
        if not isinstance(self.strength, int | float) or not math.isfinite(self.strength):
            raise ValueError(f"strength must be a finite number, got {self.strength!r}")


@register
class DeLoRA(Variant):
    name = "delora"
    Config = DeLoRAConfig
    paper = "2503.18225"
    parameters: ClassVar[str] = "r * (d_in + d_out) + 1"
    reads_weight = "init"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DeLoRAConfig) -> dict[str, ParamSpec]:
        def strength(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
            return torch.full(shape, float(cfg.strength))

        A, B, differs = (cfg.r, d_in), (d_out, cfg.r), cfg.init == "paper"
        specs = {"lora_A": ParamSpec(A, "zeros" if differs else "kaiming"), "lora_B": ParamSpec(B)}
        specs["lora_lambda"] = ParamSpec((1,), strength)
        if differs:
            specs |= {"lora_A0": ParamSpec(A, "kaiming", trainable=False), "lora_B0": ParamSpec(B, "kaiming", trainable=False)}
        return specs | {"lora_w": ParamSpec((d_in,), trainable=False)}

    @staticmethod
    def init(cfg: DeLoRAConfig, base: Base, observed: None, generator: Generator | None) -> Initial:
        assert base.weight is not None  # reads_weight is "init"
        precise = torch.promote_types(base.weight.dtype, torch.float32)
        return Initial({"lora_w": torch.linalg.vector_norm(base.weight, dim=0, dtype=precise)})

    @staticmethod
    def factors(cfg: DeLoRAConfig, p: Params, base: Base) -> LowRank:
        p = {name: wide(v) for name, v in p.items()}  # A's product with w, and B's difference, would be rounded in 16 bits
        w, strength = p["lora_w"], p["lora_lambda"]
        if cfg.init == "zeros":
            return LowRank(p["lora_A"] * w, p["lora_B"], gains(p["lora_A"], p["lora_B"], strength))
        A0, B0, dA = p["lora_A0"], p["lora_B0"], p["lora_A"]
        A, B = A0 + dA, B0 + p["lora_B"]
        first = B0 * gains(A0, B0, torch.full_like(strength, cfg.strength))
        return LowRank(torch.cat([A, dA]) * w, torch.cat([B * gains(A, B, strength) - first, first], dim=1))


def gains(A: Tensor, B: Tensor, strength: Tensor) -> Tensor:
    """lambda / (r |a_k| |b_k|), one per rank (r,)."""
    norms = torch.linalg.vector_norm(A, dim=1).clamp_min(FLOOR) * torch.linalg.vector_norm(B, dim=0).clamp_min(FLOOR)
    return strength / len(norms) / norms
