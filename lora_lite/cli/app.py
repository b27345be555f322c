"""What does a user type? `lora-lite demo ...`; each option is read here, checked, and handed on as plain values."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import lora_lite as ll
from lora_lite.cli import transfer
from lora_lite.cli.errors import UserError, asked_by_user
from lora_lite.cli.speech import speak

app = typer.Typer(name="lora-lite", no_args_is_help=True, add_completion=False, help="Adapters with a dial, on unmodified models.")
GIVEN_OR = {"r": 8, "alpha": 16.0}  # for variants that have them


app.command()(transfer.transfer)


def show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"lora-lite {ll.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None: ...


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a causal model; left out, a tiny one is trained.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help='JSON lines of {"prompt", "chosen", "rejected"}; left out, code against prose.')
    ] = None,
    variant: Annotated[str, typer.Option(help=f"The method: {', '.join(sorted(ll.REGISTRY))}.")] = "lora",
    targets: Annotated[str, typer.Option(help='"all-linear" or a regex on module names.')] = "all-linear",
    layer_range: Annotated[tuple[float, float], typer.Option(help="Band of depth, as two fractions.")] = (0.0, 1.0),
    r: Annotated[int | None, typer.Option(help="Rank, for variants that have one.  [default: 8]", show_default=False)] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale alpha/r, likewise.  [default: 16]", show_default=False)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE for other fields of the variant's config.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the adapter.")] = 80,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of the adapter.")] = 2e-3,
    cap: Annotated[float, typer.Option(min=1e-6, help="Nats by which c = 1 may move the odds of chosen against rejected.")] = 6.0,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples per c.  [default: 64, with --model 8]", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per sample, and training tokens per text.")] = 64,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...  [default: cuda where there is one]", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder for what is made.")] = Path("out/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train an adapter on pairs of texts, sweep its c from -2 to 2, and write the adapter, a plot, samples and a report."""
    config = config_of(variant, {"targets": targets, "layer_range": layer_range, "r": r, "alpha": alpha}, set_ or [])
    from lora_lite.cli import contrast, sweep  # transformers takes seconds to import; --help and typing mistakes should not
    from lora_lite.cli.demo import Job
    from lora_lite.cli.demo import demo as run

    job = Job(
        config=config, out=out, model=model, pairs=pairs, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), seed=seed,
        training=contrast.Training(steps=steps, lr=lr, cap=cap, length=tokens, seed=seed),
        sampling=sweep.Sampling(samples=samples or (8 if model else 64), length=tokens, seed=seed),
        command=shlex.join(["lora-lite", *sys.argv[1:]]),
    )  # fmt: skip
    job = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, seed=seed))
    speak()
    summary = run(job)
    typer.echo(json.dumps(summary, ensure_ascii=False) if as_json else readable(summary))
    raise typer.Exit(0 if summary["ok"] else 1)


def config_of(variant: str, given: dict[str, Any], more: list[str]) -> ll.AdapterConfig:
    """The variant's config. Raises UserError: an unknown variant or field, or a value that cannot be meant."""
    if variant not in ll.REGISTRY:
        raise UserError(f"--variant {variant}: there is none of that name; there are {', '.join(sorted(ll.REGISTRY))}")
    kind = ll.REGISTRY[variant].Config
    fields = {f.name for f in dataclasses.fields(kind)}
    values = {k: v for k, v in given.items() if v is not None} | dict(map(assignment, more))
    if unknown := sorted(set(values) - fields):
        raise UserError(f"--variant {variant} has no {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    with asked_by_user(f"--variant {variant}", ValueError, TypeError):
        return kind.from_dict({k: v for k, v in GIVEN_OR.items() if k in fields} | values)


def assignment(text: str) -> tuple[str, Any]:
    """("train", "spectrum") from "train=spectrum": the value is JSON where it reads as such, else text."""
    name, found, value = text.partition("=")
    if not found:
        raise UserError(f"--set {text}: expected NAME=VALUE, such as --set dropout=0.1")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def readable(s: dict[str, Any]) -> str:
    region = s["gradual_region"]
    lines = [s["title"], ""]
    lines += [f"  {name.replace('_', ' '):34} {'yes' if held else 'NO'}" for name, held in s["checks"].items()]
    lines += ["", f"  c      {s['trait']:<12} perplexity under the base"]
    lines += [f"  {d['c']:<6g} {d['trait']:<12.2f} {d['perplexity']:.1f}" for d in s["doses"] if d["c"] * 2 == round(d["c"] * 2)]
    lines += ["", f"  the dose is gradual from c = {region[0]:g} to {region[1]:g}" if region else "  the trait hardly moves with c"]
    return "\n".join([*lines, f"  {sum(s['seconds'].values()):.0f} s; written:", *(f"    {f}" for f in s["files"])])
