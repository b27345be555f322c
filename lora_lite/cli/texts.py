"""How do texts become rows of tokens, and rows become numbers? Prompts, continuations, padding, and nats per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Token rows padded on the right; `answer` marks the tokens that are judged, the prompt's are not."""

    ids: Int[Tensor, "n t"]
    mask: Int[Tensor, "n t"]
    answer: Bool[Tensor, "n t"]

    def repeat(self, times: int) -> Rows:
        return Rows(*(x.repeat(times, 1) for x in (self.ids, self.mask, self.answer)))

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask}


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt always begins with something: the beginning-of-text token, or else the end of the text before."""
    ids = list(tokenizer(prompt)["input_ids"]) if prompt else []
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is not None and (not ids or (tokenizer.bos_token_id is not None and ids[0] != start)):
        ids.insert(0, start)
    return ids


def answer_ids(tokenizer: Any, text: str, length: int) -> list[int]:
    """A continuation with the end of text after it, cut to `length`."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [*ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])][:length]


def pack(prompts: Sequence[list[int]], answers: Sequence[list[int]], pad: int, device: torch.device | str = "cpu") -> Rows:
    """Right padding: positions then count from 0 in every architecture without being told."""
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(prompts), width), pad)
    mask, answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(p) + len(a)] = torch.tensor([*p, *a])
        mask[i, : len(p) + len(a)] = 1
        answer[i, len(p) : len(p) + len(a)] = True
    return Rows(ids.to(device), mask.to(device), answer.to(device))


def nats(logits: Float[Tensor, "n t v"], rows: Rows) -> Float[Tensor, " n"]:
    """-log p of each row's answer given its prompt, over the whole answer."""
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), rows.ids[:, 1:], reduction="none")
    return (losses * rows.answer[:, 1:]).sum(1)


def nats_per_token(logits: Float[Tensor, "n t v"], rows: Rows) -> Float[Tensor, " n"]:
    """The same, per token of the answer; NaN for a row without any."""
    return nats(logits, rows) / rows.answer[:, 1:].sum(1)


def pad_id(tokenizer: Any) -> int:
    """A token to pad with, whatever the tokenizer calls it; masked out, so that its meaning does not matter."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
    return next(int(t) for t in known if t is not None)


def logits_of(model: Any, rows: Rows) -> Float[Tensor, "n t v"]:
    return model(**rows.inputs(), use_cache=False).logits
