"""LoRA: y = W x + (alpha/r) B A x.  arXiv:2106.09685; rsLoRA scales by alpha/sqrt(r), arXiv:2312.03732.

Where A and B start is told by `init`:

    kaiming      A uniform within 1/sqrt(d_in), B = 0
    gaussian     A from N(0, 1/r^2), B = 0, as PEFT draws it
    orthogonal   A = Q1^T X, B = Y Q2: Q1 and Q2 the odd and even rows of a random orthogonal r x r matrix, X and Y from N(0, 0.1^2),
                 so that B A = Y Q2 Q1^T X = 0 while neither is: both learn from the first step (Datta 2024; r must be even)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from lora_lite.config import RankedConfig
from lora_lite.lowrank import LowRank
from lora_lite.variant import BITWISE, Base, Identity, Initial, Params, ParamSpec, Variant, register

INITS = ("kaiming", "gaussian", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(RankedConfig):
    """`LoRAConfig(r=16, alpha=32)`; rslora=True scales by alpha/sqrt(r) instead of alpha/r.

    init  "kaiming" and "gaussian" start at the base, bit for bit; "orthogonal" near it, with both factors alive
    """

    variant: ClassVar[str] = "lora"
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {self.init!r}")
        if self.init == "orthogonal" and (odd := [r for r in self.ranks() if r % 2]):
            raise ValueError(f'init="orthogonal" needs an even r, got {odd[0]}: A and B each take half of an orthogonal matrix')


@register
class LoRA(Variant):
    name = "lora"
    Config = LoRAConfig
    paper = "2106.09685"
    parameters = "r * (d_in + d_out)"
    identity = Identity("bitwise", 'but for init="orthogonal", whose halves cancel to rounding')

    @classmethod
    def identity_of(cls, cfg: Any) -> Identity:
        return Identity("close", "the halves of an orthogonal matrix cancel to rounding") if cfg.init == "orthogonal" else BITWISE

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ParamSpec]:
        def gaussian(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
            return torch.randn(shape, generator=generator) / cfg.r

        A = ParamSpec((cfg.r, d_in), gaussian if cfg.init == "gaussian" else "kaiming")
        return {"lora_A": A, "lora_B": ParamSpec((d_out, cfg.r), "zeros")}

    @staticmethod
    def init(cfg: Any, base: Base, observed: Any, generator: Generator | None) -> Initial:
        return Initial(orthogonal(cfg.r, base.d_in, base.d_out, generator) if cfg.init == "orthogonal" else {})

    @staticmethod
    def factors(cfg: Any, p: Params, base: Base) -> LowRank:
        return LowRank(p["lora_A"], p["lora_B"], cfg.scaling)


def orthogonal(r: int, d_in: int, d_out: int, generator: Generator | None) -> dict[str, Tensor]:
    """In float64, so that B A is zero to the rounding of the dtype they are kept in."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    Q = torch.linalg.qr(normal(r, r)).Q
    return {"lora_A": Q[0::2].T @ normal(r // 2, d_in) / 10, "lora_B": normal(d_out, r // 2) @ Q[1::2] / 10}
