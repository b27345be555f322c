"""Where does an adapter act now, and are those layers still the model's? From when it is put on until it is lifted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from lora_lite.attachment import Shared, all_hooks, beside, place, warn_of_hazards
from lora_lite.hooks import Hook
from lora_lite.target import Target

Held = Mapping[str, Mapping[str, Parameter]]


class Placement:
    """The layers of one model that carry an adapter's tensors and hooks."""

    def __init__(self, model: nn.Module, shared: Shared, layers: Mapping[str, nn.Module]) -> None:
        self.model, self.shared, self.layers = model, shared, dict(layers)
        last = next(reversed(self.layers))
        self._path, self._last = last.split(".") if last else [], self.layers[last]

    def looks_intact(self) -> bool:
        """Asked by each `with`, so only of the last layer: the head is what models replace, and all would cost 1 us a layer."""
        return module_along(self.model, self._path) is self._last

    def gone(self) -> list[str]:
        """The layers that are no longer in the model. One that was wrapped has another name there and acts as before."""
        elsewhere = [t for t, layer in self.layers.items() if module_along(self.model, t.split(".") if t else []) is not layer]
        here = set(self.model.modules()) if elsewhere else ()
        return [t for t in elsewhere if self.layers[t] not in here]

    def check(self, complain: Callable[[str], Any]) -> None:
        """Complain of layers that the model has replaced since (resize_token_embeddings does): there the adapter is not."""
        if gone := self.gone():
            complain(
                f"adapter {self.shared.name!r}: the model has replaced {gone[:5]} ({len(gone)} in all) since; detach and attach it again"
            )

    def hook(self, target: str) -> Hook:
        hook = next((h for _, _, h in all_hooks(self.layers[target]) if h.shared is self.shared), None)
        if hook is None:
            raise RuntimeError(
                f"adapter {self.shared.name!r}: the layer {target!r} lost its hook; was the module replaced or its hooks cleared?"
            )
        return hook

    def tensors(self) -> dict[str, dict[str, Parameter]]:
        return {t: self.hook(t).tensors(layer) for t, layer in self.layers.items()}  # type: ignore[misc]

    def also(self) -> dict[str, Parameter]:
        """What it trains beside its own (`train_also`), by full name."""
        return {name: self.model.get_parameter(name) for name in self.shared.originals}


def put(model: nn.Module, shared: Shared, targets: Sequence[Target], held: Held, also: Mapping[str, Parameter]) -> Placement:
    """Tensors where each target is, and on it; all of them, or the model as it was."""
    own = beside(model, also)
    if wrong := [n for n, p in also.items() if p.shape != own[n].shape]:
        raise RuntimeError(f"adapter {shared.name!r} trains {wrong}, which have other shapes in this {type(model).__name__}")
    warn_of_hazards(targets)
    weights = {t.name: t.module.weight for t in targets}  # a parametrised layer computes it
    kept: dict[tuple[Parameter, Any], Parameter] = {}  # one per device of a tensor that layers share
    tensors = {
        t: {f: kept.setdefault((p, weights[t].device), moved(p, weights[t].device)) for f, p in fields.items()}  # type: ignore[union-attr]
        for t, fields in held.items()
    }
    place(model, shared, targets, tensors, {n: moved(p, own[n].device, own[n].dtype) for n, p in also.items()})
    return Placement(model, shared, {t.name: t.module for t in targets})


def module_along(model: nn.Module, path: Sequence[str]) -> nn.Module | None:
    found: nn.Module | None = model
    for name in path:
        if found is None:
            return None
        found = found._modules.get(name)
    return found


def moved(p: Parameter, device: torch.device, dtype: torch.dtype | None = None) -> Parameter:
    """The same Parameter where it is right already, else one on the device (and of the dtype)."""
    right = p.device == device and dtype in (None, p.dtype)
    return p if right else Parameter(p.detach().to(device, dtype or p.dtype), requires_grad=p.requires_grad)
