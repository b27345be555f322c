"""How is a low-rank update trained in a lower precision than its factors are stored in, without keeping copies of them?

Casting A and B down gives copies that autograd would keep for the backward: at 128 tokens they are a third of what an
adapter keeps. This function keeps x and the factors themselves, and casts again when it goes back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lite.dial import transforming


class Mixed(torch.autograd.Function):
    """y + scale * B A x with x (*batch, d_in) and y (*batch, d_out) of one dtype, A and B of another.

    inplace  whether y (contiguous, no view) may be written into
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, inplace: bool) -> Tensor:
        h = product(x.flatten(0, -2), A.to(x.dtype).t(), scale)
        ctx.save_for_backward(x, A, B, h if B.requires_grad else None)
        ctx.scale = scale
        if inplace:
            ctx.mark_dirty(y)
        return plus(y if inplace else fresh(y), h, B.to(x.dtype), 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, A, B, h), (gy,) = ctx.saved_tensors, grads
        a, b = A.to(x.dtype), B.to(x.dtype)
        g, rows = flat(gy), flat(x)
        gh = product(g, b, ctx.scale)
        gx = (gh @ a).view(x.shape) if ctx.needs_input_grad[1] else None
        gA = (gh.t() @ rows).to(A.dtype) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():  # for second derivatives, which a saved h would stand in the way of
            h = product(rows, a.t(), ctx.scale)
        gB = (g.t() @ h).to(B.dtype) if ctx.needs_input_grad[3] else None
        return gy, gx, gA, gB, None, None


def flat(x: Tensor) -> Tensor:
    """(*batch, d) as rows; a gradient may be batched once more by vmap, which has no rule for flatten."""
    return x.reshape(-1, x.shape[-1])


def fresh(y: Tensor) -> Tensor:
    return y.clone(memory_format=torch.contiguous_format)


def plus(y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale * B h written into y, and y itself: what a function returns may be no view, or `relu_` and `+=` on it are refused."""
    y.flatten(0, -2).addmm_(h, B.t(), alpha=scale)
    return y


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a b, in one kernel."""
    return a @ b if scale == 1.0 else torch.addmm(a.new_empty(()), a, b, beta=0.0, alpha=scale)  # beta 0: what is empty is not read


class MixedLinear(torch.autograd.Function):
    """y + scale * B h with h (*batch, r) and y (*batch, d_out) of one dtype, B of another; without a y, B h."""

    @staticmethod
    def forward(ctx: Any, y: Tensor | None, h: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(h if B.requires_grad else None, B)
        ctx.dtype, ctx.scale = h.dtype, scale
        b = B.to(h.dtype)
        if y is None:
            return F.linear(h, b)
        return plus(fresh(y), h.flatten(0, -2), b, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (h, B), (gy,) = ctx.saved_tensors, grads
        dtype = gy.dtype  # autocast may have made it another than h's
        gh = ((gy @ B.to(dtype)) * ctx.scale).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        gB = (flat(gy).t() @ (flat(h).to(dtype) * ctx.scale)).to(B.dtype) if ctx.needs_input_grad[2] else None
        return gy if ctx.needs_input_grad[0] else None, gh, gB, None


def linear(x: Tensor, W: Tensor) -> Tensor:
    """W x in x's dtype, for x (*batch, d_in)."""
    if W.dtype is x.dtype:
        return F.linear(x, W)
    return MixedLinear.apply(None, x, W, 1.0) if trains_across_dtypes(x, W) else F.linear(x, W.to(x.dtype))  # type: ignore[return-value]


def trains_across_dtypes(x: Tensor, W: Tensor) -> bool:
    """Whether a cast of W would be kept for a backward (torch.func's transforms take the ordinary way)."""
    needed = x.dim() > 1 and torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    return needed and (torch.compiler.is_compiling() or not transforming())
