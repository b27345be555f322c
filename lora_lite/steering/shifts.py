"""Where in the model does c stop being linear? How far each block's output moves at +c and -c, and whether in opposite directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.calibration.forms import as_batches
from lora_lite.calibration.padding import Padding
from lora_lite.dial import check_float
from lora_lite.running import called, moved
from lora_lite.steering.arguments import check_adapter, check_ids, told
from lora_lite.steering.response import aligned
from lora_lite.steering.writing import on_model
from lora_lite.target import Place, check_model, places


def block_shifts(model: nn.Module, adapter: Adapter, batches: Any, c: float = 1.0) -> BlockShifts:
    """How far c moves the residual stream, block by block. `print(ll.block_shifts(model, adapter, batches, c=1.5))`

    batches   one batch (a mapping of the model's arguments, or a tensor) or several; padding is left out by its mask

    Three forwards a batch, at 0, c and -c; two of them are kept until the third: blocks x tokens x width numbers each. The model,
    its flags and the random state come out as they went in. Raises ValueError for c=0 or no batches, RuntimeError where the
    model has no stack of blocks.
    """
    check_model(model)
    check_adapter(adapter)
    if not check_float(c):
        raise ValueError("c=0 moves nothing; give the c to look at, e.g. 1.0")
    stacks = blocks_of(model)
    if not stacks:
        raise RuntimeError(f"{type(model).__name__} has no stack of blocks (a ModuleList) to look at")
    sums: dict[str, Sums] = {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with on_model(model, adapter) as here, Stream(model, stacks) as stream:
        for batch in several(batches):
            batch = moved(batch, device)
            check_batch(batch, model)
            outputs = []
            for dose in (0.0, c, -c):
                with here(model, c=dose):
                    outputs.append(stream.run(batch))
            for path in outputs[0]:
                sums.setdefault(path, Sums()).add(*(found[path] for found in outputs))
    if not sums:
        raise ValueError("no block was reached: there are no batches, or the model does not run its blocks on them")
    return BlockShifts(float(c), tuple(BlockShift(stacks[path].stack, stacks[path].depth, *total.means()) for path, total in sums.items()))


def several(batches: Any) -> Iterable[Any]:
    try:
        return as_batches(batches)
    except ValueError as error:  # which speaks of calibration data, and of forms that only those have
        empty = isinstance(batches, list | tuple) and not batches
        raise ValueError(f"batches is {'an empty list' if empty else told(batches)}; {FORMS}") from error


def check_batch(batch: Any, model: nn.Module) -> None:
    tensors = [x for x in (batch.values() if isinstance(batch, Mapping) else as_parts(batch)) if isinstance(x, Tensor)]
    if not tensors:
        raise ValueError(f"a batch is {told(batch)}, without a tensor in it; {FORMS}")
    if not any(x.numel() for x in tensors):
        raise ValueError(f"a batch holds no tokens: its tensors are {[tuple(x.shape) for x in tensors]}; {FORMS}")
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else tensors[0]
    if isinstance(ids, Tensor) and ids.ndim and not ids.is_floating_point():
        check_ids(model, ids.reshape(-1, ids.shape[-1]).tolist(), "the batches")


def as_parts(batch: Any) -> Iterable[Any]:
    return batch if isinstance(batch, list | tuple) else [batch]


def blocks_of(model: nn.Module) -> dict[str, Place]:
    """Path -> place, of the blocks of every outermost stack."""
    return {path: place for path, place in places(model).items() if place is not None and path.rpartition(".")[0] == place.stack}


FORMS = (
    'it can be a mapping of the model\'s arguments, {"input_ids": ids, "attention_mask": mask}, a tensor of ids, or a list of such batches'
)


class Stream:
    """Hooks, for the block, that note what each block puts out; padding left out."""

    def __init__(self, model: nn.Module, stacks: Iterable[str]) -> None:
        self.model, self.stacks = model, list(stacks)
        self.padding, self.hooks = Padding(model), ExitStack()
        self.outputs: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        with ExitStack() as hooks:
            for path in self.stacks:
                hooks.callback(self.model.get_submodule(path).register_forward_hook(self.listener(path)).remove)
            self.padding.watch(hooks)
            self.hooks = hooks.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.hooks.close()

    def listener(self, path: str) -> Callable[..., None]:
        def note(block: nn.Module, args: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple | list) else output
            if isinstance(stream, Tensor) and stream.is_floating_point() and stream.ndim > 1:
                self.outputs[path] = self.padding.without(block, stream)

        return note

    def run(self, batch: Any) -> dict[str, Float[Tensor, "n d"]]:
        """One forward: path -> what the block put out, one row per token."""
        self.outputs = {}
        with self.padding.of(batch):
            try:
                called(self.model, batch)
            except Exception as error:
                error.add_note(f"in {type(self.model).__name__}, which block_shifts called with a batch of its own form; {FORMS}")
                raise
        return self.outputs


class Sums:
    """Running means over tokens, so that memory does not grow with the data."""

    def __init__(self) -> None:
        self.total, self.n = torch.zeros(3, dtype=torch.float64), 0

    def add(self, zero: Float[Tensor, "n d"], plus: Float[Tensor, "n d"], minus: Float[Tensor, "n d"]) -> None:
        up, down = (plus - zero).double(), (minus - zero).double()
        size = zero.double().norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
        cosine = torch.cosine_similarity(up, down, dim=-1, eps=torch.finfo(torch.float64).tiny)
        each = torch.stack([up.norm(dim=-1) / size, down.norm(dim=-1) / size, cosine])
        self.total += each.sum(dim=1).cpu()
        self.n += zero.shape[0]

    def means(self) -> list[float]:
        return (self.total / self.n).tolist()


@dataclass(frozen=True)
class BlockShift:
    """One block: |h_c - h_0| / |h_0| at +c and at -c, and the cosine between the two shifts: means over tokens.

    A cosine of -1 and equal sizes: still linear in c. Of 0 or more: +c and -c are no longer opposites. 0 where nothing moves.
    """

    stack: str
    block: int
    plus: float
    minus: float
    cosine: float


@dataclass(frozen=True)
class BlockShifts:
    """By stack and block, in the order of the model; `print` shows a table. Made by `ll.block_shifts`."""

    c: float
    blocks: tuple[BlockShift, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = ["stack", "block", f"shift at {self.c:+g}", f"shift at {-self.c:+g}", "cosine"]
        rows = [[b.stack or "(the model)", str(b.block), f"{b.plus:.3g}", f"{b.minus:.3g}", f"{b.cosine:+.3f}"] for b in self.blocks]
        said = "shift: |h_c - h_0| / |h_0|, a block's output, mean over tokens; cosine -1: +c and -c are opposites, as in a linear model"
        return "\n".join([*aligned([head, *rows]), said])
