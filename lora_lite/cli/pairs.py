"""What should the adapter tell apart? Pairs of texts: at c > 0 it leans to the chosen one, at c < 0 to the rejected one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

import lora_lite as ll
from lora_lite.cli.corpus import Corpus
from lora_lite.cli.errors import UserError, asked_by_user
from lora_lite.steering.pairs import EXPECTED, Pair

FEW = 10  # with fewer pairs than these, what the held-out ones say is said with a warning
EVERY = 5  # of so many pairs one is held out


@dataclass(frozen=True)
class Contrast:
    """Pairs of texts to train on, pairs to judge by, and what the two sides are called."""

    train: Sequence[Pair]
    held: Sequence[Pair]
    chosen: str = "chosen"
    rejected: str = "rejected"

    def prompts(self, most: int) -> list[str]:
        """Different prompts to generate from, held-out ones first."""
        return list(dict.fromkeys(str(p.prompt) for p in (*self.held, *self.train)))[:most]


def code_and_prose(corpus: Corpus, seed: int) -> Contrast:
    """Code against prose, both from the beginning of a text: nothing but c says which."""
    kept, held = (shuffled_pairs(part, seed) for part in corpus.split())
    return Contrast(kept, held, "code", "prose")


def shuffled_pairs(corpus: Corpus, seed: int) -> ll.ContrastivePairs:
    draw = random.Random(seed)
    code, prose = (draw.sample(kind, len(kind)) for kind in (corpus.code, corpus.prose))
    return ll.ContrastivePairs(("", c, p) for c, p in zip(code, prose, strict=False))


def read_pairs(path: Path, seed: int) -> Contrast:
    """A JSONL file, one {"prompt", "chosen", "rejected"} a line; of its pairs in a random order every fifth is held out, the first always.

    So no pair that is judged by was trained on, however few there are; of fewer than ten that is one or two, which a warning says.
    Raises UserError with the number of the line that is wrong.
    """
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "it is a device or a pipe" if path.exists() else "no such file"
        raise UserError(f"--pairs {path}: {found}; expected JSON lines, each {EXPECTED}")
    with asked_by_user("--pairs", ValueError, OSError):
        pairs = list(ll.ContrastivePairs.from_jsonl(path))
    if len(pairs) < 2:
        raise UserError(f"--pairs {path}: 1 pair; at least 2 are needed, one to train on and one to judge by, and tens are better")
    if ids := [i for i, pair in enumerate(pairs, 1) if not all(isinstance(part, str) for part in pair)]:
        raise UserError(f"--pairs {path}: pairs {ids[:5]} hold token ids; the command line judges texts, so it needs them as texts")
    random.Random(seed).shuffle(pairs)
    held = ll.ContrastivePairs(pairs[::EVERY])
    if len(pairs) < FEW:
        logger.warning(
            "--pairs {}: {} pairs, {} of them held out to judge by: what is said of so few says little; tens are better",
            path, len(pairs), len(held),
        )  # fmt: skip
    return Contrast(ll.ContrastivePairs(p for i, p in enumerate(pairs) if i % EVERY), held)
