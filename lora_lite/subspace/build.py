"""How do many adapters become one subspace? Layer by layer, each layer of all adapters read once and let go."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence

import torch
from loguru import logger
from torch import Tensor

from lora_lite.checkpoint import finite, listed
from lora_lite.config import AdapterConfig
from lora_lite.subspace.apart import cheaper
from lora_lite.subspace.bases import joined
from lora_lite.subspace.block import Block, blocks
from lora_lite.subspace.coefficients import Kind, both, encode, encode_rows
from lora_lite.subspace.forms import split
from lora_lite.subspace.frame import Choose, Frame, leading, none
from lora_lite.subspace.packed import wide
from lora_lite.subspace.reserve import beyond
from lora_lite.subspace.source import Source, Update, check_finite, lora_config, same_sizes
from lora_lite.subspace.state import Layer, Missing, Policy, State
from lora_lite.variants.lora import LoRAConfig

LOST = 0.9  # of |dW|: a task that loses more is as good as gone
Rows = tuple[Tensor, Tensor]


def data(kind: Kind, stacks: Sequence[Block], dtype: torch.dtype, room: Rows | None = None) -> Rows:
    """The rows whose leading directions are the basis, for each side; in `room`, those of a layer that is done, where they fit: a
    sixth of the time went into getting fresh memory."""
    (d_in, d_out), device = stacks[0].sizes, stacks[0].scale.device
    if kind == "flat":
        sizes = [sum(len(x.scale) for x in stacks)] * 2
        widths = d_out * max(x.r for x in stacks), d_in * max(x.r for x in stacks)
    else:
        sizes, widths = [sum(len(x.scale) * x.r for x in stacks)] * 2, (d_out, d_in)
    shapes = list(zip(sizes, widths, strict=True))
    if room is None or [(*X.shape, X.dtype, X.device) for X in room] != [(*shape, dtype, device) for shape in shapes]:
        room = torch.empty(shapes[0], dtype=dtype, device=device), torch.empty(shapes[1], dtype=dtype, device=device)
    at = 0
    for x in stacks:
        end = at + len(x.scale) * (1 if kind == "flat" else x.r)
        Xb, Xa = (X[at:end] for X in room)
        if kind == "flat":
            fill(Xb, x.B.transpose(1, 2))
            fill(Xa, x.A)
        else:
            x.weigh(Xb, Xa)
        at = end
    return room


def fill(X: Tensor, rows: Tensor) -> None:
    """What `flat_a` and `flat_b` make, in place."""
    X[:, : rows[0].numel()].unflatten(1, rows.shape[1:]).copy_(rows)
    X[:, rows[0].numel() :] = 0


def by_policy(kind: Kind, policy: Policy) -> Choose:
    """How many directions a side keeps, from its spectrum. A layer's explained variance is lost on both sides, so each side
    leaves out at most half of what may be left out."""

    def choose(spectrum: Tensor, total: float) -> int:
        if policy.num_components is not None:
            return min(policy.num_components, len(spectrum))
        share = policy.variance_threshold if kind == "flat" else (1 + policy.variance_threshold) / 2
        enough = spectrum.cumsum(0) >= share * total * (1 - 1e-12)
        return min(int((~enough).sum()) + 1, len(spectrum))

    return choose


def reserves(kind: Kind, policy: Policy) -> bool:
    """Whether layers hold directions back for absorbs: not of a diagonal, which none can carry, nor out of a budget."""
    return kind != "diag" and policy.budget_bytes is None


def build_layer(kind: Kind, policy: Policy, tasks: Sequence[str], stacks: Sequence[Block], rows: Rows, dtype: torch.dtype) -> Layer:
    """Overwrites the rows of `data`."""
    d_in, d_out = stacks[0].sizes
    frames = [side(kind, policy, X, dtype) for X in rows]
    if kind == "diag":  # direction j of one side belongs to direction j of the other
        k = min(f.k for f in frames)
        frames = [f.cut(k) for f in frames]
    b, a = frames
    if kind == "flat":
        coded = [both(encode_rows(b, rows[0], dtype), encode_rows(a, rows[1], dtype))]
    else:
        wide_b, wide_a = (dataclasses.replace(f, components=wide(f.components)) for f in frames)  # once for all
        coded = [encode(kind, wide_b, wide_a, x, dtype) for x in stacks]
    parts = tuple(torch.cat(column) for column in zip(*(c.parts for c in coded), strict=True))
    energy = torch.cat([c.energy for c in coded])
    lost = torch.cat([c.error for c in coded])
    ranks, scales = tuple(x.r for x in stacks for _ in x.scale), tuple(s for x in stacks for s in x.scale.tolist())
    layer = Layer(d_in, d_out, b, a, tuple(tasks), ranks, scales, parts, energy.float(), lost.float())
    if not reserves(kind, policy):
        return layer
    totals = [float(f.energy.sum()) + f.rest if kind == "flat" else float(energy.sum()) for f in (b, a)]
    kb, ka = (by_policy(kind, policy)(f.energy, total) for f, total in zip((b, a), totals, strict=True))
    return split(kind, layer, kb, ka, fresh=dtype.itemsize >= 4)


def check_values(kind: Kind, module: str, tasks: Sequence[str], updates: Sequence[Update], stacks: Sequence[Block]) -> None:
    """By what is computed anyway and is finite only where they are; one by one where it is not."""
    if not all(finite(x.scale) and (finite(x.A) and finite(x.B) if kind == "flat" else finite(x.energy)) for x in stacks):
        for task, update in zip(tasks, updates, strict=True):
            check_finite(task, module, update)


def side(kind: Kind, policy: Policy, X: Tensor, dtype: torch.dtype) -> Frame:
    """In "flat" leaves in X the rows less the mean as it is held."""
    mean = X.mean(0) if kind == "flat" else None
    if mean is not None:
        X -= mean
    more = beyond if reserves(kind, policy) else none
    U, energy = leading(X, by_policy(kind, policy), policy.num_components, more)
    if mean is not None and dtype is not X.dtype:
        X += mean - mean.to(dtype)
    rest = 0.0 if mean is None else max(0.0, float(torch.linalg.vector_norm(X)) ** 2 - float(energy.sum()))
    return Frame(U.to(dtype), None if mean is None else mean.to(dtype), energy.float(), rest)


def shared_modules(sources: Sequence[Source], missing: Missing) -> list[str]:
    """The layers of the subspace, in the first adapter's order. Raises ValueError where adapters differ and may not."""
    found = list(dict.fromkeys(m for s in sources for m in s.modules))
    absent = {m: [s.task for s in sources if m not in set(s.modules)] for m in found}
    absent = {m: tasks for m, tasks in absent.items() if tasks}
    if not found:
        raise ValueError("the adapters have no layers")
    if not absent or missing == "zero":
        return found
    examples = "; ".join(f"{m} is not in {tasks[:3]}" for m, tasks in list(absent.items())[:3])
    if missing == "error":
        raise ValueError(
            f'{len(absent)} of {len(found)} layers are not in every adapter: {examples}. missing="zero" or "common" allows that'
        )
    common = [m for m in found if m not in absent]
    if not common:
        raise ValueError(f"the adapters share no common layers: {examples}")
    logger.warning("left out, since not in every adapter: {}", sorted(absent))
    return common


Progress = Callable[[int, int], None]  # (layers done, of how many)


def build(
    sources: Sequence[Source], kind: Kind, policy: Policy, missing: Missing, dtype: torch.dtype | None, progress: Progress | None = None
) -> State:
    modules = shared_modules(sources, missing)
    base = None
    for s in sources:
        base = joined(base, s.base, s.task)
    layers: dict[str, Layer] = {}
    rows = None
    first = policy if policy.budget_bytes is None else dataclasses.replace(policy, variance_threshold=1.0, num_components=None)
    for module in modules:
        having = [s for s in sources if module in set(s.modules)]
        updates = [having[0].read(module)]
        for s in having[1:]:
            updates.append(same_sizes(s.task, module, s.read(module), updates[0].sizes, f"adapter {having[0].task!r}"))
        tasks, stacks = [s.task for s in having], list(blocks(updates))
        check_values(kind, module, tasks, updates, stacks)
        rows = data(kind, stacks, precise(updates), rows)
        layers[module] = build_layer(kind, first, tasks, stacks, rows, dtype or precise(updates))
        del updates, stacks  # before the next layer's are read
        if progress is not None:
            progress(len(layers), len(modules))
    state = State("flat" if kind == "flat" else "feature", kind, missing, policy, layers, base=base)
    if policy.budget_bytes is not None:
        state = budgeted(state, policy.budget_bytes, sources, dtype)
    say_bare(state, [s.task for s in sources])
    say_lost(state, [s.task for s in sources])
    return dataclasses.replace(state, configs={s.task: config_of(state, s.task, s.base_config) for s in sources})


def say_bare(state: State, tasks: Sequence[str]) -> None:
    """A zero adapter among others is one like them; where all are zero there is nothing to share, and nothing to train along."""
    if bare := [m for m, layer in state.layers.items() if layer.bare]:
        logger.warning(
            "{} of {} layers have no directions, since every adapter ({}) is zero there (B = 0: was it trained?): {}; absorb of one that "
            "is not brings some", len(bare), len(state.layers), listed(tasks), listed(bare),
        )  # fmt: skip


def say_lost(state: State, tasks: Sequence[str]) -> None:
    """A share of the whole collection is kept: of a task that is small beside the others that may be nothing."""
    energy, lost = dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, 0.0)
    for layer in state.layers.values():
        for task, whole, gone in zip(layer.tasks, layer.energy.double().tolist(), layer.lost.double().tolist(), strict=True):
            energy[task] += whole
            lost[task] += gone
    if few := [f"{t} ({(lost[t] / energy[t]) ** 0.5:.2f})" for t in energy if lost[t] > LOST**2 * energy[t] > 0]:
        logger.warning(
            "{} of {} tasks keep next to nothing here: |dW - kept| is more than {} of |dW| for {}; give more directions (num_components, "
            "variance_threshold, budget_bytes), or leave out what shares none", len(few), len(energy), LOST, listed(few),
        )  # fmt: skip


def config_of(state: State, task: str, config: AdapterConfig) -> LoRAConfig:
    """The config of the adapter that a task's coefficients stand for."""
    having = {m: layer for m, layer in state.layers.items() if task in layer.index}
    if not having:
        raise ValueError(f"adapter {task!r} has none of the layers of the subspace")
    ranks = {m: layer.rank(state.kind, task) for m, layer in having.items()}
    return lora_config(config, ranks, {m: layer.scales[layer.index[task]] for m, layer in having.items()})


def precise(updates: Sequence[Update]) -> torch.dtype:
    """float32, or float64 where an adapter is: 16 bits are for storage (`to`), not for a basis that is computed with."""
    dtype = torch.float32
    for u in updates:
        dtype = torch.promote_types(dtype, torch.promote_types(u.A.dtype, u.B.dtype))
    return dtype


# -- a budget -----------------------------------------------------------------------------------------------------------


def budgeted(state: State, budget: int, sources: Sequence[Source], dtype: torch.dtype | None) -> State:
    """Directions within the budget. Layers whose tasks' own factors lose less at the same bytes keep those, the worst half of them at a
    time: what they leave unspent goes to the others, which may then be better shared."""
    full, alone = dict(state.layers), dict[str, Layer]()
    while full:
        left = budget - sum(x.nbytes for layer in alone.values() for x in layer.stored())
        shared = within_budget(dataclasses.replace(state, layers=full), left).layers
        better = {} if state.kind == "flat" else {m: own for m, x in shared.items() if (own := own_factors(m, x, sources, dtype))}
        if not better:
            return dataclasses.replace(state, layers={m: alone.get(m) or shared[m] for m in state.layers})
        gains = {m: float(shared[m].lost.double().sum() - own.lost.double().sum()) for m, own in better.items()}
        for m in sorted(gains, key=gains.__getitem__, reverse=True)[: (len(gains) + 1) // 2]:
            alone[m] = better[m]
            del full[m]
    return dataclasses.replace(state, layers={m: alone[m] for m in state.layers})


def own_factors(module: str, shared: Layer, sources: Sequence[Source], dtype: torch.dtype | None) -> Layer | None:
    """The tasks' factors, read again, where they lose less than the shared layer in no more bytes."""
    updates = [s.read(module) for s in sources if s.task in shared.index]
    return cheaper(shared, shared.tasks, updates, dtype or precise(updates))


def within_budget(state: State, budget: int) -> State:
    """Directions one by one, each time the one that explains most per byte, over all layers and sides."""
    ks = {(m, s): min(1, frame(layer, s).k) for m, layer in state.layers.items() for s in "ba"}
    if state.kind == "diag":
        ks = {(m, "b"): 1 for m in state.layers}
    spent = sum(cost(state.kind, layer, *widths(state.kind, ks, m)) for m, layer in state.layers.items())
    if spent > budget:
        raise ValueError(f"budget_bytes={budget:,} does not hold one direction per side of each layer, which takes {spent:,}")
    heap = [(-gain(state, ks, key), key) for key in ks]
    heapq.heapify(heap)
    while heap:
        worth, key = heapq.heappop(heap)
        if worth != (now := -gain(state, ks, key)):  # the other side has grown since, which makes a direction dearer
            heapq.heappush(heap, (now, key))
            continue
        if now == 0 or spent + (price := step(state, ks, key)) > budget:
            continue
        ks[key] += 1
        spent += price
        heapq.heappush(heap, (-gain(state, ks, key), key))
    layers = {m: split(state.kind, x, *widths(state.kind, ks, m), reserve=False) for m, x in state.layers.items()}
    return dataclasses.replace(state, layers=layers)


def frame(layer: Layer, name: str) -> Frame:
    return layer.b if name == "b" else layer.a


def widths(kind: Kind, ks: dict[tuple[str, str], int], module: str) -> tuple[int, int]:
    kb = ks[module, "b"]
    return kb, kb if kind == "diag" else ks[module, "a"]


def step(state: State, ks: dict[tuple[str, str], int], key: tuple[str, str]) -> int:
    layer, kind = state.layers[key[0]], state.kind
    return cost(kind, layer, *widths(kind, ks | {key: ks[key] + 1}, key[0])) - cost(kind, layer, *widths(kind, ks, key[0]))


def gain(state: State, ks: dict[tuple[str, str], int], key: tuple[str, str]) -> float:
    f, k = frame(state.layers[key[0]], key[1]), ks[key]
    return float(f.energy[k]) / step(state, ks, key) if k < f.k else 0.0


def cost(kind: Kind, layer: Layer, kb: int, ka: int) -> int:
    """Bytes of a layer held with kb and ka directions."""
    n, width = len(layer.tasks), layer.b.basis().itemsize
    per_task = {"core": n * kb * ka, "factors": sum(layer.ranks) * (kb + ka), "diag": n * min(kb, ka), "flat": n * (kb + ka)}[kind]
    means = sum(f.d for f in (layer.b, layer.a) if f.mean is not None)
    return width * (kb * layer.b.d + ka * layer.a.d + means + per_task) + 4 * (kb + ka + 2 * n)
