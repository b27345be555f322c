"""What does an adapter cost where arithmetic dominates: 4 rows of 256 tokens, without gradients?

Issue 2: attached at most 1.05x of the base (PEFT 1.14x). By operations alone the two small products are 1.05x of the linears.
Fresh memory is the rest: glibc hands pages back and asks for them again, 212 thousand page faults in a forward of the base, 264
with the adapter, 400 with PEFT. With MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised there are none.
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
