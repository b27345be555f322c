"""Which kernel multiplies? In float32 on x86, torch hands its products to MKL, which on AMD's processors takes twice as long as
oneDNN; both are in every wheel. Ours go to oneDNN where they are large enough to pay for the way there (10 us).

On an EPYC with AVX-512, one thread, oneDNN / MKL for n rows of d numbers times r columns: 1024 x 512 x 16 takes 0.47, 1024 x 512 x 256
0.45, 4096 x 2048 x 16 0.37; 128 x 512 x 16 0.87, and r = 4 is never faster below 4096. torch reaches oneDNN in float32 by this
operator only; it records no gradients, so what trains goes through the functions of mixed.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from lora_lite.dial import transforming

WORK = 2**21  # multiply-adds from which it pays, with one thread or two
NARROW = 8  # columns on either side below which it does not

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkl.is_available() else None
_PLAIN = (Tensor, nn.Parameter)


def suits(x: Tensor, W: Tensor) -> bool:
    """Whether x (*batch, k) times W (k, m), or its transpose (m, k), is better left to oneDNN: large, float32, on x86, seen by nobody."""
    return (
        x.dtype is torch.float32 is W.dtype
        and not is_compiling()
        and x.numel() * W.numel() >= WORK * x.shape[-1]
        and min(W.shape) >= NARROW
        and x.device.type == "cpu"
        and type(x) in _PLAIN
        and type(W) in _PLAIN
        and _ONEDNN is not None
        and torch.backends.mkldnn.enabled  # type: ignore[reportAttributeAccessIssue]
        and not torch.is_autocast_enabled("cpu")
        and not watched()
        and forward_ad.unpack_dual(x).tangent is None
        and forward_ad.unpack_dual(W).tangent is None
    )


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for a (*batch, k) and b (k, m) of one dtype; any strides. Where gradients are recorded, an ordinary product."""
    if suits(a, b) and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        W = b.t()
        dense = W.is_contiguous() or b.is_contiguous()  # any other W takes 1,000 times as long there
        return _ONEDNN(a, W if dense else W.contiguous(), None, "none", [], "")
    return a @ b


def watched() -> bool:
    """Whether a mode or a transform of torch sees every operation here, and may keep what it saw."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()) or transforming()  # type: ignore[reportAttributeAccessIssue]
