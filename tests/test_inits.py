"""Do the LoRAs that differ in where they start, start where their papers say? Dense float64 formulas, numpy, and PEFT's own starts.

PEFT computes these in float32 and writes W. CorDA's is compared in float64 all the same, with `.float()` made to keep doubles.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lora_lite as ll
from lora_lite.variants import eva
from tests.models import Single, checked_again, llama, mlp, normal, single, tensors_at, token_ids
from tests.references import TOLERANCE, assert_close, assert_differs, same_bits

with pytest.MonkeyPatch.context() as patch:  # peft 0.21.2's corda.py imports `dataclass` from attrs, which peft does not ask for
    attr = ModuleType("attr")
    attr.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "attr", attr)
    from peft.tuners.lora.corda import preprocess_corda

NAMES = ["q_proj", "k_proj", "v_proj", "down_proj"]
TARGETS = tuple(rf"\.{name}$" for name in NAMES)
BATCH = {"input_ids": token_ids(1, 40)}
F64 = torch.float64
FIELDS: dict[str, Any] = {"r": 4, "alpha": 6.0, "targets": TARGETS}
WHOLE: dict[str, Any] = {"r": 4, "alpha": 6.0, "dtype": F64}
S = 6.0 / 4
ROWS = normal(1, 40, 12, seed=4)  # for the MLP


# LoRA-GA: backward hooks of PEFT's own, where no input asks for a gradient
BACKWARD = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def loss_of(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return cross_entropy(output.logits.flatten(0, 1), batch["input_ids"].flatten())


def starts(config: ll.AdapterConfig, dtype: torch.dtype = F64, **keywords: Any) -> dict[str, dict[str, Tensor]]:
    adapter = ll.attach(llama(dtype), dataclasses.replace(config, dtype=dtype), seed=0, **keywords)
    return {t: {f: p.detach() for f, p in fields.items()} for t, fields in adapter.tensors().items()}


@lru_cache
def inputs(dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """What each target reads of BATCH, with plain hooks."""
    model, seen = llama(dtype), dict[str, Tensor]()
    for name, layer in model.named_modules():
        if name.endswith(tuple(NAMES)):
            layer.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0][0].detach()))
    model(**BATCH)
    return seen


def weight(target: str, dtype: torch.dtype = F64) -> Tensor:
    return llama(dtype).get_submodule(target).weight.detach()


def as_numpy(x: Tensor) -> Any:
    return x.detach().double().numpy()


def same_rows(got: Tensor, want: Tensor, what: str = "", tolerance: float | None = None) -> None:
    """Rows equal but for their signs."""
    sign = torch.where((got * want).sum(1, keepdim=True) < 0, -1.0, 1.0).to(got)
    assert_close(sign * got, want, what, tolerance)


# --- gaussian and orthogonal -------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_gaussian_has_a_standard_deviation_of_one_over_r_and_starts_at_the_base() -> None:
    p = tensors_at(attached(single(400, 30), ll.LoRAConfig(r=8, init="gaussian")), "linear")
    assert abs(float(p["lora_A"].detach().std()) * 8 - 1) < 0.05 and not p["lora_B"].any()
    assert float(p["lora_A"].detach().abs().max()) > 3 / 8, "normal, not uniform"
    there = peft.get_peft_model(single(400, 30), peft.LoraConfig(r=8, target_modules=["linear"], init_lora_weights="gaussian"))
    theirs: Any = there.base_model.model.linear.lora_A["default"].weight  # type: ignore[union-attr,index]
    assert abs(float(theirs.detach().std()) * 8 - 1) < 0.05, "PEFT's too"


def attached(model: nn.Module, config: ll.AdapterConfig) -> nn.Module:
    ll.attach(model, config, seed=0)
    return model


@pytest.mark.fast
def test_orthogonal_factors_are_alive_and_cancel() -> None:
    model = single(60, 50, dtype=F64)
    x = normal(5, 60, dtype=F64)
    base = model(x)
    p = tensors_at(attached(model, ll.LoRAConfig(r=8, init="orthogonal", dtype=F64)), "linear")
    A, B = p["lora_A"].detach(), p["lora_B"].detach()
    assert float((B @ A).abs().max()) < 1e-15 and not same_bits(model(x), base)
    assert_close(model(x), base)
    assert torch.linalg.matrix_rank(A) == 4 == torch.linalg.matrix_rank(B), "each takes half of the directions"
    model(x).square().sum().backward()
    assert all(p[f].grad is not None and p[f].grad.abs().max() > 1e-3 for f in p), "both learn from the first step"  # type: ignore[union-attr]


def test_orthogonal_factors_are_distributed_as_peft_s() -> None:
    """Mean squares of A's and B's entries, and A A^T is r/2-dimensional with the same spread, over 40 draws of each."""
    ours, theirs = [], []
    for seed in range(40):
        p = tensors_at(attached_with(single(60, 50), seed), "linear")
        ours.append([float(p[f].detach().square().mean()) for f in ("lora_A", "lora_B")])
        layer: Any = peft.get_peft_model(
            single(60, 50), peft.LoraConfig(r=8, target_modules=["linear"], init_lora_weights="orthogonal")
        ).base_model.model.linear  # type: ignore[union-attr]
        theirs.append([float(m["default"].weight.detach().square().mean()) for m in (layer.lora_A, layer.lora_B)])
    assert_close(torch.tensor(ours).mean(0) / 0.005, torch.ones(2), tolerance=0.03)  # 0.1^2 times half the rank, shared by all of it
    assert_close(torch.tensor(theirs).mean(0) / 0.005, torch.ones(2), tolerance=0.03)


def attached_with(model: nn.Module, seed: int) -> nn.Module:
    ll.attach(model, ll.LoRAConfig(r=8, init="orthogonal"), seed=seed)
    return model


@pytest.mark.fast
@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (ll.LoRAConfig(), {"init": "eva"}, "init must be one of .'kaiming', 'gaussian', 'orthogonal'."),
        (ll.LoRAConfig(), {"init": "orthogonal", "rank_pattern": {"q": 3}}, "needs an even r, got 3"),
        (ll.CorDAConfig(), {"mode": "top"}, "mode must be one of .'kpm', 'ipm'."),
        (ll.CorDAConfig(), {"alpha": -1.0}, "alpha must be positive, got -1.0"),
        (ll.EVAConfig(), {"rho": 0.5}, "rho must be a finite number from 1, got 0.5"),
        (ll.LoRAGAConfig(), {"direction": "ArB"}, "direction must be one of .'ArB2r'"),
        (ll.LoRAGAConfig(), {"scale": "z"}, "scale must be one of .'stable'"),
        (ll.LoRAGAConfig(), {"gamma": 0.0}, "gamma must be a positive number, got 0.0"),
        (ll.LoRAGAConfig(), {"scale": "gd", "alpha": 0.0}, "alpha must not be 0"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_again(config, fields)


# --- OLoRA -------------------------------------------------------------------------------------------------------------


def test_olora_takes_the_span_of_the_first_columns_of_w_out_of_it() -> None:
    """B0 is orthonormal, A0 upper triangular, and B0 A0 is W projected on the span of its first r columns."""
    for target, p in starts(ll.OLoRAConfig(**FIELDS)).items():
        W, A0, B0 = as_numpy(weight(target)), p["lora_A0"], p["lora_B0"]
        assert_close(B0.T @ B0, torch.eye(4, dtype=F64))
        assert torch.equal(A0, A0.triu())
        columns = W[:, :4]
        projected = torch.from_numpy(columns @ np.linalg.lstsq(columns, W, rcond=None)[0])
        assert_close(B0 @ A0, projected, target)
        best = np.linalg.svd(W)
        assert_differs(B0 @ A0, torch.from_numpy(best[0][:, :4] * best[1][:4] @ best[2][:4]), "that would be PiSSA")


# --- CorDA -------------------------------------------------------------------------------------------------------------


def damped(x: Tensor) -> Any:
    X = as_numpy(x) / abs(as_numpy(x).max())
    C = X.T @ X
    return C + 0.01 * np.mean(np.diag(C)) * np.eye(len(C))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_takes_the_strongest_or_weakest_part_of_w_as_the_inputs_weigh_it(mode: Any) -> None:
    found = starts(ll.CorDAConfig(mode=mode, **FIELDS), calibration_data=[BATCH])
    other = starts(ll.CorDAConfig(mode="kpm" if mode == "ipm" else "ipm", **FIELDS), calibration_data=[BATCH])
    for target, p in found.items():
        W, C = as_numpy(weight(target)), damped(inputs()[target])
        U, s, Vh = np.linalg.svd(W @ C, full_matrices=False)
        kept = slice(0, 4) if mode == "ipm" else slice(len(s) - 4, None)
        want = torch.from_numpy(U[:, kept] * s[kept] @ Vh[kept] @ np.linalg.inv(C))
        assert_close(S * p["lora_B0"] @ p["lora_A0"], want, target, 1e-9)
        assert_differs(S * other[target]["lora_B0"] @ other[target]["lora_A0"], want, "the other mode")
        balance = np.sqrt(s[kept] / S)
        assert_close(p["lora_B0"].norm(dim=0), torch.from_numpy(balance), "B0 has the root of the spectrum", 1e-9)


def test_all_of_corda_s_directions_are_w() -> None:
    """At full rank W_res is zero: C and its inverse are consistent."""
    found = starts(ll.CorDAConfig(r=64, alpha=6.0, mode="kpm", targets=TARGETS), calibration_data=[BATCH])
    for target, p in found.items():
        assert_close(6.0 / min(weight(target).shape) * p["lora_B0"] @ p["lora_A0"], weight(target), target)


def test_corda_counts_batches_as_its_authors_do() -> None:
    twice, mixed = (
        starts(ll.CorDAConfig(mode="ipm", **FIELDS), calibration_data=data)
        for data in ([BATCH, BATCH], [BATCH, {"input_ids": token_ids(1, 40, seed=1)}])
    )
    once = starts(ll.CorDAConfig(mode="ipm", **FIELDS), calibration_data=[BATCH])
    for target, p in once.items():
        assert_close(twice[target]["lora_B0"] @ twice[target]["lora_A0"], p["lora_B0"] @ p["lora_A0"], tolerance=1e-9)
        assert_differs(mixed[target]["lora_B0"] @ mixed[target]["lora_A0"], p["lora_B0"] @ p["lora_A0"])


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_starts_where_peft_does(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there, x = mlp(F64), ROWS.double()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["up", "down"], init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode)
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(F64)  # of its torch.ones
        try:
            preprocess_corda(there, config, run_model=lambda: there(x))
        finally:
            torch.set_default_dtype(torch.float32)
    adapter = ll.attach(mlp(F64), ll.CorDAConfig(mode=mode, **WHOLE), calibration_data=[x])
    for target, p in adapter.tensors().items():
        eigens: Any = there.get_submodule(target).eigens
        root = (eigens.S_WC / S).sqrt()
        same_rows(p["lora_B0"].T, (eigens.U_WC * root).T, f"B0 of {target}")
        same_rows(p["lora_A0"], root[:, None] * eigens.V_WC.T, f"A0 of {target}")


@pytest.mark.fast
def test_inputs_that_weigh_nothing_are_refused() -> None:
    model = mlp()
    data = {t.name: torch.zeros(8, t.d_in) for t in ll.find_targets(model, ll.CorDAConfig())}
    with pytest.raises(ValueError, match=r"layers\.0\.up: its inputs in the calibration data are all zero"):
        ll.attach(model, ll.CorDAConfig(r=2), calibration_data=data)
    assert not [n for n, _ in model.named_parameters() if "lora_" in n]


# --- LoRA-GA -----------------------------------------------------------------------------------------------------------


@lru_cache
def gradients() -> dict[str, Tensor]:
    model = llama(F64)
    loss_of(model(**BATCH), BATCH).backward()
    return {name: model.get_submodule(name).weight.grad for name in inputs()}


PICKS = {"ArB2r": ([0, 1, 2, 3], [4, 5, 6, 7]), "A2rBr": ([4, 5, 6, 7], [0, 1, 2, 3]), "ArBr": ([1, 3, 5, 7], [0, 2, 4, 6])}


@pytest.mark.parametrize("scale", ["stable", "unit", "gd", "peft"])
@pytest.mark.parametrize("direction", PICKS)
def test_lora_ga_starts_from_the_gradient_s_directions(direction: Any, scale: Any) -> None:
    config = ll.LoRAGAConfig(direction=direction, scale=scale, gamma=9.0, **FIELDS)
    found = starts(config, calibration_data=[BATCH], loss=loss_of)
    of_A, of_B = PICKS[direction]
    for target, p in found.items():
        G = as_numpy(gradients()[target])
        U, s, Vh = np.linalg.svd(G, full_matrices=False)
        z = {"stable": len(G) ** 0.25 / 3, "unit": 1.0, "gd": 1 / S, "peft": 1.0}[scale]
        b = len(G) ** 0.25 / 3 * s[of_B] if scale == "peft" else z
        same_rows(p["lora_A0"], torch.from_numpy(z * Vh[of_A]), f"A0 of {target}", 1e-8)
        same_rows(p["lora_B0"].T, torch.from_numpy((U[:, of_B] * b).T), f"B0 of {target}", 1e-8)


def test_lora_ga_averages_over_batches() -> None:
    other = {"input_ids": token_ids(1, 40, seed=1)}
    both = starts(ll.LoRAGAConfig(scale="peft", **FIELDS), calibration_data=[BATCH, other], loss=loss_of)
    model = llama(F64)
    ((loss_of(model(**BATCH), BATCH) + loss_of(model(**other), other)) / 2).backward()
    for target, p in both.items():
        G = model.get_submodule(target).weight.grad
        _, s, _ = torch.linalg.svd(G)
        assert_close(p["lora_B0"].norm(dim=0), len(G) ** 0.25 / 4 * s[4:8], target, 1e-9)


def test_lora_ga_s_first_step_is_nearer_to_full_fine_tuning_s_than_lora_s() -> None:
    """The paper's promise (theorem 3.1): B0 dA + dB A0 of one gradient step spans what rank 2r can of the gradient."""

    def alignment(config: ll.AdapterConfig, **keywords: Any) -> Tensor:
        model = llama(F64)
        adapter = ll.attach(model, dataclasses.replace(config, dtype=F64), seed=0, **keywords)
        loss_of(model(**BATCH), BATCH).backward()
        found = []
        for target, p in adapter.tensors().items():
            A, B = p.get("lora_A0", p["lora_A"]), p.get("lora_B0", p["lora_B"])
            step = B @ p["lora_A"].grad + p["lora_B"].grad @ A  # type: ignore[operator]
            found.append(torch.cosine_similarity(step.detach().flatten(), gradients()[target].flatten(), dim=0))
        return torch.stack(found).mean()

    ours, plain = alignment(ll.LoRAGAConfig(**FIELDS), calibration_data=[BATCH], loss=loss_of), alignment(ll.LoRAConfig(**FIELDS))
    assert float(ours) > 0.9 and float(ours) > 1.5 * float(plain), (ours, plain)


@BACKWARD
def test_peft_s_lora_ga_is_our_scale_of_that_name() -> None:
    there = llama()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=NAMES, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(stable_gamma=9)
    )
    preprocess_loraga(there, config, train_step=lambda: loss_of(there(**BATCH), BATCH).backward())
    layers: Any = peft.get_peft_model(there, config).base_model.model
    found = starts(ll.LoRAGAConfig(scale="peft", gamma=9.0, **FIELDS), torch.float32, calibration_data=[BATCH], loss=loss_of)
    for target, p in found.items():
        layer = layers.get_submodule(target)
        if target.endswith("v_proj"):  # PEFT's own svd_lowrank is random and finds the others only nearly; here q = 4 r is 16 of 32
            same_rows(p["lora_A0"], layer.lora_A["default"].weight.detach(), f"A0 of {target}", 2e-3)
            same_rows(p["lora_B0"].T, layer.lora_B["default"].weight.detach().T, f"B0 of {target}", 2e-3)


@pytest.mark.fast
def test_lora_ga_leaves_hooks_flags_modes_and_random_state() -> None:
    model = llama()
    model.train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    state, flags = torch.random.get_rng_state(), [p.requires_grad for p in model.parameters()]
    adapter = ll.attach(model, ll.LoRAGAConfig(r=2), calibration_data=[BATCH], loss=loss_of)
    assert torch.equal(torch.random.get_rng_state(), state), "no dropout, nothing drawn"
    adapter.detach()

    def failing(output: Any, batch: Any) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ll.attach(model, ll.LoRAGAConfig(r=2), calibration_data=[BATCH], loss=failing)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(m.training for m in model.modules()) and [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.fast
def test_a_loss_that_moves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient here is zero or not finite"):
        ll.attach(llama(), ll.LoRAGAConfig(r=2), calibration_data=[BATCH], loss=lambda output, batch: 0.0 * output.logits.sum())


@pytest.mark.fast
def test_where_torch_records_no_gradients_that_is_said() -> None:
    labelled = BATCH | {"labels": BATCH["input_ids"]}
    model = llama()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inside torch.inference_mode\(\) torch records none: attach outside"):
        ll.attach(model, ll.LoRAGAConfig(r=2), calibration_data=[labelled])
    assert not ll.adapters(model)
    with torch.no_grad():
        ll.attach(model, ll.LoRAGAConfig(r=2), calibration_data=[labelled])


@pytest.mark.fast
def test_a_loss_of_the_model_s_own_does() -> None:
    labelled = BATCH | {"labels": BATCH["input_ids"]}
    assert ll.attach(llama(), ll.LoRAGAConfig(r=2), calibration_data=[labelled]).diagnostics["gradient_kept"] > 0.3
    with pytest.raises(ValueError, match="has no loss; put labels"):
        ll.attach(llama(), ll.LoRAGAConfig(r=2), calibration_data=[BATCH])


# --- all that start from W, against PEFT's residual form -----------------------------------------------------------------


def rows_loss(output: Tensor, batch: Any) -> Tensor:
    return (output * torch.linspace(-1, 2, 12, dtype=output.dtype)).square().mean()


def from_peft_start(kind: Any) -> Any:
    """PEFT's model, its start computed in float32 and W rewritten, then taken to float64. No Llama: its norms round to float32."""
    there = mlp()
    extra: dict[str, Any] = {}
    if kind == "corda":
        extra["corda_config"] = CordaConfig(corda_method="ipm")
    if kind == "lora_ga":
        extra["lora_ga_config"] = LoraGAConfig()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up", "down"], init_lora_weights=kind, **extra)
    if kind == "corda":
        preprocess_corda(there, config, run_model=lambda: there(ROWS))
    if kind == "lora_ga":
        preprocess_loraga(there, config, train_step=lambda: rows_loss(there(ROWS), None).backward())
    return peft.get_peft_model(there, config).double().eval()


CONFIGS = {"olora": ll.OLoRAConfig(**WHOLE), "corda": ll.CorDAConfig(mode="ipm", **WHOLE), "lora_ga": ll.LoRAGAConfig(**WHOLE)}


@BACKWARD
@pytest.mark.fast
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "B0 left out"])
def test_differences_on_w_are_peft_s_factors_on_its_residual(kind: Any, wrong: bool) -> None:
    """The same function and the same gradients, in float64, once both sides hold the same start: W = W_res + s B0 A0."""
    there, ours, x = from_peft_start(kind), mlp().double(), ROWS.double()
    keywords: dict[str, Any] = {"olora": {}, "corda": {"calibration_data": [x]}, "lora_ga": {"calibration_data": [x], "loss": rows_loss}}
    adapter = ll.attach(ours, CONFIGS[kind], **keywords[kind])
    layers = {t: there.base_model.model.get_submodule(t) for t in adapter.targets}
    with torch.no_grad():
        for i, (t, p) in enumerate(adapter.tensors().items()):
            A, B = layers[t].lora_A["default"].weight, layers[t].lora_B["default"].weight
            ours.get_submodule(t).weight.copy_(layers[t].base_layer.weight + S * B @ A)
            p["lora_A0"].copy_(A)
            p["lora_B0"].copy_(0 * B if wrong else B)
            for start, moved, seed in ((A, p["lora_A"], 2 * i), (B, p["lora_B"], 2 * i + 1)):
                moved.copy_(normal(*start.shape, seed=seed, std=0.1, dtype=F64))
                start.add_(moved)
    got, want = ours(x), there(x)
    if wrong:
        assert_differs(got, want)
        return
    assert_close(got, want)
    rows_loss(got, None).backward()
    rows_loss(want, None).backward()
    for t, p in adapter.tensors().items():
        for field in ("lora_A", "lora_B"):
            theirs, found = getattr(layers[t], field)["default"].weight.grad, p[field].grad
            assert found is not None and float(theirs.abs().max()) > 1e-6
            assert_close(found, theirs, f"{t}.{field}")


def test_olora_starts_where_peft_does() -> None:
    layers: Any = from_peft_start("olora").base_model.model
    for target, p in ll.attach(mlp(), dataclasses.replace(CONFIGS["olora"], dtype=torch.float32)).tensors().items():
        layer = layers.get_submodule(target)
        theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert_close((p["lora_B0"] @ p["lora_A0"]).double(), theirs.detach(), target, TOLERANCE[torch.float32])


# --- EVA ---------------------------------------------------------------------------------------------------------------


def exact_components(x: Any) -> tuple[Any, Any]:
    """Shares of the variance and directions, by a plain SVD of the centred inputs."""
    centred = x - x.mean(0)
    _, s, Vh = np.linalg.svd(centred, full_matrices=False)
    return s**2 / (centred**2).sum(), Vh


def test_eva_s_a_is_the_principal_components_of_the_inputs() -> None:
    found = starts(ll.EVAConfig(**FIELDS), calibration_data=[BATCH])
    for target, p in found.items():
        _, Vh = exact_components(as_numpy(inputs()[target]))
        same_rows(p["lora_A"], torch.from_numpy(Vh[:4]), target, 1e-8)
        assert not p["lora_B"].any()
    x = as_numpy(inputs()["model.layers.0.mlp.down_proj"] + 3.0)  # off centre, where centring matters
    uncentred = np.linalg.svd(x, full_matrices=False)[2][:4]
    assert_differs(torch.from_numpy(abs(uncentred)), torch.from_numpy(abs(exact_components(x)[1][:4])), "without centring")


def test_components_of_a_stream_are_those_of_all_of_it() -> None:
    """Lossless when nothing is cut off; near where something is; and what is kept does not grow."""
    spread = torch.linspace(0, 3, 24, dtype=F64).exp().flip(0)
    x = normal(3000, 24, seed=1, dtype=F64) @ torch.linalg.qr(normal(24, 24, seed=2, dtype=F64)).Q * 1.0
    x = (x * spread) @ torch.linalg.qr(normal(24, 24, seed=3, dtype=F64)).Q + 5.0
    shares, Vh = exact_components(x.numpy())
    for k, tolerance in ((12, 1e-9), (4, 0.05)):
        pca = eva.Components(k, 24, torch.device("cpu"))
        for rows in x.split(170):
            pca.update(rows, "all")
            assert pca.Vh.shape[0] <= 2 * k
        assert pca.n == 3000
        same_rows(pca.first(4), torch.from_numpy(Vh[:4]), f"{k} components", tolerance)
        assert_close(torch.tensor(pca.shares()[:4]), torch.from_numpy(shares[:4]).float(), tolerance=max(tolerance, 1e-6))


def test_layers_that_read_one_input_share_their_components() -> None:
    adapter = ll.attach(llama(), ll.EVAConfig(**FIELDS), calibration_data=[BATCH])
    first = {t.rpartition(".")[2]: f["lora_A"] for t, f in adapter.tensors().items() if ".0." in t}
    assert same_bits(first["q_proj"], first["k_proj"]) and same_bits(first["q_proj"], first["v_proj"])
    assert first["q_proj"] is not first["k_proj"], "they start alike and train apart"
    patterns = {"q_proj": 2, r"layers\.1\..*": 6}
    mixed = ll.attach(llama(), ll.EVAConfig(**FIELDS, rank_pattern=patterns), calibration_data=[BATCH])
    ranks = {t.partition("layers.")[2]: len(f["lora_A"]) for t, f in mixed.tensors().items()}
    assert ranks == {f"{i}.{m}": 2 if "q_proj" in m else 6 if i else 4 for i in (0, 1) for m in MODULES}


MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.mark.parametrize("rho", [1.5, 2.0, 3.0])
def test_ranks_go_where_they_explain_most_and_scales_stay(rho: float) -> None:
    model = llama(F64)
    adapter: Any = ll.attach(model, ll.EVAConfig(**FIELDS, rho=rho, dtype=F64), calibration_data=[BATCH])
    ranks = {t: len(f["lora_A"]) for t, f in adapter.tensors().items()}
    assert sum(ranks.values()) == 4 * 8 and max(ranks.values()) <= 4 * rho and min(ranks.values()) >= 1
    offers = sorted(((s, t) for t, x in inputs().items() for s in exact_components(as_numpy(x))[0][: round(4 * rho)]), reverse=True)
    threshold = offers[31][0]
    for t, x in inputs().items():
        shares, Vh = exact_components(as_numpy(x))
        above = int((shares[: round(4 * rho)] > threshold * (1 + 1e-6)).sum())
        at_most = int((shares[: round(4 * rho)] > threshold * (1 - 1e-6)).sum())
        assert max(1, above) <= ranks[t] <= max(1, at_most), "equals (q, k and v) share what is left between them"
        same_rows(adapter.tensors()[t]["lora_A"].detach(), torch.from_numpy(Vh[: ranks[t]]), t, 1e-6)
        assert math.isclose(adapter.config.at(t, 1, 1).alpha / adapter.config.at(t, 64, 64).r, S, rel_tol=1e-12)


def test_a_redistributed_adapter_comes_back_from_its_file(tmp_path: Any) -> None:
    model = llama()
    adapter = ll.attach(model, ll.EVAConfig(**FIELDS, rho=2.0), calibration_data=[BATCH])
    assert len({len(f["lora_A"]) for f in adapter.tensors().values()}) > 1, "the ranks did move"
    for p in adapter.parameters():
        p.data.add_(0.1)
    want = model(**BATCH).logits
    adapter.save(tmp_path / "eva.safetensors")
    other = llama()
    loaded = ll.load(other, tmp_path / "eva.safetensors")
    assert loaded.config == adapter.config and same_bits(other(**BATCH).logits, want)
    ll.to_peft(loaded, tmp_path / "folder")
    there: Any = peft.PeftModel.from_pretrained(llama(), tmp_path / "folder")
    assert_close(there(**BATCH).logits, want, tolerance=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_is_peft_s_up_to_its_random_svd(rho: float) -> None:
    """PEFT meets the same batch again and again until its components stand still; its SVD is random and in float32."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=NAMES, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho, tau=0.999)
    )
    theirs = get_eva_state_dict(llama(), [BATCH], config, show_progress_bar=False)
    found = starts(ll.EVAConfig(**FIELDS, rho=rho), torch.float32, calibration_data=[BATCH])
    for same_input in ((f"model.layers.{i}.{m}" for m in part) for i in (0, 1) for part in (MODULES[:3], MODULES[3:])):
        names = list(same_input)
        assert sorted(len(found[t]["lora_A"]) for t in names) == sorted(len(theirs[t]) for t in names), "twins may swap ranks"
    for t, x in inputs().items():
        centred, r = x - x.mean(0), min(len(theirs[t]), len(found[t]["lora_A"]))
        seen, there = (float((centred @ A[:r].double().T).square().sum() / centred.square().sum()) for A in (found[t]["lora_A"], theirs[t]))
        assert there * 0.999 < seen and there > 0.97 * seen, (t, seen, there)


@pytest.mark.fast
def test_data_of_too_few_directions_is_refused() -> None:
    model = mlp()
    data = {t.name: normal(3, t.d_in, seed=i) for i, t in enumerate(ll.find_targets(model, ll.EVAConfig()))}
    with pytest.raises(ValueError, match=r"layers\.0\.up: .*\(3 tokens\) vary in 2 directions, r=4"):
        ll.attach(model, ll.EVAConfig(r=4), calibration_data=data)


def test_what_is_calibrated_asks_for_data() -> None:
    for config in (ll.EVAConfig(), ll.CorDAConfig(), ll.LoRAGAConfig()):
        with pytest.raises(ValueError, match="needs calibration data"):
            ll.attach(Single(nn.Linear(3, 3)), config)
