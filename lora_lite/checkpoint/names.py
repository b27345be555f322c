"""Which of a model's names does a name in a file mean, and do the shapes fit?"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache

from lora_lite.checkpoint.contents import CheckpointError, Contents
from lora_lite.checkpoint.words import listed, problem

INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # put anywhere in a name by wrappers
IN_FRONT = (("module",), ("base_model", "model"))


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
