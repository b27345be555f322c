"""Do `lora-lite steer`, `sweep`, `generate` and `rounds` do what they say, in words and as JSON? On a model of 20,000 parameters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_lite as ll
from lora_lite.cli import main, options, tiny_lm
from tests.test_demo import TINY, made_up

pytestmark = pytest.mark.xdist_group("steering on the command line")  # one worker trains the model, once
CHEAP = ["--steps", "12", "--batch-size", "6", "--lr", "2e-2", "--tokens", "8", "--samples", "6", "--r", "4"]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `lm` and `pairs.jsonl`, code against prose."""
    folder, corpus = tmp_path_factory.mktemp("room"), made_up(40)
    tiny_lm.make(folder / "lm", corpus, TINY)
    lines = [{"prompt": "", "chosen": c, "rejected": p} for c, p in zip(corpus.code, corpus.prose, strict=True)]
    for name, n in (("pairs", None), ("five", 5), ("two", 2), ("none", 0)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines[:n])))
    return folder


@pytest.fixture
def run(shell: Any, room: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """run("steer", "--r", "4") -> (exit status, stdout, stderr), in the room."""
    monkeypatch.chdir(room)

    return shell


@pytest.fixture(scope="module")
def steered(room: Path) -> dict[str, Any]:
    """What `steer --json` said, in the folder `kept`."""
    words = ["steer", "--model", "lm", "--pairs", "pairs.jsonl", "--null", "--doses", "-1,0,1", "--out", "kept", "--json", *CHEAP]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        patch.setattr(sys, "argv", ["lora-lite", *words])
        said: list[str] = []
        patch.setattr(options.typer, "echo", said.append)
        with pytest.raises(SystemExit) as left:
            main()
    assert not left.value.code
    return json.loads(said[0])


# -- steer ----------------------------------------------------------------------------------------------------------------


def test_steer_trains_calibrates_and_writes(steered: dict[str, Any], room: Path) -> None:
    for file in steered["files"]:
        assert (room / file).stat().st_size > 100, file
    assert (room / "kept" / "dose_response.png").read_bytes().startswith(b"\x89PNG")
    adapter = ll.read(room / "kept" / "adapter.safetensors")
    assert adapter.calibrated["positive"] == steered["c"]["positive"] and adapter.calibrated["verdict"] == steered["c"]["verdict"]
    assert json.loads((room / "kept" / "report.json").read_text()) == steered
    report = (room / "kept" / "report.md").read_text()
    for piece in ("## Training", "## How far c can go", "## Doses", "## Null control", "lora-lite steer", steered["c"]["verdict"]):
        assert piece in report


def test_steer_moves_the_trait_and_further_than_its_null_control(steered: dict[str, Any]) -> None:
    trait = {d["c"]: d["trait"] for d in steered["doses"]}
    assert trait[1.0] - trait[-1.0] > 0.3
    (up, down), (null_up, null_down) = (steered[which]["poles"] for which in ("trained", "null"))
    assert up["shift"] > 1 > -1 > down["shift"]
    assert up["shift"] > null_up["shift"] + 1 and down["shift"] < null_down["shift"] - 1
    assert [d["c"] for d in steered["null"]["doses"]] == [-1.0, 0.0, 1.0] and steered["null"]["doses"][1] == steered["doses"][1]
    assert steered["trait"] == "P(chosen)" and steered["judge_accuracy"] > 0.9


def test_the_same_seed_gives_the_same_adapter(steered: dict[str, Any], room: Path, run: Any) -> None:
    words = ["steer", "--model", "lm", "--pairs", "pairs.jsonl", "--doses", "0,1", "--out", "again", *CHEAP]
    status, out, err = run(*words)
    assert status == 0, err
    assert "c can go from" in out and "again/adapter.safetensors" in out
    one, two = (ll.read(room / name / "adapter.safetensors") for name in ("kept", "again"))
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    assert one.calibrated == two.calibrated


def test_five_pairs_are_judged_by_one_that_was_held_out(run: Any, room: Path) -> None:
    status, out, err = run("steer", "--model", "lm", "--pairs", "five.jsonl", "--null", "--doses", "0,1", "--out", "few", "--json", *CHEAP)
    assert status == 0 and "five.jsonl: 5 pairs, 1 of them held out" in err, err
    found = json.loads(out)
    for which in ("trained", "null"):
        assert found[which]["held_out_pairs"] == 1 and [p["effect"] for p in found[which]["poles"]] == [None, None]
    report = (room / "few" / "report.md").read_text()
    assert "12 steps on 4 pairs" in report and "on 1 held-out pair c=1" in report and "effect +" not in report.split("## Doses")[0]


@pytest.mark.parametrize("variant", ["pissa", "dora", "ia3"])
def test_steer_takes_a_variant(variant: str, run: Any, room: Path) -> None:
    words = [w for w in CHEAP if w not in ("--r", "4")] if variant == "ia3" else CHEAP
    more = ["--set", "train=spectrum", "--set", "selection_score=wanda"] if variant == "pissa" else []
    status, out, err = run("steer", "--model", "lm", "--pairs", "pairs.jsonl", "--variant", variant, "--layer-range", "0", "0.5",
                           "--doses", "0,1", "--out", variant, "--json", *words, "--steps", "2", *more)  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["made"]["config"]["variant"] == variant
    assert all(".layers.0." in name for name in ll.read(room / variant / "adapter.safetensors").targets)


# -- sweep ----------------------------------------------------------------------------------------------------------------


def test_sweep_measures_what_steer_measured(steered: dict[str, Any], run: Any, room: Path) -> None:
    words = ["sweep", "--model", "lm", "--adapter", "kept/adapter.safetensors", "--pairs", "pairs.jsonl", "--doses", "-1:1:3",
             "--null", "kept/null.safetensors", "--samples", "6", "--tokens", "8", "--out", "swept"]  # fmt: skip
    status, out, err = run(*words, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["doses"] == steered["doses"] and found["null"]["doses"] == steered["null"]["doses"]
    assert found["c"]["positive"] == steered["c"]["positive"]
    assert all((room / file).stat().st_size > 100 for file in found["files"])
    status, out, err = run(*words)
    assert status == 0 and "P(chosen)" in out and "null" in out and "swept/dose_response.png" in out


# -- generate -------------------------------------------------------------------------------------------------------------


def written(room: Path, prompt: str, doses: dict[str, float]) -> str:
    """By the public API alone, greedily."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(room / "lm").eval(), AutoTokenizer.from_pretrained(room / "lm")
    ids = tokenizer(prompt, return_tensors="pt")
    with ll.stack(model, [(ll.read(room / file), c) for file, c in doses.items()]):
        out = model.generate(**ids, do_sample=False, max_new_tokens=8)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_writes_at_c(steered: dict[str, Any], run: Any, room: Path) -> None:
    words = ["generate", "--model", "lm", "--adapter", "kept/adapter.safetensors", "--prompt", "the file", "--tokens", "8"]
    status, out, err = run(*words, "-c", "1.5", "-c", "-1", "--prompt", "", "--json")
    assert status == 0, err
    texts = {(t["c"][0], t["prompt"]): t["text"] for t in json.loads(out)["texts"]}
    assert texts.keys() == {(c, p) for c in (1.5, -1.0) for p in ("the file", "")}
    for (c, prompt), text in texts.items():
        assert text == written(room, prompt, {"kept/adapter.safetensors": c})
    assert texts[1.5, "the file"] != texts[-1.0, "the file"]
    status, out, _ = run(*words)
    assert status == 0 and out.startswith("--- c = 1\nthe file")


def test_generate_at_auto_is_what_was_calibrated(steered: dict[str, Any], run: Any) -> None:
    words = ["generate", "--model", "lm", "--adapter", "kept/adapter.safetensors", "--prompt", "a", "--tokens", "2", "--json"]
    for word, side in (("auto", "positive"), ("-auto", "negative")):
        limit = steered["c"][side]
        status, out, err = run(*words, "-c", word)
        if limit is None:
            assert status == 2 and f"no {side} c" in err
        else:
            assert [t["c"] for t in json.loads(out)["texts"]] == [[limit]]
    status, _, err = run(*[w.replace("adapter.s", "null.s") for w in words], "-c", "auto")
    assert status == 2 and "calibrate_c" in err and "Traceback" not in err


def test_generate_stacks_adapters_each_at_its_own_dose(steered: dict[str, Any], run: Any, room: Path) -> None:
    files = {"kept/adapter.safetensors": 0.8, "kept/null.safetensors": -1.5}
    words = [w for file, c in files.items() for w in ("--adapter", f"{file}:{c}")]
    status, out, err = run("generate", "--model", "lm", *words, "--prompt", "the", "--tokens", "8", "--json")
    assert status == 0, err
    (text,) = json.loads(out)["texts"]
    assert text["c"] == [0.8, -1.5] and text["text"] == written(room, "the", files)


def test_generate_draws_the_same_from_a_seed(steered: dict[str, Any], run: Any) -> None:
    words = ["generate", "--model", "lm", "--adapter", "kept/adapter.safetensors", "--prompt", "", "--tokens", "8", "--json",
             "--temperature", "1", "--samples", "3"]  # fmt: skip
    first, again, other = (json.loads(run(*words, "--seed", seed)[1])["texts"] for seed in ("0", "0", "1"))
    assert first == again != other and len({t["text"] for t in first}) > 1


# -- rounds ---------------------------------------------------------------------------------------------------------------

ROUNDS = ["rounds", "--model", "lm", "--pairs", "pairs.jsonl", "--rounds", "2", "--json", "--variant", "pissa", "--set", "train=spectrum",
          *CHEAP]  # fmt: skip


def kept_files(folder: Path) -> dict[str, bytes]:
    """All but the picture and the words, which are made of these."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".safetensors")}


def test_rounds_killed_by_the_system_go_on_to_the_same_result(run: Any, room: Path) -> None:
    status, out, err = run(*ROUNDS, "--state", "whole")
    assert status == 0, err
    found = json.loads(out)
    assert [r["number"] for r in found["rounds"]] == [1, 2] and all(r["why"] for r in found["rounds"]) and "kept when" in found["rule"]
    assert all((room / file).stat().st_size > 100 for file in found["files"])
    assert found["rule"] in (room / "whole" / "report.md").read_text()

    child = subprocess.Popen(
        [sys.executable, "-m", "lora_lite", *ROUNDS, "--state", "killed"], cwd=room, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(ll.__file__).parent.parent)},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (room / "killed" / "state.json").exists() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it was to be killed at its work"
    assert not all(r["why"] for r in json.loads((room / "killed" / "state.json").read_text())["rounds"])
    status, out, err = run(*ROUNDS, "--state", "killed")
    assert status == 0, err
    assert [r["why"] for r in json.loads(out)["rounds"]] == [r["why"] for r in found["rounds"]]
    assert kept_files(room / "killed") == kept_files(room / "whole")
    status, _, err = run(*ROUNDS, "--state", "killed", "--seed", "4")
    assert status == 2 and "seed was 0, is 4" in err and "Traceback" not in err


# -- Ctrl-C -------------------------------------------------------------------------------------------------------------------


def stops(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("command", ["steer", "sweep"])
def test_stopped_before_anything_was_saved_leaves_no_folder(command: str, steered: Any, run: Any, room: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ll, "train_steering" if command == "steer" else "dose_response", stops)
    more = ["--adapter", "kept/adapter.safetensors"] if command == "sweep" else []
    status, out, err = run(command, *STEER[1:], *more, "--out", "stop/deep")
    assert (status, out) == (130, "") and err.endswith("lora-lite: stopped; saved in stop/deep: nothing\n")
    assert not (room / "stop").exists()


def test_stopped_after_the_training_says_what_there_is(run: Any, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ll, "calibrate_c", stops)
    status, _, err = run(*STEER, "--out", "half", *CHEAP)
    assert status == 130 and "stopped; saved in half: adapter.safetensors" in err
    assert ll.read(room / "half" / "adapter.safetensors").calibrated == {}


def test_a_mistake_leaves_no_folder(run: Any, room: Path) -> None:
    status, _, err = run(*STEER, "--targets", "nowhere_proj", "--out", "wrong")
    assert status == 2 and "nowhere_proj" in err and not (room / "wrong").exists()


def test_stopped_rounds_say_that_the_same_command_goes_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lite.steering.rounds.calibrate_c", stops)
    status, _, err = run(*ROUNDS, "--state", "stopped rounds")
    assert status == 130 and "the same command goes on after the last step that stopped rounds has: lora-lite rounds --model lm" in err


def test_stopped_elsewhere_is_a_word_too(steered: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lite.cli.generate.writing_model", stops)
    assert run("generate", "--model", "lm", "--adapter", "kept/adapter.safetensors", "--prompt", "a") == (130, "", "lora-lite: stopped\n")


# -- mistakes -------------------------------------------------------------------------------------------------------------

STEER = ["steer", "--model", "lm", "--pairs", "pairs.jsonl"]
GENERATE = ["generate", "--model", "lm", "--adapter", "absent.safetensors", "--prompt", "a"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*STEER, "--variant", "lorra"], "lorra"),
        ([*STEER, "--doses", "one"], "--doses one: expected numbers such as"),
        (
            [*STEER, "--doses", "-1:1"],
            "--doses -1:1: expected numbers such as -1,0,1 or, for nine from -2 to 2, -2:2:9: from, to and how many",
        ),
        ([*STEER, "--doses", "nan"], "--doses nan: expected numbers such as -1,0,1 or, for nine from -2 to 2, -2:2:9: c must be finite"),
        ([*STEER, "--doses", "-1:1:0"], "cs is empty"),
        (["sweep", *STEER[1:], "--adapter", "absent.safetensors", "--doses", "0,inf"], "--doses 0,inf: expected"),
        ([*STEER, "--targets", "nowhere_proj", "--out", "x"], "nowhere_proj"),
        ([*STEER[:3], "--pairs", "absent.jsonl"], "no such file"),
        (["steer", "--model", "absent", *STEER[3:]], "--model absent"),
        (["steer", "--pairs", "pairs.jsonl"], "--model"),
        (["sweep", *STEER[1:], "--adapter", "absent.safetensors"], "there is no file absent.safetensors"),
        (["sweep", *STEER[1:], "--adapter", "pairs.jsonl", "--null", "nope"], "--null nope: there is no file nope"),
        (["sweep", *STEER[1:], "--adapter", "folder"], "lora-lite convert folder NAME.safetensors --model lm"),
        ([*GENERATE[:3], "--adapter", "folder:1.5", "--prompt", "a"], "lora-lite convert folder NAME.safetensors --model lm"),
        ([*STEER[:3], "--pairs", "."], "--pairs .: it is a folder"),
        (GENERATE, "there is no file absent.safetensors"),
        ([*GENERATE, "-c", "much"], "-c much: expected a number, auto or -auto"),
        ([*GENERATE, "-c", "nan"], "-c nan: expected a number, auto or -auto"),
        ([*GENERATE[:3], "--adapter", "pairs.jsonl:foo", "--prompt", "a"], "'foo' is no dose; expected a number, auto or -auto after"),
        ([*STEER[:1], "--model", "folder", *STEER[3:]], "--model folder: this folder has no config.json"),
        ([*GENERATE, "--samples", "2"], "give a temperature"),
        ([*GENERATE, "--device", "foo"], "--device foo: nothing can be computed there; here there are cpu"),
        ([*GENERATE, "--device", "cuda:99"], "--device cuda:99: nothing can be computed there; here there are cpu"),
        ([*STEER, "--device", "foo", "--out", "x"], "--device foo"),
        (["sweep", *STEER[1:], "--adapter", "absent.safetensors", "--device", "foo"], "--device foo"),
        (["rounds", *STEER[1:], "--device", "foo"], "--device foo"),
        (["rounds", *STEER[1:], "--rounds", "0"], "--rounds"),
        (["rounds", *STEER[1:3], "--pairs", "five.jsonl"], "5 pairs, of which 1 is held out; the rule needs"),
        ([*STEER[:3], "--pairs", "two.jsonl", "--null"], "--null with --pairs two.jsonl: 1 pair is left"),
        ([*STEER[:3], "--pairs", "none.jsonl"], "there are no pairs"),
        (["rounds", *STEER[1:], "--state", "pairs.jsonl", *CHEAP], "--state pairs.jsonl"),
    ],
    ids=lambda v: " ".join(v[-2:]) if isinstance(v, list) else "",
)
def test_a_mistake_is_told_without_a_traceback(words: list[str], said: str, run: Any, room: Path) -> None:
    (room / "folder").mkdir(exist_ok=True)
    (room / "folder" / "adapter_config.json").write_text("{}")
    status, out, err = run(*words)
    assert (status, out) == (2, "") and said in err and "Traceback" not in err, err


def test_without_matplotlib_it_is_said_before_the_work(run: Any, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for words in (STEER, ["rounds", *STEER[1:]]):
        status, _, err = run(*words, *(["--out"] if words is STEER else ["--state"]), "unmade")
        assert status == 2 and "pip install 'lora_lite[plot]'" in err and not (room / "unmade").exists()
