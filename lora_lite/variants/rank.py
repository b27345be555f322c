"""Which methods have a rank but no alpha? What their configs share: r, its exceptions per layer, and for some a dropout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lora_lite.config import AdapterConfig, as_patterns, match_pattern


@dataclass(frozen=True, kw_only=True)
class RankConfig(AdapterConfig):
    """r, and rank_pattern: a regex on the end of a module path to that layer's own r, the first match wins."""

    r: int = 16
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, r in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
                raise ValueError(f"{what} must be a positive whole number, got {r!r}")
        as_patterns(tuple(self.rank_pattern), "rank_pattern")

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        if not self.rank_pattern:
            return self
        return dataclasses.replace(self, r=match_pattern(self.rank_pattern, target, self.r), rank_pattern={})

    def patterns(self) -> dict[str, Mapping[str, Any]]:
        return {"rank_pattern": self.rank_pattern}


@dataclass(frozen=True, kw_only=True)
class RankDropoutConfig(RankConfig):
    """Also dropout on the input of the update, in training only."""

    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
