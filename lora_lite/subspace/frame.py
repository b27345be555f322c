"""Which few directions carry most of what one side of a layer's updates do? An orthonormal basis and how strong each direction is.

Gram matrices are accumulated in float64: a float32 Gram loses every direction below 3e-4 of the strongest
(tests/test_subspace.py), a float64 one none that float32 data can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.subspace.packed import Stored, dense, wide
from lora_lite.subspace.products import matmul

CHUNK = 2**18  # numbers of a data matrix in float64 at a time, 2 MiB: they are to stay in the processor's cache
NOISE = 1e-14  # of the largest eigenvalue of a Gram: below it is rounding (1e-7 of the largest singular value)
SMALL = 256  # rows: below, all directions are found at once
SETTLED = 1e-5  # of the energy caught: one more step of the iteration would bring less
PROBES = 8  # random vectors whose products with a vector tell its length
START = 1504_05477  # a seed that no one else is likely to make up data with
STRONG = 1e-3  # of the strongest direction's energy: from there on, products in float32 leave directions orthonormal to 1e-5
WEAK = 1e-6  # of the strongest direction's energy (1e-3 of its singular value): what float32 products may lose
Choose = Callable[[Tensor, float], int]  # eigenvalues, descending, of this total -> how many to keep
More = Callable[[int], int]  # how many are kept -> how many to hold beyond those


def none(k: int) -> int:
    return 0


@dataclass(frozen=True, eq=False)
class Frame:
    """One side of one layer.

    components  (k, d), orthonormal rows unless quantised; quantised ones are used as they are, coefficients fitted to them
    mean        (d,), what the loadings are measured from; None in the uncentred space "feature"
    energy      (k,), squared singular values: how much of all updates lies along each direction, strongest first
    rest        how much lies along none of them; of space "flat" only, where a layer's sizes do not tell it
    """

    components: Stored
    mean: Stored | None
    energy: Float[Tensor, " k"]
    rest: float = 0.0

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

    def coordinates(self, X: Float[Tensor, "*n d m"]) -> Float[Tensor, "*n k m"]:
        """Where the columns of X lie, by least squares, in float64; the mean is not subtracted here."""
        rows = X.movedim(-2, -1)  # of all columns one after another, so that it is one product
        along = wide(self.components) @ rows.flatten(0, -2).double().T
        along = torch.linalg.solve(self.metric, along) if self.k else along
        return along.unflatten(1, rows.shape[:-1]).movedim(0, -2)

    @cached_property
    def metric(self) -> Float[Tensor, "k k"]:
        """Inner products between the directions: one but for rounding, unless quantised."""
        return gram(self.basis())

    def cut(self, k: int) -> Frame:
        rest = self.rest + float(self.energy[k:].sum()) if self.mean is not None else 0.0
        return replace(self, components=self.basis()[:k].clone(), energy=self.energy[:k].clone(), rest=rest)

    def padded(self, new: Float[Tensor, "q d"]) -> Frame:
        """With further directions that no task has used yet."""
        components = torch.cat([self.basis(), new.to(self.basis())])
        return replace(self, components=components, energy=F.pad(self.energy, (0, len(new))))


def columns(X: Float[Tensor, "n d"], dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor]]:
    """X in other precision, some columns at a time."""
    step = max(1, CHUNK // max(1, len(X)))
    for start in range(0, X.shape[1], step):
        where = slice(start, start + step)
        yield where, X[:, where].to(dtype)


def gram(X: Float[Tensor, "n d"], dtype: torch.dtype = torch.float64) -> Float[Tensor, "n n"]:
    """X X^T, of which one quarter is the mirror of another: a fifth less time, where there are many rows."""
    total, half = X.new_zeros(len(X), len(X), dtype=dtype), len(X) // 2 if len(X) >= SMALL // 4 else 0
    for _, part in columns(X, dtype):
        if half:
            total[:half, :half].addmm_(part[:half], part[:half].T)
        total[half:].addmm_(part[half:], part.T)
    total[:half, half:] = total[half:, :half].T
    return total


def principal(X: Float[Tensor, "n d"], choose: Choose, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """The leading directions of the rows of X: components (k, d), their energies (k,), and the whole spectrum.

    In float64; in X's float32 where each is STRONG: no nearer to them could it be kept."""
    n, d = X.shape
    values, vectors = torch.linalg.eigh(gram(X if n <= d else X.T, dtype))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    k = min(choose(values, float(values.sum())), int((values > NOISE * values[0]).sum()) if len(values) else 0)
    if n > d:
        return orthonormal(vectors[:, :k].T), values[:k], values
    back = (vectors[:, :k] / values[:k].sqrt()).T
    weakest = float(values[k - 1] / values[0]) if k else 0.0
    rounded = X.dtype is torch.float32 and dtype is torch.float64  # what a weak direction loses by it float32 cannot hold
    if rounded and weakest > STRONG:
        return matmul(back.to(X.dtype), X), values[:k], values
    U = X.new_empty(k, d, dtype=dtype)
    for where, part in columns(X, dtype):
        U[:, where] = back @ part
    return U if rounded and weakest > WEAK else orthonormal(U), values[:k], values


def leading(
    X: Float[Tensor, "n d"], choose: Choose, k: int | None = None, more: More = none
) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
    """The leading directions of the rows of X, and their energies; k where it is known how many are wanted. And `more` than the k
    wanted, as near as they are found on the way.

    A few of many are found by a block Krylov method (arXiv:1504.05477): half a dozen products with X in place of a Gram matrix and all
    its eigenvectors, 10 times faster at 1,024 rows of 2,048. What it catches is the most there is to catch within SETTLED. Exactly,
    by `principal`, where the matrix is small, too many are wanted, or some of them are WEAK.
    """
    found = krylov(X, choose, k or 24, more) if min(X.shape) > SMALL else None
    return found or principal(X, with_more(choose, more))[:2]


def with_more(choose: Choose, more: More) -> Choose:
    def both(spectrum: Tensor, total: float) -> int:
        k = choose(spectrum, total)
        return min(k + more(k), len(spectrum))

    return both


def krylov(X: Float[Tensor, "n d"], choose: Choose, k: int, more: More = none) -> tuple[Tensor, Tensor] | None:
    n, d = X.shape
    block, total = k + 8, float(torch.linalg.vector_norm(X)) ** 2
    new, probes = drawn(block, d, X.dtype, X.device)
    K, (seen, probed) = new, matmul(torch.cat([new, probes]), X.T).split([block, PROBES])
    while len(K) <= min(n, d) // 4:
        if len(K) > block:
            values, vectors = torch.linalg.eigh(gram(seen))
            values, turn = values.flip(0).clamp(min=0), vectors.flip(1).T
            wanted = choose(values, total)
            if wanted + more(wanted) <= len(values) and wanted <= len(values) - block:
                further, turn = turn[wanted : wanted + more(wanted)], turn[:wanted]
                rest = probed.double() @ seen.double().T @ turn.T - (probes @ K.T).double() @ turn.T * values[:wanted]
                if float(gain(values, rest.square().mean(0).sqrt())) <= SETTLED * float(values[:wanted].sum()):
                    weak = bool(wanted) and float(values[wanted - 1]) < WEAK * float(values[0])
                    turn = torch.cat([turn, further])
                    return None if weak else (orthonormal(matmul(turn.to(K.dtype), K).double()), values[: len(turn)])
        new = matmul(seen[-block:], X)
        for _ in range(2):  # as in `outside`
            new = orthonormal(new - matmul(matmul(new, K.T), K))
        K, seen = torch.cat([K, new]), torch.cat([seen, matmul(new, X.T)])
    return None


@lru_cache(maxsize=4)  # a layer's two sides want the same, and so does the next layer
def drawn(block: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Float[Tensor, "block d"], Float[Tensor, "probes d"]]:
    """Random directions to begin with, orthonormal, and probes; in the layer's own space, so in no task's gauge. Not to be written to."""
    both = torch.randn(block + PROBES, d, generator=torch.Generator().manual_seed(START)).to(device, dtype)
    return orthonormal(both[:block]), both[block:]


def gain(values: Float[Tensor, " m"], rest: Float[Tensor, " k"]) -> Tensor:
    """What the first k eigenvalues of the m found would gain by one more step, at most, where what is left of X^T X u beside its own
    direction has these lengths: that of [[value, rest], [rest, next]], next being the largest one not wanted. No step has to be
    taken to see that it is not needed, nor the product that would give those lengths: the probes know them well enough."""
    apart = values[: len(rest)] - values[len(rest)]
    return ((apart.square() + 4 * rest.square()).sqrt() - apart).sum() / 2


def orthonormal(U: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """Nearly orthonormal rows made exactly so."""
    return upright(U)[0]


def upright(U: Float[Tensor, "k d"]) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k k"]]:
    """Rows that rounding has bent a little, or quantising a lot: U = T Q with Q orthonormal, so that U^T l = Q^T (T^T l) for every l.

    One Cholesky-QR, five times as fast as Householder's, which is for rows that are nearly dependent.
    """
    T, failed = torch.linalg.cholesky_ex(U @ U.T)
    if not len(U) or (not int(failed) and float(T.diagonal().min()) > 0.1 * float(T.diagonal().max())):
        # by T's inverse, which is harmless here: solving with all of U would answer in columns, 20 times as slow to multiply with
        return torch.linalg.solve_triangular(T, torch.eye(len(U)).to(T), upper=False) @ U, T
    Q, R = torch.linalg.qr(U.T)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
    return (Q * sign).T.contiguous(), (R.T * sign)


def extended(W: Float[Tensor, "kn d"], k: int, noise: float) -> tuple[Float[Tensor, "kq d"], Float[Tensor, "kq kq"]]:
    """(W, T): rows W = T C with C orthonormal and T lower triangular. The first k rows stay as they were given, nearly orthonormal; the
    others, overwritten, hold what lay outside those; parts shorter than `noise` of it all are rounding, not directions.

    By Gram matrices, which tell sizes down to 1e-8 of the largest. What comes out of the first one is the less orthogonal the smaller
    it was, at 1e-6 of the rest by 1e-4; T, from a second one, knows.
    """
    G = W @ W.T
    if noise < 1e-7 or not k:
        Q = outside(upright(W[:k])[0], W[k:].T, noise)
    else:
        along = torch.linalg.solve(G[:k, :k], G[:k, k:])
        whitening = whitened(G[k:, k:] - G[k:, :k] @ along, noise**2 * float(G.diagonal()[k:].sum()))[: W.shape[1] - k]
        Q = torch.cat([-whitening @ along.T, whitening], dim=1) @ W
    m = k + len(Q)
    W, G = W[:m], G[:m, :m]
    W[k:] = Q
    G[k:] = Q @ W.T  # the lower triangle is all that is read
    return W, torch.linalg.cholesky(G)


def whitened(G: Float[Tensor, "n n"], least: float) -> Float[Tensor, "q n"]:
    """M with M G M^T = 1, of what is stronger than `least`: by Cholesky, in half the time, where all of it is, and by far."""
    T, failed = torch.linalg.cholesky_ex(G)
    sizes = T.diagonal().tolist()
    if not int(failed) and min(sizes) > 0.1 * max(sizes) and min(sizes) ** 2 > 100 * least:
        return torch.linalg.solve_triangular(T, torch.eye(len(G)).to(T), upper=False)
    strength, mixing = torch.linalg.eigh(G)
    real = strength > least
    return (mixing[:, real] / strength[real].sqrt()).T.flip(0)


def outside(U: Float[Tensor, "k d"], X: Float[Tensor, "d n"], noise: float) -> Float[Tensor, "q d"]:
    """Orthonormal rows for what of X lies outside the rows of U; parts shorter than `noise` of X are rounding, not directions."""
    size = float(torch.linalg.matrix_norm(X)) if X.numel() else 0.0
    if size == 0.0:
        return U.new_zeros(0, U.shape[1])
    left, strength, _ = torch.linalg.svd(X - U.T @ (U @ X), full_matrices=False)
    Q = left[:, strength > noise * size].T[: U.shape[1] - len(U)]
    for _ in range(2):  # twice is enough (Kahan): the first pass leaves what rounding of a small rest blew up
        Q = orthonormal(Q - (Q @ U.T) @ U)
    return Q
