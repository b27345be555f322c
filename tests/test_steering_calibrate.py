"""Is the c that comes back one that was tried and held, with nothing before it that failed, whatever the curve looks like?"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_lite as ll
from lora_lite.steering import calibrate
from lora_lite.steering.calibrate import Calibration, aggregates
from lora_lite.steering.search import limits
from lora_lite.steering.writing import Sample, Writing
from tests.models import VARIANTS, Row, attach, llama, opt, randomise, t5
from tests.test_steering_response import assert_as_before, state_of, with_sdpa
from tests.words import ids_of, word_tokenizer

TOKENIZER = word_tokenizer()
PROMPTS = ["w5 w17 w40 w9", "w88", "w23 w61"]
GRID = (0.5, 1.0, 2.0, 4.0)


def adapted(model: nn.Module, row: Row = VARIANTS["lora"], std: float = 0.3, **keywords: Any) -> ll.Adapter:
    return randomise(attach(model, row, dtype=torch.float64, **keywords), std=std)


def sdpa() -> Any:
    return llama(torch.float64, attention="sdpa")


def double() -> Any:
    """In float64 throughout: Llama's norms go through float32, which shows in the ninth digit where a batch sums in another order."""
    return with_sdpa(opt(torch.float64))


def calibrated(adapter: ll.Adapter, prompts: Any = PROMPTS, **keywords: Any) -> Calibration:
    given = {"tokenizer": TOKENIZER, "max_new_tokens": 8, "progress": False, "grid": GRID, **keywords}
    return ll.calibrate_c(adapter, prompts, **given)


# --- the search, over made-up curves -----------------------------------------------------------------------------------

sizes = st.lists(st.floats(0.01, 10), min_size=1, max_size=6, unique=True).map(sorted)
# Coherent or not by slices of c, in any order: monotone curves are a few of these.
slices = st.lists(st.booleans(), min_size=1, max_size=40)


def search(up: list[bool], down: list[bool], grid: Sequence[float], *steps: int) -> tuple[dict, dict, list]:
    """What the search found on a curve of slices, everything it tried, and the batches it tried it in."""
    tried, batches = dict[float, bool](), list[list[float]]()

    def holds(doses: list[float]) -> list[bool]:
        batches.append(doses)
        for c in doses:
            side = up if c > 0 else down
            assert c not in tried, "tried twice"
            tried[c] = side[min(len(side) - 1, int(abs(c) / 11 * len(side)))]
        return [tried[c] for c in doses]

    return limits(holds, grid, (1, -1), *steps), tried, batches


@given(slices, slices, sizes, st.integers(0, 3), st.integers(2, 5), st.integers(0, 4))
def test_the_answer_was_tried_held_and_passed_no_failure(up: Any, down: Any, grid: Any, doublings: int, sections: int, rounds: int) -> None:
    found, tried, batches = search(up, down, grid, doublings, sections, rounds)
    assert len(batches) <= 1 + doublings + rounds, "each step is one batch"
    assert {sign * c for sign in (1, -1) for c in grid} <= set(tried)
    for sign in (1, -1):
        held = sorted(abs(c) for c, holds in tried.items() if c * sign > 0 and holds)
        failed = sorted(abs(c) for c, holds in tried.items() if c * sign > 0 and not holds)
        limit = found[sign]
        if limit is None:
            assert not held or (failed and failed[0] < held[0])
            continue
        assert limit * sign > 0 and tried[limit] is True
        assert all(tried[sign * c] for c in grid if c <= abs(limit)), "every dose of the grid below was tried, and held"
        assert all(c > abs(limit) for c in failed)
        assert not [c for c in held if c > abs(limit) and (not failed or c < failed[0])], "the largest such"


@given(st.floats(0.02, 9.9), sizes, st.integers(0, 3), st.integers(2, 4), st.integers(0, 4))
def test_a_threshold_is_found_to_the_resolution(threshold: float, grid: Any, doublings: int, sections: int, rounds: int) -> None:
    found = limits(lambda doses: [abs(c) <= threshold for c in doses], grid, (1, -1), doublings, sections, rounds)
    grid = [*grid, *(grid[-1] * 2**i for i in range(1, doublings + 1))]
    before = max([0.0, *(c for c in grid if c <= threshold)])
    after = min([c for c in grid if c > threshold], default=math.inf)
    width = (after - before) / sections**rounds
    for sign in (1, -1):
        limit = abs(found[sign] or 0.0)
        assert limit <= threshold and (math.isinf(after) or threshold - limit <= width * (1 + 1e-9) + 1e-12)


# --- calibrate_c, over made-up texts -----------------------------------------------------------------------------------


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Every text is its c, so that a coherence function can be any function of c. Returns the batches that were written."""
    batches: list[list[float]] = []

    def write(model: Any, adapter: Any, tokenizer: Any, prompts: Any, cs: list[float], how: Writing) -> list[Sample]:
        batches.append(list(cs))
        return [Sample(c, i, 0, p.ids, (2,), repr(c)) for c in cs for i, p in enumerate(prompts)]

    monkeypatch.setattr(calibrate, "write", write)
    return batches


def by_c(curve: Callable[[float], float]) -> Callable[[list[str]], list[float]]:
    def coherent(texts: list[str]) -> list[float]:
        return [curve(float(text)) for text in texts]

    return coherent


def test_each_sign_has_its_own_limit(made_up: list[list[float]]) -> None:
    adapter = adapted(sdpa())
    found = calibrated(adapter, coherence=by_c(lambda c: float(-1.1 <= c <= 2.6)), rounds=3)
    assert found.positive == 2.59375 and found.negative == -1.09375
    assert [b[0] for b in made_up[:1]] == [0.0] and len(made_up) == 4 and len(made_up[0]) == 1 + 2 * len(GRID)
    assert "positive c is coherent up to 2.59375" in found.verdict and "negative c is coherent up to -1.09375" in found.verdict
    assert "coherent 0x c=0's, floor 0.8x" in found.verdict
    assert [p.c for p in found.probes] == [-1.09375] * 3 + [0.0] * 3 + [2.59375] * 3
    assert [p.text for p in found.probes[:1]] == ["-1.09375"] and found.probes[0].prompt == PROMPTS[0]


def test_a_dose_that_fails_is_not_passed_over_for_one_further_out(made_up: list[list[float]]) -> None:
    adapter = adapted(sdpa())
    found = calibrated(adapter, coherence=by_c(lambda c: float(not 0.9 < c < 1.2)), rounds=4)
    assert found.positive is not None and 0.85 < found.positive <= 0.9 and found.negative == -32.0
    assert [t.holds for t in found.curve if t.c >= 2.0] == [True, True], "2 and 4 hold, and are not the answer"


def test_where_nothing_is_coherent_it_says_so(made_up: list[list[float]]) -> None:
    adapter = adapted(sdpa())
    found = calibrated(adapter, coherence=by_c(lambda c: float(c == 0)))
    assert found.positive is None and found.negative is None
    assert "no positive c is coherent: 0.03125 already has" in found.verdict and "no negative c is coherent: -0.03125" in found.verdict
    assert {p.c for p in found.probes} == {0.0}
    one = calibrated(adapter, coherence=by_c(lambda c: float(c <= 0)))
    assert one.positive is None and one.negative == -32.0


def test_where_everything_is_coherent_it_says_that_the_limit_may_lie_beyond(made_up: list[list[float]]) -> None:
    found = calibrated(adapted(sdpa()), coherence=by_c(lambda c: 1.0))
    assert (found.positive, found.negative) == (32.0, -32.0) and made_up[1:] == [[8.0, -8.0], [16.0, -16.0], [32.0, -32.0]]
    assert "every positive c tried is coherent, up to 32; the limit may lie beyond" in found.verdict


def test_floors_decide(made_up: list[list[float]]) -> None:
    def fading(texts: list[str]) -> list[float]:
        return [10 * max(0.0, 1 - abs(float(t)) / 4) for t in texts]  # 10 at c=0: what counts is the share of that

    adapter = adapted(sdpa())
    assert calibrated(adapter, coherence=fading, rounds=5, grid=[4.0]).positive == pytest.approx(0.8, abs=0.01)
    assert calibrated(adapter, coherence=fading, rounds=5, grid=[4.0], floors={"fading": 0.4}).positive == pytest.approx(2.4, abs=0.01)
    with pytest.raises(ValueError, match=r"floors has \['other'\]"):
        calibrated(adapter, coherence=fading, floors={"other": 0.4})


# --- on a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sdpa, lambda: t5(torch.float64)], ids=["llama", "t5"])
def test_the_curve_is_what_a_sweep_measures(make: Callable[[], Any]) -> None:
    """Every c that was tried, measured again by dose_response: the same numbers, so the same verdict."""
    model = make()
    adapter = adapted(model, std=0.2)
    found = calibrated(adapter, samples=2, floors={"distinct-3": 1.0, "perplexity": 1.0})
    again = ll.dose_response(
        model, adapter, [t.c for t in found.curve], PROMPTS, tokenizer=TOKENIZER, score=lambda texts: [0.0] * len(texts), progress=False,
        temperature=0.8, samples=2, max_new_tokens=8, max_rows=1000,
    )  # fmt: skip
    for tried in found.curve:
        want = again.at(tried.c).relative
        assert tried.numbers == pytest.approx(want, rel=1e-9)
        assert tried.holds == (want["distinct-3"] >= 1 and want["perplexity"] >= 1)
    assert any(not t.holds for t in found.curve) and found.curve[[t.c for t in found.curve].index(0.0)].holds
    for limit in (found.positive, found.negative):
        assert limit is None or [t.holds for t in found.curve if t.c == limit] == [True]


def test_a_perplexity_that_rose_is_told_as_the_multiple_that_it_is() -> None:
    """In the verdict, the table and the file: never a third, or 0.32, for three times as much."""
    adapter = adapted(sdpa(), std=0.5)
    found = calibrated(adapter, floors={"perplexity": 1 / 1.5, "distinct-3": 1e-6}, temperature=0.1)
    rows = str(found).splitlines()[1:-1]
    failed = [t for t in found.curve if not t.holds]
    assert failed and all(t.numbers["perplexity"] < 1 / 1.5 for t in failed)
    for tried, row, kept in zip(found.curve, rows, adapter.calibrated["curve"], strict=True):
        times = 1 / tried.numbers["perplexity"]
        assert kept["perplexity"] == pytest.approx(times) and kept["distinct-3"] == tried.numbers["distinct-3"]
        assert f" {times:.3g}x" in row
        assert tried.failure == ("" if tried.holds else f"perplexity {times:.3g}x c=0's, ceiling 1.5x")
    assert "c=0's, ceiling 1.5x" in found.verdict and found.verdict == adapter.calibrated["verdict"]


def test_the_result_is_kept_on_the_adapter_as_json() -> None:
    adapter = adapted(sdpa())
    found = calibrated(adapter)
    kept: Any = adapter.calibrated  # type: ignore[attr-defined]
    assert kept == found.to_dict() == json.loads(json.dumps(kept, allow_nan=False))
    assert list(kept) == ["positive", "negative", "mode", "curve", "verdict", "probes"]
    assert kept["mode"] == "largest" and [t["c"] for t in kept["curve"]] == sorted(t["c"] for t in kept["curve"])
    assert set(kept["curve"][0]) == {"c", "holds", "distinct-3", "perplexity", "failure"}
    assert set(kept["probes"][0]) == {"c", "prompt", "text"}
    head, *rows, verdict = str(found).splitlines()
    assert (
        head.split() == ["c", "distinct-3", "(x", "c=0's)", "perplexity", "(x", "c=0's)"]
        and len(rows) == len(found.curve)
        and verdict == found.verdict
    )


def test_it_may_be_detached_and_calibrated_for_a_model() -> None:
    model = sdpa()
    adapter = adapted(model)
    want = calibrated(adapter)
    adapter.detach()
    with pytest.raises(ValueError, match="not attached; say for which model"):
        calibrated(adapter)
    assert calibrated(adapter, model=model) == want and not adapter.attached


# --- a budget of divergence --------------------------------------------------------------------------------------------


def divergence_by_hand(model: Any, adapter: ll.Adapter, c: float, prompts: Sequence[str], texts: Sequence[str]) -> torch.Tensor:
    """KL(p_c || p_0) at every token of the texts, each row alone, from the definition."""
    found = []
    for prompt, text in zip(map(ids_of, prompts), map(ids_of, texts), strict=True):
        ids = torch.tensor([[*prompt, *text]])
        with torch.no_grad(), adapter(model, c=c):
            p = model(input_ids=ids).logits[0].softmax(-1)
        with torch.no_grad(), adapter(model, c=0.0):
            q = model(input_ids=ids).logits[0].softmax(-1)
        kl = (p * (p / q).log()).sum(-1)
        found += kl[len(prompt) - 1 : -1].tolist()
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("aggregate", ["mean", "rmse", "p95"])
def test_a_budget_over_given_texts_is_met_to_the_resolution(aggregate: str) -> None:
    model = double()
    adapter = adapted(model, std=0.2)
    texts, budget = ["w9 w10 w11", "w12", "w13 w14 w15 w16"], 0.05
    found = calibrated(adapter, mode="iso_kl", budget=budget, aggregate=aggregate, texts=texts, rounds=4, max_rows=2)
    of = {"mean": torch.mean, "rmse": lambda x: (x**2).mean().sqrt(), "p95": lambda x: x.quantile(0.95)}[aggregate]
    for limit, sign in ((found.positive, 1), (found.negative, -1)):
        assert limit is not None and limit * sign > 0
        assert float(of(divergence_by_hand(model, adapter, limit, PROMPTS, texts))) <= budget
        beyond = min(abs(t.c) for t in found.curve if t.c * sign > 0 and not t.holds) * sign
        assert float(of(divergence_by_hand(model, adapter, beyond, PROMPTS, texts))) > budget
        assert abs(beyond - limit) <= 0.5 / 4**4 * (1 + 1e-9)
    for tried in found.curve:
        by_hand = divergence_by_hand(model, adapter, tried.c, PROMPTS, texts)
        assert tried.numbers[f"kl_{aggregate}"] == pytest.approx(float(of(by_hand)), rel=1e-9, abs=1e-12)
    assert f"within {budget:g} nats" in found.verdict


def test_a_budget_over_one_s_own_text() -> None:
    """Over what is written at c, by hand, for every c that was tried."""
    model = double()
    adapter = adapted(model, std=0.2)
    found, compared = calibrated(adapter, mode="iso_kl", budget=0.1), 0
    for tried in found.curve:
        again = ll.dose_response(
            model, adapter, [tried.c], PROMPTS, tokenizer=TOKENIZER, score=lambda t: [0.0] * len(t), progress=False, temperature=0.8,
            max_new_tokens=8,
        )  # fmt: skip
        own = [r.text for r in again.readings if r.c == tried.c]
        if any("<" in text or len(text.split()) < 8 for text in own):
            continue  # special tokens are not shown in a text
        by_hand = divergence_by_hand(model, adapter, tried.c, PROMPTS, own)
        assert tried.numbers["kl_mean"] == pytest.approx(float(by_hand.mean()), rel=1e-9, abs=1e-12)
        compared += 1
    assert compared > 10 and found.positive is not None and found.negative is not None


def test_the_mean_hides_a_short_loop_that_the_others_show() -> None:
    calm, loop = [0.01] * 90, [5.0] * 10
    found = aggregates(calm + loop)
    assert found["kl_mean"] == pytest.approx(0.509) and found["kl_rmse"] == pytest.approx(math.sqrt((90 * 1e-4 + 250) / 100))
    assert found["kl_p95"] == 5.0


# --- nothing is left behind, and bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_come_out_as_they_went_in(fails: bool) -> None:
    def coherent(texts: list[str]) -> list[float]:
        if fails:
            raise ArithmeticError("mine")
        return [1.0] * len(texts)

    model = sdpa().train()
    adapter = adapted(model, c=0.7)
    before = state_of(model)
    if fails:
        with pytest.raises(ArithmeticError, match="mine"):
            calibrated(adapter, coherence=coherent)
        assert not adapter.calibrated, "a failed calibration is none"
    else:
        calibrated(adapter, coherence=coherent)
    assert_as_before(model, before)
    assert adapter.c == 0.7


@pytest.mark.fast
@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"grid": []}, "grid holds the sizes"),
        ({"grid": [-1.0, 1.0]}, "all above 0"),
        ({"sections": 1}, "sections must be at least 2"),
        ({"doublings": -1}, "at least 0, .*doublings=-1"),
        ({"mode": "smallest"}, '"largest" or "iso_kl"'),
        ({"mode": "iso_kl"}, "needs a budget"),
        ({"mode": "iso_kl", "budget": 0.0}, "needs a budget above 0"),
        ({"mode": "iso_kl", "budget": 0.1, "aggregate": "max"}, "aggregate must be one of"),
        ({"mode": "iso_kl", "budget": 0.1, "coherence": "perplexity"}, "belong to mode="),
        ({"mode": "iso_kl", "budget": 0.1, "texts": ["w5"]}, "one each: got 1 for 3"),
        ({"mode": "iso_kl", "budget": 0.1, "texts": ["w5", "", "w6"]}, r"texts \[1\] have no tokens"),
        ({"budget": 0.1}, 'budget and texts belong to mode="iso_kl"'),
        ({"texts": ["w5"] * 3}, 'budget and texts belong to mode="iso_kl"'),
        ({"coherence": "fluency"}, "unknown"),
        ({"coherence": lambda texts: [0.0] * len(texts)}, "nothing can be compared"),
        ({"prompts": []}, "at least one"),
        ({"temperature": 0.0, "samples": 2}, "give a temperature"),
    ],
)
def test_what_cannot_be_meant_is_refused(keywords: dict[str, Any], says: str) -> None:
    adapter = adapted(sdpa())
    with pytest.raises(ValueError, match=says):
        calibrated(adapter, **keywords)
