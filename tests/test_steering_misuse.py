"""Is what is handed to steering by mistake named, with how to make the right thing? Without the typing hook, which would speak first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_lite as ll
from tests.models import llama
from tests.words import word_tokenizer

pytestmark = pytest.mark.untyped

GIVEN: Any = [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}] * 4
PAIRS = ll.ContrastivePairs(GIVEN)
LORA = ll.LoRAConfig(r=2)
QUIET: dict[str, Any] = {"steps": 1, "progress": False}
AS_PAIRS = r"ll\.ContrastivePairs\(\.\.\.\), or ContrastivePairs\.from_jsonl"

Call = Callable[[Any, Any, Any, Path], object]  # model, adapter, tokenizer, folder
CALLS: dict[str, tuple[Call, str]] = {
    "pairs = a list": (lambda m, a, t, _: ll.train_steering(m, a, GIVEN, t, **QUIET), f"pairs is list .*make it {AS_PAIRS}"),
    "pairs = a file": (lambda m, a, t, _: ll.train_steering(m, a, "p.jsonl", t, **QUIET), f"pairs is str 'p.jsonl'.*{AS_PAIRS}"),  # type: ignore[arg-type]
    "validation = a list": (
        lambda m, a, t, _: ll.train_steering(m, a, PAIRS, t, validation=GIVEN, **QUIET),
        f"validation is list .*{AS_PAIRS}",
    ),
    "a null of a list": (lambda m, a, t, _: ll.null_control(m, a, GIVEN, t, **QUIET), f"pairs is list .*{AS_PAIRS}"),
    "rounds of a list": (lambda m, a, t, d: ll.steering_rounds(m, LORA, GIVEN, ["w1"], d, tokenizer=t), f"pairs is list .*{AS_PAIRS}"),
    "tokenizer = its name": (
        lambda m, a, _, d: ll.train_steering(m, a, PAIRS, "tok", **QUIET),
        r"tokenizer is str 'tok'; give the tokenizer itself, AutoTokenizer\.from_pretrained",
    ),
    "rounds without a tokenizer": (
        lambda m, a, _, d: ll.steering_rounds(m, LORA, PAIRS, ["w1"], d, validation=0.5, tokenizer=None),
        r"tokenizer is None; what is written has to be read: give the model's",
    ),
    "doses without a tokenizer": (lambda m, a, _, d: ll.dose_response(m, a, [1], ["w1"], tokenizer=None, score=len), "tokenizer is None"),
    "a calibration by a name": (lambda m, a, _, d: ll.calibrate_c(a, ["w1"], tokenizer="tok"), "tokenizer is str 'tok'"),
    "no score": (
        lambda m, a, t, d: ll.dose_response(m, a, [1], ["w1"], tokenizer=t, score=None),  # type: ignore[arg-type]
        r"score is a function of texts, a list, to one number each; got NoneType None",
    ),
    "pairs of nothing": (lambda *_: ll.ContrastivePairs(None), "takes a list of pairs.*got NoneType None"),  # type: ignore[arg-type]
    "pairs of a number": (lambda *_: ll.ContrastivePairs(3), "takes a list of pairs.*got int 3"),  # type: ignore[arg-type]
    "pairs of one pair": (lambda *_: ll.ContrastivePairs(GIVEN[0]), "takes a list of pairs.*got dict"),
}


@pytest.mark.parametrize(("call", "said"), CALLS.values(), ids=CALLS)
def test_a_mistake_is_named_with_what_was_meant(call: Call, said: str, tmp_path: Path) -> None:
    model = llama()
    adapter = ll.attach(model, LORA, seed=0)
    with pytest.raises(TypeError, match=said):
        call(model, adapter, word_tokenizer(), tmp_path / "never")
    assert not (tmp_path / "never").exists() and adapter.attached and not adapter.calibrated
