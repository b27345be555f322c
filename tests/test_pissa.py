"""Is our PiSSA the paper's without touching W, and does each selection score pick the directions its formula says?"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger
from torch import Tensor, nn
from torch.nn.functional import linear

import lora_lite as ll
from lora_lite.variants.pissa import PiSSA, Spectrum
from tests.models import activations, checked_again, generator, llama, mlp, normal, randomise
from tests.references import assert_close, assert_differs, error, same_bits

pytestmark = pytest.mark.fast

F64 = torch.float64
D_OUT, D_IN, R, K = 14, 10, 4, 10
ALPHA = 6.0
SCALE = ALPHA / R


def weight(d_out: int = D_OUT, d_in: int = D_IN, dtype: torch.dtype = F64) -> Tensor:
    return normal(d_out, d_in, seed=1, dtype=dtype)


def config(**fields: Any) -> ll.PiSSAConfig:
    return ll.PiSSAConfig(**({"r": R, "alpha": ALPHA, "dtype": F64} | fields))


def start(cfg: ll.PiSSAConfig, W: Tensor, spectrum: Spectrum | None = None) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A fresh adapter's tensors on W, and its notes."""
    base = ll.Base(W.shape[1], W.shape[0], W)
    own = cfg.at("layer", W.shape[1], W.shape[0])
    made = PiSSA.init(own, base, spectrum or PiSSA.observe(own, base, None), generator(0))
    specs = PiSSA.param_specs(W.shape[1], W.shape[0], own)
    return {name: made.tensors.get(name, spec.init(spec.shape, generator(0))) for name, spec in specs.items()}, dict(made.notes)


def update(cfg: ll.PiSSAConfig, p: dict[str, Tensor]) -> Tensor:
    return PiSSA.factors(cfg, p, ll.Base(D_IN, D_OUT)).dense()


# --- the factors ------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """PiSSA as published: the weight is replaced by W - s B0 A0, and s B A is trained beside it."""

    def __init__(self, base: nn.Linear, r: int, s: float) -> None:
        super().__init__()
        U, S, Vh = torch.linalg.svd(base.weight.detach(), full_matrices=False)
        root = (S[:r] / s).sqrt().diag()
        self.A, self.B, self.s = nn.Parameter(root @ Vh[:r]), nn.Parameter(U[:, :r] @ root), s
        self.W, self.b = base.weight.detach() - s * self.B.detach() @ self.A.detach(), base.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.W, self.b) + self.s * linear(linear(x, self.A), self.B)


def published(model: nn.Module, r: int, s: float) -> tuple[nn.Module, dict[str, Residual]]:
    model = copy.deepcopy(model)
    layers = {name: Residual(layer, r, s) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return model, layers


def test_the_differences_are_the_published_function_with_the_published_gradients_along_a_training_run() -> None:
    x, goal = normal(9, 12, seed=3, dtype=F64), normal(9, 12, seed=4, dtype=F64)
    base = mlp(F64)
    theirs, layers = published(base, R, SCALE)
    adapter = ll.attach(base, config())
    ours = adapter.tensors()
    signs_agree = [same(ours[name]["lora_B0"] @ ours[name]["lora_A0"], layer.B @ layer.A) for name, layer in layers.items()]
    assert all(signs_agree) and len(layers) == 6

    def gradients(model: nn.Module, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad((model(x) - goal).square().mean(), parameters)

    for _ in range(4):
        assert_close(base(x), theirs(x), "outputs")
        mine = [ours[name][field] for name in layers for field in ("lora_A", "lora_B")]
        other = [p for layer in layers.values() for p in (layer.A, layer.B)]
        for p, q, g, h in zip(mine, other, gradients(base, mine), gradients(theirs, other), strict=True):
            assert_close(g, h, "gradients", tolerance=1e-10)
            with torch.no_grad():
                p -= 0.5 * g
                q -= 0.5 * h
    assert_differs(theirs(x), mlp(F64)(x), "the run")  # it went somewhere
    first_order = {  # the mistake that gradients at the start would not show: s (dB A0 + B0 dA)
        name: SCALE * (t["lora_B"] @ t["lora_A0"] + t["lora_B0"] @ t["lora_A"]) for name, t in ours.items()
    }
    assert max(error(first_order[name], adapter.factors()[name].dense()) for name in layers) > 1e-3


def same(a: Tensor, b: Tensor) -> bool:
    return error(a, b) < 1e-10


def test_what_is_frozen_is_the_best_approximation_of_the_weight() -> None:
    W = weight()
    p, notes = start(config(), W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert_close(SCALE * p["lora_B0"] @ p["lora_A0"], U[:, :R] * S[:R] @ Vh[:R])
    assert_close(p["lora_A0"].norm(dim=1), p["lora_B0"].norm(dim=0), "the two halves of each singular value")
    assert notes == {"tail_depth": 0.0}
    assert not p["lora_A"].any() and not p["lora_B"].any() and not update(config(), p).any()
    assert not [name for name, spec in PiSSA.param_specs(D_IN, D_OUT, config()).items() if name.endswith("0") == spec.trainable]


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32, F64])
def test_the_decomposition_is_float32_at_least_and_leaves_the_weight_alone(weights: torch.dtype) -> None:
    W = weight(dtype=weights)
    kept = W.clone()
    p, _ = start(config(), W)
    assert same_bits(W, kept)
    assert p["lora_A0"].dtype is (F64 if weights is F64 else torch.float32)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    assert_close(SCALE * p["lora_B0"] @ p["lora_A0"], (U[:, :R] * S[:R] @ Vh[:R]).to(p["lora_B0"].dtype))


def test_in_bfloat16_the_differences_keep_small_updates_that_subtracting_the_start_loses() -> None:
    W, x = weight(256, 192), normal(64, 192, seed=2, dtype=F64)
    cfg = config(r=16, alpha=32.0)
    p, _ = start(cfg, W)
    p |= {"lora_A": normal(16, 192, seed=5, std=1e-4, dtype=F64), "lora_B": normal(256, 16, seed=6, std=1e-4, dtype=F64)}
    A, B, A0, B0 = p["lora_A0"] + p["lora_A"], p["lora_B0"] + p["lora_B"], p["lora_A0"], p["lora_B0"]
    want = cfg.scaling * (x @ A.T @ B.T - x @ A0.T @ B0.T)

    def low(t: Tensor) -> Tensor:
        return t.to(torch.bfloat16)

    subtracted = cfg.scaling * (linear(linear(low(x), low(A)), low(B)) - linear(linear(low(x), low(A0)), low(B0)))
    kept = PiSSA.factors(cfg, p, ll.Base(192, 256))
    differences = kept.g * linear(linear(low(x), low(kept.A)), low(kept.B))
    lost, left = relative(subtracted, want), relative(differences, want)
    assert lost > 1.0, f"subtracting after the cast should lose the update altogether, its error is {lost:.1%}"
    assert left < 0.01, f"the differences should keep it, their error is {left:.1%}"


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


# --- the spectrum -----------------------------------------------------------------------------------------------------


def test_spectrum_moves_the_chosen_singular_values_and_nothing_else() -> None:
    W, cfg = weight(), config(train="spectrum")
    p, _ = start(cfg, W)
    assert not p["lora_dS"].any()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    p["lora_dS"] = normal(R, seed=3, dtype=F64)
    moved = S.clone()
    moved[:R] += p["lora_dS"]
    assert_close(W + update(cfg, p), U * moved @ Vh)
    assert not [name for name, spec in PiSSA.param_specs(D_IN, D_OUT, cfg).items() if spec.trainable != (name == "lora_dS")]


def test_in_bfloat16_a_spectral_dose_on_the_residual_is_far_off_and_beside_the_weight_it_is_not() -> None:
    W, x, cfg = weight(256, 192), normal(64, 192, seed=2, dtype=F64), config(r=16, train="spectrum")
    p, _ = start(cfg, W)
    U, Vh, dS = p["lora_U"], p["lora_Vh"], normal(16, seed=3, std=0.04, dtype=F64) + 0.04
    S = torch.linalg.svdvals(W)[:16]
    want = x @ Vh.T * dS @ U.T

    def low(t: Tensor) -> Tensor:
        return t.to(torch.bfloat16)

    residual = low(W - U * S @ Vh)
    rewritten = linear(low(x), residual).double() + linear(low(linear(low(x), low(Vh)) * (S + dS)), low(U)).double() - low(x).double() @ W.T
    beside = linear(low(linear(low(x), low(Vh)) * dS), low(U))
    assert relative(rewritten, want) > 0.2
    assert relative(beside, want) < 0.01


def test_a_normal_start_draws_from_the_origins_distribution_and_is_not_the_base() -> None:
    cfg = config(r=4096, train="spectrum", ds_init="normal")
    draw = PiSSA.param_specs(5000, 5000, cfg)["lora_dS"].init((4096,), generator(0))
    assert abs(float(draw.mean()) - 0.04) < 0.003 and abs(float(draw.std()) - 0.04) < 0.003
    assert same_bits(draw, PiSSA.param_specs(5000, 5000, cfg)["lora_dS"].init((4096,), generator(0)))
    model, x = mlp(F64), normal(3, 12, seed=2, dtype=F64)
    before = model(x)
    ll.attach(model, config(train="spectrum"), name="zeros", seed=0)
    assert same_bits(model(x), before)
    ll.attach(model, config(train="spectrum", ds_init="normal"), name="normal", seed=0)
    assert_differs(model(x), before)


# --- which directions -------------------------------------------------------------------------------------------------


def poles(n: int = 60, d_in: int = D_IN) -> dict[str, Tensor]:
    """Two clouds with a centre and widths of their own along W's directions, so that the four scores disagree."""
    Vh = torch.linalg.svd(weight(d_in=d_in), full_matrices=False)[2]
    k = len(Vh)
    rise, fall = torch.linspace(0.1, 3.0, k, dtype=F64), torch.linspace(3.0, 0.2, k, dtype=F64).roll(3)
    centre = torch.linspace(-4.0, 4.0, k, dtype=F64)
    cho = (normal(n, k, seed=11, dtype=F64) * rise + centre) @ Vh
    return {"cho": cho, "rej": (normal(n // 2, k, seed=12, dtype=F64) * fall) @ Vh}


def by_hand(score: str, W: Tensor, data: dict[str, Tensor]) -> Tensor:
    """The score of each direction, from the formulas of ORIGINS.md A and everything at once."""
    _, S, Vh = torch.linalg.svd(W, full_matrices=False)
    z = {name: x @ Vh.T for name, x in data.items()}
    reach = torch.cat(list(z.values())).abs().mean(0)
    return {
        "s_only": lambda: S,
        "wanda": lambda: S * reach,
        "act_only": lambda: reach,
        "cho_rej_min_std": lambda: torch.minimum(torch.std(z["cho"], dim=0), torch.std(z["rej"], dim=0)),
    }[score]()


def picked(score: Tensor, r: int = R) -> list[int]:
    return sorted(score.topk(r).indices.tolist())


def fed(W: Tensor, data: dict[str, Tensor], size: int = 7, exclude: Tensor | None = None) -> Spectrum:
    spectrum = Spectrum(W, exclude)
    for group, x in data.items():
        for batch in x.split(size):
            spectrum.update(batch, group)
    return spectrum


SCORES = ("s_only", "wanda", "act_only", "cho_rej_min_std")


@pytest.mark.parametrize("score", SCORES)
def test_a_score_streamed_in_batches_is_its_formula_and_picks_its_directions(score: str) -> None:
    W, data = weight(), poles()
    spectrum = fed(W, data)
    assert_close(spectrum.score(score), by_hand(score, W, data))
    want = picked(by_hand(score, W, data))
    assert spectrum.choose(score, R).tolist() == want
    p, notes = start(config(train="spectrum", selection_score=score), W, spectrum)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    assert_close((p["lora_Vh"] @ Vh.T).abs(), torch.eye(K, dtype=F64)[want], "the chosen directions")
    assert_close((U.T @ p["lora_U"]).abs().T, torch.eye(K, dtype=F64)[want], "their outputs")
    assert notes["tail_depth"] == pytest.approx((sum(want) / R - (R - 1) / 2) / (K - R))
    f, _ = start(config(selection_score=score), W, spectrum)
    assert_close(SCALE * f["lora_B0"] @ f["lora_A0"], U[:, want] * torch.linalg.svdvals(W)[want] @ Vh[want])


def test_the_scores_disagree_on_these_data() -> None:
    """The control of the test above: with any other score's formula it would fail."""
    choices = [tuple(picked(by_hand(score, weight(), poles()))) for score in SCORES]
    assert len(set(choices)) == len(SCORES)
    wrong = torch.maximum(*(torch.std(x @ torch.linalg.svd(weight(), full_matrices=False)[2].T, dim=0) for x in poles().values()))
    assert picked(wrong) != picked(by_hand("cho_rej_min_std", weight(), poles()))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.sampled_from(SCORES))
def test_how_the_data_was_cut_into_batches_does_not_matter(cuts: list[int], score: str) -> None:
    W, data = weight(), poles()
    spectrum = Spectrum(W)
    for group, x in data.items():
        edges = sorted({0, len(x), *(c for c in cuts if c < len(x))})
        for lo, hi in pairwise(edges):
            spectrum.update(x[lo:hi], group)
        spectrum.update(x[:0], group)  # a batch that was all padding
    assert_close(spectrum.score(score), by_hand(score, W, data))


def test_poles_are_pooled_token_by_token_where_a_score_knows_no_poles() -> None:
    W, data = weight(), poles()
    assert_close(fed(W, data).score("act_only"), fed(W, {"all": torch.cat([data["cho"], data["rej"]])}).score("act_only"))
    of_means = torch.stack([fed(W, {"all": x}).score("act_only") for x in data.values()]).mean(0)
    assert_differs(of_means, fed(W, data).score("act_only"), "the mean of the poles' means")


def test_the_deviation_survives_a_large_mean_that_the_textbook_difference_does_not() -> None:
    W = torch.eye(K, dtype=F64).flip(0) * torch.linspace(2, 1, K, dtype=F64)
    narrow = {name: normal(50, K, seed=i, std=1e-3, dtype=F64) + 1e6 for i, name in enumerate(("cho", "rej"))}
    want = torch.minimum(*(torch.std(x @ torch.linalg.svd(W)[2].T, dim=0) for x in narrow.values()))
    got = fed(W, narrow).score("cho_rej_min_std")
    assert float((got / want - 1).abs().max()) < 1e-6
    z = narrow["cho"] @ torch.linalg.svd(W)[2].T
    textbook = ((z.square().sum(0) - z.sum(0).square() / len(z)) / (len(z) - 1)).clamp_min(0).sqrt()
    assert float((textbook / torch.std(z, dim=0) - 1).abs().max()) > 1e-2


def test_statistics_take_the_same_memory_whatever_was_streamed() -> None:
    def numbers(spectrum: Spectrum) -> int:
        return sum(t.numel() for moments in spectrum.groups.values() for t in vars(moments).values() if isinstance(t, Tensor))

    assert numbers(fed(weight(), poles(20))) == numbers(fed(weight(), poles(2000))) == 2 * 3 * K


@pytest.mark.parametrize(
    ("score", "data", "says"),
    [
        ("wanda", {}, "given: none"),
        ("act_only", {}, "given: none"),
        ("cho_rej_min_std", {}, r"\['cho', 'rej'\]; given: none"),
        ("cho_rej_min_std", {"all": 9}, r"\['cho', 'rej'\]; given: 9 of 'all'"),
        ("cho_rej_min_std", {"cho": 9}, "given: 9 of 'cho'"),
        ("cho_rej_min_std", {"cho": 9, "rej": 1}, "given: 9 of 'cho', 1 of 'rej'"),
        ("wanda", {"all": 1}, "given: 1 of 'all'"),
    ],
)
def test_a_score_without_the_data_it_needs_says_what_it_needs_and_what_it_got(score: str, data: dict[str, int], says: str) -> None:
    spectrum = fed(weight(), {name: normal(n, D_IN, dtype=F64) for name, n in data.items()})
    with pytest.raises(ValueError, match=f"selection_score='{score}' needs calibration data.*{says}"):
        spectrum.choose(score, R)
    assert spectrum.choose("s_only", R).tolist() == [0, 1, 2, 3]  # which needs none


def test_a_weight_that_is_not_finite_has_no_directions() -> None:
    W = weight()
    W[2, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        Spectrum(W)


def test_only_the_scores_that_look_at_activations_need_calibration() -> None:
    assert [PiSSA.needs_calibration(config(selection_score=score)) for score in SCORES] == [False, True, True, True]


# --- directions in use ------------------------------------------------------------------------------------------------


def test_directions_in_use_are_left_out() -> None:
    W = weight()
    Vh = torch.linalg.svd(W, full_matrices=False)[2]
    assert Spectrum(W, Vh[[0, 2]]).choose("s_only", R).tolist() == [1, 3, 4, 5]
    assert Spectrum(W).choose("s_only", R).tolist() == [0, 1, 2, 3]
    assert fed(W, poles(), exclude=Vh[picked(by_hand("wanda", W, poles()))[:1]]).choose("wanda", R).tolist() != picked(
        by_hand("wanda", W, poles())
    )


@pytest.mark.parametrize(("overlap", "used"), [(0.4, False), (0.6, True)])
def test_a_direction_is_in_use_when_more_than_half_of_it_is(overlap: float, used: bool) -> None:
    W = weight()
    Vh = torch.linalg.svd(W, full_matrices=False)[2]
    leaning = math.sqrt(overlap) * Vh[0] + math.sqrt(1 - overlap) * torch.stack([Vh[6], Vh[7]]).sum(0) / math.sqrt(2)
    assert (0 not in Spectrum(W, leaning[None]).choose("s_only", R).tolist()) is used


def test_what_counts_is_the_span_and_not_the_rows_it_is_written_in() -> None:
    """Rows of zeros (untrained differences), short rows, repeated rows and mixtures leave the same directions out."""
    W = weight()
    Vh = torch.linalg.svd(W, full_matrices=False)[2]
    mixed = torch.cat(
        [normal(2, 2, seed=3, dtype=F64) @ Vh[:2], torch.zeros(3, D_IN, dtype=F64), 1e-6 * Vh[:1], Vh[:2], Vh[:2].float().double()]
    )
    assert Spectrum(W, mixed).free().tolist() == [False, False, *[True] * (K - 2)]
    assert Spectrum(W, torch.zeros(3, D_IN, dtype=F64)).free().all() and Spectrum(W, torch.zeros(0, D_IN, dtype=F64)).free().all()
    leaning = math.sqrt(0.4) * Vh[0] + math.sqrt(0.3) * (Vh[6] + Vh[7])
    assert Spectrum(W, leaning.expand(3, -1)).free().all()
    assert float((leaning.expand(3, -1) @ Vh[0]).square().sum()) > 0.5  # the mistake: adding up over rows that are no basis


def test_more_directions_than_are_left_are_refused_with_the_counts() -> None:
    Vh = torch.linalg.svd(weight(), full_matrices=False)[2]
    with pytest.raises(ValueError, match="r=4 directions, exclude_directions leave 3 of 10"):
        Spectrum(weight(), Vh[:7]).choose("s_only", R)
    with pytest.raises(ValueError, match="width 3, this layer's inputs 10"):
        Spectrum(weight(), normal(2, 3, dtype=F64)).choose("s_only", R)


@pytest.mark.parametrize("train", ["factors", "spectrum"])
def test_rounds_of_attachments_use_directions_of_their_own(train: str) -> None:
    model, cfg = mlp(F64), config(r=3, train=train)
    first = randomise(ll.attach(model, cfg, name="first"), std=1e-6)
    second = ll.attach(model, cfg, name="second", exclude_directions=[first])
    repeated = ll.attach(model, cfg, name="repeated")
    rows = "lora_A0" if train == "factors" else "lora_Vh"
    for target in first.targets:
        one, two, again = (torch.nn.functional.normalize(a.tensors()[target][rows], dim=1) for a in (first, second, repeated))
        assert_close(one @ two.T, torch.zeros(3, 3, dtype=F64), f"overlap of the rounds at {target}")
        assert_close((one @ again.T).abs(), torch.eye(3, dtype=F64))
    with pytest.raises(ValueError, match=r"layers\.0\.up: asked for r=12 directions, exclude_directions leave"):
        ll.attach(model, dataclasses.replace(cfg, r=12), name="third", exclude_directions=[first, second])


def kept_lora(model: nn.Module, rows: Callable[[Tensor], Tensor]) -> ll.Adapter:
    """A LoRA whose A has these rows, made of each layer's right singular vectors."""
    kept = randomise(ll.attach(model, ll.LoRAConfig(r=2, dtype=F64), name="kept", seed=0))
    with torch.no_grad():
        for target, fields in kept.tensors().items():
            Vh = torch.linalg.svd(model.get_submodule(target).weight, full_matrices=False)[2]  # type: ignore[arg-type]
            fields["lora_A"].copy_(rows(Vh))
    return kept


def test_a_loras_rows_keep_matching_directions_out() -> None:
    """What a LoRA reads is the span of A's rows: mixtures of the first two singular vectors leave both out, whatever B is."""
    model = mlp(F64)
    kept = kept_lora(model, lambda Vh: torch.tensor([[2.0, 1.0], [-1.0, 0.1]], dtype=F64) @ Vh[:2])
    second = ll.attach(model, config(r=3), name="second", exclude_directions=[kept])
    for target, fields in second.tensors().items():
        Vh = torch.linalg.svd(model.get_submodule(target).weight, full_matrices=False)[2]  # type: ignore[arg-type]
        chosen = torch.nn.functional.normalize(fields["lora_A0"], dim=1) @ Vh.T
        assert chosen.abs().argmax(1).tolist() == [2, 3, 4], target
    assert 0.1 < second.diagnostics["left_out"] < 0.2  # 2 of 12


@pytest.mark.parametrize("after", [ll.PiSSAConfig(r=3), ll.AntiPaSTOConfig(r=4, block_size=2)], ids=lambda cfg: cfg.variant)
def test_a_lora_that_matches_no_direction_is_told(after: ll.AdapterConfig, said: list[str]) -> None:
    model = mlp(F64)
    kept = kept_lora(model, lambda Vh: Vh.mean(0).expand(2, -1))  # it leans to all of them alike
    second = ll.attach(model, after, name="second", exclude_directions=[kept])
    assert second.diagnostics["left_out"] == 0.0
    assert len(said) == 1 and "exclude_directions left out no direction" in said[0]


# --- how deep the picks lie -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "r", "depth"),
    [(range(4), 4, 0.0), (range(6, 10), 4, 1.0), (range(3, 7), 4, 0.5), (range(10), 99, 0.0)],
    ids=["top", "tail", "middle", "all"],
)
def test_tail_depth_runs_from_the_top_to_the_tail_by_the_clamped_rank(rows: range, r: int, depth: float) -> None:
    W = weight()
    Vh = torch.linalg.svd(W, full_matrices=False)[2]
    wide = torch.full((K,), 1e-3, dtype=F64)
    wide[list(rows)] = 5.0
    spectrum = fed(W, {"all": (normal(40, K, seed=5, dtype=F64) * wide) @ Vh})
    p, notes = start(config(r=r, selection_score="act_only", train="spectrum"), W, spectrum)
    assert notes["tail_depth"] == pytest.approx(depth)
    assert len(p["lora_dS"]) == min(r, K)


@pytest.mark.parametrize(
    ("score", "depth", "warns"),
    [("s_only", 0.0, False), ("wanda", 0.05, True), ("wanda", 0.051, False), ("cho_rej_min_std", 0.0, True), ("act_only", 0.6, False)],
)
def test_an_activation_score_that_picked_the_top_anyway_is_worth_a_warning(score: str, depth: float, warns: bool) -> None:
    said = PiSSA.check(config(selection_score=score), {"tail_depth": depth})
    assert (said is not None and "tail_depth" in said and score in said) if warns else said is None


def test_the_adapter_keeps_the_depth_and_the_log_tells_of_it() -> None:
    model, lines = mlp(), []
    cfg = config(r=3, selection_score="cho_rej_min_std", train="spectrum", dtype=torch.float32)
    handler = logger.add(lambda message: lines.append(str(message)), level="INFO", format="{level} {message}")
    logger.enable("lora_lite")
    try:
        adapter = ll.attach(model, cfg, activations(model, cfg))
        in_the_tail = adapter.diagnostics["tail_depth"]
        adapter.detach()
        assert 0.05 < in_the_tail <= 1.0 and any("tail_depth" in line for line in lines) and not any("WARNING" in line for line in lines)
        svd = {t.name: torch.linalg.svd(t.module.weight.detach(), full_matrices=False) for t in ll.find_targets(model, cfg)}
        top = {name: normal(40, len(S), seed=3) * (S / S[0]) ** 4 @ Vh for name, (_, S, Vh) in svd.items()}
        ll.attach(model, dataclasses.replace(cfg, selection_score="act_only", r=1), top).detach()
        assert [line for line in lines if line.startswith("WARNING") and "picked the top" in line]
    finally:
        logger.disable("lora_lite")
        logger.remove(handler)


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"train": "values"}, "train must be one of .*'values'"),
        ({"selection_score": "largest"}, "selection_score must be one of .*'largest'"),
        ({"ds_init": "ones", "train": "spectrum"}, "ds_init must be one of .*'ones'"),
        ({"ds_init": "normal"}, "ds_init='normal' is of train=\"spectrum\""),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha_pattern": {"up": -2.0}}, "alpha must be positive, got -2.0"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        checked_again(config(), fields)


def test_a_config_survives_json() -> None:
    cfg = config(train="spectrum", selection_score="wanda", ds_init="normal", rank_pattern={"up": 3}, alpha=-1.0)  # alpha is not used there
    assert ll.PiSSAConfig.from_dict(json.loads(cfg.to_json())) == cfg


@pytest.mark.parametrize(("d_in", "d_out", "r", "scaling"), [(12, 20, 9, 4.0 / 9), (5, 20, 5, 4.0 / 5), (20, 6, 6, 4.0 / 6)])
def test_the_rank_is_clamped_after_the_patterns_and_the_scale_follows(d_in: int, d_out: int, r: int, scaling: float) -> None:
    own = config(r=2, rank_pattern={"up": 9}, alpha_pattern={"up": 4.0}).at("layers.0.up", d_in, d_out)
    assert (own.r, own.scaling) == (r, pytest.approx(scaling))
    assert config(r=2, rank_pattern={"up": 9}).at("layers.0.down", d_in, d_out).r == 2


# --- on a language model ----------------------------------------------------------------------------------------------


def test_calibration_in_batches_equals_calibration_by_activations() -> None:
    """Padded batches of both poles through a Llama, and the same tokens' activations by hand."""
    cfg = config(selection_score="cho_rej_min_std", train="spectrum", targets=("q_proj", "down_proj"), dtype=torch.float32)
    ids = torch.randint(1, 128, (6, 9), generator=generator(3))
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [5], [1], [0], [7]])).long()
    batches = {
        "cho": [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:3]}],
        "rej": [{"input_ids": ids[3:], "attention_mask": mask[3:]}],
    }
    by_hand = {
        t.name: {pole: torch.cat([seen(llama(), t.name, b) for b in bs]) for pole, bs in batches.items()}
        for t in ll.find_targets(llama(), cfg)
    }
    one, two = ll.attach(llama(), cfg, batches), ll.attach(llama(), cfg, by_hand)
    for name, p in one.state_dict().items():
        assert_close(p, two.state_dict()[name], name)
    assert one.diagnostics == two.diagnostics
    padded = {
        pole: [{"input_ids": b["input_ids"], "attention_mask": torch.ones_like(b["input_ids"])} for b in bs] for pole, bs in batches.items()
    }
    unmasked = ll.attach(llama(), cfg, padded).state_dict()
    assert any(error(p, unmasked[name]) > 1e-3 for name, p in one.state_dict().items())


def seen(model: Any, target: str, batch: dict[str, Tensor]) -> Tensor:
    """The target's input at the tokens that are no padding, caught by a hook of the test's own."""
    caught: list[Tensor] = []
    catch: Callable[..., None] = lambda layer, args: caught.append(args[0].detach())  # noqa: E731
    handle = model.get_submodule(target).register_forward_pre_hook(catch)
    try:
        model(**batch)
    finally:
        handle.remove()
    mask = batch.get("attention_mask")
    return caught[0].flatten(0, 1) if mask is None else caught[0][mask.bool()]


@pytest.mark.parametrize("score", SCORES[1:])
def test_an_activation_score_without_data_is_refused_and_the_model_left_alone(score: str) -> None:
    model = mlp()
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="needs calibration data"):
        ll.attach(model, config(selection_score=score))
    assert all(p.requires_grad == before[name][0] and same_bits(p, before[name][1]) for name, p in model.named_parameters())
    assert list(before) == [name for name, _ in model.named_parameters()]
