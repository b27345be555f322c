"""What is in a PEFT folder, and how does one get onto the disk whole? Files only; knows no method and no model."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lite.checkpoint import (
    RESERVED,
    CheckpointError,
    as_json,
    as_path,
    brief,
    check_entries,
    check_metadata,
    header,
    in_place,
    in_the_name_of,
    is_unicode,
    listed,
    make_folder,
    non_finite,
    object_from,
    problem,
    raw,
    read_header,
    read_tensors,
    replace,
    shown,
    strict_json,
)
from lora_lite.version import __version__

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_LIMIT = 50_000_000  # bytes; every module of the largest model by its full name takes one
# In the header, where PEFT looks at "format" only.
VERSION, FINGERPRINT, DTYPE = "lora_lite_version", "lora_lite_fingerprint", "lora_lite_dtype"
OURS = ("format", VERSION, FINGERPRINT, DTYPE)
DTYPES = {"float32": torch.float32, "float64": torch.float64}  # that an adapter comes back in


@dataclass(frozen=True, eq=False)
class Folder:
    """What PEFT's two files hold.

    config       adapter_config.json
    tensors      by key, as in the file
    metadata     text by name from the tensors' header, without what is PEFT's and what is ours
    fingerprint  of the base it was trained on, where we wrote it
    dtype        the adapter's own, where we wrote it: a tensor may be wider here (`numbers.Distance`)
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    fingerprint: dict[str, Any] | None = None
    dtype: torch.dtype | None = None
    source: str = "the folder"
    by: str = "PEFT"  # what wrote it, such as "PEFT 0.21.2"


def read_folder(path: str | os.PathLike[str]) -> Folder:
    """Both files, after everything that can be checked without a model has been. Raises CheckpointError, FileNotFoundError."""
    folder = as_path(path, "ll.from_peft(model, folder) reads a PEFT folder")
    check_place(folder)
    config = read_config(folder / CONFIG)
    source = str(folder / TENSORS)
    with open(folder / TENSORS, "rb") as file:
        head = read_header(source, file)
        metadata = head.pop("__metadata__", None) or {}
        check_entries(source, head)
        file.seek(0)
        tensors = read_tensors(source, file, list(head))
    if problems := problem("holding NaN or infinity", non_finite(tensors)):
        raise CheckpointError(f"{source}: {problems[0]}")
    fingerprint = None
    if FINGERPRINT in metadata:
        fingerprint = parsed(f"{source}, {FINGERPRINT}", metadata[FINGERPRINT])
    beside = {k: v for k, v in metadata.items() if k not in (*OURS, *RESERVED)}
    return Folder(config, tensors, beside, fingerprint, dtype_in(source, metadata), str(folder), written_by(config, metadata))


def dtype_in(source: str, metadata: Mapping[str, str]) -> torch.dtype | None:
    """Raises CheckpointError for one that `to_peft` does not write."""
    name = metadata.get(DTYPE)
    if name is not None and name not in DTYPES:
        raise CheckpointError(f"{source}: {DTYPE} is {shown(repr(name))}; to_peft writes one of {sorted(DTYPES)}")
    return None if name is None else DTYPES[name]


def written_by(config: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    return f"lora_lite {metadata[VERSION]}" if VERSION in metadata else f"PEFT {config.get('peft_version') or ''}".strip()


def check_place(folder: Path) -> None:
    """Refuse, in words, what is no PEFT folder. Pickles are not read: reading one may run code."""
    if folder.is_file():
        instead = "" if folder.name == TENSORS else f"; ll.load(model, {str(folder)!r}) attaches a file that adapter.save wrote"
        raise CheckpointError(f"{folder} is a file; a PEFT adapter is the folder with {CONFIG} and {TENSORS} in it{instead}")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; nothing is fetched from a hub: download the adapter first")
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
    if not missing:
        return
    found = listed(sorted(p.name for p in folder.iterdir()))
    inside = [p.parent.name for p in sorted(folder.glob(f"*/{CONFIG}"))]
    hint = f"; PEFT puts an adapter with a name of its own into a subfolder: give {listed(inside)}" if inside else ""
    if TENSORS in missing and (folder / "adapter_model.bin").is_file():
        hint = "; adapter_model.bin is a pickle, which can run code: load it with PEFT and save it again as safetensors"
    raise CheckpointError(f"{folder} lacks {' and '.join(missing)}{hint}. It holds: {found}")


def read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > CONFIG_LIMIT:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, no config has that many")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text: {brief(error)}") from error
    return parsed(str(path), text)


def parsed(source: str, text: str) -> dict[str, Any]:
    try:
        return object_from(strict_json(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not the JSON object it must be: {brief(error)}") from error


def write_folder(path: str | os.PathLike[str], contents: Folder) -> None:
    """Both files. A new folder appears whole; in one that exists the old config goes first and the new one comes last,
    so that what a crash leaves is the old adapter, the new one, or none that loads, never a mixture."""
    folder = Path(os.path.realpath(path))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{path} is a file; a PEFT adapter is a folder")
    flat = {name: v.detach().to("cpu", copy=True).contiguous() for name, v in contents.tensors.items()}
    head, config = header(described(flat, contents), flat), config_text(contents.config)
    make_folder(folder.parent)
    place = folder if folder.exists() else folder.with_name(f".lora_lite-{secrets.token_hex(8)}.tmp")
    try:
        with in_the_name_of(folder):
            place.mkdir(exist_ok=True)
        (place / CONFIG).unlink(missing_ok=True)
        replace(place / TENSORS, [head, *(raw(v) for _, v in in_place(flat))])
        replace(place / CONFIG, [config])
        if place != folder:
            os.rename(place, folder)
    except BaseException:
        if place != folder:
            shutil.rmtree(place, ignore_errors=True)
        raise


def described(flat: Mapping[str, Tensor], contents: Folder) -> dict[str, str]:
    """The header's metadata: "format" is PEFT's, the rest it does not look at."""
    check_metadata(contents.metadata)
    if taken := [k for k in contents.metadata if k in OURS]:
        raise CheckpointError(f"not saved: of the metadata, {listed(taken)} are ours to write")
    if problems := problem("holding NaN or infinity", non_finite(flat)) + problem("not Unicode", [n for n in flat if not is_unicode(n)]):
        raise CheckpointError(f"not saved: {'; '.join(problems)}")
    ours = {"format": "pt", VERSION: __version__}
    if contents.fingerprint is not None:
        ours[FINGERPRINT] = as_json(FINGERPRINT, contents.fingerprint)
    if contents.dtype is not None:
        ours[DTYPE] = str(contents.dtype).removeprefix("torch.")
    return contents.metadata | ours


def config_text(config: Mapping[str, Any]) -> bytes:
    """As PEFT writes it: sorted keys, two spaces. But not inside: of rank_pattern and alpha_pattern the first match wins."""
    return (json.dumps(dict(sorted(config.items())), indent=2, allow_nan=False) + "\n").encode()


# -- keys -----------------------------------------------------------------------------------------------------------------

FRONT, SHARED_FRONT = "base_model.model.", "base_model."
INFIX = r"(\.(?!weight$|bias$)[^.]+)?"  # an adapter's name, as in memory: lora_A.default.weight; files have none


def key_pattern(end: str) -> re.Pattern[str]:
    """Which keys end in `end`, such as "lora_A.weight" or "ia3_l", with or without an adapter's name. DoRA's magnitudes are a
    module's weight in memory, and in files have lost that word."""
    stem, dot, weight = end.partition(".")
    last = re.escape(dot + weight) if weight else r"(\.weight)?"
    return re.compile(rf"(?P<target>.+)\.{re.escape(stem)}{INFIX}{last}", re.DOTALL)


def shared_pattern(end: str) -> re.Pattern[str]:
    """Which keys are a matrix that serves all layers: "base_model.vera_A"."""
    return re.compile(rf"(base_model\.)?{re.escape(end)}{INFIX}")
