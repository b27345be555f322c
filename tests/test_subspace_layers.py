"""What becomes of the layers that an adapter has and a subspace lacks, or a task has and a training left out?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lora_lite as ll
from tests.models import generator, mlp
from tests.subspaces import MODULES, family, of, snapshot, updates

pytestmark = pytest.mark.fast


def narrow(missing: str, **form: Any) -> ll.SharedSubspace:
    """Of adapters that have the first layer only, of the same family."""
    return of([part(a) for a in family(4, noise=0.0)], missing=missing, variance_threshold=1.0, **form)


def part(adapter: ll.Adapter) -> ll.Adapter:
    return ll.Adapter(adapter.config, {MODULES[0]: adapter.tensors()[MODULES[0]]}, {MODULES[0]: adapter.sizes[MODULES[0]]})


# --- an adapter with more layers than the subspace -----------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["zero", "common"])
def test_coverage_is_of_all_the_layers_of_the_adapter(missing: str, said: list[str]) -> None:
    sub, whole = narrow(missing), family(5, noise=0.0)[4]
    p = sub.project(whole, "new")
    sub.add_task(p)
    given, kept = updates(whole), updates(sub.reconstruct("new"))
    assert list(kept) == [MODULES[0]]
    lost = sum(float((w - kept.get(m, torch.zeros_like(w))).square().sum()) for m, w in given.items())
    true = 1 - lost / sum(float(w.square().sum()) for w in given.values())
    assert 0.1 < true < 0.9 and p.coverage == pytest.approx(true, abs=1e-6)
    assert p.coverage_by_layer == {MODULES[0]: pytest.approx(1, abs=1e-6), MODULES[1]: 0.0}
    assert len(said) == 1 and "'new'" in said[0] and MODULES[1] in said[0] and MODULES[0] not in said[0]


def test_in_flat_it_is_of_the_factors() -> None:
    sub, whole = narrow("zero", space="flat"), family(4, noise=0.0)[1]
    size = {m: sum(float(p.detach().double().square().sum()) for p in fields.values()) for m, fields in whole.tensors().items()}
    assert sub.project(whole).coverage == pytest.approx(size[MODULES[0]] / sum(size.values()), abs=1e-6)


def test_an_absorb_names_the_layers_it_leaves_out(said: list[str]) -> None:
    sub, whole = narrow("common"), family(5)[4]
    sub.absorb(whole, "new")
    assert sub.layer_names == [MODULES[0]] and len(said) == 1 and "'new'" in said[0] and MODULES[1] in said[0]


def test_where_nothing_is_left_out_nothing_is_said(said: list[str]) -> None:
    """The control."""
    sub = narrow("zero")
    sub.project(part(family(5)[4]), "new")
    sub.absorb(family(5)[4], "new")  # "zero" takes the layer in
    sub.project(family(6)[5], "more")
    assert sub.layer_names == list(MODULES) and said == []


def test_a_projection_is_shown_without_its_tensors() -> None:
    sub = narrow("zero")
    one = sub.project(part(family(5)[4]), "new")
    assert repr(one) == f"TaskProjection('new', coverage {one.coverage:.3g}, 1 layers)"
    assert repr(sub.project(family(5)[4], "whole")).endswith(", 1 layers and 1 left out)")


def test_nan_in_a_layer_that_is_left_out_is_told(said: list[str]) -> None:
    sub, whole = narrow("zero"), family(5)[4]
    with torch.no_grad():
        whole.tensors()[MODULES[1]]["lora_B"][0, 0] = float("nan")
    before = snapshot(sub)
    with pytest.raises(ValueError, match=r"'new'.*layers\.1.*NaN"):
        sub.project(whole, "new")
    assert snapshot(sub) == before


# --- a training with fewer layers than the task ----------------------------------------------------------------------------------

LIVE = ("layers.0.up", "layers.1.up")


def trained(sub: ll.SharedSubspace, **config: Any) -> ll.Adapter:
    live = ll.attach(mlp(depth=2), ll.SharedConfig(**config), shared=sub)
    with torch.no_grad():
        for p in live.parameters():
            p.normal_(generator=generator(1), std=0.1)
    return live


def test_a_task_is_never_half_of_one_training_and_half_of_another() -> None:
    sub = of(family(5, modules=LIVE, d_in=12, d_out=20), num_components=4)
    live = trained(sub, targets=r"0\.up")
    want, before = updates(live), snapshot(sub)
    with pytest.raises(ValueError, match=r"'task_1' is there already.*1 layers that were not trained here: \['layers\.1\.up'\]"):
        sub.commit(live, "task_1")
    assert snapshot(sub) == before
    for task in ("new", "task_1"):
        sub.remove_task(task) if task in sub.tasks else None
        sub.commit(live, task)
        kept = updates(sub.reconstruct(task))
        assert list(kept) == list(want) and all(torch.dist(kept[m], w) < 1e-5 for m, w in want.items())
    whole = trained(sub)  # the control: all of the task's layers were trained
    sub.commit(whole, "task_2")
    assert all(torch.dist(updates(sub.reconstruct("task_2"))[m], w) < 1e-5 for m, w in updates(whole).items())


def test_nor_where_a_layer_is_kept_apart() -> None:
    """Such a layer has no bases, so nothing trains on it."""
    shared = family(5, modules=LIVE, d_in=12, d_out=20, noise=0.0, rank=2)
    alone = [family(1, modules=LIVE, d_in=12, d_out=20, noise=1.0, seed=10 + i)[0] for i in range(5)]
    both = [(a, {LIVE[0]: a.tensors()[LIVE[0]], LIVE[1]: b.tensors()[LIVE[1]]}) for a, b in zip(shared, alone, strict=True)]
    mixed = [ll.Adapter(a.config, tensors, a.sizes) for a, tensors in both]
    sub = of(mixed, budget_bytes=2200)
    held = sub.compression_stats()["components_per_layer"]
    assert isinstance(held[LIVE[0]], tuple) and held[LIVE[1]] in ("raw", "int8")
    with pytest.raises(ValueError, match=r"'task_1' is there already.*layers\.1\.up"):
        sub.commit(trained(sub), "task_1")
    sub.commit(trained(sub), "new")
    assert sub.reconstruct("new").targets == [LIVE[0]]
