"""How long does `import lora_lite` take for someone who has imported torch already?

Issue 2: at most 0.3 s. Fresh processes, PEFT's in turn with ours; the first of each warms the disk's cache and is not counted.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Row, Setup, Spread

ROOT = Path(__file__).parent.parent
CHILD = "import time, torch; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def rows(setup: Setup) -> Iterator[Row]:
    seconds: dict[str, list[float]] = {"lora_lite": [], "peft": []}
    for number in range(1 + setup.rounds(10)):
        for package in sorted(seconds, reverse=number % 2 == 1):
            elapsed = added_by(package)
            if number:
                seconds[package].append(elapsed)
    yield Row("imports", "import lora_lite, after import torch", Spread.of(seconds["lora_lite"]), 0.30, unit="s")
    yield Row("imports", "import peft, after import torch", Spread.of(seconds["peft"]), unit="s")


def added_by(package: str) -> float:
    """Seconds, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CHILD.format(package)], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)
