"""Is what was handed in what was meant? Adapters, models, numbers, functions: each refused by the name of its argument."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

from torch import nn

from lora_lite.adapter import Adapter
from lora_lite.attachment import inner


def told(value: Any) -> str:
    return f"{type(value).__name__} {' '.join(repr(value).split()):.60}"


def is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_real(value: Any) -> bool:
    """A finite number: no text that reads as one, no truth."""
    return hasattr(value, "__float__") and not isinstance(value, bool) and not getattr(value, "ndim", 0) and math.isfinite(value)


def check_whole(least: int, **given: Any) -> None:
    """Raises ValueError naming every one that is no whole number of at least `least`."""
    if wrong := {name: value for name, value in given.items() if not is_whole(value, least)}:
        got = ", ".join(f"{name}={value!r:.60}" for name, value in wrong.items())
        raise ValueError(f"{' and '.join(wrong)} must be at least {least}, a whole number; got {got}")


def check_seed(seed: Any) -> None:
    if not isinstance(seed, Integral):
        raise TypeError(f"seed must be a whole number, got {type(seed).__name__}: {seed!r:.60}")


def check_adapter(adapter: Any, name: str = "adapter") -> None:
    if not isinstance(adapter, Adapter):
        raise TypeError(f"{name} is {told(adapter)}; give the Adapter that ll.attach(model, config), ll.load or ll.read returned")


def check_list(what: str, given: Any, example: str) -> None:
    """Raises TypeError for one value in place of several, and for what holds them by other names."""
    if isinstance(given, str | bytes | dict) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
        raise TypeError(f"{what} is a list, e.g. {example}; got {told(given)}")


def check_rating(what: str, function: Any) -> None:
    """Before minutes of writing, not after."""
    meant = f"{what} is a function of texts, a list, to one number each"
    if not callable(function):
        raise TypeError(f"{meant}; got {told(function)}")
    try:
        inspect.signature(function).bind([])
    except TypeError as error:
        raise TypeError(f"{meant}; {told(function)} cannot be called with the list alone: {error}") from error
    except ValueError:  # some functions written in C do not say what they take
        pass


def check_ids(model: nn.Module, rows: Iterable[Sequence[int]], what: str) -> None:
    """A token beyond the embedding is an IndexError that names nothing; on a GPU it ends the process."""
    embedding = inner(model).get_input_embeddings() if hasattr(inner(model), "get_input_embeddings") else None  # type: ignore[operator]
    size = getattr(embedding, "num_embeddings", math.inf)
    if (wrong := next((i for row in rows for i in row if not 0 <= i < size), None)) is not None:
        raise ValueError(
            f"{what} hold token {wrong}, and {type(inner(model)).__name__} knows 0 to {size - 1}; is the tokenizer this model's?"
        )


def check_takes(model: nn.Module, name: str) -> None:
    """Raises TypeError for a model that is none of tokens."""
    takes: Callable[..., Any] = inner(model).forward
    found = inspect.signature(takes).parameters
    if name not in found and not any(p.kind is p.VAR_KEYWORD for p in found.values()):
        raise TypeError(f"{type(inner(model)).__name__} takes {list(found)}, not {name}; what is steered is a language model")


def check_writes(model: nn.Module) -> None:
    if not (callable(getattr(model, "generate", None)) and hasattr(model, "generation_config")):
        raise TypeError(
            f"{type(model).__name__} has no generate(); doses are judged by what a model writes: give a language model of transformers"
        )
