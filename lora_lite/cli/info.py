"""What is in a checkpoint, without a model? A file of ours, one of the predecessors', or a PEFT folder: `lora-lite info FILE`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lite.checkpoint import CheckpointError, shown, strip_prefixes
from lora_lite.config import AdapterConfig
from lora_lite.fitting import UNMISTAKABLE, for_showing
from lora_lite.peft_format.folder import CONFIG, Folder, key_pattern, read_folder
from lora_lite.peft_format.methods import method_candidates
from lora_lite.peft_format.reading import known_methods
from lora_lite.variant import variant_of

MOST = 12  # kinds of layers shown


def info(path: Path) -> dict[str, Any]:
    """Everything that a checkpoint says of itself, as JSON holds it. Raises CheckpointError or OSError for what is none."""
    return of_folder(read_folder(path)) if (path / CONFIG).is_file() else of_file(path)


def of_file(path: Path) -> dict[str, Any]:
    contents, sizes = for_showing(path)
    config = contents.config
    layers = {t: layer(p, sizes[t], trained(config, t, sizes[t] or UNMISTAKABLE)) for t, p in contents.tensors.items()}
    return {
        "file": str(path), "written_by": contents.by, "variant": config.variant, "config": config.to_dict(),
        "chosen": sorted(config.chosen()),
        **counted(layers, contents.also), "fingerprint": contents.fingerprint, "metadata": contents.metadata,
        "diagnostics": {k: v if math.isfinite(v) else repr(v) for k, v in contents.diagnostics.items()},
        "calibrated": contents.calibrated,
    }  # fmt: skip


def trained(config: AdapterConfig, target: str, size: tuple[int, int]) -> set[str]:
    """The fields that train: the same at every size that the config has room for."""
    specs = variant_of(config).param_specs(*size, config.at(target, *size))
    return {f for f, spec in specs.items() if spec.trainable}


def of_folder(found: Folder) -> dict[str, Any]:
    """A PEFT folder: which methods here it is, and under `layers` PEFT's own tensors; `why_not` says what `ll.from_peft` would."""
    candidates = method_candidates(found.config)
    patterns = [key_pattern(end) for m in candidates for end in m.keys.values()]
    tensors: dict[str, dict[str, Tensor]] = {}
    beside: dict[str, Tensor] = {}
    for key, v in found.tensors.items():
        match = next((m for p in patterns if (m := p.fullmatch(key))), None)
        if match is None:
            beside[key] = v
        else:
            target = match["target"]
            tensors.setdefault(strip_prefixes(target), {})[key.removeprefix(f"{target}.")] = v
    layers = {t: layer(p, None, set(p)) for t, p in tensors.items()}
    return {
        "file": found.source, "written_by": found.by, "peft_type": found.config.get("peft_type"),
        "variant": sorted({m.variant for m in candidates}), "why_not": refusal(found), "config": found.config,
        **counted(layers, beside), "fingerprint": found.fingerprint, "metadata": found.metadata, "diagnostics": {},
    }  # fmt: skip


def refusal(found: Folder) -> str | None:
    try:
        known_methods(found)
    except CheckpointError as error:
        return str(error)
    return None


def layer(p: Mapping[str, Tensor], size: tuple[int, int] | None, trains: set[str]) -> dict[str, Any]:
    d_in, d_out = size or (None, None)
    return {"d_in": d_in, "d_out": d_out, "tensors": {f: {**tensor(v), "trained": f in trains} for f, v in p.items()}}


def tensor(v: Tensor) -> dict[str, Any]:
    return {"shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch."), "bytes": v.nbytes}


def counted(layers: Mapping[str, dict[str, Any]], also: Mapping[str, Tensor]) -> dict[str, Any]:
    beside = {name: {**tensor(v), "trained": True} for name, v in also.items()}
    every = [t for x in layers.values() for t in x["tensors"].values()] + list(beside.values())
    return {
        "layers": dict(layers),
        "also": beside,
        "numbers": sum(math.prod(t["shape"]) for t in every),
        "trained": sum(math.prod(t["shape"]) for t in every if t["trained"]),
        "bytes": sum(t["bytes"] for t in every),
    }


# -- as text --------------------------------------------------------------------------------------------------------------


def readable(s: Mapping[str, Any]) -> str:
    kind = f"{s['peft_type']} of PEFT, here {' or '.join(s['variant']) or 'unknown'}" if "peft_type" in s else s["variant"]
    rows = [("variant", kind), ("written by", s["written_by"]), ("config", settings(s)), ("base", base(s["fingerprint"]))]
    rows += [("holds", f"{s['numbers']:,} numbers on {len(s['layers'])} layers, {s['trained']:,} of them trained; {s['bytes']:,} bytes")]
    rows += [("layers", line) for line in layer_lines(s["layers"])]
    rows += [("beside", f"{name} {shape(t)}") for name, t in s["also"].items()]
    rows += [("metadata", f"{k}: {v}") for k, v in s["metadata"].items()]
    rows += [("c can go", f"from {s['calibrated'].get('negative')} to {s['calibrated'].get('positive')}")] if s.get("calibrated") else []
    rows += [("diagnostics", f"{k}: {v}") for k, v in s["diagnostics"].items()]
    rows += [("refused", s["why_not"])] if s.get("why_not") else []
    lines, last = [shown(s["file"])], ""
    for name, text in rows:
        lines.append(f"  {name if name != last else '':<12} {shown(text, 400)}")
        last = name
    return "\n".join(lines)


def settings(s: Mapping[str, Any]) -> str:
    """What the config says other than its variant's defaults; of PEFT's everything that is not off."""
    if "peft_type" in s:
        return ", ".join(f"{k}={v!r}" for k, v in sorted(s["config"].items()) if v not in (None, False, [], {}, "") and k != "peft_type")
    return ", ".join(f"{k}={s['config'][k]!r}" for k in s["chosen"]) or "its variant's defaults"


def base(fingerprint: Mapping[str, Any] | None) -> str:
    if fingerprint is None:
        return "no fingerprint: that a model is the one it was trained on cannot be checked"
    return f"{fingerprint.get('architecture')}, known by a fingerprint"


def layer_lines(layers: Mapping[str, dict[str, Any]]) -> list[str]:
    """Layers that differ in numbers of their names only, together: "model.layers.*.self_attn.q_proj (14)  64 -> 64  lora_A (8, 64)"."""
    alike: dict[tuple[str, str], int] = {}
    for name, x in layers.items():
        sizes = f"{x['d_in']} -> {x['d_out']}  " if x["d_in"] else ""
        key = re.sub(r"\d+", "*", name), sizes + ", ".join(f"{f} {shape(t)}" for f, t in x["tensors"].items())
        alike[key] = alike.get(key, 0) + 1
    lines = [f"{name or 'the model itself'}{f' ({n})' if n > 1 else ''}  {rest}" for (name, rest), n in alike.items()]
    return lines[:MOST] + ([f"and {len(lines) - MOST} more kinds; --json has all"] if len(lines) > MOST else [])


def shape(t: Mapping[str, Any]) -> str:
    return f"({', '.join(map(str, t['shape']))}){'' if t['dtype'] == 'float32' else ' ' + t['dtype']}"
