"""Does a sweep of doses measure what it says: separate runs in one batch, the base's perplexity, effect sizes by the book?"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_lite as ll
from lora_lite.steering.coherence import distinct, perplexity
from lora_lite.steering.response import Reading, effect_size
from lora_lite.steering.writing import Prompt, Sample, Writing, on_model, write
from tests.models import VARIANTS, Row, attach, each_variant, llama, opt, randomise, t5
from tests.words import ids_of, word_tokenizer

SEVEN = [-1.5, -1.0, -0.4, 0.0, 0.3, 1.0, 2.0]
PROMPTS = ["w5 w17 w40 w9", "w88", "w23 w61"]  # of three lengths: padding in every batch
TOKENIZER = word_tokenizer()
NEW = 6
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(torch.float64, attention="sdpa"),  # transformers' eager attention makes NaN of a padded row in float64
    "opt": lambda: with_sdpa(opt(torch.float64)),
    "t5": lambda: t5(torch.float64),
}


def with_sdpa(model: Any) -> Any:
    model.set_attn_implementation("sdpa")
    return model


def sevens(texts: list[str]) -> list[float]:
    """A trait: how many words hold a 7."""
    return [float(sum("7" in word for word in text.split())) for text in texts]


def adapted(model: nn.Module, row: Row = VARIANTS["lora"], std: float = 0.6, **keywords: Any) -> ll.Adapter:
    return randomise(attach(model, row, dtype=torch.float64, **keywords), std=std)


def swept(model: Any, adapter: ll.Adapter, cs: Any = SEVEN, prompts: Any = PROMPTS, **keywords: Any) -> ll.DoseResponse:
    given = {"tokenizer": TOKENIZER, "score": sevens, "max_new_tokens": NEW, "progress": False, **keywords}
    return ll.dose_response(model, adapter, cs, prompts, **given)


def texts(found: ll.DoseResponse) -> dict[tuple[float, int], str]:
    return {(r.c, r.prompt): r.text for r in found.readings}


def alone(model: Any, adapter: ll.Adapter, c: float, prompt: str, **keywords: Any) -> str:
    """One prompt at one c, without padding and without company."""
    ids = torch.tensor([ids_of(prompt)])
    with adapter(model, c=c):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **keywords)
    new = out[0, 1:] if model.config.is_encoder_decoder else out[0, ids.shape[1] :]
    return TOKENIZER.decode(new, skip_special_tokens=True)


# --- one batch is seven runs -------------------------------------------------------------------------------------------


@pytest.mark.fast
@each_variant
def test_one_batched_generate_over_seven_c_is_seven_separate_runs(row: Row) -> None:
    model = MODELS["llama"]()
    adapter = adapted(model, row)
    found = texts(swept(model, adapter, coherence=()))
    assert found == {(c, i): alone(model, adapter, c, prompt) for c in SEVEN for i, prompt in enumerate(PROMPTS)}
    assert len(set(found.values())) > len(PROMPTS), "if c changes no text, nothing was shown"


@pytest.mark.parametrize("row", [VARIANTS[k] for k in ("lora", "ia3_ff")], ids=["lora", "ia3_ff"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_separate_runs_on_every_architecture_and_under_beams(name: str, beams: int, row: Row) -> None:
    model = MODELS[name]()
    adapter = adapted(model, row, std=1.0)
    found = texts(swept(model, adapter, coherence=(), num_beams=beams))
    assert found == {(c, i): alone(model, adapter, c, p, num_beams=beams) for c in SEVEN for i, p in enumerate(PROMPTS)}
    assert len(set(found.values())) > len(PROMPTS)


def test_it_is_one_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["llama"]()
    adapter, generate, batches = adapted(model), model.generate, list[int]()

    def counted(**keywords: Any) -> Any:
        batches.append(len(keywords["input_ids"]))
        return generate(**keywords)

    monkeypatch.setattr(model, "generate", counted)
    swept(model, adapter)
    assert batches == [len(SEVEN) * len(PROMPTS)]
    swept(model, adapter, max_rows=8)
    assert batches[1:] == [8, 8, 5]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_is_the_same_in_any_batch(temperature: float) -> None:
    model = MODELS["llama"]()
    adapter, keywords = adapted(model), {"temperature": temperature, "samples": 2 if temperature else 1}
    whole = swept(model, adapter, **keywords)
    split = swept(model, adapter, **keywords, max_rows=5)
    assert [(r.c, r.prompt, r.draw, r.text, r.trait) for r in split.readings] == [
        (r.c, r.prompt, r.draw, r.text, r.trait) for r in whole.readings
    ]
    fewer = swept(model, adapter, [1.0], **keywords)
    assert texts(fewer) == {key: text for key, text in texts(whole).items() if key[0] in (0.0, 1.0)}


def test_samples_differ_and_follow_their_seed() -> None:
    model = MODELS["llama"]()
    adapter = adapted(model)
    one, again, other = (swept(model, adapter, [1.0], temperature=1.0, samples=3, seed=seed) for seed in (0, 0, 1))
    assert one == again and texts(one) != texts(other)
    assert len({r.text for r in one.readings if r.c == 1}) == 3 * len(PROMPTS)


def test_sampling_draws_from_the_softmax_at_that_temperature() -> None:
    """2000 first tokens against the model's own probabilities: no share is further off than five standard errors."""
    model = MODELS["llama"]()
    adapter, n, temperature = adapted(model), 2000, 0.7
    with on_model(model, adapter) as here:
        how = Writing(1, temperature, samples=n, max_rows=n, progress=False)
        drawn = Counter(s.ids[0] for s in write(model, here, TOKENIZER, [Prompt("w5", (5,))], [1.0], how))
    with torch.no_grad(), adapter(model, c=1.0):
        p = (model(input_ids=torch.tensor([[5]])).logits[0, -1] / temperature).softmax(-1)
    shares = torch.tensor([drawn[i] / n for i in range(len(p))], dtype=torch.float64)
    assert ((shares - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()
    assert ((shares - p.roll(1)).abs() > 5 * (p * (1 - p) / n).sqrt() + 1 / n).any(), "a wrong distribution would be seen"


def test_text_ends_where_the_model_ends_it() -> None:
    model = MODELS["llama"]()
    adapter = adapted(model)
    prompts = [Prompt(p, tuple(ids_of(p))) for p in PROMPTS]

    def ids() -> list[list[int]]:
        with on_model(model, adapter) as here:
            return [list(s.ids) for s in write(model, here, TOKENIZER, prompts, SEVEN, Writing(NEW, progress=False))]

    free = ids()
    end = free[0][2]
    model.generation_config.eos_token_id = [end, 127]
    ended = ids()
    assert ended == [row[: row.index(end) + 1] if end in row else row for row in free]
    assert any(len(row) < NEW for row in ended) and any(len(row) == NEW for row in ended)


def test_logits_that_are_nan_at_zero_are_told() -> None:
    model = llama(torch.float64, attention="eager")
    with pytest.raises(RuntimeError, match=r"NaN at c=0.*sdpa"):
        swept(model, adapted(model))


def test_prompts_may_be_tokens_and_may_be_empty() -> None:
    model = MODELS["llama"]()
    adapter = adapted(model)
    as_text = swept(model, adapter)
    as_ids = swept(model, adapter, prompts=[ids_of(p) for p in PROMPTS])
    assert texts(as_ids) == texts(as_text) and as_ids.prompts == as_text.prompts
    with pytest.raises(ValueError, match="neither a beginning nor an end"):
        swept(model, adapter, prompts=[""])
    beginning = word_tokenizer()
    beginning.bos_token = "w5"
    assert texts(swept(model, adapter, prompts=[""], tokenizer=beginning)) == texts(swept(model, adapter, prompts=["w5"]))


# --- coherence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_perplexity_is_the_base_s_of_the_continuation_alone(name: str) -> None:
    """Token by token, each text alone and unpadded, on the model without an adapter."""
    model = MODELS[name]()
    adapter = adapted(model)
    found = swept(model, adapter, max_rows=4)
    adapter.detach()
    assert found.measures == ("distinct-3", "perplexity")
    for reading in found.readings:
        start, text = ids_of(PROMPTS[reading.prompt]), ids_of(reading.text)
        if len(text) < NEW:
            continue  # padding and unknown words are not shown in a text
        total = 0.0
        for i, token in enumerate(text):
            ids = torch.tensor([start if name == "t5" else [*start, *text[:i]]])
            inputs = {"decoder_input_ids": torch.tensor([[0, *text[:i]]])} if name == "t5" else {}
            with torch.no_grad():
                total -= float(model(input_ids=ids, **inputs).logits[0, -1].log_softmax(-1)[token])
        assert math.log(reading.coherence["perplexity"]) == pytest.approx(total / len(text), rel=1e-9)


def test_perplexity_is_taken_with_a_gated_history_shut() -> None:
    model = MODELS["llama"]()
    kept = adapted(model, name="kept")
    kept.detach()
    adapter = adapted(model)
    samples = [Sample(1.0, 0, 0, (5, 6), (7, 8, 9), "")]
    with torch.no_grad():
        base = perplexity(model, adapter, samples)
        history = ll.HistoryBake(model, [(kept, 1.0)], gate=adapter)
        assert perplexity(model, adapter, samples) == base
        history.set_gate(None)
        assert perplexity(model, adapter, samples) != base


def test_distinct_counts_n_grams() -> None:
    loop = [1, 2, 3] * 4
    assert distinct([[1, 2, 3, 4], [7, 7, 7, 7, 7], loop, [1, 2], []]) == [1.0, 1 / 3, 3 / 10, 1.0, 1.0]
    assert distinct([[7, 7, 7, 7]], n=1) == [1 / 4]


def test_measures_of_one_s_own_stand_beside_the_others() -> None:
    def words(texts: list[str]) -> torch.Tensor:
        return torch.tensor([len(set(t.split())) for t in texts])

    model = MODELS["llama"]()
    found = swept(model, adapted(model), coherence=("perplexity", words))
    assert found.measures == ("perplexity", "words")
    for reading in found.readings:
        assert reading.coherence["words"] == len(set(reading.text.split()))
    here = [len(set(r.text.split())) for r in found.readings if r.c == 1.0]
    there = [len(set(r.text.split())) for r in found.readings if r.c == 0.0]
    assert found.at(1.0).relative["words"] == pytest.approx(np.mean(here) / np.mean(there), rel=1e-12)
    there, here = ([r.coherence["perplexity"] for r in found.readings if r.c == c] for c in (0.0, 1.0))
    ratio = np.exp(np.log(there).mean() - np.log(here).mean())
    assert found.at(1.0).relative["perplexity"] == pytest.approx(ratio, rel=1e-12)
    assert found.at(0.0).relative == {"perplexity": 1.0, "words": 1.0}


# --- effect sizes ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=8))
def test_effect_size_is_cohen_s_d(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    pooled = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    if pooled > 1e-6:
        assert effect_size(list(a), list(b)) == pytest.approx((a.mean() - b.mean()) / pooled, rel=1e-6, abs=1e-9)


def test_effect_size_where_prompts_do_not_differ() -> None:
    assert effect_size([1.0], [0.0]) is None
    assert effect_size([1.0, 1.0], [0.0, 0.0]) == math.inf and effect_size([0.0, 0.0], [1.0, 1.0]) == -math.inf
    assert effect_size([1.0, 1.0], [1.0, 1.0]) == 0.0


def test_samples_of_one_prompt_are_no_evidence_of_their_own() -> None:
    model = MODELS["llama"]()
    found = swept(model, adapted(model), [1.0], temperature=1.0, samples=4)
    by_prompt = {c: [np.mean([r.trait for r in found.readings if (r.c, r.prompt) == (c, i)]) for i in range(3)] for c in (0.0, 1.0)}
    dose = found.at(1.0)
    assert dose.n == 3 and dose.trait == pytest.approx(np.mean(by_prompt[1.0]))
    assert dose.error == pytest.approx(np.std(by_prompt[1.0], ddof=1) / 3**0.5)
    pooled = np.sqrt((np.var(by_prompt[1.0], ddof=1) + np.var(by_prompt[0.0], ddof=1)) / 2)
    assert found.effects()[1.0] == pytest.approx((np.mean(by_prompt[1.0]) - np.mean(by_prompt[0.0])) / pooled)
    assert found.effects()[0.0] == 0.0


# --- the null control --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [True, False])
def test_the_null_is_swept_by_itself(attached: bool) -> None:
    model = MODELS["llama"]()
    adapter = adapted(model)
    alone_before = swept(model, adapter)
    null = randomise(attach(model, VARIANTS["lora"], dtype=torch.float64, name="null"), seed=5, std=0.6)
    if not attached:
        null.detach()
        null.name = adapter.name  # a name that is taken does not matter
    found = swept(model, adapter, null=null)
    assert found.readings == alone_before.readings
    assert found.null is not None and found.null.cs == found.cs
    assert [r for r in found.null.readings if r.c == 0] == [r for r in found.readings if r.c == 0]
    assert null.attached is attached
    adapter.detach()
    assert swept(model, null).readings == found.null.readings
    assert found.null.readings != found.readings


def test_an_adapter_that_is_not_attached_is_measured_and_left_detached() -> None:
    model = MODELS["llama"]()
    adapter = adapted(model)
    want = swept(model, adapter)
    adapter.detach()
    names = [n for n, _ in model.named_parameters()]
    assert swept(model, adapter) == want
    assert not adapter.attached and adapter.name == "default" and [n for n, _ in model.named_parameters()] == names


# --- the value ---------------------------------------------------------------------------------------------------------


def test_the_result_survives_json_and_prints_as_a_table() -> None:
    model = MODELS["llama"]()
    adapter = adapted(model)
    null = copy.deepcopy(adapter)
    found = swept(model, adapter, [1.0, -1.0], null=null)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert type(found).from_dict(plain) == found
    assert [d["c"] for d in plain["doses"]] == [-1.0, 0.0, 1.0]
    head, *rows, said = str(found).splitlines()
    assert "sevens" in head and "null effect" in head and "perplexity" in head
    assert [row.split()[0] for row in rows] == ["-1", "0", "1"] and "Cohen" in said
    assert "perplexity (x c=0's)" in head
    for row, dose in zip(rows, found.doses, strict=True):
        there, here = found.at(0.0).coherence["perplexity"], dose.coherence["perplexity"]
        assert row.endswith(f" {here:.3g} ({here / there:.2f}x)")
    with pytest.raises(KeyError, match=r"0\.7 was not measured"):
        found.at(0.7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.trait = "other"  # type: ignore[misc]


def test_an_infinite_effect_is_json_still() -> None:
    model = MODELS["llama"]()
    found = swept(model, adapted(model), [1.0], score=lambda texts: [float(i >= len(PROMPTS)) for i in range(len(texts))])
    assert found.effects()[1.0] == math.inf and found.trait == "trait"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["doses"][1]["effect"] is None
    assert "+inf" in str(found)


def table(traits: dict[float, float]) -> ll.DoseResponse:
    readings = [Reading(c, i, 0, "", t, {"distinct-3": 1.0, "perplexity": 9.0}) for c, t in sorted(traits.items()) for i in range(2)]
    return ll.DoseResponse(("", ""), "trait", ("distinct-3", "perplexity"), tuple(readings))


@pytest.mark.parametrize(
    ("curve", "region"),
    [
        ({-2: 0.0, -1: 0.0, -0.5: 0.05, 0: 0.5, 0.5: 0.95, 1: 1.0, 2: 1.0}, (-0.5, 0.5)),
        ({-2: 1.0, -1: 1.0, 0: 0.5, 1: 0.0, 2: 0.0}, (-1, 1)),
        ({-2: 0.5, 0: 0.5, 2: 0.6}, None),
        ({-2: 0.0, 0: 0.0, 2: 1.0}, (0, 2)),
        ({-2: 0.0, -1: 1.0, 0: 0.1, 2: 0.9}, (-2, -1)),
    ],
    ids=["rising", "falling", "flat", "late", "there and back"],
)
def test_the_stretch_is_where_the_trait_makes_its_way(curve: dict[float, float], region: tuple[float, float] | None) -> None:
    found = table({float(c): t for c, t in curve.items()})
    assert found.stretch(least=0.2) == region
    assert found.gradual(least=0.2) is None, "of so few doses it is a place to look closer, not more"
    assert ("no gradual stretch was resolved" if region else "hardly moves") in found.way(least=0.2)


def test_the_stretch_leaves_out_the_flat_before_and_after_it() -> None:
    """A level that wavers, as the demo's does: its lowest dose and the tenth of the range above that began it while all was flat."""
    flat = {-2.0: 0.02, -1.75: 0.02, -1.5: 0.0, -1.25: 0.02, -1.0: 0.08, -0.75: 0.11, -0.5: 0.12}
    steep = {-0.25: 0.19, -0.125: 0.3, 0.0: 0.45, 0.125: 0.58, 0.25: 0.77}
    late = {0.375: 0.89, 0.5: 0.88, 0.75: 0.95, 1.0: 0.95, 1.5: 0.98, 2.0: 1.0}
    assert table(flat | steep | late).stretch() == (-0.5, 0.375)
    falling = {c: 1 - t for c, t in (flat | steep | late).items()}
    assert table(falling).stretch() == (-0.5, 0.375)
    assert table({-c: t for c, t in (flat | steep | late).items()}).stretch() == (-0.375, 0.5)


def test_a_trait_that_moves_all_along_has_no_flat_to_leave_out() -> None:
    low, high = table({c / 8: c / 8 for c in range(-8, 9)}).stretch() or (0, 0)
    assert low <= -0.75 and high >= 0.75


RISING = {c / 8: 1 / (1 + math.exp(-c)) for c in range(-8, 9)}


def noisy(curve: dict[float, float], spread: float, prompts: int = 8, seed: int = 0) -> ll.DoseResponse:
    draw = random.Random(seed)
    readings = [
        Reading(c, i, 0, "", t + draw.gauss(0, spread), {"distinct-3": 1.0, "perplexity": 9.0})
        for c, t in sorted(curve.items())
        for i in range(prompts)
    ]
    return ll.DoseResponse(("",) * prompts, "trait", ("distinct-3", "perplexity"), tuple(readings))


def test_gradual_is_claimed_of_what_was_resolved() -> None:
    found = noisy(RISING, 0.1)
    assert found.gradual() == found.stretch() is not None and "trait is gradual from c = -0." in found.way()
    assert noisy(RISING, 3.0).gradual() is None, "the same curve, lost in its standard errors"
    assert noisy(RISING, 0.1, prompts=1).gradual() is None, "one prompt has no standard error"
    claimed = [noisy(dict.fromkeys(RISING, 0.5), 0.1, seed=seed) for seed in range(200)]
    assert all(f.stretch() for f in claimed) and sum(f.gradual() is not None for f in claimed) <= 10, "of noise hardly ever"
    lost = noisy(dict.fromkeys(RISING, 0.5), 0.1)
    assert lost.gradual() is None and "the change of trait is not clear of its standard errors" in lost.way()


def test_a_switch_is_not_called_gradual() -> None:
    """c=0 lies in the middle of one: a dose between the ends that proves nothing."""
    found = noisy({c: 0.5 + 0.5 * (c > 0) - 0.5 * (c < 0) for c in RISING}, 0.01)
    assert found.stretch() == (-0.125, 0.125) and found.gradual() is None
    assert "from c = -0.125 to 0.125, and there are 1 doses in between, of 3 needed" in found.way()


def test_two_sweeps_are_one_table() -> None:
    one, two = table({-1.0: 0.0, 0.0: 0.5, 1.0: 1.0}), table({0.0: 0.7, 0.5: 0.9})
    both = one.joined(two)
    assert both.cs == [-1.0, 0.0, 0.5, 1.0] and both.at(0.5).trait == 0.9
    assert both.at(0.0) == one.at(0.0), "a dose in both keeps its readings"
    with_null = dataclasses.replace(one, null=one).joined(dataclasses.replace(two, null=two))
    assert with_null.null is not None and with_null.null.cs == both.cs
    with pytest.raises(ValueError, match="differ in prompts, trait or measures"):
        one.joined(dataclasses.replace(two, trait="another"))
    with pytest.raises(ValueError, match="only one has a null"):
        one.joined(dataclasses.replace(two, null=two))


def test_the_plot_shows_a_stretch_once_more_where_that_makes_it_larger(tmp_path: Path) -> None:
    found = table({-1.0: 0.0, 0.0: 0.5, 1.0: 1.0})
    found.plot(tmp_path / "plain.png")
    found.plot(tmp_path / "zoomed.png", zoom=(-0.3, 0.4), title="a title")
    found.plot(tmp_path / "all of it.png", zoom=found.gradual())
    table({0.0: 0.5}).plot(tmp_path / "one dose.png")
    width = {p.name: int.from_bytes(p.read_bytes()[16:20]) for p in tmp_path.iterdir()}  # of a PNG's header
    assert width["zoomed.png"] > 1.3 * width["plain.png"] == 1.3 * width["one dose.png"] == 1.3 * width["all of it.png"]


def drawn(found: ll.DoseResponse, monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> list[Any]:
    """The axes of its figure, row by row."""
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (self.draw_without_rendering(), kept.append(self)))
    found.plot("never.png", **keywords)
    return kept[0].axes


def test_a_perplexity_that_stays_is_a_line_on_an_axis_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(log 9) is 9.000000000000002: an axis as narrow as that had no numbers, and took the figure apart."""
    low, high = drawn(table({-1.0: 0.0, 0.0: 0.5, 1.0: 1.0}), monkeypatch)[-1].get_ylim()
    assert low < 8 < 10 < high < 12


def test_a_panel_says_of_its_stretch_what_the_doses_say(monkeypatch: pytest.MonkeyPatch) -> None:
    clear, lost = noisy(RISING | {-4.0: 0.0, 4.0: 1.0}, 0.02), noisy(dict.fromkeys(RISING, 0.5) | {4.0: 0.5}, 0.1)
    ends = clear.gradual()
    assert ends is not None
    seen = f"trait rises from {clear.at(ends[0]).trait:.2f} to {clear.at(ends[1]).trait:.2f}"
    whole, part = (axis.get_title() for axis in drawn(clear, monkeypatch, zoom=ends)[:2])
    assert whole == "every dose, c from -4 to 4" and part == f"the shaded part, larger: {seen}"
    assert drawn(clear, monkeypatch, zoom=(-0.5, 0.3))[1].get_title() == "the shaded part, larger: c from -0.5 to 0.3"
    assert "gradual" not in drawn(lost, monkeypatch, zoom=(-0.5, 0.5))[1].get_title()
    assert drawn(clear, monkeypatch, zoom=(-3.0, 3.0))[0].get_title() == "shaded: c from -3 to 3"
    assert len(drawn(lost, monkeypatch, zoom=lost.gradual())) == 3, "nothing to claim, no second column"


@pytest.mark.parametrize("zoom", [(0.5, 1.0), (-1.0, -0.7), (-0.3, 0.3)])
def test_a_zoom_shows_whole_markers_and_lines_up_to_its_edges(zoom: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    for axis in drawn(noisy(RISING, 0.02), monkeypatch, zoom=zoom)[1::2]:
        low, high = axis.get_xlim()
        line, markers = axis.lines[0], axis.lines[1]
        assert line.get_xdata()[0] <= max(low, -1.0) and line.get_xdata()[-1] >= min(high, 1.0), "the line does not end inside the panel"
        assert not markers.get_clip_on() and len(markers.get_xdata()) >= 3
        assert max(-1.0 - low, high - 1.0) <= 0.1, "no strip where nothing was measured"


@pytest.mark.parametrize("zoom", [(1.0, -1.0), (0.5, 0.5), (2.0, 3.0), (math.nan, 1.0)])
def test_a_zoom_that_is_no_stretch_of_the_doses_is_refused(zoom: tuple[float, float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"zoom is a stretch .*from -1 to 1; got"):
        table({-1.0: 0.0, 0.0: 0.5, 1.0: 1.0}).plot(tmp_path / "a.png", zoom=zoom)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("worst", [1.3, 2.0, 5.0, 20.0, 500.0, 1e9])
def test_a_perplexity_can_be_read_off(worst: float, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = [
        Reading(c, i, 0, "", 0.5, {"distinct-3": 1.0, "perplexity": 7.0 * worst ** abs(c)})
        for c in (-1.0, -0.5, 0.0, 0.5, 1.0)
        for i in range(2)
    ]
    found = ll.DoseResponse(("", ""), "trait", ("distinct-3", "perplexity"), tuple(readings))
    trait, flat, axis = drawn(found, monkeypatch)
    low, high = axis.get_ylim()
    shown = [t.get_text() for t in axis.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert 4 <= len(shown) <= 12 and all(float(text) > 0 for text in shown), shown
    assert flat.get_window_extent().height < 0.65 * trait.get_window_extent().height and flat.get_ylim()[0] > 0.5


def test_the_plot_makes_its_folder(tmp_path: Path) -> None:
    table({0.0: 0.5, 1.0: 1.0}).plot(tmp_path / "nn" / "oo" / "x.png")
    assert (tmp_path / "nn" / "oo" / "x.png").stat().st_size > 5000


def test_the_plot_is_a_file(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    adapter = adapted(model)
    swept(model, adapter, null=copy.deepcopy(adapter)).plot(tmp_path / "response.svg")
    assert (tmp_path / "response.svg").stat().st_size > 5000


def test_without_matplotlib_the_plot_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["llama"]()
    found = swept(model, adapted(model))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lora_lite\[plot\]'"):
        found.plot(tmp_path / "response.png")


# --- nothing is left behind --------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    weights = {n: (p, p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for n, m in model.named_modules()]
    return {"weights": weights, "hooks": hooks, "random": (torch.get_rng_state(), np.random.get_state()[1].tolist())}  # type: ignore[index]


def assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after["hooks"] == before["hooks"]
    assert torch.equal(after["random"][0], before["random"][0]) and after["random"][1] == before["random"][1]
    assert list(after["weights"]) == list(before["weights"])
    for name, (p, value, flag) in before["weights"].items():
        now, _, now_flag = after["weights"][name]
        assert now is p and torch.equal(p, value) and now_flag is flag


@pytest.mark.parametrize("fails", ["nothing", "score", "generate", "coherence"])
@pytest.mark.parametrize("attached", [True, False])
def test_the_model_and_the_random_state_come_out_as_they_went_in(fails: str, attached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ArithmeticError("mine")

    model = MODELS["llama"]().train()
    adapter = adapted(model, c=0.7)
    if not attached:
        adapter.detach()
    keywords = {fails: broken} if fails in ("score", "coherence") else {}
    if fails == "generate":
        monkeypatch.setattr(model, "generate", broken)
    before = state_of(model)
    if fails == "nothing":
        swept(model, adapter, temperature=1.0)
    else:
        with pytest.raises(ArithmeticError, match="mine"):
            swept(model, adapter, temperature=1.0, **keywords)
    assert_as_before(model, before)
    assert adapter.c == 0.7 and adapter.attached is attached


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"cs": []}, "cs is empty"),
        ({"cs": [float("nan")]}, "finite"),
        ({"prompts": []}, "at least one"),
        ({"prompts": "w5"}, "list of strings"),
        ({"score": lambda texts: [1.0]}, r"24 texts and returned 1 numbers"),
        ({"score": lambda texts: [math.nan] * len(texts)}, "finite numbers; it returned nan"),
        ({"coherence": "fluency"}, r"fluency.*distinct-3, perplexity"),
        ({"coherence": ("perplexity", "perplexity")}, "share a name"),
        ({"coherence": lambda texts: [0.0] * (len(texts) - 1)}, "returned 23 numbers"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"samples": 4}, "give a temperature"),
        ({"do_sample": True}, r"do_sample.*temperature="),
        ({"num_return_sequences": 2}, r"samples="),
        ({"temperature": 1.0, "num_beams": 2}, "beams are greedy"),
    ],
)
def test_what_cannot_be_meant_is_refused(keywords: dict[str, Any], says: str) -> None:
    model = MODELS["llama"]()
    adapter = adapted(model)
    with pytest.raises(ValueError, match=says):
        swept(model, adapter, **{"cs": [*SEVEN, -2.0], **keywords})


def test_a_null_that_is_no_control_is_refused() -> None:
    model = MODELS["llama"]()
    adapter = adapted(model)
    with pytest.raises(ValueError, match="null is the adapter itself"):
        swept(model, adapter, null=adapter)
    with pytest.raises(ValueError, match="attached to another"):
        swept(MODELS["llama"](), adapter)
    adapter.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        swept(model, adapter)


def test_a_measure_that_is_nothing_at_zero_cannot_be_compared() -> None:
    model = MODELS["llama"]()
    found = swept(model, adapted(model), coherence=lambda texts: [0.0] * len(texts))
    with pytest.raises(ValueError, match="nothing can be compared"):
        found.doses  # noqa: B018


def test_prompts_of_tokens_need_a_tokenizer_that_decodes_and_no_more() -> None:
    """It may be any object: nothing is read by it, only what is written."""

    class Numbers:
        pad_token_id, eos_token_id, bos_token_id = 0, None, None

        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join(map(str, ids))

        def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
            return [self.decode(row) for row in rows]

    model = llama()
    adapter = ll.attach(model, ll.LoRAConfig(r=2), seed=0)
    found = ll.dose_response(
        model, adapter, [1.0], [[3, 4, 5]], tokenizer=Numbers(), score=lambda texts: list(map(len, texts)), coherence=("distinct-3",),
        max_new_tokens=3, progress=False,
    )  # fmt: skip
    assert 1.0 in found.cs and len(found.readings[0].text.split()) == 3
