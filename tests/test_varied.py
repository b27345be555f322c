"""Is a c that differs by layer, follows the tokens, or was measured, what the same numbers given otherwise would be?"""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from tests.models import VOCABULARY, Row, attach, each_variant, llama, randomise, t5

pytestmark = pytest.mark.fast
IDS = torch.arange(1, 19).reshape(2, 9) % VOCABULARY


def late(position: torch.Tensor) -> torch.Tensor:
    return 1.5 * (position >= 4)


def adapted(dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[Any, ll.Adapter]:
    model = llama(dtype)
    adapter = randomise(attach(model, Row(ll.LoRAConfig(r=4, alpha=6.0, dtype=dtype, **kwargs))))
    return model, adapter


# -- by layer -----------------------------------------------------------------------------------------------------------


@each_variant
def test_c_by_layer_is_each_layer_at_its_own_c(row: Row) -> None:
    """Against a c that is turned between the blocks of one forward."""
    model = llama(torch.float64)
    adapter = randomise(attach(model, row))
    with adapter(model, c={r"layers\.0\.": 2.0, "": 0.0}):
        found = model(IDS).logits
        assert adapter.c == {t: (2.0 if ".0." in t else 0.0) for t in adapter.targets}
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: adapter.set_coeff(0.0))
    with adapter(model, c=2.0):
        expected = model(IDS).logits
    handle.remove()
    assert torch.equal(found, expected)
    with adapter(model, c=2.0):
        assert not torch.equal(found, model(IDS).logits)


def test_c_by_layer_takes_tensors_zeros_and_gradients() -> None:
    model, adapter = adapted()
    rows = torch.tensor([1.0, -0.5])
    with adapter(model, c={r"q_proj$": rows, "": 0.0}):
        both = model(IDS).logits
    for i in range(2):
        with adapter(model, c={r"q_proj$": float(rows[i]), "": 0.0}):
            torch.testing.assert_close(both[i : i + 1], model(IDS[i : i + 1]).logits, rtol=1e-10, atol=1e-12)
    with adapter(model, c=0.0):
        base = model(IDS).logits
    with adapter(model, c={"": 0.0}):
        assert torch.equal(model(IDS).logits, base)
    c = torch.tensor(0.0, requires_grad=True)
    with adapter(model, c={r"o_proj$": c, "": 1.0}):
        model(IDS).logits.sum().backward()
    assert c.grad is not None and c.grad.abs() > 0


def test_c_by_layer_goes_with_a_recomputed_forward() -> None:
    model, adapter = adapted()

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        with adapter(model, c={r"layers\.0\.": 2.0, "": -1.0}):
            x = model.get_input_embeddings()(IDS).requires_grad_()
            run = lambda x: model(inputs_embeds=x).logits.square().sum()  # noqa: E731
            loss = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
        return list(torch.autograd.grad(loss, list(adapter.parameters())))  # type: ignore[arg-type]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-10, atol=1e-12)


def test_c_by_layer_can_rest_and_be_copied() -> None:
    model, adapter = adapted()
    adapter.c = {r"layers\.0\.": 2.0, "": 1.0}
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    assert ll.adapters(twin)["default"].c == adapter.c


@pytest.mark.parametrize(
    ("c", "message"),
    [
        ({"nothing": 1.0, "": 1.0}, "match none"),
        ({"q_proj": 1.0}, 'the key "" stands for the rest'),
        ({"": float("nan")}, "finite"),
        ({}, "no entry"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(c: Any, message: str) -> None:
    model, adapter = adapted()
    with pytest.raises(ValueError, match=message), adapter(model, c=c):
        pass
    assert adapter.c == 1.0


# -- by position --------------------------------------------------------------------------------------------------------


def test_a_schedule_is_the_tensor_of_its_values_in_a_full_forward() -> None:
    model, adapter = adapted()
    with adapter(model, c=late):
        found = model(IDS).logits
        again = model(input_ids=IDS).logits
    with adapter(model, c=late(torch.arange(9)).expand(2, 9)):
        expected = model(IDS).logits
    assert torch.equal(found, expected) and torch.equal(again, expected)
    assert adapter.c == 1.0 and not model._forward_pre_hooks and not model._forward_hooks


def test_a_schedule_while_decoding_from_a_cache_is_the_full_forwards(padding: int = 3) -> None:
    """Greedy generation under a schedule, token by token from the cache, against full forwards at c (B, T)."""
    model, adapter = adapted()
    mask = torch.ones_like(IDS)
    mask[1, :padding] = 0
    with adapter(model, c=late):
        found = model.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False)
    ids = IDS
    for _ in range(6):
        full = torch.cat([mask, torch.ones(2, ids.shape[1] - 9, dtype=torch.long)], 1)
        where = (full.cumsum(1) - 1).clamp(min=0)
        with adapter(model, c=late(where)):
            logits = model(ids, attention_mask=full, position_ids=where, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)
    with adapter(model, c=1.5):
        assert not torch.equal(found, model.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False))


def test_a_schedule_counts_the_decoders_tokens() -> None:
    model = t5(torch.float64)
    adapter = randomise(attach(model, Row(ll.LoRAConfig(r=4, targets=r"decoder\..*SelfAttention\.", dtype=torch.float64))))
    with adapter(model, c=late):
        found = model.generate(IDS, max_new_tokens=8, do_sample=False)
        logits = model(input_ids=IDS, decoder_input_ids=found[:, :-1]).logits
    assert torch.equal(logits.argmax(-1), found[:, 1:])


def test_an_inner_block_replaces_a_schedule_and_other_threads_do_not_see_it() -> None:
    model, adapter = adapted()
    plain = model(IDS).logits
    seen: list[torch.Tensor] = []
    with adapter(model, c=late):
        outer = model(IDS).logits
        with adapter(model, c=1.0):
            assert torch.equal(model(IDS).logits, plain)
        assert torch.equal(model(IDS).logits, outer)
        thread = threading.Thread(target=lambda: seen.append(model(IDS).logits))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], plain)
    with pytest.raises(ZeroDivisionError), adapter(model, c=lambda position: 1 / 0):
        model(IDS)
    assert torch.equal(model(IDS).logits, plain) and not model._forward_hooks


def test_a_schedule_goes_with_a_recomputed_forward() -> None:
    model, adapter = adapted()

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        if checkpointed:
            model.activation_checkpointing_enable()
        model.train()
        with adapter(model, c=late):
            loss = model(IDS, use_cache=False).logits.square().sum()
        return list(torch.autograd.grad(loss, list(adapter.parameters())))

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-10, atol=1e-12)


def test_what_a_schedule_cannot_be_is_refused() -> None:
    model, adapter = adapted()
    with pytest.raises(TypeError, match="cannot rest at a schedule"):
        adapter.c = late
    with adapter(model, c=late), pytest.raises(RuntimeError, match="not a part of it called directly"):
        model.model(IDS)
    with adapter(model, c=lambda position: torch.ones(3)), pytest.raises(ValueError, match="one per position"):
        model(IDS)
    for c, said in (("x", "str 'x'"), (None, "NoneType None"), ([1.0, "x"], "list")):
        with adapter(model, c=lambda position, c=c: c), pytest.raises(TypeError, match=f"the schedule returned {said}.*return a number"):
            model(IDS)


def test_a_layer_that_is_no_regular_expression_is_named() -> None:
    model, adapter = adapted()
    with pytest.raises(ValueError, match=r"c by layer holds '\(', which is not a regular expression"), adapter(model, c={"(": 1.0}):
        pass


# -- compiled -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("c", [{"": 1.0}, late], ids=["by layer", "schedule"])
def test_compiled_code_refuses_what_it_cannot_ask_for(c: Any, grad: bool) -> None:
    model, adapter = adapted(torch.float32, targets="q_proj")
    run = torch.compile(model.model, backend="eager")
    with torch.set_grad_enabled(grad), adapter(model, c=c), pytest.raises(RuntimeError, match="compiled code takes a number"):
        run(IDS)


# -- by measurement -----------------------------------------------------------------------------------------------------


def test_auto_is_what_was_calibrated_also_from_the_file_and_on_copies(tmp_path: Any) -> None:
    model, adapter = adapted()
    with pytest.raises(ValueError, match="calibrate_c"), adapter(model, c="auto"):
        pass
    adapter.calibrated = {"positive": 1.75, "negative": None, "verdict": "none below zero"}
    with adapter(model, c="auto"):
        assert adapter.c == 1.75
    with pytest.raises(ValueError, match="none below zero"), adapter(model, c="-auto"):
        pass
    with pytest.raises(TypeError, match='or "auto"'), adapter(model, c="full"):
        pass
    adapter.save(tmp_path / "a.safetensors")
    assert ll.adapters(copy.deepcopy(model))["default"].calibrated == adapter.calibrated == copy.deepcopy(adapter).calibrated
    adapter.detach()
    loaded = ll.load(model, tmp_path / "a.safetensors", c="auto")
    assert loaded.c == 1.75 and loaded.calibrated == adapter.calibrated
