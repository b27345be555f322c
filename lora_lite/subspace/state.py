"""What is a shared subspace, as a value? Frozen layers of bases and coefficients, swapped whole; nothing here is ever written to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lora_lite.lowrank import LowRank
from lora_lite.subspace.coefficients import Kind, Parts, as_cores, compact, of_rank, rows, squares
from lora_lite.subspace.frame import Frame
from lora_lite.subspace.packed import Packed, Sized, Stored, append, dense, sizes_of, take, with_size
from lora_lite.subspace.reserve import Reserve
from lora_lite.variants.lora import LoRAConfig

Missing = Literal["error", "zero", "common"]


@dataclass(frozen=True)
class Policy:
    """How many directions each side of each layer keeps, at the start and after each absorb: a number, or by explained variance."""

    variance_threshold: float = 0.6
    num_components: int | None = None
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        threshold, k, budget = self.variance_threshold, self.num_components, self.budget_bytes
        if not number(threshold) or not 0 < threshold <= 1:
            raise ValueError(f"variance_threshold must be in (0, 1], got {threshold!r}")
        if k is not None and (not number(k) or not isinstance(k, int) or k < 1):
            raise ValueError(f"num_components must be a whole number from 1, got {k!r}")
        if budget is not None and (not number(budget) or not 1 <= budget < math.inf):
            raise ValueError(f"budget_bytes must be a number from 1, got {budget!r}")


def number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's bases and what each task keeps on them: a pair of frames, b for the output side and a for the input side.

    energy (n,)  each task's squared size as it was given: of its update at c = 1; in space "flat" of its factors
    lost (n,)    a bound on each task's squared error: the error at entry, and after each truncation (sqrt(lost) + d)^2, d its size
    reserve      further directions, for the next absorb alone
    """

    d_in: int
    d_out: int
    b: Frame
    a: Frame
    tasks: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    parts: tuple[Stored, ...]
    energy: Sized
    lost: Sized
    reserve: Reserve | None = None

    @cached_property
    def index(self) -> dict[str, int]:
        return {task: i for i, task in enumerate(self.tasks)}

    def own(self, kind: Kind, task: str) -> Parts:
        """One task's rows of the coefficients, as they are meant."""
        where = rows(kind, self.ranks, self.index[task])
        found = tuple(dense(take(p, torch.arange(where.start, where.stop))) for p in self.parts)
        return self.cut_back(kind, found, [self.ranks[self.index[task]]])

    @property
    def bare(self) -> bool:
        """Whether one side has nothing at all, neither directions nor a mean: any task is zero here, whatever its coefficients."""
        return any(not f.k and (f.mean is None or not bool(dense(f.mean).any())) for f in (self.b, self.a))

    def all_parts(self) -> Parts:
        return tuple(dense(p) for p in self.parts)

    def meant(self, kind: Kind) -> Parts:
        return self.cut_back(kind, self.all_parts(), self.ranks)

    def cut_back(self, kind: Kind, parts: Parts, ranks: Sequence[int]) -> Parts:
        """A core in integers has every rank there is; what it has beyond its adapter's is rounding, and no adapter is made of it."""
        return (of_rank(parts[0], ranks),) if kind == "core" and isinstance(self.parts[0], Packed) else parts

    def update(self, kind: Kind, task: str) -> LowRank:
        """The task's update with as many ranks as its adapter had, in float64 but for "flat"."""
        i = self.index[task]
        A, B = compact(kind, self.own(kind, task), self.b, self.a, self.rank(kind, task), (self.d_in, self.d_out))
        return LowRank(A, B, self.scales[i])

    def rank(self, kind: Kind, task: str) -> int:
        """Of the task's update: as its adapter had it, but a diagonal has the basis' own."""
        return max(1, min(self.b.k, self.a.k)) if kind == "diag" else self.ranks[self.index[task]]

    def weights(self) -> Tensor:
        """(n,) squared scales: what turns a coefficient's squared size into its update's."""
        return torch.tensor(self.scales, dtype=torch.float64, device=self.lost.device).square()

    def measure(self, kind: Kind, parts: Parts) -> Tensor:
        """(n,) squared size of each task's kept update, in float64 (in "flat": of its loadings)."""
        return sizes(kind, parts, self.ranks, self.weights())

    def joined(self, kind: Kind, task: str, rank: int, scale: float, parts: Parts, energy: float, lost: float) -> Layer:
        """With one more task, its coefficients held as the others are. The bases stay, but know that more lies along them.

        `lost` is what these coefficients lose as they are given. What holding them takes lies where the bases reach, and what was
        lost does not: the squares add up.
        """
        b, a = self.shared_with(kind, parts, 1.0, scale)
        b, a = (dataclasses.replace(f, rest=f.rest + max(lost, 0.0) / 2) if kind == "flat" else f for f in (b, a))  # of two sides
        grown = dataclasses.replace(
            self,
            b=b,
            a=a,
            tasks=(*self.tasks, task),
            ranks=(*self.ranks, rank),
            scales=(*self.scales, scale),
            parts=tuple(append(old, new) for old, new in zip(self.parts, parts, strict=True)),
            energy=with_size(self.energy, energy),
        )
        lost = max(lost, 0.0) + self.between(kind, scale, parts, grown.own(kind, task))
        reserve = None if self.reserve is None else self.reserve.joined(len(parts[0]), lost)
        return dataclasses.replace(grown, lost=with_size(self.lost, lost), reserve=reserve)

    def between(self, kind: Kind, scale: float, one: Parts, other: Parts) -> float:
        """|difference|^2 of what two sets of one task's coefficients stand for on these bases (in "flat": of the factors)."""
        if all(p.dtype == q.dtype and torch.equal(p.to(q.device), q) for p, q in zip(one, other, strict=True)):
            return 0.0
        if kind == "flat":
            steps = [(p - q.double())[0] for p, q in zip(one, other, strict=True)]
            return float(sum(x @ f.metric @ x for x, f in zip(steps, (self.b, self.a), strict=True)))
        D = (as_cores(kind, one, [len(one[0])]) - as_cores(kind, other, [len(other[0])]))[0]
        kb, ka = D.shape
        return scale**2 * float((D * (self.b.metric[:kb, :kb] @ D @ self.a.metric[:ka, :ka])).sum())

    def shared_with(self, kind: Kind, parts: Parts, sign: float, scale: float) -> tuple[Frame, Frame]:
        """The frames with a task's share of energy added or given up."""
        weight = sign * (1.0 if kind == "flat" else scale**2)

        def frame(f: Frame, share: Tensor) -> Frame:
            share = torch.nn.functional.pad(share, (0, f.k - len(share)))  # a diagonal may be shorter than its basis
            return dataclasses.replace(f, energy=(f.energy + (weight * share).to(f.energy)).clamp(min=0))

        share_b, share_a = shares(kind, parts)
        return frame(self.b, share_b), frame(self.a, share_a)

    def without(self, kind: Kind, task: str) -> Layer:
        """With one task fewer. The bases stay, so that no bit of the others changes; their energies give up the task's share."""
        i, where = self.index[task], rows(kind, self.ranks, self.index[task])
        count = self.parts[0].shape[0]
        rest = torch.tensor([j for j in range(count) if not where.start <= j < where.stop], dtype=torch.long)
        keep = [j for j in range(len(self.tasks)) if j != i]
        b, a = self.shared_with(kind, self.own(kind, task), -1.0, self.scales[i])
        b, a = (dataclasses.replace(f, rest=f.rest * len(keep) / len(self.tasks)) for f in (b, a))  # whose it was is not known
        return dataclasses.replace(
            self,
            b=b,
            a=a,
            tasks=tuple(self.tasks[j] for j in keep),
            ranks=tuple(self.ranks[j] for j in keep),
            scales=tuple(self.scales[j] for j in keep),
            parts=tuple(take(p, rest) for p in self.parts),
            energy=sizes_of(self.energy, torch.tensor(keep, dtype=torch.long)),
            lost=sizes_of(self.lost, torch.tensor(keep, dtype=torch.long)),
            reserve=None if self.reserve is None else self.reserve.without(keep, rest),
        )

    def whole(self, kind: Kind) -> Layer:
        """With the reserve's directions among its own."""
        if self.reserve is None:
            return self
        b, a = self.reserve.frames(self.b, self.a)
        parts = self.reserve.whole(kind, self.all_parts())
        return dataclasses.replace(self, b=b, a=a, parts=parts, lost=self.reserve.lost, reserve=None)

    def stored(self) -> list[Stored | Sized]:
        """Everything that takes room, for counting bytes."""
        more = [] if self.reserve is None else self.reserve.tensors()
        return [*self.numbers(), self.b.energy, self.a.energy, self.energy, self.lost, *more]

    def numbers(self) -> list[Stored]:
        """Bases, means and coefficients, of which tasks are made."""
        means = [f.mean for f in (self.b, self.a) if f.mean is not None]
        return [self.b.components, self.a.components, *means, *self.parts]


def sizes(kind: Kind, parts: Parts, ranks: Sequence[int], weights: Tensor) -> Tensor:
    found = squares(kind, tuple(p.double() for p in parts), ranks)
    return found if kind == "flat" else found * weights


def shares(kind: Kind, parts: Parts) -> tuple[Tensor, Tensor]:
    """How much of one task lies along each direction: (k_b,), (k_a,). In float64: squares of float16 end at a length of 256."""
    parts = tuple(p.double() for p in parts)
    if kind == "flat":
        return parts[0][0].square(), parts[1][0].square()
    if kind == "diag":
        return parts[0][0].square(), parts[0][0].square()
    core = parts[0][0] if kind == "core" else parts[0].T @ parts[1]
    return core.square().sum(1), core.square().sum(0)


@dataclass(frozen=True, eq=False)
class State:
    """A whole subspace between two changes."""

    space: Literal["feature", "flat"]
    kind: Kind
    missing: Missing
    policy: Policy
    layers: Mapping[str, Layer] = field(default_factory=dict)
    configs: Mapping[str, LoRAConfig] = field(default_factory=dict)  # by task, in the order they came
    bits: int | None = None
    base: Mapping[str, Any] | None = None  # the fingerprint of the base, as far as the adapters told

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.layers.values() for x in layer.stored())
