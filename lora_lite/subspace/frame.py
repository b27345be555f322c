"""Which few directions carry most of what one side of a layer's updates do? An orthonormal basis and how strong each direction is.

Gram matrices are accumulated in float64: a float32 Gram loses every direction below 3e-4 of the strongest
(tests/test_subspace_frame.py), a float64 one none that float32 data can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.subspace.packed import Stored, dense, wide

CHUNK = 4096  # rows of a data matrix in float64 at a time
NOISE = 1e-14  # of the largest eigenvalue of a Gram: below it is rounding (1e-7 of the largest singular value)
Choose = Callable[[Tensor], int]  # eigenvalues, descending -> how many to keep


@dataclass(frozen=True, eq=False)
class Frame:
    """One side of one layer.

    components  (k, d), orthonormal rows unless quantised; quantised ones are used as they are, coefficients fitted to them
    mean        (d,), what the loadings are measured from; None in the uncentred space "feature"
    energy      (k,), squared singular values: how much of all updates lies along each direction, strongest first
    """

    components: Stored
    mean: Stored | None
    energy: Float[Tensor, " k"]

    @property
    def k(self) -> int:
        return self.components.shape[0]

    @property
    def d(self) -> int:
        return self.components.shape[1]

    def basis(self) -> Float[Tensor, "k d"]:
        return dense(self.components)

    def centre(self) -> Float[Tensor, " d"] | None:
        return None if self.mean is None else dense(self.mean).reshape(-1)  # packed as one row

    def coordinates(self, X: Float[Tensor, "d n"]) -> Float[Tensor, "k n"]:
        """Where the columns of X lie, by least squares, in float64; the mean is not subtracted here."""
        along = self.along(X)
        return torch.linalg.solve(self.metric, along) if self.k else along

    def along(self, X: Float[Tensor, "d n"]) -> Float[Tensor, "k n"]:
        """The inner products of the columns of X with each direction, in float64."""
        return wide(self.components) @ X.double()

    @cached_property
    def metric(self) -> Float[Tensor, "k k"]:
        """Inner products between the directions: one but for rounding, unless quantised."""
        U = wide(self.components)
        return U @ U.T

    def cut(self, k: int) -> Frame:
        return replace(self, components=self.basis()[:k].clone(), energy=self.energy[:k].clone())

    def padded(self, new: Float[Tensor, "q d"]) -> Frame:
        """With further directions that no task has used yet."""
        components = torch.cat([self.basis(), new.to(self.basis())])
        return Frame(components, self.mean, F.pad(self.energy, (0, len(new))))


def gram(X: Float[Tensor, "rows n"], dtype: torch.dtype = torch.float64) -> Float[Tensor, "n n"]:
    """X^T X, in chunks of rows."""
    total = X.new_zeros(X.shape[1], X.shape[1], dtype=dtype)
    for rows in X.split(CHUNK):
        wide_rows = rows.to(dtype)
        total.addmm_(wide_rows.T, wide_rows)
    return total


def principal(X: Float[Tensor, "d n"], choose: Choose, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """The leading directions of the columns of X: components (k, d) in float64, their energies (k,), and the whole spectrum."""
    d, n = X.shape
    tall = n <= d
    values, vectors = torch.linalg.eigh(gram(X if tall else X.T, dtype))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    k = min(choose(values), int((values > NOISE * values[0]).sum()) if len(values) else 0)
    U = X.to(dtype) @ (vectors[:, :k] / values[:k].sqrt()) if tall else vectors[:, :k]
    return orthonormal(U).T.contiguous(), values[:k], values


def orthonormal(U: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Nearly orthonormal columns made exactly so: one Cholesky-QR, a Householder QR where columns are nearly dependent."""
    if not U.shape[1]:
        return U
    L, failed = torch.linalg.cholesky_ex(U.T @ U)
    if int(failed) or float(L.diagonal().min()) < 0.5:
        return torch.linalg.qr(U).Q
    return torch.linalg.solve_triangular(L, U.T, upper=False).T


def upright(U: Float[Tensor, "k d"]) -> tuple[Tensor, Tensor]:
    """Rows that rounding has bent a little, or quantising a lot: (Q, T) with Q orthonormal and U^T l = Q^T (T^T l) for every l."""
    if not len(U):
        return U, U.new_zeros(0, 0)
    Q, R = torch.linalg.qr(U.T)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
    return (Q * sign).T, (R.T * sign)


def outside(U: Float[Tensor, "k d"], X: Float[Tensor, "d n"], noise: float) -> Float[Tensor, "q d"]:
    """Orthonormal rows for what of X lies outside the rows of U; parts shorter than `noise` of X are rounding, not directions."""
    size = float(torch.linalg.matrix_norm(X)) if X.numel() else 0.0
    if size == 0.0:
        return U.new_zeros(0, U.shape[1])
    rest = X - U.T @ (U @ X)
    left, strength, _ = torch.linalg.svd(rest, full_matrices=False)
    Q = left[:, strength > noise * size][:, : U.shape[1] - len(U)]
    for _ in range(2):  # twice is enough (Kahan): the first pass leaves what rounding of a small rest blew up
        Q = torch.linalg.qr(Q - U.T @ (U @ Q)).Q if Q.shape[1] else Q
    return Q.T
