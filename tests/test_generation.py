"""Does c mean the same through every way of generating? One c per row equals separate runs, token for token.

In float64, so that no choice of a token hangs on how a batch was summed. Three variants stand for the three kinds of hook;
greedy decoding, the way that the others build on, runs on all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite as ll
from tests.models import VARIANTS, Row, attach, bert, each_variant, llama, opt, randomise, t5, token_ids
from tests.references import assert_close, assert_differs

ROWS = torch.tensor([-1.5, 0.0, 1.0])
IDS = token_ids(3, 5)
NEW = 6
each_kind = pytest.mark.parametrize("row", [VARIANTS[k] for k in ("lora", "dora", "ia3_ff")], ids=["lora", "dora", "ia3_ff"])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 2},
    "beams": {"num_beams": 3},
    "beams, two returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True},
    "sampling, two returned": {"do_sample": True, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
}


def adapted(model: Any, row: Row, std: float = 0.6, **keywords: Any) -> ll.Adapter:
    return randomise(attach(model, row, dtype=torch.float64, **keywords), std=std)


def generated(model: Any, ids: Tensor = IDS, **keywords: Any) -> Tensor:
    """The new tokens; the same draws in each call."""
    torch.manual_seed(0)
    mask = keywords.pop("attention_mask", torch.ones_like(ids))
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, **{"do_sample": False, **keywords})
    return out if model.config.is_encoder_decoder else out[:, ids.shape[1] :]


def separate(adapter: ll.Adapter, model: Any, run: Callable[[], Tensor]) -> Tensor:
    """The rows of three whole-batch runs at one c each: sampling then draws for each row what it drew for all together."""
    outputs = []
    for i, c in enumerate(ROWS.tolist()):
        with adapter(model, c=c):
            out = run()
        each = out.shape[0] // len(ROWS)
        outputs.append(out[i * each : (i + 1) * each])
    return torch.cat(outputs)


def assert_rows_are_separate(adapter: ll.Adapter, model: Any, run: Callable[[], Tensor]) -> None:
    with adapter(model, c=ROWS):
        together = run()
    assert torch.equal(together, separate(adapter, model, run))
    with adapter(model, c=ROWS.flip(0)):
        assert not torch.equal(run(), together), "if the order of rows changes nothing, nothing was shown"


@pytest.mark.fast
@each_variant
def test_greedy_rows_equal_separate_runs_alone_in_their_batch(row: Row) -> None:
    model = llama(torch.float64)
    adapter = adapted(model, row)
    with adapter(model, c=ROWS):
        together = generated(model)
    for i, c in enumerate(ROWS.tolist()):
        with adapter(model, c=c):
            assert torch.equal(generated(model, IDS[i : i + 1]), together[i : i + 1]), f"c={c}"
    with adapter(model, c=0.0):
        base = generated(model)
    assert not torch.equal(together, base) and torch.equal(together[1], base[1])
    adapter.detach()
    assert torch.equal(generated(model), base)


@each_kind
@pytest.mark.parametrize("way", WAYS)
def test_rows_equal_separate_runs_in_every_way_of_generating(way: str, row: Row) -> None:
    model = llama(torch.float64)
    adapter = adapted(model, row)
    assert_rows_are_separate(adapter, model, lambda: generated(model, **WAYS[way]))


@each_kind
def test_the_cache_changes_nothing(row: Row) -> None:
    model = llama(torch.float64)
    adapter = adapted(model, row)
    with adapter(model, c=-1.5):
        tokens = [generated(model, **WAYS[way]) for way in ("greedy", "no cache", "static cache", "chunked prefill")]
    assert all(torch.equal(t, tokens[0]) for t in tokens)


@each_variant
def test_left_padding_equals_no_padding(row: Row) -> None:
    model = llama(torch.float64, attention="sdpa")  # transformers' eager attention makes NaN of a padded row in float64
    adapter, lengths = adapted(model, row), (5, 3, 4)
    mask = torch.stack([(torch.arange(5) >= 5 - n).long() for n in lengths])
    with adapter(model, c=ROWS):
        together = generated(model, IDS * mask, attention_mask=mask)
    for i, (c, n) in enumerate(zip(ROWS.tolist(), lengths, strict=True)):
        with adapter(model, c=c):
            assert torch.equal(generated(model, IDS[i : i + 1, 5 - n :]), together[i : i + 1])


@each_kind
@pytest.mark.parametrize("way", ["greedy", "beams", "beams, two returned", "sampling, two returned"])
def test_t5_whose_encoder_sees_rows_and_decoder_sees_beams(way: str, row: Row) -> None:
    model = t5(torch.float64)
    adapter = adapted(model, row)
    assert any("encoder" in t for t in adapter.targets) and any("decoder" in t for t in adapter.targets)
    assert_rows_are_separate(adapter, model, lambda: generated(model, **WAYS[way]))


@each_variant
def test_opt_which_flattens_rows_and_tokens(row: Row) -> None:
    model = opt(torch.float64)
    adapter = adapted(model, row, std=0.2)
    assert any(t.endswith("fc1") for t in adapter.targets)
    tokens = ROWS[:, None].repeat(1, 5)
    with torch.no_grad(), adapter(model, c=ROWS):
        together = model(input_ids=IDS).logits
    with torch.no_grad(), adapter(model, c=tokens):
        assert_close(model(input_ids=IDS).logits, together, "a c per token that is one c per row")
    for i, c in enumerate(ROWS.tolist()):
        with torch.no_grad(), adapter(model, c=c):
            assert_close(model(input_ids=IDS[i : i + 1]).logits, together[i : i + 1], f"row {i}")
    with torch.no_grad(), adapter(model, c=ROWS.flip(0)):
        assert_differs(model(input_ids=IDS).logits, together)


@each_kind
@pytest.mark.parametrize("way", ["greedy", "beams, two returned"])
def test_opt_generates_the_same(way: str, row: Row) -> None:
    model = opt(torch.float64)
    adapter = adapted(model, row)
    assert_rows_are_separate(adapter, model, lambda: generated(model, **WAYS[way]))


@each_variant
def test_bert_whose_pooler_sees_one_vector_per_row(row: Row) -> None:
    model = bert(torch.float64)
    adapter = adapted(model, row, std=0.2, targets=("pooler", "classifier", "query"))
    assert "bert.pooler.dense" in adapter.targets and "classifier" in adapter.targets
    with torch.no_grad(), adapter(model, c=ROWS):
        together = model(input_ids=IDS).logits
    for i, c in enumerate(ROWS.tolist()):
        with torch.no_grad(), adapter(model, c=c):
            assert_close(model(input_ids=IDS[i : i + 1]).logits, together[i : i + 1], f"row {i}")
    with torch.no_grad(), adapter(model, c=ROWS.flip(0)):
        assert_differs(model(input_ids=IDS).logits, together)


# --- shapes that cannot be meant ---------------------------------------------------------------------------------------


def assert_refused(adapter: ll.Adapter, model: Any, c: Tensor, run: Callable[[], Any], *shapes: tuple[int, ...]) -> None:
    """Refused with the shapes named, and nothing is left behind."""
    with adapter(model, c=0.5):
        want = model(input_ids=IDS).logits
    with pytest.raises(ValueError) as caught, adapter(model, c=c):
        run()
    for shape in shapes:
        assert str(shape) in str(caught.value), f"{shape} is not in: {caught.value}"
    assert adapter.c == 1.0
    with adapter(model, c=0.5):
        assert torch.equal(model(input_ids=IDS).logits, want)


@pytest.mark.fast
@each_kind
def test_token_c_is_refused_at_a_one_token_step(row: Row) -> None:
    model = llama(torch.float64)
    adapter = adapted(model, row, targets="q_proj")
    assert_refused(adapter, model, torch.ones(3, 5), lambda: generated(model), (3, 5), (3, 1, 64))


@each_kind
def test_token_c_is_refused_where_tokens_are_missing_or_too_many(row: Row) -> None:
    model = llama(torch.float64)
    adapter = adapted(model, row, targets="q_proj")
    for tokens in (4, 6, 10):
        assert_refused(adapter, model, torch.ones(3, tokens), lambda: model(input_ids=IDS), (3, tokens), (3, 5, 64))


@pytest.mark.fast
@each_kind
def test_a_wrong_number_of_rows_is_refused(row: Row) -> None:
    model = llama(torch.float64)
    adapter = adapted(model, row, targets="q_proj")
    four = token_ids(4, 5)
    assert_refused(adapter, model, ROWS, lambda: model(input_ids=four), (3,), (4, 5, 64))
    assert_refused(adapter, model, ROWS, lambda: model(input_ids=IDS[:1]), (3,), (1, 5, 64))
    assert_refused(adapter, model, torch.ones(2), lambda: generated(model), (2,), (3, 5, 64))
    with pytest.raises(ValueError, match=r"\(3, 5, 1\)"), adapter(model, c=torch.ones(3, 5, 1)):
        pass


@each_kind
def test_a_packed_batch_has_no_rows(row: Row) -> None:
    """Three sequences packed into one row: a c per row cannot be spread, a scalar can."""
    model = llama(torch.float64)
    adapter = adapted(model, row, targets="q_proj")
    packed, positions = IDS.reshape(1, -1), torch.arange(5).repeat(3)[None]
    assert_refused(adapter, model, ROWS, lambda: model(input_ids=packed, position_ids=positions), (3,), (1, 15, 64))
    with adapter(model, c=0.5):
        model(input_ids=packed, position_ids=positions)


@each_kind
def test_token_c_is_refused_while_decoding_where_rows_and_tokens_are_flattened(row: Row) -> None:
    """OPT's fc1 sees (6, d) at a one-token step of 2 rows on 3 beams, as many as a (2, 3) c has numbers."""
    model = opt(torch.float64)
    adapter = adapted(model, row, targets="fc1")
    with pytest.raises(ValueError, match=r"\(2, 3\)"), adapter(model, c=torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]])):
        generated(model, token_ids(2, 3), num_beams=3)
