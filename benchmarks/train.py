"""What does a training step cost with a bfloat16 base and float32 adapters, in time and in tensors kept for the backward?

Issue 2: at most 0.65x of PEFT's saved bytes, at most 0.85x of its step time (forward, backward, AdamW).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, Setup, exact, ratio_row, time_rounds
from benchmarks.models import check_same, llama, ours, theirs, tokens

SHAPES = ((2, 64, 24), (4, 128, 10))  # rows, tokens, rounds


def rows(setup: Setup) -> Iterator[Row]:
    model = llama(dtype=torch.bfloat16, device=setup.device)
    attached, adapter = ours(model)
    wrapped = theirs(model, like=adapter)
    check_same(attached, wrapped, tokens(2, 8, setup.device), 0.05)  # two orders of rounding in bfloat16, through 24 layers
    trained = {"lora_lite": (attached, list(adapter.parameters())), "PEFT": (wrapped, trainable(wrapped))}
    for net, _ in trained.values():
        net.train()
    optimizers = {name: torch.optim.AdamW(parameters, lr=1e-5) for name, (_, parameters) in trained.items()}
    for batch, length, rounds in SHAPES:
        ids, shape = tokens(batch, length, setup.device), f"{batch}x{length}"
        saved = {name: float(saved_bytes(net, ids)) for name, (net, _) in trained.items()}
        proportion = exact(saved["lora_lite"] / saved["PEFT"])
        yield Row("train", f"{shape} saved bytes: lora_lite / PEFT", proportion, 0.65, medians=saved)
        steps = {name: partial(step, net, optimizers[name], ids) for name, (net, _) in trained.items()}
        yield ratio_row("train", f"{shape} step", time_rounds(steps, setup, rounds, warmup=2), "lora_lite", "PEFT", 0.85)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """Memory that autograd holds between forward and backward: storages counted once, and not those the model holds anyway."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss  # alive until counted: a freed storage's address would be given again
    held = addresses([*model.parameters(), *model.buffers(), ids])
    total = sum(size for address, size in storages.items() if address not in held)
    del loss
    return total


def addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
