"""How does a PEFT folder become an adapter on a model? Everything is checked before the model is touched."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from loguru import logger
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.attachment import all_hooks, tied_names, unwrapped
from lora_lite.base import fingerprint, is_linear, sizes
from lora_lite.checkpoint import CheckpointError, Contents, brief, check_tensors, listed, match_names, problem, shown, strip_prefixes
from lora_lite.config import AdapterConfig
from lora_lite.dial import Coefficient
from lora_lite.fitting import check_base, fitted, shapes_beside
from lora_lite.peft_format.folder import Folder, key_pattern, read_folder, shared_pattern
from lora_lite.peft_format.matching import named_layers, placed
from lora_lite.peft_format.methods import INERT, METHODS, OFF, Method, method_candidates
from lora_lite.peft_format.numbers import At, Found, common_dtype
from lora_lite.variant import REGISTRY


def from_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    c: Coefficient = 1.0,
    strict_base: bool = True,
    part: str | None = None,
) -> Adapter:
    """Attach the adapter in a PEFT folder. `adapter = ll.from_peft(model, "folder")`. Nothing is fetched from a hub.

    strict_base  whether a base other than the one it was trained on is an error; only folders that `to_peft` wrote say which
    part         of an IA3 folder with both kinds of gates only the "ia3" (outputs) or the "ia3_ff" (inputs); all by default

    `modules_to_save` come as `train_also` does. Tensors of 16 bits become float32, as in PEFT. All or nothing: on any error
    the model is as it was. Raises CheckpointError (a ValueError) for what is damaged, does not fit or cannot be said here.
    """
    model = unwrapped(model)
    found = read_folder(folder)
    contents, layer_sizes = converted(model, found, part)
    now = fingerprint(model, {t: model.get_submodule(t) for t in contents.tensors})
    if found.fingerprint is not None:
        check_base(found.source, restricted(found.fingerprint, layer_sizes), now, strict_base)
    else:
        log_base(found, model)
    adapter = Adapter(
        contents.config, contents.tensors, layer_sizes, name=name or "default", also=contents.also,
        metadata=contents.metadata, fingerprint=now, c=c,
    )  # fmt: skip
    return adapter.put_on(model, known_base=True)


def restricted(saved: Mapping[str, Any], layer_sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint of the layers at hand, under the model's names for them."""
    targets = saved.get("targets")
    if not isinstance(targets, dict):
        return dict(saved)  # refused as unreadable
    names = match_names(targets, layer_sizes)
    return {**saved, "targets": {names[t]: v for t, v in targets.items() if names[t] in layer_sizes}}


def converted(model: nn.Module, found: Folder, part: str | None) -> tuple[Contents, dict[str, tuple[int, int]]]:
    """The folder's contents in our words, under the model's names and in its order, and the sizes of the layers they go on."""
    layers = {n: m for n, m in model.named_modules() if n and is_linear(m)}
    try:
        named = named_layers(model, found.config)
    except CheckpointError as error:
        raise CheckpointError(f"{found.source}: {error}") from error
    candidates = known_methods(found)
    sorted_keys = assign(found, candidates, layers, model)
    check_layers(found, sorted_keys.tensors, named)
    method, here = chosen(found, candidates, named, part)
    told = Found(found.config, sorted_keys.shared, {t: sorted_keys.tensors[t] for t in here}, {t: sizes(layers[t]) for t in here})
    config = settled(method, config_of(method, found), found, told)
    ats = {t: At(own_config(found, config, t, sizes(layers[t])), *sizes(layers[t]), layers[t], t) for t in here}
    theirs = {t: {**method.fill(sorted_keys.tensors[t], ats[t]), **sorted_keys.shared} for t in here}
    check_shapes(found, method, ats, theirs)
    wide = common_dtype(theirs)
    dtype = found.dtype or wide
    read = {t: method.read({f: v.to(wide) for f, v in p.items()}, ats[t]) for t, p in theirs.items()}
    tensors = {t: {f: v.to(dtype) for f, v in p.items()} for t, p in read.items()}
    config = placed(dataclasses.replace(config, dtype=dtype), found.config, model, here)
    layer_sizes = {t: (at.d_in, at.d_out) for t, at in ats.items()}
    also = sorted_keys.also if here[0] == named[0] else {}  # once, though two parts be loaded
    contents = Contents(config, tensors, also, metadata=found.metadata, source=found.source)
    return fitted(contents, layer_sizes, shapes_beside(model, also)), layer_sizes


def every_key(method: Method) -> dict[str, str]:
    return {**method.keys, **method.shared}


def check_shapes(found: Folder, method: Method, ats: Mapping[str, At], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """What is written of zeros has the shapes that are read."""
    expected = {t: expected_shapes(found, method, at) for t, at in ats.items()}
    ends = {t: {every_key(method).get(field, field): v for field, v in fields.items()} for t, fields in tensors.items()}
    check_tensors(Contents(AdapterConfig(), ends, source=found.source), expected)


def expected_shapes(found: Folder, method: Method, at: At) -> dict[str, tuple[int, ...]]:
    specs = REGISTRY[method.variant].param_specs(at.d_in, at.d_out, at.cfg)
    try:
        zeros = {field: torch.zeros(()).expand(spec.shape) for field, spec in specs.items()}  # of any size without memory for it
    except (OverflowError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{found.source}: no tensors have the sizes that the config asks for at {at.name}: {brief(error)}") from error
    written = method.write(zeros, at)
    return {end: tuple(written[field].shape) for field, end in every_key(method).items()}


# -- the method and its config ------------------------------------------------------------------------------------------------


def known_methods(found: Folder) -> list[Method]:
    """What the config may mean. Raises CheckpointError naming everything in it that cannot be said here."""
    kind = found.config.get("peft_type")
    candidates = method_candidates(found.config)
    if not candidates:
        read = listed(sorted({m.peft_type for m in METHODS}), 20)
        raise CheckpointError(f"{found.source} is of peft_type {shown(repr(kind))}; read are {read}")
    known = {name for m in candidates for name in (*(o.theirs for o in m.options), *m.when, *m.inert)}
    strange = {k: v for k, v in found.config.items() if k not in INERT and k not in known and not any(v is o or v == o for o in OFF)}
    problems = [f"{shown(k)}={shown(repr(v), 60)}" for k, v in strange.items()]
    if problems:
        raise CheckpointError(f"{found.source} uses what {candidates[0].variant!r} here does not have: {', '.join(problems[:5])}")
    options = [o for m in candidates for o in m.options]
    if empty := [o.theirs for o in options if found.config.get(o.theirs, o.default) is None and o.default not in OFF]:
        raise CheckpointError(
            f"{found.source}: its {listed(list(dict.fromkeys(empty)))} is null, which PEFT does not load, or takes for something else than "
            "its default; write the value that the adapter was trained with"
        )
    if reason := next((r for m in candidates if (r := m.refuses(found.config))), None):
        raise CheckpointError(f"{found.source}: {reason}")
    return candidates


def chosen(found: Folder, candidates: Sequence[Method], named: Sequence[str], part: str | None) -> tuple[Method, list[str]]:
    """The one method to load and its layers: the part asked for, or all of them."""
    shares = {m.variant: (m, [n for n in named if m.layers(found.config, strip_prefixes(n))]) for m in candidates}
    shares = {variant: share for variant, share in shares.items() if share[1]}
    if part is not None and part not in shares:
        raise CheckpointError(f"{found.source} has no part {part!r}; it has {sorted(shares)}")
    if part is None and len(shares) > 1:
        return next(m for m, _ in shares.values() if m.holds_all), list(named)
    return shares[part] if part else next(iter(shares.values()))


def config_of(method: Method, found: Folder) -> AdapterConfig:
    """Our config for PEFT's, still without its targets."""
    given = [(o, found.config.get(o.theirs)) for o in method.options]
    try:
        return REGISTRY[method.variant].Config(**method.fixed, **{o.ours: o.read(o.default if v is None else v) for o, v in given})
    except Exception as error:  # anyone may have written the JSON
        raise CheckpointError(f"{found.source}: its config cannot be read: {brief(error)}") from error


def settled(method: Method, config: AdapterConfig, found: Folder, told: Found) -> AdapterConfig:
    try:
        return method.settle(config, told)
    except Exception as error:  # a pattern's value may be anything
        raise CheckpointError(f"{found.source}: its config cannot be read: {brief(error)}") from error


def own_config(found: Folder, config: AdapterConfig, target: str, size: tuple[int, int]) -> AdapterConfig:
    try:
        return config.at(target, *size)
    except Exception as error:  # a pattern's value may be anything
        raise CheckpointError(f"{found.source}: the config at {target} cannot be read: {brief(error)}") from error


# -- keys ---------------------------------------------------------------------------------------------------------------------


EMBEDDING = re.compile(r"\.lora_embedding_[AB](\.|$)")


class Keys(NamedTuple):
    """A file's tensors by where they belong: {target: {field: tensor}}, {field: tensor} for all, and whole parameters by name."""

    tensors: dict[str, dict[str, Tensor]]
    shared: dict[str, Tensor]
    also: dict[str, Tensor]


def assign(found: Folder, candidates: Sequence[Method], layers: Mapping[str, nn.Module], model: nn.Module) -> Keys:
    """Every key to its place. Raises one CheckpointError with all that have none, or two."""
    patterns = {field: key_pattern(end) for m in candidates for field, end in m.keys.items()}
    common = {field: shared_pattern(end) for m in candidates for field, end in m.shared.items()}
    shared = {field: key for key in found.tensors for field, p in common.items() if p.fullmatch(key)}
    hits = {key: (m["target"], field) for key in found.tensors for field, p in patterns.items() if (m := p.fullmatch(key))}
    names = match_names([t for t, _ in hits.values()], layers)
    rest = [key for key in found.tensors if key not in hits and key not in shared.values()]
    ours = {f"{path}.{on_layer}" for path, _, hook in all_hooks(model) for _, on_layer in hook.fields}
    parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if n not in ours}
    beside = match_names(rest, parameters)
    saved = {key: beside[key] for key in rest if to_save(found.config, strip_prefixes(beside[key])) and beside[key] in parameters}
    bases = {key: match_names([bare(key)], parameters)[bare(key)] for key in rest if key not in saved}
    kept = {key: name for key, name in bases.items() if name in parameters}
    embedded = [key for key in rest if EMBEDDING.search(key)]
    tied = tied_names(model)
    places = Counter([(names[t], field) for t, field in hits.values()]) + Counter(saved.values())
    problems = [
        *problem("of no linear layer of this model", [key for key, (t, _) in hits.items() if names[t] not in layers]),
        *problem("of an embedding, and only linear layers carry adapters here", embedded),
        *problem("without a home", [key for key in rest if key not in saved and key not in kept and key not in embedded]),
        *problem(
            "with other base weights than this model's, in no module of modules_to_save (a resized vocabulary?)",
            [key for key, name in kept.items() if not same_values(found.tensors[key], parameters[name])],
        ),
        *problem("that mean one tensor", [k for k, (t, f) in hits.items() if places[names[t], f] > 1]),
        *problem("that mean one parameter", [k for k, n in saved.items() if places[n] > 1]),
        *problem(
            "of a parameter that is tied to another (PEFT unties it, here both would change)", [k for k, n in saved.items() if n in tied]
        ),
        *problem("that modules_to_save asks for and the file lacks", unsaved(found.config, parameters, set(saved.values()))),
    ]
    if problems:
        raise CheckpointError(f"{found.source} does not fit this {type(model).__name__}: {'; '.join(problems)}")
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, (t, field) in hits.items():
        tensors.setdefault(names[t], {})[field] = found.tensors[key]
    return Keys(tensors, {field: found.tensors[key] for field, key in shared.items()}, {n: found.tensors[key] for key, n in saved.items()})


def bare(key: str) -> str:
    """A base weight's key: PEFT writes those of embeddings beside an adapter that has one among its targets."""
    return key.replace(".base_layer.", ".")


def same_values(saved: Tensor, own: Tensor) -> bool:
    return saved.shape == own.shape and torch.equal(saved.to(own.device, own.dtype), own.detach())


def to_save(config: Mapping[str, Any], parameter: str) -> bool:
    """Whether a parameter is inside one of modules_to_save, by PEFT's rule: the end of a module's path, dot or not."""
    modules, parts = config.get("modules_to_save") or (), parameter.split(".")[:-1]
    return any(".".join(parts[: i + 1]).endswith(tuple(modules)) for i in range(len(parts)))


def unsaved(config: Mapping[str, Any], parameters: Iterable[str], saved: set[str]) -> list[str]:
    return [n for n in parameters if n not in saved and to_save(config, strip_prefixes(n))]


def check_layers(found: Folder, tensors: Mapping[str, Any], named: Sequence[str]) -> None:
    """The config and the tensors must speak of the same layers; PEFT fills what is missing with a fresh adapter, in silence."""
    problems = [
        *([] if named else ["its config names no linear layer of this model"]),
        *problem("missing: its config names these layers, the file does not", [n for n in named if n not in tensors]),
        *problem("unexpected: the file has these layers, its config does not name them", [n for n in tensors if n not in named]),
    ]
    if problems:
        raise CheckpointError(f"{found.source}: {'; '.join(problems)}. Is it whole, and is this its model?")


def log_base(found: Folder, model: nn.Module) -> None:
    there, here = found.config.get("base_model_name_or_path"), getattr(getattr(model, "config", None), "_name_or_path", None)
    if there and here and there != here:
        logger.warning("{}: trained on {}, this model is {}; the folder holds no fingerprint to tell", found.source, there, here)
