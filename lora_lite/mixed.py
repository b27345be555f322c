"""How is a low-rank update trained in a lower precision than its factors are stored in, without keeping copies of them?

Casting A and B down gives copies that autograd would keep for the backward: at 128 tokens they are a third of what an
adapter keeps. This function keeps x and the factors themselves, and casts again when it goes back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Mixed(torch.autograd.Function):
    """y + scale * B A x with x (*batch, d_in) and y (*batch, d_out) of one dtype, A and B of another."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.scale = scale
        h = F.linear(x, A.to(x.dtype)).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), h, B.to(x.dtype).t(), alpha=scale).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Only inputs were saved, and A x is computed anew: it is cheap, and second derivatives stay right.
        (x, A, B), (gy,) = ctx.saved_tensors, grads
        a, b = A.to(x.dtype), B.to(x.dtype)
        g, rows = gy.flatten(0, -2), x.flatten(0, -2)
        gh = (g @ b) * ctx.scale
        gx = (gh @ a).view(x.shape) if ctx.needs_input_grad[1] else None
        gA = (gh.t() @ rows).to(A.dtype) if ctx.needs_input_grad[2] else None
        gB = (g.t() @ ((rows @ a.t()) * ctx.scale)).to(B.dtype) if ctx.needs_input_grad[3] else None
        return gy, gx, gA, gB, None


class MixedB(torch.autograd.Function):
    """y + scale * B h with h (*batch, r) and y (*batch, d_out) of one dtype, B of another."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(h, B)
        ctx.scale = scale
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.to(h.dtype).t(), alpha=scale).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (h, B), (gy,) = ctx.saved_tensors, grads
        g = gy.flatten(0, -2)
        gh = ((g @ B.to(h.dtype)) * ctx.scale).view(h.shape) if ctx.needs_input_grad[1] else None
        gB = (g.t() @ (h.flatten(0, -2) * ctx.scale)).to(B.dtype) if ctx.needs_input_grad[2] else None
        return gy, gh, gB, None
