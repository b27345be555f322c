"""What does `lora-lite transfer` write and say: an adapter that loads, a table or JSON, and one clear line for each mistake?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll
from lora_lite.cli import tiny_lm, transfer
from lora_lite.cli.corpus import Corpus
from tests.models import refill
from tests.twins import recovered, rotated, trained

WAYS = [(a, b, c) for a in ("quick", "slow", "old") for b in ("jumps", "falls") for c in ("lazy", "tired")]
PROSE = tuple(f"The {a} fox {b} over the {c} dog, and nobody minded it much at all." for a, b, c in WAYS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its rotated twin, one with another tokenizer, an adapter as a file and as a PEFT folder, and a text."""
    folder = tmp_path_factory.mktemp("transfer")
    tokenizer = tiny_lm.train_tokenizer(Corpus(PROSE, ("x = 1",)), 280)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=280, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    source = LlamaForCausalLM(config)
    refill(source, seed=0)
    for name, model in (("source", source), ("target", rotated(source)), ("other", source)):
        model.save_pretrained(folder / name)
        (tiny_lm.train_tokenizer(Corpus(PROSE[::2], ("y",)), 270) if name == "other" else tokenizer).save_pretrained(folder / name)
    config.hidden_size, config.intermediate_size = 48, 96
    big = LlamaForCausalLM(config)
    refill(big, seed=0)
    big.save_pretrained(folder / "big")
    tokenizer.save_pretrained(folder / "big")
    adapter = trained(source)
    adapter.save(folder / "adapter.safetensors")
    ll.to_peft(adapter, folder / "peft")
    (folder / "text.txt").write_text(" ".join(PROSE) * 4)
    (folder / "empty.txt").write_text("\n")
    (folder / "short.txt").write_text("The fox.")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe")
    return folder


@pytest.fixture
def run(shell: Any, monkeypatch: pytest.MonkeyPatch, place: Path) -> Any:
    monkeypatch.chdir(place)
    monkeypatch.setattr(transfer, "speak", lambda: None)

    def call(**options: str | None) -> tuple[int, str, str]:
        given = {"adapter": "adapter.safetensors", "source": "source", "target": "target", "text": "text.txt", "out": "out.safetensors"}
        given |= {"device": "cpu", "force": ""} | options  # type: ignore[arg-type]
        words = ["transfer", given.pop("adapter")]
        for name, value in given.items():
            words += [] if value is None else ["--" + name.replace("_", "-"), *([value] if value else [])]
        return shell(*words)

    return call


@pytest.mark.parametrize("adapter", ["adapter.safetensors", "peft"])
def test_the_adapter_that_is_written_does_the_same_on_the_target(run: Any, place: Path, adapter: str) -> None:
    status, out, err = run(adapter=adapter, roles="all")
    assert status == 0, err
    assert "14 moved, 0 copied, 0 skipped" in out and "write_cos" in out and "written: out.safetensors" in out
    source, target = (LlamaForCausalLM.from_pretrained(place / name) for name in ("source", "target"))
    given, moved = ll.load(source, place / "adapter.safetensors"), ll.load(target, place / "out.safetensors")
    given.detach()
    moved.detach()
    assert recovered(source, given, target, moved) > 0.9  # few kinds of token: not every direction is seen


def test_the_report_as_json(run: Any) -> None:
    status, out, _ = run(json="", layer_map="cka", min_r2="-5", sequential="")
    found = json.loads(out)
    assert status == 0 and found["out"] == "out.safetensors" and found["tokens"] > 100
    assert sum(row["action"] == "moved" for row in found["modules"]) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": "absent.safetensors"}, ["absent.safetensors"]),
        ({"source": "absent-model"}, ["--source absent-model"]),
        ({"target": "absent-model"}, ["--target absent-model"]),
        ({"target": "other"}, ["--text text.txt", "read it differently"]),
        ({"text": "absent.txt"}, ["--text absent.txt"]),
        ({"text": "empty.txt"}, ["--text empty.txt", "empty"]),
        ({"text": "bytes.txt"}, ["--text bytes.txt", "not UTF-8"]),
        ({"text": "short.txt"}, ["too few", "at least 32"]),
        ({"out": "absent/out.safetensors"}, ["--out absent/out.safetensors"]),
        ({"out": "adapter.safetensors"}, ["--out adapter.safetensors", "is read by this command"]),
        ({"out": "text.txt"}, ["--out text.txt", "is read by this command"]),
        ({"out": "short.txt", "force": None}, ["--out short.txt: short.txt exists", "--force"]),
        ({"source": "big"}, ["lora-lite: adapter.safetensors does not fit", "expected (4, 48)"]),
        ({"device": "foo", "source": "absent-model"}, ["--device foo: nothing can be computed there; here there are cpu"]),
        ({"device": "meta"}, ["--device meta"]),
        ({"roles": "some"}, ["--roles some", "writers"]),
        ({"layer_map": "width"}, ["--layer-map width", "cka"]),
        ({"min_r2": "1"}, ["no module can be moved", "min_r2"]),
        ({"tokens": "3"}, ["--tokens"]),
    ],
    ids=lambda v: " ".join(f"{k}={w}" for k, w in v.items()) if isinstance(v, dict) else "",
)
def test_a_mistake_is_one_line_and_exit_status_2(options: dict[str, str], said: list[str], run: Any) -> None:
    status, out, err = run(**options)
    assert status == 2 and out == "" and "Traceback" not in err, (out, err)
    for piece in said:
        assert piece in err
    assert err.count("\n") == 1 or "device" not in options


def test_one_batch_of_rows_is_padded_and_masked() -> None:
    batch = transfer.padded(list(range(1, 8)), 4, 0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != 0)


def test_a_folder_that_takes_no_file_is_told_before_the_models_are_read(run: Any, closed: Path) -> None:
    status, _, err = run(out=str(closed / "out.safetensors"), source="absent-model")
    assert status == 2 and f"no file can be made in {closed}" in err


def test_a_disk_that_fails_at_the_end_is_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_lite.checkpoint.disk.os.replace", full)
    status, _, err = run(roles="all")
    assert status == 2 and "out.safetensors cannot be written" in err and "No space left" in err and ".tmp" not in err, err
