"""How does a subspace become one safetensors file, and come back whole or not at all?

Layers and tasks are numbered in the tensors' keys (`0.b.components`, `0.parts.1.scales`); their names are JSON text in the
header and never a path. One tensor per layer holds all tasks' coefficients, so that a thousand tasks are a few tensors.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lora_lite import checkpoint
from lora_lite.checkpoint import (
    CheckpointError,
    as_path,
    brief,
    check_entries,
    check_place,
    digest,
    in_place,
    make_folder,
    non_finite,
    problem,
    raw,
    read_header,
    read_tensors,
    replace,
    shown,
    strict_json,
)
from lora_lite.subspace.apart import Apart
from lora_lite.subspace.coefficients import Kind
from lora_lite.subspace.frame import Frame
from lora_lite.subspace.packed import Packed, Sized, Sizes, Stored, even
from lora_lite.subspace.reserve import Reserve
from lora_lite.subspace.source import largest_rank
from lora_lite.subspace.state import Layer, Missing, Policy, State
from lora_lite.variants.lora import LoRAConfig
from lora_lite.version import __version__

FORMAT, FORMAT_VERSION = "lora_lite.subspace", "2"
READABLE = ("1", "2")  # "1" had no reserves, nor the scatter outside the directions of space "flat"
RESERVED = ("b.components", "a.components", "b.energy", "a.energy", "lost", "parts.0", "parts.1")
PARTS = {"core": 1, "diag": 1, "factors": 2, "flat": 2}


def write(path: str | os.PathLike[str], state: State) -> None:
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give a file in it, such as {Path(path) / 'subspace.safetensors'}")
    flat = {name: v.detach().to("cpu").contiguous() for name, v in tensors(state).items()}
    if bad := non_finite(flat):
        raise CheckpointError(f"not saved: {bad[:5]} hold NaN or infinity")
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "subspace": json.dumps(described(state), separators=(",", ":")),
    }
    head = checkpoint.header(metadata | {"sha256": digest(metadata, flat)}, flat)
    make_folder(target.parent)
    replace(target, [head, *(raw(v) for _, v in in_place(flat))])


def tensors(state: State) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}

    def put(name: str, x: Stored | None) -> None:
        if isinstance(x, Packed):
            flat[name], flat[f"{name}.scales"] = x.values, x.scales
            if x.runs is not None and not x.is_even:
                flat[f"{name}.runs"] = x.runs
        elif x is not None:
            flat[name] = x

    for i, layer in enumerate(state.layers.values()):
        for side, frame in (("b", layer.b), ("a", layer.a)):
            put(f"{i}.{side}.components", frame.components)
            put(f"{i}.{side}.mean", frame.mean)
            put(f"{i}.{side}.energy", frame.energy)
        for j, part in enumerate(layer.parts):
            put(f"{i}.parts.{j}", part)
        if layer.reserve is not None:
            for name, x in zip(RESERVED, layer.reserve.tensors(), strict=False):
                put(f"{i}.reserve.{name}", x)
        for name, sizes in (("energy", layer.energy), ("lost", layer.lost)):
            flat[f"{i}.{name}"] = sizes.codes if isinstance(sizes, Sizes) else sizes
    return flat


def described(state: State) -> dict[str, Any]:
    """Everything but the tensors. Configs and lists of tasks that repeat are written once."""
    texts: dict[str, int] = {}
    lists: dict[Having, int] = {}
    tasks = list(state.configs)
    number = {t: i for i, t in enumerate(tasks)}
    own, last = [], None
    for c in state.configs.values():  # most are as the one before: comparing is a tenth of writing out
        own.append(own[-1] if c == last else texts.setdefault(c.to_json(), len(texts)))
        last = c
    layers = []
    for name, x in state.layers.items():
        which = lists.setdefault((x.tasks, x.ranks, x.scales), len(lists))
        said: dict[str, Any] = {"name": name, "d_in": x.d_in, "d_out": x.d_out, "having": which, "shapes": shapes(x)}
        said["tops"] = [s.top if isinstance(s, Sizes) else None for s in (x.energy, x.lost)]
        rare = {"rest": [x.b.rest, x.a.rest], "reserve": x.reserve is not None, "apart": isinstance(x, Apart)}
        layers.append(said | {k: v for k, v in rare.items() if v not in (False, [0.0, 0.0])})
    policy = {k: getattr(state.policy, k) for k in ("variance_threshold", "num_components", "budget_bytes")}
    return {
        "space": state.space, "kind": state.kind, "missing": state.missing, "bits": state.bits, "policy": policy, "base": state.base,
        "tasks": tasks, "config_of": short(own), "configs": [json.loads(c) for c in texts],
        "having": [{"tasks": None if list(ts) == tasks else [number[t] for t in ts], "ranks": short(r), "scales": short(s)}
                   for ts, r, s in lists], "layers": layers,
    }  # fmt: skip


def short(values: Sequence[Any]) -> Any:
    """One value for all where they are the same: a thousand tasks often are."""
    return values[0] if values and all(v == values[0] for v in values) else list(values)


def spread(said: Any, n: int) -> list[Any]:
    return said if isinstance(said, list) else [said] * n


def shapes(layer: Layer) -> list[Any]:
    """Of what is packed, whose integers do not tell: [shape, group, bits] by the order of `Layer.numbers`."""
    return [[list(x.shape), x.group, x.bits] if isinstance(x, Packed) else None for x in layer.numbers()]


def read(path: str | os.PathLike[str]) -> State:
    source, path = (
        str(path),
        as_path(path, "SharedSubspace.load(path) reads what sub.save(path) wrote; of adapters it is from_adapters([...])"),
    )
    check_place(path)
    with open(path, "rb") as file:
        head = read_header(source, file)
        metadata = head.pop("__metadata__", None) or {}
        check_ours(source, metadata, head)
        check_entries(source, head)
        file.seek(0)
        flat = read_tensors(source, file, list(head))
    problems = problem("holding NaN or infinity", non_finite(flat))
    try:
        state = restored(strict_json(metadata["subspace"]), flat)
    except Exception as error:  # JSON that anyone may have written
        state, problems = None, [f"its header does not describe its tensors: {brief(error)}", *problems]
    checkpoint.check_whole(source, "is not a subspace as it stands", problems, checkpoint.is_damaged(source, metadata, flat))
    assert state is not None
    return state


def check_ours(source: str, metadata: Mapping[str, str], head: Mapping[str, Any]) -> None:
    if metadata.get("format") != FORMAT or "subspace" not in metadata:
        found = metadata.get("format")
        hint = " It is an adapter: ll.load(model, path) attaches it." if found == checkpoint.FORMAT else ""
        raise CheckpointError(f"{source} was not saved by SharedSubspace.save: its format is {shown(repr(found))}.{hint}")
    if metadata.get("format_version") not in READABLE:
        version = shown(str(metadata.get("format_version")))
        raise CheckpointError(f"{source} has subspace format version {version}; lora_lite {__version__} reads {' and '.join(READABLE)}")


def restored(said: dict[str, Any], flat: dict[str, Tensor]) -> State:
    kind: Kind = said["kind"]
    if kind not in PARTS or said["space"] != ("flat" if kind == "flat" else "feature") or said["missing"] not in get_args(Missing):
        raise ValueError(f"space {said['space']!r}, kind {kind!r}, missing {said['missing']!r}")
    if said["bits"] not in (None, 4, 8):
        raise ValueError(f"bits {said['bits']!r}")
    tasks: list[str] = said["tasks"]
    config_of = spread(said["config_of"], len(tasks))
    if len(set(tasks)) < len(tasks) or not all(isinstance(t, str) for t in tasks) or len(tasks) != len(config_of):
        raise ValueError("its tasks are not different texts with a config each")
    configs = [LoRAConfig.from_dict(c) for c in said["configs"]]
    left = dict(flat)
    having = [having_from(h, tasks) for h in said["having"]]  # once for all the layers that say the same
    layers = {x["name"]: layer_from(i, x, having[x["having"]], kind, left) for i, x in enumerate(said["layers"])}
    if left or len(layers) < len(said["layers"]):
        raise ValueError(f"tensors that no layer has: {sorted(left)[:5]}")
    by_task = {t: configs[c] for t, c in zip(tasks, config_of, strict=True)}
    base = said.get("base")
    if base is not None and not isinstance(base["targets"], dict):
        raise ValueError("the fingerprint of its base has no layers")
    return State(said["space"], kind, said["missing"], Policy(**said["policy"]), layers, by_task, said["bits"], base)


Having = tuple[tuple[str, ...], tuple[int, ...], tuple[float, ...]]  # tasks, their ranks and scales


def having_from(said: dict[str, Any], tasks: list[str]) -> Having:
    having = tasks if said["tasks"] is None else [tasks[t] for t in said["tasks"]]
    ranks, scales = (spread(said[name], len(having)) for name in ("ranks", "scales"))
    if not all(isinstance(r, int) and r > 0 for r in ranks):
        raise ValueError("ranks are whole numbers from 1")
    return tuple(having), tuple(ranks), tuple(map(float, scales))


def layer_from(i: int, x: dict[str, Any], having: Having, kind: Kind, flat: dict[str, Tensor]) -> Layer:
    packed = iter(x["shapes"])

    def take(name: str) -> Stored:
        shape = next(packed)
        values = flat.pop(f"{i}.{name}")
        if shape is None:
            return values
        scales, runs = flat.pop(f"{i}.{name}.scales"), flat.pop(f"{i}.{name}.runs", None)
        return unpacked(values, scales, runs, tuple(shape[0]), shape[2], shape[1])

    components = [take(f"{side}.components") for side in "ba"]
    means = [take(f"{side}.mean") if kind == "flat" else None for side in "ba"]
    parts = tuple(take(f"parts.{j}") for j in range(2 if x.get("apart") else PARTS[kind]))
    rests = [max(0.0, float(rest)) for rest in x.get("rest", (0.0, 0.0))]
    b, a = (Frame(c, m, flat.pop(f"{i}.{side}.energy"), rest) for side, c, m, rest in zip("ba", components, means, rests, strict=True))
    kinds = Apart if x.get("apart") else Layer
    layer = kinds(x["d_in"], x["d_out"], b, a, *having, parts, *sizes_from(i, x, flat))
    if x.get("reserve"):
        cb, ca, eb, ea, lost, *more = (flat.pop(f"{i}.reserve.{name}") for name in RESERVED[: 5 + PARTS[kind]])
        layer = dataclasses.replace(layer, reserve=Reserve((cb, ca), (eb, ea), tuple(more), lost))
    check_layer(kind, layer)
    return layer


def sizes_from(i: int, x: dict[str, Any], flat: dict[str, Tensor]) -> tuple[Sized, Sized]:
    found = []
    for name, top, up in zip(("energy", "lost"), x.get("tops", (None, None)), (False, True), strict=True):
        values = flat.pop(f"{i}.{name}")
        if (top is not None) != (values.dtype is torch.uint8) or values.dim() != 1:
            raise ValueError(f"{name} {tuple(values.shape)} of {values.dtype} with the largest at {top!r}")
        found.append(values if top is None else Sizes(values, int(top), up))
    return found[0], found[1]


def unpacked(values: Tensor, scales: Tensor, runs: Tensor | None, shape: tuple[int, ...], bits: int, group: int) -> Packed:
    width = 1
    for n in shape[1:]:
        width *= n
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits")
    if runs is None and 0 < width <= group // 2 and len(scales) != shape[0]:
        runs = even(shape[0], group // width)
    if runs is not None and (runs.dtype != torch.uint8 or runs.dim() != 1 or int(runs.sum(dtype=torch.long)) != shape[0]):
        raise ValueError(f"runs of rows that share a scale do not add up to {shape[0]} rows")
    expected = (shape[0], width if bits == 8 else -(-width // 2)), (shape[0] if runs is None else len(runs), -(-width // group))
    dtypes = (torch.int8 if bits == 8 else torch.uint8, torch.bfloat16)
    if (tuple(values.shape), tuple(scales.shape)) != expected or (values.dtype, scales.dtype) != dtypes:
        raise ValueError(f"integers {tuple(values.shape)} and scales {tuple(scales.shape)} do not hold {shape} in {bits} bits")
    return Packed(values, scales, shape, bits, group, runs)


def check_layer(kind: Kind, x: Layer) -> None:
    """Every shape that follows from another."""
    if x.reserve is not None:
        check_reserve(kind, x, x.reserve)
    n, kb, ka = len(x.tasks), x.b.k, x.a.k
    if not all(isinstance(d, int) and d > 0 for d in (x.d_in, x.d_out)):
        raise ValueError(f"a layer {x.d_in!r} -> {x.d_out!r}")
    if max(x.ranks, default=0) > (most := largest_rank(x.d_in, x.d_out)):
        raise ValueError(f"a layer {x.d_in} -> {x.d_out} has a task of rank {max(x.ranks):,}; at most {most:,}")
    if kind == "flat":
        sizes_fit = x.b.d % x.d_out == 0 and x.a.d % x.d_in == 0 and max(x.ranks, default=0) * x.d_in <= x.a.d
    else:
        sizes_fit = (x.b.d, x.a.d) == (x.d_out, x.d_in)
    total = sum(x.ranks)
    want = [(total, x.d_out), (total, x.d_in)] if isinstance(x, Apart) else {
        "core": [(n, kb, ka)], "diag": [(n, min(kb, ka))], "factors": [(total, kb), (total, ka)], "flat": [(n, kb), (n, ka)],
    }[kind]  # fmt: skip
    lengths = {len(x.ranks), len(x.scales), len(x.energy), len(x.lost), len(set(x.tasks))}
    if not sizes_fit or [tuple(p.shape) for p in x.parts] != want or lengths != {n} or (len(x.b.energy), len(x.a.energy)) != (kb, ka):
        raise ValueError(
            f"a layer {x.d_in} -> {x.d_out} on {kb} and {ka} directions for {n} tasks has parts {[tuple(p.shape) for p in x.parts]}"
        )


def check_reserve(kind: Kind, x: Layer, reserve: Reserve) -> None:
    qb, qa, n = len(reserve.energies[0]), len(reserve.energies[1]), len(x.tasks)
    kb, ka = x.b.k + qb, x.a.k + qa
    rows = sum(x.ranks) if kind == "factors" else n
    parts = [(n, kb * ka - x.b.k * x.a.k)] if kind == "core" else [(rows, qb), (rows, qa)]
    found = [tuple(t.shape) for t in (*reserve.components, *reserve.parts, reserve.lost)]
    if kind == "diag" or isinstance(x, Apart) or found != [(qb, x.b.d), (qa, x.a.d), *parts, (n,)]:
        raise ValueError(f"a reserve of {qb} and {qa} directions beside {x.b.k} and {x.a.k} for {n} tasks has tensors {found}")
