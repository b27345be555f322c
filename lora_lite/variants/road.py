"""ROAD: y' = R y with y = W x + b, and R turning pairs of outputs by angles theta and stretching them by alpha.

    y'_j       = a_j cos(t_j) y_j             - a_j sin(t_j) y_{j + G/2}             j in the first half of its group of G
    y'_{j+G/2} = a_{j+G/2} cos(t_{j+G/2}) y_{j+G/2} + a_{j+G/2} sin(t_{j+G/2}) y_j

arXiv:2409.00119. road_1 has one (theta, alpha) per pair, road_2 one per output, road_4 a separate pair for each of the two
terms. The bias is turned too. Stored are theta and alpha - 1, zero at init. c turns and stretches in part, theta_c = c theta and
alpha_c = 1 + c (alpha - 1), so a road_1 at -c with alpha = 1 undoes the one at c. What is added is

    a cos t - 1 = (a - 1) - 2 a sin^2(t/2)     never a difference of two numbers near 1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from lora_lite.config import AdapterConfig
from lora_lite.variant import Base, Params, ParamSpec, Variant, register

PER_OUTPUT = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}  # angles for each output; there are as many stretches


@dataclass(frozen=True, kw_only=True)
class ROADConfig(AdapterConfig):
    """`ROADConfig(kind="road_2", group_size=64)`.

    Output j is paired with j + group_size/2 within its group. Where d_out is not a multiple of group_size, the layer's
    groups have the largest even size up to group_size that divides d_out; of an odd d_out the last output is left alone.
    """

    variant: ClassVar[str] = "road"
    kind: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in PER_OUTPUT:
            raise ValueError(f"kind must be one of {tuple(PER_OUTPUT)}, got {self.kind!r}")
        if not isinstance(self.group_size, int) or self.group_size < 2 or self.group_size % 2:
            raise ValueError(f"group_size must be an even whole number from 2, got {self.group_size!r}")

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        if d_out < 2:
            raise ValueError(f"{target} has one output and road turns pairs; exclude it")
        return dataclasses.replace(self, group_size=next(g for g in range(self.group_size, 0, -2) if paired(d_out) % g == 0))


def paired(d_out: int) -> int:
    return d_out - d_out % 2


@register
class ROAD(Variant):
    name = "road"
    Config = ROADConfig
    paper = "2409.00119"
    parameters: ClassVar[str] = "int(kind[-1]) * (d_out - d_out % 2)"
    why_not: ClassVar[Mapping[str, str]] = {"linear_in_c": "c turns by c theta, and a cosine is no line"}
    form = "output"
    linear_in_c = False

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: ROADConfig) -> dict[str, ParamSpec]:
        shape = (int(paired(d_out) * PER_OUTPUT[cfg.kind]),)
        return {"lora_theta": ParamSpec(shape), "lora_alpha": ParamSpec(shape)}

    @staticmethod
    def prepare(cfg: ROADConfig, p: Params, base: Base, c: float | Tensor) -> Params:
        one = isinstance(c, float) and c == 1.0  # a product of small tensors costs as much as a pass over y
        theta, alpha = (v if one else c * v for v in (p["lora_theta"], p["lora_alpha"]))
        stretch = 1 + alpha
        own = torch.addcmul(alpha, stretch, (theta / 2).sin().square(), value=-2)
        return per_output(cfg, own, stretch * theta.sin())

    @classmethod
    def added(cls, cfg: ROADConfig, p: Params, x: Tensor, y: Tensor | None, base: Base, c: float | Tensor) -> Tensor:
        assert y is not None  # form "output"
        n = paired(base.d_out)
        even, last = (y, None) if n == base.d_out else (y[..., :n], y[..., n:])
        partners = even.unflatten(-1, (-1, cfg.group_size)).roll(cfg.group_size // 2, dims=-1).flatten(-2)
        if y.dtype.itemsize >= 4:
            new = torch.addcmul((1 + p["own"]) * even, p["other"], partners)
        else:  # in half precision 1 + own would lose what was learned
            new = even + torch.addcmul(p["own"] * even, p["other"], partners)
        return new if last is None else torch.cat([new, last], dim=-1)


def per_output(cfg: ROADConfig, own: Tensor, other: Tensor) -> Params:
    """One number per output (*batch, n), of its own term and of its partner's, which first halves subtract."""
    stored = int(4 * PER_OUTPUT[cfg.kind]) // 2  # halves of a group that are stored: one for both, both, or both for each term
    own, other = (v.unflatten(-1, (-1, stored, cfg.group_size // 2)) for v in (own, other))
    if stored == 1:
        own = torch.cat([own, own], dim=-2)
    first, second = other[..., -min(stored, 2), None, :], other[..., -1:, :]
    return {"own": own[..., :2, :].flatten(-3), "other": torch.cat([-first, second], dim=-2).flatten(-3)}
