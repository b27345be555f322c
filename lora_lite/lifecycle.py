"""How does an adapter come onto a model: fresh, back again, from a file (or only out of it), or found there?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn import Parameter

from lora_lite import fitting
from lora_lite.adapter import Adapter, CValue, Path, check_name, handle_of
from lora_lite.attachment import Shared, all_hooks, beside, check_layers, fresh_parameter, inner, tied_names, unwrapped
from lora_lite.base import fingerprint
from lora_lite.config import AdapterConfig, as_patterns, found_in
from lora_lite.dial import Coefficient, Setting
from lora_lite.hooks import Hook
from lora_lite.initialise import Start, Tensors, check_calibration, start
from lora_lite.target import Target, find_targets
from lora_lite.variant import ParamSpec, Variant, variant_of


@runtime_checkable
class Bases(Protocol):
    """What a SharedSubspace, which stands above this room, does for `attach`."""

    def starting(self, config: AdapterConfig, sizes: Mapping[str, tuple[int, int]], seed: int | None) -> tuple[AdapterConfig, Tensors]:
        """The config with what it needs of the bases, and every tensor by target, for those of the layers that it has."""
        ...

    def base_of(self, targets: Sequence[str]) -> dict[str, Any] | None:
        """The fingerprint of the base it was made on, as far as it knows these layers."""
        ...


def attach(
    model: nn.Module,
    config: AdapterConfig | Adapter,
    calibration_data: Any = None,
    name: str | None = None,
    c: Coefficient | None = None,
    train_also: Sequence[str] | str = (),
    seed: int | None = None,
    exclude_directions: Sequence[Adapter] = (),
    loss: Callable[[Any, Any], Tensor] | None = None,
    shared: Bases | None = None,
) -> Adapter:
    """Put a fresh adapter, or a detached one, on a model. `adapter = ll.attach(model, ll.LoRAConfig(r=16))`.

    model             unmodified; its parameters are frozen (the flags come back with the last detach), its weights never written
    config            a variant's config, or a detached Adapter to put back
    calibration_data  target -> activations (N, d_in), or -> {"cho": ..., "rej": ...}; batches; or {"cho": batches, "rej": batches}
    name              an identifier; several adapters live on one model under different names
    c                 the resting coefficient, 1.0 unless told
    train_also        regexes of other parameters to train and save with it (a fresh head, norms); originals return at detach
    seed              of the initial values; without one the global random state is used
    exclude_directions  low-rank adapters whose input directions the new one leaves out (variants that choose directions). A singular
                        direction is in use where the rows of their A span half of its squared length: always PiSSA's own, a
                        LoRA's only where training turned its random A there; where none is, a warning says so
    loss              (model's output, batch) -> scalar, for variants that read gradients; else the output's own `loss`
    shared            the SharedSubspace on whose bases a SharedConfig trains

    All or nothing: on any error the model is as it was. Raises RuntimeError where nothing matches or a layer cannot carry
    an adapter, ValueError for a name in use, calibration data that is missing or does not fit, or bases of other layers.
    """
    model = unwrapped(model)
    if isinstance(config, Adapter):
        asked = {
            "calibration_data": calibration_data is not None, "train_also": bool(train_also), "seed": seed is not None,
            "exclude_directions": bool(exclude_directions), "loss": loss is not None, "shared": shared is not None,
        }  # fmt: skip
        if any(asked.values()):
            unused = ", ".join(name for name, given in asked.items() if given)
            raise ValueError(f"a made adapter is put back as it is; for a fresh one only: {unused}")
        return config.put_on(model, name, c)
    _check_kinds(seed, shared)
    variant = variant_of(config)
    name = check_name("default" if name is None else name)
    targets = find_targets(model, config)
    given = None
    if shared is not None or variant.needs_shared:
        check_calibration(config, variant, calibration_data, loss)
        config, given = _on_bases(config, variant, targets, shared, seed)
    targets = [t for t in targets if given is None or t.name in given]
    specs = {t.name: variant.param_specs(t.d_in, t.d_out, config.at(t.name, t.d_in, t.d_out)) for t in targets}
    check_layers(model, name, targets, variant, specs)
    also = _also(model, train_also)
    _refuse_both(model, config, targets, also)
    if exclude_directions and not variant.chooses_directions:
        raise ValueError(f"variant {config.variant!r} chooses no directions; leave exclude_directions out")
    exclude = _directions(exclude_directions)
    rest = Setting(1.0 if c is None else c).c  # a bad c fails before anything is computed
    base = fingerprint(model, {t.name: t.module for t in targets})
    if shared is not None and (known := shared.base_of([t.name for t in targets])) is not None:
        fitting.check_base("the subspace", known, base, True, "a subspace serves the base its adapters were trained on")
    fresh = Start(config, given, {}) if given is not None else start(model, config, targets, calibration_data, seed, exclude, loss)
    _warn_of_ranks(fresh.config, targets)
    adapter = Adapter(
        fresh.config,
        placed(targets, fresh),
        {t.name: (t.d_in, t.d_out) for t in targets},
        name=name,
        also=also,
        fingerprint=base,
        diagnostics=fresh.notes,
        c=rest,
    )
    return adapter.put_on(model, known_base=True)


def _check_kinds(seed: Any, shared: Any) -> None:
    """Of what torch, or a subspace's methods, would refuse without naming it."""
    if not (seed is None or isinstance(seed, Integral)):
        raise TypeError(f"seed must be a whole number, got {type(seed).__name__}: {seed!r}")
    if not (shared is None or isinstance(shared, Bases)):
        raise TypeError(f"shared must be a SharedSubspace, got {type(shared).__name__}: {shared!r}; ll.SharedSubspace.load(path) reads one")


def _warn_of_ranks(config: AdapterConfig, targets: Sequence[Target]) -> None:
    """Once, of layers with a trained A and B of more ranks than the smaller side of the layer, which no update of it can have."""
    ranks = {t.name: _trained_rank(variant_of(config).param_specs(*t.shape, config.at(t.name, *t.shape)), t) for t in targets}
    if wide := [t for t in targets if ranks[t.name] > min(t.shape)]:
        least = min(wide, key=lambda t: min(t.shape))
        logger.warning(
            "{} trains r={} on {} ({} -> {}), whose weight has rank {} at most ({} of {} targets are such): what is beyond costs, and adds "
            "no rank; lower r, or give these layers a smaller one in rank_pattern",
            type(config).__name__, ranks[least.name], least.name, *least.shape, min(least.shape), len(wide), len(targets),
        )  # fmt: skip


def _trained_rank(specs: Mapping[str, ParamSpec], t: Target) -> int:
    """r of a trained pair A (r, d_in) and B (d_out, r); 0 where there is none."""
    A, B = specs.get("lora_A"), specs.get("lora_B")
    pair = A is not None and B is not None and A.trainable and B.trainable and (A.shape[1:], B.shape[:1]) == ((t.d_in,), (t.d_out,))
    return A.shape[0] if A is not None and pair else 0


def _on_bases(
    config: AdapterConfig, variant: type[Variant], targets: Sequence[Target], shared: Bases | None, seed: int | None
) -> tuple[AdapterConfig, Tensors]:
    if shared is None:
        raise ValueError(
            f"{type(config).__name__} trains on the bases of a subspace: ll.attach(model, {type(config).__name__}(...), shared=sub), with "
            "sub = ll.SharedSubspace.from_adapters([...]) or .load(path)"
        )
    if not variant.needs_shared:
        raise ValueError(f"variant {config.variant!r} has no use for shared=; ll.SharedConfig(train=...) trains on shared bases")
    return shared.starting(config, {t.name: (t.d_in, t.d_out) for t in targets}, seed)


def placed(targets: Sequence[Target], fresh: Start) -> dict[str, dict[str, Parameter]]:
    """The initial values as Parameters, each on its target's device; one Parameter per device for a tensor that several share."""
    made: dict[tuple[int, torch.device], Parameter] = {}
    variant, found = variant_of(fresh.config), {}
    for t in targets:
        like = t.module.weight
        assert isinstance(like, Tensor)
        specs = variant.param_specs(t.d_in, t.d_out, fresh.config.at(t.name, t.d_in, t.d_out))
        found[t.name] = {}
        for field, value in fresh.tensors[t.name].items():
            key = (id(value), like.device)
            if key not in made:
                made[key] = fresh_parameter(value, like, specs[field].trainable, copy=False)
            found[t.name][field] = made[key]
    return found


def load(model: nn.Module, path: Path, name: str | None = None, c: CValue = 1.0, strict_base: bool = True) -> Adapter:
    """`Adapter.from_checkpoint(model, path, ...)`: attach the adapter in a file."""
    return Adapter.from_checkpoint(model, path, name, c, strict_base)


def read(path: Path, name: str = "default", c: CValue = 1.0) -> Adapter:
    """The adapter in a file as a value, without any model: `ll.HistoryBake(model, [(ll.read("kind.safetensors"), 1.0)])`.

    Detached: to look at, save, stack, export (`ll.to_peft`), or put on a model later (`ll.attach(model, adapter)`, which checks
    the base then). Layers keep the names in the file; `ll.load` also finds them under a wrapper's. Costs the reading of the file.
    Raises what `ll.load` raises of a file by itself, and CheckpointError for one that does not say how wide its layers are.
    """
    contents, layer_sizes = fitting.for_nobody(path)
    return Adapter(
        contents.config, contents.tensors, layer_sizes, name=name, also=contents.also, metadata=contents.metadata,
        fingerprint=contents.fingerprint, diagnostics=contents.diagnostics, calibrated=contents.calibrated, c=c,
    )  # fmt: skip


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters attached to a model, by name; also on a deepcopy or an unpickled model, which carries its own."""
    model = inner(model)
    found: dict[Shared, dict[str, tuple[nn.Module, Hook]]] = {}
    for path, layer, hook in all_hooks(model):
        if isinstance(hook.shared, Shared):  # a history's hooks have their own kind (history.py)
            found.setdefault(hook.shared, {})[path] = (layer, hook)
    return {shared.name: handle_of(model, shared, hooks) for shared, hooks in found.items()}


def _also(model: nn.Module, patterns: Sequence[str] | str) -> dict[str, Parameter]:
    """Trainable twins of the parameters that `train_also` names. Raises RuntimeError for a regex that finds none."""
    patterns, found = as_patterns(patterns, "train_also") if patterns else (), {}  # type: ignore[arg-type]
    ours = {f"{path}.{n}" for path, _, hook in all_hooks(model) for _, n in hook.fields}
    names = {n: p for n, p in model.named_parameters() if n not in ours}
    for pattern in patterns:
        hits = [n for n in names if found_in(pattern, n)]
        if not hits:
            for name, several in tied_names(model).items():
                if found_in(pattern, name):
                    raise RuntimeError(
                        f"train_also {pattern!r} names {name}, which is tied to {several[0]}: one parameter under two names; "
                        f"train_also={re.escape(several[0])!r} trains both"
                    )
            raise RuntimeError(f"train_also {pattern!r} matches no parameter; there are e.g. {list(names)[-3:]}")
        found.update({n: fresh_parameter(names[n], names[n], True) for n in hits})
    beside(model, found)  # none that another adapter trains
    return found


def _refuse_both(model: nn.Module, config: AdapterConfig, targets: Sequence[Target], also: Iterable[str]) -> None:
    """Refuse to train a weight that the adapter changes too: it is the base that c = 0 is and the fingerprint knows."""
    adapted = {id(t.module._parameters.get("weight")): t.name for t in targets}
    have = dict(model.named_parameters())
    if both := {n: adapted[id(have[n])] for n in also if id(have[n]) in adapted}:
        exclude = (*config.exclude, *(rf"{re.escape(t)}$" for t in list(both.values())[:3]))
        raise RuntimeError(
            f"train_also would train {list(both)[:3]} ({len(both)} in all), the weights of layers that get an adapter too; leave these "
            f"layers to one of the two: {type(config).__name__}(exclude={exclude}, ...) keeps the adapter off them"
        )


def _directions(kept: Sequence[Adapter]) -> dict[str, Tensor]:
    """The input directions that kept adapters use, by target: rows (n, d_in)."""
    if not isinstance(kept, Iterable) or not all(isinstance(a, Adapter) for a in kept):
        raise TypeError(f"exclude_directions takes a list of Adapters, such as [ll.read('kind.safetensors')]; got {str(kept)[:80]!r}")
    found: dict[str, list[Tensor]] = {}
    for adapter in kept:
        for target, rows in _directions_of(adapter).items():
            found.setdefault(target, []).append(rows.detach())
    return {target: torch.cat(rows) for target, rows in found.items()}


def _directions_of(adapter: Adapter) -> dict[str, Tensor]:
    if adapter.variant.form != "low-rank":
        own = {target: adapter.variant.directions(p) for target, p in adapter.tensors().items()}
        if known := {target: rows for target, rows in own.items() if rows is not None}:
            return known
    return {target: update.A for target, update in adapter.factors().items()}  # or a TypeError that names the variant
