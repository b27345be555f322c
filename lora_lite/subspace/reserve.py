"""Which directions does a layer hold beyond those it uses, so that tasks to come may show them to be strong? The next few, in bfloat16.

What an absorb lets go of is gone: adapters that come one by one would bring, a little each, a direction that all of them share, and
none of it would add up. With two more, and one for every eight used, one by one ends within 1.05 of the batch's error
(tests/test_subspace_absorb.py); without them at up to 3 times.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lite.subspace.coefficients import Kind, Parts
from lora_lite.subspace.frame import Frame

HELD = torch.bfloat16


def beyond(k: int) -> int:
    """How many more than the k that are used."""
    return 2 + k // 8


@dataclass(frozen=True, eq=False)
class Reserve:
    """Directions behind each side's, weaker than those; no task is reconstructed from them.

    components  (q_b, d_out) and (q_a, d_in), orthogonal to the layer's and to each other but for rounding
    energies    (q_b,) and (q_a,)
    parts       each task's coefficients along them, as the layer has its own; of a "core" all that the wider one has beside it, in a row
    lost        (n,) a bound on each task's squared error if they were used
    """

    components: tuple[Tensor, Tensor]
    energies: tuple[Tensor, Tensor]
    parts: Parts
    lost: Tensor

    def tensors(self) -> list[Tensor]:
        return [*self.components, *self.energies, self.lost, *self.parts]

    def frames(self, b: Frame, a: Frame) -> tuple[Frame, Frame]:
        """Both sides with these behind; nothing of what lies along them is left over."""
        found = []
        for f, more, energy in zip((b, a), self.components, self.energies, strict=True):
            rest = max(0.0, f.rest - float(energy.sum())) if f.mean is not None else 0.0
            wider = torch.cat([f.basis(), more.to(f.basis())])
            found.append(dataclasses.replace(f, components=wider, energy=torch.cat([f.energy, energy]), rest=rest))
        return found[0], found[1]

    def whole(self, kind: Kind, parts: Parts) -> Parts:
        """Coefficients on the layer's directions and these together."""
        mine = tuple(p.to(q) for p, q in zip(self.parts, parts, strict=True))
        if kind != "core":
            return tuple(torch.cat(pair, dim=1) for pair in zip(parts, mine, strict=True))
        n, kb, ka = parts[0].shape
        (qb, qa), below = (len(e) for e in self.energies), mine[0][:, kb * len(self.energies[1]) :]
        right = mine[0][:, : kb * qa].unflatten(1, (kb, qa))
        return (torch.cat([torch.cat([parts[0], right], 2), below.reshape(n, qb, ka + qa)], 1),)

    def joined(self, rows: int, lost: float) -> Reserve:
        """With a task that was fitted to the layer's own directions, in so many rows: it has nothing here."""
        parts = tuple(F.pad(p, (0, 0, 0, rows)) for p in self.parts)
        return dataclasses.replace(self, parts=parts, lost=torch.cat([self.lost, self.lost.new_tensor([lost])]))

    def without(self, task: list[int], rows: Tensor) -> Reserve:
        return dataclasses.replace(self, parts=tuple(p[rows.to(p.device)] for p in self.parts), lost=self.lost[task])

    def to(self, device: torch.device | None) -> Reserve:
        cb, ca, eb, ea, lost, *parts = (x.to(device=device) for x in self.tensors())
        return Reserve((cb, ca), (eb, ea), tuple(parts), lost)


def kept_back(kind: Kind, b: Frame, a: Frame, parts: Parts, lost: Tensor, gone: Tensor, kb: int, ka: int) -> Reserve:
    """What lies behind the first kb and ka directions, of squared size `gone` by task; `lost` is what the tasks had lost with them.

    Rounding three factors of relative error e, f and g moves their product by at most (1 + e)(1 + f)(1 + g) - 1 of its size.
    """
    if kind == "core":
        more: Parts = (torch.cat([parts[0][:, :kb, ka:].flatten(1), parts[0][:, kb:].flatten(1)], 1),)
    else:
        more = parts[0][:, kb:], parts[1][:, ka:]
    sides, moved = (b.basis()[kb:], a.basis()[ka:]), 1 + torch.finfo(HELD).eps / 2
    for x in sides:
        moved *= 1 + float(torch.linalg.vector_norm(x - x.to(HELD)))
    held = (lost.double().clamp(min=0).sqrt() + (moved - 1) * gone.sqrt()).square().float()
    energies = b.energy[kb:].clone(), a.energy[ka:].clone()
    return Reserve((sides[0].to(HELD), sides[1].to(HELD)), energies, tuple(p.to(HELD) for p in more), held)
