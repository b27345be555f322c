"""How does an adapter become one safetensors file, and come back whole or not at all? docs/format.md in code; knows no model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from lora_lite.config import AdapterConfig
from lora_lite.variant import config_from_dict
from lora_lite.version import __version__

FORMAT, FORMAT_VERSION = "lora_lite", "1"
RESERVED = ("format", "format_version", "library_version", "config", "also", "fingerprint", "diagnostics", "sha256")
HEADER_LIMIT = 100_000_000  # safetensors' own
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # what holds the bits of a dtype of that size
FIELD = re.compile(r"lora_(?!.*__)\w+")
INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # put anywhere in a name by wrappers
IN_FRONT = (("module",), ("base_model", "model"))


class CheckpointError(ValueError):
    """A file, or contents on their way to one, that cannot be an adapter: which file, what was found, what to do."""


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds: config, tensors by target and field, and what was trained, known and said beside them.

    {"model.layers.0.self_attn.q_proj": {"lora_A": (r, d_in), "lora_B": (d_out, r)}}    tensors
    {"score.weight": (n, d)}                                                            also: parameters by full name
    """

    config: AdapterConfig
    tensors: dict[str, dict[str, Tensor]]
    also: dict[str, Tensor] = field(default_factory=dict)
    fingerprint: dict[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)
    source: str = "the file"  # where it was read from, for messages

    def named(self) -> list[tuple[str, Tensor]]:
        """Every tensor under its key in the file. A target without a name is the model itself."""
        own = [(f"{t}.{f}" if t else f, v) for t, fields in self.tensors.items() for f, v in fields.items()]
        return own + list(self.also.items())


# -- writing ------------------------------------------------------------------------------------------------------------


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
    flat = snapshot(contents)
    metadata = described(contents)
    head = header(metadata | {"sha256": digest(metadata, flat)}, flat)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace(target, [head, *(raw(v) for _, v in in_place(flat))])


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
    whole = v.detach().contiguous().reshape(-1).view(INTEGERS[v.itemsize]).numpy()
    return whole.astype(whole.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def digest(metadata: Mapping[str, str], flat: Mapping[str, Tensor]) -> str:
    """sha256 over all metadata but itself and all tensors, each by sorted name, each part after its length in 8 bytes."""
    total = hashlib.sha256()

    def add(*parts: bytes | memoryview) -> None:
        for part in parts:
            total.update(len(part).to_bytes(8, "little"))
            total.update(part)

    for key in sorted(metadata.keys() - {"sha256"}):
        add(key.encode(), metadata[key].encode())
    for name in sorted(flat):
        v = flat[name]
        add(name.encode(), DTYPES[v.dtype].encode(), ",".join(map(str, v.shape)).encode(), raw(v))
    return total.hexdigest()


def replace(target: Path, parts: Iterable[bytes | memoryview]) -> None:
    temporary = target.with_name(f".lora_lite-{secrets.token_hex(8)}.tmp")
    file = open(temporary, "xb")  # noqa: SIM115 (a file that could not be made here is not ours to remove)
    try:
        with file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # the file is in place; some systems cannot sync a folder
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- reading ------------------------------------------------------------------------------------------------------------


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
    also: list[str] = known["also"]
    if problems := key_problems(flat, also) + problem("holding NaN or infinity", non_finite(flat)):
        raise CheckpointError(f"{source} is not an adapter as it stands: {'; '.join(problems)}")
    return Contents(
        known["config"],
        by_target({name: v for name, v in flat.items() if name not in set(also)}),
        {name: flat[name] for name in also},
        known["fingerprint"],
        {k: v for k, v in metadata.items() if k not in RESERVED},
        known["diagnostics"],
        source,
    )


def check_place(path: Path) -> None:
    """Refuse what is no file, before opening it: a pipe would wait for ever."""
    if path.is_dir():
        inside = listed(sorted(p.name for p in path.glob("*.safetensors")))
        raise IsADirectoryError(f"{path} is a directory; an adapter is one file. It holds these .safetensors files: {inside}")
    if not path.exists():
        near = listed(sorted(p.name for p in path.parent.glob("*.safetensors"))) if path.parent.is_dir() else "no such folder"
        raise FileNotFoundError(f"there is no file {path}; .safetensors files in {path.parent}: {near}")
    if not path.is_file():
        raise CheckpointError(f"{path} is a device or a pipe; an adapter is a plain file")


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


MAGIC = {
    b"PK\x03\x04": "is a zip or torch.save file; read it with torch.load(..., weights_only=True), save adapters with adapter.save(path)",
    b"\x80": "is a pickle; save adapters with adapter.save(path)",
    b"GGUF": "is a GGUF file of llama.cpp; adapters are loaded from what adapter.save(path) wrote",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository",
    b"<": "is a web page or XML, perhaps a failed download; download the file itself",
    b"{": "is JSON, perhaps a config or an index beside the file meant; give the .safetensors file",
}


def foreign(start: bytes, size: int, length: int) -> str:
    """What a file is that does not begin as safetensors do, from its first bytes."""
    if size == 0:
        return "is empty; was saving it interrupted? Take another copy"
    known = next((words for magic, words in MAGIC.items() if start.startswith(magic)), None)
    broken = f"is cut short or no safetensors file: it announces a header of {length:,} bytes and has {size:,}; take another copy"
    return known or broken


def check_format(source: str, metadata: Mapping[str, str], names: list[str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{source} was not saved by lora_lite: {resembles(metadata, names)} Its keys: {listed(names, 3)}")
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        by = shown(metadata.get("library_version", "unknown"))
        raise CheckpointError(
            f"{source} has format version {shown(str(version))} (written by lora_lite {by}); lora_lite {__version__} reads version "
            f"{FORMAT_VERSION}: update lora_lite, or save the adapter again with the version that made it"
        )


def resembles(metadata: Mapping[str, str], names: list[str]) -> str:
    """What a safetensors file of something else looks like, and what reads it."""
    any_key = lambda pattern: any(re.search(pattern, name) for name in names)  # noqa: E731
    if any_key(r"^base_model\.model\.|\.lora_[AB]\.(\w+\.)?weight$|\.lora_(embedding_[AB]|magnitude_vector)|\.ia3_l"):
        return "it looks like a PEFT adapter; ll.from_peft(model, folder) loads the folder it is in."
    if any_key(r"lora_(down|up)\.weight|^lora_(unet|te)"):
        return "it looks like a LoRA of kohya or diffusers; pipeline.load_lora_weights(file) of diffusers loads it."
    if any_key(r"^(A|B|U|S|Vh|delta_s)\..*__"):
        return "it looks like an adapter of lora-lite's predecessor; load it there, or train it again."
    if all(map(is_own, names)) and names:
        return "its keys are an adapter's, its header is not: perhaps a bare state_dict. docs/format.md says what the header must hold."
    if any_key(r"\.(weight|bias)$"):
        return (
            "it looks like a model's weights; AutoModelForCausalLM.from_pretrained(folder) loads those, adapter.save(path) writes adapters."
        )
    return f"the format in its header is {shown(repr(metadata.get('format')))}; give a file that adapter.save(path) wrote."


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
    values: dict[str, Any] = {"also": [], "fingerprint": None, "diagnostics": {}}
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


PARSERS: dict[str, Callable[[Any], Any]] = {
    "config": lambda value: config_from_dict(object_from(value)),
    "also": names_from,
    "fingerprint": object_from,
    "diagnostics": numbers_from,
}


def strict_json(text: str) -> Any:
    """JSON as its standard has it: no NaN, and no name twice in an object, which readers would take for different values."""
    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"repeated: {listed([k for k, times in Counter(k for k, _ in pairs).items() if times > 1])}")
    return found


def refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def by_target(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, v in flat.items():
        target, _, leaf = name.rpartition(".")
        tensors.setdefault(target, {})[leaf] = v
    return tensors


def key_problems(flat: Mapping[str, Tensor], also: Iterable[str]) -> list[str]:
    """What is wrong with the keys of a file, by kind."""
    beside = set(also)
    own = [name for name in flat if name not in beside]
    return [
        *problem("neither <layer>.lora_<field> nor listed in `also` (keys carry no adapter's name)", [n for n in own if not is_own(n)]),
        *problem("listed in `also` and not there", [n for n in beside if n not in flat]),
        *problem("with a name that safetensors keeps for itself", [n for n in flat if n == "__metadata__"]),
        *([] if own else ["it holds no adapter's tensors, <layer>.lora_<field>"]),
    ]


def is_own(name: str) -> bool:
    return FIELD.fullmatch(name.rpartition(".")[2]) is not None


# -- fitting a model ----------------------------------------------------------------------------------------------------


def strip_prefixes(name: str) -> str:
    """A module's or parameter's name without what wrappers add to it: `module.`, `base_model.model.`, and `_orig_mod.` anywhere."""
    parts = [part for part in name.split(".") if part not in INSIDE]
    while front := next((p for p in IN_FRONT if tuple(parts[: len(p)]) == p and len(parts) > len(p)), None):
        parts = parts[len(front) :]
    return ".".join(parts)


def match_names(found: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """A file's names -> a model's: the same where it has them, else the one that is equal without wrappers' prefixes.

    A name that fits none, or several, stays as it is.
    """
    wanted = list(wanted)
    exact, bare = set(wanted), {}
    for name in wanted:
        bare.setdefault(strip_prefixes(name), set()).add(name)

    def match(name: str) -> str:
        same = bare.get(strip_prefixes(name), set())
        return name if name in exact or len(same) != 1 else next(iter(same))

    return {name: match(name) for name in found}


def renamed(contents: Contents, targets: Iterable[str], parameters: Iterable[str] = ()) -> Contents:
    """The contents under the names a model has for its layers and parameters. Raises CheckpointError where two keys mean one."""
    layers, beside = match_names(contents.tensors, targets), match_names(contents.also, parameters)
    for names in (layers, beside):
        times = Counter(names.values())
        if twice := [f"{k} -> {v}" for k, v in names.items() if times[v] > 1]:
            raise CheckpointError(f"{contents.source}: several keys mean one, under a wrapper's prefix and without: {listed(twice)}")
    fingerprint = contents.fingerprint
    if fingerprint and isinstance(fingerprint.get("targets"), dict):
        fingerprint = {**fingerprint, "targets": {layers.get(t, t): v for t, v in fingerprint["targets"].items()}}
    return dataclasses.replace(
        contents,
        config=contents.config.renamed(layers),
        tensors={layers[t]: fields for t, fields in contents.tensors.items()},
        also={beside[n]: v for n, v in contents.also.items()},
        fingerprint=fingerprint,
    )


def check_tensors(contents: Contents, expected: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Raise one CheckpointError with every missing, unexpected and mis-shaped key, or return."""
    want = {(t, f): tuple(shape) for t, fields in expected.items() for f, shape in fields.items()}
    have = {(t, f): tuple(v.shape) for t, fields in contents.tensors.items() for f, v in fields.items()}
    problems = [
        *problem("missing", [".".join(k) for k in want if k not in have]),
        *problem("unexpected", [".".join(k) for k in have if k not in want]),
        *problem("of another shape", [f"{'.'.join(k)} {have[k]}, expected {want[k]}" for k in want if k in have and have[k] != want[k]]),
    ]
    if problems:
        raise CheckpointError(
            f"{contents.source} does not fit: {'; '.join(problems)}. Is this the model, and the config, the adapter was trained with?"
        )


# -- words --------------------------------------------------------------------------------------------------------------


def non_finite(flat: Mapping[str, Tensor]) -> list[str]:
    return [name for name, v in flat.items() if v.is_floating_point() and not bool(torch.isfinite(v.reshape(-1)).all())]


def is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def problem(what: str, which: Iterable[str]) -> list[str]:
    """ "3 keys missing: a, b, c", or nothing."""
    which = list(which)
    return [f"{len(which)} {'key' if len(which) == 1 else 'keys'} {what}: {listed(which)}"] if which else []


def listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more if names else "none"


def shown(text: str, most: int = 160) -> str:
    """Text from a file, short enough and safe for a message: a hostile one may hold megabytes, or control a terminal."""
    text = text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
    return text if text.isprintable() else ascii(text)


def brief(error: BaseException) -> str:
    return shown(f"{type(error).__name__}: {error}".replace("\n", " "), 300)
