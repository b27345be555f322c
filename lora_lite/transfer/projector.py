"""How do the factors of an adapter become those of a layer of another width, and what is left of the update?

A change of shape, not of meaning: feature i of one model is not feature i of another. On a target whose right answer is known all
three methods keep about nothing of the adapter's function (docs/transfer.md); `transfer_adapter` is what carries it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.lowrank import LowRank, stack

TOP = 5  # singular directions compared by subspace_alignment
TIED = 1e-4  # singular values this close, relatively, are one level: a cut between them would be arbitrary
METHODS = ("svd", "truncate", "interpolate")


@dataclass(frozen=True, kw_only=True)
class DimensionProjector:
    """`DimensionProjector(variance_threshold=0.95).project_adapter(A, B, 768, 1024)` -> (A', B').

    variance_threshold  "svd" keeps the fewest singular values whose squares hold this share of their sum
    max_rank            and at most this many of them

    Raises ValueError for a threshold outside (0, 1] or a max_rank below 1.
    """

    variance_threshold: float = 0.95
    max_rank: int | None = None

    def __post_init__(self) -> None:
        share = self.variance_threshold
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"variance_threshold must be in (0, 1], got {share!r}")
        if self.max_rank is not None:
            check_whole("max_rank", self.max_rank)

    @torch.no_grad()
    def project_adapter(
        self, A: Tensor, B: Tensor, target_in_dim: int, target_out_dim: int, method: str = "svd"
    ) -> tuple[Float[Tensor, "k n_in"], Float[Tensor, "n_out k"]]:
        """A (r, d_in) and B (d_out, r) for a layer target_in_dim -> target_out_dim: A' (k, target_in_dim), B' (target_out_dim, k).

            A2, B2 = projector.project_adapter(A, B, 1024, 1024)

        method  "svd": singular vectors of B A are cut or padded with zeros, singular values scaled by
                sqrt(sqrt(out in) / sqrt(out' in')) and split evenly; k as the threshold says, at most r.
                "truncate": the factors themselves are cut or padded; k = r. "interpolate": each row of A and column of B
                is resampled linearly; k = r

        New tensors of the inputs' dtype on their device, without gradients. Two thin QRs and an r x r SVD: never d_out x d_in.
        Raises ValueError naming the shapes: not 2-D, ranks that differ, dims that are no positive whole numbers, NaN.
        """
        check_factors(A, B)
        check_whole("target_in_dim", target_in_dim)
        check_whole("target_out_dim", target_out_dim)
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r} for A {tuple(A.shape)} and B {tuple(B.shape)}; there are {', '.join(METHODS)}")
        way: Callable[..., LowRank] = {"svd": self._svd, "truncate": truncated, "interpolate": interpolated}[method]
        update = way(widened(A, B), target_in_dim, target_out_dim)
        return update.A.to(A.dtype), update.B.to(B.dtype)

    def _svd(self, update: LowRank, d_in: int, d_out: int) -> LowRank:
        U, S, Vh = signed(*update.svd())
        k = self.rank_kept(S)
        root = (S[:k] * math.sqrt(math.sqrt(update.B.shape[0] * update.A.shape[1]) / math.sqrt(d_out * d_in))).sqrt()
        return LowRank(root[:, None] * fitted(Vh[:k], d_in), fitted(U[:, :k].T, d_out).T.contiguous() * root)

    def rank_kept(self, S: Float[Tensor, " n"]) -> int:
        """The fewest leading singular values that hold the threshold's share of the energy, from 1 to max_rank."""
        energy = S.double().square().cumsum(0)
        k = int((energy < self.variance_threshold * energy[-1] * (1 - 1e-12)).sum()) + 1
        return min(k, len(S), self.max_rank or k)

    @torch.no_grad()
    def analyze_projection_quality(self, original: Tensor | LowRank | tuple[Tensor, Tensor], A: Tensor, B: Tensor) -> dict[str, float]:
        """How far the update B A is from the original one, which is dense (d_out, d_in), a LowRank, or a pair (A, B).

            projector.analyze_projection_quality((A, B), A2, B2)["reconstruction_error"]

        reconstruction_error  |D - D'|^2 / |D|^2          rank_preservation  rank D' / rank D
        norm_ratio            |D'| / |D|                  cosine             <D, D'> / (|D| |D'|): -1 for a negated update
        subspace_alignment    |U^T U'|^2 / k over the five leading left singular vectors (fewer at a lower rank, more where
                              the fifth singular value is tied), so that it does not depend on which basis an SVD picks
        shapes_differ         1.0 where the smaller of two shapes was padded with zeros for the comparison

        Defined for every input: two zero updates are equal (0, 1, 1, 1); of one that is zero and one that is not, nothing is
        preserved (1, 0, 0, 0). A dense original costs its SVD. Raises ValueError as project_adapter.
        """
        check_factors(A, B)
        D, D2 = as_update(original), widened(A, B)
        d_in, d_out = (max(pair) for pair in zip(sizes(D), sizes(D2), strict=True))
        differ = sizes(D) != sizes(D2)
        return compared(truncated(D, d_in, d_out), truncated(D2, d_in, d_out)) | {"shapes_differ": float(differ)}


# -- the two plain ways ---------------------------------------------------------------------------------------------------


def fitted(rows: Float[Tensor, "k n"], width: int) -> Float[Tensor, "k m"]:
    """Rows cut, or continued with zeros, to a width; never a view."""
    return F.pad(rows, (0, width - rows.shape[1])) if width > rows.shape[1] else rows[:, :width].clone()


def truncated(update: LowRank, d_in: int, d_out: int) -> LowRank:
    return LowRank(fitted(update.A, d_in), fitted(update.B.T, d_out).T.contiguous(), update.g)


def interpolated(update: LowRank, d_in: int, d_out: int) -> LowRank:
    """Bilinear resizing of each factor; the rank keeps its size, so it is linear along the features."""
    return LowRank(resampled(update.A, d_in), resampled(update.B.T, d_out).T.contiguous())


def resampled(rows: Float[Tensor, "k n"], width: int) -> Float[Tensor, "k m"]:
    return F.interpolate(rows[None], size=width, mode="linear", align_corners=False)[0].clone()


# -- comparing two updates of one shape -----------------------------------------------------------------------------------


def compared(D: LowRank, D2: LowRank) -> dict[str, float]:
    """On factors alone. The difference is a stack of both: |a|^2 - 2<a, b> + |b|^2 would lose 7e-4 in float32."""
    (U, S, _), (U2, S2, _) = D.svd(), D2.svd()
    size, size2 = float(S.norm()), float(S2.norm())
    if not size or not size2:
        same = float(size == size2)
        return {"reconstruction_error": 1 - same, "rank_preservation": same, "norm_ratio": same, "subspace_alignment": same, "cosine": same}
    away = float(stack([D, D2.scaled(-1.0)]).svd()[1].norm())
    inner = float(((D2.A @ D.A.T) * (D2.B.T @ D.B)).sum())
    d_in, d_out = sizes(D)
    k, k2 = leading(S), leading(S2)
    return {
        "reconstruction_error": (away / size) ** 2,
        "rank_preservation": rank(S2, d_in, d_out) / rank(S, d_in, d_out),
        "norm_ratio": size2 / size,
        "subspace_alignment": float((U[:, :k].T @ U2[:, :k2]).square().sum()) / max(k, k2),
        "cosine": max(-1.0, min(1.0, inner / (size * size2))),
    }


def rank(S: Float[Tensor, " n"], d_in: int, d_out: int) -> int:
    """Of rounding noise free: singular values above max(d) eps of the largest, as torch.linalg.matrix_rank has it."""
    return int(S.gt(S[0] * max(d_in, d_out) * torch.finfo(S.dtype).eps).sum())


def leading(S: Float[Tensor, " n"]) -> int:
    """The first TOP that are not zero, and all that are tied with the last of them."""
    k = min(TOP, int(S.gt(S[0] * 1e-5).sum()))
    return int(S.ge(S[k - 1] * (1 - TIED)).sum())


# -- taking in ------------------------------------------------------------------------------------------------------------


def sizes(update: LowRank) -> tuple[int, int]:
    return update.A.shape[1], update.B.shape[0]


def signed(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each pair of singular vectors with the sign that makes the largest entry of the right one positive: one answer per update."""
    sign = torch.where(Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0)
    return U * sign.T, S, Vh * sign


def as_update(given: Tensor | LowRank | tuple[Tensor, Tensor]) -> LowRank:
    """A dense update as the factors of its SVD, so that everything is compared in one way."""
    if isinstance(given, LowRank):
        check_factors(given.A, given.B)
        folded = given.folded()
        return widened(folded.A, folded.B)
    if isinstance(given, tuple):
        check_factors(*given)
        return widened(*given)
    if given.ndim != 2 or not given.numel() or not bool(torch.isfinite(given).all()):
        raise ValueError(f"the original update is {tuple(given.shape)}; expected (d_out, d_in) of finite values, or its factors")
    U, S, Vh = torch.linalg.svd(computable(given), full_matrices=False)
    return LowRank(S[:, None] * Vh, U)


def widened(A: Tensor, B: Tensor) -> LowRank:
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    return LowRank(A.detach().to(dtype), B.detach().to(dtype))


def computable(x: Tensor) -> Tensor:
    """Detached, and in a precision that has a QR and an SVD: float32, or float64 where it was."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def check_factors(A: Tensor, B: Tensor) -> None:
    shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
    if A.ndim != 2 or B.ndim != 2 or not A.numel() or not B.numel():
        raise ValueError(f"{shapes} are not the factors (r, d_in) and (d_out, r) of an update")
    if A.shape[0] != B.shape[1]:
        raise ValueError(f"{shapes} have ranks {A.shape[0]} and {B.shape[1]}; they must be the same")
    if not A.is_floating_point() or not B.is_floating_point() or A.device != B.device:
        raise ValueError(f"{shapes} are {A.dtype} on {A.device} and {B.dtype} on {B.device}; expected floats on one device")
    if not bool(torch.isfinite(A).all() & torch.isfinite(B).all()):
        raise ValueError(f"{shapes} hold NaN or infinite values")


def check_whole(what: str, n: object) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"{what} must be a positive whole number, got {n!r}")
