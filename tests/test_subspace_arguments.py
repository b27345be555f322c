"""Does each call read one state, take its arguments as they are documented, and name the one that is wrong?"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_lite as ll
from lora_lite.subspace import SharedSubspace
from lora_lite.subspace.state import State
from tests.subspaces import family, of, snapshot

pytestmark = pytest.mark.fast


# --- one state per call ------------------------------------------------------------------------------------------------------


class Overtaken(SharedSubspace):
    """Between any two looks at the state a writer has put another in its place."""

    def __init__(self, *states: State) -> None:
        self.states, self.looks = states, 0

    @property
    def _state(self) -> State:  # type: ignore[override]
        self.looks += 1
        return self.states[min(self.looks, len(self.states)) - 1]


READS: dict[str, Callable[[SharedSubspace], Any]] = {
    "compression_stats": lambda s: s.compression_stats(),
    "get_trainable_params": lambda s: sorted(s.get_trainable_params("task_2")),
    "reconstruct": lambda s: s.reconstruct("task_2").targets,
    "project": lambda s: s.project(family(1)[0]).coverage,
    "error_bound": lambda s: s.error_bound("task_2"),
    "components": lambda s: list(s.components),
    "means": lambda s: list(s.means),
    "singular_values": lambda s: list(s.singular_values),
    "nbytes": lambda s: s.nbytes,
    "diagnose": lambda s: list(s.diagnose()),
    "repr": repr,
}


@pytest.mark.parametrize("name", READS)
def test_a_call_speaks_of_one_state(name: str) -> None:
    whole = of(family(3), space="flat", num_components=2) if name != "diagnose" else of(family(3), num_components=2)
    fewer = SharedSubspace(whole.state)
    fewer.remove_task("task_2")
    sub = Overtaken(whole.state, fewer.state)
    assert READS[name](sub) == READS[name](whole) and sub.looks == 1


# --- arguments ---------------------------------------------------------------------------------------------------------------


def untyped(tmp_path: Path, *calls: str) -> list[str]:
    """What the calls are refused with where nothing checks annotations, as these tests do and a user's program does not."""
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[1:2]; torch.set_num_threads(1)\n"
        "from lora_lite.subspace import SharedSubspace\n"
        "from tests.subspaces import family, of\n"
        "sub, given = of(family(2)), family(2)\n"
        "for call in sys.argv[2:]:\n"
        "    try: print('taken', eval(call))\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    words = [sys.executable, "-c", code, str(Path(__file__).parents[1]), *calls]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
    return done.stdout.splitlines()


UNTYPED = {
    # also where the adapters' layers agree and it would not be looked at: the file would not be read again
    "of(given, missing='comon')": r"ValueError missing must be one of \('error', 'zero', 'common'\), got 'comon'",
    "of(given, num_components=True)": "ValueError num_components must be a whole number from 1, got True",
    "of(given, num_components=2.0)": "ValueError num_components must be a whole number from 1, got 2.0",
    "of(given, variance_threshold='0.9')": r"ValueError variance_threshold must be in \(0, 1\], got '0.9'",
    "of(given, variance_threshold=float('nan'))": r"ValueError variance_threshold must be in \(0, 1\], got nan",
    "of(given, budget_bytes='1e6')": "ValueError budget_bytes must be a number from 1, got '1e6'",
    "of(given, dtype=torch.int8)": "ValueError dtype must be a floating torch.dtype .* got torch.int8",
    "of(given, dtype='float16')": "ValueError dtype must be a floating torch.dtype .* got 'float16'",
    "sub.get_trainable_params('task_0', num_expand=1.5)": "ValueError num_expand must be a whole number from 0, got 1.5",
    "sub.absorb(given[0], 5)": "ValueError task ids are text, got 5",  # its file could not be read again
    "sub.absorb('new', given[0])": "ValueError task ids are text, got an adapter, which comes first, its id after it",
    "sub.project(given[0], task_id=None)": "ValueError task ids are text, got None",
    "sub.commit(sub.get_trainable_params('task_0'), 3)": "ValueError task ids are text, got 3",
    "of(given, task_ids=['a', 1])": "ValueError task ids are text, got 1",
    "of(given[0])": r"TypeError expected a list of adapters or paths, got one Adapter: write \[adapter\]",
    "sub.diagnose(given)": r"TypeError diagnose\(\) takes the originals by task id, .* got list",
    "sub.diagnose({'task_0': given[0], 'x': given[1]})": r"ValueError .* without one are \['task_1'\], not tasks are \['x'\]",
    "sub.get_trainable_params('task_0', num_expand=-1)": "ValueError num_expand must be a whole number from 0, got -1",
}


def test_an_argument_of_the_wrong_kind_is_named(tmp_path: Path) -> None:
    said = untyped(tmp_path, "of(given, missing='common')", *UNTYPED)
    assert said[0].startswith("taken SharedSubspace(2 tasks")  # the control
    for line, (call, words) in zip(said[1:], UNTYPED.items(), strict=True):
        assert re.match(words, line), (call, line)


def test_options_may_be_given_by_place_in_the_order_of_the_origin() -> None:
    """vlora's from_adapters(adapters, task_ids, variance_threshold, num_components, adaptive_k), and its streaming's third."""
    given = family(4, noise=0.3)
    ids = ["a", "b", "c", "d"]
    assert snapshot(of_places(given, ids, 0.9)) == snapshot(of(given, task_ids=ids, variance_threshold=0.9))
    assert snapshot(of_places(given, ids, 0.9, 2)) == snapshot(of(given, task_ids=ids, variance_threshold=0.9, num_components=2))
    everything = snapshot(of(given, task_ids=ids, variance_threshold=0.9, num_components=2, adaptive_k=True))
    assert snapshot(of_places(given, ids, 0.9, 2, True)) == everything


of_places = SharedSubspace.from_adapters


def test_streaming_refuses_k_beside_a_budget_as_batch_does(tmp_path: Path) -> None:
    given = family(3)
    for i, adapter in enumerate(given):
        adapter.save(tmp_path / f"task_{i}.safetensors")
    paths = sorted(tmp_path.iterdir())
    streaming, batch = SharedSubspace.from_adapters_streaming, SharedSubspace.from_adapters
    for made in (batch, streaming):
        for k in (2, 4):  # 4 is what streaming takes where none is given
            with pytest.raises(ValueError, match=rf"budget_bytes=5000.*without num_components={k}"):
                made(paths, num_components=k, budget_bytes=5000)
    assert snapshot(streaming(paths, budget_bytes=5000)) == snapshot(batch(paths, budget_bytes=5000))
    assert snapshot(streaming(paths)) == snapshot(batch(paths, num_components=4))
    assert repr(inspect.signature(streaming).parameters["num_components"].default) == "4"  # what `help` shows


def test_a_rank_beyond_all_reason_does_not_come_in_either() -> None:
    """What load refuses is not there to be saved."""
    wide = family(1, config=ll.LoRAConfig(r=5000))[0]
    with pytest.raises(ValueError, match=r"'task_0'.*layers\.0.*rank 5,000 is too large.*at most 4,096"):
        of([wide])
