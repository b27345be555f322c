"""Which adapters may be merged beside others, and what is refused instead of being ignored?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lora_lite as ll
from lora_lite.dial import check_float
from tests.models import VARIANTS, attach, mlp, normal, randomise


def test_merging_minds_only_the_layers_that_are_shared() -> None:
    model, x = mlp(torch.float64), normal(3, 12, dtype=torch.float64)
    one = randomise(attach(model, VARIANTS["lora"], targets="up", dtype=torch.float64))
    randomise(attach(model, VARIANTS["dora"], targets="down", name="two", dtype=torch.float64), seed=3)
    wanted = model(x)
    with one.merged():
        torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-12)
    assert torch.equal(model(x), wanted)
    randomise(attach(model, VARIANTS["ia3"], targets=r"0\.up", name="three", dtype=torch.float64), seed=4)
    with pytest.raises(RuntimeError, match="at the layers they share"):
        one.merge()


def test_directions_are_not_excluded_in_silence() -> None:
    model = mlp()
    kept = attach(model, VARIANTS["lora"], name="kept")
    with pytest.raises(ValueError, match="'ia3' chooses no directions"):
        ll.attach(model, ll.IA3Config(), exclude_directions=[kept])


def test_an_array_is_told_how_to_become_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"torch\.as_tensor"):
        check_float(np.array([1.0, 2.0]))


@pytest.mark.parametrize("variant", ["lora", "oft", "vera"])
def test_a_replica_of_data_parallel_is_refused_by_name(variant: str) -> None:
    """Its threads would see neither the c of a block nor the adapter's parameters. torch.nn.parallel.replicate needs GPUs."""
    model, x = mlp(), normal(3, 12)
    adapter = attach(model, VARIANTS[variant], targets="up")
    original = next(m for n, m in model.named_modules() if n.endswith("0.up"))
    layer = original._replicate_for_data_parallel()
    for name, p in original.named_parameters():
        setattr(layer, name, p.detach())  # not a Parameter: a part of the broadcast
    for c in (1.0, 0.0):
        adapter.c = c
        with torch.no_grad(), pytest.raises(RuntimeError, match="DistributedDataParallel"):
            layer(x)


def test_factors_asked_for_under_autocast_are_not_rounded() -> None:
    adapter = randomise(attach(mlp(), VARIANTS["lora-xs"]))
    plain = adapter.factors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = adapter.factors()
    for target, update in plain.items():
        assert torch.equal(update.B, found[target].B)
