"""How does a checkpoint become another kind of checkpoint? Files of ours, the predecessors' and PEFT folders: `lora-lite convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.cli.errors import UserError, asked_by_user, spoken
from lora_lite.cli.options import model_at
from lora_lite.cli.outputs import check_file, check_peft_folders
from lora_lite.peft_format.folder import CONFIG, read_folder

OURS = ".safetensors"  # how a target ends that is to be a file of ours; any other is a PEFT folder
WORDS = {"as_lora=True": "--as-lora", "approximate=True": "--approximate", "part='": "--part '", "asked for r=": "asked for --r "}


@dataclass(frozen=True)
class Conversion:
    """What was asked for. c None: 1. model None: without one, where the method does not need the base."""

    source: Path
    target: Path
    c: float | None = None
    as_lora: bool = False
    approximate: bool = False
    r: int | None = None
    model: str | None = None
    part: str | None = None
    force: bool = False


def convert(job: Conversion) -> dict[str, Any]:
    """Does it, and returns what was done. Raises UserError for what cannot be, and for what needs --model."""
    check(job)
    try:
        with asked_by_user(f"{job.source} -> {job.target}", ll.CheckpointError, ValueError, TypeError, OSError):
            adapter = read(job)
            lost = write(job, adapter)
    except RuntimeError as error:
        needs = "" if job.model else "; here: --model PATH_OR_HUB_ID of the base"
        raise UserError(f"{job.source} -> {job.target}: {spoken(error, WORDS)}{needs}") from error
    except UserError as error:
        raise UserError(spoken(error, WORDS)) from error
    return {
        "from": str(job.source), "to": str(job.target), "variant": adapter.variant.name, "layers": len(adapter.targets),
        "numbers": adapter.num_parameters(), "c": None if is_ours(job.target) else dose(job), "model": job.model,
        "as": "lora_lite" if is_ours(job.target) else "PEFT", "relative_error": lost,
    }  # fmt: skip


def is_ours(target: Path) -> bool:
    return target.suffix == OURS


def dose(job: Conversion) -> float:
    return 1.0 if job.c is None else job.c


def check(job: Conversion) -> None:
    if is_ours(job.target):
        said = {"-c": job.c is not None, "--as-lora": job.as_lora, "--approximate": job.approximate, "--r": job.r is not None}
        given = [option for option, given in said.items() if given]
        if given:
            raise UserError(
                f"{', '.join(given)} shape a PEFT folder, and {job.target} ends in {OURS}: it will hold the adapter whole, and c is said "
                "when it is used; leave them out, or name a folder"
            )
    if is_folder(job.source) and job.model is None:
        raise UserError(
            f"{job.source} is a PEFT folder: which layers it means, and the fingerprint of its base, only the base says; give --model "
            "PATH_OR_HUB_ID"
        )
    if job.part is not None and not is_folder(job.source):
        raise UserError(f"--part {job.part}: of an IA3 folder of PEFT; {job.source} is none")
    if is_ours(job.target):
        check_file(f"{job.source} -> {job.target}", job.target, [job.source], job.force)
    else:
        check_peft_folders(f"{job.source} -> {job.target}", [job.target], [job.source], job.force)


def is_folder(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read(job: Conversion) -> ll.Adapter:
    """The adapter: on its base where one was named, by itself otherwise."""
    if is_folder(job.source):
        return ll.from_peft(base(job, (read_folder(job.source).fingerprint or {}).get("architecture")), job.source, part=job.part)
    adapter = ll.read(job.source)
    return adapter if job.model is None else ll.load(base(job, (adapter.fingerprint or {}).get("architecture")), job.source)


def base(job: Conversion, architecture: Any) -> Any:
    """The model, as the class that the adapter was made on where transformers has it, else as the one its config names."""
    import transformers  # takes seconds; conversions without --model should not

    assert job.model is not None
    with asked_by_user(f"--model {job.model}", OSError, ValueError, KeyError):
        config = transformers.AutoConfig.from_pretrained(model_at(job.model))
        names = [architecture, *(config.architectures or [])]
        kinds = [kind for name in names if isinstance(kind := getattr(transformers, str(name), None), type)]
        kind = next((k for k in kinds if issubclass(k, transformers.PreTrainedModel)), transformers.AutoModelForCausalLM)
        return kind.from_pretrained(model_at(job.model)).eval()


def write(job: Conversion, adapter: ll.Adapter) -> dict[str, float]:
    if is_ours(job.target):
        adapter.save(job.target)
        return {}
    return ll.to_peft(adapter, job.target, dose(job), as_lora=job.as_lora, approximate=job.approximate, r=job.r)


def readable(s: dict[str, Any]) -> str:
    worst = max(s["relative_error"].values(), default=0.0)
    at = "" if s["c"] is None else f" at c = {s['c']:g}"
    kept = f"approximately: a layer's update is off by up to {worst:.3g} of itself" if worst else "exactly"
    return f"{s['from']} ({s['variant']}, {s['layers']} layers) -> {s['to']}, for {s['as']}{at}, {kept}"
