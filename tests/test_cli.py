"""What does the command line say to a user: the version, the result as JSON, and one clear line for each mistake, with exit status 2?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

import lora_lite as ll
from lora_lite.cli import app, demo
from lora_lite.cli.errors import UserError
from lora_lite.cli.pairs import read_pairs

GOOD = '{"prompt": "a", "chosen": " b", "rejected": " c"}'


@pytest.fixture
def run(shell: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """run("demo", "--r", "4") -> (exit status, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    return shell


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[demo.Job]:
    """The jobs the command line hands on, none of them run."""
    jobs: list[demo.Job] = []

    def instead(job: demo.Job) -> dict[str, Any]:
        jobs.append(job)
        dose = {"c": 0.0, "trait": 0.5, "perplexity": 9.0}
        return {"title": "t", "ok": job.seed != 13, "checks": {"all": True}, "trait": "P(x)", "gradual_region": (-0.5, 0.5),
                "way": "P(x) is gradual",
                "doses": [dose], "seconds": {"all": 1.0}, "files": []}  # fmt: skip

    monkeypatch.setattr(demo, "demo", instead)
    monkeypatch.setattr(app, "speak", lambda: None)
    return jobs


def test_the_version(run: Any) -> None:
    assert run("--version") == (0, f"lora-lite {ll.__version__}\n", "")


def test_python_dash_m_is_the_same_command(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "lora_lite", "demo", "--variant", "lorra"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(ll.__file__).parent.parent)},
    )  # fmt: skip
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert "lorra" in found.stderr and all(name in found.stderr for name in ll.REGISTRY)


def test_options_become_a_job(run: Any, asked: list[demo.Job], tmp_path: Path) -> None:
    status, out, _ = run("demo", "--model", "some/model", "--pairs", "p.jsonl", "--variant", "pissa", "--layer-range", "0.2", "0.8",
                         "--r", "4", "--set", "train=spectrum", "--steps", "7", "--seed", "3", "--out", "here", "--json")  # fmt: skip
    assert status == 0 and json.loads(out)["trait"] == "P(x)"
    (job,) = asked
    assert job.config == ll.PiSSAConfig(r=4, alpha=16.0, layer_range=(0.2, 0.8), train="spectrum")
    assert (job.model, job.pairs, job.out) == ("some/model", Path("p.jsonl"), Path("here"))
    assert (job.recipe.steps, job.sampling.seed, job.seed) == (7, 3, 3)


def test_nothing_given_is_lora_on_the_tiny_model(run: Any, asked: list[demo.Job]) -> None:
    status, out, _ = run("demo")
    assert status == 0 and "P(x)" in out and "P(x) is gradual" in out
    assert asked[0].config == ll.LoRAConfig(r=8, alpha=16.0) and asked[0].model == "tiny" and asked[0].out == Path("out/demo")


def test_a_check_that_fails_is_exit_status_1(run: Any, asked: list[demo.Job]) -> None:
    assert run("demo", "--seed", "13")[0] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variant", "lorra"], ["lorra", *ll.REGISTRY]),
        (["--variant", "ia3", "--r", "4"], ["ia3", "no r", "targets"]),
        (["--r", "0"], ["r must be a positive whole number"]),
        (["--alpha", "nan"], ["alpha must be a finite number"]),
        (["--layer-range", "0.8", "0.2"], ["0 <= lo < hi <= 1", "0.8"]),
        (["--targets", "q_proj("], ["not a regular expression", "q_proj("]),
        (["--set", "dropout"], ["NAME=VALUE"]),
        (["--set", "drop=0.1"], ["no drop", "dropout"]),
        (["--set", 'dropout="much"'], ["--variant lora"]),
        (["--pairs", "absent.jsonl"], ["absent.jsonl", "no such file", "rejected"]),
        (["--pairs", "bad.jsonl"], ["bad.jsonl, line 2", "not JSON"]),
        (["--model", "absent-model", "--pairs", "good.jsonl"], ["--model absent-model"]),
        (["--out", "bad.jsonl"], ["--out bad.jsonl"]),
        (["--steps", "0"], ["--steps"]),
        (["--nonsense"], ["--nonsense"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_mistake_is_one_line_and_exit_status_2(words: list[str], said: list[str], run: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(GOOD + "\n{not json\n")
    (tmp_path / "good.jsonl").write_text(f"{GOOD}\n{GOOD}\n")
    status, out, err = run("demo", *words)
    assert status == 2, err
    assert out == "" and "Traceback" not in err
    for piece in said:
        assert piece in err
    assert not any((tmp_path / "out").rglob("*.*"))  # told before the work, not after


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{GOOD}\n\n[1, 2]\n", "line 3: found list"),
        (f'{GOOD}\n{{"prompt": "a", "chosen": "b"}}\n', "line 2: ['rejected'] missing"),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}\n', "line 1: 'chosen' is int 3"),
        ('{"prompt": "a", "chosen": "b", "rejected": "  "}\n', "line 1: 'rejected' is empty"),
        (f"{GOOD}\n", "1 pair; at least 2"),
        ("", "there are no pairs in it"),
    ],
)
def test_a_pairs_file_that_cannot_be_used_names_the_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        read_pairs(path, seed=0)
    assert said in str(told.value) and str(path) in str(told.value)


def test_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_pairs(path, seed=0)


@pytest.mark.parametrize(("n", "held"), [(2, 1), (3, 1), (5, 1), (6, 2), (9, 2), (10, 2), (20, 4)])
def test_held_out_pairs_are_never_trained_on_and_few_are_warned_of(n: int, held: int, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "", "chosen": f"c{i}", "rejected": f"r{i}"}) for i in range(n)))
    logged: list[str] = []
    logger.enable("lora_lite")
    sink = logger.add(logged.append, level="WARNING")  # type: ignore[arg-type]
    try:
        found = read_pairs(path, seed=0)
    finally:
        logger.remove(sink)
    assert len(found.held) == held and len(found.train) == n - held and not set(found.held) & set(found.train)
    assert any(f"{n} pairs, {held} of them held out" in line for line in logged) == (n < 10)
    assert read_pairs(path, seed=0) == found
    assert n < 20 or read_pairs(path, seed=1) != found
