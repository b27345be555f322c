"""How is a task trained by its coefficients alone, with a few private directions, and kept when it is good?"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from loguru import logger
from torch import Tensor
from torch.nn import Parameter

from lora_lite.checkpoint import listed, raw
from lora_lite.lowrank import LowRank
from lora_lite.subspace.apart import Apart
from lora_lite.subspace.build import config_of
from lora_lite.subspace.coefficients import Kind, Parts, as_cores, expand, mapped, padded
from lora_lite.subspace.frame import Frame, outside, upright
from lora_lite.subspace.packed import Packed, Stored, dense
from lora_lite.subspace.source import check_id
from lora_lite.subspace.state import Layer, State
from lora_lite.variants.lora import LoRAConfig

NAMES = {"core": ("loadings",), "diag": ("loadings",), "factors": ("loadings_b", "loadings_a"), "flat": ("loadings_b", "loadings_a")}


class Place(NamedTuple):
    """Where one layer's coefficients live while they are trained: the bases they began on, those bases with private directions."""

    bases: tuple[Stored, Stored]
    b: Frame
    a: Frame
    rank: int
    scale: float
    sizes: tuple[int, int]


class Trainable(dict[str, Parameter]):
    """Parameters by name, and the bases that give them meaning: `params.factors()` is the update, differentiable in them."""

    def __init__(self, kind: Kind, task_id: str, places: Mapping[str, Place], values: Mapping[str, Parts]) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.task_id, self.places = task_id, dict(places)
        for m, parts in values.items():
            for name, value in zip(NAMES[kind], parts, strict=True):
                squeezed = value if kind == "factors" else value[0]
                self[f"{m}.{name}"] = Parameter(squeezed.detach().clone())

    def parts(self, module: str) -> Parts:
        found = tuple(self[f"{module}.{name}"] for name in NAMES[self.kind])
        return found if self.kind == "factors" else tuple(p[None] for p in found)

    def factors(self, c: float = 1.0) -> dict[str, LowRank]:
        """The weight update by layer, to add to a forward pass: y + g (x A^T) B^T."""
        return {m: LowRank(*expand(self.kind, self.parts(m), p.b, p.a, p.rank, p.sizes), p.scale).scaled(c) for m, p in self.places.items()}


def trainable(state: State, task_id: str, num_expand: int, seed: int) -> Trainable:
    if not isinstance(num_expand, int) or isinstance(num_expand, bool) or num_expand < 0:
        raise ValueError(f"num_expand must be a whole number from 0, got {num_expand!r}")
    generator = torch.Generator().manual_seed(seed)
    places, values = {}, {}
    on_bases(state.layers, task_id)
    for m, layer in state.layers.items():
        if task_id in layer.index:
            b, a = expanded(layer.b, num_expand, generator), expanded(layer.a, num_expand, generator)
            i = layer.index[task_id]
            bases = (layer.b.components, layer.a.components)
            places[m] = Place(bases, b, a, layer.ranks[i], layer.scales[i], (layer.d_in, layer.d_out))
            values[m] = padded(state.kind, layer.own(state.kind, task_id), b.k, a.k)
    return Trainable(state.kind, task_id, places, values)


def on_bases(layers: Mapping[str, Layer], task_id: str) -> None:
    if odd := [m for m, layer in layers.items() if task_id in layer.index and isinstance(layer, Apart)]:
        raise ValueError(
            f"task {task_id!r} keeps its own factors on {len(odd)} layers that share too little for a basis ({odd[:3]}), so it has no "
            "loadings there: ll.attach(model, sub.reconstruct(task)) trains all of it"
        )


def check_directions(layers: Mapping[str, Layer], expand: int) -> None:
    """Refuse to train where no layer has a direction to train along, of its own or of the bases; name those that have none."""
    still = [m for m, x in layers.items() if not isinstance(x, Apart) and (x.bare or not (x.b.k or x.a.k))]
    if expand or not still:
        return
    ways = "absorb an adapter that has some, or ask for further directions of the task's own (expand=, num_expand=)"
    if len(still) == len(layers):
        raise ValueError(
            f"there is nothing to train: the bases have no directions on any of {len(layers)} layers ({listed(still)}). They are made of "
            f'adapters that are zero there (B = 0, untrained), or of only one in space "flat"; {ways}'
        )
    logger.warning("{} of {} layers have no directions, so nothing trains there: {}; {}", len(still), len(layers), listed(still), ways)


def expanded(frame: Frame, q: int, generator: torch.Generator | None) -> Frame:
    """Random directions behind the basis, orthogonal to it and to each other; fewer where the side has no room."""
    if not q:
        return frame
    U = frame.basis().double()
    drawn = torch.randn(frame.d, q, generator=generator, dtype=torch.float64).to(U.device)
    return frame.padded(outside(torch.linalg.qr(U.T).Q.T, drawn, 1e-9)) if frame.k else frame.padded(outside(U, drawn, 1e-9))


def committed(state: State, trained: Mapping[str, Tensor], task_id: str) -> State:
    """The state with the task as it was trained; all is checked first. Its private directions become everyone's, unused by the others."""
    check_id(task_id)
    if not isinstance(trained, Trainable):
        trained = named(state, trained, task_id)
    check(state, trained, task_id)
    layers = dict(state.layers)
    for m, place in trained.places.items():
        layers[m] = replaced(state, layers[m], place, converted(state.kind, trained.kind, trained.parts(m)), task_id)
    config = state.configs.get(task_id, LoRAConfig())
    state = dataclasses.replace(state, layers=layers, configs={**state.configs, task_id: config})
    return dataclasses.replace(state, configs={**state.configs, task_id: config_of(state, task_id, config)})


def named(state: State, given: Mapping[str, Tensor], task_id: str) -> Trainable:
    """A plain dict of parameters, as `get_trainable_params` names them, on the bases as they are."""
    if task_id not in state.configs:
        raise KeyError(f"no task {task_id!r} here; parameters alone can only replace a task; there are {list(state.configs)[:20]}")
    fresh = trainable(state, task_id, 0, 0)
    if set(fresh) != set(given):
        raise ValueError(f"the parameters of {task_id!r} are {sorted(fresh)[:4]}, got {sorted(given)[:4]}")
    if wrong := [n for n, p in fresh.items() if p.shape != given[n].shape]:
        raise ValueError(f"{wrong[0]}: expected {tuple(fresh[wrong[0]].shape)}, got {tuple(given[wrong[0]].shape)}")
    for n, p in given.items():
        fresh[n] = Parameter(p.detach().clone())
    return fresh


def check(state: State, trained: Trainable, task_id: str) -> None:
    for m, place in trained.places.items():
        layer = state.layers.get(m)
        if layer is None or not (place.bases[0] is layer.b.components and place.bases[1] is layer.a.components):
            raise ValueError(
                f"task {task_id!r}, module {m!r}: the bases have changed since training began (absorb, quantize, to or commit)"
            )
        if place.b.k > layer.b.k and isinstance(layer.b.components, Packed):
            raise ValueError(f"task {task_id!r}: a quantised basis cannot take private directions; to(dtype=torch.float32) first")
    if others := [m for m, layer in state.layers.items() if task_id in layer.index and m not in trained.places]:
        raise ValueError(
            f"task {task_id!r} is there already, with {len(others)} layers that were not trained here: {others[:3]}; both together would "
            "be neither. remove_task it first, or give another id"
        )
    for n, p in trained.items():
        if not bool(torch.isfinite(p).all()):
            raise ValueError(f"task {task_id!r}: {n} holds NaN or infinite values; nothing was changed")


def converted(to: Kind, kind: Kind, parts: Parts) -> Parts:
    """Coefficients of one kind as another that can hold them exactly."""
    parts = tuple(p.detach() for p in parts)
    if to == kind:
        return parts
    if "flat" in (to, kind) or to == "diag":
        raise ValueError(f'a subspace of {to!r} coefficients cannot keep what was trained as {kind!r}; train="{to}"')
    core = as_cores(kind, parts, [parts[0].shape[0]])
    if to == "core":
        return (core,)
    P, S, Qh = torch.linalg.svd(core[0], full_matrices=False)
    return (P * S.sqrt()).T.contiguous(), S.sqrt()[:, None] * Qh


def replaced(state: State, layer: Layer, place: Place, parts: Parts, task_id: str) -> Layer:
    kind = state.kind
    if task_id in layer.index:
        layer = layer.without(kind, task_id)
    kb, ka = max(place.b.k, layer.b.k), max(place.a.k, layer.a.k)
    place, parts = straightened(kind, layer, place, parts)
    if (kb, ka) != (layer.b.k, layer.a.k):
        wider = padded(kind, layer.all_parts(), kb, ka)
        b, a = (dataclasses.replace(p, energy=energy(f, p.k)) for f, p in ((layer.b, place.b), (layer.a, place.a)))
        layer = dataclasses.replace(layer, b=b, a=a, parts=wider, reserve=None)  # it may lie along the new ones
    parts = padded(kind, parts, kb, ka)
    least = max(1, min(kb, ka))  # where no adapter had a direction the update is zero, of rank 1 as a LoRA
    rank = {"core": least, "diag": least, "factors": parts[0].shape[0], "flat": place.rank}[kind]
    size = kept_size(kind, layer, parts, rank, place.scale)
    return layer.joined(kind, task_id, rank, place.scale, tuple(p.detach() for p in parts), size, 0.0)


def straightened(kind: Kind, layer: Layer, place: Place, parts: Parts) -> tuple[Place, Parts]:
    """Private directions that were trained in low precision made orthonormal again, the coefficients carried. The layer's stay."""
    if (place.b.k, place.a.k) == (layer.b.k, layer.a.k):
        return place, parts
    frames, turns = [], []
    for old, f in ((layer.b, place.b), (layer.a, place.a)):
        U, T = upright(f.basis().double())
        T[: old.k], U[: old.k] = torch.eye(old.k, f.k).to(T), old.basis().double()
        frames.append(dataclasses.replace(f, components=U.to(old.basis())))
        turns.append(T)
    # a diagonal cannot be turned: what directions bent by bfloat16 cost it is of bfloat16's size
    parts = parts if kind == "diag" else mapped(kind, parts, turns[0], turns[1])
    return place._replace(b=frames[0], a=frames[1]), parts


def energy(frame: Frame, k: int) -> Tensor:
    return torch.nn.functional.pad(frame.energy, (0, k - frame.k))


def kept_size(kind: Kind, layer: Layer, parts: Parts, rank: int, scale: float) -> float:
    A, B = expand(kind, tuple(p.double() for p in parts), layer.b, layer.a, rank, (layer.d_in, layer.d_out))
    if kind == "flat":
        return float(A.square().sum() + B.square().sum())
    return scale**2 * float(((B.T @ B) * (A @ A.T)).sum())


def with_dtype(config: LoRAConfig, dtype: torch.dtype) -> LoRAConfig:
    return config if config.dtype is dtype else dataclasses.replace(config, dtype=dtype)


def basis_hash(state: State, modules: Sequence[str]) -> str:
    """sha256 over the bases of these layers, in this order."""
    total = hashlib.sha256()
    for m in modules:
        layer = state.layers[m]
        for x in (layer.b.components, layer.a.components, layer.b.mean, layer.a.mean):
            if x is not None:
                total.update(m.encode())
                total.update(raw(dense(x).cpu()))
    return total.hexdigest()
