"""What do many adapters cost as one subspace, beside vlora 1.0.0 (PyPI: vlora-dev)? 64 adapters, r=16, 8 layers of 2048 x 2048.

Issue 5: building at least 4x faster with a third of the extra memory; absorb 80x; streaming 20x at the batch error; a layer's hook at
256 tokens 15x less overhead; 1,000 tasks saved and loaded 500x faster. Each as ours / theirs. Then what each form loses at equal
bytes, on adapters that share SHARED directions per layer and side and have noise of their own.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from benchmarks.measure import Row, Setup, Step, exact, ratio_row, time_fresh, time_rounds
from lora_lite.subspace.packed import Packed

N, R, D, LAYERS, K = 64, 16, 2048, 8, 16
SHARED, NOISE = 24, 0.3
NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)]
Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> A (r, d), B (d, r)


def rows(setup: Setup) -> Iterator[Row]:
    import vlora

    given = family(N + 1)
    mine, theirs = [ours(f) for f in given], [vlora.LoRAWeights(NAMES, *split(f), R) for f in given]
    yield from building(setup, vlora, mine[:N], theirs[:N])
    yield from absorbing(setup, vlora, mine, theirs)
    yield from streaming(setup, vlora, mine[:N], theirs[:N])
    yield from hooks(setup, vlora, mine, theirs)
    yield from files(setup, vlora, mine, theirs)
    for n in (N, 1000):
        yield from integers([mine[i % N] for i in range(n)])
    for n in (8, 32, 64):
        yield from quality(mine[:n])


def family(n: int, seed: int = 0) -> list[Factors]:
    """Made up: trained collections share less or more, which is for `diagnose` to say; times do not depend on it."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    U, V = {m: normal(D, SHARED) for m in NAMES}, {m: normal(SHARED, D) for m in NAMES}
    found = []
    for _ in range(n):
        own = {}
        for m in NAMES:
            A, B = (
                normal(R, SHARED) @ V[m] / SHARED**0.5 + NOISE * normal(R, D),
                U[m] @ normal(SHARED, R) / SHARED**0.5 + NOISE * normal(D, R),
            )
            own[m] = (0.01 * A, 0.01 * B)
        found.append(own)
    return found


def ours(factors: Factors) -> ll.Adapter:
    tensors = {m: {"lora_A": A, "lora_B": B} for m, (A, B) in factors.items()}
    return ll.Adapter(ll.LoRAConfig(r=R, alpha=R, targets=("q_proj",)), tensors, {m: (D, D) for m in factors})


def split(factors: Factors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {m: A for m, (A, _) in factors.items()}, {m: B for m, (_, B) in factors.items()}


# -- times ------------------------------------------------------------------------------------------------------------------


def building(setup: Setup, vlora: Any, mine: list[ll.Adapter], theirs: list[Any]) -> Iterator[Row]:
    steps: dict[str, Step] = {
        "vlora": lambda: vlora.SharedSubspace.from_adapters(theirs, num_components=K),
        "feature": lambda: ll.SharedSubspace.from_adapters(mine, num_components=K),
        "flat": lambda: ll.SharedSubspace.from_adapters(mine, num_components=K, space="flat"),
    }
    seconds = time_rounds(steps, setup, rounds=8, warmup=1)
    memory = {name: extra_memory(name) for name in steps}
    for name in ("feature", "flat"):
        yield ratio_row("subspace", "from_adapters", seconds, name, "vlora", 1 / 4)
        yield Row("subspace", f"from_adapters, extra memory: {name} / vlora", exact(memory[name] / memory["vlora"]), 1 / 3, medians=memory)


def extra_memory(name: str) -> float:
    """Bytes of resident memory at the highest beyond those before, in a process that has built nothing yet."""
    words = [sys.executable, "-c", f"from benchmarks.subspace import highest; print(highest({name!r}))"]
    return float(subprocess.run(words, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True).stdout.split()[-1])


def highest(name: str) -> float:
    """Looked at every millisecond. A small collection first, so that what is loaded at first use is not counted."""
    torch.set_num_threads(1)
    given = family(N)
    before, top, done = 0, 0, threading.Event()
    if name == "vlora":
        import vlora

        build = lambda n: vlora.SharedSubspace.from_adapters(theirs[:n], num_components=K)  # noqa: E731
        theirs = [vlora.LoRAWeights(NAMES, *split(f), R) for f in given]
    else:
        mine = [ours(f) for f in given]
        build = lambda n: ll.SharedSubspace.from_adapters(mine[:n], num_components=K, space=name)  # type: ignore[arg-type]  # noqa: E731
    build(2)
    before = top = resident()

    def watch() -> None:
        nonlocal top
        while not done.is_set():
            top = max(top, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = build(N)
    done.set()
    watcher.join()
    del kept
    return float(top - before)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def absorbing(setup: Setup, vlora: Any, mine: list[ll.Adapter], theirs: list[Any]) -> Iterator[Row]:
    state = ll.SharedSubspace.from_adapters(mine[:N], num_components=K).state
    other = vlora.SharedSubspace.from_adapters(theirs[:N], num_components=K)
    makers: dict[str, Callable[[], Step]] = {
        "ours": lambda: partial(ll.SharedSubspace(state).absorb, mine[N], "new"),
        "vlora": lambda: partial(copy.deepcopy(other).absorb, theirs[N], "new"),
        "vlora's incremental": lambda: partial(copy.deepcopy(other).absorb_incremental, theirs[N], "new"),
    }
    seconds = time_fresh(makers, setup, rounds=8, warmup=1)
    yield ratio_row("subspace", "absorb", seconds, "ours", "vlora", 1 / 80)
    yield ratio_row("subspace", "absorb", seconds, "ours", "vlora's incremental")


def streaming(setup: Setup, vlora: Any, mine: list[ll.Adapter], theirs: list[Any]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        paths, folders = [Path(folder) / f"a{i}.safetensors" for i in range(N)], [Path(folder) / f"b{i}" for i in range(N)]
        for path, there, adapter in zip(paths, folders, mine, strict=True):
            adapter.save(path)
            ll.to_peft(adapter, there)
        steps: dict[str, Step] = {
            "files": lambda: ll.SharedSubspace.from_adapters_streaming(paths, num_components=K),
            "PEFT folders": lambda: ll.SharedSubspace.from_adapters_streaming(folders, num_components=K),
            "vlora": lambda: vlora.SharedSubspace.from_adapters_streaming(folders, num_components=K),
        }
        seconds = time_rounds(steps, Setup(setup.device, 0.0, setup.threads), rounds=0, warmup=0)
        for name in ("files", "PEFT folders"):
            yield ratio_row("subspace", "streaming", seconds, name, "vlora", 1 / 20)
        batch, streamed = (error(mine, reconstructed(make())) for make in (
            lambda: ll.SharedSubspace.from_adapters(mine, num_components=K), steps["files"]))  # fmt: skip
        yield Row("subspace", "streaming, error: files / batch", exact(streamed / batch), 1.00001)
        other = steps["vlora"]()
        yield Row("subspace", "streaming, error: vlora / batch", exact(error(mine, their_updates(other)) / batch))


def hooks(setup: Setup, vlora: Any, mine: list[ll.Adapter], theirs: list[Any]) -> Iterator[Row]:
    """One linear, 256 tokens: what each takes beyond the base. Theirs multiplies by a dense dW."""
    sub = ll.SharedSubspace.from_adapters(mine[:N], num_components=K)
    other = vlora.SharedSubspace.from_adapters(theirs[:N], num_components=K)
    base, task, live, wrapped = (one_layer() for _ in range(4))
    ll.attach(task, sub.reconstruct("task_3"))
    ll.attach(live, ll.SharedConfig(task="task_3", targets="q_proj"), shared=sub)
    wrapper = vlora.VLoRAModel(wrapped, other)
    wrapper.set_task("task_3")
    x = torch.randn(1, 256, D, generator=torch.Generator().manual_seed(0))
    models = {"base": base, "task": task, "live": live, "vlora": wrapped}

    @torch.no_grad()
    def forward(model: nn.Module) -> Tensor:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer(x)
        return x

    seconds = time_rounds({name: partial(forward, m) for name, m in models.items()}, setup, rounds=40)
    beyond = {name: [a - b for a, b in zip(seconds[name], seconds["base"], strict=True)] for name in ("task", "live", "vlora")}
    for name in ("task", "live"):
        yield ratio_row("subspace", "overhead of a hook, 256 tokens", beyond, name, "vlora", 1 / 15, at_least=-1.0)


def one_layer() -> nn.Module:
    """Eight linears under the names that the adapters have."""
    tree = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList()})})
    for _ in NAMES:
        tree["model"]["layers"].append(nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(D, D, bias=False)})}))  # type: ignore[index]
    return tree


def files(setup: Setup, vlora: Any, mine: list[ll.Adapter], theirs: list[Any]) -> Iterator[Row]:
    """1,000 tasks on the bases of the 64. By processor time neither waits for the disk; ours syncs and hashes, theirs does not."""
    sub, flat = (ll.SharedSubspace.from_adapters(mine[:N], num_components=K, space=space) for space in ("feature", "flat"))
    other = vlora.SharedSubspace.from_adapters(theirs[:N], num_components=K)
    for i in range(N, 1000):
        for one in (sub, flat):
            one.add_task(one.project(mine[i % N], f"task_{i}"))
        other.add_task(other.project(theirs[i % N], f"task_{i}"))
    with tempfile.TemporaryDirectory() as folder:

        def saved_and_loaded(one: Any, path: str) -> None:
            one.save(Path(folder) / path)
            type(one).load(Path(folder) / path)

        steps: dict[str, Step] = {
            "core": partial(saved_and_loaded, sub, "core"),
            "flat": partial(saved_and_loaded, flat, "flat"),
            "vlora": partial(saved_and_loaded, other, "theirs"),
        }
        seconds = time_rounds(steps, setup, rounds=4, warmup=1)
        for name in ("core", "flat"):
            yield ratio_row("subspace", "1,000 tasks saved and loaded", seconds, name, "vlora", 1 / 500)


# -- integers ---------------------------------------------------------------------------------------------------------------


def integers(mine: Sequence[ll.Adapter]) -> Iterator[Row]:
    """How much smaller than float32, in memory and on disk, the float32 without its reserve. A smaller figure is the better one: asked
    for are 1 / 3.8 and 1 / 7."""
    forms: dict[str, dict[str, Any]] = {k: {"coefficients": k} for k in ("core", "factors", "diag")} | {"flat": {"space": "flat"}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sub"
        for name, how in forms.items():
            whole = bare(ll.SharedSubspace.from_adapters(mine, num_components=K, **how))
            sizes = []
            for bits in (None, 8, 4):
                sub = ll.SharedSubspace(whole.state)
                sub = sub if bits is None else sub.quantize(bits)
                sub.save(path)
                sizes.append((sub.nbytes, path.stat().st_size))
            for bits, least, (memory, disk) in ((8, 3.8, sizes[1]), (4, 7.0, sizes[2])):
                label = f"{len(mine)} tasks, {name} in int{bits} / float32"
                yield Row("subspace", f"{label}, memory", exact(memory / sizes[0][0]), 1 / least)
                yield Row("subspace", f"{label}, disk", exact(disk / sizes[0][1]), 1 / least)


def bare(sub: ll.SharedSubspace) -> ll.SharedSubspace:
    """Without what it holds in reserve for an absorb."""
    layers = {m: replace(x, reserve=None) for m, x in sub.state.layers.items()}
    return ll.SharedSubspace(replace(sub.state, layers=layers))


# -- quality ----------------------------------------------------------------------------------------------------------------


def quality(mine: Sequence[ll.Adapter]) -> Iterator[Row]:
    """Relative errors of the whole collection at the bytes of a core with k = K."""
    n = len(mine)
    budget = bare(ll.SharedSubspace.from_adapters(mine, num_components=K)).nbytes
    forms: dict[str, Callable[[], Any]] = {
        "feature": lambda: ll.SharedSubspace.from_adapters(mine, budget_bytes=budget),
        "feature int8": lambda: ll.SharedSubspace.from_adapters(mine, budget_bytes=int(3.8 * budget)).quantize(8),
        "feature int4": lambda: ll.SharedSubspace.from_adapters(mine, budget_bytes=int(7 * budget)).quantize(4),
        "diag": lambda: ll.SharedSubspace.from_adapters(mine, budget_bytes=budget, coefficients="diag"),
        "flat": lambda: flat_within(mine, budget),
    }
    for name, make in forms.items():
        sub = make()
        if sub is None:
            yield Row("subspace", f"N={n}, error at {budget:,} bytes: {name} does not fit", exact(1.0))
            continue
        label = f"N={n}, error at {budget:,} bytes: {name} ({sub.nbytes:,})"
        yield Row("subspace", label, exact(error(mine, reconstructed(sub))))
    r = max(1, budget // (4 * n * LAYERS * 2 * D))
    cut = [{m: u.truncated(r) for m, u in a.factors().items()} for a in mine]
    yield Row("subspace", f"N={n}, error: truncated SVD, r={r} ({4 * n * LAYERS * 2 * D * r:,})", exact(error(mine, cut)))
    for bits in (8, 4):
        packed = [{m: as_integers(u, bits) for m, u in a.factors().items()} for a in mine]
        size = sum(bytes_ for one in packed for _, bytes_ in one.values())
        yield Row(
            "subspace",
            f"N={n}, error: int{bits} factors ({size:,})",
            exact(error(mine, [{m: u for m, (u, _) in p.items()} for p in packed])),
        )


def flat_within(mine: Sequence[ll.Adapter], budget: int) -> ll.SharedSubspace | None:
    """Its means alone are as large as one adapter."""
    try:
        return ll.SharedSubspace.from_adapters(mine, budget_bytes=budget, space="flat")
    except ValueError:
        return None


def as_integers(u: ll.LowRank, bits: int) -> tuple[ll.LowRank, int]:
    A, B = Packed.of(u.A.detach(), bits, 128), Packed.of(u.B.detach().T, bits, 128)
    return ll.LowRank(A.dense(), B.dense().T, u.g), A.nbytes + B.nbytes


def reconstructed(sub: Any) -> list[Mapping[str, ll.LowRank]]:
    return [sub.reconstruct(t).factors() for t in sub.tasks]


def their_updates(other: Any) -> list[Mapping[str, ll.LowRank]]:
    made = [other.reconstruct(f"b{i}") for i in range(N)]
    return [{m: ll.LowRank(w.lora_a[m], w.lora_b[m]) for m in NAMES} for w in made]


@torch.no_grad()
def error(mine: Sequence[ll.Adapter], kept: Sequence[Mapping[str, ll.LowRank]]) -> float:
    """Root of the summed |dW - kept|^2 over the summed |dW|^2, from factors."""
    lost = whole = 0.0
    for adapter, have in zip(mine, kept, strict=True):
        for m, u in adapter.factors().items():
            whole += inner(u, u)
            lost += inner(u, u) - 2 * inner(u, have[m]) + inner(have[m], have[m])
    return (max(lost, 0.0) / whole) ** 0.5


def inner(u: ll.LowRank, v: ll.LowRank) -> float:
    Bu, Bv = (x.B.double() * x.g for x in (u, v))
    return float(((Bu.T @ Bv) * (u.A.double() @ v.A.double().T)).sum())
