"""Which products of a collection go to oneDNN, and are they the same numbers?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_lite.subspace import products
from tests.models import normal
from tests.references import assert_close
from tests.subspaces import MODULES, family, of

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(products._ONEDNN is None, reason="this torch multiplies by something else than MKL, and nothing goes to oneDNN"),
]
N, D, R = 128, 1024, 64  # 2**23 multiply-adds, the least that go there


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what went to oneDNN."""
    found: list[tuple[int, ...]] = []
    kernel = products._ONEDNN

    def noted(a: Tensor, W: Tensor, *rest: Any) -> Tensor:
        found.append((*a.shape, len(W)))
        return kernel(a, W, *rest)

    monkeypatch.setattr(products, "_ONEDNN", noted)
    return found


@pytest.mark.parametrize("turned", [False, True])
def test_the_same_numbers(turned: bool, sent: list[tuple[int, ...]]) -> None:
    a, b = normal(N, D), normal(R, D).T if turned else normal(D, R)
    assert_close(products.matmul(a, b), a.double() @ b.double(), tolerance=3e-6)
    assert sent == [(N, D, R)]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (normal(N // 2, D), normal(D, R)),
        (normal(4, 32 * D), normal(32 * D, R)),
        (normal(N, D).double(), normal(D, R).double()),
        (normal(N, D + 8)[:, :D], normal(D, R)),
        (normal(D, N).T, normal(D, R)),
        (normal(N, D), normal(D, R + 8)[:, :R]),
        (normal(N, D).requires_grad_(), normal(D, R)),
        (normal(N, D), normal(D, R).requires_grad_()),
    ],
    ids=["little", "narrow", "float64", "part of rows", "turned", "part of columns", "gradient", "gradient of b"],
)
def test_not_where_it_gains_nothing_or_loses_something(a: Tensor, b: Tensor, sent: list[tuple[int, ...]]) -> None:
    found = products.matmul(a, b)
    assert not sent and torch.equal(found, a @ b)
    for x in (x for x in (a, b) if x.requires_grad):
        found.sum().backward()
        assert x.grad is not None and bool(x.grad.any())


def test_not_where_it_is_switched_off(sent: list[tuple[int, ...]]) -> None:
    torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)  # type: ignore[arg-type]  # `flags` warns about GPUs
    try:
        products.matmul(normal(N, D), normal(D, R))
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True, _fp32_precision=None)  # type: ignore[arg-type]
    assert not sent
    products.matmul(normal(N, D), normal(D, R))
    assert sent


@pytest.mark.parametrize("form", [{"coefficients": "core"}, {"space": "flat"}], ids=["feature", "flat"])
def test_a_subspace_is_the_same_either_way(form: dict[str, Any], sent: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = family(40, d_in=320, d_out=300, r=8, rank=12, noise=0.1, modules=MODULES[:1])
    plain = of(adapters, num_components=12, **form)
    assert not sent
    monkeypatch.setattr(products, "WORK", 0)
    other = of(adapters, num_components=12, **form)
    assert sent
    for task in plain.tasks[:3]:
        for m, u in plain.reconstruct(task).factors().items():
            assert_close(other.reconstruct(task).factors()[m].dense(), u.dense(), tolerance=2e-6)
