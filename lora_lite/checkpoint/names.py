"""Which of a model's names does a name in a file mean, and do the shapes fit?"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from lora_lite.checkpoint.contents import CheckpointError, Contents, absent_keys, joined, listed_targets
from lora_lite.checkpoint.words import listed, problem

INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # put anywhere in a name by wrappers
IN_FRONT = (("module",), ("base_model", "model"))
IS_IT = "Is this the model, and the config, the adapter was trained with?"


@lru_cache(maxsize=4096)  # a thousand adapters of one base have the same names
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
    targets = list(targets)
    layers, beside = match_names(contents.tensors, targets), match_names(contents.also, parameters)
    for names in (layers, beside):
        times = Counter(names.values())
        if twice := [f"{k} -> {v}" for k, v in names.items() if times[v] > 1]:
            raise CheckpointError(f"{contents.source}: several keys mean one, under a wrapper's prefix and without: {listed(twice)}")
    return dataclasses.replace(
        contents,
        config=contents.config.renamed(layers),
        tensors={layers[t]: fields for t, fields in contents.tensors.items()},
        also={beside[n]: v for n, v in contents.also.items()},
        fingerprint=renamed_fingerprint(contents.fingerprint, match_names(listed_targets(contents.fingerprint), targets) | layers),
    )


def renamed_fingerprint(fingerprint: dict[str, Any] | None, layers: Mapping[str, str]) -> dict[str, Any] | None:
    """The fingerprint of layers under other names."""
    known = listed_targets(fingerprint)
    return {**fingerprint, "targets": {layers.get(t, t): v for t, v in known.items()}} if fingerprint and known else fingerprint


Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # by layer and field


def misfits(contents: Contents, expected: Shapes, also: Mapping[str, tuple[int, ...]] | None = None) -> list[str]:
    """Every key that is missing, unexpected, of another shape or without floats, by kind; and those of `also`, where it is given."""
    want = {joined(t, f): tuple(shape) for t, fields in expected.items() for f, shape in fields.items()} | dict(also or {})
    have = {k: v for k, v in contents.named() if also is not None or k not in contents.also}
    both = {k: v for k, v in have.items() if k in want}
    return [
        *problem("missing", dict.fromkeys([k for k in [*want, *absent_keys(contents)] if k not in have])),
        *problem("unexpected", [k for k in have if k not in want]),
        *problem("of another shape", [f"{k} {tuple(v.shape)}, expected {want[k]}" for k, v in both.items() if tuple(v.shape) != want[k]]),
        *problem(
            "whose values are no floats", [f"{k} ({v.dtype})" for k, v in (both | contents.also).items() if not v.is_floating_point()]
        ),
    ]


def check_tensors(contents: Contents, expected: Shapes) -> None:
    """Raise one CheckpointError with every misfit, or return."""
    if problems := misfits(contents, expected):
        raise CheckpointError(f"{contents.source} does not fit: {'; '.join(problems)}. {IS_IT}")
