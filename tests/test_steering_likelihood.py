"""Is a text's likelihood its own: in any order and company, told once for all doses that wrote it, with or without the start's logits?"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lora_lite.steering import likelihood
from lora_lite.steering.likelihood import divergence, nats, spares_starts
from tests.models import VARIANTS, attach, llama, opt, randomise, t5

STARTS = [[5, 9, 12, 7, 31], [8], [8], [5, 9, 12, 7, 31], [40, 41, 42], [8]]
TEXTS = [[3, 3, 7], [50, 51, 52, 53, 54, 55, 56], [9], [3, 3, 7], [17, 18], [50, 51, 52, 53, 54, 55, 56]]
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(torch.float64),
    "opt": lambda: opt(torch.float64),
    "t5": lambda: t5(torch.float64),
}
NORMED_IN_FLOAT32 = 1e-7  # LlamaRMSNorm casts float64 down, where the last bit of a sum moves a number by 6e-8


def log_probs(model: Any, start: list[int], text: list[int]) -> torch.Tensor:
    """log p of every token at each place of the text, from a run of its own."""
    if model.config.is_encoder_decoder:
        begun = [model.config.decoder_start_token_id, *text[:-1]]
        logits = model(input_ids=torch.tensor([start]), decoder_input_ids=torch.tensor([begun])).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*start, *text]])).logits[0, len(start) - 1 : -1]
    return F.log_softmax(logits, dim=-1)


def own_nats(model: Any, start: list[int], text: list[int]) -> float:
    return -float(log_probs(model, start, text)[range(len(text)), text].mean())


@pytest.mark.parametrize("max_rows", [1, 2, 64])
@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_each_text_has_the_likelihood_of_a_run_of_its_own(name: str, max_rows: int) -> None:
    model = MODELS[name]()
    want = [own_nats(model, start, text) for start, text in zip(STARTS, TEXTS, strict=True)]
    assert len(set(want)) == 4  # a mistaken order would show
    assert nats(model, STARTS, TEXTS, max_rows) == pytest.approx(want, rel=NORMED_IN_FLOAT32 if name == "llama" else 1e-9)


@torch.no_grad()
def test_divergence_is_that_of_runs_of_their_own_in_the_order_given() -> None:
    model = llama(torch.float64)
    adapter = randomise(attach(model, VARIANTS["lora"], dtype=torch.float64), std=0.6)
    want = []
    for start, text in zip(STARTS, TEXTS, strict=True):
        with adapter(model, c=0.0):
            reference = log_probs(model, start, text)
        with adapter(model, c=0.7):
            here = log_probs(model, start, text)
        want += (here.exp() * (here - reference)).sum(-1).tolist()
    assert min(want) > 1e-4
    assert divergence(model, adapter, 0.7, STARTS, TEXTS, 2) == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("name", ["llama", "t5"])
@torch.no_grad()
def test_a_text_that_several_wrote_is_read_once(name: str) -> None:
    model, rows = MODELS[name](), []
    model.lm_head.register_forward_hook(lambda layer, args, out: rows.append(len(out)))
    nats(model, STARTS, TEXTS, 64)
    assert rows == [4]


@torch.no_grad()
def test_a_model_that_cannot_leave_logits_out_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = llama(torch.float64), []
    model.lm_head.register_forward_hook(lambda layer, args, out: shapes.append(tuple(out.shape[:2])))
    spared, forward = nats(model, STARTS, TEXTS, 64), model.forward
    assert spares_starts(model)

    def whole(input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", whole)
    assert not spares_starts(model) and "logits_to_keep" not in inspect.signature(model.forward).parameters
    assert nats(model, STARTS, TEXTS, 64) == pytest.approx(spared, rel=1e-12)
    same = [[5, 9, 12], [6, 6, 6]]
    monkeypatch.undo()
    nats(model, same, [[7], [8]], 64)
    assert shapes == [(4, 7), (4, 7), (2, 1)]  # 8 tokens less the last; the shortest start has 1. Then a start of 3 and its 1 token


@torch.no_grad()
def test_what_does_not_fit_at_once_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = llama(torch.float64), []
    model.lm_head.register_forward_hook(lambda layer, args, out: shapes.append(tuple(out.shape[:2])))
    whole = nats(model, STARTS, TEXTS, 64)
    monkeypatch.setattr(likelihood, "LOGITS", 14 * model.config.vocab_size)
    assert nats(model, STARTS, TEXTS, 64) == pytest.approx(whole, rel=1e-9)
    assert shapes[1:] == [(2, 7), (2, 4)] and all(rows * places <= 14 for rows, places in shapes[1:])


@torch.no_grad()
def test_an_empty_text_has_no_likelihood() -> None:
    found = nats(llama(torch.float64), [[8], [5, 9]], [[], [3]], 64)
    assert math.isnan(found[0]) and math.isfinite(found[1])
    assert all(map(math.isnan, nats(llama(torch.float64), [[8]], [[]], 64)))


@torch.no_grad()
def test_low_precision_logits_are_summed_in_float32() -> None:
    model = llama(torch.bfloat16)
    logits = model(input_ids=torch.tensor([[5, 9, 12, 3]])).logits[0, 1:3].float()
    want = -float(F.log_softmax(logits, dim=-1)[[0, 1], [12, 3]].mean())
    assert nats(model, [[5, 9]], [[12, 3]], 64) == pytest.approx([want], rel=1e-6)
