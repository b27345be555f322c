"""Are the committed tables what the registry says now, and is every yes and every no in them what happens when one tries?"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite import table
from lora_lite.variant import REGISTRY
from tests.models import VARIANTS, Row, Single, attach, normal, randomise, single
from tests.references import TOLERANCE, assert_close, assert_differs

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
        for question, answer in table.answers(variant).items():
            assert answer.yes or answer.reason, f"{name}: {question} is a no without a reason"


def test_every_size_is_a_formula() -> None:
    """A number would be that of an example: 16 for r, 496 for a block of 32."""
    for row in table.rows():
        for size in re.findall(r"[(x] ?(\d+)\b", row["tensors"]):
            assert size == "1", f"{row['variant']} has a tensor of size {size}: add its formula to SIZES in lora_lite/table.py"
        assert row["trained per layer"]


# --- every yes is seen, every no is refused ------------------------------------------------------------------------------------

X, C, F64 = normal(3, 5, 16, seed=1), 0.7, torch.float64


def out(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x.to(next(model.parameters()).dtype))


def carried(row: Row, dtype: torch.dtype = torch.float32) -> tuple[Single, ll.Adapter]:
    model = single(16, 24, dtype)  # widths that the toys' groups and blocks divide: PEFT has one size of them for all layers
    adapter = randomise(attach(model, row, dtype=dtype))
    assert_differs(out(model), out(single(16, 24, dtype)), "the adapter's effect")
    return model, adapter


def at(model: nn.Module, adapter: ll.Adapter, c: float | Tensor, x: Tensor = X) -> Tensor:
    with adapter(model, c=c):
        return out(model, x)


def per_row(row: Row, _: Path) -> bool:
    model, adapter = carried(row)
    doses = torch.tensor([-1.0, 0.0, C])
    try:
        together = at(model, adapter, doses)
    except (ValueError, TypeError, RuntimeError):
        return False
    assert_close(together, torch.cat([at(model, adapter, float(c), x[None]) for c, x in zip(doses, X, strict=True)]), "row by row")
    return True


def linear(row: Row, _: Path) -> bool:
    model, adapter = carried(row, F64)
    base = at(model, adapter, 0.0)
    change = at(model, adapter, 1.0) - base
    return all(float((at(model, adapter, c) - base - c * change).abs().max()) < TOLERANCE[F64] for c in (-1.5, 0.3, 2.0))


def merge(row: Row, _: Path) -> bool:
    model, adapter = carried(row)
    want = at(model, adapter, C)
    with adapter.merged(c=C):
        assert_close(out(model), want, "merged")
    return True


def history(row: Row, _: Path) -> bool:
    model, adapter = carried(row)
    want = at(model, adapter, C)
    adapter.detach()
    kept = ll.HistoryBake(model, [(adapter, C)])
    assert_close(out(model), want, "baked")
    kept.remove()
    return True


def one_lora(row: Row, folder: Path) -> bool:
    model, adapter = carried(row)
    try:
        assert set(ll.to_peft(adapter, folder, as_lora=True).values()) == {0.0}
    except ValueError as error:
        assert "approximate=True" in str(error)
        return False
    return read_back(model, adapter, folder)


def quantised(row: Row, _: Path) -> bool:
    """An int8 weight stands for what bitsandbytes packs; tests/test_quantised.py has its own layers."""
    model = single()
    layer = model.linear
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight.float(), layer.bias)
    try:
        attach(model, row)
    except RuntimeError as error:
        assert "its weight is quantised" in str(error)
        return False
    return True


def in_peft(row: Row, folder: Path) -> bool:
    model, adapter = carried(row)
    try:
        ll.to_peft(adapter, folder)
    except ValueError as error:
        assert "as_lora=True" in str(error)
        return False
    return read_back(model, adapter, folder)


def read_back(model: nn.Module, adapter: ll.Adapter, folder: Path) -> bool:
    want = out(model)
    adapter.detach()
    ll.from_peft(model, folder)
    assert_close(out(model), want, "read back")
    return True


TRIED: dict[str, Callable[[Row, Path], bool]] = {
    "c per row": per_row,
    "linear in c": linear,
    "merge": merge,
    "history": history,
    "exact as one LoRA": one_lora,
    "quantised base": quantised,
    "PEFT folder": in_peft,
}
SOME = {"PEFT folder"}  # where a method has configs that PEFT cannot say, the overview says of which it can


def test_every_question_is_tried() -> None:
    assert set(TRIED) == set(table.MATRIX)


@pytest.mark.parametrize("variant", sorted(REGISTRY))
@pytest.mark.parametrize("question", TRIED)
def test_every_answer_is_what_happens(question: str, variant: str, tmp_path: Path) -> None:
    rows = {name: row for name, row in VARIANTS.items() if row.config.variant == variant}
    seen = {name: TRIED[question](row, tmp_path / name) for name, row in rows.items()}
    answer = table.answers(REGISTRY[variant])[question].yes
    assert answer in seen.values() and (question in SOME or len(set(seen.values())) == 1), seen


def test_a_wrong_answer_would_be_seen(tmp_path: Path) -> None:
    assert not linear(VARIANTS["road"], tmp_path) and not quantised(VARIANTS["dora"], tmp_path) and not one_lora(VARIANTS["ia3"], tmp_path)
