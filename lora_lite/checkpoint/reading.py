"""What is in a file of ours, once everything that can be checked without a model has been?"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lite.checkpoint.contents import (
    RESERVED,
    CheckpointError,
    Contents,
    absent_keys,
    by_target,
    is_own,
    joined,
    key_problems,
    listed_targets,
    split,
)
from lora_lite.checkpoint.disk import check_place
from lora_lite.checkpoint.foreign import check_format
from lora_lite.checkpoint.layout import bare_names, check_entries, digest, non_finite, read_header, read_tensors, strict_json
from lora_lite.checkpoint.names import match_names
from lora_lite.checkpoint.words import brief, problem, shown
from lora_lite.variant import config_from_dict
from lora_lite.version import __version__

DAMAGED = "its contents are not those that were saved (sha256)"
WAY_OUT = "Take another copy; if it was edited on purpose, remove sha256 and library_version from its header"


@dataclass(frozen=True, eq=False)
class Findings:
    """What was read, and all that is wrong with it so far: what a model finds is said in the same error, `taken` raises it."""

    contents: Contents
    problems: list[str] = field(default_factory=list)
    damaged: bool = False  # another hash than when it was saved

    def taken(self, contents: Contents, misfits: Sequence[str] = (), question: str = "") -> Contents:
        """`contents`, which are these under other names perhaps. Raises one CheckpointError with everything that is wrong."""
        what, question = ("does not fit", question) if misfits else ("is not an adapter as it stands", "")
        check_whole(self.contents.source, what, [*misfits, *self.problems], self.damaged, question)
        return contents


def check_whole(source: str, what: str, problems: Sequence[str], damaged: bool, question: str = "") -> None:
    """Raise one CheckpointError with the problems and whether the contents are others than were saved, or return."""
    more = f"{DAMAGED}. {WAY_OUT}" if damaged else question
    if problems:
        raise CheckpointError(f"{source} {what}: {'; '.join(problems)}.{f' {more[0].upper()}{more[1:]}' if more else ''}")
    if damaged:
        raise CheckpointError(f"{source} is damaged: {more}")


def read(path: str | os.PathLike[str]) -> Contents:
    """The contents of a file, after everything that can be checked without a model has been.

    The file is opened once, so that one replaced meanwhile is read whole, and its tensors do not depend on it afterwards.
    Raises FileNotFoundError, IsADirectoryError, or CheckpointError saying what the file is and what to do.
    """
    found = look(path)
    return found.taken(found.contents, problem("missing", absent_keys(found.contents)))


def look(path: str | os.PathLike[str]) -> Findings:
    """What `read` reads, with the problems of its keys, its values and its hash beside it: a model may find more.

    Raises at once what leaves nothing to look at: no safetensors file, another format, a header that cannot be read.
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
    damaged = is_damaged(source, metadata, flat)
    known = read_metadata(source, metadata, [DAMAGED] if damaged else [])
    also, shared, names = known["also"], known["shared"], aligned(flat, known)
    flat = {names[key]: v for key, v in flat.items()}
    bad = [*shared_problems(flat, shared), *problem("holding NaN or infinity", non_finite(flat))]
    flat |= {key: flat[stored] for key, stored in shared.items() if stored in flat and key not in flat}
    contents = Contents(
        known["config"],
        by_target({name: v for name, v in flat.items() if is_own(name) and name not in set(also)}),
        {name: flat[name] for name in also if name in flat},
        known["fingerprint"],
        {k: v for k, v in metadata.items() if k not in RESERVED},
        known["diagnostics"],
        known["calibrated"],
        source,
        f"lora_lite {metadata['library_version']}" if "library_version" in metadata else "hand",
    )
    return Findings(contents, [*key_problems(flat, also), *bad], damaged)


def aligned(keys: Iterable[str], known: Mapping[str, Any]) -> dict[str, str]:
    """The file's keys -> what they are by the header's names: a tool that puts `module.` before every key leaves the header as it was.

    The header names layers in the fingerprint and in `shared`. A key stays where none is named like it, or two would become one.
    """
    keys, also, shared = list(keys), known["also"], known["shared"]
    named = [*listed_targets(known["fingerprint"]), *(split(key)[0] for key in (*shared, *shared.values()))]
    beside, layers = followed(keys, also), followed([split(key)[0] for key in keys], named)
    found = {key: beside[key] if beside[key] in also else joined(layers[split(key)[0]], split(key)[1]) for key in keys}
    return found if len(set(found.values())) == len(found) else {key: key for key in keys}


def followed(names: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Names -> those wanted that are the same but for wrappers' prefixes; a name stays where two would come to mean one."""
    found = match_names(dict.fromkeys(names), wanted)
    times = Counter(found.values())
    return {name: meant if times[meant] == 1 else name for name, meant in found.items()}


def shared_problems(flat: Mapping[str, Tensor], shared: Mapping[str, str]) -> list[str]:
    return [
        *problem("shared, and there by themselves too", [k for k in shared if k in flat]),
        *problem("shared with a tensor that is not there", [k for k, stored in shared.items() if stored not in flat]),
    ]


def is_damaged(source: str, metadata: Mapping[str, str], flat: Mapping[str, Tensor]) -> bool:
    """Whether the contents are others than those that were saved.

    Files of ours carry a hash. One written by hand may do without, but then without `library_version` too: a damaged key
    "sha256" must not pass for a file that never had one. Raises CheckpointError for such a one.
    """
    if ("sha256" in metadata) != ("library_version" in metadata):
        found = "sha256" if "sha256" in metadata else "library_version"
        raise CheckpointError(
            f"{source} is damaged: its header has {found} alone; it holds sha256 and library_version, or, written by hand, neither"
        )
    if "sha256" not in metadata:
        return False
    bare = bare_names(flat)
    ways = [bare] if all(name == key for key, name in bare.items()) else [bare, {key: key for key in flat}]  # 0.1.0 hashed whole keys
    try:
        return all(metadata["sha256"] != digest(metadata, flat, names) for names in ways)
    except UnicodeEncodeError:
        return True


def read_metadata(source: str, metadata: Mapping[str, str], known: Sequence[str] = ()) -> dict[str, Any]:
    """Our entries of the header as values, or one error with everything that is wrong with them, and what is known to be already."""
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
        raise CheckpointError(f"{source} (written by {by}; this is lora_lite {__version__}): {'; '.join([*problems, *known])}")
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
