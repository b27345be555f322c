"""HRA: y = W H_1 H_2 ... H_r x + b, H_k = I - 2 u_k u_k^T / |u_k|^2: reflections of the input, the last one first.

arXiv:2405.17484. The chain is never multiplied out: with U of unit columns (compact WY, Schreiber and Van Loan 1989)

    H_1 ... H_r = I - U T U^T,   T = (triu(U^T U, 1) + I/2)^-1

so it costs what a rank-r update costs. A fresh adapter has its columns in equal pairs, each the inverse of the other.
"hra_gs" is the paper's strictly orthogonal form (its lambda = inf): Gram-Schmidt makes U orthonormal, H = I - 2 Q Q^T.
c goes from x to H x in a line, x + c (H x - x): the published method at 1, orthogonal only at 0 and 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lora_lite.config import RankConfig
from lora_lite.lowrank import LowRank, add_narrow
from lora_lite.variant import Base, Identity, Initial, Params, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class HRAConfig(RankConfig):
    """`HRAConfig(r=8)`: r reflections. Attaching wants an even r, since reflections start in pairs that undo each other."""

    variant: ClassVar[str] = "hra"
    r: int = 8


@dataclass(frozen=True, kw_only=True)
class HRAGSConfig(RankConfig):
    """`HRAGSConfig(r=8)`: r reflections in directions made orthogonal to each other. r is clamped to the layer's d_in."""

    variant: ClassVar[str] = "hra_gs"
    r: int = 8

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        own = super().at(target, d_in, d_out)
        return dataclasses.replace(own, r=min(own.r, d_in))


def kaiming_columns(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Uniform within 1/sqrt(columns), as PEFT draws (d_in, r); only directions matter."""
    return torch.empty(shape).uniform_(-1.0, 1.0, generator=generator) / shape[1] ** 0.5


@register
class HRA(Variant):
    name = "hra"
    Config = HRAConfig
    paper = "2405.17484"
    parameters: ClassVar[str] = "r * d_in"
    form = "input"
    identity = Identity("close", "pairs of equal reflections cancel to rounding")
    exact_low_rank: ClassVar[str] = "given weight"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ParamSpec]:
        return {"lora_u": ParamSpec((d_in, cfg.r), kaiming_columns)}

    @staticmethod
    def init(cfg: Any, base: Base, observed: Any, generator: Generator | None) -> Initial:
        if cfg.r % 2:
            raise ValueError(f"asked for r={cfg.r} reflections, which leaves one without its inverse at the start; use an even r")
        half = kaiming_columns((base.d_in, cfg.r // 2), generator)
        return Initial({"lora_u": half.repeat_interleave(2, dim=1)})

    @staticmethod
    def prepare(cfg: Any, p: Params, base: Base, c: float | Tensor) -> Params:
        u = precise(p["lora_u"])
        U = u * u.square().sum(0).rsqrt()  # vector_norm down the columns takes as long as both ends of the update
        eye = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        T = torch.linalg.solve_triangular(torch.triu(U.T @ U, 1) + eye / 2, -eye, upper=True)
        return {"A": U.T, "B": U @ T}  # H - I = B A

    @classmethod
    def added(cls, cfg: Any, p: Params, x: Tensor, y: Tensor | None, base: Base, c: float | Tensor) -> Tensor:
        return add_narrow(x, F.linear(x, p["A"]), p["B"], c)

    @classmethod
    def low_rank_at(cls, cfg: Any, p: Params, base: Base, c: float = 1.0) -> LowRank:
        """c W (H - I): exact, of rank r, for merging by factors and for export. Reads the weight (d_out, d_in) once."""
        assert base.weight is not None
        change = cls.prepare(cfg, p, base, 1.0)
        return LowRank(change["A"], base.weight.to(change["B"].dtype) @ change["B"], c)


@register
class HRAGS(HRA):
    name = "hra_gs"
    Config = HRAGSConfig
    identity = Identity("none", "I - 2 Q Q^T turns r directions round, whatever they are; it is never the identity")

    @staticmethod
    def init(cfg: Any, base: Base, observed: Any, generator: Generator | None) -> Initial:
        return Initial({})  # equal pairs, as PEFT draws here too, have no second direction: Gram-Schmidt would divide 0 by 0

    @staticmethod
    def prepare(cfg: Any, p: Params, base: Base, c: float | Tensor) -> Params:
        Q, _ = torch.linalg.qr(precise(p["lora_u"]))  # Q Q^T is Gram-Schmidt's, whatever the lengths of u and the signs of Q
        return {"A": Q.T, "B": -2 * Q}


def precise(u: Tensor) -> Tensor:
    """In float32 at least: LAPACK has no half precision."""
    return u.to(torch.promote_types(u.dtype, torch.float32))
