"""What does the model think of a text: how likely is it here, and how far is that from what c=0 thinks?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lora_lite.adapter import Adapter
from lora_lite.steering.writing import is_encoder_decoder, padded

LOGITS = 2**27  # at once: half a GiB in float32, the largest tensor here
Ids = Sequence[int]


@dataclass(frozen=True)
class Rows:
    """Some texts as one batch: the model's inputs, the tokens its logits speak of, and which of those are the text's own."""

    inputs: dict[str, Tensor]
    ids: Int[Tensor, "n t"]
    own: Bool[Tensor, "n t"]

    def log_probs(self, model: Any) -> Float[Tensor, "n t v"]:
        """log p of every token at the places of `ids`, in float32 or wider. (A decoder's last logits speak of a token not there.)"""
        logits = model(**self.inputs, use_cache=False).logits[:, : self.ids.shape[1]]
        return F.log_softmax(logits if logits.dtype is torch.float64 else logits.float(), dim=-1)


def nats(model: Any, starts: Sequence[Ids], texts: Sequence[Ids], max_rows: int) -> list[float]:
    """-log p per token of each text after its start, under the c in force: exp of it is the perplexity. NaN for an empty text."""
    found: list[float] = []
    for rows in batches(model, starts, texts, max_rows):
        losses = -rows.log_probs(model).gather(-1, rows.ids[..., None])[..., 0]
        found += ((losses * rows.own).sum(1) / rows.own.sum(1)).tolist()
    return found


def divergence(model: Any, adapter: Adapter, c: float, starts: Sequence[Ids], texts: Sequence[Ids], max_rows: int) -> list[float]:
    """KL(p_c || p_0) in nats at every token of every text: how much that token would say of whether c or 0 wrote it.

    Over texts drawn at c the mean is the divergence of what the two write, per token (the chain rule of the KL).
    """
    found: list[float] = []
    for rows in batches(model, starts, texts, max_rows):
        with adapter(model, c=0.0):
            reference = rows.log_probs(model)
        with adapter(model, c=c):
            here = rows.log_probs(model)
        each = (here.exp() * (here - reference)).sum(-1).clamp_min(0)  # rounding may take an equal pair below 0
        found += each[rows.own].tolist()
    return found


def batches(model: Any, starts: Sequence[Ids], texts: Sequence[Ids], max_rows: int) -> Iterator[Rows]:
    device = next(model.parameters()).device
    width = max((len(s) + len(t) for s, t in zip(starts, texts, strict=True)), default=1)
    step = max(1, min(max_rows, LOGITS // (width * model.config.get_text_config().vocab_size)))
    for i in range(0, len(texts), step):
        yield (encoded if is_encoder_decoder(model) else continued)(model, starts[i : i + step], texts[i : i + step], device)


def continued(model: Any, starts: Sequence[Ids], texts: Sequence[Ids], device: torch.device) -> Rows:
    """Start and text in one row. Padding on the right: positions then count from 0 in every architecture without being told."""
    ids, mask = (x.to(device) for x in padded([[*s, *t] for s, t in zip(starts, texts, strict=True)], 0))
    place = torch.arange(ids.shape[1], device=device)
    begins = torch.tensor([len(s) for s in starts], device=device)
    own = (place >= begins[:, None]) & (mask == 1)
    return Rows({"input_ids": ids, "attention_mask": mask}, ids[:, 1:], own[:, 1:])


def encoded(model: Any, starts: Sequence[Ids], texts: Sequence[Ids], device: torch.device) -> Rows:
    """The start for the encoder, the text for the decoder, behind the token that it starts from."""
    ids, mask = (x.to(device) for x in padded(starts, 0))
    target, own = (x.to(device) for x in padded(texts, 0))
    begin = model.generation_config.decoder_start_token_id
    begin = model.config.decoder_start_token_id if begin is None else begin
    shifted = torch.cat([torch.full_like(target[:, :1], begin), target[:, :-1]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": shifted}
    return Rows(inputs, target, own == 1)
