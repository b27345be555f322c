"""How do tensors and text lie in a safetensors file, ours or anybody's?"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from lora_lite.checkpoint.contents import CheckpointError
from lora_lite.checkpoint.foreign import foreign
from lora_lite.checkpoint.names import strip_prefixes
from lora_lite.checkpoint.words import brief, listed, problem

HEADER_LIMIT = 100_000_000  # safetensors' own
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def header(metadata: Mapping[str, str], flat: Mapping[str, Tensor]) -> bytes:
    """The start of the file. Written here since safetensors' own writer shuffles the metadata: other bytes on each run."""
    offsets, end = {}, 0
    for name, v in in_place(flat):
        offsets[name] = [end, end := end + v.nbytes]
    entries = {n: {"dtype": DTYPES[v.dtype], "shape": list(v.shape), "data_offsets": offsets[n]} for n, v in flat.items()}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items()))} | entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise CheckpointError(f"not saved: names and metadata take {len(text):,} bytes, safetensors allows {HEADER_LIMIT:,}")
    return len(text).to_bytes(8, "little") + text


def in_place(flat: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors as they lie in the file: wide items first, so that each begins at a multiple of its item's size."""
    return sorted(flat.items(), key=lambda item: -item[1].itemsize)


def raw(v: Tensor) -> memoryview:
    """A tensor's values in order, little-endian, bit for bit."""
    whole = v.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return whole.data if sys.byteorder == "little" else whole.reshape(-1, v.itemsize)[:, ::-1].ravel().data


def digest(metadata: Mapping[str, str], flat: Mapping[str, Tensor], names: Mapping[str, str] | None = None) -> str:
    """sha256 over all metadata but itself and all tensors, each by sorted name, each part after its length in 8 bytes.

    Tensors go by their keys without wrappers' prefixes: a file whose keys a tool put `module.` before is no damaged file.
    """
    total, names = hashlib.sha256(), names or bare_names(flat)

    def add(*texts: str, last: bytes | memoryview = b"") -> None:
        parts = [*(text.encode() for text in texts), last]
        total.update(b"".join(len(p).to_bytes(8, "little") + p for p in parts[:-1]) + len(last).to_bytes(8, "little"))
        total.update(last)

    for key in sorted(metadata.keys() - {"sha256"}):
        add(key, last=metadata[key].encode())
    for name in sorted(flat, key=names.__getitem__):
        v = flat[name]
        add(names[name], DTYPES[v.dtype], ",".join(map(str, v.shape)), last=raw(v))
    return total.hexdigest()


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """Keys -> themselves without wrappers' prefixes; all as they are where two would become one."""
    bare = {key: strip_prefixes(key) for key in keys}
    return bare if len(set(bare.values())) == len(bare) else {key: key for key in bare}


def read_header(source: str, file: BinaryIO) -> dict[str, Any]:
    """The JSON at the start, without repeated names, which safetensors itself lets through (the last one wins)."""
    size, start = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT):
        raise CheckpointError(f"{source} {foreign(start + file.read(56), size, length)}")
    try:
        head = strict_json(file.read(length).decode())
        texts = [head, head.get("__metadata__") or {}]
    except (ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(
            f"{source} is damaged, or no safetensors file: its header is not the JSON it must be: {brief(error)}"
        ) from error
    if not all(isinstance(t, dict) for t in texts) or not all(isinstance(v, str) for v in texts[1].values()):
        raise CheckpointError(f"{source} is damaged: the metadata in its header must be text by name")
    return head


def check_entries(source: str, head: Mapping[str, Any]) -> None:
    dtypes = {name: entry.get("dtype") if isinstance(entry, dict) else None for name, entry in head.items()}
    if wrong := problem(
        f"of a dtype that is not one of {', '.join(DTYPES.values())}", [n for n, d in dtypes.items() if d not in [*DTYPES.values()]]
    ):
        raise CheckpointError(f"{source}: {wrong[0]}")


def read_tensors(source: str, file: BinaryIO, names: list[str]) -> dict[str, Tensor]:
    """The tensors in the header's order. safetensors checks that their ranges fit dtype and shape and tile the file exactly."""
    try:
        loaded = parse_safetensors(file.read())
        return {name: loaded[name] for name in names}
    except Exception as error:  # SafetensorError, and what torch raises for a shape beyond its integers
        raise CheckpointError(f"{source} is damaged or cut short: {brief(error)}. Take another copy") from error


def non_finite(flat: Mapping[str, Tensor]) -> list[str]:
    return [name for name, v in flat.items() if v.is_floating_point() and not finite(v)]


def finite(v: Tensor) -> bool:
    """A sum is finite only where all is; where it is not, it may have overflowed, and all is looked at (five times as long)."""
    return math.isfinite(float(v.sum(dtype=torch.promote_types(v.dtype, torch.float32)))) or bool(torch.isfinite(v).all())


def strict_json(text: str) -> Any:
    """JSON as its standard has it: no NaN, and no name twice in an object, which readers would take for different values."""
    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"repeated: {listed([k for k, times in Counter(k for k, _ in pairs).items() if times > 1])}")
    return found


def refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
