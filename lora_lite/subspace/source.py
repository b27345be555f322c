"""What does an adapter bring, in memory, in a file or in a PEFT folder? Factors layer by layer, checked, and the LoRA config they keep."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

import torch
from loguru import logger
from safetensors import safe_open
from torch import Tensor

from lora_lite import fitting
from lora_lite.adapter import Adapter
from lora_lite.checkpoint import (
    DTYPES,
    CheckpointError,
    aligned,
    check_entries,
    check_format,
    check_place,
    finite,
    is_damaged,
    listed,
    read_header,
    read_metadata,
    strip_prefixes,
)
from lora_lite.config import AdapterConfig
from lora_lite.lowrank import LowRank
from lora_lite.peft_format import folder
from lora_lite.peft_format.numbers import At
from lora_lite.peft_format.reading import config_of, known_methods
from lora_lite.variant import Base, variant_of
from lora_lite.variants.lora import LoRAConfig

PathLike = str | os.PathLike[str]
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
# Beyond a layer's own d_in + d_out a rank says nothing. A core does not show its adapter's rank: a file may say any, and zeros are
# allocated for it.
LARGEST_RANK = 2**12
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
    """One task's adapter; `base` is the fingerprint of what it was trained on, where that is known."""

    @property
    def task(self) -> str: ...
    @property
    def modules(self) -> list[str]: ...
    @property
    def base_config(self) -> AdapterConfig: ...
    @property
    def base(self) -> dict[str, Any] | None: ...
    def read(self, module: str) -> Update:
        """The module's update. Raises ValueError naming task and module for shapes that cannot be; values: `check_finite`."""
        ...


def check_id(task: object) -> None:
    if not isinstance(task, str):
        found = "an adapter, which comes first, its id after it" if isinstance(task, Adapter) else repr(task)
        raise ValueError(f"task ids are text, got {found}")


def source_of(task: str, given: Adapter | PathLike | Source) -> Source:
    """An adapter, a file of ours, or a PEFT folder; what `source_of` opened before is not opened again."""
    check_id(task)
    if isinstance(given, Source):
        assert given.task == task
        return given
    if isinstance(given, str | os.PathLike):
        return PeftSource(task, given) if Path(given).is_dir() else FileSource(task, given)
    return AdapterSource(task, given)


class AdapterSource:
    """An Adapter in memory."""

    def __init__(self, task: str, adapter: Adapter) -> None:
        if not isinstance(adapter, Adapter):
            raise TypeError(f"{task!r}: expected an Adapter (ll.load, ll.attach) or a path, got {type(adapter).__name__}")
        check_form(f"adapter {task!r}", adapter.config)
        self.task, self.base_config, self.base, self.factors = task, adapter.config, adapter.fingerprint, adapter.factors()
        self.modules = list(self.factors)
        left_behind(f"adapter {task!r}", adapter.also())

    def read(self, module: str) -> Update:
        return checked(self.task, module, unscaled(self.factors[module], self.base_config))


class TensorsOf(Mapping[str, Tensor]):
    """A safetensors file's tensors by key, each read when it is asked for and not kept; within `with self:` from one open file.
    Not open for good: a thousand adapters would be a thousand files. Nor mapped, so that what was read does not stay in memory."""

    def __init__(self, path: Path, head: Mapping[str, Any], file: BinaryIO) -> None:
        """`file` is open, its header just read."""
        self.path, self.head, self.start, self.stamp = path, head, file.tell(), stamp(file)
        self.file: FileIO | None = None
        try:
            with safe_open(path, framework="pt"):  # checks that ranges fit dtypes and shapes, and tile the file
                pass
        except Exception as error:  # SafetensorError: cut short, overlapping ranges
            raise CheckpointError(f"{path} is damaged or cut short: {error}. Take another copy") from error

    def __enter__(self) -> TensorsOf:
        self.file = open(self.path, "rb", buffering=0)
        if stamp(self.file) != self.stamp:
            self.file.close()
            raise CheckpointError(f"{self.path} has changed since it was opened; start again")
        return self

    def __exit__(self, *why: Any) -> None:
        assert self.file is not None
        self.file.close()
        self.file = None

    def __getitem__(self, name: str) -> Tensor:
        if self.file is None:
            with self:
                return self[name]
        entry = self.head[name]
        v = torch.empty(entry["shape"], dtype=BY_NAME[entry["dtype"]])
        self.file.seek(self.start + entry["data_offsets"][0])
        if self.file.readinto(v.view(-1).view(torch.uint8).numpy().data) != v.nbytes:
            raise CheckpointError(f"{self.path} is cut short. Take another copy")
        if sys.byteorder == "big":
            v.untyped_storage().byteswap(v.dtype)
        return v

    def __iter__(self) -> Iterator[str]:
        return iter(self.head)

    def __len__(self) -> int:
        return len(self.head)


def stamp(file: BinaryIO | FileIO) -> tuple[int, ...]:
    """Another one when the file is another, or has been written to."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class FileSource:
    """A file that `adapter.save` wrote: its hash is checked tensor by tensor, then one module's are read at a time."""

    def __init__(self, task: str, path: PathLike) -> None:
        self.task, self.path = task, Path(path)
        check_place(self.path)
        with open(path, "rb") as file:
            head = read_header(str(path), file)
            metadata = head.pop("__metadata__", None) or {}
            check_format(str(path), metadata, list(head))
            check_entries(str(path), head)
            self.tensors = TensorsOf(self.path, head, file)
        with self.tensors:
            damaged = is_damaged(str(path), metadata, self.tensors)
        if damaged or "sha256" not in metadata:  # what no hash vouches for is read whole, and refused with all that is wrong with it
            fitting.for_showing(path)
        if damaged:
            raise CheckpointError(f"{path} has changed since it was opened; start again")
        known = read_metadata(str(path), metadata)
        self.base_config, self.base = known["config"], known["fingerprint"]
        check_form(str(path), self.base_config)
        self.fields: dict[str, dict[str, str]] = {}  # module -> field -> its key, or that of the tensor which layers share
        keys = {name: key for key, name in aligned(head, known).items()}
        for name, key in (keys | {name: keys[stored] for name, stored in known["shared"].items()}).items():
            if name not in known["also"]:
                module, _, field = name.rpartition(".")
                self.fields.setdefault(module, {})[field] = key
        self.modules = list(self.fields)
        left_behind(str(path), known["also"])

    def read(self, module: str) -> Update:
        with self.tensors:
            p = {field: self.tensors[key] for field, key in self.fields[module].items()}
        return update_of(self.task, module, self.base_config, p, self.sizes(module, p), str(self.path))

    def sizes(self, module: str, p: Mapping[str, Tensor]) -> tuple[int, int]:
        """(d_in, d_out): as the fingerprint has them, else as those tensors do that lie along one of them."""
        try:
            d_out, d_in = (self.base or {"targets": {}})["targets"][module]["shape"]
            return int(d_in), int(d_out)
        except (KeyError, TypeError, ValueError):
            pass
        try:
            return next(v.shape[-1] for k, v in p.items() if k in INPUT_SIDE), next(v.shape[0] for k, v in p.items() if k in OUTPUT_SIDE)
        except (StopIteration, IndexError) as error:
            raise CheckpointError(f"{self.path}: {module} holds {sorted(p)}, which do not tell the sizes of its layer") from error


class PeftSource:
    """A PEFT folder with a LoRA in it: one module's tensors are read at a time. docs/peft.md says what is read."""

    def __init__(self, task: str, path: PathLike) -> None:
        self.task, self.path = task, Path(path)
        folder.check_place(self.path)
        config = folder.read_config(self.path / folder.CONFIG)
        file_path = self.path / folder.TENSORS
        with open(file_path, "rb") as file:
            head = read_header(str(file_path), file)
            metadata = head.pop("__metadata__", None) or {}
            check_entries(str(file_path), head)
            self.tensors = TensorsOf(file_path, head, file)
        self.base = folder.parsed(f"{file_path}", metadata[folder.FINGERPRINT]) if folder.FINGERPRINT in metadata else None
        found = folder.Folder(config, {}, fingerprint=self.base, source=str(path))
        self.method = known_methods(found)[0]
        if self.method.variant != "lora":
            raise CheckpointError(f"{path} is {self.method.variant!r}; without a model only LoRA is read: ll.from_peft(model, folder)")
        self.keys = self.by_module(head)
        self.modules = list(self.keys)
        self.base_config = dataclasses.replace(config_of(self.method, found), targets=patterns(config.get("target_modules"), self.modules))

    def by_module(self, head: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """{module: {field: key}}. Raises CheckpointError for adapter tensors that are of no linear layer."""
        ends = {field: folder.key_pattern(end) for field, end in self.method.keys.items()}
        hits = {key: (strip_prefixes(m["target"]), field) for key in head for field, p in ends.items() if (m := p.fullmatch(key))}
        if strange := [key for key in head if key not in hits and ".lora_" in key]:
            raise CheckpointError(
                f"{self.path} holds tensors of no linear layer's LoRA, and nothing else carries adapters here "
                f"(an embedding's are lora_embedding_A and _B): {listed(strange)}"
            )
        left_behind(str(self.path), [key for key in head if key not in hits])
        found: dict[str, dict[str, str]] = {}
        for key, (module, field) in hits.items():
            found.setdefault(module, {})[field] = key
        return found

    def read(self, module: str) -> Update:
        with self.tensors:
            p = {field: self.tensors[key] for field, key in self.keys[module].items()}
        if not {"lora_A", "lora_B"} <= set(p) or p["lora_A"].ndim != 2 or p["lora_B"].ndim != 2:
            raise CheckpointError(f"{self.path}: {module} holds {sorted(p)} {[tuple(v.shape) for v in p.values()]}, not A and B")
        size = p["lora_A"].shape[1], p["lora_B"].shape[0]
        at = At(self.base_config.at(module, *size), *size, None, module)
        p = dict(self.method.read(self.method.fill(p, at), at))
        return update_of(self.task, module, self.base_config, p, size, str(self.path))


def patterns(targets: Any, modules: list[str]) -> str | tuple[str, ...]:
    """PEFT's target_modules in our words: the ends of names, a regex that must fit whole, or (its own set of layers) every name."""
    if isinstance(targets, str) and targets:
        return targets if targets == "all-linear" else rf"^(?:{targets})$"
    ends = [str(t) for t in targets or ()]
    return tuple(rf"(^|\.){re.escape(t)}$" for t in ends) or tuple(rf"^{re.escape(m)}$" for m in modules) or "all-linear"


def check_form(what: str, config: AdapterConfig) -> None:
    if variant_of(config).form != "low-rank":
        raise ValueError(f"{what}: variant {config.variant!r} has no low-rank form, so no directions to share")


def left_behind(what: str, names: Any) -> None:
    if names:
        logger.warning("{}: a subspace keeps adapters only; what was trained beside this one is left out: {}", what, listed(list(names)))


def update_of(task: str, module: str, config: AdapterConfig, p: Mapping[str, Tensor], size: tuple[int, int], source: str) -> Update:
    """One layer's update from a file's tensors, their shapes held against what the config says."""
    try:
        cfg = config.at(module, *size)
        specs = variant_of(cfg).param_specs(*size, cfg)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: {module}: {error}") from error
    want, have = ({k: tuple(v.shape) for k, v in given.items()} for given in (specs, p))
    if want != have:
        raise CheckpointError(f"{source}: {module} holds {have}, not the factors of {config.variant!r}: {want}")
    return checked(task, module, unscaled(variant_of(cfg).factors(cfg, p, Base(*size)), cfg))


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
    if update.rank > (most := largest_rank(*update.sizes)):
        raise ValueError(f"adapter {task!r}, module {module!r}: rank {update.rank:,} is too large for such a layer; at most {most:,}")
    return update


def largest_rank(d_in: int, d_out: int) -> int:
    return max(LARGEST_RANK, d_in + d_out)


def check_finite(task: str, module: str, update: Update) -> None:
    bad = [name for name, v in (("A", update.A), ("B", update.B)) if not finite(v)]
    if bad or not math.isfinite(update.scale):
        raise ValueError(
            f"adapter {task!r}, module {module!r}: {' and '.join(bad) or 'alpha'} holds NaN or infinite values; nothing was changed"
        )


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
    alike = all((ranks[m], alphas[m]) == usual for m in ranks)
    order = () if alike else sorted(ranks, key=len, reverse=True)  # a pattern matches the end of a path: the longest first
    patterns: dict[str, Any] = {
        "rank_pattern": {re.escape(m): ranks[m] for m in order},
        "alpha_pattern": {re.escape(m): alphas[m] for m in order},
    }
    return LoRAConfig(r=usual[0], alpha=usual[1], **places, **kept, **patterns)


def agrees(config: LoRAConfig, ranks: Mapping[str, int], scales: Mapping[str, float]) -> bool:
    own = {m: config.at(m, 0, 0) for m in ranks}
    return all(own[m].r == ranks[m] and own[m].scaling == scales[m] for m in ranks)
