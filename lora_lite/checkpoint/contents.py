"""What does an adapter's file hold? A value that knows no file and no model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_lite.checkpoint.words import problem
from lora_lite.config import AdapterConfig

FORMAT, FORMAT_VERSION = "lora_lite", "1"
RESERVED = (
    "format", "format_version", "library_version", "config", "also", "fingerprint", "diagnostics", "calibrated", "shared", "sha256",
)  # fmt: skip
FIELD = re.compile(r"lora_(?!.*__)\w+")


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
    calibrated: dict[str, Any] = field(default_factory=dict)  # how far c can go, as steering found it
    source: str = "the file"  # where it was read from, for messages
    by: str = ""  # what wrote it, such as "lora_lite 0.1.0"
    says_where: bool = False  # its layers are all those that its config finds on its base: an origin's header says so, ours does not

    def named(self) -> list[tuple[str, Tensor]]:
        """Every tensor under its key in the file. A target without a name is the model itself."""
        own = [(joined(t, f), v) for t, fields in self.tensors.items() for f, v in fields.items()]
        return own + list(self.also.items())


def by_target(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, v in flat.items():
        target, leaf = split(name)
        tensors.setdefault(target, {})[leaf] = v
    return tensors


def split(key: str) -> tuple[str, str]:
    """(layer, field) of a key; the model itself has no name."""
    layer, _, leaf = key.rpartition(".")
    return layer, leaf


def joined(layer: str, leaf: str) -> str:
    return f"{layer}.{leaf}" if layer else leaf


def absent_keys(contents: Contents) -> list[str]:
    """The keys of layers that the fingerprint lists, the targets, of which nothing is there: the fields are those that others have."""
    fields = next(iter(contents.tensors.values()), {})
    absent = [t for t in listed_targets(contents.fingerprint) if t not in contents.tensors]
    return [joined(t, f) for t in absent for f in fields]


def listed_targets(fingerprint: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a fingerprint says by layer; nothing where it is none, or none that can be read."""
    targets = (fingerprint or {}).get("targets")
    return targets if isinstance(targets, dict) else {}


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
