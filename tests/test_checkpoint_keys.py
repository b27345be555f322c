"""What does a user hear of a file whose keys or values a tool has changed? Everything at once; and a wrapper's prefix is no change."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.base import fingerprint, is_linear
from lora_lite.checkpoint import CheckpointError, digest
from lora_lite.cli.info import info
from lora_lite.subspace.source import source_of
from tests.models import VARIANTS, attach, llama, randomise
from tests.references import same_bits
from tests.test_checkpoint_file import mangled

IDS = torch.arange(1, 9)[None]
UP = "model.layers.1.mlp.up_proj"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "a.safetensors"
    randomise(attach(llama(), VARIANTS["lora"])).save(path)
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    return tmp_path / "b.safetensors"


def rewritten(source: Path, target: Path, change: Callable[[Tensors], Tensors], hashed: bool = True, **header: str) -> None:
    """As users do it: read with safetensors, change, save with the same metadata (`hashed`) or without what the hash needs."""
    with safe_open(source, "pt") as file:
        metadata = dict(file.metadata()) | header
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 a safe_open is no dict
    if not hashed:
        del metadata["sha256"], metadata["library_version"]
    save_file(change(tensors), target, metadata)


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + k: v for k, v in tensors.items()}


def without(*starts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(starts)}


def with_values(**changes: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {f"{UP}.{f}": make(tensors[f"{UP}.{f}"]) for f, make in changes.items()}


def with_nan(v: Tensor) -> Tensor:
    v = v.clone()
    v.view(-1)[0] = math.nan
    return v


def everything(tensors: Tensors) -> Tensors:
    """One key missing, one of another shape, one of no linear layer, one not finite."""
    tensors = with_values(lora_A=with_nan)(without(f"{UP}.lora_B")(tensors))
    q = "model.layers.0.self_attn.q_proj.lora_A"
    return tensors | {"x.y.lora_A": torch.ones(2), q: tensors[q][:-1].clone()}


def in_every_way(path: Path, model: nn.Module, adapter: ll.Adapter) -> dict[str, Callable[[], Any]]:
    """All that reads an adapter's file."""
    return {
        "load": lambda: ll.load(model, path, name="other"),
        "load, any base": lambda: ll.load(model, path, name="other", strict_base=False),
        "from_checkpoint": lambda: ll.Adapter.from_checkpoint(model, path, name="other"),
        "adapter.load": lambda: adapter.load(path),
        "adapter.load, any base": lambda: adapter.load(path, strict_base=False),
        "read": lambda: ll.read(path),
        "info": lambda: info(path),
        "subspace": lambda: ll.SharedSubspace.from_adapters([path]),
        "streaming": lambda: source_of("a", path),
    }


def refusals(path: Path) -> dict[str, str]:
    """What each way of reading says; the model and the adapter on it stay as they are."""
    model = llama()
    adapter = randomise(attach(model, VARIANTS["lora"]))
    before, said = {k: v.clone() for k, v in adapter.state_dict().items()}, {}
    for way, go in in_every_way(path, model, adapter).items():
        with pytest.raises(CheckpointError) as caught:
            go()
        said[way] = str(caught.value)
    assert list(ll.adapters(model)) == ["default"] and all(same_bits(v, before[k]) for k, v in adapter.state_dict().items())
    return said


def knows_a_model(way: str) -> bool:
    return way.startswith(("load", "from_checkpoint", "adapter"))


# --- prefixes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_a_file_whose_keys_got_a_wrappers_prefix_is_the_same_adapter(prefix: str, hashed: bool, good: Path, bad: Path) -> None:
    rewritten(good, bad, prefixed(prefix), hashed)
    model, plain = llama(), llama()
    ll.load(plain, good)
    adapter = ll.load(model, bad)
    assert same_bits(model(IDS).logits, plain(IDS).logits) and not same_bits(model(IDS).logits, llama()(IDS).logits)
    adapter.load(bad)
    assert info(bad)["numbers"] == info(good)["numbers"]
    assert ll.read(bad).sizes == ll.read(good).sizes  # the header, which says the names it was saved under, is as it was
    assert torch.equal(source_of("a", bad).read(UP).A, source_of("a", good).read(UP).A)
    assert ll.SharedSubspace.from_adapters([good, bad]).state.layers.keys() == adapter.sizes.keys()
    adapter.save(bad)
    assert bad.read_bytes() == good.read_bytes()


@pytest.mark.parametrize("row", ["vera", "eva"])
def test_what_the_header_says_by_name_follows_the_prefix(row: str, tmp_path: Path) -> None:
    """Tensors that layers share, parameters trained beside them and ranks by layer are named in the header, which stays as it was."""
    good, bad, model = tmp_path / "a", tmp_path / "b", llama()
    kept = randomise(attach(model, VARIANTS[row], train_also=r"model\.norm"))
    want = model(IDS).logits
    kept.save(good)
    rewritten(good, bad, prefixed("module."))
    other = llama()
    adapter = ll.load(other, bad)
    assert same_bits(other(IDS).logits, want)
    assert ll.read(bad).sizes == kept.sizes
    if row == "eva":  # low-rank
        assert set(source_of("a", bad).modules) == set(kept.targets)
    adapter.save(bad)
    assert bad.read_bytes() == good.read_bytes()


def test_the_hash_of_keys_as_they_are_is_understood_too(good: Path, bad: Path) -> None:
    """Before, keys were hashed with their prefixes: files that were saved on a wrapped model."""
    with safe_open(good, "pt") as file:
        flat = {f"module.{k}": file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 a safe_open is no dict
        metadata = file.metadata() | {"sha256": ""}
    assert digest(metadata, flat) != digest(metadata, flat, {k: k for k in flat})
    save_file(flat, bad, metadata | {"sha256": digest(metadata, flat, {k: k for k in flat})})
    ll.load(llama(), bad)


def test_two_keys_that_a_prefix_tells_apart_are_hashed_as_they_are() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert digest({}, {"x.lora_A": a, "module.x.lora_A": b}) != digest({}, {"x.lora_A": b, "module.x.lora_A": a})
    assert digest({}, {"x.lora_A": a}) == digest({}, {"module.x.lora_A": a}) != digest({}, {"my.x.lora_A": a})


# --- keys and values -----------------------------------------------------------------------------------------------------

SPOILT: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "a key missing": (without(f"{UP}.lora_B"), (f"1 key missing: {UP}.lora_B",)),
    "a layer missing": (without(UP), (f"2 keys missing: {UP}.lora_A, {UP}.lora_B",)),
    "a layer renamed": (
        lambda t: {k.replace("up_proj", "upward"): v for k, v in t.items()},
        ("4 keys missing: model.layers.0.mlp.up_proj.lora_A",),
    ),
    "an unknown prefix": (prefixed("my."), ("28 keys missing: model.layers.0",)),
    "another shape": (with_values(lora_A=lambda v: v[:, :-1].clone()), (f"1 key of another shape: {UP}.lora_A (4, 63), expected (4, 64)",)),
    "NaN": (with_values(lora_A=with_nan), (f"1 key holding NaN or infinity: {UP}.lora_A",)),
    "integers": (with_values(lora_A=lambda v: v.int()), (f"1 key whose values are no floats: {UP}.lora_A (torch.int32)",)),
    "a stray key": (lambda t: t | {f"{UP}.weight": torch.ones(1)}, (f"nor listed in `also` (keys carry no adapter's name): {UP}.weight",)),
}


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("case", SPOILT)
def test_a_changed_file_is_refused_in_every_way_with_what_is_wrong(case: str, hashed: bool, good: Path, bad: Path) -> None:
    change, pieces = SPOILT[case]
    rewritten(good, bad, change, hashed)
    for way, said in refusals(bad).items():
        assert all(piece in said for piece in pieces), (way, said)
        assert ("not those that were saved (sha256)" in said) is hashed, (way, said)


@pytest.mark.parametrize("hashed", [True, False])
def test_all_that_is_wrong_is_one_error(hashed: bool, good: Path, bad: Path) -> None:
    rewritten(good, bad, everything, hashed)
    for way, said in refusals(bad).items():
        assert ("not those that were saved" in said) is hashed and f"1 key holding NaN or infinity: {UP}.lora_A" in said
        assert f"1 key missing: {UP}.lora_B" in said and "1 key of another shape: model.layers.0.self_attn.q_proj.lora_A" in said, (
            way,
            said,
        )
        assert ("unexpected: x.y.lora_A" in said) is knows_a_model(way), (way, said)
        assert ("no linear layer of this LlamaForCausalLM is named x.y" in said) is way.startswith(("load", "from_"))


def test_the_hash_is_named_alone_where_nothing_else_is_wrong(good: Path, bad: Path) -> None:
    rewritten(good, bad, with_values(lora_A=lambda v: v + 1e-7))
    for said in refusals(bad).values():
        assert said.startswith(f"{bad} is damaged: its contents are not those that were saved (sha256). Take another copy")
    rewritten(good, bad, lambda t: t, note="mine")
    refusals(bad)


def test_a_damaged_header_says_both(good: Path, bad: Path) -> None:
    rewritten(good, bad, lambda t: t, config='{"variant": "lora", "rank": 3}')
    for said in refusals(bad).values():
        assert "no fields ['rank']" in said and "not those that were saved (sha256)" in said
    rewritten(good, bad, lambda t: t, config=json.dumps({"variant": "lora", "r": 5}))
    for said in refusals(bad).values():
        assert "28 keys of another shape" in said and "not those that were saved (sha256)" in said


@pytest.mark.parametrize("hashed", [True, False])
def test_parameters_beside_the_adapter_are_in_the_same_error(hashed: bool, tmp_path: Path) -> None:
    attach(llama(), VARIANTS["lora"], train_also=r"model\.norm|lm_head").save(tmp_path / "a")
    rewritten(
        tmp_path / "a",
        tmp_path / "b",
        lambda t: without("lm_head", UP)(t) | {"model.norm.weight": torch.ones(3), "x.weight": torch.ones(1)},
        hashed,
        also='["model.norm.weight", "lm_head.weight", "x.weight"]',
    )
    model = llama()
    adapter = attach(model, VARIANTS["lora"], train_also=r"model\.norm|lm_head")
    for go in (lambda: ll.load(llama(), tmp_path / "b"), lambda: adapter.load(tmp_path / "b")):
        with pytest.raises(CheckpointError) as caught:
            go()
        said = str(caught.value)
        for piece in (f"{UP}.lora_A, {UP}.lora_B",
                      "1 key listed in `also` and not there: lm_head.weight", "unexpected: x.weight",
                      "1 key of another shape: model.norm.weight (3,), expected (64,)"):  # fmt: skip
            assert piece in said, said
        assert ("not those that were saved" in said) is hashed
    rewritten(tmp_path / "a", tmp_path / "b", lambda t: t | {"model.norm.weight": torch.ones(64).int()}, hashed=False)
    for go in (lambda: ll.load(llama(), tmp_path / "b"), lambda: adapter.load(tmp_path / "b"), lambda: ll.read(tmp_path / "b")):
        with pytest.raises(CheckpointError, match=r"no floats: model\.norm\.weight \(torch\.int32\)"):
            go()


def test_a_config_without_room_for_a_layer_is_such_an_error(tmp_path: Path) -> None:
    attach(llama(), VARIANTS["miss"]).save(tmp_path / "a")
    rewritten(tmp_path / "a", tmp_path / "b", lambda t: t, hashed=False, config='{"variant": "miss", "r": 7}')
    for go in (lambda: ll.load(llama(), tmp_path / "b"), lambda: ll.read(tmp_path / "b")):
        with pytest.raises(CheckpointError):
            go()


def test_a_mangled_file_of_a_real_model_never_loads(good: Path, bad: Path, tmp_path: Path) -> None:
    """Whatever is wrong with it is a CheckpointError, and what loads is what was saved."""
    other, model = tmp_path / "c", llama()
    randomise(attach(llama(), VARIANTS["lora"]), seed=5).save(other)
    adapter = ll.load(model, good)
    want, refused, rng = {k: v.clone() for k, v in adapter.state_dict().items()}, 0, random.Random(0)
    for data in mangled(rng.randrange(1000), 120, good.read_bytes(), other.read_bytes()):
        if data == other.read_bytes():
            continue
        bad.write_bytes(data)
        for go in (lambda: ll.load(model, bad, name="b", strict_base=False).detach(), lambda: adapter.load(bad, strict_base=False)):
            try:
                go()
            except CheckpointError:
                refused += 1
        assert all(same_bits(v, want[k]) for k, v in adapter.state_dict().items()) and list(ll.adapters(model)) == ["default"]
    assert refused > 200


def test_a_damaged_subspace_says_all_too(good: Path, tmp_path: Path) -> None:
    ll.SharedSubspace.from_adapters([good]).save(tmp_path / "s")
    ll.SharedSubspace.load(tmp_path / "s")
    cases: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
        "NaN": (lambda t: t | {"0.energy": with_nan(t["0.energy"])}, "1 key holding NaN or infinity: 0.energy. Its contents are not"),
        "a key": (without("0.energy"), "header does not describe its tensors: KeyError: '0.energy'. Its contents are not those"),
        "a value": (lambda t: t | {"0.energy": t["0.energy"] + 1}, "its contents are not those that were saved (sha256)"),
    }
    for change, piece in cases.values():
        rewritten(tmp_path / "s", tmp_path / "t", change)
        with pytest.raises(CheckpointError) as caught:
            ll.SharedSubspace.load(tmp_path / "t")
        assert piece in str(caught.value)


# --- wrappers ------------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A user's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def in_peft(model: nn.Module) -> nn.Module:
    """A PEFT model whose own adapter, still without effect, is on the output embedding."""
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))  # type: ignore[arg-type]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "a user's": Wrapped,
    "two": lambda m: nn.DataParallel(Wrapped(m)),
    "compiled inside": lambda m: Wrapped(torch.compile(m)),  # type: ignore[arg-type]
    "PEFT's": in_peft,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_the_base_it_wraps(name: str, good: Path, bad: Path) -> None:
    wrap, model = WRAPPERS[name], llama()
    adapter = ll.load(wrap(model), good)
    plain = llama()
    ll.load(plain, good)
    assert same_bits(model(IDS).logits, plain(IDS).logits)
    adapter.save(bad)
    assert json.loads(_header(bad)["fingerprint"])["architecture"] == "LlamaForCausalLM"
    back = llama()
    ll.load(back, bad)
    assert same_bits(back(IDS).logits, plain(IDS).logits)
    adapter.load(bad)
    adapter.load(good)
    with pytest.raises(CheckpointError, match="it was a LlamaForCausalLM, this is an Other"):
        ll.load(wrap(_other()), bad)  # the control: what is inside the same wrapper counts


def _header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def _other() -> nn.Module:
    """Another architecture with the same layers and weights."""
    model = llama()
    model.__class__ = type("Other", (type(model),), {})
    return model


def test_a_file_of_before_with_the_wrappers_own_class_goes_on_loading(good: Path, bad: Path) -> None:
    ll.load(Wrapped(llama()), good).save(bad)
    said = json.loads(_header(bad)["fingerprint"])
    assert said.pop("wrappers") == ["Wrapped"]
    rewritten(bad, bad, lambda t: t, hashed=False, fingerprint=json.dumps(said | {"architecture": "Wrapped"}))
    ll.load(Wrapped(llama()), bad)
    with pytest.raises(CheckpointError, match="it was a Wrapped, this is a LlamaForCausalLM"):
        ll.load(nn.DataParallel(llama()), bad)


def test_a_plain_models_fingerprint_is_as_it_was(good: Path) -> None:
    model = llama()
    layers = {n: m for n, m in model.named_modules() if is_linear(m)}
    assert list(fingerprint(model, layers)) == ["architecture", "targets"] == list(json.loads(_header(good)["fingerprint"]))
