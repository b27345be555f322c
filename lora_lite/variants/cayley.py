"""How does one b x b skew-symmetric matrix per block become a rotation, for one c or for a c of each row?

    R(c) = (I + cQ)(I - cQ)^-1,  x_block -> x_block R(c)

R(c) is orthogonal for every Q and c, and R(-c) = R(c)^T undoes it. An eigenvalue i q of Q is a plane that turns by 2 atan(c q).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.dial import transforming
from lora_lite.variant import Params


def times(x: Float[Tensor, "*batch n b"], M: Float[Tensor, "n b b"]) -> Float[Tensor, "*batch n b"]:
    return torch.einsum("...nb,nbc->...nc", x, M)


def skew(upper: Float[Tensor, "n k"], b: int) -> Float[Tensor, "n b b"]:
    """The numbers above the diagonal, row after row, and their negatives below; in float32 at least, as LAPACK wants."""
    upper = upper.to(torch.promote_types(upper.dtype, torch.float32))
    return scattered(upper, b) if torch.compiler.is_compiling() or transforming() else Skew.apply(upper, b)  # type: ignore[return-value]


def scattered(upper: Tensor, b: int) -> Tensor:
    rows, columns = torch.triu_indices(b, b, 1, device=upper.device)
    half = upper.new_zeros(len(upper), b * b).index_copy(1, rows * b + columns, upper).unflatten(1, (b, b))
    return half - half.mT


class Skew(torch.autograd.Function):
    """`scattered`, whose own backward would keep an index for every layer: 0.4 % of what a small OFT model keeps."""

    @staticmethod
    def forward(ctx: Any, upper: Tensor, b: int) -> Tensor:
        ctx.b = b
        return scattered(upper, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows, columns = torch.triu_indices(ctx.b, ctx.b, 1, device=grads[0].device)
        flat = (grads[0] - grads[0].mT).reshape(-1, ctx.b * ctx.b)  # flatten has no rule for a backward under vmap
        return flat.index_select(1, rows * ctx.b + columns), None


def exact(Q: Float[Tensor, "n b b"]) -> Float[Tensor, "n b b"]:
    """R - I = 2 Q (I - Q)^-1, which takes no difference of near numbers."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(eye - Q, 2 * Q, left=False)


@torch.no_grad()
def eigenvectors(Q: Float[Tensor, "n b b"]) -> Params:
    """Q^2 = -V diag(squares) V^T, so that (I - c^2 Q^2)^-1 is one diagonal for every c."""
    Q = Q.detach()  # no_grad lets forward mode through, to eigenvalues that come in pairs: infinite derivatives
    squares, V = torch.linalg.eigh(Q.mT @ Q)
    return {"V": V, "squares": squares.clamp_min(0)}


def newton(x: Tensor, Q: Tensor, V: Tensor, squares: Tensor, c: Tensor, steps: int) -> Tensor:
    """x (I - cQ)^-1: by the eigenvectors, constants to autograd (those of a near-zero Q have no derivative), and refined.

    Each step refines the value, in float32 at a large c, and makes one more order of derivatives exact.
    """
    still_Q, still_c = Q.detach(), c.detach()

    def inverse(v: Tensor) -> Tensor:
        v = times(times(v, V) / (1 + still_c.square() * squares), V.mT)
        return v + still_c * times(v, still_Q)

    z = inverse(x.detach())
    for _ in range(steps):
        z = z + inverse(x - (z - c * times(z, Q)))
    return z


class Solve(torch.autograd.Function):
    """z with z (I - cQ) = x, one c per row. The backward is a solve with -Q by this same function: exact in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, Q: Tensor, V: Tensor, squares: Tensor, c: Tensor) -> Tensor:
        z = newton(x, Q, V, squares, c, 1)
        ctx.save_for_backward(z, Q, V, squares, c)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, Q, V, squares, c = ctx.saved_tensors
        gx: Tensor = Solve.apply(grads[0], -Q, V, squares, c)  # type: ignore[assignment]
        gQ = torch.einsum("...nb,...nd->nbd", c * z, gx) if ctx.needs_input_grad[1] else None
        gc = (times(z, Q) * gx).sum((-2, -1), keepdim=True).sum_to_size(c.shape) if ctx.needs_input_grad[4] else None
        return gx, gQ, None, None, gc


def solve(x: Tensor, Q: Tensor, V: Tensor, squares: Tensor, c: Tensor) -> Tensor:
    """`Solve`, also where a function with a backward of its own cannot take part: compiled graphs have first derivatives only,
    torch.func gets two orders."""
    if torch.compiler.is_compiling() or transforming():
        return newton(x, Q, V, squares, c, 1 if torch.compiler.is_compiling() else 2)
    return Solve.apply(x, Q, V, squares, c)  # type: ignore[return-value]


def turned(x: Float[Tensor, "*batch n b"], p: Params, c: Tensor) -> Float[Tensor, "*batch n b"]:
    """x R(c) - x with a c per row, (*batch, 1, 1): 2 z c Q where z (I - cQ) = x. p has Q and its `eigenvectors`."""
    z = solve(x, p["Q"], p["V"], p["squares"], c)
    return 2 * c * times(z, p["Q"])
