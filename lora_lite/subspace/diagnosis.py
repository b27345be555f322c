"""Does this collection share anything, and is a shared basis the cheapest way to keep it? Measured per layer, never assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite.adapter import Adapter
from lora_lite.lowrank import LowRank
from lora_lite.subspace.apart import Apart
from lora_lite.subspace.block import Block, blocks
from lora_lite.subspace.build import Progress, data
from lora_lite.subspace.coefficients import encode
from lora_lite.subspace.frame import Frame, leading
from lora_lite.subspace.packed import Packed
from lora_lite.subspace.source import PathLike, Update, source_of
from lora_lite.subspace.state import Layer, State

SAMPLED = 8  # tasks left out in turn: each costs a basis of all the others
SAME_SEED = 0.7  # cosine between two A's: unrelated ones are at 0, give or take 1 / sqrt(r k) where they share k directions
MORE_THAN_CHANCE = 1.5
# Of |dW|^2: eight bits lose 1e-4 of it. What is kept of truncated updates lies in the few directions they were truncated to, so that
# three unrelated ones, of which 10% was let go, found 100% of one another; of the originals it is 1%.
WHOLE = 1e-3
ASK = "give the original adapters"


@dataclass(frozen=True)
class Verdict:
    """What one layer's updates have in common.

    coverage     how much of the tasks the k directions kept hold; without the originals at least this, from the tasks' bounds
    left_out     the same of a task whose own update was left out when the basis was made: what a new task may expect
    chance       `left_out` when every update keeps its singular values and gets random directions
    mean_adapter 1 - |dW - mean|^2 / |dW|^2: what one and the same adapter for all tasks would do
    seed_groups  tasks that will have started from one seed; found in the originals' own A only
    bytes        at the shared basis' error: "shared", "diag", "truncated", "int8"; None where it cannot reach that error
    originals    whether this was measured on the adapters, or on what was kept of them

    left_out, chance and mean_adapter are None, and bytes is empty, where a part of the adapters is gone and the originals were not given.
    """

    coverage: float
    left_out: float | None
    chance: float | None
    mean_adapter: float | None
    seed_groups: tuple[tuple[str, ...], ...]
    bytes: Mapping[str, int | None]
    originals: bool

    @property
    def shares(self) -> bool | None:
        """None: it cannot be told."""
        if self.left_out is None or self.chance is None:
            return None
        return self.left_out > max(MORE_THAN_CHANCE * self.chance, self.chance + 0.05)

    @property
    def text(self) -> str:
        if self.shares is None:
            return f"no verdict: {1 - self.coverage:.1%} of the adapters is not kept, and the rest would agree by itself; {ASK}"
        best = min((b, name) for name, b in self.bytes.items() if b is not None)[1]
        first = f"a new task finds {self.left_out:.0%} of itself here, {self.chance:.0%} by chance: " + (
            "the tasks share directions" if self.shares else "nothing is shared"
        )
        return f"{first}; the cheapest at this error is {best}"


def diagnose(
    state: State, adapters: Mapping[str, Adapter | PathLike] | None, seed: int, progress: Progress | None = None
) -> dict[str, Verdict]:
    if state.space == "flat":
        raise ValueError('diagnose() measures directions of dW, which space="flat" does not keep; build with space="feature"')
    if adapters is not None and set(adapters) != set(state.configs):
        raise ValueError(f"diagnose() needs the adapters of {list(state.configs)[:5]}, got {list(adapters)[:5]}")
    sources = None if adapters is None else {t: source_of(t, a) for t, a in adapters.items()}
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for done, (m, layer) in enumerate(state.layers.items(), 1):
        if progress is not None:
            progress(done, len(state.layers))
        if len(layer.tasks) < 2 or isinstance(layer, Apart):
            continue
        if sources is None and (gone := let_go(layer)) > WHOLE:
            found[m] = Verdict(1 - gone, None, None, None, (), {}, False)
            continue
        updates = [as_update(layer.update(state.kind, t)) if sources is None else sources[t].read(m) for t in layer.tasks]
        found[m] = verdict(layer, updates, sources is not None, generator)
    return found


def let_go(layer: Layer) -> float:
    """The share of the layer's |dW|^2 that is not kept, at most."""
    whole = float(layer.energy.double().sum())
    return min(1.0, float(layer.lost.double().sum()) / whole) if whole else 0.0


def as_update(u: LowRank) -> Update:
    return Update(u.A, u.B, float(u.g))


def verdict(layer: Layer, updates: Sequence[Update], originals: bool, generator: torch.Generator) -> Verdict:
    kb, ka = max(1, layer.b.k), max(1, layer.a.k)
    b, a = bases(updates, kb, ka)
    errors = sum(1 - covered(b, a, u) for u in updates)
    return Verdict(
        coverage=1 - float(errors) / len(updates),
        left_out=left_out(updates, kb, ka),
        chance=left_out([scrambled(u, generator) for u in updates], kb, ka),
        mean_adapter=mean_share(updates),
        seed_groups=same_seed(layer.tasks, updates) if originals else (),
        bytes=equal_error(updates, b, a),
        originals=originals,
    )


def bases(updates: Sequence[Update], kb: int, ka: int) -> tuple[Frame, Frame]:
    found = []
    for X, k in zip(data("core", list(blocks(updates)), torch.float64), (kb, ka), strict=True):
        U, energy = leading(X, lambda spectrum, total, k=k: min(k, len(spectrum)), k)
        found.append(Frame(U, None, energy))
    return found[0], found[1]


def core(b: Frame, a: Frame, u: Update) -> Tensor:
    return u.scale * encode("core", b, a, Block([u])).parts[0][0]


def energy(u: Update) -> float:
    return u.scale**2 * float(((u.B.T @ u.B).double() * (u.A @ u.A.T).double()).sum())


def covered(b: Frame, a: Frame, u: Update) -> float:
    whole = energy(u)
    return float(core(b, a, u).square().sum()) / whole if whole else 1.0


def left_out(updates: Sequence[Update], kb: int, ka: int) -> float:
    n = len(updates)
    chosen = sorted({round(i * (n - 1) / max(1, min(SAMPLED, n) - 1)) for i in range(min(SAMPLED, n))})
    shares = []
    for i in chosen:
        b, a = bases([u for j, u in enumerate(updates) if j != i], kb, ka)
        shares.append(covered(b, a, updates[i]))
    return sum(shares) / len(shares)


def scrambled(u: Update, generator: torch.Generator) -> Update:
    """The same singular values along random directions."""
    _, S, _ = LowRank(u.A.double(), u.B.double()).svd()

    def directions(d: int) -> Tensor:
        drawn = torch.randn(d, len(S), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn).Q.to(S.device)

    return Update(directions(u.A.shape[1]).T, directions(u.B.shape[0]) * S, u.scale)


def mean_share(updates: Sequence[Update]) -> float:
    """N |mean|^2 / sum |dW|^2, by inner products of factors."""
    B = torch.cat([u.B.double() * u.scale for u in updates], dim=1)
    A = torch.cat([u.A.double() for u in updates])
    whole = sum(map(energy, updates))
    return float(((B.T @ B) * (A @ A.T)).sum()) / len(updates) / whole if whole else 1.0


def same_seed(tasks: Sequence[str], updates: Sequence[Update]) -> tuple[tuple[str, ...], ...]:
    """Groups of tasks whose A's point the same way, entry by entry. Shared directions alone do not do that: each training would
    have to have mixed them alike."""
    group = list(range(len(tasks)))
    for i, u in enumerate(updates):
        for j, v in enumerate(updates[:i]):
            if u.A.shape == v.A.shape and float(torch.cosine_similarity(u.A.flatten(), v.A.flatten(), dim=0)) > SAME_SEED:
                group = [group[j] if g == group[i] else g for g in group]
    found = [tuple(t for t, g in zip(tasks, group, strict=True) if g == label) for label in dict.fromkeys(group)]
    return tuple(g for g in found if len(g) > 1)


def equal_error(updates: Sequence[Update], b: Frame, a: Frame) -> dict[str, int | None]:
    """Bytes in float32 (or int8) that each form takes to be no further from the updates than a shared core."""
    whole = sum(map(energy, updates))
    cores = [core(b, a, u) for u in updates]
    error = max(whole - sum(float(c.square().sum()) for c in cores), 1e-10 * whole)
    k, basis = min(b.k, a.k), 4 * (b.k * b.d + a.k * a.d)
    diagonal = whole - sum(float(c.diagonal().square().sum()) for c in cores)
    spectra = [LowRank(u.A.double(), u.B.double() * u.scale).svd()[1].square() for u in updates]
    tail, kept = torch.cat(spectra).sort().values.cumsum(0), 0
    kept = int((tail > error).sum())  # the smallest singular values of all tasks go first
    return {
        "shared": basis + 4 * len(updates) * b.k * a.k,
        "diag": basis + 4 * len(updates) * k if diagonal <= error else None,
        "truncated": 4 * kept * (b.d + a.d),
        "int8": sum(Packed.of(x, 8, 128).nbytes for u in updates for x in (u.A, u.B)) if rounding(updates) <= error else None,
    }


def rounding(updates: Sequence[Update]) -> float:
    """Squared error of factors held in int8."""
    total = 0.0
    for u in updates:
        A, B = Packed.of(u.A, 8, 128).dense().to(u.A), Packed.of(u.B.T, 8, 128).dense().T.to(u.B)
        both = Update(torch.cat([u.A, A]).double(), torch.cat([u.B, -B], dim=1).double(), u.scale)
        total += energy(both)
    return total
