"""EVA: LoRA whose A spans the directions in which a layer's inputs vary most: their first principal components; B = 0.  arXiv:2410.07170

Layers that read the same input (q, k and v) share one analysis. With rho > 1 ranks move to where they explain most: of all the
components on offer, up to rho r in each layer, those with the largest shares of their layer's variance are kept, r per layer on
average, and alpha follows so that every layer keeps its scale. (A layer keeps one at least; PEFT unwraps those left with none.)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lora_lite.config import RankedConfig
from lora_lite.variant import BITWISE, Base, Group, Identity, Initial, ParamSpec, register
from lora_lite.variants.lora import LoRA

V = TypeVar("V")
CHUNK = 256  # rows taken into the analysis at once: its cost per row grows with chunk + components


@dataclass(frozen=True, kw_only=True)
class EVAConfig(RankedConfig):
    """`ll.attach(model, EVAConfig(r=16, rho=2.0), calibration_data=batches)`. r is clamped to each layer's d_in.

    rho  the most rank a layer can get, as a multiple of r; 1 leaves every layer its r
    """

    variant: ClassVar[str] = "eva"
    rho: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rho, int | float) or isinstance(self.rho, bool) or not 1.0 <= self.rho < math.inf:
            raise ValueError(f"rho must be a finite number from 1, got {self.rho!r}")

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        own = super().at(target, d_in, d_out)
        return own if own.r <= d_in else dataclasses.replace(own, r=d_in)


class Components:
    """The first k principal components of streamed inputs, by incremental SVD (Ross, Lim, Lin and Yang 2008). An Observer.

    What is kept of the rows so far is S V (2k x d_in, of which k are told: the rest takes up most of what truncation loses),
    their mean and their number, in float64.
    """

    def __init__(self, k: int, d_in: int, device: torch.device) -> None:
        self.k, self.kept = k, 2 * k
        self.n, self.energy = 0, torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.S, self.Vh = self.mean.new_zeros(0), self.mean.new_zeros(0, d_in)

    def update(self, x: Float[Tensor, "n d_in"], group: str) -> None:
        if self.S.device != x.device:
            self.energy, self.mean, self.S, self.Vh = (v.to(x.device) for v in (self.energy, self.mean, self.S, self.Vh))
        for rows in x.double().split(max(CHUNK, self.kept)):
            if len(rows):
                self.take(rows)

    def take(self, x: Float[Tensor, "n d_in"]) -> None:
        n, total, mean = len(x), self.n + len(x), x.mean(0)
        shift = math.sqrt(self.n * n / total) * (mean - self.mean)  # what the move of the mean adds to the scatter
        rows = torch.cat([self.S[:, None] * self.Vh, x - mean, shift[None]])
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        self.S, self.Vh = S[: self.kept], Vh[: self.kept]
        self.energy = self.energy + (x - mean).square().sum() + shift.square().sum()
        self.mean, self.n = self.mean + (mean - self.mean) * (n / total), total

    def shares(self) -> list[float]:
        """The share of the variance that each of the first k components explains, those that explain some."""
        shares = self.S[: self.k].square() / self.energy
        return shares[shares > 1e-14].tolist()  # what is left is rounding

    def first(self, r: int) -> Float[Tensor, "r d_in"]:
        """Raises ValueError where the data has fewer directions."""
        if (found := len(self.shares())) < r:
            raise ValueError(f"its inputs in the calibration data ({self.n} tokens) vary in {found} directions, r={r}; give more data")
        return self.Vh[:r]


@register
class EVA(LoRA):
    name = "eva"
    Config = EVAConfig
    paper = "2410.07170"
    calibration = "required"
    shares_observers = True
    identity = BITWISE

    @classmethod
    def identity_of(cls, cfg: EVAConfig) -> Identity:
        return BITWISE

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: EVAConfig) -> dict[str, ParamSpec]:
        return {"lora_A": ParamSpec((cfg.r, d_in)), "lora_B": ParamSpec((d_out, cfg.r))}

    @staticmethod
    def observe(cfg: EVAConfig, base: Base, exclude: Tensor | None) -> Components:
        most = round(cfg.rho * max(cfg.ranks()))
        return Components(min(most, base.d_in), base.d_in, torch.device("cpu"))

    @staticmethod
    def group_init(cfg: EVAConfig, sizes: Mapping[str, tuple[int, int]], observed: Mapping[str, Components]) -> Group:
        if cfg.rho == 1:
            return Group(cfg)
        own = {t: cfg.at(t, *size) for t, size in sizes.items()}
        offers = [(share, t) for t in sizes for share in observed[t].shares()[1 : round(cfg.rho * own[t].r)]]
        offers.sort(key=lambda offer: -offer[0])
        won = Counter(t for _, t in offers[: sum(c.r for c in own.values()) - len(own)])
        spread = {t: dataclasses.replace(c, r=1 + won[t]) for t, c in own.items()}
        ranks = by_name({t: c.r for t, c in spread.items()})
        alphas = by_name({t: c.alpha * own[t].scaling / c.scaling for t, c in spread.items()})  # every layer's scale as it was
        return Group(dataclasses.replace(cfg, rank_pattern=ranks, alpha_pattern=alphas))

    @staticmethod
    def init(cfg: EVAConfig, base: Base, observed: Components, generator: Generator | None) -> Initial:
        return Initial({"lora_A": observed.first(cfg.r)}, {"explained_variance": sum(observed.shares()[: cfg.r])})


def by_name(values: Mapping[str, V]) -> dict[str, V]:
    """A pattern for each full name, longer ones first: "layers.0.q" is also the end of "model.layers.0.q"."""
    return {re.escape(name): values[name] for name in sorted(values, key=len, reverse=True)}
