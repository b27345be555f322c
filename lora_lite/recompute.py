"""Which c does a forward see when a checkpointed backward runs it again? The one it ran with, in whatever thread.

torch.utils.checkpoint has no public hook for "when a checkpointed forward is stored and replayed" that reaches both kinds,
calls already imported elsewhere and FSDP's wrappers, so two of its classes are patched in place, once. Should torch rename
them, `install` says so and returns False; Dial.stale then raises where a wrong gradient would otherwise come out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch.utils.checkpoint
from loguru import logger

from lora_lite.dial import DIALS, MOVED, Dial, Setting, Slot, current_task, live, replaying


class Captured(NamedTuple):
    """What a forward found: c, and where the hooks were (by how often they had been put on or off, and called)."""

    setting: Setting
    places: int
    calls: int


Snapshot = Mapping[Dial, Captured]
_installed: bool | None = None


def capture() -> Snapshot:
    """Every adapter's c as it is in force now."""
    return {dial: Captured(dial.setting(), dial.places, dial.calls) for dial in live()}


def replay(snapshot: Snapshot, function: Callable[..., Any], ran: Collection[Dial] = ()) -> Callable[..., Any]:
    """`function`, run with the captured c, stamped with the backward it runs in.

    ran  the dials whose hooks took part in the forward. One that has been moved since cannot take the same part again; where that
         is not known, torch finds that other tensors were saved, and a hook that runs now and did not then says so itself
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if lost := next((dial for dial in ran if dial.places != snapshot[dial].places), None):
            raise lost.displaced()
        task = current_task()
        stamped = {dial: then.setting.stamped(task if dial.places == then.places else MOVED) for dial, then in snapshot.items()}
        token, flag = DIALS.set({dial: (setting,) for dial, setting in stamped.items()}), replaying.set(True)
        slots = {dial: dial.here.slot for dial in snapshot}
        for dial, setting in stamped.items():
            dial.here.slot = Slot(setting.cell)
        try:
            return function(*args, **kwargs)
        finally:
            replaying.reset(flag)
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
        ran = [dial for dial, then in snapshot.items() if dial.calls != then.calls]
        after = {dial: then._replace(places=dial.places) for dial, then in snapshot.items()}  # what it moved itself it moves again
        ctx.run_function = replay(after, ctx.run_function, ran)
        return output

    function.forward = staticmethod(forward)
    return True
