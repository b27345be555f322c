"""Where PEFT keeps other numbers than we do: what turns one layer's tensors into the other's, and into those for another c?"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.base import dense_weight
from lora_lite.checkpoint import strip_prefixes
from lora_lite.config import RankedConfig
from lora_lite.variant import Base, variant_of
from lora_lite.variants.dora import row_norms
from lora_lite.variants.pissa import PiSSA

Fields = Mapping[str, Tensor]


def common_dtype(tensors: Mapping[str, Fields]) -> torch.dtype:
    """One dtype that holds all values: float32, or float64 where there are some."""
    return functools.reduce(torch.promote_types, {v.dtype for fields in tensors.values() for v in fields.values()}, torch.float32)


class At(NamedTuple):
    """One layer under conversion: its own config (ours), its sizes, and the module where a model is at hand."""

    cfg: Any
    d_in: int
    d_out: int
    layer: nn.Module | None = None
    name: str = ""

    def weight(self) -> Tensor:
        """W (d_out, d_in). Raises RuntimeError without a model, TypeError for a quantised layer."""
        if self.layer is None:
            raise RuntimeError(
                f"PEFT's form of {variant_of(self.cfg).name!r} holds numbers of the base weight: attach the adapter first, unmerged"
            )
        return dense_weight(self.layer).detach()


Convert = Callable[[Fields, At], Fields]
Said = dict[str, dict[str, Any]]  # dictionaries of PEFT's config, one layer's part of each


def same(p: Fields, at: At) -> Fields:
    return p


def nothing_dropped(p: Fields, at: At) -> tuple[Fields, Said]:
    return p, {}


def scaled(*names: str) -> Callable[[Fields, At, float], Fields]:
    """c enters in a line through these tensors."""
    return lambda p, at, c: {k: v * c if k in names else v for k, v in p.items()}


class Distance(NamedTuple):
    """A tensor that PEFT keeps as a value and we as its distance from where it starts."""

    name: str
    start: Callable[[At], Tensor | float]

    def read(self, p: Fields, at: At) -> Fields:
        value = p[self.name]
        return {**p, self.name: (value.double() - self.begin(value, at)).to(value.dtype)}

    def write(self, p: Fields, at: At) -> Fields:
        """In the first dtype that gives the distance back bit for bit: near 1 float32 is spaced by 1e-7, a distance of 1e-3 by 1e-10.
        Float64 says all distances from 2e-9 of their start on; PEFT casts what it loads to float32."""
        distance, begin = p[self.name], self.begin(p[self.name], at)
        whole = distance.double() + begin
        for dtype in dict.fromkeys((distance.dtype, torch.float32)):
            if torch.equal((whole.to(dtype).double() - begin).to(distance.dtype), distance):
                return {**p, self.name: whole.to(dtype)}
        return {**p, self.name: whole}

    def begin(self, like: Tensor, at: At) -> Tensor | float:
        start = self.start(at)
        return start.to(like.device) if isinstance(start, Tensor) else start


ROAD_STRETCH = Distance("lora_alpha", lambda at: 1.0)
IA3_GATE = Distance("lora_l", lambda at: 1.0)
DORA_MAGNITUDE = Distance("lora_m", lambda at: torch.linalg.vector_norm(at.weight(), dim=1, dtype=torch.float64))


def dora_turn(p: Fields, at: At, c: float) -> Fields:
    """W + c (g (W + sBA) - W) is DoRA again: with h = 1 - c + cg, B' = (cg/h) B and m' = sign(h) |h W + cg sBA|, row by row."""
    W, A, B = at.weight().double(), p["lora_A"].double(), p["lora_B"].double()
    norm, n, q = row_norms(W, A, at.cfg.scaling * B)
    g = 1 + (p["lora_m"].double() - q / (norm + n)) / n
    h = 1 - c + c * g
    if bool((h.abs() < 1e-4).any()):
        raise ValueError(f"{at.name}: at c={c} a row of the base vanishes, which DoRA cannot say; as_lora=True, approximate=True can")
    B = (c * g / h)[:, None] * B
    _, n, _ = row_norms(W, A, at.cfg.scaling * B)
    dtype = p["lora_B"].dtype
    return {"lora_A": p["lora_A"], "lora_B": B.to(dtype), "lora_m": (h.sign() * h.abs() * n - norm).to(dtype)}


def pissa_read(p: Fields, at: At) -> Fields:
    """PEFT subtracts s B0 A0 from the weight when it loads; here they are found again and the differences kept. The sign of
    a direction is free: each is turned to where A and B went."""
    base = Base(at.d_in, at.d_out, at.weight())
    start = PiSSA.init(at.cfg, base, PiSSA.observe(at.cfg, base, None), None).tensors
    A, B = p["lora_A"], p["lora_B"]
    A0, B0 = start["lora_A0"].to(A), start["lora_B0"].to(B)
    if A0.shape != A.shape or B0.shape != B.shape:
        return p  # refused with the other shapes
    sign = torch.where((A0 * A).sum(1) + (B0 * B).sum(0) < 0, -1.0, 1.0).to(A)
    A0, B0 = A0 * sign[:, None], B0 * sign
    return {"lora_A": A - A0, "lora_B": B - B0, "lora_A0": A0, "lora_B0": B0}


def adalora_fill(p: Fields, at: At) -> Fields:
    """Ranks that the schedule took away are not in the file: back come zeros, which add nothing."""
    A, B, E = (p.get(field) for field in ("lora_A", "lora_B", "lora_E"))
    if A is None or B is None or E is None or not A.dim() == B.dim() == E.dim() == 2 or not len(A) == len(E) == B.shape[1] <= at.cfg.r:
        return p  # refused with the other shapes
    more, pad = at.cfg.r - len(A), torch.nn.functional.pad
    return {"lora_A": pad(A, (0, 0, 0, more)), "lora_B": pad(B, (0, more)), "lora_E": pad(E, (0, 0, 0, more))}


def adalora_drop(p: Fields, at: At) -> tuple[Fields, Said]:
    """Ranks that are zero throughout, as `adalora_fill` puts them back, stay out of the file again; its config says which."""
    kept = p["lora_A"].any(1) | p["lora_B"].any(0) | p["lora_E"].any(1)
    if bool(kept.all()):
        return p, {}
    fields = {"lora_A": p["lora_A"][kept], "lora_B": p["lora_B"][:, kept], "lora_E": p["lora_E"][kept]}
    return fields, {"rank_pattern": {f"{strip_prefixes(at.name)}.lora_E": kept.tolist()}}


def adalora_read(p: Fields, at: At) -> Fields:
    """E as a vector, and the schedule's own state: nothing measured yet, chosen what is not zero (only pruning makes it so).

    Where all of a layer's E is zero it is fresh, but for the ranks that `adalora_fill` put back.
    """
    E = p["lora_E"].flatten()
    kept = (E != 0 if bool(E.any()) else p["lora_A"].any(dim=1)).to(E.dtype)
    fields = {**p, "lora_E": E}
    return {**fields, **{f"{n}_{what}": torch.zeros_like(v) for n, v in fields.items() for what in "IU"}, "lora_kept": kept}


def adalora_write(p: Fields, at: At) -> Fields:
    return {**p, "lora_E": p["lora_E"][:, None]}


class Found(NamedTuple):
    """A folder's config, as PEFT has it, and its tensors: those of all layers, each layer's own, with the layers' sizes (d_in, d_out)."""

    config: Mapping[str, Any]
    shared: Fields
    own: Mapping[str, Fields]
    sizes: Mapping[str, tuple[int, int]]


def vera_room(config: Any, found: Found) -> Any:
    """How wide the shared projections are; what has not two sides is refused with the other shapes."""
    A, B = found.shared.get("lora_A"), found.shared.get("lora_B")
    if A is None or B is None or A.dim() != 2 or B.dim() != 2:
        return config
    return dataclasses.replace(config, room=(A.shape[1], B.shape[0]))


def pissa_scales(config: Any, found: Found) -> Any:
    """PEFT cuts r down to a layer's rank and leaves the scale what it was; here the scale follows r, so alpha makes up for it."""
    alphas = {}
    for t, size in found.sizes.items():
        own, asked = config.at(t, *size), RankedConfig.at(config, t, *size)
        if own.r < asked.r:
            alphas[re.escape(t)] = own.alpha * asked.scaling / own.scaling
    return dataclasses.replace(config, alpha_pattern={**alphas, **config.alpha_pattern}) if alphas else config


def oft_blocks(config: Any, found: Found) -> Any:
    """PEFT takes the nearest block size that divides a layer's width, or the nearest number of blocks, we the largest size below
    the one asked for: the tensors tell which it was."""
    held = {t: p["lora_Q"].shape[0] for t, p in found.own.items() if "lora_Q" in p and p["lora_Q"].dim() == 2}
    blocks = {t: found.sizes[t][0] // n for t, n in held.items() if n and found.sizes[t][0] % n == 0}
    size = max(blocks.values(), default=0)
    if size < 2 or len(blocks) < len(found.own):
        return config  # refused with the other shapes
    fitting = dataclasses.replace(config, block_size=size)
    if odd := {t: b for t, b in blocks.items() if fitting.at(t, *found.sizes[t]).block_size != b}:
        t, b = next(iter(odd.items()))
        raise ValueError(f"its layers have blocks of several sizes, {size} and {b} (in {t}), which no one block_size gives here")
    return fitting


def oft_asked(config: Any, ats: Mapping[str, At]) -> int | None:
    """The oft_block_size nearest to ours of which PEFT makes every layer's own, if there is one: of the numbers that divide a
    layer's width it takes the nearest, of two as near the smaller. So each layer leaves an interval."""
    first, last = 2, max(at.d_in for at in ats.values())
    for at in ats.values():
        below, b, above = beside(at.d_in, at.cfg.block_size)
        first, last = max(first, (below + b) // 2 + 1), min(last, (b + above) // 2) if above else last
    return min(max(config.block_size, first), last) if first <= last else None


@functools.lru_cache
def beside(width: int, b: int) -> tuple[int, int, int]:
    """b, which divides the width, between the next numbers that do; 0 where there is none."""
    sizes = [0, *(n for n in range(1, width + 1) if width % n == 0), 0]
    i = sizes.index(b)
    return sizes[i - 1], b, sizes[i + 1]


def oft_said(config: Any, ats: Mapping[str, At]) -> Any:
    """In PEFT's number for the blocks."""
    return dataclasses.replace(config, block_size=oft_asked(config, ats))


def oft_unsaid(config: Any, ats: Mapping[str, At]) -> str | None:
    if config.cayley == "neumann" and config.terms == 3:
        return "terms=3: PEFT's 3 is its 4"
    if oft_asked(config, ats) is None:
        sizes = {at.cfg.block_size: t for t, at in ats.items()}
        some = ", ".join(f"{b} (in {sizes[b]})" for b in sorted(sizes)[:3])
        return f"blocks of {some} at once: it has one oft_block_size for all layers, and of no number it would make these"
    return None


def gate_axis(at: At) -> int:
    """PEFT's gate of outputs is a column, its gate of inputs a row."""
    return 0 if at.cfg.feedforward else 1


def gate_read(p: Fields, at: At) -> Fields:
    gate = p["lora_l"]
    return IA3_GATE.read({"lora_l": gate.squeeze(gate_axis(at))}, at) if gate.dim() == 2 else p


def gate_write(p: Fields, at: At) -> Fields:
    return {"lora_l": IA3_GATE.write(p, at)["lora_l"].unsqueeze(gate_axis(at))}


def oft_factor(at: At) -> float:
    """PEFT's exact form turns by -Q, its truncated one by Q, ours both by Q; and of two terms PEFT makes I + 2 Q, we I + Q."""
    return -1.0 if at.cfg.cayley == "exact" else 2.0 if at.cfg.terms == 2 else 1.0


def oft_read(p: Fields, at: At) -> Fields:
    return {"lora_Q": p["lora_Q"] * oft_factor(at)}


def oft_write(p: Fields, at: At) -> Fields:
    return {"lora_Q": p["lora_Q"] / oft_factor(at)}
