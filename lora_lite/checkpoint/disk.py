"""Where may a file lie, and how does it get there whole?"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_lite.checkpoint.contents import CheckpointError
from lora_lite.checkpoint.words import listed

TEMPORARY = ".lora_lite-{}.tmp"


def as_path(
    path: str | os.PathLike[str], way: str = "ll.load(model, path) and ll.read(path) read files, ll.attach takes what is none"
) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"expected a path, got {type(path).__name__}: {str(path)[:80]!r}; {way}")
    return Path(path)


def check_place(path: Path) -> None:
    """Refuse what is no file, before opening it: a pipe would wait for ever."""
    if (path / "adapter_config.json").is_file():
        raise IsADirectoryError(f"{path} is a PEFT adapter's folder; ll.from_peft(model, {str(path)!r}) attaches that")
    if path.is_dir():
        inside = listed(sorted(p.name for p in path.glob("*.safetensors")))
        raise IsADirectoryError(f"{path} is a directory; an adapter is one file. It holds these .safetensors files: {inside}")
    if not path.exists():
        near = listed(sorted(p.name for p in path.parent.glob("*.safetensors"))) if path.parent.is_dir() else "no such folder"
        raise FileNotFoundError(f"there is no file {path}; .safetensors files in {path.parent}: {near}")
    if not path.is_file():
        raise CheckpointError(f"{path} is a device or a pipe; an adapter is a plain file")


def make_folder(folder: Path) -> None:
    """The folder, and those above it. Raises NotADirectoryError naming the file that is in its way."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"not saved: {there} is a file, so {folder} cannot be a folder; save elsewhere, or move that file")
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def in_the_name_of(target: Path) -> Iterator[None]:
    """What the disk refuses within the block names what was asked for, not a temporary file that nobody has heard of."""
    try:
        yield
    except OSError as error:
        told = type(error)(f"not saved: {target} cannot be written in {target.parent}: {error.strerror or error}")
        told.errno = error.errno
        raise told from error


def replace(target: Path, parts: Iterable[bytes | memoryview]) -> None:
    temporary = target.with_name(TEMPORARY.format(secrets.token_hex(8)))
    with in_the_name_of(target):
        file = open(temporary, "xb")  # noqa: SIM115 (a file that could not be made here is not ours to remove)
        try:
            with file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    with suppress(OSError):  # the file is in place; some systems cannot sync a folder
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
