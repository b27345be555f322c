"""Which linear map takes one model's activations to another's, given the same tokens? Streamed sums, and two maps from them.

With Xs (n, d_s) and Xt (n, d_t) the activations of n tokens, C = Xs^T Xt and G = Xt^T Xt:

    Procrustes      M = polar(C)                          the partial isometry that turns one into the other
    read map        (A C + l A R0) (G + l I)^-1           ridge toward R0 = s M with l = 0.1 tr G / d: where the tokens say little, turn

Plain ridge shrinks what the tokens do not fill and so loses most of an update even when both models are one (docs/transfer.md).
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

LAMBDA = 0.1  # of the mean variance per direction
HELD_MOST = 512  # tokens kept for the report, at each pair of sites
FLOOR = 1e-10  # singular values of C below this share of the largest: the tokens never went there (float64 sums)


class Pairs:
    """Two models' activations at one pair of sites, as sums. Few tokens for the width stay as rows, reduced by a thin QR."""

    def __init__(self, d_source: int, d_target: int) -> None:
        self.d_source, self.d_target, self.n = d_source, d_target, 0
        self.rows: list[tuple[Tensor, Tensor]] | None = []
        self.C = self.G = torch.empty(0)

    def add(self, xs: Float[Tensor, "n d_s"], xt: Float[Tensor, "n d_t"]) -> None:
        xt = wide(xt)
        xs = wide(xs).to(xt.device)
        self.n += len(xt)
        if self.rows is not None and self.n <= min(self.d_source, self.d_target):
            self.rows.append((xs, xt))
            return
        if self.rows is not None:
            earlier, self.rows = self.rows, None
            self.C, self.G = xt.new_zeros(self.d_source, self.d_target), xt.new_zeros(self.d_target, self.d_target)
            for pair in earlier:
                self.sum(*pair)
        self.sum(xs, xt)

    def sum(self, xs: Tensor, xt: Tensor) -> None:
        self.C.addmm_(xs.T, xt)
        self.G.addmm_(xt.T, xt)

    @cached_property
    def fit(self) -> Fit:
        """The maps; no tokens may come after."""
        if self.rows is None:
            return Fit(self.C, self.G, None, None)
        xs, xt = (torch.cat(side) for side in zip(*self.rows, strict=True))
        Qs, Rs = torch.linalg.qr(xs.T)
        Qt, Rt = torch.linalg.qr(xt.T)
        return Fit(Rs @ Rt.T, Rt @ Rt.T, Qs, Qt)


class Fit:
    """C and G, in the coordinates of orthonormal columns Qs (d_s, k), Qt (d_t, k) where there are fewer tokens than features."""

    def __init__(self, C: Tensor, G: Tensor, Qs: Tensor | None, Qt: Tensor | None) -> None:
        self.C, self.G, self.Qs, self.Qt = C, G, Qs, Qt
        U, S, Vh = torch.linalg.svd(C, full_matrices=False)
        seen = S.gt(S[:1] * FLOOR)
        self.U, self.V = U[:, seen], Vh[seen].T
        self.scale = float(S.sum() / self.G.trace()) if bool(seen.any()) else 0.0

    @property
    def energy(self) -> float:
        """sum |x_t|^2"""
        return float(self.G.trace())

    def read(self, A: Float[Tensor, "r d_s"]) -> Float[Tensor, "r d_t"]:
        """Rows that read from x_t what A reads from x_s."""
        inside = A if self.Qs is None else A @ self.Qs
        ridge = LAMBDA * self.energy / len(self.G)
        right = inside @ self.C + ridge * self.scale * (inside @ self.U) @ self.V.T
        if not ridge:
            return A.new_zeros(len(A), len(self.G) if self.Qt is None else len(self.Qt))
        found = torch.linalg.solve(self.G + ridge * torch.eye(len(self.G), dtype=A.dtype, device=A.device), right.T).T
        return found if self.Qt is None else found @ self.Qt.T

    def write(self, B: Float[Tensor, "d_s r"]) -> Float[Tensor, "d_t r"]:
        """Columns turned from the source's space into the target's."""
        inside = B if self.Qs is None else self.Qs.T @ B
        turned = self.V @ (self.U.T @ inside)
        return turned if self.Qt is None else self.Qt @ turned

    def spread(self, A: Float[Tensor, "r d_t"]) -> Float[Tensor, "r r"]:
        """A G A^T: the second moments of what A reads from x_t."""
        inside = A if self.Qt is None else A @ self.Qt
        return inside @ self.G @ inside.T


class Held:
    """The tokens kept out of the fit, at one pair of sites."""

    def __init__(self) -> None:
        self.n = 0
        self.xs: list[Tensor] = []
        self.xt: list[Tensor] = []

    def add(self, xs: Tensor, xt: Tensor) -> None:
        room = HELD_MOST - self.n
        if room > 0:
            self.xs.append(xs[:room])
            self.xt.append(xt[:room])
            self.n += len(self.xt[-1])

    def pair(self) -> tuple[Tensor, Tensor]:
        xt = wide(torch.cat(self.xt))
        return wide(torch.cat(self.xs)).to(xt.device), xt


def wide(x: Tensor) -> Tensor:
    """float64 where the device has it: C squares the scale of the activations, and float32 would lose the small directions."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)
