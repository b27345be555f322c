"""OFT: y = W R^T x + b, R block-diagonal and orthogonal: x is cut into blocks of b, each turned by its own Cayley transform.

    R = (I + Q)(I - Q)^-1,  x_block -> x_block R,  Q skew-symmetric, b (b - 1) / 2 numbers above its diagonal

arXiv:2306.07280; cayley="neumann" is OFTv2's truncated inverse, arXiv:2506.19847: (I + Q)(I + Q + ... + Q^(terms - 2)), near a
rotation while |Q| is small. Both turn the same way; PEFT's exact form turns the other way, by -Q. c turns in part: Q_c = c Q,
so the exact R stays a rotation and R(-c) undoes R(c).

Cost. One c for the call shares one b x b matrix per block. With a c per row or token (always, in compiled graphs) a matrix
for each would be b times the activations, so none is formed: neumann applies Q terms - 1 times, exact goes through one
eigendecomposition of Q^2 per layer and call, and adds some five tensors as large as x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.config import AdapterConfig
from lora_lite.variant import Base, Params, ParamSpec, Variant, register
from lora_lite.variants.cayley import eigenvectors, exact, skew, times, turned


@dataclass(frozen=True, kw_only=True)
class OFTConfig(AdapterConfig):
    """`OFTConfig(block_size=32)`. Where block_size does not divide d_in, the layer's blocks have the largest smaller size that does.

    cayley  "exact": a rotation for every Q and c. "neumann": no linear solve, PEFT's default, a rotation only near Q = 0
    terms   of "neumann": how many powers of Q, 0 included, the product holds, from 2, which is I + Q
    """

    variant: ClassVar[str] = "oft"
    block_size: int = 32
    cayley: Literal["exact", "neumann"] = "exact"
    terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cayley not in ("exact", "neumann"):
            raise ValueError(f'cayley must be "exact" or "neumann", got {self.cayley!r}')
        for name, least in (("block_size", 2), ("terms", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        b = next(b for b in range(self.block_size, 0, -1) if d_in % b == 0)
        if b == 1:
            raise ValueError(f"{target} has {d_in} inputs, which no block size from 2 to {self.block_size} divides; raise block_size")
        return dataclasses.replace(self, block_size=b)


@register
class OFT(Variant):
    name = "oft"
    Config = OFTConfig
    paper = "2306.07280"
    parameters: ClassVar[str] = "d_in * (block_size - 1) // 2"
    why_not: ClassVar[Mapping[str, str]] = {"linear_in_c": "c turns by c Q: every c is a rotation, a mix of x and its rotation is none"}
    form = "input"
    linear_in_c = False

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: OFTConfig) -> dict[str, ParamSpec]:
        b = cfg.block_size
        return {"lora_Q": ParamSpec((d_in // b, b * (b - 1) // 2))}

    @staticmethod
    def prepare(cfg: OFTConfig, p: Params, base: Base, c: float | Tensor) -> Params:
        Q = skew(p["lora_Q"], cfg.block_size)
        with torch.autocast(Q.device.type, enabled=False):  # it would take the small products down to bfloat16
            if isinstance(c, Tensor) and c.dim():
                return {"Q": Q, **eigenvectors(Q)} if cfg.cayley == "exact" else {"Q": Q}
            Q = c * Q
            return {"turn": exact(Q) if cfg.cayley == "exact" else neumann(Q, cfg.terms)}

    @classmethod
    def added(cls, cfg: OFTConfig, p: Params, x: Tensor, y: Tensor | None, base: Base, c: float | Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, cfg.block_size))
        if "turn" in p:
            return plus_times(blocks, p["turn"]).flatten(-2)
        assert isinstance(c, Tensor)
        c = c[..., None].to(x.dtype)
        if cfg.cayley == "neumann":
            return x + neumann_of(blocks, lambda z: c * times(z, p["Q"]), cfg.terms).flatten(-2)
        return x + turned(blocks, p, c).flatten(-2)


def plus_times(x: Float[Tensor, "*batch n b"], M: Float[Tensor, "n b b"]) -> Float[Tensor, "*batch n b"]:
    """x + x M in one pass."""
    rows = x.reshape(-1, *M.shape[:2]).transpose(0, 1)
    return torch.baddbmm(rows, rows, M).transpose(0, 1).reshape(x.shape)


def neumann(Q: Float[Tensor, "n b b"], terms: int) -> Float[Tensor, "n b b"]:
    """(I + Q)(I + Q + ... + Q^(terms - 2)) - I = 2 Q + 2 Q^2 + ... + Q^(terms - 1), by Horner in Q^2: half as many products."""
    square = Q @ Q
    quadratic = torch.add(square, Q, alpha=2)
    z = quadratic if terms % 2 else Q
    for _ in range(terms // 2 - 1):
        z = torch.baddbmm(quadratic + square, square, z)
    return z


def neumann_of(x: Tensor, times_Q: Callable[[Tensor], Tensor], terms: int) -> Tensor:
    """x times the same, where times_Q is x -> x Q."""
    z = first = times_Q(x)
    if terms == 2:
        return first
    for _ in range(terms - 3):
        z = first + times_Q(z)
    return first + z + times_Q(z)
