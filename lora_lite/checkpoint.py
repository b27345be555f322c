"""How does an adapter become one safetensors file and come back? A value <-> bytes; knows no model. docs/format.md in code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_lite.config import AdapterConfig
from lora_lite.variant import config_from_dict
from lora_lite.version import __version__

FORMAT, FORMAT_VERSION = "lora_lite", "1"
RESERVED = ("format", "format_version", "library_version", "config", "fingerprint", "diagnostics", "also", "sha256")
PREFIXES = ("_orig_mod.", "module.", "base_model.model.")


class CheckpointError(ValueError):
    """A file cannot be an adapter for this model: says which file, what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Contents:
    """What is in a file: config, tensors by target and field, parameters trained beside them, what is known of the base."""

    config: AdapterConfig
    tensors: dict[str, dict[str, Tensor]]
    also: dict[str, Tensor] = field(default_factory=dict)
    fingerprint: dict[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, Tensor]:
        return {f"{t}.{f}": v for t, fields in self.tensors.items() for f, v in fields.items()} | self.also


# -- writing ------------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write atomically: the path holds the old file or the new one, whole. Creates missing folders.

    Raises CheckpointError for non-finite tensors and for metadata that is not plain strings or uses a reserved key.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory; give a file, such as {target / 'adapter.safetensors'}")
    check_metadata(contents.metadata)
    flat = {name: v.detach().to("cpu").contiguous().clone() for name, v in contents.flat().items()}
    if bad := non_finite(flat):
        raise CheckpointError(f"not saved: {listed(bad)} hold NaN or infinity")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file(flat, temporary, metadata=header(contents, flat))
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def header(contents: Contents, flat: Mapping[str, Tensor]) -> dict[str, str]:
    """The file's metadata: ours, and the caller's beside it. safetensors holds strings only, so the rest is JSON."""
    return {
        **contents.metadata,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "config": contents.config.to_json(),
        "fingerprint": json.dumps(contents.fingerprint),
        "diagnostics": json.dumps(contents.diagnostics),
        "also": json.dumps(sorted(contents.also)),
        "sha256": digest(flat),
    }


def check_metadata(metadata: Mapping[str, str]) -> None:
    if reserved := sorted(set(metadata) & set(RESERVED)):
        raise CheckpointError(f"metadata keys {reserved} are reserved; reserved are {list(RESERVED)}")
    if wrong := sorted(str(k) for k, v in metadata.items() if not isinstance(v, str) or not isinstance(k, str)):
        raise CheckpointError(f"metadata must map strings to strings; {wrong} do not (json.dumps them)")


def digest(flat: Mapping[str, Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of each tensor, by sorted name."""
    total = hashlib.sha256()
    for name in sorted(flat):
        v = flat[name].contiguous()
        total.update(f"{name}|{str(v.dtype).removeprefix('torch.')}|{list(v.shape)}|".encode())
        total.update(v.flatten().view(torch.uint8).numpy().data if v.numel() else b"")
    return total.hexdigest()


def sync(path: str | os.PathLike[str]) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- reading ------------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Contents:
    """The contents of a file, everything that can be checked without a model checked.

    Raises FileNotFoundError, IsADirectoryError, or CheckpointError saying what the file is and what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; an adapter is one .safetensors file" + looks_like(path))
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            names = list(file.keys())
            check_format(path, metadata, names)
            flat = {name: file.get_tensor(name) for name in names}
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is truncated, damaged or not a safetensors file: {error}") from error
    config = parsed_config(path, metadata)
    also = parsed(path, metadata, "also", list, [])
    tensors, strays = grouped(flat, also)
    if strays or (set(also) - set(flat)):
        raise CheckpointError(
            f"{path}: keys without a home {listed(strays)}, announced but missing {listed(sorted(map(str, set(also) - set(flat))))}"
        )
    if bad := non_finite(flat):
        raise CheckpointError(f"{path}: {listed(bad)} hold NaN or infinity; the file was not made by save, or is damaged")
    if "sha256" in metadata and metadata["sha256"] != digest(flat):
        raise CheckpointError(f"{path} is damaged: its tensors do not have the checksum they were saved with")
    return Contents(
        config,
        tensors,
        {name: flat[name] for name in also},
        parsed(path, metadata, "fingerprint", dict, None),
        {k: v for k, v in metadata.items() if k not in RESERVED},
        parsed(path, metadata, "diagnostics", dict, {}),
    )


def check_format(path: Path, metadata: Mapping[str, str], names: list[str]) -> None:
    if metadata.get("format") != FORMAT:
        kind = (
            "a PEFT adapter"
            if any(".lora_A.weight" in n or n.startswith("base_model.model.") for n in names)
            else "some other safetensors file"
        )
        raise CheckpointError(
            f"{path} was not saved by lora_lite (format {metadata.get('format')!r}); it looks like {kind}, with keys {listed(names)}"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {metadata.get('format_version')!r}; lora_lite {__version__} reads {FORMAT_VERSION!r}: update it"
        )


def looks_like(path: Path) -> str:
    found = sorted(p.name for p in path.glob("*.safetensors"))
    return f"; it holds {listed(found)}" if found else ""


def parsed(path: Path, metadata: Mapping[str, str], key: str, kind: type, default: Any) -> Any:
    """A JSON entry of the header, of the type it must have; null and absence are the default."""
    try:
        value = json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header entry {key!r} is not JSON: {error}") from error
    if value is None:
        return default
    if not isinstance(value, kind):
        raise CheckpointError(f"{path}: header entry {key!r} must be a JSON {kind.__name__}, found {type(value).__name__}")
    return value


def parsed_config(path: Path, metadata: Mapping[str, str]) -> AdapterConfig:
    values = parsed(path, metadata, "config", dict, None)
    if values is None:
        raise CheckpointError(f"{path}: the header holds no config")
    try:
        return config_from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: config {str(values)[:200]} cannot be read: {error}") from error


def grouped(flat: Mapping[str, Tensor], also: Iterable[str]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors by target and field, and the keys that are neither an adapter's nor announced as trained beside it."""
    tensors: dict[str, dict[str, Tensor]] = {}
    beside, strays = set(map(str, also)), []
    for name, value in flat.items():
        target, dot, leaf = name.rpartition(".")
        if name in beside:
            continue
        if not dot or not leaf.startswith("lora_"):
            strays.append(name)
        else:
            tensors.setdefault(target, {})[leaf] = value
    return tensors, strays


# -- fitting a model ----------------------------------------------------------------------------------------------------


def strip_prefixes(name: str) -> str:
    """A module path without the names that wrappers put in front of it or, for torch.compile, inside it."""
    name = name.replace("_orig_mod.", "")
    while name.startswith(PREFIXES):
        name = re.sub(rf"^({'|'.join(map(re.escape, PREFIXES))})", "", name)
    return name


def match_names(found: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """File names -> a model's names: as they are where they fit, else by what is left of both without wrappers' prefixes."""
    wanted = list(wanted)
    exact, bare = set(wanted), {strip_prefixes(name): name for name in wanted}
    return {name: name if name in exact else bare.get(strip_prefixes(name), name) for name in found}


def renamed(contents: Contents, targets: Iterable[str], parameters: Iterable[str] = ()) -> Contents:
    """The contents under the names a model has for its layers and parameters; what fits nothing keeps its name."""
    layers, beside = match_names(contents.tensors, targets), match_names(contents.also, parameters)
    if len(set(layers.values())) < len(layers):
        raise CheckpointError(f"several keys mean one layer: {listed(sorted(layers))}")
    tensors = {layers[t]: fields for t, fields in contents.tensors.items()}
    fingerprint = contents.fingerprint
    if fingerprint and isinstance(fingerprint.get("targets"), dict):
        fingerprint = {**fingerprint, "targets": {layers.get(t, t): v for t, v in fingerprint["targets"].items()}}
    return dataclasses.replace(contents, tensors=tensors, also={beside[n]: v for n, v in contents.also.items()}, fingerprint=fingerprint)


def check_tensors(contents: Contents, expected: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Raise one CheckpointError with every missing, unexpected and mis-shaped key, or return."""
    want = {f"{t}.{f}": tuple(shape) for t, fields in expected.items() for f, shape in fields.items()}
    have = {f"{t}.{f}": tuple(v.shape) for t, fields in contents.tensors.items() for f, v in fields.items()}
    problems = {
        "missing": sorted(set(want) - set(have)),
        "unexpected": sorted(set(have) - set(want)),
        "mis-shaped": [f"{k} {have[k]} for {want[k]}" for k in sorted(set(want) & set(have)) if want[k] != have[k]],
    }
    if any(problems.values()):
        raise CheckpointError("the file does not fit: " + "; ".join(f"{len(v)} {k}: {listed(v)}" for k, v in problems.items() if v))


def non_finite(flat: Mapping[str, Tensor]) -> list[str]:
    return sorted(name for name, v in flat.items() if v.is_floating_point() and not bool(torch.isfinite(v).all()))


def listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"
