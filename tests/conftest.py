"""Under which conditions does every test run? Offline, seeded, few threads, shapes and types checked at each call.

jaxtyping's import hook lets beartype check every annotated function of lora_lite. torch.compile cannot trace such
functions, so tests marked `untyped` run in a child process without the hook: one child per module, started by the first
of them, whose verdicts the others read.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args, get_type_hints

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
import numpy as np
import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook
from loguru import logger

UNTYPED = os.environ.get("LORA_LITE_UNTYPED") == "1"
VERDICTS = "LORA_LITE_VERDICTS"  # in the child: the file that each report is appended to

if any(name == "lora_lite" or name.startswith("lora_lite.") for name in sys.modules):
    raise RuntimeError("lora_lite was imported before tests/conftest.py could install the typing hook; nothing of it would be checked")


# An int is welcome where a float is, as PEP 484 has it; what is wrong is a TypeError, as jaxtyping's is.
TYPED = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, told not to look at `Self`: the hook decorates methods one by one, and beartype allows Self in whole classes only."""
    function.__annotations__ = {
        name: Any if mentions(hint, lambda part: part is Self) else hint for name, hint in function.__annotations__.items()
    }
    return TYPED(function)


def mentions(hint: object, what: Callable[[object], bool]) -> bool:
    return what(hint) or any(mentions(part, what) for part in get_args(hint))


def is_array(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations as objects; Any for what is imported for type checkers only."""
    found = {}
    for name, written in function.__annotations__.items():
        lone = types.SimpleNamespace(__annotations__={name: written})
        try:
            found |= get_type_hints(lone, function.__globals__, include_extras=True)
        except Exception:
            found[name] = Any
    return found


def jaxtyped(decorated: Any = None, *, typechecker: Any) -> Any:
    """What the import hook puts on every function and class: jaxtyping's own where a shape is annotated, beartype alone elsewhere.

    jaxtyping binds each call's arguments to their names, 20 us for beartype's 1: half the time of the whole suite.
    """
    if decorated is None:
        return partial(jaxtyped, typechecker=typechecker)
    if isinstance(decorated, type) and not (is_dataclass(decorated) and "__init__" in vars(decorated)):
        return decorated
    function = decorated.__init__ if isinstance(decorated, type) else decorated
    found = hints(function)
    if any(mentions(hint, is_array) for hint in found.values()):
        return SHAPED(decorated, typechecker=typechecker)
    function.__annotations__ = found
    if function is decorated:
        return checked(function)
    decorated.__init__ = checked(function)
    return decorated


SHAPED = jaxtyping.jaxtyped
if not UNTYPED:
    jaxtyping.jaxtyped = jaxtyped
    install_import_hook("lora_lite", f"{__name__}.checked")

import_module("lora_lite.hooks").LARGE = 0  # tests' models are small: what is done with large activations is done with all of theirs
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# No deadline, because a slow machine is not a failure; derandomised, so that every run tries the same examples.
settings.register_profile("lora_lite", deadline=None, derandomize=True)
settings.load_profile("lora_lite")


def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    seed()
    logger.disable("lora_lite")  # as it is when imported; the command line's tests let it speak


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    seed()  # again: a fixture that this test happened to be the first to build has used up numbers


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The warnings of the library's log."""
    lines: list[str] = []
    handler = logger.add(lines.append, level="WARNING", format="{message}")  # type: ignore[arg-type]
    logger.enable("lora_lite")
    yield lines
    logger.disable("lora_lite")
    logger.remove(handler)


# --- the `untyped` marker ---------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """How a test ended in the child."""

    outcome: str
    text: str


NODE = pytest.StashKey[str]()
CHILDREN = pytest.StashKey[dict[Path, tuple[dict[str, Verdict], str]]]()


def delegated(item: pytest.Item) -> bool:
    return not UNTYPED and item.get_closest_marker("untyped") is not None


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """A wrapper, so as to come before xdist, which writes the groups into the node ids in a hook that also goes first."""
    for item in items:
        if not delegated(item):
            continue
        assert isinstance(item, pytest.Function)
        item.stash[NODE] = item.nodeid  # xdist appends the group's name to nodeid afterwards
        item.fixturenames = []  # the child builds its own
        item.add_marker(pytest.mark.xdist_group(f"untyped {item.path.name}"))  # one worker, one child (--dist loadgroup)
        item.add_marker(pytest.mark.timeout(0))  # the first waits for all; the child times each out
    yield


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not delegated(pyfuncitem):
        return None
    children = pyfuncitem.session.stash.setdefault(CHILDREN, {})
    if pyfuncitem.path not in children:
        children[pyfuncitem.path] = run_child(pyfuncitem)
    verdicts, output = children[pyfuncitem.path]
    nodeid = pyfuncitem.stash[NODE]
    verdict = verdicts.get(nodeid, Verdict("lost", f"the child process ended without a verdict on {nodeid}; its output:\n{output}"))
    if verdict.outcome == "skipped":
        pytest.skip(verdict.text)
    if verdict.outcome != "passed":
        pytest.fail(f"untyped, in a child process:\n{verdict.text}", pytrace=False)
    return True


def run_child(asked: pytest.Function) -> tuple[dict[str, Verdict], str]:
    """Run all selected untyped tests of a module in one fresh process: verdict by node id, and what it printed."""
    config = asked.config
    nodes = [item.stash[NODE] for item in asked.session.items if item.path == asked.path and NODE in item.stash]
    with tempfile.TemporaryDirectory() as folder:
        verdicts = Path(folder, "verdicts")
        verdicts.touch()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"LORA_LITE_UNTYPED": "1", VERDICTS: str(verdicts)}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", "--rootdir", str(config.rootpath)]
        command += ["-c", str(config.inipath)] if config.inipath else []
        done = subprocess.run(
            [*command, *nodes],
            cwd=config.rootpath,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        output = f"{done.stdout}\n(exit status {done.returncode})"
        return {nodeid: Verdict(outcome, text) for nodeid, outcome, text in read_verdicts(verdicts)}, output


def read_verdicts(path: Path) -> Iterator[tuple[str, str, str]]:
    return (tuple(json.loads(line)) for line in path.read_text().splitlines())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the child: note the call's outcome, or that of a set-up or tear-down that did not pass (the last note counts)."""
    path = os.environ.get(VERDICTS)
    if UNTYPED and path and (report.when == "call" or report.outcome != "passed"):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        sections = "".join(f"\n{title}\n{content}" for title, content in report.sections)
        with open(path, "a") as file:
            file.write(json.dumps([report.nodeid, report.outcome, text + (sections if report.failed else "")]) + "\n")


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """shell("info", "a.safetensors") is the command `lora-lite info a.safetensors` -> (exit status, stdout, stderr)."""
    from lora_lite.cli import main

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora-lite", *words])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A folder that takes no file, whoever runs the tests: no mode keeps root out, but nobody can make a file in /proc."""
    if (proc := Path("/proc")).is_dir():
        return proc
    (folder := tmp_path / "closed").mkdir(mode=0o500)
    return folder
