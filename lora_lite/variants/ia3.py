"""IA3: a learned gate on what a linear puts out, y' = l * y (bias included), or on what it takes in, y' = W (l * x) + b.

arXiv:2205.05638, which gates the outputs of keys and values and the inputs of the feed-forward block's second layer. Stored as
the deviation l - 1, zero at init: near 1, bfloat16 would lose half of what was learned. c moves the gate in a line: 1 + c (l - 1).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from lora_lite.config import AdapterConfig, as_patterns, as_tuple, found_in
from lora_lite.variant import Base, Params, ParamSpec, Variant, register

EVERY = ("",)  # the pattern that every name matches


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """`IA3Config(targets=("k_proj", "v_proj", "down_proj"), feedforward="down_proj")`: the paper's choice. One gate per feature.

    feedforward  regexes searched in the full module name: these targets are gated on what they take in, the others on what
                 they put out
    """

    variant: ClassVar[str] = "ia3"
    feedforward: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.feedforward,) if isinstance(self.feedforward, str) else as_tuple(self.feedforward, "feedforward")
        object.__setattr__(self, "feedforward", as_patterns(given, "feedforward"))

    def gates_input(self, target: str) -> bool:
        return any(found_in(pattern, target) for pattern in self.feedforward)

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        return dataclasses.replace(self, feedforward=EVERY if self.gates_input(target) else ()) if self.feedforward else self

    def searched(self) -> dict[str, Sequence[str]]:
        return {"feedforward": self.feedforward}

    def renamed(self, names: Mapping[str, str]) -> Self:
        """As it is where the patterns mean the same layers by their new names, else with these names in full."""
        if all(self.gates_input(old) == self.gates_input(new) for old, new in names.items()):
            return self
        return dataclasses.replace(self, feedforward=tuple(rf"^{re.escape(new)}$" for old, new in names.items() if self.gates_input(old)))


@dataclass(frozen=True, kw_only=True)
class IA3FFConfig(AdapterConfig):
    """`IA3FFConfig(targets="down_proj")`: every target gated on what it takes in."""

    variant: ClassVar[str] = "ia3_ff"
    feedforward: ClassVar[tuple[str, ...]] = EVERY


@register
class IA3(Variant):
    name = "ia3"
    Config = IA3Config
    paper = "2205.05638"
    parameters: ClassVar[str] = "d_in if feedforward else d_out"
    form = "either"

    @classmethod
    def form_at(cls, cfg: IA3Config | IA3FFConfig) -> Literal["output", "input"]:
        return "input" if cfg.feedforward else "output"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: IA3Config | IA3FFConfig) -> dict[str, ParamSpec]:
        return {"lora_l": ParamSpec((d_in if cfg.feedforward else d_out,))}

    @classmethod
    def added(cls, cfg: IA3Config | IA3FFConfig, p: Params, x: Tensor, y: Tensor | None, base: Base, c: float | Tensor) -> Tensor:
        return gated(x if y is None else y, p["lora_l"], c)


@register
class IA3FF(IA3):
    name = "ia3_ff"
    Config = IA3FFConfig
    parameters = "d_in"
    form = "input"


def gated(x: Tensor, change: Tensor, c: float | Tensor) -> Tensor:
    """(1 + c change) * x in one pass; in half precision a gate near 1 would lose what was learned, and so never is made."""
    if x.dtype.itemsize >= 4:
        return (1 + (change if type(c) is float and c == 1.0 else c * change)) * x
    return torch.addcmul(x, change, x, value=c) if isinstance(c, float) else torch.addcmul(x, c * change, x)
