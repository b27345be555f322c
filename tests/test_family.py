"""What does each method of the family promise beyond the laws: rotations that are rotations, starts that train, corners that agree?"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.attachment import all_hooks
from lora_lite.variant import Base
from lora_lite.variants import cayley as cayley_file
from lora_lite.variants import oft as oft_file
from tests.models import VARIANTS, Row, attach, checked_again, llama, mlp, normal, randomise, refill, resolved, single, tensors_at
from tests.references import assert_close, assert_differs, reference, same_bits

F64 = torch.float64
COUNTED = {name: row for name, row in VARIANTS.items() if hasattr(ll.REGISTRY[row.config.variant], "parameters")}


def effect(config: ll.AdapterConfig, c: float, d_in: int = 12, d_out: int = 14, std: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """W, the weight at c, and the bias at c, of a layer with a randomised adapter."""
    model = single(d_in, d_out, F64)
    W = model.linear.weight.detach().clone()
    adapter = randomise(attach(model, Row(config), dtype=F64), std=std)
    with torch.no_grad(), adapter(model, c=c):
        bias = model(torch.zeros(1, d_in, dtype=F64))[0]
        return W, (model(torch.eye(d_in, dtype=F64)) - bias).T, bias


# --- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTED)
def test_the_declared_number_of_parameters_is_what_is_trained(name: str) -> None:
    for d_in, d_out in ((10, 14), (24, 32), (32, 9)):
        cfg = resolved(COUNTED[name], "linear", d_in, d_out)
        variant: Any = ll.REGISTRY[cfg.variant]
        sizes = dataclasses.asdict(cfg) | {"d_in": d_in, "d_out": d_out, "k": 4}
        specs = variant.param_specs(d_in, d_out, cfg)
        assert sum(math.prod(s.shape) for s in specs.values() if s.trainable) == eval(variant.parameters, {"int": int}, sizes)


# --- HRA ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ll.HRAConfig(r=6), ll.HRAGSConfig(r=6)], ids=["product", "gram-schmidt"])
def test_reflections_keep_lengths_and_have_an_exact_low_rank_form(config: ll.AdapterConfig) -> None:
    W, turned, _ = effect(config, 1.0)
    H = torch.linalg.lstsq(W, turned).solution  # W has more rows than columns: H is determined
    assert_close(H @ H.T, torch.eye(12, dtype=F64), "H H^T", tolerance=1e-9)
    model = single(12, 14, F64)
    randomise(attach(model, Row(config), dtype=F64), std=0.4)
    variant: Any = ll.REGISTRY[config.variant]
    update = variant.low_rank_at(config, tensors_at(model, "linear"), Base(12, 14, W))
    assert variant.exact_low_rank == "given weight" and update.r == 6
    assert_close(W + update.dense(), turned, "W + B A")


def test_the_gram_schmidt_form_does_not_ask_for_an_order() -> None:
    model, x = single(12, 14, F64), normal(5, 12, dtype=F64)
    for config, least in ((ll.HRAGSConfig(r=4), 0.0), (ll.HRAConfig(r=4), 1e-3)):
        adapter = randomise(attach(model, Row(config), dtype=F64))
        before, u = model(x).detach(), tensors_at(model, "linear")["lora_u"]
        with torch.no_grad():
            u.copy_(u.flip(1))
        if least:
            assert_differs(model(x), before, "a product in the other order")
        else:
            assert_close(model(x), before, "the same subspace")
        adapter.detach()


def test_an_odd_number_of_reflections_is_refused_at_the_start_only() -> None:
    model = single()
    with pytest.raises(ValueError, match=r"linear: asked for r=3 .* even"):
        ll.attach(model, ll.HRAConfig(r=3))
    assert not tensors_at(model, "linear")
    attach(model, Row(ll.HRAGSConfig(r=3)))


def test_pairs_of_reflections_train_from_the_start() -> None:
    model, x = single(), normal(5, 10)
    attach(model, Row(ll.HRAConfig(r=4)))
    model(x).square().sum().backward()
    grad = tensors_at(model, "linear")["lora_u"].grad
    assert grad is not None and (grad.norm(dim=0) > 1e-3).all()


def test_more_reflections_than_inputs_are_still_right() -> None:
    model, x = single(6, 5, F64), normal(4, 6, dtype=F64)
    config = ll.HRAConfig(r=10)
    randomise(attach(model, Row(config), dtype=F64))
    want = reference(model.linear.weight, model.linear.bias, tensors_at(model, "linear"), config, x, 1.0)
    assert_close(model(x), want)


# --- OFT and ROAD ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1.0, -1.5, 0.3])
def test_an_exact_oft_is_a_rotation_at_every_c_and_minus_c_undoes_it(c: float) -> None:
    config = ll.OFTConfig(block_size=6)
    W, turned, _ = effect(config, c)
    R = torch.linalg.lstsq(W, turned).solution
    assert_close(R @ R.T, torch.eye(12, dtype=F64), tolerance=1e-9)
    assert_close(R[:6, 6:], torch.zeros(6, 6, dtype=F64), "other blocks", tolerance=1e-9)
    _, back, _ = effect(config, -c)
    assert_close(torch.linalg.lstsq(W, back).solution @ R, torch.eye(12, dtype=F64), "R(-c) R(c)", tolerance=1e-9)


def test_the_two_cayley_forms_turn_the_same_way_and_part_at_the_truncated_power() -> None:
    """terms = 5 drops 2 Q^4 - Q^4 and what follows: halving Q makes the difference 2^4 times smaller."""
    gaps = []
    for std in (0.02, 0.01):
        _, exact, _ = effect(ll.OFTConfig(block_size=6), 1.0, std=std)
        W, neumann, _ = effect(ll.OFTConfig(block_size=6, cayley="neumann"), 1.0, std=std)
        gaps.append(float((exact - neumann).norm()))
        assert gaps[-1] < 1e-2 * float((exact - W).norm())
    assert 13 < gaps[0] / gaps[1] < 19


@pytest.mark.parametrize(
    "config", [ll.OFTConfig(block_size=6)] + [ll.OFTConfig(block_size=6, cayley="neumann", terms=n) for n in (2, 3, 5, 6)]
)
def test_one_c_for_all_and_the_same_c_per_row_are_one_method(config: ll.OFTConfig) -> None:
    """Two roads of the code: a matrix per block, and none at all."""
    model, x = single(12, 14, F64), normal(3, 5, 12, dtype=F64)
    adapter = randomise(attach(model, Row(config), dtype=F64), std=0.4)
    (p,) = adapter.parameters()
    with adapter(model, c=0.7):
        assert_close(model(x), reference(model.linear.weight, model.linear.bias, tensors_at(model, "linear"), config, x, 0.7))
    outputs = []
    for c in (0.7, torch.full((3,), 0.7, dtype=F64), torch.full((3, 5), 0.7, dtype=F64)):
        seen = x.clone().requires_grad_()
        with adapter(model, c=c):
            y = model(seen)
        outputs.append((y, *torch.autograd.grad(y.square().sum(), [p, seen])))
    for other in outputs[1:]:
        for got, want in zip(other, outputs[0], strict=True):
            assert_close(got, want)


def test_a_fresh_oft_with_a_c_per_row_has_finite_gradients() -> None:
    """Q = 0 has one eigenvalue for all directions, where eigenvectors have no derivative."""
    model, x = single(12, 14), normal(3, 5, 12)
    adapter = attach(model, Row(ll.OFTConfig(block_size=6)))
    (p,) = adapter.parameters()
    grads = []
    for c in (torch.tensor([0.5, 1.0, -1.0]), torch.tensor([1.0, 1.0, 1.0]), 1.0):
        with adapter(model, c=c):
            grads.append(torch.autograd.grad(model(x).square().sum(), p)[0])
    assert grads[0].isfinite().all() and grads[0].any()
    assert_close(grads[1], grads[2])


def test_a_c_per_token_forms_no_matrix_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = [0]
    times = cayley_file.times

    def watched(x: Tensor, M: Tensor) -> Tensor:
        largest[0] = max(largest[0], M.numel())
        return times(x, M)

    for file in (cayley_file, oft_file):
        monkeypatch.setattr(file, "times", watched)
    model, x = single(12, 14), normal(3, 5, 12)
    for cayley in ("exact", "neumann"):
        adapter = randomise(attach(model, Row(ll.OFTConfig(block_size=6, cayley=cayley))))  # type: ignore[arg-type]
        with adapter(model, c=normal(3, 5)):
            model(x)
        adapter.detach()
    assert largest == [2 * 6 * 6], "two blocks of 6 x 6, for 15 tokens"


def test_blocks_and_groups_fit_every_layer_by_the_stated_rule() -> None:
    assert [ll.OFTConfig(block_size=8).at("", d, 9).block_size for d in (64, 10, 12, 21)] == [8, 5, 6, 7]
    assert [ll.ROADConfig(group_size=64).at("", 9, d).group_size for d in (128, 32, 14, 96, 15, 2)] == [64, 32, 14, 48, 14, 2]
    with pytest.raises(ValueError, match="13 inputs"):
        ll.attach(single(13, 4), ll.OFTConfig(block_size=8))
    with pytest.raises(ValueError, match="one output"):
        ll.attach(single(4, 1), ll.ROADConfig())


@pytest.mark.parametrize("kind", ["road_1", "road_2", "road_4"])
def test_road_leaves_the_last_of_an_odd_number_of_outputs_alone(kind: Any) -> None:
    config = ll.ROADConfig(kind=kind, group_size=4)
    W, turned, bias = effect(config, 1.0, 6, 9)
    model = single(6, 9, F64)
    assert_close(turned[-1], W[-1])
    assert_close(bias[-1], model.linear.bias[-1])
    x = normal(4, 6, dtype=F64)
    randomise(attach(model, Row(config), dtype=F64))
    assert_close(model(x), reference(model.linear.weight, model.linear.bias, tensors_at(model, "linear"), config, x, 1.0))


def test_road_1_without_stretch_is_a_rotation_and_minus_c_undoes_it() -> None:
    model, x = single(6, 8, F64), normal(4, 6, dtype=F64)
    base = model(x).detach()
    adapter = attach(model, Row(ll.ROADConfig(group_size=4)), dtype=F64)
    with torch.no_grad():
        tensors_at(model, "linear")["lora_theta"].copy_(normal(4, dtype=F64))
    there = model(x).detach()
    assert_close(there.norm(dim=1), base.norm(dim=1))
    assert_differs(there, base)
    with torch.no_grad(), adapter(model, c=-1.0):
        back = model(x)
    assert_close((there + back) / 2, (base.unflatten(1, (2, 2, 2)) * normal(4, dtype=F64).cos().view(2, 1, 2)).flatten(1))


@pytest.mark.parametrize("name", ["road", "ia3", "ia3_ff"])
def test_a_small_stretch_survives_bfloat16(name: str) -> None:
    """1 + 0.003 is 1 in bfloat16, but 1.003 times most numbers is the next one."""
    small, variant, y, base = 3e-3, ll.REGISTRY[name], normal(512, 8).bfloat16(), Base(8, 8)
    tensors = (
        {"lora_theta": torch.zeros(4), "lora_alpha": torch.full((4,), small)} if name == "road" else {"lora_l": torch.full((8,), small)}
    )
    cfg = ll.ROADConfig(group_size=4) if name == "road" else variant.Config()
    p = {k: v.bfloat16() for k, v in variant.prepare(cfg, tensors, base, 1.0).items()}
    got = variant.added(cfg, p, y, None if name == "ia3_ff" else y, base, 1.0)
    want = ((1 + small) * y.double()).bfloat16()
    assert float((got == want).double().mean()) > 0.98 and float((want != y).double().mean()) > 0.5
    assert torch.equal(torch.tensor(1 + small).bfloat16() * y, y), "cast first, nothing would be left"


# --- IA3 ---------------------------------------------------------------------------------------------------------------


def square(seed: int = 0) -> nn.Module:
    """Four layers of one size each, whose shapes do not tell a gate of inputs from one of outputs."""
    model = nn.Sequential(OrderedDict({n: nn.Linear(8, 8, dtype=F64) for n in ("k_proj", "fc", "v_proj", "down_proj")}))
    refill(model, seed, weight_std=0.3, bias_std=0.2)
    return model.eval()


def test_ia3_gates_what_feedforward_names_on_its_input_and_the_rest_on_its_output() -> None:
    model, x = square(), normal(5, 8, dtype=F64)
    adapter = randomise(attach(model, Row(ll.IA3Config(targets=("k_proj", "down_proj"), feedforward="down")), dtype=F64))
    gate = {t: 1 + p["lora_l"].detach() for t, p in adapter.tensors().items()}
    layers: list[Any] = [model.get_submodule(n) for n in ("k_proj", "fc", "v_proj", "down_proj")]
    k, fc, v, down = layers

    def dense(x: Tensor) -> Tensor:
        h = (x @ k.weight.T + k.bias) * gate["k_proj"]
        h = (h @ fc.weight.T + fc.bias) @ v.weight.T + v.bias
        return (h * gate["down_proj"]) @ down.weight.T + down.bias

    assert_close(model(x), dense(x))
    assert {t: type(hook).__name__ for t, _, hook in all_hooks(model)} == {"k_proj": "OutputHook", "down_proj": "InputHook"}


def test_a_half_of_ia3_is_ia3_ff_to_the_bit() -> None:
    model, other, x = square(), square(), normal(5, 8, dtype=F64)
    randomise(attach(model, Row(ll.IA3Config(feedforward="proj|fc")), dtype=F64))
    randomise(attach(other, Row(ll.IA3FFConfig()), dtype=F64))
    assert same_bits(model(x), other(x))


@pytest.mark.parametrize("feedforward", ["down_proj", r"^down_proj$", "^(down_proj|fc)$"])
def test_feedforward_layers_stay_what_they_are_under_a_wrappers_names(feedforward: str, tmp_path: Any) -> None:
    """All shapes are the same, so nothing but the names could tell."""
    x = normal(5, 8, dtype=F64)
    model = square()
    adapter = randomise(attach(model, Row(ll.IA3Config(feedforward=feedforward)), dtype=F64))
    adapter.save(tmp_path / "bare.safetensors")
    wrapped = nn.ModuleDict({"module": square()})
    there = ll.load(wrapped, tmp_path / "bare.safetensors", strict_base=False)
    assert there.targets == [f"module.{t}" for t in adapter.targets]
    assert same_bits(wrapped["module"](x), model(x))
    there.save(tmp_path / "wrapped.safetensors")
    back = square()
    ll.load(back, tmp_path / "wrapped.safetensors", strict_base=False)
    assert same_bits(back(x), model(x))


def test_ia3_files_from_before_feedforward_load(tmp_path: Any) -> None:
    values, x = {t: normal(8, seed=i, dtype=F64) for i, t in enumerate(("k_proj", "down_proj"))}, normal(5, 8, dtype=F64)
    for variant, config in (("ia3", ll.IA3Config()), ("ia3_ff", ll.IA3FFConfig())):
        said = {"variant": variant, "targets": "proj", "exclude": [], "layer_range": [0.0, 1.0], "layers": None, "roles": None}
        header = {"format": "lora_lite", "format_version": "1", "config": json.dumps(said | {"dtype": "float64"})}
        save_file({f"{t}.lora_l": v for t, v in values.items()}, tmp_path / f"{variant}.safetensors", header)
        model, want = square(), square()
        ll.load(model, tmp_path / f"{variant}.safetensors")
        adapter = attach(want, Row(config), targets="proj", exclude=("v_proj",), dtype=F64)
        with torch.no_grad():
            for t, p in adapter.tensors().items():
                p["lora_l"].copy_(values[t])
        assert same_bits(model(x), want(x))


# --- DeLoRA ------------------------------------------------------------------------------------------------------------


def gradients_at_the_start(init: Any) -> dict[str, float]:
    model, x = single(16, 24, F64), normal(32, 16, dtype=F64)
    attach(model, Row(ll.DeLoRAConfig(r=4, init=init)), dtype=F64)
    model(x).square().mean().backward()
    return {name: float(p.grad.norm()) for name, p in tensors_at(model, "linear").items() if p.grad is not None}


def test_deloras_paper_start_trains_every_tensor_and_pefts_only_b() -> None:
    paper, zeros = gradients_at_the_start("paper"), gradients_at_the_start("zeros")
    assert min(paper["lora_A"], paper["lora_B"], paper["lora_lambda"]) > 1e-3
    assert zeros["lora_A"] == zeros["lora_lambda"] == 0.0
    assert zeros["lora_B"] > 1000 * paper["lora_B"], "B is divided by the floor of its norm"


def test_the_first_step_from_pefts_start_jumps_to_the_bound() -> None:
    moved = {}
    for init in ("paper", "zeros"):
        model, x = single(16, 24, F64), normal(32, 16, dtype=F64)
        adapter = attach(model, Row(ll.DeLoRAConfig(r=4, init=init, strength=1.0)), dtype=F64)  # type: ignore[arg-type]
        base = model(x).detach()
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
        (model(x) - normal(32, 24, seed=1, dtype=F64)).square().mean().backward()
        optimizer.step()
        moved[init] = float((model(x).detach() - base).norm() / base.norm())
    assert moved["zeros"] > 10 * moved["paper"]


def test_deloras_update_is_bounded_by_lambda_and_the_columns_of_w() -> None:
    W, tuned, _ = effect(ll.DeLoRAConfig(r=4, init="zeros", strength=2.0), 1.0, std=3.0)
    model = single(12, 14, F64)
    randomise(attach(model, Row(ll.DeLoRAConfig(r=4, init="zeros", strength=2.0)), dtype=F64), std=3.0)
    bound = float(tensors_at(model, "linear")["lora_lambda"].detach().abs())
    change = (tuned - W) / W.norm(dim=0)
    assert 0 < float(change.norm()) <= bound * (1 + 1e-12)


# --- the others --------------------------------------------------------------------------------------------------------


def test_hira_writes_no_entry_that_w_does_not_have() -> None:
    model, x = single(dtype=F64), normal(4, 10, dtype=F64)
    with torch.no_grad():
        model.linear.weight[:, 3] = 0.0
    adapter = randomise(attach(model, Row(ll.HiRAConfig(r=4)), dtype=F64))
    with torch.no_grad(), adapter.merged():
        assert not model.linear.weight[:, 3].any() and model.linear.weight.count_nonzero() == 9 * 14
    assert_differs(model(x), model.linear.forward(x))


def test_misss_last_block_may_be_short() -> None:
    W, tuned, _ = effect(ll.MiSSConfig(r=5), 1.0)
    change = (tuned - W).T
    assert_close(change[:5], change[5:10])
    assert_close(change[:2], change[10:])
    assert ll.MiSSConfig(r=64).at("", 12, 14).r == 12


def test_lora_xs_starts_where_the_paper_does_and_stays_in_ws_top_directions() -> None:
    config = ll.LoRAXSConfig(r=3, alpha=3.0)
    model = single(12, 14, F64)
    attach(model, Row(config), dtype=F64)
    R = tensors_at(model, "linear")["lora_R"].detach()
    assert R.shape == (3, 3) and 0 < float(R.abs().max()) < 5e-5
    W, tuned, _ = effect(config, 1.0)
    U, _, Vh = torch.linalg.svd(W)
    assert_close(U[:, :3].T @ (tuned - W) @ Vh[3:].T, torch.zeros(3, 9, dtype=F64))
    assert_close(U[:, 3:].T @ (tuned - W), torch.zeros(11, 12, dtype=F64))
    still, x = single(), normal(4, 10)
    base = still(x)
    attach(still, Row(dataclasses.replace(config, std=0.0)))
    assert same_bits(still(x), base), "R = 0 is the base"


def test_vera_s_layers_share_one_pair_which_a_file_holds_once(tmp_path: Path) -> None:
    model = mlp()  # 12 -> 20 and back
    before = [list(vars(m)) for m in model.modules()]
    adapter = ll.attach(model, ll.VeRAConfig(r=6, projection_seed=5))
    for there in (adapter, ll.load(mlp(), file_of(adapter, tmp_path)), ll.adapters(copy.deepcopy(model))["default"]):
        held = [fields for fields in there.tensors().values()]
        assert len(held) == 6 and len({id(f["lora_A"]) for f in held}) == 1 == len({id(f["lora_B"]) for f in held})
        assert held[0]["lora_A"].shape == (6, 20) and held[0]["lora_B"].shape == (20, 6)
        assert there.config.room == (20, 20)  # type: ignore[attr-defined]
    stored = load_file(tmp_path / "vera.safetensors")
    assert sum("lora_A" in k for k in stored) == 1 == sum("lora_B" in k for k in stored) and sum("lora_d" in k for k in stored) == 6
    adapter.detach()
    assert [list(vars(m)) for m in model.modules()] == before


def file_of(adapter: ll.Adapter, folder: Path) -> Path:
    adapter.save(folder / "vera.safetensors")
    return folder / "vera.safetensors"


def test_hugging_face_saves_a_model_whose_layers_share_tensors(tmp_path: Path) -> None:
    model = llama()
    ll.attach(model, ll.VeRAConfig(r=4))
    model.save_pretrained(tmp_path)
    assert sum(k.endswith("lora_A") for k in load_file(tmp_path / "model.safetensors")) == 1


def test_more_room_leaves_a_corner_as_it_was() -> None:
    held = {}
    for d_in, d_out in ((10, 14), (24, 32), (7, 40)):
        model = single(d_in, d_out)
        attach(model, Row(ll.VeRAConfig(r=6, projection_seed=5)), seed=d_in)
        held[d_in, d_out] = tensors_at(model, "linear")
    for (d_in, d_out), t in held.items():
        for (other_in, other_out), o in held.items():
            n, m = min(d_in, other_in), min(d_out, other_out)
            assert_close(t["lora_A"][:, :n] * d_in**0.5, o["lora_A"][:, :n] * other_in**0.5, "scaled by the widest")
            assert same_bits(t["lora_B"][:m], o["lora_B"][:m])
    model = single(10, 14)
    attach(model, Row(ll.VeRAConfig(r=6, projection_seed=6)))
    assert_differs(tensors_at(model, "linear")["lora_A"], held[10, 14]["lora_A"], "another seed")


def test_a_layer_that_the_shared_projections_have_no_room_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"room for \(5, 14\), this layer is 10 -> 14"):
        ll.VeRAConfig(r=6, room=(5, 14)).at("linear", 10, 14)


def test_veras_projections_have_the_variance_of_kaiming() -> None:
    specs = ll.REGISTRY["vera"].param_specs(600, 400, ll.VeRAConfig(r=100))
    A, B = (specs[key].init(specs[key].shape, None) for key in ("lora_A", "lora_B"))
    assert float(A.var()) == pytest.approx(2 / 600, rel=0.02) and float(B.var()) == pytest.approx(2 / 100, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([A[:, :400].T.flatten(), B.flatten()]))[0, 1])) < 0.02, "A and B are not the same numbers"


# --- configs -----------------------------------------------------------------------------------------------------------

BAD: list[tuple[type[ll.AdapterConfig], dict[str, Any], str]] = [
    (ll.HRAConfig, {"r": 0}, "r must be a positive whole number, got 0"),
    (ll.MiSSConfig, {"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern\['q_proj'\] must be"),
    (ll.HiRAConfig, {"dropout": 1.0}, "dropout"),
    (ll.ROADConfig, {"kind": "road_3"}, "road_4"),
    (ll.ROADConfig, {"group_size": 7}, "even"),
    (ll.OFTConfig, {"cayley": "taylor"}, "neumann"),
    (ll.OFTConfig, {"block_size": 1}, "block_size must be a whole number from 2"),
    (ll.OFTConfig, {"terms": 1}, "terms"),
    (ll.DeLoRAConfig, {"init": "random"}, "paper"),
    (ll.DeLoRAConfig, {"strength": math.nan}, "strength"),
    (ll.LoRAXSConfig, {"std": -1.0}, "std"),
    (ll.VeRAConfig, {"projection_seed": -1}, "projection_seed"),
    (ll.VeRAConfig, {"room": (3,)}, "room must be"),
    (ll.VeRAConfig, {"rank_pattern": {"q": 3}}, "one r: leave rank_pattern out"),
]


@pytest.mark.parametrize(("config", "fields", "says"), BAD, ids=[f"{c.variant}-{next(iter(f))}" for c, f, _ in BAD])
def test_what_cannot_be_meant_is_refused_when_the_config_is_made(config: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        checked_again(config(), fields)
