"""What does an adapter bring, in memory or in a file? Factors layer by layer, checked, and the LoRA config that they keep."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor

from lora_lite.adapter import Adapter
from lora_lite.checkpoint import CheckpointError, check_entries, check_format, check_place, read_header, read_metadata
from lora_lite.config import AdapterConfig
from lora_lite.lowrank import LowRank
from lora_lite.variant import Base, variant_of
from lora_lite.variants.lora import LoRAConfig

INPUT_SIDE, OUTPUT_SIDE = ("lora_A", "lora_Vh"), ("lora_B", "lora_U")


class Update(NamedTuple):
    """B A and its scale alpha/r, apart: the scale is the task's, the factors are what is shared."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def sizes(self) -> tuple[int, int]:
        return self.A.shape[1], self.B.shape[0]


@runtime_checkable
class Source(Protocol):
    """One task's adapter."""

    @property
    def task(self) -> str: ...
    @property
    def modules(self) -> list[str]: ...
    @property
    def base_config(self) -> AdapterConfig: ...
    def read(self, module: str) -> Update:
        """The module's update. Raises ValueError naming task and module for values or shapes that cannot be."""
        ...


class AdapterSource:
    """An Adapter in memory."""

    def __init__(self, task: str, adapter: Adapter) -> None:
        if not isinstance(adapter, Adapter):
            raise TypeError(f"{task!r}: expected an Adapter (ll.load, ll.attach), got {type(adapter).__name__}")
        if adapter.variant.form != "low-rank":
            raise ValueError(f"adapter {task!r}: variant {adapter.variant.name!r} has no low-rank form, so no directions to share")
        self.task, self.base_config, self.factors = task, adapter.config, adapter.factors()
        self.modules = list(self.factors)

    def read(self, module: str) -> Update:
        return checked(self.task, module, unscaled(self.factors[module], self.base_config))


class FileSource:
    """A file that `adapter.save` wrote, memory-mapped: one module's tensors are read at a time. Its hash is not checked, which
    would read all of it; shapes and values are."""

    def __init__(self, task: str, path: str | Path) -> None:
        self.task, self.path = task, Path(path)
        check_place(self.path)
        with open(self.path, "rb") as file:
            head = read_header(str(path), file)
        metadata = head.pop("__metadata__", None) or {}
        check_format(str(path), metadata, list(head))
        check_entries(str(path), head)
        known = read_metadata(str(path), metadata)
        self.base_config = known["config"]
        if variant_of(self.base_config).form != "low-rank":
            raise ValueError(f"{path}: variant {self.base_config.variant!r} has no low-rank form, so no directions to share")
        self.fields: dict[str, list[str]] = {}
        for name in head:
            if name not in known["also"]:
                module, _, field = name.rpartition(".")
                self.fields.setdefault(module, []).append(field)
        self.modules = list(self.fields)

    def read(self, module: str) -> Update:
        p = self.tensors(module)
        try:
            d_in = next(v.shape[-1] for k, v in p.items() if k in INPUT_SIDE)
            d_out = next(v.shape[0] for k, v in p.items() if k in OUTPUT_SIDE)
            cfg = self.base_config.at(module, d_in, d_out)
            update = variant_of(cfg).factors(cfg, p, Base(d_in, d_out))
        except (StopIteration, KeyError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: {module} holds {sorted(p)}, not the factors of {self.base_config.variant!r}") from error
        return checked(self.task, module, unscaled(update, cfg))

    def tensors(self, module: str) -> dict[str, Tensor]:
        try:
            with safe_open(self.path, framework="pt") as file:
                return {field: file.get_tensor(f"{module}.{field}" if module else field) for field in self.fields[module]}
        except Exception as error:  # SafetensorError: cut short, overlapping ranges
            raise CheckpointError(f"{self.path} is damaged or cut short: {error}. Take another copy") from error


def unscaled(update: LowRank, config: AdapterConfig) -> Update:
    """LoRA keeps its alpha apart. Other methods' gains (a number per rank, a doubled rank) go into B, at scale 1."""
    A, B, g = update.A.detach(), update.B.detach(), update.g
    if isinstance(config, LoRAConfig) and not isinstance(g, Tensor):
        return Update(A, B, float(g))
    return Update(A, B * (g.detach() if isinstance(g, Tensor) else g), 1.0)


def checked(task: str, module: str, update: Update) -> Update:
    A, B = update.A, update.B
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.numel() or not B.numel():
        raise ValueError(f"adapter {task!r}, module {module!r}: A {tuple(A.shape)} and B {tuple(B.shape)} are not (r, d_in) and (d_out, r)")
    bad = [name for name, v in (("A", A), ("B", B)) if not bool(torch.isfinite(v).all())]
    if bad or not math.isfinite(update.scale):
        raise ValueError(
            f"adapter {task!r}, module {module!r}: {' and '.join(bad) or 'alpha'} holds NaN or infinite values; nothing was changed"
        )
    return update


def same_sizes(task: str, module: str, update: Update, sizes: tuple[int, int], others: str) -> Update:
    if update.sizes != sizes:
        raise ValueError(
            f"adapter {task!r}, module {module!r}: it maps {update.sizes[0]} -> {update.sizes[1]}, {others} has {sizes[0]} -> {sizes[1]}; "
            "are these adapters of one base?"
        )
    return update


def lora_config(config: AdapterConfig, ranks: Mapping[str, int], scales: Mapping[str, float]) -> LoRAConfig:
    """The task's own config where it says these ranks and scales; otherwise one that does, with the same places."""
    if isinstance(config, LoRAConfig) and agrees(config, ranks, scales):
        return config
    places = {f.name: getattr(config, f.name) for f in dataclasses.fields(AdapterConfig)}
    kept = {k: getattr(config, k) for k in ("rslora", "dropout") if hasattr(config, k)}
    power = 0.5 if kept.get("rslora") else 1.0
    alphas = {m: scales[m] * ranks[m] ** power for m in ranks}
    usual = Counter((ranks[m], alphas[m]) for m in ranks).most_common(1)[0][0]
    odd = {m: (ranks[m], alphas[m]) for m in ranks if (ranks[m], alphas[m]) != usual}
    patterns: dict[str, Any] = {
        "rank_pattern": {re.escape(m): r for m, (r, _) in odd.items()},
        "alpha_pattern": {re.escape(m): alpha for m, (_, alpha) in odd.items()},
    }
    return LoRAConfig(r=usual[0], alpha=usual[1], **places, **kept, **patterns)


def agrees(config: LoRAConfig, ranks: Mapping[str, int], scales: Mapping[str, float]) -> bool:
    own = {m: config.at(m, 0, 0) for m in ranks}
    return all(own[m].r == ranks[m] and own[m].scaling == scales[m] for m in ranks)
