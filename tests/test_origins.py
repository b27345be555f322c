"""Do files of the origin systems, written here by hand, do what they did there?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.origins import look_any
from tests.models import llama, mlp, normal
from tests.references import assert_close, assert_differs, same_bits

NAMES = [f"layers.{i}.{side}" for i in range(1, 3) for side in ("up", "down")]
X = normal(3, 12, seed=9, dtype=torch.float64)
SAID = {"r": "4", "alpha": "6.0", "targets": "up,down", "layer_range": "0.34,1.0"}


def base() -> Any:
    return mlp(torch.float64)


def there(model: nn.Module, x: Tensor, updates: dict[str, Tensor]) -> Tensor:
    """The model with dense updates added to its weights."""
    with torch.no_grad():
        for name, dW in updates.items():
            model.get_submodule(name).weight.add_(dW)  # type: ignore[operator]
        return model(x)


def lora_file(path: Path, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What ModulatedLoRA saved, and the dense update of each layer at c = 1."""
    tensors, updates = {}, {}
    for i, name in enumerate(NAMES):
        layer = base().get_submodule(name)
        A, B = normal(4, layer.in_features, seed=i, dtype=dtype), normal(layer.out_features, 4, seed=50 + i, std=0.1, dtype=dtype)
        tensors |= {f"A.{name.replace('.', '__')}": A, f"B.{name.replace('.', '__')}": B}
        updates[name] = 6.0 / 4 * B.double() @ A.double()
    save_file(tensors, path, {**SAID, "trait": "kind"})
    return updates


def pissa_file(path: Path) -> dict[str, Tensor]:
    """What ModulatedPiSSA saved: directions of W itself, the largest but one first."""
    tensors, updates = {}, {}
    for i, name in enumerate(NAMES):
        U, S, Vh = torch.linalg.svd(base().get_submodule(name).weight.detach(), full_matrices=False)
        U, S, Vh, dS = U[:, 1:5].contiguous(), S[1:5].clone(), Vh[1:5].contiguous(), normal(4, seed=i, dtype=torch.float64)
        tensors |= {f"{k}.{name.replace('.', '__')}": v for k, v in {"U": U, "S": S, "Vh": Vh, "delta_s": dS}.items()}
        updates[name] = U @ torch.diag(dS) @ Vh
    save_file(tensors, path, {**SAID, "kind": "pissa", "selection_score": "cho_rej_min_std"})
    return updates


@pytest.mark.parametrize("write", [lora_file, pissa_file])
@pytest.mark.parametrize("c", [-1.0, 0.5, 1.0])
def test_the_outputs_are_those_of_there(write: Any, c: float, tmp_path: Path) -> None:
    updates = write(tmp_path / "old.safetensors")
    model = base()
    adapter = ll.load(model, tmp_path / "old.safetensors")
    want = there(base(), X, {name: c * dW for name, dW in updates.items()})
    assert_differs(want, base()(X), "the adapter's effect")
    with torch.no_grad(), adapter(model, c=c):
        assert_close(model(X), want, "outputs")
    adapter.detach()
    assert same_bits(model(X), base()(X))


def test_the_header_becomes_a_config(tmp_path: Path) -> None:
    lora_file(tmp_path / "a")
    adapter = ll.load(base(), tmp_path / "a")
    assert adapter.config.to_dict() | {"dtype": ""} == ll.LoRAConfig(
        r=4, alpha=6.0, targets=("up", "down"), layer_range=(0.34, 1.0)
    ).to_dict() | {"dtype": ""}
    assert adapter.targets == NAMES and adapter.metadata == {"trait": "kind"}
    assert [t.name for t in ll.find_targets(base(), adapter.config)] == NAMES  # the band means the same blocks
    pissa_file(tmp_path / "b")
    config: Any = ll.load(base(), tmp_path / "b").config
    assert (config.train, config.selection_score, config.r) == ("spectrum", "cho_rej_min_std", 4)


def test_a_score_we_do_not_have_says_only_how_the_directions_were_chosen(tmp_path: Path) -> None:
    updates = pissa_file(tmp_path / "old")
    with safe_open(tmp_path / "old", "pt") as file:
        said = file.metadata()
    save_file(load_file(tmp_path / "old"), tmp_path / "old", {**said, "selection_score": "cho_rej_f_ratio"})
    model = base()
    lines: list[str] = []
    logger.enable("lora_lite")
    handler = logger.add(lines.append, level="INFO", format="{message}")  # type: ignore[arg-type]
    try:
        adapter: Any = ll.load(model, tmp_path / "old")
    finally:
        logger.remove(handler)
    assert adapter.config.selection_score == "s_only" and any("'cho_rej_f_ratio' is none of" in line for line in lines)
    assert_close(model(X), there(base(), X, updates), "outputs")


def test_sixteen_bits_become_thirty_two(tmp_path: Path) -> None:
    updates = lora_file(tmp_path / "a", torch.bfloat16)
    model = mlp()
    adapter = ll.load(model, tmp_path / "a")
    assert {v.dtype for v in adapter.state_dict().values()} == {torch.float32}
    assert_close(model(X.float()), there(base(), X, updates).float(), "outputs")


def test_it_can_be_saved_in_our_format(tmp_path: Path) -> None:
    pissa_file(tmp_path / "old")
    model = base()
    adapter = ll.load(model, tmp_path / "old")
    want = model(X)
    adapter.save(tmp_path / "new")
    adapter.detach()
    ll.load(model, tmp_path / "new")
    assert same_bits(model(X), want)


def test_the_guides_files_of_lora(tmp_path: Path) -> None:
    updates = lora_file(tmp_path / "a")
    flat = {f"{n}.{f}": v for n, fields in ll.load(base(), tmp_path / "a").tensors().items() for f, v in fields.items()}
    flat = {k: v.detach().clone() for k, v in flat.items()}
    save_file(
        flat, tmp_path / "b", {"cfg": json.dumps({"variant": "lora", "r": 4, "alpha": 6.0, "targets": ["up", "down"], "layers": [1, 2]})}
    )
    model = base()
    ll.load(model, tmp_path / "b")
    assert_close(model(X), there(base(), X, updates), "outputs")
    save_file(flat, tmp_path / "c", {"cfg": json.dumps({"variant": "pissa", "r": 4})})
    with pytest.raises(ll.CheckpointError, match="'pissa' of the variant guide"):
        ll.load(base(), tmp_path / "c")
    save_file(flat, tmp_path / "d", {"cfg": json.dumps({"variant": "lora", "rank": 4})})
    with pytest.raises(ll.CheckpointError, match=r"no fields \['rank'\]"):
        ll.load(base(), tmp_path / "d")


def test_a_guides_config_is_held_against_the_layers_of_its_file(tmp_path: Path) -> None:
    """As the other headers that say where the layers are: a part of a file, or a config that means others, is no whole adapter."""
    lora_file(tmp_path / "a")
    flat = {key: v for key, v in ll.read(tmp_path / "a").state_dict().items()}
    whole = {"variant": "lora", "r": 4, "alpha": 6.0, "targets": ["up", "down"]}

    def load(flat: dict[str, Tensor], **said: Any) -> ll.Adapter:
        save_file(flat, tmp_path / "b", {"cfg": json.dumps(whole | said)})
        return ll.load(base(), tmp_path / "b")

    assert load(flat, layers=[1, 2]).targets == load(flat, layer_range=[0.34, 1.0]).targets == NAMES
    part = {key: v for key, v in flat.items() if key.startswith(NAMES[0])}
    with pytest.raises(ll.CheckpointError, match=r"layers=\(1, 2\)\) means 4 layers of this MLP, the file has 1 \(not in"):
        load(part, layers=[1, 2])
    with pytest.raises(ll.CheckpointError, match=r"means 2 layers .* the file has 4 \(not meant: layers\.1\.down, layers\.1\.up\)"):
        load(flat, layer_range=[0.67, 1.0])
    with pytest.raises(ll.CheckpointError, match=r"its header means no layer here: .*q_proj"):
        load(flat, targets=["q_proj"], layer_range=[0.0, 1.0])
    assert load(part).targets == NAMES[:1]  # a config that does not say how deep may mean these


BROKEN: dict[str, tuple[dict[str, str], str]] = {
    "r is text": ({"r": "four"}, "its header cannot be read"),
    "a band of three": ({"layer_range": "0,1,2"}, "its header cannot be read"),
    "no targets": ({"targets": ""}, "its header cannot be read.*targets is empty"),
    "another r": ({"r": "3"}, "of another shape"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_refused(what: str, tmp_path: Path) -> None:
    said, words = BROKEN[what]
    lora_file(tmp_path / "a")
    contents = look_any(tmp_path / "a").contents
    tensors = {f"{f[-1]}.{t.replace('.', '__')}": v for t, fields in contents.tensors.items() for f, v in fields.items()}
    save_file(tensors, tmp_path / "b", SAID | said)
    with pytest.raises(ll.CheckpointError, match=words):
        ll.load(base(), tmp_path / "b")


def test_a_layer_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    save_file(
        {"A.layers__1__up": torch.zeros(4, 12), "A.layers__1__down": torch.zeros(4, 20), "B.layers__1__up": torch.zeros(20, 4)},
        tmp_path / "a",
        SAID,
    )
    with pytest.raises(ll.CheckpointError, match=r"lacks tensors of layers\.1\.down; each layer has A, B"):
        ll.load(base(), tmp_path / "a")


def part_of(source: Path, target: Path, names: list[str], **said: str) -> None:
    """The file again with tensors for some layers only."""
    tensors = {k: v for k, v in load_file(source).items() if k.partition(".")[2].replace("__", ".") in names}
    save_file(tensors, target, {**SAID, **said})


@pytest.mark.parametrize("write", [lora_file, pissa_file])
def test_a_part_of_a_file_is_refused_with_both_counts(write: Any, tmp_path: Path) -> None:
    """The header says where the layers are; a mismatch was an error there with both counts, and is one here."""
    write(tmp_path / "a")
    kind = {"kind": "pissa"} if write is pissa_file else {}
    part_of(tmp_path / "a", tmp_path / "b", NAMES[:1], **kind)
    for strict in (True, False):
        model = base()
        with pytest.raises(ll.CheckpointError) as caught:
            ll.load(model, tmp_path / "b", strict_base=strict)
        said = str(caught.value)
        assert "means 4 layers of this MLP, the file has 1 (not in the file: layers.1.down, layers.2.up, layers.2.down)" in said, said
        assert "targets=('up', 'down'), layer_range=(0.34, 1.0)" in said and not ll.adapters(model)
    part_of(tmp_path / "a", tmp_path / "c", NAMES, **kind, layer_range="0.67,1")
    with pytest.raises(ll.CheckpointError, match=r"means 2 layers .* the file has 4 \(not meant: layers\.1\.down, layers\.1\.up\)"):
        ll.load(base(), tmp_path / "c")
    part_of(tmp_path / "a", tmp_path / "d", NAMES, **kind, targets="q_proj")
    with pytest.raises(ll.CheckpointError, match=r"its header means no layer here: .*q_proj"):
        ll.load(base(), tmp_path / "d")


def test_a_file_that_is_a_part_of_a_real_model_is_refused(tmp_path: Path) -> None:
    model, said = llama(), {"r": "4", "alpha": "8", "targets": "all-linear", "layer_range": "0,1"}
    layers = {t.name: t for t in ll.find_targets(model, ll.LoRAConfig())}
    flat = {f"{f}.{n.replace('.', '__')}": v for n, t in layers.items() for f, v in (("A", normal(4, t.d_in)), ("B", normal(t.d_out, 4)))}
    save_file(flat, tmp_path / "whole", said)
    assert len(ll.load(model, tmp_path / "whole").targets) == 14
    part = {k: v for k, v in flat.items() if "0__self_attn__q_proj" in k}
    save_file(part, tmp_path / "part", said)
    with pytest.raises(ll.CheckpointError, match=r"means 14 layers of this LlamaForCausalLM, the file has 1 \(not in .* and 8 more\)"):
        ll.load(llama(), tmp_path / "part")
    save_file(flat | {"A.x__y": torch.ones(4, 2), "B.x__y": torch.ones(2, 4)}, tmp_path / "more", said)
    with pytest.raises(ll.CheckpointError, match=r"unexpected: x\.y\.lora_A.*means 14 layers .* the file has 15 \(not meant: x\.y\)"):
        ll.load(llama(), tmp_path / "more")
    save_file(part, tmp_path / "untold", {k: said[k] for k in ("r", "alpha")})  # a header that does not say where may mean these
    assert len(ll.load(llama(), tmp_path / "untold").targets) == 1


def test_files_of_ours_are_read_as_before(tmp_path: Path) -> None:
    model = base()
    adapter = ll.attach(model, ll.LoRAConfig(r=4), seed=0)
    adapter.save(tmp_path / "a")
    assert {k: v.shape for k, v in look_any(tmp_path / "a").contents.named()} == {k: v.shape for k, v in adapter.state_dict().items()}
    with pytest.raises(IsADirectoryError):
        look_any(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / "b")
    with pytest.raises(ll.CheckpointError, match="was not saved by lora_lite"):
        look_any(tmp_path / "b")
