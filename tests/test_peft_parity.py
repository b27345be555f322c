"""Do logits and every gradient equal PEFT's? On a float64 Llama with biases, beside the mistakes that must not pass.

Three runs of each case: PEFT itself, our dense references in plain hooks, and the library. The controls are the
references with one mistake in them, in the same harness that agrees with PEFT when there is none.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from peft import (
    AdaLoraConfig,
    DeloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    RoadConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lora_lite as ll
from tests import references
from tests.models import generator, llama, tensors_at, token_ids
from tests.references import assert_close, assert_differs, reference

# peft 0.21.2 asks transformers 5.23 under a name that is going away
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NAMES = ["q_proj", "k_proj", "v_proj", "down_proj"]
TARGETS = tuple(rf"\.{name}$" for name in NAMES)
LAYER_1 = r"layers\.1\..*"
PATTERNS: dict[str, Any] = {"rank_pattern": {"k_proj": 3, LAYER_1: 6}, "alpha_pattern": {LAYER_1: 5.0, "v_proj": 2.0}}
ATTRIBUTES = {
    **{"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E", "lora_magnitude_vector": "lora_m", "ia3_l": "lora_l"},
    **{"delora_A": "lora_A", "delora_B": "lora_B", "delora_lambda": "lora_lambda", "hira_A": "lora_A", "hira_B": "lora_B"},
    **{"miss_block": "lora_M", "vera_lambda_b": "lora_b", "vera_lambda_d": "lora_d"},
    **{"hra_u": "lora_u", "oft_R": "lora_Q", "road_theta": "lora_theta", "road_alpha": "lora_alpha"},
}
NEAR_A_START = ("lora_l", "lora_m", "lora_alpha", "lora_lambda")  # drawn around where PEFT starts, not around zero

Grads = dict[tuple[str, str], Tensor]


class Case(NamedTuple):
    """PEFT's config and ours for the same thing. PEFT's IA3 may be two adapters here, so ours are several, on disjoint targets."""

    peft: Callable[[], PeftConfig]
    ours: tuple[ll.AdapterConfig, ...]
    frozen: tuple[str, ...] = ()  # tensors PEFT does not train, taken over all the same
    negated: tuple[str, ...] = ()  # tensors of the opposite sign there: PEFT's exact OFT turns against its own Neumann form


def oft(neumann: bool) -> Callable[[], PeftConfig]:
    return lambda: OFTConfig(oft_block_size=8, r=0, use_cayley_neumann=neumann, target_modules=NAMES)


CASES = {
    "lora": Case(lambda: LoraConfig(r=4, lora_alpha=6, target_modules=NAMES), (ll.LoRAConfig(r=4, alpha=6.0, targets=TARGETS),)),
    "rslora": Case(
        lambda: LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, use_rslora=True),
        (ll.LoRAConfig(r=4, alpha=6.0, targets=TARGETS, rslora=True),),
    ),
    "adalora": Case(
        lambda: AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, lora_dropout=0.0, total_step=9, target_modules=NAMES),
        (ll.AdaLoRAConfig(r=4, alpha=6.0, target_r=2, total_step=9, targets=TARGETS),),
    ),
    "patterns": Case(
        lambda: LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, **PATTERNS),
        (ll.LoRAConfig(r=4, alpha=6.0, targets=TARGETS, **PATTERNS),),
    ),
    "dora": Case(
        lambda: LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, use_dora=True),
        (ll.DoRAConfig(r=4, alpha=6.0, targets=TARGETS),),
    ),
    "dora_rs": Case(
        lambda: LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, use_dora=True, use_rslora=True),
        (ll.DoRAConfig(r=4, alpha=6.0, targets=TARGETS, rslora=True),),
    ),
    "ia3": Case(
        lambda: IA3Config(target_modules=NAMES, feedforward_modules=["down_proj"]),
        (ll.IA3Config(targets=TARGETS[:3]), ll.IA3FFConfig(targets=TARGETS[3:])),
    ),
    "ia3_both": Case(
        lambda: IA3Config(target_modules=NAMES, feedforward_modules=["down_proj"]),
        (ll.IA3Config(targets=TARGETS, feedforward="down_proj"),),
    ),
    "hra": Case(lambda: HRAConfig(r=4, target_modules=NAMES), (ll.HRAConfig(r=4, targets=TARGETS),)),
    "hra_gs": Case(lambda: HRAConfig(r=4, target_modules=NAMES, apply_GS=True), (ll.HRAGSConfig(r=4, targets=TARGETS),)),
    "delora": Case(
        lambda: DeloraConfig(r=4, target_modules=NAMES), (ll.DeLoRAConfig(r=4, init="zeros", targets=TARGETS),), frozen=("lora_w",)
    ),
    "hira": Case(lambda: HiraConfig(r=4, target_modules=NAMES), (ll.HiRAConfig(r=4, targets=TARGETS),)),
    "miss": Case(lambda: MissConfig(r=8, target_modules=NAMES), (ll.MiSSConfig(r=8, targets=TARGETS),)),
    "miss_padded": Case(lambda: MissConfig(r=7, target_modules=NAMES), (ll.MiSSConfig(r=7, targets=TARGETS),)),
    "vera": Case(lambda: VeraConfig(r=12, target_modules=NAMES), (ll.VeRAConfig(r=12, targets=TARGETS),), frozen=("lora_A", "lora_B")),
    "oft": Case(oft(neumann=True), (ll.OFTConfig(block_size=8, cayley="neumann", targets=TARGETS),)),
    "oft_exact": Case(oft(neumann=False), (ll.OFTConfig(block_size=8, targets=TARGETS),), negated=("lora_Q",)),
    **{
        kind: Case(
            lambda kind=kind: RoadConfig(variant=kind, group_size=8, target_modules=NAMES),
            (ll.ROADConfig(kind=kind, group_size=8, targets=TARGETS),),
        )
        for kind in ("road_1", "road_2", "road_4")
    },
}


class Run(NamedTuple):
    """What a model did with an adapter: its logits, and the loss's gradient for each tensor of each target."""

    logits: Tensor
    grads: Grads


@lru_cache
def base(dtype: torch.dtype = torch.float64) -> Any:
    return llama(dtype)


IDS = token_ids(2, 9)


def run(model: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]]) -> Run:
    logits = model(input_ids=IDS).logits
    cross_entropy(logits.flatten(0, 1), IDS.flatten()).backward()  # not labels=IDS: transformers takes its loss in float32
    grads = {(target, key): p.grad.reshape(-1) for target, group in tensors.items() for key, p in group.items() if p.grad is not None}
    return Run(logits.detach(), grads)


def peft_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """PEFT's trainable tensors under our names, by target: module names inside PEFT's wrapper equal those of the base."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for target, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for theirs, ours in ATTRIBUTES.items():
                held = getattr(layer, theirs, {})
                if "default" in held:
                    value = held["default"]
                    found.setdefault(target, {})[ours] = value if isinstance(value, nn.Parameter) else value.weight
    return found


def peft_frozen(model: nn.Module, target: str, field: str) -> Tensor:
    """PEFT's buffers of one layer under our names; VeRA's are one pair for all layers."""
    layer: Any = model.get_submodule(target)
    if field == "lora_w":
        return layer.delora_w_norm["default"]
    return (layer.vera_A if field == "lora_A" else layer.vera_B)["default"]


@lru_cache
def peft_run(name: str) -> tuple[Run, dict[str, dict[str, Tensor]]]:
    """PEFT's run with its tensors drawn at random, and those tensors as this library stores them (l - 1, m - |W|)."""
    model: Any = get_peft_model(copy.deepcopy(base()), CASES[name].peft()).double().eval()
    parameters = peft_parameters(model.base_model.model)
    draw = generator(5)
    with torch.no_grad():
        for group in parameters.values():
            for key, p in group.items():
                noise = torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.2
                p.copy_(p + noise if key in NEAR_A_START else noise)
    result, sign = run(model, parameters), {key: -1.0 for key in CASES[name].negated}
    result = Run(result.logits, {(target, k): sign.get(k, 1.0) * grad for (target, k), grad in result.grads.items()})
    kept = {target: {k: sign.get(k, 1.0) * stored(target, k, p) for k, p in group.items()} for target, group in parameters.items()}
    for target, group in kept.items():
        group |= {key: peft_frozen(model.base_model.model, target, key).detach().double() for key in CASES[name].frozen}
    return result, kept


def stored(target: str, key: str, p: Tensor) -> Tensor:
    p = p.detach().clone()
    if key in ("lora_l", "lora_alpha"):
        return p.flatten() - 1
    if key == "lora_E":
        return p.flatten()
    return p - base().get_submodule(target).weight.detach().norm(dim=1) if key == "lora_m" else p


def config_of(case: Case, target: str) -> ll.AdapterConfig:
    """The one config whose targets name this layer."""
    (config,) = [c for c in case.ours if any(target.endswith(t.strip(r"\.$")) for t in c.targets)]
    return config


@contextmanager
def plain_hooks(model: nn.Module, formulas: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Replace each target's output by formula(W, b, x) for the block."""
    handles = [
        model.get_submodule(target).register_forward_hook(lambda layer, args, _, f=f: f(layer.weight, layer.bias, args[0]))
        for target, f in formulas.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reference_run(name: str, formula: Callable[..., Tensor] = reference) -> Run:
    frozen = CASES[name].frozen
    tensors = {t: {k: v.clone().requires_grad_(k not in frozen) for k, v in group.items()} for t, group in peft_run(name)[1].items()}
    model = copy.deepcopy(base()).requires_grad_(False)

    def at(target: str) -> Callable[..., Tensor]:
        cfg = config_of(CASES[name], target)
        return lambda W, b, x: formula(W, b, tensors[target], cfg, x, 1.0, target)

    with plain_hooks(model, {target: at(target) for target in tensors}):
        return run(model, tensors)


def library_run(name: str) -> Run:
    model = copy.deepcopy(base())
    for i, config in enumerate(CASES[name].ours):
        ll.attach(model, dataclasses.replace(config, dtype=torch.float64), name="default" if i == 0 else f"part{i}")
    parts = ["default", *(f"part{i}" for i in range(1, len(CASES[name].ours)))]
    placed: dict[str, dict[str, nn.Parameter]] = {}
    for target, group in peft_run(name)[1].items():
        (part,) = [p for p in parts if tensors_at(model, target, p)]
        placed[target] = tensors_at(model, target, part)
        with torch.no_grad():
            for key, value in group.items():
                placed[target][key].copy_(value)
    return run(model, placed)


def assert_same(got: Run, want: Run) -> None:
    assert_close(got.logits, want.logits, "logits")
    assert got.grads.keys() == want.grads.keys(), got.grads.keys() ^ want.grads.keys()
    for key, grad in want.grads.items():
        assert_close(got.grads[key], grad, f"the gradient of {key}")


@pytest.mark.parametrize("name", CASES)
def test_peft_moves_the_logits_so_that_equality_means_something(name: str) -> None:
    result, _ = peft_run(name)
    assert_differs(result.logits, base()(input_ids=IDS).logits, least=0.1)
    assert all(float(grad.abs().max()) > 1e-6 for grad in result.grads.values())


@pytest.mark.parametrize("name", CASES)
def test_the_references_are_peft(name: str) -> None:
    assert_same(reference_run(name), peft_run(name)[0])


@pytest.mark.fast
@pytest.mark.parametrize("name", CASES)
def test_the_library_is_peft(name: str) -> None:
    assert_same(library_run(name), peft_run(name)[0])


@pytest.mark.parametrize("name", CASES)
def test_as_many_numbers_are_trained_as_in_peft(name: str) -> None:
    want: dict[str, int] = {}
    for (target, _), grad in peft_run(name)[0].grads.items():
        want[target] = want.get(target, 0) + grad.numel()
    assert {target: trained(config_of(CASES[name], target), target) for target in want} == want


def trained(config: ll.AdapterConfig, target: str) -> int:
    """How many numbers a variant trains on one layer: what its declared tensors hold."""
    layer = base().get_submodule(target)
    size = layer.in_features, layer.out_features
    specs = ll.REGISTRY[config.variant].param_specs(*size, config.at(target, *size))
    return sum(math.prod(spec.shape) for spec in specs.values() if spec.trainable)


def wrong_only(variant: str, formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The references, with `formula` in the place of one variant's."""

    def chosen(W: Tensor, b: Tensor | None, t: Any, cfg: Any, x: Tensor, c: Any, target: str) -> Tensor:
        return (formula if cfg.variant == variant else reference)(W, b, t, cfg, x, c, target)

    return chosen


MISTAKES = {
    "scale alpha/sqrt r": ("lora", "lora", partial(references.lora, wrong_scale=math.sqrt(4)), "logits"),
    "a scale of the rank that is left": ("adalora", "adalora", partial(references.adalora, wrong_rank=2), "logits"),
    "patterns ignored": ("patterns", "lora", lambda *a: references.lora(*a[:3], ll.LoRAConfig(r=4, alpha=6.0), *a[4:]), "logits"),
    "bias not scaled": ("ia3", "ia3", partial(references.ia3, wrong_bias=True), "logits"),
    "a square layer gated on its other side": (
        "ia3_both",
        "ia3",
        lambda *a: (references.ia3_ff if a[0].shape[0] == a[0].shape[1] else references.ia3)(*a),
        "logits",
    ),
    "norm not detached": ("dora", "dora", partial(references.dora, wrong_norm=True), "gradients"),
    "first column first": ("hra", "hra", partial(references.hra, wrong_order=True), "logits"),
    "the inverse rotation": ("oft", "oft", partial(references.oft, wrong_way=True), "logits"),
    "PEFT's exact rotation, its sign kept": ("oft_exact", "oft", partial(references.oft, wrong_way=True), "logits"),
    "norms of W's rows": ("delora", "delora", partial(references.delora, wrong_norm=True), "logits"),
    "W left out of the mask": ("hira", "hira", partial(references.hira, wrong_mask=True), "logits"),
    "neighbours share a row of the shard": ("miss", "miss", partial(references.miss, wrong_blocks=True), "logits"),
    "a scale of 1/r": ("vera", "vera", partial(references.vera, wrong_scale=1 / 12), "logits"),
    "adjacent outputs in pairs": ("road_2", "road", partial(references.road, wrong_pairs=True), "logits"),
    "reflections not made orthogonal": ("hra_gs", "hra_gs", references.hra, "logits"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_does_not_pass(mistake: str) -> None:
    case, variant, formula, shows_in = MISTAKES[mistake]
    wrong, want = reference_run(case, wrong_only(variant, formula)), peft_run(case)[0]
    if shows_in == "logits":
        assert_differs(wrong.logits, want.logits, mistake)
    else:
        assert_close(wrong.logits, want.logits, "this one is right in the forward")
        assert_differs(torch.cat(list(wrong.grads.values())), torch.cat([want.grads[k] for k in wrong.grads]), mistake)
    with pytest.raises(AssertionError):
        assert_same(wrong, want)


# --- PiSSA: PEFT refuses float64 and rewrites W, so float32, and the same factors on both sides -----------------------


class PissaRuns(NamedTuple):
    """PEFT's run, ours, and the products s B0 A0 that each side chose by itself."""

    theirs: Run
    ours: Run
    chosen: dict[str, tuple[Tensor, Tensor]]


@lru_cache
def pissa_runs() -> PissaRuns:
    dtype, r, alpha = torch.float32, 4, 6.0
    peft_model: Any = get_peft_model(
        copy.deepcopy(base(dtype)), LoraConfig(r=r, lora_alpha=6, target_modules=NAMES, init_lora_weights="pissa")
    )
    theirs, draw = peft_parameters(peft_model.eval().base_model.model), generator(7)
    model = copy.deepcopy(base(dtype))
    ll.attach(model, ll.PiSSAConfig(r=r, alpha=alpha, targets=TARGETS))
    ours = {target: tensors_at(model, target) for target in theirs}
    chosen = {}
    with torch.no_grad():
        for target, group in theirs.items():
            mine = ours[target]
            chosen[target] = (mine["lora_B0"] @ mine["lora_A0"] * alpha / r, group["lora_B"] @ group["lora_A"] * alpha / r)
            for key, p in group.items():
                mine[f"{key}0"].copy_(p)
                mine[key].copy_(torch.randn(p.shape, generator=draw) * 0.05)
                p.add_(mine[key])
    return PissaRuns(run(peft_model, theirs), run(model, ours), chosen)


def test_pissa_is_peft() -> None:
    runs = pissa_runs()
    assert_differs(runs.theirs.logits, base(torch.float32)(input_ids=IDS).logits, least=0.05)
    assert_same(runs.ours, runs.theirs)


def test_pissa_starts_from_the_directions_peft_starts_from() -> None:
    for target, (ours, theirs) in pissa_runs().chosen.items():
        assert_close(ours, theirs, f"s B0 A0 of {target}")
