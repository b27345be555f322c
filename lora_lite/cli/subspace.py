"""What does a user type to keep many adapters as one? `lora-lite subspace build|info|add|export|diagnose|validate|diff`."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

import lora_lite as ll
from lora_lite.cli.errors import UserError, asked_by_user
from lora_lite.cli.options import JSON, log
from lora_lite.cli.outputs import Force, check_file, check_peft_folders
from lora_lite.subspace import Update, Verdict, source_of
from lora_lite.subspace.projection import project as projected

app = typer.Typer(name="subspace", no_args_is_help=True, help="Many adapters of one base as one shared basis and a few numbers each.")

File = Annotated[Path, typer.Argument(help="A file of SharedSubspace.save.", show_default=False)]
Adapters = Annotated[list[Path], typer.Argument(help="Adapter files of lora_lite, or PEFT LoRA folders.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Where the result goes.  [default: back into FILE]", show_default=False)]
Names = Annotated[list[str] | None, typer.Option("--id", help="The task ids, once per adapter; left out, the names of files or folders.")]
Threshold = Annotated[float, typer.Option(min=1e-9, max=1, help="Share of |dW|^2 that each layer keeps; 0.6 as in vlora.")]

# The library's words for its arguments, and the command line's.
WORDS = {
    "Give task_ids=": "Give --id once per adapter", "task_ids for": "--id for", 'missing="zero" or "common"': "--missing zero or common",
    'missing="zero" allows that': "build with --missing zero allows that", "budget_bytes=": "--budget-bytes ",
    "to(dtype=torch.float32) first, quantize() afterwards; project() and add_task() work as it is":
        "--project works as it is, or build it again without --bits",
    'coefficients="diag"': "--coefficients diag",
    'project() and add_task(), or build "core"': "--project, or build with --coefficients core",
    "remove_task it first, or give another id": "give another --id",
    'space="flat"': "--space flat", 'space="feature"': "--space feature",
    "adapter.fingerprint = None": "in Python, adapter.fingerprint = None",
}  # fmt: skip


@app.callback()
def warn() -> None:
    """What the library leaves out or drops, it says."""
    log()


class Space(StrEnum):
    feature = "feature"
    flat = "flat"


class Coefficients(StrEnum):
    core = "core"
    factors = "factors"
    diag = "diag"


class Missing(StrEnum):
    error = "error"
    zero = "zero"
    common = "common"


@app.command()
def build(
    adapters: Adapters,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    ids: Names = None,
    space: Annotated[Space, typer.Option(help="feature: directions of B A. flat: PCA of flattened factors.")] = Space.feature,
    coefficients: Annotated[Coefficients, typer.Option(help="What each task keeps in space feature.")] = Coefficients.core,
    variance_threshold: Threshold = 0.6,
    num_components: Annotated[int | None, typer.Option("--num-components", "-k", min=1, help="The same k everywhere instead.")] = None,
    adaptive_k: Annotated[bool, typer.Option("--adaptive-k", help="The threshold decides k all the same.")] = False,
    budget_bytes: Annotated[int | None, typer.Option(min=1, help="Directions where they explain most, until this is spent.")] = None,
    missing: Annotated[Missing, typer.Option(help="Layers that are not in every adapter.")] = Missing.error,
    bits: Annotated[int | None, typer.Option(help="8 or 4: quantise the result.")] = None,
    force: Force = False,
    as_json: JSON = False,
) -> None:
    """Find what adapters share, one layer of all of them in memory at a time."""
    if bits not in (None, 4, 8):
        raise UserError(f"--bits {bits}: it must be 8 or 4")
    if num_components is not None and budget_bytes is not None:
        raise UserError("give -k or --budget-bytes, not both: a budget chooses k itself")
    if space is Space.flat and coefficients is not Coefficients.core:
        raise UserError(f"--coefficients {coefficients.value} is of space feature: in flat each task keeps loadings on each side")
    check_file(f"--out {out}", out, adapters, force)
    with refusals(), progress("layers", "layer") as step:
        sub = ll.SharedSubspace.from_adapters_streaming(
            adapters, ids, num_components, space=space.value, coefficients=coefficients.value, variance_threshold=variance_threshold,
            adaptive_k=adaptive_k, budget_bytes=budget_bytes, missing=missing.value, progress=step,
        )  # fmt: skip
        if bits is not None:
            sub.quantize(bits)
        sub.save(out)
    found = {**described(sub, out), "given_bytes": sum(map(size_of, adapters))}
    larger = found["file_bytes"] - found["given_bytes"]
    note = f"the file is {larger:,} bytes larger than the adapters: keep those, or give fewer directions (-k, --budget-bytes) or --bits"
    tell(found | {"note": note} if larger > 0 else found, as_json)


@app.command()
def info(file: File, as_json: JSON = False) -> None:
    """What a subspace holds: tasks, layers, directions, bytes, and a bound on each task's error."""
    sub = opened(file)
    bounds = {t: relative_bound(sub, t) for t in sub.tasks}
    tell({**described(sub, file), "tasks": sub.tasks, "error_at_most": bounds}, as_json)


@app.command()
def add(
    file: File,
    adapters: Adapters,
    ids: Names = None,
    project: Annotated[bool, typer.Option("--project", help="Leave the bases as they are; what they do not hold is lost.")] = False,
    out: Out = None,
    force: Force = False,
    as_json: JSON = False,
) -> None:
    """Take in further adapters. The bases turn to make room for them; old tasks lose no more than `info` then says."""
    sub = opened(file)
    names = ids or [a.name if a.is_dir() else a.stem for a in adapters]
    if len(names) != len(adapters):
        raise UserError(f"{len(names)} --id for {len(adapters)} adapters")
    into_itself = out is None or out.resolve() == file.resolve()  # as --help says
    check_file(f"{file}" if out is None else f"--out {out}", out or file, adapters, force or into_itself)
    coverage = {}
    with refusals():
        for name, adapter in zip(names, tqdm(adapters, desc="adding", unit="adapter", delay=1.0), strict=True):
            source = source_of(name, adapter)
            # an absorb says itself which layers it leaves out
            projection = sub.project(source, name) if project else projected(sub.state, source, name)
            coverage[name] = projection.coverage
            sub.add_task(projection) if project else sub.absorb(source, name)
        sub.save(out or file)
    tell({**described(sub, out or file), "covered_before": coverage}, as_json)


@app.command()
def export(
    file: File,
    out: Annotated[Path, typer.Option(help="A folder; each task becomes a PEFT folder task_<n> in it, or --task the folder itself.")],
    task: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    force: Force = False,
    as_json: JSON = False,
) -> None:
    """Tasks back to PEFT folders. Ids are never used as file names: the answer says which folder is whose."""
    sub = opened(file)
    folders = {task: out} if task is not None else {name: out / f"task_{i}" for i, name in enumerate(sub.tasks)}
    check_peft_folders(f"--out {out}", list(folders.values()), [file], force)
    written = {}
    with refusals():
        for name, folder in tqdm(folders.items(), desc="exporting", unit="task", delay=1.0):
            ll.to_peft(sub.reconstruct(name), folder)
            written[name] = str(folder)
    tell({"file": str(file), "folders": written}, as_json)


@app.command()
def diagnose(
    file: File,
    adapters: Annotated[list[Path] | None, typer.Argument(help="The originals, in the order of the tasks.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of the chance that sharing is compared with.")] = 0,
    as_json: JSON = False,
) -> None:
    """Does this collection share anything, and is a shared basis the cheapest way to keep it? A verdict per layer.

    Of layers that were truncated only the originals can tell: without them there is no verdict. --json has all figures."""
    sub = opened(file)
    if adapters and len(adapters) != len(sub.tasks):
        raise UserError(f"{len(adapters)} adapters for the {len(sub.tasks)} tasks of {file}: {', '.join(sub.tasks[:5])}")
    given = dict(zip(sub.tasks, adapters, strict=True)) if adapters else None
    with refusals(), progress("layers", "layer") as step:
        verdicts = sub.diagnose(given, seed, progress=step)
    judged = [v.shares for v in verdicts.values() if v.shares is not None]
    sharing = f"{sum(judged)} of {len(judged)}"
    if unknown := len(verdicts) - len(judged):
        sharing += f"; no verdict on {unknown}"
        if any(v.needs_originals for v in verdicts.values()):
            sharing += f": name the original adapters behind {file}, in the order of its tasks"
    found = {"file": str(file), "layers_that_share": sharing}
    if as_json:
        return tell(found | {"layers": {m: figures(v) for m, v in verdicts.items()}}, as_json)
    tell(found, as_json)
    for m, v in verdicts.items():
        typer.echo(f"{m}: {v.text}")


def figures(v: Verdict) -> dict[str, Any]:
    spectra = {name: x and x._asdict() for name, x in (("spectrum", v.spectrum), ("chance_spectrum", v.chance_spectrum))}
    return {"verdict": v.text, "shares": v.shares, **vars(v), "bytes": dict(v.bytes), **spectra}


@app.command()
def validate(
    file: File,
    adapters: Annotated[list[Path] | None, typer.Argument(help="The originals, in the order of the tasks.", show_default=False)] = None,
    as_json: JSON = False,
) -> None:
    """Is the file whole, are its bases orthonormal, and is each task as near to its original as it says? Exit status 1 if not."""
    sub = opened(file)
    bases = [U for sides in sub.components.values() for U in sides]
    bent = max(map(orthonormality, bases))
    straight = sub.state.bits is not None or bent < 100 * torch.finfo(bases[0].dtype).eps
    checks = {"file_is_whole": True, "bases_are_orthonormal": straight}  # `load` has read every number, and refuses NaN
    errors: dict[str, float] = {}
    if adapters:
        if len(adapters) != len(sub.tasks):
            raise UserError(f"{len(adapters)} adapters for the {len(sub.tasks)} tasks of {file}: {', '.join(sub.tasks[:5])}")
        with refusals():
            for name, path in zip(sub.tasks, tqdm(adapters, desc="comparing", unit="task", delay=1.0), strict=True):
                errors[name] = relative(updates(path, name), updates(sub.reconstruct(name), name))
        checks["errors_within_their_bounds"] = sub.state.space == "flat" or all(
            errors[t] <= relative_bound(sub, t) * (1 + 1e-3) + 1e-4 for t in errors
        )
    tell({"file": str(file), "checks": checks, "farthest_from_orthonormal": bent, "error": errors}, as_json)
    raise typer.Exit(0 if all(checks.values()) else 1)


@app.command()
def diff(
    one: Annotated[str, typer.Argument(help="An adapter file or PEFT folder, or FILE::TASK of a subspace.", show_default=False)],
    other: Annotated[str, typer.Argument(help="The same.", show_default=False)],
    as_json: JSON = False,
) -> None:
    """How far are two adapters apart: |dW1 - dW2| / |dW1|, and the cosine between them, by layer and over all."""
    with refusals():
        a, b = (updates(meant(text), text) for text in (one, other))
    common = [m for m in a if m in b]
    layers = {m: {"relative": relative({m: a[m]}, b), "cosine": cosine([a[m]], [b[m]])} for m in common}
    found = {
        "relative": relative({m: a[m] for m in common}, b), "cosine": cosine([a[m] for m in common], [b[m] for m in common]),
        "only_in_first": [m for m in a if m not in b], "only_in_second": [m for m in b if m not in a], "layers": layers,
    }  # fmt: skip
    tell(found, as_json)


# -- what several commands share ----------------------------------------------------------------------------------------------


def refusals() -> Any:
    """What the library refuses was asked by the user."""
    return asked_by_user("", ValueError, TypeError, KeyError, OSError, words=WORDS)


@contextmanager
def progress(what: str, unit: str) -> Iterator[Any]:
    """A bar that the library moves: `step(done, of)`. It appears after a second, on stderr."""
    with tqdm(desc=what, unit=unit, delay=1.0) as bar:

        def step(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield step


def opened(file: Path) -> ll.SharedSubspace:
    with refusals():
        return ll.SharedSubspace.load(file)


def described(sub: ll.SharedSubspace, file: Path) -> dict[str, Any]:
    stats, state = sub.compression_stats(), sub.state
    per_layer = stats["components_per_layer"]
    ks = [k for sides in per_layer.values() if not isinstance(sides, str) for k in sides]
    apart = Counter(held for held in per_layer.values() if isinstance(held, str))
    return {
        "file": str(file), "file_bytes": os.path.getsize(file), "bytes": sub.nbytes, "space": state.space, "coefficients": state.kind,
        "bits": state.bits, "num_tasks": stats["num_tasks"], "num_layers": stats["num_layers"],
        "components": [min(ks, default=0), max(ks, default=0)], "layers_that_do_not_share": dict(apart),
        "compression_ratio": stats["compression_ratio"],
    }  # fmt: skip


def size_of(path: Path) -> int:
    return sum(p.stat().st_size for p in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size


def relative_bound(sub: ll.SharedSubspace, task: str) -> float:
    """A bound on |dW - kept| / |dW| over the task's layers ("flat": of the factors)."""
    layers = [layer for layer in sub.state.layers.values() if task in layer.index]
    energy = sum(float(x.energy[x.index[task]]) for x in layers)
    lost = sum(sub.error_bound(task).values())
    return math.sqrt(lost / energy) if energy else 0.0


def orthonormality(U: torch.Tensor) -> float:
    return float((U.double() @ U.double().T - torch.eye(len(U), dtype=torch.float64)).abs().max()) if len(U) else 0.0


def meant(text: str) -> ll.Adapter | Path:
    file, found, task = text.partition("::")
    return ll.SharedSubspace.load(file).reconstruct(task) if found else Path(text)


def updates(given: ll.Adapter | Path, name: str) -> dict[str, Update]:
    source = source_of(name, given)
    return {m: source.read(m) for m in source.modules}


def inner(a: Update, b: Update) -> float:
    """<dW_a, dW_b> without forming either."""
    return a.scale * b.scale * float(((a.B.double().T @ b.B.double()) * (a.A.double() @ b.A.double().T)).sum())


def relative(given: Mapping[str, Update], kept: Mapping[str, Update]) -> float:
    whole = sum(inner(u, u) for u in given.values())
    apart = sum(inner(u, u) - 2 * inner(u, kept[m]) + inner(kept[m], kept[m]) for m, u in given.items() if m in kept)
    return math.sqrt(max(0.0, apart) / whole) if whole else 0.0


def cosine(a: Sequence[Update], b: Sequence[Update]) -> float:
    sizes = math.sqrt(sum(inner(u, u) for u in a) * sum(inner(u, u) for u in b))
    return sum(inner(u, v) for u, v in zip(a, b, strict=True)) / sizes if sizes else 0.0


def tell(found: Mapping[str, Any], as_json: bool) -> None:
    typer.echo(json.dumps(found, ensure_ascii=False, default=list) if as_json else "\n".join(lines(found)))


BY_ID = ("error", "error_at_most", "covered_before", "folders")  # tables whose names are the tasks', which are typed as they are


def lines(found: Mapping[str, Any], depth: int = 0, exact: bool = False) -> Iterator[str]:
    """For people: a name and its value per line, tables below their names."""
    for key, value in found.items():
        if isinstance(value, Mapping) and value:
            yield f"{'  ' * depth}{key}"
            yield from lines(value, depth + 1, key in BY_ID)
        else:
            shown = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value
            said = key if exact else key.replace("_", " ")
            yield f"{'  ' * depth}{said:{max(1, 34 - 2 * depth)}} {shown}"
