"""CorDA: LoRA that starts from W's directions as the inputs weigh them: W C = U S V^T, C = sum x x^T.  arXiv:2406.05223

    B0 = U_k sqrt(S_k / s),  A0 = sqrt(S_k / s) V_k^T C^-1,  W_res = W - s B0 A0      (s B0 A0 summed over all k is W)

"kpm", knowledge-preserving: the r weakest directions are trained, so that what the data asks about stays in W_res.
"ipm", instruction-previewed: the r strongest are, those that the data uses most. Trained as differences (differences.py).

As in the authors' code and PEFT each batch of inputs is divided by its largest value and C by the number of batches (which sets
how B0 and A0 share the scale), and C is damped by 0.01 of its mean diagonal, doubled while its inverse is off by 0.05.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lora_lite.variant import Base, Initial, register
from lora_lite.variants.differences import DifferenceConfig, Differences, precise, start_at

MODES = ("kpm", "ipm")


@dataclass(frozen=True, kw_only=True)
class CorDAConfig(DifferenceConfig):
    """`ll.attach(model, CorDAConfig(r=16, mode="ipm"), calibration_data=batches)`. r is clamped to each layer's own rank.

    mode  "kpm": keep what the calibration data is about. "ipm": train for it. A batch is meant to be one text of some length
    """

    variant: ClassVar[str] = "corda"
    mode: Literal["kpm", "ipm"] = "kpm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if bad := [alpha for alpha in self.alphas() if alpha <= 0]:
            raise ValueError(f"alpha must be positive, got {bad[0]!r}: A and B start from sqrt(S r / alpha); a negative dose is c=-1")


class Covariance:
    """Sum of x x^T over the tokens of each batch, batches scaled to a largest value of one; in float64, d_in x d_in. An Observer."""

    def __init__(self, d_in: int, device: torch.device) -> None:
        self.total, self.batches = torch.zeros(d_in, d_in, dtype=torch.float64, device=device), 0

    def update(self, x: Float[Tensor, "n d_in"], group: str) -> None:
        if not len(x) or not bool(x.any()):
            return
        x = x.double()
        largest = x.max().abs()
        x = x / (largest if largest > 0 else x.abs().max())  # published as it stands: the largest, not the largest in magnitude
        self.total.addmm_(x.T, x)
        self.batches += 1

    def damped(self) -> tuple[Float[Tensor, "d_in d_in"], Float[Tensor, "d_in d_in"]]:
        """C with its diagonal raised until it can be inverted, and its inverse. Raises ValueError where nothing was seen."""
        if not self.batches:
            raise ValueError("its inputs in the calibration data are all zero, or none: no direction is weighed more than another")
        C, eye = self.total / self.batches, torch.eye(len(self.total), dtype=torch.float64, device=self.total.device)
        damp = 0.01 * C.diagonal().mean()
        while True:
            raised = C + damp * eye
            L, failed = torch.linalg.cholesky_ex(raised)
            inverse = torch.cholesky_inverse(L)
            if not failed and torch.dist(raised @ inverse, eye) < 0.05:
                return raised, inverse
            damp = 2 * damp


@register
class CorDA(Differences):
    name = "corda"
    Config = CorDAConfig
    paper = "2406.05223"
    reads_weight = "init"
    calibration = "required"
    shares_observers = True

    @staticmethod
    def observe(cfg: CorDAConfig, base: Base, exclude: Tensor | None) -> Covariance:
        assert base.weight is not None  # reads_weight is "init"
        return Covariance(base.d_in, base.weight.device)

    @staticmethod
    def init(cfg: CorDAConfig, base: Base, observed: Covariance, generator: Generator | None) -> Initial:
        C, inverse = observed.damped()
        U, S, Vh = torch.linalg.svd(precise(base.weight).double() @ C, full_matrices=False)
        kept = slice(0, cfg.r) if cfg.mode == "ipm" else slice(len(S) - cfg.r, None)
        root = (S[kept] / cfg.scaling).sqrt()
        return Initial(start_at(root[:, None] * (Vh[kept] @ inverse), U[:, kept] * root))
