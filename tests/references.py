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
    """arXiv:2205.05638 section 3.3 on an output: the whole output is gated, bias too. Stored as l - 1; the gate is 1 + c (l - 1)."""
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


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "lora": lora,
    "pissa": pissa,
    "ia3": ia3,
    "ia3_ff": ia3_ff,
    "dora": dora,
    "hra": hra,
    "hra_gs": hra_gs,
}


def reference(W: Tensor, b: Tensor | None, tensors: Tensors, cfg: Any, x: Tensor, c: Any, target: str = "") -> Tensor:
    """What the layer `target` with weight W (d_out, d_in) and bias b must put out for x (*batch, d_in) at this c."""
    return REFERENCES[cfg.variant](W, b, tensors, cfg, x, c, target)
