"""Do `lora-lite variants`, `info` and `convert` say what is so, without a model where none is needed, and refuse in one line else?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_lite as ll
from tests.models import VARIANTS, Row, attach, each_variant, llama, mlp, normal, randomise, token_ids
from tests.references import assert_close, assert_differs, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = ("q_proj", "down_proj")
IDS = token_ids(2, 6)


@pytest.fixture
def run(shell: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """run("info", "a.safetensors") -> (exit status, stdout, stderr), in the test's folder."""
    monkeypatch.chdir(tmp_path)

    return shell


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(config: ll.AdapterConfig, **keywords: Any) -> tuple[Any, ll.Adapter]:
    model = llama()
    return model, randomise(attach(model, Row(config), **keywords), std=0.1)


def saved(path: Path, config: ll.AdapterConfig, **keywords: Any) -> tuple[Any, ll.Adapter]:
    model, adapter = trained(config, **keywords)
    adapter.save(path, {"note": "kind"})
    return model, adapter


# -- an adapter as a value, from a file -------------------------------------------------------------------------------------


@each_variant
def test_a_file_is_an_adapter_without_a_model(row: Row, tmp_path: Path) -> None:
    model = mlp()
    adapter = randomise(attach(model, row))
    adapter.save(tmp_path / "a", {"note": "kind"})
    alone = ll.read(tmp_path / "a", name="alone")
    assert not alone.attached and alone.sizes == adapter.sizes and alone.config == adapter.config
    assert alone.metadata == {"note": "kind"} and alone.fingerprint == adapter.fingerprint and alone.diagnostics == adapter.diagnostics
    assert [n for n, _ in alone.named_parameters()] == [f"{n}__alone" for n, _ in adapter.named_parameters()]
    assert all(same_bits(v, alone.state_dict()[k]) for k, v in adapter.state_dict().items())
    x = normal(2, 3, 12)
    want = model(x)
    adapter.detach()
    ll.attach(model, alone)
    assert same_bits(model(x), want)


def test_a_value_put_on_another_base_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", ll.LoRAConfig(r=4, targets=TARGETS))
    with pytest.raises(ValueError, match="another base"):
        ll.attach(llama(seed=1), ll.read(tmp_path / "a"))


def test_a_file_of_the_predecessors_says_its_sizes_by_its_tensors(tmp_path: Path) -> None:
    save_file({"A.a__b": normal(4, 7), "B.a__b": normal(5, 4)}, tmp_path / "old", {"r": "4", "alpha": "8"})
    assert ll.read(tmp_path / "old").sizes == {"a.b": (7, 5)}


def by_hand(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], fingerprint: Any = None) -> Path:
    metadata = {"format": "lora_lite", "format_version": "1", "config": json.dumps(config)}
    save_file(tensors, path, metadata | ({"fingerprint": json.dumps(fingerprint)} if fingerprint is not None else {}))
    return path


def test_a_file_that_does_not_say_its_sizes_needs_a_model(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "a", {"variant": "ia3"}, {"a.lora_l": normal(5)})
    with pytest.raises(ll.CheckpointError, match=r"no fingerprint, and what 'ia3' keeps does not say how wide the layers a are.*ll\.load"):
        ll.read(path)


@pytest.mark.parametrize("shape", [None, [5], [5, "7"], [5, -7], "57", [[5, 7]]])
def test_a_fingerprint_that_cannot_be_read_says_nothing(shape: Any, tmp_path: Path) -> None:
    tensors = {"a.lora_A": normal(4, 7), "a.lora_B": normal(5, 4)}
    path = by_hand(tmp_path / "a", {"variant": "lora", "r": 4}, tensors, {"targets": {"a": {"shape": shape}}})
    assert ll.read(path).sizes == {"a": (7, 5)}
    path = by_hand(tmp_path / "b", {"variant": "lora", "r": 4}, tensors, {"targets": {"a": {"shape": [6, 7]}}})
    with pytest.raises(ll.CheckpointError, match="of another shape"):
        ll.read(path)


# -- variants -------------------------------------------------------------------------------------------------------------


def test_every_variant_has_a_line(run: Any) -> None:
    status, out, err = run("variants")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:]] == sorted(ll.REGISTRY)
    assert "PEFT name" in out.splitlines()[0] and "trained per layer" in out.splitlines()[0]


def test_variants_as_json_answer_with_reasons(run: Any) -> None:
    rows = {row["variant"]: row for row in json.loads(run("variants", "--json")[1])}
    assert set(rows) == set(ll.REGISTRY)
    assert rows["dora"]["can"]["quantised base"] == {"yes": False, "why": "dora reads the dense weight at every forward"}
    assert rows["lora"]["can"]["merge"] == {"yes": True} and rows["lora"]["PEFT name"] == "LORA"


# -- info -----------------------------------------------------------------------------------------------------------------


def test_info_of_a_file(run: Any, tmp_path: Path) -> None:
    _, adapter = saved(tmp_path / "a.safetensors", ll.PiSSAConfig(r=4, targets=TARGETS), train_also="model.norm")
    status, out, _ = run("info", "a.safetensors", "--json")
    found = json.loads(out)
    assert status == 0 and found["variant"] == "pissa" and found["written_by"] == f"lora_lite {ll.__version__}"
    assert found["config"] == json.loads(adapter.config.to_json())
    assert {t: (x["d_in"], x["d_out"]) for t, x in found["layers"].items()} == adapter.sizes
    assert found["trained"] == adapter.num_parameters() and found["numbers"] == sum(v.numel() for v in adapter.state_dict().values())
    assert found["fingerprint"] == adapter.fingerprint and found["diagnostics"] == adapter.diagnostics
    assert found["metadata"] == {"note": "kind"} and list(found["also"]) == ["model.norm.weight"]
    status, out, err = run("info", "a.safetensors")
    assert (status, err) == (0, "")
    for piece in ("pissa", "r=4", "LlamaForCausalLM", "model.layers.*.self_attn.q_proj (2)  64 -> 64", "lora_A (4, 64)", "note: kind",
                  "model.norm.weight (64)", f"lora_lite {ll.__version__}", "tail_depth"):  # fmt: skip
        assert piece in out


@each_variant
def test_info_counts_what_trains_in_every_variant(row: Row, run: Any, tmp_path: Path) -> None:
    adapter = attach(mlp(), row)
    adapter.save(tmp_path / "a")
    found = json.loads(run("info", "a", "--json")[1])
    assert found["trained"] == adapter.num_parameters() and len(found["layers"]) == len(adapter.targets)


def test_info_of_a_predecessors_file(run: Any, tmp_path: Path) -> None:
    save_file({"A.a__b": normal(4, 7), "B.a__b": normal(5, 4)}, tmp_path / "old", {"r": "4", "alpha": "8", "trait": "kind"})
    status, out, _ = run("info", "old")
    assert status == 0
    for piece in ("ModulatedLoRA", "r=4", "a.b  7 -> 5", "trait: kind", "no fingerprint"):
        assert piece in out


def test_info_where_the_sizes_are_not_known(run: Any, tmp_path: Path) -> None:
    by_hand(tmp_path / "a", {"variant": "ia3"}, {"a.lora_l": normal(5)})
    assert json.loads(run("info", "a", "--json")[1])["layers"]["a"]["d_in"] is None
    assert "a  lora_l (5)" in run("info", "a")[1]


def test_info_of_a_peft_folder(run: Any, tmp_path: Path) -> None:
    _, adapter = trained(ll.DoRAConfig(r=4, targets=TARGETS))
    ll.to_peft(adapter, tmp_path / "folder")
    found = json.loads(run("info", "folder", "--json")[1])
    assert (found["peft_type"], found["variant"], found["why_not"]) == ("LORA", ["dora"], None)
    assert found["written_by"] == f"lora_lite {ll.__version__}" and found["fingerprint"] == adapter.fingerprint
    assert set(found["layers"]) == set(adapter.targets) and found["trained"] == adapter.num_parameters()
    config = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    (tmp_path / "folder" / "adapter_config.json").write_text(json.dumps(config | {"bias": "all", "peft_version": "0.21.2"}))
    status, out, _ = run("info", "folder")
    assert status == 0 and "refused" in out and "bias='all'" in out and "lora_A.weight (4, 64)" in out


def test_info_of_a_hostile_header_prints_nothing_that_a_terminal_obeys(run: Any, tmp_path: Path) -> None:
    adapter = attach(mlp(), VARIANTS["lora"])
    adapter.save(tmp_path / "a", {"note": "\x1b[2Jgone", "long": "x" * 100_000})
    _, out, _ = run("info", "a")
    assert "\x1b" not in out and len(out) < 5_000


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("none", "there is no file none"),
        (".", "is a directory; an adapter is one file"),
        ("model.safetensors", "it looks like a model's weights"),
        ("text", "is JSON"),
    ],
)
def test_info_of_what_is_no_checkpoint_is_one_line(word: str, said: str, run: Any, tmp_path: Path) -> None:
    save_file({"a.weight": normal(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "text").write_text('{"a": 1}' + " " * 80)
    status, out, err = run("info", word)
    assert (status, out) == (2, "") and said in err and "Traceback" not in err and err.startswith("lora-lite: info: ")


# -- convert --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "dose"),
    [
        (ll.LoRAConfig(r=4, targets=TARGETS), ["-c", "-0.7"]),
        (ll.PiSSAConfig(r=4, targets=TARGETS), ["-c=-0.7"]),
        (ll.VeRAConfig(r=4, targets=TARGETS), ["-c-0.7"]),
        (ll.AntiPaSTOConfig(r=4, targets=TARGETS), ["-c=-0.7"]),
        (ll.SSVDConfig(r=4, targets=TARGETS), ["-c", "-0.7"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v.variant,
)
def test_a_file_becomes_one_plain_lora_without_a_model(config: ll.AdapterConfig, dose: list[str], run: Any, tmp_path: Path) -> None:
    model, adapter = saved(tmp_path / "a.safetensors", config)
    status, out, err = run("convert", "a.safetensors", "folder", "--as-lora", *dose, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["c"] == -0.7 and found["layers"] == len(adapter.targets) and set(found["relative_error"].values()) == {0.0}
    with adapter(model, c=-0.7):
        want = logits(model)
    assert_differs(want, logits(llama()), "the adapter's effect", least=2e-3)
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "folder").eval()), want, "PEFT's logits", 2e-6)


def test_a_method_that_needs_the_base_names_the_option(run: Any, tmp_path: Path) -> None:
    model, adapter = saved(tmp_path / "a.safetensors", ll.DoRAConfig(r=4, targets=TARGETS))
    status, out, err = run("convert", "a.safetensors", "folder")
    assert (status, out) == (2, "") and "--model PATH_OR_HUB_ID of the base" in err and "Traceback" not in err
    assert not (tmp_path / "folder").exists()
    adapter.detach()
    model.save_pretrained(tmp_path / "base")
    status, out, err = run("convert", "a.safetensors", "folder", "--model", "base")
    assert status == 0 and "exactly" in out, err
    ll.attach(model, adapter)
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "folder").eval()), logits(model), "PEFT's logits", 2e-6)


def test_an_approximation_is_asked_for_and_told(run: Any, tmp_path: Path) -> None:
    model, adapter = saved(tmp_path / "a.safetensors", ll.IA3Config(targets=TARGETS))
    adapter.detach()
    model.save_pretrained(tmp_path / "base")
    status, _, err = run("convert", "a.safetensors", "folder", "--as-lora", "--model", "base")
    assert status == 2 and "--approximate" in err and "approximate=True" not in err
    status, out, _ = run("convert", "a.safetensors", "folder", "--as-lora", "--approximate", "--r", "3", "--model", "base")
    assert status == 0 and "approximately" in out


def test_a_peft_folder_becomes_a_file_of_ours(run: Any, tmp_path: Path) -> None:
    model, adapter = trained(ll.LoRAConfig(r=4, targets=TARGETS))
    ll.to_peft(adapter, tmp_path / "folder")
    want = logits(model)
    adapter.detach()
    model.save_pretrained(tmp_path / "base")
    status, _, err = run("convert", "folder", "a.safetensors")
    assert status == 2 and "give --model" in err and not (tmp_path / "a.safetensors").exists()
    status, out, err = run("convert", "folder", "a.safetensors", "--model", "base", "--json")
    assert status == 0 and json.loads(out)["as"] == "lora_lite", err
    assert ll.read(tmp_path / "a.safetensors").fingerprint == adapter.fingerprint
    ll.load(model, tmp_path / "a.safetensors")
    assert same_bits(logits(model), want)


def test_a_predecessors_file_becomes_one_of_ours(run: Any, tmp_path: Path) -> None:
    save_file({"A.a__b": normal(4, 7), "B.a__b": normal(5, 4)}, tmp_path / "old", {"r": "4", "alpha": "8"})
    assert run("convert", "old", "new.safetensors")[0] == 0
    assert same_bits(ll.read(tmp_path / "new.safetensors").state_dict()["a.b.lora_A"], normal(4, 7))


def test_the_model_is_of_the_class_it_was(run: Any, tmp_path: Path) -> None:
    """A folder of a causal model's base holds what a classifier's trunk needs too; the fingerprint says which it was."""
    from tests.models import bert

    model = bert()
    adapter = randomise(ll.attach(model, ll.DoRAConfig(r=2, targets="query")), std=0.1)
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    model.save_pretrained(tmp_path / "base")
    status, _, err = run("convert", "a.safetensors", "folder", "--model", "base")
    assert status == 0, err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none", "folder"], "there is no file none"),
        (["a.safetensors", "b.safetensors", "-c", "0.5"], "-c shape a PEFT folder"),
        (["a.safetensors", "b.safetensors", "--as-lora"], "--as-lora shape a PEFT folder"),
        (["a.safetensors", "folder", "-c", "nan"], "c must be finite"),
        (["a.safetensors", "folder", "--r", "2"], "--as-lora"),
        (["a.safetensors", "folder", "--as-lora", "--r", "2"], "--approximate"),
        (["a.safetensors", "folder", "--part", "ia3"], "--part ia3"),
        (["a.safetensors", "file"], "is a file"),
        (["a.safetensors", "file/folder"], "is a file"),
        (["a.safetensors", "folder", "--model", "absent"], "--model absent"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_cannot_be_converted_is_one_line(words: list[str], said: str, run: Any, tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", ll.LoRAConfig(r=4, targets=TARGETS))
    (tmp_path / "file").write_text("")
    status, out, err = run("convert", *words)
    assert (status, out) == (2, "") and said in err and "Traceback" not in err and err.startswith("lora-lite: "), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "file"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.safetensors", "b.safetensors"], "b.safetensors exists"),
        (["a.safetensors", "a.safetensors", "--force"], "a.safetensors is read by this command"),
        (["a.safetensors", "folder"], "folder/adapter_config.json exists"),
        (["folder", "folder", "--model", "absent", "--force"], "is read by this command"),
        (["a.safetensors", "folder", "--force"], None),
        (["a.safetensors", "b.safetensors", "--force"], None),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_convert_replaces_what_it_is_asked_to_and_never_its_source(words: list[str], said: str | None, run: Any, tmp_path: Path) -> None:
    for i, name in enumerate(("a.safetensors", "b.safetensors")):
        _, adapter = saved(tmp_path / name, ll.LoRAConfig(r=4 + i, targets=TARGETS))
    ll.to_peft(adapter, tmp_path / "folder")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    status, _, err = run("convert", *words)
    same = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert (status, same) == ((0, False) if said is None else (2, True)) and (said or "") in err and "Traceback" not in err, err


def test_convert_into_a_folder_that_takes_no_file_is_one_line(run: Any, tmp_path: Path, closed: Path) -> None:
    saved(tmp_path / "a.safetensors", ll.LoRAConfig(r=4, targets=TARGETS))
    for target in ("x.safetensors", "folder"):
        status, _, err = run("convert", "a.safetensors", str(closed / target))
        assert status == 2 and f"no file can be made in {closed}" in err and ".tmp" not in err
