"""AntiPaSTO: singular values of W take steps, and the singular directions on one side turn in small blocks.  arXiv:2601.07473

    y = U diag(S + c dS) R(c)^T Vh x + W_res x     rotate="V"        W = U diag(S) Vh + W_res, r chosen directions
    y = U R(c) diag(S + c dS) Vh x + W_res x       rotate="U"
    R(c) = (I - cA/2)^-1 (I + cA/2)                A = a tanh(theta / a), a = 2 tan(max_angle / 2), skew-symmetric

Trained are dS and theta; W is never split (turning.py adds the difference). R(-c) undoes R(c). Each pair of directions turns by
less than max_angle; in a block of b no plane turns by more than 2 atan(cot(pi / 2b) tan(max_angle / 2)), Pick's bound (1922) on the
eigenvalues of A, which is max_angle itself for b = 2. theta is in radians while it is small.

The paper's code turns by one block of r and starts from dS ~ N(4e-4, 4e-4) and A ~ N(0, 8.5e-3^2), so that a loss between +c and
-c has a slope at once: block_size=r and init="paper" are that. Blocks came with its author's later releases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lora_lite.config import RankConfig
from lora_lite.lowrank import LowRank, add_narrow
from lora_lite.variant import BITWISE, Base, Identity, Params, ParamSpec, register
from lora_lite.variants import turning
from lora_lite.variants.cayley import skew
from lora_lite.variants.spectrum import SCORES, FromSpectrum, Score, Spectrum

CHOICES = {"rotate": ("V", "U"), "init": ("zeros", "paper"), "selection_score": SCORES}


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOConfig(RankConfig):
    """`AntiPaSTOConfig(r=64, selection_score="cho_rej_min_std")`: r (block_size + 1) / 2 numbers per layer.

    block_size       directions that turn among each other. r is clamped to a layer's own rank, and then to a multiple of this
    rotate           "V" turns what a direction listens to, "U" what it writes
    max_angle        of a pair of directions, in radians, below pi
    selection_score  which r directions, as PiSSAConfig's; all but "s_only" need calibration data
    init             "zeros" starts at the base, "paper" a little beside it
    """

    variant: ClassVar[str] = "antipasto"
    r: int = 64
    block_size: int = 4
    rotate: Literal["V", "U"] = "V"
    max_angle: float = math.pi / 3
    selection_score: Score = "s_only"
    init: Literal["zeros", "paper"] = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not isinstance(self.block_size, int) or isinstance(self.block_size, bool) or self.block_size < 2:
            raise ValueError(f"block_size must be a whole number from 2, got {self.block_size!r}")
        if bad := [r for r in self.ranks() if r < self.block_size]:
            raise ValueError(f"r must be at least block_size={self.block_size}, got {bad[0]!r}")
        if not isinstance(self.max_angle, int | float) or not 0.0 < self.max_angle < math.pi:
            raise ValueError(f"max_angle must be between 0 and pi, got {self.max_angle!r}")

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        own = super().at(target, d_in, d_out)
        r = min(own.r, d_in, d_out)
        if r < 2:
            raise ValueError(f"{target} is {d_in} -> {d_out}: one direction cannot turn; exclude it")
        b = min(own.block_size, r)
        return dataclasses.replace(own, r=r - r % b, block_size=b)


@register
class AntiPaSTO(FromSpectrum):
    name = "antipasto"
    Config = AntiPaSTOConfig
    paper = "2601.07473"
    parameters: ClassVar[str] = "r + r * (block_size - 1) // 2"
    why_not: ClassVar[Mapping[str, str]] = {"linear_in_c": "c turns by c theta: every c is a rotation, a mix of x and its rotation is none"}
    form = "output"
    linear_in_c = False
    exact_low_rank: ClassVar[str] = "by itself"
    identity = Identity("bitwise", 'but for init="paper", which starts beside the base on purpose')

    @classmethod
    def identity_of(cls, cfg: AntiPaSTOConfig) -> Identity:
        return BITWISE if cfg.init == "zeros" else Identity("none", 'init="paper" starts beside the base on purpose')

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: AntiPaSTOConfig) -> dict[str, ParamSpec]:
        b, paper = cfg.block_size, cfg.init == "paper"
        trained = {
            "lora_dS": ParamSpec((cfg.r,), steps if paper else "zeros"),
            "lora_theta": ParamSpec((cfg.r // b, b * (b - 1) // 2), angles if paper else "zeros"),
        }
        return trained | turning.frozen_specs(d_in, d_out, cfg.r)

    @staticmethod
    def start(cfg: AntiPaSTOConfig, spectrum: Spectrum, chosen: Tensor) -> dict[str, Tensor]:
        return turning.directions(spectrum, chosen)

    @staticmethod
    def directions(p: Params) -> Tensor:
        return p["lora_Vh"]  # their span, in which they turn

    @staticmethod
    def prepare(cfg: AntiPaSTOConfig, p: Params, base: Base, c: float | Tensor) -> Params:
        return turning.prepared(generator(cfg, p["lora_theta"]), p, c, cfg.rotate)

    @classmethod
    def added(cls, cfg: AntiPaSTOConfig, p: Params, x: Tensor, y: Tensor | None, base: Base, c: float | Tensor) -> Tensor:
        assert y is not None  # form "output"
        return add_narrow(y, turning.cored(p, x, c, cfg.rotate), p["U"], 1.0)

    @classmethod
    def low_rank_at(cls, cfg: AntiPaSTOConfig, p: Params, base: Base, c: float = 1.0) -> LowRank:
        return turning.low_rank(generator(cfg, p["lora_theta"]), p, c, cfg.rotate)


def generator(cfg: AntiPaSTOConfig, theta: Float[Tensor, "n k"]) -> Float[Tensor, "n b b"]:
    """Q = A/2 of each block, every entry within tan(max_angle / 2)."""
    a = 2 * math.tan(cfg.max_angle / 2)
    return skew(a / 2 * torch.tanh(theta / a), cfg.block_size)


def steps(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    return 4e-4 + 4e-4 * torch.randn(shape, generator=generator)


def angles(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Both triangles of the paper's r x r draw at std 3e-3 and are subtracted twice over: 2 sqrt 2 times that."""
    return 8.5e-3 * torch.randn(shape, generator=generator)
