"""How is an adapter put on a model and taken off again, exactly, in any order, also from a copy of the model?"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lora_lite import compiled, recompute
from lora_lite.base import follow, hazard, is_linear, refusal, sizes, transposed
from lora_lite.config import AdapterConfig
from lora_lite.dial import Dial
from lora_lite.hooks import HOOKS, Hook, hooks_on
from lora_lite.target import Target, check_model
from lora_lite.variant import Base, Variant, variant_of


class Ledger:
    """One per model: the `requires_grad` flags from before the first adapter, put back when the last one leaves."""

    def __init__(self) -> None:
        self.flags: dict[str, bool] = {}
        self.holders: list[str] = []
        self.merged: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()  # a handle let go makes a merge final

    def __getstate__(self) -> dict[str, Any]:  # a copy of a merged model is a plain model: it cannot be unmerged
        return {"flags": self.flags, "holders": [name for name in self.holders if name not in self.merged]}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__()
        self.flags, self.holders = dict(state["flags"]), list(state["holders"])

    def freeze(self, model: nn.Module, holder: str, spare: set[str]) -> None:
        self.holders.append(holder)
        for name, p in model.named_parameters():
            if name not in spare:
                self.flags.setdefault(name, p.requires_grad)
                p.requires_grad_(False)

    def leave(self, model: nn.Module, holder: str) -> None:
        if holder in self.holders:
            self.holders.remove(holder)
        if not self.holders:
            for name, p in model.named_parameters():
                if name in self.flags:
                    with torch.inference_mode(p.is_inference()):  # outside of it a parameter made inside cannot be asked to train
                        p.requires_grad_(self.flags[name])
            self.flags.clear()


@dataclass(eq=False)
class Shared:
    """What the hooks of one attached adapter share, and a copy of the model carries along: no tensors, but for the
    originals of parameters it trains beside its own (`train_also`)."""

    name: str
    config: AdapterConfig
    ledger: Ledger
    dial: Dial
    metadata: dict[str, str] = field(default_factory=dict)
    fingerprint: dict[str, Any] | None = None
    diagnostics: dict[str, float] = field(default_factory=dict)
    calibrated: dict[str, Any] = field(default_factory=dict)
    originals: dict[str, Parameter] = field(default_factory=dict)


class Reader:
    """What a hook hands its variant as `base`: sizes, and at each step the weight and bias if the variant reads them."""

    def __init__(self, layer: nn.Module, d_in: int, d_out: int, reads: bool) -> None:
        self.sizes = Base(d_in, d_out)
        self.reads, self.transposed = reads, transposed(layer)

    def read(self, layer: nn.Module, dtype: torch.dtype) -> Base:
        if not self.reads:
            return self.sizes
        weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
        assert weight is not None
        weight = weight.T if self.transposed else weight
        return Base(self.sizes.d_in, self.sizes.d_out, weight, bias if bias is None or bias.dtype is dtype else bias.to(dtype))


_LEDGERS: weakref.WeakKeyDictionary[nn.Module, Ledger] = weakref.WeakKeyDictionary()


def all_hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Hook]]:
    """Every hook of ours in the model with its layer, as (path from this model, layer, hook)."""
    for path, layer in model.named_modules():
        for hook in hooks_on(layer):
            yield path, layer, hook


def ledger_of(model: nn.Module) -> Ledger:
    """The model's ledger; a copied or unpickled model brings its own in its hooks.

    Raises RuntimeError where adapters were attached through another module, whose paths this one cannot name.
    """
    for path, _, hook in all_hooks(model):
        if path != hook.path:
            raise RuntimeError(
                f"adapter {hook.shared.name!r} was attached through another module, where the layer {path!r} is {hook.path!r}; "
                "attach to that same module, or detach it first"
            )
        return _LEDGERS.setdefault(model, hook.shared.ledger)
    return _LEDGERS.setdefault(model, Ledger())


def field_names(name: str, fields: Iterable[str]) -> dict[str, str]:
    """A variant's tensor names -> their names on the layer: the default adapter's as they are, another's with its name."""
    return {f: f if name == "default" else f"{f}__{name}" for f in fields}


def owned(hooks: Iterable[tuple[str, nn.Module, Hook]]) -> set[str]:
    """Full names of the parameters that belong to adapters: their tensors, and what they train beside them."""
    names = set()
    for path, _, hook in hooks:
        names.update(f"{path}.{on_layer}" for _, on_layer in hook.fields)
        names.update(hook.shared.originals)
    return names


def check_free(model: nn.Module, name: str, targets: Iterable[Target], fields: Mapping[str, Iterable[str]]) -> None:
    """Refuse a name already in use, and layers that have something of that name. Touches nothing."""
    taken = sorted({hook.shared.name for _, _, hook in all_hooks(model)} | set(_LEDGERS.get(model, Ledger()).holders))
    if name in taken:
        raise ValueError(f"an adapter named {name!r} is already attached; attached: {taken}. Detach it, or pass another name=")
    for target in targets:
        for on_layer in field_names(name, fields[target.name]).values():
            if hasattr(target.module, on_layer):
                raise ValueError(f"{target.name} already has an attribute {on_layer!r} that is not ours; pass another name=")


def place(
    model: nn.Module,
    shared: Shared,
    targets: Iterable[Target],
    tensors: Mapping[str, Mapping[str, Parameter]],
    also: Mapping[str, Parameter],
) -> None:
    """Parameters onto layers, one hook each, the base frozen: all of it, or the model as it was."""
    targets = list(targets)
    try:
        for name, new in also.items():
            shared.originals[name] = substitute(model, name, new)
        for target in targets:
            _place_one(shared, target, tensors[target.name])
        _declare_tied(targets, tensors, shared.name)
        shared.ledger.freeze(model, shared.name, owned(all_hooks(model)) | set(also))
        recompute.install()
        compiled.notice_hooks()
    except BaseException:
        lift(model, shared, {t.name: t.module for t in targets})
        raise


TIED = "_tied_weights_keys"


def _declare_tied(targets: Iterable[Target], tensors: Mapping[str, Mapping[str, Parameter]], name: str) -> None:
    """Tell Hugging Face's `save_pretrained`, and so its Trainer, which tensors are one on purpose: it refuses others it finds so."""
    times = Counter(id(p) for fields in tensors.values() for p in fields.values())
    for target in targets:
        names = field_names(name, tensors[target.name])
        tied = {names[f]: names[f] for f, p in tensors[target.name].items() if times[id(p)] > 1}
        if tied:
            target.module.__dict__.setdefault(TIED, {}).update(tied)


def _undeclare_tied(layer: nn.Module, names: Iterable[str]) -> None:
    tied = layer.__dict__.get(TIED, {})
    for name in names:
        tied.pop(name, None)
    if TIED in layer.__dict__ and not tied:
        del layer.__dict__[TIED]


def _place_one(shared: Shared, target: Target, tensors: Mapping[str, Parameter]) -> None:
    variant, layer = variant_of(shared.config), target.module
    cfg = shared.config.at(target.name, target.d_in, target.d_out)
    names = field_names(shared.name, tensors)
    specs = variant.param_specs(target.d_in, target.d_out, cfg)
    trained = tuple(names[f] for f, spec in specs.items() if spec.trainable)
    reader = Reader(layer, target.d_in, target.d_out, variant.reads_weight == "step")
    hook = HOOKS[variant.form_at(cfg)](shared.dial, target.name, names, trained, variant, cfg, reader, target.routed, shared)
    hook.install(layer)
    for f, on_layer in names.items():
        layer.register_parameter(on_layer, tensors[f])


def lift(model: nn.Module, shared: Shared, layers: Mapping[str, nn.Module]) -> dict[str, dict[str, Parameter]]:
    """Take the adapter off its layers, also a half-placed one; its tensors come back by target and field, and what it
    trained beside them under their full names in "" . The layers are given: the model may have replaced one meanwhile."""
    tensors: dict[str, dict[str, Parameter]] = {}
    for path, layer in layers.items():
        for hook in [hook for hook in hooks_on(layer) if hook.shared is shared]:
            hook.remove()
            _undeclare_tied(layer, [on_layer for _, on_layer in hook.fields])
            taken = {f: layer._parameters.pop(on_layer, None) for f, on_layer in hook.fields}
            tensors[path] = {f: p for f, p in taken.items() if p is not None}
    also = {name: substitute(model, name, original) for name, original in shared.originals.items()}
    for name, trained in also.items():
        follow(shared.originals[name], trained)
    originals, ledger = list(shared.originals.items()), shared.ledger
    shared.originals.clear()
    ledger.leave(model, shared.name)
    for name, p in originals if ledger.holders else ():  # another adapter stays: what this one trained is base again, and frozen
        ledger.flags.setdefault(name, p.requires_grad)
        p.requires_grad_(False)
    compiled.notice_hooks()
    return {**tensors, "": also} if also else tensors


def substitute(model: nn.Module, name: str, new: Parameter) -> Parameter:
    """Put `new` wherever the parameter `name` sits (tied places too) and return what was there."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(parent)._parameters[leaf]
    assert old is not None
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is old:
                module._parameters[key] = new
    return old


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """The names of each parameter that has several, by each of them: {"lm_head.weight": ["embed_tokens.weight", "lm_head.weight"]}."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {name: several for several in names.values() if len(several) > 1 for name in several}


def fresh_parameter(value: Tensor, like: Tensor, trainable: bool, copy: bool = True) -> Parameter:
    """A Parameter on the layer's device, fit for training even when made under inference_mode; `copy` unless the value is ours."""
    with torch.inference_mode(False):
        value = value.detach().clone() if copy or value.is_inference() else value.detach()
        return Parameter(value.to(like.device), requires_grad=trainable)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself where torch.compile wrapped it. Raises RuntimeError for wrappers that must come after the adapter."""
    check_model(model)
    if isinstance(model, torch.nn.parallel.DistributedDataParallel) or type(model).__name__ == "FullyShardedDataParallel":
        raise RuntimeError(
            f"attach before wrapping in {type(model).__name__}: gradients of what comes later are never reduced between ranks"
        )
    return getattr(model, "_orig_mod", model)


def targets_by_name(model: nn.Module, layer_sizes: Mapping[str, tuple[int, int]]) -> list[Target]:
    """The named layers of a model as targets. Raises RuntimeError listing all that are missing or of another size."""
    modules = dict(model.named_modules())
    wrong = {
        t: modules.get(t)
        for t in layer_sizes
        if t not in modules or not is_linear(modules[t]) or sizes(modules[t]) != tuple(layer_sizes[t])
    }
    if wrong:
        found = {t: "nothing" if m is None else repr(m) for t, m in list(wrong.items())[:5]}
        raise RuntimeError(f"{len(wrong)} of {len(layer_sizes)} targets do not fit this {type(model).__name__}: {found}")
    return [Target(name=t, module=modules[t], d_in=s[0], d_out=s[1]) for t, s in layer_sizes.items()]


def refuse_merged(ledger: Ledger) -> None:
    if merged := sorted(ledger.merged):
        raise RuntimeError(f"adapter {merged} is merged into this model; unmerge it first, or save the merged model and load that")


def warn_of_hazards(targets: Iterable[Target]) -> None:
    if hazards := [h for t in targets if (h := hazard(t.name, t.module))]:
        warnings.warn(f"{len(hazards)} layers: {hazards[0]}", stacklevel=4)


def inner(model: nn.Module) -> nn.Module:
    """The module itself behind torch.compile's and DDP's wrappers."""
    check_model(model)
    while isinstance(model, torch.nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    return model


def beside(model: nn.Module, names: Iterable[str]) -> dict[str, Parameter]:
    """The model's own parameters of these names. Raises RuntimeError for one it lacks, or that an adapter here trains already."""
    have, taken = dict(model.named_parameters()), {n: hook.shared.name for _, _, hook in all_hooks(model) for n in hook.shared.originals}
    problems = [
        f"{n} is trained by adapter {taken[n]!r} already" if n in taken else f"{n} is not there"
        for n in names
        if n in taken or n not in have
    ]
    if problems:
        raise RuntimeError(f"train_also, on this {type(model).__name__}: {'; '.join(problems)}")
    return {n: have[n] for n in names}


def check_layers(
    model: nn.Module, name: str, targets: Sequence[Target], variant: type[Variant], specs: Mapping[str, Mapping[str, Any]]
) -> None:
    refuse_merged(ledger_of(model))
    problems = [r for t in targets if (r := refusal(t.name, t.module, variant.reads_weight != "never"))]
    if problems:
        raise RuntimeError(f"{len(problems)} of {len(targets)} layers cannot carry {variant.name!r}: " + "; ".join(problems[:3]))
    check_free(model, name, targets, specs)
