"""Which figures hold here? `python -m benchmarks [--device cpu|cuda] [--only NAME ...] [--out FILE.json]`"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lora_lite
from benchmarks.measure import Row, Setup, Spread

NAMES = ("aa", "decode", "prefill", "train", "dora", "imports", "attach", "history", "steering", "variants", "subspace", "transfer")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers by the old name
    setup = Setup(torch.device(options.device), options.effort, options.threads)
    facts = environment(setup)
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    found: list[Row] = []
    if len(options.only) == 1:
        for row in importlib.import_module(f"benchmarks.{options.only[0]}").rows(setup):
            print(line(row), flush=True)
            found.append(row)
    else:
        for name in options.only:
            found += alone(name, options)
    if options.out:
        write(options.out, facts, found)
    print(summary(found))
    return 0


def alone(name: str, options: argparse.Namespace) -> list[Row]:
    """One benchmark in a process of its own: what another leaves on the heap decides how often a large result must wait for fresh
    memory (prefill takes 1.06 of the base behind decode, 1.04 to 1.055 by itself)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        words = [f"--{key}={getattr(options, key)}" for key in ("device", "threads", "effort")]
        run = [sys.executable, "-W", "ignore", "-m", "benchmarks", "--only", name, *words, "--out", str(out)]
        with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
            for said in process.stdout or ():
                if said.startswith(name):
                    print(said, end="", flush=True)
        if process.returncode:
            raise SystemExit(process.returncode)
        return [row_of(row) for row in json.loads(out.read_text())["rows"]]


def row_of(told: dict[str, Any]) -> Row:
    """What `write` wrote of a row."""
    return Row(**{k: v for k, v in told.items() if k != "verdict"} | {"spread": Spread(**told["spread"])})


def summary(found: Sequence[Row]) -> str:
    """One line: how many figures keep their bound, and the names of those that do not."""
    judged = [row for row in found if row.verdict]
    told = [f"{row.verdict}: {row.benchmark} {row.name}" for row in judged if row.verdict != "ok"]
    return "; ".join([f"{len(judged) - len(told)} of {len(judged)} figures keep their bound", *told])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; one, because several wait for each other on a busy machine (up to 8x slower)"
    )
    parser.add_argument("--effort", type=float, default=1.0, help="scales the number of rounds: 0.2 for a look, 3 for a noisy machine")
    return parser.parse_args(arguments)


def environment(setup: Setup) -> dict[str, Any]:
    """What the figures depend on, and nothing that tells whose machine it was."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    on_cpu = f"cpu ({processor()}, {torch.backends.cpu.get_cpu_capability()})"
    device = torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else on_cpu
    facts: dict[str, Any] = {"lora_lite": lora_lite.__version__, **packages, "python": platform.python_version()}
    return facts | {"device": device, "threads": setup.threads, "clock": setup.clock, "effort": setup.effort}


def processor() -> str:
    """The model's name as Linux tells it; platform.processor() says only x86_64 there."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((text.partition(":")[2].strip() for text in lines if text.startswith("model name")), platform.machine())


def line(row: Row) -> str:
    spread = row.spread
    quartiles = f"[{spread.q1:.3f}, {spread.q3:.3f}]" if spread.n > 1 else "counted"
    figure = f"{spread.median:8.3f} {row.unit} {quartiles:16} n={spread.n:<4}"
    return f"{row.benchmark:8} {row.name:48} {figure} {row.allowed:11} {row.verdict}"


def write(path: Path, facts: dict[str, Any], found: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(row) | {"verdict": row.verdict} for row in found]
    path.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
