"""Does a subspace in integers, or in 16 bits, still say the truth: about its errors, its sizes and where training starts?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import lora_lite as ll
from lora_lite.subspace import SharedSubspace
from lora_lite.subspace.apart import Apart
from lora_lite.subspace.packed import Packed, Sizes
from tests.models import mlp
from tests.subspaces import MODULES, family, of, snapshot, squared_error, updates

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
    assert found <= bound * (1 + 1e-4) <= 1.1 * found
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


# --- sizes -----------------------------------------------------------------------------------------------------------------


def tasks_of(n: int, d: int, r: int, layers: int, **form: Any) -> SharedSubspace:
    """n tasks of a few adapters that share 24 directions; nothing in reserve, which would only flatter the integers."""
    modules = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(layers))
    few = family(20, d_in=d, d_out=d, r=r, rank=24, noise=0.05, modules=modules)
    sub = of([few[i % 20] for i in range(n)], num_components=16, **form)
    bare = {m: dataclasses.replace(x, reserve=None) for m, x in sub.state.layers.items()}
    return SharedSubspace(dataclasses.replace(sub.state, layers=bare))


@each_form
def test_integers_are_smaller_in_memory_and_on_disk_at_the_size_of_the_benchmark(form: dict[str, Any], tmp_path: Path) -> None:
    """Rows of 16 numbers among them, which need a scale as much as long ones do."""
    sub, path = tasks_of(64, 2048, 16, 4, **form), tmp_path / "sub"
    for bits, least in ((8, 3.8), (4, 7.0)):
        small = SharedSubspace(sub.state).quantize(bits)
        sub.save(path)
        disk = path.stat().st_size
        small.save(path)
        assert sub.nbytes / small.nbytes >= least and disk / path.stat().st_size >= least
        assert snapshot(SharedSubspace.load(path)) == snapshot(small)


@each_form
def test_a_thousand_tasks_in_integers_are_smaller(form: dict[str, Any]) -> None:
    sub = tasks_of(1000, 1024, 8, 1, **form)
    for bits, least in ((8, 3.8), (4, 7.0)):
        assert sub.nbytes / SharedSubspace(sub.state).quantize(bits).nbytes >= least


def test_tasks_that_are_alike_take_their_names_on_disk(tmp_path: Path) -> None:
    """A thousand of them: what is the same for all is written once."""
    sub = tasks_of(1000, 32, 8, 1, coefficients="diag")
    sub.save(tmp_path / "sub")
    assert (tmp_path / "sub").stat().st_size - sub.nbytes < sum(len(t) + 3 for t in sub.tasks) + 4000
    assert snapshot(SharedSubspace.load(tmp_path / "sub")) == snapshot(sub)


@each_form
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_an_fp16_state_never_grows_however_few_its_directions(form: dict[str, Any], bits: int, k: int, tmp_path: Path) -> None:
    adapters = family(10, r=1, noise=0.5)
    sub = of([adapters[i % 10] for i in range(300)], num_components=k, **form).to(dtype=torch.float16)
    sub.save(tmp_path / "half")
    half, disk = sub.nbytes, (tmp_path / "half").stat().st_size
    sub.quantize(bits).save(tmp_path / "sub")
    assert sub.nbytes < half and (tmp_path / "sub").stat().st_size < disk


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_share_a_scale_come_and_go_alone(bits: int) -> None:
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    packed = Packed.of(x, bits, 64)
    assert packed.runs is not None and packed.runs.tolist() == [11] and packed.scales.shape == (1, 1)
    assert torch.dist(packed.dense(), x) < (0.02 if bits == 8 else 0.25) * x.norm()
    which = torch.tensor([0, 3, 4, 9])
    fewer = packed.rows(which)
    assert torch.equal(fewer.dense(), packed.dense()[which])
    more = fewer.joined(Packed.of(100 * x[:2], bits, 64))
    assert torch.equal(more.dense()[:4], fewer.dense()) and more.runs is not None and more.runs.tolist() == [4, 2]
    assert torch.equal(more.rows(torch.tensor([5, 1])).dense(), more.dense()[[5, 1]])
    long = Packed.of(torch.randn(40, 5, generator=torch.Generator().manual_seed(1)), bits, 64)
    assert long.runs is not None and long.runs.tolist() == [12, 12, 12, 4]


@pytest.mark.parametrize("bits", [4, 8])
def test_runs_are_in_the_file_only_where_they_do_not_follow(bits: int, tmp_path: Path) -> None:
    adapters = family(12)
    sub = of(adapters[:11], coefficients="diag", num_components=8).quantize(bits)

    def there_and_back() -> set[str]:
        sub.save(tmp_path / "sub")
        assert snapshot(SharedSubspace.load(tmp_path / "sub")) == snapshot(sub)
        with safe_open(tmp_path / "sub", framework="pt") as file:
            return {key for key in file.keys() if key.endswith(".runs")}  # noqa: SIM118

    assert not there_and_back()
    assert sub.state.layers[MODULES[0]].parts[0].runs is not None  # type: ignore[union-attr]
    sub.remove_task("task_2")
    assert len(there_and_back()) == len(MODULES)


def test_sizes_in_a_byte_are_bounds() -> None:
    x = torch.tensor([0.0, 1e-30, 1e-3, 7.0, 1e5], dtype=torch.float64)
    up, down = Sizes.of(x, True), Sizes.of(x, False)
    assert bool((up.double() >= x).all()) and bool((down.double()[2:] <= x[2:]).all()) and float(up[0]) == 0
    assert bool((up.double()[2:] < 1.1 * x[2:]).all()) and bool((down.double()[2:] > 0.9 * x[2:]).all()) and up.nbytes == 5
    for value in (0.0, 3.0, 1e6):
        more = up.joined(value)
        assert torch.equal(more.double()[2:5], up.double()[2:]) and value <= float(more[5]) <= 1.1 * value
    assert torch.equal(up.taken(torch.tensor([3, 0])).double(), up.double()[[3, 0]])


# --- bases stay orthonormal ------------------------------------------------------------------------------------------------


def orthonormality(sub: SharedSubspace) -> float:
    bases = [U.double() for sides in sub.components.values() for U in sides]
    return max(float((U @ U.T - torch.eye(len(U), dtype=torch.float64)).abs().max()) for U in bases)


@each_form
@pytest.mark.parametrize("held", [torch.float16, torch.bfloat16, 8, 4])
def test_bases_are_orthonormal_again_when_precision_rises(form: dict[str, Any], held: Any) -> None:
    adapters = family(6, noise=0.1)
    sub = of(adapters, num_components=6, **form)
    sub = sub.to(dtype=held) if isinstance(held, torch.dtype) else sub.quantize(held)
    bent, before = orthonormality(sub), {t: updates(sub.reconstruct(t)) for t in sub.tasks}
    sub.to(dtype=torch.float32)
    assert bent > 1e-4 and orthonormality(sub) < 1e-5
    for t, given in zip(sub.tasks, adapters, strict=True):
        now = updates(sub.reconstruct(t))
        if form.get("coefficients") != "diag":  # which cannot be carried
            assert all(torch.dist(w, now[m]) < 1e-5 * w.norm() for m, w in before[t].items())
        assert true_error(form, given, sub.reconstruct(t)) <= sum(sub.error_bound(t).values()) * (1 + 1e-4) + 1e-6


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_trained_in_low_precision_leaves_the_bases_orthonormal(form: dict[str, Any], dtype: torch.dtype) -> None:
    modules, kind = ("layers.0.up", "layers.1.up"), form.get("coefficients", "flat")
    sub = of(family(5, modules=modules, d_in=12, d_out=20), num_components=4, **form)
    others = {t: updates(sub.reconstruct(t)) for t in sub.tasks if t != "task_1"}
    live = ll.attach(mlp(depth=2), ll.SharedConfig(train=kind, task="task_1", expand=2, dtype=dtype), shared=sub, seed=0)
    with torch.no_grad():
        for p in live.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p))
    trained = {m: u.B.detach().double() * u.g @ u.A.detach().double() for m, u in live.factors().items()}
    sub.commit(live, "task_1")
    assert all(len(U) == 6 for sides in sub.components.values() for U in sides)
    assert orthonormality(sub) < 1e-5
    assert all(torch.dist(w, trained[m]) < 0.02 * w.norm() for m, w in updates(sub.reconstruct("task_1")).items())
    for t, was in others.items():
        assert all(torch.dist(w, was[m]) < 1e-6 * w.norm() for m, w in updates(sub.reconstruct(t)).items())
