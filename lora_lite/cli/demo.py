"""The main job, start to end: train an adapter on pairs, sweep its c, check the promises, and write it all down."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lora_lite as ll
from lora_lite.cli import checks, report
from lora_lite.cli.corpus import standard_library
from lora_lite.cli.errors import asked_by_user
from lora_lite.cli.language import Clock, Recipe, Sampling, calibration, dose_rows, machine, need_matplotlib, respond, writing_model
from lora_lite.cli.options import TINY
from lora_lite.cli.outputs import check_writable
from lora_lite.cli.pairs import Contrast, code_and_prose, read_pairs
from lora_lite.cli.traits import Judge
from lora_lite.steering import TrainingReport

DOSES = tuple(i / 4 for i in range(-8, 9))  # the whole sweep: -2 to 2
FINE = 17  # doses inside the gradual region
HELD = 32  # pairs that checks and validation look at
MOVES = 0.2  # of a probability: a trait that moves by less has no gradual region


@dataclass(frozen=True)
class Job:
    """What was asked for. pairs None: Python code against English prose."""

    config: ll.AdapterConfig
    out: Path
    model: str = TINY
    pairs: Path | None = None
    device: str = "cpu"
    recipe: Recipe = field(default_factory=Recipe)
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    command: str = "lora-lite demo"


def demo(job: Job) -> dict[str, Any]:
    """Runs the job and returns the summary that report.json holds. Raises UserError for what was typed wrong."""
    need_matplotlib()
    with asked_by_user(f"--out {job.out}", OSError):
        job.out.mkdir(parents=True, exist_ok=True)
    check_writable(f"--out {job.out}", job.out)
    clock = Clock()
    with clock("texts"):
        contrasted = read_pairs(job.pairs, job.seed) if job.pairs else code_and_prose(standard_library(), job.seed)
        judge, prompts = Judge(contrasted), contrasted.prompts(8)
    with clock("model"):
        model, tokenizer = writing_model(job.model, job.device)
    pairs, held = (ll.ContrastivePairs(part[:most]) for part, most in ((contrasted.train, seen(job)), (contrasted.held, HELD)))
    with asked_by_user("the pairs", ValueError):
        inputs = held[:8].encode(tokenizer, max_completion=32, device=model.device).inputs()
    pristine, base = checks.state(model), checks.logits(model, inputs)

    with clock("attach"), asked_by_user("the adapter", ValueError, RuntimeError, TypeError):
        adapter = ll.attach(model, job.config, calibration_data=calibration(job.config, tokenizer, pairs, job.recipe), seed=job.seed)
    with clock("train the adapter"), asked_by_user("training", ValueError, RuntimeError):
        trained = ll.train_steering(
            model, adapter, pairs, tokenizer, validation=held, checks=4, seed=job.seed, **dataclasses.asdict(job.recipe)
        )
    with clock("sweep c"):
        response = respond(model, tokenizer, adapter, judge, DOSES, prompts, job.sampling)
    with clock("sweep the gradual region"):
        response = response.joined(respond(model, tokenizer, adapter, judge, finer(response), prompts, job.sampling))
    with clock("checks"):
        kept = {"c0_bit_identical_to_base": checks.zero_is_base(model, adapter, inputs, base)}
        kept |= checks.survives_the_file(model, adapter, job.out / "adapter.safetensors", inputs, pristine)

    summary = summarise(job, contrasted, judge, adapter, trained, response, model.num_parameters(), kept, clock)
    with clock("plot"):
        response.plot(job.out / "dose_response.png", zoom=summary["gradual_region"], title=summary["title"])
    report.write_samples(job.out / "samples.md", response, DOSES)
    report.write_report(job.out, summary)
    return summary


def seen(job: Job) -> int:
    """The pairs that training comes to see, and the calibration: the rest need no tokens."""
    return max(64, job.recipe.steps * job.recipe.batch_size)


def finer(response: ll.DoseResponse) -> list[float]:
    """Doses where the first sweep found the trait on its way; around 0 where it did not move."""
    low, high = response.stretch(MOVES) or (-0.5, 0.5)
    return torch.linspace(low, high, FINE).tolist()


def summarise(
    job: Job, contrasted: Contrast, judge: Judge, adapter: ll.Adapter, trained: TrainingReport, response: ll.DoseResponse,
    parameters: int, kept: Mapping[str, bool], clock: Clock,
) -> dict[str, Any]:  # fmt: skip
    name = "a tiny Llama trained on the Python standard library" if job.model == TINY else job.model
    words = ["lora-lite", "generate", "--model", job.model, "--adapter", str(job.out / "adapter.safetensors"), "--prompt", "The"]
    return {
        "title": f"{job.config.variant} on {Path(name).name}: {contrasted.chosen} against {contrasted.rejected}",
        "ok": all(kept.values()),
        "checks": dict(kept),
        "trait": response.trait,
        "gradual_region": response.gradual(MOVES),
        "way": response.way(MOVES),
        "judge_accuracy": judge.accuracy,
        "doses": dose_rows(response),
        "loss": {"first": trained.losses[0], "last": trained.losses[-1]},
        "made": {
            "model": f"{name}, {parameters:,} parameters",
            "pairs": str(job.pairs or "standard library"),
            "adapter": str(adapter),
            "config": job.config.to_json(),
            "trained": str(trained),
            "training": dataclasses.asdict(job.recipe),
            "sampling": dataclasses.asdict(job.sampling),
            "seed": job.seed,
            **machine(job.device),
        },
        "command": job.command,
        "next": shlex.join([*words, "-c", "-1", "-c", "0", "-c", "1", "--temperature", "0.8"]),
        "seconds": clock.seconds,
        "files": [str(job.out / f) for f in ("adapter.safetensors", "dose_response.png", "samples.md", "report.md", "report.json")],
    }
