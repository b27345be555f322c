"""Do adapters that come one by one end where they would have ended together, by every rule of how many directions to keep?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll
from lora_lite import checkpoint
from lora_lite.subspace import SharedSubspace
from lora_lite.subspace.reserve import beyond
from tests.models import generator
from tests.subspaces import MODULES, collection_error, of, snapshot, squared_error

pytestmark = pytest.mark.fast
FORMS: dict[str, dict[str, Any]] = {"core": {"coefficients": "core"}, "factors": {"coefficients": "factors"}, "flat": {"space": "flat"}}
RULES: dict[str, dict[str, Any]] = {
    "k=8": {"num_components": 8}, "k=12": {"num_components": 12}, "k=16": {"num_components": 16},
    "0.6": {"variance_threshold": 0.6}, "0.9": {"variance_threshold": 0.9}, "0.95": {"variance_threshold": 0.95},
    "budget": {"budget_bytes": 30_000},
}  # fmt: skip
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def many(seed: int, noise: float) -> list[ll.Adapter]:
    """64 that share twelve directions per side, each as strong as the others."""
    draw, made = generator(seed), []
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    U, V = (torch.linalg.qr(normal(d, 12)).Q for d in (48, 64))
    for _ in range(64):
        A, B = normal(4, 12) @ V.T + noise * normal(4, 64), U @ normal(12, 4) + noise * normal(48, 4)
        made.append(ll.Adapter(ll.LoRAConfig(r=4, alpha=6.0), {MODULES[0]: {"lora_A": A, "lora_B": B}}, {MODULES[0]: (64, 48)}))
    return made


def factor_error(given: ll.Adapter, kept: ll.Adapter) -> float:
    pairs = [(fields[n], kept.tensors()[m][n]) for m, fields in given.tensors().items() for n in fields]
    return sum(float((x.detach().double() - y.detach().double()).square().sum()) for x, y in pairs)


def error(adapters: list[ll.Adapter], sub: SharedSubspace) -> float:
    """Of what the space approximates: updates, or flattened factors."""
    if sub.state.space == "feature":
        return collection_error(adapters, sub)
    return sum(factor_error(a, sub.reconstruct(t)) for a, t in zip(adapters, sub.tasks, strict=True)) ** 0.5


def one_by_one(adapters: list[ll.Adapter], first: int, **how: Any) -> SharedSubspace:
    sub = of(adapters[:first], **how)
    for i in range(first, len(adapters)):
        sub.absorb(adapters[i], f"task_{i}")
    return sub


SETTINGS = [
    (f, r, s, n) for f in FORMS for r in RULES for s, n in ((0, 0.02), (1, 0.1), (2, 0.2)) if r != "budget" and (f == "core" or s < 1)
]


@pytest.mark.parametrize(("form", "rule", "seed", "noise"), SETTINGS)
def test_one_by_one_ends_near_the_batch(form: str, rule: str, seed: int, noise: float, record_property: Any) -> None:
    adapters, how = many(seed, noise), {**FORMS[form], **RULES[rule]}
    ratio = error(adapters, one_by_one(adapters, 8, **how)) / error(adapters, of(adapters, **how))
    record_property("ratio", ratio)
    assert ratio < 1.05


@pytest.mark.parametrize("rule", ["k=8", "0.95"])
def test_without_a_reserve_it_does_not(rule: str) -> None:
    """The control: the same absorbs with what is held back thrown away each time."""
    adapters = many(0, 0.02)
    sub = of(adapters[:8], **RULES[rule])
    for i in range(8, 64):
        layers = {m: dataclasses.replace(x, reserve=None) for m, x in sub.state.layers.items()}
        sub = SharedSubspace(dataclasses.replace(sub.state, layers=layers))
        sub.absorb(adapters[i], f"task_{i}")
    assert error(adapters, sub) > 1.05 * error(adapters, of(adapters, **RULES[rule]))


@pytest.mark.parametrize("threshold", [0.6, 0.9])
def test_flattened_factors_make_room_for_what_comes(threshold: float) -> None:
    adapters = many(3, 0.1)
    sub, batch = (
        make(space="flat", variance_threshold=threshold)
        for make in (lambda **k: one_by_one(adapters, 8, **k), lambda **k: of(adapters, **k))
    )
    for one, other in zip(sub.components[MODULES[0]], batch.components[MODULES[0]], strict=True):
        assert len(other) <= len(one) < 1.4 * len(other)


@each_form
@pytest.mark.parametrize("rule", ["k=8", "0.6", "0.9"])
def test_the_bounds_hold_and_a_task_may_come_back(form: dict[str, Any], rule: str) -> None:
    """Directions held in reserve that turn out to be strong give old tasks back what they had along them."""
    adapters = many(1, 0.05)
    sub = of(adapters[:8], **form, **RULES[rule])
    for i in range(8, 24):
        sub.absorb(adapters[i], f"task_{i}")
        if i % 8 == 0:
            sub.add_task(sub.project(adapters[i], f"again_{i}"))
            sub.remove_task(f"again_{i}")
        for task, given in list(zip(sub.tasks, adapters, strict=False))[i % 8 :: 8]:
            found = (factor_error if sub.state.space == "flat" else squared_error)(given, sub.reconstruct(task))
            assert found <= sum(sub.error_bound(task).values()) * (1 + 1e-4) + 1e-6


@each_form
def test_a_reserve_is_small_and_no_task_is_made_of_it(form: dict[str, Any]) -> None:
    adapters = many(0, 0.1)
    sub = of(adapters, num_components=12, **form)
    layer = sub.state.layers[MODULES[0]]
    assert layer.reserve is not None and [len(x) for x in layer.reserve.components] == [beyond(12)] * 2 == [3, 3]
    bare = SharedSubspace(dataclasses.replace(sub.state, layers={MODULES[0]: dataclasses.replace(layer, reserve=None)}))
    assert snapshot(bare) != snapshot(sub) and 1 < sub.nbytes / bare.nbytes < 1.4
    for one, other in zip(sub.components[MODULES[0]], bare.components[MODULES[0]], strict=True):
        assert torch.equal(one, other) and len(one) == 12
    assert all(torch.equal(v, bare.reconstruct("task_5").state_dict()[n]) for n, v in sub.reconstruct("task_5").state_dict().items())
    wide = layer.whole(sub.state.kind)
    for U in (wide.b.basis().double(), wide.a.basis().double()):
        assert torch.dist(U @ U.T, torch.eye(len(U), dtype=torch.float64)) < 0.05


@pytest.mark.parametrize("change", ["to", "quantize", "expand"])
def test_what_moves_the_bases_lets_the_reserve_go(change: str) -> None:
    adapters = many(0, 0.1)
    sub = of(adapters[:8], num_components=8)
    if change == "to":
        sub.to(dtype=torch.float16)
    elif change == "quantize":
        sub.quantize(8)
    else:
        sub.commit(sub.get_trainable_params("task_1", num_expand=2), "task_1")
    assert sub.state.layers[MODULES[0]].reserve is None
    if change != "quantize":
        sub.absorb(adapters[9], "new")
        assert sub.state.layers[MODULES[0]].reserve is not None


def test_a_budget_and_a_diagonal_hold_nothing_back() -> None:
    adapters = many(0, 0.1)
    for how in (RULES["budget"], {"coefficients": "diag"}):
        assert of(adapters, **how).state.layers[MODULES[0]].reserve is None


@each_form
def test_a_file_keeps_the_reserve(form: dict[str, Any], tmp_path: Path) -> None:
    adapters = many(0, 0.1)
    sub = of(adapters[:8], variance_threshold=0.9, **form)
    sub.save(tmp_path / "sub")
    again = SharedSubspace.load(tmp_path / "sub")
    assert snapshot(again) == snapshot(sub)
    for one in (sub, again):
        one.absorb(adapters[8], "new")
    assert snapshot(again) == snapshot(sub)


@each_form
def test_a_file_of_the_first_format_still_loads(form: dict[str, Any], tmp_path: Path) -> None:
    """Without reserves, and without the scatter outside the directions."""
    from safetensors.torch import load_file, save_file

    adapters, path = many(0, 0.1), tmp_path / "sub"
    sub = of(adapters[:8], variance_threshold=0.9, **form)
    sub.save(path)
    with open(path, "rb") as file:
        metadata = checkpoint.read_header(str(path), file)["__metadata__"]
    said = json.loads(metadata["subspace"])
    for layer in said["layers"]:
        layer["apart"] = False  # written out then
        assert layer.pop("reserve")
        layer.pop("rest", None)
    tensors = {n: v for n, v in load_file(path).items() if ".reserve." not in n}
    save_file(tensors, path, {"format": metadata["format"], "format_version": "1", "subspace": json.dumps(said)})
    old = SharedSubspace.load(path)
    assert old.tasks == sub.tasks and old.state.layers[MODULES[0]].reserve is None
    assert all(torch.equal(v, sub.reconstruct("task_5").state_dict()[n]) for n, v in old.reconstruct("task_5").state_dict().items())
    old.absorb(adapters[8], "new")
