"""What few numbers does a task keep, once its layers share a basis? Four kinds, and how each moves when the basis turns.

    kind      per task and layer       the update it stands for (U (d_out, k_b), V (d_in, k_a): the layer's bases)
    core      C (k_b, k_a)             U C V^T
    factors   Y (r, k_b), X (r, k_a)   U Y^T X V^T
    diag      d (k,)                   U diag(d) V^T, on the first k = min(k_b, k_a) of each basis
    flat      y (k_b,), x (k_a,)       (mean_B + y comps_B as d_out x r) (mean_A + x comps_A as r x d_in)

Tasks lie one after another in the rows of each tensor ("parts"): one row per task, or r rows in "factors".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.subspace.block import Block
from lora_lite.subspace.frame import Frame, columns

Kind = Literal["core", "factors", "diag", "flat"]
Parts = tuple[Tensor, ...]
FEATURE_KINDS = ("core", "factors", "diag")


def rows(kind: Kind, ranks: Sequence[int], i: int) -> slice:
    """Which rows of the parts are task i's."""
    if kind != "factors":
        return slice(i, i + 1)
    start = sum(ranks[:i])
    return slice(start, start + ranks[i])


class Coded(NamedTuple):
    """What the bases hold of some updates, in float64.

    parts  their coefficients (alpha not in them): the nearest updates that the bases can hold
    energy (n,) the squared size of the updates, in "flat" of their factors
    error  (n,) the squared error of what these parts stand for, whatever they are: |dW|^2 - 2 <dW, kept> + |kept|^2
    """

    parts: Parts
    energy: Tensor
    error: Tensor


def encode(kind: Kind, b: Frame, a: Frame, block: Block, dtype: torch.dtype = torch.float64) -> Coded:
    """The coefficients rounded to `dtype`, and the error that they have then."""
    if kind == "flat":
        return encode_flat(b, a, block, dtype)
    left, right = b.coordinates(block.B), a.coordinates(block.A.transpose(1, 2))
    core = left @ right.transpose(1, 2)
    seen = b.metric @ core @ a.metric  # <u_i v_j^T, B A>
    if kind == "factors":
        parts: Parts = (left.transpose(1, 2).flatten(0, 1), right.transpose(1, 2).flatten(0, 1))
    else:
        parts = (core,) if kind == "core" else (nearest_diagonal(b, a, seen),)
    parts = tuple(p.to(dtype).contiguous() for p in parts)  # strides decide last bits, and a loaded state has plain ones
    held = as_cores(kind, parts, [block.r] * len(core))
    kb, ka = held.shape[1:]  # a diagonal may be smaller than its bases
    kept = b.metric[:kb, :kb] @ held @ a.metric[:ka, :ka]
    off = block.energy + block.scale.square() * ((kept - 2 * seen[:, :kb, :ka]) * held).sum((1, 2))
    return Coded(parts, block.energy, off.clamp(min=0))


def nearest_diagonal(b: Frame, a: Frame, seen: Tensor) -> Tensor:
    """(n, k). Least squares also where quantising bent the bases: (Gb * Ga) d = diag(Gb core Ga)."""
    k = min(b.k, a.k)
    return torch.linalg.solve(b.metric[:k, :k] * a.metric[:k, :k], seen.diagonal(dim1=1, dim2=2)[:, :k].T).T


def encode_flat(b: Frame, a: Frame, block: Block, dtype: torch.dtype) -> Coded:
    sides = []
    for frame, rows in ((b, flat_b(block.B, b.d)), (a, flat_a(block.A, a.d))):
        mean = frame.centre()
        assert mean is not None
        sides.append(encode_rows(frame, rows.double() - mean, dtype))
    return both(*sides)


def encode_rows(frame: Frame, rest: Float[Tensor, "n d"], dtype: torch.dtype) -> Coded:
    """One side in space "flat", of rows that the mean was taken from."""
    U, mean = frame.basis(), frame.centre()
    assert mean is not None
    mean, n = mean.double(), len(rest)
    seen, energy, off = mean.new_zeros(frame.k, n), mean.new_zeros(n), mean.new_zeros(n)
    for where, part in columns(rest):
        seen.addmm_(U[:, where].double(), part.T)  # part U^T takes 1.6 times as long
        off += torch.linalg.vector_norm(part, dim=1).square()
        energy += torch.linalg.vector_norm(part + mean[where], dim=1).square()
    loadings = (torch.linalg.solve(frame.metric, seen).T if frame.k else seen.T).to(dtype).contiguous()
    held = loadings.double()
    off += ((held @ frame.metric - 2 * seen.T) * held).sum(1)
    return Coded((loadings,), energy, off.clamp(min=0))


def both(b: Coded, a: Coded) -> Coded:
    return Coded((*b.parts, *a.parts), b.energy + a.energy, b.error + a.error)


def flat_a(A: Float[Tensor, "n r d_in"], width: int) -> Float[Tensor, "n width"]:
    """Row by row, zeros behind where another task has a larger rank."""
    return F.pad(A.flatten(1), (0, width - A[0].numel()))


def flat_b(B: Float[Tensor, "n d_out r"], width: int) -> Float[Tensor, "n width"]:
    """B^T row by row, so that padding the rank pads the end."""
    return flat_a(B.transpose(1, 2), width)


def expand(kind: Kind, parts: Parts, b: Frame, a: Frame, r: int, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(A (n, d_in), B (d_out, n)) of one task, differentiable in its parts; n is r, or the basis' k for core and diag."""
    d_in, d_out = sizes
    if kind == "flat":
        mb, ma = b.centre(), a.centre()
        assert mb is not None and ma is not None
        x, y = ma.to(parts[1]) + parts[1][0] @ a.basis().to(parts[1]), mb.to(parts[0]) + parts[0][0] @ b.basis().to(parts[0])
        return x[: r * d_in].reshape(r, d_in), y[: r * d_out].reshape(r, d_out).T
    U, V = b.basis().to(parts[0]), a.basis().to(parts[0])
    if kind == "factors":
        return parts[1] @ V, (parts[0] @ U).T
    if kind == "diag":
        k = parts[0].shape[1]
        return V[:k], U[:k].T * parts[0][0]
    return parts[0][0] @ V, U.T


def compact(kind: Kind, parts: Parts, b: Frame, a: Frame, r: int, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(A (r, d_in), B (d_out, r)), exact: a core has the rank of the adapter it came from. Zero rows where k < r."""
    if kind != "core":
        # rounded products would lose more than the numbers did
        wider = tuple(p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts)
        A, B = expand(kind, wider, b, a, r, sizes)
    else:
        P, S, Qh = torch.linalg.svd(parts[0][0].double(), full_matrices=False)
        root = S[:r].sqrt()
        A = (root[:, None] * Qh[:r]) @ a.basis().double()
        B = b.basis().double().T @ (P[:, :r] * root)
    missing = r - A.shape[0]
    return F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))


def of_rank(cores: Tensor, ranks: Sequence[int]) -> Tensor:
    """(n, k_b, k_a): each core's nearest of its rank."""
    P, S, Qh = torch.linalg.svd(cores.double(), full_matrices=False)
    kept = torch.arange(S.shape[1], device=S.device) < torch.tensor(ranks, device=S.device)[:, None]
    return ((P * (S * kept)[:, None]) @ Qh).to(cores)


def mapped(kind: Kind, parts: Parts, Tb: Tensor, Ta: Tensor) -> Parts:
    """Coefficients in other coordinates, in float64: those along old direction j become row j of T (k_old, k_new)."""
    parts = tuple(p.double() for p in parts)
    if kind == "core":
        return (Tb.T @ parts[0] @ Ta,)
    if kind == "diag":
        raise ValueError('coefficients="diag" cannot be carried to another basis; build with coefficients="core" to absorb')
    return parts[0] @ Tb, parts[1] @ Ta


def padded(kind: Kind, parts: Parts, kb: int, ka: int) -> Parts:
    """With zeros along new directions, up to kb and ka."""
    if kind == "core":
        return (F.pad(parts[0], (0, ka - parts[0].shape[2], 0, kb - parts[0].shape[1])),)
    if kind == "diag":
        return (F.pad(parts[0], (0, min(kb, ka) - parts[0].shape[1])),)
    return F.pad(parts[0], (0, kb - parts[0].shape[1])), F.pad(parts[1], (0, ka - parts[1].shape[1]))


def as_cores(kind: Kind, parts: Parts, ranks: Sequence[int]) -> Tensor:
    """(n, k_b, k_a) in float64, of every kind but "flat"."""
    if kind == "core":
        return parts[0].double()
    if kind == "diag":
        return torch.diag_embed(parts[0].double())
    Y, X = parts[0].double(), parts[1].double()
    return torch.stack([Y[s].T @ X[s] for s in (rows(kind, ranks, i) for i in range(len(ranks)))])


def squares(kind: Kind, parts: Parts, ranks: Sequence[int]) -> Tensor:
    """Squared length of each task's coefficients (n,): that of its update, alpha not in it; in "flat" that of both vectors."""
    if kind == "factors":
        grams = [(parts[0][s] @ parts[0][s].T, parts[1][s] @ parts[1][s].T) for s in (rows(kind, ranks, i) for i in range(len(ranks)))]
        return torch.stack([(y * x).sum() for y, x in grams]) if grams else parts[0].new_zeros(0)
    return torch.stack([p.square().flatten(1).sum(1) for p in parts]).sum(0)
