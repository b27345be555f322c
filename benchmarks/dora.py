"""What does DoRA's norm cost, when |W + sBA| is never made dense?

Issue 2: forward and backward at most 0.75x of PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import lora_lite as ll
from benchmarks.measure import Row, Setup, ratio_row, time_rounds
from benchmarks.models import ALPHA, R, check_same, llama, ours, theirs, tokens
from benchmarks.train import trainable

CASES = ((torch.float32, 2, 64, 16), (torch.bfloat16, 2, 64, 16), (torch.float32, 4, 128, 8))  # base, rows, tokens, rounds


def rows(setup: Setup) -> Iterator[Row]:
    for dtype, batch, length, rounds in CASES:
        model = llama(dtype=dtype, device=setup.device)
        attached, adapter = ours(model, ll.DoRAConfig(r=R, alpha=ALPHA))
        wrapped = theirs(model, like=adapter, use_dora=True)
        check_same(attached, wrapped, tokens(2, 8, setup.device), 1e-4 if dtype is torch.float32 else 0.1)
        ids = tokens(batch, length, setup.device)
        steps = {
            "lora_lite": partial(there_and_back, attached.train(), list(adapter.parameters()), ids),
            "PEFT": partial(there_and_back, wrapped.train(), trainable(wrapped), ids),
        }
        label = f"{str(dtype).removeprefix('torch.')} {batch}x{length}"
        yield ratio_row("dora", label, time_rounds(steps, setup, rounds, warmup=2), "lora_lite", "PEFT", 0.75)


def there_and_back(model: nn.Module, parameters: list[nn.Parameter], ids: Tensor) -> None:
    torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters)
