"""How are many updates of one layer handled at once? In stacks of equal rank, so that a thousand are a few products."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.subspace.source import Update

NUMBERS = 2**19  # of one side in a stack: 4 MiB in float64, which stays in the processor's cache


@dataclass(frozen=True, eq=False)
class Block:
    """n updates s B A of one rank, one after another; stacked when they are asked for, so that one stack is in memory at a time."""

    updates: Sequence[Update]

    @property
    def A(self) -> Float[Tensor, "n r d_in"]:
        return stacked([u.A for u in self.updates])

    @property
    def B(self) -> Float[Tensor, "n d_out r"]:
        return stacked([u.B for u in self.updates])

    @cached_property
    def scale(self) -> Float[Tensor, " n"]:
        return torch.tensor([u.scale for u in self.updates], dtype=torch.float64, device=self.updates[0].A.device)

    @property
    def sizes(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        return self.updates[0].sizes

    @property
    def r(self) -> int:
        return self.updates[0].rank

    @cached_property
    def grams(self) -> tuple[Float[Tensor, "n r r"], Float[Tensor, "n r r"]]:
        """B^T B and A A^T, in float64."""
        B, A = self.B.double(), self.A.double()
        return B.transpose(1, 2) @ B, A @ A.transpose(1, 2)

    @cached_property
    def energy(self) -> Float[Tensor, " n"]:
        """Squared sizes of the updates, without forming one."""
        Gb, Ga = self.grams
        return self.scale.square() * (Gb * Ga).sum((1, 2))

    def weigh(self, Xb: Float[Tensor, "nr d_out"], Xa: Float[Tensor, "nr d_in"]) -> None:
        """Fill Xb and Xa with the updates seen from each side, in no gauge: Xb^T Xb = sum of dW dW^T, Xa^T Xa = sum of dW^T dW."""
        Gb, Ga = self.grams
        for X, G, rows in ((Xb, Ga, self.B.transpose(1, 2)), (Xa, Gb, self.A)):
            weight = (root(G) * self.scale[:, None, None]).to(X.dtype)
            torch.bmm(weight, rows.to(X.dtype), out=X.view(rows.shape))


def stacked(xs: Sequence[Tensor]) -> Tensor:
    """Not to be written to: of one, it is a view."""
    return xs[0][None] if len(xs) == 1 else torch.stack(list(xs))


def root(G: Float[Tensor, "n r r"]) -> Float[Tensor, "n r r"]:
    """L^T with L L^T = G, also where G has no inverse, which takes 20 times as long."""
    L, failed = torch.linalg.cholesky_ex(G)
    if not bool(failed.any()):
        return L.transpose(1, 2)
    values, vectors = torch.linalg.eigh(G)
    return values.clamp(min=0).sqrt()[..., None] * vectors.transpose(1, 2)


def blocks(updates: Sequence[Update]) -> Iterator[Block]:
    """In order, so that what is computed of the blocks is that of the updates one after another."""
    for _, run in itertools.groupby(updates, key=lambda u: u.rank):
        same = list(run)
        each = max(1, NUMBERS // max(same[0].A.numel(), same[0].B.numel()))
        for start in range(0, len(same), each):
            yield Block(same[start : start + each])
