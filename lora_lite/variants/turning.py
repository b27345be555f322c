"""What does it add to turn chosen singular directions of W by blocks, and to move their values? For SSVD and AntiPaSTO.

    U diag(S + c dS) R(c)^T Vh - U diag(S) Vh       side "V": x Vh^T is turned, then scaled
    U R(c) diag(S + c dS) Vh   - U diag(S) Vh       side "U": x Vh^T is scaled, then turned back, R(-c) = R(c)^T

U (d_out x r), S and Vh (r x d_in) are frozen, R is block-diagonal (cayley.py). Both are x Vh^T, a b x b core per block, and U^T:

    V: (R(c) - I) diag(S + c dS) + c diag(dS)       U: diag(S + c dS) (R(-c) - I) + c diag(dS)

no difference of near numbers, and zero bit for bit while nothing has moved. With a c per row no core is formed: the r numbers
of each token go through one eigendecomposition of Q^2 per layer and call.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.lowrank import LowRank
from lora_lite.variant import Params, ParamSpec
from lora_lite.variants.cayley import eigenvectors, exact, times, turned
from lora_lite.variants.spectrum import Spectrum

Side = Literal["V", "U"]


def frozen_specs(d_in: int, d_out: int, r: int) -> dict[str, ParamSpec]:
    shapes = {"lora_U": (d_out, r), "lora_S": (r,), "lora_Vh": (r, d_in)}
    return {name: ParamSpec(shape, trainable=False) for name, shape in shapes.items()}


def directions(spectrum: Spectrum, chosen: Tensor) -> dict[str, Tensor]:
    return {"lora_U": spectrum.U[:, chosen], "lora_S": spectrum.S[chosen], "lora_Vh": spectrum.Vh[chosen]}


def core(Q: Float[Tensor, "n b b"], p: Params, c: float | Tensor, side: Side = "V", first_order: bool = False) -> Float[Tensor, "n b b"]:
    """What comes between x Vh^T and U^T, at one c for all."""
    b, sign = Q.shape[-1], 1 if side == "V" else -1
    Q = sign * c * Q
    moved = 2 * Q if first_order else exact(Q)
    S, dS = p["lora_S"].unflatten(0, (-1, b)), c * p["lora_dS"].unflatten(0, (-1, b))
    return moved * (S + dS).unsqueeze(-2 if side == "V" else -1) + torch.diag_embed(dS)


def prepared(Q: Float[Tensor, "n b b"], p: Params, c: float | Tensor, side: Side = "V", first_order: bool = False) -> Params:
    ends = {"Vh": p["lora_Vh"], "U": p["lora_U"]}
    if not isinstance(c, Tensor) or not c.dim():
        return {**ends, "core": core(Q, p, c, side, first_order)}
    return {**ends, "S": p["lora_S"], "dS": p["lora_dS"], "Q": Q, **({} if first_order else eigenvectors(Q))}


def cored(p: Params, x: Float[Tensor, "*batch d_in"], c: float | Tensor, side: Side = "V") -> Float[Tensor, "*batch r"]:
    """What U takes to what is added to y, from what `prepared` made."""
    h = F.linear(x, p["Vh"])
    if "core" in p:
        return times(h.unflatten(-1, (-1, p["core"].shape[-1])), p["core"]).flatten(-2)
    assert isinstance(c, Tensor)
    rows = c.to(h.dtype)
    S, moved = p["S"] + rows * p["dS"], rows * p["dS"] * h
    return (turn(h, p, rows) * S if side == "V" else turn(h * S, p, -rows)) + moved


def turn(h: Float[Tensor, "*batch r"], p: Params, c: Tensor) -> Float[Tensor, "*batch r"]:
    """h R(c) - h."""
    blocks, c = h.unflatten(-1, (-1, p["Q"].shape[-1])), c[..., None]
    return (turned(blocks, p, c) if "V" in p else 2 * c * times(blocks, p["Q"])).flatten(-2)


def low_rank(Q: Float[Tensor, "n b b"], p: Params, c: float, side: Side = "V", first_order: bool = False) -> LowRank:
    """The same at one c as an update of rank r, exactly: the core goes into U."""
    K = core(Q, p, c, side, first_order)
    U = p["lora_U"].to(K.dtype).unflatten(-1, (-1, K.shape[-1]))
    return LowRank(p["lora_Vh"].to(K.dtype), times(U, K.mT).flatten(-2))
