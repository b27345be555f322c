"""Where does each part of an adapter go, and which parts have nowhere to go?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lora_lite.base import dense_weight, quantised
from lora_lite.lowrank import LowRank
from lora_lite.subspace.source import AdapterSource, check_finite
from lora_lite.transfer.listening import Site
from lora_lite.transfer.parts import Anatomy, Part, by_depth, partner_stack
from lora_lite.transfer.result import Moved

ROWS = 256  # of two weights that are compared at once: no copy of a whole one is made


@dataclass(frozen=True)
class Job:
    """One part's way, and the pairs of sites its maps are fitted at.

    update  of the source's part, with its scale in g
    read    where the update reads; write, where it is felt; out, what it adds to
    """

    source: Part
    target: Part
    update: LowRank
    read: tuple[Site, Site]
    write: tuple[Site, Site]
    out: tuple[Site, Site]

    @property
    def label(self) -> str:
        return f"{self.source.name} -> {self.target.name}"


def planned(
    updates: AdapterSource, source: Anatomy, target: Anatomy, roles: Sequence[str], layer_map: Any
) -> tuple[list[Job], list[Moved], list[Moved]]:
    """The jobs, a row for each module that `roles` leaves out, and one for each part that has nowhere to go."""
    jobs: list[Job] = []
    left: list[Moved] = []
    rows: list[Moved] = []
    for module in updates.modules:
        role = source.layers[module].role
        if role is not None and role not in roles:
            left.append(skipped(module, f"a {role}, and roles={tuple(roles)!r}"))
            continue
        if reason := unmovable(module, source):
            rows.append(skipped(module, reason))
            continue
        check_finite(updates.task, module, update := updates.read(module))
        A, B, scale = update
        for part in source.parts[module]:
            goal = goal_of(part, source, target, layer_map)
            if isinstance(goal, str):
                rows.append(skipped(part.name, goal))
            else:
                jobs.append(job_of(part, goal, LowRank(A, part.of(B), scale), source, target))
    return jobs, left, rows


def skipped(name: str, why: str) -> Moved:
    return Moved(source=name, target=None, action="skipped", why=why)


def unmovable(module: str, source: Anatomy) -> str | None:
    t = source.layers[module]
    if t.depth is None:
        return "outside the stack of blocks, where there is no depth to go by"
    if t.routed:
        return "inside an expert, which sees tokens in an order of its own"
    if module in source.problems:
        return source.problems[module]
    return None if t.role else "neither a reader nor a writer of the residual stream, as far as is known"


def goal_of(part: Part, source: Anatomy, target: Anatomy, layer_map: Any) -> Part | str:
    """The target's part that does what `part` does, or why there is none."""
    if isinstance(layer_map, Mapping) and part.module in layer_map:
        return named_goal(part, target, layer_map[part.module])
    assert part.target.stack is not None and part.target.depth is not None
    there = partner_stack(source, target, part.target.stack)
    if there is None:
        return f"the target has no stack {part.target.stack!r}, only {', '.join(target.blocks)}"
    blocks = by_depth(source.blocks[part.target.stack], target.blocks[there]) if layer_map == "depth" else layer_map
    if part.target.depth not in blocks:
        return f"layer_map has no block {part.target.depth}"
    block = blocks[part.target.depth]
    found = target.at.get((there, block, part.kind))
    if found is None:
        kinds = sorted(kind for stack, b, kind in target.at if (stack, b) == (there, block))
        return f"the target's block {block} has no {part.kind!r}, only {', '.join(kinds)}"
    return found


def named_goal(part: Part, target: Anatomy, module: str) -> Part | str:
    parts = target.parts.get(module, [])
    same = [p for p in parts if p.kind == part.kind] or [p for p in parts if p.rows is None and part.rows is None]
    return same[0] if same else target.problems.get(module, f"the target's {module} has no part {part.kind!r}")


def job_of(part: Part, goal: Part, update: LowRank, source: Anatomy, target: Anatomy) -> Job:
    """The write map is fitted where the write matters: the stream after a writer; down's input for gate and up; else the output."""
    read = Site(part.module, "input"), Site(goal.module, "input")
    out = Site(part.module, "output", part.fused_kind), Site(goal.module, "output", goal.fused_kind)
    downs = source.down_of(part), target.down_of(goal)
    if part.target.role == goal.target.role == "writer":
        write = Site(part.module, "stream"), Site(goal.module, "stream")
    elif downs[0] is not None and downs[1] is not None:
        write = Site(downs[0].module, "input"), Site(downs[1].module, "input")
    else:
        write = out
    return Job(part, goal, update, read, write, out)


def alike(job: Job, below: float) -> bool:
    """Whether the two base weights are nearly one, so that the update means the same there."""
    a, b = job.source, job.target
    if (a.target.d_in, a.d_out) != (b.target.d_in, b.d_out) or not below:
        return False
    if any(quantised(p.target.module) or p.target.module._parameters.get("weight") is None for p in (a, b)):
        return False
    apart = whole = 0.0
    for start in range(0, a.d_out, ROWS):
        Ws, Wt = (some_rows(p, start) for p in (a, b))
        apart += float((Ws.to(Wt.device) - Wt).square().sum())
        whole += float(Wt.square().sum())
    return apart < below**2 * whole


def some_rows(part: Part, start: int) -> Float[Tensor, "n d_in"]:
    """ROWS rows of the part's weight from `start`, in float32."""
    W = dense_weight(part.target.module).detach()
    rows = slice(start, start + ROWS) if part.rows is None else part.rows[start : start + ROWS].to(W.device)
    return W[rows].float()
