"""How does steering go on, round after round? Train, compare with a null, calibrate, keep or drop by a rule; what is kept acts on.

A folder holds the state: state.json and an adapter's file per round. Each step of a round starts from the folder and ends in it, with
nothing carried over in memory, so that going on after a kill is the same as never having stopped, to the bit.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from loguru import logger
from torch import nn

from lora_lite.adapter import Adapter
from lora_lite.checkpoint import disk
from lora_lite.config import AdapterConfig
from lora_lite.history import HistoryBake, disabled
from lora_lite.lifecycle import attach, load
from lora_lite.steering.arguments import check_seed, is_real, is_whole, told
from lora_lite.steering.calibrate import calibrate_c
from lora_lite.steering.loop import Recipe
from lora_lite.steering.pairs import ContrastivePairs
from lora_lite.steering.refusals import refuse_few, refuse_poles
from lora_lite.steering.report import TrainingReport
from lora_lite.steering.standing import alone_in, record, recorded
from lora_lite.steering.train import null_control, parted, train_steering
from lora_lite.steering.verdict import RULE, Round, Rounds, judged
from lora_lite.steering.writing import as_prompts
from lora_lite.target import check_model
from lora_lite.variant import variant_of


def steering_rounds(
    model: nn.Module,
    config: AdapterConfig,
    pairs: ContrastivePairs,
    prompts: Sequence[str | Sequence[int]],
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    rounds: int = 3,
    margin: float = 0.5,
    dose: float = 0.5,
    validation: float | ContrastivePairs = 0.2,
    training: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    after: Callable[[Round], None] | None = None,
) -> Rounds:
    """Several rounds of steering, each on top of what the earlier ones left: train, null control, calibrate, keep or drop, bake.

        found = ll.steering_rounds(model, ll.PiSSAConfig(r=8), pairs, prompts, "out/rounds", tokenizer=tokenizer, rounds=4)
        print(found)
        history = ll.HistoryBake(model, found.kept())

    folder       the state. Called again with the same folder and settings it goes on where it was; more `rounds` are more of them
    margin       of the rule, which the result states: how far an effect must be above the size of the null's
    dose         at which a kept adapter acts on, at most; less where no c as large is coherent
    validation   share of the pairs that judges, the same in all rounds, or pairs of their own
    training     keywords for `ll.train_steering`, but seed and validation; calibration: for `ll.calibrate_c`, but seed
    after        called with each step that was recorded, for a log; a kill there, or anywhere, loses the step in progress at most

    The earlier rounds' history is open where the round's adapter is on, so that c = 0 is the pristine base. A variant that chooses
    directions (PiSSA) leaves out those that kept rounds use. Each round has its own seed. The model comes out as it went in.

    Raises ValueError for another job's folder (naming what differs) and for bad settings, RuntimeError where another process is at
    work in the folder, and what training, calibration and files raise.
    """
    check_model(model)
    variant_of(config)
    as_prompts(prompts, tokenizer)
    for name, given in (("training", training), ("calibration", calibration)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"{name} is a mapping of keywords to values; got {told(given)}")
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder is where the state lies, a path; got {told(folder)}")
    if after is not None and not callable(after):
        raise TypeError(f"after is a function of a Round; got {told(after)}")
    check_seed(seed)
    job = Job(
        model, config, *parted(pairs, validation, seed), list(prompts), Path(folder), tokenizer, margin, dose, dict(training or {}),
        dict(calibration or {}), seed, progress,
    )  # fmt: skip
    job.check(rounds)
    disk.make_folder(job.folder)
    with alone_in(job.folder):
        done = recorded(job.folder, job.to_dict())
        while len(done) < rounds or not all(r.why for r in done):
            if not done or done[-1].why:
                done.append(Round(len(done) + 1, seed + len(done)))
            done[-1] = next_step(job, done[:-1], done[-1])
            record(job.folder, job.to_dict(), job.rule, done)
            if after:
                after(done[-1])
    return Rounds(job.folder, job.rule, tuple(done))


@dataclass(frozen=True)
class Job:
    """What all rounds share."""

    model: nn.Module
    config: AdapterConfig
    pairs: ContrastivePairs
    held: ContrastivePairs | None
    prompts: list[str | Sequence[int]]
    folder: Path
    tokenizer: Any
    margin: float
    dose: float
    training: dict[str, Any]
    calibration: dict[str, Any]
    seed: int
    progress: bool

    @property
    def rule(self) -> str:
        return RULE.format(margin=self.margin, dose=self.dose, up=self.training.get("poles", (1.0, -1.0))[0])

    def check(self, rounds: int) -> None:
        """Everything that can be known before the first step."""
        if not (is_whole(rounds, 1) and is_real(self.margin) and is_real(self.dose) and self.dose > 0):
            got = f"{rounds!r:.60}, {self.margin!r:.60}, {self.dose!r:.60}"
            raise ValueError(f"rounds must be at least 1, a whole number, margin finite and dose above 0; got {got}")
        own = {
            "training": ("seed", "validation", "progress", "model", "adapter", "pairs", "tokenizer"),
            "calibration": ("seed", "progress", "model", "adapter", "prompts", "tokenizer"),
        }
        for what, given in (("training", self.training), ("calibration", self.calibration)):
            if taken := sorted(set(own[what]) & set(given)):
                raise ValueError(f"{what} holds {taken}, which the rounds set themselves; give them to steering_rounds, or leave them out")
        if unknown := sorted(set(self.training) - set(inspect.signature(train_steering).parameters)):
            raise ValueError(f"training holds {unknown}, which ll.train_steering does not take")
        said = {name: p.default for name, p in inspect.signature(train_steering).parameters.items()} | self.training
        Recipe(**{f.name: said[f.name] for f in fields(Recipe)})
        refuse_poles(said["poles"])
        if len(self.held or ()) < 2:
            raise ValueError("validation holds less than 2 pairs, and the rule needs a spread between pairs; give a larger share, or pairs")
        refuse_few(self.pairs, self.held)
        for part in (self.pairs, self.held or self.pairs):
            part.tokenised(self.tokenizer, self.training.get("eos", True), self.training.get("max_completion"))

    def to_dict(self) -> dict[str, Any]:
        """What decides the result, as JSON."""
        plain = {
            "config": self.config.to_dict(), "training": self.training, "calibration": self.calibration, "margin": self.margin,
            "dose": self.dose, "seed": self.seed, "prompts": digest(self.prompts), "pairs": digest(list(self.pairs)),
            "validation": digest(list(self.held or ())),
        }  # fmt: skip
        return json.loads(json.dumps(plain, default=lambda x: getattr(x, "__name__", type(x).__name__)))

    def calibration_data(self) -> Any:
        if variant_of(self.config).calibration == "no":
            return None
        return self.pairs.calibration_data(self.tokenizer, self.training.get("max_completion"))


def digest(values: Any) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


# -- the steps of a round -------------------------------------------------------------------------------------------------


def next_step(job: Job, earlier: Sequence[Round], now: Round) -> Round:
    """The round with one thing more known of it. Files it writes are whole before the state says so; done twice is done once."""
    logger.info("round {}: {}", now.number, "train" if not now.trained else "null control" if not now.null else "calibrate")
    with beside(job, earlier) as (history, kept):
        if now.trained is None:
            return trained(job, now, history, kept)
        adapter = load(job.model, job.folder / now.file, now.name)
        try:
            history.set_gate(adapter)
            return with_null(job, now, adapter, kept) if now.null is None else calibrated(job, now, adapter)
        finally:
            adapter.detach()


@contextmanager
def beside(job: Job, earlier: Sequence[Round]) -> Iterator[tuple[HistoryBake, list[Adapter]]]:
    """What the earlier rounds kept, on the model for the block and as adapters."""
    kept = Rounds(job.folder, job.rule, tuple(earlier)).kept()
    history = HistoryBake(job.model, kept)
    try:
        yield history, [adapter for adapter, _ in kept]
    finally:
        history.remove()


def directions(job: Job, kept: list[Adapter]) -> list[Adapter]:
    return kept if variant_of(job.config).chooses_directions else []


def trained(job: Job, now: Round, history: HistoryBake, kept: list[Adapter]) -> Round:
    with disabled(job.model):  # its start is chosen on the base, as the null's is
        adapter = attach(job.model, job.config, job.calibration_data(), now.name, seed=now.seed, exclude_directions=directions(job, kept))
    try:
        history.set_gate(adapter)
        report = train_steering(
            job.model, adapter, job.pairs, job.tokenizer, validation=job.held, seed=now.seed, progress=job.progress, **job.training
        )
        adapter.save(job.folder / now.file, {"round": str(now.number)})
    finally:
        adapter.detach()
    return replace(now, before=asdict(report.checks[0].poles[0]), trained=at_positive_pole(report))


def with_null(job: Job, now: Round, adapter: Adapter, kept: list[Adapter]) -> Round:
    how = {name: value for name, value in job.training.items() if name != "keep"}
    _, report = null_control(
        job.model, adapter, job.pairs, job.tokenizer, validation=job.held, calibration_data=job.calibration_data(),
        exclude_directions=directions(job, kept), seed=now.seed, progress=job.progress, **how,
    )  # fmt: skip
    return replace(now, null=at_positive_pole(report))


def at_positive_pole(report: TrainingReport) -> dict[str, Any]:
    assert report.best is not None  # there are held-out pairs
    return {**asdict(report.best.poles[0]), "step": report.best_step}


def calibrated(job: Job, now: Round, adapter: Adapter) -> Round:
    """How far it goes, which its file keeps, and with that the rule's answer."""
    found = calibrate_c(adapter, job.prompts, tokenizer=job.tokenizer, seed=now.seed, progress=job.progress, **job.calibration)
    adapter.save(job.folder / now.file)
    return judged(replace(now, calibrated=found.to_dict()), job.margin, job.dose)
