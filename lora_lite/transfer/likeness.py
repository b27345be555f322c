"""Which block of one model is most like which block of the other? Linear CKA of their residual streams, arXiv:1905.00414."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.transfer.alignment import wide
from lora_lite.transfer.listening import Listener, Site
from lora_lite.transfer.parts import Anatomy, by_likeness

TOKENS = 512  # their n x n products are compared


class Streams:
    """The stream at the start of each block, for the first tokens."""

    def __init__(self) -> None:
        self.n = 0
        self.rows: tuple[dict[Site, list[Tensor]], dict[Site, list[Tensor]]] = ({}, {})

    def add(self, xs: Mapping[Site, Tensor], xt: Mapping[Site, Tensor]) -> None:
        room = TOKENS - self.n
        counts = {len(x) for x in (*xs.values(), *xt.values())}
        if len(counts) > 1:
            raise ValueError(f"layer_map='cka': the models saw {sorted(counts)} tokens of one pair of batches; both must see the same")
        for kept, seen in zip(self.rows, (xs, xt), strict=True):
            for site, x in seen.items():
                kept.setdefault(site, []).append(wide(x[: max(room, 0)]).cpu())
        self.n += min(max(room, 0), counts.pop())


def block_map(source: Anatomy, target: Anatomy, listen: Callable[[Listener, Listener, Streams], None]) -> dict[int, int]:
    """Source block -> target block, never going back up; `listen` runs both models into the streams.

    Raises ValueError where the models have several stacks.
    """
    stacks = [list(a.blocks) for a in (source, target)]
    if any(len(s) != 1 for s in stacks):
        raise ValueError(f"layer_map='cka' compares two stacks of blocks; here are {stacks[0]} and {stacks[1]}. Give a dict")
    streams, sites = Streams(), (entries(source), entries(target))
    listen(Listener(source, sites[0], "source"), Listener(target, sites[1], "target"), streams)
    ours, theirs = ([centred(torch.cat(kept[site])) for site in order] for kept, order in zip(streams.rows, sites, strict=True))
    return by_likeness(torch.tensor([[cka(a, b) for b in theirs] for a in ours]))


def entries(anatomy: Anatomy) -> list[Site]:
    stack, blocks = next(iter(anatomy.blocks.items()))
    return [Site(f"{stack}.{i}" if stack else str(i), "block") for i in range(blocks)]


def centred(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    x = x - x.mean(0)
    return x @ x.T


def cka(K: Float[Tensor, "n n"], L: Float[Tensor, "n n"]) -> float:
    size = float(K.norm() * L.norm())
    return float((K * L).sum()) / size if size else 0.0
