"""Are the committed tables what the registry says now?"""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_lite import table
from lora_lite.variant import REGISTRY

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("document", ["README.md", "docs/matrix.md"])
def test_committed_tables_are_current(document: str) -> None:
    text = (ROOT / document).read_text()
    assert ":begin -->" in text
    assert table.refreshed(text) == text, f"run `make tables` and commit {document}"


def test_a_stale_table_would_be_noticed() -> None:
    text = (ROOT / "README.md").read_text()
    assert table.refreshed(text.replace("| `lora` |", "| `laura` |")) == text


def test_every_variant_is_in_both_tables() -> None:
    for name in REGISTRY:
        assert f"| `{name}` |" in table.overview() and f"| `{name}` |" in table.matrix()


def test_every_no_has_its_reason() -> None:
    for name, variant in REGISTRY.items():
        for question, ask in table.MATRIX.items():
            answer = ask(variant)
            assert answer.yes or answer.reason, f"{name}: {question} is a no without a reason"
