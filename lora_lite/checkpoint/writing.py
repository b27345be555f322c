"""How do an adapter's contents become a file?"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lite.checkpoint.contents import FORMAT, FORMAT_VERSION, RESERVED, CheckpointError, Contents, key_problems
from lora_lite.checkpoint.disk import make_folder, replace
from lora_lite.checkpoint.layout import DTYPES, digest, header, in_place, non_finite, raw, strict_json
from lora_lite.checkpoint.words import brief, is_unicode, problem
from lora_lite.config import AdapterConfig
from lora_lite.variant import config_from_dict
from lora_lite.version import __version__


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Put the contents into a file, atomically: at every moment the path holds the old file or the new one, whole.

    Missing folders are made; a link is followed. The same contents give the same bytes. Raises CheckpointError, before
    anything is touched, for tensors that are not finite and for metadata that is reserved or not text.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give a file in it, such as {Path(path) / 'adapter.safetensors'}")
    if target.exists() and not target.is_file():
        raise CheckpointError(f"{path} is a device or a pipe; an adapter is saved to a plain file")
    same = aliases(contents)
    flat = {name: v for name, v in snapshot(contents).items() if name not in same}
    metadata = described(contents) | ({"shared": as_json("shared", same)} if same else {})
    head = header(metadata | {"sha256": digest(metadata, flat)}, flat)
    make_folder(target.parent)
    replace(target, [head, *(raw(v) for _, v in in_place(flat))])


def aliases(contents: Contents) -> dict[str, str]:
    """Keys of tensors that are one and the same in memory as one that comes before: what layers share is written once."""
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, v in contents.named():
        place = (v.device, v.data_ptr(), v.dtype, v.shape, v.stride()) if v.numel() else name
        if (before := first.setdefault(place, name)) != name:
            found[name] = before
    return found


def snapshot(contents: Contents) -> dict[str, Tensor]:
    """The tensors as they are now, on the CPU, packed: training may go on in another thread while the file is written."""
    named = contents.named()
    flat = {name: v.detach().to("cpu", copy=True).contiguous() for name, v in named}
    problems = [
        *problem("given to several tensors", [n for n, times in Counter(n for n, _ in named).items() if times > 1]),
        *key_problems(flat, list(contents.also)),
        *problem("of a dtype the format does not hold", [f"{n} ({v.dtype})" for n, v in flat.items() if v.dtype not in DTYPES]),
        *problem("that is not Unicode", [n for n in flat if not is_unicode(n)]),
        *problem("holding NaN or infinity", non_finite(flat)),
    ]
    if problems:
        raise CheckpointError(f"not saved: {'; '.join(problems)}")
    return flat


def described(contents: Contents) -> dict[str, str]:
    """The file's metadata but for the hash: ours, and the caller's beside it. safetensors holds text only, so the rest is JSON."""
    check_metadata(contents.metadata)
    numbers = {k: float(v) if math.isfinite(v) else repr(float(v)) for k, v in contents.diagnostics.items()}
    optional = {"also": list(contents.also) or None, "fingerprint": contents.fingerprint, "diagnostics": numbers or None}
    optional["calibrated"] = contents.calibrated or None
    ours = {"format": FORMAT, "format_version": FORMAT_VERSION, "library_version": __version__, "config": config_text(contents.config)}
    return contents.metadata | ours | {k: as_json(k, v) for k, v in optional.items() if v is not None}


def check_metadata(metadata: Mapping[Any, Any]) -> None:
    wrong = [str(k) for k, v in metadata.items() if not isinstance(k, str) or not isinstance(v, str)]
    problems = [
        *problem(f"reserved (reserved are {', '.join(RESERVED)})", [k for k in metadata if k in RESERVED]),
        *problem("not text, or without a text as value (json.dumps it)", wrong),
        *problem("holding half a surrogate pair, which UTF-8 cannot", [k for k, v in metadata.items() if not is_unicode(f"{k}{v}")]),
    ]
    if problems:
        raise CheckpointError(f"not saved: of the metadata, {'; '.join(problems)}")


def config_text(config: AdapterConfig) -> str:
    """The config's JSON, after making sure that it can be read again: an unreadable file is found now, not when it is needed."""
    try:
        text = config.to_json()
        again = config_from_dict(strict_json(text)).to_json()
    except Exception as error:  # a variant of the user's own may raise anything
        raise CheckpointError(f"not saved: {config} does not survive JSON: {brief(error)}") from error
    if again != text:
        raise CheckpointError(f"not saved: the config {text} comes back from JSON as {again}")
    return text


def as_json(key: str, value: Any) -> str:
    try:
        text = json.dumps(value, allow_nan=False)
        same = strict_json(text) == value
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"not saved: {key} is not JSON: {brief(error)}") from error
    if not same:
        raise CheckpointError(f"not saved: {key} changes in JSON, which has no tuples and only text as keys")
    return text
