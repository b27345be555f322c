"""What would the base weight be with an adapter inside it? Computed without touching it; the layer is lent another Parameter.

No base tensor is ever written: the layer's own Parameter is set aside and put back, so restoring is exact by construction,
and a weight shared with another layer (tied embeddings) changes only here, as the hook does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lora_lite import compiled
from lora_lite.base import dense_weight, follow, refusal, transposed
from lora_lite.dial import check_float
from lora_lite.hooks import Hook, LowRankHook
from lora_lite.lowrank import LowRank


class Folded(NamedTuple):
    """A layer's weight and bias with an adapter folded in, in the layer's own layout and dtype."""

    weight: Parameter
    bias: Parameter | None


@torch.no_grad()
def folded(layer: nn.Module, hook: Hook, c: float) -> Folded:
    """The parameters with which the bare layer does what the hooked one does at c. Costs a pass of d_in rows, one layer at a time."""
    W, bias = dense_weight(layer), layer._parameters.get("bias")
    wide = torch.promote_types(W.dtype, torch.float32)
    b = None if bias is None else bias.to(wide)
    if isinstance(hook, LowRankHook) and not hook.variant.narrows:  # those round elsewhere than their factors do
        with precisely(W):
            A, B, g = hook.variant.factors(hook.cfg, hook.tensors(layer), hook.base.sizes)
            new_W, new_b = W.to(wide) + LowRank(A.to(wide), B.to(wide), c * g).dense(), b
    else:
        new_W, new_b = measured(layer, hook, c, W.to(wide), b)
    new_W = new_W.to(W.dtype)
    stored = new_W.T.contiguous() if transposed(layer) else new_W
    return Folded(_frozen(stored), None if new_b is None or bias is None else _frozen(new_b.to(bias.dtype)))


def measured(layer: nn.Module, hook: Hook, c: float, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Every method here is affine in x at a fixed c, so its effect on the unit vectors and on zero is all of it."""
    d_in = W.shape[1]
    x = torch.cat([torch.eye(d_in, dtype=W.dtype, device=W.device), W.new_zeros(1, d_in)])
    training, hook.dial.training = hook.dial.training, False  # no dropout in what is folded
    try:
        with precisely(W):
            if hook.site == "input":
                out = F.linear(hook.apply(layer, x, None, c), W, b)
            else:
                out = hook.apply(layer, x, F.linear(x, W, b), c)
    finally:
        hook.dial.training = training
    return (out[:-1] - out[-1]).T.contiguous(), None if b is None else out[-1]


def precisely(like: Tensor) -> AbstractContextManager[Any]:
    """Without autocast: an update outlives the block it was made in (14 % of it was lost, measured for HiRA in bfloat16)."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()  # entering one takes 20 us


def _frozen(tensor: Tensor) -> Parameter:
    return Parameter(tensor, requires_grad=False)


class Merged:
    """An adapter inside the weights of its layers, and what it takes to get it out again."""

    def __init__(self, places: Mapping[str, tuple[nn.Module, Hook]], others: Sequence[Hook], c: float) -> None:
        """Computes every weight first: on any error nothing has changed."""
        if isinstance(c, Tensor) and c.numel() != 1:
            raise TypeError(f"a weight holds one c; got one per row, shape {tuple(c.shape)}")
        if refused := [r for path, (layer, _) in places.items() if (r := refusal(path, layer, reads_weight=True))]:
            raise TypeError(f"{len(refused)} layers cannot be merged into: " + "; ".join(refused[:3]))
        self.c, self.places = check_float(c), places
        hooks = [hook for _, hook in places.values()]
        refuse_company(hooks, [other for other in others if other.path in places])
        self._lent = {path: folded(layer, hook, self.c) for path, (layer, hook) in places.items()}

    def swap_in(self) -> None:
        for path, (layer, hook) in self.places.items():
            hook.suspend(layer)
            self._lent[path] = swap(layer, self._lent[path])
        compiled.notice_hooks()

    def swap_out(self, tensors: Mapping[str, Mapping[str, Parameter]]) -> None:
        for path, (layer, hook) in self.places.items():
            lent = swap(layer, self._lent[path])
            for mine, theirs in zip(self._lent[path], lent, strict=True):
                if mine is not None and theirs is not None:
                    follow(mine, theirs)
            for p in tensors[path].values():
                follow(p, lent.weight, dtype=False)
            hook.resume(layer, tensors[path])
        compiled.notice_hooks()


def refuse_company(hooks: Sequence[Hook], others: Sequence[Hook]) -> None:
    """Low-rank updates add up in any order; anything else acts on what the others made, so merging one would change it."""
    company = sorted({hook.shared.name for hook in others})
    if company and not all(hook.additive for hook in (*hooks, *others)):
        raise RuntimeError(
            f"{hooks[0].shared.name!r} and {company} do not simply add up at the layers they share; detach {company} before merging"
        )


def swap(layer: nn.Module, new: Folded) -> Folded:
    """Lend the layer these parameters; returns its own, to be put back with the same call."""
    old = Folded(layer._parameters["weight"], layer._parameters.get("bias"))  # type: ignore[arg-type]
    layer._parameters["weight"] = new.weight
    if new.bias is not None:
        layer._parameters["bias"] = new.bias
    return old
