"""May a command write there? Asked before the work: nothing of the user's is replaced unasked, and the folder takes files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from lora_lite.cli.errors import UserError
from lora_lite.peft_format.folder import CONFIG, TENSORS

Force = Annotated[bool, typer.Option("--force", help="Replace what is there already; never what is read.")]


def check_file(named: str, out: Path, inputs: Iterable[Path] = (), force: bool = False) -> None:
    """A file that will be written: `check_file("--out b", Path("b"), adapters, force)`. Raises UserError, `named` in front."""
    if out.is_dir():
        raise UserError(f"{named}: it is a folder; name a file, such as {out / 'adapter.safetensors'}")
    if out.exists() and not out.is_file():
        raise UserError(f"{named}: it is a device or a pipe; name a plain file")
    check_free(named, [out], inputs, force)
    check_writable(named, out.parent)


def check_peft_folders(named: str, folders: Sequence[Path], inputs: Iterable[Path] = (), force: bool = False) -> None:
    """PEFT folders that will be written. Other files in them stay."""
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{named}: {folder} is a file; a PEFT adapter is a folder")
    check_free(named, [file for folder in folders for file in peft_files(folder)], inputs, force)
    for folder in folders:
        check_writable(named, folder)


def check_free(named: str, written: Sequence[Path], inputs: Iterable[Path], force: bool) -> None:
    there = [file for file in written if file.exists()]
    read = [file for path in inputs for file in (peft_files(path) if path.is_dir() else [path]) if file.exists()]
    if lost := [file for file in there if any(file.samefile(other) for other in read)]:
        raise UserError(f"{named}: {lost[0]} is read by this command, and would be replaced; name another place")
    if there and not force:
        raise UserError(f"{named}: {there[0]} exists; name another place, or --force to replace it")


def peft_files(folder: Path) -> list[Path]:
    return [folder / CONFIG, folder / TENSORS]


def check_writable(named: str, folder: Path) -> None:
    """The folder takes a file, or, where it is not there yet, the nearest one above it does."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"{named}: {there} is a file, so {folder} cannot be a folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{named}: no file can be made in {there}: {error.strerror or error}") from error
