"""Which set-ups would train nothing, or the wrong thing, without a word? Each is refused by name before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lora_lite.adapter import Adapter
from lora_lite.attachment import all_hooks, inner
from lora_lite.baked import HistoryHook
from lora_lite.dial import Dial, check_float
from lora_lite.doses import DoseDial
from lora_lite.steering.arguments import check_takes
from lora_lite.steering.pairs import ContrastivePairs


def refuse_broken(model: nn.Module, adapter: Adapter, poles: Sequence[float]) -> None:
    """Raises RuntimeError or ValueError that says what is wrong with this training, and what to do."""
    refuse_model(model)
    refuse_absent(model, adapter)
    refuse_untrainable(adapter)
    refuse_poles(poles)
    refuse_shut_gates(model, adapter, poles)


def refuse_model(model: nn.Module) -> None:
    check_takes(model, "input_ids")
    config = getattr(inner(model), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(inner(model)).__name__} is an encoder-decoder; these rows hold prompt and completion in one sequence, for causal "
            "models. Write the loop (examples/steer.py) with the prompt as input_ids and the completion as labels"
        )


def refuse_absent(model: nn.Module, adapter: Adapter) -> None:
    if not adapter.attached:
        raise RuntimeError(f"adapter {adapter.name!r} is not attached, so nothing of it would run; ll.attach(model, adapter) first")
    adapter(model, c=0.0)  # raises for another model, for a merged adapter, and for layers that were replaced
    if also := sorted(adapter.also()):
        raise RuntimeError(
            f"adapter {adapter.name!r} also trains {also}, which c = 0 does not switch off: the reference would move with what it is the "
            "reference of. Train those first, or write the loop with a copy of the model as its reference"
        )


def refuse_untrainable(adapter: Adapter) -> None:
    trained = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(f"adapter {adapter.name!r} has nothing to train: none of its tensors requires gradients; adapter.requires_grad_()")
    if narrow := {name: p.dtype for name, p in trained.items() if p.dtype in (torch.bfloat16, torch.float16)}:
        name, dtype = next(iter(narrow.items()))
        raise ValueError(
            f"{len(narrow)} of {len(trained)} trainable tensors are {dtype} ({name}): most steps round away (at lr 1e-4, 63% of bfloat16 "
            "ones never move a number). Trainables stay float32 on a model of any dtype: attach after model.to(dtype), not before, with "
            "dtype=torch.float32 in the config"
        )
    if wrong := [name for name, p in trained.items() if not bool(torch.isfinite(p).all())]:
        raise ValueError(
            f"adapter {adapter.name!r} holds NaN or infinite values in {wrong[:3]} ({len(wrong)} tensors); start from a fresh one"
        )


def refuse_poles(poles: Sequence[float]) -> None:
    if not isinstance(poles, tuple | list) or len(poles) != 2:
        raise ValueError(f"poles are (c of the chosen texts > 0, c of the rejected ones < 0), usually (1.0, -1.0); got {poles!r:.60}")
    up, down = (check_float(c) for c in poles)
    if 0.0 in (up, down):
        raise ValueError(f"a pole at c = 0 is the base itself and cannot learn; got poles {(up, down)}, usual are (1.0, -1.0)")
    if not down < 0 < up:
        raise ValueError(f"poles are (c of the chosen texts > 0, c of the rejected ones < 0), got {(up, down)}")


def refuse_few(kept: ContrastivePairs, held: ContrastivePairs | None) -> None:
    """A null control of one pair is that pair's training, with the labels as they are or the other way round."""
    if len(kept) < 2:
        parts = f"{len(kept)} pair to train on, beside {len(held)} held out" if held else f"{len(kept)} pair, none held out"
        raise ValueError(
            f"a null control needs at least 2 pairs to train on, one with its labels exchanged and one without; got {parts}. Give at "
            "least 3 pairs; with 2, validation=None or pairs of its own leaves both to train on"
        )


def refuse_shut_gates(model: nn.Module, adapter: Adapter, poles: Sequence[float]) -> None:
    """A history that is shut wherever it is looked at would train the adapter for a model without it."""
    baked = {hook.shared.name: hook.dial for _, _, hook in all_hooks(inner(model)) if isinstance(hook, HistoryHook)}
    for name, dial in baked.items():
        shut = [c for c in poles if not opens_at(dial, adapter, c)]
        if shut:
            raise RuntimeError(
                f"the gate of {name} does not open at c = {' or '.join(map(str, shut))}: {described(dial)}. The adapter would be "
                "trained for a model without that history; history.set_gate(adapter) opens it where this adapter's c is not 0"
            )


def opens_at(dial: DoseDial, adapter: Adapter, c: float) -> bool:
    with adapter(c=c):
        if isinstance(dial.gate, Dial):
            return not dial.gate.setting().off
        return dial.gate is None or bool(torch.as_tensor(dial.gate()).any())


def described(dial: DoseDial) -> str:
    if isinstance(dial.gate, Dial):
        return f"it follows adapter {dial.gate.name!r}, whose c is {dial.gate.setting().c}"
    return "it is a callable that says no there"
