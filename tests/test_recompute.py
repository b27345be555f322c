"""A forward under gradient checkpointing recomputes with the c it ran with: gradients equal the plain ones, or an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite import recompute
from tests.models import VARIANTS, Row, attach, llama, mlp, normal, randomise, token_ids

RTOL = 1e-6
KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
METHODS = pytest.mark.parametrize(
    "row", [VARIANTS[n] for n in ("lora", "pissa", "ia3_ff", "dora", "antipasto")], ids=["lora", "pissa", "ia3_ff", "dora", "antipasto"]
)

Case = Callable[[nn.Module, ll.Adapter, Callable[[], Tensor]], None]


def checkpointed(reentrant: bool, row: Row, before: bool = True) -> tuple[nn.Module, ll.Adapter]:
    model = llama(torch.float64).train()
    enable = lambda: model.activation_checkpointing_enable({"use_reentrant": reentrant})  # noqa: E731
    if before:
        enable()
    adapter = randomise(attach(model, row, dtype=torch.float64))
    if not before:
        enable()
    model.enable_input_require_grads()
    return model, adapter


def plain(row: Row) -> tuple[nn.Module, ll.Adapter]:
    model = llama(torch.float64).train()
    return model, randomise(attach(model, row, dtype=torch.float64))


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=token_ids(2, 7), use_cache=False).logits.square().mean()


def after_the_block(model: nn.Module, adapter: ll.Adapter) -> Tensor:
    with adapter(model, c=-0.7):
        return loss(model)


def joint(model: nn.Module, adapter: ll.Adapter) -> Tensor:
    with adapter(model, c=1.0):
        up = loss(model)
    with adapter(model, c=-1.0):
        down = loss(model)
    return up - 0.5 * down


def with_the_reference(model: nn.Module, adapter: ll.Adapter) -> Tensor:
    with adapter(model, c=0.0):
        reference = loss(model)
    with adapter(model, c=0.7):
        return loss(model) - reference


def per_row(model: nn.Module, adapter: ll.Adapter) -> Tensor:
    with adapter(model, c=torch.tensor([0.0, -1.3], dtype=torch.float64)):
        return loss(model)


def resting_moved(model: nn.Module, adapter: ll.Adapter) -> Tensor:
    adapter.c = 0.4
    value = loss(model)
    adapter.c = 2.0
    return value


def nested(model: nn.Module, adapter: ll.Adapter) -> Tensor:
    with adapter(model, c=0.5):
        with adapter(model, c=-0.2):
            inner = loss(model)
        return inner + loss(model)


CASES = pytest.mark.parametrize(
    "case", [after_the_block, joint, with_the_reference, per_row, resting_moved, nested], ids=lambda f: f.__name__
)


def gradients(adapter: ll.Adapter, value: Tensor) -> list[Tensor]:
    value.backward()
    return [p.grad for p in adapter.parameters() if p.grad is not None]


def in_another_thread(adapter: ll.Adapter, value: Tensor) -> list[Tensor]:
    thread = threading.Thread(target=value.backward)
    thread.start()
    thread.join()
    return [p.grad for p in adapter.parameters() if p.grad is not None]


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=RTOL, atol=1e-12)


@KINDS
@METHODS
@CASES
def test_gradients_equal_the_unchecked_ones(row: Row, reentrant: bool, case: Case) -> None:
    wanted_model, wanted = plain(row)
    model, adapter = checkpointed(reentrant, row)
    same(gradients(adapter, case(model, adapter)), gradients(wanted, case(wanted_model, wanted)))


@KINDS
@CASES
def test_backward_in_another_thread(reentrant: bool, case: Case) -> None:
    row = VARIANTS["lora"]
    wanted_model, wanted = plain(row)
    model, adapter = checkpointed(reentrant, row, before=False)
    same(in_another_thread(adapter, case(model, adapter)), gradients(wanted, case(wanted_model, wanted)))


@KINDS
def test_gradient_to_c_itself(reentrant: bool) -> None:
    found = []
    for model, adapter in (plain(VARIANTS["lora"]), checkpointed(reentrant, VARIANTS["lora"])):
        c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        with adapter(model, c=c):
            value = loss(model)
        value.backward()
        found.append(c.grad)
    assert found[0] is not None and found[0].abs() > 0
    torch.testing.assert_close(found[1], found[0], rtol=RTOL, atol=0.0)


@KINDS
def test_two_adapters(reentrant: bool) -> None:
    found = []
    for model, first in (plain(VARIANTS["lora"]), checkpointed(reentrant, VARIANTS["lora"])):
        second = randomise(attach(model, VARIANTS["ia3"], name="second", dtype=torch.float64), seed=5)
        with first(model, c=-1.0), second(model, c=0.5):
            value = loss(model)
        value.backward()
        found.append([p.grad for a in (first, second) for p in a.parameters()])
    same(found[1], found[0])


def toy(checkpointing: Callable[[nn.Module, Tensor], Tensor] | None) -> list[Tensor]:
    """A stack whose blocks run through `checkpointing`; gradients of a joint +1/-1 loss, backward outside."""
    model = mlp(torch.float64)
    adapter = randomise(attach(model, VARIANTS["lora"], dtype=torch.float64))
    x = normal(3, 12, dtype=torch.float64).requires_grad_()

    def forward() -> Tensor:
        h = x
        for block in model.layers:
            h = block(h) if checkpointing is None else checkpointing(block, h)
        return h.square().mean()

    with adapter(model, c=1.0):
        up = forward()
    with adapter(model, c=-1.0):
        down = forward()
    return gradients(adapter, up - 2 * down)


def in_pairs(block: nn.Module, h: Tensor, inner: bool, outer: bool) -> Tensor:
    def once(h: Tensor) -> Tensor:
        return checkpoint(block, h, use_reentrant=inner)

    return checkpoint(once, h, use_reentrant=outer)


RAW: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "raw": lambda block, h: checkpoint(block, h, use_reentrant=False),
    "raw reentrant": lambda block, h: checkpoint(block, h, use_reentrant=True),
    "nested": lambda block, h: in_pairs(block, h, inner=False, outer=False),
    "reentrant in non-reentrant": lambda block, h: in_pairs(block, h, inner=True, outer=False),
    "non-reentrant in reentrant": lambda block, h: in_pairs(block, h, inner=False, outer=True),
    "without early stop": lambda block, h: checkpoint(block, h, use_reentrant=False, determinism_check="default", debug=False),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_calls(name: str) -> None:
    same(toy(RAW[name]), toy(None))


def test_a_block_inside_the_checkpointed_function() -> None:
    found = []
    for use in (False, True):
        model = mlp(torch.float64)
        adapter = randomise(attach(model, VARIANTS["lora"], dtype=torch.float64))

        def forward(h: Tensor, model=model, adapter=adapter) -> Tensor:
            with adapter(model, c=-2.0):
                return model(h)

        x = normal(3, 12, dtype=torch.float64).requires_grad_()
        value = checkpoint(forward, x, use_reentrant=False) if use else forward(x)
        found.append(gradients(adapter, value.square().mean()))
    same(found[1], found[0])


class Foreign(torch.autograd.Function):
    """A recomputing function that torch.utils.checkpoint knows nothing of, as fused losses have."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run, ctx.x = run, x
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            torch.autograd.backward(ctx.run(x), grad)
        return None, x.grad


def test_an_unknown_recompute_raises_when_c_has_moved() -> None:
    model = mlp(torch.float64)
    adapter = randomise(attach(model, VARIANTS["lora"], dtype=torch.float64))
    x = normal(3, 12, dtype=torch.float64).requires_grad_()
    Foreign.apply(model, x).sum().backward()  # c never moved: there is only one it can have been
    with adapter(model, c=-1.0):
        value = Foreign.apply(model, x).sum()
    with pytest.raises(RuntimeError, match="recomputed during backward"):
        value.backward()


@pytest.fixture
def unpatched() -> Iterator[None]:
    """torch.utils.checkpoint as a torch would have it that renamed what `recompute` patches."""
    frame, function = torch.utils.checkpoint._CheckpointFrame, torch.utils.checkpoint.CheckpointFunction
    patched = frame.__init__, function.forward
    frame.__init__, function.forward = patched[0].__wrapped__, staticmethod(patched[1].__wrapped__)
    yield
    frame.__init__, function.forward = patched[0], staticmethod(patched[1])


@KINDS
def test_without_the_patch_a_wrong_gradient_never_comes_out(reentrant: bool, unpatched: None) -> None:
    model, adapter = checkpointed(reentrant, VARIANTS["lora"])
    for case in (after_the_block, joint, with_the_reference, per_row, resting_moved, nested):
        with pytest.raises(RuntimeError, match="recomputed during backward"):
            case(model, adapter).backward()


def test_torch_still_has_what_is_patched() -> None:
    """Fails loudly when torch renames them; the library itself goes on, raising where c would be wrong."""
    assert recompute.install()
    assert hasattr(torch.utils.checkpoint._CheckpointFrame.__init__, "__wrapped__")
    assert hasattr(torch.utils.checkpoint.CheckpointFunction.forward, "__wrapped__")
    assert torch._C._current_graph_task_id() == -1


def attached_for_the_block(model: nn.Module, live: ll.Adapter, kept: ll.Adapter, folder: Path) -> Tensor:
    with kept(model, c=1.5):
        return loss(model)


def stacked_for_the_block(model: nn.Module, live: ll.Adapter, kept: ll.Adapter, folder: Path) -> Tensor:
    with ll.stack(model, [(kept, 1.5)]):
        return loss(model)


def merged_for_the_block(model: nn.Module, live: ll.Adapter, kept: ll.Adapter, folder: Path) -> Tensor:
    ll.attach(model, kept)
    with kept.merged(c=0.5):
        return loss(model)


def detached_before(model: nn.Module, live: ll.Adapter, kept: ll.Adapter, folder: Path) -> Tensor:
    value = loss(model) if ll.attach(model, kept) else None
    kept.detach()
    assert value is not None
    return value


def merged_before(model: nn.Module, live: ll.Adapter, kept: ll.Adapter, folder: Path) -> Tensor:
    ll.attach(model, kept)
    value = loss(model)
    kept.merge(2.0)
    return value


def attached_before(model: nn.Module, live: ll.Adapter, kept: ll.Adapter, folder: Path) -> Tensor:
    value = loss(model)
    ll.attach(model, kept)
    return value


def put_back_before(model: nn.Module, live: ll.Adapter, kept: ll.Adapter, folder: Path) -> Tensor:
    """In another order among the layer's hooks."""
    value = loss(model)
    live.detach()
    ll.attach(model, kept)
    ll.attach(model, live)
    return value


def loaded_before(model: nn.Module, live: ll.Adapter, kept: ll.Adapter, folder: Path) -> Tensor:
    value = loss(model)
    live.save(folder / "a.safetensors")
    live.detach()
    ll.load(model, folder / "a.safetensors")
    return value


def history_grown_before(model: nn.Module, live: ll.Adapter, kept: ll.Adapter, folder: Path) -> Tensor:
    history = ll.HistoryBake(model, [(kept, 0.5)])
    value = loss(model)
    history.push(kept, 0.7)
    return value


DISPLACED = [
    attached_for_the_block, stacked_for_the_block, merged_for_the_block, detached_before, merged_before, attached_before,
    put_back_before, loaded_before, history_grown_before,
]  # fmt: skip


@KINDS
@pytest.mark.parametrize("displaced", DISPLACED, ids=lambda f: f.__name__)
def test_an_adapter_that_came_or_went_meanwhile_is_an_error(reentrant: bool, displaced: Callable[..., Tensor], tmp_path: Path) -> None:
    """What is recomputed would not be what was computed; the reentrant kind does not notice by itself."""
    model, live = checkpointed(reentrant, VARIANTS["lora"])
    kept = randomise(attach(model, VARIANTS["lora"], name="kept", dtype=torch.float64), seed=1)
    kept.detach()
    with pytest.raises(RuntimeError, match=r"attached, detached or merged between|different number of tensors|different metadata"):
        displaced(model, live, kept, tmp_path).backward()


@KINDS
def test_what_happens_to_other_models_meanwhile_does_not_matter(reentrant: bool) -> None:
    wanted_model, wanted = plain(VARIANTS["lora"])
    model, adapter = checkpointed(reentrant, VARIANTS["lora"])
    other = mlp()
    twin = attach(other, VARIANTS["lora"], name="twin")
    value = after_the_block(model, adapter)
    twin.merge()
    twin.unmerge()
    twin.detach()
    attach(other, VARIANTS["dora"], name="next")
    same(gradients(adapter, value), gradients(wanted, after_the_block(wanted_model, wanted)))


@KINDS
def test_what_a_checkpointed_function_does_itself_it_does_again(reentrant: bool) -> None:
    """Blocks and attachments inside of it are part of what is recomputed."""
    found = []
    for wrap in (False, True):
        model = mlp(torch.float64)
        live = randomise(attach(model, VARIANTS["lora"], dtype=torch.float64))
        kept = randomise(attach(model, VARIANTS["lora"], name="kept", dtype=torch.float64), seed=1)
        kept.detach()

        def run(x: Tensor, model: nn.Module = model, live: ll.Adapter = live, kept: ll.Adapter = kept) -> Tensor:
            with kept(model, c=1.5), live(model, c=-0.5):
                return model(x)

        x = normal(3, 12, dtype=torch.float64).requires_grad_()
        y = checkpoint(run, x, use_reentrant=reentrant) if wrap else run(x)
        assert isinstance(y, Tensor)
        found.append(gradients(live, y.square().mean()))
    same(found[1], found[0])
