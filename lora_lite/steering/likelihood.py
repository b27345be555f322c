"""What does the model think of a text: how likely is it here, and how far is that from what c=0 thinks?"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lora_lite.adapter import Adapter
from lora_lite.steering.losses import kl_terms
from lora_lite.steering.writing import is_encoder_decoder, padded

LOGITS = 2**27  # at once: half a GiB in float32, the largest tensor here
Ids = Sequence[int]
Pair = tuple[tuple[int, ...], tuple[int, ...]]  # a start, and the text that follows it


@dataclass(frozen=True)
class Rows:
    """Some texts as one batch: the model's inputs, the tokens its last logits speak of, and which of those are the text's own."""

    pairs: Sequence[Pair]
    inputs: dict[str, Any]
    ids: Int[Tensor, "n t"]
    own: Bool[Tensor, "n t"]

    def log_probs(self, model: Any) -> Float[Tensor, "n t v"]:
        """log p of every token at the places of `ids`, in float32 or wider."""
        logits = model(**self.inputs, use_cache=False).logits[:, -self.ids.shape[1] :]
        # as one kernel: gather - logsumexp, which needs no such tensor, takes 2.2x as long at 512 words and 1.2x at 50,000
        return F.log_softmax(logits, dim=-1, dtype=logits.dtype if logits.dtype is torch.float64 else torch.float32)


def nats(model: Any, starts: Sequence[Ids], texts: Sequence[Ids], max_rows: int) -> list[float]:
    """-log p per token of each text after its start, under the c in force: exp of it is the perplexity. NaN for an empty text."""

    def losses(rows: Rows) -> Float[Tensor, "n t"]:
        return -rows.log_probs(model).gather(-1, rows.ids[..., None])[..., 0]

    return [statistics.fmean(x) if x else math.nan for x in by_token(model, losses, starts, texts, max_rows)]


def divergence(model: Any, adapter: Adapter, c: float, starts: Sequence[Ids], texts: Sequence[Ids], max_rows: int) -> list[float]:
    """KL(p_c || p_0) in nats at every token of every text: how much that token would say of whether c or 0 wrote it.

    Over texts drawn at c the mean is the divergence of what the two write, per token (the chain rule of the KL).
    """

    def apart(rows: Rows) -> Float[Tensor, "n t"]:
        with adapter(model, c=0.0):
            reference = rows.log_probs(model)
        with adapter(model, c=c):
            here = rows.log_probs(model)
        return kl_terms(here, reference).sum(-1).clamp_min(0)  # rounding may take an equal pair below 0

    return [x for found in by_token(model, apart, starts, texts, max_rows) for x in found]


def by_token(
    model: Any, measure: Callable[[Rows], Float[Tensor, "n t"]], starts: Sequence[Ids], texts: Sequence[Ids], max_rows: int
) -> list[list[float]]:
    """What `measure` finds at each token of each text. A text that several doses wrote after the same start is read once."""
    pairs = [(tuple(s), tuple(t)) for s, t in zip(starts, texts, strict=True)]
    found: dict[Pair, list[float]] = {pair: [] for pair in pairs}
    for rows in batches(model, [pair for pair in found if pair[1]], max_rows):
        for pair, values, own in zip(rows.pairs, measure(rows).cpu(), rows.own.cpu(), strict=True):  # one wait for a GPU, not one a row
            found[pair] = values[own].tolist()
    return [found[pair] for pair in pairs]


def batches(model: Any, pairs: Sequence[Pair], max_rows: int) -> Iterator[Rows]:
    """The long ones first, each among its like: the less padding, and what does not fit into memory shows at once."""
    device = next(model.parameters()).device
    spared = min((len(start) for start, _ in pairs), default=0) if spares_starts(model) else 0
    left = sorted(pairs, key=lambda pair: (len(pair[0]) + len(pair[1]), len(pair[0])), reverse=True)
    while left:
        width = len(left[0][0]) + len(left[0][1]) - spared
        step = max(1, min(max_rows, LOGITS // (width * model.config.get_text_config().vocab_size)))
        yield (encoded if is_encoder_decoder(model) else continued)(model, left[:step], device)
        left = left[step:]


def spares_starts(model: Any) -> bool:
    """Whether it need not compute logits for a start: a decoder behind an encoder never sees one; most others can be told."""
    return is_encoder_decoder(model) or "logits_to_keep" in inspect.signature(model.forward).parameters


def continued(model: Any, pairs: Sequence[Pair], device: torch.device) -> Rows:
    """Start and text in one row, but for the last token, after which nothing is asked. Logits from the shortest start's end on.

    Padding on the right: positions then count from 0 in every architecture without being told.
    """
    ids, mask = (x.to(device) for x in padded([[*start, *text] for start, text in pairs], 0))
    begins = torch.tensor([len(start) for start, _ in pairs], device=device)
    own = (torch.arange(ids.shape[1], device=device) >= begins[:, None]) & (mask == 1)
    first = min(len(start) for start, _ in pairs)
    keep = {"logits_to_keep": ids.shape[1] - first} if spares_starts(model) else {}
    return Rows(pairs, {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], **keep}, ids[:, first:], own[:, first:])


def encoded(model: Any, pairs: Sequence[Pair], device: torch.device) -> Rows:
    """The start for the encoder, the text for the decoder, behind the token that it starts from."""
    ids, mask = (x.to(device) for x in padded([start for start, _ in pairs], 0))
    target, own = (x.to(device) for x in padded([text for _, text in pairs], 0))
    begin = model.generation_config.decoder_start_token_id
    begin = model.config.decoder_start_token_id if begin is None else begin
    shifted = torch.cat([torch.full_like(target[:, :1], begin), target[:, :-1]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": shifted}
    return Rows(pairs, inputs, target, own == 1)
