"""Which form does calibration data have, and does it fit the targets? Activations, batches, and either by pole."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lite.variant import Observer

POLES = ("cho", "rej")
FORMS = (
    'target -> activations (N, d_in); target -> {"cho": activations, "rej": activations}; '
    'an iterable of batches, each a tensor, a dict or a tuple; or {"cho": batches, "rej": batches}'
)
ROWS = 4096  # tokens an observer takes at once: it may widen them to float64, whatever the batch


class Watched(NamedTuple):
    """One target: where its input is seen, how wide it should be, who wants it."""

    name: str
    layer: nn.Module
    width: int
    observer: Observer

    def problem(self, x: Any) -> str | None:
        """What keeps x (*batch, d_in) from being this target's input, or None."""
        expected = f"expected a floating tensor (..., {self.width}), this layer's input"
        if not isinstance(x, Tensor):
            found = f"a mapping of {list(x)}" if isinstance(x, Mapping) else type(x).__name__
            return f"{self.name}: found {found}, {expected}"
        if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] != self.width:
            return f"{self.name}: found {x.dtype} {tuple(x.shape)}, {expected}"
        if not bool(torch.isfinite(x).all()):
            return f"{self.name}: {int((~torch.isfinite(x)).sum())} of {x.numel()} values are NaN or infinite, {expected} of finite ones"
        return None

    def feed(self, x: Float[Tensor, "n d_in"], group: str) -> None:
        device = next((p.device for p in self.layer.parameters()), x.device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # statistics keep their own precision
            for start in range(0, len(x), ROWS):
                self.observer.update(x[start : start + ROWS].to(device), group)


def by_group(data: Any) -> dict[str, Any]:
    """The data of each pole, or all of it under "all"."""
    if isinstance(data, Mapping) and data and set(data) <= set(POLES):
        return dict(data)
    return {"all": data}


def is_batch(part: Mapping[Any, Any], model: nn.Module, watched: Mapping[str, Watched]) -> bool:
    """Whether a mapping is one batch: its keys are arguments of the model, none is a target."""
    if not part or any(key in watched for key in part):
        return False
    return "input_ids" in part or set(part) <= set(inspect.signature(model.forward).parameters)


def as_batches(part: Any) -> Iterable[Any]:
    if isinstance(part, Mapping | Tensor):
        return [part]
    if isinstance(part, str | bytes) or not isinstance(part, Iterable):
        raise ValueError(f"calibration data is {type(part).__name__}; it can be {FORMS}")
    if isinstance(part, list | tuple) and not part:
        raise ValueError(f"calibration data is an empty {type(part).__name__}; it can be {FORMS}")
    return part


def activations(part: Mapping[Any, Any], group: str, watched: Mapping[str, Watched]) -> list[tuple[Watched, str, Tensor]]:
    """(target, group, tensor) of a mapping from targets, all of it checked. Raises ValueError listing what does not fit."""
    found, problems = [], misnamed(part, watched)
    for target in (watched[name] for name in watched if name in part):
        for pole, x in (by_group(part[target.name]) if group == "all" else {group: part[target.name]}).items():
            problem = target.problem(x)
            if problem is None and (x.ndim != 2 or not len(x)):
                problem = f"{target.name}: found {tuple(x.shape)}, expected (N, {target.width}), one row per token, at least one"
            problems += [] if problem is None else [problem + ("" if pole == "all" else f" (in {pole!r})")]
            found.append((target, pole, x))
    if problems:
        raise ValueError("calibration data does not fit the targets:\n  " + some(problems, "\n  "))
    return found


def misnamed(part: Mapping[Any, Any], watched: Mapping[str, Watched]) -> list[str]:
    """Targets without activations, and keys without a target."""
    problems = []
    if missing := [name for name in watched if name not in part]:
        problems.append(f"{len(missing)} of {len(watched)} targets have no activations: {some(missing)}")
    if unknown := [str(key) for key in part if key not in watched]:
        near = difflib.get_close_matches(unknown[0], watched, n=3, cutoff=0.0)
        problems.append(
            f"{some(unknown)}: neither targets nor arguments of the model; targets near the first: {some(near)}; the data can be {FORMS}"
        )
    return problems


def some(names: Sequence[str], between: str = ", ", at_most: int = 8) -> str:
    rest = len(names) - at_most
    return between.join([*names[:at_most], *([f"... and {rest} more"] if rest > 0 else [])])
