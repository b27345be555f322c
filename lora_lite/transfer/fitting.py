"""What does one update become on the other model, and how far can that be trusted? From pairs of activations, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.lowrank import LowRank
from lora_lite.transfer.alignment import Fit, Held, Pairs, wide
from lora_lite.transfer.listening import Site
from lora_lite.transfer.plan import Job

HELD_EVERY = 8  # every 8th token is kept out of the fit, for the report
Pair = tuple[Site, Site]


class Figures(NamedTuple):
    """See `Moved`."""

    read_r2: float
    write_cos: float
    norm_ratio: float


class Statistics:
    """Sums over the tokens of all batches. Pairs of sites that see the same two tensors are summed once."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.seen, self.fitted = jobs, 0, 0
        self.same: dict[Pair, Pair] = {}
        self.sums: dict[Pair, Pairs] = {}
        self.held: dict[Pair, Held] = {}
        self.moments: dict[int, Tensor] = {}  # by job: (Xs A^T)^T (Xs A^T), r x r
        self.energy: dict[Pair, tuple[float, float]] = {}  # of what an update adds to, in the source and in the target

    def add(self, xs: Mapping[Site, Tensor], xt: Mapping[Site, Tensor]) -> None:
        """One batch. Raises ValueError naming module and shapes where the two models saw different numbers of tokens."""
        for job in self.jobs:
            for pair in (job.read, job.write, job.out):
                check_rows(job, xs[pair[0]], xt[pair[1]])
        if not self.same:
            first: dict[tuple[int, int], Pair] = {}
            for pair in (p for job in self.jobs for p in (job.read, job.write)):
                self.same[pair] = first.setdefault((id(xs[pair[0]]), id(xt[pair[1]])), pair)
        for pair in dict.fromkeys(self.same.values()):
            self.add_pair(pair, xs[pair[0]], xt[pair[1]])
        for i, job in enumerate(self.jobs):
            z = wide(self.kept(xs[job.read[0]]))
            z = z @ job.update.A.to(z).T
            self.moments[i] = self.moments[i] + z.T @ z if i in self.moments else z.T @ z
        for pair in {job.out for job in self.jobs}:
            known = self.energy.get(pair, (0.0, 0.0))
            self.energy[pair] = (known[0] + self.size(xs[pair[0]]), known[1] + self.size(xt[pair[1]]))
        n = len(xs[self.jobs[0].read[0]])
        self.fitted += n - int(self.held_out(n).sum())
        self.seen += n

    def add_pair(self, pair: Pair, a: Tensor, b: Tensor) -> None:
        out = self.held_out(len(a))
        self.sums.setdefault(pair, Pairs(a.shape[1], b.shape[1])).add(self.kept(a), self.kept(b))
        self.held.setdefault(pair, Held()).add(a[out.to(a.device)], b[out.to(b.device)])

    def held_out(self, n: int) -> Tensor:
        return torch.arange(self.seen, self.seen + n) % HELD_EVERY == HELD_EVERY - 1

    def kept(self, x: Tensor) -> Tensor:
        return x[~self.held_out(len(x)).to(x.device)]

    def size(self, y: Tensor) -> float:
        return float(wide(self.kept(y)).square().sum())

    def moved(self, i: int) -> tuple[LowRank, Figures]:
        """Job i's update for the target, and its figures: turned on both sides, then scaled to the same relative energy."""
        job, read, write = self.jobs[i], self.fit(self.jobs[i].read), self.fit(self.jobs[i].write)
        A, B = (wide(v).to(read.G.device) for v in job.update.folded()[:2])
        A2, B2 = read.read(A), write.write(B.to(write.G.device)).to(A.device)
        before = share(energy(B, self.moments[i].to(A.device)), self.energy[job.out][0])
        after = share(energy(B2, read.spread(A2)), self.energy[job.out][1])
        scale = math.sqrt(before / after) if after > 0 else 0.0
        found = LowRank(A2, B2 * scale)
        figures = Figures(self.read_r2(job, A, B, A2), self.write_cos(job, write), share(norm(found), norm(LowRank(A, B))))
        return found, figures

    def fit(self, pair: Pair) -> Fit:
        return self.sums[self.same[pair]].fit

    def read_r2(self, job: Job, A: Tensor, B: Tensor, A2: Tensor) -> float:
        xs, xt = self.held[self.same[job.read]].pair()
        true, found = xs @ A.T, xt @ A2.T
        metric = torch.linalg.qr(B)[1] if bool(B.any()) else torch.eye(len(A), dtype=A.dtype, device=A.device)
        lost, all_of_it = (float((z @ metric.T).square().sum()) for z in (true - found, true - true.mean(0)))
        return 1 - lost / all_of_it if all_of_it else 0.0

    def write_cos(self, job: Job, write: Fit) -> float:
        xs, xt = self.held[self.same[job.write]].pair()
        turned, there = write.write((xs - xs.mean(0)).T).T, xt - xt.mean(0)
        return share(float((turned * there).sum()), float(turned.norm() * there.norm()))


def energy(B: Float[Tensor, "d_out r"], moments: Float[Tensor, "r r"]) -> float:
    """sum over tokens of |B z|^2, from sum z z^T."""
    return max(0.0, float(((B.T @ B) * moments).sum()))


def norm(update: LowRank) -> float:
    """|B A|, from QRs."""
    return float(update.svd()[1].norm())


def share(part: float, whole: float) -> float:
    """part / whole, and 0 where there is no whole."""
    return part / whole if whole else 0.0


def check_rows(job: Job, a: Tensor, b: Tensor) -> None:
    if len(a) != len(b):
        raise ValueError(
            f"{job.label}: the source saw {tuple(a.shape)} there and the target {tuple(b.shape)}; both must see the same tokens, one row "
            "each. With two tokenizers give target_batches, token i beside token i"
        )
