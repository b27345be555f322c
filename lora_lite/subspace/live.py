"""How does a task of a subspace go onto a model to be trained there (`ll.attach(model, SharedConfig(), shared=sub)`), and come back?"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lite.adapter import Adapter
from lora_lite.config import AdapterConfig
from lora_lite.subspace.apart import Apart
from lora_lite.subspace.coefficients import Kind, Parts, padded
from lora_lite.subspace.state import Layer, State
from lora_lite.subspace.training import Place, Trainable, basis_hash, check_directions, converted, expanded, on_bases
from lora_lite.variants.shared import SharedConfig, small

FIELDS = {"core": ("lora_core",), "diag": ("lora_diag",), "factors": ("lora_Y", "lora_X"), "flat": ("lora_y", "lora_x")}
PLACES = [f.name for f in dataclasses.fields(AdapterConfig) if f.name != "dtype"]
Sizes = Mapping[str, tuple[int, int]]


def starting(state: State, config: AdapterConfig, sizes: Sizes, seed: int | None) -> tuple[SharedConfig, dict[str, dict[str, Tensor]]]:
    """What `ll.attach(model, config, shared=sub)` puts on the layers that the subspace has among `sizes`."""
    assert isinstance(config, SharedConfig)
    check_train(state, config)
    modules = [m for m in sizes if m in layers_for(state, config)]
    check_places(state, config, sizes, modules)
    check_directions({m: state.layers[m] for m in modules}, config.expand)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    tensors, rooms = {}, {}
    for m in modules:
        tensors[m], rooms[m] = layer_tensors(state, state.layers[m], config, generator)
    made = f"{len(state.configs)} tasks, {len(modules)} layers"
    return dataclasses.replace(config, rooms=rooms, basis_id=made, basis_hash=basis_hash(state, modules)), tensors


def layers_for(state: State, config: SharedConfig) -> dict[str, Layer]:
    found = {m: layer for m, layer in state.layers.items() if config.task is None or config.task in layer.index}
    if config.task is not None:
        on_bases(found, config.task)
    return {m: layer for m, layer in found.items() if not isinstance(layer, Apart)}


def check_train(state: State, config: SharedConfig) -> None:
    if (config.train == "flat") != (state.space == "flat"):
        raise ValueError(f'train={config.train!r} does not fit a subspace of space="{state.space}"')
    if config.task is not None and config.task not in state.configs:
        raise KeyError(f"no task {config.task!r} here; there are {list(state.configs)[:20]}")
    if state.kind == "diag" and config.train != "diag":
        raise ValueError(f'a subspace of "diag" coefficients could not keep what was trained as {config.train!r}: train="diag"')
    if config.task is not None and config.train == "diag" != state.kind:
        raise ValueError(f'train="diag" cannot start at a task kept as {state.kind!r}, which is no diagonal; train="core" or "factors" can')


def check_places(state: State, config: SharedConfig, sizes: Sizes, modules: Sequence[str]) -> None:
    """Layers that were asked for and are not in the subspace, or are of another size; and the other way round, where no config narrows."""
    have, default = layers_for(state, config), SharedConfig()
    odd = [f"{m} {sizes[m]}, in the subspace {(have[m].d_in, have[m].d_out)}" for m in modules if sizes[m] != (have[m].d_in, have[m].d_out)]
    lacking = [m for m in sizes if m not in have] if config.targets != default.targets else []
    narrowed = any(getattr(config, name) != getattr(default, name) for name in PLACES)
    absent = [] if narrowed else [m for m in have if m not in sizes]
    problems = [
        *([f"none of its layers is among the targets, e.g. {list(sizes)[:2]}; it has {list(have)[:2]}"] if not modules else []),
        *([f"{len(odd)} layers are of other sizes (d_in, d_out): {odd[:2]}"] if odd else []),
        *([f"targets={config.targets!r} names {len(lacking)} layers that it lacks: {lacking[:3]}"] if lacking and modules else []),
        *([f"the model lacks {len(absent)} of its layers (or `exclude` leaves them out): {absent[:3]}"] if absent and modules else []),
    ]
    if problems:
        raise ValueError(f"this subspace does not fit: {'; '.join(problems)}")


def layer_tensors(
    state: State, layer: Layer, config: SharedConfig, generator: torch.Generator | None
) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    """Copies, so that nothing which happens to an adapter reaches the subspace."""
    b, a = expanded(layer.b, config.expand, generator), expanded(layer.a, config.expand, generator)
    r, scale = beginning(layer, config)
    frozen, widest = {"lora_B": b.basis().T, "lora_A": a.basis()}, 0
    if config.train == "flat":
        mb, ma = b.centre(), a.centre()
        assert mb is not None and ma is not None
        frozen = {"lora_comps_B": b.basis(), "lora_comps_A": a.basis(), "lora_mean_B": mb, "lora_mean_A": ma}
        widest = b.d // layer.d_out
    start = padded(config.train, beginnings(state, layer, config, r, generator), b.k, a.k)
    own = start if config.train == "factors" else tuple(p[0] for p in start)
    tensors = dict(zip(FIELDS[config.train], own, strict=True)) | frozen
    copied = {n: v.to(config.dtype, copy=True, memory_format=torch.contiguous_format) for n, v in tensors.items()}
    return copied, (b.k, a.k, r, scale, widest)


def beginning(layer: Layer, config: SharedConfig) -> tuple[int, float]:
    """Rank and scale: the task's, else (flat) what most tasks have, since the mean is theirs, else r and 1."""
    if config.task is not None:
        i = layer.index[config.task]
        return layer.ranks[i], layer.scales[i]
    if config.train == "flat" and layer.tasks:
        return Counter(zip(layer.ranks, layer.scales, strict=True)).most_common(1)[0][0]
    return config.r, 1.0


def beginnings(state: State, layer: Layer, config: SharedConfig, r: int, generator: torch.Generator | None) -> Parts:
    kb, ka, device = layer.b.k, layer.a.k, layer.lost.device
    if config.task is not None:
        own = layer.own(state.kind, config.task)
        start = converted(config.train, state.kind, own)
        return (
            start
            if config.train == state.kind or config.train != "factors"
            else of_rank(r, start, torch.finfo(own[0].dtype).eps, generator)
        )
    shapes = {"core": [(1, kb, ka)], "diag": [(1, min(kb, ka))], "factors": [(r, kb), (r, ka)], "flat": [(1, kb), (1, ka)]}[config.train]
    fresh = tuple(torch.zeros(s, device=device) for s in shapes)
    return (fresh[0], small((r, ka), generator).to(device)) if config.train == "factors" else fresh


def of_rank(r: int, parts: Parts, noise: float, generator: torch.Generator | None) -> Parts:
    """Y (r, k_b) and X (r, k_a) of the same core, whose singular values they share. Where those are nothing but rounding, both are zero
    and no gradient would ever leave: such ranks begin as those of a new task do."""
    Y, X = parts
    strength = X.square().sum(1)
    alive = min(r, int((strength > noise * strength.amax()).sum())) if len(strength) else 0
    Y, X, more = Y[:alive], X[:alive], r - alive
    return F.pad(Y, (0, 0, 0, more)), torch.cat([X, small((more, X.shape[1]), generator).to(X)])


def as_trainable(state: State, adapter: Adapter, task_id: str) -> Trainable:
    """A trained live adapter as parameters on the subspace's bases. Raises ValueError where those are not the ones it was trained on."""
    config = adapter.config
    if not isinstance(config, SharedConfig):
        raise TypeError(
            f"commit() takes what was trained on this subspace; a {adapter.variant.name!r} adapter is absorbed: sub.absorb(adapter, id)"
        )
    missing = [m for m in adapter.targets if m not in state.layers]
    if missing or basis_hash(state, adapter.targets) != config.basis_hash:
        raise ValueError(
            f"task {task_id!r} was trained on other bases than the subspace has now (absorb, quantize, to or commit); absorb it instead"
        )
    places, values = {}, {}
    for m, fields in adapter.tensors().items():
        layer, (kb, ka, r, scale, _) = state.layers[m], config.at(m, 0, 0).room
        detached = {n: v.detach().to(layer.lost.device) for n, v in fields.items()}
        flat = config.train == "flat"
        wide_b, wide_a = (detached["lora_comps_B"], detached["lora_comps_A"]) if flat else (detached["lora_B"].T, detached["lora_A"])
        b, a = layer.b.padded(wide_b[layer.b.k :]), layer.a.padded(wide_a[layer.a.k :])
        assert (b.k, a.k) == (kb, ka)
        bases = (layer.b.components, layer.a.components)
        places[m] = Place(bases, b if kb > layer.b.k else layer.b, a if ka > layer.a.k else layer.a, r, scale, (layer.d_in, layer.d_out))
        own = tuple(detached[n] for n in FIELDS[config.train])
        values[m] = own if config.train == "factors" else tuple(p[None] for p in own)
    kind: Kind = config.train
    return Trainable(kind, task_id, places, values)
