"""What does DoRA's norm cost, when |W + sBA| is never made dense?

Issue 2: forward and backward at most 0.75x of PEFT's. The bound is held against the smaller step: PEFT's dense BA costs the
same however many tokens there are, so that with more of them both approach the base's own products, and each other.
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

CASES = ((torch.float32, 2, 64, 20, 0.75), (torch.bfloat16, 2, 64, 20, 0.75), (torch.float32, 4, 128, 10, None))


def rows(setup: Setup) -> Iterator[Row]:
    for dtype, batch, length, rounds, bound in CASES:
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
        yield ratio_row("dora", label, time_rounds(steps, setup, rounds, warmup=2), "lora_lite", "PEFT", bound)


def there_and_back(model: nn.Module, parameters: list[nn.Parameter], ids: Tensor) -> None:
    torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters)
