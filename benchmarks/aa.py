"""Can the measurement be trusted? The same thing against itself must give 1.00, and 5 % of added work must give 1.05."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.measure import Row, Setup, Spread, Step, ratio_row, time_rounds
from benchmarks.models import llama, tokens, tree

ADDED, OFF = 0.05, 0.01


def rows(setup: Setup) -> Iterator[Row]:
    model = llama(device=setup.device)
    for batch, length, rounds in ((1, 1, 80), (4, 256, 20)):
        ids = tokens(batch, length, setup.device)
        steps: dict[str, Step] = {name: partial(forward, net, ids) for name, net in {"base": model, "another tree": tree(model)}.items()}
        pause = ADDED * Spread.of(time_rounds({"base": steps["base"]}, setup, 8)["base"]).median
        steps["slowed"] = partial(slowed, steps["base"], pause, setup)
        seconds = time_rounds(steps, setup, rounds)
        shape = f"{batch}x{length}"
        yield ratio_row("aa", shape, seconds, "another tree", "base", at_most=1 + OFF, at_least=1 - OFF)
        yield ratio_row("aa", shape, seconds, "slowed", "base", at_most=1 + ADDED + OFF, at_least=1 + ADDED - OFF)


@torch.no_grad()
def forward(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids)


def slowed(step: Step, pause: float, setup: Setup) -> None:
    step()
    end = setup.now() + pause
    while setup.now() < end:
        pass
