"""What may come into a subspace, from where, and is it of one base? Files of any low-rank method, PEFT folders, damaged files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite as ll
from lora_lite.checkpoint import CheckpointError
from lora_lite.subspace import source_of
from lora_lite.subspace.block import blocks, root
from lora_lite.subspace.build import data
from lora_lite.subspace.frame import krylov, leading, principal, upright
from tests.models import generator, llama, mlp, normal, randomise, token_ids
from tests.subspaces import MODULES, collection_error, family, of, relative_error, snapshot, updates

pytestmark = pytest.mark.fast

# Every method that says its update without the base weight, by what it needs to be attached.
METHODS: dict[str, Callable[[], ll.AdapterConfig]] = {
    "lora": lambda: ll.LoRAConfig(r=2, alpha=3.0, targets="up"),
    "rslora": lambda: ll.LoRAConfig(r=2, alpha=3.0, rslora=True, targets="up"),
    "pissa": lambda: ll.PiSSAConfig(r=2, alpha=3.0, targets="up"),
    "spectrum": lambda: ll.PiSSAConfig(r=2, train="spectrum", targets="up"),
    "lora-xs": lambda: ll.LoRAXSConfig(r=2, alpha=3.0, targets="up"),
    "vera": lambda: ll.VeRAConfig(r=4, targets="up"),
    "miss": lambda: ll.MiSSConfig(r=3, targets="up"),
}


def trained(config: ll.AdapterConfig, n: int = 3, model: Any = None) -> list[ll.Adapter]:
    model, made = mlp() if model is None else model, []
    for i in range(n):
        made.append(randomise(ll.attach(model, config, name=f"a{i}", seed=i), seed=i))
        made[-1].detach()
    return made


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_is_a_low_rank_sum_streams_as_it_does_in_memory(name: str, tmp_path: Path) -> None:
    config = METHODS[name]()
    if ll.REGISTRY[config.variant].form != "low-rank":
        with pytest.raises(ValueError, match="no low-rank form"):
            of(trained(config))
        return
    adapters = trained(config)
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for adapter, path in zip(adapters, paths, strict=True):
        adapter.save(path)
    batch = of(adapters, task_ids=["0", "1", "2"], variance_threshold=1.0)
    streamed = ll.SharedSubspace.from_adapters_streaming(paths, num_components=None, variance_threshold=1.0)
    assert snapshot(streamed) == snapshot(batch)
    assert collection_error(adapters, streamed) < 1e-5


def test_a_live_adapter_may_itself_be_shared(tmp_path: Path) -> None:
    """Of the variant "shared", whose file carries bases: its update is a low-rank sum like others."""
    sub = of(family(4, modules=("layers.0.up", "layers.1.up"), d_in=12, d_out=20), num_components=4)
    live = randomise(ll.attach(mlp(depth=2), ll.SharedConfig(), shared=sub))
    live.save(tmp_path / "live.safetensors")
    live.detach()
    again = ll.SharedSubspace.from_adapters_streaming([tmp_path / "live.safetensors"], num_components=None, variance_threshold=1.0)
    assert relative_error(live, again.reconstruct("live")) < 1e-5


# --- PEFT folders ----------------------------------------------------------------------------------------------------------


def test_peft_folders_give_what_the_adapters_would(tmp_path: Path) -> None:
    """Written by PEFT itself, with rank and alpha patterns, rsLoRA; alpha comes back, not only its effect."""
    from peft import LoraConfig, get_peft_model

    want = {}
    for i in range(3):
        config = LoraConfig(
            r=4, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2},
            alpha_pattern={"1.self_attn.q_proj": 3},
        )  # fmt: skip
        model = get_peft_model(llama(), config)
        with torch.no_grad():
            for n, p in sorted(model.named_parameters()):
                if "lora_" in n:
                    p.copy_(normal(*p.shape, seed=i, std=0.2))
        model.save_pretrained(tmp_path / f"t{i}")
        want[f"t{i}"] = model(token_ids(2, 7)).logits.detach()
    folders = [tmp_path / t for t in want]
    sub = ll.SharedSubspace.from_adapters_streaming(folders, num_components=None, variance_threshold=1.0)
    assert sub.tasks == list(want) and sorted({n.split(".")[-1] for n in sub.layer_names}) == ["q_proj", "v_proj"]
    assert snapshot(ll.SharedSubspace.from_adapters(folders, variance_threshold=1.0)) == snapshot(sub)
    for t, logits in want.items():
        back = sub.reconstruct(t)
        assert (back.config.r, back.config.alpha, back.config.rslora) == (4, 7, True)  # type: ignore[attr-defined]
        assert {u.r for n, u in back.factors().items() if "v_proj" in n} == {2}
        model = llama()
        ll.attach(model, back)
        assert float((model(token_ids(2, 7)).logits.detach() - logits).abs().max()) < 1e-5 * float(logits.abs().max())
        assert [name for name in ll.find_targets(model, dataclasses.replace(back.config, rank_pattern={}, alpha_pattern={}))]


def spoilt_folder(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    from safetensors.torch import load_file, save_file

    ll.to_peft(family(1)[0], folder)
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


PEFT_WRONG: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "dora": (lambda c, t: c.update(use_dora=True), "only LoRA is read"),
    "other method": (lambda c, t: c.update(peft_type="HRA"), "only LoRA is read|does not have"),
    "unknown option": (lambda c, t: c.update(magic=3), "magic"),
    "rank": (lambda c, t: c.update(r=9), "not the factors"),
    "embedding": (lambda c, t: t.update({"base_model.model.emb.lora_embedding_A": torch.ones(2, 2)}), "no linear layer"),
    "half a layer": (lambda c, t: t.pop(next(iter(t))), "not A and B"),
    "pissa": (lambda c, t: c.update(init_lora_weights="olora"), "changes the base weights"),
}


@pytest.mark.parametrize("name", PEFT_WRONG)
def test_a_folder_that_cannot_be_read_says_why(name: str, tmp_path: Path) -> None:
    change, words = PEFT_WRONG[name]
    folder = spoilt_folder(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=words):
        ll.SharedSubspace.from_adapters([folder])


def test_the_folder_as_it_was_written_is_read(tmp_path: Path) -> None:
    """The control of the test above."""
    folder = spoilt_folder(tmp_path / "a", lambda c, t: None)
    assert relative_error(family(1)[0], ll.SharedSubspace.from_adapters([folder], variance_threshold=1.0).reconstruct("a")) < 1e-5


# --- files -----------------------------------------------------------------------------------------------------------------


def test_a_byte_that_changed_is_noticed_while_streaming(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    family(1)[0].save(path)
    assert source_of("a", path).modules == list(MODULES)
    bits = bytearray(path.read_bytes())
    bits[-3] ^= 1
    path.write_bytes(bits)
    with pytest.raises(CheckpointError, match="sha256"):
        ll.SharedSubspace.from_adapters_streaming([path])


def test_what_a_subspace_leaves_behind_is_said(tmp_path: Path) -> None:
    from loguru import logger

    model, said = mlp(), []
    adapter = ll.attach(model, ll.LoRAConfig(r=2, targets="up"), train_also=r"layers\.2\.down\.bias")
    adapter.save(tmp_path / "a.safetensors")
    logger.enable("lora_lite")
    sink = logger.add(lambda message: said.append(str(message)), level="WARNING")
    try:
        source_of("a", tmp_path / "a.safetensors")
        source_of("b", adapter)
    finally:
        logger.remove(sink)
        logger.disable("lora_lite")
    assert sum("layers.2.down.bias" in line for line in said) == 2


# --- one base ----------------------------------------------------------------------------------------------------------------


def test_adapters_of_different_bases_are_refused(tmp_path: Path) -> None:
    config = METHODS["lora"]()
    one, other = trained(config, 2), trained(config, 1, mlp(seed=5))
    with pytest.raises(ValueError, match=r"'task_2' was trained on another base.*hold other weights"):
        of([*one, *other])
    sub = of(one)
    before = snapshot(sub)
    for call in (sub.absorb, sub.project):
        with pytest.raises(ValueError, match="another base"):
            call(other[0], "new")
    assert snapshot(sub) == before
    other[0].save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="another base"):
        sub.absorb(tmp_path / "other.safetensors", "new")
    other[0].fingerprint = None  # the way out that the message names
    sub.absorb(other[0], "new")
    sub.save(tmp_path / "sub")
    again = ll.SharedSubspace.load(tmp_path / "sub")
    with pytest.raises(ValueError, match="another base"):
        again.absorb(tmp_path / "other.safetensors", "newer")
    back = again.reconstruct("task_0")
    ll.attach(mlp(), back)
    for wrong in (lambda m: ll.attach(m, again.reconstruct("task_1")), lambda m: ll.attach(m, ll.SharedConfig(), shared=again)):
        with pytest.raises(ValueError, match="another base"):
            wrong(mlp(seed=5))


# --- many at once --------------------------------------------------------------------------------------------------------------


def wide_family() -> list[ll.Adapter]:
    """Ranks 8 and 5, more than 256 rows and columns: what the quick way is for."""
    module = MODULES[:1]
    return [
        *family(40, d_in=320, d_out=300, r=8, rank=12, noise=0.1, modules=module),
        *family(9, d_in=320, d_out=300, r=5, rank=12, noise=0.1, modules=module),
    ]


def test_the_quick_way_finds_the_leading_directions() -> None:
    together = list(blocks([source_of("t", a).read(MODULES[0]) for a in wide_family()]))
    for X in data("core", together, torch.float64):
        found = krylov(X, lambda spectrum, total: min(12, len(spectrum)), 12)
        U, energy, _ = principal(X, lambda spectrum, total: 12)
        assert found is not None and float(1 - found[1].sum() / energy.sum()) < 1e-5
        assert torch.dist(found[0] @ found[0].T, torch.eye(12, dtype=torch.float64)) < 1e-12
        caught = (X @ found[0].T).square().sum() / (X @ U.T).square().sum()
        assert 1 - 1e-5 < float(caught) <= 1 + 1e-12


def test_the_quick_way_gives_up_on_what_it_cannot_find() -> None:
    """Directions much weaker than the first, and most of all directions: both by `principal`."""
    draw = generator(0)
    U, V = (torch.linalg.qr(torch.randn(n, 300, generator=draw, dtype=torch.float64)).Q for n in (400, 300))
    graded = U @ torch.diag(torch.logspace(0, -12, 300, dtype=torch.float64)) @ V.T
    assert krylov(graded, lambda spectrum, total: min(100, len(spectrum)), 100) is None
    every, _ = leading(graded, lambda spectrum, total: min(100, len(spectrum)), 100)
    assert float((every @ V[:, :100]).diagonal().abs().min()) > 1 - 1e-6
    assert krylov(torch.randn(300, 300, generator=draw), lambda spectrum, total: len(spectrum), 24) is None


def test_a_large_collection_is_gauge_free_and_kept_as_a_small_one_is() -> None:
    adapters = wide_family()
    sub = of(adapters, num_components=12)
    assert collection_error(adapters, sub) < 0.2
    turned = [ll.Adapter(a.config, mixed(a, i), a.sizes) for i, a in enumerate(adapters)]
    again = of(turned, num_components=12)
    assert max(relative_error(sub.reconstruct(t), again.reconstruct(t)) for t in sub.tasks) < 1e-4


def mixed(adapter: ll.Adapter, seed: int) -> dict[str, dict[str, Tensor]]:
    found = {}
    for m, p in adapter.tensors().items():
        A, B = p["lora_A"].detach().double(), p["lora_B"].detach().double()
        G = normal(len(A), len(A), seed=seed, dtype=torch.float64) + 3 * torch.eye(len(A), dtype=torch.float64)
        found[m] = {"lora_A": torch.linalg.solve(G, A).float(), "lora_B": (B @ G).float()}
    return found


def test_blocks_are_the_updates_one_after_another() -> None:
    ups = [source_of("t", a).read(MODULES[0]) for a in wide_family()]
    together = list(blocks(ups))
    assert sum(len(x.scale) for x in together) == len(ups) and {x.r for x in together} == {8, 5}
    dense = torch.stack([u.scale * u.B.double() @ u.A.double() for u in ups])
    assert torch.allclose(torch.cat([x.energy for x in together]), dense.square().sum((1, 2)))
    Xb, Xa = data("core", together, torch.float64)
    assert torch.allclose(Xb.T @ Xb, (dense @ dense.transpose(1, 2)).sum(0)) and torch.allclose(
        Xa.T @ Xa, (dense.transpose(1, 2) @ dense).sum(0)
    )


def test_roots_exist_where_inverses_do_not() -> None:
    G = torch.zeros(2, 3, 3, dtype=torch.float64)
    G[1, 0, 0] = 4.0
    L = root(G)
    assert torch.allclose(L.transpose(1, 2) @ L, G)


def test_upright_undoes_any_bend() -> None:
    for bend in (1e-6, 0.3, 100.0):
        U = torch.linalg.qr(torch.randn(40, 6, generator=generator(0), dtype=torch.float64)).Q.T
        U = U + bend * torch.randn(6, 40, generator=generator(1), dtype=torch.float64)
        Q, T = upright(U)
        assert torch.dist(Q @ Q.T, torch.eye(6, dtype=torch.float64)) < 1e-12 and torch.allclose(T @ Q, U)


def test_updates_of_a_family_are_as_the_tests_compute_them() -> None:
    a = family(1)[0]
    u = source_of("t", a).read(MODULES[0])
    assert torch.allclose(u.scale * u.B.double() @ u.A.double(), updates(a)[MODULES[0]])
