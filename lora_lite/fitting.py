"""Does a file fit this model, or this adapter, or itself alone? Everything is checked here, before anything is touched."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loguru import logger
from torch import Tensor, nn

from lora_lite.base import compare_fingerprint, fingerprint, is_linear, sizes
from lora_lite.checkpoint import IS_IT, CheckpointError, Contents, Findings, listed, misfits, renamed
from lora_lite.config import AdapterConfig
from lora_lite.origins import look_any
from lora_lite.target import band_of, find_targets
from lora_lite.variant import variant_of

Path = str | os.PathLike[str]
Sizes = Mapping[str, tuple[int, int]]
UNMISTAKABLE = (3 << 20, 5 << 20)  # d_in and d_out that no rank is, and that blocks of any usual size divide


def for_model(path: Path, model: nn.Module, strict_base: bool) -> tuple[Contents, dict[str, tuple[int, int]], dict[str, Any]]:
    """A file's contents under the model's names and in its order, the sizes of the layers they go on, and the base's fingerprint."""
    linears = {n: m for n, m in model.named_modules() if is_linear(m)}
    found = look_any(path)
    contents = renamed(found.contents, linears, [n for n, _ in model.named_parameters()])
    layers = {t: layer for t, layer in linears.items() if t in contents.tensors}
    layer_sizes = {t: sizes(layer) for t, layer in layers.items()}
    more = [*strangers(contents, model, linears), *misplaced(contents, model)]
    contents = fitted(contents, layer_sizes, shapes_beside(model, contents.also), found, more)
    now = fingerprint(model, layers)
    check_base(path, contents.fingerprint, now, strict_base)
    return contents, layer_sizes, now


def for_adapter(
    path: Path,
    config: AdapterConfig,
    layer_sizes: Sizes,
    also: Mapping[str, tuple[int, ...]],
    base: dict[str, Any] | None,
    strict_base: bool,
) -> Contents:
    """A file's contents for an adapter that exists: the same method at every layer, the same tensors, the same base."""
    found = look_any(path)
    contents = fitted(renamed(found.contents, layer_sizes, also), layer_sizes, also, found)
    there, here = ({t: method_of(cfg.at(t, *s)) for t, s in layer_sizes.items()} for cfg in (contents.config, config))
    if differing := [t for t in layer_sizes if there[t] != here[t]]:
        unlike = differences(there[differing[0]], here[differing[0]])
        raise CheckpointError(f"{path}: it was made with {unlike}, at {listed(differing)}; ll.attach or ll.load one made as it was")
    check_base(path, contents.fingerprint, base, strict_base)
    return contents


def for_nobody(path: Path) -> tuple[Contents, dict[str, tuple[int, int]]]:
    """A file's contents without a model, and the sizes of its layers, which its fingerprint or its tensors say."""
    contents, said = for_showing(path)
    if unknown := [t for t, size in said.items() if size is None]:
        raise CheckpointError(
            f"{path}: it has no fingerprint, and what {contents.config.variant!r} keeps does not say how wide the layers {listed(unknown)} "
            "are; a model does: ll.load(model, path)"
        )
    return contents, {t: size for t, size in said.items() if size is not None}


def for_showing(path: Path) -> tuple[Contents, dict[str, tuple[int, int] | None]]:
    """A file's contents without a model, and the sizes of its layers where they are known: these layers fit."""
    found = look_any(path)
    said = layer_sizes_said(found.contents)
    return fitted(found.contents, said, None, found), said


def layer_sizes_said(contents: Contents) -> dict[str, tuple[int, int] | None]:
    """(d_in, d_out) of each layer, or None where neither the fingerprint nor a tensor says it."""
    return {t: size_printed(contents.fingerprint, t) or size_measured(contents.config, t, p) for t, p in contents.tensors.items()}


def size_printed(fingerprint: Mapping[str, Any] | None, target: str) -> tuple[int, int] | None:
    try:
        d_out, d_in = fingerprint["targets"][target]["shape"]  # type: ignore[index]
    except (KeyError, TypeError, ValueError):  # none, or one that anyone may have written
        return None
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) and min(d_in, d_out) > 0 else None


def size_measured(config: AdapterConfig, target: str, p: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The sizes of tensors at the places where the variant, asked about a layer of unmistakable sizes, answers with these."""
    try:
        specs = variant_of(config).param_specs(*UNMISTAKABLE, config.at(target, *UNMISTAKABLE))
    except ValueError:  # the config has room for smaller layers only
        return None
    places = [(f, i, n) for f, spec in specs.items() for i, n in enumerate(spec.shape) if f in p and p[f].dim() == len(spec.shape)]
    found = [{p[f].shape[i] for f, i, n in places if n == size} for size in UNMISTAKABLE]
    return (found[0].pop(), found[1].pop()) if len(found[0]) == len(found[1]) == 1 else None


def fitted(
    contents: Contents,
    layer_sizes: Mapping[str, tuple[int, int] | None],
    also: Mapping[str, tuple[int, ...]] | None,
    found: Findings | None = None,
    more: Sequence[str] = (),
) -> Contents:
    """The contents in the order of `layer_sizes` and of the variant's specs.

    also   the shapes that the parameters beside its own must have; None where nobody knows them
    found  what reading the file found; with `more` it is in the one CheckpointError that lists everything which does not fit
    """
    found = found or Findings(contents)
    try:
        expected = {t: declared(contents, t, size) for t, size in layer_sizes.items()}
    except ValueError as error:  # such as a block size that does not divide the layer's
        return found.taken(contents, [f"its config has no room for these layers: {error}", *more], IS_IT)
    found.taken(contents, [*misfits(contents, expected, also), *more], IS_IT)
    return dataclasses.replace(contents, tensors={t: {f: contents.tensors[t][f] for f in fields} for t, fields in expected.items()})


def declared(contents: Contents, target: str, size: tuple[int, int] | None) -> dict[str, tuple[int, ...]]:
    """The shapes that the variant declares; of a layer whose size nobody knows, those that are there."""
    if size is None:
        return {f: tuple(v.shape) for f, v in contents.tensors[target].items()}
    return {f: spec.shape for f, spec in variant_of(contents.config).param_specs(*size, contents.config.at(target, *size)).items()}


def strangers(contents: Contents, model: nn.Module, linears: Mapping[str, nn.Module]) -> list[str]:
    """Layers of the file that the model does not have, in words."""
    unknown = [t for t in contents.tensors if t not in linears]
    return [f"no linear layer of this {type(model).__name__} is named {listed(unknown)} ({len(unknown)} in all)"] if unknown else []


def misplaced(contents: Contents, model: nn.Module) -> list[str]:
    """Of a file whose header says where its layers are: where they are not those that it means on this model, both counts and which."""
    if not contents.says_where:
        return []
    try:
        meant = [t.name for t in find_targets(model, contents.config)]
    except RuntimeError as error:
        return [f"its header means no layer here: {error}"]
    lacks, extra = [t for t in meant if t not in contents.tensors], [t for t in contents.tensors if t not in meant]
    differing = [f"{what}: {listed(names)}" for what, names in (("not in the file", lacks), ("not meant", extra)) if names]
    said = f"targets={contents.config.targets!r}, {band_of(contents.config)}"
    found = f"its header ({said}) means {len(meant)} layers of this {type(model).__name__}, the file has {len(contents.tensors)}"
    return [f"{found} ({'; '.join(differing)})"] if differing else []


def shapes_beside(model: nn.Module, also: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of those of a file's other parameters that the model has."""
    have = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return {n: have[n] for n in also if n in have}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """ "r=4 (here 8), alpha=8.0 (here 16.0)"; of two methods, their names alone."""
    keys = ["variant"] if there["variant"] != here["variant"] else [k for k in there if there[k] != here.get(k)]
    return ", ".join(f"{k}={there[k]!r} (here {here.get(k)!r})" for k in keys)


def method_of(config: AdapterConfig) -> dict[str, Any]:
    """A layer's config without where it applies: what must agree for tensors to mean the same."""
    where = ("targets", "exclude", "layer_range", "layers", "roles", "dtype", "dropout")
    return {k: v for k, v in config.to_dict().items() if k not in where}


def check_base(
    path: Path, saved: dict[str, Any] | None, now: dict[str, Any] | None, strict: bool, way: str = "strict_base=False loads it all the same"
) -> None:
    """Refuse another base than the one an adapter was trained on; without `strict`, and for quantised bases, warn."""
    if saved is None or now is None:
        logger.warning("{}: no fingerprint of the base it was trained on; it cannot be checked", path)
        return
    differences, warnings = compare_fingerprint(saved, now)
    for warning in warnings:
        logger.warning("{}: {}", path, warning)
    if differences and strict:
        raise CheckpointError(f"{path} was trained on another base: {'; '.join(differences)}. {way}")
    if differences:
        logger.warning("{} was trained on another base: {}", path, "; ".join(differences))
