"""What does a user type to steer a model? `lora-lite steer`, `sweep`, `generate` and `rounds`; the work is in the files they import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_lite.cli.options import (
    JSON,
    KL,
    SWEPT,
    Alpha,
    Band,
    Base,
    Batch,
    Cap,
    Device,
    Doses,
    Heat,
    Method,
    More,
    Pairs,
    Rank,
    Rate,
    Samples,
    Seed,
    Steps,
    Tokens,
    Where,
    after_equals,
    config_of,
    cs_of,
    place,
    speak,
    tell,
    typed,
)


def steer(
    model: Base,
    pairs: Pairs,
    variant: Method = "lora",
    targets: Where = "all-linear",
    layer_range: Band = (0.0, 1.0),
    r: Rank = None,
    alpha: Alpha = None,
    set_: More = None,
    steps: Steps = 200,
    lr: Rate = 1e-3,
    cap: Cap = 3.0,
    kl: KL = 10.0,
    batch_size: Batch = 8,
    null: Annotated[bool, typer.Option("--null/--no-null", help="Train a null control too: the same on shuffled labels.")] = False,
    doses: Doses = SWEPT,
    samples: Samples = 16,
    tokens: Tokens = 64,
    temperature: Heat = 0.8,
    seed: Seed = 0,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder for what is made.")] = Path("out/steer"),
    as_json: JSON = False,
) -> None:
    """Train an adapter on pairs of texts, find how far its c can go, and write the adapter, a plot, samples and a report."""
    config = config_of(variant, set_, steps, targets=targets, layer_range=layer_range, r=r, alpha=alpha)
    from lora_lite.cli import steer as cli
    from lora_lite.cli.language import Recipe, Sampling

    job = cli.Steering(
        config=config, model=model, pairs=pairs, out=out, device=place(device), doses=cs_of(doses), null=null, seed=seed, command=typed(),
        recipe=Recipe(steps, batch_size, lr, cap, kl, tokens), sampling=Sampling(samples, tokens, temperature, seed),
    )  # fmt: skip
    speak()
    tell(cli.steer(job), cli.readable, as_json)


def sweep(
    model: Base,
    adapter: Annotated[Path, typer.Option(help="The adapter's file.", show_default=False)],
    pairs: Pairs,
    doses: Doses = SWEPT,
    null: Annotated[Path | None, typer.Option(help="File of a null control, to set beside it.", show_default=False)] = None,
    samples: Samples = 16,
    tokens: Tokens = 64,
    temperature: Heat = 0.8,
    seed: Seed = 0,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder for what is made.")] = Path("out/sweep"),
    as_json: JSON = False,
) -> None:
    """What does a saved adapter do at each c? A table, a plot and samples; the pairs say what its trait is."""
    from lora_lite.cli import steer as cli
    from lora_lite.cli.language import Sampling

    job = cli.Sweep(
        model=model, adapter=adapter, pairs=pairs, out=out, device=place(device), doses=cs_of(doses), null=null, seed=seed,
        command=typed(), sampling=Sampling(samples, tokens, temperature, seed),
    )  # fmt: skip
    speak()
    tell(cli.sweep(job), cli.readable, as_json)


def generate(
    model: Base,
    adapter: Annotated[
        list[str],
        typer.Option(metavar="FILE[:C]", help="An adapter, with a dose of its own or -c's; again for a stack.", show_default=False),
    ],
    prompt: Annotated[list[str], typer.Option(help="A text to continue; again for more.", show_default=False)],
    c: Annotated[
        list[str] | None,
        typer.Option(
            "-c", parser=after_equals, metavar="TEXT", help="A number, auto or -auto; again for more.  \\[default: 1]", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts per prompt; more than one needs --temperature.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 64,
    temperature: Heat = 0.0,
    seed: Seed = 0,
    device: Device = None,
    as_json: JSON = False,
) -> None:
    """Write at this c, with one adapter or several stacked."""
    from lora_lite.cli import generate as cli

    job = cli.Generation(model, adapter, prompt, c or ["1"], place(device), tokens, temperature, samples, seed)
    speak()
    tell(cli.generate(job), cli.readable, as_json)


def rounds(
    model: Base,
    pairs: Pairs,
    variant: Method = "pissa",
    targets: Where = "all-linear",
    layer_range: Band = (0.0, 1.0),
    r: Rank = None,
    alpha: Alpha = None,
    set_: More = None,
    n: Annotated[int, typer.Option("--rounds", min=1, help="How many, those in the folder included.")] = 3,
    margin: Annotated[float, typer.Option(help="How far an effect must be above the size of its null control's.")] = 0.5,
    dose: Annotated[float, typer.Option(min=1e-6, help="At which a kept adapter acts on, at most.")] = 0.5,
    steps: Steps = 200,
    lr: Rate = 1e-3,
    cap: Cap = 3.0,
    kl: KL = 10.0,
    batch_size: Batch = 8,
    samples: Samples = 16,
    tokens: Tokens = 64,
    temperature: Heat = 0.8,
    seed: Seed = 0,
    device: Device = None,
    state: Annotated[Path, typer.Option(help="The folder that holds the state; the same command goes on where it was.")] = Path(
        "out/rounds"
    ),
    as_json: JSON = False,
) -> None:
    """Several rounds, each on top of what the earlier ones left: train, null control, calibrate, keep or drop by a rule, bake."""
    config = config_of(variant, set_, steps, targets=targets, layer_range=layer_range, r=r, alpha=alpha)
    from lora_lite.cli import rounds as cli
    from lora_lite.cli.language import Recipe, Sampling

    job = cli.Asked(
        config=config, model=model, pairs=pairs, state=state, rounds=n, margin=margin, dose=dose, device=place(device), seed=seed,
        command=typed(), recipe=Recipe(steps, batch_size, lr, cap, kl, tokens), sampling=Sampling(samples, tokens, temperature, seed),
    )  # fmt: skip
    speak()
    tell(cli.rounds(job), cli.readable, as_json)
