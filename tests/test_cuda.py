"""What a CPU cannot show: backward in autograd's device threads, CUDA graphs, half precision on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from tests.models import VARIANTS, Row, attach, llama, mlp, normal, randomise, token_ids

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; run on one with `pytest tests/test_cuda.py`"),
    pytest.mark.untyped,
]
SMALL = ("lora", "pissa", "pissa-spectrum", "ia3", "ia3_ff", "dora")
METHODS = pytest.mark.parametrize("row", [VARIANTS[n] for n in SMALL], ids=SMALL)


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=token_ids(2, 7).cuda(), use_cache=False).logits.square().mean()


def joint(model: nn.Module, adapter: ll.Adapter) -> list[Tensor]:
    """Gradients of a +1, a -1 and a per-row forward, one backward, after the blocks."""
    values = []
    for c in (1.0, -1.0, torch.tensor([0.0, 0.5])):
        with adapter(model, c=c):
            values.append(loss(model))
    (values[0] - 0.5 * values[1] + 0.3 * values[2]).backward()
    return [p.grad for p in adapter.parameters()]


@METHODS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_backward_runs_in_a_device_thread_and_sees_its_c(row: Row, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = llama(torch.float64).cuda().train()
        adapter = randomise(attach(model, row, dtype=torch.float64, seed=0))
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its older name
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        found.append(joint(model, adapter))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_c_zero_is_the_base_bitwise(row: Row, dtype: torch.dtype) -> None:
    base, model = llama(dtype).cuda(), llama(dtype).cuda()
    adapter = randomise(attach(model, row))
    ids = token_ids(2, 7).cuda()
    with torch.no_grad():
        wanted = base(input_ids=ids).logits
        with adapter(model, c=0.0):
            assert torch.equal(model(input_ids=ids).logits, wanted)
        with adapter(model, c=torch.tensor([0.0, 1.0])):
            mixed = model(input_ids=ids).logits
    assert torch.equal(mixed[0], wanted[0]) and not torch.equal(mixed[1], wanted[1])
    adapter.detach()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wanted)


@METHODS
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_sees_every_c_also_under_cuda_graphs(row: Row, mode: str) -> None:
    """reduce-overhead replays recorded kernels: a c that Python looked up while recording would be frozen into them."""
    torch._dynamo.reset()
    model = mlp(torch.float32).cuda()
    adapter = randomise(attach(model, row))
    fast = torch.compile(model, mode=mode, fullgraph=True)
    x = normal(3, 4, 12).cuda()
    with torch.no_grad():
        for c in (1.0, 1.0, 1.0, -0.5, 0.0, 2.0, torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.5, 0.0, 2.0])):
            with adapter(model, c=c):
                found = fast(x).clone()
                torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)
    for c in (1.0, 1.0, 1.0, -0.5, 0.0, 2.0):
        with adapter(model, c=c):
            found, wanted = fast(x).square().mean(), model(x).square().mean()
        a = torch.autograd.grad(found, list(adapter.parameters()))
        b = torch.autograd.grad(wanted, list(adapter.parameters()))
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_a_recorded_graph_follows_a_tensor_c_filled_in_place() -> None:
    """torch.cuda.graph records kernels: a float c is recorded with them, a tensor c on the device may be refilled."""
    model = mlp(torch.float32).cuda()
    adapter = randomise(attach(model, VARIANTS["lora"]))
    x, c = normal(3, 4, 12).cuda(), torch.full((3,), 0.5, device="cuda")
    with torch.no_grad(), adapter(model, c=c):
        for _ in range(3):
            model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for value in (0.5, -1.0, 2.0):
            c.fill_(value)
            graph.replay()
            with adapter(model, c=value):
                torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


@METHODS
def test_merging_in_bfloat16_on_the_device_restores_the_weights(row: Row) -> None:
    model = llama(torch.bfloat16).cuda()
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapter = randomise(attach(model, row))
    with adapter.merged(0.5):
        assert all(not n.endswith("lora_A") for n, _ in model.named_parameters())
    adapter.detach()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_streams_keep_rows_on_the_device() -> None:
    model = llama(torch.float32).cuda()
    adapter = randomise(attach(model, VARIANTS["lora"]))
    ids = token_ids(3, 5).cuda()
    c = torch.tensor([-1.0, 0.0, 1.0])  # on the CPU: it is moved once per shape
    with torch.no_grad():
        with adapter(model, c=c):
            rows = model(input_ids=ids).logits
        for i, value in enumerate(c.tolist()):
            with adapter(model, c=value):
                torch.testing.assert_close(rows[i : i + 1], model(input_ids=ids[i : i + 1]).logits, rtol=1e-3, atol=1e-4)
