"""Which collections of adapters do the subspace tests run on? Seeded families that share directions, with noise that they do not share."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import lora_lite as ll
from lora_lite.subspace import SharedSubspace
from tests.models import generator

MODULES = ("model.layers.0.q_proj", "model.layers.1.q_proj")


def family(
    n: int,
    d_in: int = 24,
    d_out: int = 20,
    r: int = 3,
    rank: int = 5,
    noise: float = 0.1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    config: ll.AdapterConfig | None = None,
    modules: tuple[str, ...] = MODULES,
) -> list[ll.Adapter]:
    """n adapters that share `rank` directions per side and module, and `noise` of their own beside them."""
    draw = generator(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    shared = {m: (normal(d_out, rank), normal(rank, d_in)) for m in modules}
    config = config or ll.LoRAConfig(r=r, alpha=2.0 * r)
    config = dataclasses.replace(config, dtype=dtype)
    made = []
    for _ in range(n):
        tensors = {}
        for m, (U, V) in shared.items():
            own = config.at(m, d_in, d_out).r  # type: ignore[attr-defined]
            B, A = U @ normal(rank, own) + noise * normal(d_out, own), normal(own, rank) @ V + noise * normal(own, d_in)
            tensors[m] = {"lora_A": (0.2 * A).to(dtype), "lora_B": (0.2 * B).to(dtype)}
        made.append(ll.Adapter(config, tensors, {m: (d_in, d_out) for m in modules}))
    return made


def of(adapters: list[ll.Adapter], **keywords) -> SharedSubspace:
    return SharedSubspace.from_adapters(adapters, **keywords)


def updates(adapter: ll.Adapter) -> dict[str, Tensor]:
    """Dense dW by module in float64: the independent formula the tests compare with."""
    found = {}
    for m, u in adapter.factors().items():
        g = u.g.detach().double() if isinstance(u.g, Tensor) else u.g
        found[m] = (u.B.detach().double() * g) @ u.A.detach().double()
    return found


def squared_error(given: ll.Adapter, kept: ll.Adapter) -> float:
    """|dW - kept dW|^2 over the given adapter's modules."""
    have = updates(kept)
    return sum(float((w - have[m]).square().sum()) for m, w in updates(given).items())


def relative_error(given: ll.Adapter, kept: ll.Adapter) -> float:
    return (squared_error(given, kept) / sum(float(w.square().sum()) for w in updates(given).values())) ** 0.5


def collection_error(adapters: list[ll.Adapter], sub: SharedSubspace) -> float:
    """Root of summed squared error over summed squared size."""
    lost = sum(squared_error(a, sub.reconstruct(t)) for a, t in zip(adapters, sub.tasks, strict=True))
    return (lost / sum(float(w.square().sum()) for a in adapters for w in updates(a).values())) ** 0.5


def snapshot(sub: SharedSubspace) -> list[tuple[str, tuple, bytes]]:
    """Every bit of a state, for telling whether a failed call left any trace."""
    from lora_lite.subspace.file import described, tensors

    state = sub.state
    bits = [(k, (tuple(v.shape), v.dtype), bytes(v.contiguous().flatten().view(torch.uint8).numpy())) for k, v in tensors(state).items()]
    return [*bits, (repr(described(state)), (), b"")]
