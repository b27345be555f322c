"""What do the targets see when the model runs on some data? Streams their inputs to observers, and keeps none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_lite.calibration.forms import Watched, activations, as_batches, by_group, is_batch, some
from lora_lite.calibration.padding import Padding
from lora_lite.running import called, moved, undisturbed
from lora_lite.variant import Observer


def stream(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    widths: Mapping[str, int],
    observers: dict[str, Observer],
    data: Any,
    *,
    progress: bool = True,
    shared: bool = False,
) -> None:
    """Feed every target's inputs to its observer: `update(x (n, d_in), group)`, group "cho" or "rej", or "all" without poles.

    data  target -> activations (N, d_in); target -> {"cho": X, "rej": X}; an iterable of batches (tensor, dict, tuple), or one
          batch; {"cho": batches, "rej": batches}. Padding is left out by `attention_mask`; where no mask fits, all tokens count

    shared  targets that the first batch shows to read one and the same tensor are given one observer, in `observers` too

    Batches run through the model as it is (other adapters too) in eval mode, without gradients and uncompiled; flags, hooks
    and the random state return as they were, also after an exception. Memory does not grow with the data.
    Raises ValueError for data that does not fit, naming targets; RuntimeError naming targets that no batch ever reached.
    """
    watched = {name: Watched(name, layer, widths[name], observers[name]) for name, layer in layers.items()}
    given, batches = [], {}
    for group, part in by_group(data).items():
        if isinstance(part, Mapping) and not is_batch(part, model, watched):
            given += activations(part, group, watched)
        else:
            batches[group] = as_batches(part)
    twins = Twins(shared)
    for target, group, x in tqdm(given, desc="calibrating", unit="tensor", delay=2, disable=not progress):
        if twins.leader(target.name, x) == target.name:
            target.feed(x, group)
    if batches:
        run(model, watched, batches, progress, twins)
    observers.update({name: observers[leader] for name, leader in twins.leaders.items()})


class Twins:
    """Which targets read one and the same tensor, as the first batch shows: q, k and v of a block do."""

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.leaders = wanted, dict[str, str]()
        self._seen: list[tuple[Tensor, str]] = []  # held, so that no other tensor takes its place in memory meanwhile

    def leader(self, name: str, x: Tensor) -> str:
        """The target whose observer is fed for this one: the first that read this tensor, or itself."""
        if self.wanted and name not in self.leaders:
            self.leaders[name] = next((first for seen, first in self._seen if seen is x), name)
            self._seen.append((x, name))
        return self.leaders.get(name, name)

    def settle(self) -> None:
        self._seen.clear()


def run(model: nn.Module, watched: Mapping[str, Watched], parts: Mapping[str, Iterable[Any]], progress: bool, twins: Twins) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    listening = Pass(model, twins)
    with undisturbed(model), ExitStack() as hooks:
        listening.install(watched.values(), hooks)
        for group, batches in parts.items():
            where, count = "" if group == "all" else f" {group!r}", 0
            for batch in tqdm(batches, desc=f"calibrating{where}", unit="batch", delay=2, disable=not progress):
                listening.to(group, moved(batch, device), f"in calibration batch{where} {count}")
                twins.settle()
                count += 1
            if not count:
                raise ValueError(f"calibration data{where} holds no batches (a generator can be read only once)")
    if silent := [name for name in watched if name not in listening.reached]:
        raise RuntimeError(
            f"{len(silent)} of {len(watched)} targets were never called while the model ran on the calibration data, so an adapter "
            f"there would see nothing: {some(silent)}. Add them to `exclude`, or give batches that reach them"
        )


class Pass:
    """The temporary hooks of one run over the data: what reaches a target goes to its observer, padding left out."""

    def __init__(self, model: nn.Module, twins: Twins) -> None:
        self.model, self.padding, self.twins = model, Padding(model), twins
        self.group, self.reached = "all", set[str]()

    def install(self, targets: Iterable[Watched], hooks: ExitStack) -> None:
        for target in targets:
            hooks.callback(target.layer.register_forward_pre_hook(self.listener(target), with_kwargs=True).remove)
        self.padding.watch(hooks)

    def listener(self, target: Watched) -> Callable[..., None]:
        def listen(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and self.twins.leader(target.name, x) != target.name:
                self.reached.add(target.name)
                return
            kept = self.padding.without(layer, x) if isinstance(x, Tensor) else x  # before the check: padding may well be NaN
            if problem := target.problem(kept):
                raise ValueError(problem)
            self.reached.add(target.name)
            target.feed(kept, self.group)  # type: ignore[arg-type]

        return listen

    def to(self, group: str, batch: Any, where: str) -> None:
        """Run one batch. Whatever is raised gets a note of where in the data it was."""
        self.group = group
        try:
            with self.padding.of(batch):
                called(self.model, batch)
        except Exception as error:
            error.add_note(where)
            raise
