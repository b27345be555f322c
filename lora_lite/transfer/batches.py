"""What does each of the two models run on? Batches in pairs, never guessed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

Batches = Iterable[Any] | Tensor | Mapping[str, Any]


def paired(source: nn.Module, target: nn.Module, batches: Batches, target_batches: Batches | None) -> list[tuple[Any, Any]]:
    """Batch by batch what each model gets. Raises ValueError for none, for unequal numbers, and for two vocabularies."""
    mine = listed(batches, "batches")
    if target_batches is not None:
        theirs = listed(target_batches, "target_batches")
        if len(mine) != len(theirs):
            raise ValueError(f"{len(mine)} batches and {len(theirs)} target_batches; they are paired one by one")
        return list(zip(mine, theirs, strict=True))
    words = [vocabulary(model) for model in (source, target)]
    if None not in words and words[0] != words[1]:
        raise ValueError(
            f"the source has a vocabulary of {words[0]} and the target of {words[1]}: the same ids may be other words there. Give "
            "target_batches, token i beside token i (target_batches=batches if it is one tokenizer, only padded)"
        )
    return [(batch, batch) for batch in mine]


def listed(batches: Batches, what: str) -> list[Any]:
    if isinstance(batches, str | bytes) or not isinstance(batches, Iterable):
        raise ValueError(f"{what} is {type(batches).__name__}; expected batches (tensors, dicts, tuples), or one of them")
    found = [batches] if isinstance(batches, Tensor | Mapping) else list(batches)
    if not found:
        raise ValueError(f"{what} holds no batches (a generator can be read only once)")
    return found


def vocabulary(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)
