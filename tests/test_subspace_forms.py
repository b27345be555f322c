"""Do streaming, training, quantising, files and threads keep what a shared subspace promises?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_lite as ll
from lora_lite import checkpoint
from lora_lite.subspace import SharedSubspace
from lora_lite.subspace.packed import Packed
from lora_lite.subspace.shared import checked_policy
from lora_lite.subspace.source import FileSource, Update
from lora_lite.subspace.state import State
from lora_lite.variant import Base
from lora_lite.variants.shared import Shared
from tests.models import generator, llama, mlp, randomise, token_ids
from tests.subspaces import MODULES, collection_error, family, of, relative_error, snapshot, updates

FORMS: dict[str, dict[str, Any]] = {
    "core": {"coefficients": "core"}, "factors": {"coefficients": "factors"}, "diag": {"coefficients": "diag"}, "flat": {"space": "flat"},
}  # fmt: skip
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


# --- 4: streaming ----------------------------------------------------------------------------------------------------------


def saved(adapters: list[ll.Adapter], folder: Path) -> list[Path]:
    paths = [folder / f"task_{i}.safetensors" for i in range(len(adapters))]
    for adapter, path in zip(adapters, paths, strict=True):
        adapter.save(path)
    return paths


@each_form
def test_streaming_gives_the_same_bits_as_batch(form: dict[str, Any], tmp_path: Path):
    adapters = family(5)
    batch, streamed = of(adapters, num_components=4, **form), SharedSubspace.from_adapters_streaming(saved(adapters, tmp_path), **form)
    assert streamed.tasks == batch.tasks == [f"task_{i}" for i in range(5)]
    assert snapshot(streamed) == snapshot(batch)


def test_streaming_reads_other_variants_too(tmp_path: Path):
    model = mlp()
    adapters = []
    for i in range(3):
        adapter = ll.attach(model, ll.PiSSAConfig(r=2, alpha=3.0, targets="up"), name=f"a{i}")
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_(generator=generator(i))
        adapter.detach()
        adapters.append(adapter)
    streamed = SharedSubspace.from_adapters_streaming(saved(adapters, tmp_path), num_components=None, variance_threshold=1.0)
    assert snapshot(streamed) == snapshot(of(adapters, variance_threshold=1.0))
    assert collection_error(adapters, streamed) < 1e-5


def test_streaming_holds_one_layer_of_the_files_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    modules = tuple(f"model.layers.{i}.q_proj" for i in range(6))
    paths = saved(family(4, modules=modules), tmp_path)
    assert most_alive(monkeypatch, lambda: SharedSubspace.from_adapters_streaming(paths)) == 4 * 2
    keep: list[Any] = []  # the control: holding everything would be seen
    assert most_alive(monkeypatch, lambda: keep.extend(FileSource("t", p).read(m) for p in paths for m in modules)) == 4 * 2 * 6


def most_alive(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> int:
    """How many tensors read from files were alive at once."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, original = 0, FileSource.read

    def counted(self: FileSource, module: str) -> Update:
        nonlocal most
        found = original(self, module)
        alive.update((found.A, found.B))
        most = max(most, len(alive))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "read", counted)
        call()
    return most


# --- 5: gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMS)
def test_the_gradient_is_the_projected_one(kind: str):
    """Against G = dL/dW, projected by hand."""
    sub = of(family(6, dtype=torch.float64, modules=MODULES[:1]), num_components=4, **FORMS[kind])
    m, params = MODULES[0], sub.get_trainable_params("task_2")
    x, W = torch.randn(7, 24, generator=generator(0), dtype=torch.float64, requires_grad=True), torch.randn(20, 24, dtype=torch.float64)
    u = params.factors()[m]
    loss = F.linear(x, W) + F.linear(F.linear(x, u.A), u.B * u.g)
    loss.square().sum().backward()
    dense = (W + u.dense().detach()).requires_grad_()
    again = x.detach().clone().requires_grad_()
    F.linear(again, dense).square().sum().backward()
    G, s, (U, V) = dense.grad, 2.0, sub.components[m]
    assert G is not None and torch.allclose(x.grad, again.grad, atol=1e-10)  # type: ignore[arg-type]
    if kind == "core":
        expected = {"loadings": s * U @ G @ V.T}
    elif kind == "diag":
        expected = {"loadings": s * (U @ G @ V.T).diagonal()}
    elif kind == "factors":
        Y, X = params[f"{m}.loadings_b"].detach(), params[f"{m}.loadings_a"].detach()
        expected = {"loadings_b": s * (U @ G @ (X @ V).T).T, "loadings_a": s * (Y @ U) @ G @ V.T}
    else:
        A, B = u.A.detach(), u.B.detach()
        expected = {"loadings_a": V @ (s * B.T @ G).flatten(), "loadings_b": U @ (s * G @ A.T).T.flatten()}
    for name, value in expected.items():
        found = params[f"{m}.{name}"].grad
        assert found is not None and float((found - value).abs().max()) < 1e-10 * max(1.0, float(value.abs().max()))


@pytest.mark.parametrize("kind", FORMS)
def test_the_live_variant_has_that_gradient_too(kind: str):
    sub = of(family(6, dtype=torch.float64, modules=("layers.0.up", "layers.1.up"), d_in=12, d_out=20), num_components=4, **FORMS[kind])
    model = mlp(torch.float64, depth=2)
    live = ll.attach(model, ll.SharedConfig(train=kind, task="task_2", dtype=torch.float64), shared=sub)
    x = torch.randn(5, 12, generator=generator(0), dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    merged_x = x.detach().clone().requires_grad_()
    with live.merged():
        model(merged_x).square().sum().backward()
    assert torch.allclose(x.grad, merged_x.grad, atol=1e-10)  # type: ignore[arg-type]
    p, base, cfg = live.tensors()["layers.0.up"], Base(12, 20), live.config.at("layers.0.up", 12, 20)
    want = sub.get_trainable_params("task_2").factors()["layers.0.up"].dense()
    assert torch.dist(Shared.factors(cfg, p, base).dense(), want) < 1e-10
    frozen = [n for n, v in p.items() if not v.requires_grad]
    assert all(p[n].grad is None for n in frozen) and all(v.grad is not None for n, v in p.items() if n not in frozen)


# --- 6: expansion and commit -----------------------------------------------------------------------------------------------


@each_form
def test_private_directions_are_private_until_commit(form: dict[str, Any]):
    sub = of(family(6), num_components=4, **form)
    before, own = snapshot(sub), updates(sub.reconstruct("task_3"))
    others = {t: updates(sub.reconstruct(t)) for t in sub.tasks if t != "task_3"}
    params = sub.get_trainable_params("task_3", num_expand=2)
    for m, u in params.factors().items():
        assert torch.allclose(u.dense().double(), own[m], atol=1e-5)  # unchanged when it is expanded
    loss = sum((u.dense() - torch.ones_like(u.dense())).square().sum() for u in params.factors().values())
    loss.backward()  # type: ignore[union-attr]
    with torch.no_grad():
        for p in params.values():
            p.sub_(0.05 * p.grad)
    assert snapshot(sub) == before
    trained = {m: u.dense().detach().double() for m, u in params.factors().items()}
    sub.commit(params, "task_3")
    kept = updates(sub.reconstruct("task_3"))
    assert all(torch.allclose(kept[m], trained[m], atol=1e-5) and torch.dist(kept[m], own[m]) > 0.1 for m in kept)
    for task, was in others.items():
        assert all(torch.allclose(w, was[m], atol=1e-6) for m, w in updates(sub.reconstruct(task)).items())
    for sides in sub.components.values():
        assert all(len(U) == 6 and torch.dist(U @ U.T, torch.eye(6)) < 1e-5 for U in sides)


def test_without_private_directions_the_others_stay_bit_for_bit():
    sub = of(family(6), num_components=4)
    others = {t: sub.reconstruct(t).state_dict() for t in sub.tasks if t != "task_3"}
    params = sub.get_trainable_params("task_3")
    with torch.no_grad():
        params[f"{MODULES[0]}.loadings"].add_(1.0)
    sub.commit(dict(params), "task_3")  # a plain dict will do
    for t, was in others.items():
        assert all(torch.equal(v, was[n]) for n, v in sub.reconstruct(t).state_dict().items())


def test_training_that_began_on_other_bases_is_refused():
    adapters = family(7)
    sub = of(adapters[:6], num_components=4)
    params, p = sub.get_trainable_params("task_3"), sub.project(adapters[6], "late")
    sub.absorb(adapters[6], "new")
    before = snapshot(sub)
    for call in (lambda: sub.commit(params, "task_3"), lambda: sub.add_task(p)):
        with pytest.raises(ValueError, match="bases"):
            call()
    assert snapshot(sub) == before


@pytest.mark.parametrize("expand", [0, 2])
def test_a_live_adapter_comes_back_by_commit_and_through_a_file(expand: int, tmp_path: Path):
    modules = ("layers.0.up", "layers.1.up")
    sub = of(family(5, modules=modules, d_in=12, d_out=20), num_components=4)
    model, x = mlp(depth=2), torch.randn(5, 12, generator=generator(0))
    plain = model(x)
    live = ll.attach(model, ll.SharedConfig(train="core", expand=expand), seed=0, shared=sub)
    assert torch.equal(model(x), plain)
    with torch.no_grad():
        for p in live.parameters():
            p.normal_(generator=generator(1), std=0.1)
    want = model(x)
    live.save(tmp_path / "live.safetensors")
    live.detach()
    sub.commit(live, "new")
    ll.attach(model, sub.reconstruct("new"))
    assert torch.allclose(model(x), want, atol=1e-5) and not torch.allclose(want, plain, atol=1e-2)
    fresh = mlp(depth=2)
    ll.load(fresh, tmp_path / "live.safetensors")
    assert torch.equal(fresh(x), want)


LIVE = ("layers.0.up", "layers.1.up")


def on_mlp(n: int = 5, **keywords: Any) -> SharedSubspace:
    """A subspace of the `up` layers of mlp(depth=2)."""
    return of(family(n, modules=LIVE, d_in=12, d_out=20), num_components=4, **keywords)


def test_a_live_adapter_of_other_bases_is_refused():
    sub = on_mlp()
    live = ll.attach(mlp(depth=2), ll.SharedConfig(), shared=sub)
    sub.absorb(family(6, modules=LIVE, d_in=12, d_out=20)[5], "more")
    with pytest.raises(ValueError, match="other bases"):
        sub.commit(live, "new")


def start(coefficients: str, **config: Any) -> ll.Adapter:
    return ll.attach(mlp(depth=2), ll.SharedConfig(**config), shared=on_mlp(coefficients=coefficients))


NOT_LIVE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no subspace": (lambda: ll.attach(mlp(depth=2), ll.SharedConfig()), ValueError, r"trains on the bases of a subspace.*shared=sub"),
    "no use for one": (lambda: ll.attach(mlp(depth=2), ll.LoRAConfig(), shared=on_mlp()), ValueError, "'lora' has no use for shared="),
    "other space": (lambda: ll.attach(mlp(depth=2), ll.SharedConfig(train="flat"), shared=on_mlp()), ValueError, "does not fit"),
    "other layers": (lambda: ll.attach(mlp(depth=2), ll.SharedConfig(), shared=of(family(3))), ValueError, "none of its layers"),
    "other sizes": (lambda: ll.attach(mlp(depth=2, hidden=24), ll.SharedConfig(), shared=on_mlp()), ValueError, r"2 layers.*\(12, 24\)"),
    "a layer it lacks": (lambda: ll.attach(mlp(), ll.SharedConfig(targets="up"), shared=on_mlp()), ValueError, r"lacks.*layers\.2\.up"),
    "a layer the model lacks": (lambda: ll.attach(mlp(depth=1), ll.SharedConfig(), shared=on_mlp()), ValueError, r"model lacks 1 of"),
    "a core that a diagonal cannot keep": (lambda: start("diag", train="core"), ValueError, 'could not keep.*\'core\': train="diag"'),
    "factors that a diagonal cannot keep": (lambda: start("diag", train="factors", task="task_1"), ValueError, 'could not keep'),
    "a diagonal of a core": (lambda: start("core", train="diag", task="task_1"), ValueError, 'cannot start.*train="core" or "factors" can'),
    "unknown task": (lambda: ll.attach(mlp(depth=2), ll.SharedConfig(task="nobody"), shared=on_mlp()), KeyError, "nobody"),
    "activations": (lambda: ll.attach(mlp(depth=2), ll.SharedConfig(), {"x": 1}, shared=on_mlp()), ValueError, "no use of calibration"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_LIVE)
def test_what_cannot_live_on_a_model_says_why(name: str):
    call, error, words = NOT_LIVE[name]
    with pytest.raises(error, match=words):
        call()


def test_a_narrowed_config_takes_those_layers_only():
    live = ll.attach(mlp(depth=2), ll.SharedConfig(targets=r"1\.up"), shared=on_mlp())
    assert live.targets == list(LIVE[1:]) and list(live.config.rooms) == list(LIVE[1:])  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", FORMS)
def test_every_kind_starts_at_its_task_and_expanding_changes_nothing(kind: str):
    sub, x = on_mlp(**FORMS[kind]), torch.randn(5, 12, generator=generator(0))
    found = []
    for made in (
        lambda m: ll.attach(m, sub.reconstruct("task_2")),
        lambda m: ll.attach(m, ll.SharedConfig(train=kind, task="task_2"), shared=sub),
        lambda m: ll.attach(m, ll.SharedConfig(train=kind, task="task_2", expand=2), shared=sub, seed=1),
    ):
        model = mlp(depth=2)
        made(model)
        found.append(model(x))
    assert torch.allclose(found[0], found[1], atol=1e-5) and torch.allclose(found[1], found[2], atol=1e-6)


@pytest.mark.parametrize("kind", ["core", "factors"])
@pytest.mark.parametrize("train", ["core", "factors"])
def test_a_task_starts_in_either_exact_form_and_comes_back(kind: str, train: str):
    """With more ranks than directions too: those have a gradient, or they would never be of use."""
    adapters = [*family(4, modules=LIVE, d_in=12, d_out=20), *family(1, modules=LIVE, d_in=12, d_out=20, r=6)]
    with torch.no_grad():
        adapters[3].tensors()[LIVE[0]]["lora_B"].zero_()
    sub = of(adapters, num_components=4, coefficients=kind)
    for task in ("task_2", "task_3", "task_4"):
        live = ll.attach(model := mlp(depth=2), ll.SharedConfig(train=train, task=task, expand=1), seed=0, shared=sub)
        want = updates(sub.reconstruct(task))
        assert all(torch.dist(w, want[m]) < 1e-5 * (1 + w.norm()) for m, w in updates(live).items())
        model(torch.randn(40, 12, generator=generator(0))).square().sum().backward()
        if train == "factors":
            assert live.tensors()[LIVE[0]]["lora_Y"].shape[0] == (6 if task == "task_4" else 3)
            dead = [
                int(sum(p.grad.abs().sum(1) for n, p in fields.items() if n in ("lora_Y", "lora_X") and p.grad is not None).eq(0).sum())  # type: ignore[union-attr]
                for fields in live.tensors().values()
            ]
            assert kind != "core" or dead == [0, 0]
        with torch.no_grad():
            for p in live.parameters():
                p.sub_(0.001 * p.grad)
        now = updates(live)
        sub.commit(live, task)
        assert all(torch.dist(w, now[m]) < 1e-5 * (1 + w.norm()) for m, w in updates(sub.reconstruct(task)).items())


def test_a_subspace_is_not_written_through_its_live_adapter(tmp_path: Path):
    sub = on_mlp()
    before = snapshot(sub)
    live = ll.attach(mlp(depth=2), ll.SharedConfig(), shared=sub)
    with torch.no_grad():
        for fields in live.tensors().values():
            for p in fields.values():
                p.add_(1.0)
    assert snapshot(sub) == before


def test_a_fresh_process_loads_it_without_a_subspace(tmp_path: Path):
    """The file carries the bases; the config says which they are, and a wrapper's prefix on the names does no harm."""
    sub, model, x = on_mlp(), mlp(depth=2), torch.randn(5, 12, generator=generator(0))
    live = randomise(ll.attach(model, ll.SharedConfig(train="core"), shared=sub))
    live.save(tmp_path / "live.safetensors")
    torch.save({"x": x, "want": model(x).detach(), "base": mlp(depth=2).state_dict()}, tmp_path / "seen.pt")
    assert live.config.basis_hash and "5 tasks" in live.config.basis_id  # type: ignore[attr-defined]
    code = (
        "import sys, torch; sys.path[:0] = [sys.argv[2], sys.argv[2] + '/tests']\n"
        "import lora_lite as ll\n"
        "from tests.models import mlp\n"
        "seen = torch.load(sys.argv[1] + '/seen.pt')\n"
        "for wrap in (lambda m: m, lambda m: torch.nn.ModuleDict({'module': m})):\n"
        "    inner = mlp(depth=2); inner.load_state_dict(seen['base']); model = wrap(inner)\n"
        "    adapter = ll.load(model, sys.argv[1] + '/live.safetensors', strict_base=model is inner)\n"
        "    assert torch.equal(inner(seen['x']), seen['want']), 'other numbers'\n"
        "    assert adapter.targets == list(adapter.config.rooms), adapter.config.rooms\n"
        "print('loaded')\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(root)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "loaded" in done.stdout, done.stderr[-2000:]


# --- 7: quantised means quantised --------------------------------------------------------------------------------------------


def big(**form: Any) -> SharedSubspace:
    return of(family(8, d_in=1024, d_out=1024, r=8, rank=20, noise=0.3), num_components=32, **form)


@pytest.mark.parametrize("form", [FORMS[k] for k in ("core", "factors", "flat")], ids=["core", "factors", "flat"])
@pytest.mark.parametrize(("bits", "least"), [(8, 3.8), (4, 7.0)])
def test_integers_are_smaller_in_memory_and_on_disk(form: dict[str, Any], bits: int, least: float, tmp_path: Path, record_property: Any):
    sub = big(**form)
    exact = {t: updates(sub.reconstruct(t)) for t in sub.tasks}
    sub.save(tmp_path / "dense")
    memory, disk = sub.nbytes, os.path.getsize(tmp_path / "dense")
    assert sub.quantize(bits) is sub
    sub.save(tmp_path / "packed")
    factors = memory / sub.nbytes, disk / os.path.getsize(tmp_path / "packed")
    record_property("factors", factors)
    assert min(factors) >= least
    for t, was in exact.items():
        for m, w in updates(sub.reconstruct(t)).items():
            assert torch.dist(w, was[m]) < (0.02 if bits == 8 else 0.24) * was[m].norm()
    assert snapshot(SharedSubspace.load(tmp_path / "packed")) == snapshot(sub)


@each_form
@pytest.mark.parametrize("bits", [8, 4])
def test_an_fp16_state_never_grows(form: dict[str, Any], bits: int):
    sub = big(**form).to(dtype=torch.float16)
    half = sub.nbytes
    assert all(U.dtype is torch.float16 for U in sub.components[MODULES[0]])
    if form.get("coefficients") != "diag":
        sub.absorb(family(1, d_in=1024, d_out=1024, r=8, seed=3)[0], "new")
        assert all(U.dtype is torch.float16 for U in sub.components[MODULES[0]])
        half = sub.nbytes  # a basis with room has grown by what came
    assert sub.quantize(bits).nbytes < half * (0.55 if bits == 8 else 0.3)
    assert all(p.dtype is torch.float32 for _, p in sub.reconstruct("task_0").named_parameters())


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_dtype_takes_away_is_in_the_bound(form: dict[str, Any], dtype: torch.dtype):
    """Of an update; in "flat" of its two factors, which the bound speaks of there."""
    sub = of(family(3), **{"variance_threshold": 1.0, **form})
    before, kept = sub.error_bound("task_1"), sub.reconstruct("task_1").factors()
    sub.to(dtype=dtype)
    after, now = sub.error_bound("task_1"), sub.reconstruct("task_1").factors()
    for m, was in kept.items():
        sides = [(was.A, now[m].A), (was.B, now[m].B)] if form.get("space") == "flat" else [(was.dense(), now[m].dense())]
        moved = sum(float(torch.dist(x.detach().double(), y.detach().double()) ** 2) for x, y in sides)
        room = after[m] ** 0.5 - before[m] ** 0.5  # what was lost before is not lost again
        assert 0 < moved <= 1.01 * room**2 + 1e-10


def test_rank_patterns_of_a_task_name_layers_whose_names_end_alike():
    """A pattern matches the end of a path, so "0" would speak for "1.0" too if it stood first, or alone."""
    ranks = {"0": 1, "1.0": 3, "1.1": 3, "2": 3}
    draw = generator(0)
    tensors = {m: {"lora_A": torch.randn(r, 6, generator=draw), "lora_B": torch.randn(5, r, generator=draw)} for m, r in ranks.items()}
    given = ll.Adapter(ll.LoRAConfig(r=3, alpha=3.0, rank_pattern={"^0": 1}), tensors, dict.fromkeys(ranks, (6, 5)))
    back = of([given]).reconstruct("task_0")
    assert {m: back.config.at(m, 6, 5).r for m in ranks} == ranks


def test_coefficients_are_fitted_again_to_the_quantised_basis():
    """Against the coefficients of the exact basis on the quantised one, which is what not refitting would do."""
    sub = big()
    exact = {t: updates(sub.reconstruct(t))[MODULES[0]] for t in sub.tasks}
    layer = sub.state.layers[MODULES[0]]
    U, V = (Packed.of(f.basis(), 4, 64).dense().double() for f in (layer.b, layer.a))
    C = Packed.of(layer.all_parts()[0], 4, 32).dense().double()
    naive = sum(float((U.T @ C[i] @ V * layer.scales[i] - exact[t]).square().sum()) for i, t in enumerate(sub.tasks))
    sub.quantize(4)
    refitted = sum(float((updates(sub.reconstruct(t))[MODULES[0]] - exact[t]).square().sum()) for t in sub.tasks)
    assert refitted < naive


def test_a_quantised_subspace_takes_tasks_and_gives_them_back():
    adapters = family(7)
    sub = of(adapters[:6], num_components=5).quantize(8)
    others = {t: sub.reconstruct(t).state_dict() for t in sub.tasks}
    sub.add_task(sub.project(adapters[6], "new"))
    assert relative_error(adapters[6], sub.reconstruct("new")) < 0.15
    sub.remove_task("task_2")
    for t in sub.tasks[:-1]:
        assert all(torch.equal(v, others[t][n]) for n, v in sub.reconstruct(t).state_dict().items())
    with pytest.raises(ValueError, match="quantised to 8 bits"):
        sub.absorb(adapters[2], "again")
    sub.to(dtype=torch.float32).absorb(adapters[2], "again")
    assert all(torch.dist(U @ U.T, torch.eye(len(U))) < 1e-5 for U in sub.components[MODULES[0]])


def test_packing_is_as_exact_as_its_levels():
    x = torch.randn(5, 131, generator=generator(0)) * torch.logspace(-12, 3, 5)[:, None]
    x[3, :64] = 0
    packed = Packed.of(x, 8, 64)
    step = packed.scales.float().repeat_interleave(64, 1)[:, :131]
    assert bool(((packed.dense() - x).abs() <= 0.5001 * step).all()) and torch.equal(packed.dense()[3, :64], x[3, :64])
    assert bool((step <= x.abs().max() / 127 * 1.02).all())
    assert packed.nbytes == 5 * 131 + 5 * 3 * 2


def test_four_bits_are_nearer_than_with_the_largest_number_as_scale():
    x = torch.randn(40, 128, generator=generator(0)) * torch.logspace(-12, 3, 40)[:, None]
    groups = x.reshape(40, 4, 32)
    steps = groups.abs().amax(2, keepdim=True) / 7
    plain = ((groups / steps).round() * steps - groups).square().sum((1, 2))
    packed = Packed.of(x, 4, 32)
    off = (packed.dense() - x).square().sum(1)
    assert bool((off < plain).all() and off.sum() < 0.95 * plain.sum()) and packed.nbytes == 40 * (64 + 4 * 2)


# --- 8: errors leave no trace --------------------------------------------------------------------------------------------------


def with_value(adapter: ll.Adapter, module: str, value: float) -> ll.Adapter:
    with torch.no_grad():
        adapter.tensors()[module]["lora_A"][0, 0] = value
    return adapter


def spoilt(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() * float("nan") for name, p in params.items()}


BAD: dict[str, tuple[Callable[[SharedSubspace], Any], type[Exception], str]] = {
    "nan": (lambda s: s.absorb(with_value(family(1)[0], MODULES[1], float("nan")), "bad"), ValueError, r"'bad'.*layers\.1.*NaN"),
    "inf": (lambda s: s.project(with_value(family(1)[0], MODULES[1], float("inf")), "bad"), ValueError, r"'bad'.*layers\.1.*infinite"),
    "shape": (lambda s: s.absorb(family(1, d_in=30)[0], "bad"), ValueError, r"'bad'.*layers\.0.*30 -> 20.*24 -> 20"),
    "duplicate": (lambda s: s.absorb(family(1)[0], "task_1"), ValueError, "'task_1' is there already"),
    "duplicate projection": (lambda s: s.add_task(s.project(family(1)[0], "task_1")), ValueError, "'task_1' is there already"),
    "missing": (lambda s: s.absorb(family(1, modules=MODULES[:1])[0], "bad"), ValueError, r"'bad' lacks 1 of 2 modules.*layers\.1"),
    "extra": (lambda s: s.absorb(family(1, modules=(*MODULES, "new"))[0], "bad"), ValueError, "'bad' has 1 modules.*new"),
    "unknown": (lambda s: s.reconstruct("nobody"), KeyError, "nobody"),
    "unknown to remove": (lambda s: s.remove_task("nobody"), KeyError, "nobody"),
    "unknown to train": (lambda s: s.get_trainable_params("nobody"), KeyError, "nobody"),
    "bits": (lambda s: s.quantize(3), ValueError, "4 or 8"),
    "dtype": (lambda s: s.to(dtype=torch.int8), ValueError, "floating"),
    "nan trained": (lambda s: s.commit(spoilt(s.get_trainable_params("task_0")), "task_0"), ValueError, "task_0.*NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_refusal_names_what_is_wrong_and_leaves_no_trace(name: str):
    call, error, words = BAD[name]
    sub = of(family(4), num_components=4)
    before, state = snapshot(sub), sub.state
    with pytest.raises(error, match=words):
        call(sub)
    assert snapshot(sub) == before and sub.state is state


def test_a_trace_would_be_seen():
    sub = of(family(4), num_components=4)
    before = snapshot(sub)
    sub.state.layers[MODULES[1]].parts[0][0, 0, 0] += 1e-6
    assert snapshot(sub) != before


def test_what_cannot_be_built_says_why():
    adapters = family(3)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: of([]), "no adapters"),
        (lambda: of(adapters, task_ids=["a"]), "1 task_ids for 3"),
        (lambda: of(adapters, task_ids=["a", "b", "a"]), "repeated"),
        (lambda: of([*adapters, with_value(family(1)[0], MODULES[0], float("nan"))]), "task_3.*layers.0.*NaN"),
        (lambda: of([*adapters, *family(1, d_out=9)]), "task_3.*layers.0.*24 -> 9"),
        (lambda: of([*adapters, *family(1, modules=MODULES[:1])]), r"layers\.1\.q_proj is not in \['task_3'\]"),
        (lambda: of([*adapters, *family(1, modules=("other",))], missing="common"), "share no common layers"),
        (lambda: checked_policy("other", "core", 0.5, None, False, None), "space"),
        (lambda: checked_policy("feature", "other", 0.5, None, False, None), "coefficients"),
        (lambda: of(adapters, variance_threshold=0.0), "variance_threshold"),
        (lambda: of(adapters, num_components=0), "num_components"),
        (lambda: of(adapters, num_components=2, budget_bytes=10**6), "budget_bytes"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()


def test_layers_may_be_missing_when_told_so():
    adapters = [*family(3), *family(1, modules=MODULES[:1]), *family(1, modules=MODULES[1:])]
    sub = of(adapters, variance_threshold=1.0, missing="zero")
    for t, a in zip(sub.tasks, adapters, strict=True):
        assert sub.reconstruct(t).targets == a.targets and relative_error(a, sub.reconstruct(t)) < 1e-5
    sub.absorb(family(1, seed=4, modules=("model.layers.7.q_proj",))[0], "elsewhere")
    assert sub.layer_names == [*MODULES, "model.layers.7.q_proj"]
    common = of(adapters[:4], missing="common")
    assert common.layer_names == [MODULES[0]]


def test_common_warns_with_the_names(said: list[str]):
    of([*family(2), *family(1, modules=MODULES[:1])], missing="common")
    assert any(MODULES[1] in line for line in said)


# --- 9: files -----------------------------------------------------------------------------------------------------------------


IDS = ["a/b", "a_b", "..", "x" * 300, "naïve-任务-🙂", "", "/etc/passwd", 'quote"\\', "line\nbreak", "__metadata__"]


@each_form
def test_every_id_comes_back_and_touches_nothing_beside_the_file(form: dict[str, Any], tmp_path: Path):
    sub = of(family(len(IDS)), task_ids=IDS, num_components=4, **form)
    (tmp_path / "in").mkdir()
    sub.save(tmp_path / "in" / "tasks.safetensors")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["in", "in/tasks.safetensors"]
    again = SharedSubspace.load(tmp_path / "in" / "tasks.safetensors")
    assert again.tasks == IDS and snapshot(again) == snapshot(sub)
    for t in IDS:
        assert all(torch.equal(v, sub.reconstruct(t).state_dict()[n]) for n, v in again.reconstruct(t).state_dict().items())


def test_a_thousand_tasks_are_a_few_tensors(tmp_path: Path):
    adapters = family(10)
    sub = of([adapters[i % 10] for i in range(1000)], num_components=4)
    sub.save(tmp_path / "many")
    with open(tmp_path / "many", "rb") as file:
        head = checkpoint.read_header("many", file)
    assert len(head) == 1 + 2 * (7 + 6)  # of two layers, with their reserves
    assert SharedSubspace.load(tmp_path / "many").tasks == sub.tasks


def test_killed_while_saving_the_old_file_is_whole(tmp_path: Path):
    """The child is stopped by SIGKILL when the new file has been written in part."""
    path = tmp_path / "tasks"
    of(family(3), num_components=4).save(path)
    old = path.read_bytes()
    code = (
        "import os, signal, sys; sys.path[:0] = sys.argv[2:]\n"
        "from lora_lite import checkpoint\n"
        "from lora_lite.subspace import SharedSubspace\n"
        "sub = SharedSubspace.load(sys.argv[1]); sub.remove_task('task_0')\n"
        "sync = os.fsync\n"
        "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sub.save(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(Path(__file__).parents[1])], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == old and len(SharedSubspace.load(path).tasks) == 3
    assert len(list(tmp_path.iterdir())) == 2  # what the killed one had written lies beside it


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The file with another description, its hash left out as for one written by hand."""
    from safetensors.torch import load_file, save_file

    with open(path, "rb") as file:
        metadata = checkpoint.read_header(str(path), file)["__metadata__"]
    said = json.loads(metadata["subspace"])
    change(said)
    kept = {"format": metadata["format"], "format_version": metadata["format_version"], "subspace": json.dumps(said)}
    save_file(load_file(path), path, kept)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no layers": lambda s: s.update(layers=[]),
    "layer twice": lambda s: s["layers"].append(s["layers"][0]),
    "other kind": lambda s: s.update(kind="flat", space="flat"),
    "unknown kind": lambda s: s.update(kind="../../etc"),
    "bits without integers": lambda s: s.update(bits=3),
    "sizes": lambda s: s["layers"][0].update(d_in=10**9),
    "task numbers": lambda s: s["having"][0].update(tasks=[0, 1, 99]),
    "ranks": lambda s: s["having"][0].update(ranks=[-1, 3, 3]),
    "fewer scales": lambda s: s["having"][0].update(scales=[1.0]),
    "tasks twice": lambda s: s.update(tasks=["a", "a", "a"]),
    "tasks that are no text": lambda s: s.update(tasks=[1, 2, 3]),
    "config of nowhere": lambda s: s.update(config_of=[0, 7, 0]),
    "config with a file": lambda s: s["configs"][0].update(base_model="/etc/passwd"),
    "policy": lambda s: s["policy"].update(path="/etc/passwd"),
    "policy without a threshold": lambda s: s["policy"].update(variance_threshold=None),
    "policy of more than all": lambda s: s["policy"].update(variance_threshold=7.0),
    "policy of half a direction": lambda s: s["policy"].update(num_components=4.5),
    "policy of a yes": lambda s: s["policy"].update(num_components=True),
    "policy of a budget in words": lambda s: s["policy"].update(budget_bytes="much"),
    "a rank that no memory holds": lambda s: s["having"][0].update(ranks=[3, 10**12, 3]),
    "sizes that are no numbers of rows": lambda s: s["layers"][0].update(d_in=24.0),
    "no tasks": lambda s: s.pop("tasks"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_description_is_refused(name: str, tmp_path: Path):
    path = tmp_path / "tasks"
    of(family(3), num_components=4).save(path)
    rewritten(path, lambda said: None)
    SharedSubspace.load(path)  # the control: rewriting alone does no harm
    rewritten(path, HOSTILE[name])
    with pytest.raises(checkpoint.CheckpointError, match="does not describe"):
        SharedSubspace.load(path)


def test_files_that_are_something_else_are_named(tmp_path: Path):
    path = tmp_path / "f"
    family(1)[0].save(path)
    with pytest.raises(checkpoint.CheckpointError, match="It is an adapter"):
        SharedSubspace.load(path)
    of(family(2)).save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        SharedSubspace.load(path)
    with pytest.raises(FileNotFoundError):
        SharedSubspace.load(tmp_path / "nothing")


# --- 10: threads ----------------------------------------------------------------------------------------------------------------


def test_readers_see_committed_states_only():
    """One writer, four readers: every update read equals that of some state the writer had put in place."""
    adapters = family(12, modules=MODULES[:1])
    sub = of(adapters[:3], num_components=5)
    committed: list[State] = [sub.state]
    seen: list[tuple[float, ...]] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def fingerprint(state: State) -> tuple[float, ...]:
        shown = SharedSubspace(state)
        return tuple(float(p.detach().double().sum()) for t in ("task_0", "task_1") for _, p in shown.reconstruct(t).named_parameters())

    def read() -> None:
        try:
            while not done.is_set():
                tasks = sub.tasks
                seen.append(fingerprint(sub.state))
                sub.reconstruct(tasks[0]), sub.project(adapters[0], "x").coverage, sub.compression_stats(), sub.nbytes
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for r in readers:
        r.start()
    for i in range(3, 12):
        sub.absorb(adapters[i], f"task_{i}")
        committed.append(sub.state)
        if i > 5:
            sub.remove_task(f"task_{i - 2}")
            committed.append(sub.state)
    done.set()
    for r in readers:
        r.join()
    assert not failures and len(seen) > 10
    known = {fingerprint(state) for state in committed}
    assert set(seen) <= known
    assert len(known) > 5


def test_a_state_does_not_change_under_its_reader():
    sub = of(family(3), num_components=4)
    held = SharedSubspace(sub.state)
    before = snapshot(held)
    sub.absorb(family(4)[3], "new")
    sub.to(dtype=torch.float16)
    sub.quantize(4)
    sub.remove_task("task_0")
    assert snapshot(held) == before != snapshot(sub)


# --- 11: to PEFT ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rslora", [False, True])
def test_exported_to_peft_it_does_the_same(dtype: torch.dtype, rslora: bool, tmp_path: Path):
    """The reference is the original adapter on the model, never what was reconstructed."""
    from peft import PeftModel

    ids = token_ids(2, 7)
    config = ll.LoRAConfig(r=3, alpha=5.0, rslora=rslora, targets=("q_proj", "v_proj"), rank_pattern={"v_proj": 2}, dtype=dtype)
    adapters, model = [], llama()
    for i in range(4):
        adapters.append(randomise(ll.attach(model, config, seed=i), seed=i, std=0.2))
        if i == 2:
            want = model(ids).logits.detach()
        adapters[-1].detach()
    plain = model(ids).logits.detach()
    sub = of(adapters, variance_threshold=1.0)
    adapter = ll.attach(model, sub.reconstruct("task_2"))
    ll.to_peft(adapter, tmp_path / "folder")
    adapter.detach()
    exported = PeftModel.from_pretrained(llama(), tmp_path / "folder")(ids).logits
    assert float((exported - want).abs().max()) < 1e-5 * float(want.abs().max())  # of 16 bits too: a float32 base reads them exactly
    assert float((want - plain).abs().max()) > 0.05 * float(want.abs().max())


# --- nothing to share ---------------------------------------------------------------------------------------------------------------


@each_form
def test_an_adapter_that_does_nothing_yet_is_taken_too(form: dict[str, Any], tmp_path: Path):
    """A fresh LoRA has B = 0: no direction on either side. Then one that has some."""
    empty = family(2)
    for a in empty:
        with torch.no_grad():
            for fields in a.tensors().values():
                fields["lora_B"].zero_()
    sub = of(empty, num_components=6, **form)
    assert all(float(w.abs().max()) == 0 for w in updates(sub.reconstruct("task_0")).values())
    if form.get("coefficients") != "diag":
        sub.absorb(family(1, seed=3)[0], "new")
        assert relative_error(family(1, seed=3)[0], sub.reconstruct("new")) < 1e-5
        assert all(float(w.abs().max()) < 1e-5 for w in updates(sub.reconstruct("task_0")).values())
    sub.quantize(4).save(tmp_path / "tasks")
    assert snapshot(SharedSubspace.load(tmp_path / "tasks")) == snapshot(sub)


@each_form
def test_one_adapter_alone_and_none_left(form: dict[str, Any]):
    sub = of(family(1), num_components=6, **form)
    sub.remove_task("task_0")
    assert sub.tasks == [] and sub.compression_stats()["num_tasks"] == 0
    if form.get("coefficients") != "diag":
        sub.absorb(family(1)[0], "again")
        assert relative_error(family(1)[0], sub.reconstruct("again")) < 1e-5


# --- nothing there yet --------------------------------------------------------------------------------------------------------------


def emptied(adapters: list[ll.Adapter], layers: tuple[str, ...] = LIVE) -> list[ll.Adapter]:
    """With B = 0 on these layers, as a fresh LoRA has it."""
    with torch.no_grad():
        for a in adapters:
            for m in layers:
                a.tensors()[m]["lora_B"].zero_()
    return adapters


def live_family(n: int, seed: int = 0) -> list[ll.Adapter]:
    return family(n, modules=LIVE, d_in=12, d_out=20, seed=seed)


def train_of(form: dict[str, Any]) -> str:
    return "flat" if "space" in form else form["coefficients"]


@each_form
def test_bases_of_untrained_adapters_are_refused_where_one_would_train_along_them(form: dict[str, Any], tmp_path: Path, said: list[str]):
    sub = of(emptied(live_family(2)), task_ids=["kind", "brief"], **form)
    (line,) = said
    assert line.startswith(
        f"2 of 2 layers have no directions, since every adapter (kind, brief) is zero there (B = 0: was it trained?): {LIVE[0]}"
    )
    for begin in (
        lambda: ll.attach(mlp(depth=2), ll.SharedConfig(train=train_of(form)), shared=sub),
        lambda: sub.get_trainable_params("kind"),
    ):
        with pytest.raises(ValueError, match=r"nothing to train: the bases have no directions on any of 2 layers .*; absorb an"):
            begin()
    params = sub.get_trainable_params("kind", num_expand=2)
    with torch.no_grad():
        for p in params.values():
            p.fill_(0.5)
    sub.commit(params, "kind")
    assert all(float(w.norm()) > 0 for w in updates(sub.reconstruct("kind")).values())
    assert not any(float(w.norm()) for w in updates(sub.reconstruct("brief")).values())
    sub.save(tmp_path / "tasks")
    assert snapshot(SharedSubspace.load(tmp_path / "tasks")) == snapshot(sub)


@each_form
def test_a_layer_where_all_adapters_are_zero_is_kept_trained_around_and_saved(form: dict[str, Any], tmp_path: Path, said: list[str]):
    """`commit` asked such a layer for a LoRA of rank 0; of a diagonal it kept that, in a file that nobody could read."""
    sub = of(emptied(live_family(3), LIVE[:1]), **form)
    assert len(said) == 1 and said[0].startswith("1 of 2 layers have no directions")
    live = randomise(ll.attach(mlp(depth=2), ll.SharedConfig(train=train_of(form)), seed=0, shared=sub))
    assert len(said) == 2 and said[1].startswith(f"1 of 2 layers have no directions, so nothing trains there: {LIVE[0]}; absorb")
    want = updates(live)
    for trained, task in ((live, "new"), (sub.get_trainable_params("task_1"), "task_1")):
        sub.commit(trained, task)
    made = sub.reconstruct("new")
    for m, w in updates(made).items():
        assert torch.dist(w, want[m]) < 1e-5 * (1 + w.norm()) and bool(w.any()) == (m != LIVE[0])
    ll.attach(mlp(depth=2), made).detach()
    sub.save(tmp_path / "tasks")
    assert snapshot(SharedSubspace.load(tmp_path / "tasks")) == snapshot(sub)


@each_form
def test_a_zero_adapter_among_others_is_zero_again(form: dict[str, Any], said: list[str]):
    whole = live_family(3)
    sub = of([*whole, *emptied(live_family(1, seed=1))], num_components=12, **form)
    p = sub.project(emptied(live_family(1, seed=2))[0], "later")
    sub.add_task(p)
    assert p.coverage == 1.0 or "space" in form
    for task in ("task_3", "later"):
        assert max(float(w.norm()) for w in updates(sub.reconstruct(task)).values()) < 1e-5
    assert not said


def test_a_task_of_which_next_to_nothing_is_kept_is_told(said: list[str]):
    """A share of the whole is kept: small updates in directions of their own may be gone altogether."""
    large, small = live_family(3), live_family(2, seed=5)[1:]
    with torch.no_grad():
        for fields in small[0].tensors().values():
            fields["lora_B"] *= 1e-3
    sub = of([*large, *small], num_components=4)
    assert (
        relative_error(small[0], sub.reconstruct("task_3"))
        > 0.9
        > max(relative_error(a, sub.reconstruct(f"task_{i}")) for i, a in enumerate(large))
    )
    assert len(said) == 1 and said[0].startswith(
        "1 of 4 tasks keep next to nothing here: |dW - kept| is more than 0.9 of |dW| for task_3 ("
    )
    of(large, num_components=4)
    assert len(said) == 1
