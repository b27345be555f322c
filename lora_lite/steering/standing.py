"""Where do the rounds in a folder stand? state.json, replaced whole after each step, and one process at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_lite.checkpoint import disk
from lora_lite.steering.verdict import Round

STATE, FORMAT = "state.json", 1


def record(folder: Path, job: Mapping[str, Any], rule: str, done: Sequence[Round]) -> None:
    """`job`: the settings that decide the result, by name."""
    state = {"format": FORMAT, "job": job, "rule": rule, "rounds": [asdict(r) for r in done]}
    disk.replace(folder / STATE, [json.dumps(state, indent=1, ensure_ascii=False).encode()])


def recorded(folder: Path, job: Mapping[str, Any]) -> list[Round]:
    """The rounds so far; the last one may be half done. Raises ValueError for the state of another job, or of none."""
    path = folder / STATE
    if not path.exists():
        return []
    try:
        state = json.loads(path.read_bytes())
        there, done = state["job"], [Round(**r) for r in state["rounds"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a state of steering_rounds ({error}); give another folder") from error
    if not isinstance(there, dict):
        raise ValueError(f"{path} is not a state of steering_rounds (its job is {there!r:.60}); give another folder")
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} has format {state.get('format')}, this version reads {FORMAT}; give another folder")
    differ = [f"{key} was {there.get(key)}, is {job.get(key)}" for key in sorted({*there, *job}) if there.get(key) != job.get(key)]
    if differ:
        raise ValueError(f"{folder} holds the rounds of another job: {'; '.join(differ)}. Give another folder, or those settings to go on")
    return done


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Two processes in one folder would each undo the other's step; the system drops the lock with the process, however it ends."""
    with ExitStack() as held:
        try:
            import fcntl
        except ImportError:  # not on Windows
            yield
            return
        handle = os.open(folder, os.O_RDONLY)
        held.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another process is at work in {folder}; wait for it, or give another folder") from error
        for left in folder.glob(disk.TEMPORARY.format("*")):  # of a process that was killed while it wrote
            left.unlink()
        yield
