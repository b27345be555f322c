"""What does `lora-lite transfer` do? Two models, an adapter and a text file in; an adapter for the second model and a table out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import lora_lite as ll
from lora_lite.cli.errors import UserError, asked_by_user
from lora_lite.cli.options import JSON, Device, place, speak, tell
from lora_lite.cli.outputs import Force, check_file
from lora_lite.steering.rows import pad_id

ROLES = {"writers": ("writer",), "readers": ("reader",), "all": ("reader", "writer")}


def transfer(
    adapter: Annotated[Path, typer.Argument(help="File of `adapter.save`, or a PEFT folder, made for the source.")],
    source: Annotated[str, typer.Option(help="Folder or hub id of the model it was trained on.")],
    target: Annotated[str, typer.Option(help="Folder or hub id of the model it is wanted on, with the same tokenizer.")],
    text: Annotated[Path, typer.Option(help="Any text, UTF-8; both models run on it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the new adapter.")],
    roles: Annotated[str, typer.Option(help=f"What is moved: {', '.join(ROLES)}.")] = "writers",
    layer_map: Annotated[str, typer.Option(help='"depth" or "cka".')] = "depth",
    sequential: Annotated[bool, typer.Option(help="Fit block after block, each on what was moved before it.")] = False,
    min_r2: Annotated[
        float | None, typer.Option(help="Skip modules that the target's activations explain less.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="How many tokens of the text to use.")] = 4096,
    length: Annotated[int, typer.Option(min=8, help="Tokens per row.")] = 128,
    device: Device = None,
    force: Force = False,
    as_json: JSON = False,
) -> None:
    """Carry an adapter to a model of another width or depth, without its training data."""
    if roles not in ROLES:
        raise UserError(f"--roles {roles}: there are {', '.join(ROLES)}")
    if layer_map not in ("depth", "cka"):
        raise UserError(f"--layer-map {layer_map}: there are depth, cka")
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out}: expected a file in a folder that exists")
    check_file(f"--out {out}", out, [adapter, text], force)
    written, where = read_text(text), place(device)
    speak()
    from lora_lite.cli.language import language_model  # transformers takes seconds to import

    here, words = language_model(source, where, "--source")
    there, other_words = language_model(target, where, "--target")
    rows = batches(words, other_words, written, tokens, length, text)
    with asked_by_user(f"{adapter}", OSError, ValueError, RuntimeError, KeyError):
        given = ll.from_peft(here, adapter) if adapter.is_dir() else ll.load(here, adapter)
        given.detach()
    with asked_by_user("the transfer", ValueError, RuntimeError):
        result = ll.transfer_adapter(given, here, there, rows, rows, ROLES[roles], layer_map, sequential, min_r2)
    with asked_by_user(f"--out {out}", OSError):
        result.adapter.save(out)
    tell(result.to_dict() | {"out": str(out)}, lambda _: f"{result}\nwritten: {out}", as_json)


def read_text(path: Path) -> str:
    try:
        found = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--text {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path}: not UTF-8 at byte {error.start}") from error
    if not found.strip():
        raise UserError(f"--text {path}: it is empty")
    return found


def batches(words: Any, other_words: Any, text: str, tokens: int, length: int, path: Path) -> list[dict[str, Tensor]]:
    """Rows of tokens for both models. Raises UserError where the two tokenizers read the text differently."""
    ids = list(words(text)["input_ids"])[:tokens]
    if ids != list(other_words(text)["input_ids"])[:tokens]:
        raise UserError(
            f"--text {path}: the two models' tokenizers read it differently, so their tokens cannot be paired; ll.transfer_adapter takes "
            "target_batches with the pairs"
        )
    return [padded(ids[i : i + 8 * length], length, pad_id(words)) for i in range(0, len(ids), 8 * length)]


def padded(ids: list[int], length: int, pad: int) -> dict[str, Tensor]:
    """One batch of rows, the last of them padded on the right."""
    rows = list(cut(ids, length))
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def cut(ids: list[int], length: int) -> Iterator[list[int]]:
    yield from (ids[i : i + length] for i in range(0, len(ids), length))
