"""What does an adapter cost where arithmetic dominates: 4 rows of 256 tokens, without gradients?

Issue 2: attached at most 1.05x of the base (PEFT 1.14x). The sum is written into the base's output where nobody else can hold it, so
what is left are the two small products: 4.5% of the forward by their operations at the speed of the base's own, 6% as measured inside it,
where x and y come from further away than the processor's second cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.decode import forward
from benchmarks.measure import Row, Setup, ratio_row, time_rounds
from benchmarks.models import check_same, llama, ours, theirs, tokens

BATCH, LENGTH = 4, 256


def rows(setup: Setup) -> Iterator[Row]:
    model = llama(device=setup.device)
    attached, adapter = ours(model)
    models = {"base": model, "attached": attached, "PEFT": theirs(model, like=adapter)}
    check_same(attached, models["PEFT"], tokens(2, 8, setup.device), 1e-4)
    ids = tokens(BATCH, LENGTH, setup.device)
    seconds = time_rounds({name: partial(forward, net, ids) for name, net in models.items()}, setup, rounds=20, warmup=2)
    shape = f"{BATCH}x{LENGTH}"
    yield ratio_row("prefill", shape, seconds, "attached", "base", 1.05)
    yield ratio_row("prefill", shape, seconds, "attached", "PEFT")
    yield ratio_row("prefill", shape, seconds, "PEFT", "base")
