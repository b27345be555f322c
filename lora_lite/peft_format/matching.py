"""Which layers does a PEFT config name? PEFT's rule, and the same said in our config."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lora_lite.base import is_linear
from lora_lite.checkpoint import CheckpointError, brief, shown, strip_prefixes
from lora_lite.config import AdapterConfig
from lora_lite.target import ALL, find_targets, output_embeddings

HEADS = ("score", "classifier")  # what PEFT leaves out of "all-linear" in a classifier without an output embedding
Config = Mapping[str, Any]


def named_layers(model: nn.Module, config: Config) -> list[str]:
    """The linears of the model that the config names, in order. Raises CheckpointError for a config that cannot be read."""
    check_where(config)
    linears = [n for n, m in model.named_modules() if n and is_linear(m)]
    try:
        re.compile(inputs if isinstance(inputs := config.get("feedforward_modules"), str) else "")  # IA3's, read later
        every = set(all_linear(model, config, linears)) if is_all(config) else None
        return [n for n in linears if meant(config, strip_prefixes(n), every is None or n in every)]
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"where the adapter goes cannot be read from its config: {brief(error)}") from error


def check_where(config: Config) -> None:
    """Raises CheckpointError where a field that says where the adapter goes holds something else than it may."""
    names = {k: config.get(k) for k in ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules", "modules_to_save")}
    wrong = [k for k, v in names.items() if not (v is None or (isinstance(v, str) and k != "modules_to_save") or is_list(v, str))]
    depth = config.get("layers_to_transform")
    if not (depth is None or is_list([depth], int) or is_list(depth, int)):
        wrong.append("layers_to_transform")
    if config.get("target_modules") in (None, "", []):
        wrong.append("target_modules")
    if wrong:
        found = ", ".join(f"{k}={shown(repr(config.get(k)), 60)}" for k in wrong)
        raise CheckpointError(f"its config does not say where the adapter goes: {found}")


def is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def is_all(config: Config) -> bool:
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == ALL


def all_linear(model: nn.Module, config: Config, linears: Iterable[str]) -> list[str]:
    modules = dict(model.named_modules())
    outputs = output_embeddings(modules)
    if not outputs and config.get("task_type") == "SEQ_CLS":
        outputs = [next(m for head in HEADS if (m := getattr(model, head, None)) is not None)] if any(map(modules.get, HEADS)) else []
    return [n for n in linears if not any(modules[n] is output for output in outputs)]


def meant(config: Config, name: str, by_all: bool) -> bool:
    """PEFT's check for one module's name."""
    targets, excluded = config["target_modules"], config.get("exclude_modules")
    if excluded and ends(excluded, name):
        return False
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.get("modules_to_save") or ()):
        return False
    if is_all(config):
        return by_all
    if isinstance(targets, str) or name in targets:
        return ends(targets, name)
    return ends(targets, name) and at_depth(config, name)


def ends(patterns: str | Sequence[str], name: str) -> bool:
    """One regex for the whole name, or names that end it from a dot on."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in patterns)


def at_depth(config: Config, name: str) -> bool:
    """Whether the first numbered part of the name is among layers_to_transform."""
    wanted, stacks = config.get("layers_to_transform"), config.get("layers_pattern")
    if wanted is None or wanted == []:
        return True
    stacks = [stacks] if isinstance(stacks, str) else stacks
    patterns = [rf"(?:^|.*?\.){stack}\.(\d+)\." for stack in stacks] if stacks else [r".*?\.[^.]*\.(\d+)\."]
    found = next((m for p in patterns if (m := re.match(p, name))), None)
    return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)


# -- the same in our words --------------------------------------------------------------------------------------------------


def placed(config: AdapterConfig, theirs: Config, model: nn.Module, names: Sequence[str]) -> AdapterConfig:
    """The config with `targets` that mean exactly these layers: PEFT's own words where ours can say them, else every name."""
    wanted, modules = theirs.get("layers_to_transform"), theirs["target_modules"]
    in_full = dataclasses.replace(config, targets=tuple(f"^{re.escape(n)}$" for n in names), exclude=())
    if not isinstance(modules, str) and len(modules) > len(names):  # some of them mean no layer, which is an error here
        return in_full
    short = {
        "targets": patterns(modules),
        "exclude": patterns(theirs.get("exclude_modules") or ()),
        "layers": [wanted] if isinstance(wanted, int) else wanted or None,
    }
    try:
        found = dataclasses.replace(config, **short)
        if [t.name for t in find_targets(model, found)] == list(names):
            return found
    except (ValueError, TypeError, RuntimeError):
        pass  # the config is for a part of the layers, or says more than ours can; names always can
    return in_full


def patterns(theirs: Any) -> str | tuple[str, ...]:
    if isinstance(theirs, str):
        return ALL if theirs.lower() == ALL else f"^(?:{theirs})$"
    return tuple(rf"(^|\.){re.escape(end)}$" for end in theirs)
