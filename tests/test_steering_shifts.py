"""Does block by block come out what the hidden states say, padding left out, and -1 where c is linear?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from tests.models import VARIANTS, attach, each_variant, llama, mlp, normal, randomise, t5, token_ids
from tests.references import assert_close
from tests.test_steering_response import assert_as_before, state_of


def adapted(model: nn.Module, name: str = "lora", std: float = 0.3, **keywords: Any) -> ll.Adapter:
    return randomise(attach(model, VARIANTS[name], dtype=torch.float64, **keywords), std=std)


def by_hand(states: Callable[[float], list[Tensor]], c: float) -> list[tuple[float, float, float]]:
    """From each block's states at 0, c and -c, one row per token."""
    found = []
    for zero, plus, minus in zip(states(0.0), states(c), states(-c), strict=True):
        up, down = plus - zero, minus - zero
        size = zero.norm(dim=-1)
        cosine = (up * down).sum(-1) / (up.norm(dim=-1) * down.norm(dim=-1))
        found.append(tuple(float(x.mean()) for x in (up.norm(dim=-1) / size, down.norm(dim=-1) / size, cosine)))
    return found


def assert_are(found: Any, want: list[tuple[float, float, float]]) -> None:
    rows = [(b.plus, b.minus, b.cosine) for b in found]
    assert_close(torch.tensor(rows, dtype=torch.float64), torch.tensor(want, dtype=torch.float64), "shifts")


@pytest.mark.parametrize("name", ["lora", "dora", "ia3_ff"])
def test_shifts_are_those_of_the_hidden_states(name: str) -> None:
    """Over rows of three lengths, padded together in two batches, against each row alone; the last state is normed, so not compared."""
    model, c = llama(torch.float64, layers=3, attention="sdpa"), 0.8
    adapter = adapted(model, name)
    rows = [token_ids(1, n, seed=n) for n in (5, 3, 4)]
    mask = torch.stack([(torch.arange(5) < r.shape[1]).long() for r in rows])
    ids = torch.cat([nn.functional.pad(r, (0, 5 - r.shape[1]), value=7) for r in rows])

    def states(c: float) -> list[Tensor]:
        with torch.no_grad(), adapter(model, c=c):
            alone = [model(input_ids=r, output_hidden_states=True).hidden_states for r in rows]
        return [torch.cat([a[i + 1][0] for a in alone]) for i in range(2)]

    batches = [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}]
    found = ll.block_shifts(model, adapter, batches, c=c)
    assert [(b.stack, b.block) for b in found.blocks] == [("model.layers", i) for i in range(3)]
    rounding = [(b.plus, b.minus, b.cosine) for b in found.blocks[:2]]
    for got, want in zip(rounding, by_hand(states, c), strict=True):
        assert got == pytest.approx(want, rel=1e-6)  # Llama's norms go through float32
    unmasked = ll.block_shifts(model, adapter, [{"input_ids": ids}], c=c)
    assert unmasked.blocks[0].plus != pytest.approx(found.blocks[0].plus, rel=1e-3), "padding counted would show"


@pytest.mark.fast
def test_a_model_without_masks_by_hand_to_the_last_digit() -> None:
    model, x, c = mlp(torch.float64), normal(6, 12, dtype=torch.float64), 1.3
    adapter = adapted(model)

    def states(c: float) -> list[Tensor]:
        with torch.no_grad(), adapter(model, c=c):
            found, h = [], x + model.offset
            for layer in model.layers:
                h = layer(h)
                found.append(h)
        return found

    assert_are(ll.block_shifts(model, adapter, x, c=c).blocks, by_hand(states, c))
    assert_are(ll.block_shifts(model, adapter, [x[:2], x[2:]], c=c).blocks, by_hand(states, c))


@pytest.mark.fast
def test_the_cosine_is_minus_one_where_c_is_linear_and_only_there() -> None:
    model, x = mlp(torch.float64), normal(6, 12, dtype=torch.float64)
    adapter = adapted(model, targets=r"layers\.0\.down")
    first, *others = ll.block_shifts(model, adapter, x, c=1.0).blocks
    assert first.cosine == pytest.approx(-1, abs=1e-12) and first.plus == pytest.approx(first.minus, rel=1e-12)
    assert all(-1 < b.cosine < -0.5 for b in others)
    near = ll.block_shifts(model, adapter, x, c=0.01).blocks[-1]
    assert near.cosine == pytest.approx(-1, abs=1e-3), "near 0 everything is linear"


@each_variant
def test_every_variant_has_shifts(row: Any) -> None:
    model = mlp(torch.float64)
    adapter = randomise(attach(model, row, dtype=torch.float64), std=0.1)
    found = ll.block_shifts(model, adapter, normal(4, 12, dtype=torch.float64), c=0.5)
    assert len(found.blocks) == 3 and all(b.plus > 0 and -1 <= b.cosine < 0 for b in found.blocks)


def test_blocks_that_c_does_not_reach_do_not_move() -> None:
    model = mlp(torch.float64)
    adapter = adapted(model, layers=(2,))
    zero, one, two = ll.block_shifts(model, adapter, normal(4, 12, dtype=torch.float64)).blocks
    assert [(b.plus, b.minus, b.cosine) for b in (zero, one)] == [(0.0, 0.0, 0.0)] * 2 and two.plus > 0


def test_an_encoder_and_a_decoder_are_two_stacks() -> None:
    """Each with its own mask: what stands behind the padding does not matter."""
    model = t5(torch.float64)
    adapter = adapted(model)
    batch = {
        "input_ids": token_ids(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "decoder_input_ids": token_ids(2, 3, seed=1), "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
    }  # fmt: skip
    found = ll.block_shifts(model, adapter, batch)
    assert [(b.stack, b.block) for b in found.blocks] == [(f"{s}.block", i) for s in ("encoder", "decoder") for i in range(2)]
    other = {**batch, "input_ids": batch["input_ids"].clone(), "decoder_input_ids": batch["decoder_input_ids"].clone()}
    other["input_ids"][1, 2:], other["decoder_input_ids"][1, 1:] = 9, 9
    assert ll.block_shifts(model, adapter, other).to_dict()["blocks"] == pytest.approx(found.to_dict()["blocks"])
    assert ll.block_shifts(model, adapter, {k: v for k, v in batch.items() if "mask" not in k}).blocks != found.blocks


def test_the_table_can_be_read() -> None:
    model = mlp(torch.float64)
    found = ll.block_shifts(model, adapted(model), normal(4, 12, dtype=torch.float64), c=1.5)
    head, *rows, said = str(found).splitlines()
    assert head.split() == ["stack", "block", "shift", "at", "+1.5", "shift", "at", "-1.5", "cosine"]
    assert [r.split()[:2] for r in rows] == [["layers", str(i)] for i in range(3)] and "cosine -1" in said
    assert found.to_dict()["blocks"][2]["block"] == 2


# --- nothing is left behind, and bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("batch", [token_ids(2, 4), {"input_ids": "wrong"}], ids=["works", "raises"])
def test_the_model_comes_out_as_it_went_in(batch: Any, attached: bool) -> None:
    model = llama(torch.float64).train()
    adapter = adapted(model, c=0.7)
    if not attached:
        adapter.detach()
    before = state_of(model)
    if isinstance(batch, Tensor):
        ll.block_shifts(model, adapter, batch)
    else:
        with pytest.raises(Exception):  # noqa: B017 the model's own
            ll.block_shifts(model, adapter, batch)
    assert_as_before(model, before)
    assert adapter.c == 0.7 and adapter.attached is attached


@pytest.mark.fast
def test_what_cannot_be_meant_is_refused() -> None:
    model, x = mlp(torch.float64), normal(4, 12, dtype=torch.float64)
    adapter = adapted(model)
    with pytest.raises(ValueError, match="c=0 moves nothing"):
        ll.block_shifts(model, adapter, x, c=0.0)
    with pytest.raises(ValueError, match="empty list"):
        ll.block_shifts(model, adapter, [])
    with pytest.raises(ValueError, match="no block was reached"):
        ll.block_shifts(model, adapter, iter(()))
    flat = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with pytest.raises(RuntimeError, match="no stack of blocks"):
        ll.block_shifts(flat, ll.attach(flat, ll.LoRAConfig(r=1)), torch.zeros(1, 4))
