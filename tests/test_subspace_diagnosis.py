"""Does `diagnose` answer for every layer, in either space, with spectra beside those of chance?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite as ll
from lora_lite.subspace import Verdict
from tests.models import generator
from tests.subspaces import MODULES, family, of, updates

pytestmark = pytest.mark.fast


def judged(adapters: list[ll.Adapter], sub: ll.SharedSubspace) -> dict[str, Verdict]:
    return sub.diagnose(dict(zip(sub.tasks, adapters, strict=True)))


def strangers(n: int, d_in: int = 48, d_out: int = 40) -> list[ll.Adapter]:
    return [family(1, d_in, d_out, seed=50 + i, noise=1.0)[0] for i in range(n)]


# --- spectra -------------------------------------------------------------------------------------------------------------------


def shares(total: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(total).flip(0).clamp(min=0)
    return values / values.sum()


def test_the_spectrum_is_that_of_all_updates_seen_from_each_side() -> None:
    """Against the eigenvalues of dense sums."""
    adapters = family(6, noise=0.3)
    for m, v in judged(adapters, of(adapters, num_components=4)).items():
        W = [updates(a)[m] for a in adapters]
        assert v.spectrum is not None
        for found, want in zip(v.spectrum, (sum(w @ w.T for w in W), sum(w.T @ w for w in W)), strict=True):
            assert isinstance(want, Tensor)
            found = torch.tensor(found, dtype=torch.float64)  # 18 ranks, and 20 or 24 directions
            assert torch.allclose(found, shares(want)[: len(found)], atol=1e-9) and float(found.sum()) == pytest.approx(1)


def test_chance_is_as_strong_and_has_no_direction_in_common() -> None:
    shared, alone = family(8, d_in=200, d_out=160), strangers(8, d_in=200, d_out=160)
    for adapters, ratio in ((shared, 1.4), (alone, 1.1)):
        for v in judged(adapters, of(adapters, num_components=5)).values():
            assert v.spectrum is not None and v.chance_spectrum is not None
            for found, chance in zip(v.spectrum, v.chance_spectrum, strict=True):
                assert sum(found) == pytest.approx(1) and sum(chance) == pytest.approx(1)  # of the same updates' strength
                above = sum(found[:5]) / sum(chance[:5])
                assert above > ratio if adapters is shared else 1 / ratio < above < ratio


def test_in_flat_the_spectrum_is_of_what_the_mean_leaves_of_each_factor() -> None:
    adapters = family(6, noise=0.3)
    for m, v in judged(adapters, of(adapters, space="flat", num_components=3)).items():
        assert v.spectrum is not None and v.chance_spectrum is not None
        for found, name in zip(v.spectrum, ("lora_B", "lora_A"), strict=True):
            X = torch.stack([a.tensors()[m][name].detach().double().flatten() for a in adapters])
            want = torch.linalg.svdvals(X - X.mean(0)).square() / X.square().sum()
            assert torch.allclose(torch.tensor(found, dtype=torch.float64), want, atol=1e-9)
        assert sum(v.chance_spectrum.b) == pytest.approx(1 - 1 / 6, abs=0.05)  # random ones have no mean but their own


# --- every layer has an answer ---------------------------------------------------------------------------------------------------


def test_a_layer_of_one_task_is_told_to_be_one() -> None:
    adapters = [*family(3, modules=MODULES[:1]), *family(1)]
    sub = of(adapters, missing="zero", variance_threshold=1.0)
    for found in (sub.diagnose(), judged(adapters, sub)):
        assert list(found) == list(MODULES) and found[MODULES[0]].shares
        alone = found[MODULES[1]]
        assert alone.shares is None and alone.tasks == 1 and not alone.needs_originals and "one task alone" in alone.text
    sub.remove_task("task_3")
    assert sub.diagnose()[MODULES[1]].text == "no task has this layer"


@pytest.mark.parametrize("form", [{}, {"space": "flat"}], ids=["feature", "flat"])
def test_a_layer_that_no_task_has_changed_shares_nothing_and_is_no_stranger(form: dict[str, Any]) -> None:
    adapters = family(3)
    with torch.no_grad():
        for adapter in adapters:
            adapter.tensors()[MODULES[1]]["lora_B"].zero_()
    found = judged(adapters, of(adapters, num_components=5, **form))
    assert found[MODULES[0]].shares is not None
    assert found[MODULES[1]].shares is None and found[MODULES[1]].text == "its tasks change nothing here"


@pytest.mark.parametrize("budget", [9000, 200_000], ids=["int8", "raw"])
def test_a_layer_kept_apart_is_judged_too(budget: int) -> None:
    alone = strangers(5)
    sub = of(alone, budget_bytes=budget)
    held = set(sub.compression_stats()["components_per_layer"].values())
    assert held <= {"int8", "raw"}, held
    for found in (sub.diagnose(), judged(alone, sub)):
        for v in found.values():
            assert v.shares is False and v.held in held and v.coverage > 0.99 and v.bytes == {}
            assert "keep their own factors" in v.text and "nothing is shared" in v.text
    sub.quantize(4)
    assert all(v.shares is None and "no verdict" in v.text and v.held == "int4" for v in sub.diagnose().values())


def test_one_that_shares_all_the_same_is_found() -> None:
    """The control: what is kept apart is looked at."""
    adapters = family(4, d_in=240, d_out=200, noise=0.05, rank=3)
    sub = of(adapters, budget_bytes=10**6)
    apart = [v for v in sub.diagnose().values() if v.held != "shared"]
    assert all(v.shares for v in judged(adapters, sub).values()) and all(v.shares for v in apart)


# --- flat ----------------------------------------------------------------------------------------------------------------------------


def one_seed(n: int, noise: float = 0.05) -> list[ll.Adapter]:
    """A's that stay near where they all began, B's that move along a few directions."""
    made, draw = family(n, d_in=48, d_out=40, config=ll.LoRAConfig(r=3, alpha=6.0)), generator(3)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    start, moves = {m: normal(3, 48) for m in MODULES}, {m: normal(2, 40, 3) for m in MODULES}
    with torch.no_grad():
        for adapter in made:
            for m, fields in adapter.tensors().items():
                fields["lora_A"].copy_(start[m] + noise * normal(3, 48))
                fields["lora_B"].copy_(torch.einsum("k,kor->or", 1 + normal(2), moves[m]) + noise * normal(40, 3))
    return made


def test_a_family_of_one_seed_shares_in_flat() -> None:
    adapters = one_seed(8)
    whole = of(adapters, space="flat", num_components=8)  # of 8 tasks less their mean there are 7 directions
    for v in (*judged(adapters, of(adapters, space="flat", num_components=3)).values(), *whole.diagnose().values()):
        assert v.shares and v.left_out is not None and v.left_out > 0.8 and "share directions" in v.text
        assert v.chance is not None and v.chance < 0.1 and v.seed_groups == (tuple(whole.tasks),)
        assert v.bytes["shared"] and v.bytes["diag"] is None


def test_strangers_share_nothing_in_flat_either() -> None:
    alone = strangers(6)
    for found in (judged(alone, of(alone, space="flat", num_components=3)), of(alone, space="flat", num_components=6).diagnose()):
        assert list(found) == list(MODULES)
        assert all(v.shares is False and v.seed_groups == () and "finds 0% of itself" in v.text for v in found.values())


def test_the_figures_of_flat_are_of_dW() -> None:
    """Coverage against the reconstructions; what is left out against a subspace that was built without it."""
    adapters = one_seed(5, noise=0.3)
    sub = of(adapters, space="flat", num_components=2)
    kept = [sub.reconstruct(t) for t in sub.tasks]
    for m, v in judged(adapters, sub).items():
        want = sum(share(updates(a)[m], updates(k)[m]) for a, k in zip(adapters, kept, strict=True)) / 5
        assert v.coverage == pytest.approx(want, abs=1e-4)
        found = []
        for i, new in enumerate(adapters):
            others = of([a for a in adapters if a is not new], space="flat", num_components=2)
            others.add_task(others.project(new, f"new_{i}"))
            found.append(share(updates(new)[m], updates(others.reconstruct(f"new_{i}"))[m]))
        assert v.left_out == pytest.approx(sum(found) / 5, abs=1e-4)
        assert v.left_out is not None and v.left_out < v.coverage


def share(given: Tensor, kept: Tensor) -> float:
    return 1 - float((given - kept).square().sum() / given.square().sum())


def test_ranks_may_differ_in_flat() -> None:
    adapters = [*family(4, r=2), *family(2, r=4, seed=1)]
    assert set(judged(adapters, of(adapters, space="flat", num_components=5))) == set(MODULES)


def test_flat_gives_no_verdict_on_what_was_cut_away() -> None:
    for found in (of(strangers(6), space="flat", num_components=2).diagnose(), of(one_seed(6), space="flat").quantize(4).diagnose()):
        assert all(v.shares is None and v.needs_originals and "no verdict" in v.text and v.spectrum is None for v in found.values())


def test_nor_where_the_smaller_factor_is_what_was_lost() -> None:
    """A bound on both factors together says little of a B that is a hundredth of its A."""
    alone = strangers(6)
    with torch.no_grad():
        for adapter in alone:
            for fields in adapter.tensors().values():
                fields["lora_B"].mul_(1e-3)
    sub = of(alone, space="flat", num_components=8)
    assert all(v.shares is False for v in sub.diagnose().values())  # nothing is gone, so there is a verdict
    bound = {m: sum(sub.quantize(8).error_bound(t)[m] for t in sub.tasks) / float(x.energy.sum()) for m, x in sub.state.layers.items()}
    assert all(b < 1e-3 for b in bound.values()) and all(v.shares is None for v in sub.diagnose().values())


# --- the originals -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{}, {"space": "flat"}], ids=["feature", "flat"])
def test_what_is_not_the_original_is_named(form: dict[str, Any]) -> None:
    adapters = family(3)
    sub = of(adapters, **form)
    with pytest.raises(ValueError, match=r"task 'task_2' has no layer 'model\.layers\.1"):
        judged([*adapters[:2], *family(1, modules=MODULES[:1])], sub)
    with pytest.raises(ValueError, match=r"'task_2'.*30 -> 20"):
        judged([*adapters[:2], *family(1, d_in=30)], sub)
