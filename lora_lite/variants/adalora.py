"""AdaLoRA: y = W x + (alpha/r) P diag(E) Q x, in SVD's form, whose least important triplets (a row of Q, E, a column of P) the schedule
prunes over all layers together: r each at the start, target_r on average at the end.  arXiv:2303.10512

An optimizer's step moves every number p with gradient g. Its sensitivity is |p g|; what counts is its smoothed value I times its
smoothed uncertainty U (equations 8 and 9), and of a triplet E's score plus the mean scores of its row and its column (equation 7):

    I <- beta1 I + (1 - beta1) |p g|,   U <- beta2 U + (1 - beta2) | |p g| - I |,   score = I U

    step <= tinit                        nothing is pruned
    up to total_step - tfinal            every deltaT steps E is zeroed but for the best; how many falls as a cube. It may grow back
    after that                           the triplets that the last step chose are trained, the others stay at zero

P and Q are held near orthogonal by a term of the loss, orth_reg_weight times the mean of |P^T P - I| and |Q Q^T - I|. As in PEFT
the scale is alpha / (r + 1e-5), r the first rank whatever is left of it. I and U of every number and the last choice are frozen
tensors of the adapter: it holds three times what it trains while the schedule runs, and a resumed run goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lora_lite.config import RankedConfig
from lora_lite.lowrank import LowRank
from lora_lite.mixed import wide
from lora_lite.variant import Base, Params, ParamSpec, Variant, register

TRAINED = ("lora_A", "lora_B", "lora_E")  # Q, P and Lambda


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(RankedConfig):
    """`AdaLoRAConfig(r=12, target_r=8, total_step=1000)`, and in the training loop

        (loss + adapter.aux_loss()).backward(); optimizer.step(); adapter.on_step(step); optimizer.zero_grad()

    with step counted from 1. Without total_step nothing is pruned, and on_step is refused.

    r, target_r  the rank of every layer at the start (init_r in PEFT), and on average at the end
    tinit, tfinal, deltaT  steps before the first pruning, steps after the last, and steps from one to the next
    """

    variant: ClassVar[str] = "adalora"
    r: int = 12
    target_r: int = 8
    total_step: int | None = None
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rslora:
            raise ValueError("rslora=True: AdaLoRA scales by alpha/r, with the r it starts from")
        counts = {"target_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1} | ({} if self.total_step is None else {"total_step": 1})
        for name, least in counts.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
        if bad := {n: v for n in ("beta1", "beta2") if not 0 < (v := getattr(self, n)) < 1}:
            raise ValueError(f"beta1 and beta2 lie between 0 and 1, got {bad}")
        if not 0 <= self.orth_reg_weight < float("inf"):
            raise ValueError(f"orth_reg_weight must be a finite number from 0, got {self.orth_reg_weight!r}")
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            raise ValueError(f"no step is left to prune in: tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step}")

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r + 1e-5)


def near_zero(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    return 0.02 * torch.randn(shape, generator=generator)


@register
class AdaLoRA(Variant):
    name = "adalora"
    Config = AdaLoRAConfig
    paper = "2303.10512"
    parameters = "r * (d_in + d_out + 1)"
    schedule = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: AdaLoRAConfig) -> dict[str, ParamSpec]:
        shapes = {"lora_A": (cfg.r, d_in), "lora_B": (d_out, cfg.r), "lora_E": (cfg.r,)}
        trained = {n: ParamSpec(shape, "zeros" if n == "lora_E" else near_zero) for n, shape in shapes.items()}
        smoothed = {f"{n}_{what}": ParamSpec(shape, trainable=False) for n, shape in shapes.items() for what in ("I", "U")}
        return trained | smoothed | {"lora_kept": ParamSpec((cfg.r,), "ones", trainable=False)}

    @staticmethod
    def factors(cfg: AdaLoRAConfig, p: Params, base: Base) -> LowRank:
        return LowRank(p["lora_A"], p["lora_B"], wide(p["lora_E"]) * cfg.scaling)

    @staticmethod
    def on_step(cfg: AdaLoRAConfig, step: int, layers: Mapping[str, Params]) -> None:
        if cfg.total_step is None:
            raise ValueError("the schedule needs its length: AdaLoRAConfig(..., total_step=the number of optimizer steps)")
        last = cfg.total_step - cfg.tfinal
        if step < last:
            smooth(cfg, layers)
        if step == last or (cfg.tinit < step < last and step % cfg.deltaT == 0):
            choose(layers, budget(cfg, step, layers))
        if step == last:
            for p in layers.values():
                for name in TRAINED:
                    p[f"{name}_I"].zero_()
                    p[f"{name}_U"].zero_()
        if step > last:
            prune(layers)

    @staticmethod
    def aux_loss(cfg: AdaLoRAConfig, layers: Mapping[str, Params]) -> Tensor:
        grams = [g for p in layers.values() for g in (p["lora_A"] @ p["lora_A"].T, p["lora_B"].T @ p["lora_B"])]
        far = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)) for gram in grams]
        return cfg.orth_reg_weight * torch.stack([f.to(far[0].device) for f in far]).mean()


def budget(cfg: AdaLoRAConfig, step: int, layers: Mapping[str, Params]) -> int:
    """How many triplets of all layers are kept at this step (equation 12)."""
    assert cfg.total_step is not None  # on_step refuses
    first, end = sum(len(p["lora_E"]) for p in layers.values()), cfg.target_r * len(layers)
    left = 1 - (step - cfg.tinit) / (cfg.total_step - cfg.tfinal - cfg.tinit)
    return int((first - end) * left**3 + end)


def smooth(cfg: AdaLoRAConfig, layers: Mapping[str, Params]) -> None:
    """Take this step's sensitivities into I and U."""
    if still := [f"{t}.{n}" for t, p in layers.items() for n in TRAINED if p[n].grad is None]:
        raise ValueError(f"{len(still)} tensors have no gradient, e.g. {still[0]}: call on_step(step) after backward, before zero_grad")
    for p in layers.values():
        for name in TRAINED:
            I, U, grad = p[f"{name}_I"], p[f"{name}_U"], p[name].grad  # noqa: E741 the paper's letters
            assert grad is not None
            sensitivity = (p[name] * grad).abs()
            I.copy_(cfg.beta1 * I + (1 - cfg.beta1) * sensitivity)
            U.copy_(cfg.beta2 * U + (1 - cfg.beta2) * (sensitivity - I).abs())


def scores(p: Params) -> Float[Tensor, " r"]:
    """The importance of one layer's triplets."""
    A, B, E = (p[f"{name}_I"] * p[f"{name}_U"] for name in TRAINED)
    return E + (A.mean(1) + B.mean(0))


def choose(layers: Mapping[str, Params], budget: int) -> None:
    """Keep the `budget` best triplets of all layers, and zero the others' E; of equals at the threshold none is kept."""
    found = {t: scores(p) for t, p in layers.items()}
    every = torch.cat([score.cpu() for score in found.values()])
    dropped = len(every) - budget
    threshold = every.kthvalue(dropped).values.item() if dropped > 0 else -float("inf")
    for t, score in found.items():
        layers[t]["lora_kept"].copy_(score > threshold)
    prune(layers)


def prune(layers: Mapping[str, Params]) -> None:
    for p in layers.values():
        p["lora_E"].masked_fill_(p["lora_kept"] == 0, 0.0)
