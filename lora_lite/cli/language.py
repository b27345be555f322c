"""Where does the model come from, and what is one run's work made of? What `demo`, `steer`, `sweep`, `generate` and `rounds` share."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_lite as ll
from lora_lite.cli.errors import UserError, asked_by_user
from lora_lite.cli.options import model_at
from lora_lite.cli.traits import Judge
from lora_lite.steering import plot
from lora_lite.steering.response import finite


@dataclass(frozen=True)
class Recipe:
    """How the adapter is trained: keywords of `ll.train_steering`, with what suits a model of a million parameters.

    cap, kl   on the tiny model they let the trait change gradually from c = -0.4 to 0.7, at perplexity 8.5 at c = -2 and 6.8 at 0; without
              a cap c was a switch at 0, and perplexity in the thousands from c = -1
    """

    steps: int = 80
    batch_size: int = 8
    lr: float = 2e-3
    cap: float = 3.0
    kl: float = 10.0
    max_completion: int = 64


@dataclass(frozen=True)
class Sampling:
    """What is written at each c: `samples` texts, shared out among the prompts, of at most `length` new tokens."""

    samples: int = 64
    length: int = 64
    temperature: float = 0.8
    seed: int = 0

    def rows(self, prompts: Sequence[str]) -> list[str]:
        """A prompt for each sample: each is a text of its own, and errors are between texts."""
        return [prompts[i % len(prompts)] for i in range(self.samples)]

    def keywords(self) -> dict[str, Any]:
        return {"max_new_tokens": self.length, "temperature": self.temperature, "seed": self.seed, "max_rows": 2048}


@dataclass
class Clock:
    """Says what is being done, and keeps how long it took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        logger.info("{} ...", step)
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 2)


def need_matplotlib() -> None:
    """Before minutes of training, not after. Raises UserError."""
    with asked_by_user("the dose-response plot", ImportError):
        plot.need_matplotlib()


def language_model(source: str, device: str = "cpu", option: str = "--model") -> tuple[Any, Any]:
    """Any causal model in Hugging Face format, and its tokenizer: a folder, a hub id, or "tiny"."""
    if Path(source).is_dir() and not Path(source, "config.json").is_file():
        raise UserError(f"{option} {source}: this folder has no config.json, so it is no model in Hugging Face format")
    with asked_by_user(f"{option} {source}", OSError, ValueError, KeyError):
        tokenizer = AutoTokenizer.from_pretrained(model_at(source))
        model: Any = AutoModelForCausalLM.from_pretrained(model_at(source), dtype="auto")
        return model.to(device).eval(), tokenizer


def writing_model(source: str, device: str = "cpu") -> tuple[Any, Any]:
    """One that can write from nothing too. Raises UserError where its tokenizer has no token to begin with."""
    model, tokenizer = language_model(source, device)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"--model {source}: its tokenizer names neither a beginning nor an end of text, so an empty prompt has no tokens")
    return model, tokenizer


def calibration(config: ll.AdapterConfig, tokenizer: Any, pairs: ll.ContrastivePairs, recipe: Recipe) -> Any:
    """Both kinds of text for variants that look at activations, the chosen with labels for those that look at gradients, or None."""
    variant = ll.REGISTRY[config.variant]
    if variant.calibration == "no":
        return None
    if variant.observes == "gradients":
        return pairs.calibration_data(tokenizer, recipe.max_completion, labels=True)["cho"]
    return pairs.calibration_data(tokenizer, recipe.max_completion)


def respond(
    model: Any, tokenizer: Any, adapter: ll.Adapter, judge: Judge, cs: Sequence[float], prompts: Sequence[str], how: Sampling,
    null: ll.Adapter | None = None,
) -> ll.DoseResponse:  # fmt: skip
    """P(chosen) by the judge, and coherence, of what is written at each c."""
    return ll.dose_response(model, adapter, cs, how.rows(prompts), tokenizer=tokenizer, score=judge, null=null, **how.keywords())


def dose_rows(found: ll.DoseResponse) -> list[dict[str, Any]]:
    """What reports and --json say of each dose."""
    return [finite({"c": d.c, "n": d.n, "trait": d.trait, "trait_error": d.error, "effect": d.effect, **d.coherence}) for d in found.doses]


def machine(device: str) -> dict[str, str]:
    own = {"lora_lite": ll.__version__, "Python": platform.python_version()}
    versions = own | {"torch": torch.__version__, "transformers": transformers.__version__}
    where = f"{platform.machine()}, {device}, {torch.get_num_threads()} threads"
    return {"versions": ", ".join(f"{k} {v}" for k, v in versions.items()), "machine": where}
