"""What does the model write at this c? One adapter or a stack of them, each at its own dose: `lora-lite generate -c 1.5 --prompt ...`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.cli.errors import UserError, asked_by_user
from lora_lite.cli.language import writing_model
from lora_lite.cli.options import check_adapter_file
from lora_lite.steering.arguments import told
from lora_lite.steering.writing import Writing, as_prompts, on_model, write
from lora_lite.varied import limit


@dataclass(frozen=True)
class Generation:
    """What was asked for: files, each with a dose of its own ("a.safetensors:0.8", "a.safetensors:auto") or at each of `cs`."""

    model: str
    adapters: Sequence[str]
    prompts: Sequence[str]
    cs: Sequence[str] = ("1",)
    device: str = "cpu"
    length: int = 64
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("adapters", "prompts", "cs"):
            given = getattr(self, name)
            if not isinstance(given, list | tuple) or not given or not all(isinstance(text, str) for text in given):
                raise UserError(f"{name} is a list of texts, at least one; got {told(given)}")


def generate(job: Generation) -> dict[str, Any]:
    """What was written, by c: `generate(Generation("lm", ["a.safetensors"], ["Once"]))["texts"]`. The stack acts in the order given.

    Raises UserError for what was typed wrong.
    """
    if not isinstance(job, Generation):
        raise UserError(f"generate takes one Generation(model, adapters, prompts, ...); got {told(job)}")
    with asked_by_user("generate", ValueError):
        how = Writing(job.length, job.temperature, job.samples, job.seed)
    if wrong := [c for c in job.cs if not is_dose(c)]:
        raise UserError(f"-c {wrong[0]}: expected a number, auto or -auto")
    named = [parted(text) for text in job.adapters]
    for path, _ in named:
        check_adapter_file("--adapter", path, job.model)
    model, tokenizer = writing_model(job.model, job.device)
    adapters = [read(path, i) for i, (path, _) in enumerate(named)]
    with asked_by_user("--prompt", TypeError):
        prompts = as_prompts(list(job.prompts), tokenizer)
    texts = []
    for c in job.cs:
        doses = [dose(adapter, path, own or c) for adapter, (path, own) in zip(adapters, named, strict=True)]
        *below, (top, last) = zip(adapters, doses, strict=True)  # the last one is live, so that a row has its own random numbers
        said = asked_by_user("--adapter", ll.CheckpointError, RuntimeError, ValueError)
        with said, ll.stack(model, below), on_model(model, top) as live:
            found = write(model, live, tokenizer, prompts, [last], how)
        texts += [{"c": doses, "prompt": prompts[s.prompt].text, "sample": s.draw, "text": s.text} for s in found]
    return {"model": job.model, "adapters": [str(path) for path, _ in named], "texts": texts}


def parted(text: str) -> tuple[Path, str | None]:
    """("a.safetensors", "0.8") from "a.safetensors:0.8"; None where no dose is named."""
    path, colon, last = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), None
    if not is_dose(last):
        if Path(path).exists():
            raise UserError(f"--adapter {text}: {last!r} is no dose; expected a number, auto or -auto after the colon")
        return Path(text), None
    return Path(path), last


def is_dose(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return text in ("auto", "-auto")


def read(path: Path, i: int) -> ll.Adapter:
    with asked_by_user(f"--adapter {path}", ll.CheckpointError, OSError):
        return ll.read(path, name=f"adapter_{i}")


def dose(adapter: ll.Adapter, path: Path, text: str) -> float:
    """A number, or what "auto" and "-auto" stand for in this adapter's file."""
    if not text.endswith("auto"):
        return float(text)
    if adapter.calibrated is None:
        raise UserError(f"-c {text}: {path} does not say how far its c may go; `lora-lite steer` finds that out. Give a number")
    with asked_by_user(f"-c {text}", ValueError):
        return limit(adapter.name, adapter.calibrated, text)


def readable(s: dict[str, Any]) -> str:
    lines = []
    for t in s["texts"]:
        lines += [f"--- c = {', '.join(f'{c:g}' for c in t['c'])}", t["prompt"] + t["text"]]
    return "\n".join(lines)
