"""Which real text is on every machine? Python's own standard library: docstring paragraphs are English prose, function bodies are code."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import re
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Tests are not prose, and distributions leave these packages out as they please: with them, machines would differ.
SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo")
SKIPPED += ("lib2to3", "ensurepip", "distutils", "pydoc_data")
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "__")
LENGTH = (80, 600)  # characters of one document: about a sentence to a screenful
HELD_OUT = 20  # every 20th document


@dataclass(frozen=True)
class Corpus:
    """Two kinds of text, each as documents in a fixed order."""

    prose: tuple[str, ...]
    code: tuple[str, ...]

    def split(self) -> tuple[Corpus, Corpus]:
        """(training, held out)."""
        kinds = (self.prose, self.code)
        kept = Corpus(*(tuple(d for i, d in enumerate(k) if i % HELD_OUT) for k in kinds))
        return kept, Corpus(*(k[::HELD_OUT] for k in kinds))

    def digest(self) -> str:
        """Changes when any document does."""
        state = hashlib.blake2b(digest_size=8)
        for kind in (self.prose, self.code):
            state.update("\0".join((*kind, "\1")).encode())
        return state.hexdigest()


@functools.cache
def standard_library(root: Path | None = None) -> Corpus:
    """Every docstring paragraph that reads as prose, every function body without its docstring; sorted by file, then by place."""
    prose: dict[str, None] = {}  # a dict keeps the order and drops repetitions
    code: dict[str, None] = {}
    for path in python_files(root or Path(sysconfig.get_paths()["stdlib"])):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):  # a template, another encoding, or a file we may not read: the rest is plenty
            continue
        prose.update(dict.fromkeys(p for p in paragraphs(tree) if is_prose(p)))
        code.update(dict.fromkeys(bodies(tree, source.splitlines())))
    return Corpus(tuple(prose), tuple(code))


def python_files(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in SKIPPED and not n.startswith(SKIPPED_PREFIXES))
        yield from (Path(folder, f) for f in sorted(files) if f.endswith(".py") and not f.startswith(("_sysconfigdata", "test_")))


def paragraphs(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            yield from (" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if fits(" ".join(p.split())))


def bodies(tree: ast.Module, lines: Sequence[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body and body[-1].end_lineno and fits(text := cut("\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno]))):
            yield text


def cut(block: str) -> str:
    """Left-aligned, without its comments (they are prose), and whole lines up to the longest length."""
    kept: list[str] = []
    for line in inspect.cleandoc(textwrap.dedent(block)).splitlines():
        if line.strip() and not line.lstrip().startswith("#") and sum(map(len, kept)) + len(kept) + len(line) <= LENGTH[1]:
            kept.append(line.rstrip())
    return "\n".join(kept)


def fits(text: str) -> bool:
    return LENGTH[0] <= len(text) <= LENGTH[1] and text.isascii()


def is_prose(text: str) -> bool:
    """Mostly words, no doctest, no table, no signature: docstrings hold those too."""
    words = re.findall(r"(?<![\w.(`'\"-])[a-zA-Z][a-z]+(?=[\s,.;:!?)]|$)", text)
    return ">>>" not in text and "--" not in text and len(words) >= 0.7 * len(text.split())
