"""Which options do commands share, and what does each of them come to? Words in, values out; wrong words are a UserError."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from loguru import logger
from tqdm import tqdm

import lora_lite as ll
from lora_lite.checkpoint import check_place
from lora_lite.cli.errors import UserError, asked_by_user
from lora_lite.peft_format.folder import CONFIG
from lora_lite.steering.writing import check_doses

JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
TINY, SHIPPED = "tiny", Path(__file__).with_name("tiny-lm")  # the model that tiny_lm.py made, and its folder
Base = Annotated[str, typer.Option("--model", help=f"Folder or hub id of a causal model, or {TINY}, the one shipped.", show_default=False)]
PAIRS = 'JSON lines of {"prompt", "chosen", "rejected"}; every fifth is held out to judge by: 2 at least, tens are better.'
Pairs = Annotated[Path, typer.Option(help=PAIRS, show_default=False)]
Method = Annotated[str, typer.Option("--variant", help=f"The method: {', '.join(sorted(ll.REGISTRY))}.")]
Where = Annotated[str, typer.Option("--targets", help='"all-linear" or a regex on module names.')]
Band = Annotated[tuple[float, float], typer.Option("--layer-range", help="Band of depth, as two fractions.")]
Rank = Annotated[int | None, typer.Option("--r", help="Rank, for variants that have one.  \\[default: 8]", show_default=False)]
Alpha = Annotated[float | None, typer.Option("--alpha", help="Scale alpha/r, likewise.  \\[default: 16]", show_default=False)]
More = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE for other fields of the variant's config.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps of an adapter.")]
Rate = Annotated[float, typer.Option(min=0, help="Learning rate of the adapter.")]
Cap = Annotated[float, typer.Option(min=1e-6, help="Nats by which a text is pulled up, and its counterpart pushed down, at most.")]
KL = Annotated[float, typer.Option(min=0, help="Weight of a nat of divergence from the base, per token.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Pairs per step.")]
Tokens = Annotated[int, typer.Option(min=1, help="New tokens per text written, and training tokens per text.")]
Seed = Annotated[int, typer.Option(help="Of everything drawn at random.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...  \\[default: cuda where there is one]", show_default=False)]
Doses = Annotated[str, typer.Option("--doses", help="Each c to try: -1,0,1 or, for nine from -2 to 2, -2:2:9.")]
Samples = Annotated[int, typer.Option(min=1, help="Texts per c, shared out among the prompts.")]
Heat = Annotated[float, typer.Option(min=0, help="0 writes greedily.")]
SWEPT = "-2,-1.5,-1,-0.5,-0.25,0,0.25,0.5,1,1.5,2"
GIVEN_OR = {"r": 8, "alpha": 16.0}  # for variants that have them


def model_at(name: str) -> str:
    """The folder or hub id that a --model means."""
    return str(SHIPPED) if name == TINY and not Path(name).exists() else name


def after_equals(text: str) -> str:
    """click takes -c=1 for -c with the value "=1"."""
    return text.removeprefix("=")


def number(text: str) -> float:
    try:
        return float(after_equals(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a valid float.") from error


def tell(found: dict[str, Any], readable: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    typer.echo(json.dumps(found, ensure_ascii=False) if as_json else readable(found))


def typed() -> str:
    return shlex.join(["lora-lite", *sys.argv[1:]])


def check_adapter_file(option: str, path: Path, model: str) -> None:
    """Before a model is read. Raises UserError for what is none; a PEFT folder becomes one by a command that it names."""
    if (path / CONFIG).is_file():
        raise UserError(
            f"{option} {path}: it is a PEFT folder; lora-lite convert {path} NAME.safetensors --model {model} makes a file of it"
        )
    with asked_by_user(f"{option} {path}", ll.CheckpointError, OSError):
        check_place(path)


def place(device: str | None) -> str:
    """The device that was asked for, else the best there is. Raises UserError where a tensor cannot be put on it, before anything is."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        works = torch.ones(1, device=device).tolist() == [1.0]  # the device "meta" has no numbers to give back
    except (RuntimeError, AssertionError, ImportError, ValueError):  # what torch says takes lines, and names C++ files
        works = False
    if not works:
        raise UserError(f"--device {device}: nothing can be computed there; here there are {', '.join(devices())}")
    return device


def devices() -> list[str]:
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *["mps"] * torch.backends.mps.is_available()]


def cs_of(text: str) -> list[float]:
    """[-1.0, 0.0, 1.0] from "-1,0,1"; nine doses from "-2:2:9"."""
    with asked_by_user(f"--doses {text}: expected numbers such as -1,0,1 or, for nine from -2 to 2, -2:2:9", ValueError, RuntimeError):
        if ":" not in text:
            return check_doses([float(part) for part in text.split(",")])
        if text.count(":") != 2:
            raise ValueError("from, to and how many")
        low, high, n = text.split(":")
        return check_doses(torch.linspace(float(low), float(high), int(n)).tolist())


def config_of(variant: str, more: list[str] | None, steps: int, **given: Any) -> ll.AdapterConfig:
    """The variant's config, of what is `given` (not None) and what `more` says; a schedule is as long as the training.

    Raises UserError: an unknown variant, field, or a bad value.
    """
    if variant not in ll.REGISTRY:
        raise UserError(f"--variant {variant}: there is none of that name; there are {', '.join(sorted(ll.REGISTRY))}")
    if ll.REGISTRY[variant].needs_shared:
        raise UserError(
            f"--variant {variant} trains on the bases of a subspace, which there are none of here: see lora-lite subspace --help"
        )
    kind = ll.REGISTRY[variant].Config
    fields = {f.name for f in dataclasses.fields(kind)}
    values = {k: v for k, v in given.items() if v is not None} | dict(map(assignment, more or []))
    if unknown := sorted(set(values) - fields):
        raise UserError(f"--variant {variant} has no {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    with asked_by_user(f"--variant {variant}", ValueError, TypeError):
        return kind.from_dict({k: v for k, v in (GIVEN_OR | {"total_step": steps}).items() if k in fields} | values)


def assignment(text: str) -> tuple[str, Any]:
    """("train", "spectrum") from "train=spectrum": the value is JSON where it reads as such, else text."""
    name, found, value = text.partition("=")
    if not found:
        raise UserError(f"--set {text}: expected NAME=VALUE, such as --set dropout=0.1")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def log() -> None:
    """The library's log goes to stderr, past the progress bars."""
    logger.remove()
    logger.add(lambda line: tqdm.write(line, end="", file=sys.stderr), level="INFO", format="<level>{message}</level>")
    logger.enable("lora_lite")


def speak() -> None:
    """We do, transformers does not."""
    import transformers

    log()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
