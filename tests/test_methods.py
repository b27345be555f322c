"""Does the comparison of methods take every method of the registry? A few steps of each on a toy, at one budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import lora_lite as ll
from benchmarks import methods
from tests.models import VOCABULARY, generator, llama
from tests.test_laws import changed, snapshot

TASK = methods.Task(*(torch.randint(1, VOCABULARY, (400,), generator=generator(seed)) for seed in (0, 1)), steps=3, rows=2, length=16)
BUDGET = 4000
FIXED = ("ia3", "ia3_ff", "lora_xs", "road", "vera")  # of a few numbers per layer, whatever they are told


@pytest.mark.parametrize("name", methods.names())
def test_every_method_trains_near_the_budget_and_leaves(name: str) -> None:
    model: Any = llama()
    layers, before = ll.find_targets(model, ll.LoRAConfig()), snapshot(model)
    config = methods.sized(methods.names()[name], BUDGET, layers, TASK.steps)
    count = methods.parameters(config, layers)
    assert 0.4 < count / BUDGET < 2.5 or config.variant in FIXED or "spectrum" in name
    loss, trained, _ = methods.run(model, config, TASK, 1e-2, 0)
    assert math.isfinite(loss) and 0.7 < trained / count < 1.5 and (trained == count or "rho" in name)  # ranks cost by their layer
    assert not changed(before, snapshot(model, hook_numbers=True))


def test_one_line_of_the_table() -> None:
    model: Any = llama()
    config = methods.sized({"variant": "lora"}, BUDGET, ll.find_targets(model, ll.LoRAConfig()), TASK.steps)
    result = methods.judged("lora", model, config, TASK, seeds=2)
    assert len(result.losses) == 2 and result.rate in methods.RATES and len(result.tuning) == len(methods.RATES)
    assert "lora" in methods.table([result], 5.0) and f"{result.parameters:,}" in methods.table([result], 5.0)
