"""Which values does a fresh adapter start from? Specs, what the variant makes of the weight, and what calibration saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from loguru import logger
from torch import Generator, Tensor
from tqdm import tqdm

from lora_lite import calibration
from lora_lite.base import dense_weight
from lora_lite.config import AdapterConfig
from lora_lite.target import Target
from lora_lite.variant import NAMED, Base, Initial, Variant, variant_of

Tensors = dict[str, dict[str, Tensor]]  # target -> field -> tensor


class Start(NamedTuple):
    """A fresh adapter's config (with the ranks its variant settled), its tensors on the CPU or where they were made, and its notes."""

    config: AdapterConfig
    tensors: Tensors
    notes: dict[str, float]


def base_of(target: Target, variant: type[Variant]) -> Base:
    """What the variant declared that it reads at init: sizes always, the weight if it says so."""
    if variant.reads_weight == "never":
        return Base(target.d_in, target.d_out)
    bias = getattr(target.module, "bias", None)
    return Base(target.d_in, target.d_out, dense_weight(target.module).detach(), bias)


def start(
    model: torch.nn.Module,
    config: AdapterConfig,
    targets: Iterable[Target],
    calibration_data: Any = None,
    seed: int | None = None,
    exclude: Mapping[str, Tensor] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> Start:
    """What a fresh adapter starts from; its notes are averaged over the targets.

    Touches nothing but the global random state, and that only without a seed. Raises ValueError naming the target.
    """
    targets, variant = list(targets), variant_of(config)
    check_calibration(config, variant, calibration_data, loss)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    observed = observers(model, config, targets, calibration_data, exclude or {}, loss)
    group = variant.group_init(config, {t.name: (t.d_in, t.d_out) for t in targets}, observed)
    tensors: Tensors = {}
    notes = {key: [value] for key, value in group.notes.items()}
    shared = {id(v): owned(v.detach()).to(config.dtype) for fields in group.tensors.values() for v in fields.values()}
    for t in tqdm(targets, desc=f"initialising {config.variant}", unit="layer", delay=3.0):
        seen = observed.pop(t.name) if observed else observe(t, group.config, variant, (exclude or {}).get(t.name))
        given = {field: shared[id(v)] for field, v in group.tensors.get(t.name, {}).items()}
        tensors[t.name], found = initialise(t, group.config, variant, seen, generator, given)
        for key, value in found.items():
            notes.setdefault(key, []).append(value)
    means = {key: sum(values) / len(values) for key, values in notes.items()}
    if means:
        logger.info("{} selection over {} targets: {}", config.variant, len(targets), means)
    if warning := variant.check(group.config, means):
        logger.warning(warning)
    return Start(group.config, tensors, means)


def observers(
    model: torch.nn.Module,
    config: AdapterConfig,
    targets: Iterable[Target],
    data: Any,
    exclude: Mapping[str, Tensor],
    loss: Callable[[Any, Any], Tensor] | None,
) -> dict[str, Any]:
    """Each target's observer, fed with the data; none where there is none."""
    if data is None:
        return {}
    variant = variant_of(config)
    fed = {t.name: observe(t, config, variant, exclude.get(t.name)) for t in targets}
    layers, sizes = {t.name: t.module for t in targets}, {t.name: (t.d_in, t.d_out) for t in targets}
    if variant.observes == "gradients":
        calibration.stream_gradients(model, layers, fed, data, loss)
    else:
        calibration.stream(model, layers, {n: d_in for n, (d_in, _) in sizes.items()}, fed, data, shared=variant.shares_observers)
    return fed


def check_calibration(config: AdapterConfig, variant: type[Variant], data: Any, loss: Any) -> None:
    if loss is not None and variant.observes != "gradients":
        raise ValueError(f"variant {config.variant!r} reads no gradients; leave loss out")
    if data is None and (variant.calibration == "required" or variant.needs_calibration(config)):
        asked = f" for {config.chosen()}" if config.chosen() else ""
        raise ValueError(
            f"variant {config.variant!r} needs calibration data{asked}: attach(model, config, calibration_data=...), which "
            "takes batches, or activations per target"
        )
    if data is not None and variant.calibration == "no":
        raise ValueError(f"variant {config.variant!r} makes no use of calibration data; leave calibration_data out")


def observe(target: Target, config: AdapterConfig, variant: type[Variant], exclude: Tensor | None) -> Any:
    cfg = config if variant.shares_observers else config.at(target.name, target.d_in, target.d_out)
    try:
        return variant.observe(cfg, base_of(target, variant), exclude)
    except ValueError as error:
        raise ValueError(f"{target.name}: {error}") from error


def initialise(
    target: Target,
    config: AdapterConfig,
    variant: type[Variant],
    observed: Any,
    generator: Generator | None,
    given: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Mapping[str, float]]:
    """One target's tensors in the config's dtype (on the CPU or where init made them), and its notes. `given` is settled already."""
    cfg = config.at(target.name, target.d_in, target.d_out)
    specs = variant.param_specs(target.d_in, target.d_out, cfg)
    try:
        made: Initial = variant.init(cfg, base_of(target, variant), observed, generator)
    except ValueError as error:
        raise ValueError(f"{target.name}: {error}") from error
    if unknown := sorted(set(made.tensors) - set(specs) | set(given) - set(specs)):
        raise ValueError(f"{target.name}: init of {variant.name!r} returned {unknown}, its specs are {sorted(specs)}")
    tensors = {}
    for field, spec in specs.items():
        settled = given.get(field, made.tensors.get(field))
        value = spec.init(spec.shape, generator) if settled is None else settled
        if settled is not None or spec.init not in NAMED.values():  # not one of ours: it may be anything
            if tuple(value.shape) != spec.shape or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{target.name}: initial {field} must be finite and {spec.shape}, got {tuple(value.shape)}")
            value = value if field in given else owned(value)
        tensors[field] = value if field in given else value.detach().to(config.dtype)
    return tensors, made.notes


def owned(value: Tensor) -> Tensor:
    """The tensor in memory of its own, contiguous as a loaded one: it may be a view of the base or of Vh, and strides decide last bits."""
    return value.clone(memory_format=torch.contiguous_format)
