"""How much of each kept adapter acts here and now? One dial holds all doses of a history, and the gate that can shut it.

Being a dial, it is per context, carried into checkpointed backwards (recompute.py) and visible to compiled code as c is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lite import compiled
from lora_lite.dial import WIDEST, Coefficient, Dial, Setting, by_key, current_task, is_functorch, rows

Gate = Dial | Callable[[], Any] | None
Parts = tuple[tuple[int, int], ...]  # (place in the stack, ranks) of each additive update that shares a layer's A and B


class Doses(Setting):
    """Resolved doses, one c per adapter: numbers, one per row, one per token. A bare 0.0 shuts off however many there are.

    each  the doses one by one
    c     what they were given as
    cell  all in one tensor (n,), (B, n) or (B, T, n), for compiled graphs
    """

    __slots__ = ("each",)

    def __init__(self, c: tuple[Coefficient, ...] | float, owner: object = None) -> None:
        self.c = c  # type: ignore[assignment]
        self.each = tuple(Setting(dose) for dose in c) if isinstance(c, tuple) else ()
        if not isinstance(c, tuple) and c != 0.0:
            raise TypeError(f"doses are a tuple with one c per adapter, got {c!r}")
        self.cell = in_one([dose.cell for dose in self.each])
        self.tensor = any(dose.tensor for dose in self.each)
        self.off = all(dose.off for dose in self.each)
        self.zeros = any(dose.off or dose.zeros for dose in self.each)
        self.task, self.owner, self._rows = current_task(), owner, {}

    def columns(self, x: Tensor, routed: bool, path: str) -> list[Coefficient]:
        """Each dose for an activation x (*batch, d), as a hook of its own would see it."""
        return [dose.rows(x, routed, path) if dose.tensor else dose.c for dose in self.each]

    def gains(self, parts: Parts, name: str, x: Tensor, routed: bool, path: str) -> Tensor:
        """The doses on the rank axis, (R,) or (*batch, R), in float32 or wider. Kept by the `name` of these parts: layers share it."""
        rows_of = (x.shape[:-1], routed) if self.tensor else None
        key = (name, x.device, x.dtype is torch.float64, rows_of, torch.is_inference_mode_enabled())
        if (kept := self._rows.get(key)) is None:
            kept = on_ranks(self.columns(x, routed, path), parts, x)
            if not any(dose.tensor and unseen(dose.c) for dose in self.each):
                self._rows[key] = kept
        return kept


def in_one(cells: Sequence[Tensor]) -> Tensor:
    """() | (B,) | (B, T) each -> (n,) | (B, n) | (B, T, n). Raises ValueError where their rows or tokens are not as many."""
    depth = max((cell.dim() for cell in cells), default=0)
    device = next((cell.device for cell in cells if cell.dim() or cell.device.type != "cpu"), torch.device("cpu"))
    lifted = [cell.to(device).reshape((*cell.shape, *[1] * (depth - cell.dim()))) if cell.dim() else cell.to(device) for cell in cells]
    shapes = {tuple(cell.shape) for cell in cells if cell.dim()}
    if len({shape[:1] for shape in shapes}) > 1 or len({shape[1:] for shape in shapes if len(shape) > 1}) > 1:
        raise ValueError(f"doses have shapes {sorted(shapes)}: those that differ by row, or by token, must agree on how many there are")
    if not cells:
        return torch.zeros((), dtype=WIDEST.get(device.type, torch.float64))
    return torch.stack(torch.broadcast_tensors(*lifted), dim=-1)


def on_ranks(columns: Sequence[Coefficient], parts: Parts, x: Tensor) -> Tensor:
    """Each dose once per rank of its adapter."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    if not any(isinstance(columns[place], Tensor) for place, _ in parts):
        return torch.tensor([columns[place] for place, r in parts for _ in range(r)], dtype=wide, device=x.device)
    doses = [torch.as_tensor(columns[place], dtype=wide, device=x.device) for place, _ in parts]
    batch = torch.broadcast_shapes(*(dose.shape for dose in doses))[:-1]
    return torch.cat([dose.expand(*batch, r) for dose, (_, r) in zip(doses, parts, strict=True)], dim=-1)


def unseen(c: Coefficient) -> bool:
    """Whether a tensor's values say too little: it takes gradients, or is being transformed."""
    return isinstance(c, Tensor) and (c.requires_grad or is_functorch(c))


class DoseDial(Dial):
    """The doses of one history, with its gate: a dial (open where that adapter's c is not 0), a callable, or None."""

    kind = Doses
    gate: Gate = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "gate": self.gate}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(state)
        self.gate = state["gate"]

    def doses(self) -> Doses:
        setting = self.setting()
        assert isinstance(setting, Doses)
        return setting

    def opened(self, x: Tensor, routed: bool, path: str) -> bool | Tensor:
        """Whether the gate is open for x (*batch, d): yes, no, or row by row."""
        if isinstance(self.gate, Dial):
            setting = self.gate.setting()
            if setting.task != current_task():
                self.gate.stale(setting)
            setting = setting.at("")
            if setting.off or not setting.tensor:
                return not setting.off
            return setting.rows(x, routed, path) != 0 if setting.zeros or unseen(setting.c) else True
        found = True if self.gate is None else self.gate()
        if isinstance(found, Tensor) and found.numel() > 1:
            return rows(found.detach().float(), x, routed, path) != 0
        return bool(found)

    def traced(self, x: Tensor, n: int, routed: bool, path: str) -> tuple[list[Tensor], bool]:
        """Inside a graph being compiled: the n doses against x (*batch, d), and whether one of them is trained."""
        compiled.refuse_export(self, path)
        if not torch.is_grad_enabled():
            return list(_doses(x.detach(), self.key, n, routed).split(1, dim=-1)), False
        cell = self.here.slot.tensor
        if not cell.requires_grad:
            cell = torch.where(compiled._agrees(cell, self.key), cell, torch.nan)  # it raises; used, so that it is not optimised away
        return [rows(cell[..., place] if cell.dim() else cell, x, routed, path) for place in range(n)], cell.requires_grad

    def traced_gate(self, x: Tensor, routed: bool, path: str) -> Tensor | None:
        """Inside a graph being compiled: where it is shut, against x (*batch, d)."""
        if isinstance(self.gate, Dial):
            c, zero = compiled.coefficient(self.gate, x, routed, path)
            return c.detach() == 0 if zero is None else zero
        return None if self.gate is None else ~_opened(x.detach(), self.key, routed)


@torch.library.custom_op(
    "lora_lite::doses", mutates_args=(), schema="(Tensor x, int key, int n, bool routed) -> Tensor", tags=compiled._TAGS
)
def _doses(x: Tensor, key: int, n: int, routed: bool) -> Tensor:
    dial = by_key(key)
    assert isinstance(dial, DoseDial)
    out = torch.zeros((*x.shape[:-1], n), dtype=compiled._wide(x), device=x.device)
    for place, dose in enumerate(dial.doses().columns(x, routed, "a compiled layer")):
        out[..., place : place + 1] = dose
    return out


@_doses.register_fake
def _(x: Tensor, key: int, n: int, routed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], n), dtype=compiled._wide(x))


@torch.library.custom_op("lora_lite::opened", mutates_args=(), schema="(Tensor x, int key, bool routed) -> Tensor", tags=compiled._TAGS)
def _opened(x: Tensor, key: int, routed: bool) -> Tensor:
    """A gate that is a callable, asked when the graph runs. Compiled code recomputes in a backward, where its answer may be another."""
    dial = by_key(key)
    assert isinstance(dial, DoseDial)
    if current_task() != -1:
        raise RuntimeError(f"{dial.name}: its gate is a callable, whose answer a recomputed forward cannot know; use set_gate(adapter)")
    found = torch.as_tensor(dial.opened(x, routed, "a compiled layer"), device=x.device)
    return found.expand((*x.shape[:-1], 1)).contiguous()


@_opened.register_fake
def _(x: Tensor, key: int, routed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.bool)
