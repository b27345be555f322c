"""Where does an adapter lie in a subspace as it is now, and how much of it is caught?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_lite.config import AdapterConfig
from lora_lite.subspace.apart import Apart, as_parts
from lora_lite.subspace.bases import joined
from lora_lite.subspace.block import Block
from lora_lite.subspace.build import config_of
from lora_lite.subspace.change import appended, check_new, read_all
from lora_lite.subspace.coefficients import Kind, Parts, encode
from lora_lite.subspace.packed import Stored
from lora_lite.subspace.source import Source, check_finite
from lora_lite.subspace.state import Layer, State


@dataclass(frozen=True, eq=False)
class Caught:
    """One layer of a projection: coefficients, and the squared size and squared error of what they stand for."""

    parts: Parts
    rank: int
    scale: float
    energy: float
    error: float
    bases: tuple[Stored, Stored]


@dataclass(frozen=True, eq=False)
class TaskProjection:
    """An adapter's coefficients on a subspace's bases: `p = sub.project(adapter, task_id="new"); p.coverage; sub.add_task(p)`.

    It belongs to the bases it was made on: after an absorb, quantize or to, `add_task` refuses it.
    left_out: by layer that the subspace lacks, how large the adapter is there; all of that is lost.
    """

    task_id: str
    kind: Kind
    layers: Mapping[str, Caught]
    config: AdapterConfig
    base: Mapping[str, Any] | None = None
    left_out: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        lost = f" and {len(self.left_out)} left out" if self.left_out else ""
        return f"TaskProjection({self.task_id!r}, coverage {self.coverage:.3g}, {len(self.layers)} layers{lost})"

    @property
    def coverage(self) -> float:
        """1 - |error|^2 / |update|^2 over all the adapter's layers: 1 is all of it. In "flat", of the factors; it may be below 0 there."""
        lost = sum(self.left_out.values())
        return _share(lost + sum(c.error for c in self.layers.values()), lost + sum(c.energy for c in self.layers.values()))

    @property
    def coverage_by_layer(self) -> dict[str, float]:
        """Layers that the subspace lacks are there with nothing."""
        return {m: _share(c.error, c.energy) for m, c in self.layers.items()} | dict.fromkeys(self.left_out, 0.0)

    @property
    def loadings_a(self) -> dict[str, Tensor]:
        """By layer: the input side's coefficients (a core or a diagonal belongs to both sides)."""
        return {m: c.parts[-1] for m, c in self.layers.items()}

    @property
    def loadings_b(self) -> dict[str, Tensor]:
        return {m: c.parts[0] for m, c in self.layers.items()}


def _share(error: float, energy: float) -> float:
    return 1.0 if energy == 0 else 1 - error / energy


def project(state: State, source: Source, task_id: str) -> TaskProjection:
    updates = read_all(state, source, new=False)
    caught = {}
    for m, u in updates.items():
        layer = state.layers[m]
        if isinstance(layer, Apart):
            one = appended(layer, task_id, u)
            bases = (layer.b.components, layer.a.components)
            error = layer.between("factors", u.scale, as_parts(u), one.own("factors", task_id))
            caught[m] = Caught(as_parts(u), u.rank, u.scale, float(Block([u]).energy), error, bases)
            continue
        alone = Block([u])
        coded = encode(state.kind, layer.b, layer.a, alone, torch.float64 if state.bits is not None else layer.b.basis().dtype)
        bases = (layer.b.components, layer.a.components)
        caught[m] = Caught(coded.parts, u.rank, u.scale, float(coded.energy), float(coded.error), bases)
    return TaskProjection(task_id, state.kind, caught, source.base_config, source.base, sizes_beside(state, source))


def sizes_beside(state: State, source: Source) -> dict[str, float]:
    """By layer that the subspace lacks: the squared size of the update there, in "flat" of its factors."""
    found = {}
    for m in source.modules:
        if m not in state.layers:
            u = source.read(m)
            check_finite(source.task, m, u)
            flat = u.A.double().square().sum() + u.B.double().square().sum()
            found[m] = float(flat if state.kind == "flat" else Block([u]).energy)
    return found


def same_bases(c: Caught, layer: Layer) -> bool:
    return c.bases[0] is layer.b.components and c.bases[1] is layer.a.components


def added(state: State, p: TaskProjection) -> State:
    """With a projected task beside the others, whose coefficients and bases stay bit for bit."""
    check_new(state, p.task_id)
    stale = [m for m, c in p.layers.items() if m not in state.layers or not same_bases(c, state.layers[m])]
    if stale or p.kind != state.kind:
        raise ValueError(
            f"the projection of {p.task_id!r} was made on other bases (of {stale[:3]}) than the subspace has now; project again"
        )
    layers = dict(state.layers)
    for m, c in p.layers.items():
        layers[m] = layers[m].joined(p.kind, p.task_id, c.rank, c.scale, c.parts, c.energy, c.error)
    state = dataclasses.replace(state, layers=layers)
    configs = {**state.configs, p.task_id: config_of(state, p.task_id, p.config)}
    return dataclasses.replace(state, configs=configs, base=joined(state.base, p.base, p.task_id))
