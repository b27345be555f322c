"""What should the adapter tell apart? Pairs of texts: at c > 0 it leans to the chosen one, at c < 0 to the rejected one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_lite.cli.corpus import Corpus
from lora_lite.cli.errors import UserError

FIELDS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two continuations of one prompt; an empty prompt is the beginning of a text."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Contrast:
    """Pairs to train on, pairs to judge by, and what the two sides are called."""

    train: tuple[Pair, ...]
    held: tuple[Pair, ...]
    chosen: str = "chosen"
    rejected: str = "rejected"

    def prompts(self, most: int) -> list[str]:
        """Different prompts to generate from, held-out ones first."""
        return list(dict.fromkeys(p.prompt for p in (*self.held, *self.train)))[:most]


def code_and_prose(corpus: Corpus, seed: int) -> Contrast:
    """Code against prose, both from the beginning of a text: nothing but c says which."""
    kept, held = (shuffled_pairs(part, seed) for part in corpus.split())
    return Contrast(kept, held, "code", "prose")


def shuffled_pairs(corpus: Corpus, seed: int) -> tuple[Pair, ...]:
    draw = random.Random(seed)
    code, prose = (draw.sample(kind, len(kind)) for kind in (corpus.code, corpus.prose))
    return tuple(Pair("", c, p) for c, p in zip(code, prose, strict=False))


def read_pairs(path: Path, seed: int) -> Contrast:
    """A JSONL file, one {"prompt", "chosen", "rejected"} a line; every fifth pair is held out where there are ten or more.

    Raises UserError with the number of the line that is wrong.
    """
    if not path.is_file():
        raise UserError(f"--pairs {path}: no such file; expected JSON lines, each " + '{"prompt": ..., "chosen": ..., "rejected": ...}')
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--pairs {path}: not UTF-8 text ({error})") from error
    pairs = list(parse(path, lines))
    if len(pairs) < 2:
        raise UserError(f"--pairs {path}: {len(pairs)} pairs; at least 2 are needed, and tens are better")
    random.Random(seed).shuffle(pairs)
    if len(pairs) < 10:
        return Contrast(tuple(pairs), tuple(pairs))
    return Contrast(tuple(p for i, p in enumerate(pairs) if i % 5), tuple(pairs[::5]))


def parse(path: Path, lines: Sequence[str]) -> Iterator[Pair]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--pairs {path}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}): {line[:60]!r}") from error
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected an object with {list(FIELDS)}, found {type(values).__name__}")
        bad = [f for f in FIELDS if not isinstance(values.get(f), str) or (f != "prompt" and not values[f].strip())]
        if bad:
            raise UserError(f"{where}: {bad} missing, empty or not text; it has {sorted(values)}, needed are {list(FIELDS)}")
        yield Pair(*(values[f] for f in FIELDS))
