"""Do imports inside lora_lite run downward only, without cycles, and does every public name say what it is?"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import lora_lite

pytestmark = pytest.mark.fast

PACKAGE = Path(lora_lite.__file__).parent
# From the top down: a module may import what stands below its room, or in it. `__main__` and cli are users of the door.
ROOMS = (
    "__main__",
    "cli",
    "__init__",
    "table",
    "steering",
    "history",
    "keeping",
    "transfer",
    "subspace",
    "peft_format",
    "lifecycle",
    "adapter",
    "placement",
    "attachment",
    "initialise",
    "calibration",
    "running",
    "fitting",
    "origins",
    "checkpoint",
    "merge",
    "variants",
    "variant",
    "target",
    "base",
    "baked",
    "hooks",
    "doses",
    "lowrank",
    "mixed",
    "varied",
    "config",
    "recompute",
    "compiled",
    "dial",
    "version",
)
PLAIN = {"__version__", "REGISTRY"}  # values, which cannot carry a docstring of their own
DRAWERS = {"util", "utils", "common", "helpers", "misc"}  # names that say nothing of what is inside


class Import(NamedTuple):
    """`module` imports `target`, both without the leading "lora_lite."; "__init__" is the door."""

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.module} imports {self.target} (line {self.line})"


Sources = Mapping[str, str]


def sources() -> dict[str, str]:
    return {module_name(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def module_name(path: Path) -> str:
    """variants/lora.py -> variants.lora, variants/__init__.py -> variants, __init__.py -> __init__"""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    return module.split(".")[0]


def imports(files: Sources) -> list[Import]:
    """Every import of one module of the package by another, those inside functions and under TYPE_CHECKING included."""
    return [Import(name, target, line) for name, text in files.items() for target, line in targets(name, text, files) if target != name]


def targets(name: str, text: str, files: Sources) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((resolve(alias.name, files), node.lineno) for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(name, node, files)
            if is_ours(origin):
                yield from ((resolve(f"{origin}.{alias.name}", files), node.lineno) for alias in node.names)


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "lora_lite"


def absolute(name: str, node: ast.ImportFrom, files: Sources) -> str:
    """The module an import names: `from ..dial import c` in variants.lora is lora_lite.dial."""
    if not node.level:
        return node.module or ""
    is_folder = name == "__init__" or any(other.startswith(f"{name}.") for other in files)
    path = ["lora_lite", *([] if name == "__init__" else name.split("."))]
    path = path[: len(path) - node.level + is_folder]
    return ".".join([*path, *([node.module] if node.module else [])])


def resolve(name: str, files: Sources) -> str:
    """The deepest module in a dotted name: lora_lite.dial.Dial -> dial, lora_lite.attach -> __init__."""
    parts = name.split(".")[1:]
    return next((m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in files), "__init__")


def upward(files: Sources) -> list[str]:
    """The imports that run upward; a module without a room stands above all, so that whoever imports it is named."""
    depth = {name: i for i, name in enumerate(ROOMS)}
    return [str(found) for found in imports(files) if depth.get(room(found.target), -1) < depth.get(room(found.module), -1)]


def cycle(files: Sources) -> list[str]:
    """One cycle of imports between modules, or nothing."""
    graph: dict[str, set[str]] = {name: set() for name in files}
    for found in imports(files):
        graph[found.module].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_module_has_a_room():
    unknown = sorted({room(name) for name in sources()} - set(ROOMS))
    assert not unknown, f"no room for {unknown}: add it to ROOMS in {Path(__file__).name}, at the height its imports allow"


def test_imports_run_downward():
    assert not upward(sources())


def test_there_are_no_import_cycles():
    assert not cycle(sources())


def test_no_drawer_is_named_for_nothing():
    assert not [name for name in sources() if DRAWERS & set(name.split("."))]


@pytest.mark.parametrize(
    "line",
    [
        "from lora_lite.adapter import Adapter",
        "import lora_lite.adapter",
        "from lora_lite import adapter",
        "from lora_lite import attach",
        "import lora_lite as ll",
        "from .adapter import Adapter",
        "from . import adapter",
        "def lazily():\n    from lora_lite.adapter import Adapter",
        "if TYPE_CHECKING:\n    from lora_lite.adapter import Adapter",
    ],
)
def test_an_upward_import_would_be_seen(line: str):
    assert upward({"__init__": "", "adapter": "", "dial": line})


def test_a_relative_import_upward_from_a_folder_would_be_seen():
    files = {"__init__": "", "variants": "from .lora import LoRA", "variants.lora": "from ..adapter import Adapter", "adapter": ""}
    assert upward(files) == ["variants.lora imports adapter (line 1)"]


def test_a_downward_import_is_allowed():
    assert not upward({"__init__": "from lora_lite.adapter import attach", "adapter": "from lora_lite import dial", "dial": "import torch"})


def test_a_cycle_inside_a_room_would_be_seen():
    assert cycle({"__init__": "", "cli": "from lora_lite.cli.main import main", "cli.main": "def f():\n    from lora_lite import cli"})


def test_the_sources_are_all_read():
    loaded = {name.removeprefix("lora_lite.") for name in sys.modules if name.startswith("lora_lite.")}
    assert loaded and loaded <= set(sources())
    assert imports(sources())


def documented(value: object) -> bool:
    """Whether someone wrote its docstring: not inherited, not the signature that dataclasses and tuples generate."""
    doc = (vars(value).get("__doc__") if isinstance(value, type) else value.__doc__) or ""
    return bool(doc.strip()) and not doc.startswith(f"{getattr(value, '__name__', '')}(")


@pytest.mark.parametrize("name", [n for n in lora_lite.__all__ if n not in PLAIN])
def test_every_public_name_is_documented(name: str):
    assert documented(getattr(lora_lite, name)), f"lora_lite.{name} has no docstring of its own"


def test_an_undocumented_name_would_be_seen():
    @dataclass
    class Generated:
        x: int = 0

    class Inherits(lora_lite.Variant):
        pass

    assert lora_lite.Variant.__doc__ and not documented(Generated) and not documented(Inherits)


def test_rooms_that_are_entered_late_are_found_like_the_others() -> None:
    program = "import sys, lora_lite as ll; early = set(sys.modules); print('lora_lite.transfer' in early, 'lora_lite.steering' in early); "
    program += "print(sorted(set(ll.__all__) - set(dir(ll))), all(getattr(ll, n) is getattr(ll, n) for n in ll.__all__)); "
    program += "print(ll.transfer_adapter.__module__, hasattr(ll, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False False", "[] True", "lora_lite.transfer.carry False"]
