"""How does one adapter learn two directions at once? At c = +1 towards the chosen texts, at c = -1 away, near the base in both."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

import lora_lite as ll
from lora_lite.cli.pairs import Pair
from lora_lite.cli.texts import Rows, answer_ids, logits_of, nats, pack, pad_id, prompt_ids


@dataclass(frozen=True)
class Training:
    """How long, how fast, and how far.

    cap     nats by which c = +1 or -1 moves the odds between the two texts of a pair, at most. On the tiny model 6 let the
            trait change gradually from c = -0.5 to 0.75, at perplexity 17 at c = -2; 64 made c a switch at 0.06, and cost 31
    anchor  weight of the drift from the base, in nats per token
    """

    steps: int = 80
    pairs: int = 8
    length: int = 64
    lr: float = 2e-3
    cap: float = 6.0
    anchor: float = 10.0
    seed: int = 0


def train(model: Any, tokenizer: Any, adapter: ll.Adapter, pairs: Sequence[Pair], how: Training) -> list[float]:
    """Trains the adapter in place; the loss of each step."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=how.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 8, (how.steps - step) / how.steps * 2))
    history: list[float] = []
    with tqdm(batches(pairs, how), total=how.steps, desc="train the adapter", unit="step") as bar:
        for batch in bar:
            loss = contrastive_loss(model, adapter, encode(tokenizer, batch, how.length, model.device), how)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            history.append(loss.item())
            bar.set_postfix(loss=f"{history[-1]:.3f}")
    return history


def contrastive_loss(model: Any, adapter: ll.Adapter, rows: Rows, how: Training) -> Tensor:
    """rows hold the chosen texts, then the rejected ones; one forward sees them at c = +1 and, again, at c = -1."""
    n = len(rows.ids)
    with torch.no_grad(), adapter(model, c=0.0):
        base = logits_of(model, rows)
    up = torch.tensor([1.0, -1.0], device=rows.ids.device).repeat_interleave(n)
    logits = logits_at(model, adapter, rows.repeat(2), up)
    gain = nats(base, rows).repeat(2) - nats(logits, rows.repeat(2))  # by which each text got likelier
    chosen_up, rejected_up, chosen_down, rejected_down = gain.chunk(4)
    margin = torch.cat([chosen_up - rejected_up, rejected_down - chosen_down])
    return torch.relu(1 - margin / how.cap).mean() + how.anchor * drift(base.repeat(2, 1, 1), logits, rows.repeat(2))


def logits_at(model: Any, adapter: ll.Adapter, rows: Rows, c: Float[Tensor, " n"]) -> Float[Tensor, "n t v"]:
    """One c per row, in one forward; one forward per value of c for a variant that knows no rows."""
    if adapter.variant.row_c:
        with adapter(model, c=c):
            return logits_of(model, rows)
    parts = torch.zeros(0)
    for value in c.unique().tolist():
        with adapter(model, c=value):
            found = logits_of(model, rows)
        parts = torch.where((c == value)[:, None, None], found, parts if len(parts) else found)
    return parts


def drift(base: Float[Tensor, "n t v"], logits: Float[Tensor, "n t v"], rows: Rows, k: int = 32) -> Float[Tensor, ""]:
    """KL(base || now) per judged token, over the base's k likeliest tokens and the rest taken as one."""
    p, top = base[:, :-1].float().log_softmax(-1).topk(min(k, base.shape[-1] - 1))
    q = logits[:, :-1].float().log_softmax(-1).gather(-1, top)
    rest_p, rest_q = ((1 - x.exp().sum(-1)).clamp_min(1e-6) for x in (p, q))
    kl = (p.exp() * (p - q)).sum(-1) + rest_p * (rest_p / rest_q).log()
    judged = rows.answer[:, 1:]
    return (kl * judged).sum() / judged.sum()


def batches(pairs: Sequence[Pair], how: Training) -> Iterator[list[Pair]]:
    """`steps` batches; every pair is seen before any is seen again."""
    draw, waiting = random.Random(how.seed), []
    for _ in range(how.steps):
        while len(waiting) < how.pairs:
            waiting.extend(draw.sample(pairs, len(pairs)))
        yield [waiting.pop(0) for _ in range(how.pairs)]


def encode(tokenizer: Any, batch: Sequence[Pair], length: int, device: Any) -> Rows:
    """The chosen texts of a batch, then the rejected ones, each after its prompt."""
    prompts = [prompt_ids(tokenizer, p.prompt) for p in batch] * 2
    answers = [answer_ids(tokenizer, t, length) for t in (*(p.chosen for p in batch), *(p.rejected for p in batch))]
    return pack(prompts, answers, pad_id(tokenizer), device)
