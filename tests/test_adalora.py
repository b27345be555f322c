"""Does AdaLoRA train, prune and resume as published? Beside PEFT's own model step by step in float64, and through files bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lora_lite as ll
from lora_lite.variants import adalora
from tests.models import generator, llama, mlp, normal, token_ids
from tests.references import assert_close, assert_differs, same_bits

NAMES = ["q_proj", "k_proj", "v_proj", "down_proj"]
TARGETS = tuple(rf"\.{name}$" for name in NAMES)
SCHEDULE: dict[str, Any] = {"target_r": 2, "total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2, "beta1": 0.8, "beta2": 0.7}
OURS = ll.AdaLoRAConfig(r=4, alpha=6.0, targets=TARGETS, dtype=torch.float64, orth_reg_weight=0.1, **SCHEDULE)
FIELDS = ("lora_A", "lora_B", "lora_E")
X = normal(3, 5, 12, seed=1)


class Judged(nn.Module):
    """A language model with its loss in float64 (transformers takes its own in float32)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama(torch.float64)

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.inner(input_ids=input_ids).logits
        return SimpleNamespace(logits=logits, loss=cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()))


Snapshot = dict[tuple[str, str], Tensor]
Change = Callable[[int, ll.Adapter], object]


def of(layer: Any, field: str) -> nn.Parameter:
    return getattr(layer, field)["default"]


@lru_cache
def peft_run() -> tuple[list[Snapshot], list[Snapshot]]:
    """After each step: PEFT's tensors, and its smoothed sensitivities and uncertainties under our names."""
    model: Any = get_peft_model(
        Judged(), AdaLoraConfig(init_r=4, lora_alpha=6, lora_dropout=0.0, target_modules=NAMES, orth_reg_weight=0.1, **SCHEDULE)
    ).double()
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_E")}
    draw_start({n: {f: of(m, f) for f in FIELDS} for n, m in layers.items()})
    optimizer = torch.optim.AdamW([of(m, f) for m in layers.values() for f in FIELDS], lr=0.02)
    allocator, tensors, state = model.base_model.rankallocator, [], []
    for step in range(1, 15):
        model.base_model(token_ids(2, 9, seed=step)).loss.backward()  # PeftModel itself goes round its orthogonality loss
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        tensors.append({(n, f): of(m, f).detach().reshape(-1).clone() for n, m in layers.items() for f in FIELDS})
        kept = {"I": allocator.exp_avg_ipt, "U": allocator.exp_avg_unc}
        state.append({key(n, what): v.reshape(-1) for what, held in kept.items() for n, v in held.items() if "ranknum" not in n})
    return tensors, state


def key(name: str, what: str) -> tuple[str, str]:
    target, _, field = name.removesuffix(".default").rpartition(".")
    return target, f"{field}_{what}"


def draw_start(tensors: dict[str, dict[str, nn.Parameter]]) -> None:
    draw = generator(5)
    with torch.no_grad():
        for target in sorted(tensors):
            for field in FIELDS:
                p = tensors[target][field]
                p.copy_(torch.randn(p.numel(), generator=draw, dtype=torch.float64).view_as(p) * 0.2)


def our_run(aux: bool = True, change: Change = lambda step, adapter: None) -> tuple[list[Snapshot], list[Snapshot]]:
    model = Judged()
    adapter = ll.attach(model, OURS)
    draw_start(adapter.tensors())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    tensors, state = [], []
    for step in range(1, 15):
        loss = model(token_ids(2, 9, seed=step)).loss
        (loss + adapter.aux_loss() if aux else loss).backward()
        optimizer.step()
        adapter.on_step(step)
        change(step, adapter)
        optimizer.zero_grad()
        held = {(t, f): p.detach().reshape(-1).clone() for t, fields in adapter.tensors().items() for f, p in fields.items()}
        tensors.append({k: v for k, v in held.items() if k[1] in FIELDS})
        state.append({k: v for k, v in held.items() if k[1].endswith(("_I", "_U"))})
    return tensors, state


def ranks(snapshot: Snapshot) -> int:
    return sum(int((v != 0).sum()) for (_, field), v in snapshot.items() if field == "lora_E")


def test_a_training_run_is_peft_s_step_by_step() -> None:
    (theirs, their_state), (ours, our_state) = peft_run(), our_run()
    for step, (want, got) in enumerate(zip(theirs, ours, strict=True), 1):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert_close(got[name], value, f"{name} after step {step}")
            assert torch.equal(got[name] == 0, value == 0), f"the mask of {name} after step {step}"
    assert [ranks(s) for s in ours] == [32, 32, 32, 21, 32, 17, 32, *[16] * 7], "8 x 4 to 8 x 2; what is pruned may grow back till 9"
    for step, (want, got) in enumerate(zip(their_state, our_state, strict=True), 1):
        if step < 9:  # at 9 both forget
            assert got.keys() == want.keys()
            assert all(float((got[k] - v).abs().max()) < 1e-12 for k, v in want.items()), f"I and U after step {step}"
        else:
            assert not want and not any(v.any() for v in got.values())


def first_difference(ours: list[Snapshot]) -> float:
    theirs = peft_run()[0]
    return max(float((ours[-1][k] - v).abs().max()) for k, v in theirs[-1].items())


def test_the_harness_sees_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_difference(our_run()[0]) < 1e-10
    assert first_difference(our_run(aux=False)[0]) > 1e-3, "without the orthogonality loss"
    forgetful = our_run(
        change=lambda step, adapter: [p.zero_() for f in adapter.tensors().values() for n, p in f.items() if n[-2:] == "_I"]
    )
    assert first_difference(forgetful[0]) > 1e-3, "sensitivities that are not smoothed"
    monkeypatch.setattr(adalora, "scores", lambda p: p["lora_E_I"] * p["lora_E_U"])
    assert first_difference(our_run()[0]) > 1e-3, "importance by E alone"


def trained(model: nn.Module, adapter: ll.Adapter, optimizer: Any, steps: range) -> None:
    for step in steps:
        (model(X + step / 10).square().mean() + adapter.aux_loss()).backward()
        optimizer.step()
        adapter.on_step(step)
        optimizer.zero_grad()


SMALL = ll.AdaLoRAConfig(r=4, alpha=6.0, target_r=2, total_step=18, tinit=2, tfinal=4, deltaT=3)


def start() -> tuple[nn.Module, ll.Adapter, torch.optim.Optimizer]:
    model = mlp()
    adapter = ll.attach(model, SMALL, seed=0)
    return model, adapter, torch.optim.AdamW(adapter.parameters(), lr=0.02)


@pytest.mark.fast
@pytest.mark.parametrize("by", ["a file", "a state_dict"])
@pytest.mark.parametrize("at", [3, 10, 14, 16])
def test_a_run_resumed_goes_on_bit_for_bit(at: int, by: str, tmp_path: Path) -> None:
    model, adapter, optimizer = start()
    trained(model, adapter, optimizer, range(1, at + 1))
    adapter.save(tmp_path / "half.safetensors")
    torch.save(adapter.state_dict(), tmp_path / "half.pt")
    moments = copy.deepcopy(optimizer.state_dict())
    trained(model, adapter, optimizer, range(at + 1, 21))
    other = mlp()
    if by == "a file":
        loaded = ll.load(other, tmp_path / "half.safetensors")
    else:
        loaded = ll.attach(other, SMALL, seed=1).load_state_dict(torch.load(tmp_path / "half.pt"))
    resumed = torch.optim.AdamW(loaded.parameters(), lr=0.02)
    resumed.load_state_dict(moments)
    trained(other, loaded, resumed, range(at + 1, 21))
    assert all(same_bits(v, adapter.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert sum(int((f["lora_E"] != 0).sum()) for f in loaded.tensors().values()) == 2 * len(loaded.targets)


def test_a_run_resumed_without_its_state_goes_another_way(tmp_path: Path) -> None:
    model, adapter, optimizer = start()
    trained(model, adapter, optimizer, range(1, 14))
    other = copy.deepcopy(model)
    forgot = ll.adapters(other)["default"]
    resumed = torch.optim.AdamW(forgot.parameters(), lr=0.02)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for fields in forgot.tensors().values():
            for name, p in fields.items():
                if name.endswith(("_I", "_U")):
                    p.zero_()
    trained(model, adapter, optimizer, range(14, 21))
    trained(other, forgot, resumed, range(14, 21))
    assert_differs(other(X), model(X))


def test_the_orthogonality_loss_is_its_formula_and_zero_at_orthonormal_factors() -> None:
    model = mlp(torch.float64)
    adapter = ll.attach(model, ll.AdaLoRAConfig(r=3, dtype=torch.float64, orth_reg_weight=0.25))
    draw_start(adapter.tensors())
    eye = torch.eye(3, dtype=torch.float64)
    held = list(adapter.tensors().values())
    far = [(m @ m.T - eye).square().sum().sqrt() for f in held for m in (f["lora_A"], f["lora_B"].T)]
    assert_close(adapter.aux_loss(), 0.25 * torch.stack(far).mean())
    with torch.no_grad():
        for f in held:
            f["lora_A"].copy_(torch.linalg.qr(f["lora_A"].T).Q.T)
            f["lora_B"].copy_(torch.linalg.qr(f["lora_B"]).Q)
    assert adapter.aux_loss().item() < 1e-14


@pytest.mark.fast
def test_on_step_needs_a_schedule_and_gradients() -> None:
    adapter = ll.attach(mlp(), ll.AdaLoRAConfig(r=3))
    with pytest.raises(ValueError, match="the schedule needs its length: AdaLoRAConfig"):
        adapter.on_step(1)
    adapter = ll.attach(mlp(), SMALL)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    with pytest.raises(ValueError, match=r"18 tensors have no gradient.*after backward, before zero_grad"):
        adapter.on_step(1)
    assert all(same_bits(v, before[k]) for k, v in adapter.state_dict().items())


@pytest.mark.fast
def test_nothing_is_pruned_when_the_target_is_the_start() -> None:
    model = mlp()
    adapter = ll.attach(model, ll.AdaLoRAConfig(r=2, target_r=2, total_step=3))
    trained(model, adapter, torch.optim.AdamW(adapter.parameters(), lr=0.02), range(1, 5))
    assert all(f["lora_E"].all() for f in adapter.tensors().values())


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_r": 0}, "target_r must be a whole number from 1"),
        ({"deltaT": 0}, "deltaT must be a whole number from 1"),
        ({"total_step": 0}, "total_step must be a whole number from 1"),
        ({"rslora": True}, "rslora=True: AdaLoRA scales by alpha.r"),
        ({"beta1": 1.0}, "beta1 and beta2 lie between 0 and 1, got {'beta1': 1.0}"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight must be a finite number from 0"),
        ({"total_step": 5, "tinit": 2, "tfinal": 3}, "no step is left to prune in: tinit=2, tfinal=3, total_step=5"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ll.AdaLoRAConfig(**fields)
