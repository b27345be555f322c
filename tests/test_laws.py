"""Does every variant keep every promise? One file of laws over the table VARIANTS (tests/models.py); a new variant adds a row.

"Bitwise" is meant: NaN and -0.0 count. Nearness has its numbers in one place, references.TOLERANCE.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_lite as ll
from lora_lite.variants import ia3
from tests.models import (
    VARIANTS,
    Odd,
    Row,
    Single,
    attach,
    each_variant,
    llama,
    mlp,
    normal,
    randomise,
    refill,
    single,
    tensors_at,
    token_ids,
)
from tests.references import TOLERANCE, assert_close, assert_differs, bits, reference, same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(d).removeprefix("torch.") for d in DTYPES])
each_grad_mode = pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
IDS = token_ids(3, 7)
X = normal(3, 5, 12, seed=1)  # (rows, tokens, width) for the MLP


def law_of(row: Row) -> type[ll.Variant]:
    return ll.REGISTRY[row.config.variant]


def grad_mode(grad: bool) -> AbstractContextManager[Any]:
    return nullcontext() if grad else torch.no_grad()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits.detach()


def train(model: nn.Module, adapter: ll.Adapter, x: Tensor, steps: int = 2) -> None:
    """A few steps of an ordinary loop; tensors at zero leave it."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def snapshot(model: nn.Module, hook_numbers: bool = True) -> dict[str, Any]:
    """Everything that can be seen of a model, as plain values: which objects, which flags, which bits, in which order."""

    def tensor(value: Tensor | None) -> Any:
        return None if value is None else (id(value), value.requires_grad, str(value.dtype), bits(value).numpy().tobytes())

    def module(m: nn.Module) -> dict[str, Any]:
        held = vars(m)
        tables = {k: v for k, v in held.items() if "hook" in k and isinstance(v, dict)}
        hooks = {k: list(v.items() if hook_numbers else v.values()) for k, v in tables.items()}
        plain = {k: v for k, v in held.items() if isinstance(v, bool | int | float | str | None)}
        tensors = {k: tensor(v) for k, v in (*m._parameters.items(), *m._buffers.items())}
        return {"type": type(m), "id": id(m), "keys": list(held), "hooks": hooks, "plain": plain, "tensors": list(tensors.items())}

    return {name: module(m) for name, m in model.named_modules()} | {"state_dict": list(model.state_dict())}


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def mixed_flags(model: nn.Module) -> None:
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)


# --- the table ---------------------------------------------------------------------------------------------------------


def shipped() -> set[str]:
    """Registered by the library: what another test registers for itself is that test's."""
    return {name for name, variant in ll.REGISTRY.items() if variant.__module__.startswith("lora_lite.")}


@pytest.mark.fast
def test_every_registered_variant_has_a_row() -> None:
    missing = shipped() - {row.config.variant for row in VARIANTS.values()}
    assert not missing, f"{sorted(missing)} are registered, but the laws do not run on them: add rows to VARIANTS in tests/models.py"


def test_a_variant_without_a_row_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ll.REGISTRY, "unheard-of", ia3.IA3)
    with pytest.raises(AssertionError, match="unheard-of"):
        test_every_registered_variant_has_a_row()


# --- c = 0 and the start -----------------------------------------------------------------------------------------------


@pytest.mark.fast
@each_dtype
@each_variant
def test_identity_at_init_is_as_declared(row: Row, dtype: torch.dtype) -> None:
    model = mlp(dtype)
    base = model(X.to(dtype))
    attach(model, row)
    declared, found = law_of(row).identity_of(row.config), model(X.to(dtype))
    assert declared.kind != "none" or declared.reason, "no identity at init needs its reason"
    if declared.kind == "bitwise":
        assert same_bits(found, base)
    elif declared.kind == "close":
        assert_close(found, base, tolerance=max(1e-6, torch.finfo(dtype).eps))
    else:
        assert not same_bits(found, base), "it does start at the base: declare that"


@pytest.mark.fast
@each_variant
def test_identity_at_init_on_a_language_model(row: Row) -> None:
    model = llama()
    base = logits(model)
    attach(model, row)
    if law_of(row).identity_of(row.config).kind == "bitwise":
        assert same_bits(logits(model), base)


def odd_input(dtype: torch.dtype) -> Tensor:
    """NaN, infinities and -0.0 among the numbers, in rows that are on and rows that are off."""
    x = normal(3, 4, 10, seed=3, dtype=dtype)
    x[:, 0, 0], x[:, 1, 1], x[:, 2, 2], x[:, :, 3], x[:, 3, 7] = torch.nan, torch.inf, -torch.inf, -0.0, torch.nan
    return x


ZEROS = {"0": 0.0, "-0.0": -0.0, "int": 0, "0-d": torch.tensor(0.0), "rows": torch.zeros(3), "tokens": -torch.zeros(3, 4)}


@pytest.mark.fast
@each_grad_mode
@each_dtype
@each_variant
def test_c_zero_is_the_base_bitwise_before_and_after_training(row: Row, dtype: torch.dtype, grad: bool) -> None:
    model, x, kept = Single(Odd(10, 14)), odd_input(dtype), [0, 2]
    refill(model, 0, 0.3, 0.2)
    base = model.to(dtype)(x)
    assert torch.isnan(base).any() and (torch.signbit(base) & (base == 0)).any(), "the odd values must come through"
    adapter = attach(model, row)
    for trained in (False, True):
        if trained:
            train(model, adapter, normal(3, 4, 10, seed=4, dtype=dtype))
            assert not same_bits(model(normal(3, 4, 10, dtype=dtype)), model.linear.forward(normal(3, 4, 10, dtype=dtype)))
        for c in ZEROS.values():
            with grad_mode(grad), adapter(model, c=c):
                assert same_bits(model(x), base), f"c={c}, trained={trained}"
        for c in (torch.tensor([0.0, 0.7, -0.0]), torch.tensor([0.0, 0.7, 0.0])[:, None].expand(3, 4)):
            with grad_mode(grad), adapter(model, c=c):
                assert same_bits(model(x)[kept], base[kept]), f"the rows at 0 of c={c}, trained={trained}"
    with torch.inference_mode(), adapter(model, c=0):
        assert same_bits(model(x), base)


@pytest.mark.fast
@each_variant
def test_c_zero_is_the_base_of_a_language_model_at_rest_too(row: Row) -> None:
    model = llama()
    base = logits(model)
    adapter = randomise(attach(model, row, c=0.0))
    assert same_bits(logits(model), base)
    adapter.c = 1.0
    assert_differs(logits(model), base)
    with adapter(model, c=0.0):
        assert same_bits(logits(model), base)


@each_variant
def test_c_zero_keeps_the_graph_and_the_base_s_gradients(row: Row) -> None:
    """Data parallel ranks at c = 0 must take part in the reduction: the adapter's gradients are zeros, not missing."""
    plain, model = mlp(), mlp()
    x, seen = X.clone().requires_grad_(), X.clone().requires_grad_()
    plain(x).square().sum().backward()
    adapter = randomise(attach(model, row))
    with adapter(model, c=0.0):
        model(seen).square().sum().backward()
    assert x.grad is not None and seen.grad is not None and same_bits(seen.grad, x.grad)
    assert all(p.grad is not None and not p.grad.any() for p in adapter.parameters())


# --- what an adapter may touch -----------------------------------------------------------------------------------------


@pytest.mark.fast
@each_variant
def test_detach_restores_everything(row: Row) -> None:
    model = llama()
    mixed_flags(model)
    seen: list[str] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append("the user's hook"))
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda m, a, k: None, with_kwargs=True)
    before, base = snapshot(model), logits(model)
    adapter = attach(model, row)
    assert changed(before, snapshot(model)), "the snapshot must see an attached adapter"
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    with adapter(model, c=-2.0):
        logits(model)
    adapter.detach()
    assert not changed(before, snapshot(model))
    assert same_bits(logits(model), base) and seen


@pytest.mark.fast
@each_variant
def test_types_and_names_stay_while_attached(row: Row) -> None:
    model = mlp()
    before = {name: (type(m), id(m)) for name, m in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    adapter = attach(model, row)
    assert {name: (type(m), id(m)) for name, m in model.named_modules()} == before
    assert {name: id(p) for name, p in model.named_parameters() if ".lora_" not in name} == parameters
    assert set(dict(model.named_buffers())) == {"offset"}
    own = {name for name in model.state_dict() if ".lora_" in name}
    assert own == set(adapter.state_dict()), "what is on the layers is what is saved"


@pytest.mark.fast
@each_variant
def test_training_never_writes_the_base(row: Row) -> None:
    model = mlp()
    base = {name: (p, p._version, p.detach().clone()) for name, p in (*model.named_parameters(), *model.named_buffers())}
    adapter = attach(model, row)
    train(model, adapter, X)
    with adapter(model, c=-1.0):
        train(model, adapter, X)
    for name, (p, version, old) in base.items():
        assert p._version == version and same_bits(p, old), f"{name} was written (a write that is undone counts)"


@pytest.mark.fast
@each_variant
def test_only_declared_trainables_get_gradients_and_all_of_them_do(row: Row) -> None:
    model = llama()
    adapter = randomise(attach(model, row))
    model(input_ids=IDS, labels=IDS).loss.backward()
    declared = set()
    for target in adapter.targets:
        layer = model.get_submodule(target)
        specs = law_of(row).param_specs(
            layer.in_features, layer.out_features, adapter.config.at(target, layer.in_features, layer.out_features)
        )
        declared |= {f"{target}.{field}" for field, spec in specs.items() if spec.trainable}
    assert declared == {name for name, _ in adapter.named_parameters()}
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == declared
    flags = {name for name, p in model.named_parameters() if p.requires_grad}
    assert flags == declared
    dead = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert not dead, "gradients that are exactly zero train nothing"


@each_variant
def test_attaching_twice_from_one_seed_gives_the_same_bits(row: Row) -> None:
    state = torch.random.get_rng_state()
    one, two = (attach(mlp(), row, seed=3).state_dict() for _ in range(2))
    assert one.keys() == two.keys() and all(same_bits(one[k], two[k]) for k in one)
    model = mlp()  # drawing its first weights moves the global generator
    torch.random.set_rng_state(state)
    attach(model, row, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state), "a seeded attach leaves the global generator alone"


# --- save and load -----------------------------------------------------------------------------------------------------


@pytest.mark.fast
@each_variant
def test_save_and_load_are_bitwise(row: Row, tmp_path: Path) -> None:
    model = llama()
    adapter = randomise(attach(model, row))
    want, state = logits(model), {k: v.clone() for k, v in adapter.state_dict().items()}
    adapter.save(tmp_path / "a.safetensors", metadata={"note": "kept"})
    adapter.detach()
    loaded = ll.load(model, tmp_path / "a.safetensors")
    assert same_bits(logits(model), want)
    assert loaded.config == adapter.config and loaded.metadata["note"] == "kept" and loaded.c == 1.0
    assert loaded.state_dict().keys() == state.keys() and all(same_bits(loaded.state_dict()[k], v) for k, v in state.items())
    loaded.save(tmp_path / "b.safetensors")
    loaded.detach()
    again = ll.load(model, tmp_path / "b.safetensors")  # values, not bytes of the file: safetensors writes metadata in any order
    assert all(same_bits(again.state_dict()[k], v) for k, v in state.items()) and again.metadata == loaded.metadata


@each_variant
def test_a_loaded_adapter_lists_its_parameters_in_the_order_of_a_fresh_one(row: Row, tmp_path: Path) -> None:
    """An optimizer's state_dict knows parameters by position only: in another order it would resume with another tensor's moments."""
    model = llama()
    adapter = attach(model, row)
    names, targets, everything = [name for name, _ in adapter.named_parameters()], list(adapter.targets), list(adapter.state_dict())
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    loaded = ll.load(model, tmp_path / "a.safetensors")
    assert [name for name, _ in loaded.named_parameters()] == names
    assert loaded.targets == targets and list(loaded.state_dict()) == everything


@each_variant
def test_a_detached_adapter_keeps_its_tensors_and_can_be_put_back(row: Row, tmp_path: Path) -> None:
    model = mlp()
    adapter = randomise(attach(model, row))
    want, state = model(X), {k: v.clone() for k, v in adapter.state_dict().items()}
    adapter.detach()
    assert not adapter.attached and all(same_bits(adapter.state_dict()[k], v) for k, v in state.items())
    adapter.save(tmp_path / "a.safetensors")
    assert ll.attach(model, adapter) is adapter and adapter.attached
    assert same_bits(model(X), want)


@each_variant
def test_loading_in_place_keeps_the_parameter_objects(row: Row, tmp_path: Path) -> None:
    model = mlp()
    adapter = randomise(attach(model, row), seed=1)
    want = model(X)
    adapter.save(tmp_path / "a.safetensors")
    objects = {name: id(p) for name, p in adapter.named_parameters()}
    randomise(adapter, seed=2)
    adapter.load(tmp_path / "a.safetensors")
    assert {name: id(p) for name, p in adapter.named_parameters()} == objects
    assert same_bits(model(X), want)


# --- the maths ---------------------------------------------------------------------------------------------------------

COEFFICIENTS = (1.0, -1.5, 0.3, 2.0)


@pytest.mark.fast
@each_variant
def test_equals_the_dense_float64_formula(row: Row) -> None:
    f64 = torch.float64
    model, x = single(dtype=f64), normal(3, 4, 10, seed=2, dtype=f64)
    adapter = randomise(attach(model, row, dtype=f64))
    W, b, tensors = model.linear.weight, model.linear.bias, tensors_at(model, "linear")
    for c in (*COEFFICIENTS, torch.tensor([-1.0, 0.5, 2.0], dtype=f64), normal(3, 4, seed=8, dtype=f64)):
        spread = c.reshape(*c.shape, *[1] * (3 - c.dim())) if isinstance(c, Tensor) else c
        with torch.no_grad(), adapter(model, c=c):
            assert_close(model(x), reference(W, b, tensors, adapter.config, x, spread, "linear"), f"c={c}")


@pytest.mark.fast
@each_variant
def test_gradients_equal_those_of_the_dense_float64_formula(row: Row) -> None:
    f64 = torch.float64
    model, x = single(dtype=f64), normal(3, 4, 10, seed=2, dtype=f64)
    adapter = randomise(attach(model, row, dtype=f64))
    W, b, tensors = model.linear.weight, model.linear.bias, tensors_at(model, "linear")
    trained = [p for p in tensors.values() if p.requires_grad]
    for c in COEFFICIENTS:
        got_x, want_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        with adapter(model, c=c):
            got = torch.autograd.grad(model(got_x).square().sum(), [*trained, got_x])
        want = torch.autograd.grad(reference(W, b, tensors, adapter.config, want_x, c, "linear").square().sum(), [*trained, want_x])
        for g, w in zip(got, want, strict=True):
            assert_close(g, w, f"a gradient at c={c}")


@each_variant
def test_the_dense_formula_holds_without_a_bias(row: Row) -> None:
    f64 = torch.float64
    model, x = Single(nn.Linear(10, 14, bias=False).double()), normal(3, 10, dtype=f64)
    adapter = randomise(attach(model, row, dtype=f64))
    with torch.no_grad(), adapter(model, c=0.7):
        assert_close(model(x), reference(model.linear.weight, None, tensors_at(model, "linear"), adapter.config, x, 0.7, "linear"))


@pytest.mark.fast
@each_variant
def test_linear_in_c_at_one_layer_exactly_where_declared(row: Row) -> None:
    model, x = single(dtype=torch.float64), normal(6, 10, dtype=torch.float64)
    adapter = randomise(attach(model, row, dtype=torch.float64))

    def change(c: float) -> Tensor:
        with torch.no_grad(), adapter(model, c=c):
            return model(x) - model.linear.forward(x)

    worst = max(float((change(c) - c * change(1.0)).abs().max()) for c in (-1.5, 0.3, 2.0))
    if law_of(row).linear_in_c:
        assert worst < TOLERANCE[torch.float64]
    else:
        assert worst > 1e-3, "it is linear in c: declare that"


@pytest.mark.fast
@each_variant
def test_factors_are_what_the_hook_adds_or_are_refused_by_name(row: Row) -> None:
    model, x = single(dtype=torch.float64), normal(6, 10, dtype=torch.float64)
    adapter = randomise(attach(model, row, dtype=torch.float64))
    law = law_of(row)
    if law.form != "low-rank" and law.exact_low_rank != "by itself":
        with pytest.raises(TypeError, match=repr(row.config.variant)):
            adapter.factors()
        return
    for c in (1.0, -1.5, 0.0):
        update = adapter.factors(c=c)["linear"]
        assert isinstance(update, ll.LowRank)
        with torch.no_grad(), adapter(model, c=c):
            assert_close(model.linear.forward(x) + x @ update.dense().T, model(x), f"c={c}")
    attached = {c: adapter.factors(c)["linear"].dense() for c in (1.0, 2.0)}
    adapter.detach()
    for c, update in attached.items():
        assert_close(adapter.factors(c)["linear"].dense(), update, f"detached, c={c}")
    if law.linear_in_c:
        assert_close(attached[1.0], attached[2.0] / 2)


@each_variant
def test_gradients_reach_a_c_that_wants_them_also_at_zero(row: Row) -> None:
    model, x = mlp(torch.float64), X.double()
    adapter = randomise(attach(model, row, dtype=torch.float64))

    def loss(c: Any) -> Tensor:
        with adapter(model, c=c):
            return model(x).square().sum()

    for value in (0.0, 0.8):
        c = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(c), c)
        rise = (loss(value + 1e-5) - loss(value - 1e-5)).detach() / 2e-5
        assert_close(slope, rise, f"d loss / d c at {value}", tolerance=1e-6)
        rows = torch.full((3,), value, dtype=torch.float64, requires_grad=True)
        (slopes,) = torch.autograd.grad(loss(rows), rows)
        assert_close(slopes.sum(), slope, "a row's c moves only its row")


# --- rows, tokens, batches ---------------------------------------------------------------------------------------------


@pytest.mark.fast
@each_variant
def test_row_c_equals_separate_runs(row: Row) -> None:
    model = llama(torch.float64)
    adapter = randomise(attach(model, row, dtype=torch.float64))
    rows = torch.tensor([-1.5, 0.0, 0.5])
    with adapter(model, c=rows):
        together = logits(model)
    for i, c in enumerate(rows.tolist()):
        with adapter(model, c=c):
            assert_close(together[i : i + 1], logits(model, IDS[i : i + 1]), f"row {i}")
    with adapter(model, c=rows.flip(0)):
        assert_differs(logits(model), together, "other rows")


@pytest.mark.fast
@each_variant
def test_token_c_equals_separate_runs(row: Row) -> None:
    model = llama(torch.float64)
    adapter = randomise(attach(model, row, dtype=torch.float64))
    tokens = torch.tensor([-1.5, 0.0, 0.5])[:, None].repeat(1, 7)
    tokens[:, 4:] = 1.25
    with adapter(model, c=tokens):
        together = logits(model)
    with adapter(model, c=tokens[:, 0]):  # causal: what comes later does not reach the first four
        assert_close(together[:, :4], logits(model)[:, :4])
        assert_differs(together[:, 4:], logits(model)[:, 4:])
    layer = single(dtype=torch.float64)
    own, x = randomise(attach(layer, row, dtype=torch.float64)), normal(3, 7, 10, dtype=torch.float64)
    with own(layer, c=tokens):
        mixed = layer(x)
    for t in range(7):
        with own(layer, c=tokens[:, t]):
            assert_close(mixed[:, t], layer(x)[:, t])


@pytest.mark.fast
@each_variant
def test_causal_and_independent_of_the_batch(row: Row) -> None:
    model = llama(torch.float64)
    randomise(attach(model, row, dtype=torch.float64))
    want, later = logits(model), IDS.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 128
    assert_close(logits(model, later)[:, :5], want[:, :5], "tokens before the change")
    assert_differs(logits(model, later)[:, 5:], want[:, 5:])
    for i in range(3):
        assert_close(logits(model, IDS[i : i + 1]), want[i : i + 1], "a row alone")


# --- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@each_variant
def test_merged_equals_hooked_and_unmerging_is_bitwise(row: Row) -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    adapter = randomise(attach(model, row))
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)  # ours must come back between these two
    before = snapshot(model, hook_numbers=False)
    for c in (1.0, -0.7, 0.0):
        with adapter(model, c=c):
            hooked = logits(model)
        with adapter.merged(c=c):
            assert_close(logits(model), hooked, f"merged at c={c}")
            assert not [name for name, _ in model.named_parameters() if "lora_" in name], "merged, it is a plain model"
        assert not changed(before, snapshot(model, hook_numbers=False))
    with pytest.raises(ZeroDivisionError), adapter.merged(c=1.0):
        raise ZeroDivisionError
    assert not changed(before, snapshot(model, hook_numbers=False))
    hooked = logits(model)
    adapter.merge(c=1.0)
    assert_close(logits(model), hooked)
    adapter.unmerge()
    assert not changed(before, snapshot(model, hook_numbers=False)) and same_bits(logits(model), hooked)


@each_variant
def test_merging_under_autocast_rounds_nothing(row: Row) -> None:
    model = llama()
    adapter = randomise(attach(model, row))
    with adapter.merged():
        want = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        adapter.merge()
    assert same_bits(logits(model), want)


@each_variant
def test_detaching_while_merged_restores_everything(row: Row) -> None:
    model = mlp()
    mixed_flags(model)
    before = snapshot(model)
    adapter = randomise(attach(model, row))
    adapter.merge(c=0.7)
    adapter.detach()
    assert not changed(before, snapshot(model))


@each_dtype
@each_variant
def test_merging_in_every_dtype_restores_the_weight(row: Row, dtype: torch.dtype) -> None:
    model = mlp(dtype)
    base, x = model(X.to(dtype)), X.to(dtype)
    adapter = randomise(attach(model, row))
    hooked = model(x)
    with adapter.merged():
        assert_close(model(x), hooked, tolerance=TOLERANCE[dtype])
    adapter.detach()
    assert same_bits(model(x), base)


# --- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@each_dtype
@each_variant
def test_every_dtype_of_the_base(row: Row, dtype: torch.dtype) -> None:
    """float32 factors on any base: the output keeps the base's dtype, the gradients the factors', and the value is near the truth."""
    model, x = single(dtype=dtype), normal(3, 4, 10, seed=2, dtype=dtype)
    base = model(x)
    adapter = randomise(attach(model, row))
    with adapter(model, c=torch.tensor([0.0, 0.5, -1.5])):
        mixed = model(x)
    assert same_bits(mixed[0], base[0]) and mixed.dtype == dtype
    mixed.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter.parameters())
    linear, tensors = model.linear.double(), {k: v.double() for k, v in tensors_at(model, "linear").items()}
    c = torch.tensor([0.0, 0.5, -1.5])[:, None, None]
    truth = reference(linear.weight, linear.bias, tensors, adapter.config, x.double(), c, "linear")
    assert_close(mixed, truth, tolerance=max(TOLERANCE[dtype], TOLERANCE[torch.float32]))


@pytest.mark.fast
@each_variant
def test_autocast(row: Row) -> None:
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        base = logits(model)
        adapter = randomise(attach(model, row))
        with adapter(model, c=0.0):
            assert same_bits(logits(model), base)
        out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == base.dtype
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter.parameters())
    assert_close(out.logits.float(), logits(model), tolerance=TOLERANCE[torch.bfloat16])


@each_variant
def test_moving_the_model_to_another_dtype_keeps_the_adapter(row: Row) -> None:
    model = mlp()
    adapter = randomise(attach(model, row))
    parameters, want = [id(p) for p in adapter.parameters()], model(X)
    model.double()
    assert [id(p) for p in adapter.parameters()] == parameters, "an optimizer's parameters must stay the same objects"
    assert_close(model(X.double()), want.double(), tolerance=TOLERANCE[torch.float32])
    adapter.detach()
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]


# --- copies and transformations ----------------------------------------------------------------------------------------


@pytest.mark.fast
@each_variant
def test_a_deepcopy_carries_its_own_adapter(row: Row) -> None:
    model = mlp()
    mixed_flags(model)
    plain = copy.deepcopy(model)
    adapter = randomise(attach(model, row, c=0.5))
    want, twin = model(X), copy.deepcopy(model)
    assert same_bits(twin(X), want)
    (own,) = ll.adapters(twin).values()
    assert own.c == 0.5, "the resting c goes along"
    assert own is not adapter and list(ll.adapters(model).values()) == [adapter]
    with pytest.raises(ValueError, match="another"), adapter(twin, c=0.7):
        pass
    with adapter(model, c=0.0):
        assert same_bits(twin(X), want), "the original's c moved the copy"
    with own(twin, c=0.0):
        assert same_bits(model(X), want) and same_bits(twin(X), plain(X))
    randomise(own, seed=9)
    assert same_bits(model(X), want), "the copy's tensors are shared with the original"
    own.detach()
    assert same_bits(twin(X), plain(X)) and same_bits(model(X), want)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in plain.parameters()]
    adapter.detach()
    assert same_bits(model(X), plain(X))


CHILD = """
import json, sys, warnings
import torch
import lora_lite as ll
from tests.references import same_bits

verdicts = {}
for name in json.loads(sys.argv[2]):
    held = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=False)
    model, x, calls = held["model"], held["x"], []
    for module in model.modules():  # hook numbers start again in a new process, and must not meet those that were pickled
        for kind in ("forward", "forward_pre"):
            register, number, highest = getattr(module, f"register_{kind}_hook"), -1, max(getattr(module, f"_{kind}_hooks"), default=-1)
            while number <= highest:
                handle = register(lambda *a: calls.append(1))
                number = handle.id
                handle.remove()
            register(lambda *a: calls.append(1))
    out = {"same": same_bits(model(x), held["want"])}
    (adapter,) = ll.adapters(model).values()
    with adapter(model, c=-1.5):
        out["turned"] = same_bits(model(x), held["turned"])
    with adapter(model, c=0.0):
        out["zero"] = same_bits(model(x), held["base"])
    adapter.save(f"{sys.argv[1]}/{name}.safetensors")
    adapter.detach()
    out["detached"] = same_bits(model(x), held["base"]) and not [n for n in model.state_dict() if "lora_" in n]
    out["flags"] = [p.requires_grad for p in model.parameters()] == held["flags"]
    ll.load(model, f"{sys.argv[1]}/{name}.safetensors", c=0.5)
    out["loaded"] = same_bits(model(x), held["want"])
    verdicts[name] = out
print(json.dumps(verdicts))
"""


@pytest.fixture(scope="module")
def unpickled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bool]]:
    """What a fresh process found in the pickled models of all rows."""
    folder = tmp_path_factory.mktemp("pickled")
    for name, row in VARIANTS.items():
        model = mlp()
        mixed_flags(model)
        flags, base = [p.requires_grad for p in model.parameters()], model(X).detach()
        adapter = randomise(attach(model, row, c=0.5))
        with adapter(model, c=-1.5):
            turned = model(X).detach()
        held = {"model": model, "x": X, "want": model(X).detach(), "turned": turned, "base": base, "flags": flags}
        torch.save(held, folder / f"{name}.pt")
    root = Path(__file__).parents[1]
    arguments = [sys.executable, "-c", CHILD, str(folder), json.dumps(list(VARIANTS))]
    done = subprocess.run(arguments, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_pickled_model_works_in_a_fresh_process(name: str, unpickled: dict[str, dict[str, bool]]) -> None:
    assert all(unpickled[name].values()), unpickled[name]


@pytest.mark.fast
@each_variant
def test_state_dict_is_strict_both_ways(row: Row) -> None:
    model, other, clean = mlp(), mlp(seed=1), mlp(seed=2)
    randomise(attach(model, row))
    attach(other, row)
    want = model(X)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        clean.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(clean.state_dict())
    for assign in (False, True):
        randomise(ll.adapters(other)["default"], seed=5)
        other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=assign)
        assert same_bits(other(X), want), f"assign={assign}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_variant
def test_a_batch_of_gradients_goes_back_at_once(row: Row, dtype: torch.dtype) -> None:
    """What jacobian(vectorize=True) does: the backward runs under vmap."""
    model = mlp(dtype)
    adapter = randomise(attach(model, row))
    x = X.to(dtype).requires_grad_()
    out, tensors = model(x), [x, *adapter.parameters()]
    directions = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    together = torch.autograd.grad(out, tensors, directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        for found, want in zip(together, torch.autograd.grad(out, tensors, direction, retain_graph=True), strict=True):
            assert_close(found[i], want, tolerance=TOLERANCE[dtype])


@pytest.mark.fast
@each_variant
def test_functional_call_and_vmap_over_adapters(row: Row) -> None:
    model = mlp()
    adapter = attach(model, row)
    states, outputs = [], []
    for seed in (1, 2):
        randomise(adapter, seed)
        states.append({name: p.detach().clone() for name, p in adapter.named_parameters()})
        outputs.append(model(X).detach())
    randomise(adapter, 3)
    for state, want in zip(states, outputs, strict=True):
        assert same_bits(torch.func.functional_call(model, state, (X,)).detach(), want)
    stacked = {name: torch.stack([s[name] for s in states]) for name in states[0]}
    both = torch.vmap(lambda state: torch.func.functional_call(model, state, (X,)))(stacked)
    assert_close(both, torch.stack(outputs))


@pytest.mark.fast
@each_variant
def test_vmap_and_jacobians_over_c(row: Row) -> None:
    model = mlp(torch.float64)
    adapter, x = randomise(attach(model, row, dtype=torch.float64)), X.double()
    cs = torch.tensor([-1.5, 0.0, 0.7], dtype=torch.float64)

    def run(c: Any) -> Tensor:
        with adapter(model, c=c):
            return model(x)

    assert_close(torch.vmap(run)(cs), torch.stack([run(c) for c in cs.tolist()]))
    slope = (run(1e-5) - run(-1e-5)) / 2e-5
    assert_close(torch.func.jacfwd(run)(cs[1]), slope, "forward mode at 0", tolerance=1e-6)
    assert_close(torch.func.jacrev(run)(cs[1]), slope, "reverse mode at 0", tolerance=1e-6)


# --- two adapters ------------------------------------------------------------------------------------------------------

EACH_FORM = ("lora", "ia3_ff", "dora")  # one variant of each form; every variant meets each of them, on both sides
PAIRS = [p for p in itertools.permutations(VARIANTS, 2) if set(p) & set(EACH_FORM)]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["+".join(p) for p in PAIRS])
def test_two_adapters_are_switched_independently_and_leave_in_any_order(first: str, second: str) -> None:
    model = mlp()
    mixed_flags(model)
    before, base, alone = snapshot(model), model(X).detach(), {}
    for seed, name in enumerate((first, second)):
        adapter = randomise(attach(model, VARIANTS[name]), seed)
        alone[name] = model(X).detach()
        adapter.detach()
    for leaves_first in (first, second):
        one = randomise(attach(model, VARIANTS[first], name="one"), 0)
        two = randomise(attach(model, VARIANTS[second], name="two"), 1)
        assert sorted(ll.adapters(model)) == ["one", "two"]
        trained = {id(p) for p in (*one.parameters(), *two.parameters())}
        assert {id(p) for p in model.parameters() if p.requires_grad} == trained, "attaching one must not freeze the other"
        both = model(X).detach()
        assert_differs(both, alone[first])
        assert_differs(both, alone[second])
        with one(model, c=0.0), two(model, c=0.0):
            assert same_bits(model(X), base)
        with two(model, c=0.0):
            assert same_bits(model(X), alone[first])
        with one(model, c=0.0):
            assert same_bits(model(X), alone[second])
        assert same_bits(model(X), both)
        leaver, stayer, stays = (one, two, second) if leaves_first == first else (two, one, first)
        leaver.detach()
        assert same_bits(model(X), alone[stays])
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in stayer.parameters()}, "the base must stay frozen"
        stayer.detach()
        assert not changed(before, snapshot(model))


# --- kinds of layers and calls -----------------------------------------------------------------------------------------


@pytest.mark.fast
@each_variant
def test_conv1d_equals_the_linear_with_its_weight(row: Row) -> None:
    """GPT-2's layer keeps (d_in, d_out); the adapter's tensors do not know."""
    plain, model = single(10, 14), Single(Conv1D(14, 10))
    with torch.no_grad():
        model.linear.weight.copy_(plain.linear.weight.T)
        model.linear.bias.copy_(plain.linear.bias)
    x, before = normal(3, 4, 10, seed=2), snapshot(model)
    want_base, base = plain(x), model(x)
    assert_close(base, want_base)
    for m in (plain, model):
        randomise(attach(m, row))
    adapter, tensors = ll.adapters(model)["default"], tensors_at(plain, "linear")
    with torch.no_grad():  # the same frozen tensors too: an SVD of W^T may choose other signs
        for key, p in tensors_at(model, "linear").items():
            assert p.shape == tensors[key].shape
            p.copy_(tensors[key])
    assert_close(model(x), plain(x))
    assert_differs(model(x), base)
    with adapter.merged():
        assert_close(model(x), plain(x), "merged")
    with adapter(model, c=0.0):
        assert same_bits(model(x), base)
    adapter.detach()
    assert not changed(before, snapshot(model))


@pytest.mark.fast
@each_variant
def test_a_keyword_call_is_a_call(row: Row) -> None:
    plain, model, x = single(), single(by_keyword=True), normal(3, 4, 10, seed=2)
    base = model(x)
    adapters = [randomise(attach(m, row)) for m in (plain, model)]
    assert same_bits(model(x), plain(x))
    assert_differs(model(x), base)
    with adapters[1](model, c=0.0):
        assert same_bits(model(x), base)


# --- dropout -----------------------------------------------------------------------------------------------------------

DROPPED = {name: row for name, row in VARIANTS.items() if hasattr(row.config, "dropout")}
each_dropped = pytest.mark.parametrize("row", DROPPED.values(), ids=DROPPED)
RATE = 0.25


@each_dropped
def test_dropout_scales_or_zeroes_each_input_in_training_only(row: Row) -> None:
    """With one input feature the change is all there, 1 / (1 - rate) times, or gone: both are seen at their frequencies."""
    n = 4000
    model, x = single(1, 3, torch.float64), torch.full((n, 1), 1.7, dtype=torch.float64)
    base, adapter = model(x), randomise(attach(model, row, dtype=torch.float64, dropout=RATE))
    change = (model(x) - base).detach()
    assert same_bits(model(x), model(x)) and change.abs().min() > 1e-3
    model.train()
    share = (model(x).detach() - base) / change
    kept = share > 0.5
    assert torch.equal(kept, kept[:, :1].expand_as(kept)), "an input is dropped for the whole row of outputs"
    assert_close(share, kept.double() / (1 - RATE))
    spread = 5 * (RATE * (1 - RATE) / n) ** 0.5
    assert abs(float(kept[:, 0].double().mean()) - (1 - RATE)) < spread
    assert not same_bits(model(x), model(x)), "drawn anew at each call"
    with adapter(model, c=0.0):
        assert same_bits(model(x), base)
    adapter.eval()
    assert same_bits(model(x) - base, change)
    adapter.train()
    model.eval()
    assert same_bits(model(x) - base, change)


@each_dropped
def test_merging_leaves_dropout_out(row: Row) -> None:
    model = mlp()
    adapter = randomise(attach(model, row, dropout=0.5))
    want = model(X)
    model.train()
    with adapter.merged():
        assert_close(model(X), want)
    assert_differs(model(X), want)


# --- c -----------------------------------------------------------------------------------------------------------------


def blocks(adapter: ll.Adapter, model: nn.Module) -> Iterator[tuple[Callable[[], AbstractContextManager[Any]], float]]:
    yield lambda: adapter(model, c=-1.5), -1.5
    yield lambda: adapter(c=0.25), 0.25


@pytest.mark.fast
@each_variant
def test_blocks_nest_and_c_returns(row: Row) -> None:
    model = mlp()
    adapter = randomise(attach(model, row))
    rest = model(X)
    for block, c in blocks(adapter, model):
        with block():
            assert adapter.c == c
            outer = model(X)
            with adapter(model, c=2.0):
                assert adapter.c == 2.0 and not same_bits(model(X), outer)
            with pytest.raises(ZeroDivisionError), adapter(model, c=3.0):
                raise ZeroDivisionError
            assert adapter.c == c and same_bits(model(X), outer)
        assert adapter.c == 1.0 and same_bits(model(X), rest)
