"""Are the reference formulas themselves right? Each is held to a property its paper states, and each deliberate mistake must show."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tests import references
from tests.models import normal
from tests.references import assert_close, assert_differs, error, same_bits

D_OUT, D_IN, R = 14, 10, 3
CONFIG = SimpleNamespace(alpha=6.0, alpha_pattern={}, rslora=False, train="factors", feedforward=("down",))


def weights() -> tuple[Tensor, Tensor, Tensor]:
    f64 = torch.float64
    return normal(D_OUT, D_IN, seed=1, dtype=f64), normal(D_OUT, seed=2, dtype=f64), normal(5, D_IN, seed=3, dtype=f64)


def pair(seed: int = 4) -> dict[str, Tensor]:
    return {"lora_A": normal(R, D_IN, seed=seed, dtype=torch.float64), "lora_B": normal(D_OUT, R, seed=seed + 1, dtype=torch.float64)}


def test_dora_gives_every_row_of_the_weight_the_length_of_its_magnitude() -> None:
    W, _, _ = weights()
    dm = normal(D_OUT, seed=9, std=0.1, dtype=torch.float64)
    tuned = references.dora(W, None, pair() | {"lora_m": dm}, CONFIG, torch.eye(D_IN, dtype=torch.float64), 1.0).T
    assert_close(tuned.norm(dim=1), W.norm(dim=1) + dm)
    V = W + CONFIG.alpha / R * pair()["lora_B"] @ pair()["lora_A"]
    assert_close(tuned / tuned.norm(dim=1, keepdim=True), V / V.norm(dim=1, keepdim=True), "DoRA's directions")


def test_doras_norm_is_a_constant_for_gradients_only() -> None:
    W, b, x = weights()

    def run(wrong: bool) -> tuple[Tensor, Tensor]:
        t = {k: v.requires_grad_() for k, v in (pair() | {"lora_m": torch.zeros(D_OUT, dtype=torch.float64)}).items()}
        y = references.dora(W, b, t, CONFIG, x, 1.0, wrong_norm=wrong)
        return y, torch.autograd.grad(y.square().sum(), t["lora_A"])[0]

    (right, right_grad), (wrong, wrong_grad) = run(False), run(True)
    assert_close(wrong, right)
    assert_differs(wrong_grad, right_grad)


def test_pissa_starts_at_the_base_and_moves_as_lora_on_the_residual() -> None:
    W, b, x = weights()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:R] / (CONFIG.alpha / R)).sqrt()
    start = {"lora_A0": root[:, None] * Vh[:R], "lora_B0": U[:, :R] * root}
    still = start | {"lora_A": torch.zeros(R, D_IN, dtype=torch.float64), "lora_B": torch.zeros(D_OUT, R, dtype=torch.float64)}
    assert_close(references.pissa(W, b, still, CONFIG, x, 1.0), linear(x, W, b))
    s, d = CONFIG.alpha / R, pair()
    moved = s * (d["lora_B"] @ start["lora_A0"] + start["lora_B0"] @ d["lora_A"] + d["lora_B"] @ d["lora_A"])
    assert_close(references.pissa(W, b, start | d, CONFIG, x, 1.0), linear(x, W + moved, b))


def test_the_spectral_form_is_an_edit_of_singular_values() -> None:
    W, b, x = weights()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    dS = normal(R, seed=5, std=0.1, dtype=torch.float64)
    edited = U @ torch.diag(torch.cat([S[:R] + dS, S[R:]])) @ Vh
    t = {"lora_U": U[:, :R], "lora_dS": dS, "lora_Vh": Vh[:R]}
    got = references.pissa(W, b, t, SimpleNamespace(train="spectrum"), x, 1.0)
    assert_close(got, linear(x, edited, b))


def test_ia3_gates_the_bias_and_its_input_form_does_not() -> None:
    W, b, x = weights()
    l_out, l_in = normal(D_OUT, seed=6, dtype=torch.float64), normal(D_IN, seed=7, dtype=torch.float64)
    got = references.ia3(W, b, {"lora_l": l_out}, CONFIG, x, 1.0)
    assert_close(got, (x @ W.T + b) * (1 + l_out))
    assert_close(references.ia3_ff(W, b, {"lora_l": l_in}, CONFIG, x, 1.0), x @ (W * (1 + l_in)).T + b)
    assert_close(references.ia3(W, b, {"lora_l": l_in}, CONFIG, x, 1.0, "layers.0.down"), x @ (W * (1 + l_in)).T + b)
    assert_differs(references.ia3(W, b, {"lora_l": l_out}, CONFIG, x, 1.0, wrong_bias=True), got)


def turned(name: str, c: float, **fields: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, S + c dS and Vh of the base's own SVD, and the weight that a formula makes of them at c."""
    W, _, _ = weights()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    t = {"lora_U": U[:, :4], "lora_S": S[:4], "lora_Vh": Vh[:4], "lora_dS": normal(4, seed=5, std=0.1, dtype=torch.float64)}
    t |= {"lora_theta": normal(2, 1, seed=6, dtype=torch.float64), "lora_K": normal(6, seed=6, dtype=torch.float64)}
    cfg = SimpleNamespace(**{"rotate": "V", "max_angle": 1.0, "cayley": "exact"} | fields)
    made = references.REFERENCES[name](W, None, t, cfg, torch.eye(D_IN, dtype=torch.float64), c).T
    return U, torch.cat([S[:4] + c * t["lora_dS"], S[4:]]), Vh, made


@pytest.mark.parametrize("c", [1.0, -0.7])
@pytest.mark.parametrize(("name", "side"), [("antipasto", "V"), ("antipasto", "U"), ("ssvd", "V")])
def test_a_turned_spectrum_keeps_its_singular_values_and_one_side(name: str, side: str, c: float) -> None:
    U, moved, Vh, made = turned(name, c, rotate=side)
    assert_close(torch.linalg.svdvals(made), moved.sort(descending=True).values, "a rotation changes no singular value")
    kept = U.T @ made if side == "V" else (made @ Vh.T).T
    assert_close(kept @ kept.T, torch.diag(moved.square()), "the side that does not turn still has orthogonal directions")
    assert_differs(made, (U * moved) @ Vh, "nothing turned")
    assert_close(made @ Vh[4:].T, U[:, 4:] * moved[4:], "what was not chosen")


def test_the_first_order_form_is_no_rotation() -> None:
    _, moved, _, made = turned("ssvd", 1.0, cayley="first-order")
    assert_differs(torch.linalg.svdvals(made), moved.sort(descending=True).values)


def test_lora_scales_by_alpha_over_r_or_its_root_and_the_first_pattern_wins() -> None:
    W, b, x = weights()
    t, update = pair(), pair()["lora_B"] @ pair()["lora_A"]

    def expected(s: float) -> Tensor:
        return linear(x, W + s * update, b)

    assert_close(references.lora(W, b, t, CONFIG, x, 1.0), expected(6.0 / R))
    rooted = SimpleNamespace(alpha=6.0, rslora=True, alpha_pattern={"q": 1.0, r"blocks\.1\..*": 12.0, "k": 5.0})
    assert_close(references.lora(W, b, t, rooted, x, 1.0, "blocks.1.k"), expected(12.0 / math.sqrt(R)))
    assert_close(references.lora(W, b, t, rooted, x, 1.0, "blocks.11.kq"), expected(6.0 / math.sqrt(R)))
    assert_differs(references.lora(W, b, t, CONFIG, x, 1.0, wrong_scale=R / math.sqrt(R)), expected(6.0 / R))


# What else each formula wants: shapes of tensors, and fields of the config.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "ia3_ff": {"lora_l": (D_IN,)},
    "hra": {"lora_u": (D_IN, R)},
    "hra_gs": {"lora_u": (D_IN, R)},
    "road": {"lora_theta": (D_OUT,), "lora_alpha": (D_OUT,)},
    "oft": {"lora_Q": (2, 10)},
    "delora": {"lora_lambda": (1,)},
    "miss": {"lora_M": (R, D_OUT)},
    "lora_xs": {"lora_R": (R, R)},
    "adalora": {"lora_E": (R,)},
    "shared": {"lora_core": (R, R)},
    "vera": {"lora_d": (R,), "lora_b": (D_OUT,)},
    "antipasto": {"lora_U": (D_OUT, 4), "lora_S": (4,), "lora_Vh": (4, D_IN), "lora_dS": (4,), "lora_theta": (2, 1)},
    "ssvd": {"lora_U": (D_OUT, R), "lora_S": (R,), "lora_Vh": (R, D_IN), "lora_dS": (R,), "lora_K": (R,)},
}
FIELDS = {"road": {"kind": "road_2", "group_size": 8}, "oft": {"cayley": "exact"}, "delora": {"init": "paper", "strength": 1.5}}
FIELDS |= {"antipasto": {"rotate": "V", "max_angle": 1.0}, "ssvd": {"cayley": "exact"}}
FIELDS |= {"shared": {"train": "core", "rooms": {"": (R, R, R, 0.7, 0)}}}
TURNED = ("oft", "road", "antipasto", "ssvd")  # by an angle c theta: not in a line


@pytest.mark.parametrize("name", references.REFERENCES)
def test_at_c_zero_every_formula_is_the_base_and_c_moves_it(name: str) -> None:
    W, b, x = weights()
    t = pair() | {"lora_A0": pair(20)["lora_A"], "lora_B0": pair(20)["lora_B"]}
    shapes = {"lora_m": (D_OUT,), "lora_l": (D_OUT,)} | SHAPES.get(name, {})
    t |= {key: normal(*shape, seed=8, dtype=torch.float64) for key, shape in shapes.items()}
    formula, config = references.REFERENCES[name], SimpleNamespace(**vars(CONFIG) | FIELDS.get(name, {}))
    base, at = linear(x, W, b), {c: formula(W, b, t, config, x, c) for c in (0.0, 0.5, 1.0)}
    assert_close(at[0.0], base)
    assert_differs(at[1.0], base)
    halfway = (base + at[1.0]) / 2
    if name in TURNED:
        assert_differs(at[0.5], halfway, "a turn is not in a line")
    else:
        assert_close(at[0.5], halfway, "it moves in a line at one layer")


def test_closeness_and_bits_see_what_they_must() -> None:
    one = torch.ones(2)
    assert error(torch.tensor([1.0, math.nan]), one) == math.inf
    assert same_bits(torch.tensor([math.nan]), torch.tensor([math.nan])) and not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(one, one.double())
    with pytest.raises(AssertionError, match="shapes differ"):
        error(one, torch.ones(2, 1))  # broadcasting would hide a row too many
    with pytest.raises(AssertionError, match="more than"):
        assert_close(one * 1.001, one)
    with pytest.raises(AssertionError, match="pass unseen"):
        assert_differs(one, one)
