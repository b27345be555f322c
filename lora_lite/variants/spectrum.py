"""Which singular directions of a weight do inputs excite? One SVD, and scores streamed through it; PiSSA and AntiPaSTO start from some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from lora_lite.variant import Base, Initial, Variant
from lora_lite.variants.differences import precise

Score = Literal["s_only", "wanda", "act_only", "cho_rej_min_std"]
SCORES = ("s_only", "wanda", "act_only", "cho_rej_min_std")
USED = 0.5  # a direction is in use when kept adapters span this much of its squared length
DEEP = 0.05  # a tail_depth an activation score should exceed


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

    def notes(self, chosen: Int[Tensor, " r"]) -> dict[str, float]:
        """How deep the picks lie, and the share of the directions that was left out for kept adapters, if there are any."""
        found = {"tail_depth": tail_depth(chosen, len(self.S))}
        return found if self.exclude is None else found | {"left_out": float((~self.free()).double().mean())}


class FromSpectrum(Variant):
    """A variant that starts from r singular directions of W: of those that no kept adapter uses the highest by `selection_score`."""

    reads_weight: ClassVar[Literal["never", "init", "step"]] = "init"
    calibration: ClassVar[Literal["no", "optional", "required"]] = "optional"
    chooses_directions: ClassVar[bool] = True

    @staticmethod
    def start(cfg: Any, spectrum: Spectrum, chosen: Int[Tensor, " r"]) -> dict[str, Tensor]:
        """The tensors that hold the chosen directions."""
        raise NotImplementedError

    @staticmethod
    def needs_calibration(cfg: Any) -> bool:
        return cfg.selection_score != "s_only"

    @staticmethod
    def observe(cfg: Any, base: Base, exclude: Tensor | None) -> Spectrum:
        assert base.weight is not None  # reads_weight is "init"
        return Spectrum(base.weight, exclude)

    @classmethod
    def init(cls, cfg: Any, base: Base, observed: Spectrum, generator: Generator | None) -> Initial:
        chosen = observed.choose(cfg.selection_score, cfg.r)
        return Initial(cls.start(cfg, observed, chosen), observed.notes(chosen))

    @staticmethod
    def check(cfg: Any, notes: Mapping[str, float]) -> str | None:
        return unsaid(cfg.selection_score, notes)


def tail_depth(chosen: Int[Tensor, " r"], k: int) -> float:
    """How deep in a spectrum of k the picks lie: 0 the top only, 1 all in the tail."""
    r = len(chosen)
    return (float(chosen.double().mean()) - (r - 1) / 2) / max(1, k - r)


def unsaid(by: str, notes: Mapping[str, float]) -> str | None:
    """A sentence to warn with: nothing was left out that was asked to be, or a score picked what s_only would without data."""
    depth = notes.get("tail_depth", 1.0)
    if notes.get("left_out") == 0.0:  # as with a LoRA of r=8 trained on a toy Llama: 0 of 768 directions, the nearest spanned to 0.38
        return (
            "exclude_directions left out no direction: the kept adapters' inputs span less than half of every singular direction, as "
            "a LoRA's do whose random A has hardly turned; PiSSA and AntiPaSTO adapters use directions of the weight itself"
        )
    if by == "s_only" or depth > DEEP:
        return None
    return (
        f"selection_score={by!r} picked the top of the spectrum, as s_only would: tail_depth {depth:.3f}, "
        f"not above {DEEP}; is the calibration data what the adapter is for, and r well below the layers' rank?"
    )
