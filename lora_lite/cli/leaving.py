"""What is left where a command does not come to its end? No empty folder, and a word on what there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_lite.cli.errors import asked_by_user
from lora_lite.cli.outputs import check_writable


class Stopped(Exception):
    """Ctrl-C. The message says what is left and how to go on."""


@contextmanager
def on_stop(said: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C within the block is `Stopped`, with what is said then."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(said()) from error


@contextmanager
def making(out: Path) -> Iterator[None]:
    """The folder for the block; the folders this made are gone again where the block fails and left them empty."""
    fresh = [p for p in (out, *out.parents) if not p.exists()]
    with asked_by_user(f"--out {out}", OSError):
        out.mkdir(parents=True, exist_ok=True)
    check_writable(f"--out {out}", out)
    before = times(out)
    try:
        with on_stop(lambda: f"saved in {out}: {', '.join(sorted(n for n, t in times(out).items() if before.get(n) != t)) or 'nothing'}"):
            yield
    except BaseException:
        for folder in fresh:
            if any(folder.iterdir()):
                break
            folder.rmdir()
        raise


def times(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
