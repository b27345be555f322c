"""What is an adapter's effect as plain LoRA factors: exactly where it is of low rank, else as near as a rank allows?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lite import merge
from lora_lite.adapter import Adapter
from lora_lite.attachment import all_hooks
from lora_lite.base import dense_weight
from lora_lite.hooks import Hook
from lora_lite.lowrank import LowRank
from lora_lite.variant import Base

RANK = 16  # of an approximation, where neither the caller nor the config gives one


class Plain(NamedTuple):
    """One layer's update B A, everything folded in, and how far from the adapter's own it is, relative to it."""

    A: Float[Tensor, "r d_in"]
    B: Float[Tensor, "d_out r"]
    error: float


def plain_updates(adapter: Adapter, c: float, approximate: bool, r: int | None, why: str | None) -> dict[str, Plain]:
    """Every layer's update at c, of one rank: the given one, or the largest. Raises ValueError where that would not be exact.

    why  it is to be a plain LoRA, if not because somebody asked for one
    """
    with merge.precisely(next(iter(adapter.state_dict().values()))):
        given = exact_updates(adapter, c)
    if given is None and not approximate:
        raise ValueError(
            f"{f'{why}, and ' if why else ''}variant {adapter.variant.name!r} is no low-rank update, so no plain LoRA does exactly what it "
            "does; approximate=True writes the nearest of rank r and returns the error of each layer"
        )
    rank = r or (max(u.r for u in given.values()) if given is not None else getattr(adapter.config, "r", RANK))
    if given is None:
        return {t: nearest(*dense_change(layer, hook, c), rank) for t, (layer, hook) in places(adapter).items()}
    if too_high := {t: u.r for t, u in given.items() if u.r > rank and not approximate}:
        t, have = next(iter(too_high.items()))
        raise ValueError(f"asked for r={rank}; {len(too_high)} layers have more, as {t} with {have}: approximate=True cuts them down")
    return {t: padded(u, rank) if u.r <= rank else cut(u, rank) for t, u in given.items()}


def exact_updates(adapter: Adapter, c: float) -> dict[str, LowRank] | None:
    variant = adapter.variant
    if variant.form == "low-rank" or variant.exact_low_rank == "by itself":
        return {t: precise(u) for t, u in adapter.factors(c).items()}
    if variant.exact_low_rank == "no":
        return None
    found = {}
    for t, (layer, hook) in places(adapter).items():
        base = Base(hook.base.sizes.d_in, hook.base.sizes.d_out, dense_weight(layer).detach())
        p = {field: v.detach() for field, v in hook.tensors(layer).items()}
        found[t] = precise(variant.low_rank_at(hook.cfg, p, base, c))
    return found


def places(adapter: Adapter) -> dict[str, tuple[nn.Module, Hook]]:
    """The adapter's layers and hooks. Raises RuntimeError where it acts on no model by its hooks."""
    model = adapter.model
    found = {} if model is None else {path: (layer, hook) for path, layer, hook in all_hooks(model) if hook.shared.name == adapter.name}
    if not found:
        raise RuntimeError(
            f"what {adapter.variant.name!r} does as a matrix depends on the base weight: attach {adapter.name!r} first (and unmerge it)"
        )
    return {t: found[t] for t in adapter.targets}


def precise(u: LowRank) -> LowRank:
    """Folded in float64, so that each number is rounded once."""
    g = u.g.detach().double() if isinstance(u.g, Tensor) else u.g
    return LowRank(u.A.detach(), u.B.detach().double(), g).folded()


def stored(A: Tensor, B: Tensor, error: float = 0.0) -> Plain:
    return Plain(A.to(torch.float32).contiguous(), B.to(torch.float32).contiguous(), error)


def padded(u: LowRank, r: int) -> Plain:
    more = r - u.r
    return stored(torch.nn.functional.pad(u.A, (0, 0, 0, more)), torch.nn.functional.pad(u.B, (0, more)))


def cut(u: LowRank, r: int) -> Plain:
    u = LowRank(u.A.double(), u.B)
    S = u.svd()[1]
    near = u.truncated(r)
    return padded_near(near.A, near.B, r, relative(S, r))


@torch.no_grad()
def dense_change(layer: nn.Module, hook: Hook, c: float) -> tuple[Tensor, Tensor | None]:
    """By how much the adapter changes this layer's weight and bias at c, in float32 at least."""
    W, bias = dense_weight(layer).detach(), layer._parameters.get("bias")
    wide = torch.promote_types(W.dtype, torch.float32)
    W, b = W.to(wide), None if bias is None else bias.detach().to(wide)
    new_W, new_b = merge.measured(layer, hook, c, W, b)
    return new_W - W, None if new_b is None or b is None else new_b - b


def nearest(dW: Tensor, db: Tensor | None, r: int) -> Plain:
    """The best rank-r B A; a change of the bias, which a plain LoRA cannot carry, counts as error beside what is cut off."""
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    root = S[:r].sqrt()
    lost = relative(S, r, 0.0 if db is None else float(db.norm()))
    return padded_near(root[:, None] * Vh[:r], U[:, :r] * root, r, lost)


def padded_near(A: Tensor, B: Tensor, r: int, error: float) -> Plain:
    """A layer smaller than r has fewer directions than that."""
    return padded(LowRank(A, B), r)._replace(error=error)


def relative(S: Tensor, r: int, beside: float = 0.0) -> float:
    """How much of an update with singular values S is beyond rank r, or is `beside` it altogether."""
    S = S.double()
    whole = float(S.square().sum()) + beside**2
    return ((float(S[r:].square().sum()) + beside**2) / whole) ** 0.5 if whole else 0.0


def errors(updates: Mapping[str, Plain]) -> dict[str, float]:
    return {t: u.error for t, u in updates.items()}
