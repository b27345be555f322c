"""How do a prompt and its completion become a row of tokens? Tokenised apart, put end to end, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lora_lite.steering.arguments import told

Text = str | Sequence[int]  # or the token ids of one


def is_text(part: Any) -> bool:
    """Text that can be written down, which half of a surrogate pair cannot, or token ids."""
    if isinstance(part, str):
        return part.isascii() or not any("\ud800" <= c <= "\udfff" for c in part)
    return isinstance(part, list | tuple) and all(isinstance(i, Integral) and not isinstance(i, bool) and 0 <= int(i) < 2**63 for i in part)


@dataclass(frozen=True)
class Rows:
    """Token rows of n completions after their prompts, padded on the right. `model(**rows.inputs())`, then judge `rows.completion`."""

    ids: Int[Tensor, "n t"]
    mask: Int[Tensor, "n t"]
    completion: Bool[Tensor, "n t"]

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask}

    def repeat(self, times: int) -> Rows:
        """All rows, `times` times over: one copy per pole."""
        return Rows(*(x.repeat(times, 1) for x in (self.ids, self.mask, self.completion)))

    def to(self, device: torch.device | str) -> Rows:
        return Rows(*(x.to(device) for x in (self.ids, self.mask, self.completion)))


def prompt_ids(tokenizer: Any, prompt: Text) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    bos, eos = needed(tokenizer).bos_token_id, tokenizer.eos_token_id
    own, whole = (list(tokenizer(prompt, add_special_tokens=special)["input_ids"]) for special in (False, True))
    if not own:  # nothing, or spaces that the tokenizer takes for nothing
        return [next(i for i in (bos, eos) if i is not None)] if (bos, eos) != (None, None) else []
    if own[:1] == [bos]:  # a chat template's text begins with BOS already
        return own
    at = next((i for i in range(len(whole) - len(own) + 1) if whole[i : i + len(own)] == own), None)
    return whole if at is None else whole[: at + len(own)]


def completion_ids(tokenizer: Any, text: Text, eos: bool) -> list[int]:
    if not isinstance(text, str):
        return list(text)
    ids = list(needed(tokenizer)(text, add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id] if eos and tokenizer.eos_token_id is not None else ids


def needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise TypeError("pairs of texts need a tokenizer; only pairs of token ids go without one")
    if not (callable(tokenizer) and hasattr(tokenizer, "eos_token_id")):
        raise TypeError(f"tokenizer is {told(tokenizer)}; give the tokenizer itself, AutoTokenizer.from_pretrained(...)")
    return tokenizer


def packed(texts: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int) -> Rows:
    """(prompt ids, completion ids) as rows."""
    width = max((len(p) + len(c) for p, c in texts), default=0)
    ids = torch.full((len(texts), width), pad, dtype=torch.long)
    mask, completion = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (p, c) in enumerate(texts):
        end = len(p) + len(c)
        ids[row, :end] = torch.tensor([*p, *c])
        mask[row, :end] = 1
        completion[row, len(p) : end] = True
    return Rows(ids, mask, completion)


def pad_id(tokenizer: Any) -> int:
    """Any token will do: it is masked out."""
    known = [getattr(tokenizer, f"{kind}_token_id", None) for kind in ("pad", "eos", "bos")]
    return next((int(i) for i in known if i is not None), 0)
