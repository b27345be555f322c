"""What does a user type? `lora-lite steer ...`; each option is read here, checked, and handed on as plain values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import lora_lite as ll
from lora_lite.cli import steering, subspace, transfer
from lora_lite.cli.errors import asked_by_user
from lora_lite.cli.options import (
    JSON,
    TINY,
    Alpha,
    Band,
    Base,
    Cap,
    Device,
    Method,
    More,
    Rank,
    Rate,
    Seed,
    Steps,
    Tokens,
    Where,
    config_of,
    log,
    number,
    place,
    speak,
    tell,
    typed,
)
from lora_lite.cli.outputs import Force

app = typer.Typer(name="lora-lite", no_args_is_help=True, add_completion=False, help="Adapters with a dial, on unmodified models.")
app.add_typer(subspace.app)


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
    model: Base = TINY,
    pairs: Annotated[
        Path | None, typer.Option(help='JSON lines of {"prompt", "chosen", "rejected"}; left out, code against prose.')
    ] = None,
    variant: Method = "lora",
    targets: Where = "all-linear",
    layer_range: Band = (0.0, 1.0),
    r: Rank = None,
    alpha: Alpha = None,
    set_: More = None,
    steps: Steps = 80,
    lr: Rate = 2e-3,
    cap: Cap = 3.0,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples per c.  \\[default: 64, with --model 8]", show_default=False)] = None,
    tokens: Tokens = 64,
    seed: Seed = 0,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder for what is made.")] = Path("out/demo"),
    as_json: JSON = False,
) -> None:
    """Train an adapter on pairs of texts, sweep its c from -2 to 2, and write the adapter, a plot, samples and a report."""
    config = config_of(variant, set_, steps, targets=targets, layer_range=layer_range, r=r, alpha=alpha)
    from lora_lite.cli.demo import Job  # transformers takes seconds to import; --help and typing mistakes should not
    from lora_lite.cli.demo import demo as run
    from lora_lite.cli.language import Recipe, Sampling

    job = Job(
        config=config, out=out, model=model, pairs=pairs, device=place(device), seed=seed, command=typed(),
        recipe=Recipe(steps=steps, lr=lr, cap=cap, max_completion=tokens),
        sampling=Sampling(samples=samples or (64 if model == TINY else 8), length=tokens, seed=seed),
    )  # fmt: skip
    speak()
    summary = run(job)
    tell(summary, readable, as_json)
    raise typer.Exit(0 if summary["ok"] else 1)


@app.command()
def variants(as_json: JSON = False) -> None:
    """What each method can do: one line per variant; with --json every answer, and the reason of every no."""
    from lora_lite.cli.variants import readable, variants

    typer.echo(json.dumps(variants(), ensure_ascii=False) if as_json else readable())


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A .safetensors file of an adapter, or a PEFT folder.", show_default=False)],
    as_json: JSON = False,
) -> None:
    """What is in a checkpoint, without a model: variant, config, layers and shapes, counts, metadata, fingerprint, version."""
    from lora_lite.cli.info import info, readable

    with asked_by_user("info", ll.CheckpointError, OSError):
        found = info(file)
    typer.echo(json.dumps(found, ensure_ascii=False, allow_nan=False) if as_json else readable(found))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter's file or a PEFT folder.", show_default=False)],
    target: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A PEFT folder to write, or a file of ours: a name in .safetensors.", show_default=False),
    ],
    as_lora: Annotated[bool, typer.Option("--as-lora", help="One plain LoRA, c folded in: what servers load.")] = False,
    c: Annotated[
        float | None,
        typer.Option(
            "-c",
            parser=number,
            metavar="FLOAT",
            help="The dose that the folder does at its full strength.  \\[default: 1]",
            show_default=False,
        ),
    ] = None,
    approximate: Annotated[bool, typer.Option("--approximate", help="With --as-lora: the nearest one, where none is exact.")] = False,
    r: Annotated[int | None, typer.Option(min=1, help="With --as-lora: its rank.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the base, where it is needed: for PEFT folders, DoRA, HRA, ...", show_default=False),
    ] = None,
    part: Annotated[str | None, typer.Option(help='Only this of an IA3 folder: "ia3" or "ia3_ff".', show_default=False)] = None,
    force: Force = False,
    as_json: JSON = False,
) -> None:
    """A file of ours to a PEFT folder, or a PEFT folder to a file of ours; a file to a file is the same adapter in the newest format."""
    from lora_lite.cli.convert import Conversion, convert, readable

    (speak if model else log)()
    tell(convert(Conversion(source, target, c, as_lora, approximate, r, model, part, force)), readable, as_json)


for command in (steering.steer, steering.sweep, steering.generate, steering.rounds, transfer.transfer):
    app.command()(command)


def readable(s: dict[str, Any]) -> str:
    lines = [s["title"], ""]
    lines += [f"  {name.replace('_', ' '):34} {'yes' if held else 'NO'}" for name, held in s["checks"].items()]
    lines += ["", f"  c      {s['trait']:<12} perplexity under the base"]
    lines += [f"  {d['c']:<6g} {d['trait']:<12.2f} {d['perplexity']:.1f}" for d in s["doses"] if d["c"] * 2 == round(d["c"] * 2)]
    lines += ["", f"  {s['way']}"]
    return "\n".join([*lines, f"  {sum(s['seconds'].values()):.0f} s; written:", *(f"    {f}" for f in s["files"])])
