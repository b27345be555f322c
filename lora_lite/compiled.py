"""How does a compiled graph see c, and how does it learn of hooks that came after it?

A graph may not read a ContextVar. Without gradients a custom operator reads it each time the graph runs; with gradients c
is a tensor input of the graph, found in a thread-local slot, and a second operator checks that both tell the same.
"""

from __future__ import annotations

import sys

import torch
from loguru import logger
from torch import Tensor

from lora_lite.dial import Dial, by_key, current_task, rows

# CUDA graphs replay kernels, not Python: an operator that looks up c must stay outside of them, where torch can say so.
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


@torch.library.custom_op("lora_lite::coefficient", mutates_args=(), schema="(Tensor x, int key, bool routed) -> Tensor", tags=_TAGS)
def _coefficient(x: Tensor, key: int, routed: bool) -> Tensor:
    setting = by_key(key).setting()
    c = setting.rows(x, routed, "a compiled layer") if setting.tensor else setting.cell
    shape = (*x.shape[:-1], 1)
    return c.to(device=x.device, dtype=_wide(x)).expand(shape).contiguous()


@_coefficient.register_fake
def _(x: Tensor, key: int, routed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=_wide(x))


@torch.library.custom_op("lora_lite::agrees", mutates_args=(), schema="(Tensor c, int key) -> Tensor")
def _agrees(c: Tensor, key: int) -> Tensor:
    """True, or an error: an asyncio task may not train compiled code while another task of its thread holds a block open."""
    dial = by_key(key)
    if dial.setting().varied:
        dial.setting().rows(c, False, "a compiled layer")  # says why not
    if current_task() == -1 and dial.here.slot.tensor is not dial.setting().cell:
        raise RuntimeError(
            f"adapter {dial.name!r}: two tasks of one thread train compiled code with different c at once, which compiled graphs "
            "cannot tell apart; close the `with` block before awaiting, or use threads"
        )
    return torch.ones((), dtype=torch.bool, device=c.device)


@_agrees.register_fake
def _(c: Tensor, key: int) -> Tensor:
    return torch.empty((), dtype=torch.bool, device=c.device)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def coefficient(dial: Dial, x: Tensor, routed: bool, path: str) -> tuple[Tensor, Tensor | None]:
    """Inside a graph being compiled: c against x (*batch, d), and where it is zero (None when c itself is trained)."""
    refuse_export(dial, path)
    if not torch.is_grad_enabled():
        c = _coefficient(x.detach(), dial.key, routed)
        return c, c == 0
    cell = dial.here.slot.tensor
    c = rows(cell, x, routed, path)
    if cell.requires_grad:
        return c, None
    return c, (c == 0) & _agrees(c.detach(), dial.key)


def refuse_export(dial: Dial, path: str) -> None:
    """A program outlives the process: traced with gradients it would keep this moment's c for good, without them it would look c
    up by a number that is another adapter's where it is loaded (and was turned by that one, measured)."""
    if torch.compiler.is_exporting():
        raise holds_no_c(dial, path, "torch.export.export")


def holds_no_c(dial: Dial, path: str, how: str) -> RuntimeError:
    return RuntimeError(
        f"adapter {dial.name!r}, at {path}: an exported program can hold no c; export it merged: `with adapter.merged(c=...): "
        f"{how}(...)` (a history by history.to_adapter() first), or detach it"
    )


def notice_hooks() -> None:
    """Call after hooks came or went: compiled code made before would go on without seeing them, silently.

    torch skips the guards on hooks by default, and graphs are shared between instances of a class, so the guards are
    switched on, and code already compiled (by anyone: wrappers are not known to us) is dropped; it recompiles when called.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    dynamo.config.skip_nnmodule_hook_guards = False
    if _compiled_code(dynamo):
        dynamo.reset()
        logger.info("hooks changed: compiled code was dropped and will be compiled again when called")


def _compiled_code(dynamo) -> bool:
    frames, caches = dynamo.convert_frame, dynamo.eval_frame
    try:
        return any(caches._debug_get_cache_entry_list(code) for code in frames.input_codes.seen)
    except AttributeError:  # torch has renamed them: dropping too much costs a recompile, dropping too little a wrong number
        return True
