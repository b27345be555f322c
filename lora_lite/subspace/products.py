"""Which kernel multiplies a collection's rows? In float32 on x86 torch hands products to MKL, which on AMD's processors takes up to
twice as long as oneDNN; both are in every wheel, and torch has no other way to oneDNN in float32 than this operator.

oneDNN keeps a program, and memory for it, for each shape it has met (a gigabyte for 300 of a training run's lengths, measured), copies
operands whose rows are not one after another, and knows no gradients. So it is for the large products of building a basis, which meet
a few shapes a layer, and not for what a model's inputs pass through.

On an EPYC with AVX-512, one thread, oneDNN / MKL: 32 x 2048 x 1024 takes 0.57 of the time, 20 x 64 x 32768 0.66.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WORK = 2**23  # multiply-adds beside which the way there (10 us) is nothing
NARROW = 8  # rows or columns below which nothing is gained

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkl.is_available() else None


def suits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype is torch.float32 is b.dtype
        and a.device.type == b.device.type == "cpu"
        and a.numel() * b.shape[1] >= WORK
        and min(*a.shape, *b.shape) >= NARROW
        and a.is_contiguous()
        and (b.is_contiguous() or b.t().is_contiguous())
        and not (a.requires_grad or b.requires_grad)
        and _ONEDNN is not None
        and torch.backends.mkldnn.enabled  # type: ignore[reportAttributeAccessIssue]
    )


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices."""
    return _ONEDNN(a, b.t(), None, "none", [], "") if suits(a, b) else a @ b
