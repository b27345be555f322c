"""How is a low-rank update trained in a lower precision than its factors are stored in, without keeping copies of them?

Casting A and B down gives copies that autograd would keep for the backward: at 128 tokens they are a third of what an
adapter keeps. This function keeps x and the factors themselves, and casts again when it goes back.

Where the processor has no products in the lower precision the cast goes up: torch then multiplies number by number, and float32
takes a tenth of the time. (512 x 512, r = 16, 128 tokens, AVX2: 0.67 ms for the six products there and back, 8.8 in bfloat16.)
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lite.dial import transforming

# What a CPU multiplies slowly: float16 but on the newest servers, bfloat16 on x86 without AVX-512.
_X86 = platform.machine().lower() in ("x86_64", "amd64")
SLOW = (
    {torch.float16, torch.bfloat16}
    if _X86 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
    else {torch.float16}
)


def working(x: Tensor) -> torch.dtype:
    """The dtype to multiply in: x's own where the device has products for it (autocast would cast all down again)."""
    return torch.float32 if x.dtype in SLOW and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") else x.dtype


def wide(small: Tensor) -> Tensor:
    """In float32 at least: what is computed of 16 bits in 16 bits is off by 1e-2 (a norm, an angle, a gain)."""
    return small if small.dtype.itemsize > 2 else small.float()


class Mixed(torch.autograd.Function):
    """y + scale * B A x with x (*batch, d_in) and y (*batch, d_out) of one dtype, A and B of another.

    inplace  whether y (contiguous, no view) may be written into
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, inplace: bool) -> Tensor:
        dtype = working(x)
        h = product(x.flatten(0, -2).to(dtype), A.to(dtype).t(), scale)
        ctx.save_for_backward(x, A, B, h.to(x.dtype) if B.requires_grad else None)
        ctx.scale = scale
        if inplace:
            ctx.mark_dirty(y)
        return plus(y if inplace else fresh(y), h, B.to(dtype), 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, A, B, h), (gy,) = ctx.saved_tensors, grads
        dtype = working(x)
        a, b = A.to(dtype), B.to(dtype)
        g, rows = flat(gy).to(dtype), flat(x).to(dtype)
        gh = product(g, b, ctx.scale)
        gx = (gh @ a).to(x.dtype).view(x.shape) if ctx.needs_input_grad[1] else None
        gA = (gh.t() @ rows).to(A.dtype) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():  # for second derivatives, which a saved h would stand in the way of
            h = product(rows, a.t(), ctx.scale)
        gB = (g.t() @ h.to(dtype)).to(B.dtype) if ctx.needs_input_grad[3] else None
        return gy, gx, gA, gB, None, None


def flat(x: Tensor) -> Tensor:
    """(*batch, d) as rows; a gradient may be batched once more by vmap, which has no rule for flatten."""
    return x.reshape(-1, x.shape[-1])


def fresh(y: Tensor) -> Tensor:
    return y.clone(memory_format=torch.contiguous_format)


def plus(y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale * B h written into y, and y itself: what a function returns may be no view, or `relu_` and `+=` on it are refused."""
    rows = y.flatten(0, -2)
    if h.dtype is y.dtype:
        rows.addmm_(h, B.t(), alpha=scale)
    else:
        rows.add_(h @ B.t(), alpha=scale)
    return y


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a b, in one kernel."""
    return a @ b if scale == 1.0 else torch.addmm(a.new_empty(()), a, b, beta=0.0, alpha=scale)  # beta 0: what is empty is not read


class MixedLinear(torch.autograd.Function):
    """y + scale * B h with h (*batch, r) and y (*batch, d_out) of one dtype, B of another; without a y, B h."""

    @staticmethod
    def forward(ctx: Any, y: Tensor | None, h: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(h if B.requires_grad else None, B)
        ctx.dtype, ctx.scale, dtype = h.dtype, scale, working(h)
        if y is None:
            return F.linear(h.to(dtype), B.to(dtype)).to(h.dtype)
        return plus(fresh(y), h.flatten(0, -2).to(dtype), B.to(dtype), scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (h, B), (gy,) = ctx.saved_tensors, grads
        dtype = working(gy)  # autocast may have made it another than h's
        gh = ((gy.to(dtype) @ B.to(dtype)) * ctx.scale).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        gB = (flat(gy).to(dtype).t() @ (flat(h).to(dtype) * ctx.scale)).to(B.dtype) if ctx.needs_input_grad[2] else None
        return gy if ctx.needs_input_grad[0] else None, gh, gB, None


def linear(x: Tensor, W: Tensor) -> Tensor:
    """W x in x's dtype, for x (*batch, d_in)."""
    if W.dtype is x.dtype:
        return F.linear(x, W)
    if trains_across_dtypes(x, W):
        return MixedLinear.apply(None, x, W, 1.0)  # type: ignore[return-value]
    dtype = working(x)
    return F.linear(x.to(dtype), W.to(dtype)).to(x.dtype)


def trains_across_dtypes(x: Tensor, W: Tensor) -> bool:
    """Whether a cast of W would be kept for a backward (torch.func's transforms take the ordinary way)."""
    needed = x.dim() > 1 and torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    return needed and (torch.compiler.is_compiling() or not transforming())
