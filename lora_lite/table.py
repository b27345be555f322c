"""What can each variant do? Tables made from the registry: `python -m lora_lite.table README.md docs/matrix.md` rewrites them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from lora_lite import variants as _registered  # noqa: F401 the files register themselves
from lora_lite.variant import REGISTRY, Variant
from lora_lite.variants.shared import SharedConfig

MARK = "<!-- {name}:{end} -->"


class Answer(NamedTuple):
    """Yes, or no with its reason."""

    yes: bool
    reason: str = ""


def reads(v: type[Variant]) -> str:
    return "at init" if v.reads_weight == "init" else "at every forward"


# A question and how a variant's declarations answer it. Nothing is probed: what is not declared cannot be answered.
MATRIX: Mapping[str, Callable[[type[Variant]], Answer]] = {
    "c per row": lambda v: Answer(v.row_c, v.why_not.get("row_c", "")),
    "linear in c": lambda v: Answer(v.linear_in_c, v.why_not.get("linear_in_c", "")),
    "merge": lambda v: Answer(True),
    "history": lambda v: Answer(True),
    "exact as one LoRA": lambda v: Answer(
        v.form == "low-rank" or v.exact_low_rank != "no", f"{v.name} is no low-rank sum; only a truncated SVD of its effect is one"
    ),
    "quantised base": lambda v: Answer(v.reads_weight == "never", f"{v.name} reads the dense weight {reads(v)}"),
}

OVERVIEW: Mapping[str, Callable[[type[Variant]], str]] = {
    "variant": lambda v: f"`{v.name}`",
    "config": lambda v: f"`{v.Config.__name__}`",
    "paper": lambda v: f"[{v.paper}](https://arxiv.org/abs/{v.paper})" if v.paper[:1].isdigit() else v.paper,
    "trained per layer": lambda v: v.parameters,
    "tensors": lambda v: tensors(v),
    "site": lambda v: "input" if v.form == "input" else "output",
    "reads the weight": lambda v: "never" if v.reads_weight == "never" else reads(v),
    "calibration": lambda v: v.calibration,
    "quantised base": lambda v: "yes" if v.reads_weight == "never" else "no",
    "low-rank form": lambda v: "yes" if v.form == "low-rank" else v.exact_low_rank,
    "at init": lambda v: {"bitwise": "the base", "close": "the base, nearly", "none": "not the base"}[v.identity.kind],
}


# Where the default config means nothing before it has met a subspace, here one of k = 48 directions on each side.
EXAMPLES = {"shared": SharedConfig(rooms={"layer": (48, 48, 16, 1.0, 0)})}


def tensors(v: type[Variant]) -> str:
    """The trained tensors of the default config at a layer of unmistakable sizes, written back as letters."""
    cfg = EXAMPLES.get(v.name, v.Config()).at("layer", 1152, 2304)
    letters = {1152: "d_in", 2304: "d_out", getattr(cfg, "r", 0): "r", 48: "k"}
    trained = {name: spec.shape for name, spec in v.param_specs(1152, 2304, cfg).items() if spec.trainable}
    return ", ".join(
        f"{name.removeprefix('lora_')} ({' x '.join(letters.get(n, str(n)) for n in shape)})" for name, shape in trained.items()
    )


def grid(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def overview() -> str:
    """The README's table."""
    return grid(OVERVIEW, ([say(v) for say in OVERVIEW.values()] for _, v in sorted(REGISTRY.items())))


def matrix() -> str:
    """Variant x capability, yes or no, and below it the reason of every no."""
    rows, reasons = [], []
    for name, v in sorted(REGISTRY.items()):
        answers = {question: ask(v) for question, ask in MATRIX.items()}
        rows.append([f"`{name}`", *("yes" if a.yes else "no" for a in answers.values())])
        reasons += [f"- `{name}`, {question}: {a.reason}" for question, a in answers.items() if not a.yes]
    return grid(["variant", *MATRIX], rows) + "\n\n" + "\n".join(reasons)


TABLES: Mapping[str, Callable[[], str]] = {"variants": overview, "matrix": matrix}


def refreshed(text: str) -> str:
    """A document with each marked table as it should be now."""
    for name, make in TABLES.items():
        begin, end = MARK.format(name=name, end="begin"), MARK.format(name=name, end="end")
        if begin in text and end in text:
            text = text[: text.index(begin)] + f"{begin}\n{make()}\n" + text[text.index(end) :]
    return text


if __name__ == "__main__":
    for document in map(Path, sys.argv[1:]):
        document.write_text(refreshed(document.read_text()))
