"""How are adapters read that were saved by the systems this library grew from? Into the same Contents as a file of ours.

Three kinds of safetensors files are known, by their header:

    r, alpha, targets, layer_range        ModulatedLoRA: keys A.<layer> (r, d_in) and B.<layer> (d_out, r), "." written "__"
    the same and kind="pissa"             ModulatedPiSSA: U. S. Vh. delta_s.<layer>; W was the residual W - U S Vh there, and
                                          y = W_res x + U (S + c dS) Vh x  is  W x + c U dS Vh x  on the untouched base
    cfg (JSON)                            the variant guide's: keys <layer>.lora_A and <layer>.lora_B, of the method "lora"
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from lora_lite.checkpoint import (
    FORMAT,
    RESERVED,
    CheckpointError,
    Contents,
    Findings,
    as_path,
    brief,
    by_target,
    check_entries,
    check_place,
    listed,
    look,
    non_finite,
    object_from,
    problem,
    read_header,
    read_tensors,
    shown,
    strict_json,
)
from lora_lite.config import AdapterConfig
from lora_lite.variants.lora import LoRAConfig
from lora_lite.variants.pissa import PiSSAConfig
from lora_lite.variants.spectrum import SCORES

SAID = ("r", "alpha", "targets", "layer_range", "kind", "selection_score", "cfg")
FIELDS = {"A": "lora_A", "B": "lora_B"}
SPECTRUM = {"U": "lora_U", "Vh": "lora_Vh", "delta_s": "lora_dS", "S": "S"}


def look_any(path: str | os.PathLike[str]) -> Findings:
    """A file of ours by `checkpoint.look`, or one of the origin systems'. Raises what that raises."""
    check_place(as_path(path))
    with open(path, "rb") as file:
        head = read_header(str(path), file)
        metadata: dict[str, str] = head.pop("__metadata__", None) or {}
        reader = None if metadata.get("format") == FORMAT else reader_of(metadata, list(head))
        if reader is None:
            return look(path)
        check_entries(str(path), head)
        file.seek(0)
        flat = read_tensors(str(path), file, list(head))
    try:
        config, tensors = reader(metadata, {k: widened(v) for k, v in flat.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # anyone may have written the header
        raise CheckpointError(f"{path}: its header cannot be read: {brief(error)}") from error
    beside = {k: v for k, v in metadata.items() if k not in SAID and k not in RESERVED}
    said = object_from(strict_json(metadata["cfg"])) if reader is from_guide else metadata
    says_where = "targets" in said and not {"layer_range", "layers"}.isdisjoint(said)
    contents = Contents(config, tensors, metadata=beside, source=str(path), by=SYSTEMS[reader], says_where=says_where)
    return Findings(contents, problem("holding NaN or infinity", non_finite(flat)))


Reader = Callable[[Mapping[str, str], dict[str, Tensor]], tuple[AdapterConfig, dict[str, dict[str, Tensor]]]]


def reader_of(metadata: Mapping[str, str], keys: list[str]) -> Reader | None:
    fronts = {key.partition(".")[0] for key in keys}
    if "cfg" in metadata and all(".lora_" in f".{key}" for key in keys):
        return from_guide
    if metadata.get("kind") == "pissa" and fronts <= set(SPECTRUM):
        return from_pissa
    return from_lora if {"r", "alpha"} <= metadata.keys() and fronts == {"A", "B"} else None


def from_lora(metadata: Mapping[str, str], flat: dict[str, Tensor]) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]]]:
    return LoRAConfig(**placed(metadata)), grouped(flat, FIELDS)


def from_pissa(metadata: Mapping[str, str], flat: dict[str, Tensor]) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]]]:
    score: Any = metadata.get("selection_score", "s_only")
    if score not in SCORES:
        logger.info(
            "selection_score={} is none of {}; its directions are in the file, and it is read as s_only", shown(repr(score)), SCORES
        )
        score = "s_only"
    tensors = grouped(flat, SPECTRUM)
    for fields in tensors.values():
        fields.pop("S", None)  # the base's own singular values: what was taken out of W there and is still in it here
    return PiSSAConfig(train="spectrum", selection_score=score, **placed(metadata)), tensors


def from_guide(metadata: Mapping[str, str], flat: dict[str, Tensor]) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]]]:
    said = object_from(strict_json(metadata["cfg"]))
    variant = said.pop("variant", said.pop("name", "lora"))
    if variant != "lora":
        raise CheckpointError(
            f"it holds {shown(repr(variant))} of the variant guide, whose tensors mean something else here; 'lora' can be read"
        )
    said.pop("dtype", None)
    return LoRAConfig.from_dict(said), by_target(flat)


SYSTEMS: dict[Reader, str] = {from_lora: "ModulatedLoRA", from_pissa: "ModulatedPiSSA", from_guide: "the variant guide's runtime"}


def placed(metadata: Mapping[str, str]) -> dict[str, Any]:
    """r, alpha and where, as that header writes them: targets joined by commas, layer_range "lo,hi"."""
    words = tuple(t.strip() for t in metadata.get("targets", "all-linear").split(",") if t.strip())
    lo, hi = (float(v) for v in metadata.get("layer_range", "0,1").split(","))
    return {
        "r": int(metadata["r"]),
        "alpha": float(metadata["alpha"]) if "alpha" in metadata else 32.0,
        "targets": words,
        "layer_range": (lo, hi),
    }


def grouped(flat: Mapping[str, Tensor], fields: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """{target: {field: tensor}} of keys "A.model__layers__0__self_attn__q_proj"."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, v in flat.items():
        front, _, name = key.partition(".")
        tensors.setdefault(name.replace("__", "."), {})[fields[front]] = v
    if incomplete := [t for t, found in tensors.items() if len(found) < len(fields)]:
        raise CheckpointError(f"it lacks tensors of {listed(incomplete)}; each layer has {listed(sorted(fields))}")
    return tensors


def widened(v: Tensor) -> Tensor:
    return v.to(torch.promote_types(v.dtype, torch.float32)) if v.is_floating_point() else v
