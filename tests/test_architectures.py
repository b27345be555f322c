"""Does every variant live its whole life on every model family: attach, train, save, load, c per row, c = 0, detach?"""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from tests.architectures import ARCHITECTURES
from tests.models import VARIANTS, Row, attach, each_variant, randomise
from tests.references import assert_close, assert_differs, bits, same_bits

NAMES = tuple(ARCHITECTURES)
ASKED = {
    "llama", "qwen3", "gemma3", "mistral", "gpt2", "opt", "bloom", "phi3", "t5", "bert", "vit", "whisper", "mixtral", "qwen3-moe",
}  # by issue 2  # fmt: skip
MIXED = (-1.0, 0.0, 0.5)  # c per row
ROUTED = ("mixtral", "qwen3-moe")  # other rows decide how many tokens an expert multiplies at once, which moves the last bit
each_architecture = pytest.mark.parametrize("name", NAMES)


@functools.cache
def built(name: str) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A model, three rows of input for it, and what it says of them. Copied by whoever changes it."""
    family = ARCHITECTURES[name]
    model = family.build()
    inputs = family.inputs(model, batch=len(MIXED))
    return model, inputs, answer(model, inputs)


def fresh(name: str) -> Any:
    return copy.deepcopy(built(name)[0])


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def state(model: nn.Module) -> dict[str, tuple[int, bool, bytes]]:
    """Identity, flag and bits of everything that is stored."""
    held = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {n: (id(t), t.requires_grad, bits(t).numpy().tobytes()) for n, t in held}


def train(name: str, model: nn.Module, adapter: ll.Adapter, steps: int = 3) -> list[float]:
    """The loss before each step and after the last. Adam without decay: what changes has had a gradient."""
    _, inputs, _ = built(name)
    optimizer, losses = torch.optim.Adam(adapter.parameters(), lr=0.01), []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = ARCHITECTURES[name].loss(model, model(**inputs), inputs)
        losses.append(loss.item())
        if len(losses) <= steps:
            loss.backward()
            optimizer.step()
    return losses


def test_the_families_asked_for_are_all_here() -> None:
    assert set(NAMES) >= ASKED


@each_variant
@pytest.mark.parametrize("name", sorted(ASKED))
def test_attach_train_save_load_and_leave(name: str, row: Row, tmp_path: Path) -> None:
    model, (_, inputs, base) = fresh(name), built(name)
    before = state(model)
    adapter = attach(model, row, batch=inputs)
    own = {id(p) for fields in adapter.tensors().values() for p in fields.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()} <= own
    trained = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    everything = {n: v.clone() for n, v in adapter.state_dict().items()}

    losses = train(name, model, adapter)
    assert losses[-1] < losses[0], losses
    still = [n for n, p in adapter.named_parameters() if torch.equal(p, trained[n])]
    assert not still, f"{len(still)} of {len(trained)} trainable tensors had no gradient in three steps: {still[:5]}"
    assert all(same_bits(v, everything[n]) for n, v in adapter.state_dict().items() if n not in trained), "a frozen tensor moved"
    assert all(b == before[n][2] for n, (_, _, b) in state(model).items() if n in before), "the base was written"

    found = answer(model, inputs)
    assert_differs(found, base, "three steps")
    with adapter(model, c=0.0):
        assert same_bits(answer(model, inputs), base)
    adapter.save(tmp_path / "a.safetensors")
    other = fresh(name)
    loaded = ll.load(other, tmp_path / "a.safetensors")
    assert same_bits(answer(other, inputs), found), "a loaded adapter is the saved one"
    for owner, m in ((adapter, model), (loaded, other)):
        owner.detach()
        assert same_bits(answer(m, inputs), base)
    assert state(model) == before


def kinds() -> dict[str, Row]:
    """One row of the table per way that c enters a forward; the laws run all of them, on one family."""
    found: dict[tuple[str, bool], str] = {}
    for key, row in VARIANTS.items():
        variant = ll.REGISTRY[row.config.variant]
        if variant.row_c:
            found.setdefault((variant.form, variant.linear_in_c), key)
    return {key: VARIANTS[key] for key in found.values()}


@pytest.mark.parametrize("row", kinds().values(), ids=kinds())
@each_architecture
def test_every_row_has_its_own_c(name: str, row: Row) -> None:
    model, (_, inputs, base) = fresh(name), built(name)
    adapter = randomise(attach(model, row, batch=inputs), std=0.05)
    with adapter(model, c=torch.tensor(MIXED)):
        together = answer(model, inputs)
    for i, c in enumerate(MIXED):
        with adapter(model, c=c):
            alone = answer(model, inputs)
        assert_close(together[i], alone[i], f"row {i} at c={c}", tolerance=2e-5)
        if c:
            assert_differs(alone[i], base[i], f"c={c}")
        elif name not in ROUTED:
            assert same_bits(together[i], base[i]), "a row at c = 0 beside others"


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("targets", ["experts", r"experts\.\d+\.down_proj", ("q_proj", "gate_up_proj")], ids=str)
def test_experts_hold_no_linears_and_the_error_says_so(name: str, targets: Any) -> None:
    model = fresh(name)
    before = state(model)
    with pytest.raises(RuntimeError, match=r"no linear|hold no linears") as caught:
        ll.attach(model, dataclasses.replace(VARIANTS["lora"].config, targets=targets))
    assert "gate_up_proj (4," in str(caught.value) or "down_proj (4," in str(caught.value), "the error shows what holds the weights"
    assert state(model) == before


@pytest.mark.parametrize("name", ROUTED)
def test_all_linear_on_a_mixture_of_experts_is_its_attention(name: str) -> None:
    adapter = attach(fresh(name), VARIANTS["lora"])
    assert {target.split(".")[-2] for target in adapter.targets} == {"self_attn"}
