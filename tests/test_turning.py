"""What do AntiPaSTO and SSVD promise beyond the laws: rotations that c undoes, bounded angles, directions chosen in one pass?"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite as ll
from lora_lite.variant import Base
from lora_lite.variants import antipasto, cayley, turning
from lora_lite.variants.cayley import exact
from tests import references
from tests.models import VARIANTS, Row, activations, attach, checked_again, llama, mlp, normal, randomise, single, tensors_at, token_ids
from tests.references import assert_close, assert_differs, same_bits

F64 = torch.float64
ROWS = {name: VARIANTS[name] for name in ("antipasto", "antipasto-u", "ssvd", "ssvd-first-order")}
each_row = pytest.mark.parametrize("name", ROWS)
ROTATIONS = ("antipasto", "antipasto-u", "ssvd")


def attached(name: str, dtype: torch.dtype = F64, std: float = 0.4) -> tuple[Any, ll.Adapter, dict[str, Tensor]]:
    model = single(dtype=dtype)
    adapter = randomise(attach(model, ROWS[name], dtype=dtype), std=std)
    return model, adapter, tensors_at(model, "linear")  # type: ignore[return-value]


def tuned(model: Any, adapter: ll.Adapter, c: float) -> Tensor:
    """The weight at c."""
    with torch.no_grad(), adapter(model, c=c):
        return (model(torch.eye(10, dtype=F64)) - model.linear.bias).T


# --- c -----------------------------------------------------------------------------------------------------------------


def rotation(model: Any, adapter: ll.Adapter, c: float) -> Tensor:
    """R(c), read off the weight: with dS = 0 it is all that differs from W."""
    p = tensors_at(model, "linear")
    with torch.no_grad():
        p["lora_dS"].zero_()
    inside = p["lora_U"].T @ (tuned(model, adapter, c) - model.linear.weight) @ p["lora_Vh"].T + torch.diag(p["lora_S"])
    at_v = getattr(adapter.config, "rotate", "V") == "V"
    return ((inside / p["lora_S"][:, None]).T if at_v else inside / p["lora_S"]).detach()


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("c", [1.0, -1.5, 0.3])
def test_every_c_turns_and_minus_c_turns_back(name: str, c: float) -> None:
    model, adapter, _ = attached(name)
    R, back = rotation(model, adapter, c), rotation(model, adapter, -c)
    eye = torch.eye(len(R), dtype=F64)
    assert_close(R @ R.T, eye, "R R^T")
    assert_close(R @ back, eye, "R(c) R(-c)")
    assert_differs(R, eye)


def test_the_first_order_form_does_not_turn_back() -> None:
    """The control of the test above."""
    model, adapter, _ = attached("ssvd-first-order")
    R = rotation(model, adapter, 1.0)
    assert_differs(R @ R.T, torch.eye(4, dtype=F64))
    assert_differs(R @ rotation(model, adapter, -1.0), torch.eye(4, dtype=F64))


MISTAKES = {
    "a rotation that -c does not undo": ("antipasto", references.antipasto, {"never_back": True}, -1.0),
    "values on the wrong side of the turn": ("antipasto", references.antipasto, {"wrong_side": True}, 1.0),
    "values on the wrong side of the turn of U": ("antipasto-u", references.antipasto, {"wrong_side": True}, 1.0),
    "SSVD turned the other way": ("ssvd", references.ssvd, {"wrong_way": True}, 1.0),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_formula_would_be_seen(mistake: str) -> None:
    name, formula, wrong, c = MISTAKES[mistake]
    model, adapter, p = attached(name)
    x = normal(5, 10, dtype=F64)
    arguments = (model.linear.weight, model.linear.bias, p, ROWS[name].config, x, c)
    with torch.no_grad(), adapter(model, c=c):
        assert_close(model(x), formula(*arguments))
        assert_differs(model(x), formula(*arguments, **wrong), mistake)


@each_row
def test_one_c_for_all_and_the_same_c_per_row_are_one_method(name: str) -> None:
    """Two roads of the code: a core per block, and none at all."""
    model, adapter, _ = attached(name)
    x, trained, outputs = normal(3, 5, 10, dtype=F64), list(adapter.parameters()), []
    for c in (0.7, torch.full((3,), 0.7, dtype=F64), torch.full((3, 5), 0.7, dtype=F64)):
        seen = x.clone().requires_grad_()
        with adapter(model, c=c):
            y = model(seen)
        outputs.append((y, *torch.autograd.grad(y.square().sum(), [*trained, seen])))
    for other in outputs[1:]:
        for got, want in zip(other, outputs[0], strict=True):
            assert_close(got, want)


@each_row
def test_a_fresh_adapter_with_a_c_per_row_trains(name: str) -> None:
    """At the start all planes turn by nothing, and their eigenvectors have no derivative."""
    model, x, grads = single(), normal(3, 5, 10), []
    adapter = attach(model, ROWS[name])
    for c in (torch.ones(3), 1.0):
        with adapter(model, c=c):
            grads.append(torch.autograd.grad(model(x).square().sum(), list(adapter.parameters())))
    for rows, one in zip(*grads, strict=True):
        assert rows.isfinite().all() and rows.abs().max() > 1e-3
        assert_close(rows, one)


@each_row
@pytest.mark.parametrize("c", [1.0, -0.7, 2.0])
def test_at_every_c_it_is_one_update_of_rank_r(name: str, c: float, tmp_path: Path) -> None:
    model, adapter, p = attached(name)
    variant, cfg = adapter.variant, adapter.config.at("linear", 10, 14)
    update = variant.low_rank_at(cfg, p, Base(10, 14), c)
    assert update.r == cfg.r  # type: ignore[attr-defined]
    assert_close(model.linear.weight + update.dense(), tuned(model, adapter, c))
    lost = ll.to_peft(adapter, tmp_path, c=c, as_lora=True)
    assert lost == {"linear": 0.0}


def saved(model: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    kept: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        return kept, model(x)


@each_row
def test_nothing_as_large_as_the_weight_is_kept(name: str) -> None:
    model, x = single(40, 50), normal(3, 4, 40)
    adapter = randomise(attach(model, ROWS[name]))
    weight = model.linear.weight.data_ptr()
    for c in (0.7, torch.tensor([0.5, 1.0, -1.0])):
        with adapter(model, c=c):
            kept, y = saved(model, x)
        assert max(t.numel() for t in kept if t.data_ptr() != weight) <= y.numel() < 40 * 50


# --- angles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [2, 3, 5, 8])
def test_planes_turn_within_the_stated_bound_and_reach_it(b: int) -> None:
    """Pick's bound: of all skew matrices with entries within t, the one with all t above the diagonal turns most."""
    config = ll.AntiPaSTOConfig(r=b, block_size=b, max_angle=0.6)
    most = 2 * math.atan(math.tan(0.3) / math.tan(math.pi / (2 * b)))
    pairs = b * (b - 1) // 2

    def widest(theta: Tensor) -> float:
        R = torch.eye(b, dtype=F64) + exact(antipasto.generator(config, theta))
        return float(torch.linalg.eigvals(R).angle().abs().max())

    for seed in range(20):
        assert widest(normal(1, pairs, seed=seed, std=3.0, dtype=F64)) <= most + 1e-9
    assert widest(torch.full((1, pairs), 1e3, dtype=F64)) == pytest.approx(most)
    assert b > 2 or most == pytest.approx(0.6)
    small = torch.zeros(1, pairs, dtype=F64)
    small[0, 0] = 1e-3
    assert widest(small) == pytest.approx(1e-3, rel=1e-5), "theta is in radians while it is small"


def test_a_saturated_angle_keeps_its_gradient_finite() -> None:
    model = single()
    adapter = attach(model, ROWS["antipasto"])
    with torch.no_grad():
        tensors_at(model, "linear")["lora_theta"].fill_(1e4)
    model(normal(4, 10)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


# --- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["wanda", "act_only", "cho_rej_min_std"])
def test_directions_are_pissas_choice_and_cost_one_svd_a_layer(score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, svd = mlp(), [0], torch.linalg.svd

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return svd(*args, **kwargs)

    config = ll.AntiPaSTOConfig(r=4, block_size=2, selection_score=score)
    data = activations(model, config)
    monkeypatch.setattr(torch.linalg, "svd", counted)
    adapter = ll.attach(model, config, calibration_data=data, name="turned")
    assert calls[0] == len(adapter.targets)
    monkeypatch.undo()
    same = ll.attach(model, ll.PiSSAConfig(r=4, train="spectrum", selection_score=score), calibration_data=data, name="pissa")
    assert adapter.diagnostics == same.diagnostics
    for target in adapter.targets:
        assert same_bits(adapter.tensors()[target]["lora_Vh"], same.tensors()[target]["lora_Vh"])


def test_a_score_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match="needs calibration data"):
        ll.attach(mlp(), ll.AntiPaSTOConfig(r=4, selection_score="wanda"))


@pytest.mark.parametrize("kept", [ll.AntiPaSTOConfig(r=4, block_size=2), ll.SSVDConfig(r=4), ll.PiSSAConfig(r=4, train="spectrum")])
def test_later_rounds_leave_the_directions_of_kept_ones_out(kept: ll.AdapterConfig) -> None:
    model = mlp()
    first = randomise(ll.attach(model, kept, name="first"))
    second = ll.attach(model, ll.AntiPaSTOConfig(r=4, block_size=2), name="second", exclude_directions=[first])
    for target in first.targets:
        one, two = (a.tensors()[target]["lora_Vh"] for a in (first, second))
        assert_close(one @ two.T, torch.zeros(4, 4), tolerance=1e-5)
    hra = ll.attach(model, ll.HRAConfig(r=2), name="third")
    with pytest.raises(TypeError, match="hra"):
        ll.attach(model, ll.AntiPaSTOConfig(r=4), name="fourth", exclude_directions=[hra])


@pytest.mark.parametrize("name", ["antipasto", "antipasto-scored", "ssvd"])
def test_a_file_says_everything_and_reloads_on_a_fresh_model_bitwise(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama(), token_ids(2, 6)
    adapter = randomise(attach(model, VARIANTS[name]))
    adapter.save(tmp_path / "a.safetensors")
    with adapter(model, c=-0.7):
        want = model(input_ids=ids).logits
    monkeypatch.setattr(torch.linalg, "svd", None)  # loading takes no SVD
    fresh = llama()
    loaded = ll.load(fresh, tmp_path / "a.safetensors", c=-0.7)
    assert same_bits(fresh(input_ids=ids).logits, want) and loaded.config == VARIANTS[name].config


# --- the starts --------------------------------------------------------------------------------------------------------


def test_the_papers_start_is_beside_the_base_as_the_paper_draws_it() -> None:
    config = ll.AntiPaSTOConfig(r=300, block_size=300, init="paper")
    model = single(300, 310)
    base = model(normal(4, 300))
    adapter = attach(model, Row(config))
    p = {k: v.detach() for k, v in tensors_at(model, "linear").items()}
    assert p["lora_theta"].shape == (1, 300 * 299 // 2)
    assert float(p["lora_theta"].std()) == pytest.approx(math.sqrt(8) * 3e-3, rel=0.01)
    assert float(p["lora_dS"].mean()) == pytest.approx(4e-4, rel=0.2) and float(p["lora_dS"].std()) == pytest.approx(4e-4, rel=0.2)
    assert not same_bits(model(normal(4, 300)), base)
    with torch.no_grad():  # a loss between +c and -c has a slope here, and none at the base

        def apart(c: float) -> Tensor:
            with adapter(model, c=c):
                return model(normal(4, 300))

        assert (apart(1.0) - apart(-1.0)).norm() > 1e-3 * base.norm()


def test_ranks_and_blocks_fit_every_layer_by_the_stated_rule() -> None:
    config = ll.AntiPaSTOConfig(r=10, block_size=4)
    fitted = [config.at("", d_in, d_out) for d_in, d_out in ((64, 64), (9, 64), (64, 3), (6, 6))]
    assert [(cfg.r, cfg.block_size) for cfg in fitted] == [(8, 4), (8, 4), (3, 3), (4, 4)]
    assert ll.SSVDConfig(r=32).at("", 64, 9).r == 9
    for refused in (config, ll.SSVDConfig()):
        with pytest.raises(ValueError, match="one direction cannot turn"):
            ll.attach(single(1, 4), refused)


BAD: list[tuple[type[ll.AdapterConfig], dict[str, Any], str]] = [
    (ll.AntiPaSTOConfig, {"rotate": "W"}, r"rotate must be one of \('V', 'U'\)"),
    (ll.AntiPaSTOConfig, {"init": "random"}, "init must be one of"),
    (ll.AntiPaSTOConfig, {"selection_score": "best"}, "selection_score must be one of"),
    (ll.AntiPaSTOConfig, {"block_size": 1}, "block_size must be a whole number from 2"),
    (ll.AntiPaSTOConfig, {"r": 3}, "r must be at least block_size=4, got 3"),
    (ll.AntiPaSTOConfig, {"rank_pattern": {"q_proj": 2}}, "r must be at least block_size=4, got 2"),
    (ll.AntiPaSTOConfig, {"max_angle": math.pi}, "max_angle must be between 0 and pi"),
    (ll.AntiPaSTOConfig, {"max_angle": math.nan}, "max_angle"),
    (ll.SSVDConfig, {"cayley": "neumann"}, "first-order"),
]


@pytest.mark.parametrize(("config", "fields", "says"), BAD, ids=[f"{c.variant}-{next(iter(f))}" for c, f, _ in BAD])
def test_what_cannot_be_meant_is_refused_when_the_config_is_made(config: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        checked_again(config(), fields)


def test_a_small_step_survives_bfloat16() -> None:
    """(S + dS) - S in bfloat16 would lose a step of 1e-3 beside S = 1; the core never takes that difference."""
    cfg = dataclasses.replace(ROWS["antipasto"].config.at("", 10, 14), r=6)
    p = {k: v.detach() for k, v in attached("antipasto", torch.float32)[2].items()}
    p |= {"lora_dS": torch.full((6,), 1e-3), "lora_theta": torch.full((2, 3), 1e-3), "lora_S": torch.ones(6)}
    ready = antipasto.AntiPaSTO.prepare(cfg, p, Base(10, 14), 1.0)
    want = turning.cored(ready, normal(64, 10), 1.0)
    got = turning.cored({k: v.bfloat16() for k, v in ready.items()}, normal(64, 10).bfloat16(), 1.0)
    assert float((got.float() - want).norm() / want.norm()) < 0.02
    assert not ((p["lora_S"] + p["lora_dS"]).bfloat16() - p["lora_S"].bfloat16()).any(), "cast first, nothing would be left"


def test_the_generator_has_the_gradient_of_the_scatter_it_stands_for() -> None:
    upper = normal(3, 10, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: cayley.skew(u, 5), upper)
    assert torch.autograd.gradgradcheck(lambda u: cayley.skew(u, 5).sin(), upper)
    with torch.no_grad():
        assert_close(cayley.skew(upper, 5), cayley.scattered(upper, 5))
        assert_close(cayley.skew(upper, 5)[1], references.skew_of(upper[1], 5))


@pytest.mark.parametrize(("init", "kind"), [("zeros", "bitwise"), ("paper", "none")])
def test_a_fresh_one_is_as_near_to_the_base_as_its_config_declares(init: Any, kind: str) -> None:
    config, model, x = ll.AntiPaSTOConfig(r=4, block_size=2, init=init), single(), normal(5, 10)
    base = model(x)
    ll.attach(model, config, seed=0)
    assert ll.REGISTRY["antipasto"].identity_of(config).kind == kind
    assert torch.equal(model(x), base) == (kind == "bitwise")


@pytest.mark.parametrize("name", ["antipasto", "antipasto-u", "ssvd", "oft"])
def test_second_derivatives_are_exact_at_a_c_per_row(name: str) -> None:
    """With a c per row the solve was once exact in its first derivatives only: gradient penalties were wrong without a word."""
    model = single(dtype=F64)
    adapter = randomise(attach(model, dataclasses.replace(VARIANTS[name], config=small(name)), dtype=F64), std=0.4)
    names, values = zip(*adapter.named_parameters(), strict=True)
    dose = torch.tensor((0.5, -1.2), dtype=F64, requires_grad=True)
    x = normal(2, 1, 10, seed=5, dtype=F64).requires_grad_()

    def out(x: Tensor, dose: Tensor, *values: Tensor) -> Tensor:
        with adapter(model, c=dose):
            return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)).sin()

    assert torch.autograd.gradgradcheck(out, (x, dose, *values))


def test_second_derivatives_are_exact_in_torch_func() -> None:
    model = single(dtype=F64)
    adapter = randomise(attach(model, VARIANTS["ssvd"], dtype=F64), std=0.4)
    x = normal(2, 3, 10, seed=5, dtype=F64)

    def loss(values: dict[str, Tensor], c: Any) -> Tensor:
        with adapter(model, c=c):
            return torch.func.functional_call(model, values, (x,)).sin().sum()

    values = {n: p.detach() for n, p in adapter.named_parameters()}
    row = torch.full((2,), 0.7, dtype=F64)
    one = torch.func.hessian(lambda v: loss(v, 0.7))(values)
    each = torch.func.hessian(lambda v: loss(v, row))(values)
    for n in values:
        for k in values:
            assert_close(each[n][k], one[n][k], f"{n}, {k}")


def small(name: str) -> ll.AdapterConfig:
    config = VARIANTS[name].config
    return dataclasses.replace(config, block_size=5) if name.startswith("oft") else config
