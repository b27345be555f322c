"""Does a model come through every order of events as it was: attach, leave, copy, pickle, fail, replace, collect?"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger
from safetensors import safe_open
from torch import Tensor, nn

import lora_lite as ll
from lora_lite import attachment
from lora_lite.hooks import owner
from tests.models import VARIANTS, Row, attach, each_variant, llama, mlp, normal, randomise, tensors_at, token_ids
from tests.references import assert_close, assert_differs, same_bits
from tests.test_laws import changed, mixed_flags, snapshot

X = normal(3, 5, 12, seed=1)
LORA, IA3, FF, DORA = (VARIANTS[k] for k in ("lora", "ia3", "ia3_ff", "dora"))
UP = "layers.0.up"
BIAS = rf"{re.escape(UP)}\.bias$"


def trainable(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad]


def moved(adapter: ll.Adapter, by: float = 0.5) -> ll.Adapter:
    """Every trained parameter shifted, those of train_also too."""
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(by)
    return adapter


# --- the ledger --------------------------------------------------------------------------------------------------------

ALSO: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {"train_also": BIAS},
    "c": {"train_also": r"layers\.1\.down\.weight", "exclude": (r"layers\.1\.down",)},
}


@pytest.mark.parametrize("leaving", list(itertools.permutations("abc")), ids="".join)
@pytest.mark.parametrize("coming", list(itertools.permutations("abc")), ids="".join)
def test_three_adapters_come_and_leave_in_any_order(coming: tuple[str, ...], leaving: tuple[str, ...]) -> None:
    """Two of them train parameters of the base beside their own: its original comes back when they leave, frozen while others stay."""
    model = mlp()
    mixed_flags(model)
    rows, before, base = {"a": LORA, "b": FF, "c": DORA}, snapshot(model), model(X)
    here = {name: moved(attach(model, rows[name], name=name, **ALSO[name])) for name in coming}
    assert list(ll.adapters(model)) and set(ll.adapters(model)) == set("abc")
    for name in leaving:
        expected = {n for adapter in here.values() for n, _ in adapter.named_parameters()}
        assert set(trainable(model)) == expected
        assert not same_bits(model(X), base)
        here.pop(name).detach()
        assert set(ll.adapters(model)) == set(here)
    assert not changed(before, snapshot(model)) and same_bits(model(X), base)


@pytest.mark.parametrize("first_leaves", [True, False])
def test_one_parameter_is_trained_by_one_adapter(first_leaves: bool) -> None:
    """Two twins of one parameter could not both be in its place; whoever left first would put the other's back for good."""
    model = mlp()
    before = snapshot(model)
    one = attach(model, LORA, name="one", train_also=BIAS)
    with pytest.raises((RuntimeError, ValueError), match=rf"{re.escape(UP)}\.bias"):
        attach(model, LORA, name="two", train_also=BIAS)
    assert set(ll.adapters(model)) == {"one"}
    two = attach(model, LORA, name="two")
    for adapter in (one, two) if first_leaves else (two, one):
        adapter.detach()
    assert not changed(before, snapshot(model))


def test_flags_that_the_user_changes_meanwhile_are_the_adapters_business_until_it_leaves() -> None:
    model = mlp()
    mixed_flags(model)
    before = snapshot(model)
    adapter = attach(model, LORA)
    model.requires_grad_(True)
    adapter.requires_grad_(False)
    second = attach(model, IA3, name="second")
    assert set(trainable(model)) == {n for n, _ in second.named_parameters()}, "a paused adapter stays paused, the base is frozen again"
    second.detach()
    adapter.requires_grad_()
    assert set(trainable(model)) == {n for n, _ in adapter.named_parameters()}
    adapter.detach()
    assert not changed(before, snapshot(model))


def test_detaching_twice_is_harmless() -> None:
    model = mlp()
    before = snapshot(model)
    adapter = attach(model, LORA)
    adapter.detach()
    adapter.detach()
    assert not adapter.attached and adapter.model is None and not changed(before, snapshot(model))


# --- names -------------------------------------------------------------------------------------------------------------


def test_names_on_the_layer_in_lists_and_in_files(tmp_path: Path) -> None:
    model = llama()
    default, brief = attach(model, LORA), attach(model, LORA, name="brief")
    q = "model.layers.0.self_attn.q_proj"
    on_layer = [n for n, _ in model.get_submodule(q).named_parameters()]
    assert on_layer == ["weight", "bias", "lora_A", "lora_B", "lora_A__brief", "lora_B__brief"]
    assert next(n for n, _ in default.named_parameters()) == f"{q}.lora_A"
    assert next(n for n, _ in brief.named_parameters()) == f"{q}.lora_A__brief"
    assert all(model.get_parameter(n) is p for adapter in (default, brief) for n, p in adapter.named_parameters())
    assert default.targets == brief.targets and q in default.targets
    assert list(default.state_dict()) == list(brief.state_dict()) and f"{q}.lora_A" in brief.state_dict()
    brief.save(tmp_path / "brief.safetensors")
    with safe_open(tmp_path / "brief.safetensors", "pt") as file:
        assert set(file.keys()) == set(default.state_dict()), "files are free of names"
    again = ll.load(model, tmp_path / "brief.safetensors", name="again")
    assert set(ll.adapters(model)) == {"default", "brief", "again"} and again.name == "again"


def test_an_adapter_can_come_back_under_another_name() -> None:
    model = mlp()
    adapter = randomise(attach(model, LORA))
    want = model(X)
    adapter.detach()
    ll.attach(model, adapter, name="other", c=0.5)
    assert adapter.name == "other" and adapter.c == 0.5 and list(ll.adapters(model)) == ["other"]
    assert f"{UP}.lora_A__other" in dict(model.named_parameters())
    adapter.c = 1.0
    assert same_bits(model(X), want)


# --- back on, in place, for a block --------------------------------------------------------------------------------------


@each_variant
def test_the_same_parameter_objects_come_back(row: Row) -> None:
    model = mlp()
    adapter = moved(attach(model, row, train_also=BIAS))
    objects = {n: id(p) for n, p in adapter.named_parameters()}
    frozen = {(t, f): id(p) for t, fields in adapter.tensors().items() for f, p in fields.items()}
    want = model(X)
    for _ in range(2):
        adapter.detach()
        assert {n: id(p) for n, p in adapter.named_parameters()} == objects, "detached, it holds the same objects"
        assert ll.attach(model, adapter) is adapter
        assert {n: id(p) for n, p in adapter.named_parameters()} == objects
        assert {(t, f): id(p) for t, fields in adapter.tensors().items() for f, p in fields.items()} == frozen
        assert all(id(model.get_parameter(n)) == i for n, i in objects.items())
        assert same_bits(model(X), want)


@each_variant
def test_a_detached_adapter_is_attached_for_the_block(row: Row) -> None:
    model = mlp()
    mixed_flags(model)
    before, base = snapshot(model), model(X)
    adapter = randomise(attach(model, row))
    with adapter(model, c=-0.5):
        want = model(X)
    adapter.detach()
    for fails in (False, True):
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext(), adapter(model, c=-0.5):
            assert adapter.attached and adapter.c == -0.5
            assert same_bits(model(X), want)
            with adapter(model, c=0.0):
                assert same_bits(model(X), base)
            assert adapter.c == -0.5
            if fails:
                raise ZeroDivisionError
        assert not adapter.attached and adapter.c == 1.0
        assert not changed(before, snapshot(model)) and same_bits(model(X), base)
    with pytest.raises(ValueError, match="not attached"), adapter(c=0.5):
        pass


def loss(model: nn.Module) -> Tensor:
    return (model(X) - 1.0).square().mean()


def test_an_optimizer_goes_on_through_load_detach_and_attach(tmp_path: Path) -> None:
    """Training that is saved, wrecked, loaded in place, taken off and put back equals training that was left alone."""
    found = []
    for interrupted in (False, True):
        model = mlp()
        adapter = randomise(attach(model, LORA, train_also=BIAS))
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
        for step in range(4):
            if interrupted and step == 2:
                adapter.save(tmp_path / "a.safetensors")
                moved(adapter, 3.0)
                assert adapter.load(tmp_path / "a.safetensors") is adapter
                adapter.detach()
                ll.attach(model, adapter)
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        found.append({n: v.clone() for n, v in adapter.state_dict().items()})
    assert all(same_bits(found[0][n], v) for n, v in found[1].items()) and found[0].keys() == found[1].keys()


def test_a_merged_adapter_takes_no_other_values(tmp_path: Path) -> None:
    """They would not reach the weights it is in."""
    model = mlp()
    adapter = randomise(attach(model, LORA), 1)
    adapter.save(tmp_path / "a.safetensors")
    randomise(adapter, 2)
    adapter.merge()
    merged, held = model(X), {n: v.clone() for n, v in adapter.state_dict().items()}
    with pytest.raises(RuntimeError, match="merged"):
        adapter.load(tmp_path / "a.safetensors")
    assert all(same_bits(v, held[n]) for n, v in adapter.state_dict().items())
    adapter.unmerge()
    assert_close(model(X), merged)


# --- copies ------------------------------------------------------------------------------------------------------------


def copies(model: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


def test_adapters_lists_the_handles_one_holds() -> None:
    model = mlp()
    assert ll.adapters(model) == {}
    one, two = attach(model, LORA, name="one"), attach(model, IA3, name="two")
    found = ll.adapters(model)
    assert found["one"] is one and found["two"] is two
    two.detach()
    assert list(ll.adapters(model)) == ["one"]


def test_a_handle_that_was_dropped_can_be_had_again() -> None:
    model = mlp()
    before, base = snapshot(model), model(X)
    randomise(attach(model, LORA, c=0.5, train_also=BIAS))
    want = model(X)
    gc.collect()
    adapter = ll.adapters(model)["default"]
    assert adapter.c == 0.5 and adapter.config == LORA.config and same_bits(model(X), want)
    assert ll.adapters(model)["default"] is adapter
    with adapter(model, c=0.0):
        assert not same_bits(model(X), want)
    assert f"{UP}.bias" in dict(adapter.named_parameters())
    adapter.detach()
    assert not changed(before, snapshot(model)) and same_bits(model(X), base)


def test_copies_carry_two_adapters_of_their_own() -> None:
    model = mlp()
    mixed_flags(model)
    plain = copy.deepcopy(model)
    one, two = moved(attach(model, LORA, name="one", train_also=BIAS)), moved(attach(model, DORA, name="two", c=0.3), 0.1)
    one.metadata["note"] = "kept"
    want, before = model(X), snapshot(model)
    for twin in copies(model):
        own = ll.adapters(twin)
        assert set(own) == {"one", "two"} and own["one"] is not one and own["two"].c == 0.3
        assert own["one"].metadata == {"note": "kept"} and own["one"].fingerprint == one.fingerprint
        assert own["one"].targets == one.targets and own["one"].config == one.config
        assert same_bits(twin(X), want)
        shared = {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        assert not shared, "a copy has tensors of its own"
        own["one"].metadata["note"] = "the copy's"
        own["two"].c = -1.0
        moved(own["one"])
        assert same_bits(model(X), want) and two.c == 0.3 and one.metadata == {"note": "kept"}
        for name in ("one", "two"):  # the first to come leaves first
            own[name].detach()
        assert same_bits(twin(X), plain(X))
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in plain.parameters()]
        assert not changed(before, snapshot(model)), "the copy's adapters leave the original alone"


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_handle_knows_its_model_inside_a_wrapper_and_refuses_every_other() -> None:
    model = mlp()
    adapter = randomise(attach(model, LORA))
    wrapped, want = Wrapper(Wrapper(model)), model(X)
    with adapter(wrapped, c=-1.0):
        assert adapter.c == -1.0 and not same_bits(wrapped(X), want)
    assert ll.adapters(wrapped)["default"] is adapter
    for other in (*copies(model), Wrapper(copy.deepcopy(model)), mlp(), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"another \w+"), adapter(other, c=0.5):
            pass
        assert adapter.c == 1.0 and same_bits(model(X), want)
    with pytest.raises(RuntimeError, match="attached through another module"):
        attach(wrapped, LORA, name="second")


def test_a_copied_adapter_is_a_value_of_its_own() -> None:
    model = mlp()
    adapter = randomise(attach(model, LORA, c=0.5, train_also=BIAS))
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert not twin.attached and adapter.attached and twin.c == 0.5 and twin.config == adapter.config
        assert all(same_bits(v, adapter.state_dict()[n]) for n, v in twin.state_dict().items())
        moved(twin)
        assert not same_bits(next(iter(twin.parameters())), next(iter(adapter.parameters())))
        with pytest.raises(RuntimeError, match="attached already"):
            ll.attach(mlp(), adapter)
        other = mlp()
        assert ll.attach(other, twin, name="twin").attached and list(ll.adapters(model)) == ["default"]


CHILD = """
import json, sys
import torch
from torch.utils.hooks import RemovableHandle
import lora_lite as ll
from tests.references import same_bits

folder = sys.argv[1]
held = torch.load(f"{folder}/model.pt", weights_only=False)
model, x, numbers = held["model"], held["x"], held["numbers"]
layer = model.get_submodule(held["layer"])
ours = [h for table in (layer._forward_hooks, layer._forward_pre_hooks) for h in table.values()]
calls, out = [], {"loaded": same_bits(model(x), held["want"])}
out["counter is past ours"] = RemovableHandle.next_id > max(numbers)
while RemovableHandle.next_id <= max(numbers) + 3:  # hooks on this very layer under every number that was pickled
    layer.register_forward_hook(lambda *a: calls.append(1))
    layer.register_forward_pre_hook(lambda *a: calls.append(1))
if not calls and not layer._forward_hooks:
    raise SystemExit("nothing was registered")
layer.register_forward_hook(lambda *a: calls.append(1))
now = [h for table in (layer._forward_hooks, layer._forward_pre_hooks) for h in table.values()]
out["none was replaced"] = all(any(h is n for n in now) for h in ours) and len(ours) == held["count"]
out["after other hooks"] = same_bits(model(x), held["want"]) and bool(calls)
adapters = ll.adapters(model)
out["both"] = sorted(adapters) == ["one", "two"]
with adapters["one"](model, c=0.0), adapters["two"](model, c=0.0):
    out["zero"] = same_bits(model(x), held["zero"])
adapters["one"].detach()
stray = [n for n, p in model.named_parameters() if p.requires_grad and "__two" not in n]
out["one left"] = list(ll.adapters(model)) == ["two"] and not stray
adapters["two"].merge()
adapters["two"].unmerge()
adapters["two"].detach()
out["base"] = same_bits(model(x), held["base"]) and list(model.state_dict()) == held["keys"]
out["flags"] = [p.requires_grad for p in model.parameters()] == held["flags"]
print(json.dumps(out))
"""


def test_an_unpickled_model_in_a_fresh_process_keeps_its_hooks_among_others(tmp_path: Path) -> None:
    """Hook numbers start again at 0 there: a hook registered under a number that was pickled would silently replace ours."""
    model = mlp()
    mixed_flags(model)
    base, flags, keys = model(X).detach(), [p.requires_grad for p in model.parameters()], list(model.state_dict())
    one, two = randomise(attach(model, LORA, name="one", train_also=BIAS)), randomise(attach(model, FF, name="two"), 1)
    with one(model, c=0.0), two(model, c=0.0):
        zero = model(X).detach()
    layer = model.get_submodule(UP)
    numbers = [*layer._forward_hooks, *layer._forward_pre_hooks]
    held = {"model": model, "x": X, "base": base, "want": model(X).detach(), "zero": zero, "flags": flags, "keys": keys, "layer": UP}
    torch.save(held | {"numbers": numbers, "count": len(numbers)}, tmp_path / "model.pt")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    verdict = json.loads(done.stdout.splitlines()[-1])
    assert all(verdict.values()), verdict


# --- train_also ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose weight is also the head's, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.inner, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(self.embedding(ids))))


def test_train_also_trains_twins_and_gives_the_originals_back(tmp_path: Path) -> None:
    model, ids = Tied(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    model.norm.requires_grad_(False)
    before, base, original = snapshot(model), model(ids), model.embedding.weight
    config = ll.LoRAConfig(r=2, targets="inner", exclude=())
    adapter = ll.attach(model, config, train_also=("norm", r"embedding\.weight"), seed=0)
    assert same_bits(model(ids), base)
    own, beside = {"inner.lora_A", "inner.lora_B"}, {"embedding.weight", "norm.weight", "norm.bias"}
    assert set(dict(adapter.named_parameters())) == set(trainable(model)) == own | beside
    assert model.embedding.weight is model.head.weight and model.embedding.weight is not original, "tied twins stay tied"
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    assert original.grad is None and same_bits(original, before_bits(before, "embedding", original))
    with adapter(model, c=0.0):
        assert_differs(model(ids), base, "c turns the adapter, not what is trained beside it")
    want = model(ids)
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    assert not changed(before, snapshot(model)) and same_bits(model(ids), base)
    loaded = ll.load(model, tmp_path / "a.safetensors")
    assert same_bits(model(ids), want) and model.embedding.weight is model.head.weight is not original
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in adapter.named_parameters()}
    pointers = {n: id(p) for n, p in loaded.named_parameters()}
    moved(loaded)
    loaded.load(tmp_path / "a.safetensors")
    assert same_bits(model(ids), want) and {n: id(p) for n, p in loaded.named_parameters()} == pointers
    loaded.detach()
    assert not changed(before, snapshot(model))


def test_what_was_trained_beside_goes_where_the_model_went() -> None:
    """detach() puts the originals back into a model that was cast meanwhile, also through a merge."""
    model, ids = Tied(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    want = copy.deepcopy(model).to(torch.bfloat16)(ids)
    adapter = ll.attach(model, ll.LoRAConfig(r=2, targets="inner", exclude=()), train_also=("norm", r"embedding\.weight"), seed=0)
    adapter.merge()
    model.to(torch.bfloat16)
    adapter.unmerge()
    adapter.detach()
    assert same_bits(model(ids), want)


def before_bits(before: dict[str, Any], module: str, like: Tensor) -> Tensor:
    """The weight of a module as it was when the snapshot was made."""
    content = dict(before[module]["tensors"])["weight"][3]
    return torch.frombuffer(bytearray(content), dtype=like.dtype).view(like.shape)


def test_a_classifier_head_is_trained_and_saved(tmp_path: Path) -> None:
    from tests.models import bert

    model, ids = bert(), token_ids(2, 6)
    adapter = attach(model, LORA, train_also="classifier", exclude=("classifier",))
    base = model(input_ids=ids).logits.detach()
    torch.nn.functional.cross_entropy(model(input_ids=ids).logits, torch.tensor([1, 2])).backward()
    torch.optim.SGD(adapter.parameters(), lr=1.0).step()
    assert {"classifier.weight", "classifier.bias"} <= set(dict(adapter.named_parameters())) and "classifier.weight" in adapter.state_dict()
    want = model(input_ids=ids).logits
    assert_differs(want, base)
    adapter.save(tmp_path / "a.safetensors")
    other = bert()
    ll.load(other, tmp_path / "a.safetensors")
    assert same_bits(other(input_ids=ids).logits, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_was_trained_beside_comes_in_the_models_own_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """A base in another dtype is the same base; its bias must not become one of the file's dtype."""
    model = mlp(torch.bfloat16)
    moved(attach(model, LORA, train_also=BIAS)).save(tmp_path / "a.safetensors")
    other = mlp(torch.bfloat16).to(dtype)
    ll.load(other, tmp_path / "a.safetensors")
    assert other.get_parameter(f"{UP}.bias").dtype is dtype
    assert_close(other(X.to(dtype)).float(), model(X.bfloat16()).float(), tolerance=0.1)


def test_a_made_adapter_checks_what_it_trained_beside_before_it_is_put_on() -> None:
    model, other = mlp(), mlp()
    adapter = attach(model, LORA, targets="up", train_also=r"layers\.0\.down\.bias")
    adapter.detach()
    other.layers[0].down = nn.Linear(20, 12, bias=False)
    before = snapshot(other)
    with pytest.raises((RuntimeError, ValueError), match=r"layers\.0\.down\.bias"):
        ll.attach(other, adapter)
    assert not changed(before, snapshot(other)) and not adapter.attached


# --- merged --------------------------------------------------------------------------------------------------------------


class Noted:
    """A hook of the user's that notes its turn."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def __call__(self, *arguments: Any) -> None:
        self.seen.append(self.name)


@each_variant
def test_hooks_of_the_user_keep_their_order_through_merging(row: Row) -> None:
    model, seen = mlp(), list[str]()
    layer = model.get_submodule(UP)
    for stage in ("before", "after"):
        layer.register_forward_hook(Noted(f"{stage}, output", seen))
        layer.register_forward_pre_hook(Noted(f"{stage}, input", seen))
        if stage == "before":
            adapter = randomise(attach(model, row))
    order = lambda: [[type(owner(h)).__name__ for h in t.values()] for t in (layer._forward_pre_hooks, layer._forward_hooks)]  # noqa: E731
    seen.clear()  # a calibration runs the model too
    want, hooks = model(X), order()
    turns = list(seen)
    assert sum(len(table) for table in hooks) == 5 and len(turns) == 4
    for _ in range(2):
        with adapter.merged():
            seen.clear()
            assert_close(model(X), want)
            assert seen == turns and sum(len(table) for table in order()) == 4
        seen.clear()
        assert same_bits(model(X), want) and seen == turns and order() == hooks


@pytest.mark.parametrize("leaving", list(itertools.permutations("ab")), ids="".join)
def test_merging_two_never_reaches_the_base(leaving: tuple[str, ...]) -> None:
    """Each keeps aside what it found: out of order, one would put the other's sum back for good. So the second is refused, or undone."""
    model = mlp()
    before, base = snapshot(model), model(X)
    both = {name: randomise(attach(model, LORA, name=name), seed) for seed, name in enumerate("ab")}
    hooked = model(X)
    both["a"].merge()
    with contextlib.suppress(RuntimeError):
        both["b"].merge()
    for name in leaving:
        both[name].unmerge()
    assert same_bits(model(X), hooked), "unmerging is bitwise, the order of the hooks too"
    for name in leaving:
        both[name].detach()
    assert not changed(before, snapshot(model)) and same_bits(model(X), base)


def test_a_merged_model_can_be_moved() -> None:
    model = mlp()
    adapter = randomise(attach(model, LORA))
    want = model(X)
    adapter.merge()
    model.double()
    assert_close(model(X.double()).float(), want)
    adapter.unmerge()
    assert_close(model(X.double()).float(), want)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.float64}


def test_what_is_merged_is_attached_and_says_so() -> None:
    model = mlp()
    adapter = randomise(attach(model, LORA))
    adapter.merge(c=0.5)
    assert adapter.attached and "merged at c=0.5" in repr(adapter)
    for forbidden in (lambda: adapter.merge(), lambda: setattr(adapter, "c", 0.3), lambda: adapter(model, c=0.1).__enter__()):
        with pytest.raises(RuntimeError, match="merged"):
            forbidden()
    with pytest.raises(RuntimeError, match="merged into this model"):
        attach(model, LORA, name="second")
    assert len(list(adapter.parameters())) == 12 and not [n for n in model.state_dict() if "lora_" in n]


# --- what PyTorch does to models -----------------------------------------------------------------------------------------


@each_variant
def test_state_dicts_with_two_adapters_are_strict_and_may_replace_the_parameters(row: Row) -> None:
    model, other = mlp(), mlp(seed=1)
    for m, seed in ((model, 1), (other, 2)):
        randomise(attach(m, row, name="one"), seed)
        randomise(attach(m, IA3, name="two"), seed + 5)
    want = model(X)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        mlp().load_state_dict(model.state_dict())
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert same_bits(other(X), want)
    adapter = ll.adapters(other)["one"]
    assert all(other.get_parameter(n) is p for n, p in adapter.named_parameters()), "the adapter's tensors are those on the layers"
    loss(other).backward()
    assert all(p.grad is not None for p in adapter.parameters())
    for name in ("one", "two"):
        ll.adapters(other)[name].detach()
    plain = mlp()
    assert same_bits(other(X), plain(X)) and list(other.state_dict()) == list(plain.state_dict())


def test_a_state_dict_is_loaded_in_place_and_whole_or_not_at_all() -> None:
    model = mlp()
    adapter = randomise(ll.attach(model, ll.LoRAConfig(r=2), train_also=(r"layers\.0\.down\.bias",)))
    objects = list(adapter.parameters())
    saved = {n: v.clone() for n, v in adapter.state_dict().items()}
    want = model(X)
    randomise(adapter, seed=7)
    moved = {n: v.clone() for n, v in adapter.state_dict().items()}
    name, other = next(iter(saved)), next(reversed(saved))
    wrong: dict[str, tuple[Any, str]] = {
        "missing": ({n: v for n, v in saved.items() if n != name}, f"1 key missing: {name}"),
        "unexpected": (saved | {"x.lora_A": torch.ones(1)}, r"1 key unexpected: x\.lora_A"),
        "of another shape": (saved | {name: torch.ones(1)}, f"1 key of another shape: {name}"),
        "NaN": (saved | {other: saved[other] * float("nan")}, f"1 key holding NaN or infinity: {other}"),
    }
    for state, said in wrong.values():
        with pytest.raises(ll.CheckpointError, match=f"nothing loaded into adapter 'default': {said}"):
            adapter.load_state_dict(state)
    assert all(same_bits(v, moved[n]) for n, v in adapter.state_dict().items())
    assert adapter.load_state_dict(saved) is adapter and same_bits(model(X), want)
    assert all(a is b for a, b in zip(objects, adapter.parameters(), strict=True))


def test_to_keeps_the_objects_and_the_meta_device_is_survived() -> None:
    model = mlp()
    adapter = randomise(attach(model, LORA, train_also=BIAS))
    objects, want = [id(p) for p in adapter.parameters()], model(X)
    model.to(torch.bfloat16).to("cpu")
    assert [id(p) for p in adapter.parameters()] == objects and next(adapter.parameters()).dtype is torch.bfloat16
    assert_close(model(X.bfloat16()).float(), want, tolerance=0.1)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert_close(model(X.bfloat16()).float(), want, tolerance=0.1)
    assert all(model.get_parameter(n) is p for n, p in adapter.named_parameters())


def test_a_model_made_under_inference_mode_has_its_flags_back() -> None:
    """Its parameters say that they train, and torch lets nobody say so again outside: detach once failed half-way, values lost."""
    with torch.inference_mode():
        model = mlp()
    before = snapshot(model)
    adapter = randomise(ll.attach(model, ll.LoRAConfig(r=2), seed=0))
    held = {name: value.clone() for name, value in adapter.state_dict().items()}
    adapter.detach()
    assert not changed(before, snapshot(model))
    assert all(same_bits(value, held[name]) for name, value in adapter.state_dict().items())


def as_module(model: nn.Module) -> nn.Module:
    """Inside a wrapper whose prefix is understood."""
    return nn.Sequential(OrderedDict(module=model))


@pytest.mark.parametrize("config", [ll.EVAConfig(r=2, rho=2.0), ll.LoRAConfig(rank_pattern={r"module\.layers\.0\.up": 3})])
def test_a_pattern_of_full_names_follows_them_out_of_a_wrapper_and_in_again(config: Any, tmp_path: Path) -> None:
    """EVA's ranks, and a history's, are by full name, of which a wrapper's part is left out where there is none."""
    path, folder = tmp_path / "a.safetensors", tmp_path / "folder"
    data = [normal(40, 12, seed=3)] if config.variant == "eva" else None
    wrapped = as_module(mlp(torch.float32))
    adapter = randomise(ll.attach(wrapped, config, data, seed=0))
    ranks = {t.removeprefix("module."): p["lora_A"].shape[0] for t, p in adapter.tensors().items()}
    want, ordinary = wrapped(normal(3, 12, seed=4)), len(set(ranks.values())) > 1
    adapter.save(path)
    ll.to_peft(adapter, folder)
    for model in (mlp(torch.float32), as_module(mlp(torch.float32))):
        again = ll.load(model, path, strict_base=False)
        assert ordinary and {t.removeprefix("module."): p["lora_A"].shape[0] for t, p in again.tensors().items()} == ranks
        assert same_bits(model(normal(3, 12, seed=4)), want)
        again.detach()
        ll.from_peft(model, folder, strict_base=False)
        assert_close(model(normal(3, 12, seed=4)), want)


def test_a_layer_that_was_replaced_is_not_dropped_in_silence(tmp_path: Path) -> None:
    """As resize_token_embeddings does: the new module has no hook. The adapter's own tensors are not lost with it."""
    model = mlp()
    adapter = randomise(attach(model, LORA))
    state = {n: v.clone() for n, v in adapter.state_dict().items()}
    model.layers[0].up = nn.Linear(12, 20)
    said: list[str] = []
    try:
        adapter.detach()
        adapter.save(tmp_path / "a.safetensors")
    except (RuntimeError, ValueError) as error:
        said.append(str(error))
    kept = adapter.state_dict() if not said else {}
    assert any(UP in text for text in said) or (kept.keys() == state.keys() and all(same_bits(kept[n], v) for n, v in state.items()))


def replaced_block(model: Any) -> None:
    model.layers[0] = copy.deepcopy(mlp().layers[0])


def in_modules(model: Any) -> None:
    model.layers[2]._modules["down"] = nn.Linear(20, 12)


REPLACED: dict[str, tuple[Callable[[Any], Any], int, str]] = {
    "a layer": (lambda m: setattr(m.layers[0], "up", nn.Linear(12, 20)), 1, UP),
    "a layer by register_module": (lambda m: m.layers[1].register_module("up", nn.Linear(12, 20)), 1, "layers.1.up"),
    "set_submodule": (lambda m: m.set_submodule("layers.1.down", nn.Linear(20, 12)), 1, "layers.1.down"),
    "a block": (replaced_block, 2, UP),
    "None, then another": (lambda m: (setattr(m.layers[0], "up", None), setattr(m.layers[0], "up", nn.Linear(12, 20))), 1, UP),
    "the last in _modules": (in_modules, 1, "layers.2.down"),
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_layer_replaced_after_attaching_is_noticed_by_print_and_the_next_step(what: str) -> None:
    """A block and c ask only about the last layer: all of them would cost a microsecond each."""
    replace, n, first = REPLACED[what]
    model = mlp()
    adapter = randomise(attach(model, LORA))
    with adapter(model, c=0.5):  # all was well
        pass
    replace(model)
    assert f", but {n} of these layers are no longer in the model, such as {first})" in repr(adapter)
    calls: list[Callable[[], Any]] = [lambda: adapter.on_step(1)]
    if first == adapter.targets[-1]:
        calls += [lambda: adapter(model, c=0.5), lambda: setattr(adapter, "c", 0.5)]
    for call in calls:
        with pytest.raises(RuntimeError, match=rf"the model has replaced \['{re.escape(first)}'.*\({n} in all\) since; detach and attach"):
            call()
    adapter.detach()
    assert "no longer" not in repr(adapter)
    with adapter.put_on(model, known_base=True)(model, c=0.5):
        assert "no longer" not in repr(adapter)


def test_what_is_wrapped_or_put_elsewhere_is_not_taken_for_replaced() -> None:
    model = mlp()
    adapter = randomise(attach(model, LORA))
    with adapter(model, c=0.5):
        want = model(X)
    nn.Linear(3, 3), mlp()
    for i in (0, 2):
        model.layers[i].down = nn.Sequential(model.layers[i].down)
    with adapter(model, c=0.5):
        assert same_bits(model(X), want)
    assert "no longer" not in repr(adapter)


@pytest.mark.parametrize("row", [LORA, IA3, FF], ids=["lora", "ia3", "ia3_ff"])
def test_a_layer_whose_weight_is_computed_can_carry_what_never_reads_it(row: Row, tmp_path: Path) -> None:
    """torch.nn.utils.parametrize takes the weight out of the layer's own parameters."""
    model = mlp()
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule(UP))
    base = model(X)
    adapter = randomise(attach(model, row))
    want = model(X)
    assert_differs(want, base)
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    assert same_bits(model(X), base)
    ll.attach(model, adapter)
    assert same_bits(model(X), want)
    adapter.detach()
    ll.load(model, tmp_path / "a.safetensors")
    assert same_bits(model(X), want)


# --- failure -------------------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def failing(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function, but for its call number `at`."""
    calls = itertools.count()

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise Broken
        return function(*args, **kwargs)

    return call


# Where attaching can be interrupted: after so many calls of each of these.
STEPS: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "a parameter": (nn.Module, "register_parameter", (0, 1, 5, 11)),
    "a hook": (nn.Module, "register_forward_hook", (0, 3, 5)),
    "a flag": (nn.Parameter, "requires_grad_", (0, 4, 9)),
    "a twin": (attachment, "substitute", (0, 1)),
    "the compiler": (attachment.compiled, "notice_hooks", (0,)),
}
FAULTS = [(name, k) for name, (_, _, at) in STEPS.items() for k in at]


@pytest.mark.parametrize("company", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize(("step", "k"), FAULTS, ids=[f"{name}, call {k}" for name, k in FAULTS])
def test_an_attach_that_fails_leaves_the_model_as_it_was(step: str, k: int, company: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    mixed_flags(model)
    if company:
        attach(model, DORA, name="company")
    model.get_submodule(UP).register_forward_hook(lambda *_: None)
    before, want = snapshot(model), model(X)
    owner, name, _ = STEPS[step]
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(owner, name, failing(getattr(owner, name), k))
        attach(model, LORA, train_also=(BIAS, r"layers\.2\.down\.bias"))
    assert not changed(before, snapshot(model)) and same_bits(model(X), want)
    assert list(ll.adapters(model)) == (["company"] if company else [])
    adapter = attach(model, LORA, train_also=(BIAS, r"layers\.2\.down\.bias"))  # nothing of the failure is left to be in the way
    adapter.detach()
    assert not changed(before, snapshot(model))


@pytest.mark.parametrize("k", [0, 5])
def test_a_detached_adapter_that_cannot_be_put_on_stays_as_it_was(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    adapter = randomise(attach(model, LORA, c=0.7))
    want = model(X)
    adapter.detach()
    objects, before = [id(p) for p in adapter.parameters()], snapshot(model)
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(nn.Module, "register_forward_hook", failing(nn.Module.register_forward_hook, k))
        ll.attach(model, adapter, name="other", c=0.1)
    assert not adapter.attached and adapter.name == "default" and adapter.c == 0.7 and not changed(before, snapshot(model))
    assert float(adapter._dial.slot.tensor) == 0.7, "what compiled code reads moves back too"
    assert [id(p) for p in adapter.parameters()] == objects
    ll.attach(model, adapter)
    assert same_bits(model(X), want)


@each_variant
def test_an_exception_inside_a_forward_leaves_no_trace(row: Row) -> None:
    model = mlp()
    adapter = randomise(attach(model, row))
    want, before = model(X), snapshot(model, hook_numbers=False)

    def explode(*_: Any) -> None:
        raise Broken

    handle = model.layers[1].up.register_forward_hook(explode)
    with pytest.raises(Broken), adapter(model, c=-1.0):
        model(X)
    assert adapter.c == 1.0
    with pytest.raises(Broken), adapter.merged(c=0.5):
        model(X)
    handle.remove()
    assert not changed(before, snapshot(model, hook_numbers=False)) and same_bits(model(X), want)


# --- blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_blocks_end_in_any_order(order: tuple[int, ...]) -> None:
    """Each takes away its own value only; the innermost that is still open is in force."""
    model = mlp()
    one, two = attach(model, LORA, name="one"), attach(model, IA3, name="two")
    open_ = {i: one(model, c=c) for i, c in enumerate((0.5, -0.3, 2.0))}
    beside = two(model, c=9.0)
    for i, block in open_.items():
        block.__enter__()
        if i == 1:
            beside.__enter__()
    for i in order:
        open_.pop(i).__exit__(None, None, None)
        assert one.c == ([0.5, -0.3, 2.0][max(open_)] if open_ else 1.0)
        assert two.c == 9.0
    beside.__exit__(None, None, None)
    assert two.c == 1.0


def test_exit_stacks_and_one_block_twice() -> None:
    adapter = attach(mlp(), LORA)
    with contextlib.ExitStack() as stack:
        for c in (0.5, -1.0):
            stack.enter_context(adapter(c=c))
        assert adapter.c == -1.0
        kept = stack.pop_all()
        assert adapter.c == -1.0
    assert adapter.c == -1.0, "popped, they are still open"
    kept.close()
    assert adapter.c == 1.0
    block = adapter(c=0.2)
    with block:
        with adapter(c=0.4), block:
            assert adapter.c == 0.2
        assert adapter.c == 0.2
    assert adapter.c == 1.0


def test_setting_c_inside_a_block_sets_the_block_s() -> None:
    adapter = attach(mlp(), LORA)
    with adapter(c=0.5):
        adapter.c = 0.7
        with adapter(c=2.0):
            adapter.set_coeff(3.0)
            assert adapter.c == 3.0
        assert adapter.c == 0.7
    assert adapter.c == 1.0
    adapter.c = 0.1
    with adapter(c=0.5):
        pass
    assert adapter.c == 0.1


@pytest.mark.parametrize("ending", ["exhausted", "closed", "thrown into", "collected"])
def test_a_generator_that_holds_a_block_open_takes_only_its_own_value_away(ending: str) -> None:
    adapter = attach(mlp(), LORA)

    def steps() -> Iterator[int]:
        with adapter(c=0.5):
            yield 1

    held = steps()
    next(held)
    assert adapter.c == 0.5, "a generator has no context of its own"
    with adapter(c=-2.0):
        if ending == "exhausted":
            list(held)
        elif ending == "closed":
            held.close()
        elif ending == "thrown into":
            with pytest.raises(Broken):
                held.throw(Broken)
        else:
            del held
            gc.collect()
        assert adapter.c == -2.0
    assert adapter.c == 1.0


# --- memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["attached", "detached", "merged", "in a block", "after backward", "copied"])
def test_nothing_keeps_a_model_alive(event: str) -> None:
    model = mlp()
    adapter = randomise(attach(model, LORA, train_also=BIAS))
    if event == "detached":
        adapter.detach()
    elif event == "merged":
        adapter.merge()
    elif event == "in a block":
        with adapter(model, c=torch.tensor([0.0, 1.0, 2.0])):
            model(X)
    elif event == "after backward":
        torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False).sum().backward()
    elif event == "copied":
        copy.deepcopy(model)
        ll.adapters(model)
    seen = [weakref.ref(model), weakref.ref(model.get_parameter(f"{UP}.weight"))]
    if event != "detached":
        del adapter
    del model
    gc.collect()
    assert [reference() for reference in seen] == [None, None]


def test_a_layer_is_copied_without_its_model() -> None:
    model = mlp()
    attach(model, LORA)
    layer = copy.deepcopy(model.get_submodule(UP))
    size = len(pickle.dumps(layer))
    assert size < len(pickle.dumps(model)) / 2, "a hook must not hold the model"


# --- one module at two places ---------------------------------------------------------------------------------------------


@each_variant
def test_a_module_at_two_places_is_adapted_once_and_acts_twice(row: Row, tmp_path: Path) -> None:
    model = mlp()
    model.layers[2] = model.layers[0]
    before, base = snapshot(model), model(X)
    adapter = randomise(attach(model, row))
    assert adapter.targets == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    want = model(X)
    apart = mlp()
    apart.layers[2].load_state_dict(apart.layers[0].state_dict())
    twin = attach(apart, row)
    with torch.no_grad():
        for target in twin.targets:
            source = target.replace("layers.2", "layers.0")
            for field, p in tensors_at(apart, target).items():
                p.copy_(tensors_at(model, source)[field])
    assert same_bits(apart(X), want), "as two modules with equal weights and adapters"
    with adapter(model, c=0.0):
        assert same_bits(model(X), base)
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    assert not changed(before, snapshot(model))
    ll.load(model, tmp_path / "a.safetensors")
    assert same_bits(model(X), want)


# --- words ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def heard(level: str) -> Iterator[io.StringIO]:
    """What the library logs at a level and above."""
    text = io.StringIO()
    sink = logger.add(text, level=level, format="{level} {message}")
    try:
        yield text
    finally:
        logger.remove(sink)


def everything_said(tmp_path: Path) -> None:
    model = mlp()
    adapter = attach(model, VARIANTS["pissa-scored"])
    adapter.save(tmp_path / "a.safetensors")
    adapter.load(tmp_path / "a.safetensors")
    with adapter.merged():
        model(X)
    adapter.detach()
    ll.load(mlp(), tmp_path / "a.safetensors")


def test_the_library_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with heard("TRACE") as text:
        everything_said(tmp_path)
    assert text.getvalue() == "" and capfd.readouterr() == ("", "")


def test_enabled_it_says_what_it_did(tmp_path: Path) -> None:
    logger.enable("lora_lite")
    try:
        with heard("DEBUG") as debug, heard("INFO") as info:
            everything_said(tmp_path)
    finally:
        logger.disable("lora_lite")
    attached = [line for line in debug.getvalue().splitlines() if line.startswith("DEBUG attached")]
    assert len(attached) == 2 and all("6 targets" in line and "r=4" in line and "24 trainable" in line for line in attached)
    assert "DEBUG" not in info.getvalue() and "tail_depth" in info.getvalue() and "6 targets" in info.getvalue()


def test_printed_an_adapter_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    model = mlp()
    adapter = attach(model, LORA, name="kind", c=0.5)
    assert str(adapter) == "Adapter('kind': lora r=4 on 6 targets, 768 trainable, attached, c=0.5)"
    with adapter(model, c=-2.0):
        assert "c=-2.0" in repr(adapter)
    assert adapter.num_parameters() == 768
    adapter.print_trainable_parameters()
    everything = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out == f"trainable params: 768 || all params: {everything:,} || trainable%: {76800 / everything:.4f}\n"
    adapter.detach()
    assert str(adapter).endswith("768 trainable, detached)")
    print(ll.find_targets(model, LORA.config))
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["name", "type", "d_in", "d_out", "block", "role"] and "6 targets" in printed
    assert re.search(r"layers\.0\.up +Linear +12 +20 +0 of 3 +reader", printed)


PRINTED: dict[str, tuple[ll.AdapterConfig, str]] = {  # the MLP's layers are 12 -> 20 and 20 -> 12
    "as asked for": (ll.LoRAConfig(r=4), "lora r=4 on 6"),
    "a rank_pattern": (ll.LoRAConfig(r=4, rank_pattern={"up": 2}), "lora r=4 (2 on 3 layers) on 6"),
    "a rank_pattern for all": (ll.LoRAConfig(r=16, rank_pattern={"up": 2, "down": 3}), "lora r=2 (3 on 3 layers) on 6"),
    "one layer": (ll.LoRAConfig(r=4, rank_pattern={r"0\.up": 2}), "lora r=4 (2 on 1 layer) on 6"),
    "many": (ll.LoRAConfig(r=4, rank_pattern={r"0\.up": 2, r"1\.up": 7}), "lora r=2..7 on 6"),
    "pissa": (ll.PiSSAConfig(r=16), "pissa r=12 on 6"),
    "miss": (ll.MiSSConfig(r=16), "miss r=16 (12 on 3 layers) on 6"),
    "antipasto": (ll.AntiPaSTOConfig(r=64, block_size=16), "antipasto r=12 block_size=12 on 6"),
    "oft": (ll.OFTConfig(block_size=10), "oft block_size=10 (6 on 3 layers) on 6"),
    "road": (ll.ROADConfig(group_size=16), "road group_size=10 (12 on 3 layers) on 6"),
    "nothing to be wide": (ll.IA3Config(), "ia3 on 6"),
}


@pytest.mark.parametrize("what", PRINTED)
def test_printed_an_adapter_says_what_its_layers_have_and_not_what_was_asked_for(what: str) -> None:
    config, words = PRINTED[what]
    adapter = ll.attach(mlp(), config)
    assert f": {words} targets" in repr(adapter)
    adapter.detach()
    assert f": {words} targets" in repr(adapter)


@contextlib.contextmanager
def warned() -> Iterator[io.StringIO]:
    logger.enable("lora_lite")
    try:
        with heard("WARNING") as text:
            yield text
    finally:
        logger.disable("lora_lite")


@pytest.mark.parametrize("name", ["lora", "dora", "hira", "delora", "adalora"])
def test_a_rank_wider_than_a_layer_is_warned_of_once(name: str, tmp_path: Path) -> None:
    config: Any = dataclasses.replace(VARIANTS[name].config, r=14, rank_pattern={r"1\.up": 12, r"2\.up": 30})
    with warned() as text:
        adapter = ll.attach(mlp(), config)
    (line,) = text.getvalue().splitlines()
    assert re.search(
        r"Config trains r=14 on layers\.0\.up \(12 -> 20\), whose weight has rank 12 at most \(5 of 6 targets are such\)", line
    )
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    with warned() as text:  # said when it was chosen
        ll.attach(mlp(), adapter).detach()
        ll.load(mlp(), tmp_path / "a.safetensors")
    assert not text.getvalue()


def test_a_rank_that_fits_is_not_warned_of() -> None:
    with warned() as text:
        for config in (ll.LoRAConfig(r=12), ll.PiSSAConfig(r=99), ll.MiSSConfig(r=99), ll.VeRAConfig(r=99), ll.LoRAXSConfig(r=99)):
            ll.attach(mlp(), config)
    assert not text.getvalue()
