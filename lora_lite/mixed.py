"""How is a low-rank update trained where autograd's own way costs more: in a lower precision than its factors are stored in, and
where another kernel multiplies faster (products.py)?

Casting A and B down gives copies that autograd would keep for the backward: at 128 tokens they are a third of what an
adapter keeps. These functions keep x and the factors themselves, and cast again when they go back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lite.dial import transforming
from lora_lite.products import matmul, suits


class Mixed(torch.autograd.Function):
    """y + scale * B A x with x (*batch, d_in) and y (*batch, d_out) of one dtype, A and B of any.

    inplace  whether y (contiguous, no view) may be written into
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, inplace: bool) -> Tensor:
        early, late = (1.0, scale) if A.dtype is x.dtype else (scale, 1.0)  # as without gradients; in bfloat16 a late one is dear
        h = product(x.flatten(0, -2), A.to(x.dtype).t(), early)
        ctx.save_for_backward(x, A, B, h)
        ctx.scales = scale, early, late
        if inplace:
            ctx.mark_dirty(y)
        return plus(y if inplace else fresh(y), h, B.to(x.dtype), late)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, A, B, h), (gy,) = ctx.saved_tensors, grads
        a, b = A.to(x.dtype), B.to(x.dtype)
        g, rows, (scale, early, late) = gy.flatten(0, -2), x.flatten(0, -2), ctx.scales
        gh = product(g, b, scale)
        gx = matmul(gh, a).view(x.shape) if ctx.needs_input_grad[1] else None
        gA = matmul(gh.t(), rows).to(A.dtype) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():  # for second derivatives, which a saved h would stand in the way of
            h = product(rows, a.t(), early)
        gB = scaled(across(h, g).to(B.dtype), late) if ctx.needs_input_grad[3] else None
        return gy, gx, gA, gB, None, None


class MixedLinear(torch.autograd.Function):
    """y + scale * B h with h (*batch, r) and y (*batch, d_out) of one dtype, B of any; without a y, B h.

    inplace  whether y (contiguous, no view) may be written into
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor | None, h: Tensor, B: Tensor, scale: float, inplace: bool) -> Tensor:
        ctx.save_for_backward(h if B.requires_grad else None, B if h.requires_grad else None)
        ctx.dtypes, ctx.scale = (h.dtype, B.dtype), scale
        b = B.to(h.dtype)
        if y is None:
            return matmul(h, b.t()) if suits(h, b) else F.linear(h, b)
        if inplace:
            ctx.mark_dirty(y)
        return plus(y if inplace else fresh(y), h.flatten(0, -2), b, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (h, B), (gy,) = ctx.saved_tensors, grads
        dtype = gy.dtype  # autocast may have made it another than h's
        gh = scaled(matmul(gy, B.to(dtype)), ctx.scale).to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
        gB = across(h.flatten(0, -2).to(dtype), gy.flatten(0, -2)).to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        return gy if ctx.needs_input_grad[0] else None, gh, gB if gB is None else scaled(gB, ctx.scale), None, None


def fresh(y: Tensor) -> Tensor:
    return y.clone(memory_format=torch.contiguous_format)


def plus(y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale * B h written into y, and y itself: what a function returns may be no view, or `relu_` and `+=` on it are refused."""
    y.flatten(0, -2).addmm_(h, B.t(), alpha=scale)
    return y


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b of two matrices, in one kernel where there is one."""
    if scale == 1.0 or suits(a, b):
        return scaled(matmul(a, b), scale)
    return torch.addmm(a.new_empty(()), a, b, beta=0.0, alpha=scale)  # beta 0: what is empty is not read


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale


def across(h: Tensor, g: Tensor) -> Tensor:
    """g^T h for rows h (n, r) and g (n, d_out): the gradient of a B that took h there."""
    return matmul(h.t(), g).t() if suits(h.t(), g) else g.t() @ h


def linear(x: Tensor, W: Tensor) -> Tensor:
    """W x in x's dtype, for x (*batch, d_in)."""
    if pays(x, W):
        return MixedLinear.apply(None, x, W, 1.0, False)  # type: ignore[return-value]
    W = W if W.dtype is x.dtype else W.to(x.dtype)
    return matmul(x, W.t()) if suits(x, W) else F.linear(x, W)


def pays(x: Tensor, W: Tensor) -> bool:
    """Whether W x trains better by these functions: they keep no cast of W, and choose the kernel. torch.func's transforms take the
    ordinary way."""
    needed = x.dim() > 1 and torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    if not needed or W.dtype is x.dtype:
        return needed and suits(x, W)
    return torch.compiler.is_compiling() or not transforming()
