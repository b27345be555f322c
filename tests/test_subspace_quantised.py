"""Does a subspace in integers, or in 16 bits, still say the truth: about its errors, its sizes and where training starts?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll
from lora_lite.subspace import SharedSubspace
from lora_lite.subspace.apart import Apart
from tests.models import mlp
from tests.subspaces import MODULES, family, of, squared_error, updates

pytestmark = pytest.mark.fast

FORMS: dict[str, dict[str, Any]] = {
    "core": {"coefficients": "core"}, "factors": {"coefficients": "factors"}, "diag": {"coefficients": "diag"}, "flat": {"space": "flat"},
}  # fmt: skip
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def factor_error(given: ll.Adapter, kept: ll.Adapter) -> float:
    """What the bound speaks of in space "flat"."""
    pairs = [(fields[n], kept.tensors()[m][n]) for m, fields in given.tensors().items() for n in fields]
    return sum(float((x.detach().double() - y.detach().double()).square().sum()) for x, y in pairs)


def true_error(form: dict[str, Any], given: ll.Adapter, kept: ll.Adapter) -> float:
    return (factor_error if form.get("space") == "flat" else squared_error)(given, kept)


# --- bounds ---------------------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_of_a_task_added_to_integers_holds(form: dict[str, Any], bits: int, seed: int) -> None:
    adapters = family(6, noise=0.1, seed=seed)
    sub = of(adapters[:5], variance_threshold=0.9, **form).quantize(bits)
    sub.add_task(sub.project(adapters[5], "new"))
    for task, given in zip(sub.tasks, adapters, strict=True):
        found, bound = true_error(form, given, sub.reconstruct(task)), sum(sub.error_bound(task).values())
        assert found <= bound * (1 + 1e-4) and (task != "new" or bound < 1.2 * found)


@each_form
@pytest.mark.parametrize("held", [8, 4, torch.bfloat16])
def test_what_a_commit_rounds_is_in_the_bound(form: dict[str, Any], held: Any) -> None:
    sub = of(family(6, noise=0.1), num_components=4, **form)
    sub = sub.to(dtype=held) if isinstance(held, torch.dtype) else sub.quantize(held)
    params = sub.get_trainable_params("task_2")
    draw = torch.Generator().manual_seed(0)
    for n, p in params.items():
        params[n] = torch.nn.Parameter(p.detach().float() + 0.01 * torch.randn(p.shape, generator=draw))
    trained = {m: (u.A.detach().double(), u.B.detach().double() * u.g) for m, u in params.factors().items()}
    sub.commit(params, "task_2")
    for m, u in sub.reconstruct("task_2").factors().items():
        A, B = u.A.detach().double(), u.B.detach().double() * u.g
        if form.get("space") == "flat":
            found = float((A - trained[m][0]).square().sum() + ((B - trained[m][1]) / u.g).square().sum())
        else:
            found = float((B @ A - trained[m][1] @ trained[m][0]).square().sum())
        assert found <= 1.001 * sub.error_bound("task_2")[m] + 1e-9
        assert found > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_the_bounds_of_tasks_apart_count_their_rounding_once(bits: int) -> None:
    modules = MODULES[:1]
    strangers = [family(1, seed=i, noise=1.0, modules=modules)[0] for i in range(5)]
    sub = of(strangers[:4], budget_bytes=1200)
    assert isinstance(sub.state.layers[modules[0]], Apart)
    sub.quantize(bits)
    p = sub.project(strangers[4], "new")
    sub.add_task(p)
    found, bound = squared_error(strangers[4], sub.reconstruct("new")), sum(sub.error_bound("new").values())
    assert found <= bound * (1 + 1e-4) <= 1.01 * found
    assert p.coverage == pytest.approx(1 - found / sum(float(w.square().sum()) for w in updates(strangers[4]).values()), abs=1e-6)


# --- training starts where the task is -------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("bits", [8, 4])
def test_training_starts_at_the_task_as_it_is_reconstructed(form: dict[str, Any], bits: int) -> None:
    modules = ("layers.0.up", "layers.1.up")
    sub = of(family(6, modules=modules, d_in=12, d_out=20, noise=0.3), num_components=8, **form).quantize(bits)
    want = updates(sub.reconstruct("task_1"))
    for m, u in sub.get_trainable_params("task_1").factors().items():
        assert torch.dist(u.dense().detach().double(), want[m]) < 1e-5 * want[m].norm()
    kind = sub.state.kind
    live = ll.attach(mlp(depth=2), ll.SharedConfig(train=kind, task="task_1"), shared=sub)
    for m, u in live.factors().items():
        assert torch.dist(u.dense().detach().double(), want[m]) < 1e-5 * want[m].norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_leaving_integers_changes_no_task(bits: int) -> None:
    sub = of(family(6, noise=0.3), num_components=8).quantize(bits)
    before = {t: updates(sub.reconstruct(t)) for t in sub.tasks}
    sub.to(dtype=torch.float32)
    for t, was in before.items():
        assert all(torch.dist(w, was[m]) < 1e-5 * w.norm() for m, w in updates(sub.reconstruct(t)).items())


# --- sixteen bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficients", ["core", "factors", "diag"])
def test_large_tasks_in_float16_leave_the_energies_finite(coefficients: str, tmp_path: Path) -> None:
    """Their coefficients fit, their squares do not: float16 ends at 65,504."""
    adapters = family(4, d_in=400, d_out=400, r=6, rank=40, noise=1.0)
    sub = of(adapters[:3], coefficients=coefficients, variance_threshold=0.9).to(dtype=torch.float16)
    sub.add_task(sub.project(adapters[0], "again"))
    sub.save(tmp_path / "sub")
    sub.remove_task("again")
    assert all(bool(torch.isfinite(s).all()) for sides in sub.singular_values.values() for s in sides)
    if coefficients != "diag":
        sub.absorb(adapters[3], "new")
        sub.save(tmp_path / "sub")
    SharedSubspace.load(tmp_path / "sub")
    assert max(float(s.max()) for sides in sub.singular_values.values() for s in sides) > 256
