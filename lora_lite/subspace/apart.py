"""What if a layer's tasks share too little for a basis to pay? They keep their own factors, as they came or in int8."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lora_lite.lowrank import LowRank
from lora_lite.subspace.block import blocks
from lora_lite.subspace.coefficients import Kind, Parts
from lora_lite.subspace.frame import Frame
from lora_lite.subspace.packed import Packed, Stored, dense
from lora_lite.subspace.source import Update
from lora_lite.subspace.state import Layer

GROUP = 128  # numbers that share a scale


class Apart(Layer):
    """A layer without bases: its frames are empty, its parts are every task's B^T (r, d_out) and A (r, d_in), one after another."""

    @property
    def held(self) -> Literal["raw", "int8", "int4"]:
        part = self.parts[0]
        return ("int8" if part.bits == 8 else "int4") if isinstance(part, Packed) else "raw"

    @property
    def bare(self) -> bool:
        return False  # what is zero loses nothing by sharing, and is never held apart

    def own(self, kind: Kind, task: str) -> Parts:
        return super().own("factors", task)

    def update(self, kind: Kind, task: str) -> LowRank:
        B, A = self.own(kind, task)
        return LowRank(A.double(), B.double().T, self.scales[self.index[task]])

    def rank(self, kind: Kind, task: str) -> int:
        return self.ranks[self.index[task]]

    def without(self, kind: Kind, task: str) -> Layer:
        return super().without("factors", task)

    def shared_with(self, kind: Kind, parts: Parts, sign: float, scale: float) -> tuple[Frame, Frame]:
        return self.b, self.a

    def joined(self, kind: Kind, task: str, rank: int, scale: float, parts: Parts, energy: float, lost: float) -> Layer:
        return super().joined("factors", task, rank, scale, parts, energy, 0.0)  # nothing is lost but by rounding

    def between(self, kind: Kind, scale: float, one: Parts, other: Parts) -> float:
        return float(rounding([len(one[0])], [scale], one, other))

    def with_parts(self, parts: tuple[Stored, ...]) -> Apart:
        """The same tasks, held otherwise: what that loses is added to their bounds."""
        off = rounding(self.ranks, self.scales, [dense(p) for p in self.parts], [dense(p) for p in parts])
        lost = (self.lost.double().sqrt() + off.sqrt()).square().float()
        return dataclasses.replace(self, parts=parts, lost=lost)


def as_parts(update: Update) -> Parts:
    return update.B.T.contiguous(), update.A.contiguous()


def rounding(ranks: Sequence[int], scales: Sequence[float], exact: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
    """(n,) |dW - kept dW|^2 of tasks whose B^T and A lie one after another, without forming a dW."""
    found, at = [], 0
    for r, scale in zip(ranks, scales, strict=True):
        (B, A), (C, D) = ([p[at : at + r].double() for p in side] for side in (exact, kept))
        left, right = torch.cat([B, -C]), torch.cat([A, D])
        found.append(scale**2 * ((left @ left.T) * (right @ right.T)).sum().clamp(min=0))
        at += r
    return torch.stack(found) if found else exact[0].new_zeros(0, dtype=torch.float64)


def apart(tasks: Sequence[str], updates: Sequence[Update], dtype: torch.dtype, bits: int | None) -> Apart:
    """The layer as it came, or in integers."""
    (d_in, d_out), device = updates[0].sizes, updates[0].A.device
    ranks, scales = tuple(u.rank for u in updates), tuple(u.scale for u in updates)
    exact = [torch.cat(column).to(dtype) for column in zip(*map(as_parts, updates), strict=True)]
    parts: tuple[Stored, ...] = tuple(Packed.of(p, bits, GROUP) for p in exact) if bits else tuple(exact)
    lost = rounding(ranks, scales, exact, [dense(p) for p in parts]) if bits else torch.zeros(len(ranks), device=device)
    empty = [Frame(torch.zeros(0, d, dtype=dtype, device=device), None, torch.zeros(0, device=device)) for d in (d_out, d_in)]
    energy = torch.cat([x.energy for x in blocks(updates)])
    return Apart(d_in, d_out, empty[0], empty[1], tuple(tasks), ranks, scales, parts, energy.float(), lost.float())


def cheaper(shared: Layer, tasks: Sequence[str], updates: Sequence[Update], dtype: torch.dtype) -> Apart | None:
    """The layer held apart where that loses less in no more bytes."""
    room, error = sum(x.nbytes for x in shared.stored()), float(shared.lost.double().sum())
    for bits in (None, 8):
        one = apart(tasks, updates, dtype, bits)
        if sum(x.nbytes for x in one.stored()) <= room and float(one.lost.double().sum()) < error:
            return one
    return None
