"""What is one step of contrastive training, and which step's weights are kept? Both poles and the reference, forward and back."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor, nn
from torch.nn import Parameter
from tqdm import tqdm

from lora_lite.adapter import Adapter
from lora_lite.attachment import all_hooks, inner
from lora_lite.steering.arguments import check_seed, is_real, is_whole
from lora_lite.steering.losses import Aggregate, aggregated, completion_nll, kl_by_place, margin_nll, pcgrad
from lora_lite.steering.pairs import ContrastivePairs
from lora_lite.steering.report import Check, PoleCheck, TrainingReport
from lora_lite.steering.rows import Rows


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The numbers of a training; `train_steering` says what they are."""

    steps: int
    batch_size: int
    lr: float
    warmup: float
    clip: float
    cap: float
    kl: float
    kl_aggregate: Aggregate
    kl_top_k: int
    project: bool
    poles: tuple[float, float]
    checks: int
    keep: Literal["best", "last"]
    seed: int

    def __post_init__(self) -> None:
        counted, positive, others = ("steps", "batch_size", "kl_top_k", "checks"), ("lr", "cap", "clip"), ("kl", "warmup")
        check_seed(self.seed)
        wrong = [f"{name} must be at least 1, a whole number" for name in counted if not is_whole(getattr(self, name), 1)]
        wrong += [f"{name} must be above 0" for name in positive if not (is_real(x := getattr(self, name)) and x > 0)]
        wrong += [f"{name} must be 0 or above" for name in others if not (is_real(x := getattr(self, name)) and x >= 0)]
        if not isinstance(self.project, bool):
            wrong.append("project is True or False")
        if self.kl_aggregate not in get_args(Aggregate):
            wrong.append(f"kl_aggregate is one of {get_args(Aggregate)}")
        if self.keep not in ("best", "last"):
            wrong.append("keep is 'best' or 'last'")
        if wrong:
            raise ValueError(f"{'; '.join(wrong)}; got {dataclasses.asdict(self)}")

    def rate(self, step: int) -> float:
        """The share of lr in a step: a straight rise over the warm-up, half a cosine down to 0 after it."""
        rise = max(1.0, self.warmup * self.steps)
        return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * max(0.0, step + 1 - rise) / max(1.0, self.steps - rise + 1)))


class Reading(NamedTuple):
    """What the model says of a batch at one pole, beside what it says at c = 0: -log p of the pole's own texts and of the other's, KL."""

    own: Float[Tensor, " n"]
    other: Float[Tensor, " n"]
    own_reference: Float[Tensor, " n"]
    other_reference: Float[Tensor, " n"]
    kl: Float[Tensor, " m"]

    def loss(self, recipe: Recipe) -> Float[Tensor, ""]:
        margin = margin_nll(self.own, self.other, self.own_reference, self.other_reference, recipe.cap)
        return margin + recipe.kl * aggregated(self.kl, recipe.kl_aggregate)

    def check(self, c: float) -> PoleCheck:
        moved = (self.own_reference - self.own) + (self.other - self.other_reference)
        shift, spread = moved.mean().item() * (1 if c > 0 else -1), moved.std(correction=0).item()
        kl, rmse, p95 = (aggregated(self.kl, how).item() for how in ("mean", "rmse", "p95"))
        return PoleCheck(c, shift, shift / spread if spread else 0.0, (moved > 0).float().mean().item(), kl, rmse, p95)


@dataclass
class Training:
    """One run. `model` goes between train mode (steps) and eval mode (reference, checks); the caller puts modes back."""

    model: nn.Module
    adapter: Adapter
    trained: list[Parameter]
    recipe: Recipe
    progress: bool

    def run(self, kept: ContrastivePairs, held: ContrastivePairs | None) -> TrainingReport:
        recipe, start = self.recipe, time.perf_counter()
        optimizer = torch.optim.AdamW(self.trained, lr=recipe.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
        losses, cosines, checks = [], [], []
        best = Best(self.adapter, recipe.keep == "best")
        looks = {round(i * recipe.steps / recipe.checks) for i in range(1, recipe.checks + 1)}
        try:
            if held:
                checks.append(best.seen(self.check(0, held)))
            with tqdm(kept.batches(recipe.batch_size, recipe.steps, recipe.seed), total=recipe.steps, desc="train the adapter",
                      unit="step", disable=not self.progress) as bar:  # fmt: skip
                for step, batch in enumerate(bar, 1):
                    optimizer.zero_grad()
                    losses.append(self.backward(batch.encode(device=self.device), step, cosines))
                    optimizer.step()
                    self.adapter.on_step(step)
                    schedule.step()
                    if held and step in looks:
                        checks.append(best.seen(self.check(step, held)))
                    bar.set_postfix(refresh=False, loss=f"{losses[-1]:.3f}", held_out=f"{checks[-1].loss:.3f}" if checks else "-")
        finally:
            best.put_back()
        report = TrainingReport(
            dataclasses.asdict(recipe), (len(kept), len(held or ())), tuple(losses), tuple(cosines), tuple(checks),
            best.step if best.values else recipe.steps, time.perf_counter() - start,
        )  # fmt: skip
        logger.info("{}: {}", self.adapter.name, report)
        if best.values and best.step == 0:
            logger.warning("{}: no check was better than the start, so the adapter is as it was; a lower lr may help", self.adapter.name)
        return report

    def backward(self, rows: Rows, step: int, cosines: list[float]) -> float:
        """The gradient of one batch, clipped, in `.grad`; its loss. Raises RuntimeError where either is not finite."""
        up, down = (reading.loss(self.recipe) for reading in self.readings(rows, train=True))
        own = self.adapter.aux_loss()  # the method's own term; it takes no side, so nothing of it is projected
        if self.recipe.project:
            if own.requires_grad:
                own.backward()
            cosines.append(pcgrad([up, down], self.trained))
        else:
            (up + down + own).backward()
        norm, loss = torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.clip), (up + down + own).item()
        if not (math.isfinite(loss) and bool(norm.isfinite())):
            raise RuntimeError(
                f"step {step}: loss {loss}, norm of its gradient {norm.item()}. A lower lr, a larger kl or a longer warmup may hold it; "
                "a model in float16 may overflow where bfloat16 does not"
            )
        return loss

    def readings(self, rows: Rows, train: bool) -> list[Reading]:
        """One per pole; rows hold the chosen texts, then the rejected ones."""
        self.model.eval()
        with torch.no_grad(), self.adapter(self.model, c=0.0):
            reference = self.logits(rows)
        self.model.train(train)
        now = self.at_poles(rows)
        judged, before = rows.completion[:, 1:], completion_nll(reference, rows.ids, rows.completion)
        found = []
        for c, logits in zip(self.recipe.poles, now, strict=True):
            sides = [*completion_nll(logits, rows.ids, rows.completion).chunk(2), *before.chunk(2)]
            own, other, own_before, other_before = sides if c > 0 else (sides[i] for i in (1, 0, 3, 2))
            kl = kl_by_place(logits[:, :-1][judged], reference[:, :-1][judged], self.recipe.kl_top_k)
            found.append(Reading(own, other, own_before, other_before, kl))
        return found

    def at_poles(self, rows: Rows) -> Sequence[Float[Tensor, "n t v"]]:
        """The same rows at each pole: a c per row in one forward where the variant has it, else one forward each."""
        poles = self.recipe.poles
        if self.adapter.variant.row_c and not self.routed:
            c = torch.tensor(poles, device=self.device).repeat_interleave(len(rows.ids))
            with self.adapter(self.model, c=c):
                return self.logits(rows.repeat(len(poles))).chunk(len(poles))
        found = []
        for c in poles:
            with self.adapter(self.model, c=c):
                found.append(self.logits(rows))
        return found

    def logits(self, rows: Rows) -> Float[Tensor, "n t v"]:
        out = self.model(**rows.inputs(), **self.uncached)
        return out if isinstance(out, Tensor) else out.logits

    @functools.cached_property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @functools.cached_property
    def routed(self) -> bool:
        """Whether the adapter sits in experts, where tokens of different rows meet."""
        return any(hook.routed for path, _, hook in all_hooks(inner(self.model)) if path in self.adapter.targets)

    @functools.cached_property
    def uncached(self) -> dict[str, bool]:
        return {"use_cache": False} if "use_cache" in inspect.signature(inner(self.model).forward).parameters else {}

    @torch.no_grad()
    def check(self, step: int, held: ContrastivePairs) -> Check:
        """All held-out pairs, in eval mode."""
        size = self.recipe.batch_size
        batches = [self.readings(held[i : i + size].encode(device=self.device), train=False) for i in range(0, len(held), size)]
        up, down = (Reading(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*batches, strict=True))
        loss = (up.loss(self.recipe) + down.loss(self.recipe)).item()
        return Check(step, loss, (up.check(self.recipe.poles[0]), down.check(self.recipe.poles[1])))


class Best:
    """The values of the check with the least loss so far; none where the last are wanted."""

    def __init__(self, adapter: Adapter, wanted: bool) -> None:
        self.adapter, self.step, self.loss = adapter, 0, math.inf if wanted else -math.inf
        self.values: dict[str, Tensor] = {}

    def seen(self, check: Check) -> Check:
        if check.loss < self.loss:
            self.step, self.loss = check.step, check.loss
            self.values = {name: p.detach().clone() for name, p in self.moving().items()}
        return check

    @torch.no_grad()
    def put_back(self) -> None:
        for name, p in self.moving().items() if self.values else ():
            p.copy_(self.values[name])

    def moving(self) -> dict[str, Tensor]:
        """What a step may change: the trained tensors; of a method with a schedule also those that hold its state."""
        return self.adapter.state_dict() if self.adapter.variant.schedule else dict(self.adapter.named_parameters())
