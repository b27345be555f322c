"""When may a hook write into the output it was given? Only where nobody else can have kept that output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite as ll
from lora_lite import hooks
from tests.models import VARIANTS, Row, attach, each_variant, mlp, normal, randomise

ROWS = 32  # more than the few for which nothing is written into anyway


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each product that a hook added, whether it wrote into y."""
    monkeypatch.setattr(hooks, "LARGE", 0)
    found: list[bool] = []
    add = hooks.add_low_rank

    def noted(y: Tensor, x: Tensor, update: ll.LowRank, c: Any, inplace: bool = False) -> Tensor:
        out = add(y, x, update, c, inplace)
        found.append(out.data_ptr() == y.data_ptr())
        assert found[-1] <= inplace
        return out

    monkeypatch.setattr(hooks, "add_low_rank", noted)
    return found


def adapted(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Linear, ll.Adapter]:
    model = mlp(dtype)
    adapter = randomise(attach(model, VARIANTS["lora"], targets="up"))
    return model, next(m for name, m in model.named_modules() if name.endswith("up")), adapter  # type: ignore[return-value]


def test_it_happens_and_no_bit_differs(written: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer, _ = adapted()
    x = normal(ROWS, layer.in_features)
    with torch.no_grad():
        inside = layer(x)
        monkeypatch.setattr(hooks, "LARGE", 10**9)
        outside = layer(x)
    assert written == [True, False]
    assert torch.equal(inside, outside)
    assert torch.equal(outside, layer(x))  # with gradients


@pytest.mark.parametrize(("variant", "dtype"), [("lora", torch.bfloat16), ("vera", torch.float32), ("vera", torch.bfloat16)])
@pytest.mark.parametrize("shape", [(ROWS,), (4, ROWS)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_the_same(
    variant: str, dtype: torch.dtype, shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers in a row, so that what the second writes into hangs on what the first wrote into."""
    monkeypatch.setattr(hooks, "LARGE", 0)
    model = nn.Sequential(nn.Linear(16, 24, bias=bias), nn.Linear(24, 16, bias=bias)).to(dtype)
    adapter = randomise(attach(model, VARIANTS[variant], targets="all-linear"))
    x = normal(*shape, 16).to(dtype).requires_grad_()
    tensors, written = [x, *adapter.parameters()], []
    apply = hooks.LowRankHook.apply

    def noted(self: hooks.Hook, layer: nn.Module, x: Tensor, y: Tensor | None, c: Any) -> Tensor:
        written.append((out := apply(self, layer, x, y, c)) is y)
        return out

    def losses_and_gradients() -> list[Tensor]:
        loss = model(x).float().square().sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.float().square().sum() for g in first]).sum(), tensors)
        return [loss, *first, *second]

    monkeypatch.setattr(hooks.LowRankHook, "apply", noted)
    inside = losses_and_gradients()
    monkeypatch.setattr(hooks.LowRankHook, "holds_alone", lambda self, layer, y: False)
    outside = losses_and_gradients()
    view = bias and len(shape) == 2  # torch's own linear gives one there
    assert written == [not view, not view, False, False]
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_not_where_rows_keep_the_bases_bits(written: list[bool]) -> None:
    model, layer, adapter = adapted()
    x, c = normal(ROWS, layer.in_features), torch.ones(ROWS)
    c[::2] = 0.0
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    layer(x)
    with torch.no_grad(), adapter(model, c=c):
        y = layer(x)
    assert torch.equal(y[::2], plain[::2])
    assert not torch.equal(y[1::2], plain[1::2])
    assert written == [False, False]


@contextmanager
def earlier_hook(layer: nn.Linear, keep: Callable[[Tensor], None]) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda module, args, y: keep(y), prepend=True)
    yield
    handle.remove()


@contextmanager
def global_hook(layer: nn.Linear, keep: Callable[[Tensor], None]) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: keep(y) if module is layer else None)
    yield
    handle.remove()


@contextmanager
def replaced_forward(layer: nn.Linear, keep: Callable[[Tensor], None]) -> Iterator[None]:
    original = layer.forward

    def forward(x: Tensor) -> Tensor:
        keep(y := original(x))
        return y

    layer.forward = forward
    yield
    del layer.forward


@contextmanager
def subclass(layer: nn.Linear, keep: Callable[[Tensor], None]) -> Iterator[None]:
    class Remembering(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            keep(y := super().forward(x))
            return y

    layer.__class__ = Remembering
    yield
    layer.__class__ = nn.Linear


@contextmanager
def dispatch_mode(layer: nn.Linear, keep: Callable[[Tensor], None]) -> Iterator[None]:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape == (ROWS, layer.out_features):
                keep(out)
            return out

    with Recorder():
        yield


@contextmanager
def function_mode(layer: nn.Linear, keep: Callable[[Tensor], None]) -> Iterator[None]:
    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is nn.functional.linear and out.shape[-1] == layer.out_features:
                keep(out)
            return out

    with Recorder():
        yield


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("observer", [earlier_hook, global_hook, replaced_forward, subclass, dispatch_mode, function_mode])
def test_what_somebody_kept_is_left_alone(
    observer: Callable[..., Any], gradients: bool, written: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16 if gradients else torch.float32  # where each is written into
    _, layer, _ = adapted(dtype)
    x, kept = normal(ROWS, layer.in_features).to(dtype), []
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    with torch.set_grad_enabled(gradients):
        wanted = layer(x)
        with observer(layer, kept.append):
            found = layer(x)
        assert torch.equal(kept[0], plain)
        assert torch.equal(found, wanted)
        assert written == [True, False]
        monkeypatch.setattr(hooks.LowRankHook, "holds_alone", lambda self, layer, y: True)
        kept.clear()
        with observer(layer, kept.append):
            layer(x)
        assert not torch.equal(kept[0], plain)  # so that asking is what keeps it


def test_transforms_of_torch_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """vmap over adapters cannot write a batch of results into one y; a forward gradient rides on y through no_grad."""
    monkeypatch.setattr(hooks, "LARGE", 0)
    _, layer, _ = adapted()
    x, tangent = normal(ROWS, layer.in_features), normal(ROWS, layer.in_features)
    several = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in layer.named_parameters() if name.startswith("lora_")}
    with torch.no_grad():
        both = vmap(lambda tensors: functional_call(layer, tensors, (x,)))(several)
        assert torch.allclose(both[0], layer(x), atol=1e-6)
        with forward_ad.dual_level():
            pushed = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    assert torch.allclose(pushed, torch.func.jvp(layer, (x,), (tangent,))[1], atol=1e-6)


@pytest.mark.parametrize("how", ["a c for all", "a c per row", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_variant
def test_what_comes_after_a_layer_may_write_into_its_output(row: Row, dtype: torch.dtype, how: str) -> None:
    """As it may into the bare layer's: relu_, and the += of a residual stream (Falcon's)."""
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(inplace=True), nn.Linear(24, 24)).to(dtype)
    adapter = attach(model, row)
    x = normal(3, 5, 24).to(dtype)
    c = torch.tensor([1.0, 0.0, -1.0]) if how == "a c per row" else 0.5
    with adapter(model, c=c), torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        y = model(x)
        y += x
    y.float().square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in adapter.parameters())


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_nothing_is_kept_for_a_gradient_that_nobody_wants(frozen: str) -> None:
    """h = A x is kept for B alone."""
    _, layer, _ = adapted(torch.bfloat16)
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    dict(layer.named_parameters())[frozen].requires_grad_(False)
    x = normal(ROWS, layer.in_features).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x).sum().backward()
    r = len(dict(layer.named_parameters())["lora_A"])
    assert ((ROWS, r) in kept) is (frozen == "lora_A")
