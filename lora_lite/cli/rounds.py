"""What is there to say on rounds of steering, from the command line? `lora-lite rounds`: the library's rounds, a plot and a report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.cli.errors import UserError, asked_by_user
from lora_lite.cli.language import Recipe, Sampling, need_matplotlib, writing_model
from lora_lite.cli.leaving import on_stop
from lora_lite.cli.outputs import check_writable
from lora_lite.cli.pairs import EVERY, read_pairs
from lora_lite.cli.report import table
from lora_lite.steering import Round, Rounds, plot
from lora_lite.steering.verdict import spread

PROMPTS = 8


@dataclass(frozen=True)
class Asked:
    """What was asked for; `state` is the folder that survives a kill."""

    config: ll.AdapterConfig
    model: str
    pairs: Path
    state: Path
    rounds: int = 3
    margin: float = 0.5
    dose: float = 0.5
    device: str = "cpu"
    recipe: Recipe = field(default_factory=Recipe)
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    command: str = "lora-lite rounds"


def rounds(job: Asked) -> dict[str, Any]:
    """Goes on where the folder is, and returns what all its rounds came to. Raises UserError for what was typed wrong."""
    need_matplotlib()
    check_writable(f"--state {job.state}", job.state)
    contrasted = read_pairs(job.pairs, job.seed)
    if len(contrasted.held) < 2:
        few = f"{len(contrasted.train) + 1} pairs, of which 1 is held out"
        raise UserError(
            f"--pairs {job.pairs}: {few}; the rule needs a spread between held-out pairs: at least {EVERY + 1}, tens are better"
        )
    model, tokenizer = writing_model(job.model, job.device)
    calibration = {k: v for k, v in job.sampling.keywords().items() if k != "seed"}
    going_on = f"the same command goes on after the last step that {job.state} has: {job.command}"
    with on_stop(lambda: going_on), asked_by_user(f"--state {job.state}", ValueError, RuntimeError, TypeError, OSError):
        found = ll.steering_rounds(
            model, job.config, ll.ContrastivePairs(contrasted.train), job.sampling.rows(contrasted.prompts(PROMPTS)), job.state,
            tokenizer=tokenizer, rounds=job.rounds, margin=job.margin, dose=job.dose, validation=ll.ContrastivePairs(contrasted.held),
            training=asdict(job.recipe), calibration=calibration, seed=job.seed,
        )  # fmt: skip
    draw(job.state / "rounds.png", found)
    written = {"files": [str(job.state / name) for name in ("state.json", "rounds.png", "report.md", *(r.file for r in found.rounds))]}
    summary = {**found.to_dict(), "adapters": [f"{job.state / r.file}:{r.dose}" for r in found.rounds if r.dose is not None], **written}
    (job.state / "report.md").write_text(report(found, summary), encoding="utf-8")
    return summary


def draw(path: Path, found: Rounds) -> None:
    """The shift on held-out pairs, round by round, and what the null did in its place."""

    def marks(name: str, key: str, color: str) -> plot.Marks:
        checks: list[Any] = [getattr(r, key) for r in found.rounds]
        return plot.Marks(name, [c["shift"] for c in checks], [spread(c) for c in checks], color)

    label = "odds towards the chosen text, nats\n(mean ± standard deviation over held-out pairs)"
    fates = [f"round {r.number}\n" + ("dropped" if r.dose is None else f"kept, c = {r.dose:.3g}") for r in found.rounds]
    before, after = marks("before it", "before", plot.ORANGE), marks("with this round", "trained", plot.BLUE)
    plot.side_by_side(path, label, fates, [before, after, marks("with its null control", "null", plot.GRAY)])


def report(found: Rounds, summary: dict[str, Any]) -> str:
    parts = ["# Rounds of steering", "![rounds](rounds.png)", f"```text\n{found}\n```", "## Texts"]
    parts += [texts(r) for r in found.rounds]
    parts += ["## What is kept", "\n".join(f"    --adapter {name}" for name in summary["adapters"]) or "Nothing."]
    return "\n\n".join(parts) + "\n"


def texts(r: Round) -> str:
    """Probes of the calibration: numbers do not tell everything."""
    rows = [(p["c"], json.dumps(p["prompt"] + p["text"], ensure_ascii=False)) for p in (r.calibrated or {})["probes"]]
    return f"Round {r.number}:\n\n{table(('c', 'text'), rows)}"


def readable(s: dict[str, Any]) -> str:
    lines = [f"round {r['number']}: {r['why']}" for r in s["rounds"]]
    kept = [f"    --adapter {name}" for name in s["adapters"]]
    return "\n".join([*lines, "", s["rule"], "", *(["kept, as `lora-lite generate` takes them:", *kept] if kept else ["nothing is kept"])])
