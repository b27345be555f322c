"""What does a layer become on fewer directions or in other numbers, and what does each task lose by it?"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lora_lite.subspace.coefficients import Kind, Parts, as_cores
from lora_lite.subspace.frame import Frame
from lora_lite.subspace.packed import Sized, wide
from lora_lite.subspace.reserve import kept_back
from lora_lite.subspace.state import Layer


def leading(kind: Kind, parts: Parts, kb: int, ka: int) -> Parts:
    """Coefficients of an orthonormal basis are nested: on its first directions they are cut, not fitted again."""
    if kind == "core":
        return (parts[0][:, :kb, :ka].contiguous(),)
    if kind == "diag":
        return (parts[0][:, : min(kb, ka)].contiguous(),)
    return parts[0][:, :kb].contiguous(), parts[1][:, :ka].contiguous()


def split(kind: Kind, layer: Layer, kb: int, ka: int, size: Tensor | None = None, fresh: bool = False, reserve: bool = True) -> Layer:
    """The layer on its leading directions, the next ones in reserve or gone; `size` is what the tasks measure now, where it is known.

    Of fresh coefficients, just fitted, what is cut off and what was lost are at right angles. Later they need not be."""
    if (kb, ka) == (layer.b.k, layer.a.k):
        return layer
    parts = layer.all_parts()
    kept = leading(kind, parts, kb, ka)
    gone = ((layer.measure(kind, parts) if size is None else size) - layer.measure(kind, kept)).clamp(min=0)
    lost = layer.lost.double() + gone if fresh else further(layer.lost, gone)
    behind = kept_back(kind, layer.b, layer.a, parts, layer.lost.double(), gone, kb, ka) if reserve else None
    return dataclasses.replace(layer, b=layer.b.cut(kb), a=layer.a.cut(ka), parts=kept, lost=lost.float(), reserve=behind)


def further(lost: Sized, off: Tensor) -> Tensor:
    """A bound on squared errors when each task's update moves by so much more, in whatever direction."""
    return torch.where(off > 0, (lost.double().clamp(min=0).sqrt() + off.to(lost.device).sqrt()).square(), lost.double())


def rounded(kind: Kind, old: Layer, new: Layer) -> Layer:
    """The new form of a layer, with what the rounding took from each task among what is lost."""
    return dataclasses.replace(new, lost=further(old.lost, distances(kind, old, new)).float())


def distances(kind: Kind, old: Layer, new: Layer) -> Tensor:
    """(n,) squared distances between what two forms of a layer make of its tasks."""
    if kind == "flat":
        return sum((flat_rows(o, p) - flat_rows(f, q)).square().sum(1) for o, p, f, q in zip(
            (old.b, old.a), old.all_parts(), (new.b, new.a), new.all_parts(), strict=True))  # type: ignore[return-value]  # fmt: skip
    C, D = as_cores(kind, old.meant(kind), old.ranks), as_cores(kind, new.meant(kind), new.ranks)
    kb, ka = C.shape[1:]
    across = [(wide(o.components) @ wide(n.components).T)[:k, :k] for o, n, k in ((old.b, new.b, kb), (old.a, new.a, ka))]
    own = [(frame.metric[:k, :k]) for frame, k in ((old.b, kb), (old.a, ka), (new.b, kb), (new.a, ka))]
    inner = (C * (own[0] @ C @ own[1])).sum((1, 2)) + (D * (own[2] @ D @ own[3])).sum((1, 2))
    return ((inner - 2 * (C * (across[0] @ D @ across[1].T)).sum((1, 2))) * old.weights()).clamp(min=0)


def flat_rows(frame: Frame, loadings: Tensor) -> Tensor:
    mean = frame.centre()
    assert mean is not None
    return mean.double() + loadings.double() @ frame.basis().double()
