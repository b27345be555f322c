"""Does `lora-lite subspace` do from a shell what the library does, as text and as JSON, and say in one line what is wrong?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll
from lora_lite.subspace.source import FileSource
from tests.models import llama, mlp, randomise
from tests.subspaces import MODULES, collection_error, family, of, relative_error, updates

Run = Callable[..., tuple[int, Any, str]]
LORA = ll.LoRAConfig(r=2, targets=("q_proj",))


@pytest.fixture
def run(shell: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """run("info", "x") -> (exit status, what --json said or the text, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str, plain: bool = False) -> tuple[int, Any, str]:
        status, out, err = shell("subspace", *words, *([] if plain else ["--json"]))
        return status, (out if plain or not out else json.loads(out)), err

    return call


@pytest.fixture
def given() -> list[ll.Adapter]:
    """Five that share, three saved as files of ours and two as PEFT folders, in the folder that `run` runs in."""
    return family(5, config=ll.LoRAConfig(r=3, alpha=7.0, rslora=True, targets=("q_proj",)))


def laid_out(adapters: list[ll.Adapter], folder: Path) -> list[str]:
    for i, adapter in enumerate(adapters):
        adapter.save(folder / f"a{i}.safetensors") if i < 3 else ll.to_peft(adapter, folder / f"a{i}")
    return [f"a{i}.safetensors" if i < 3 else f"a{i}" for i in range(len(adapters))]


def test_build_takes_files_and_peft_folders(run: Run, given: list[ll.Adapter], tmp_path: Path) -> None:
    status, found, _ = run("build", *laid_out(given, tmp_path), "--out", "tasks", "-k", "4")
    assert status == 0 and found["num_tasks"] == 5 and found["components"] == [4, 4] and found["file_bytes"] > 0
    sub = ll.SharedSubspace.load("tasks")
    assert sub.tasks == ["a0", "a1", "a2", "a3", "a4"]
    assert collection_error(given, sub) == pytest.approx(collection_error(given, of(given, num_components=4)), abs=1e-6)
    status, found, _ = run("info", "tasks")
    assert status == 0 and found["tasks"] == sub.tasks
    for t, a in zip(sub.tasks, given, strict=True):
        assert relative_error(a, sub.reconstruct(t)) <= found["error_at_most"][t] * (1 + 1e-4) + 1e-6


def test_build_says_when_the_result_is_larger_than_what_it_was_given(run: Run, tmp_path: Path) -> None:
    for i, one in enumerate(family(2, r=1, d_in=200, d_out=200, noise=1.0)):
        one.save(tmp_path / f"{i}.safetensors")
    found = run("build", "0.safetensors", "1.safetensors", "--out", "tasks", "--variance-threshold", "1")[1]
    assert found["file_bytes"] > found["given_bytes"] and f"{found['file_bytes'] - found['given_bytes']:,} bytes larger" in found["note"]
    found = run("build", "0.safetensors", "1.safetensors", "--out", "less", "--variance-threshold", "1", "--bits", "4")[1]
    assert found["file_bytes"] < found["given_bytes"] and "note" not in found


def test_every_command_speaks_to_people_too(run: Run, given: list[ll.Adapter], tmp_path: Path) -> None:
    paths = laid_out(given, tmp_path)
    ids = [word for i in range(4) for word in ("--id", f"t_{i}")]
    assert "num tasks" in run("build", *paths[:4], *ids, "--out", "tasks", plain=True)[1]
    assert "space" in (text := run("info", "tasks", plain=True)[1]) and "\n  t_0 " in text
    assert "covered_before" in run("add", "tasks", paths[4], plain=True)[1]
    assert "nothing is shared" in (text := run("diagnose", "tasks", *paths, plain=True)[1]) or "share directions" in text
    assert "bases are orthonormal" in run("validate", "tasks", plain=True)[1]
    assert "cosine" in run("diff", paths[0], paths[1], plain=True)[1]
    assert "folders" in run("export", "tasks", "--out", "peft", plain=True)[1]


def test_build_has_the_options_of_the_library(run: Run, given: list[ll.Adapter], tmp_path: Path) -> None:
    paths = laid_out(given, tmp_path)
    ids = [word for name in ("x/y", "..", "任务", "p", "q") for word in ("--id", name)]
    for options, want in (
        (["--space", "flat", "-k", "3"], of(given, space="flat", num_components=3)),
        (["--coefficients", "factors", "--variance-threshold", "0.9"], of(given, coefficients="factors", variance_threshold=0.9)),
        (["--budget-bytes", "6000"], of(given, budget_bytes=6000)),
        (["-k", "4", "--bits", "8"], of(given, num_components=4).quantize(8)),
    ):
        status, found, err = run("build", *paths, "--out", "tasks", *ids, *options, "--force")
        assert status == 0, err
        sub = ll.SharedSubspace.load("tasks")
        assert sub.tasks == ["x/y", "..", "任务", "p", "q"] and found["bytes"] == sub.nbytes == want.nbytes
        assert collection_error(given, sub) == pytest.approx(collection_error(given, want), abs=1e-5)


def test_add_absorbs_or_projects(run: Run, given: list[ll.Adapter], tmp_path: Path) -> None:
    paths = laid_out(given, tmp_path)
    run("build", *paths[:3], "--out", "tasks", "--variance-threshold", "1")
    status, found, _ = run("add", "tasks", paths[3], "--out", "more")
    assert status == 0 and 0 < found["covered_before"]["a3"] < 1 and ll.SharedSubspace.load("tasks").tasks == ["a0", "a1", "a2"]
    assert relative_error(given[3], ll.SharedSubspace.load("more").reconstruct("a3")) < 1e-5
    run("add", "tasks", paths[3], "--id", "only/seen", "--project")
    projected = ll.SharedSubspace.load("tasks")
    assert projected.tasks[-1] == "only/seen"
    lost = relative_error(given[3], projected.reconstruct("only/seen")) ** 2
    assert lost == pytest.approx(1 - found["covered_before"]["a3"], abs=1e-5) and lost > 1e-3


def test_export_writes_folders_that_peft_loads_and_no_id_is_a_path(run: Run, tmp_path: Path) -> None:
    from peft import PeftModel

    model, ids = llama(), torch.arange(1, 8)[None]
    adapters, want = [], {}
    for i in range(2):
        config = ll.LoRAConfig(r=3, alpha=5.0, rslora=True, targets=("q_proj", "v_proj"), rank_pattern={"v_proj": 2})
        adapter = randomise(ll.attach(model, config, seed=i), seed=i)
        want[f"../{i}"] = model(ids).logits.detach()
        adapter.detach()
        adapters.append(adapter)
    of(adapters, task_ids=list(want), variance_threshold=1.0).save("tasks")
    status, found, _ = run("export", "tasks", "--out", "peft")
    assert status == 0 and sorted(p.name for p in (tmp_path / "peft").iterdir()) == ["task_0", "task_1"]
    for t, folder in found["folders"].items():
        got = PeftModel.from_pretrained(llama(), folder)(ids).logits
        assert float((got - want[t]).abs().max()) < 1e-5 * float(want[t].abs().max())
    assert run("export", "tasks", "--task", "../1", "--out", "one")[0] == 0 and (tmp_path / "one" / "adapter_config.json").is_file()


def test_diagnose_answers_per_layer(run: Run, given: list[ll.Adapter], tmp_path: Path) -> None:
    paths = laid_out(given, tmp_path)
    run("build", *paths, "--out", "tasks", "-k", "5")
    status, found, _ = run("diagnose", "tasks", *paths)
    assert status == 0 and found["layers_that_share"] == "2 of 2"
    assert all(layer["originals"] and layer["left_out"] > layer["chance"] for layer in found["layers"].values())
    found = run("diagnose", "tasks")[1]
    assert found["layers_that_share"].startswith("0 of 0; no verdict on 2: name the original adapters behind tasks")
    assert all(layer["shares"] is None and "no verdict" in layer["verdict"] for layer in found["layers"].values())
    assert "no verdict" in run("diagnose", "tasks", plain=True)[1]


@pytest.mark.parametrize("space", ["feature", "flat"])
def test_diagnose_is_short_for_people_and_whole_in_json(space: str, run: Run, given: list[ll.Adapter], tmp_path: Path) -> None:
    paths = laid_out(given, tmp_path)
    run("build", *paths, "--out", "tasks", "-k", "4", "--space", space)
    layers = run("diagnose", "tasks", *paths)[1]["layers"]
    for layer in layers.values():
        for name in ("spectrum", "chance_spectrum"):
            assert sorted(layer[name]) == ["a", "b"] and len(layer[name]["b"]) >= 5 and layer[name]["b"][0] > layer[name]["b"][4]
    lines = run("diagnose", "tasks", *paths, plain=True)[1].splitlines()
    assert lines[2:] == [f"{m}: {layer['verdict']}" for m, layer in layers.items()] and len(lines) == 4
    assert all(len(line) < 200 for line in lines)


def test_validate_holds_the_tasks_against_their_originals(run: Run, given: list[ll.Adapter], tmp_path: Path) -> None:
    paths = laid_out(given, tmp_path)
    run("build", *paths, "--out", "tasks", "-k", "4")
    status, found, _ = run("validate", "tasks", *paths)
    assert status == 0 and all(found["checks"].values()) and set(found["error"]) == {"a0", "a1", "a2", "a3", "a4"}
    status, found, _ = run("validate", "tasks", *paths[1:], paths[0])  # the control: the originals in another order
    assert status == 1 and not found["checks"]["errors_within_their_bounds"]


def test_diff_compares_adapters_files_folders_and_tasks(run: Run, given: list[ll.Adapter], tmp_path: Path) -> None:
    paths = laid_out(given, tmp_path)
    run("build", *paths, "--out", "tasks", "--variance-threshold", "1")
    assert run("diff", paths[0], "tasks::a0")[1]["relative"] < 1e-5 and run("diff", paths[4], "tasks::a4")[1]["cosine"] > 1 - 1e-6
    found = run("diff", paths[0], paths[3])[1]
    a, b = (torch.cat([w.flatten() for w in updates(x).values()]) for x in (given[0], given[3]))
    assert found["relative"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-5)
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-6)
    family(1, modules=("other",))[0].save(tmp_path / "other.safetensors")
    assert run("diff", paths[0], "other.safetensors")[1]["only_in_second"] == ["other"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["build", "a0.safetensors", "a1.safetensors", "--out", "a1.safetensors", "--force"], "a1.safetensors is read by this command"),
        (["build", "a0.safetensors", "a3", "--out", "a3/adapter_model.safetensors", "--force"], "adapter_model.safetensors is read by"),
        (["build", "a0.safetensors", "link.safetensors", "--out", "a1.safetensors", "--force"], "is read by this command"),
        (["build", "a0.safetensors", "a2.safetensors", "--out", "a1.safetensors"], "--out a1.safetensors: a1.safetensors exists"),
        (["build", "a0.safetensors", "a2.safetensors", "--out", "a3"], "--out a3: it is a folder"),
        (["build", "a0.safetensors", "--out", "a1.safetensors/in/it"], "a1.safetensors is a file"),
        (["add", "tasks", "a2.safetensors", "--out", "a2.safetensors", "--force"], "is read by this command"),
        (["add", "tasks", "a2.safetensors", "--out", "a1.safetensors"], "--out a1.safetensors: a1.safetensors exists"),
        (["export", "tasks", "--task", "a0", "--out", "a3"], "--out a3: a3/adapter_config.json exists"),
        (["export", "tasks", "--out", "a0.safetensors"], "a0.safetensors is a file"),
    ],
)
def test_what_the_user_has_is_not_replaced_unasked(words: list[str], said: str, run: Run, given: list[ll.Adapter], tmp_path: Path) -> None:
    laid_out(given, tmp_path)
    (tmp_path / "link.safetensors").symlink_to("a1.safetensors")
    of(given[:2], task_ids=["a0", "a1"]).save("tasks")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    status, _, err = run(*words)
    assert status == 2 and said in err and "Traceback" not in err, err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_there_is_is_replaced_when_asked(run: Run, given: list[ll.Adapter], tmp_path: Path) -> None:
    laid_out(given, tmp_path)
    assert run("build", "a0.safetensors", "a2.safetensors", "--out", "a1.safetensors", "--force")[0] == 0
    assert run("add", "a1.safetensors", "a3", "--out", "a1.safetensors")[0] == 0  # into itself, as without --out
    assert ll.SharedSubspace.load("a1.safetensors").tasks == ["a0", "a2", "a3"]
    assert run("export", "a1.safetensors", "--task", "a0", "--out", "a3", "--force")[0] == 0
    assert relative_error(given[0], ll.SharedSubspace.load("a1.safetensors").reconstruct("a0")) < 1


def test_a_folder_that_takes_no_file_is_told_before_the_work(
    run: Run, given: list[ll.Adapter], tmp_path: Path, closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = laid_out(given, tmp_path)
    monkeypatch.setattr(ll.SharedSubspace, "from_adapters_streaming", lambda *_, **__: pytest.fail("the work was done"))
    status, _, err = run("build", *paths, "--out", str(closed / "tasks"))
    assert status == 2 and f"no file can be made in {closed}" in err and "tmp" not in err.replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["build", "in/kind.safetensors", "in/kind.safetensors", "--out", "t"], "repeated: ['kind']. Give --id once per adapter"),
        (["build", "a0.safetensors", "wide.safetensors", "--out", "t"], "--missing zero or common allows that"),
        (["build", "a0.safetensors", "a1.safetensors", "--out", "t", "--id", "x"], "1 --id for 2 adapters"),
        (["build", "a0.safetensors", "a1.safetensors", "--out", "t", "--budget-bytes", "9"], "--budget-bytes 9 does not hold"),
        (["add", "tasks", "wide.safetensors"], "build with --missing zero allows that"),
        (["add", "int8", "a2.safetensors"], "--project works as it is, or build it again without --bits"),
        (["add", "diag", "a2.safetensors"], "--project, or build with --coefficients core"),
        (["export", "tasks", "--task", "nobody", "--out", "x"], "lora-lite: no task 'nobody' here"),
        (["info", "nothing"], "nothing"),
        (["info", "a0.safetensors"], "It is an adapter"),
        (["build", "a0.safetensors", "a0.safetensors", "--out", "t"], "repeated"),
        (["build", "a0.safetensors", "--out", "t", "--bits", "3"], "--bits 3"),
        (["build", "a0.safetensors", "--out", "t", "-k", "2", "--budget-bytes", "9999"], "not both"),
        (["build", "odd.safetensors", "--out", "t"], "no low-rank form"),
        (["add", "tasks", "a0.safetensors"], "'a0' is there already"),
        (["export", "tasks", "--task", "nobody", "--out", "x"], "nobody"),
        (["validate", "tasks", "a0.safetensors"], "1 adapters for the 2 tasks"),
        (["diff", "a0.safetensors", "tasks::nobody"], "nobody"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words: list[str], said: str, run: Run, given: list[ll.Adapter], tmp_path: Path) -> None:
    laid_out(given, tmp_path)
    odd = ll.attach(mlp(), ll.IA3Config(targets="up"))
    odd.save(tmp_path / "odd.safetensors")
    given[0].save(tmp_path / "in" / "kind.safetensors")
    family(1, modules=("other",))[0].save(tmp_path / "wide.safetensors")
    two = lambda **how: of(given[:2], task_ids=["a0", "a1"], **how)  # noqa: E731
    for name, sub in {"tasks": two(), "int8": two().quantize(8), "diag": two(coefficients="diag"), "flat": two(space="flat")}.items():
        sub.save(name)
    status, _, err = run(*words)
    assert status == 2 and said in err and "Traceback" not in err and "lora-lite subspace" not in err
    for python in ("task_ids", "missing=", "dtype=", "budget_bytes", "()", 'space="', 'coefficients="', '"no task'):
        assert python not in err


def test_add_names_the_layers_it_leaves_out_once(run: Run, tmp_path: Path) -> None:
    whole = family(3)
    for i, one in enumerate(whole):
        one.save(tmp_path / f"{i}.safetensors")
    family(1, modules=MODULES[:1])[0].save(tmp_path / "small.safetensors")
    run("build", "0.safetensors", "small.safetensors", "--missing", "common", "--out", "tasks")
    for words in (["add", "tasks", "1.safetensors"], ["add", "tasks", "2.safetensors", "--project"]):
        status, found, err = run(*words)
        assert status == 0 and max(found["covered_before"].values()) < 0.95
        assert err.count(MODULES[1]) == 1 and "left out" in err


@pytest.mark.parametrize("words", [[], ["--project"]], ids=["absorb", "project"])
def test_add_opens_an_adapter_once(words: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening checks a file's hash over all of its tensors, and says what was trained beside them; an absorb did both twice."""
    of([randomise(ll.attach(llama(), LORA, seed=i), seed=i) for i in range(2)], task_ids=["a", "b"]).save("tasks")
    randomise(ll.attach(llama(), LORA, seed=2, train_also="norm"), seed=2).save(tmp_path / "c.safetensors")
    opened: list[Path] = []
    init = FileSource.__init__
    monkeypatch.setattr(FileSource, "__init__", lambda self, task, path: (opened.append(path), init(self, task, path))[1])
    status, found, err = run("add", "tasks", "c.safetensors", *words)
    assert status == 0 and found["num_tasks"] == 3, err
    assert opened == [Path("c.safetensors")] and err.count("was trained beside this one") == 1
