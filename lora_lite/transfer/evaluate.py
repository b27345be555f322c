"""How much of what the adapter did for the source does it do for the target? Beside what costs nothing, what is random, and a ceiling."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.attachment import unwrapped
from lora_lite.running import called, moved, undisturbed
from lora_lite.transfer.batches import Batches, paired

Loss = Callable[[Tensor, Any], Tensor | float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Losses (lower is better), and gains as shares. `print` shows both.

    gain_kept   (target - moved) / (source - source with its adapter): of what the adapter gained on its own model
    recovery    (target - moved) / (target - target with its own adapter), where one was given
    arithmetic  target's logits + (source with adapter - source)'s: needs both models at each step, and one vocabulary (else None)
    random      a LoRA of the moved one's singular values on random directions
    note        why a share is None: there is none of a gain that is not there
    """

    source: float
    source_adapted: float
    target: float
    moved: float
    random: float
    arithmetic: float | None
    own: float | None = None

    @property
    def gain_kept(self) -> float | None:
        return self.of_source(self.moved)

    @property
    def recovery(self) -> float | None:
        return None if self.own is None else share(self.target - self.moved, self.target, self.own)

    def of_source(self, loss: float | None) -> float | None:
        """The gain at this loss on the target, as a share of the source's; None where the adapter gained nothing there."""
        return None if loss is None else share(self.target - loss, self.source, self.source_adapted)

    @property
    def note(self) -> str | None:
        found = []
        if not gained(self.source, self.source_adapted):
            found.append(f"the adapter gains nothing on its own model with these batches (loss {self.source:.4f}, with it "
                         f"{self.source_adapted:.4f}), so there is no gain to keep")  # fmt: skip
        if self.own is not None and not gained(self.target, self.own):
            found.append(f"the target's own adapter gains nothing with these batches (loss {self.target:.4f}, with it {self.own:.4f})")
        return "; ".join(found) + ": give batches, or a loss, of what it was trained for" if found else None

    def to_dict(self) -> dict[str, float | str | None]:
        return asdict(self) | {"gain_kept": self.gain_kept, "recovery": self.recovery, "note": self.note}

    def __repr__(self) -> str:
        rows = {"target, unadapted": self.target, "random LoRA": self.random, "moved": self.moved, "logit arithmetic": self.arithmetic}
        told = [f"source {self.source:.4f}, with its adapter {self.source_adapted:.4f}", f"{'':18} {'loss':>8} {'gain kept':>9}"]
        told += [f"{name:18} {loss:8.4f} {percent(self.of_source(loss)):>9}" for name, loss in rows.items() if loss is not None]
        if self.own is not None:
            told.append(f"of the target's own adapter ({self.own:.4f}): {percent(self.recovery)}")
        return "\n".join([*told, *([self.note] if self.note else [])])


ROUNDING = 1e-6  # of a loss: means of float32 logits differ by that much for no reason


def gained(before: float, after: float) -> bool:
    return before - after > ROUNDING * abs(before)


def share(part: float, before: float, after: float) -> float | None:
    """`part` of the gain from `before` to `after`; None where it is no gain: a share of a loss would be praise for doing harm."""
    return part / (before - after) if gained(before, after) else None


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def evaluate_transfer(
    source_model: nn.Module,
    target_model: nn.Module,
    adapter: Adapter,
    transferred: Adapter,
    batches: Batches,
    loss: Loss | None = None,
    *,
    target_batches: Batches | None = None,
    own: Adapter | None = None,
    seed: int = 0,
) -> Evaluation:
    """What a transfer kept, on batches it has not seen. `print(ll.evaluate_transfer(source, target, adapter, result.adapter, batches))`

    loss  (logits, batch) -> a number, lower is better; next-token cross entropy in nats unless given (`labels` where the batch has
          them, else `input_ids` without padding). The mean over batches, each of one weight
    own   an adapter trained on the target itself: the ceiling
    seed  of the random LoRA

    Both models come back as they were. Seven forwards a batch at most. Raises ValueError as transfer_adapter for batches.
    """
    source, target = unwrapped(source_model), unwrapped(target_model)
    pairs, measure = paired(source, target, batches, target_batches), loss or next_token
    noise = random_like(transferred, seed)
    sums: dict[str, float] = {}
    arithmetic = True
    with undisturbed(source), undisturbed(target):
        for theirs, ours in pairs:
            s, a = logits(source, theirs, off=(adapter,)), logits(source, theirs, adapter)
            off = [x for x in (transferred, own) if x is not None]
            t = logits(target, ours, off=off)
            seen = {"source": (s, theirs), "source_adapted": (a, theirs), "target": (t, ours)}
            for name, other in (("moved", transferred), ("random", noise), ("own", own)):
                if other is not None:
                    seen[name] = (logits(target, ours, other, [x for x in off if x is not other]), ours)
            arithmetic = arithmetic and s.shape == t.shape
            if arithmetic:
                seen["arithmetic"] = (t + (a - s).to(t), ours)
            for name, (found, batch) in seen.items():
                sums[name] = sums.get(name, 0.0) + float(measure(found, batch))
    means = {name: total / len(pairs) for name, total in sums.items()}
    return Evaluation(**{"own": None, **means, "arithmetic": means.get("arithmetic") if arithmetic else None})


def logits(model: nn.Module, batch: Any, on: Adapter | None = None, off: Sequence[Adapter] = ()) -> Float[Tensor, "*batch v"]:
    """The model's logits with one adapter at c = 1, and with those of `off` that are attached at 0."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with ExitStack() as state:
        for adapter in off:
            state.enter_context(silent(adapter))
        if on is not None:
            state.enter_context(on(model))
        out = called(model, moved(batch, device))
    found = out if isinstance(out, Tensor) else out["logits"] if isinstance(out, Mapping) else out[0]
    return found


def silent(adapter: Adapter) -> AbstractContextManager[Any]:
    return adapter(c=0.0) if adapter.attached else nullcontext()


def next_token(found: Float[Tensor, "n t v"], batch: Any) -> Tensor:
    """Cross entropy of each next token, in nats."""
    ids = batch.get("labels", batch.get("input_ids")) if isinstance(batch, Mapping) else batch if isinstance(batch, Tensor) else batch[0]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or found.dim() != 3:
        raise ValueError(f"logits {tuple(found.shape)} and a batch without 2-D ids (labels or input_ids): give a loss of your own")
    ids = ids.to(found.device)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None:
        ids = ids.masked_fill(mask.to(ids.device) == 0, -100)
    return F.cross_entropy(found[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def random_like(adapter: Adapter, seed: int) -> Adapter:
    """A detached copy whose singular vectors are random orthonormal ones; singular values, and so |B A|, are kept."""
    twin = copy.deepcopy(adapter)
    draw = torch.Generator().manual_seed(seed)
    for target, update in adapter.factors().items():
        fields = twin.tensors()[target]
        S = update.svd()[1].float().cpu() / abs(float(update.g) or 1.0)
        A, B = (torch.linalg.qr(torch.randn(d, len(S), generator=draw))[0] for d in (update.A.shape[1], update.B.shape[0]))
        k = len(S)
        fields["lora_A"].zero_()[:k].copy_(A.T * S.sqrt()[:, None])
        fields["lora_B"].zero_()[:, :k].copy_(B * S.sqrt())
    return twin
