"""Does this collection share anything, and is a shared basis the cheapest way to keep it? Measured per layer, never assumed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lite.adapter import Adapter
from lora_lite.lowrank import LowRank
from lora_lite.subspace.apart import Apart
from lora_lite.subspace.block import Block, blocks
from lora_lite.subspace.build import Progress, data, side
from lora_lite.subspace.coefficients import encode, expand
from lora_lite.subspace.frame import Frame, gram, leading
from lora_lite.subspace.packed import Packed
from lora_lite.subspace.source import PathLike, Source, Update, check_finite, same_sizes, source_of
from lora_lite.subspace.state import Layer, Policy, State

Space = Literal["feature", "flat"]
SAMPLED = 8  # tasks left out in turn: each costs a basis of all the others
SAME_SEED = 0.7  # cosine between two A's: unrelated ones are at 0, give or take 1 / sqrt(r k) where they share k directions
MORE_THAN_CHANCE = 1.5
# Of |dW|^2: eight bits lose 1e-4 of it. What is kept of truncated updates lies in the few directions they were truncated to, so that
# three unrelated ones, of which 10% was let go, found 100% of one another; of the originals it is 1%.
WHOLE = 1e-3
ASK = "give the original adapters"
LEADING = 64  # directions of a spectrum that are told


class Spectra(NamedTuple):
    """Of the output side (b) and of the input side (a): what each direction, strongest first, holds of all updates together. In "flat"
    of that side's flattened factors, the mean taken away."""

    b: tuple[float, ...]
    a: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """What one layer's updates have in common, as shares of |dW|^2.

    coverage     how much of the tasks the k directions kept hold; without the originals at least this, from the tasks' bounds (in
                 "flat" of each factor)
    left_out     the same of a task whose own update was left out when the basis was made: what a new task may expect
    chance       `left_out` when every update keeps its singular values and gets random directions; in "flat", when its factors keep
                 their lengths and get random entries
    mean_adapter 1 - |dW - mean|^2 / |dW|^2: what one and the same adapter for all tasks would do
    spectrum, chance_spectrum  of the updates, and of those that `chance` is of
    seed_groups  tasks that will have started from one seed; found in the originals' own A only, which "flat" keeps
    bytes        at the shared basis' error: "shared", "diag", "truncated", "int8"; None where it cannot reach that error
    originals    whether this was measured on the adapters, or on what was kept of them
    held         "shared", or how the tasks' own factors are kept where the layer has no basis; as many directions as such a task has
                 ranks are tried then, and no bytes compared
    tasks        how many have the layer

    left_out, chance, mean_adapter and the spectra are None, and bytes is empty, where there are fewer than two tasks, or a part of the
    adapters is gone and the originals were not given.
    """

    coverage: float
    left_out: float | None
    chance: float | None
    mean_adapter: float | None
    spectrum: Spectra | None
    chance_spectrum: Spectra | None
    seed_groups: tuple[tuple[str, ...], ...]
    bytes: Mapping[str, int | None]
    originals: bool
    held: Literal["shared", "raw", "int8", "int4"]
    tasks: int

    @property
    def shares(self) -> bool | None:
        """None: it cannot be told."""
        if self.left_out is None or self.chance is None or self.idle:
            return None
        chance = max(0.0, self.chance)
        return self.left_out > max(MORE_THAN_CHANCE * chance, chance + 0.05)

    @property
    def idle(self) -> bool:
        """Whether all updates are zero, as those of fresh adapters are."""
        return self.spectrum is not None and () in self.spectrum

    @property
    def needs_originals(self) -> bool:
        return self.tasks > 1 and self.left_out is None

    @property
    def text(self) -> str:
        if self.tasks < 2:
            return "one task alone has this layer, so it shares it with none" if self.tasks else "no task has this layer"
        if self.idle:
            return "its tasks change nothing here"
        own = "" if self.held == "shared" else f"its tasks keep their own factors ({self.held}); "
        if self.left_out is None or self.chance is None:
            return f"{own}no verdict: up to {1 - self.coverage:.1%} of the adapters is not kept, and the rest would agree by itself; {ASK}"
        found = f"a new task finds {max(0.0, self.left_out):.0%} of itself here, {max(0.0, self.chance):.0%} by chance"
        best = min(((b, name) for name, b in self.bytes.items() if b is not None), default=None)
        cheapest = f"; the cheapest at this error is {best[1]}" if best else ""
        return f"{own}{found}: {'the tasks share directions' if self.shares else 'nothing is shared'}{cheapest}"


def check_originals(given: object, tasks: Collection[str]) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"diagnose() takes the originals by task id, {{id: adapter or path}}, got {type(given).__name__}")
    absent, extra = [t for t in tasks if t not in given], [t for t in given if t not in tasks]
    if absent or extra:
        raise ValueError(f"diagnose() needs every task's original and no other: without one are {absent[:5]}, not tasks are {extra[:5]}")


def diagnose(
    state: State, adapters: Mapping[str, Adapter | PathLike] | None, seed: int, progress: Progress | None = None
) -> dict[str, Verdict]:
    if adapters is not None:
        check_originals(adapters, state.configs)
    sources = None if adapters is None else {t: source_of(t, a) for t, a in adapters.items()}
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for done, (m, layer) in enumerate(state.layers.items(), 1):
        if progress is not None:
            progress(done, len(state.layers))
        gone = let_go(state, layer)
        if len(layer.tasks) < 2 or (sources is None and gone > WHOLE):
            found[m] = Verdict(1 - gone, None, None, None, None, None, (), {}, False, held(layer), len(layer.tasks))
            continue
        updates = [as_update(layer.update(state.kind, t)) if sources is None else original(sources[t], m, layer) for t in layer.tasks]
        found[m] = verdict(state.space, layer, updates, gone, sources is not None, generator)
    return found


def original(source: Source, module: str, layer: Layer) -> Update:
    if module not in source.modules:
        raise ValueError(f"the adapter given for task {source.task!r} has no layer {module!r}, which the task has; is it another's?")
    update = same_sizes(source.task, module, source.read(module), (layer.d_in, layer.d_out), "the subspace")
    check_finite(source.task, module, update)
    return Update(update.A.to(layer.lost.device), update.B.to(layer.lost.device), update.scale)


def held(layer: Layer) -> Literal["shared", "raw", "int8", "int4"]:
    return layer.held if isinstance(layer, Apart) else "shared"


def let_go(state: State, layer: Layer) -> float:
    """The share of the layer's |dW|^2 that is not kept, at most. In "flat" the bounds are of both factors together; all of what is lost
    may be of the smaller one."""
    whole, lost = float(layer.energy.double().sum()), float(layer.lost.double().sum())
    if state.space == "flat":
        kept = [layer.update(state.kind, t) for t in layer.tasks]
        whole = sum(min(float(u.A.double().square().sum()), float(u.B.double().square().sum())) for u in kept)
    return min(1.0, lost / whole) if whole else float(lost > 0)


def as_update(u: LowRank) -> Update:
    return Update(u.A, u.B, float(u.g))


def verdict(space: Space, layer: Layer, given: Sequence[Update], gone: float, originals: bool, generator: torch.Generator) -> Verdict:
    widest = max(u.rank for u in given)
    updates = [of_rank(widest, u) for u in given] if space == "flat" else given
    apart = isinstance(layer, Apart)
    kb, ka = (min(widest, d) for d in (layer.d_out, layer.d_in)) if apart else (max(1, layer.b.k), max(1, layer.a.k))
    b, a = bases(space, updates, kb, ka)
    random = [scrambled(space, u, generator) for u in updates]
    return Verdict(
        coverage=1 - gone if apart else sum(covered(space, b, a, u) for u in updates) / len(updates),
        left_out=left_out(space, updates, kb, ka),
        chance=left_out(space, random, kb, ka),
        mean_adapter=mean_share(updates),
        spectrum=spectra(space, updates),
        chance_spectrum=spectra(space, random),
        seed_groups=same_seed(layer.tasks, given) if originals or space == "flat" or apart else (),
        bytes={} if apart else equal_error(space, given, b, a, sum(missed(space, b, a, u) for u in updates)),
        originals=originals,
        held=held(layer),
        tasks=len(layer.tasks),
    )


def of_rank(r: int, u: Update) -> Update:
    """The same update with zeros behind, so that flattened factors are of one length."""
    return Update(F.pad(u.A, (0, 0, 0, r - u.rank)), F.pad(u.B, (0, r - u.rank)), u.scale)


def bases(space: Space, updates: Sequence[Update], kb: int, ka: int) -> tuple[Frame, Frame]:
    found = []
    for X, k in zip(rows(space, updates), (kb, ka), strict=True):
        if space == "flat":
            found.append(side("flat", Policy(num_components=k), X, torch.float64).cut(k))
        else:
            U, energy = leading(X, lambda spectrum, total, k=k: min(k, len(spectrum)), k)
            found.append(Frame(U, None, energy))
    return found[0], found[1]


def rows(space: Space, updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    return data("flat" if space == "flat" else "core", list(blocks(updates)), torch.float64)


def spectra(space: Space, updates: Sequence[Update]) -> Spectra:
    found = []
    for X in rows(space, updates):
        whole = float(X.square().sum())
        if space == "flat":
            X -= X.mean(0)
        values = torch.linalg.eigvalsh(gram(X if len(X) <= X.shape[1] else X.T)).flip(0).clamp(min=0)
        found.append(tuple((values[:LEADING] / whole).tolist()) if whole else ())
    return Spectra(*found)


def core(b: Frame, a: Frame, u: Update) -> Tensor:
    return u.scale * encode("core", b, a, Block([u])).parts[0][0]


def energy(u: Update) -> float:
    return u.scale**2 * float(((u.B.T @ u.B).double() * (u.A @ u.A.T).double()).sum())


def missed(space: Space, b: Frame, a: Frame, u: Update) -> float:
    """|dW - kept|^2."""
    if space == "feature":
        return max(0.0, energy(u) - float(core(b, a, u).square().sum()))
    A, B = expand("flat", encode("flat", b, a, Block([u])).parts, b, a, u.rank, u.sizes)
    return apart_by(u, A, B)


def apart_by(u: Update, A: Tensor, B: Tensor) -> float:
    return energy(Update(torch.cat([u.A.double(), A.double()]), torch.cat([u.B.double(), -B.double()], dim=1), u.scale))


def covered(space: Space, b: Frame, a: Frame, u: Update) -> float:
    whole = energy(u)
    return 1 - missed(space, b, a, u) / whole if whole else 1.0


def left_out(space: Space, updates: Sequence[Update], kb: int, ka: int) -> float:
    n = len(updates)
    chosen = sorted({round(i * (n - 1) / max(1, min(SAMPLED, n) - 1)) for i in range(min(SAMPLED, n))})
    shares = []
    for i in chosen:
        b, a = bases(space, [u for j, u in enumerate(updates) if j != i], kb, ka)
        shares.append(covered(space, b, a, updates[i]))
    return sum(shares) / len(shares)


def scrambled(space: Space, u: Update, generator: torch.Generator) -> Update:
    """The same singular values along random directions; in "flat" the same lengths of factors."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(u.A.device)

    if space == "flat":
        A, B = (F.normalize(drawn(x.numel()), dim=0).view(x.shape) * x.double().norm() for x in (u.A, u.B))
        return Update(A, B, u.scale)
    _, S, _ = LowRank(u.A.double(), u.B.double()).svd()
    right, left = (torch.linalg.qr(drawn(d, len(S))).Q for d in u.sizes)
    return Update(right.T, left * S, u.scale)


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


def equal_error(space: Space, updates: Sequence[Update], b: Frame, a: Frame, error: float) -> dict[str, int | None]:
    """Bytes in float32 (or int8) that each form takes to be no further from the updates than the shared one, which has this error."""
    whole = sum(map(energy, updates))
    error = max(error, 1e-10 * whole)
    k, basis = min(b.k, a.k), 4 * (b.k * b.d + a.k * a.d)
    spectra = [LowRank(u.A.double(), u.B.double() * u.scale).svd()[1].square() for u in updates]
    tail = torch.cat(spectra).sort().values.cumsum(0)
    kept = int((tail > error).sum())  # the smallest singular values of all tasks go first
    d_in, d_out = updates[0].sizes
    found: dict[str, int | None] = {
        "shared": basis + 4 * len(updates) * b.k * a.k,
        "diag": None,
        "truncated": 4 * kept * (d_in + d_out),
        "int8": sum(Packed.of(x, 8, 128).nbytes for u in updates for x in (u.A, u.B)) if rounding(updates) <= error else None,
    }
    if space == "flat":
        return found | {"shared": basis + 4 * (b.d + a.d) + 4 * len(updates) * (b.k + a.k)}
    diagonal = whole - sum(float(core(b, a, u).diagonal().square().sum()) for u in updates)
    return found | {"diag": basis + 4 * len(updates) * k if diagonal <= error else None}


def rounding(updates: Sequence[Update]) -> float:
    """Squared error of factors held in int8."""
    return sum(apart_by(u, Packed.of(u.A, 8, 128).dense(), Packed.of(u.B.T, 8, 128).dense().T) for u in updates)
