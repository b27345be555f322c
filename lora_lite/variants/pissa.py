"""PiSSA: y = W_res x + s B A x, W = U S V^T, W_res = W - s B A at the start: A0 = sqrt(S/s) V^T, B0 = U sqrt(S/s).  arXiv:2404.02948

Without touching W, as differences.py says (s = alpha/r); both forms add exactly zero at the start:

    y = W x + s (B A - B0 A0) x       train="factors": A = A0 + dA, B = B0 + dB
    y = W x + U diag(dS) V^T x        train="spectrum": only the singular values move
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from lora_lite.lowrank import LowRank
from lora_lite.variant import BITWISE, Base, Identity, Initial, Params, ParamSpec, register
from lora_lite.variants.differences import DifferenceConfig, Differences, precise, start_at

CHOICES = {
    "train": ("factors", "spectrum"),
    "selection_score": ("s_only", "wanda", "act_only", "cho_rej_min_std"),
    "ds_init": ("zeros", "normal"),
}
USED = 0.5  # a direction is in use when kept adapters span this much of its squared length
DEEP = 0.05  # a tail_depth an activation score should exceed


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(DifferenceConfig):
    """`PiSSAConfig(r=16, alpha=32)`. r is clamped to each layer's own rank, which changes its scale alpha/r.

    train            "factors": A and B, as published. "spectrum": one number per direction, for steering; alpha is not used
    selection_score  which r directions v: the largest "s_only" S, "wanda" S * mean|x.v|, "act_only" mean|x.v|, or
                     "cho_rej_min_std" min(std(x_cho.v), std(x_rej.v)); all but the first need calibration data
    ds_init          "spectrum" only. "normal" draws N(0.04, 0.04): +c amplifies and -c attenuates from the first step, and
                     a fresh adapter is not the base
    """

    variant: ClassVar[str] = "pissa"
    train: Literal["factors", "spectrum"] = "factors"
    selection_score: Literal["s_only", "wanda", "act_only", "cho_rej_min_std"] = "s_only"
    ds_init: Literal["zeros", "normal"] = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.train == "spectrum":
            return
        if self.ds_init != "zeros":
            raise ValueError(f'ds_init={self.ds_init!r} is of train="spectrum"; train="factors" starts at the chosen directions')
        if bad := [alpha for alpha in self.alphas() if alpha <= 0]:
            raise ValueError(f"alpha must be positive, got {bad[0]!r}: A and B start from sqrt(S r / alpha); a negative dose is c=-1")


def amplifying(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    return 0.04 + 0.04 * torch.randn(shape, generator=generator)


class Moments:
    """Count, mean, squared deviations and sum of magnitudes per column of a stream, in float64.

    Batches are merged by their means (Chan, Golub and LeVeque 1983): sum z^2 - (sum z)^2 / n would cancel where |mean| >> std.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self.n = 0
        self.mean, self.deviations, self.magnitudes = torch.zeros(3, k, dtype=torch.float64, device=device)

    def add(self, z: Float[Tensor, "n k"]) -> None:
        z, n, total = z.double(), len(z), self.n + len(z)
        mean = z.mean(0)
        shift = mean - self.mean
        self.deviations += (z - mean).square_().sum(0) + shift.square() * (self.n * n / total)
        self.mean += shift * (n / total)
        self.magnitudes += z.abs().sum(0)
        self.n = total

    def std(self) -> Float[Tensor, " k"]:
        return (self.deviations / (self.n - 1)).sqrt()


class Spectrum:
    """The SVD of one weight, and how strongly streamed inputs excite each of its input directions. An Observer.

    Holds U (d_out, k), S (k,), Vh (k, d_in) in float32 at least, and four numbers per direction and group.
    """

    def __init__(self, weight: Float[Tensor, "d_out d_in"], exclude: Float[Tensor, "n width"] | None = None) -> None:
        self.U, self.S, self.Vh = torch.linalg.svd(precise(weight), full_matrices=False)
        self.exclude = exclude
        self.groups: dict[str, Moments] = {}

    def update(self, x: Float[Tensor, "n d_in"], group: str) -> None:
        if len(x):
            moments = self.groups.setdefault(group, Moments(len(self.S), self.S.device))
            moments.add(x.to(self.Vh.dtype) @ self.Vh.T)

    def score(self, by: str) -> Float[Tensor, " k"]:
        if by == "s_only":
            return self.S
        if by == "cho_rej_min_std":
            groups = self.seen(by, "cho", "rej")
            return torch.minimum(groups[0].std(), groups[1].std())
        groups = self.seen(by, *(self.groups or ("all",)))
        magnitude = torch.stack([g.magnitudes for g in groups]).sum(0) / sum(g.n for g in groups)  # the poles pooled, token by token
        return self.S * magnitude if by == "wanda" else magnitude

    def seen(self, by: str, *needed: str) -> list[Moments]:
        """The groups a score needs. Raises ValueError when one is missing or has a single token."""
        found = {name: moments.n for name, moments in self.groups.items()}
        if any(found.get(name, 0) < 2 for name in needed):
            given = ", ".join(f"{n} of {name!r}" for name, n in found.items()) or "none"
            raise ValueError(f"selection_score={by!r} needs calibration data, at least 2 tokens of each of {list(needed)}; given: {given}")
        return [self.groups[name] for name in needed]

    def free(self) -> Bool[Tensor, " k"]:
        """Which directions no kept adapter uses."""
        if self.exclude is None or not len(self.exclude):
            return torch.ones_like(self.S, dtype=torch.bool)
        if self.exclude.shape[1] != self.Vh.shape[1]:
            raise ValueError(f"exclude_directions have width {self.exclude.shape[1]}, this layer's inputs {self.Vh.shape[1]}")
        rows = F.normalize(self.exclude.to(self.Vh), dim=1)  # the length of a row says nothing: a trained difference is short beside its A0
        _, lengths, Q = torch.linalg.svd(rows, full_matrices=False)
        Q = Q[lengths > 1e-5 * lengths[0]]
        return (self.Vh @ Q.T).square().sum(1) <= USED

    def choose(self, by: str, r: int) -> Int[Tensor, " r"]:
        """The r free directions of the highest score, in ascending order. Raises ValueError when fewer are free."""
        free = self.free()
        if (left := int(free.sum())) < r:
            raise ValueError(
                f"asked for r={r} directions, exclude_directions leave {left} of {len(free)}; lower r, or exclude fewer adapters"
            )
        score = self.score(by).masked_fill(~free, -torch.inf)
        return score.argsort(descending=True, stable=True)[:r].sort().values


@register
class PiSSA(Differences):
    name = "pissa"
    Config = PiSSAConfig
    paper = "2404.02948"
    chooses_directions = True
    parameters = "r if train == 'spectrum' else r * (d_in + d_out)"
    reads_weight = "init"
    calibration = "optional"
    identity = Identity("bitwise", 'but for ds_init="normal", which starts away from the base on purpose')

    @classmethod
    def identity_of(cls, cfg: PiSSAConfig) -> Identity:
        return BITWISE if cfg.ds_init == "zeros" else Identity("none", 'ds_init="normal" starts away from the base on purpose')

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PiSSAConfig) -> dict[str, ParamSpec]:
        if cfg.train == "spectrum":
            frozen = {"lora_U": ParamSpec((d_out, cfg.r), trainable=False), "lora_Vh": ParamSpec((cfg.r, d_in), trainable=False)}
            return frozen | {"lora_dS": ParamSpec((cfg.r,), amplifying if cfg.ds_init == "normal" else "zeros")}
        return Differences.param_specs(d_in, d_out, cfg)

    @staticmethod
    def needs_calibration(cfg: PiSSAConfig) -> bool:
        return cfg.selection_score != "s_only"

    @staticmethod
    def observe(cfg: PiSSAConfig, base: Base, exclude: Tensor | None) -> Spectrum:
        assert base.weight is not None  # reads_weight is "init"
        return Spectrum(base.weight, exclude)

    @staticmethod
    def init(cfg: PiSSAConfig, base: Base, observed: Spectrum, generator: Generator | None) -> Initial:
        chosen = observed.choose(cfg.selection_score, cfg.r)
        U, S, Vh = observed.U[:, chosen], observed.S[chosen], observed.Vh[chosen]
        notes = {"tail_depth": tail_depth(chosen, len(observed.S))}
        if observed.exclude is not None:
            notes["left_out"] = float((~observed.free()).double().mean())  # the share of the directions that kept adapters use
        if cfg.train == "spectrum":
            return Initial({"lora_U": U, "lora_Vh": Vh}, notes)
        root = (S / cfg.scaling).sqrt()
        return Initial(start_at(root[:, None] * Vh, U * root), notes)

    @staticmethod
    def check(cfg: PiSSAConfig, notes: Mapping[str, float]) -> str | None:
        depth = notes.get("tail_depth", 1.0)
        if notes.get("left_out") == 0.0:  # as with a LoRA of r=8 trained on a toy Llama: 0 of 768 directions, the nearest spanned to 0.38
            return (
                "exclude_directions left out no direction: the kept adapters' inputs span less than half of every singular direction, as "
                "a LoRA's do whose random A has hardly turned; PiSSA adapters keep directions of the weight itself"
            )
        if cfg.selection_score == "s_only" or depth > DEEP:
            return None
        return (
            f"selection_score={cfg.selection_score!r} picked the top of the spectrum, as s_only would: tail_depth {depth:.3f}, "
            f"not above {DEEP}; is the calibration data what the adapter is for, and r well below the layers' rank?"
        )

    @staticmethod
    def factors(cfg: PiSSAConfig, p: Params, base: Base) -> LowRank:
        if cfg.train == "spectrum":
            return LowRank(p["lora_Vh"], p["lora_U"], p["lora_dS"])
        return Differences.factors(cfg, p, base)


def tail_depth(chosen: Int[Tensor, " r"], k: int) -> float:
    """How deep in a spectrum of k the picks lie: 0 the top only, 1 all in the tail."""
    r = len(chosen)
    return (float(chosen.double().mean()) - (r - 1) / 2) / max(1, k - r)
