"""How does a subspace take in, give up or quantise, without its old tasks losing more than it says? A state in, a new state out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lite.subspace.apart import Apart, as_parts
from lora_lite.subspace.bases import joined
from lora_lite.subspace.block import Block
from lora_lite.subspace.build import build_layer, by_policy, config_of, data, precise, reserves
from lora_lite.subspace.coefficients import Coded, Kind, Parts, flat_a, flat_b, mapped
from lora_lite.subspace.forms import further, rounded, split
from lora_lite.subspace.frame import NOISE, Choose, Frame, More, extended, none, upright
from lora_lite.subspace.packed import Packed, Sizes, Stored, dense, wide
from lora_lite.subspace.reserve import beyond
from lora_lite.subspace.source import Source, Update, check_finite, same_sizes
from lora_lite.subspace.state import Layer, State, sizes

# Numbers that share a scale of 2 bytes: by bits, for bases and for coefficients. Small groups are what four bits gain most by; with
# these they are still 7 times smaller than float32. Rows too short for a group of their own share one of 64.
BASIS_GROUP, COEFFICIENT_GROUP, SHORT_GROUP = {8: 128, 4: 64}, {8: 64, 4: 32}, 64


class Grown(NamedTuple):
    """One side with room for one more task: rows (k + q, d) that are T C with C orthonormal, the mean, the scatter of all tasks in
    C's coordinates and all there ever was of it, and how old ones turn into the first k of them (k, k) and shift (k + q,). In float64."""

    rows: Tensor
    T: Tensor
    mean: Tensor | None
    scatter: Tensor
    total: float
    turn: Tensor
    shift: Tensor | None


def absorb(state: State, source: Source) -> State:
    """Take in a task and the directions it brings; every old coefficient is carried into the new basis exactly, then all are
    truncated together. Nothing is computed from old adapters, which need not exist any more."""
    if state.kind == "diag":
        raise ValueError(
            'coefficients="diag" keeps a pinned basis: an absorb cannot carry a diagonal. project() and add_task(), or build "core"'
        )
    if state.bits is not None:
        raise ValueError(
            f"this subspace is quantised to {state.bits} bits, and turning its basis would round every old task again; "
            "to(dtype=torch.float32) first, quantize() afterwards; project() and add_task() work as it is"
        )
    check_new(state, source.task)
    updates = read_all(state, source)
    layers = dict(state.layers)
    for module, update in updates.items():
        old = state.layers.get(module)
        layers[module] = alone(state, source.task, update) if old is None else absorbed(state, old, source.task, update)
    return admitted(dataclasses.replace(state, layers=layers), source)


def alone(state: State, task: str, update: Update) -> Layer:
    """A layer that no task had before."""
    stacks, dtype = [Block([update])], precise([update])
    return build_layer(state.kind, state.policy, [task], stacks, data(state.kind, stacks, dtype), dtype)


def admitted(state: State, source: Source) -> State:
    configs = {**state.configs, source.task: config_of(state, source.task, source.base_config)}
    return dataclasses.replace(state, configs=configs, base=joined(state.base, source.base, source.task))


def check_new(state: State, task: str) -> None:
    if task in state.configs:
        raise ValueError(f"a task {task!r} is there already; remove_task it first, or give another id")


def read_all(state: State, source: Source, new: bool = True) -> dict[str, Update]:
    """The source's updates for the layers of the state, all checked before anything is computed."""
    joined(state.base, source.base, source.task)
    has = set(source.modules)
    absent, extra = [m for m in state.layers if m not in has], [m for m in source.modules if m not in state.layers]
    if absent and state.missing != "zero":
        raise ValueError(
            f'adapter {source.task!r} lacks {len(absent)} of {len(state.layers)} modules: {absent[:3]}; missing="zero" allows that'
        )
    if extra and state.missing == "error":
        raise ValueError(
            f"adapter {source.task!r} has {len(extra)} modules that the subspace lacks: {extra[:3]}; it has {list(state.layers)[:3]}"
        )
    modules = [m for m in source.modules if m in state.layers or (new and state.missing == "zero")]
    if not modules:
        raise ValueError(f"adapter {source.task!r} has none of the layers of the subspace: {list(state.layers)[:3]}")
    updates = {m: source.read(m) for m in modules}
    for m, update in updates.items():
        check_finite(source.task, m, update)
        if m in state.layers:
            layer = state.layers[m]
            same_sizes(source.task, m, update, (layer.d_in, layer.d_out), "the subspace")
            device = layer.lost.device
            updates[m] = Update(update.A.to(device), update.B.to(device), update.scale)
    return updates


# -- absorbing ----------------------------------------------------------------------------------------------------------


def absorbed(state: State, layer: Layer, task: str, update: Update) -> Layer:
    if isinstance(layer, Apart):
        return appended(layer, task, update)
    layer = layer.whole(state.kind)
    new = Block([Update(update.A.double(), update.B.double(), update.scale)])
    sides, own = (grown_flat if state.kind == "flat" else grown)(layer, state.kind, new)
    whole = dataclasses.replace(
        layer, tasks=(*layer.tasks, task), ranks=(*layer.ranks, update.rank), scales=(*layer.scales, update.scale),
        energy=torch.cat([layer.energy.double(), own.energy]).float(),
    )  # fmt: skip
    return truncated(state, layer, whole, sides, own)


def appended(layer: Apart, task: str, update: Update) -> Layer:
    return layer.joined("factors", task, update.rank, update.scale, as_parts(update), float(Block([update]).energy), 0.0)


def grown(layer: Layer, kind: Kind, new: Block) -> tuple[tuple[Grown, Grown], Coded]:
    """Both sides with the update's directions added, and the update in their coordinates."""
    rows = [torch.empty(f.k + new.r, f.d, dtype=torch.float64, device=new.scale.device) for f in (layer.b, layer.a)]
    new.weigh(*(W[-new.r :] for W in rows))
    found, coordinates, total = [], [], float(layer.energy.double().sum() + new.energy)
    for W, frame, factor, other in zip(rows, (layer.b, layer.a), (new.B[0].T, new.A[0]), new.grams[::-1], strict=True):
        W[: frame.k] = frame.basis()
        W, T = extended(W, frame.k, noise_of(frame))
        own = torch.linalg.solve_triangular(T, (factor.double() @ W.T).T, upper=False)  # W by the few columns takes half as long again
        turn = T[: frame.k, : frame.k]
        scatter = turned_energy(frame, turn, len(W)) + new.scale.square() * (own @ other[0] @ own.T)
        found.append(Grown(W, T, None, scatter, total, turn, None))
        coordinates.append(own)
    left, right = coordinates
    core = left @ right.T
    error = new.energy - new.scale.square() * core.square().sum()
    return (found[0], found[1]), Coded((core[None],) if kind == "core" else (left.T, right.T), new.energy, error.clamp(min=0))


def grown_flat(layer: Layer, kind: Kind, new: Block) -> tuple[tuple[Grown, Grown], Coded]:
    n = len(layer.tasks)
    wide_b, wide_a = widened(layer.b, new.B.numel()), widened(layer.a, new.A.numel())
    x_b, x_a = flat_b(new.B, wide_b.d)[0].double(), flat_a(new.A, wide_a.d)[0].double()
    (b, own_b, off_b), (a, own_a, off_a) = grow_centred(wide_b, x_b, n), grow_centred(wide_a, x_a, n)
    return (b, a), Coded((own_b[None], own_a[None]), (x_b.square().sum() + x_a.square().sum())[None], (off_b + off_a)[None])


def grow_centred(frame: Frame, x: Tensor, n: int) -> tuple[Grown, Tensor, Tensor]:
    """The mean moves by (x - mean) / (n + 1); what the old loadings are measured from moves with it, along the new direction. With
    x's own loadings and what they miss."""
    mean = frame.centre()
    assert mean is not None
    step = x - mean.double()
    W, T = extended(torch.cat([wide(frame.components), step[None]]), frame.k, noise_of(frame))
    z = torch.linalg.solve_triangular(T, (W @ step)[:, None], upper=False)[:, 0]
    turn = T[: frame.k, : frame.k]
    scatter = turned_energy(frame, turn, len(W)) + torch.outer(z, z) * (n / (n + 1))
    own = z * (n / (n + 1))
    off = (step.square().sum() * (n / (n + 1)) ** 2 - own.square().sum()).clamp(min=0)
    total = float(frame.energy.double().sum() + step.square().sum() * (n / (n + 1))) + frame.rest
    return Grown(W, T, mean.double() + step / (n + 1), scatter, total, turn, -z / (n + 1)), own, off


def noise_of(frame: Frame) -> float:
    return 8 * torch.finfo(frame.basis().dtype).eps


def turned_energy(frame: Frame, turn: Tensor, size: int) -> Tensor:
    more = size - frame.k
    return F.pad(turn.T @ (frame.energy.double()[:, None] * turn), (0, more, 0, more))


def widened(frame: Frame, width: int) -> Frame:
    """Room for a rank larger than any before: zeros behind, as every old task has them there."""
    more = max(0, width - frame.d)
    mean = frame.centre()
    assert mean is not None
    return frame if not more else dataclasses.replace(frame, components=F.pad(frame.basis(), (0, more)), mean=F.pad(mean, (0, more)))


def carry(kind: Kind, parts: Parts, b: Grown, a: Grown) -> Parts:
    """Every old task in the grown coordinates: the same update, to rounding. Only a mean that moves needs the new ones of them."""
    parts = mapped(kind, parts, b.turn, a.turn)
    if b.shift is None or a.shift is None:
        return parts
    return F.pad(parts[0], (0, len(b.T) - len(b.turn))) + b.shift, F.pad(parts[1], (0, len(a.T) - len(a.turn))) + a.shift


def truncated(state: State, layer: Layer, whole: Layer, sides: tuple[Grown, Grown], own: Coded) -> Layer:
    """Onto the leading directions of all tasks together; what each task loses is added to its bound."""
    kind, policy, dtype, old = state.kind, state.policy, layer.b.basis().dtype, layer.all_parts()
    choices = [as_many(f) if policy.budget_bytes is not None else by_policy(kind, policy) for f in (layer.b, layer.a)]
    more = beyond if reserves(kind, policy) else none
    (Rb, energy_b, kb), (Ra, energy_a, ka) = (strongest(g, choose, more) for g, choose in zip(sides, choices, strict=True))
    carried = carry(kind, old, *sides)
    before = torch.cat([layer.measure(kind, carried), sizes(kind, own.parts, whole.ranks[-1:], whole.weights()[-1:])])
    turned = (mapped(kind, p, Rb[: p[0].shape[1]], Ra[: p[-1].shape[-1]]) for p in (carried, own.parts))
    kept = tuple(torch.cat(pair) for pair in zip(*turned, strict=True))
    after = whole.measure(kind, kept)
    gone = (before - after).clamp(min=0)
    b, a = (
        Frame(
            turned_rows(g, R, dtype),
            None if g.mean is None else g.mean.to(dtype),
            energy.float(),
            0.0 if g.mean is None else max(0.0, g.total - float(energy.sum())),
        )
        for g, R, energy in ((sides[0], Rb, energy_b), (sides[1], Ra, energy_a))
    )
    lost = further(torch.cat([layer.lost.double(), own.error]), gone).float()  # the new one's own is rounding: its directions are all there
    return split(kind, dataclasses.replace(whole, b=b, a=a, parts=tuple(p.to(dtype) for p in kept), lost=lost), kb, ka, after)


def turned_rows(grown: Grown, R: Tensor, dtype: torch.dtype) -> Tensor:
    """The directions that R makes of C, to be kept in `dtype`; in float32, where more would be rounded off, in half the time."""
    precise = torch.promote_types(dtype, torch.float32)
    onto = torch.linalg.solve_triangular(grown.T, R.T, upper=False, left=False)
    return (onto.to(precise) @ grown.rows.to(precise)).to(dtype)


def as_many(frame: Frame) -> Choose:
    """Under a budget each side keeps the number of directions it was given; the threshold was not what chose it."""
    return lambda spectrum, total: min(max(1, frame.k), len(spectrum))


def strongest(grown: Grown, choose: Choose, more: More) -> tuple[Tensor, Tensor, int]:
    """(R (k + q, k' + q'), energies (k' + q',), k'): the rotation onto the strongest directions, to be used and to be held back.

    A threshold is a share of all that was ever given, not only of what is still there: each absorb would let go of as much again."""
    values, vectors = torch.linalg.eigh(grown.scatter)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    k = choose(values, grown.total)
    real = int((values > NOISE * values[0]).sum()) if len(values) else 0
    wide = max(k, min(k + more(k), real))
    return vectors[:, :wide], values[:wide], k


# -- leaving, moving, quantising ----------------------------------------------------------------------------------------


def removed(state: State, task: str) -> State:
    layers = {m: layer.without(state.kind, task) if task in layer.index else layer for m, layer in state.layers.items()}
    return dataclasses.replace(state, layers=layers, configs={t: c for t, c in state.configs.items() if t != task})


def quantised(state: State, bits: int) -> State:
    """Bases to integers, then every coefficient fitted again to the basis as it is now, and to integers itself."""
    if state.bits == bits:
        return state
    layers = {m: coarse(quantised_layer(state.kind, layer, bits)) for m, layer in state.layers.items()}
    return dataclasses.replace(state, layers=layers, bits=bits)


def coarse(layer: Layer) -> Layer:
    """What is known of each task's size and error in a byte each."""
    return dataclasses.replace(layer, energy=Sizes.of(layer.energy.double(), False), lost=Sizes.of(layer.lost.double(), True))


def quantised_layer(kind: Kind, layer: Layer, bits: int) -> Layer:
    if isinstance(layer, Apart):
        if layer.held == f"int{bits}":
            return layer
        return layer.with_parts(tuple(Packed.of(dense(p), bits, BASIS_GROUP[bits]) for p in layer.parts))
    b, a = quantised_frame(layer.b, bits), quantised_frame(layer.a, bits)
    parts = layer.all_parts() if kind == "diag" else mapped(kind, layer.meant(kind), refit(layer.b, b), refit(layer.a, a))
    new = dataclasses.replace(layer, b=b, a=a, parts=tuple(Packed.of(p, bits, group_of(kind, p, bits)) for p in parts), reserve=None)
    return rounded(kind, layer, new)


def group_of(kind: Kind, parts: Tensor, bits: int) -> int:
    """Rows that share a scale lose a tenth more by rounding, which a smaller file has to be worth: not where bases are r times larger."""
    width = parts[:1].numel()
    if width >= SHORT_GROUP // 2:
        return COEFFICIENT_GROUP[bits]
    return max(width, 16) if kind == "flat" else SHORT_GROUP


def quantised_frame(frame: Frame, bits: int) -> Frame:
    mean = None if frame.mean is None else Packed.of(dense(frame.mean)[None], bits, BASIS_GROUP[bits])
    return dataclasses.replace(frame, components=Packed.of(frame.basis(), bits, BASIS_GROUP[bits]), mean=mean)


def refit(old: Frame, new: Frame) -> Tensor:
    """(k, k): the old directions in least-squares coordinates of the new ones."""
    return new.coordinates(old.basis().double().T).T


def moved(state: State, device: torch.device | None, dtype: torch.dtype | None) -> State:
    """Onto a device, in a dtype. A quantised state given a dtype is dequantised: its bases made orthonormal, the coefficients carried.
    So is one whose precision rises, as far as that rounding had bent it."""
    if state.bits is not None and dtype is not None:
        state = dataclasses.replace(state, layers={m: straight(state.kind, fine(x)) for m, x in state.layers.items()}, bits=None)
    put: Callable[[Stored], Stored] = lambda x: x.to(device or x.device) if isinstance(x, Packed) else x.to(device=device, dtype=dtype)  # noqa: E731

    def frame(f: Frame) -> Frame:
        mean = None if f.mean is None else put(f.mean)
        return dataclasses.replace(f, components=put(f.components), mean=mean, energy=f.energy.to(device=device))

    def layer(x: Layer) -> Layer:
        if dtype is not None and dtype.itemsize > x.b.basis().itemsize == 2:
            x = straight(state.kind, x)
        parts = tuple(put(p) for p in x.parts)
        reserve = x.reserve if dtype in (None, x.b.basis().dtype) else None  # it was behind the basis as it was
        if dtype is not None and isinstance(x, Apart):
            x = x.with_parts(parts)
        elif dtype is not None and any(f.basis().dtype != dtype for f in (x.b, x.a)):
            x = rounded(state.kind, x, dataclasses.replace(x, b=frame(x.b), a=frame(x.a), parts=parts))
        places = dict(energy=x.energy.to(device=device), lost=x.lost.to(device=device), reserve=reserve and reserve.to(device))
        return dataclasses.replace(x, b=frame(x.b), a=frame(x.a), parts=parts, **places)

    return dataclasses.replace(state, layers={m: layer(x) for m, x in state.layers.items()})


def fine(layer: Layer) -> Layer:
    energy = layer.energy.middle() if isinstance(layer.energy, Sizes) else layer.energy
    return dataclasses.replace(layer, energy=energy.float(), lost=layer.lost.double().float())


def straight(kind: Kind, layer: Layer) -> Layer:
    """In float32 on orthonormal bases, which integers and 16 bits had bent: the same updates, but of diagonals, which cannot be turned."""
    if isinstance(layer, Apart):
        return dataclasses.replace(layer, parts=layer.all_parts())
    (Ub, Tb), (Ua, Ta) = ((nearest_upright if kind == "diag" else upright)(f.basis().double()) for f in (layer.b, layer.a))
    b, a = (dataclasses.replace(f, components=U.float(), mean=f.centre()) for U, f in ((Ub, layer.b), (Ua, layer.a)))
    parts = layer.meant(kind)
    k = parts[0].shape[1]
    carried = (parts[0].double() @ (Tb * Ta)[:k, :k],) if kind == "diag" else mapped(kind, parts, Tb, Ta)
    new = dataclasses.replace(layer, b=b, a=a, parts=tuple(p.float() for p in carried), reserve=None)
    return rounded(kind, layer, new) if kind == "diag" else new


def nearest_upright(U: Tensor) -> tuple[Tensor, Tensor]:
    """As `upright`, but with each direction as near to its own as can be: U = T Q with T symmetric."""
    values, vectors = torch.linalg.eigh(U @ U.T)
    root = values.clamp(min=1e-12).sqrt()
    return (vectors / root) @ vectors.T @ U, (vectors * root) @ vectors.T
