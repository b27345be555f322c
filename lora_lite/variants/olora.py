"""OLoRA: LoRA that starts from an orthonormal basis of W: W = Q R, B0 = Q[:, :r], A0 = R[:r], W_res = W - s B0 A0.  arXiv:2406.01775

Trained as differences, W untouched (differences.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from lora_lite.variant import Base, Initial, register
from lora_lite.variants.differences import DifferenceConfig, Differences, precise, start_at


@dataclass(frozen=True, kw_only=True)
class OLoRAConfig(DifferenceConfig):
    """`OLoRAConfig(r=16, alpha=32)`; no data, one QR per layer. r is clamped to each layer's own rank."""

    variant: ClassVar[str] = "olora"


@register
class OLoRA(Differences):
    name = "olora"
    Config = OLoRAConfig
    paper = "2406.01775"
    reads_weight = "init"

    @staticmethod
    def init(cfg: OLoRAConfig, base: Base, observed: None, generator: Generator | None) -> Initial:
        Q, R = torch.linalg.qr(precise(base.weight))
        return Initial(start_at(R[: cfg.r], Q[:, : cfg.r]))
