"""Kept adapters act together as the ordered formula says, at the doses in force here, and leave nothing behind."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import io
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.baked import HistoryHook
from lora_lite.history import HistoryBake, disabled, stack
from lora_lite.hooks import hooks_on, owner
from tests.models import VARIANTS, Odd, Single, attach, llama, mlp, normal, opt, randomise, single, t5, token_ids
from tests.references import assert_close, assert_differs, bits, reference, same_bits

F64 = torch.float64
X = normal(3, 4, 12, seed=1, dtype=F64)
IDS = token_ids(3, 6)
ADDITIVE = ("lora", "pissa", "pissa-spectrum", "lora-rs")
# name -> methods of one stack, in order; several of a kind, additive ones between others
STACKS = {
    "additive": ADDITIVE,
    "outputs": ("dora", "ia3", "dora"),
    "inputs": ("ia3_ff", "hra", "ia3-both", "oft"),
    "all": ("dora", "lora", "ia3_ff", "ia3", "pissa-spectrum", "hra", "dora", "pissa", "road"),
}
each_stack = pytest.mark.parametrize("names", STACKS.values(), ids=STACKS.keys())
ROWS = torch.tensor([0.0, 0.7, -1.2], dtype=F64)


def kept(model: nn.Module, names: Sequence[str], dtype: torch.dtype = F64, **options: Any) -> list[ll.Adapter]:
    """Detached adapters with random values and names and ranks of their own."""
    found = []
    for i, name in enumerate(names):
        config = {"r": 2 + i} if hasattr(VARIANTS[name].config, "alpha") else {}
        adapter = randomise(attach(model, VARIANTS[name], name=f"kept{i}", dtype=dtype, **config, **options), seed=10 + i)
        adapter.detach()
        found.append(adapter)
    return found


def pairs(adapters: Sequence[ll.Adapter], doses: Sequence[Any] = ()) -> list[tuple[ll.Adapter, Any]]:
    return list(zip(adapters, doses or [0.9 - 0.4 * i for i in range(len(adapters))], strict=True))


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def everything(model: nn.Module) -> list[Any]:
    """Which tensors, of which bits and flags, and which hooks in which order."""
    tensors = [(n, id(p), p.requires_grad, bits(p).tolist()) for n, p in (*model.named_parameters(), *model.named_buffers())]
    tables = [(n, k, list(v.items())) for n, m in model.named_modules() for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict)]
    return [tensors, tables, list(model.state_dict())]


# --- the order, against dense matrices -------------------------------------------------------------------------------


def ordered(layer: nn.Module, stacked: Sequence[tuple[ll.Adapter, Any]], x: Tensor, live: Sequence[tuple[ll.Adapter, Any]] = ()) -> Tensor:
    """The layer's output, method after method, each by its own dense formula on a weight that makes it speak of one thing only."""
    W, b = layer.weight.detach(), layer.bias.detach()  # type: ignore[union-attr, operator]
    eye, groups = torch.eye(W.shape[1], dtype=W.dtype), (stacked, live)
    first = {id(p): {f: t.detach() for f, t in p[0].tensors()["linear"].items()} for group in groups for p in group}

    def method(pair: tuple[ll.Adapter, Any], W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
        adapter, c = pair
        return reference(W, b, first[id(pair)], adapter.config.at("linear", W.shape[1], W.shape[0]), x, c, "linear")

    def form(pair: tuple[ll.Adapter, Any]) -> str:
        return pair[0].variant.form_at(pair[0].config.at("linear", W.shape[1], W.shape[0]))

    for group in groups:
        for pair in group:
            if form(pair) == "input":
                x = method(pair, eye, None, x)
    y = linear(x, W, b)
    for group in groups:
        for pair in group:
            if form(pair) == "low-rank":
                y = y + method(pair, W, None, x) - linear(x, W)
        for pair in group:
            if form(pair) == "output":
                y = on_output(pair, method, W, b, x, y)
    return y


def on_output(pair: tuple[ll.Adapter, Any], method: Callable[..., Tensor], W: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """ia3 and road turn the y they find. DoRA rescales what is there without the bias, and adds its own update."""
    if pair[0].config.variant != "dora":
        return method(pair, torch.eye(len(b), dtype=y.dtype), None, y)
    adapter, c = pair
    t = {f: v.detach() for f, v in adapter.tensors()["linear"].items()}
    cfg: Any = adapter.config
    V = W + cfg.alpha / t["lora_A"].shape[0] * t["lora_B"] @ t["lora_A"]
    ratio = (W.norm(dim=1) + t["lora_m"]) / V.norm(dim=1)
    return y + c * ((ratio - 1) * (y - b) + linear(x, ratio[:, None] * (V - W)))


@each_stack
def test_a_history_is_the_ordered_formula(names: Sequence[str]) -> None:
    model, x = single(12, 8, dtype=F64), X
    stacked = pairs(kept(model, names))
    history = HistoryBake(model, stacked)
    assert_close(model(x), ordered(model.linear, stacked, x))
    for i, c in ((0, 0.0), (len(names) - 1, -2.0)):
        history.set_coeff(i, c)
        stacked[i] = (stacked[i][0], c)
        assert_close(model(x), ordered(model.linear, stacked, x))


@each_stack
def test_doses_that_differ_by_row_are_the_formula_too(names: Sequence[str]) -> None:
    model = single(12, 8, dtype=F64)
    doses = [ROWS.roll(i) if i % 2 == 0 else 0.3 + i for i in range(len(names))]
    stacked = pairs(kept(model, names), doses)
    spread = [(a, c.view(3, 1, 1) if isinstance(c, Tensor) else c) for a, c in stacked]
    with stack(model, stacked):
        assert_close(model(X), ordered(model.linear, spread, X))


def test_order_matters_where_it_does() -> None:
    model = single(12, 8, dtype=F64)
    one, other = kept(model, ("dora", "dora"))
    results = []
    for order in ((one, other), (other, one)):
        with stack(model, pairs(order, (1.0, 1.0))):
            results.append(model(X))
    assert_differs(results[0], results[1], "two DoRAs in either order")
    assert_differs(results[0], ordered(model.linear, pairs((other, one), (1.0, 1.0)), X), "a reference in the wrong order")


@pytest.mark.parametrize("live_first", [False, True], ids=["history first", "live first"])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "hra"])
def test_live_adapters_act_after_the_history_whenever_they_came(name: str, live_first: bool) -> None:
    model = single(12, 8, dtype=F64)
    stacked = pairs(kept(model, ("dora", "lora", "ia3_ff")))
    if live_first:
        live = randomise(attach(model, VARIANTS[name], dtype=F64), seed=5)
        history = HistoryBake(model, stacked)
    else:
        history = HistoryBake(model, stacked)
        live = randomise(attach(model, VARIANTS[name], dtype=F64), seed=5)
    with live(model, c=0.6):
        assert_close(model(X), ordered(model.linear, stacked, X, [(live, 0.6)]))
    history.remove()
    assert_close(model(X), ordered(model.linear, [], X, [(live, 1.0)]))


def test_hooks_of_others_keep_their_order() -> None:
    model, seen = single(12, 8, dtype=F64), []
    say = lambda name: lambda *_: seen.append(name)  # noqa: E731
    model.linear.register_forward_hook(say("before"))
    attach(model, VARIANTS["lora"], dtype=F64)
    model.linear.register_forward_hook(say("after"))
    before = everything(model)
    (adapter,) = kept(model, ("dora",))
    with stack(model, [(adapter, 1.0)]):
        model(X)
        table = list(model.linear._forward_hooks.values())
        assert [type(owner(hook)).__name__ for hook in table] == ["function", "HistoryHook", "LowRankHook", "function"]
    assert seen == ["before", "after"] and everything(model) == before


# --- additive stacks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-6)])
def test_a_stack_of_additive_adapters_is_their_separate_hooks(dtype: torch.dtype, tolerance: float) -> None:
    model = single(12, 8, dtype=dtype) if dtype is torch.float32 else llama(dtype)
    run = (lambda: model(X.float())) if dtype is torch.float32 else lambda: logits(model)
    adapters = kept(model, ADDITIVE, dtype=dtype)
    doses = (0.5, -1.0, 2.0, 0.25)
    history = HistoryBake(model, pairs(adapters, doses))
    together = run()
    history.remove()
    for adapter, c in zip(adapters, doses, strict=True):
        ll.attach(model, adapter, c=c)
    assert_close(run(), together, tolerance=tolerance)
    adapters[1].c = -0.99
    assert_differs(run(), together, least=1e-4)


def test_a_method_of_both_sites_is_kept_at_each_layers_own() -> None:
    model = mlp(F64)
    (adapter,) = kept(model, ("ia3-both",))
    with ll.attach(model, adapter)(model, c=0.7):
        want = model(X)
    adapter.detach()
    history = HistoryBake(model, [(adapter, 0.7)])
    assert_close(model(X), want, tolerance=1e-14)
    sites = {(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules() if isinstance(m, nn.Linear)}
    assert sites == {(1, 0), (0, 1)}
    history.pop()
    assert same_bits(model(X), mlp(F64)(X)) and "lora_" not in str(list(model.state_dict()))


def test_one_hook_per_layer_and_site_for_all() -> None:
    model = mlp(F64)
    with stack(model, pairs(kept(model, STACKS["all"]))):
        for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
            assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1
    with stack(model, pairs(kept(model, ADDITIVE))):
        for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
            assert len(layer._forward_hooks) == 1 and not layer._forward_pre_hooks
            assert sorted(n.partition("__")[0] for n in layer._parameters if "__" in n) == ["lora_A", "lora_Bt"]


@pytest.mark.parametrize("make", [llama, opt], ids=["llama", "opt"])
def test_one_matrix_of_doses_is_a_run_for_every_row(make: Callable[..., Any]) -> None:
    model = make(F64)
    adapters = kept(model, ("lora", "pissa-spectrum", "ia3"))
    doses = torch.tensor([[0.0, 0.0, 0.0], [1.0, -0.5, 0.0], [0.3, 0.0, 1.5]], dtype=F64)
    with stack(model, pairs(adapters, doses.unbind(1))):
        together = logits(model)
    for row in range(3):
        with stack(model, pairs(adapters, doses[row].tolist())):
            assert_close(together[row], logits(model)[row])
    assert same_bits(together[0], logits(model)[0])
    assert_differs(together[1], logits(model)[1])


def test_doses_by_token() -> None:
    model = llama(F64)
    adapters = kept(model, ("lora", "ia3"))
    late = torch.zeros(3, 6, dtype=F64)
    late[:, 4:] = 1.0
    with stack(model, pairs(adapters, (late, torch.tensor([1.0, 0.0, 0.0], dtype=F64)))):
        found = logits(model)
    assert same_bits(found[1:, :4], logits(model)[1:, :4])
    assert_differs(found[1:, 4:], logits(model)[1:, 4:])


@pytest.mark.parametrize("make", [llama, t5], ids=["llama", "t5"])
def test_one_batched_generate_is_a_run_for_every_row(make: Callable[..., Any]) -> None:
    model = make(F64)
    adapters = kept(model, ("lora", "ia3"), targets=r"(q|v)(_proj)?")
    doses = torch.tensor([[0.0, 0.0], [3.0, 1.0], [-3.0, 4.0]], dtype=F64)
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    prompt = IDS[:1].expand(3, -1)
    with stack(model, pairs(adapters, doses.unbind(1))):
        together = model.generate(input_ids=prompt, **options)
    for row in range(3):
        with stack(model, pairs(adapters, doses[row].tolist())):
            assert torch.equal(model.generate(input_ids=prompt[:1], **options)[0], together[row])
    assert not torch.equal(together[0], together[1])


def test_an_adapter_listed_twice_adds_up() -> None:
    model = llama(F64)
    (adapter,) = kept(model, ("lora",))
    with stack(model, [(adapter, 0.4), (adapter, 0.3)]):
        twice = logits(model)
    with stack(model, [(adapter, 0.7)]):
        assert_close(logits(model), twice)
    with stack(model, [(adapter, 0.4)]):
        assert_differs(logits(model), twice)


def test_as_one_plain_lora() -> None:
    model = llama(F64)
    adapters = [*kept(model, ADDITIVE), *kept(model, ("lora",), targets="q_proj")]
    history = HistoryBake(model, pairs(adapters))
    wanted = logits(model)
    whole = history.to_adapter("whole")
    history.remove()
    assert whole.config.variant == "lora" and not whole.attached
    ll.attach(model, whole)
    assert_close(logits(model), wanted)
    with whole(model, c=0.0):
        assert_differs(logits(model), wanted)


def test_as_one_plain_lora_through_a_file(tmp_path: Any) -> None:
    model = mlp(torch.float32)
    history = HistoryBake(model, pairs(kept(model, ("lora", "pissa"), dtype=torch.float32)))
    x = X.float()
    wanted = model(x)
    history.to_adapter().save(tmp_path / "whole.safetensors")
    history.remove()
    ll.load(model, tmp_path / "whole.safetensors")
    assert_close(model(x), wanted)


# --- a snapshot, and what may change -----------------------------------------------------------------------------------


def test_an_empty_history_is_the_identity() -> None:
    model = mlp(F64)
    before, base = everything(model), model(X)
    history = HistoryBake(model)
    assert everything(model) == before and same_bits(model(X), base)
    assert len(history) == 0 and "empty" in repr(history)
    with pytest.raises(IndexError, match="nothing to pop"):
        history.pop()
    with pytest.raises(ValueError, match="empty"):
        history.to_adapter()


def test_what_becomes_of_an_adapter_does_not_change_the_history() -> None:
    model = mlp(F64)
    adapters = kept(model, STACKS["all"])
    HistoryBake(model, pairs(adapters))
    wanted = model(X)
    for adapter in adapters:
        for p in adapter.state_dict().values():
            p.fill_(7.0)
    assert same_bits(model(X), wanted)


@each_stack
def test_push_and_pop_and_remove(names: Sequence[str]) -> None:
    model = mlp(F64)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
    adapters = kept(model, names)
    before, results = everything(model), [model(X)]
    history = HistoryBake(model)
    for adapter, c in pairs(adapters):
        history.push(adapter, c)
        results.append(model(X))
    history2 = HistoryBake(model)  # an empty one beside it
    history.remove()
    assert everything(model) == before
    history = HistoryBake(model, pairs(adapters))
    assert_close(model(X), results[-1])
    assert history.names == [a.name for a in adapters]
    for wanted in results[-2::-1]:
        history.pop()
        assert_close(model(X), wanted)
    assert everything(model) == before and same_bits(model(X), results[0])
    history.push(adapters[0], pairs(adapters)[0][1])
    history.remove()
    history.push(adapters[0], pairs(adapters)[0][1])  # one that was removed is an empty one, and may be filled again
    assert_close(model(X), results[1])
    history.remove()
    history.remove()
    history2.remove()
    assert everything(model) == before


def test_histories_beside_each_other() -> None:
    """The older first, also where it came to a layer later; each has tensors and doses of its own."""
    model = single(12, 8, dtype=F64)
    before = everything(model)
    one, other, third = kept(model, ("dora", "dora", "lora"))
    older, younger = HistoryBake(model), HistoryBake(model)
    older.push(third, 0.0)
    younger.push(other, 0.8)
    older.push(one, -0.7)
    assert_close(model(X), ordered(model.linear, [(one, -0.7), (other, 0.8)], X))
    assert_differs(model(X), ordered(model.linear, [(other, 0.8), (one, -0.7)], X))
    ages = HistoryBake.of(model)
    assert [h.names for h in ages] == [["kept2", "kept0"], ["kept1"]] and [h.coeffs for h in ages] == [(0.0, -0.7), (0.8,)]
    younger.set_coeff(0, 0.0)
    assert_close(model(X), ordered(model.linear, [(one, -0.7)], X))
    older.remove()
    assert same_bits(model(X), ordered(model.linear, [], X))
    younger.remove()
    assert everything(model) == before


def test_an_older_history_that_comes_to_a_layer_later_still_acts_first() -> None:
    model = mlp(F64)
    first, second = kept(model, ("ia3",), targets="up"), kept(model, ("dora",), targets="down")
    (late,) = kept(model, ("dora",), targets="down")
    older, younger = HistoryBake(model, pairs(first)), HistoryBake(model, pairs(second))
    older.push(late, 1.0)
    hooks = list(hooks_on(model.get_submodule("layers.0.down")))
    assert [h.names for h in HistoryBake.of(model)] == [["kept0", "kept0"], ["kept0"]]
    assert [hook.shared for hook in hooks] == [older._baked, younger._baked]


def test_flags_of_the_base_are_the_bases() -> None:
    model = mlp(F64)
    (adapter,) = kept(model, ("lora",))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    history = HistoryBake(model, [(adapter, 1.0)])
    own = {n: p.requires_grad for n, p in model.named_parameters() if n not in flags}
    assert own and not any(own.values())
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in flags} == flags
    live = attach(model, VARIANTS["lora"], dtype=F64)  # freezes the base, not for good
    history.push(adapter, 0.5)
    history.remove()
    live.detach()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_in_lower_precision(dtype: torch.dtype) -> None:
    model, exact = mlp(dtype), mlp(F64)
    adapters = kept(model, STACKS["all"], dtype=torch.float32)
    HistoryBake(exact, pairs(adapters), strict_base=False)
    base = model(X.to(dtype))
    history = HistoryBake(model, pairs(adapters))
    found = model(X.to(dtype))
    assert found.dtype is dtype
    assert_close(found, exact(X).to(dtype), tolerance={torch.float32: 1e-4}.get(dtype, 0.15))
    for i in range(len(adapters)):
        history.set_coeff(i, 0.0)
    assert same_bits(model(X.to(dtype)), base)


def test_under_autocast_and_inference_mode() -> None:
    model, exact = mlp(torch.float32), mlp(torch.float32)
    adapters = kept(model, STACKS["all"], dtype=torch.float32)
    HistoryBake(exact, pairs(adapters))
    x = X.float()
    with torch.inference_mode():
        history = HistoryBake(model, pairs(adapters))
        assert same_bits(model(x), exact(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(model(x), exact(x))
        low = model(x).float()
    assert_close(low, model(x), tolerance=0.15)
    assert_differs(low, model(x), "bfloat16 and float32")
    history.set_coeff(0, ROWS)
    with torch.inference_mode():
        model(x)
    seen = x.requires_grad_()
    model(seen).sum().backward()  # what inference mode made can still be differentiated through
    assert seen.grad is not None and len(history) == len(adapters)


def test_what_is_baked_under_autocast_is_not_rounded() -> None:
    """LoRA-XS multiplies two of its tensors to say what it is: once in bfloat16, and kept so."""
    model = mlp(torch.float32)
    adapters, x = kept(model, ("lora-xs", "vera"), dtype=torch.float32), X.float()
    with ll.stack(model, pairs(adapters)):
        want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        HistoryBake(model, pairs(adapters))
    assert same_bits(model(x), want)


def test_an_adapter_is_asked_for_all_its_layers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for all of them at each of its layers, a PiSSA on 168 layers took 2.2 s to bake, now 0.05."""
    model, asked = mlp(), list[str]()
    adapters, factors = kept(model, ("pissa", "lora")), ll.Adapter.factors
    monkeypatch.setattr(ll.Adapter, "factors", lambda self, c=1.0: asked.append(self.name) or factors(self, c))
    HistoryBake(model, pairs(adapters))
    assert len(asked) == len(adapters)


# --- the gate ----------------------------------------------------------------------------------------------------------

GATES: dict[str, Callable[[ll.Adapter], Any]] = {"adapter": lambda a: a, "callable": lambda a: lambda: a.c != 0}
each_gate = pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())


@each_gate
@each_stack
def test_a_shut_gate_is_the_base_bit_for_bit(names: Sequence[str], gate: Callable[[ll.Adapter], Any]) -> None:
    model = mlp(F64)
    base = model(X).detach()
    stacked = pairs(kept(model, names))
    adapter = attach(model, VARIANTS["lora"], dtype=F64)  # fresh: adds nothing at any c
    history = HistoryBake(model, stacked, gate=gate(adapter))
    opened = model(X)
    assert_differs(opened, base)
    with adapter(model, c=0.0):
        assert same_bits(model(X), base)
    with pytest.raises(ZeroDivisionError), adapter(model, c=0.0):
        raise ZeroDivisionError
    assert same_bits(model(X), opened)
    with adapter(model, c=ROWS):
        found = model(X)
        assert same_bits(found[0], base[0])
        assert_close(found[1:], opened[1:])
    history.set_gate(None)
    with adapter(model, c=0.0):
        assert same_bits(model(X), opened)


@each_stack
def test_rows_at_zero_keep_the_bits_of_what_is_no_number(names: Sequence[str]) -> None:
    model = Single(Odd(12, 8).double()).requires_grad_(False)
    x = X.clone()
    x[..., :4] = torch.tensor([torch.nan, torch.inf, -0.0, 0.0], dtype=F64)
    base = model(x)
    rows = torch.tensor([0.0, 1.0, 0.0], dtype=F64)
    with stack(model, pairs(kept(model, names), [rows] * len(names))):
        found = model(x)
    assert same_bits(found[::2], base[::2]) and not same_bits(found[1], base[1])


def test_what_is_kept_is_no_longer_dropped_out() -> None:
    model = mlp(F64).train()
    adapters = kept(model, ("lora", "dora"), dropout=0.5)
    HistoryBake(model, pairs(adapters))
    assert same_bits(model(X), model(X))
    ll.attach(model, adapters[0])
    assert not same_bits(model(X), model(X))


def test_a_shut_gate_costs_nothing_but_the_hook() -> None:
    model = mlp(F64)
    stacked = pairs(kept(model, STACKS["all"]))
    HistoryBake(model, stacked, gate=lambda: False)
    for layer in model.modules():
        for hook in hooks_on(layer):
            assert isinstance(hook, HistoryHook)
            assert hook.run(layer, (X,), {}, X) is None


def test_the_gate_is_asked_in_every_forward() -> None:
    model, asked = mlp(F64), []
    (adapter,) = kept(model, ("lora",))
    HistoryBake(model, [(adapter, 1.0)], gate=lambda: asked.append(0) or False)
    model(X)
    first = len(asked)
    model(X)
    assert first == 6 and len(asked) == 12  # once at each of the six layers


# --- context -----------------------------------------------------------------------------------------------------------


def test_a_stack_is_seen_in_its_context_only() -> None:
    model = mlp(F64)
    base, before = model(X).detach(), everything(model)
    adapters = kept(model, STACKS["all"])
    seen: list[Tensor] = []
    with pytest.raises(ZeroDivisionError), stack(model, pairs(adapters)) as doses:
        inside = model(X)
        thread = threading.Thread(target=lambda: seen.append(model(X)))
        thread.start()
        thread.join()
        doses.set_coeff(0, 0.1)
        assert_differs(model(X), inside)
        raise ZeroDivisionError
    assert_differs(inside, base)
    assert same_bits(seen[0], base) and same_bits(model(X), base) and everything(model) == before


def test_threads_each_see_their_own_doses() -> None:
    model = mlp(F64)
    adapters = kept(model, ("lora", "ia3"))
    wrong: list[float] = []

    def work(c: float) -> None:
        with torch.no_grad(), stack(model, pairs(adapters, (c, -c))):
            for _ in range(10):
                if not torch.allclose(model(X), wanted[c]):
                    wrong.append(c)

    wanted = {}
    for c in (0.0, 0.5, -2.0):
        with torch.no_grad(), stack(model, pairs(adapters, (c, -c))):
            wanted[c] = model(X)
    threads = [threading.Thread(target=work, args=(c,)) for c in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not [m for m in model.modules() if m._forward_hooks]


def test_tasks_each_see_their_own_doses() -> None:
    model = mlp(F64)
    (adapter,) = kept(model, ("lora",))

    async def run(c: float) -> Tensor:
        with stack(model, [(adapter, c)]):
            await asyncio.sleep(0)
            return model(X)

    async def both() -> list[Tensor]:
        return list(await asyncio.gather(run(1.0), run(-1.0)))

    for c, found in zip((1.0, -1.0), asyncio.run(both()), strict=True):
        with stack(model, [(adapter, c)]):
            assert_close(found, model(X))


def test_disabled_is_the_base_whatever_is_attached() -> None:
    model = mlp(F64)
    base = model(X).detach()
    stacked = pairs(kept(model, STACKS["all"]))
    HistoryBake(model, stacked)
    HistoryBake(model, stacked[:2], gate=lambda: True)
    live = randomise(attach(model, VARIANTS["dora"], dtype=F64), seed=3)
    on, seen = model(X), []
    with disabled(model):
        assert same_bits(model(X), base)
        thread = threading.Thread(target=lambda: seen.append(model(X)))
        thread.start()
        thread.join()
        with live(model, c=1.0):
            assert_differs(model(X), base)  # a c that is set inside acts
        assert same_bits(model(X), base)
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert same_bits(model(X), on) and same_bits(seen[0], on)


# --- gradients ---------------------------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def contrast(reentrant: bool | None, gate: str, names: Sequence[str]) -> tuple[list[Tensor], Tensor]:
    """Gradients of +1 against -1 with the pristine base as reference, all in one backward after the blocks, in a thread."""
    model = llama(F64)
    stacked = pairs(kept(model, names))
    adapter = randomise(attach(model, VARIANTS["lora"], dtype=F64))
    HistoryBake(model, stacked, gate=GATES[gate](adapter))
    model.train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = lambda: model(input_ids=IDS, use_cache=False).logits.square().mean()  # noqa: E731
    with adapter(model, c=0.0):
        base = loss()
    with adapter(model, c=1.0):
        up = loss()
    with adapter(model, c=-1.0):
        down = loss()
    with adapter(model, c=torch.tensor([1.0, 0.0, -1.0])):
        mixed = loss()
    with disabled(model):
        off = loss()
    value = up - 0.5 * down + base + mixed - off
    thread = threading.Thread(target=value.backward)
    thread.start()
    thread.join()
    return [p.grad for p in adapter.parameters() if p.grad is not None], (base - off).detach()


@KINDS
@pytest.mark.parametrize("gate", GATES)
def test_gradients_equal_the_unchecked_ones(reentrant: bool, gate: str) -> None:
    wanted, zero = contrast(None, gate, ("lora", "dora", "ia3_ff"))
    found, _ = contrast(reentrant, gate, ("lora", "dora", "ia3_ff"))
    assert len(found) == len(wanted) > 0 and float(zero) == 0.0
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


def test_the_checked_gradients_would_differ_without_the_capture() -> None:
    """What the test above would let through, were the gate read when the backward runs."""
    model = mlp(F64)
    stacked = pairs(kept(model, ("lora",)))
    adapter = randomise(attach(model, VARIANTS["lora"], dtype=F64))
    HistoryBake(model, stacked, gate=adapter)
    grads = []
    for c in (0.0, 1.0):
        with adapter(model, c=1.0):
            up = model(X)
        with adapter(model, c=c):
            grads.append(torch.autograd.grad((up - model(X).detach()).square().mean(), list(adapter.parameters())))
    assert any(not torch.allclose(a, b) for a, b in zip(*grads, strict=True))


def test_a_recompute_nobody_told_about_raises() -> None:
    class Again(torch.autograd.Function):
        """Recomputes its forward in the backward, as reversible layers do, without our knowing."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
            ctx.run = run
            ctx.save_for_backward(x)
            return run(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(ctx.run(x), x, grads)[0], None

    model = mlp(F64)
    (adapter,) = kept(model, ("lora",))
    run = lambda x: Again.apply(x, model)  # noqa: E731
    x = X.clone().requires_grad_()
    history = HistoryBake(model, [(adapter, 1.0)])
    run(x).sum().backward()  # doses that never moved do no harm
    history.set_coeff(0, 2.0)
    value = run(x)
    with pytest.raises(RuntimeError, match="recomputed"):
        value.sum().backward()


@KINDS
def test_a_raw_checkpoint_inside_a_stack(reentrant: bool) -> None:
    model = mlp(F64)
    adapters = kept(model, ("lora", "ia3"))
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        x = X.clone().requires_grad_()
        doses = torch.tensor([1.0, 0.0, -1.0], dtype=F64)
        with stack(model, pairs(adapters, (0.5, doses))) as s:
            value = run(x)
            s.set_coeff(0, -3.0)
            value = value + run(x)
            value.square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("names", [("lora", "pissa"), ("ia3", "hra")], ids=["additive", "others"])
def test_doses_can_be_trained(names: Sequence[str]) -> None:
    model = mlp(F64)
    adapters = kept(model, names)
    with torch.no_grad(), stack(model, pairs(adapters, (1.3, -0.4))):
        wanted = model(X)
    doses = torch.zeros(2, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([doses], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with stack(model, pairs(adapters, doses.unbind())):
            loss = (model(X) - wanted).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert_close(doses, torch.tensor([1.3, -0.4], dtype=F64), tolerance=1e-4)


def test_trained_doses_keep_their_gradients_after_a_forward_without() -> None:
    model = mlp(F64)
    dose = torch.tensor(0.5, dtype=F64, requires_grad=True)
    with stack(model, [(kept(model, ("lora",))[0], dose)]):
        with torch.no_grad():
            model(X)
        first, second = (torch.autograd.grad(model(X).square().sum(), dose)[0] for _ in range(2))
    assert float(first) == float(second) != 0.0


# --- copies ------------------------------------------------------------------------------------------------------------


def copies() -> dict[str, Callable[[nn.Module], nn.Module]]:
    def saved(model: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("how", copies().values(), ids=copies().keys())
def test_a_copy_has_a_history_of_its_own(how: Callable[[nn.Module], nn.Module]) -> None:
    model = mlp(F64)
    base = model(X)
    stacked = pairs(kept(model, STACKS["all"]))
    adapter = randomise(attach(model, VARIANTS["lora"], dtype=F64))
    history = HistoryBake(model, stacked, gate=adapter)
    twin = how(model)
    wanted = model(X)
    assert same_bits(twin(X), wanted)
    history.set_coeff(0, -1.0)
    assert same_bits(twin(X), wanted)
    with adapter(model, c=0.0):
        assert same_bits(twin(X), wanted) and same_bits(model(X), base)
    (own,) = HistoryBake.of(twin)
    (theirs,) = ll.adapters(twin).values()
    with theirs(twin, c=0.0):
        assert same_bits(twin(X), base)  # its gate is its own adapter
    own.pop()
    own.remove()
    theirs.detach()
    assert same_bits(twin(X), base) and HistoryBake.of(twin) == []
    assert list(ll.adapters(model)) == ["default"] and HistoryBake.of(model)[0].coeffs == history.coeffs


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_refused_and_leaves_the_model_alone() -> None:
    model = mlp(F64)
    good, bad, other = kept(model, ("lora", "lora", "dora"))
    with torch.no_grad():
        bad.state_dict()["layers.1.up.lora_B"][0, 0] = torch.nan
    (stranger,) = kept(mlp(F64, width=16), ("lora",))
    (foreign,) = kept(mlp(F64, seed=9), ("lora",))
    head = attach(model, VARIANTS["lora"], name="head", train_also=r"layers\.2\.up\.bias", dtype=F64)
    head.detach()
    live = attach(model, VARIANTS["lora"], name="live", dtype=F64)
    before = everything(model)
    cases: list[tuple[type[Exception], str, Any]] = [
        (RuntimeError, "'live' is attached.*twice", [(good, 1.0), (live, 1.0)]),
        (ValueError, "'kept1' holds NaN", [(good, 1.0), (bad, 1.0)]),
        (RuntimeError, "do not fit", [(good, 1.0), (stranger, 1.0)]),
        (ValueError, "another base", [(good, 1.0), (foreign, 1.0)]),
        (RuntimeError, r"'head' also trains \['layers.2.up.bias'\]", [(good, 1.0), (head, 1.0)]),
        (ValueError, "finite", [(good, float("nan"))]),
        (TypeError, "number or a tensor|violates type hint", [(good, "much")]),
        (ValueError, "must agree", [(good, torch.ones(3)), (other, torch.ones(2))]),
        (TypeError, "pairs|violates type hint", [good]),
    ]
    for kind, message, stacked in cases:
        with pytest.raises(kind, match=message):
            HistoryBake(model, stacked)
        with pytest.raises(kind, match=message), stack(model, stacked):
            pass
        assert everything(model) == before
    history = HistoryBake(model, [(good, 1.0), (other, torch.tensor(0.5))])
    before = everything(model)
    for kind, message, call in (
        (RuntimeError, "twice", lambda: history.push(live)),
        (TypeError, "gate is None, an adapter or a callable|violates type hint", lambda: history.set_gate(0.5)),  # type: ignore[arg-type]
        (RuntimeError, "cannot be a gate: it is detached", lambda: history.set_gate(good)),
        (RuntimeError, "cannot be a gate: it is attached to another model", lambda: history.set_gate(attach(mlp(), VARIANTS["lora"]))),
        (IndexError, "no number 2", lambda: history.set_coeff(2, 1.0)),
        (TypeError, r"'kept2' \(dora\) are not additive", history.to_adapter),
    ):
        with pytest.raises(kind, match=message):
            call()
        assert everything(model) == before and len(history) == 2
    history.pop()
    history.set_coeff(0, torch.ones(3))
    with pytest.raises(TypeError, match="differ by row"):
        history.to_adapter()
    with disabled(model):
        for call in (lambda: history.push(other), history.pop):
            with pytest.raises(RuntimeError, match="inside the block"):
                call()
        with pytest.raises(RuntimeError, match="switched off in this block"):
            history.set_coeff(0, 1.0)


def test_merged_adapters_are_refused_by_name() -> None:
    model = mlp(F64)
    (adapter,) = kept(model, ("lora",))
    merged = attach(model, VARIANTS["lora"], name="inside", dtype=F64)
    merged.merge()
    with pytest.raises(RuntimeError, match=r"inside.*merged"), disabled(model):
        raise AssertionError("the block was entered")
    with pytest.raises(RuntimeError, match=r"inside.*merged"):
        HistoryBake(model, [(adapter, 1.0)])
    merged.detach()
    HistoryBake(model, [(adapter, 1.0)])
    live = ll.attach(model, merged)
    assert live is merged


def test_merging_beside_a_history_that_does_not_add_up_is_refused() -> None:
    model = mlp(F64)
    HistoryBake(model, pairs(kept(model, ("dora",))))
    live = randomise(attach(model, VARIANTS["lora"], dtype=F64))
    wanted = model(X)
    with pytest.raises(RuntimeError, match="history 0"):
        live.merge()
    assert same_bits(model(X), wanted)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_rounds_of_spectral_pissa_reload_in_any_order(order: tuple[int, int], tmp_path: Any) -> None:
    """The second round is made on top of the first, from the directions it left; the base is never written, so both just add."""
    model = llama(torch.float32)
    config = dataclasses.replace(VARIANTS["pissa-spectrum"].config, dtype=torch.float32)
    rounds: list[ll.Adapter] = []
    for i in range(2):
        history = HistoryBake(model, [(earlier, 1.0) for earlier in rounds])
        adapter = randomise(ll.attach(model, config, name=f"round{i}", exclude_directions=rounds), seed=i)
        wanted = logits(model)
        adapter.save(tmp_path / f"{i}.safetensors")
        adapter.detach()
        history.remove()
        rounds.append(adapter)
    assert_differs(logits(model), wanted)
    fresh = llama(torch.float32)
    for i in order:
        ll.load(fresh, tmp_path / f"{i}.safetensors", name=f"round{i}")
    assert_close(logits(fresh), wanted)
    again = llama(torch.float32)
    loaded = [ll.load(again, tmp_path / f"{i}.safetensors", name=f"round{i}") for i in order]
    for adapter in loaded:
        adapter.detach()
    HistoryBake(again, pairs(loaded, (1.0, 1.0)))
    assert_close(logits(again), wanted)


def test_disabled_refuses_what_c_does_not_switch_off() -> None:
    model = mlp(F64)
    attach(model, VARIANTS["lora"], train_also=r"layers\.2\.up\.bias", dtype=F64)
    with pytest.raises(RuntimeError, match=r"layers\.2\.up\.bias"), disabled(model):
        pass


def test_another_base_passes_when_told() -> None:
    model = mlp(F64)
    (foreign,) = kept(mlp(F64, seed=9), ("lora",))
    HistoryBake(model, [(foreign, 1.0)], strict_base=False)


# --- compiled ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(model: nn.Module) -> tuple[Any, Any]:
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("eager")
    return torch.compile(model, backend=backend, fullgraph=True), backend


each_small_stack = pytest.mark.parametrize("names", [("lora", "pissa"), ("dora", "lora", "ia3_ff")], ids=["additive", "mixed"])


@pytest.mark.untyped
@each_gate
@each_small_stack
def test_one_graph_for_all_doses_and_gates_without_gradients(fresh: None, names: Sequence[str], gate: Callable[[ll.Adapter], Any]) -> None:
    model = mlp(F64, depth=1)
    base, stacked = model(X).detach(), pairs(kept(model, names))
    adapter = randomise(attach(model, VARIANTS["lora"], dtype=F64))
    history = HistoryBake(model, stacked, gate=gate(adapter))
    fast, backend = counted(model)
    with torch.no_grad():
        for c in (0.5, 0.0, -1.0, ROWS, torch.zeros(3, dtype=F64)):
            with adapter(model, c=c):
                torch.testing.assert_close(fast(X), model(X), rtol=1e-9, atol=1e-12)
        for dose in (0.0, 2.0, ROWS, torch.tensor(0.3)):
            history.set_coeff(0, dose)
            torch.testing.assert_close(fast(X), model(X), rtol=1e-9, atol=1e-12)
        with adapter(model, c=0.0):
            assert same_bits(fast(X), base)
        with disabled(model):
            assert same_bits(fast(X), base)
    assert backend.frame_count == 1


@pytest.mark.untyped
@each_small_stack
def test_compiled_gradients(fresh: None, names: Sequence[str]) -> None:
    model = mlp(F64, depth=1)
    stacked = pairs(kept(model, names))
    adapter = randomise(attach(model, VARIANTS["lora"], dtype=F64))
    history = HistoryBake(model, stacked, gate=adapter)
    fast, backend = counted(model)

    def same() -> None:
        found, wanted = (torch.autograd.grad(run(X).square().mean(), list(adapter.parameters())) for run in (fast, model))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)

    for c in (1.0, 0.0, -1.0):
        with adapter(model, c=c):
            same()
    for dose in (0.0, -0.6):
        history.set_coeff(0, dose)
        same()
    assert backend.frame_count == 1
    with adapter(model, c=ROWS):
        same()
    history.set_coeff(0, ROWS)
    same()


@pytest.mark.untyped
def test_compiled_gradients_to_doses(fresh: None) -> None:
    model = mlp(F64, depth=1)
    adapters = kept(model, ("lora", "ia3", "hra"))
    fast, _ = counted(model)
    doses = torch.tensor([0.5, 0.0, -1.0], dtype=F64, requires_grad=True)
    with stack(model, pairs(adapters, doses.unbind())):
        found, wanted = (torch.autograd.grad(run(X).square().mean(), doses)[0] for run in (fast, model))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)
    assert bool((wanted != 0).all())


@pytest.mark.untyped
def test_a_history_that_came_after_compiling(fresh: None) -> None:
    model = mlp(F64, depth=1).requires_grad_(False)
    adapters = kept(model, ("lora", "ia3_ff"))
    fast, _ = counted(model)
    with torch.no_grad():
        base = fast(X)
        history = HistoryBake(model, [(adapters[0], 1.0)])
        for change in (lambda: None, lambda: history.push(adapters[1], 0.5), history.pop, lambda: history.set_gate(lambda: False)):
            change()
            torch.testing.assert_close(fast(X), model(X), rtol=1e-9, atol=1e-12)
        history.set_gate(None)
        assert not torch.allclose(fast(X), base)
        history.remove()
        assert same_bits(fast(X), base)


# --- what counts twice ------------------------------------------------------------------------------------------------------


TWICE = "adapter 'kind' is attached at c=1.0 and history 0 on the same model holds it too, so it counts twice: detach() it"


@pytest.mark.parametrize("name", ["lora", "pissa", "ia3", "vera", "hra"])
def test_an_adapter_beside_a_history_that_holds_it_is_warned_of(name: str, said: list[str], tmp_path: Path) -> None:
    model = mlp()
    adapter = randomise(attach(model, VARIANTS[name], name="kind"), seed=3)
    other = randomise(attach(model, VARIANTS[name], name="other"), seed=4)
    adapter.save(tmp_path / "kind")
    ll.HistoryBake(model, [(copy.deepcopy(adapter), 0.5)]).remove()  # a copy of what is attached
    with ll.stack(model, [(ll.read(tmp_path / "kind"), 0.5)]):  # its file
        pass
    assert len(said) == 2 and all(line.startswith(TWICE) for line in said)
    adapter.detach()
    history = ll.HistoryBake(model, [(adapter, 0.5)])
    assert len(said) == 2
    ll.attach(model, adapter)  # put back beside the snapshot
    assert len(said) == 3 and said[2].startswith(TWICE)
    adapter.detach()
    ll.attach(model, adapter, c=0.0).detach()  # shut
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    ll.attach(model, adapter, c=1.0).detach()  # trained on since
    other.detach()
    history.push(other)
    assert len(said) == 3
    history.remove()
    ll.attach(model, other)
    assert len(said) == 3
