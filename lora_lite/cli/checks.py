"""Do the promises hold here, on this model, after this training? Bit for bit, by torch.equal."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll

DOSES = (1.0, -1.5)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a detach must bring back: types, hooks, flags, and the bytes of every parameter and buffer."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {
        "modules": {name: (type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "tensors": {name: (t.requires_grad, content(t)) for name, t in tensors.items()},
    }


def content(tensor: Tensor) -> str:
    """A hash, so that a large model need not be held twice."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(flat.tobytes(), digest_size=16).hexdigest()


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits.clone()


def zero_is_base(model: Any, adapter: ll.Adapter, inputs: dict[str, Tensor], base: Tensor) -> bool:
    """c = 0 for all rows, and for every second row of a batch whose other rows are at c = 1."""
    with adapter(model, c=0.0):
        same = torch.equal(logits(model, inputs), base)
    if not adapter.variant.row_c:
        return same
    off = torch.arange(len(base)) % 2 == 0
    with adapter(model, c=(~off).float()):
        mixed = logits(model, inputs)
    moves = not torch.equal(at(model, adapter, inputs, 1.0)[~off], base[~off])  # one that learned nothing is the base at c = 1 too
    return same and torch.equal(mixed[off], base[off]) and torch.equal(mixed[~off], base[~off]) != moves


def survives_the_file(model: Any, adapter: ll.Adapter, path: Path, inputs: dict[str, Tensor], pristine: dict[str, Any]) -> dict[str, bool]:
    """Save, detach, load: the model as it was in between, the same numbers after. Leaves the model without adapters."""
    before = {c: at(model, adapter, inputs, c) for c in DOSES}
    adapter.save(path)
    adapter.detach()
    detached = state(model) == pristine
    again = ll.load(model, path)
    same = all(torch.equal(v, again.state_dict()[k]) for k, v in adapter.state_dict().items())
    same = same and all(torch.equal(at(model, again, inputs, c), before[c]) for c in DOSES)
    again.detach()
    return {"save_load_bit_identical": same, "detach_bit_identical": detached and state(model) == pristine}


def at(model: Any, adapter: ll.Adapter, inputs: dict[str, Tensor], c: float) -> Tensor:
    with adapter(model, c=c):
        return logits(model, inputs)
