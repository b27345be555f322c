"""What if c is not a number? It may be what was measured ("auto"), differ by layer (a mapping), or follow a text's tokens (a schedule)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.config import as_patterns, found_in
from lora_lite.dial import DIALS, Block, Coefficient, Dial, Setting, Varied, current_task

Schedule = Callable[[Tensor], Any]  # positions (B, T), whole numbers from 0 -> c of that shape, or a number
EAGER = "; compiled code takes a number or a tensor: run it uncompiled (torch.compiler.set_stance('force_eager'))"


class VariedSetting(Setting):
    """A setting whose c must still be asked for, by layer or by forward. `cell` is NaN: compiled graphs cannot ask."""

    __slots__ = ("says",)
    varied = True

    def __init__(self, c: Any, owner: object, off: bool, says: str) -> None:
        self.c, self.owner, self.off, self.says = c, owner, off, says
        self.tensor, self.zeros, self.task, self._rows = True, False, current_task(), {}
        self.cell = torch.full((), torch.nan, dtype=torch.float64)

    def rows(self, x: Tensor, routed: bool, path: str) -> Tensor:
        raise RuntimeError(f"at {path}: {self.says}")


# -- by measurement --------------------------------------------------------------------------------------------------


def limit(name: str, calibrated: Mapping[str, Any], c: str) -> float:
    """The c that "auto" or "-auto" stands for. Raises ValueError where that is not known, or there is none."""
    side = {"auto": "positive", "-auto": "negative"}.get(c)
    if side is None:
        raise TypeError(f'c must be a number or a tensor, or "auto" or "-auto"; got {c!r}')
    if not calibrated:
        raise ValueError(
            f"adapter {name!r}: c={c!r} needs ll.calibrate_c(adapter, prompts, ...) first; its result is saved with the adapter"
        )
    if calibrated.get(side) is None:
        raise ValueError(f"adapter {name!r}: c={c!r}, but no {side} c was found usable: {calibrated.get('verdict')}")
    return float(calibrated[side])


# -- by layer -----------------------------------------------------------------------------------------------------------


class ByLayer(dict[str, Coefficient], Varied):
    """One c per target. Made by `by_layer`."""

    def setting(self, owner: object = None) -> Setting:
        return LayerSetting(self, owner)


class LayerSetting(VariedSetting):
    __slots__ = ("each", "elsewhere")

    def __init__(self, c: ByLayer, owner: object = None) -> None:
        self.each = {target: Setting(value) for target, value in c.items()}
        super().__init__(c, owner, all(s.off for s in self.each.values()), f"c differs by layer{EAGER}")
        self.elsewhere = Setting(0.0 if self.off else 1.0)

    def at(self, path: str) -> Setting:
        return self.each.get(path, self.elsewhere)


def by_layer(c: Mapping[str, Coefficient], targets: Iterable[str]) -> ByLayer:
    """The c of each target: `{r"layers\\.3\\.": 2.0, "": 1.0}` are regexes searched in the full name, the first that is found wins.

    Raises ValueError for a key that is no regex or finds no target, and for targets that none finds: "" as the last one finds the rest.
    """
    as_patterns(list(c), "c by layer")
    targets, found = list(targets), ByLayer()
    for target in targets:
        for pattern, value in c.items():
            if found_in(pattern, target):
                found[target] = value
                break
    if idle := [pattern for pattern in c if not any(found_in(pattern, target) for target in targets)]:
        raise ValueError(f"c by layer: {idle} match none of the {len(targets)} targets, which are e.g. {targets[:3]}")
    if left := [target for target in targets if target not in found]:
        raise ValueError(f'c by layer: no entry for {left[:3]} ({len(left)} of {len(targets)} in all); the key "" stands for the rest')
    return found


# -- by position --------------------------------------------------------------------------------------------------------


class Scheduled(Varied):
    """c as a function of the token's position. Used through `scheduled`."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def setting(self, owner: object = None) -> Setting:
        says = (
            "c is a schedule of positions, which are known while the model that carries the adapter runs as a whole "
            f"(not a part of it called directly, as generate() does with an encoder){EAGER}"
        )
        return VariedSetting(self.schedule, owner, False, says)


class Forward:
    """The owner of the setting that holds for one forward of a scheduled block."""

    def __init__(self, block: Setting) -> None:
        self.block = block


@contextmanager
def scheduled(model: nn.Module, dial: Dial, schedule: Schedule) -> Iterator[None]:
    """`schedule(positions)` in force for the block: asked at each forward of the model, in this context only."""
    with Block(dial, Scheduled(schedule)):
        block = dial.setting()

        def begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.compiler.is_compiling() and dial.setting() is block:  # an inner block, another thread: not ours
                c = Setting(at_positions(schedule, positions(model, args, kwargs)), Forward(block))
                held = DIALS.get()
                DIALS.set({**held, dial: (*held[dial], c)})
                dial.sync()

        def end(model: nn.Module, args: Any, output: Any) -> None:
            held = DIALS.get()
            stack = held.get(dial, ())
            if stack and isinstance(stack[-1].owner, Forward) and stack[-1].owner.block is block:
                DIALS.set({**held, dial: stack[:-1]})
                dial.sync()

        handles = [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(end, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def at_positions(schedule: Schedule, where: Tensor) -> Tensor:
    """The schedule's c (B, T) at positions (B, T). Raises ValueError where it returns another shape, TypeError for no numbers."""
    found = schedule(where)
    try:
        c = torch.as_tensor(found, device=where.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"the schedule returned {type(found).__name__} {found!r:.60} as c; return a number, or one per position, as in "
            "lambda position: 1.5 * (position >= 10)"
        ) from error
    try:
        return (c if c.is_floating_point() else c.float()).expand(where.shape)
    except RuntimeError as error:
        raise ValueError(
            f"the schedule was given positions {tuple(where.shape)} and returned c of shape {tuple(c.shape)}; "
            "return a number, or one per position, as in lambda position: 1.5 * (position >= 10)"
        ) from error


def positions(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The position (B, T) of each token of a call, from 0 for a text's first: what the cache holds is counted, padding is not.

    Of an encoder-decoder, the decoder's. Raises ValueError for a call without tokens.
    """
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    side = "decoder_" if any(given.get(f"decoder_{name}") is not None for name in ("input_ids", "inputs_embeds")) else ""
    tokens = next((given[n] for n in (f"{side}input_ids", f"{side}inputs_embeds") if isinstance(given.get(n), Tensor)), None)
    if tokens is None or tokens.dim() < 2:
        raise ValueError(f"c is a schedule of positions, but {type(model).__name__} was called without input_ids or inputs_embeds (B, T)")
    size, T = tokens.shape[:2], tokens.shape[1]
    known = given.get(f"{side}position_ids")
    if isinstance(known, Tensor) and known.dim() == 2 and known.shape[1] == T:
        return known.expand(size)
    past = given.get("past_key_values")
    before = past.get_seq_length() if past is not None else 0
    mask = given.get(f"{side}attention_mask")
    if isinstance(mask, Tensor) and mask.shape == (size[0], before + T):
        return ((mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
    return torch.arange(before, before + T, device=tokens.device).expand(size)
