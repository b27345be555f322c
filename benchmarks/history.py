"""What do eight kept adapters cost at once: one token through 24 layers, 168 linears with 8 x r=16 on each?

Issue 3: at most 1.45x of the base and 0.55x of PEFT's eight active adapters. For comparison: a shut gate, doses that differ by
row, and the same eight as hooks of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from peft import LoraConfig, PeftModel

import lora_lite as ll
from benchmarks.decode import forward
from benchmarks.measure import Row, Setup, ratio_row, time_rounds
from benchmarks.models import ALPHA, R, check_same, llama, theirs, tokens, tree
from lora_lite.dial import Block

N = 8
BOUNDS = {
    ("history", "base"): 1.45,
    ("history", "PEFT"): 0.55,
    ("gate shut", "base"): 1.03,
    ("doses by row", "base"): None,
    ("own hooks", "base"): None,
    ("PEFT", "base"): None,
}


def rows(setup: Setup) -> Iterator[Row]:
    base = llama(device=setup.device)
    kept = [kept_adapter(base, i) for i in range(N)]
    pairs = [(adapter, 0.2 + 0.1 * i) for i, adapter in enumerate(kept)]
    together, shut, apart = tree(base), tree(base), tree(base)
    history = ll.HistoryBake(together, pairs)
    ll.HistoryBake(shut, pairs, gate=lambda: False)
    peft = eight_of_theirs(base, pairs)
    for adapter, c in pairs:
        ll.attach(apart, adapter, c=c)
    ids = tokens(2, 8, setup.device)
    check_same(together, apart, ids, 1e-4)
    check_same(together, peft, ids, 1e-4)
    check_same(shut, base, ids, 0.0)
    models = {"base": base, "history": together, "gate shut": shut, "own hooks": apart, "PEFT": peft}
    for batch in (1, 4):
        ids = tokens(batch, 1, setup.device)
        spread = Block(history._baked.dial, tuple(c * torch.linspace(0.5, 1.5, batch, device=setup.device) for _, c in pairs))

        def by_row(ids: torch.Tensor = ids, spread: Block = spread) -> None:
            with spread:
                forward(together, ids)

        steps = {name: partial(forward, model, ids) for name, model in models.items()} | {"doses by row": by_row}
        seconds = time_rounds(steps, setup, rounds=40)
        for (name, peer), bound in BOUNDS.items():
            yield ratio_row("history", f"{batch}x1", seconds, name, peer, bound if batch == 1 or peer != "PEFT" else None)


def kept_adapter(base: torch.nn.Module, i: int) -> ll.Adapter:
    """A detached adapter whose updates are not zero."""
    adapter = ll.attach(base, ll.LoRAConfig(r=R, alpha=ALPHA), name=f"kept{i}", seed=i)
    generator = torch.Generator().manual_seed(100 + i)
    with torch.no_grad():
        for fields in adapter.tensors().values():
            fields["lora_B"].copy_(torch.randn(fields["lora_B"].shape, generator=generator) * 0.003)
    adapter.detach()
    return adapter


@torch.no_grad()
def eight_of_theirs(base: torch.nn.Module, pairs: list[tuple[ll.Adapter, float]]) -> PeftModel:
    """The same adapters in PEFT's hands, all active, doses inside their B."""
    wrapped = theirs(base)  # type: ignore[arg-type]
    names = [adapter.name for adapter, _ in pairs]
    for name in names:
        wrapped.add_adapter(name, LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear"))
    layers = {name.removeprefix("base_model.model."): layer for name, layer in wrapped.named_modules() if hasattr(layer, "lora_A")}
    for adapter, c in pairs:
        for target, fields in adapter.tensors().items():
            layers[target].lora_A[adapter.name].weight.copy_(fields["lora_A"])  # type: ignore[index, union-attr]
            layers[target].lora_B[adapter.name].weight.copy_(fields["lora_B"] * c)  # type: ignore[index, union-attr]
    wrapped.base_model.set_adapter(names)  # type: ignore[operator]
    return wrapped.eval()  # type: ignore[return-value]
