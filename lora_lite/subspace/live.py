"""How does a task of a subspace go onto a model to be trained there, and come back?"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_lite.adapter import Adapter
from lora_lite.config import AdapterConfig
from lora_lite.subspace.coefficients import Kind, Parts, as_cores, padded
from lora_lite.subspace.state import Layer, State
from lora_lite.subspace.training import Place, Trainable, basis_hash, expanded
from lora_lite.variants.shared import SharedConfig, small

FIELDS = {"core": ("lora_core",), "diag": ("lora_diag",), "factors": ("lora_Y", "lora_X"), "flat": ("lora_y", "lora_x")}
FROZEN = {"flat": ("lora_comps_B", "lora_comps_A", "lora_mean_B", "lora_mean_A")}


def live(state: State, config: AdapterConfig, targets: Sequence[str] | None, name: str, seed: int | None) -> Adapter:
    """A detached adapter of variant "shared" on this subspace's bases: `sub.live(config).put_on(model)`."""
    if not isinstance(config, SharedConfig):
        raise TypeError(f"shared= goes with SharedConfig(train=...), got {type(config).__name__}")
    check_train(state, config)
    modules = [m for m in state.layers if targets is None or m in set(targets)]
    if config.task is not None:
        modules = [m for m in modules if config.task in state.layers[m].index]
    if not modules:
        raise ValueError(
            f"none of the targets is a layer of the subspace; it has {list(state.layers)[:5]}, asked for {list(targets or ())[:5]}"
        )
    generator = torch.Generator().manual_seed(seed if seed is not None else int(torch.randint(2**62, ())))
    tensors, rooms = {}, {}
    for m in modules:
        tensors[m], rooms[m] = layer_tensors(state, state.layers[m], config, generator)
    made = dataclasses.replace(
        config, rooms=rooms, basis_id=f"{len(state.configs)} tasks, {len(modules)} layers", basis_hash=basis_hash(state, modules)
    )
    return Adapter(made, tensors, {m: (state.layers[m].d_in, state.layers[m].d_out) for m in modules}, name=name)


def check_train(state: State, config: SharedConfig) -> None:
    if (config.train == "flat") != (state.space == "flat"):
        raise ValueError(f'train={config.train!r} does not fit a subspace of space="{state.space}"')
    if config.task is not None and config.task not in state.configs:
        raise KeyError(f"no task {config.task!r} here; there are {list(state.configs)[:20]}")
    if config.task is not None and config.train not in (state.kind, "core", "flat"):
        raise ValueError(f'train={config.train!r} cannot start at a task kept as {state.kind!r}; train="core" can')


def layer_tensors(
    state: State, layer: Layer, config: SharedConfig, generator: torch.Generator
) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    b, a = expanded(layer.b, config.expand, generator), expanded(layer.a, config.expand, generator)
    r, scale = beginning(state, layer, config)
    tensors = {"lora_U": b.basis(), "lora_V": a.basis()}
    widest = 0
    if config.train == "flat":
        mb, ma = b.centre(), a.centre()
        assert mb is not None and ma is not None
        tensors, widest = dict(zip(FROZEN["flat"], (b.basis(), a.basis(), mb, ma), strict=True)), b.d // layer.d_out
    start = padded(config.train, starting(state, layer, config, r, generator), b.k, a.k)
    own = start if config.train == "factors" else tuple(p[0] for p in start)
    wanted = {n: v.to(config.dtype) for n, v in tensors.items()}
    return wanted | {n: v.to(config.dtype) for n, v in zip(FIELDS[config.train], own, strict=True)}, (b.k, a.k, r, scale, widest)


def beginning(state: State, layer: Layer, config: SharedConfig) -> tuple[int, float]:
    """Rank and scale: the task's, else (flat) what most tasks have, since the mean is theirs, else r and 1."""
    if config.task is not None:
        i = layer.index[config.task]
        return layer.ranks[i], layer.scales[i]
    if config.train == "flat" and layer.tasks:
        return Counter(zip(layer.ranks, layer.scales, strict=True)).most_common(1)[0][0]
    return config.r, 1.0


def starting(state: State, layer: Layer, config: SharedConfig, r: int, generator: torch.Generator) -> Parts:
    kb, ka, device = layer.b.k, layer.a.k, layer.lost.device
    if config.task is not None:
        own = layer.own(state.kind, config.task)
        return own if config.train == state.kind else (as_cores(state.kind, own, [own[0].shape[0]]),)
    shapes = {"core": [(1, kb, ka)], "diag": [(1, min(kb, ka))], "factors": [(r, kb), (r, ka)], "flat": [(1, kb), (1, ka)]}[config.train]
    fresh = tuple(torch.zeros(s, device=device) for s in shapes)
    return (fresh[0], small((r, ka), generator).to(device)) if config.train == "factors" else fresh


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
        names = FROZEN["flat"][:2] if config.train == "flat" else ("lora_U", "lora_V")
        b, a = (f.padded(detached[n][f.k :]) for f, n in zip((layer.b, layer.a), names, strict=True))
        assert (b.k, a.k) == (kb, ka)
        bases = (layer.b.components, layer.a.components)
        places[m] = Place(bases, b if kb > layer.b.k else layer.b, a if ka > layer.a.k else layer.a, r, scale, (layer.d_in, layer.d_out))
        own = tuple(detached[n] for n in FIELDS[config.train])
        values[m] = own if config.train == "factors" else tuple(p[None] for p in own)
    kind: Kind = config.train
    return Trainable(kind, task_id, places, values)
