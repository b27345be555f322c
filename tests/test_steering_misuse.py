"""Is what is handed to steering by mistake named, with how to make the right thing? Without the typing hook, which would speak first."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll
from lora_lite.cli.errors import UserError
from lora_lite.cli.generate import Generation, generate
from lora_lite.steering.response import DoseResponse, Reading
from tests.models import llama, mlp
from tests.words import word_tokenizer

pytestmark = pytest.mark.untyped

GIVEN: Any = [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}] * 4
PAIRS = ll.ContrastivePairs(GIVEN)
LORA = ll.LoRAConfig(r=2)
QUIET: dict[str, Any] = {"steps": 1, "progress": False}
AS_PAIRS = r"ll\.ContrastivePairs\(\.\.\.\), or ContrastivePairs\.from_jsonl"

FAR = ll.ContrastivePairs([([1], [10**6], [3])] * 4)
IDS = torch.tensor([[1, 2, 3]])
LOGITS, ROW, FREE = torch.zeros(1, 3, 5), torch.tensor([[0, 1, 2]]), torch.nn.Parameter(torch.ones(2))
TABLE = DoseResponse(("",), "t", (), (Reading(0.0, 0, 0, "", 0.5, {}),))


def sweep(model: Any, adapter: Any, tokenizer: Any, cs: Any = (1.0,), prompts: Any = ("w1",), **keywords: Any) -> object:
    given = {"tokenizer": tokenizer, "score": lambda texts: [1.0] * len(texts), "max_new_tokens": 2, "progress": False} | keywords
    return ll.dose_response(model, adapter, cs, prompts, **given)


def calibrate(adapter: Any, tokenizer: Any, **keywords: Any) -> object:
    mode = {"mode": "iso_kl", "budget": 1.0} if "texts" in keywords else {}
    return ll.calibrate_c(adapter, ["w1"], tokenizer=tokenizer, progress=False, **mode | keywords)


def train(model: Any, adapter: Any, tokenizer: Any, **keywords: Any) -> object:
    return ll.train_steering(model, adapter, PAIRS, tokenizer, **QUIET | keywords)


def shifts(model: Any, adapter: Any, batches: Any = IDS) -> object:
    return ll.block_shifts(model, adapter, batches)


def rounds(model: Any, tokenizer: Any, folder: Any, config: Any = LORA, prompts: Any = ("w1",), **keywords: Any) -> object:
    given = {"tokenizer": tokenizer, "rounds": 1, "validation": 0.5, "progress": False} | keywords
    return ll.steering_rounds(model, config, PAIRS, prompts, folder, **given)


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
    "a trained name": (lambda m, a, t, _: train(m, "a.safetensors", t), "adapter is str 'a.safetensors'; give the Adapter that ll.attach"),
    "a swept config": (lambda m, a, t, _: sweep(m, LORA, t), "adapter is LoRAConfig .*; give the Adapter"),
    "a null by its name": (lambda m, a, t, _: sweep(m, a, t, null="n"), "null is str 'n'; give the Adapter"),
    "a calibrated model": (lambda m, a, t, _: calibrate(m, t), "adapter is LlamaForCausalLM .*; give the Adapter"),
    "shifts of nothing": (lambda m, a, t, _: shifts(m, None), "adapter is NoneType None; give the Adapter"),
    "shifts, the adapter first": (lambda m, a, t, _: shifts(a, m), "the model comes first"),
    "a sweep, the adapter first": (lambda m, a, t, _: sweep(a, m, t), "the model comes first"),
    "a sweep of no writer": (lambda m, a, t, _: sweep(mlp(), a, t), r"MLP has no generate\(\)"),
    "a training of no language model": (
        lambda m, a, t, _: train(n := mlp(), ll.attach(n, ll.LoRAConfig(targets="up")), t),
        "MLP takes .*, not input_ids; what is steered is a language model",
    ),
    "a null with a keyword too many": (lambda m, a, t, _: ll.null_control(m, a, PAIRS, t, keep="best"), r"null_control has no \['keep'\]"),
    "one dose": (lambda m, a, t, _: sweep(m, a, t, cs=1), r"cs is a list, e\.g\. \[-1, -0\.5, 0\.5, 1\]; got int 1"),
    "a grid of one": (lambda m, a, t, _: calibrate(a, t, grid=1.0), "grid is a list, .*got float 1.0"),
    "one prompt's ids": (lambda m, a, t, _: sweep(m, a, t, prompts=[1, 2]), r"prompts\[0\] is int 1, neither a text nor .*are \[ids\]"),
    "a chat": (lambda m, a, t, _: sweep(m, a, t, prompts=[[{"role": "user"}]]), r"prompts\[0\] is list .*apply_chat_template"),
    "half a character": (lambda m, a, t, _: sweep(m, a, t, prompts=["\udcff"]), r"prompts\[0\] is str '.udcff'"),
    "a coherence of a number": (lambda m, a, t, _: sweep(m, a, t, coherence=3), "coherence is 'distinct-3', 'perplexity', .*got int 3"),
    "a coherence with floors": (lambda m, a, t, _: sweep(m, a, t, coherence={"perplexity": 1}), "coherence is .*got dict"),
    "a score of two": (lambda m, a, t, _: sweep(m, a, t, score=lambda a, b: [1.0]), "cannot be called with the list alone: missing .* 'b'"),
    "a score of one number": (lambda m, a, t, _: sweep(m, a, t, score=len), "score must return one number per text; .* it returned int"),
    "a score of nothing": (lambda m, a, t, _: sweep(m, a, t, score=lambda _: None), "for 2 texts it returned NoneType None"),
    "a score of words": (lambda m, a, t, _: sweep(m, a, t, score=list), "for 2 texts it returned list"),
    "a score of one word": (lambda m, a, t, _: sweep(m, a, t, score=lambda _: "1"), "it returned str '1'"),
    "a score of rows": (lambda m, a, t, _: sweep(m, a, t, score=lambda x: torch.ones(len(x), 1)), "it returned Tensor tensor"),
    "a coherence of one number": (lambda m, a, t, _: sweep(m, a, t, coherence=len), "coherence 'len' must return one number per text"),
    "floors of a number": (lambda m, a, t, _: calibrate(a, t, floors=0.5), "floors is a mapping .*got float 0.5"),
    "texts of nothing": (lambda m, a, t, _: calibrate(a, t, texts=[None]), "in words; among them is NoneType"),
    "rounds of a name": (lambda m, a, t, d: rounds(m, t, d, config="lora"), "expected a config, got .lora.; write LoRAConfig"),
    "rounds in nothing": (lambda m, a, t, d: rounds(m, t, None), "folder is where the state lies, a path; got NoneType"),
    "rounds that tell a list": (lambda m, a, t, d: rounds(m, t, d, after=[]), "after is a function of a Round; got list"),
    "rounds of steps": (lambda m, a, t, d: rounds(m, t, d, training=["steps"]), "training is a mapping of keywords.*; got list"),
    "a seed in words": (lambda m, a, t, _: sweep(m, a, t, seed="x"), "seed must be a whole number, got str: 'x'"),
    "joined with nothing": (lambda *_: TABLE.joined(None), "a DoseResponse is joined with another; got NoneType"),  # type: ignore[arg-type]
    "a file of no path": (lambda *_: ll.ContrastivePairs.from_jsonl(None), "from_jsonl takes a file's path; got NoneType"),  # type: ignore[arg-type]
    "a model for a tokenizer": (lambda m, a, t, _: PAIRS.encode(m), "tokenizer is LlamaForCausalLM .*; give the tokenizer itself"),
    "logits in a list": (lambda *_: ll.completion_nll([1.0], ROW, ROW > 0), r"are tensors; got \{'logits': 'list'\}"),  # type: ignore[arg-type]
    "a mask of numbers": (lambda *_: ll.reference_kl(LOGITS, LOGITS, ROW), "in torch.bool; got torch.int64"),
    "a parameter alone": (lambda *_: ll.pcgrad([FREE.sum(), FREE.sum()], FREE), "parameters are several"),
    "pairs of one pair": (lambda *_: ll.ContrastivePairs(GIVEN[0]), "takes a list of pairs.*got dict"),
}


MEANINGLESS: dict[str, tuple[Call, str]] = {
    "shifts of a number": (lambda m, a, *_: shifts(m, a, 3), 'batches is int 3; it can be a mapping of .* {"input_ids"'),
    "shifts of words": (lambda m, a, *_: shifts(m, a, {"input_ids": "w1"}), "a batch is dict .*without a tensor in it; it can be"),
    "shifts of a list of words": (lambda m, a, *_: shifts(m, a, ["w1"]), "a batch is str 'w1', without a tensor"),
    "shifts of no tokens": (lambda m, a, *_: shifts(m, a, IDS[:0]), r"a batch holds no tokens: its tensors are \[\(0, 3\)\]"),
    "shifts of unknown tokens": (
        lambda m, a, *_: shifts(m, a, IDS + 10**6),
        "the batches hold token 1000001, and LlamaForCausalLM knows",
    ),
    "unknown prompts": (
        lambda m, a, t, _: sweep(m, a, t, prompts=[[10**6]]),
        "the prompts hold token 1000000, .*is the tok",
    ),
    "unknown pairs": (lambda m, a, *_: ll.train_steering(m, a, FAR, **QUIET), "the pairs hold token 1000000"),
    "prompts of a tokenizer": (lambda m, a, t, _: sweep(m, a, t, prompts={"input_ids": [1]}), "prompts is a list of .*got {"),
    "rounds of one prompt": (lambda m, a, t, d: rounds(m, t, d, prompts="w1"), "prompts is a list of strings"),
    "the prompts twice": (lambda m, a, t, _: sweep(m, a, t, input_ids=IDS), r"\['input_ids'\] are made of the prompts"),
    "tokens in words": (
        lambda m, a, t, _: sweep(m, a, t, max_new_tokens="3"),
        "max_new_tokens must be at least 1, .*='3'",
    ),
    "half a sample": (
        lambda m, a, t, _: sweep(m, a, t, samples=1.5, max_rows=None),
        "samples and max_rows .*samples=1.5, max_rows=None",
    ),
    "a temperature in words": (lambda m, a, t, _: sweep(m, a, t, temperature="hot"), "temperature must be 0 .*, got 'hot'"),
    "sections in words": (lambda m, a, t, _: calibrate(a, t, sections="4"), "sections must be at least 2.*'4'"),
    "a budget in words": (lambda m, a, t, _: calibrate(a, t, mode="iso_kl", budget="1"), "budget above 0.*got '1'"),
    "a floor in words": (lambda m, a, t, _: calibrate(a, t, floors={"perplexity": "x"}), "a floor is a number .*'x'"),
    "a rate in words": (lambda m, a, t, _: train(m, a, t, steps="9", lr="x"), "steps must be at least 1.*; lr must be above 0"),
    "half a step": (lambda m, a, t, _: train(m, a, t, steps=1.5), "steps must be at least 1, a whole number"),
    "projected in words": (lambda m, a, t, _: train(m, a, t, project="no"), "project is True or False"),
    "one pole": (lambda m, a, t, _: train(m, a, t, poles=1.0), r"usually \(1\.0, -1\.0\); got 1\.0"),
    "a share of nothing": (lambda m, a, t, _: train(m, a, t, validation=float("nan")), "cannot hold out nan of 4 pairs"),
    "rounds that cannot train": (lambda m, a, t, d: rounds(m, t, d, training={"steps": "x"}), "steps must be at least 1"),
    "rounds of one pole": (lambda m, a, t, d: rounds(m, t, d, training={"poles": 3}), "poles are"),
    "rounds of two models": (lambda m, a, t, d: rounds(m, t, d, training={"model": m}), r"training holds \['model'\]"),
    "rounds with a margin in words": (lambda m, a, t, d: rounds(m, t, d, margin="x"), "margin finite and dose above 0; got 1, 'x'"),
    "batches of none": (lambda *_: next(PAIRS.batches(0, 1)), "size must be at least 1"),
    "calibration data of none": (
        lambda m, a, t, _: PAIRS.calibration_data(t, size=0),
        "size must be at least 1, .*got size=0",
    ),
    "cut below nothing": (lambda m, a, t, _: PAIRS.encode(t, max_completion=-1), "max_completion must be at least 1"),
    "a token below 0": (
        lambda *_: ll.ContrastivePairs([([1], [-2], [3])]),
        "'chosen' is list .-2., neither a text nor a list",
    ),
    "a table of nothing": (lambda *_: type(TABLE).from_dict({}), r"not what DoseResponse\.to_dict wrote: KeyError 'null'; it has \[\]"),
    "a table without c=0": (lambda *_: type(TABLE)(("",), "t", (), ()), r"there are no readings at c=0, .*there are \[\]"),
    "a zoom of a number": (lambda m, a, t, d: TABLE.plot(d / "x.png", zoom=0.5), "zoom is a stretch .*got 0.5"),  # type: ignore[arg-type]
    "rows that do not fit": (lambda *_: ll.completion_nll(LOGITS, ROW, ROW[:, :2] > 0), "not of the same rows and tokens"),
    "a top of none": (lambda *_: ll.reference_kl(LOGITS, LOGITS, ROW > 0, top_k=0), "top_k must be at least 1"),
    "a margin of numbers": (lambda *_: ll.margin_nll(1.0, 2.0), "own and other are tensors .*'float 1.0', 'float 2.0'"),  # type: ignore[arg-type]
    "a cap of nothing": (lambda *_: ll.margin_nll(torch.ones(2), torch.ones(2), cap=0.0), "cap is how many nats .*got 0.0"),
    "one loss": (lambda *_: ll.pcgrad(FREE.sum(), [FREE]), "pcgrad takes the losses of the two poles"),  # type: ignore[arg-type]
    "losses without a slope": (lambda *_: ll.pcgrad([torch.ones(()), FREE.sum()], [FREE]), "a loss is one number that depends on"),
    "nothing to train": (lambda *_: ll.pcgrad([FREE.sum(), FREE.sum()], []), "there is nothing to train"),
}


@pytest.mark.parametrize(
    ("kind", "call", "said"),
    [*((TypeError, *case) for case in CALLS.values()), *((ValueError, *case) for case in MEANINGLESS.values())],
    ids=[*CALLS, *MEANINGLESS],
)
def test_a_mistake_is_named_with_what_was_meant(kind: type[Exception], call: Call, said: str, tmp_path: Path) -> None:
    model = llama()
    adapter = ll.attach(model, LORA, seed=0)
    with pytest.raises(kind, match=said):
        call(model, adapter, word_tokenizer(), tmp_path / "never")
    assert not (tmp_path / "never").exists() and adapter.attached and not adapter.calibrated


def test_an_error_of_ones_own_function_says_what_it_was_called_with() -> None:
    model = llama()
    with pytest.raises(AttributeError) as told:
        sweep(model, ll.attach(model, LORA, seed=0), word_tokenizer(), score=lambda text: [float(text.upper() == "A")])
    assert told.value.__notes__[0] == "in score, which was called with a list of 2 texts, for one number each"


@pytest.mark.parametrize("batch", [{"input": torch.tensor([[1]])}, torch.ones(1, 3)], ids=["a wrong name", "floats"])
def test_a_batch_the_model_refuses_says_what_it_can_be(batch: Any) -> None:
    model = llama()
    with pytest.raises((ValueError, TypeError, RuntimeError)) as told:
        shifts(model, ll.attach(model, LORA, seed=0), batch)
    assert "it can be a mapping of the model's arguments" in told.value.__notes__[0]


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("gone.jsonl", FileNotFoundError, r"gone\.jsonl: there is no such file \(\.jsonl files in .*kept\.jsonl.*\); expected JSON lines"),
        ("no/gone.jsonl", FileNotFoundError, r"gone\.jsonl: there is no such file .*no: no such folder"),
        (".", IsADirectoryError, "it is a folder; expected JSON lines"),
        ("kept.jsonl/x", NotADirectoryError, r"kept\.jsonl.x: it cannot be read \(Not a directory\)"),
        ("shut.jsonl", PermissionError, r"shut\.jsonl: it cannot be read \(Permission denied\)"),
    ],
)
def test_a_file_of_pairs_that_cannot_be_read_is_named(
    name: str, kind: type[OSError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept.jsonl").touch()

    def shut(path: Any, *args: Any, **keywords: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))  # no mode keeps root out

    with monkeypatch.context() as patch, pytest.raises(kind, match=said) as told:
        if name == "shut.jsonl":
            patch.setattr("builtins.open", shut)
        ll.ContrastivePairs.from_jsonl(tmp_path / name)
    assert str(told.value).startswith(str(tmp_path)) and "Errno" not in str(told.value) and told.value.errno


def test_a_line_that_nests_too_deep_is_told_with_the_others(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="deep, line 1: not JSON"):
        ll.ContrastivePairs.from_jsonl(tmp_path / "deep")


def test_a_plot_into_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"is a folder; name a file in it, such as .*response\.png"):
        TABLE.plot(tmp_path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: generate("Once"), "generate takes one Generation.*got str 'Once'"),
        (lambda: Generation("lm", ["a"], "Once"), "prompts is a list of texts, at least one; got str 'Once'"),
        (lambda: Generation("lm", [], ["Once"]), r"adapters is a list of texts, at least one; got list \[\]"),
        (lambda: Generation("lm", ["a"], ["Once"], cs=[1.0]), r"cs is a list of texts, at least one; got list \[1\.0\]"),
    ],
)
def test_generate_names_what_was_handed_to_it(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()
