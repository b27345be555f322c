"""LoRA-XS: y = W x + (alpha/r) U_r S_r R V_r^T x: the top of W's SVD is frozen, only R (r x r) is trained.  arXiv:2405.17604

R starts at N(0, 1e-5^2) as published, so a fresh adapter is near the base and not at it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor

from lora_lite.config import RankedConfig
from lora_lite.lowrank import LowRank
from lora_lite.variant import Base, Identity, Initial, Params, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class LoRAXSConfig(RankedConfig):
    """`LoRAXSConfig(r=25, alpha=25)`: r^2 numbers per layer. r is clamped to each layer's own rank, which changes its scale alpha/r.

    std  of R at the start; 0 starts at the base, bit for bit, and trains as well: B and A are not zero
    """

    variant: ClassVar[str] = "lora_xs"
    std: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.std, int | float) or not math.isfinite(self.std) or self.std < 0:
            raise ValueError(f"std must be a finite number from 0, got {self.std!r}")

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        own = super().at(target, d_in, d_out)
        return dataclasses.replace(own, r=min(own.r, d_in, d_out))


@register
class LoRAXS(Variant):
    name = "lora_xs"
    Config = LoRAXSConfig
    paper = "2405.17604"
    parameters: ClassVar[str] = "r * r"
    reads_weight = "init"
    identity = Identity("none", "R starts at N(0, std^2), as published; std=0 starts at the base")

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoRAXSConfig) -> dict[str, ParamSpec]:
        def core(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
            return torch.randn(shape, generator=generator) * cfg.std

        frozen = {"lora_A": ParamSpec((cfg.r, d_in), trainable=False), "lora_B": ParamSpec((d_out, cfg.r), trainable=False)}
        return {"lora_R": ParamSpec((cfg.r, cfg.r), core)} | frozen

    @staticmethod
    def init(cfg: LoRAXSConfig, base: Base, observed: None, generator: Generator | None) -> Initial:
        assert base.weight is not None  # reads_weight is "init"
        if not bool(torch.isfinite(base.weight).all()):
            raise ValueError("the base weight holds NaN or infinite values, so it has no singular directions")
        U, S, Vh = torch.linalg.svd(base.weight.to(torch.promote_types(base.weight.dtype, torch.float32)), full_matrices=False)
        return Initial({"lora_A": Vh[: cfg.r], "lora_B": U[:, : cfg.r] * S[: cfg.r]})

    @staticmethod
    def factors(cfg: LoRAXSConfig, p: Params, base: Base) -> LowRank:
        return LowRank(p["lora_R"] @ p["lora_A"], p["lora_B"], cfg.scaling)
