"""Do other people's training loops learn the right thing: the Hugging Face Trainer with checkpointing, and ranks that differ in c?"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import lora_lite as ll
from lora_lite import hooks, mixed
from tests.models import VARIANTS, Row, attach, each_variant, llama, mlp, normal, randomise, token_ids
from tests.references import TOLERANCE, assert_close, assert_differs, same_bits

KINDS = ("lora", "ia3_ff", "dora")  # one per place that a hook has and way that it adds
each_kind = pytest.mark.parametrize("row", [VARIANTS[k] for k in KINDS], ids=KINDS)

# --- the Trainer -------------------------------------------------------------------------------------------------------


class Contrastive(Trainer):
    """A loss of two forwards at two c; backward comes when both blocks are closed."""

    adapter: ll.Adapter

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        inputs = {k: v for k, v in inputs.items() if k != "labels"} | {"use_cache": False}
        with self.adapter(model, c=1.0):
            up = model(**inputs).logits
        with self.adapter(model, c=torch.tensor([-1.0, 0.0])):
            down = model(**inputs).logits
        loss = (up - 1.0).square().mean() + 0.5 * (down + 1.0).square().mean()
        return (loss, up) if return_outputs else loss


def run(row: Row, folder: Path, steps: int = 2, **options: Any) -> tuple[ll.Adapter, dict[str, Tensor], Any]:
    """The adapter after some steps, the base as it was before them, and the Trainer."""
    torch.manual_seed(0)
    model = llama()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = randomise(attach(model, row), std=0.05)
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids(4, 6)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        data_seed=0,
        **options,
    )
    trainer = Contrastive(model=model, args=arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.adapter = adapter
    trainer.train()
    return adapter, base, trainer


CHECKPOINTED = {"non-reentrant": False, "reentrant": True}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # transformers 5.23 renames its own argument
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # accelerate's default, on a machine without an accelerator
@pytest.mark.parametrize("reentrant", CHECKPOINTED.values(), ids=CHECKPOINTED)
@each_kind
def test_the_trainer_with_checkpointing_equals_the_one_without(row: Row, reentrant: bool, tmp_path: Path) -> None:
    plain, base, _ = run(row, tmp_path / "plain")
    kwargs = {"use_reentrant": reentrant}
    checked, _, trainer = run(row, tmp_path / "checked", gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert trainer.model.is_gradient_checkpointing
    for name, value in plain.state_dict().items():
        assert_close(checked.state_dict()[name], value, name, tolerance=1e-6)
    start = randomise(attach(llama(), row), std=0.05).state_dict()
    still = [n for n, _ in plain.named_parameters() if same_bits(plain.state_dict()[n], start[n])]
    assert not still, "two steps moved nothing"
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in checked.parameters()}, "the base reached the optimizer"
    assert all(same_bits(p, base[n]) for n, p in trainer.model.named_parameters() if n in base), "the base was trained"
    assert checked.c == 1.0


def test_a_trainer_that_lost_its_c_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with c at rest in every forward the parameters are others."""
    right, _, _ = run(VARIANTS["lora"], tmp_path / "a")
    monkeypatch.setattr(ll.Adapter, "__call__", lambda self, model=None, c=1.0: torch.enable_grad())
    wrong, _, _ = run(VARIANTS["lora"], tmp_path / "b")
    name = next(iter(right.state_dict()))
    assert_differs(wrong.state_dict()[name], right.state_dict()[name])


# --- two ranks -----------------------------------------------------------------------------------------------------------

# c of rank 0 and of rank 1 in each step: on, off on one side, off on both, per row with zeros, a tensor that is all zero.
STEPS: tuple[tuple[Any, Any], ...] = (
    (1.0, -0.5),
    (0.0, 1.0),
    (0.0, 0.0),
    (torch.tensor(0.0), 0.5),
    (torch.tensor([0.0, 1.0]), torch.zeros(2)),
)
RATE = 0.05

RANK = """
import datetime, pickle, sys
import torch
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[4])
from tests.models import mlp, normal
from tests.test_training import RATE, STEPS, adapted, target

rank, names, folder = int(sys.argv[1]), sys.argv[2].split(), sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=40)
)
found = {}
for name in names:
    model, adapter = adapted(name)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=RATE)
    gradients = []
    for step, cs in enumerate(STEPS):
        optimizer.zero_grad()
        with adapter(wrapped, c=cs[rank]):
            out = wrapped(normal(2, 3, 12, seed=10 * step + rank))
        target(out).backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
        optimizer.step()
    found[name] = {"gradients": gradients, "state": {n: v.clone() for n, v in adapter.state_dict().items()}}
pickle.dump(found, open(f"{folder}/{rank}.pkl", "wb"))
torch.distributed.destroy_process_group()
"""


def adapted(name: str) -> tuple[nn.Module, ll.Adapter]:
    """The same on each rank: attached before it is wrapped."""
    model = mlp()
    return model, randomise(attach(model, VARIANTS[name]))


def target(out: Tensor) -> Tensor:
    return (out - 0.3).square().mean()


def ranks(names: list[str], folder: Path, script: str = RANK, limit: float = 90.0) -> list[dict[str, Any]]:
    """What two processes found, by variant. Both are ended when they take longer than the limit: a hang is a failure here."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), " ".join(names), str(folder), str(root)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=limit)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-3000:]
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in (0, 1)]


def one_process(name: str) -> dict[str, Any]:
    """The same steps on one process: each step's gradient is the mean of the two ranks'."""
    model, adapter = adapted(name)
    optimizer, gradients = torch.optim.SGD(adapter.parameters(), lr=RATE), []
    for step, cs in enumerate(STEPS):
        optimizer.zero_grad()
        losses = []
        for rank, c in enumerate(cs):
            with adapter(model, c=c):
                losses.append(target(model(normal(2, 3, 12, seed=10 * step + rank))))
        (sum(losses[1:], losses[0]) / 2).backward()
        gradients.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
        optimizer.step()
    return {"gradients": gradients, "state": dict(adapter.state_dict())}


def ranks_agree_with_one_process(names: list[str], folder: Path) -> None:
    found = ranks(names, folder)
    for name in names:
        first, second, want = found[0][name], found[1][name], one_process(name)
        for key, value in first["state"].items():
            assert same_bits(value, second["state"][key]), f"{name}: the ranks drifted apart at {key}"
            assert_close(value, want["state"][key], f"{name}: {key}")
        for step, (a, b, w) in enumerate(zip(first["gradients"], second["gradients"], want["gradients"], strict=True)):
            for x, y, z in zip(a, b, w, strict=True):
                assert same_bits(x, y), f"{name}: gradients of step {step} are not reduced"
                assert_close(x, z, f"{name}: a gradient of step {step}")
        off = STEPS.index((0.0, 0.0))
        assert not any(g.any() for g in first["gradients"][off]) and any(g.any() for g in first["gradients"][0])


@pytest.mark.timeout(150)
def test_two_ranks_with_different_c_stay_together(tmp_path: Path) -> None:
    """A rank at c = 0 takes part in the reduction with zeros; without its anchor the other would wait for ever."""
    ranks_agree_with_one_process(list(KINDS), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_two_ranks_with_different_c_stay_together_for_every_variant(tmp_path: Path) -> None:
    ranks_agree_with_one_process([name for name in VARIANTS if name not in KINDS], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_without_the_anchor_the_ranks_would_not_get_through(tmp_path: Path) -> None:
    """The control: at c = 0 nothing is computed, so that rank 0's second step has no gradient to reduce."""
    breaking = "import lora_lite.hooks as hooks\nhooks.Hook.anchored = lambda self, layer, value: None\n"
    script = RANK.replace("rank, names, folder", breaking + "rank, names, folder", 1).replace("seconds=40", "seconds=8")
    assert script.count("anchored") == 1
    with pytest.raises(AssertionError, match="does not require grad"):
        ranks(["lora"], tmp_path, script)


# --- an ordinary loop ------------------------------------------------------------------------------------------------------


@each_variant
def test_an_ordinary_loop_with_accumulation_equals_one_batch(row: Row) -> None:
    """Two backward passes at two c add up to the gradient of the sum, whatever is open when they run."""
    model, x = mlp(torch.float64), normal(4, 3, 12, dtype=torch.float64)
    adapter = randomise(attach(model, row, dtype=torch.float64))
    with adapter(model, c=torch.tensor([1.0, 1.0, -0.5, -0.5])):
        together = torch.autograd.grad((model(x) - 0.3).square().sum(), list(adapter.parameters()))
    for c, part in ((1.0, x[:2]), (-0.5, x[2:])):
        with adapter(model, c=c):
            loss = (model(part) - 0.3).square().sum()
        with adapter(model, c=9.0):
            loss.backward()
    for p, want in zip(adapter.parameters(), together, strict=True):
        assert p.grad is not None
        assert_close(p.grad / want.abs().max(), want / want.abs().max())


# --- half precision ----------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """The dtypes that matrices were multiplied in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.strip("_") in ("mm", "addmm", "mv", "bmm", "addmv"):
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lora", "miss", "vera"])
@pytest.mark.parametrize("shape", [(1, 1), (40,), (3, 40)])
def test_half_precision_is_multiplied_in_float32_where_it_is_slow(
    name: str, dtype: torch.dtype, slow: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed, "SLOW", {dtype} if slow else set())
    monkeypatch.setattr(hooks, "LARGE", 0)
    layer = nn.Sequential(nn.Linear(16, 24, bias=False)).to(dtype)
    adapter = randomise(attach(layer, VARIANTS[name], targets="all-linear"))
    truth = copy.deepcopy(layer).double()
    x = normal(*shape, 16).to(dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    y, want = layer(x), truth(exact_x)
    trained = list(adapter.parameters())
    got = torch.autograd.grad(y.float().square().sum(), [x, *trained])
    (twin,) = ll.adapters(truth).values()
    wanted = torch.autograd.grad(want.square().sum(), [exact_x, *twin.parameters()])
    assert y.dtype is dtype and [g.dtype for g in got] == [dtype, *(torch.float32 for _ in trained)]
    for g, w in zip((y, *got), (want, *wanted), strict=True):
        assert_close(g.double(), w, tolerance=TOLERANCE[dtype])
    with Products() as seen, torch.no_grad():
        again = layer(x)
    assert_close(again.double(), want, tolerance=TOLERANCE[dtype])
    assert seen.dtypes[0] is dtype and set(seen.dtypes[1:]) == {torch.float32 if slow else dtype}
