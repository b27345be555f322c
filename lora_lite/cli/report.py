"""What is left to read when the demo is over? A plot, the samples, a short report, and the same as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lora_lite as ll


def write_samples(path: Path, response: ll.DoseResponse, doses: Sequence[float], each: int = 3) -> None:
    """A few samples for each of `doses`, the first ones made, not the best ones."""
    lines = [
        "# Samples",
        "",
        f"The first {each} of each dose, as they came. `{response.trait}` is the judge's; perplexity is under the base (c = 0).",
    ]
    for c in doses:
        lines += ["", f"## c = {c:g}"]
        for r in [r for r in response.readings if r.c == c][:each]:
            text = response.prompts[r.prompt] + r.text
            fence = "`" * (3 if "```" not in text else 6)
            said = f"{response.trait} = {r.trait:.2f}, perplexity {r.coherence['perplexity']:.1f}"
            lines += ["", said, "", fence + "text", text, fence]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_report(folder: Path, summary: Mapping[str, Any]) -> None:
    """report.json holds all of the summary; report.md is the same for people."""
    (folder / "report.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(summary), encoding="utf-8")


def markdown(s: Mapping[str, Any]) -> str:
    parts = [
        f"# {s['title']}",
        f"![dose response](dose_response.png)\n\n{gist(s)} Generated texts: [samples.md](samples.md).",
        "## Checks, bit for bit",
        table(("check", "holds"), [(k.replace("_", " "), "yes" if held else "**no**") for k, held in s["checks"].items()]),
        "## Doses",
        f"Trait: {s['trait']}, by two character n-gram models fitted on the training texts alone; they put {s['judge_accuracy']:.0%} of "
        "held-out texts on their own side. Coherence: perplexity of the generated text under the base; low is text the base would write.",
        table(
            ("c", "samples", f"{s['trait']} ± standard error", "effect", "perplexity", "distinct-3"), [dose_cells(d) for d in s["doses"]]
        ),
        "Effect: by how many standard deviations the texts at c differ from those at 0 (Cohen's d). Perplexity: geometric mean.",
        "## How it was made",
        table(("what", "value"), [(k.replace("_", " "), v) for k, v in s["made"].items()]),
        "## Seconds",
        table(("step", "seconds"), [(k, f"{v:.1f}") for k, v in s["seconds"].items()]),
        f"The same seed, versions, machine and number of threads give the same files, but for the times. Again:\n\n    {s['command']}\n\n"
        f"To write with the adapter at any c:\n\n    {s['next']}",
    ]
    return "\n\n".join(parts) + "\n"


def gist(s: Mapping[str, Any]) -> str:
    """The answer in a sentence."""
    first, last = s["doses"][0], s["doses"][-1]
    ends = f"{s['trait']} goes from {first['trait']:.2f} at c = {first['c']:g} to {last['trait']:.2f} at c = {last['c']:g}"
    return f"{ends}. {as_sentence(s['way'])}"


def as_sentence(said: str) -> str:
    return f"{said[:1].upper()}{said[1:]}."


def dose_cells(d: Mapping[str, Any]) -> tuple[str, ...]:
    effect, trait = "-" if d["effect"] is None else f"{d['effect']:+.2f}", with_error(d["trait"], d["trait_error"])
    return f"{d['c']:.3g}", str(d["n"]), trait, effect, f"{d['perplexity']:.1f}", f"{d['distinct-3']:.2f}"


def with_error(mean: float, error: float | None) -> str:
    """As many digits as the error has something to say in; "0.00 ± 0.00" says nothing."""
    if not error:
        return f"{mean:.2f} (all alike)" if error == 0 else f"{mean:.2f}"
    digits = max(2, -math.floor(math.log10(error)))
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if digits <= 6 else f"{mean:.2f} (all within 1e-6)"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
