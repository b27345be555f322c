"""What happens when a layer with a history is called? One hook for all kept adapters: add them up, then turn what does not add.

Knows tensors and hooks; no Adapter, no model. The order is in history.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lora_lite import compiled
from lora_lite.dial import DIALS, Coefficient, current_task
from lora_lite.doses import DoseDial, Doses, Parts, on_ranks
from lora_lite.hooks import Hook, hooks_on, owner
from lora_lite.lowrank import FEW_ROWS

Members = tuple[tuple[int, Hook], ...]  # (place in the stack, a hook that is not installed: called at its turn)


@dataclass(eq=False)
class Baked:
    """What the hooks of one history share, and a copy of the model carries along: no tensors. Numbered by age among those with layers."""

    dial: DoseDial
    ledger: Any
    number: int = 0
    kept: list[Any] = field(default_factory=list)
    originals: dict[str, Parameter] = field(default_factory=dict)  # always empty: a history trains nothing beside its own

    @property
    def name(self) -> str:
        return f"history {self.number}"

    def on_layer(self, field: str, place: int | None = None) -> str:
        """A field's name on a layer: "lora_A__history__0" for the additive pair, "lora_l__history__0__2" for the third adapter's."""
        suffix = f"history__{self.number}"  # no adapter's: their names have no double underscore
        return f"{field}__{suffix}" if place is None else f"{field}__{suffix}__{place}"


class Content(NamedTuple):
    """What a history has at one layer and site: an additive pair of many adapters' ranks, and members that act in turn.

    The pair is A (R, d_in) and B transposed, (R, d_out): one token through 24 layers takes 0.40x of the base's linears more,
    against 0.59x with rows of B that are only R = 128 long.
    """

    parts: Parts = ()
    members: Members = ()
    tensors: Mapping[str, Parameter] = {}


class HistoryHook(Hook):
    shared: Baked

    def __init__(self, site: str, path: str, routed: bool, baked: Baked) -> None:
        self.site, self.path, self.routed, self.shared, self.dial = site, path, routed, baked, baked.dial
        self.handle, self.trained, self.fields, self.dropout = None, (), (), 0.0
        self.A, self.Bt = baked.on_layer("lora_A"), baked.on_layer("lora_Bt")
        self.parts: Parts = ()
        self.members: Members = ()
        self.alike = ""  # the same on layers with the same parts; a string knows its hash, nested tuples count it anew

    @property
    def additive(self) -> bool:
        return not self.members

    def install(self, layer: nn.Module) -> None:
        """In front of the live adapters and the younger histories on the layer; everyone else keeps their order."""
        table = self._table(layer)
        before = list(table.items())
        later = [i for i, (_, one) in enumerate(before) if isinstance(hook := owner(one), Hook) and self.precedes(hook)]
        super().install(layer)
        for key, _ in before[min(later, default=len(before)) :]:
            table.move_to_end(key)

    def precedes(self, other: Hook) -> bool:
        return not isinstance(other, HistoryHook) or other.shared.number > self.shared.number

    def content(self, layer: nn.Module) -> Content:
        return Content(self.parts, self.members, {name: layer._parameters[name] for _, name in self.fields})  # type: ignore[misc]

    def hold(self, layer: nn.Module, content: Content) -> None:
        """Put this in the place of what it has. Nothing at all takes the hook off the layer."""
        for name in {name for _, name in self.fields} - set(content.tensors):
            layer._parameters.pop(name, None)
        layer._parameters.update(content.tensors)
        self.dial.places += 1
        self.parts, self.members, self.alike = content.parts, content.members, repr(content.parts)
        self.fields = tuple((name.partition("__")[0], name) for name in content.tensors)
        if not content.tensors:
            self.remove()
        elif self.handle is None:
            self.install(layer)

    def run(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any = None, y: Tensor | None = None) -> Any:
        if y is None and self.site == "output":  # as Hook.run
            y, kwargs = kwargs, {}
        x = args[0] if args else next(iter(kwargs.values()))
        new = self.traced(layer, x, y) if torch.compiler.is_compiling() else self.dosed(layer, x, y)  # type: ignore[arg-type]
        if new is None or self.site == "output":
            return new
        if kwargs is None:
            return (new, *args[1:])
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})

    def dosed(self, layer: nn.Module, x: Tensor, y: Tensor | None) -> Tensor | None:
        """At the doses in force, under the zero rule: where all are zero, or the gate is shut, the base's bits."""
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise compiled.holds_no_c(self.dial, self.path, "torch.jit.trace")
        self.dial.calls += 1
        stack = DIALS.get().get(self.dial)
        doses: Doses = stack[-1] if stack else self.dial.rest  # type: ignore[assignment]
        if doses.task != current_task():
            self.dial.stale(doses)
        if doses.off:
            return None
        opened = True if self.dial.gate is None else self.dial.opened(x, self.routed, self.path)
        if opened is False:
            return None
        columns = doses.columns(x, self.routed, self.path) if doses.tensor else doses.c
        gains = doses.gains(self.parts, self.alike, x, self.routed, self.path) if self.parts else None
        new = self.act(layer, x, y, columns, gains, doses.zeros)  # type: ignore[arg-type]
        if new is None or opened is True:
            return new
        return torch.where(opened, new, x if y is None else y)  # type: ignore[arg-type]

    def traced(self, layer: nn.Module, x: Tensor, y: Tensor | None) -> Tensor | None:
        """The same inside a graph being compiled: doses are tensors there, and no branch may look at them."""
        columns, trained = self.dial.traced(x, len(self.shared.kept), self.routed, self.path)
        shut = self.dial.traced_gate(x, self.routed, self.path)
        gains = on_ranks(columns, self.parts, x) if self.parts else None
        new = self.act(layer, x, y, columns, gains, not trained)
        return new if new is None or shut is None else torch.where(shut, x if y is None else y, new)

    def act(
        self, layer: nn.Module, x: Tensor, y: Tensor | None, columns: Sequence[Coefficient], gains: Tensor | None, zeros: bool
    ) -> Tensor | None:
        """What comes out, or None for what came in: additive updates at once, then the members, each from the last one's output.

        columns  one dose per adapter of the history, of which this layer may have some
        zeros    whether a dose may be zero: then rows where nothing acts keep their bits
        """
        now = x if y is None else y
        before = now
        if gains is not None and (idle := idle_rows(columns, self.parts) if zeros else None) is not True:
            A, Bt = layer._parameters[self.A], layer._parameters[self.Bt]
            now = add_pair(y, x, A, Bt, gains)  # type: ignore[arg-type]
            now = now if idle is None or idle is False else torch.where(idle, y, now)  # type: ignore[arg-type]
        for place, member in self.members:
            c = columns[place]
            if isinstance(c, Tensor):
                new = member.apply(layer, x, now, c) if self.site == "output" else member.apply(layer, now, None, c)
                now = torch.where(c == 0, now, new) if zeros else new
            elif c != 0.0:
                now = member.apply(layer, x, now, c) if self.site == "output" else member.apply(layer, now, None, c)
        return None if now is before else now


def add_pair(y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, gains: Tensor) -> Tensor:
    """y + (x A^T * gains) B^T: hooks.add_low_rank for B stored the other way and gains on ranks, 2 us less of Python per layer."""
    if (dtype := x.dtype) is not A.dtype:
        A, Bt = A.to(dtype), Bt.to(dtype)
    h = F.linear(x, A) * gains
    if dtype is not h.dtype:
        h = h.to(dtype)
    if dtype is y.dtype and y.numel() > FEW_ROWS * y.shape[-1]:
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), Bt).view(y.shape)
    out = torch.add(y, torch.matmul(h, Bt))
    return out if out.dtype is y.dtype else out.to(y.dtype)


def idle_rows(columns: Sequence[Coefficient], parts: Parts) -> bool | Tensor:
    """Whether none of these acts: yes, no, or row by row, to broadcast against x."""
    doses = [columns[place] for place, _ in parts]
    if any(not isinstance(dose, Tensor) and dose != 0.0 for dose in doses):
        return False
    masks = [dose == 0 for dose in doses if isinstance(dose, Tensor)]
    return all_of(masks) if masks else True


def all_of(masks: Sequence[Tensor]) -> Tensor:
    found = masks[0]
    for mask in masks[1:]:
        found = found & mask
    return found


def history_hooks(layer: nn.Module, baked: Baked) -> dict[str, HistoryHook]:
    """A history's hooks on one layer, by site."""
    return {hook.site: hook for hook in hooks_on(layer) if isinstance(hook, HistoryHook) and hook.shared is baked}
