"""Which values does a fresh adapter start from? Specs, what the variant makes of the weight, and what calibration saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

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


def base_of(target: Target, variant: type[Variant]) -> Base:
    """What the variant declared that it reads at init: sizes always, the weight if it says so."""
    if variant.reads_weight == "never":
        return Base(target.d_in, target.d_out)
    bias = getattr(target.module, "bias", None)
    return Base(target.d_in, target.d_out, dense_weight(target.module).detach(), bias)


def initial_tensors(
    model: torch.nn.Module,
    config: AdapterConfig,
    targets: Iterable[Target],
    calibration_data: Any = None,
    seed: int | None = None,
    exclude: Mapping[str, Tensor] | None = None,
) -> tuple[Tensors, dict[str, float]]:
    """Every tensor of a fresh adapter by target and field, and the notes its variant left, averaged over the targets.

    Touches nothing but the global random state, and that only without a seed. Raises ValueError naming the target.
    """
    targets, variant, exclude = list(targets), variant_of(config), exclude or {}
    check_calibration(config, variant, calibration_data)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    fed: dict[str, Any] = {}
    if calibration_data is not None:
        fed = {t.name: observe(t, config, variant, exclude) for t in targets}
        layers, widths = {t.name: t.module for t in targets}, {t.name: t.d_in for t in targets}
        calibration.stream(model, layers, widths, fed, calibration_data)
    tensors: Tensors = {}
    notes: dict[str, list[float]] = {}
    for t in tqdm(targets, desc=f"initialising {config.variant}", unit="layer", delay=3.0):
        observed = fed.pop(t.name) if fed else observe(t, config, variant, exclude)
        tensors[t.name], found = initialise(t, config, variant, observed, generator)
        for key, value in found.items():
            notes.setdefault(key, []).append(value)
    means = {key: sum(values) / len(values) for key, values in notes.items()}
    if means:
        logger.info("{} selection over {} targets: {}", config.variant, len(targets), means)
    if warning := variant.check(config, means):
        logger.warning(warning)
    return tensors, means


def check_calibration(config: AdapterConfig, variant: type[Variant], data: Any) -> None:
    if data is None and (variant.calibration == "required" or variant.needs_calibration(config)):
        raise ValueError(
            f"variant {config.variant!r} needs calibration data for {config.chosen()}: attach(model, config, calibration_data=...), which "
            "takes batches, or activations per target"
        )
    if data is not None and variant.calibration == "no":
        raise ValueError(f"variant {config.variant!r} makes no use of calibration data; leave calibration_data out")


def observe(target: Target, config: AdapterConfig, variant: type[Variant], exclude: Mapping[str, Tensor]) -> Any:
    cfg = config.at(target.name, target.d_in, target.d_out)
    try:
        return variant.observe(cfg, base_of(target, variant), exclude.get(target.name))
    except ValueError as error:
        raise ValueError(f"{target.name}: {error}") from error


def initialise(
    target: Target, config: AdapterConfig, variant: type[Variant], observed: Any, generator: Generator | None
) -> tuple[dict[str, Tensor], Mapping[str, float]]:
    """One target's tensors in the config's dtype (on the CPU or where init made them), and its notes."""
    cfg = config.at(target.name, target.d_in, target.d_out)
    specs = variant.param_specs(target.d_in, target.d_out, cfg)
    try:
        made: Initial = variant.init(cfg, base_of(target, variant), observed, generator)
    except ValueError as error:
        raise ValueError(f"{target.name}: {error}") from error
    if unknown := sorted(set(made.tensors) - set(specs)):
        raise ValueError(f"{target.name}: init of {variant.name!r} returned {unknown}, its specs are {sorted(specs)}")
    tensors = {}
    for field, spec in specs.items():
        value = made.tensors[field] if field in made.tensors else spec.init(spec.shape, generator)
        if field in made.tensors or spec.init not in NAMED.values():  # not one of ours: it may be anything
            if tuple(value.shape) != spec.shape or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{target.name}: initial {field} must be finite and {spec.shape}, got {tuple(value.shape)}")
            value = owned(value)
        tensors[field] = value.detach().to(config.dtype)
    return tensors, made.notes


def owned(value: Tensor) -> Tensor:
    """The tensor in memory of its own, contiguous as a loaded one: it may be a view of the base or of Vh, and strides decide last bits."""
    return value.clone(memory_format=torch.contiguous_format)
