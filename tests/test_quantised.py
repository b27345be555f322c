"""On a base of 4 or 8 bits (bitsandbytes, on a CPU): does what never reads the weight work, and is what reads it refused by name?

FACTS.md T6: on CPUs with AVX512-BF16 the first forward in eval mode repacks a Linear4bit, and gradients are wrong from then
on; the layers here have that switched off, as the library's warning says to.
"""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger
from torch import Tensor, nn

import lora_lite as ll
from tests.models import VARIANTS, Row, attach, mlp, normal, randomise, tensors_at
from tests.references import assert_close, assert_differs, reference, same_bits
from tests.test_laws import changed, snapshot

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes has no wheel for this platform; it makes the layers tested here")

READS = {name: row for name, row in VARIANTS.items() if ll.REGISTRY[row.config.variant].reads_weight != "never"}
NEVER = {name: row for name, row in VARIANTS.items() if name not in READS}
each_kind = pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
each_that_reads = pytest.mark.parametrize("row", READS.values(), ids=READS)
each_that_never_reads = pytest.mark.parametrize("row", NEVER.values(), ids=NEVER)
X = normal(3, 5, 64, seed=1)
UP = "layers.0.up"


def quantised(layer: nn.Linear, kind: str) -> Any:
    sizes = (layer.in_features, layer.out_features)
    if kind == "Linear4bit":
        new = bnb.nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        new.support_avx512bf16_for_cpu = False
    else:
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0)
        new.weight = bnb.nn.Int8Params(layer.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    new.bias = nn.Parameter(layer.bias.detach().clone())
    return new.to("cpu")


def model_of(kind: str, only: str | None = None) -> Any:
    """The toy with every linear quantised, or only one; each has had its first forward, which moves things about."""
    model = mlp(width=64, hidden=96, depth=2)
    for block in model.layers:
        block.up, block.down = (quantised(layer, kind) for layer in (block.up, block.down))
    if only:
        dense = mlp(width=64, hidden=96, depth=2)
        for name, module in list(dense.named_modules()):
            if isinstance(module, nn.Linear) and name != only:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, module)
    model.eval()
    with torch.no_grad():
        model(X)
    return model


def told(layer: Any) -> Tensor:
    """The dense weight that a layer really multiplies by, asked of its forward: (d_out, d_in)."""
    with torch.no_grad():
        return (layer.forward(torch.eye(layer.in_features)) - layer.bias).T.contiguous()


def test_both_sorts_of_variant_are_here() -> None:
    assert {"lora", "ia3", "ia3_ff"} <= set(NEVER) and {"dora", "pissa"} <= set(READS)


# --- refused -----------------------------------------------------------------------------------------------------------


@each_kind
@each_that_reads
def test_what_reads_the_dense_weight_is_refused_by_name_and_nothing_is_touched(row: Row, kind: str) -> None:
    model = model_of(kind, only=UP)
    before, base = snapshot(model), model(X)
    with pytest.raises(RuntimeError, match=rf"1 of 4 layers cannot carry '{row.config.variant}'.*{UP} .*{kind} 64 -> 96.*lora, ia3"):
        attach(model, row)
    assert not changed(before, snapshot(model)) and same_bits(model(X), base) and not ll.adapters(model)
    adapter = attach(model, row, exclude=(UP,))
    assert len(adapter.targets) == 3, "the dense layers beside it can carry one"


@each_kind
def test_a_file_of_such_a_variant_is_refused_too(kind: str, tmp_path: Path) -> None:
    attach(mlp(width=64, hidden=96, depth=2), VARIANTS["dora"]).save(tmp_path / "a.safetensors")
    model = model_of(kind)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=rf"{UP}.*{kind}"):
        ll.load(model, tmp_path / "a.safetensors")
    assert not changed(before, snapshot(model))


@each_kind
@each_that_never_reads
def test_merging_is_refused_and_changes_nothing(row: Row, kind: str) -> None:
    model = model_of(kind)
    adapter = randomise(attach(model, row))
    before, want = snapshot(model), model(X)
    with pytest.raises((TypeError, RuntimeError), match=rf"{UP}.*{kind}"):
        adapter.merge()
    with pytest.raises((TypeError, RuntimeError), match=kind), adapter.merged(c=0.5):
        pass
    assert not changed(before, snapshot(model)) and same_bits(model(X), want)


def test_a_layer_that_would_be_repacked_is_warned_of() -> None:
    model = model_of("Linear4bit", only=UP)
    model.get_submodule(UP).support_avx512bf16_for_cpu = True
    with pytest.warns(UserWarning, match=rf"{UP}: Linear4bit 64 -> 96 repacks"):
        attach(model, VARIANTS["lora"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model_of("Linear4bit", only=UP), VARIANTS["lora"])


# --- working -----------------------------------------------------------------------------------------------------------


@each_kind
@each_that_never_reads
def test_a_layer_is_the_dense_formula_with_the_weight_it_multiplies_by(row: Row, kind: str) -> None:
    model = model_of(kind)
    adapter = randomise(attach(model, row, targets=rf"{UP}$"), std=0.1)
    layer, x = model.get_submodule(UP), X.clone().requires_grad_()
    base, W, tensors = layer.forward(X), told(layer), tensors_at(model, UP)
    for c in (1.0, -0.7, torch.tensor([-1.0, 0.0, 0.5])):
        spread = c[:, None, None] if isinstance(c, Tensor) else c
        with adapter(model, c=c):
            found = layer(x)
        want = reference(W, layer.bias, tensors, adapter.config, x, spread, UP)
        assert_close(found, want, f"c={c}", tolerance=ROUNDING[kind])
        assert_differs(found, base)
        pull = normal(*want.shape, seed=4)  # not the square: a rotation has no gradient there
        got = torch.autograd.grad((found * pull).mean(), [*adapter.parameters(), x])
        wanted = torch.autograd.grad((want * pull).mean(), [*adapter.parameters(), x])
        for g, w in zip(got, wanted, strict=True):
            assert_close(g / w.abs().max(), w / w.abs().max(), f"a gradient at c={c}", tolerance=10 * ROUNDING[kind])


# 8-bit layers quantise x too, row by row: with IA3-FF it is the scaled x. They multiply in bfloat16 or float16 and in float32.
ROUNDING = {"Linear4bit": 1e-4, "Linear8bitLt": 3e-2}


@each_kind
@each_that_never_reads
def test_c_zero_is_the_quantised_base_bitwise(row: Row, kind: str) -> None:
    model = model_of(kind)
    plain = copy.deepcopy(model)
    adapter = randomise(attach(model, row))
    assert_differs(model(X), plain(X))
    for train in (False, True):
        model.train(train)
        plain.train(train)
        for grad in (False, True):  # 8 bits without gradients are another kernel than 8 bits with them
            with torch.set_grad_enabled(grad):
                base = plain(X)
                for c in (0.0, torch.zeros(3)):
                    with adapter(model, c=c):
                        assert same_bits(model(X), base), f"c={c}, train={train}, grad={grad}"
                with adapter(model, c=torch.tensor([0.0, 1.0, 0.0])):
                    assert_close(model(X)[[0, 2]], base[[0, 2]], tolerance=1e-6)


@each_kind
@each_that_never_reads
def test_training_falls_saves_loads_and_leaves_the_base(row: Row, kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    before, base, other = snapshot(model), model(X).detach(), copy.deepcopy(model)
    adapter = attach(model, row)
    if ll.REGISTRY[row.config.variant].identity_of(row.config).kind == "bitwise":
        assert same_bits(model(X), base)
    optimizer, losses = torch.optim.Adam(adapter.parameters(), lr=0.01), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(X) - base.roll(1, 0)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n, _ in adapter.named_parameters()}
    want = model(X)
    twin = copy.deepcopy(model)
    assert same_bits(twin(X), want)
    adapter.save(tmp_path / "a.safetensors")
    text = io.StringIO()
    sink = logger.add(text, level="WARNING", format="{message}")
    logger.enable("lora_lite")
    try:
        ll.load(other, tmp_path / "a.safetensors")
    finally:
        logger.disable("lora_lite")
        logger.remove(sink)
    assert same_bits(other(X), want)
    assert "quantised" in text.getvalue(), "a fingerprint that sees no contents warns"
    adapter.detach()
    assert not changed(before, snapshot(model)) and same_bits(model(X), base)


@each_kind
def test_an_adapter_of_the_dense_base_loads_on_the_quantised_one(kind: str, tmp_path: Path) -> None:
    dense = mlp(width=64, hidden=96, depth=2)
    randomise(attach(dense, VARIANTS["lora"]), std=0.05).save(tmp_path / "a.safetensors")
    model = model_of(kind)
    base = model(X)
    adapter = ll.load(model, tmp_path / "a.safetensors")
    assert_differs(model(X), base)
    assert_close(model(X), dense(X), "as far as four bits go", tolerance=0.6)
    assert adapter.factors().keys() == set(adapter.targets)
