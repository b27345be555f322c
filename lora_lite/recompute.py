"""Which c does a forward see when a checkpointed backward runs it again? The one it ran with, in whatever thread.

torch.utils.checkpoint has no public hook for "when a checkpointed forward is stored and replayed" that reaches both kinds,
calls already imported elsewhere and FSDP's wrappers, so two of its classes are patched in place, once. Should torch rename
them, `install` says so and returns False; Dial.stale then raises where a wrong gradient would otherwise come out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch.utils.checkpoint
from loguru import logger

from lora_lite.dial import DIALS, Dial, Setting, Slot, current_task, live

Snapshot = Mapping[Dial, Setting]
_installed: bool | None = None


def capture() -> Snapshot:
    """Every adapter's c as it is in force now."""
    return {dial: dial.setting() for dial in live()}


def replay(snapshot: Snapshot, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run with the captured c, stamped with the backward it runs in."""
    if not snapshot:
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        task = current_task()
        token = DIALS.set({dial: (setting.stamped(task),) for dial, setting in snapshot.items()})
        slots = {dial: dial.here.slot for dial in snapshot}
        for dial, setting in snapshot.items():
            dial.here.slot = Slot(setting.cell)
        try:
            return function(*args, **kwargs)
        finally:
            DIALS.reset(token)
            for dial, slot in slots.items():
                dial.here.slot = slot

    return run


def install() -> bool:
    """Patch torch.utils.checkpoint once; True when both kinds of checkpointing carry c from now on."""
    global _installed
    if _installed is None:
        _installed = _patch_non_reentrant() and _patch_reentrant()
        if not _installed:
            logger.warning("torch.utils.checkpoint has changed: c is not carried into recomputed forwards (an error says where it matters)")
    return _installed


def _patch_non_reentrant() -> bool:
    frame = getattr(torch.utils.checkpoint, "_CheckpointFrame", None)
    if frame is None:
        return False
    original = frame.__init__

    @functools.wraps(original)
    def __init__(self: Any, recompute_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        original(self, replay(capture(), recompute_fn), *args, **kwargs)

    frame.__init__ = __init__
    return True


def _patch_reentrant() -> bool:
    function = getattr(torch.utils.checkpoint, "CheckpointFunction", None)
    if function is None:
        return False
    original = function.forward

    @functools.wraps(original)
    def forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        snapshot = capture()
        output = original(ctx, run_function, *args)
        ctx.run_function = replay(snapshot, ctx.run_function)
        return output

    function.forward = staticmethod(forward)
    return True
