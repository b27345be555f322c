"""LoRA-GA: LoRA whose first step goes where full fine-tuning's would: from the SVD of the loss's gradient G = U S V^T.  arXiv:2407.05000

    A0 = z V[first]^T,  B0 = z U[second],  W_res = W - s B0 A0,   z = d_out^(1/4) / sqrt(gamma)

direction   which of the first 2r directions A0 and B0 take:  "ArB2r" A the first r, B the second;  "A2rBr" the other way;
            "ArBr" A every second from the second on, B every second from the first on
scale       z: "stable" as above; "unit" 1; "gd" 1/s. "peft" is what PEFT 0.21 calls stable: A0 unscaled, B0 times z and the
            gradient's singular values, so that it depends on the loss's own scale

W itself is never read: trained as differences (differences.py), so the base may be quantised.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lora_lite.variant import Base, Initial, register
from lora_lite.variants.differences import DifferenceConfig, Differences, start_at

DIRECTIONS: dict[str, Callable[[int], tuple[slice, slice]]] = {  # r -> (A's directions, B's directions)
    "ArB2r": lambda r: (slice(0, r), slice(r, 2 * r)),
    "A2rBr": lambda r: (slice(r, 2 * r), slice(0, r)),
    "ArBr": lambda r: (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
}
SCALES = ("stable", "unit", "gd", "peft")


@dataclass(frozen=True, kw_only=True)
class LoRAGAConfig(DifferenceConfig):
    """`ll.attach(model, LoRAGAConfig(r=16), calibration_data=batches)`, batches with labels, or `loss=lambda output, batch: ...`.

    r is clamped to half of each layer's own rank, which changes its scale alpha/r. Attaching holds one gradient, d_out x d_in,
    per layer.
    """

    variant: ClassVar[str] = "lora_ga"
    direction: Literal["ArB2r", "A2rBr", "ArBr"] = "ArB2r"
    scale: Literal["stable", "unit", "gd", "peft"] = "stable"
    gamma: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in {"direction": tuple(DIRECTIONS), "scale": SCALES}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not isinstance(self.gamma, int | float) or not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be a positive number, got {self.gamma!r}")
        if self.scale == "gd" and 0 in self.alphas():
            raise ValueError('scale="gd" divides by alpha/r: alpha must not be 0')

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        own = super().at(target, d_in, d_out)
        return dataclasses.replace(own, r=max(1, min(own.r, min(d_in, d_out) // 2)))


class Gradient:
    """The mean over batches of the loss's gradient of one weight, d_out x d_in. A GradientObserver."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.batches = 0

    def update(self, x: Float[Tensor, "n d_in"], gradient: Float[Tensor, "n d_out"]) -> None:
        precise = torch.promote_types(x.dtype, torch.float32)
        self.total = self.total + gradient.to(precise).T @ x.to(precise)
        self.batches += 1

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Raises ValueError where there is no gradient to follow."""
        if not isinstance(self.total, Tensor) or not bool(torch.isfinite(self.total).all()) or not bool(self.total.any()):
            raise ValueError("the loss's gradient here is zero or not finite, so it has no directions")
        return torch.linalg.svd(self.total / self.batches, full_matrices=False)


@register
class LoRAGA(Differences):
    name = "lora_ga"
    Config = LoRAGAConfig
    paper = "2407.05000"
    calibration = "required"
    observes = "gradients"

    @staticmethod
    def observe(cfg: LoRAGAConfig, base: Base, exclude: Tensor | None) -> Gradient:
        return Gradient()

    @staticmethod
    def init(cfg: LoRAGAConfig, base: Base, observed: Gradient, generator: Generator | None) -> Initial:
        U, S, Vh = observed.svd()
        if len(S) == 1:  # a layer of rank one has one direction for both
            U, S, Vh = U.repeat(1, 2), S.repeat(2), Vh.repeat(2, 1)
        of_A, of_B = DIRECTIONS[cfg.direction](cfg.r)
        stable = base.d_out**0.25 / math.sqrt(cfg.gamma)
        z = {"stable": stable, "unit": 1.0, "gd": 1 / (cfg.scaling or 1.0), "peft": 1.0}[cfg.scale]
        A0, B0 = z * Vh[of_A], z * U[:, of_B]
        if cfg.scale == "peft":
            B0 = stable * B0 * S[of_B]
        return Initial(start_at(A0, B0), {"gradient_kept": float(S[: 2 * cfg.r].square().sum() / S.square().sum())})
