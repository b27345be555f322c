"""What can each variant do? Tables made from the registry: `python -m lora_lite.table README.md docs/matrix.md` rewrites them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lora_lite import variants as _registered  # noqa: F401 the files register themselves
from lora_lite.peft_format.methods import METHODS
from lora_lite.variant import REGISTRY, Variant
from lora_lite.variants.shared import SharedConfig

MARK = "<!-- {name}:{end} -->"


class Answer(NamedTuple):
    """Yes, or no with its reason."""

    yes: bool
    reason: str = ""


def reads(v: type[Variant]) -> str:
    return "at init" if v.reads_weight == "init" else "at every forward"


PEFT = {
    m.variant: ", ".join([m.peft_type, *(k for k, v in m.when.items() if v is True), *(f"of {k}={v!r}" for k, v in m.fixed.items())])
    for m in METHODS
    if m.writes
}


def in_peft(v: type[Variant]) -> str:
    """What a folder that `to_peft` writes calls the method."""
    return PEFT.get(v.name, "as a plain LORA" if one_lora(v) else "no")


def one_lora(v: type[Variant]) -> bool:
    return v.form == "low-rank" or v.exact_low_rank != "no"


# A question and how a variant's declarations answer it; tests/test_tables.py tries every yes and every no of every variant.
MATRIX: Mapping[str, Callable[[type[Variant]], Answer]] = {
    "c per row": lambda v: Answer(v.row_c, v.why_not.get("row_c", "")),
    "linear in c": lambda v: Answer(v.linear_in_c, v.why_not.get("linear_in_c", "")),
    "merge": lambda v: Answer(True),
    "history": lambda v: Answer(True),
    "exact as one LoRA": lambda v: Answer(one_lora(v), f"{v.name} is no low-rank sum; only a truncated SVD of its effect is one"),
    "quantised base": lambda v: Answer(v.reads_weight == "never", f"{v.name} reads the dense weight {reads(v)}"),
    "PEFT folder": lambda v: Answer(
        in_peft(v) != "no", f"PEFT has no {v.name}, and it is no low-rank sum; as_lora=True writes the nearest"
    ),
}

OVERVIEW: Mapping[str, Callable[[type[Variant]], str]] = {
    "variant": lambda v: v.name,
    "config": lambda v: v.Config.__name__,
    "paper": lambda v: v.paper,
    "trained per layer": lambda v: v.parameters,
    "tensors": lambda v: tensors(v),
    "site": lambda v: {"input": "input", "either": "output or input"}.get(v.form, "output"),
    "reads the weight": lambda v: "never" if v.reads_weight == "never" else reads(v),
    "calibration": lambda v: v.calibration,
    "quantised base": lambda v: "yes" if v.reads_weight == "never" else "no",
    "low-rank form": lambda v: "yes" if v.form == "low-rank" else v.exact_low_rank,
    "PEFT name": in_peft,
    "at init": lambda v: {"bitwise": "the base", "close": "the base, nearly", "none": "not the base"}[v.identity.kind],
}

# A tensor's sizes, as formulas: the first that gives the number at a layer of unmistakable sizes stands for it.
D_IN, D_OUT = 3 * 2**20, 5 * 2**20
SIZES: Mapping[str, Callable[[Any], int]] = {
    "d_in": lambda cfg: D_IN,
    "d_out": lambda cfg: D_OUT,
    "r": lambda cfg: cfg.r,
    "d_in / block_size": lambda cfg: D_IN // cfg.block_size,
    "r / block_size": lambda cfg: cfg.r // cfg.block_size,
    "block_size * (block_size - 1) / 2": lambda cfg: cfg.block_size * (cfg.block_size - 1) // 2,
    "k": lambda cfg: cfg.rooms["layer"][0],
    "r * (r - 1) / 2": lambda cfg: cfg.r * (cfg.r - 1) // 2,
    "int(kind[-1]) * d_out / 2": lambda cfg: int(cfg.kind[-1]) * D_OUT // 2,
}


# Where the default config means nothing before it has met a subspace, here one of k = 48 directions on each side.
EXAMPLES = {"shared": SharedConfig(rooms={"layer": (48, 48, 16, 1.0, 0)})}


def tensors(v: type[Variant]) -> str:
    """The trained tensors of the default config, with the formulas of their sizes; a size that none gives stays a number."""
    cfg = EXAMPLES.get(v.name, v.Config()).at("layer", D_IN, D_OUT)
    formulas: dict[int, str] = {}
    for formula, size in SIZES.items():
        with suppress(AttributeError):  # a config without such a field
            formulas.setdefault(size(cfg), formula)
    trained = {name: spec.shape for name, spec in v.param_specs(D_IN, D_OUT, cfg).items() if spec.trainable}
    return ", ".join(f"{name.removeprefix('lora_')} ({' x '.join(formulas.get(n, str(n)) for n in s)})" for name, s in trained.items())


def rows() -> list[dict[str, str]]:
    """The overview, a row per variant."""
    return [{question: say(v) for question, say in OVERVIEW.items()} for _, v in sorted(REGISTRY.items())]


def answers(v: type[Variant]) -> dict[str, Answer]:
    """The matrix's row of one variant."""
    return {question: ask(v) for question, ask in MATRIX.items()}


# -- as Markdown ----------------------------------------------------------------------------------------------------------

MARKED: Mapping[str, Callable[[str], str]] = {
    "variant": "`{}`".format,
    "config": "`{}`".format,
    "paper": lambda paper: f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:1].isdigit() else paper,
}


def grid(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def overview() -> str:
    """The README's table."""
    return grid(OVERVIEW, ([MARKED.get(question, str)(text) for question, text in row.items()] for row in rows()))


def matrix() -> str:
    """Variant x capability, yes or no, and below it the reason of every no."""
    lines, reasons = [], []
    for name, v in sorted(REGISTRY.items()):
        lines.append([f"`{name}`", *("yes" if a.yes else "no" for a in answers(v).values())])
        reasons += [f"- `{name}`, {question}: {a.reason}" for question, a in answers(v).items() if not a.yes]
    return grid(["variant", *MATRIX], lines) + "\n\n" + "\n".join(reasons)


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
