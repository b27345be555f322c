"""SharedSubspace, trained live: y = W x + s B C A x; B and A are a layer's frozen bases, shared by many tasks, C is this task's own.

    train     trained per layer             update
    core      C (k_b, k_a)                  s B C A
    diag      d (k,)                        s B diag(d) A
    factors   Y (r, k_b), X (r, k_a)        s B Y^T X A
    flat      y (k_b,), x (k_a,)            s (mean_B + y comps_B as d_out x r) (mean_A + x comps_A as r x d_in)

B (d_out, k_b) and A (k_a, d_in) come from a subspace: `ll.attach(model, ll.SharedConfig(train="core"), shared=sub)`. The file
carries them, so `ll.load` needs no subspace. LoRA-XS (arXiv:2405.17604) is the core on a basis of W instead; flat is EigenLoRAx
(arXiv:2502.04700).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Generator, Tensor

from lora_lite.config import AdapterConfig
from lora_lite.lowrank import LowRank
from lora_lite.variant import Base, Identity, Params, ParamSpec, Variant, register

KINDS = ("core", "diag", "factors", "flat")


class Room(NamedTuple):
    """What one layer's tensors measure: directions on each side, the update's rank, its scale, and the widest rank a flat basis holds."""

    k_b: int
    k_a: int
    r: int
    scale: float
    widest: int


@dataclass(frozen=True, kw_only=True)
class SharedConfig(AdapterConfig):
    """`ll.attach(model, ll.SharedConfig(train="core"), shared=sub)` fills in what follows `r`.

    train   what moves: a k x k core, its diagonal, two k x r factors, or (space "flat") one loading per component
    expand  further random directions per side, this task's own until `sub.commit`
    task    start at this task of the subspace instead of at the base
    r       of "factors"
    rooms   by exact layer name: Room, as plain numbers
    basis_id, basis_hash  how many tasks and layers made the bases, and sha256 over them
    """

    variant: ClassVar[str] = "shared"
    train: Literal["core", "diag", "factors", "flat"] = "core"
    expand: int = 0
    task: str | None = None
    r: int = 16
    rooms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    basis_id: str = ""
    basis_hash: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train not in KINDS:
            raise ValueError(f"train must be one of {KINDS}, got {self.train!r}")
        for name, least in (("expand", 0), ("r", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
        if bad := [m for m, room in self.rooms.items() if len(room) != 5 or any(n < 0 or n != int(n) for n in (*room[:3], room[4]))]:
            raise ValueError(f"rooms are (k_b, k_a, r, scale, widest) by layer; wrong at {bad[:3]}")
        rooms = {m: (int(b), int(a), int(r), float(s), int(w)) for m, (b, a, r, s, w) in self.rooms.items()}
        object.__setattr__(self, "rooms", rooms)

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        if target not in self.rooms:
            raise ValueError(f"no bases for layer {target!r}, only for {list(self.rooms)[:3]}: ll.attach(..., shared=sub) brings them")
        return dataclasses.replace(self, rooms={target: self.rooms[target]})

    def renamed(self, names: Mapping[str, str]) -> Self:
        return dataclasses.replace(self, rooms={names.get(m, m): room for m, room in self.rooms.items()})

    @property
    def room(self) -> Room:
        """Of the one layer this config was resolved for."""
        (room,) = self.rooms.values()
        return Room(*room)  # type: ignore[arg-type]


def small(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """One factor moves from the start, the other is zero: with both at zero no gradient would ever leave."""
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


@register
class Shared(Variant):
    name = "shared"
    Config = SharedConfig
    paper = "2502.04700"
    parameters = "k * {'core': k, 'diag': 1, 'factors': 2 * r, 'flat': 2}[train]"
    needs_shared = True
    identity = Identity("bitwise", 'but for train="flat", which starts at the mean adapter, and for task=, which starts at that task')

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SharedConfig) -> dict[str, ParamSpec]:
        kb, ka, r, _, widest = cfg.room
        if cfg.train == "flat":
            wide_b, wide_a = widest * d_out, widest * d_in
            frozen = {"lora_comps_B": (kb, wide_b), "lora_comps_A": (ka, wide_a), "lora_mean_B": (wide_b,), "lora_mean_A": (wide_a,)}
        else:
            frozen = {"lora_B": (d_out, kb), "lora_A": (ka, d_in)}
        trained = {
            "core": {"lora_core": ParamSpec((kb, ka))},
            "diag": {"lora_diag": ParamSpec((min(kb, ka),))},
            "factors": {"lora_Y": ParamSpec((r, kb)), "lora_X": ParamSpec((r, ka), small)},
            "flat": {"lora_y": ParamSpec((kb,)), "lora_x": ParamSpec((ka,))},
        }[cfg.train]
        return trained | {name: ParamSpec(shape, trainable=False) for name, shape in frozen.items()}

    @staticmethod
    def factors(cfg: SharedConfig, p: Params, base: Base) -> LowRank:
        _, _, r, scale, _ = cfg.room
        if cfg.train == "flat":
            A, B = p["lora_mean_A"] + p["lora_x"] @ p["lora_comps_A"], p["lora_mean_B"] + p["lora_y"] @ p["lora_comps_B"]
            return LowRank(A.reshape(-1, base.d_in)[:r], B.reshape(-1, base.d_out)[:r].T, scale)
        A, B = p["lora_A"], p["lora_B"]
        if cfg.train == "core":
            return LowRank(p["lora_core"] @ A, B, scale)
        if cfg.train == "diag":
            k = len(p["lora_diag"])
            return LowRank(A[:k], B[:, :k], scale * p["lora_diag"])
        return LowRank(p["lora_X"] @ A, B @ p["lora_Y"].T, scale)
