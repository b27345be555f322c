"""Does each call read one state, take its arguments as they are documented, and name the one that is wrong?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_lite.subspace import SharedSubspace
from lora_lite.subspace.state import State
from tests.subspaces import family, of

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
