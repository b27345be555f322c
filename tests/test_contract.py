"""Do the optional parts of the variant contract do what they say? Values settled for all layers, gradients at init, schedules."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import lora_lite as ll
from lora_lite import calibration
from lora_lite.config import RankedConfig
from lora_lite.variant import Base, Group, Initial, Params, ParamSpec
from tests.models import VOCABULARY, llama

pytestmark = pytest.mark.fast
BATCH = {"input_ids": torch.arange(24).reshape(2, 12) % VOCABULARY}
LABELLED = BATCH | {"labels": BATCH["input_ids"]}
ATTENTION = r"self_attn\.(q|k|v|o)_proj"


@dataclass(frozen=True, kw_only=True)
class ToyConfig(RankedConfig):
    variant: ClassVar[str] = "toy"
    targets: Any = ATTENTION


class Counted:
    def __init__(self) -> None:
        self.tokens, self.total = 0, torch.zeros(())

    def update(self, x: Tensor, group: str) -> None:
        self.tokens, self.total = self.tokens + len(x), self.total + x.sum()


class Toy(ll.Variant):
    """LoRA with one frozen A for all layers, ranks by layer, a count of steps and a penalty."""

    name = "toy"
    Config = ToyConfig
    calibration = "optional"
    shares_observers = True
    schedule = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: ToyConfig) -> dict[str, ParamSpec]:
        frozen = {"lora_A": ParamSpec((4, 64), trainable=False), "lora_steps": ParamSpec((1,), trainable=False)}
        return {"lora_B": ParamSpec((d_out, cfg.r))} | frozen

    @staticmethod
    def observe(cfg: ToyConfig, base: Base, exclude: Tensor | None) -> Counted:
        return Counted()

    @staticmethod
    def group_init(cfg: ToyConfig, sizes: Mapping[str, tuple[int, int]], observed: Mapping[str, Counted]) -> Group:
        A = torch.arange(256.0).reshape(4, 64) / 256
        ranks = {t.replace(".", r"\."): 1 + i % 4 for i, t in enumerate(sizes)}
        notes = {"observers": float(len({id(o) for o in observed.values()}))}
        return Group(dataclasses.replace(cfg, rank_pattern=ranks), {t: {"lora_A": A} for t in sizes}, notes)

    @staticmethod
    def init(cfg: ToyConfig, base: Base, observed: Any, generator: Any) -> Initial:
        return Initial({}, {} if observed is None else {"tokens": float(observed.tokens)})

    @staticmethod
    def factors(cfg: ToyConfig, p: Params, base: Base) -> ll.LowRank:
        return ll.LowRank(p["lora_A"][: cfg.r, : base.d_in], p["lora_B"], cfg.scaling)

    @staticmethod
    def on_step(cfg: ToyConfig, step: int, layers: Mapping[str, Params]) -> None:
        for p in layers.values():
            p["lora_steps"].add_(step)

    @staticmethod
    def aux_loss(cfg: ToyConfig, layers: Mapping[str, Params]) -> Tensor:
        return torch.stack([p["lora_B"].square().sum() for p in layers.values()]).sum()


@pytest.fixture
def toy() -> Iterator[type[ll.Variant]]:
    ll.register(Toy)
    yield Toy
    ll.REGISTRY.pop("toy")


def test_ranks_settled_for_all_layers_are_in_the_config_and_come_back_from_the_file(toy: Any, tmp_path: Any) -> None:
    adapter = ll.attach(llama(), ToyConfig(r=2))
    assert isinstance(adapter.config, ToyConfig)
    assert [len(fields["lora_B"][0]) for fields in adapter.tensors().values()] == [1, 2, 3, 4] * 2
    adapter.save(tmp_path / "toy.safetensors")
    loaded = ll.load(llama(), tmp_path / "toy.safetensors")
    assert loaded.config == adapter.config


def test_a_tensor_given_to_several_layers_is_one_parameter_also_on_copies(toy: Any) -> None:
    model = llama()
    adapter = ll.attach(model, ToyConfig(r=2))
    for there in (adapter, ll.adapters(copy.deepcopy(model))["default"], copy.deepcopy(adapter)):
        assert len({id(fields["lora_A"]) for fields in there.tensors().values()}) == 1
    adapter.detach()
    assert len({id(fields["lora_A"]) for fields in adapter.tensors().values()}) == 1


def test_layers_that_read_one_tensor_share_an_observer_which_is_fed_once(toy: Any) -> None:
    shared = ll.attach(llama(), ToyConfig(r=2), calibration_data=[BATCH, BATCH])
    assert shared.diagnostics == {"observers": 4.0, "tokens": 48.0}  # q, k, v and o, in two blocks
    x = torch.randn(5, 64)
    given = {t: x if t.endswith(("q_proj", "k_proj")) else x.clone() for t in shared.targets}
    assert ll.attach(llama(), ToyConfig(r=2), calibration_data=given).diagnostics == {"observers": 5.0, "tokens": 5.0}


def test_a_step_changes_state_that_the_file_keeps_and_the_penalty_has_gradients(toy: Any, tmp_path: Any) -> None:
    adapter = ll.attach(llama(), ToyConfig(r=2))
    for p in adapter.parameters():
        p.data.fill_(0.5)
    adapter.aux_loss().backward()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in adapter.parameters())  # type: ignore[arg-type]
    adapter.on_step(1)
    adapter.on_step(2)
    adapter.save(tmp_path / "toy.safetensors")
    assert all(fields["lora_steps"].item() == 3 for fields in ll.load(llama(), tmp_path / "toy.safetensors").tensors().values())
    with pytest.raises(ValueError, match="from 1"):
        adapter.on_step(-1)


def test_methods_without_a_schedule_take_both_calls_and_do_nothing() -> None:
    adapter = ll.attach(llama(), ll.LoRAConfig(r=2))
    before = {n: p.clone() for n, p in adapter.state_dict().items()}
    adapter.on_step(1)
    assert adapter.aux_loss().item() == 0.0
    assert all(torch.equal(p, before[n]) for n, p in adapter.state_dict().items())


# -- a form by layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["either", "neither"])
def test_a_form_that_is_not_defined_is_refused_when_the_class_is_made(form: Any) -> None:
    made = type(
        "Undefined", (ll.Variant,), {"name": "toy", "Config": ToyConfig, "form": form, "param_specs": Toy.param_specs, "added": None}
    )
    message = r"form 'either' must define form_at\(\)" if form == "either" else "form 'neither', not one of .*'either'"
    with pytest.raises(TypeError, match=message):
        ll.register(made)
    assert "toy" not in ll.REGISTRY


def test_what_is_no_variant_is_refused() -> None:
    for thing in (ToyConfig, ToyConfig(), 3):
        with pytest.raises(TypeError, match="register takes a subclass of Variant, got" + (".*goes into it" if thing is ToyConfig else "")):
            ll.register.__wrapped__(thing)  # type: ignore[attr-defined]  # beneath the tests' own check of types


# -- gradients ----------------------------------------------------------------------------------------------------------


class Summed:
    def __init__(self) -> None:
        self.gradient: Any = 0.0

    def update(self, x: Tensor, gradient: Tensor) -> None:
        self.gradient = self.gradient + gradient.T @ x


def gradients(model: Any, data: Any, loss: Any = None) -> dict[str, Tensor]:
    layers = {t.name: t.module for t in ll.find_targets(model, ll.LoRAConfig(targets="all-linear"))}
    seen = {name: Summed() for name in layers}
    calibration.stream_gradients(model, layers, seen, data, loss)
    return {name: s.gradient for name, s in seen.items()}


@pytest.mark.parametrize("frozen", [True, False])
def test_streamed_gradients_are_the_weights_gradients(frozen: bool) -> None:
    model = llama(torch.float64)
    other = {k: v.flip(0) + 1 for k, v in LABELLED.items()}
    for batch in (LABELLED, other):
        model(**batch).loss.backward()
    expected = {n: m.weight.grad for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    model.zero_grad()
    model.requires_grad_(not frozen)
    found = gradients(model, [LABELLED, other])
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    assert all(p.grad is None and p.requires_grad != frozen for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_loss_of_ones_own_gets_the_output_and_the_batch() -> None:
    model = llama(torch.float64)
    asked = gradients(model, [BATCH], lambda output, batch: output.logits[..., batch["input_ids"].max()].sum())
    assert all(gradient.abs().sum() > 0 for gradient in asked.values())


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        ([BATCH], None, "has no loss; put labels"),
        ([BATCH], lambda output, batch: output.logits, "one finite number"),
        ([], None, "empty list"),
        ({"model.layers.0": torch.ones(2, 64)}, None, "need batches"),
        ([LABELLED], lambda output, batch: torch.ones((), requires_grad=True), "did not depend on"),
    ],
)
def test_gradients_that_cannot_be_had_are_refused_and_leave_the_model_alone(data: Any, loss: Any, message: str) -> None:
    model = llama()
    with pytest.raises((ValueError, RuntimeError), match=message):
        gradients(model, data, loss)
    assert not any(m._forward_hooks for m in model.modules()) and not model.training


def test_a_loss_is_refused_by_methods_that_read_no_gradients() -> None:
    with pytest.raises(ValueError, match="reads no gradients"):
        ll.attach(llama(), ll.LoRAConfig(), loss=lambda output, batch: output.loss)
