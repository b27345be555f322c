"""Does contrastive training put a trait on the dial, and nothing else? Against formulas, a loop by hand, and a world measured exactly."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import lora_lite as ll
from examples import two_styles
from lora_lite.steering import loop, losses
from tests.models import VARIANTS, attach, llama, normal, randomise, t5, token_ids
from tests.references import assert_close, assert_differs, same_bits

pytestmark = pytest.mark.xdist_group("steering training")  # one worker trains the tiny model, once
ROOT = Path(__file__).parents[1]

# --- pairs ---------------------------------------------------------------------------------------------------------------

GIVEN = [{"prompt": "a b", "chosen": "c", "rejected": "d e"}, {"prompt": "", "chosen": "e e", "rejected": "c"}]


def test_pairs_come_from_mappings_tuples_and_files_alike(tmp_path: Path) -> None:
    pairs = ll.ContrastivePairs(GIVEN)
    columns = ([g[f] for g in GIVEN] for f in ("prompt", "chosen", "rejected"))
    file = tmp_path / "pairs.jsonl"
    file.write_text("\ufeff" + "\n\n".join(json.dumps(g | {"source": 3}) for g in GIVEN) + "\n", encoding="utf-8")
    assert pairs == ll.ContrastivePairs(zip(*columns, strict=True)) == ll.ContrastivePairs.from_jsonl(file)
    assert len(pairs) == 2 and pairs[0].chosen == "c" and pairs[1:] == ll.ContrastivePairs(GIVEN[1:]) and pairs[-1].prompt == ""


BAD = {
    "not JSON": ('{"prompt": ', "not JSON"),
    "a list of two": ('["a", "b"]', "found list"),
    "a number": ("3", "found int 3"),
    "a key missing": ('{"prompt": "", "chosen": "x", "reject": "y"}', "'rejected'. missing; it has .*'reject'"),
    "not a text": ('{"prompt": "", "chosen": 7, "rejected": "y"}', "'chosen' is int 7"),
    "blank": ('{"prompt": "", "chosen": " ", "rejected": "y"}', "'chosen' is empty"),
    "no ids": ('{"prompt": [1], "chosen": [], "rejected": [2]}', "'chosen' is empty"),
    "the same twice": ('{"prompt": "", "chosen": "y", "rejected": "y"}', "the same"),
}


@pytest.mark.parametrize(("line", "said"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named_with_what_was_expected(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(GIVEN[0]) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"(?s)expected .*prompt.*chosen.*rejected.*line 3: .*{said}"):
        ll.ContrastivePairs.from_jsonl(file)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"pairs\.bin: not UTF-8"):
        ll.ContrastivePairs.from_jsonl(tmp_path / "pairs.bin")


def test_no_pairs_are_refused_and_so_is_what_holds_none(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: there are no pairs"):
        ll.ContrastivePairs.from_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"no pairs; .*at least one"):
        ll.ContrastivePairs([])
    with pytest.raises(TypeError, match=r"from_jsonl\('pairs\.jsonl'\)"):
        ll.ContrastivePairs("pairs.jsonl")


def test_all_bad_pairs_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)7 bad pairs.*pair 2: .*pair 6: .*and 2 more"):
        ll.ContrastivePairs([GIVEN[0], *[{"prompt": ""}] * 7])


MARKS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
WORDS = {w: i for i, w in enumerate([*MARKS.values(), "a", "b", "c", "d", "e"])}


def tokenizer(side: str = "left", first: bool = False, last: bool = False, **marks: str) -> PreTrainedTokenizerFast:
    """One word, one token. first, last: whether every text gets BOS before it, EOS behind it."""
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = f"{'<s> ' * first}$A{' </s>' * last}"
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, clean_up_tokenization_spaces=False, **marks)


TOKENIZERS = {
    "all marks": (tokenizer(**MARKS), None, 0, 1),
    "pads on the right": (tokenizer("right", **MARKS), None, 0, 1),
    "writes BOS": (tokenizer(first=True, **MARKS), 0, 0, 1),
    "writes EOS": (tokenizer(first=True, last=True, **MARKS), 0, 0, 1),
    "no pad token": (tokenizer(bos_token="<s>", eos_token="</s>"), None, 0, 1),
    "no BOS": (tokenizer(eos_token="</s>"), None, 1, 1),
    "no EOS": (tokenizer(bos_token="<s>"), None, 0, None),
}


@pytest.mark.parametrize(("words", "bos", "start", "eos"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_both_poles_are_one_batch_of_prompt_ids_and_completion_ids(words: Any, bos: int | None, start: int, eos: int | None) -> None:
    """bos: what the tokenizer writes before a text; start: what stands for an empty one; eos: what ends a completion."""
    rows = ll.ContrastivePairs(GIVEN).encode(words)
    a, b, c, d, e = (WORDS[w] for w in "abcde")
    prompts = [[*([] if bos is None else [bos]), a, b], [start]]
    end = [] if eos is None else [eos]
    completions = [[c, *end], [e, e, *end], [d, e, *end], [c, *end]]
    for row, (prompt, completion) in enumerate(zip(prompts * 2, completions, strict=True)):
        n = len(prompt) + len(completion)
        assert rows.ids[row, :n].tolist() == prompt + completion
        assert rows.mask[row].tolist() == [1] * n + [0] * (rows.mask.shape[1] - n)
        assert rows.completion[row].nonzero().flatten().tolist() == list(range(len(prompt), n))
    assert rows.inputs().keys() == {"input_ids", "attention_mask"} and rows.repeat(2).ids.shape[0] == 8


@pytest.mark.parametrize("name", TOKENIZERS)
def test_spaces_that_the_tokenizer_takes_for_nothing_are_an_empty_prompt(name: str) -> None:
    words, _, start, _ = TOKENIZERS[name]
    assert ll.ContrastivePairs([("  ", "a", "b")]).tokenised(words)[0].prompt == [start]


def test_the_seam_is_not_tokenised_again() -> None:
    """A tokenizer that would join the last letter of the prompt with the first of the completion: the prompt's ids stay its own."""
    bpe = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "bc": 3}, merges=[("b", "c")]))
    words = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
    assert words("abc")["input_ids"] == [0, 3]
    rows = ll.ContrastivePairs([("ab", "c", "a")]).encode(words)
    assert rows.ids.tolist() == [[0, 1, 2], [0, 1, 0]] and rows.completion.sum(1).tolist() == [1, 1]


def test_marks_that_a_text_has_of_its_own_are_kept_and_not_doubled() -> None:
    words = tokenizer(first=True, last=True, **MARKS)
    assert ll.ContrastivePairs([("<s> a </s>", "c", "d")]).tokenised(words)[0].prompt == [0, 3, 1]
    assert words("<s> a </s>")["input_ids"] == [0, 0, 3, 1, 1]


def test_ends_can_be_left_out_and_completions_cut() -> None:
    words = tokenizer(**MARKS)
    pairs = ll.ContrastivePairs([("a", "c d e", "e")])
    assert [p.chosen for p in pairs.tokenised(words, eos=False)] == [[5, 6, 7]]
    assert [p.chosen for p in pairs.tokenised(words, max_completion=2)] == [[5, 6]]
    with pytest.raises(ValueError, match="pair 1: its two completions come to the same tokens; max_completion"):
        ll.ContrastivePairs([("a", "c d", "c e")]).tokenised(words, max_completion=1)


def test_token_ids_need_no_tokenizer_and_stay_as_they_are() -> None:
    pairs = ll.ContrastivePairs([([4], [5, 6], [7])])
    assert pairs.tokenised() == pairs == pairs.tokenised(tokenizer(**MARKS))
    assert pairs.encode().ids.tolist() == [[4, 5, 6], [4, 7, 0]]
    mixed = ll.ContrastivePairs([([4], "c", [7])]).tokenised(tokenizer(**MARKS))
    assert mixed.tokenised() == mixed and mixed[0] == ([4], [5, 1], [7])
    with pytest.raises(TypeError, match="need a tokenizer"):
        ll.ContrastivePairs(GIVEN).encode()
    with pytest.raises(ValueError, match="pair 2: its prompt has no token to start from"):
        ll.ContrastivePairs(GIVEN).encode(tokenizer())


def numbered(n: int) -> ll.ContrastivePairs:
    return ll.ContrastivePairs(([1], [2, i], [3, i]) for i in range(10, 10 + n))


@pytest.mark.parametrize("n", [2, 7, 40])
def test_a_balanced_shuffle_swaps_exactly_half(n: int) -> None:
    pairs = numbered(n)
    null = pairs.balanced_shuffle(seed=3)
    swapped = [p for p in null if p.chosen[0] == 3]
    assert len(null) == n - n % 2 and len(swapped) * 2 == len(null)
    whole = Counter(frozenset([tuple(p.chosen), tuple(p.rejected)]) for p in null)
    assert max(whole.values()) == 1 and whole.keys() <= {frozenset([tuple(p.chosen), tuple(p.rejected)]) for p in pairs}
    assert null == pairs.balanced_shuffle(seed=3) and (n == 2 or null != pairs.balanced_shuffle(seed=4))
    with pytest.raises(ValueError, match="at least 2 pairs, got 1"):
        pairs[:1].balanced_shuffle()


def test_batches_show_every_pair_before_any_again_and_splits_lose_none() -> None:
    pairs = numbered(10)
    seen = [tuple(p.chosen) for batch in pairs.batches(4, 5, seed=1) for p in batch]
    assert len(set(seen[:10])) == 10 and sorted(seen) == sorted(seen[:10] * 2)
    assert [len(batch) for batch in pairs.batches(64, 3)] == [10, 10, 10]
    kept, held = pairs.split(0.2, seed=1)
    assert (len(kept), len(held)) == (8, 2) and sorted([*kept, *held]) == sorted(pairs)
    for share in (0.0, 1.0, 0.99):
        with pytest.raises(ValueError, match="cannot hold out"):
            pairs.split(share)


# --- losses ----------------------------------------------------------------------------------------------------------------


def sample(n: int = 4, t: int = 6, v: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, a reference, ids, and a mask with a prompt of two, padding behind, and one row of a single token."""
    logits, reference = normal(n, t, v, seed=1, dtype=torch.float64), normal(n, t, v, seed=2, dtype=torch.float64)
    completion = torch.zeros(n, t, dtype=torch.bool)
    for row in range(n):
        completion[row, 2 : 6 - row] = True
    return logits, reference, torch.randint(v, (n, t), generator=torch.Generator().manual_seed(3)), completion


def nll_by_hand(logits: Tensor, ids: Tensor, completion: Tensor, shift: int = 1) -> list[float]:
    found = []
    for row in range(len(ids)):
        places = [i for i in range(ids.shape[1]) if completion[row, i]]
        found.append(-sum(math.log(torch.softmax(logits[row, i - shift], 0)[ids[row, i]].item()) for i in places))
    return found


def test_completion_nll_is_the_sum_over_the_completion_alone() -> None:
    logits, _, ids, completion = sample()
    found, want = ll.completion_nll(logits, ids, completion), torch.tensor(nll_by_hand(logits, ids, completion), dtype=torch.float64)
    assert_close(found, want)
    assert_close(ll.completion_nll(logits, ids, completion, per_token=True), want / torch.tensor([4, 3, 2, 1]))
    assert_differs(found, torch.tensor(nll_by_hand(logits, ids, completion, shift=0), dtype=torch.float64), "an unshifted loss")
    elsewhere = ~completion.roll(-1, 1)  # places that predict no completion token
    assert same_bits(ll.completion_nll(logits.masked_fill(elsewhere[..., None], 7.0), ids, completion), found)
    assert ll.completion_nll(logits.bfloat16(), ids, completion).dtype is torch.float32


def test_margin_nll_pulls_and_pushes_each_up_to_its_cap() -> None:
    own, other, own_before, other_before = normal(4, 5, seed=4, std=3.0, dtype=torch.float64).requires_grad_().unbind()
    found = ll.margin_nll(own, other, own_before, other_before, cap=2.0)
    pairs = zip(own.tolist(), other.tolist(), own_before.tolist(), other_before.tolist(), strict=True)
    want = [max(0.0, 2.0 - (a0 - a)) + max(0.0, 2.0 - (b - b0)) for a, b, a0, b0 in pairs]
    assert found.item() == pytest.approx(sum(want) / 5, rel=1e-12)
    pull, push = torch.autograd.grad(found, (own, other))
    assert torch.equal(pull, (own_before - own < 2.0).double() / 5) and torch.equal(push, (other - other_before < 2.0).double() / -5)
    assert 0 < pull.count_nonzero() + push.count_nonzero() < 10, "some are past their cap, some are not"


def test_without_references_the_own_text_is_pulled_to_the_end() -> None:
    own, other = torch.tensor([0.1, 5.0]), torch.tensor([0.5, 9.0])
    assert ll.margin_nll(own, other, cap=2.0).item() == pytest.approx(((2 + 0.1) + (2 - 0.5) + (2 + 5.0)) / 2)


def kl_by_hand(logits: Tensor, reference: Tensor, completion: Tensor, k: int) -> list[float]:
    found = []
    for row, place in completion[:, 1:].nonzero().tolist():
        p, q = torch.softmax(reference[row, place], 0), torch.softmax(logits[row, place], 0)
        top = sorted(range(len(p)), key=lambda i: -p[i].item())[:k]
        rest = [i for i in range(len(p)) if i not in top]
        parts = [(p[i].item(), q[i].item()) for i in top] + ([(p[rest].sum().item(), q[rest].sum().item())] if rest else [])
        found.append(sum(a * math.log(a / b) for a, b in parts))
    return found


@pytest.mark.parametrize("k", [1, 4, 9, 50])
def test_reference_kl_is_over_the_references_top_and_the_rest_as_one(k: int) -> None:
    logits, reference, _, completion = sample()
    by_place = torch.tensor(kl_by_hand(logits, reference, completion, k), dtype=torch.float64)
    want = {"mean": by_place.mean(), "rmse": by_place.square().mean().sqrt(), "p95": by_place.quantile(0.95)}
    for how, value in want.items():
        assert_close(ll.reference_kl(logits, reference, completion, top_k=k, aggregate=how), value, how)  # type: ignore[arg-type]
    whole = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none").sum(-1)[:, :-1]
    whole = whole[completion[:, 1:]].mean()
    found = ll.reference_kl(logits, reference, completion, top_k=k)
    assert_close(found, whole) if k >= 9 else assert_differs(found, whole)
    assert found <= whole + 1e-12


@pytest.mark.parametrize("how", ["mean", "rmse", "p95"])
def test_reference_kl_and_its_gradient_are_zero_at_the_start(how: Any) -> None:
    """Where now and reference are the same bits; the root of a mean square has no slope there of its own."""
    _, reference, _, completion = sample()
    logits = reference.clone().requires_grad_()
    found = ll.reference_kl(logits, reference, completion, aggregate=how, top_k=4)
    (slope,) = torch.autograd.grad(found, logits)
    assert abs(found.item()) < 1e-12 and slope.abs().max().item() < 1e-12


@pytest.mark.parametrize("k", [4, 50])
def test_words_that_a_model_forbids_do_not_count(k: int) -> None:
    """Logits of -inf on both sides, as a mask of a padded vocabulary gives them: the KL is that of the other words."""
    logits, reference, _, completion = sample()
    forbidden = F.pad(logits, (0, 3), value=-math.inf).requires_grad_()
    found = ll.reference_kl(forbidden, F.pad(reference, (0, 3), value=-math.inf), completion, top_k=k)
    assert_close(found.detach(), ll.reference_kl(logits, reference, completion, top_k=k))
    assert bool(torch.isfinite(torch.autograd.grad(found, forbidden)[0]).all())


def test_the_tail_sees_a_short_loop_that_the_mean_hides() -> None:
    reference = torch.zeros(1, 101, 9)
    logits, completion = reference.clone(), torch.ones(1, 101, dtype=torch.bool)
    logits[0, 40:46, 3] = 8.0  # six of a hundred places say 3, for certain
    mean, rmse, p95 = (ll.reference_kl(logits, reference, completion, aggregate=how).item() for how in ("mean", "rmse", "p95"))  # type: ignore[arg-type]
    assert mean < 0.3 < 1.1 < rmse < 4 < p95
    with pytest.raises((ValueError, TypeError), match=r"no aggregate|Type-check"):
        ll.reference_kl(logits, reference, completion, aggregate="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no completion token"):
        ll.reference_kl(logits, reference, torch.zeros_like(completion))


@pytest.mark.parametrize("apart", [True, False], ids=["conflict", "agreement"])
def test_pcgrad_projects_what_conflicts(apart: bool) -> None:
    """arXiv:2001.06782, algorithm 1: g_i minus its component along g_j where they point apart; the sum is the step."""
    x, y = (nn.Parameter(normal(n, seed=n, dtype=torch.float64)) for n in (3, 4))
    a, b = normal(7, seed=5, dtype=torch.float64), normal(7, seed=6, dtype=torch.float64)
    b = b if (a @ b < 0) == apart else -b
    want = a + b if not apart else a - (a @ b) / (b @ b) * b + b - (a @ b) / (a @ a) * a
    x.grad = torch.ones_like(x)  # what is there already is added to
    both = torch.cat([x, y])
    cosine = ll.pcgrad([both @ a, both @ b], iter([x, y]))
    assert_close(torch.cat([x.grad - 1, y.grad]), want)
    assert cosine == pytest.approx(float(F.cosine_similarity(a, b, dim=0)))
    (assert_differs if apart else assert_close)(torch.cat([x.grad - 1, y.grad]), a + b)


def test_pcgrad_of_a_loss_without_a_slope_is_the_other_alone() -> None:
    x = nn.Parameter(torch.ones(3))
    assert ll.pcgrad([x.sum(), (0 * x).sum()], [x]) == 0.0 and torch.equal(x.grad, torch.ones(3))
    with pytest.raises(ValueError, match=r"two poles, \[up, down\]; got list"):
        ll.pcgrad([x.sum()], [x])


# --- the gradient of a contrastive loss -------------------------------------------------------------------------------------

METHODS = ("lora", "pissa", "pissa-spectrum", "ia3", "dora")
each_method = pytest.mark.parametrize("method", METHODS)


def rows_of(n: int = 2, device: str = "cpu") -> Any:
    ids = token_ids(2 * n, 7, seed=5).tolist()
    return ll.ContrastivePairs((row[:3], row[3:6], other[2:]) for row, other in zip(ids[:n], ids[n:], strict=True)).encode()


def contrastive(model: Any, adapter: ll.Adapter, rows: Any) -> Tensor:
    """Both poles and the reference; what it returns is differentiated when all blocks are closed."""
    mode = model.training
    with torch.no_grad(), adapter(model.eval(), c=0.0):
        reference = model(**rows.inputs(), use_cache=False).logits
    model.train(mode)
    before = ll.completion_nll(reference, rows.ids, rows.completion).chunk(2)
    total = torch.zeros((), dtype=torch.float64)
    for c in (1.0, -1.0):
        with adapter(model, c=c):
            logits = model(**rows.inputs(), use_cache=False).logits
        now = ll.completion_nll(logits, rows.ids, rows.completion).chunk(2)
        sides = (*now, *before) if c > 0 else (*now[::-1], *before[::-1])
        total = total + ll.margin_nll(*sides) + 10.0 * ll.reference_kl(logits, reference, rows.completion, aggregate="rmse")
    return total


def prepared(method: str, reentrant: bool | None, history: bool) -> tuple[Any, ll.Adapter]:
    model = llama(torch.float64).train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    adapter = randomise(attach(model, VARIANTS[method], dtype=torch.float64), std=0.1)
    if history:
        kept = randomise(ll.attach(model, ll.LoRAConfig(r=2, dtype=torch.float64), name="kept", seed=1), seed=1)
        kept.detach()
        ll.HistoryBake(model, [(kept, 0.7)], gate=adapter)
    model.enable_input_require_grads()
    return model, adapter


def in_another_thread(loss: Tensor) -> None:
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    ("history", "backward"),
    [(False, Tensor.backward), (True, Tensor.backward), (True, in_another_thread)],
    ids=["after the block", "with a history", "with a history, in another thread"],
)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@each_method
def test_a_contrastive_gradient_under_checkpointing_equals_the_plain_one(
    method: str, reentrant: bool, history: bool, backward: Callable[[Tensor], None]
) -> None:
    found = []
    for kind, back in ((None, Tensor.backward), (reentrant, backward)):
        model, adapter = prepared(method, kind, history)
        back(contrastive(model, adapter, rows_of()))
        found.append([p.grad for p in adapter.parameters()])
    assert any(g.abs().max() > 1e-3 for g in found[0])
    for plain, checked in zip(*found, strict=True):
        assert_close(checked / plain.abs().max(), plain / plain.abs().max())


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_pcgrad_under_checkpointing_equals_the_plain_one(reentrant: bool | None) -> None:
    found = []
    for kind in (None, reentrant):
        model, adapter = prepared("lora", kind, False)
        both = []
        for c in (1.0, -1.0):
            with adapter(model, c=c):
                both.append((model(**rows_of().inputs(), use_cache=False).logits * c).square().mean())
        ll.pcgrad(both, adapter.parameters())
        found.append([p.grad for p in adapter.parameters()])
    for plain, checked in zip(*found, strict=True):
        assert_close(checked, plain)


@pytest.mark.parametrize("shape", [(), (4,)], ids=["one c", "a c per row"])
def test_descent_on_c_alone_recovers_a_hidden_dose(shape: tuple[int, ...]) -> None:
    model, rows = llama(), rows_of()
    adapter = randomise(attach(model, VARIANTS["lora"]), std=0.1)
    with torch.no_grad(), adapter(model, c=1.3):
        hidden = model(**rows.inputs(), use_cache=False).logits
    before, c = adapter.state_dict()["model.layers.0.mlp.up_proj.lora_B"].clone(), torch.zeros(shape, requires_grad=True)
    optimizer = torch.optim.Adam([c], lr=0.1)
    for _ in range(120):
        optimizer.zero_grad()
        with adapter(model, c=c):
            logits = model(**rows.inputs(), use_cache=False).logits
        ll.reference_kl(logits, hidden, rows.completion).backward()
        optimizer.step()
    assert_close(c.detach(), torch.full(shape, 1.3), tolerance=5e-3)
    assert same_bits(adapter.state_dict()["model.layers.0.mlp.up_proj.lora_B"], before)


# --- the two-style grammar: what is measured is exact ------------------------------------------------------------------------

C = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
TRAININGS: dict[str, tuple[ll.AdapterConfig, dict[str, Any]]] = {
    "lora": (ll.LoRAConfig(r=4, alpha=8), {"lr": 3e-3}),
    "pissa": (ll.PiSSAConfig(r=4), {"lr": 1e-3}),
    "pissa-spectrum": (ll.PiSSAConfig(r=48, train="spectrum"), {"lr": 2e-2, "steps": 120}),
    "ia3": (ll.IA3Config(), {"lr": 2e-2, "steps": 120}),
    "dora": (ll.DoRAConfig(r=4, alpha=8), {"lr": 3e-3}),
}
QUICK: dict[str, Any] = {"steps": 60, "checks": 3, "progress": False}


@pytest.fixture(scope="module")
def speaker() -> Any:
    """The tiny Llama that speaks the grammar. Copied by those who would change it."""
    with torch.random.fork_rng():
        return two_styles.tiny_llama()


@pytest.fixture
def model(speaker: Any) -> Any:
    return copy.deepcopy(speaker)


def test_the_grammar_lists_exactly_what_is_valid(speaker: Any) -> None:
    assert len(two_styles.SENTENCES) == len(two_styles.VALID) == 1536 and two_styles.TABLE.shape == (1536, 10)
    assert two_styles.FORMAL.sum() == two_styles.PLURAL.sum() == 768
    said = two_styles.encoded(two_styles.SENTENCES[1000])
    assert two_styles.parse(said) == two_styles.SENTENCES[1000] and two_styles.parse(said[:-1]) is None
    right = ["hey", "the", "cat", "spots", "the", "birds", ",", "sadly"]
    for wrong in (
        "indeed the cat spots the birds , sadly",
        "hey the cat spot the birds , sadly",
        "hey the cat spots the birds , fortunately",
    ):
        assert tuple(right) in two_styles.VALID and tuple(wrong.split()) not in two_styles.VALID
    uniform = copy.deepcopy(speaker)
    nn.init.zeros_(uniform.lm_head.weight)  # every token as likely: 9 tokens of one in the vocabulary, 1536 times
    assert two_styles.measured(uniform).valid == pytest.approx(1536 / len(two_styles.VOCABULARY) ** 9, rel=1e-9)
    base = two_styles.measured(speaker)
    assert base.valid > 0.97 and abs(base.style) < 0.15 and abs(base.number) < 0.15


def test_sampled_sentences_are_as_often_valid_as_the_list_says(speaker: Any) -> None:
    start = torch.zeros(400, 1, dtype=torch.long)
    said = speaker.generate(start, do_sample=True, top_k=0, max_new_tokens=10, attention_mask=torch.ones_like(start))
    valid = sum(two_styles.parse(row) is not None for row in said[:, 1:].tolist()) / 400
    assert abs(valid - two_styles.measured(speaker).valid) < 0.04


@pytest.mark.parametrize(("config", "how"), TRAININGS.values(), ids=TRAININGS)
def test_c_turns_the_style_gradually_and_nothing_else(config: ll.AdapterConfig, how: dict[str, Any], model: Any) -> None:
    adapter = ll.attach(model, config, seed=0)
    report = ll.train_steering(model, adapter, two_styles.contrast(), **QUICK | how)
    found = two_styles.sweep(model, adapter, C)
    styles, base = [found[c].style for c in C], found[0.0]
    assert all(low < high for low, high in itertools.pairwise(styles)), styles
    assert styles[0] <= -1.5 and styles[-1] >= 1.5, styles
    assert min(found[-0.5].valid, found[0.5].valid) >= 0.9, found
    assert max(abs(m.number - base.number) for m in found.values()) < 0.2, found
    assert report.best is not None and report.best.poles[0].effect > 2 and report.best.poles[1].effect < -2


@pytest.mark.parametrize(("config", "how"), TRAININGS.values(), ids=TRAININGS)
def test_the_null_control_does_not_turn_it(config: ll.AdapterConfig, how: dict[str, Any], model: Any) -> None:
    null, report = ll.null_control(model, config, two_styles.contrast(), **QUICK | how)
    assert not null.attached and not ll.adapters(model) and report.best_step == len(report.losses)
    found = two_styles.sweep(model, null, C)
    assert max(abs(m.style - found[0.0].style) for m in found.values()) <= 0.15, found
    assert report.checks[-1].poles[0].kl > 1e-3, "a null that never moved controls nothing"


def one_hinge(own: Tensor, other: Tensor, own_before: Tensor, other_before: Tensor, cap: float) -> Tensor:
    return (2 * cap - (own_before - own) - (other - other_before)).relu().mean()


def test_the_anchor_and_the_two_caps_earn_their_place(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls: without the KL the dial becomes a switch and less is valid; one cap over pull and push pays with both texts."""

    def at_the_poles(**how: Any) -> tuple[Any, Any]:
        adapter = ll.attach(model, TRAININGS["lora"][0], seed=0)
        ll.train_steering(model, adapter, two_styles.contrast(), **{**QUICK, "lr": 3e-3, "keep": "last", **how})
        found = two_styles.sweep(model, adapter, (-1.0, 1.0))
        adapter.detach()
        return found[-1.0], found[1.0]

    with_it, without = at_the_poles(steps=120), at_the_poles(steps=120, kl=0.0)
    assert all(a.valid > b.valid + 0.01 and abs(b.style) > 1.5 * abs(a.style) for a, b in zip(with_it, without, strict=True)), (
        with_it,
        without,
    )
    two = at_the_poles(kl=0.0)
    monkeypatch.setattr(loop, "margin_nll", one_hinge)
    one = at_the_poles(kl=0.0)
    assert all(a.valid > b.valid + 0.3 for a, b in zip(two, one, strict=True)), (two, one)


# --- train_steering ------------------------------------------------------------------------------------------------------------


def small(n: int = 12) -> ll.ContrastivePairs:
    return two_styles.contrast(n)


def lora(model: Any, **keywords: Any) -> ll.Adapter:
    return ll.attach(model, ll.LoRAConfig(r=2, alpha=4), seed=0, **keywords)


FEW: dict[str, Any] = {"steps": 6, "lr": 1e-2, "batch_size": 4, "checks": 3, "progress": False}


def state(adapter: ll.Adapter) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in adapter.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)


def test_it_is_the_loop_that_one_writes_by_hand(model: Any) -> None:
    pairs, adapter = small(), lora(model)
    report = ll.train_steering(model, adapter, pairs, validation=None, warmup=0.5, clip=0.3, **FEW)
    found = state(adapter)
    adapter.detach()
    again, rates = lora(model), [1 / 3, 2 / 3, 1.0, *(0.5 + 0.5 * math.cos(math.pi * i / 4) for i in (1, 2, 3))]
    optimizer = torch.optim.AdamW(again.parameters(), weight_decay=0.0)
    by_hand = []
    for batch, rate in zip(pairs.batches(4, 6, seed=0), rates, strict=True):
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        optimizer.zero_grad()
        loss = contrastive_mean(model, again, batch.encode())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(again.parameters(), 0.3)
        optimizer.step()
        by_hand.append(loss.item())
    assert report.losses == pytest.approx(by_hand, rel=1e-5) and report.best_step == 6 and not report.checks
    for key, value in again.state_dict().items():
        assert_close(found[key], value, key, tolerance=1e-4)


def contrastive_mean(model: Any, adapter: ll.Adapter, rows: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ll, "reference_kl", lambda *a, aggregate: losses.reference_kl(*a, aggregate="mean"))
        return contrastive(model, adapter, rows)


@pytest.mark.parametrize("why", ["the variant", "experts"])
def test_where_rows_cannot_differ_each_pole_has_a_forward(why: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, batches = [], []
    model.register_forward_pre_hook(lambda module, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True)
    for together in (True, False):
        if not together and why == "the variant":
            monkeypatch.setattr(ll.REGISTRY["lora"], "row_c", False)
        elif not together:
            monkeypatch.setattr(loop.Training, "routed", True)
        adapter = lora(model)
        ll.train_steering(model, adapter, small(), validation=None, **FEW)
        found.append(state(adapter))
        adapter.detach()
    assert batches == [8, 16] * 6 + [8, 8, 8] * 6
    for key, value in found[0].items():
        assert_close(found[1][key], value, key, tolerance=1e-4)


def test_the_same_seed_gives_the_same_weights(model: Any) -> None:
    found = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        adapter = lora(model)
        torch.manual_seed(disturbance)
        report = ll.train_steering(model, adapter, small(), seed=seed, **FEW)
        found.append((state(adapter), report))
        adapter.detach()
    assert same_state(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert not same_state(found[0][0], found[2][0])


def test_all_but_the_weights_is_as_it_was(model: Any) -> None:
    other, adapter = lora(model, name="other"), lora(model)
    randomise(other, std=0.05)
    model.model.layers[0].train()
    modes = {n: m.training for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    ll.train_steering(model, adapter, small(), **FEW)
    mine = {n for n, _ in adapter.named_parameters()}
    assert modes == {n: m.training for n, m in model.named_modules()} and flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert torch.equal(torch.get_rng_state(), random_state) and adapter.c == 1.0
    assert all(p.grad is None for p in model.parameters())
    assert {n for n, p in model.named_parameters() if not same_bits(p, values[n])} == mine


def test_steps_run_in_train_mode_and_the_reference_in_eval_mode(model: Any) -> None:
    adapter, seen = lora(model), []
    model.register_forward_pre_hook(lambda module, args: seen.append((module.training, torch.is_grad_enabled(), adapter.c)))
    ll.train_steering(model, adapter, small(), validation=None, **FEW | {"steps": 1})
    (reference, step) = seen
    assert reference == (False, False, 0.0) and step[:2] == (True, True) and sorted(set(step[2].tolist())) == [-1.0, 1.0]


def test_checkpointing_and_no_grad_around_it_change_nothing(model: Any) -> None:
    found = []
    for reentrant in (None, False, True):
        twin = copy.deepcopy(model)
        adapter = lora(twin)
        if reentrant is not None:
            twin.activation_checkpointing_enable({"use_reentrant": reentrant})
        with torch.set_grad_enabled(reentrant is None):
            ll.train_steering(twin, adapter, small(), project=bool(reentrant), **FEW)
        found.append(state(adapter))
    for key, value in found[0].items():
        assert_close(found[1][key], value, key, tolerance=1e-4)


def test_a_bfloat16_model_trains_float32_tensors(model: Any) -> None:
    model = model.to(torch.bfloat16)
    adapter = lora(model)
    report = ll.train_steering(model, adapter, two_styles.contrast(), lr=3e-3, **QUICK)
    assert report.losses[-1] < 0.8 * report.losses[0] and {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_projection_is_an_option_and_says_how_the_poles_agree(model: Any) -> None:
    adapter = lora(model)
    report = ll.train_steering(model, adapter, two_styles.contrast(), project=True, lr=3e-3, **QUICK)
    assert len(report.cosines) == 60 and all(-1.001 <= c <= 1.001 for c in report.cosines)
    assert report.best is not None and report.best.poles[0].shift > 1 > -1 > report.best.poles[1].shift


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_weights_are_kept(keep: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, seen, look = lora(model), [], loop.Training.check

    def staged(self: Any, step: int, held: Any) -> Any:
        seen.append(state(adapter))
        return dataclasses.replace(look(self, step, held), loss=[5.0, 3.0, 1.0, 2.0][len(seen) - 1])

    monkeypatch.setattr(loop.Training, "check", staged)
    report = ll.train_steering(model, adapter, small(), keep=keep, **FEW)
    assert [c.step for c in report.checks] == [0, 2, 4, 6] and report.best_step == (4 if keep == "best" else 6)
    assert same_state(state(adapter), seen[2 if keep == "best" else 3]) and not same_state(seen[2], seen[3])
    assert report.best is report.checks[2 if keep == "best" else 3]


def test_an_interrupted_training_leaves_the_best_weights_so_far(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, seen, look = lora(model), [], loop.Training.check

    def staged(self: Any, step: int, held: Any) -> Any:
        seen.append(state(adapter))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return look(self, step, held)

    monkeypatch.setattr(loop.Training, "check", staged)
    with pytest.raises(KeyboardInterrupt):
        ll.train_steering(model, adapter, small(), **FEW)
    assert same_state(state(adapter), seen[2]) and not model.training and torch.is_grad_enabled()


def test_one_held_out_pair_has_no_effect_size(model: Any) -> None:
    said = str(ll.train_steering(model, lora(model), small(), validation=small(1), **FEW))
    assert "on 1 held-out pair c=" in said and "no effect size of one pair" in said and "effect +" not in said


def test_held_out_checks_say_what_a_pole_does(model: Any) -> None:
    pairs, held = small(24).split(0.4)
    adapter = lora(model)
    report = ll.train_steering(model, adapter, pairs, validation=held, **FEW | {"batch_size": 3})
    rows = held.encode()
    with torch.no_grad():
        with adapter(model, c=0.0):
            before = model(**rows.inputs()).logits
        for pole in report.best.poles:  # type: ignore[union-attr]
            with adapter(model, c=pole.c):
                now = model(**rows.inputs()).logits
            (a, b), (a0, b0) = (ll.completion_nll(x, rows.ids, rows.completion).chunk(2) for x in (now, before))
            shift = (a0 - a) - (b0 - b)  # towards the chosen texts
            assert pole.shift == pytest.approx(shift.mean().item(), abs=1e-4)
            assert pole.effect == pytest.approx((shift.mean() / shift.std(correction=0)).item(), rel=1e-2)
            assert pole.agree == ((shift > 0) == (pole.c > 0)).float().mean().item()
            for how in ("mean", "rmse", "p95"):
                name = "kl" if how == "mean" else f"kl_{how}"
                assert getattr(pole, name) == pytest.approx(ll.reference_kl(now, before, rows.completion, aggregate=how).item(), abs=1e-5)
    assert json.loads(json.dumps(report.to_dict()))["pairs"] == [len(pairs), len(held)] and "held-out" in str(report)


@pytest.mark.parametrize("gate", ["adapter", "callable", None])
def test_the_reference_is_the_base_where_a_history_is_gated(gate: str | None, model: Any) -> None:
    kept = randomise(lora(model, name="kept"), std=0.1)
    kept.detach()
    held, adapter = small(), lora(model)
    history = ll.HistoryBake(model, [(kept, 1.0)], gate={"adapter": adapter, "callable": lambda: adapter.c != 0, None: None}[gate])
    start = ll.train_steering(model, adapter, small(), validation=held, **FEW).checks[0]  # the adapter adds nothing yet
    history.set_gate(None)
    with torch.no_grad(), adapter(model, c=0.0):
        rows = held.encode()
        stacked = model(**rows.inputs()).logits
        with ll.disabled(model):
            base = model(**rows.inputs()).logits
    want = 0.0 if gate is None else ll.reference_kl(stacked, base, rows.completion).item()
    assert [pole.kl for pole in start.poles] == pytest.approx([want] * 2, abs=1e-5) and (gate is None or want > 1e-3)


# --- refusals ---------------------------------------------------------------------------------------------------------------------


def narrow(model: Any) -> ll.Adapter:
    adapter = lora(model)
    model.to(torch.bfloat16)  # what is attached goes with it
    return adapter


def half(model: Any) -> ll.Adapter:
    return ll.attach(model, ll.LoRAConfig(r=2, dtype=torch.float16))


def detached(model: Any) -> ll.Adapter:
    adapter = lora(model)
    adapter.detach()
    return adapter


def elsewhere(model: Any) -> ll.Adapter:
    return lora(copy.deepcopy(model))


def merged(model: Any) -> ll.Adapter:
    return lora(model).merge()


def frozen(model: Any) -> ll.Adapter:
    return lora(model).requires_grad_(False)


def broken(model: Any) -> ll.Adapter:
    adapter = lora(model)
    with torch.no_grad():
        next(adapter.parameters())[0] = math.nan
    return adapter


def also(model: Any) -> ll.Adapter:
    return lora(model, train_also="norm")


def under_a_history(gate: Callable[[ll.Adapter], Any]) -> Callable[[Any], ll.Adapter]:
    def made(model: Any) -> ll.Adapter:
        kept = detached(model)
        adapter = lora(model)
        ll.HistoryBake(model, [(kept, 1.0)], gate=gate(adapter))
        return adapter

    return made


def another_at_zero(adapter: ll.Adapter) -> ll.Adapter:
    assert adapter.model is not None
    return lora(adapter.model, name="other", c=0.0)


REFUSED: dict[str, tuple[Callable[[Any], ll.Adapter], dict[str, Any], str]] = {
    "bfloat16 trainables": (narrow, {}, r"torch.bfloat16 .*lora_A.*stay float32.*attach after"),
    "float16 trainables": (half, {}, "torch.float16"),
    "a pole at zero": (lora, {"poles": (1.0, 0.0)}, r"c = 0 is the base itself.*\(1.0, 0.0\)"),
    "poles on one side": (lora, {"poles": (1.0, 0.5)}, "of the rejected ones < 0"),
    "a gate that never opens": (under_a_history(lambda _: lambda: False), {}, r"history 0 does not open at c = 1.0 or -1.0: .*callable"),
    "a gate for one pole": (under_a_history(lambda a: lambda: bool(a.c > 0)), {}, r"does not open at c = -1.0: .*set_gate\(adapter\)"),
    "a gate that follows another": (under_a_history(another_at_zero), {}, r"follows adapter 'other', whose c is 0.0"),
    "not attached": (detached, {}, "'default' is not attached"),
    "attached to another model": (elsewhere, {}, "attached to another LlamaForCausalLM"),
    "merged": (merged, {}, "is merged"),
    "nothing to train": (frozen, {}, "nothing to train: none of its tensors"),
    "not finite": (broken, {}, "NaN or infinite"),
    "other parameters as well": (also, {}, r"also trains .*norm.*does not switch off"),
    "no steps": (lora, {"steps": 0}, "steps must be at least 1"),
    "no rate": (lora, {"lr": 0.0}, "lr must be above 0"),
    "one pair to hold out from": (lora, {"validation": 0.99}, "cannot hold out"),
}


@pytest.mark.parametrize(("made", "how", "said"), REFUSED.values(), ids=REFUSED)
def test_what_would_silently_train_wrong_is_refused(made: Any, how: dict[str, Any], said: str, model: Any) -> None:
    adapter = made(model)
    before = state(adapter)
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){said}"):
        ll.train_steering(model, adapter, small(), **FEW | how)
    if made is not broken:
        assert same_state(state(adapter), before)


def test_an_open_gate_and_an_empty_history_are_welcome(model: Any) -> None:
    adapter = under_a_history(lambda a: lambda: a.c != 0)(model)
    ll.HistoryBake(model, gate=lambda: False)
    assert ll.train_steering(model, adapter, small(), **FEW).losses


def test_an_encoder_decoder_is_refused() -> None:
    model = t5()
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        ll.train_steering(model, ll.attach(model, ll.LoRAConfig(r=2)), small(), **FEW)


def test_a_loss_that_is_not_finite_stops_the_training(model: Any) -> None:
    adapter = lora(model)
    before = state(adapter)
    model.register_forward_hook(lambda module, args, out: out.logits.mul_(math.nan) if module.training else None)
    with pytest.raises(RuntimeError, match=r"step 1: loss nan.*lower lr"):
        ll.train_steering(model, adapter, small(), **FEW)
    assert same_state(state(adapter), before)


def test_bad_pairs_are_named_before_the_first_step(model: Any) -> None:
    pairs = ll.ContrastivePairs([*small(), ([], [1], [2])])
    with pytest.raises(ValueError, match=r"(?s)1 bad pairs.*no token to start from"):
        ll.train_steering(model, lora(model), pairs, validation=None, **FEW)
    with pytest.raises(ValueError, match="no pairs to train on"):
        ll.train_steering(model, lora(model, name="b"), small()[:0], validation=None, **FEW)


# --- the null control ----------------------------------------------------------------------------------------------------------------


def test_an_attached_adapter_lends_its_place_and_has_its_values_back(model: Any) -> None:
    """Also its part in a gate: the history is open while the null trains."""
    kept = detached(model)
    randomise(kept, std=0.1)
    adapter = randomise(lora(model), std=0.1)
    ll.HistoryBake(model, [(kept, 1.0)], gate=adapter)
    before, parameters = state(adapter), [id(p) for p in adapter.parameters()]
    null, report = ll.null_control(model, adapter, small(), **FEW)
    assert same_state(state(adapter), before) and [id(p) for p in adapter.parameters()] == parameters
    assert list(ll.adapters(model)) == ["default"] and not null.attached and null.config == adapter.config
    assert not same_state(state(null), before) and report.recipe["keep"] == "last"
    assert report.checks[0].poles[0].kl > 1e-4, "the history did not take part"


def test_a_null_is_the_same_training_from_the_same_start_on_shuffled_labels(model: Any) -> None:
    adapter = lora(model)
    null, report = ll.null_control(model, adapter, small(), seed=0, **FEW)
    kept, held = small().split(0.1, 0)
    again = ll.train_steering(model, adapter, kept.balanced_shuffle(0), validation=held, keep="last", **FEW)
    assert same_state(state(null), state(adapter)) and again == report


@pytest.mark.parametrize("detached", [True, False])
def test_a_null_of_one_pair_says_what_is_left_to_train_on(detached: bool, model: Any) -> None:
    """Of two pairs the default holds one out: the message spoke of "1" to someone who had given 2."""
    adapter = lora(model)
    before = state(adapter)
    if detached:
        adapter.detach()
    with pytest.raises(
        ValueError, match=r"needs at least 2 pairs to train on.*got 1 pair to train on, beside 1 held out.*at least 3 pairs"
    ):
        ll.null_control(model, adapter, small()[:2], **FEW)
    with pytest.raises(ValueError, match="got 1 pair, none held out"):
        ll.null_control(model, adapter, small()[:1], validation=None, **FEW)
    assert same_state(state(adapter), before) and adapter.attached is not detached


def test_a_null_of_two_pairs_that_both_train_is_made(model: Any) -> None:
    config = ll.LoRAConfig(r=2)
    for validation, held in ((None, 0), (small()[2:4], 2)):
        assert ll.null_control(model, config, small()[:2], validation=validation, **FEW)[1].pairs == (2, held)


def test_a_null_that_fails_gives_the_values_back(model: Any) -> None:
    adapter = randomise(lora(model), std=0.1)
    before = state(adapter)
    with pytest.raises(ValueError, match="lr must be above 0"):
        ll.null_control(model, adapter, small(), **FEW | {"lr": -1.0})
    assert same_state(state(adapter), before)
    adapter.detach()
    with pytest.raises(ValueError, match="lr must be above 0"):
        ll.null_control(model, adapter, small(), **FEW | {"lr": -1.0})
    assert not ll.adapters(model) and same_state(state(adapter), before)


def test_a_null_of_what_cannot_be_trained_is_refused_before_values_make_room(model: Any) -> None:
    name = next(n for n, p in model.named_parameters() if p.dim() == 1)
    adapter = randomise(lora(model, train_also=f"^{name}$"), std=0.1)
    before = state(adapter)
    with pytest.raises(RuntimeError, match="also trains"):
        ll.null_control(model, adapter, small(), **FEW)
    assert same_state(state(adapter), before) and list(ll.adapters(model)) == ["default"]


def test_training_on_leaves_no_limit_that_was_measured_before(model: Any) -> None:
    """c="auto" would take a c that was never tried on these values; a null only borrows the place, and takes nothing away."""
    adapter = lora(model)
    adapter.calibrated = {"positive": 2.0, "negative": None}
    ll.null_control(model, adapter, small(), **FEW)
    assert adapter.calibrated == {"positive": 2.0, "negative": None}
    ll.train_steering(model, adapter, small(), **FEW)
    with pytest.raises(ValueError, match="calibrate_c"):
        adapter(model, c="auto")


# --- examples ---------------------------------------------------------------------------------------------------------------------------


def test_the_loop_by_hand_is_short_and_runs(tmp_path: Path) -> None:
    script = ROOT / "examples" / "steer.py"
    assert len(script.read_text().splitlines()) < 60
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    styles = [float(line.split("formal")[1].split(",")[0]) for line in done.stdout.splitlines() if line.startswith("c = ")]
    assert len(styles) == 5 and styles == sorted(styles) and styles[0] < -1.5 < 1.5 < styles[-1]


def test_held_out_pairs_that_are_trained_on_are_told(model: Any, said: list[str]) -> None:
    pairs, adapter = two_styles.contrast(6), lora(model)
    ll.train_steering(model, adapter, pairs, validation=ll.ContrastivePairs(pairs[:2]), **FEW)
    assert len(said) == 1 and said[0].startswith("2 of 2 held-out pairs are among those trained on too")
    ll.train_steering(model, adapter, pairs, validation=0.5, **FEW)
    assert len(said) == 1
