"""Does DimensionProjector change the shape it says, keep what it says, and measure without flattering, for every input?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite as ll
from tests.models import generator, normal

pytestmark = pytest.mark.fast
METHODS = ("svd", "truncate", "interpolate")
EXACT = ll.DimensionProjector(variance_threshold=1.0)


def factors(r: int = 4, d_in: int = 24, d_out: int = 20, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return normal(r, d_in, seed=seed, dtype=dtype), normal(d_out, r, seed=seed + 1, dtype=dtype)


def dense(A: Tensor, B: Tensor) -> Tensor:
    return B.detach().double() @ A.detach().double()


def expected(A: Tensor, B: Tensor, n_in: int, n_out: int, method: str) -> Tensor:
    """The three methods again, dense and in float64."""
    d_out, d_in = len(B), A.shape[1]
    if method == "interpolate":
        A2 = F.interpolate(A.double()[None, None], size=(len(A), n_in), mode="bilinear")[0, 0]
        B2 = F.interpolate(B.double()[None, None], size=(n_out, len(A)), mode="bilinear")[0, 0]
        return B2 @ A2
    D = torch.zeros(max(d_out, n_out), max(d_in, n_in), dtype=torch.float64)
    D[:d_out, :d_in] = dense(A, B)
    scale = math.sqrt(math.sqrt(d_out * d_in) / math.sqrt(n_out * n_in)) if method == "svd" else 1.0
    return scale * D[:n_out, :n_in]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n_in", "n_out"), [(32, 28), (16, 12), (32, 12), (24, 20), (1, 1)])
def test_each_method_is_its_dense_formula(method: str, n_in: int, n_out: int) -> None:
    A, B = factors()
    A2, B2 = EXACT.project_adapter(A, B, n_in, n_out, method=method)
    assert A2.shape == (4, n_in) and B2.shape == (n_out, 4)
    torch.testing.assert_close(dense(A2, B2), expected(A, B, n_in, n_out, method), rtol=1e-5, atol=1e-5)


def test_svd_is_the_default_and_splits_the_singular_values_evenly() -> None:
    A, B = factors()
    A2, B2 = EXACT.project_adapter(A, B, 32, 28)
    torch.testing.assert_close(A2.norm(dim=1), B2.norm(dim=0))
    torch.testing.assert_close((A2, B2), EXACT.project_adapter(A, B, 32, 28, method="svd"))


def spectrum(values: list[float], d: int = 20) -> tuple[Tensor, Tensor]:
    U, V = (torch.linalg.qr(normal(d, len(values), seed=s))[0] for s in (3, 4))
    return V.T, U * torch.tensor(values)


@pytest.mark.parametrize(
    ("share", "cap", "kept"), [(0.95, None, 3), (0.85, None, 2), (0.5, None, 1), (1.0, None, 4), (1.0, 2, 2), (0.5, 3, 1)]
)
def test_the_threshold_chooses_the_rank_and_max_rank_caps_it(share: float, cap: int | None, kept: int) -> None:
    A, B = spectrum([3.0, 2.0, 1.0, 0.5])  # squares 9, 4, 1, 0.25 of 14.25: 63 %, 91 %, 98 %, 100 %
    A2, B2 = ll.DimensionProjector(variance_threshold=share, max_rank=cap).project_adapter(A, B, 30, 30)
    assert A2.shape == (kept, 30) and B2.shape == (30, kept)


@pytest.mark.parametrize("method", METHODS)
def test_gauges_permutations_and_signs_change_nothing(method: str) -> None:
    A, B = factors(dtype=torch.float64)
    G = torch.eye(4, dtype=torch.float64) + 0.3 * normal(4, 4, seed=7, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    first = EXACT.project_adapter(A, B, 30, 16, method)
    for A1, B1 in ((G @ A, B @ torch.linalg.inv(G)), (A[order], B[:, order]), (-A, -B)):
        again = EXACT.project_adapter(A1, B1, 30, 16, method)
        torch.testing.assert_close(dense(*again), dense(*first), rtol=1e-5, atol=1e-5)
        if method == "svd":  # even the factors, with a sign for each pair
            torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-5)
        assert EXACT.analyze_projection_quality((A1, B1), *again) == pytest.approx(
            EXACT.analyze_projection_quality((A, B), *first), abs=1e-5
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("r", "d_in", "d_out"), [(1, 12, 10), (4, 12, 10), (16, 12, 10), (3, 1, 5)])
def test_any_float_any_rank_any_parameter(method: str, dtype: torch.dtype, r: int, d_in: int, d_out: int) -> None:
    A, B = (nn.Parameter(v) for v in factors(r, d_in, d_out, dtype=dtype))
    A2, B2 = EXACT.project_adapter(A, B, 9, 14, method)
    assert A2.ndim == B2.ndim == 2 and A2.shape == (len(A2), 9) and B2.shape == (14, len(A2)) and 1 <= len(A2) <= r
    for v in (A2, B2):
        assert v.dtype == dtype and v.device == A.device and not v.requires_grad and not isinstance(v, nn.Parameter)
        assert torch.isfinite(v).all()
    quality = EXACT.analyze_projection_quality((A, B), A2, B2)
    assert all(math.isfinite(v) for v in quality.values()) and quality["shapes_differ"] == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_no_view_of_the_inputs_comes_back(method: str) -> None:
    A, B = factors()
    before = A.clone(), B.clone()
    for v in EXACT.project_adapter(A, B, 24, 20, method):
        v.zero_()
    assert torch.equal(A, before[0]) and torch.equal(B, before[1])


@pytest.mark.parametrize("method", METHODS)
def test_zero_in_is_exactly_zero_out(method: str) -> None:
    A, B = factors()
    A2, B2 = EXACT.project_adapter(A, torch.zeros_like(B), 30, 30, method)
    assert not (B2 @ A2).any() and torch.isfinite(A2).all() and torch.isfinite(B2).all()


# -- the figures ----------------------------------------------------------------------------------------------------------


def dense_figures(D: Tensor, D2: Tensor) -> dict[str, float]:
    """Of two updates of one shape and rank of at least five, from their dense SVDs."""
    U, U2 = torch.linalg.svd(D)[0], torch.linalg.svd(D2)[0]
    return {
        "reconstruction_error": float((D - D2).square().mean() / D.square().mean()),
        "rank_preservation": int(torch.linalg.matrix_rank(D2)) / int(torch.linalg.matrix_rank(D)),
        "norm_ratio": float(D2.norm() / D.norm()),
        "subspace_alignment": float((U[:, :5].T @ U2[:, :5]).square().sum()) / 5,
        "cosine": float((D * D2).sum() / (D.norm() * D2.norm())),
        "shapes_differ": 0.0,
    }


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_dense_formulas(seed: int) -> None:
    A, B = factors(8, dtype=torch.float32, seed=10 * seed)
    A2, B2 = factors(6, seed=10 * seed + 5)
    A2, B2 = torch.cat([A[:4], A2]), torch.cat([B[:, :4], B2], dim=1)
    found = EXACT.analyze_projection_quality((A, B), A2, B2)
    assert found == pytest.approx(dense_figures(dense(A, B), dense(A2, B2)), abs=1e-5)
    assert EXACT.analyze_projection_quality(dense(A, B).float(), A2, B2) == pytest.approx(found, abs=1e-5)
    assert EXACT.analyze_projection_quality(ll.LowRank(A, B / 2, 2.0), A2, B2) == pytest.approx(found, abs=1e-5)


def test_a_small_difference_is_not_lost_in_float32() -> None:
    A, B = factors(8, 512, 512)
    A2 = A + 1e-4 * normal(8, 512, seed=9)
    exact = float((dense(A, B) - dense(A2, B)).square().sum() / dense(A, B).square().sum())
    assert EXACT.analyze_projection_quality((A, B), A2, B)["reconstruction_error"] == pytest.approx(exact, rel=1e-2)


SELF = {"reconstruction_error": 0.0, "rank_preservation": 1.0, "norm_ratio": 1.0, "subspace_alignment": 1.0, "cosine": 1.0}


@pytest.mark.parametrize("values", [[3.0, 2.0, 1.0], [1.0] * 8, [2.0] * 4 + [1.0] * 6, [5.0]], ids=str)
def test_an_update_is_itself_also_where_its_spectrum_is_degenerate(values: list[float]) -> None:
    A, B = spectrum(values)
    Q = torch.linalg.qr(normal(len(values), len(values), seed=5))[0]  # another split of the same update
    found = EXACT.analyze_projection_quality((A, B), Q @ A, B @ Q.T)
    assert found == pytest.approx(SELF | {"shapes_differ": 0.0}, abs=1e-5)


def test_a_negated_update_is_told_by_the_cosine() -> None:
    A, B = factors()
    found = EXACT.analyze_projection_quality((A, B), A, -B)
    assert found["cosine"] == pytest.approx(-1.0, abs=1e-5) and found["reconstruction_error"] == pytest.approx(4.0, abs=1e-4)
    assert found["subspace_alignment"] == pytest.approx(1.0, abs=1e-5)  # which does not tell it


def test_zero_updates_divide_by_nothing() -> None:
    A, B = factors()
    none = torch.zeros_like(B)
    assert EXACT.analyze_projection_quality((A, none), A, none) == SELF | {"shapes_differ": 0.0}
    nothing = {**dict.fromkeys(SELF, 0.0), "reconstruction_error": 1.0, "shapes_differ": 0.0}
    assert EXACT.analyze_projection_quality((A, none), A, B) == nothing
    assert EXACT.analyze_projection_quality((A, B), A, none) == nothing
    assert EXACT.analyze_projection_quality(torch.zeros(20, 24), A, B) == nothing


def test_other_shapes_are_padded_with_zeros_and_flagged() -> None:
    A, B = factors()
    A2, B2 = EXACT.project_adapter(A, B, 40, 30, method="truncate")
    assert EXACT.analyze_projection_quality((A, B), A2, B2) == pytest.approx(SELF | {"shapes_differ": 1.0}, abs=1e-5)


# -- what it costs --------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most bytes any operator inside the block gave back in one tensor, and in all."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for v in out if isinstance(out, tuple | list) else (out,):
            if isinstance(v, Tensor):
                self.one, self.all = max(self.one, v.untyped_storage().nbytes()), self.all + v.untyped_storage().nbytes()
        return out


def test_nothing_of_the_size_of_the_weight_is_ever_made() -> None:
    d, r = 16384, 16
    A, B = torch.randn(r, d, generator=generator(0)), torch.randn(d, r, generator=generator(1))
    with Largest() as svd:
        ll.LowRank(A, B).svd()
    assert svd.one < 5e6 and svd.all < 20e6
    for method in METHODS:
        with Largest() as made:
            EXACT.project_adapter(A, B, d, d, method)
        assert made.one < 5e6, method
    with Largest() as compared:
        EXACT.analyze_projection_quality((A, B), A, B)
    assert compared.one < 5e6
    with Largest() as control:
        (B[:2048] @ A[:, :2048]).sum()
    assert control.one > 1e7


# -- what cannot be meant -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"B": torch.zeros(20, 5)}, r"A \(4, 24\) and B \(20, 5\) have ranks 4 and 5"),
        ({"A": torch.zeros(24)}, r"A \(24,\)"),
        ({"B": torch.zeros(2, 20, 4)}, r"B \(2, 20, 4\)"),
        ({"A": torch.zeros(4, 0)}, r"A \(4, 0\)"),
        ({"A": torch.full((4, 24), math.nan)}, r"A \(4, 24\).*NaN"),
        ({"B": torch.full((20, 4), math.inf)}, "infinite"),
        ({"A": torch.zeros(4, 24, dtype=torch.int64)}, "int64"),
        ({"target_in_dim": 0}, "target_in_dim.*0"),
        ({"target_out_dim": -3}, "target_out_dim.*-3"),
        ({"target_in_dim": True}, "target_in_dim.*True"),
        ({"method": "nearest"}, r"nearest.*A \(4, 24\).*svd, truncate, interpolate"),
    ],
    ids=lambda v: str(next(iter(v))) if isinstance(v, dict) else "",
)
def test_what_cannot_be_projected_is_told_with_its_shapes(change: dict[str, Any], said: str) -> None:
    A, B = factors()
    with pytest.raises(ValueError, match=said):
        EXACT.project_adapter(**({"A": A, "B": B, "target_in_dim": 8, "target_out_dim": 8} | change))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, math.nan, True])
def test_a_threshold_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="variance_threshold"):
        ll.DimensionProjector(variance_threshold=share)


@pytest.mark.parametrize("cap", [0, -1, True])
def test_a_cap_is_a_positive_number(cap: int) -> None:
    with pytest.raises(ValueError, match="max_rank"):
        ll.DimensionProjector(max_rank=cap)
