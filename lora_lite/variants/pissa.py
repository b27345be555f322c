"""PiSSA: y = W_res x + s B A x, W = U S V^T, W_res = W - s B A at the start: A0 = sqrt(S/s) V^T, B0 = U sqrt(S/s).  arXiv:2404.02948

Without touching W, as differences.py says (s = alpha/r); both forms add exactly zero at the start:

    y = W x + s (B A - B0 A0) x       train="factors": A = A0 + dA, B = B0 + dB
    y = W x + U diag(dS) V^T x        train="spectrum": only the singular values move
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from lora_lite.lowrank import LowRank
from lora_lite.variant import BITWISE, Base, Identity, Params, ParamSpec, register
from lora_lite.variants.differences import DifferenceConfig, Differences, start_at
from lora_lite.variants.spectrum import SCORES, FromSpectrum, Score, Spectrum

CHOICES = {
    "train": ("factors", "spectrum"),
    "selection_score": SCORES,
    "ds_init": ("zeros", "normal"),
}


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(DifferenceConfig):
    """`PiSSAConfig(r=16, alpha=32)`. r is clamped to each layer's own rank, which changes its scale alpha/r.

    train            "factors": A and B, as published. "spectrum": one number per direction, for steering; alpha is not used
    selection_score  which r directions v: the largest "s_only" S, "wanda" S * mean|x.v|, "act_only" mean|x.v|, or
                     "cho_rej_min_std" min(std(x_cho.v), std(x_rej.v)); all but the first need calibration data
    ds_init          "spectrum" only. "normal" draws N(0.04, 0.04): +c amplifies and -c attenuates from the first step, and
                     a fresh adapter is not the base
    """

    variant: ClassVar[str] = "pissa"
    train: Literal["factors", "spectrum"] = "factors"
    selection_score: Score = "s_only"
    ds_init: Literal["zeros", "normal"] = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.train == "spectrum":
            return
        if self.ds_init != "zeros":
            raise ValueError(f'ds_init={self.ds_init!r} is of train="spectrum"; train="factors" starts at the chosen directions')
        if bad := [alpha for alpha in self.alphas() if alpha <= 0]:
            raise ValueError(f"alpha must be positive, got {bad[0]!r}: A and B start from sqrt(S r / alpha); a negative dose is c=-1")


def amplifying(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    return 0.04 + 0.04 * torch.randn(shape, generator=generator)


@register
class PiSSA(FromSpectrum, Differences):
    name = "pissa"
    Config = PiSSAConfig
    paper = "2404.02948"
    parameters = "r if train == 'spectrum' else r * (d_in + d_out)"
    identity = Identity("bitwise", 'but for ds_init="normal", which starts away from the base on purpose')

    @classmethod
    def identity_of(cls, cfg: PiSSAConfig) -> Identity:
        return BITWISE if cfg.ds_init == "zeros" else Identity("none", 'ds_init="normal" starts away from the base on purpose')

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PiSSAConfig) -> dict[str, ParamSpec]:
        if cfg.train == "spectrum":
            frozen = {"lora_U": ParamSpec((d_out, cfg.r), trainable=False), "lora_Vh": ParamSpec((cfg.r, d_in), trainable=False)}
            return frozen | {"lora_dS": ParamSpec((cfg.r,), amplifying if cfg.ds_init == "normal" else "zeros")}
        return Differences.param_specs(d_in, d_out, cfg)

    @staticmethod
    def start(cfg: PiSSAConfig, spectrum: Spectrum, chosen: Tensor) -> dict[str, Tensor]:
        U, S, Vh = spectrum.U[:, chosen], spectrum.S[chosen], spectrum.Vh[chosen]
        if cfg.train == "spectrum":
            return {"lora_U": U, "lora_Vh": Vh}
        root = (S / cfg.scaling).sqrt()
        return start_at(root[:, None] * Vh, U * root)

    @staticmethod
    def factors(cfg: PiSSAConfig, p: Params, base: Base) -> LowRank:
        if cfg.train == "spectrum":
            return LowRank(p["lora_Vh"], p["lora_U"], p["lora_dS"])
        return Differences.factors(cfg, p, base)
