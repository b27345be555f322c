"""What is in a file of ours, once everything that can be checked without a model has been?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lite.checkpoint.contents import RESERVED, CheckpointError, Contents, by_target, key_problems
from lora_lite.checkpoint.disk import check_place
from lora_lite.checkpoint.foreign import check_format
from lora_lite.checkpoint.layout import check_entries, digest, non_finite, read_header, read_tensors, strict_json
from lora_lite.checkpoint.words import brief, problem, shown
from lora_lite.variant import config_from_dict
from lora_lite.version import __version__


def read(path: str | os.PathLike[str]) -> Contents:
    """The contents of a file, after everything that can be checked without a model has been.

    The file is opened once, so that one replaced meanwhile is read whole, and its tensors do not depend on it afterwards.
    Raises FileNotFoundError, IsADirectoryError, or CheckpointError saying what the file is and what to do.
    """
    source, path = str(path), Path(path)
    check_place(path)
    with open(path, "rb") as file:
        head = read_header(source, file)
        metadata = head.pop("__metadata__", None) or {}
        check_format(source, metadata, list(head))
        check_entries(source, head)
        file.seek(0)
        flat = read_tensors(source, file, list(head))
    check_digest(source, metadata, flat)
    known = read_metadata(source, metadata)
    bad, flat = non_finite(flat), with_shared(source, flat, known["shared"])
    also: list[str] = known["also"]
    if problems := key_problems(flat, also) + problem("holding NaN or infinity", bad):
        raise CheckpointError(f"{source} is not an adapter as it stands: {'; '.join(problems)}")
    return Contents(
        known["config"],
        by_target({name: v for name, v in flat.items() if name not in set(also)}),
        {name: flat[name] for name in also},
        known["fingerprint"],
        {k: v for k, v in metadata.items() if k not in RESERVED},
        known["diagnostics"],
        known["calibrated"],
        source,
        f"lora_lite {metadata['library_version']}" if "library_version" in metadata else "hand",
    )


def with_shared(source: str, flat: dict[str, Tensor], shared: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors, and under its other keys each one that layers share: the same object, which stays one Parameter."""
    problems = [
        *problem("shared, and there by themselves too", [k for k in shared if k in flat]),
        *problem("shared with a tensor that is not there", [k for k, stored in shared.items() if stored not in flat]),
    ]
    if problems:
        raise CheckpointError(f"{source} is not an adapter as it stands: {'; '.join(problems)}")
    return flat | {key: flat[stored] for key, stored in shared.items()}


def check_digest(source: str, metadata: Mapping[str, str], flat: Mapping[str, Tensor]) -> None:
    """Files of ours carry a hash. One written by hand may do without, but then without `library_version` too: a damaged
    key "sha256" must not pass for a file that never had one."""
    if ("sha256" in metadata) != ("library_version" in metadata):
        found = "sha256" if "sha256" in metadata else "library_version"
        raise CheckpointError(
            f"{source} is damaged: its header has {found} alone; it holds sha256 and library_version, or, written by hand, neither"
        )
    try:
        wrong = "sha256" in metadata and metadata["sha256"] != digest(metadata, flat)
    except UnicodeEncodeError:
        wrong = True
    if wrong:
        raise CheckpointError(
            f"{source} is damaged: its contents are not those that were saved (sha256). Take another copy; if it was edited on "
            "purpose, remove sha256 and library_version from its header"
        )


def read_metadata(source: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Our entries of the header as values, or one error with everything that is wrong with them."""
    values: dict[str, Any] = {"also": [], "fingerprint": None, "diagnostics": {}, "calibrated": {}, "shared": {}}
    problems = [] if "config" in metadata else ["config is missing"]
    for key, parse in PARSERS.items():
        if key in metadata:
            try:
                values[key] = parse(strict_json(metadata[key]))
            except Exception as error:  # a config is a class that a user may have written, on JSON that anyone may have written
                problems.append(f"{key} {shown(metadata[key])} cannot be read: {brief(error)}")
    if problems:
        by = shown(metadata.get("library_version", "hand"))
        raise CheckpointError(f"{source} (written by {by}; this is lora_lite {__version__}): {'; '.join(problems)}")
    return values


def names_from(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value) or len(set(value)) < len(value):
        raise ValueError("it must be a list of different names")
    return value


def object_from(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it must be an object, found {type(value).__name__}")
    return value


def numbers_from(value: Any) -> dict[str, float]:
    """Numbers by name; JSON has no NaN and no infinity, which are written as text."""
    for name, v in object_from(value).items():
        if not (isinstance(v, int | float) and not isinstance(v, bool)) and v not in ("nan", "inf", "-inf"):
            raise ValueError(f"{shown(name)} is not a number")
    return {name: float(v) for name, v in value.items()}


def keys_from(value: Any) -> dict[str, str]:
    if not all(isinstance(v, str) for v in object_from(value).values()):
        raise ValueError("it must be an object of keys by key")
    return value


PARSERS: dict[str, Callable[[Any], Any]] = {
    "config": lambda value: config_from_dict(object_from(value)),
    "also": names_from,
    "fingerprint": object_from,
    "diagnostics": numbers_from,
    "calibrated": object_from,
    "shared": keys_from,
}
