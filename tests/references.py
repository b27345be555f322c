"""What must each method compute, and how near is equal? Dense formulas in float64, written from the papers and not from the library.

Everything forms the full d_out x d_in matrix, because that is what is plainly right; c is a number or a tensor that
broadcasts against the output. The `wrong_*` switches are the mistakes that the negative controls make on purpose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

# The one place where "equal" is given a number: the largest error relative to the largest value (or to 1).
TOLERANCE: dict[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
# A mistake must show up at least this much larger than what the tolerance lets through.
CONTROL = 1e-3

Tensors = Mapping[str, Tensor]


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest wanted value or to 1 when all are smaller. NaN counts as infinite."""
    if got.shape != want.shape:
        raise AssertionError(f"shapes differ: got {tuple(got.shape)}, want {tuple(want.shape)}")
    if got.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    worst = float((got - want).abs().max()) / max(1.0, float(want.abs().max()))
    return worst if math.isfinite(worst) else math.inf


def assert_close(got: Tensor, want: Tensor, what: str = "", tolerance: float | None = None) -> None:
    tolerance = TOLERANCE[want.dtype] if tolerance is None else tolerance
    found = error(got, want)
    assert found <= tolerance, f"{what or 'values'} differ by {found:.3g}, more than {tolerance:.3g}"


def assert_differs(got: Tensor, want: Tensor, what: str = "", least: float = CONTROL) -> None:
    found = error(got, want)
    assert found >= least, f"{what or 'values'} differ by only {found:.3g}: a mistake of this kind would pass unseen"


def bits(x: Tensor) -> Tensor:
    """The same memory as integers: NaN equals itself and -0.0 is not 0.0."""
    return x.detach().contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def scale(cfg: Any, target: str, r: int) -> float:
    """alpha / r, or alpha / sqrt r with rsLoRA; the first alpha_pattern that matches the end of the path replaces alpha (PEFT.md 4.4)."""
    alpha = next((a for key, a in cfg.alpha_pattern.items() if re.match(rf"(.*\.)?({key})$", target)), cfg.alpha)
    return alpha / math.sqrt(r) if getattr(cfg, "rslora", False) else alpha / r


def lora(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_scale: float = 1.0) -> Tensor:
    """arXiv:2106.09685 equation 3, and 2312.03732 for the root."""
    s = scale(cfg, target, t["lora_A"].shape[0]) * wrong_scale
    return linear(x, W, b) + c * linear(x, s * (t["lora_B"] @ t["lora_A"]))


def pissa_factors(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "") -> Tensor:
    """arXiv:2404.02948: (W - s B0 A0) x + s B A x at c = 1, with A = A0 + dA and B = B0 + dB; c moves from W in a line."""
    s = scale(cfg, target, t["lora_A"].shape[0])
    A, B = t["lora_A0"] + t["lora_A"], t["lora_B0"] + t["lora_B"]
    residual = W - s * (t["lora_B0"] @ t["lora_A0"])
    tuned = residual + s * (B @ A)
    return linear(x, W, b) + c * linear(x, tuned - W)


def pissa_spectrum(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "") -> Tensor:
    """W with some singular values moved: the singular directions u_k v_k^T each get dS_k more."""
    moved = sum(dS * torch.outer(u, v) for u, dS, v in zip(t["lora_U"].T, t["lora_dS"], t["lora_Vh"], strict=True))
    assert isinstance(moved, Tensor)
    return linear(x, W, b) + c * linear(x, moved)


def pissa(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "") -> Tensor:
    return {"factors": pissa_factors, "spectrum": pissa_spectrum}[cfg.train](W, b, t, cfg, x, c, target)


def ia3(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_bias: bool = False) -> Tensor:
    """arXiv:2205.05638 section 3.3 on an output: the whole output is gated, bias too. Stored as l - 1; the gate is 1 + c (l - 1).

    Where the layer's name says that it is of the feed-forward block, its input is gated.
    """
    if any(re.search(pattern, target) for pattern in cfg.feedforward):
        return ia3_ff(W, b, t, cfg, x, c)
    gate = 1 + c * t["lora_l"]
    return linear(x, W) * gate + b if wrong_bias and b is not None else linear(x, W, b) * gate


def ia3_ff(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "") -> Tensor:
    """The same on an input: the columns of W are gated, the bias is not."""
    return linear(x * (1 + c * t["lora_l"]), W, b)


def dora(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_norm: bool = False) -> Tensor:
    """arXiv:2402.09353 equation 5, its norm a constant for gradients (section 4.3); one magnitude per output row, bias untouched.

    m is stored as its distance from |W|. c moves from the base's output to DoRA's in a line.
    """
    s = scale(cfg, target, t["lora_A"].shape[0])
    V = W + s * (t["lora_B"] @ t["lora_A"])
    norm = V.norm(dim=1, keepdim=True)
    m = W.norm(dim=1, keepdim=True).detach() + t["lora_m"][:, None]
    tuned = m * V / (norm if wrong_norm else norm.detach())
    y = linear(x, W, b)
    return y + c * (linear(x, tuned, b) - y)


def hra(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_order: bool = False) -> Tensor:
    """arXiv:2405.17484 equation 3: W H_1 ... H_r, one reflection after the other; x moves to H x in a line."""
    columns = t["lora_u"].T.flip(0) if wrong_order else t["lora_u"].T
    H = torch.eye(W.shape[1], dtype=W.dtype)
    for u in columns:
        H = H @ (torch.eye(W.shape[1], dtype=W.dtype) - 2 * torch.outer(u, u) / u.square().sum())
    return linear(x + c * (linear(x, H) - x), W, b)


def hra_gs(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "") -> Tensor:
    """The same with each column made orthogonal to those before it: then the order does not matter."""
    directions: list[Tensor] = []
    for u in t["lora_u"].T:
        for q in directions:
            u = u - (q @ u) * q
        directions.append(u / u.norm())
    return hra(W, b, {"lora_u": torch.stack(directions, dim=1)}, cfg, x, c, target)


def road(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_pairs: bool = False) -> Tensor:
    """arXiv:2409.00119 equation 4, pair by pair: rotated by c theta, stretched by 1 + c (alpha - 1); alpha - 1 is stored."""
    y, n = linear(x, W, b), len(W) - len(W) % 2
    size = next(g for g in range(cfg.group_size, 0, -2) if n % g == 0)
    theta, alpha = (t[key] for key in ("lora_theta", "lora_alpha"))
    new = list(y.unbind(-1))
    c = c[..., 0] if isinstance(c, Tensor) and c.dim() else c
    for start in range(0, n, size):
        for k in range(size // 2):
            i, j = (start + 2 * k, start + 2 * k + 1) if wrong_pairs else (start + k, start + k + size // 2)
            for here, there, sign, half in ((i, j, -1, 0), (j, i, 1, 1)):
                if cfg.kind == "road_4":
                    place = 2 * start + half * size // 2 + k
                    own, other = place, place + size
                else:
                    own = other = start // 2 + k if cfg.kind == "road_1" else start + half * size // 2 + k
                kept = (1 + c * alpha[own]) * torch.cos(c * theta[own]) * y[..., here]
                new[here] = kept + sign * (1 + c * alpha[other]) * torch.sin(c * theta[other]) * y[..., there]
    return torch.stack(new, dim=-1)


def oft(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_way: bool = False) -> Tensor:
    """arXiv:2306.07280 section 3.3 and 2506.19847: x R with R = (I + cQ)(I - cQ)^-1 per block, the inverse as PEFT truncates it."""
    n, numbers = t["lora_Q"].shape
    size = W.shape[1] // n
    assert numbers == size * (size - 1) // 2
    eye = torch.eye(size, dtype=W.dtype)
    blocks = []
    for upper in t["lora_Q"]:
        Q, k = torch.zeros_like(eye), 0
        for i in range(size):
            for j in range(i + 1, size):
                unit = torch.outer(eye[i], eye[j])
                Q, k = Q + upper[k] * (unit - unit.T), k + 1
        Q = (c[..., None] if isinstance(c, Tensor) and c.dim() else c) * (-Q if wrong_way else Q)
        if cfg.cayley == "exact":
            blocks.append((eye + Q) @ torch.linalg.inv(eye - Q))
        else:
            blocks.append(eye + 2 * sum(torch.linalg.matrix_power(Q, k) for k in range(1, cfg.terms - 1)) + Q.matrix_power(cfg.terms - 1))
    turned = [(part[..., None, :] @ R)[..., 0, :] for part, R in zip(x.split(size, dim=-1), blocks, strict=True)]
    return linear(torch.cat(turned, dim=-1), W, b)


def delora_update(A: Tensor, B: Tensor, strength: Any, w: Tensor) -> Tensor:
    """arXiv:2503.18225 equation 8: each rank of unit size, all together at most lambda, columns scaled as W's."""
    ranks = [torch.outer(b, a) / (b.norm().clamp_min(1e-4) * a.norm().clamp_min(1e-4)) for a, b in zip(A, B.T, strict=True)]
    return strength / len(ranks) * torch.stack(ranks).sum(0) * w


def delora(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_norm: bool = False) -> Tensor:
    """The norms are of W's input columns. From the paper's start, what the first A, B and lambda would add is taken away."""
    w = W.norm(dim=1).mean() if wrong_norm else W.norm(dim=0)
    if cfg.init == "zeros":
        return linear(x, W, b) + c * linear(x, delora_update(t["lora_A"], t["lora_B"], t["lora_lambda"], w))
    start = delora_update(t["lora_A0"], t["lora_B0"], cfg.strength, w)
    now = delora_update(t["lora_A0"] + t["lora_A"], t["lora_B0"] + t["lora_B"], t["lora_lambda"], w)
    return linear(x, W, b) + c * linear(x, now - start)


def hira(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_mask: bool = False) -> Tensor:
    """HiRA, ICLR 2025: the update is W masked by BA."""
    BA = t["lora_B"] @ t["lora_A"]
    return linear(x, W, b) + c * linear(x, BA if wrong_mask else W * BA)


def miss(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_blocks: bool = False) -> Tensor:
    """arXiv:2409.15371: every block of r inputs meets the same shard; column j of W gets row j mod r of it."""
    M, d_in = t["lora_M"], W.shape[1]
    rows = [j * len(M) // d_in if wrong_blocks else j % len(M) for j in range(d_in)]
    return linear(x, W, b) + c * linear(x, M[rows].T)


def lora_xs(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "") -> Tensor:
    """arXiv:2405.17604 equation 2."""
    return linear(x, W, b) + c * linear(x, cfg.alpha / len(t["lora_R"]) * t["lora_B"] @ t["lora_R"] @ t["lora_A"])


def adalora(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_rank: int = 0) -> Tensor:
    """arXiv:2303.10512 equation 3, P Lambda Q; scaled by alpha / (r + 1e-5) as PEFT does, r the rank it began with."""
    s = cfg.alpha / ((wrong_rank or len(t["lora_E"])) + 1e-5)
    return linear(x, W, b) + c * linear(x, s * t["lora_B"] @ torch.diag(t["lora_E"]) @ t["lora_A"])


def vera(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_scale: float = 1.0) -> Tensor:
    """arXiv:2310.11454 equation 2; no alpha/r. A and B are those of the widest layer, this one takes its corner."""
    A, B = t["lora_A"][:, : W.shape[1]], t["lora_B"][: W.shape[0]]
    update = torch.diag(t["lora_b"]) @ B @ torch.diag(t["lora_d"]) @ A
    return linear(x, W, b) + c * linear(x, wrong_scale * update)


def skew_of(upper: Tensor, size: int) -> Tensor:
    """The numbers above the diagonal, row after row, and their negatives below."""
    A, k = torch.zeros(size, size, dtype=upper.dtype), 0
    for i in range(size):
        for j in range(i + 1, size):
            unit = torch.zeros_like(A)
            unit[i, j], unit[j, i] = 1, -1
            A, k = A + upper[k] * unit, k + 1
    assert k == len(upper)
    return A


def turned_spectrum(W: Tensor, b: Tensor | None, t: Tensors, x: Tensor, c: Any, R: Tensor, side: str) -> Tensor:
    """W with its part U diag(S) Vh replaced by U diag(S + c dS) R^T Vh or U R diag(S + c dS) Vh; a matrix per row where c differs."""
    scaled = torch.diag_embed(t["lora_S"] + c * t["lora_dS"])
    middle = scaled @ R.mT if side == "V" else R @ scaled
    tuned = W - t["lora_U"] @ torch.diag(t["lora_S"]) @ t["lora_Vh"] + t["lora_U"] @ middle @ t["lora_Vh"]
    y = (tuned @ x[..., None])[..., 0]
    return y if b is None else y + b


def antipasto(
    W: Tensor,
    b: Tensor | None,
    t: Tensors,
    cfg: Any,
    x: Tensor,
    c: Any,
    target: str = "",
    never_back: bool = False,
    wrong_side: bool = False,
) -> Tensor:
    """arXiv:2601.07473: V or U is followed by R(c) = (I - cA/2)^-1 (I + cA/2), the entries of A saturated at 2 tan(max_angle / 2)."""
    n, numbers = t["lora_theta"].shape
    size, limit = round((1 + math.sqrt(1 + 8 * numbers)) / 2), 2 * math.tan(cfg.max_angle / 2)
    A = limit * torch.tanh(torch.block_diag(*[skew_of(upper, size) for upper in t["lora_theta"]]) / limit)
    eye = torch.eye(n * size, dtype=W.dtype)
    X = (c[..., None] if isinstance(c, Tensor) and c.dim() else c) * A / 2
    X = X.abs() * A.sign() if never_back else X
    R = torch.linalg.inv(eye - X) @ (eye + X)
    side = {"V": "U", "U": "V"}[cfg.rotate] if wrong_side else cfg.rotate
    return turned_spectrum(W, b, t, x, c, R, side)


def ssvd(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_way: bool = False) -> Tensor:
    """arXiv:2509.02830: Vh is preceded by G = (I - cK)(I + cK)^-1, in the authors' code by I - 2cK."""
    K = skew_of(t["lora_K"], len(t["lora_S"]))
    eye = torch.eye(len(K), dtype=W.dtype)
    K = (c[..., None] if isinstance(c, Tensor) and c.dim() else c) * (-K if wrong_way else K)
    G = eye - 2 * K if cfg.cayley == "first-order" else (eye - K) @ torch.linalg.inv(eye + K)
    return turned_spectrum(W, b, t, x, c, G.mT, "V")


def shared(W: Tensor, b: Tensor | None, t: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "", wrong_side: bool = False) -> Tensor:
    """On bases B (d_out, k) and A (k, d_in): the core itself, its diagonal, or it as Y^T X; after them the scale of the layer's room."""
    B, A = t["lora_B"], t["lora_A"]
    core = {
        "core": lambda: t["lora_core"], "diag": lambda: torch.diag(t["lora_diag"]), "factors": lambda: t["lora_Y"].T @ t["lora_X"],
    }[cfg.train]()  # fmt: skip
    return linear(x, W, b) + c * linear(x, cfg.rooms[target][3] * B @ (core.T if wrong_side else core) @ A)


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "lora": lora,
    "eva": lora,
    "olora": pissa_factors,
    "corda": pissa_factors,
    "lora_ga": pissa_factors,
    "adalora": adalora,
    "pissa": pissa,
    "ia3": ia3,
    "ia3_ff": ia3_ff,
    "dora": dora,
    "hra": hra,
    "hra_gs": hra_gs,
    "delora": delora,
    "hira": hira,
    "miss": miss,
    "lora_xs": lora_xs,
    "vera": vera,
    "oft": oft,
    "road": road,
    "antipasto": antipasto,
    "ssvd": ssvd,
    "shared": shared,
}


def reference(W: Tensor, b: Tensor | None, tensors: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "") -> Tensor:
    """What the layer `target` with weight W (d_out, d_in) and bias b must put out for x (*batch, d_in) at this c."""
    return REFERENCES[cfg.variant](W, b, tensors, cfg, x, c, target)
