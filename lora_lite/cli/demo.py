"""The main job, start to end: train an adapter on pairs, sweep its c, check the promises, and write it all down."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_lite as ll
from lora_lite.cli import checks, contrast, plot, report, sweep
from lora_lite.cli.corpus import standard_library
from lora_lite.cli.errors import UserError, asked_by_user
from lora_lite.cli.pairs import Contrast, code_and_prose, read_pairs
from lora_lite.cli.texts import pack, pad_id, prompt_ids
from lora_lite.cli.tiny_lm import Recipe, tiny_lm
from lora_lite.cli.traits import Judge

DOSES = tuple(i / 4 for i in range(-8, 9))  # the whole sweep: -2 to 2
FINE = 17  # doses inside the gradual region


@dataclass(frozen=True)
class Job:
    """What was asked for. model None: the tiny one, trained here. pairs None: Python code against English prose."""

    config: ll.AdapterConfig
    out: Path
    model: str | None = None
    pairs: Path | None = None
    device: str = "cpu"
    recipe: Recipe = field(default_factory=Recipe)
    training: contrast.Training = field(default_factory=contrast.Training)
    sampling: sweep.Sampling = field(default_factory=sweep.Sampling)
    seed: int = 0
    command: str = "lora-lite demo"


@dataclass
class Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        logger.info("{} ...", step)
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 2)


def demo(job: Job) -> dict[str, Any]:
    """Runs the job and returns the summary that report.json holds. Raises UserError for what was typed wrong."""
    plot.need_matplotlib()
    with asked_by_user(f"--out {job.out}", OSError):
        job.out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    with clock("texts"):
        contrasted = texts(job)
        judge = Judge(contrasted)
    with clock("model"):
        model, tokenizer = language_model(job)
    prompts = contrasted.prompts(8)
    inputs = pack([prompt_ids(tokenizer, p) for p in prompts] * 2, [tokens(tokenizer, contrasted, i) for i in range(2 * len(prompts))],
                  pad_id(tokenizer), model.device).inputs()  # fmt: skip
    pristine, base = checks.state(model), checks.logits(model, inputs)

    with clock("attach"), asked_by_user("the adapter", ValueError, RuntimeError, TypeError):
        adapter = ll.attach(model, job.config, calibration_data=calibration(job, tokenizer, contrasted, model), seed=job.seed)
    with clock("train the adapter"):
        losses = contrast.train(model, tokenizer, adapter, contrasted.train, job.training)
    with clock("sweep c"):
        samples = sweep.sweep(model, tokenizer, adapter, judge, DOSES, prompts, job.sampling)
    with clock("sweep the gradual region"):
        again = dataclasses.replace(job.sampling, seed=job.sampling.seed + 1)
        samples += sweep.sweep(model, tokenizer, adapter, judge, finer(samples), prompts, again)
    with clock("checks"):
        held = {"c0_bit_identical_to_base": checks.zero_is_base(model, adapter, inputs, base)}
        held |= checks.survives_the_file(model, adapter, job.out / "adapter.safetensors", inputs, pristine)

    summary = summarise(job, contrasted, judge, adapter, losses, samples, model.num_parameters(), held, clock)
    doses, region = sweep.doses_of(samples), summary["gradual_region"]
    with clock("plot"):
        plot.dose_response(job.out / "dose_response.png", doses, region, summary["trait"], summary["title"])
    report.write_samples(job.out / "samples.md", samples, DOSES, summary["trait"])
    report.write_report(job.out, summary)
    return summary


def finer(samples: list[sweep.Sample]) -> list[float]:
    """New doses where the first sweep found the trait on its way; around 0 where it did not move."""
    low, high = sweep.gradual(sweep.doses_of(samples)) or (-0.5, 0.5)
    return [c for c in torch.linspace(low, high, FINE).tolist() if c not in DOSES]


def texts(job: Job) -> Contrast:
    return read_pairs(job.pairs, job.seed) if job.pairs else code_and_prose(standard_library(), job.seed)


def language_model(job: Job) -> tuple[Any, Any]:
    """Any causal model in Hugging Face format: a folder, a hub id, or the tiny one beside --out."""
    source = job.model or str(tiny_lm(job.out.parent / "tiny-lm", standard_library(), job.recipe))
    with asked_by_user(f"--model {source}", OSError, ValueError, KeyError):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        model = model.to(job.device).eval()
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"--model {source}: its tokenizer names neither a beginning nor an end of text, so an empty prompt has no tokens")
    return model, tokenizer


def tokens(tokenizer: Any, contrasted: Contrast, i: int) -> list[int]:
    """Some real text for the checks: held-out pairs, chosen and rejected in turn."""
    pair = contrasted.held[i // 2 % len(contrasted.held)]
    return list(tokenizer(pair.rejected if i % 2 else pair.chosen, add_special_tokens=False)["input_ids"])[:32]


def calibration(job: Job, tokenizer: Any, contrasted: Contrast, model: Any) -> Any:
    """Both kinds of text for variants that look at activations, the chosen with labels for those that look at gradients, or None."""
    variant = ll.REGISTRY[job.config.variant]
    if variant.calibration == "no":
        return None
    rows = contrast.encode(tokenizer, contrasted.train[:64], job.training.length, model.device)
    if variant.observes == "gradients":
        inputs = {k: v.chunk(2)[0] for k, v in rows.inputs().items()}
        return [{**inputs, "labels": inputs["input_ids"].masked_fill(~rows.answer.chunk(2)[0].bool(), -100)}]
    chosen, rejected = ({k: v.chunk(2)[side] for k, v in rows.inputs().items()} for side in (0, 1))
    return {"cho": [chosen], "rej": [rejected]}


def summarise(
    job: Job, contrasted: Contrast, judge: Judge, adapter: ll.Adapter, losses: list[float], samples: list[sweep.Sample], parameters: int,
    held: Mapping[str, bool], clock: Clock,
) -> dict[str, Any]:  # fmt: skip
    doses = sweep.doses_of(samples)
    name = job.model or "a tiny Llama trained on the Python standard library"
    return {
        "title": f"{job.config.variant} on {Path(name).name if job.model else name}: {contrasted.chosen} against {contrasted.rejected}",
        "ok": all(held.values()),
        "checks": dict(held),
        "trait": f"P({contrasted.chosen})",
        "gradual_region": sweep.gradual(doses),
        "judge_accuracy": judge.accuracy,
        "doses": [dataclasses.asdict(d) for d in doses],
        "loss": {"first": losses[0], "last": losses[-1]} if losses else {},
        "made": {
            "model": f"{name}, {parameters:,} parameters",
            "pairs": str(job.pairs or "standard library"),
            "adapter": str(adapter),
            "config": job.config.to_json(),
            "training": dataclasses.asdict(job.training),
            "sampling": dataclasses.asdict(job.sampling),
            "seed": job.seed,
            "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
            "machine": f"{platform.machine()}, {job.device}, {torch.get_num_threads()} threads",
        },
        "command": job.command,
        "seconds": clock.seconds,
        "files": [str(job.out / f) for f in ("adapter.safetensors", "dose_response.png", "samples.md", "report.md", "report.json")],
    }


def versions() -> dict[str, str]:
    own = {"lora_lite": ll.__version__, "Python": platform.python_version()}
    return own | {"torch": torch.__version__, "transformers": transformers.__version__}
