"""Compiled code sees every c, one graph per grad mode, in threads too, and hooks that came after it."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_lite as ll
from lora_lite import compiled as compiled_room
from tests.models import VARIANTS, Row, attach, llama, mlp, normal, randomise, token_ids

pytestmark = pytest.mark.untyped

SCALARS = (0.5, 1.0, -1.0, 0.0, 2.0, torch.tensor(0.7), torch.tensor([0.3], dtype=torch.float64), torch.tensor(0))
ROWS = (torch.tensor([0.0, 1.0, -1.0]), torch.zeros(3), torch.linspace(-1, 1, 12).reshape(3, 4))
SMALL = ("lora", "pissa", "pissa-spectrum", "ia3", "ia3_ff", "dora", "antipasto", "ssvd-first-order")
METHODS = pytest.mark.parametrize("row", [VARIANTS[n] for n in SMALL], ids=SMALL)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # torch's default, which the library has to set right itself
    yield
    torch._dynamo.reset()


def counted(model: nn.Module, fullgraph: bool = True) -> tuple[nn.Module, CompileCounterWithBackend]:
    """The traced graph run by eager kernels, so that numbers may be compared bit for bit; the backend counts graphs."""
    backend = CompileCounterWithBackend("eager")
    return torch.compile(model, backend=backend, fullgraph=fullgraph), backend


def setting(row: Row) -> tuple[nn.Module, ll.Adapter, Tensor]:
    model = mlp(torch.float64)
    return model, randomise(attach(model, row, dtype=torch.float64)), normal(3, 4, 12, dtype=torch.float64)


def grads(adapter: ll.Adapter, value: Tensor, *more: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value.square().mean(), [*adapter.parameters(), *more]))


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@METHODS
def test_one_graph_for_every_c_without_gradients(row: Row) -> None:
    base = mlp(torch.float64)
    model, adapter, x = setting(row)
    fast, backend = counted(model)
    with torch.no_grad():
        for c in (*SCALARS, *ROWS):
            with adapter(model, c=c):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)
        with adapter(model, c=0.0):
            assert torch.equal(fast(x), base(x)), "c = 0 is the base bit for bit"
        torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)  # at rest
        adapter.c = -0.4
        torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)
    assert backend.frame_count == 1


@METHODS
def test_one_graph_for_every_scalar_c_with_gradients(row: Row) -> None:
    model, adapter, x = setting(row)
    fast, backend = counted(model)
    for c in SCALARS:
        with adapter(model, c=c):
            found, wanted = fast(x), model(x)
        close(grads(adapter, found), grads(adapter, wanted))  # after the block
    close(grads(adapter, fast(x)), grads(adapter, model(x)))
    assert backend.frame_count == 1
    for c in ROWS:
        with adapter(model, c=c):
            found, wanted = fast(x), model(x)
        close(grads(adapter, found), grads(adapter, wanted))


@METHODS
def test_gradient_to_c(row: Row) -> None:
    model, adapter, x = setting(row)
    fast, _ = counted(model)
    for value in (0.0, 0.6, [0.0, 0.0, -1.0], [0.0, 0.6, -1.0]):
        c = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        with adapter(model, c=c):
            found, wanted = fast(x), model(x)
        close(grads(adapter, found, c), grads(adapter, wanted, c))
        with adapter(model, c=c):
            assert grads(adapter, model(x), c)[-1].abs().sum() > 0


def test_threads_with_gradients_and_without() -> None:
    model, adapter, x = setting(VARIANTS["lora"])
    fast, _ = counted(model)
    wrong: list[float] = []
    with torch.no_grad():
        fast(x)
    fast(x)

    def work(c: float) -> None:
        for _ in range(8):
            with adapter(model, c=c):
                found, wanted = fast(x), model(x)
                with torch.no_grad():
                    if not torch.allclose(fast(x), model(x)):
                        wrong.append(c)
            if not all(torch.allclose(a, b) for a, b in zip(grads(adapter, found), grads(adapter, wanted), strict=True)):
                wrong.append(c)

    threads = [threading.Thread(target=work, args=(c,)) for c in (0.0, 0.5, -2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_interleaved_tasks_training_compiled_code_are_refused() -> None:
    model, adapter, x = setting(VARIANTS["lora"])
    fast, _ = counted(model)
    fast(x)
    turn, back = asyncio.Event(), asyncio.Event()

    async def holds_a_block() -> None:
        with adapter(model, c=-1.0):
            turn.set()
            await back.wait()

    async def trains_at_rest() -> None:
        await turn.wait()
        try:
            with pytest.raises(Exception, match="two tasks of one thread"):
                fast(x)
        finally:
            back.set()

    async def both() -> None:
        await asyncio.gather(holds_a_block(), trains_at_rest())

    asyncio.run(both())
    fast(x)  # and all is well again


@METHODS
def test_attached_after_compiling_a_frozen_model(row: Row) -> None:
    """torch's default guards would go on running the graph without hooks (CORE.md section 1)."""
    model, x = mlp(torch.float64).requires_grad_(False), normal(3, 4, 12, dtype=torch.float64)
    fast, _ = counted(model)
    with torch.no_grad():
        before = fast(x)
        adapter = randomise(attach(model, row, dtype=torch.float64))
        torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(fast(x), before)
        adapter.detach()
        assert torch.equal(fast(x), before)


def test_a_second_instance_of_the_class_without_an_adapter() -> None:
    one, other = mlp(torch.float64), mlp(torch.float64)
    adapter = randomise(attach(one, VARIANTS["lora"], dtype=torch.float64))
    x = normal(3, 4, 12, dtype=torch.float64)
    fast_one, fast_other = counted(one)[0], counted(other)[0]
    with torch.no_grad():
        torch.testing.assert_close(fast_one(x), one(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fast_other(x), other(x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(one(x), other(x))
        with adapter(one, c=-1.0):
            torch.testing.assert_close(fast_one(x), one(x), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(fast_other(x), other(x), rtol=1e-12, atol=1e-12)


def test_a_compiled_wrapper_that_is_not_the_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 2

    model, x = mlp(torch.float64).requires_grad_(False), normal(3, 4, 12, dtype=torch.float64)
    fast, _ = counted(Wrapper(model))
    with torch.no_grad():
        fast(x)
        randomise(attach(model, VARIANTS["lora"], dtype=torch.float64))
        torch.testing.assert_close(fast(x), model(x) * 2, rtol=1e-12, atol=1e-12)


def test_two_adapters_and_a_copy() -> None:
    model, adapter, x = setting(VARIANTS["lora"])
    second = randomise(attach(model, VARIANTS["ia3_ff"], name="second", dtype=torch.float64), seed=3)
    twin = copy.deepcopy(model)
    fast, _ = counted(model)
    fast_twin, _ = counted(twin)
    with torch.no_grad(), adapter(model, c=-1.0), second(model, c=0.5):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fast_twin(x), twin(x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(twin(x), model(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant: bool) -> None:
    """fullgraph=False: Hugging Face's own checkpointing breaks the graph."""
    found = []
    for compile_it in (False, True):
        torch._dynamo.reset()
        model = llama(torch.float64).train()
        adapter = randomise(attach(model, VARIANTS["lora"], dtype=torch.float64))
        if compile_it:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        run = counted(model, fullgraph=False)[0] if compile_it else model
        with adapter(model, c=1.0):
            up = run(input_ids=token_ids(2, 6), use_cache=False).logits.square().mean()
        with adapter(model, c=-1.0):
            down = run(input_ids=token_ids(2, 6), use_cache=False).logits.square().mean()
        (up - 0.5 * down).backward()
        found.append([p.grad for p in adapter.parameters()])
    close(found[1], found[0])


def test_inductor() -> None:
    """Equal up to Inductor's own fusion; the figure is the base's own distance to its compiled self, CORE.md section 1."""
    base, (model, adapter, x) = mlp(torch.float32), setting(VARIANTS["lora"])
    model, x = model.float(), x.float()
    fast = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for c in (1.0, -0.5, 0.0):
            with adapter(model, c=c):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        with adapter(model, c=0.0):
            torch.testing.assert_close(fast(x), base(x), rtol=1e-4, atol=1e-5)
    with adapter(model, c=-1.0):
        found, wanted = fast(x), model(x)
    for a, b in zip(grads(adapter, found), grads(adapter, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_torch_still_has_what_is_read() -> None:
    """Fails loudly when torch renames what tells whether code was compiled; the library itself then drops too much, not too little."""
    from torch._dynamo import convert_frame, eval_frame

    assert hasattr(convert_frame.input_codes, "seen")
    assert callable(eval_frame._debug_get_cache_entry_list)
    assert hasattr(torch._dynamo.config, "skip_nnmodule_hook_guards")
    assert compiled_room._compiled_code(torch._dynamo) is False
    model, _, x = setting(VARIANTS["lora"])
    counted(model)[0](x)
    assert compiled_room._compiled_code(torch._dynamo) is True


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("rest", [0.0, 1.0])
@pytest.mark.parametrize("name", ["lora", "ia3_ff"])
def test_an_exported_program_holds_no_c_and_says_so(grad: bool, kept: bool, rest: float, name: str) -> None:
    """It kept the c of that moment, or looked it up by a number that is another adapter's in the process that loads it."""
    model, x = mlp(torch.float32), normal(3, 12)
    adapter = randomise(attach(model, VARIANTS[name]))
    adapter.c = rest
    with torch.set_grad_enabled(grad):
        if kept:
            adapter.detach()
            ll.HistoryBake(model, [(adapter, 1.0)])
        with pytest.raises(RuntimeError, match="export it merged"):
            torch.export.export(model, (x,))
        if not kept:
            with adapter.merged(c=0.5):
                program = torch.export.export(model, (x,)).module()
            with adapter(model, c=0.5):
                torch.testing.assert_close(program(x), model(x))
