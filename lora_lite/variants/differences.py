"""How does a LoRA that starts from A0, B0 taken out of W act, with W untouched? By what it has moved since.

y = (W - s B0 A0) x + s B A x = W x + s (B A - B0 A0) x = W x + s (dB A + B0 dA) x   with A = A0 + dA, B = B0 + dB, s = alpha/r

the same function and the same gradients. dA and dB are what is trained and stored, so a fresh adapter is the base, bit for bit,
and small updates survive bfloat16: B A - B0 A0 loses those of 1e-4 altogether (511% error, against 0.4%; tests/test_pissa.py).
PiSSA, OLoRA, CorDA and LoRA-GA differ in A0 and B0 only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.config import RankedConfig
from lora_lite.lowrank import LowRank
from lora_lite.variant import Base, Params, ParamSpec, Variant


@dataclass(frozen=True, kw_only=True)
class DifferenceConfig(RankedConfig):
    """r is clamped to each layer's own rank, which changes its scale alpha/r."""

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        own = super().at(target, d_in, d_out)
        r = min(own.r, d_in, d_out)
        return own if r == own.r else dataclasses.replace(own, r=r)


class Differences(Variant):
    """A variant says what A0 and B0 are, in its `init`."""

    parameters: ClassVar[str] = "r * (d_in + d_out)"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ParamSpec]:
        moved = {"lora_A": ParamSpec((cfg.r, d_in)), "lora_B": ParamSpec((d_out, cfg.r))}
        return moved | {"lora_A0": ParamSpec((cfg.r, d_in), trainable=False), "lora_B0": ParamSpec((d_out, cfg.r), trainable=False)}

    @staticmethod
    def factors(cfg: Any, p: Params, base: Base) -> LowRank:
        dA, dB = p["lora_A"], p["lora_B"]
        return LowRank(torch.cat([p["lora_A0"] + dA, dA]), torch.cat([dB, p["lora_B0"]], dim=1), cfg.scaling)


def start_at(A0: Float[Tensor, "r d_in"], B0: Float[Tensor, "d_out r"]) -> dict[str, Tensor]:
    return {"lora_A0": A0, "lora_B0": B0}


def precise(weight: Tensor | None) -> Float[Tensor, "d_out d_in"]:
    """The weight in float32 at least, as LAPACK wants it. Raises ValueError where it has no directions."""
    assert weight is not None  # reads_weight is "init"
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the base weight {tuple(weight.shape)} holds NaN or infinite values, so it has no singular directions")
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
