"""How is a low-rank weight update held, added, measured and compressed without ever forming d_out x d_in?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.mixed import MixedLinear, linear, trains_across_dtypes, working

FEW_ROWS = 8  # up to here two small kernels beat addmm's set-up: 1.146x against 1.178x of the base at one token, CORE.md section 6


class LowRank(NamedTuple):
    """The update B diag(g) A of a weight (d_out, d_in). `LowRank(A, B, alpha / r)`.

    g is a float, or one number per rank: it carries alpha/r, a spectral step, a history's doses. A tuple, so that making
    one per layer and call costs a microsecond's third.
    """

    A: Float[Tensor, "r d_in"]
    B: Float[Tensor, "d_out r"]
    g: float | Tensor = 1.0

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def scaled(self, c: float | Tensor) -> LowRank:
        """c times the update; A and B are shared, not copied."""
        return LowRank(self.A, self.B, self.g * c)

    def folded(self) -> LowRank:
        """The same update with g inside B and 1.0 in its place, for algebra and export. Copies B."""
        return LowRank(self.A, self.B * self.g, 1.0)

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The full update: d_out * d_in numbers, for tests and merging only."""
        return (self.B * self.g) @ self.A

    def svd(self) -> tuple[Float[Tensor, "d_out k"], Float[Tensor, " k"], Float[Tensor, "k d_in"]]:
        """U, S, Vh of the update by a QR of each side and an SVD of the r x r middle; k = min(r, d_in, d_out)."""
        Qb, Rb = torch.linalg.qr(self.B * self.g)
        Qa, Ra = torch.linalg.qr(self.A.T)
        U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
        return Qb @ U, S, Vh @ Qa.T

    def truncated(self, r: int) -> LowRank:
        """The best rank-r approximation (Eckart-Young), singular values split evenly between the sides."""
        U, S, Vh = self.svd()
        root = S[:r].sqrt()
        return LowRank(root[:, None] * Vh[:r], U[:, :r] * root)


def stack(updates: Sequence[LowRank]) -> LowRank:
    """The sum of updates as one, exactly: ranks are concatenated, gains become one number per rank."""
    if len(updates) == 1:
        return updates[0]
    gains = [
        torch.as_tensor(u.g, dtype=torch.float32 if not isinstance(u.g, Tensor) else None, device=u.A.device).expand(u.r) for u in updates
    ]
    return LowRank(torch.cat([u.A for u in updates]), torch.cat([u.B for u in updates], dim=1), torch.cat(gains))


def add_narrow(y: Tensor, h: Tensor, B: Tensor, scale: float | Tensor, gate: Tensor | None = None, inplace: bool = False) -> Tensor:
    """y + scale * gate * B h, for h (*batch, r) and y (*batch, d_out); scale broadcasts against h, gate has one number per output.

    inplace  whether y (contiguous) may be written into where that pays: a third less time for the sum, at 1,024 rows
    """
    if type(scale) is not float:
        h, scale = (h * scale).to(h.dtype), 1.0
    if gate is not None:
        up = linear(h, B) * (gate if gate.dtype is h.dtype else gate.to(h.dtype))  # addcmul's backward takes a pass more than this saves
        out = y.add_(up, alpha=scale) if inplace else torch.add(y, up, alpha=scale)
    elif B.dtype is not h.dtype and h.dtype is y.dtype and trains_across_dtypes(h, B):
        return MixedLinear.apply(y, h, B, scale)  # type: ignore[return-value]
    else:
        if B.dtype is not h.dtype:
            dtype = working(h)
            h, B = h.to(dtype), B.to(dtype)
        if h.dtype is y.dtype and y.numel() > FEW_ROWS * y.shape[-1]:
            rows, h = y.flatten(0, -2), h.flatten(0, -2)
            inplace = inplace and not torch.is_grad_enabled()  # into a view, it would cost the backward more than it saves
            return (rows.addmm_(h, B.t(), alpha=scale) if inplace else torch.addmm(rows, h, B.t(), alpha=scale)).view(y.shape)
        up = F.linear(h, B)
        out = y.add_(up, alpha=scale) if inplace and h.dtype is not y.dtype else torch.add(y, up, alpha=scale)
    return out if out.dtype is y.dtype else out.to(y.dtype)
