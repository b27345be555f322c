"""Where sharing does not pay, do tasks keep their own factors, and does everything else still hold for them?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll
from tests.models import generator, mlp
from tests.subspaces import MODULES, collection_error, family, of, relative_error, snapshot, squared_error

pytestmark = pytest.mark.fast
SIZE = 6 * 2 * 3 * (240 + 200)  # numbers in six adapters of rank 3 on two layers


def collection() -> list[ll.Adapter]:
    """The first layer shares 5 directions, the second nothing at all."""
    sharing = family(7, d_in=240, d_out=200, noise=0.0)
    strangers = [family(1, d_in=240, d_out=200, seed=50 + i, noise=1.0)[0] for i in range(7)]
    made = []
    for a, b in zip(sharing, strangers, strict=True):
        made.append(ll.Adapter(a.config, {MODULES[0]: a.tensors()[MODULES[0]], MODULES[1]: b.tensors()[MODULES[1]]}, a.sizes))
    return made


def mixed(share: float = 0.45) -> ll.SharedSubspace:
    return of(collection()[:6], budget_bytes=int(share * 4 * SIZE))


def held(sub: ll.SharedSubspace) -> list[Any]:
    return list(sub.compression_stats()["components_per_layer"].values())


def test_a_layer_that_does_not_share_keeps_its_own_factors_and_the_stats_say_so() -> None:
    adapters, sub = collection()[:6], mixed()
    first, second = held(sub)
    assert isinstance(first, tuple) and second == "int8"
    assert sub.nbytes <= 0.45 * 4 * SIZE and len(sub.compression_stats()) == 6
    for t, a in zip(sub.tasks, adapters, strict=True):
        assert relative_error(a, sub.reconstruct(t)) < 0.05
        assert squared_error(a, sub.reconstruct(t)) <= sum(sub.error_bound(t).values()) * (1 + 1e-3) + 1e-6
    forced = of(adapters, num_components=max(1, int(first[0])))
    assert collection_error(adapters, sub) < 0.2 * collection_error(adapters, forced)


def test_with_bytes_enough_for_all_of_it_nothing_is_lost() -> None:
    adapters, sub = collection()[:6], mixed(1.5)
    assert "raw" in held(sub) or collection_error(adapters, sub) < 1e-5
    assert collection_error(adapters, sub) < 1e-5


def test_a_collection_that_shares_is_shared() -> None:
    """The control: what pays is not taken apart."""
    sub = of(family(6, d_in=240, d_out=200, noise=0.0), budget_bytes=int(0.3 * 4 * SIZE))
    assert all(isinstance(k, tuple) for k in held(sub))


def test_it_takes_tasks_gives_them_up_and_comes_back_from_its_file(tmp_path: Path) -> None:
    adapters, sub = collection(), mixed()
    others = {t: sub.reconstruct(t).state_dict() for t in sub.tasks}
    p = sub.project(adapters[6], "new")
    sub.add_task(p)
    assert relative_error(adapters[6], sub.reconstruct("new")) < 0.2 and p.coverage > 0.95
    sub.remove_task("task_2")
    for t in sub.tasks[:-1]:
        assert all(torch.equal(v, others[t][n]) for n, v in sub.reconstruct(t).state_dict().items())
    before = sub.reconstruct("task_4")
    sub.absorb(adapters[2], "again")
    assert relative_error(before, sub.reconstruct("task_4")) < 0.05
    assert squared_error(adapters[4], sub.reconstruct("task_4")) <= sum(sub.error_bound("task_4").values()) * (1 + 1e-3) + 1e-6
    sub.save(tmp_path / "mixed")
    again = ll.SharedSubspace.load(tmp_path / "mixed")
    assert snapshot(again) == snapshot(sub) and held(again)[1] == "int8"
    again.quantize(4)
    assert held(again)[1] == "int4" and again.nbytes < sub.nbytes
    again.save(tmp_path / "four")
    assert snapshot(ll.SharedSubspace.load(tmp_path / "four")) == snapshot(again)
    assert held(again.to(dtype=torch.float32))[1] == "raw" and relative_error(adapters[0], again.reconstruct("task_0")) < 0.3


def test_where_there_is_no_basis_there_is_nothing_to_train_on() -> None:
    modules = ("layers.0.up", "layers.1.up")
    strangers = [family(1, d_in=12, d_out=20, seed=i, noise=1.0, modules=modules)[0] for i in range(4)]
    sub = of(strangers, budget_bytes=1800)
    assert "int8" in held(sub)
    for call in (
        lambda: sub.get_trainable_params("task_0"),
        lambda: ll.attach(mlp(depth=2), ll.SharedConfig(task="task_0"), shared=sub),
    ):
        with pytest.raises(ValueError, match="keeps its own factors"):
            call()
    x, model = torch.randn(3, 12, generator=generator(0)), mlp(depth=2)
    plain = model(x)
    ll.attach(model, sub.reconstruct("task_0"))
    assert not torch.equal(model(x), plain)
