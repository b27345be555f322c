"""Does a shared subspace keep what lies in it, in any gauge, and lose no more than it says when it takes in more?"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite as ll
from lora_lite.lowrank import LowRank
from lora_lite.subspace import SharedSubspace
from lora_lite.subspace.frame import gram, outside, principal
from tests.models import generator, mlp
from tests.subspaces import MODULES, collection_error, family, of, relative_error, squared_error, updates

pytestmark = pytest.mark.fast

EXACT = ("core", "factors")
each_exact = pytest.mark.parametrize("coefficients", EXACT)
FORMS: dict[str, dict[str, Any]] = {"core": {"coefficients": "core"}, "factors": {"coefficients": "factors"}, "flat": {"space": "flat"}}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def regauged(adapter: ll.Adapter, seed: int) -> ll.Adapter:
    """(B G, G^-1 A): other factors, the same update."""
    draw, tensors = generator(seed), {}
    for m, fields in adapter.tensors().items():
        A, B = fields["lora_A"].detach().double(), fields["lora_B"].detach().double()
        G = torch.randn(len(A), len(A), generator=draw, dtype=torch.float64) + 2 * torch.eye(len(A), dtype=torch.float64)
        tensors[m] = {"lora_A": torch.linalg.solve(G, A).float(), "lora_B": (B @ G).float()}
    return ll.Adapter(adapter.config, tensors, {m: (24, 20) for m in tensors})


def projector(rows: Tensor) -> Tensor:
    return rows.T @ rows


def orthonormality(sub: SharedSubspace) -> float:
    worst = 0.0
    for sides in sub.components.values():
        for U in sides:
            worst = max(worst, float((U.double() @ U.double().T - torch.eye(len(U), dtype=torch.float64)).abs().max()))
    return worst


# --- 1: what lies in the span -------------------------------------------------------------------------------------------


@each_form
def test_an_adapter_in_the_span_comes_back_whole(form: dict[str, Any]):
    adapters = family(6)
    sub = of(adapters, variance_threshold=1.0, **form)
    for task, adapter in zip(sub.tasks, adapters, strict=True):
        assert relative_error(adapter, sub.reconstruct(task)) < 1e-5
    p = sub.project(adapters[2], task_id="again")
    assert p.coverage == pytest.approx(1, abs=1e-6)
    sub.add_task(p)
    assert relative_error(adapters[2], sub.reconstruct("again")) < 1e-5


@pytest.mark.parametrize("form", [*FORMS.values(), {"coefficients": "diag"}], ids=[*FORMS, "diag"])
def test_projecting_twice_changes_nothing(form: dict[str, Any]):
    adapters = family(8)
    sub = of(adapters[:7], num_components=4, **form)
    sub.add_task(sub.project(adapters[7], "once"))
    if form.get("space") == "flat":
        assert relative_error(sub.reconstruct("task_0"), readded(sub, "task_0")) < 1e-5
    assert relative_error(sub.reconstruct("once"), readded(sub, "once")) < 1e-5


def readded(sub: SharedSubspace, task: str) -> ll.Adapter:
    p = sub.project(sub.reconstruct(task), "twice")
    sub.add_task(p)
    again = sub.reconstruct("twice")
    sub.remove_task("twice")
    return again


@each_form
def test_what_the_subspace_has_of_a_task_projects_onto_itself(form: dict[str, Any]):
    """Under its own name, since a projection changes nothing; keeping it under that name is refused."""
    sub = of(family(6), num_components=4, **form)
    state, p = sub.state, sub.project(sub.reconstruct("task_3"), "task_3")
    assert p.coverage == pytest.approx(1, abs=1e-6) and sub.state is state
    for call in (lambda: sub.add_task(p), lambda: sub.absorb(sub.reconstruct("task_3"), "task_3")):
        with pytest.raises(ValueError, match="'task_3' is there already"):
            call()
    sub.remove_task("task_3")
    sub.add_task(p)
    assert relative_error(SharedSubspace(state).reconstruct("task_3"), sub.reconstruct("task_3")) < 1e-5


def test_a_stranger_is_not_covered():
    sub = of(family(6, noise=0.0), num_components=5)
    inside, outside_ = family(7, noise=0.0)[6], family(1, seed=9)[0]
    assert sub.project(inside, "in").coverage > 1 - 1e-6
    assert sub.project(outside_, "out").coverage < 0.5


def test_coverage_is_the_share_of_the_update_that_is_kept():
    sub, new = of(family(6), num_components=3), family(7)[6]
    p = sub.project(new, "new")
    sub.add_task(p)
    assert p.coverage == pytest.approx(1 - relative_error(new, sub.reconstruct("new")) ** 2, abs=1e-6)
    assert sum(sub.error_bound("new").values()) == pytest.approx(squared_error(new, sub.reconstruct("new")), rel=1e-4)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_the_threshold_is_a_share_of_dW(threshold: float):
    adapters = family(8, noise=0.3)
    sub = of(adapters, variance_threshold=threshold)
    for m in MODULES:
        size = sum(float(updates(a)[m].square().sum()) for a in adapters)
        lost = sum(float((updates(a)[m] - updates(sub.reconstruct(t))[m]).square().sum()) for a, t in zip(adapters, sub.tasks, strict=True))
        assert 1 - lost / size >= threshold
    assert of(adapters, variance_threshold=0.3).nbytes < of(adapters, variance_threshold=0.99).nbytes


def test_the_basis_is_the_best_for_each_side():
    """Against the SVD of the stacked dense updates."""
    adapters, k = family(6, noise=0.3), 4
    sub = of(adapters, num_components=k)
    for m in MODULES:
        wide = torch.cat([updates(a)[m] for a in adapters], dim=1)
        U, S, _ = torch.linalg.svd(wide, full_matrices=False)
        assert torch.dist(projector(sub.components[m].b.double()), U[:, :k] @ U[:, :k].T) < 1e-5
        assert torch.allclose(sub.singular_values[m].b.double(), S[:k], rtol=1e-5)


# --- 2: gauge ------------------------------------------------------------------------------------------------------------


@each_exact
def test_the_factorisation_of_an_adapter_does_not_matter(coefficients: str):
    adapters = family(6)
    one = of(adapters, num_components=4, coefficients=coefficients)
    other = of([regauged(a, i) for i, a in enumerate(adapters)], num_components=4, coefficients=coefficients)
    assert one.compression_stats() == other.compression_stats()
    for m in MODULES:
        for U, V in zip(one.components[m], other.components[m], strict=True):
            assert torch.dist(projector(U), projector(V)) < 1e-4
    for task in one.tasks:
        assert relative_error(one.reconstruct(task), other.reconstruct(task)) < 1e-4


def test_flattened_factors_depend_on_the_factorisation():
    """The control: what the test above compares does differ where the gauge matters."""
    adapters = family(6)
    one = of(adapters, num_components=3, space="flat")
    other = of([regauged(a, i) for i, a in enumerate(adapters)], num_components=3, space="flat")
    assert max(relative_error(one.reconstruct(t), other.reconstruct(t)) for t in one.tasks) > 0.1


# --- 3: absorb -----------------------------------------------------------------------------------------------------------


@each_form
def test_with_room_an_absorb_costs_the_old_tasks_nothing(form: dict[str, Any]):
    adapters = family(4)
    sub = of(adapters[:3], num_components=20, **form)
    before = [squared_error(a, sub.reconstruct(t)) for a, t in zip(adapters, sub.tasks, strict=False)]
    sub.absorb(adapters[3], "new")
    after = [squared_error(a, sub.reconstruct(t)) for a, t in zip(adapters, sub.tasks, strict=True)]
    size = squared_error(adapters[0], of([adapters[0]], variance_threshold=1.0).reconstruct("task_0")) + 1
    assert all(b <= a + 1e-9 * size for a, b in zip(before, after, strict=False))
    assert relative_error(adapters[3], sub.reconstruct("new")) < 1e-5


@each_exact
@pytest.mark.parametrize("noise", [0.1, 0.6])
def test_an_absorb_loses_no_more_of_an_old_task_than_it_says(coefficients: str, noise: float):
    adapters = family(14, noise=noise)
    sub = of(adapters[:4], num_components=5, coefficients=coefficients)
    assert truncated_somewhere(sub)
    for i in range(4, 14):
        bounds = {t: sub.error_bound(t) for t in sub.tasks}
        before = {t: squared_error(a, sub.reconstruct(t)) for a, t in zip(adapters, sub.tasks, strict=False)}
        sub.absorb(adapters[i], f"task_{i}")
        for j, task in enumerate(before):
            allowed = sum(sub.error_bound(task).values())
            found = squared_error(adapters[j], sub.reconstruct(task))
            assert found <= allowed * (1 + 1e-5) + 1e-6
            assert allowed >= sum(bounds[task].values()) * (1 - 1e-6)


def truncated_somewhere(sub: SharedSubspace) -> bool:
    return any(sum(sub.error_bound(t).values()) > 1e-3 for t in sub.tasks)


def test_the_discarded_energy_alone_would_not_bound_it():
    """Why the bound has a cross term. A task that has lost e along q, when its basis turns towards -q: error grows by more than d^2."""
    e, half = 0.5, 0.5**0.5
    u, q = torch.eye(2, dtype=torch.float64)
    whole, kept = u - e * q, u  # what it was, what the basis u holds of it
    turned = (u + q) * half
    after = turned * (turned @ kept)
    growth = float((whole - after).square().sum() - (whole - kept).square().sum())
    d = float((kept - after).square().sum()) ** 0.5
    assert d**2 < growth <= d**2 + 2 * e * d


@pytest.mark.parametrize("form", [FORMS["core"], FORMS["factors"]], ids=EXACT)
def test_one_by_one_ends_near_the_batch(form: dict[str, Any], record_property: Any):
    adapters = family(64, d_in=64, d_out=48, r=4, rank=8, noise=0.2, modules=MODULES[:1])
    batch = of(adapters, num_components=12, **form)
    sub = of(adapters[:8], num_components=12, **form)
    for i in range(8, 64):
        sub.absorb_incremental(adapters[i], f"task_{i}")
    one, other = collection_error(adapters, batch), collection_error(adapters, sub)
    record_property("ratio", other / one)
    assert one > 0.05 and other <= 1.05 * one


def test_a_basis_that_never_turns_ends_far_from_the_batch():
    """The control: with add_task instead of absorb the same collection does not end near."""
    adapters = family(64, d_in=64, d_out=48, r=4, rank=8, noise=0.2, modules=MODULES[:1])
    batch, sub = of(adapters, num_components=12), of(adapters[:1], num_components=12)
    for i in range(1, 64):
        sub.add_task(sub.project(adapters[i], f"task_{i}"))
    assert collection_error(adapters, sub) > 1.3 * collection_error(adapters, batch)


@pytest.mark.parametrize(("form", "times"), [(FORMS["core"], 1000), (FORMS["flat"], 200)], ids=["core", "flat"])
def test_the_basis_is_orthonormal_after_a_thousand_absorbs(form: dict[str, Any], times: int):
    adapters = family(20, d_in=16, d_out=12, r=2, noise=0.5, modules=MODULES[:1])
    sub = of(adapters[:2], num_components=6, **form)
    for i in range(times):
        sub.absorb(adapters[i % 20], f"new_{i}")
        sub.remove_task(f"new_{i - 30}") if i >= 30 else None
    assert orthonormality(sub) < 1e-5
    assert len(sub.tasks) == 32


def test_k_grows_with_what_comes():
    adapters = family(2, seed=1) + family(2, seed=2)
    sub = of(adapters[:2], variance_threshold=0.99)
    k = sub.components[MODULES[0]].b.shape[0]
    sub.absorb(adapters[2], "other")
    assert sub.components[MODULES[0]].b.shape[0] > k


def test_absorbing_in_the_span_adds_no_direction():
    adapters = family(8, noise=0.0)
    sub = of(adapters[:6], num_components=20)
    assert sub.components[MODULES[0]].b.shape[0] == 5
    sub.absorb(adapters[7], "new")
    assert sub.components[MODULES[0]].b.shape[0] == 5


def test_a_diagonal_says_that_it_cannot_be_carried():
    adapters = family(4)
    sub = of(adapters[:3], coefficients="diag")
    with pytest.raises(ValueError, match="pinned basis"):
        sub.absorb(adapters[3], "new")
    sub.add_task(sub.project(adapters[3], "new"))
    assert "new" in sub.tasks


def test_one_rotation_of_a_diagonal_loses_most_of_it_and_of_a_core_nothing():
    """Why: U diag(d) V^T in turned coordinates is no diagonal."""
    d = torch.diag(torch.randn(6, generator=generator(0), dtype=torch.float64))
    P, Q = (torch.linalg.qr(torch.randn(6, 6, generator=generator(s), dtype=torch.float64)).Q for s in (1, 2))
    core = P.T @ d @ Q
    assert torch.dist(P @ core @ Q.T, d) < 1e-12
    assert torch.dist(P @ torch.diag(core.diagonal()) @ Q.T, d) > 0.5 * d.norm()


# --- the numerics underneath -----------------------------------------------------------------------------------------------


def graded() -> Tensor:
    """(64, 8) with singular values from 1 to 1e-6."""
    draw = generator(0)
    U, V = (torch.linalg.qr(torch.randn(n, 8, generator=draw, dtype=torch.float64)).Q for n in (64, 8))
    return U @ torch.diag(torch.logspace(0, -6, 8, dtype=torch.float64)) @ V.T


def smallest_found(dtype: torch.dtype) -> float:
    X = graded()
    U, _, _ = principal(X.T, lambda spectrum, total: len(spectrum), dtype=dtype)
    true = torch.linalg.svd(X, full_matrices=False).U[:, -1]
    return float((U.double() @ true).norm())


def test_a_gram_in_float64_finds_the_small_directions():
    assert smallest_found(torch.float64) > 1 - 1e-6


def test_a_gram_in_float32_loses_them():
    values = torch.linalg.eigvalsh(gram(graded().T, torch.float32)).clamp(min=0).flip(0).sqrt()
    true = torch.logspace(0, -6, 8)
    assert float((values[-1] / true[-1] - 1).abs()) > 0.9
    assert smallest_found(torch.float32) < 0.9


@pytest.mark.parametrize("shape", [(64, 8), (8, 64), (30, 30)])
def test_either_gram_finds_the_same_basis(shape: tuple[int, int]):
    X = torch.randn(*shape, generator=generator(3), dtype=torch.float64)
    U, energy, spectrum = principal(X.T, lambda spectrum, total: 5)
    P, S, _ = torch.linalg.svd(X, full_matrices=False)
    assert torch.dist(projector(U), P[:, :5] @ P[:, :5].T) < 1e-9
    assert torch.allclose(energy, S[:5].square()) and len(spectrum) == min(shape) == len(S)


def test_outside_is_outside_however_little_is_left():
    U = torch.linalg.qr(torch.randn(40, 5, generator=generator(0), dtype=torch.float64)).Q.T
    X = U.T @ torch.randn(5, 3, generator=generator(1), dtype=torch.float64) + 1e-6 * torch.randn(
        40, 3, generator=generator(2), dtype=torch.float64
    )
    Q = outside(U, X, noise=1e-9)
    both = torch.cat([U, Q])
    assert len(Q) == 3 and torch.dist(both @ both.T, torch.eye(8, dtype=torch.float64)) < 1e-12
    assert len(outside(U, U.T @ torch.ones(5, 2, dtype=torch.float64), noise=1e-9)) == 0


# --- metadata --------------------------------------------------------------------------------------------------------------


@each_form
def test_alpha_ranks_and_places_survive(form: dict[str, Any]):
    config = ll.LoRAConfig(
        r=3, alpha=7.0, rslora=True, targets=("q_proj",), rank_pattern={r"layers\.1\.q_proj": 2}, alpha_pattern={r"layers\.0\.q_proj": 5.0}
    )
    adapters = family(3, config=config) + family(2, r=4, seed=5)
    sub = of(adapters, variance_threshold=1.0, **form)
    for task, adapter in zip(sub.tasks, adapters, strict=True):
        back = sub.reconstruct(task)
        assert back.config == adapter.config
        assert {m: u.r for m, u in back.factors().items()} == {m: u.r for m, u in adapter.factors().items()}
        assert relative_error(adapter, back) < 1e-5


def test_any_low_rank_variant_can_be_shared():
    config = ll.PiSSAConfig(r=3, train="spectrum")
    draw = generator(0)
    adapters = []
    for _ in range(3):
        tensors = {
            m: {
                "lora_U": torch.randn(20, 3, generator=draw),
                "lora_Vh": torch.randn(3, 24, generator=draw),
                "lora_dS": torch.randn(3, generator=draw),
            }
            for m in MODULES
        }
        adapters.append(ll.Adapter(config, tensors, {m: (24, 20) for m in MODULES}))
    sub = of(adapters, variance_threshold=1.0)
    back = sub.reconstruct("task_1")
    assert isinstance(back.config, ll.LoRAConfig) and relative_error(adapters[1], back) < 1e-5
    with pytest.raises(ValueError, match="no low-rank form"):
        of([ll.attach(mlp(), ll.IA3Config(targets="up"))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_of_any_precision(dtype: torch.dtype):
    adapters = family(4, dtype=dtype)
    sub = of(adapters, variance_threshold=1.0)
    for task, adapter in zip(sub.tasks, adapters, strict=True):
        assert relative_error(adapter, sub.reconstruct(task)) < (1e-12 if dtype is torch.float64 else 1e-5)


def test_compression_stats_has_its_six_keys():
    stats = of(family(6), num_components=4).compression_stats()
    assert sorted(stats) == sorted(
        ["components_per_layer", "total_params_compressed", "total_params_original", "compression_ratio", "num_tasks", "num_layers"]
    )
    assert stats["total_params_original"] == 6 * 2 * 3 * 44
    assert stats["total_params_compressed"] == 2 * (4 * 44 + 6 * 16)


def test_a_budget_is_kept_and_spent_where_it_explains_most():
    adapters = family(60, noise=0.05)  # so many that their own factors in int8 would not fit
    for fields in adapters:
        with torch.no_grad():
            fields.tensors()[MODULES[1]]["lora_B"].mul_(0.01)
    sub = of(adapters, budget_bytes=7500)
    ks = [tuple(map(len, sub.components[m])) for m in MODULES]
    assert 6500 < sub.nbytes <= 7500
    assert min(ks[0]) > max(ks[1])
    with pytest.raises(ValueError, match="budget_bytes"):
        of(adapters, budget_bytes=100)
    equal = of(adapters, num_components=3)
    used = sum(x.nbytes for layer in equal.state.layers.values() for x in layer.numbers())  # under a budget nothing is held in reserve
    assert used < 7500 and collection_error(adapters, sub) < collection_error(adapters, equal)


def test_the_diagnosis_tells_sharing_from_chance():
    shared = of(family(8), num_components=5)
    verdict = shared.diagnose(dict(zip(shared.tasks, family(8), strict=True)))[MODULES[0]]
    assert verdict.shares and verdict.left_out > 0.8 and verdict.seed_groups == ()
    strangers = [family(1, seed=s, d_in=48, d_out=40)[0] for s in range(8)]
    alone = of(strangers, num_components=5)
    verdict = alone.diagnose(dict(zip(alone.tasks, strangers, strict=True)))[MODULES[0]]
    assert not verdict.shares and "nothing is shared" in verdict.text


def test_without_the_originals_there_is_a_verdict_only_where_nothing_is_gone():
    strangers = [family(1, seed=s, d_in=48, d_out=40)[0] for s in range(3)]
    for threshold, bits in ((0.9, None), (0.6, None), (0.9, 8), (1.0, 4)):
        sub = of(strangers, variance_threshold=threshold)
        sub = sub if bits is None else sub.quantize(bits)
        for m, verdict in sub.diagnose().items():
            gone = sum(squared_error_at(m, a, sub.reconstruct(t)) for a, t in zip(strangers, sub.tasks, strict=True))
            whole = sum(float(updates(a)[m].square().sum()) for a in strangers)
            assert verdict.shares is None and verdict.left_out is None and verdict.bytes == {} and not verdict.originals
            assert verdict.coverage <= 1 - gone / whole + 1e-6 and "no verdict" in verdict.text and "original adapters" in verdict.text
        assert not any(v.shares for v in sub.diagnose(dict(zip(sub.tasks, strangers, strict=True))).values())
    for sub in (of(strangers, variance_threshold=1.0), of(strangers, variance_threshold=1.0).quantize(8)):
        with_originals = sub.diagnose(dict(zip(sub.tasks, strangers, strict=True)))
        for m, verdict in sub.diagnose().items():
            assert verdict.shares is False and verdict.left_out == pytest.approx(with_originals[m].left_out, abs=0.02)
    assert all(v.shares for v in of(family(8, noise=0.0), variance_threshold=1.0).diagnose().values())  # and sharing is still found


def squared_error_at(module: str, given: ll.Adapter, kept: ll.Adapter) -> float:
    return float((updates(given)[module] - updates(kept)[module]).square().sum())


def test_the_diagnosis_names_those_of_one_seed():
    adapters = [family(1, seed=s)[0] for s in range(4)]
    twin = family(1, seed=0)[0]
    with torch.no_grad():
        for fields in twin.tensors().values():
            fields["lora_B"].normal_(generator=generator(7))
            fields["lora_A"].add_(0.1 * torch.randn(fields["lora_A"].shape, generator=generator(8)))
    everyone = [*adapters, twin]
    sub = of(everyone, num_components=5)
    assert sub.diagnose(dict(zip(sub.tasks, everyone, strict=True)))[MODULES[0]].seed_groups == (("task_0", "task_4"),)


def test_low_rank_updates_are_compared_by_an_independent_formula():
    a = family(1)[0]
    u = a.factors()[MODULES[0]]
    assert torch.allclose(updates(a)[MODULES[0]].float(), LowRank(u.A, u.B, u.g).dense(), atol=1e-5)
    assert dataclasses.is_dataclass(a.config)
