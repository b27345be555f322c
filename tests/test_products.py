"""Which products go to oneDNN, and are they the same numbers, with the same derivatives?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite as ll
from lora_lite import products
from lora_lite.mixed import Mixed, MixedLinear
from tests.models import normal
from tests.references import assert_close

N, D, R, OUT = 256, 512, 16, 128  # 2**21 multiply-adds, the least that goes there


@pytest.fixture(autouse=True)
def _as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WORK", 2**21)
    monkeypatch.setattr(products, "NARROW", 8)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what went to oneDNN."""
    found: list[tuple[int, ...]] = []
    kernel = products._ONEDNN

    def noted(x: Tensor, W: Tensor, *rest: Any) -> Tensor:
        assert W.is_contiguous() or W.t().is_contiguous()  # else it takes 1,000 times as long
        found.append((*x.shape, len(W)))
        return kernel(x, W, *rest)

    monkeypatch.setattr(products, "_ONEDNN", noted)
    return found


@pytest.mark.parametrize("shape", [(N,), (2, N), (2, 1, N)])
@pytest.mark.parametrize("layout", ["rows", "columns", "part"])
def test_the_same_numbers(shape: tuple[int, ...], layout: str, sent: list[tuple[int, ...]]) -> None:
    x, W = normal(*shape, D), {"rows": normal(R, D), "columns": normal(D, R).T, "part": normal(R, D + 8)[:, :D]}[layout]
    assert_close(products.matmul(x, W.T), x.double() @ W.double().T, tolerance=3e-6)
    if len(shape) == 1:
        x = normal(D, N).T
        assert_close(products.matmul(x, W.T), x.double() @ W.double().T, tolerance=3e-6)
    assert sent and all(s[-2:] == (D, R) for s in sent)


class Seen(Tensor):
    pass


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def without_mkldnn() -> Iterator[None]:
    torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)  # type: ignore[arg-type]  # `flags` warns about GPUs
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True, _fp32_precision=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "around",
    [Dispatched, Called, lambda: torch.autocast("cpu", dtype=torch.bfloat16), without_mkldnn],
    ids=["dispatch", "function", "autocast", "off"],
)
def test_not_where_somebody_looks_on_or_it_is_switched_off(
    around: Callable[[], AbstractContextManager[Any]], sent: list[tuple[int, ...]]
) -> None:
    x, W = normal(N, D), normal(R, D)
    with around():
        inside = products.matmul(x, W.T)
    assert not sent
    assert_close(products.matmul(x, W.T), inside, tolerance=2e-2 if inside.dtype is torch.bfloat16 else 1e-6)
    assert sent


@pytest.mark.parametrize(
    ("x", "W"),
    [
        (normal(N // 2, D), normal(R, D)),
        (normal(4 * N, D), normal(4, D)),
        (normal(64 * N, 4), normal(64, 4)),
        (normal(N, D).double(), normal(R, D).double()),
        (normal(N, D).bfloat16(), normal(R, D).bfloat16()),
        (normal(N, D).as_subclass(Seen), normal(R, D)),
    ],
    ids=["little", "narrow", "short", "float64", "bfloat16", "subclass"],
)
def test_not_where_it_would_not_pay_or_not_work(x: Tensor, W: Tensor, sent: list[tuple[int, ...]]) -> None:
    products.matmul(x, W.T)
    assert not sent


def test_transforms_and_forward_gradients_take_the_ordinary_way(sent: list[tuple[int, ...]]) -> None:
    x, W, tangent = normal(N, D), normal(R, D), normal(N, D)
    several = torch.stack([W, 2 * W])
    assert_close(torch.vmap(lambda w: products.matmul(x, w.T))(several)[1], 2 * x @ W.T, tolerance=1e-6)
    assert_close(torch.func.grad(lambda w: products.matmul(x, w.T).sum())(W), x.sum(0).expand(R, D), tolerance=1e-5)
    assert_close(torch.func.jvp(lambda v: products.matmul(v, W.T), (x,), (tangent,))[1], tangent @ W.T, tolerance=1e-6)
    for gradients in (False, True):
        with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
            pushed = forward_ad.unpack_dual(products.matmul(forward_ad.make_dual(x, tangent), W.T)).tangent
        assert pushed is not None
        assert_close(pushed, tangent @ W.T, tolerance=1e-6)
    assert not sent


def test_recorded_gradients_are_not_lost() -> None:
    x, W = normal(N, D).requires_grad_(), normal(R, D).requires_grad_()
    for a, b in ((x, W), (x, W.detach()), (x.detach(), W)):
        assert products.matmul(a, b.T).requires_grad
    with torch.no_grad():
        assert not products.matmul(x, W.T).requires_grad


def adapted(bias: bool, c: float) -> tuple[nn.Module, ll.Adapter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D, bias=bias), nn.Linear(D, OUT, bias=bias))
    adapter = ll.attach(model, ll.LoRAConfig(r=R, alpha=R, targets=r"\d"), seed=0, c=c)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(normal(*p.shape) * 0.05)
    return model, adapter


@pytest.mark.parametrize(
    "config", [ll.LoRAConfig(r=R), ll.MiSSConfig(r=64), ll.VeRAConfig(r=64), ll.HRAConfig(r=R), ll.HiRAConfig(r=R), ll.DoRAConfig(r=R)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_training_and_its_second_derivatives(config: ll.AdapterConfig, bias: bool, sent: list[tuple[int, ...]]) -> None:
    """Against the same model in float64, which never goes there; 8 times as many rows, so that each product is large enough."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D, bias=bias), nn.Linear(D, OUT, bias=bias))
    x, first = normal(2, 4 * N, D), []
    for dtype in (torch.float64, torch.float32):
        twin = nn.Sequential(*(nn.Linear(D, d, bias=bias) for d in (D, OUT)))
        twin.load_state_dict(model.state_dict())
        twin.to(dtype)
        adapter = ll.attach(twin, config.__class__(**{**vars(config), "targets": r"\d", "dtype": dtype}), seed=0, c=0.7)  # type: ignore[call-arg]
        with torch.no_grad():
            for i, p in enumerate(adapter.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
        given = x.to(dtype).requires_grad_()
        tensors = [given, *adapter.parameters()]
        out = twin(given)
        grads = torch.autograd.grad(out.square().mean(), tensors, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), tensors)
        first.append([out, *grads, *second])
        assert bool(sent) is (dtype is torch.float32)
        plain = torch.autograd.grad(twin(given).square().mean(), tensors)
        for a, b in zip(plain, grads, strict=True):
            assert_close(a, b, tolerance=1e-5)
    for exact, found in zip(*first, strict=True):
        assert_close(found, exact, tolerance=2e-5)


def test_the_forward_has_the_same_bits_with_and_without_gradients(sent: list[tuple[int, ...]]) -> None:
    model, _ = adapted(bias=True, c=0.7)
    x = normal(N, D)
    trained = model(x)
    assert len(sent) == 2
    with torch.no_grad():
        assert torch.equal(model(x), trained)


def test_no_gradient_nobody_asked_for(sent: list[tuple[int, ...]]) -> None:
    x, A, B, y = normal(N, D), normal(R, D).requires_grad_(), normal(D, R).requires_grad_(), normal(N, D)
    Mixed.apply(y, x, A, B, 1.0, False).sum().backward()  # type: ignore[union-attr]
    assert x.grad is None and A.grad is not None and B.grad is not None
    frozen, h = normal(4 * R, D), normal(N, D).requires_grad_()
    MixedLinear.apply(None, h, frozen, 1.0, False).sum().backward()  # type: ignore[union-attr]
    assert h.grad is not None and frozen.grad is None
