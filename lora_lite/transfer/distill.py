"""What if the maps are not enough? A few steps without labels, toward what the source does with its adapter."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from lora_lite.attachment import unwrapped
from lora_lite.running import undisturbed
from lora_lite.transfer.batches import Batches, paired
from lora_lite.transfer.evaluate import logits
from lora_lite.transfer.result import TransferResult

TEACHERS = ("arithmetic", "source")


def distill_transfer(
    result: TransferResult,
    source_model: nn.Module,
    target_model: nn.Module,
    batches: Batches,
    steps: int = 40,
    *,
    target_batches: Batches | None = None,
    lr: float = 3e-3,
    teacher: str = "arithmetic",
    progress: bool = True,
) -> TransferResult:
    """A few label-free steps from the transferred start. `better = ll.distill_transfer(result, source, target, batches, steps=40)`

    batches  any text, best of the adapter's kind; used in turn, and again from the start where there are fewer than steps
    lr       of Adam, falling to zero
    teacher  "arithmetic": the target's own logits plus what the adapter changes in the source's; "source": the source with its
             adapter, which a target that is the better model would unlearn from

    Both need one vocabulary. The loss is KL(teacher || target) per token, padding left out. Returns a new result: its adapter is
    trained, its report is the transfer's, `distilled` holds the loss of each step. Models and the given result stay as they were.
    Raises ValueError for steps below 1, an unknown teacher, two vocabularies; RuntimeError where result.adapter is attached.
    """
    source, target = unwrapped(source_model), unwrapped(target_model)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive whole number, got {steps!r}")
    if teacher not in TEACHERS:
        raise ValueError(f"teacher={teacher!r}; there are {', '.join(TEACHERS)}")
    if result.adapter.attached:
        raise RuntimeError("result.adapter is attached; detach() it first, a copy of it is trained")
    pairs = paired(source, target, batches, target_batches)
    student = copy.deepcopy(result.adapter)
    losses: list[float] = []
    with undisturbed(source), undisturbed(target):
        student.put_on(target)
        try:
            optimizer = torch.optim.Adam(student.requires_grad_().parameters(), lr=lr)
            falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            for theirs, ours in tqdm(itertools.islice(itertools.cycle(pairs), steps), total=steps, desc="distill", disable=not progress):
                goal = taught(result, source, target, student, theirs, ours, teacher)
                with torch.enable_grad():
                    loss = divergence(goal, logits(target, ours), mask_of(ours))
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                falling.step()
                losses.append(float(loss))
        finally:
            student.detach()
    return dataclasses.replace(result, adapter=student, distilled=(*result.distilled, *losses))


def taught(result: TransferResult, source: nn.Module, target: nn.Module, student: Any, theirs: Any, ours: Any, teacher: str) -> Tensor:
    """The teacher's log probabilities."""
    adapted = logits(source, theirs, result.origin)
    with student(c=0.0):
        own = logits(target, ours)
    if adapted.shape != own.shape:
        raise ValueError(f"the source's logits are {tuple(adapted.shape)} and the target's {tuple(own.shape)}; both need one vocabulary")
    if teacher == "arithmetic":
        adapted = own + (adapted - logits(source, theirs, off=(result.origin,))).to(own)
    return adapted.to(own).float().log_softmax(-1)


def divergence(goal: Float[Tensor, "*batch v"], found: Float[Tensor, "*batch v"], mask: Tensor | None) -> Tensor:
    """KL(goal || found), the mean over tokens."""
    each = F.kl_div(found.float().log_softmax(-1), goal, reduction="none", log_target=True).sum(-1)
    return each.mean() if mask is None or mask.shape != each.shape else each[mask.to(each.device) != 0].mean()


def mask_of(batch: Any) -> Tensor | None:
    return batch.get("attention_mask") if isinstance(batch, dict) else None
