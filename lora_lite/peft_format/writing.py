"""How does an adapter become a PEFT folder: as the same method at some c, or as one plain LoRA?"""

from __future__ import annotations

import functools
import operator
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import torch
from loguru import logger
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.attachment import tied_names
from lora_lite.base import transposed
from lora_lite.checkpoint import CheckpointError, listed, strip_prefixes
from lora_lite.dial import check_float
from lora_lite.peft_format.folder import FRONT, SHARED_FRONT, Folder, write_folder
from lora_lite.peft_format.methods import LORA_SAYS, METHODS, Method
from lora_lite.peft_format.numbers import At, Said, common_dtype
from lora_lite.peft_format.plain import errors, plain_updates

Tensors = dict[str, Tensor]


class Written(NamedTuple):
    """What goes into a folder, but for what every folder says: tensors by key, config, and the relative error by layer."""

    tensors: Tensors
    config: dict[str, Any]
    lost: dict[str, float]


def to_peft(
    adapter: Adapter | Sequence[Adapter],
    folder: str | os.PathLike[str],
    c: float = 1.0,
    *,
    as_lora: bool = False,
    approximate: bool = False,
    r: SupportsIndex | None = None,
) -> dict[str, float]:
    """Write a folder that PEFT loads, doing at its full strength what the adapter does at c. `ll.to_peft(adapter, "folder")`.

    adapter      or the two halves of one IA3 folder, [ia3, ia3_ff]
    as_lora      one plain LoRA with scale and c folded into B, one rank for all layers, alpha = r: what vLLM and others load
    approximate  where nothing is exact, or r is too low, the nearest plain LoRA (a truncated SVD), instead of an error
    r            the rank of a plain LoRA; by default the one that is exact, or for an approximation the config's own

    Returns the relative error by layer: 0.0 where the folder is exact. What PEFT has no words for but a plain LoRA does exactly
    (PiSSA's differences, HRA at c = 0.5) is written as that. A folder that exists keeps its other files. Raises ValueError naming
    what the method cannot say, RuntimeError where the base weight is needed and the adapter is not attached.
    """
    several, dose, r = given(adapter), checked(c), None if r is None else checked_rank(r)
    check_halves(several, as_lora)
    reasons = {a: unsayable(a, dose) for a in several}
    if r is not None and not as_lora and not all(reasons.values()):
        raise ValueError(f"r={r} is the rank of a plain LoRA: say as_lora=True; as the method itself an adapter keeps its own")
    written = {a: plain(a, dose, approximate, r, why) if as_lora or why else native(a, dose) for a, why in reasons.items()}
    content = functools.reduce(joined, [whole(a, w) for a, w in written.items()])
    check_endings(content.config)
    content.config["target_modules"] = meaning_only(content.config["target_modules"], several[0].model)
    write_folder(folder, content)
    for a, w in written.items():
        if (why := reasons[a]) and not as_lora:
            logger.info("{!r} is written as a plain LoRA: {}", a.name, why)
        report(a, w.lost, as_lora or why is not None)
    return {t: error for w in written.values() for t, error in w.lost.items()}


def method_of(adapter: Adapter) -> Method | None:
    return next((m for m in METHODS if m.variant == adapter.variant.name and m.writes), None)


def check_halves(adapters: Sequence[Adapter], as_lora: bool) -> None:
    kinds = sorted(a.variant.name for a in adapters)
    if len(kinds) != 1 and (kinds != ["ia3", "ia3_ff"] or as_lora):
        raise ValueError(f"one folder holds one adapter, or IA3's two halves, 'ia3' and 'ia3_ff', as IA3; got {kinds}, as_lora={as_lora}")
    if both := {t for a in adapters[1:] for t in a.targets} & set(adapters[0].targets):
        raise ValueError(f"PEFT's IA3 gates a layer's output or its input; {listed(sorted(both))} have both")


def whole(adapter: Adapter, written: Written) -> Folder:
    """Everything that a folder says of one adapter."""
    beside = saved_beside(adapter)
    if len({strip_prefixes(t) for t in adapter.targets}) < len(adapter.targets):
        raise CheckpointError("not saved: two of its layers have one name without their wrappers' prefixes")
    config = {**written.config, "modules_to_save": sorted({n.rpartition(".")[0] for n in beside}), **about(adapter, written.config)}
    tensors = written.tensors | {f"{FRONT}{n}": v for n, v in beside.items()}
    config["modules_to_save"] = config["modules_to_save"] or None
    return Folder(config, tensors, adapter.metadata, adapter.fingerprint, common_dtype(adapter.tensors()))


def joined(one: Folder, other: Folder) -> Folder:
    """Two halves of the same base."""
    lists = {
        k: sorted({*(one.config[k] or ()), *(other.config[k] or ())}) for k in ("target_modules", "feedforward_modules", "modules_to_save")
    }
    config = {**other.config, **one.config, **lists, "modules_to_save": lists["modules_to_save"] or None}
    prints = [f.fingerprint for f in (one, other) if f.fingerprint is not None]
    layers = {t: v for f in prints for t, v in f["targets"].items()}
    fingerprint = {**prints[0], "targets": layers} if len(prints) == 2 else None
    dtypes = [f.dtype for f in (one, other) if f.dtype is not None]
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else None
    return Folder(config, one.tensors | other.tensors, {**other.metadata, **one.metadata}, fingerprint, dtype)


def check_endings(config: Mapping[str, Any]) -> None:
    """PEFT takes a layer for feed-forward by the end of its name, without a dot in front: "proj" takes "k_proj" too."""
    inputs = config.get("feedforward_modules") or []
    if taken := [t for t in config["target_modules"] if t not in inputs and t.endswith(tuple(inputs))]:
        raise ValueError(f"PEFT would gate the inputs of {listed(taken)} too, whose names end as one of {listed(inputs)} does")


def meaning_only(names: list[str], model: nn.Module | None) -> list[str] | str:
    """The names; or a regex where PEFT, which lets a name end a longer one, would take more modules of the model for meant."""
    own = set(names)
    others = [n for n in map(strip_prefixes, dict(model.named_modules() if model is not None else ())) if n not in own]
    return "|".join(map(re.escape, names)) if any(end in own for n in others for end in endings(n)) else names


def endings(name: str) -> list[str]:
    """Each end of a module path from a dot on: "a.b.c" -> ["b.c", "c"]."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def given(adapter: Any) -> list[Adapter]:
    """Raises TypeError for what is no adapter, or holds something else."""
    several: list[Any] = list(adapter) if isinstance(adapter, Sequence) and not isinstance(adapter, str) else [adapter]
    if wrong := [a for a in several if not isinstance(a, Adapter)]:
        on_it = "; the adapters on a model are in ll.adapters(model)" if isinstance(wrong[0], nn.Module) else ""
        raise TypeError(f"to_peft(adapter, folder) writes an Adapter, got {type(wrong[0]).__name__}{on_it}")
    return several


def checked_rank(r: SupportsIndex) -> int:
    """Raises ValueError for what is no positive whole number; numpy's are as good."""
    if isinstance(r, bool) or not hasattr(r, "__index__") or operator.index(r) < 1:
        raise ValueError(f"r must be a positive whole number, got {r!r}")
    return operator.index(r)


def checked(c: Any) -> float:
    """Raises TypeError or ValueError for what is no finite number."""
    if isinstance(c, Tensor) and c.numel() != 1:
        raise TypeError(f"a file holds one c; got one per row, shape {tuple(c.shape)}")
    return check_float(c)


def native(adapter: Adapter, c: float) -> Written:
    """The same method in PEFT's words. At c = 1 tensors that PEFT keeps as we do go over bit for bit."""
    method, ats = method_of(adapter), places_of(adapter)
    assert method is not None  # or it would be unsayable
    held = {t: {field: p.detach() for field, p in fields.items()} for t, fields in adapter.tensors().items()}
    held, whole = in_common(method, held)
    tensors: Tensors = {f"{SHARED_FRONT}{end}": whole[field] for field, end in method.shared.items()}
    said: Said = {}
    for t, at in ats.items():
        p = held[t] if c == 1.0 or method.turn is None else method.turn(held[t], at, c)
        p, told = method.drop(method.write(p, at), at)
        for name, part in told.items():
            said.setdefault(name, {}).update(part)
        tensors |= {f"{FRONT}{strip_prefixes(t)}.{end}": p[field] for field, end in method.keys.items()}
    own = method.said(adapter.config.renamed({t: strip_prefixes(t) for t in ats}), ats)
    config = {o.theirs: o.write(getattr(own, o.ours)) for o in method.options}
    if method.peft_type == "IA3":
        config["feedforward_modules"] = [strip_prefixes(t) for t, at in ats.items() if at.cfg.feedforward]
    return Written(tensors, {"peft_type": method.peft_type, **method.says, **method.when, **config, **said}, dict.fromkeys(ats, 0.0))


def places_of(adapter: Adapter) -> dict[str, At]:
    return {t: At(adapter.config.at(t, *size), *size, bare_layer(adapter, t), t) for t, size in adapter.sizes.items()}


def unsayable(adapter: Adapter, c: float) -> str | None:
    """What PEFT has no words for: the method, this config of it, this c, these layers. None where it has."""
    method, config = method_of(adapter), adapter.config
    if method is None:
        return f"PEFT has nothing that is exactly {adapter.variant.name!r}"
    if c != 1.0 and method.turn is None:
        return f"{method.peft_type} cannot say c={c}"
    if wrong := [k for k, v in method.fixed.items() if getattr(config, k) != v]:
        return f"{method.peft_type} cannot say {wrong[0]}={getattr(config, wrong[0])!r}"
    ats = places_of(adapter)
    if reason := method.unsaid(config, ats):
        return f"{method.peft_type} cannot say {reason}"
    if flat := [t for t, at in ats.items() if at.layer is not None and transposed(at.layer) and "fan_in_fan_out" not in method.says]:
        return f"{method.peft_type} has no Conv1D, which {listed(flat)} are"
    for name in method.alike:
        if odd := [t for t, at in ats.items() if getattr(at.cfg, name) != getattr(config, name)]:
            return (
                f"{method.peft_type} has one {name} for all layers, {getattr(config, name)} here, and {odd[0]} has "
                f"{getattr(ats[odd[0]].cfg, name)}"
            )
    return None


def in_common(method: Method, held: dict[str, Tensors]) -> tuple[dict[str, Tensors], Tensors]:
    """Matrices that serve all layers, the largest of each kind, and the layers' tensors with what their own differs by."""
    whole: Tensors = {}
    for field in method.shared:
        whole[field] = largest = max((p[field] for p in held.values()), key=Tensor.numel)
        held = {t: absorbed(t, p, field, method.absorbs[field], largest) for t, p in held.items()}
    return held, whole


def absorbed(target: str, p: Tensors, field: str, into: str, largest: Tensor) -> Tensors:
    own, corner = p[field], largest[tuple(slice(n) for n in p[field].shape)]
    if torch.equal(own, corner):
        return p
    factor = float((own.double() * corner).sum() / corner.double().square().sum())
    if not torch.allclose(own.double(), factor * corner.double(), rtol=1e-4, atol=1e-6 * float(own.abs().max())):
        raise ValueError(f"{target}: its {field} is no corner of the other layers'; as_lora=True writes each layer's own")
    return {**p, into: (p[into].double() * factor).to(p[into].dtype)}


def bare_layer(adapter: Adapter, target: str) -> Any:
    """The layer, where its own weight is on it."""
    return None if adapter.model is None or adapter.is_merged else adapter.model.get_submodule(target)


def plain(adapter: Adapter, c: float, approximate: bool, r: int | None, why: str | None) -> Written:
    updates = plain_updates(adapter, c, approximate, r, why)
    tensors: Tensors = {}
    for t, update in updates.items():
        name = f"{FRONT}{strip_prefixes(t)}"
        tensors |= {f"{name}.lora_A.weight": update.A, f"{name}.lora_B.weight": update.B}
    rank = next(iter(updates.values())).A.shape[0]
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {},
        "use_rslora": False, "use_dora": False, **LORA_SAYS,
    }  # fmt: skip
    return Written(tensors, config, errors(updates))


def about(adapter: Adapter, config: Mapping[str, Any]) -> dict[str, Any]:
    """What every config says: where, on which base, and how its weights lie."""
    model = adapter.model
    flipped = model is not None and any(transposed(model.get_submodule(t)) for t in adapter.targets)
    return {
        **({"fan_in_fan_out": flipped} if "fan_in_fan_out" in config else {}),
        "target_modules": [strip_prefixes(t) for t in adapter.targets],
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "task_type": None,
    }


def saved_beside(adapter: Adapter) -> Tensors:
    """What `train_also` trained. PEFT saves modules, and cannot save one that carries an adapter."""
    check_untied(adapter)
    targets, also = {strip_prefixes(t) for t in adapter.targets}, [strip_prefixes(n) for n in adapter.also()]
    if bad := [n for n in also if (module := n.rpartition(".")[0]) == "" or any(f"{t}.".startswith(f"{module}.") for t in targets)]:
        raise CheckpointError(
            f"not saved: modules_to_save cannot hold {listed(bad)}, which lie on or above adapted layers, or on the model itself"
        )
    return {strip_prefixes(n): p.detach() for n, p in whole_modules(adapter).items()}


def whole_modules(adapter: Adapter) -> Tensors:
    """Every parameter of the modules that have one in `train_also`: PEFT saves and loads modules, and fails where one lacks a part."""
    found: Tensors = {}
    for name in {n.rpartition(".")[0]: None for n in adapter.also()}:
        assert adapter.model is not None  # check_untied has refused
        module = adapter.model.get_submodule(name)
        found |= {f"{name}.{n}": p for n, p in module.named_parameters()}
        if buffers := set(module.state_dict()) - {n for n, _ in module.named_parameters()}:
            raise CheckpointError(f"not saved: {name} has buffers, {listed(sorted(buffers))}, and modules_to_save holds parameters here")
    return found | adapter.also()


def check_untied(adapter: Adapter) -> None:
    """PEFT copies the modules it saves, so that a tied one is no longer tied: there another model (logits off by 1.8, measured)."""
    also = adapter.also()
    if also and adapter.model is None:
        raise RuntimeError(
            f"adapter {adapter.name!r} trains {listed(also)} beside its own tensors: whether these are tied to other parameters, which "
            "PEFT's folders cannot say, only the model tells: attach the adapter first"
        )
    tied = {} if adapter.model is None else tied_names(adapter.model)
    if both := [f"{n} (to {next(m for m in tied[n] if m != n)})" for n in also if n in tied]:
        raise CheckpointError(
            f"not saved: it trains parameters that are tied to others, {listed(both)}, and PEFT unties what modules_to_save holds; keep "
            "it by adapter.save(path), or untie them before training (tie_word_embeddings=False)"
        )


def report(adapter: Adapter, lost: Mapping[str, float], as_lora: bool) -> None:
    if as_lora and adapter.also():
        logger.warning("{!r} trains {} beside its layers; servers such as vLLM refuse modules_to_save", adapter.name, list(adapter.also()))
    inexact = {t: error for t, error in lost.items() if error}
    for t, error in inexact.items():
        logger.info("{}: {} as a plain LoRA, relative error {:.3g}", t, adapter.variant.name, error)
    if inexact:
        worst = max(inexact, key=inexact.__getitem__)
        logger.warning(
            "{!r} written approximately: {} layers, worst {} with relative error {:.3g}", adapter.name, len(inexact), worst, inexact[worst]
        )
