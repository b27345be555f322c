"""Are types and shapes really checked while the tests run? Each kind of annotation, given what it does not allow."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from jaxtyping import TypeCheckError

import lora_lite as ll
from lora_lite.dial import Dial
from lora_lite.lowrank import LowRank, stack
from lora_lite.steering.pairs import ContrastivePairs
from lora_lite.subspace.frame import Frame, extended

ROWS = torch.ones(2, 3)
WRONG: dict[str, Callable[[], object]] = {
    "a function": lambda: stack(3),  # type: ignore[arg-type]
    "a method": lambda: LowRank(ROWS, ROWS.T).scaled("much"),  # type: ignore[arg-type]
    "an initialiser": lambda: Dial(name=3),  # type: ignore[arg-type]
    "a class method": lambda: ContrastivePairs.from_jsonl(3),  # type: ignore[arg-type]
    "a static method": lambda: ll.REGISTRY["lora"].param_specs("in", 2, ll.LoRAConfig()),  # type: ignore[arg-type]
    "a dataclass": lambda: Frame(ROWS, None, torch.ones(2), rest="much"),  # type: ignore[arg-type]
    "what comes back": lambda: LowRank(SimpleNamespace(shape=("two", 3)), ROWS).r,  # type: ignore[arg-type]
}
SHAPES: dict[str, Callable[[], object]] = {
    "a matrix": lambda: extended(torch.ones(3), 1, 0.1),
    "two that go together": lambda: Frame(ROWS, None, torch.ones(2)).padded(torch.ones(1, 2, 3)),
    "whole numbers": lambda: Frame(ROWS, None, torch.ones(2, dtype=torch.long)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_type_is_noticed(kind: str) -> None:
    with pytest.raises(TypeError, match=r"violates type hint|Type-check"):
        WRONG[kind]()


@pytest.mark.parametrize("kind", SHAPES)
def test_a_wrong_shape_is_noticed(kind: str) -> None:
    with pytest.raises(TypeCheckError):
        SHAPES[kind]()
