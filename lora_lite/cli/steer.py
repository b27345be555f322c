"""How is an adapter put on the dial from the command line? `steer` trains and calibrates one, `sweep` measures one that was saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.cli import report
from lora_lite.cli.errors import UserError, asked_by_user
from lora_lite.cli.language import Clock, Recipe, Sampling, calibration, dose_rows, machine, need_matplotlib, respond, writing_model
from lora_lite.cli.leaving import making
from lora_lite.cli.options import SWEPT, check_adapter_file, cs_of
from lora_lite.cli.pairs import read_pairs
from lora_lite.cli.report import as_sentence
from lora_lite.cli.traits import Judge

DOSES = tuple(cs_of(SWEPT))
PROMPTS = 8  # different ones that are written from


@dataclass(frozen=True)
class Steering:
    """What was asked for. null: train a null control too, and set the adapter's doses beside its."""

    config: ll.AdapterConfig
    model: str
    pairs: Path
    out: Path
    device: str = "cpu"
    recipe: Recipe = field(default_factory=Recipe)
    sampling: Sampling = field(default_factory=Sampling)
    doses: Sequence[float] = DOSES
    null: bool = False
    seed: int = 0
    command: str = "lora-lite steer"


def steer(job: Steering) -> dict[str, Any]:
    """Train, calibrate, sweep, save. Returns the summary that report.json holds; raises UserError for what was typed wrong."""
    need_matplotlib()
    with making(job.out):
        return steered(job)


def steered(job: Steering) -> dict[str, Any]:
    clock, contrasted = Clock(), read_pairs(job.pairs, job.seed)
    judge, prompts = Judge(contrasted), contrasted.prompts(PROMPTS)
    pairs, held = ll.ContrastivePairs(contrasted.train), ll.ContrastivePairs(contrasted.held)
    if job.null and len(pairs) < 2:
        raise UserError(f"--null with --pairs {job.pairs}: 1 pair is left to train on, and shuffled labels take 2; give at least 3 pairs")
    training = asdict(job.recipe) | {"validation": held, "seed": job.seed}
    with clock("model"):
        model, tokenizer = writing_model(job.model, job.device)
    with clock("attach"), asked_by_user("the adapter", ValueError, RuntimeError, TypeError):
        data = calibration(job.config, tokenizer, pairs, job.recipe)
        adapter = ll.attach(model, job.config, calibration_data=data, seed=job.seed)
    with clock("train"), asked_by_user("training", ValueError, RuntimeError):
        trained = ll.train_steering(model, adapter, pairs, tokenizer, **training)
    adapter.save(job.out / "adapter.safetensors")  # what took longest is safe before what may fail
    null = None
    if job.null:
        with clock("train the null control"):
            null, of_null = ll.null_control(model, adapter, pairs, tokenizer, calibration_data=data, **training)
            null.save(job.out / "null.safetensors")
    with clock("calibrate c"), asked_by_user("calibration", ValueError):
        found = ll.calibrate_c(adapter, job.sampling.rows(prompts), tokenizer=tokenizer, **job.sampling.keywords())
    adapter.save(job.out / "adapter.safetensors")
    with clock("sweep c"):
        response = respond(model, tokenizer, adapter, judge, job.doses, prompts, job.sampling, null)
    title = f"{job.config.variant} on {Path(job.model).name}"
    response.plot(job.out / "dose_response.png", zoom=response.gradual(), title=title)
    summary = {
        "title": title,
        "c": {"positive": found.positive, "negative": found.negative, "verdict": found.verdict},
        **measured(response, judge),
        "trained": held_out(trained),
        "null": {**held_out(of_null), "doses": dose_rows(response.null)} if null and response.null else None,
        "made": {
            "model": job.model, "pairs": str(job.pairs), "adapter": str(adapter), "config": job.config.to_dict(),
            "training": asdict(job.recipe), "sampling": asdict(job.sampling), "seed": job.seed, **machine(job.device),
        },
        "command": job.command,
        "seconds": clock.seconds,
        "files": files(job.out, "adapter.safetensors", *["null.safetensors"] * job.null, "dose_response.png", "samples.md", "report.md"),
    }  # fmt: skip
    sections = {"Training": str(trained), "How far c can go": str(found), "Doses": str(response)}
    if null:
        sections["Null control (shuffled labels)"] = str(of_null)
    written(job.out, summary, response, sections)
    return summary


@dataclass(frozen=True)
class Sweep:
    """What was asked for: a saved adapter, doses, and the pairs that say what its trait is. null: another file to set beside it."""

    model: str
    adapter: Path
    pairs: Path
    out: Path
    device: str = "cpu"
    sampling: Sampling = field(default_factory=Sampling)
    doses: Sequence[float] = DOSES
    null: Path | None = None
    seed: int = 0
    command: str = "lora-lite sweep"


def sweep(job: Sweep) -> dict[str, Any]:
    """The dose-response of a saved adapter: table, plot, samples. Raises UserError for what was typed wrong."""
    need_matplotlib()
    named = (("--adapter", job.adapter), ("--null", job.null))
    for option, path in named:
        if path is not None:
            check_adapter_file(option, path, job.model)
    with making(job.out):
        return swept(job, named)


def swept(job: Sweep, named: Sequence[tuple[str, Path | None]]) -> dict[str, Any]:
    clock, contrasted = Clock(), read_pairs(job.pairs, job.seed)
    judge, prompts = Judge(contrasted), contrasted.prompts(PROMPTS)
    with clock("model"):
        model, tokenizer = writing_model(job.model, job.device)
    adapter, null = (None if path is None else saved(model, option, path) for option, path in named)
    assert adapter is not None
    with clock("sweep c"):
        response = respond(model, tokenizer, adapter, judge, job.doses, prompts, job.sampling, null)
    title = f"{job.adapter.name} on {Path(job.model).name}"
    response.plot(job.out / "dose_response.png", zoom=response.gradual(), title=title)
    summary = {
        "title": title,
        "c": {side: adapter.calibrated.get(side) for side in ("positive", "negative", "verdict")} if adapter.calibrated else None,
        **measured(response, judge),
        "null": {"doses": dose_rows(response.null)} if response.null else None,
        "made": {"model": job.model, "adapter": str(job.adapter), "pairs": str(job.pairs), "sampling": asdict(job.sampling),
                 **machine(job.device)},
        "command": job.command,
        "seconds": clock.seconds,
        "files": files(job.out, "dose_response.png", "samples.md", "report.md"),
    }  # fmt: skip
    written(job.out, summary, response, {"Doses": str(response)})
    return summary


def saved(model: Any, option: str, path: Path) -> ll.Adapter:
    """The adapter in a file, and a word where it is not this model's before anything is generated."""
    with asked_by_user(f"{option} {path}", ll.CheckpointError, OSError, RuntimeError, ValueError):
        adapter = ll.load(model, path)
        adapter.detach()
    return adapter


def measured(response: ll.DoseResponse, judge: Judge) -> dict[str, Any]:
    return {
        "trait": response.trait, "judge_accuracy": judge.accuracy, "gradual_region": response.gradual(), "way": response.way(),
        "doses": dose_rows(response),
    }  # fmt: skip


def held_out(trained: Any) -> dict[str, Any]:
    """What the held-out pairs said of the weights that were kept, at both poles."""
    n = trained.pairs[1]
    poles = [asdict(pole) | ({} if n > 1 else {"effect": None}) for pole in trained.best.poles]  # one pair has no spread
    return {"step": trained.best_step, "held_out_pairs": n, "poles": poles}


def files(out: Path, *names: str) -> list[str]:
    return [str(out / name) for name in (*names, "report.json")]


def written(out: Path, summary: dict[str, Any], response: ll.DoseResponse, sections: dict[str, str]) -> None:
    """Samples, and the report for people and for programs."""
    report.write_samples(out / "samples.md", response, response.cs)
    made = report.table(("what", "value"), [(k, v) for k, v in summary["made"].items()])
    parts = [
        f"# {summary['title']}",
        f"![dose response](dose_response.png)\n\n{as_sentence(summary['way'])} Generated texts: [samples.md](samples.md).",
    ]
    parts += [f"## {head}\n\n```text\n{text}\n```" for head, text in sections.items()]
    parts += [f"`{summary['trait']}` is a judge's: two character n-gram models, fitted on the pairs; they put "
              f"{summary['judge_accuracy']:.0%} of held-out texts on their own side.", "## How it was made", made,
              f"Again:\n\n    {summary['command']}"]  # fmt: skip
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (out / "report.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def readable(s: dict[str, Any]) -> str:
    lines = [s["title"], ""]
    if s["c"]:
        lines += [f"  c can go from {limit(s['c']['negative'])} to {limit(s['c']['positive'])}: {s['c']['verdict']}", ""]
    of_null = {d["c"]: d["effect"] for d in s["null"]["doses"]} if s["null"] else {}
    lines += [f"  c      {s['trait']:<12} effect   {'null    ' if of_null else ''}perplexity  distinct-3"]
    for d in s["doses"]:
        null = f"{shown(of_null.get(d['c'])):<8}" if of_null else ""
        lines.append(f"  {d['c']:<6g} {d['trait']:<12.2f} {shown(d['effect']):<8} {null}{d['perplexity']:<11.1f} {d['distinct-3']:.2f}")
    return "\n".join(
        [*lines, "", f"  {s['way']}", "", f"  {sum(s['seconds'].values()):.0f} s; written:", *(f"    {f}" for f in s["files"])]
    )


def limit(c: float | None) -> str:
    return "nowhere" if c is None else f"{c:g}"


def shown(effect: float | None) -> str:
    return "-" if effect is None else f"{effect:+.2f}"
