"""How does an adapter come to another model? By the maps between the two models' activations on the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_lite.adapter import Adapter
from lora_lite.attachment import unwrapped
from lora_lite.base import fingerprint
from lora_lite.config import ROLES
from lora_lite.lowrank import LowRank, stack
from lora_lite.running import undisturbed
from lora_lite.subspace.source import AdapterSource, lora_config
from lora_lite.transfer.batches import Batches, paired
from lora_lite.transfer.fitting import Figures, Statistics
from lora_lite.transfer.likeness import block_map
from lora_lite.transfer.listening import Listener, Site
from lora_lite.transfer.parts import Anatomy, check_map
from lora_lite.transfer.plan import Job, alike, planned, skipped
from lora_lite.transfer.projector import DimensionProjector
from lora_lite.transfer.result import Moved, TransferResult
from lora_lite.variants.lora import LoRAConfig

LEAST_TOKENS = 32
COMPRESSION = DimensionProjector(variance_threshold=0.9999)  # where several updates come together on one module


def transfer_adapter(
    adapter: Adapter,
    source_model: nn.Module,
    target_model: nn.Module,
    batches: Batches,
    target_batches: Batches | None = None,
    roles: str | Sequence[str] = ("writer",),
    layer_map: Any = "depth",
    sequential: bool = False,
    min_r2: float | None = None,
    *,
    copy_below: float = 0.1,
    strict: bool = False,
    progress: bool = True,
) -> TransferResult:
    """Carry an adapter to a model of another width or depth, without its training data.

        result = ll.transfer_adapter(adapter, source, target, batches)       # 1 000 to 4 000 tokens of any text
        print(result)
        with result.adapter(target): target.generate(**inputs)               # or ll.attach(target, result.adapter)

    batches         what both models run on: tensors, dicts or tuples of arguments; padding is left out
    target_batches  the target's own, where the tokenizers differ: batch by batch as many tokens, token i beside token i
    roles           "writer" (o and down: nearly all of the effect), "reader" (q, k, v, gate, up), or both
    layer_map       "depth"; "cka" (blocks whose streams are most alike); {source block: target block}; {source module: target module}
    sequential      block after block, both models with what was moved before it in place: a pass per block
    min_r2          modules whose read_r2 is lower are skipped
    copy_below      same shape and base weights this close (relative distance): the update is copied, not mapped; 0 never copies
    strict          a module of these roles that cannot be moved is an error, not a row "skipped"

    Both models are run in eval mode without gradients, and come back as they were, also after an exception. The adapter may be
    attached to its model or not. Costs two forwards per batch and, per pair of sites, sums of d x d in float64 and one SVD.
    Raises ValueError naming module and shapes for batches that are empty, unequal or too few, for NaN, for an adapter that is no
    low-rank update (DoRA, IA3: a norm or a gate belongs to its model) and for arguments that cannot be meant. Method: docs/transfer.md.
    """
    source, target = Anatomy(unwrapped(source_model)), Anatomy(unwrapped(target_model))
    wanted = checked_roles(roles)
    check_map(layer_map, source, target)
    check_share("copy_below", copy_below)
    if min_r2 is not None:
        check_share("min_r2", min_r2)
    updates = low_rank(adapter, source)
    run = Run(source, target, adapter, paired(source.model, target.model, batches, target_batches), progress)
    blocks = block_map(source, target, run.listen) if layer_map == "cka" else layer_map
    jobs, left, rows = planned(updates, source, target, wanted, blocks)
    rows += [skipped(name, "trained beside the adapter (train_also), not a low-rank update") for name in adapter.also()]
    refuse(rows, strict, jobs or None, left)
    near = [alike(job, copy_below) for job in jobs]
    moved = [(job, *copied(job)) for job, is_near in zip(jobs, near, strict=True) if is_near]
    moved += run.fitted([job for job, is_near in zip(jobs, near, strict=True) if not is_near], sequential, min_r2)
    rows += [row for _, _, row in moved]
    refuse([row for row in rows if row.action == "skipped"], strict, [u for _, u, _ in moved if u is not None] or None, left)
    rows += left
    order = {name: i for i, name in enumerate(updates.modules)}
    report = sorted(rows, key=lambda row: order.get(row.source.partition("[")[0], len(order)))
    return TransferResult(assembled(adapter, moved, target), tuple(report), adapter, run.tokens)


Carried = tuple[Job, LowRank | None, Moved]


@runtime_checkable
class Taking(Protocol):
    """Whatever takes the activations of one pair of batches."""

    def add(self, xs: Mapping[Site, Tensor], xt: Mapping[Site, Tensor]) -> None: ...


class Run:
    """Both models over the pairs of batches."""

    def __init__(self, source: Anatomy, target: Anatomy, adapter: Adapter, pairs: list[tuple[Any, Any]], progress: bool) -> None:
        self.source, self.target, self.adapter, self.pairs, self.progress = source, target, adapter, pairs, progress
        self.tokens = 0

    def fitted(self, jobs: Sequence[Job], sequential: bool, min_r2: float | None) -> list[Carried]:
        blocks = sorted({job.target.depth for job in jobs})
        groups = [[job for job in jobs if job.target.depth == b] for b in blocks] if sequential else [jobs] if jobs else []
        done: list[Carried] = []
        for group in groups:
            done += self.fit(group, [carried for carried in done if carried[1] is not None], min_r2)
        return done

    def fit(self, jobs: Sequence[Job], before: Sequence[Carried], min_r2: float | None) -> list[Carried]:
        """Jobs on the activations as they are with `before` in place on both sides."""
        statistics = Statistics(jobs)
        self.listen(Listener(self.source, [s for j in jobs for s in (j.read[0], j.write[0], j.out[0])], "source"),
                    Listener(self.target, [s for j in jobs for s in (j.read[1], j.write[1], j.out[1])], "target"),
                    statistics, before)  # fmt: skip
        self.tokens = statistics.fitted
        check_tokens(self.tokens, jobs)
        return [
            verdict(job, *statistics.moved(i), min_r2)
            for i, job in enumerate(tqdm(jobs, desc="fit", unit="module", delay=2, disable=not self.progress))
        ]

    def listen(self, source: Listener, target: Listener, statistics: Taking, before: Sequence[Carried] = ()) -> None:
        """Every pair of batches through both models, into `statistics.add`."""
        with ExitStack() as state:
            state.enter_context(undisturbed(source.model))
            state.enter_context(undisturbed(target.model))
            if self.adapter.attached:
                state.enter_context(self.adapter(self.source.model, c=0.0))
            if before:
                state.enter_context(restricted(self.adapter, {job.source.module for job, _, _ in before})(source.model))
                state.enter_context(assembled(self.adapter, before, self.target, "transfer_to")(target.model))
            for number, (theirs, ours) in enumerate(tqdm(self.pairs, desc="align", unit="batch", delay=2, disable=not self.progress)):
                try:
                    statistics.add(source.run(theirs), target.run(ours))
                except Exception as error:
                    error.add_note(f"in calibration batch {number}")
                    raise


def restricted(adapter: Adapter, modules: set[str]) -> Adapter:
    """The adapter on some of its modules, detached."""
    tensors = {m: {f: p.detach().clone() for f, p in fields.items()} for m, fields in adapter.tensors().items() if m in modules}
    return Adapter(adapter.config, tensors, {m: adapter.sizes[m] for m in tensors}, name="transfer_from")


def copied(job: Job) -> tuple[LowRank, Moved]:
    A, B, g = job.update
    row = Moved(source=job.source.name, target=job.target.name, action="copied", why="the base weights are close", norm_ratio=1.0)
    return LowRank(A.clone(), B.clone(), g), row


def verdict(job: Job, update: LowRank, found: Figures, min_r2: float | None) -> Carried:
    poor = min_r2 is not None and found.read_r2 < min_r2
    why = f"read_r2 {found.read_r2:.3f} is below min_r2={min_r2}" if poor else ""
    row = Moved(source=job.source.name, target=job.target.name, action="skipped" if poor else "moved", why=why, **found._asdict())
    return job, None if poor else split(update), row


# -- the adapter that comes out ---------------------------------------------------------------------------------------------


def assembled(adapter: Adapter, moved: Sequence[Carried], target: Anatomy, name: str | None = None) -> Adapter:
    """A detached LoRA of the target's names, with the fingerprint of the target's base."""
    parts: dict[str, list[tuple[Job, LowRank]]] = {}
    for job, update, _ in moved:
        if update is not None:
            parts.setdefault(job.target.module, []).append((job, update))
    updates = {t.name: together(parts[t.name]) for t in target.layers.values() if t.name in parts}
    layers = {name: target.layers[name] for name in updates}
    dtype = torch.promote_types(next(iter(next(iter(adapter.tensors().values())).values())).dtype, torch.float32)
    ends = LoRAConfig(targets=tuple(dict.fromkeys(rf"(^|\.){name.rpartition('.')[2]}$" for name in updates)), exclude=(), dtype=dtype)
    config = lora_config(ends, {m: u.r for m, u in updates.items()}, {m: float(u.g) for m, u in updates.items()})
    tensors = {m: {"lora_A": on(u.A, layers[m].module, dtype), "lora_B": on(u.B, layers[m].module, dtype)} for m, u in updates.items()}
    return Adapter(
        config, tensors, {m: (t.d_in, t.d_out) for m, t in layers.items()}, name=name or adapter.name, metadata=dict(adapter.metadata),
        fingerprint=fingerprint(target.model, {m: t.module for m, t in layers.items()}),
    )  # fmt: skip


def together(parts: Sequence[tuple[Job, LowRank]]) -> LowRank:
    """All updates of one module as one: in their rows of a fused layer, ranks concatenated, then compressed."""
    whole = [in_rows(job, update) for job, update in parts]
    if len(whole) == 1:
        return whole[0] if isinstance(whole[0].g, float) else split(whole[0])
    return split(stack([LowRank(u.A.double().cpu(), u.B.double().cpu(), u.g) for u in whole]), COMPRESSION)


def split(update: LowRank, kept: DimensionProjector | None = None) -> LowRank:
    """The same update with its singular values split evenly; where it is zero, A stays as it is, so that it can train."""
    S = update.svd()[1]
    if not float(S[0]):
        return LowRank(update.A, torch.zeros_like(update.B))
    return update.truncated(len(S) if kept is None else kept.rank_kept(S))


def in_rows(job: Job, update: LowRank) -> LowRank:
    part = job.target
    if part.rows is None:
        return update
    B = update.B.new_zeros(part.target.d_out, update.r)
    B[part.rows.to(B.device)] = update.B
    return LowRank(update.A, B, update.g)


def on(value: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
    device = next((p.device for p in layer.parameters()), value.device)
    return value.detach().to(device, dtype).contiguous().clone()


# -- taking in ------------------------------------------------------------------------------------------------------------


def low_rank(adapter: Adapter, source: Anatomy) -> AdapterSource:
    if adapter.variant.form != "low-rank":
        raise ValueError(
            f"adapter {adapter.name!r} is of variant {adapter.variant.name!r}, which is no low-rank update (a gate or a norm belongs to "
            "its model); only low-rank updates can be transferred"
        )
    for module, size in adapter.sizes.items():
        t = source.layers.get(module)
        if t is None or (t.d_in, t.d_out) != size:
            found = "has no linear of that name" if t is None else f"has {t.d_in} -> {t.d_out} there"
            raise ValueError(
                f"adapter {adapter.name!r} is for {module} {size[0]} -> {size[1]}; the source {type(source.model).__name__} {found}"
            )
    return AdapterSource(adapter.name, adapter)


def checked_roles(roles: str | Sequence[str]) -> tuple[str, ...]:
    wanted = (roles,) if isinstance(roles, str) else tuple(roles)
    if not wanted or any(role not in ROLES for role in wanted):
        raise ValueError(f"roles={roles!r} are not among {ROLES}")
    return wanted


def check_share(what: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= 1 or (what == "copy_below" and value < 0):
        raise ValueError(f"{what} must be a number up to 1, got {value!r}")


def check_tokens(tokens: int, jobs: Sequence[Job]) -> None:
    least = max(LEAST_TOKENS, *(2 * job.update.r for job in jobs))
    if tokens < least:
        worst = max(jobs, key=lambda job: job.update.r)
        shapes = f"A {tuple(worst.update.A.shape)} and B {tuple(worst.update.B.shape)}"
        raise ValueError(f"{tokens} tokens to fit on are too few for {worst.label}, {shapes}: at least {least}, better 1000 to 4000")


def refuse(rows: Sequence[Moved], strict: bool, something: object, left: Sequence[Moved]) -> None:
    """Raises ValueError where nothing is left to move, or where `strict` and a module of the roles asked for cannot be."""
    rows = sorted(rows, key=lambda row: row.read_r2 is None)
    if something is None:
        raise ValueError(f"no module can be moved: {listing([*rows, *left])}")
    if strict and rows:
        raise ValueError(f"strict=True, and not every module can be moved: {listing(rows)}")


def listing(rows: Sequence[Moved]) -> str:
    return "; ".join(f"{row.source}: {row.why}" for row in rows[:5]) + f" ({len(rows)} in all)"
