"""Does every thread, task and block see its own c, whatever the others do meanwhile?"""

from __future__ import annotations

import asyncio
import contextvars
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import VARIANTS, Row, attach, each_variant, mlp, normal, randomise, single
from tests.references import same_bits

X = normal(2, 3, 12, seed=1)
CS = (-2.0, -0.5, 0.0, 0.3, 1.0, 1.7)
each_kind = pytest.mark.parametrize("row", [VARIANTS[k] for k in ("lora", "dora", "ia3_ff")], ids=["lora", "dora", "ia3_ff"])


class Bench:
    """An adapted model and what it puts out at each c, found one at a time."""

    def __init__(self, row: Row, model: nn.Module | None = None) -> None:
        self.model = mlp() if model is None else model
        self.adapter = randomise(attach(self.model, row))
        self.want: dict[float, Tensor] = {}
        for c in CS:
            with self.adapter(self.model, c=c):
                self.want[c] = self.run()
        assert all(not same_bits(self.want[a], self.want[b]) for a in CS for b in CS if a != b)

    def run(self) -> Tensor:
        with torch.no_grad():
            return self.model(X)

    def right(self, c: float) -> bool:
        return same_bits(self.run(), self.want[c])


@contextmanager
def open_block(bench: Bench, c: float) -> Iterator[None]:
    with bench.adapter(bench.model, c=c):
        yield


def in_threads(count: int, work: Callable[[int], int]) -> int:
    """The sum of what `work(number)` returns in so many threads that start together."""
    barrier = threading.Barrier(count)

    def started(number: int) -> int:
        barrier.wait(timeout=60)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(started, range(count)))


def wrong_in_threads(bench: Bench, threads: int, calls: int) -> int:
    """How many of `calls` forwards came out wrong: nested blocks and resting c, each thread with numbers of its own."""

    def work(number: int) -> int:
        draw, wrong = random.Random(number), 0
        for _ in range(calls // threads):
            outer, inner = draw.choice(CS), draw.choice(CS)
            with open_block(bench, outer):
                if draw.random() < 0.3:
                    with open_block(bench, inner):
                        wrong += not bench.right(inner) or bench.adapter.c != inner
                wrong += not bench.right(outer) or bench.adapter.c != outer
            if draw.random() < 0.1:
                wrong += not bench.right(1.0)
        return wrong

    return in_threads(threads, work)


@pytest.mark.fast
@each_variant
def test_threads_never_see_each_others_c(row: Row) -> None:
    bench = Bench(row)
    assert wrong_in_threads(bench, threads=4, calls=200) == 0
    assert bench.adapter.c == 1.0 and bench.right(1.0)


@pytest.mark.slow
@each_variant
def test_eight_threads_and_ten_thousand_calls(row: Row) -> None:
    bench = Bench(row)
    assert wrong_in_threads(bench, threads=8, calls=10_000) == 0
    assert bench.adapter.c == 1.0 and bench.right(1.0)


def test_a_shared_c_would_be_caught() -> None:
    """The control: the resting c is one for all threads, so two that both set it cannot both be right."""
    bench, together = Bench(VARIANTS["lora"]), threading.Barrier(2)

    def work(number: int) -> int:
        wrong = 0
        for c in CS if number else CS[::-1]:
            bench.adapter.c = c
            together.wait(timeout=60)
            wrong += not bench.right(c)
            together.wait(timeout=60)
        return wrong

    assert in_threads(2, work) == len(CS)


async def wrong_in_tasks(bench: Bench, tasks: int, calls: int) -> int:
    """Tasks of one thread, each holding its block open while the others run."""

    async def work(number: int) -> int:
        draw, wrong = random.Random(number), 0
        for _ in range(calls // tasks):
            outer, inner = draw.choice(CS), draw.choice(CS)
            with open_block(bench, outer):
                await asyncio.sleep(0)
                with open_block(bench, inner):
                    await asyncio.sleep(0)
                    wrong += not bench.right(inner)
                await asyncio.sleep(0)
                wrong += not bench.right(outer) or bench.adapter.c != outer
        return wrong

    return sum(await asyncio.gather(*(work(i) for i in range(tasks))))


@pytest.mark.fast
@each_variant
def test_interleaved_tasks_never_see_each_others_c(row: Row) -> None:
    bench = Bench(row)
    assert asyncio.run(wrong_in_tasks(bench, tasks=5, calls=100)) == 0
    assert bench.adapter.c == 1.0 and bench.right(1.0)


@pytest.mark.slow
@each_kind
def test_ten_thousand_calls_in_interleaved_tasks(row: Row) -> None:
    assert asyncio.run(wrong_in_tasks(Bench(row), tasks=16, calls=10_000)) == 0


@each_kind
def test_gradients_in_threads_are_those_of_their_own_c(row: Row) -> None:
    bench = Bench(row)
    parameters = list(bench.adapter.parameters())

    def gradients(c: float) -> tuple[Tensor, ...]:
        with open_block(bench, c):
            loss = bench.model(X).square().sum()
        return torch.autograd.grad(loss, parameters)  # after the block: the graph has its c

    want = {c: gradients(c) for c in CS}

    def work(number: int) -> int:
        draw = random.Random(number)
        drawn = [draw.choice(CS) for _ in range(12)]
        return sum(not all(map(same_bits, gradients(c), want[c])) for c in drawn)

    assert in_threads(4, work) == 0


@pytest.mark.fast
@each_kind
def test_a_thread_started_inside_a_block_sees_the_resting_c_unless_it_is_given_the_context(row: Row) -> None:
    bench = Bench(row)
    seen: dict[str, tuple[Any, bool]] = {}

    def look(key: str, c: float) -> None:
        seen[key] = bench.adapter.c, bench.right(c)

    with open_block(bench, -0.5):
        context = contextvars.copy_context()
        for thread in (
            threading.Thread(target=look, args=("bare", 1.0)),
            threading.Thread(target=context.run, args=(look, "given", -0.5)),
        ):
            thread.start()
            thread.join()
        asyncio.run(asyncio.to_thread(look, "to_thread", -0.5))
        assert bench.right(-0.5)
    assert seen == {"bare": (1.0, True), "given": (-0.5, True), "to_thread": (-0.5, True)}


@each_kind
def test_a_given_context_outlives_its_block_and_others_do_not_change_it(row: Row) -> None:
    bench = Bench(row)
    with open_block(bench, 0.3):
        context = contextvars.copy_context()
    with open_block(bench, 1.7):
        assert context.run(bench.right, 0.3) and bench.right(1.7)
    assert context.run(bench.right, 0.3) and bench.right(1.0)


@pytest.mark.fast
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2), (0, 2, 1), (2, 0, 1)], ids=str)
def test_blocks_of_one_adapter_end_in_any_order(order: tuple[int, ...]) -> None:
    bench, cs = Bench(VARIANTS["lora"]), (-2.0, 0.3, 1.7)
    opened = [open_block(bench, c) for c in cs]
    for block in opened:
        block.__enter__()
    still = list(cs)
    for which in order:
        assert bench.right(still[-1])
        opened[which].__exit__(None, None, None)
        still.remove(cs[which])
        assert bench.right(still[-1] if still else 1.0), f"after leaving {cs[which]} of {cs}, {still} remain"
    assert bench.adapter.c == 1.0


@pytest.mark.fast
def test_blocks_of_two_adapters_end_in_any_order() -> None:
    model = mlp()
    one = randomise(attach(model, VARIANTS["lora"], name="one"), 1)
    two = randomise(attach(model, VARIANTS["dora"], name="two"), 2)
    with two(model, c=-0.5):
        want = model(X)
    first, second = one(model, c=0.3), two(model, c=-0.5)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (one.c, two.c) == (1.0, -0.5) and same_bits(model(X), want)
    second.__exit__(None, None, None)
    assert (one.c, two.c) == (1.0, 1.0)


@pytest.mark.fast
@each_variant
def test_an_exception_inside_a_forward_leaves_no_hook_and_the_old_c(row: Row) -> None:
    model = mlp()
    bare = hooks(model)
    bench = Bench(row, model)
    attached = hooks(model)

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    for layer in (model.layers[1].up, model.layers[2].down):
        handle = layer.register_forward_hook(broken)
        for c in (0.3, 0.0, torch.tensor([0.0, 1.7])):
            with pytest.raises(ZeroDivisionError), bench.adapter(model, c=c):
                model(X)
            assert bench.adapter.c == 1.0
        handle.remove()
        assert hooks(model) == attached and bench.right(1.0)
    bench.adapter.detach()
    assert hooks(model) == bare
    with pytest.raises(ZeroDivisionError), bench.adapter(model, c=0.3):  # attached for the block only
        raise ZeroDivisionError
    assert hooks(model) == bare and not bench.adapter.attached and same_bits(bench.run(), bench.want[0.0])


def hooks(model: nn.Module) -> list[tuple[int, ...]]:
    return [(*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks) for m in model.modules()]


@each_kind
def test_assigning_c_sets_the_block_inside_and_the_rest_outside(row: Row) -> None:
    bench = Bench(row)
    with open_block(bench, 0.3):
        bench.adapter.c = 1.7
        assert bench.adapter.c == 1.7 and bench.right(1.7)
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(bench.right(1.0)))
        thread.start()
        thread.join()
        assert seen == [True], "the block's c is not the other threads' resting c"
    assert bench.adapter.c == 1.0 and bench.right(1.0)
    bench.adapter.set_coeff(-0.5)
    assert bench.adapter.c == -0.5 and bench.right(-0.5)
    with open_block(bench, 0.0):
        assert bench.right(0.0)
    assert bench.right(-0.5)


@each_kind
def test_a_generator_that_yields_inside_its_block_closes_it_when_it_ends(row: Row) -> None:
    bench = Bench(row)

    def stream() -> Iterator[bool]:
        with open_block(bench, -2.0):
            for _ in range(3):
                yield bench.right(-2.0)

    assert list(stream()) == [True, True, True]
    assert bench.adapter.c == 1.0 and bench.right(1.0)


@pytest.mark.parametrize("name", ["lora", "ia3", "ia3_ff"])
def test_a_hook_that_another_thread_is_putting_on_may_be_called_without_keywords(name: str) -> None:
    """torch enters a hook before it notes that the hook takes kwargs, and takes the note away after it: a forward may fall between."""
    model = single(dtype=torch.float64)
    randomise(attach(model, VARIANTS[name], dtype=torch.float64))
    x = normal(3, 10, dtype=torch.float64)
    wanted = model(x)
    for table in (model.linear._forward_hooks_with_kwargs, model.linear._forward_pre_hooks_with_kwargs):
        table.clear()
    assert torch.equal(model(x), wanted)
