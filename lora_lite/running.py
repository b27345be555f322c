"""How does a batch go through a model that comes out as it went in?"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, uncompiled, without gradients; flags and random state return as they were."""
    # Compiled code would not see the hooks. Where nothing can have been compiled, importing torch._dynamo costs 0.9 s for nothing.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with torch.no_grad(), as_it_was(model), eager:
        model.eval()
        yield


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Each module's train or eval flag, and the random state, return as they were."""
    flags = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta", "mps")}  # MPS has no state per device
    kind = next((d.type for d in devices), None)
    with torch.random.fork_rng([d.index for d in devices if d.type == kind], device_type=kind):
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


def called(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch in any of its forms."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple):
        return model(*batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise ValueError(f"found {type(batch).__name__}, expected a tensor, a dict or a tuple of the model's arguments")


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the model's device; containers keep their types (a model reads its encoder_outputs[0])."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, MutableMapping):
        new = copy.copy(batch)
        for key, value in batch.items():  # a ModelOutput refuses update()
            new[key] = moved(value, device)
        return new
    if isinstance(batch, list | tuple):
        values = [moved(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch
