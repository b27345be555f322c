"""What can be known of a linear layer we sit on: its sizes, its dense weight, why it cannot carry us, is it the same one?"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear  # nn.MultiheadAttention's out_proj
from torch.nn.parameter import is_lazy

SAMPLES = 4  # weight values kept per layer: enough to tell two trainings apart, 40 kB of header for 448 layers
FEW = 3  # names shown of a long list
WRAPPED = (("module",), ("_orig_mod",), ("base_model", "model"))  # where wrappers keep the model
PLAIN: Any = Tensor.__torch_dispatch__  # type: ignore[reportAttributeAccessIssue]


def _loaded(module: str, name: str) -> tuple[type, ...]:
    """A class of a package that need not be installed: while nobody has imported it, nothing can be an instance of it."""
    found = getattr(sys.modules.get(module), name, None)
    return (found,) if isinstance(found, type) else ()


def transposed(layer: nn.Module) -> bool:
    """Whether the weight is stored as (d_in, d_out): GPT-2's Conv1D."""
    return isinstance(layer, _loaded("transformers.pytorch_utils", "Conv1D"))


def never_called(module: nn.Module) -> bool:
    """nn.MultiheadAttention reads the weight of its out_proj and never calls it, so a hook on it is dead (FACTS.md T9)."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def is_linear(module: nn.Module) -> bool:
    """Whether a hook on it sees x (*batch, d_in) and y = W x + b: nn.Linear, its subclasses, and Conv1D."""
    if never_called(module) or callable(getattr(type(module), "weight", None)):  # torch.ao's packed layers have a method weight()
        return False
    return isinstance(module, nn.Linear) or transposed(module)


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out). Never from weight.shape: bitsandbytes packs a (128, 128) weight as (8192, 1)."""
    if transposed(layer):
        return int(layer.nx), int(layer.nf)  # type: ignore[arg-type]
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def follow(mine: nn.Parameter, theirs: nn.Parameter, dtype: bool = True) -> None:
    """Where the model was moved (or cast) while it had another parameter in its place, its own goes there too."""
    wanted = theirs.device, theirs.dtype if dtype else mine.dtype
    if (mine.device, mine.dtype) != wanted and not theirs.is_meta:
        mine.data = mine.data.to(*wanted)


def quantised(layer: nn.Module) -> str | None:
    """The name of the type that holds the weight in fewer bits than a float, or None: "Linear4bit", "Int8Tensor", "int8 weight"."""
    if "bitsandbytes" in _packages(type(layer)):
        return type(layer).__name__
    weight = layer._parameters.get("weight")
    if weight is None or isinstance(weight, _dtensor()):
        return None
    dispatch = getattr(type(weight), "__torch_dispatch__", PLAIN)  # torchao's own: size and dtype look right, most operators raise
    if dispatch is not PLAIN or "bitsandbytes" in _packages(type(weight)):
        return type(weight).__name__
    if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:  # float8 means nothing without a scale kept elsewhere
        return f"{_name(weight.dtype)} weight"
    return None


def dense_weight(layer: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The layer's own weight, not a copy; of a Conv1D the transposed view.

    Raises TypeError for a weight that is quantised, computed at each forward, sharded or not in memory.
    """
    if reason := _unreadable(layer):
        raise TypeError(f"{_described(layer)}: {reason}")
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight.T if transposed(layer) else weight


def refusal(path: str, layer: nn.Module, reads_weight: bool) -> str | None:
    """Why this layer cannot carry an adapter, as a sentence with a way out; None when it can.

    reads_weight  whether the variant needs the dense weight, which a quantised or computed one does not give
    """
    reason = _unhookable(path, layer) or (_unreadable(layer) if reads_weight else None)
    return f"{path} ({_described(layer)}): {reason}" if reason else None


def hazard(path: str, layer: nn.Module) -> str | None:
    """Why a layer that can carry an adapter may still train wrongly, or None. bitsandbytes 0.50 on CPUs with AVX512-BF16."""
    if getattr(layer, "support_avx512bf16_for_cpu", False) and layer.weight.device.type == "cpu":
        return (
            f"{path}: {_described(layer)} repacks its weight at the first forward in eval mode, and gradients through it are "
            "wrong from then on (by 98%, measured); set layer.support_avx512bf16_for_cpu = False before any forward"
        )
    return None


def _unhookable(path: str, layer: nn.Module) -> str | None:
    """Reasons that hold for every variant."""
    weight = layer._parameters.get("weight")
    if never_called(layer) or not is_linear(layer):
        return "its forward is never called as y = W x + b, a hook would be dead; choose the linear layers around it"
    if weight is not None and is_lazy(weight):
        return "it is lazy and has no size yet; run one forward of the model first"
    if _offloaded(layer):
        return "its weight is offloaded by accelerate, which would carry ours off with it; load with a device_map that fits"
    if weight is not None and weight.is_meta:
        return "its weight is on the meta device; load the weights, without offload to cpu or disk, and attach then"
    if "_fsdp_wrapped_module" in path.split("."):
        return "it is inside FullyShardedDataParallel, which would not reduce the adapter's gradients; attach first, wrap then"
    if isinstance(weight, _dtensor()):
        return _sharded(weight)
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):  # FACTS.md T6: gradients wrong by 98 %
        return (
            "bitsandbytes has repacked its 4-bit weight for inference on this CPU and computes wrong gradients with it; load the model "
            "again and set support_avx512bf16_for_cpu = False on each Linear4bit before the first forward in eval mode"
        )
    return None


def _sharded(weight: Any) -> str:
    return (
        f"its weight is a DTensor ({', '.join(map(str, weight.placements))}): hooks see one rank's part of x and y, and later tensors' "
        "gradients are not reduced; load without tp_plan, and with fully_shard attach first, shard then"
    )


def _unreadable(layer: nn.Module) -> str | None:
    """Reasons that hold for variants that read the dense weight."""
    weight = layer._parameters.get("weight")
    if kind := quantised(layer):
        return (
            f"its weight is quantised ({kind}) and the dense one is needed; use a method that never reads the weight (lora, ia3), "
            "or load the model without quantisation"
        )
    if weight is None:
        return "its weight is computed at each forward (parametrized); use a method that never reads the weight (lora, ia3)"
    if weight.is_meta or is_lazy(weight):
        return "its weight is not in memory; load the weights first"
    return _sharded(weight) if isinstance(weight, _dtensor()) else None


def _offloaded(layer: nn.Module) -> bool:
    """Whether an accelerate hook, alone or in a SequentialHook, moves the weights away after each forward."""
    return any(getattr(hook, "offload", False) for hook in _accelerate_hooks(getattr(layer, "_hf_hook", None)))


def _accelerate_hooks(hook: Any) -> Iterator[Any]:
    if hook is not None:
        yield hook
        for inner in getattr(hook, "hooks", ()):
            yield from _accelerate_hooks(inner)


def _described(layer: nn.Module) -> str:
    d_in, d_out = sizes(layer) if is_linear(layer) else (0, 0)
    return f"{type(layer).__name__} {d_in} -> {d_out}" if d_in else type(layer).__name__


def _dtensor() -> tuple[type, ...]:
    return _loaded("torch.distributed.tensor", "DTensor")


def _packages(kind: type) -> set[str]:
    return {ancestor.__module__.partition(".")[0] for ancestor in kind.__mro__}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- the fingerprint of a base --------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What tells this base from another, as JSON holds it; one transfer per device and dtype.

        {"architecture": "LlamaForCausalLM",       (the class inside of wrappers, whose own are named in "wrappers" where there are any)
         "targets": {"model.layers.0.self_attn.q_proj": {"shape": [d_out, d_in], "dtype": "float32", "samples": ["0.125", ...]}}}

    Samples are up to four values at even distances through the weight as it is stored, as `repr` writes a float (so NaN is
    JSON too); None where the weight is quantised or computed, since what is stored then says little.
    """
    samples, (*wrappers, inmost) = _samples(targets), _inwards(model)
    return {
        "architecture": type(inmost).__name__,
        **({"wrappers": [type(w).__name__ for w in wrappers]} if wrappers else {}),
        "targets": {
            name: {"shape": list(sizes(layer)[::-1]), "dtype": _dtype_name(layer), "samples": samples.get(name)}
            for name, layer in targets.items()
        },
    }


def _inwards(model: nn.Module) -> list[nn.Module]:
    """The model and what it wraps, inwards: by `.module` (data parallel, or anyone's), `_orig_mod`, PEFT's `base_model.model`."""
    within = next((m for path in WRAPPED if (m := _child(model, *path)) is not None), None)
    return [model] if within is None else [model, *_inwards(within)]


def _child(module: nn.Module | None, *path: str) -> nn.Module | None:
    """A registered child: transformers' models have a property `base_model` too."""
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


def _dtype_name(layer: nn.Module) -> str:
    weight = layer._parameters.get("weight")
    return "computed" if weight is None else _name(weight.dtype)


@torch.no_grad()
def _samples(targets: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, layer in targets.items():
        if _unreadable(layer) is None:
            weight: Any = layer._parameters["weight"]
            groups.setdefault((weight.device, weight.dtype), {})[name] = _spread(weight)
    found: dict[str, list[str]] = {}
    for group in groups.values():
        values = iter(torch.cat(list(group.values())).cpu().double().tolist())
        found |= {name: [repr(next(values)) for _ in range(part.numel())] for name, part in group.items()}
    return found


def _spread(weight: Tensor) -> Float[Tensor, " n"]:
    """Up to SAMPLES values of a weight as a view. The step is a quarter of (size - 1), so that columns differ too."""
    size = weight.numel()
    count, step = min(SAMPLES, size), max(1, (size - 1) // SAMPLES)
    start = step // 2
    if weight.is_contiguous():
        return weight.as_strided((count,), (step,), weight.storage_offset() + start)  # one operator, 2 us
    return weight.flatten()[start::step][:count]


def compare_fingerprint(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(differences, warnings) in words: a base that is not the one, and what could not be checked.

    Contents are equal bit for bit in one dtype; across a change of dtype, within the rounding of the two.
    """
    try:
        return _compared(saved, now)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a file may hold anything
        return [f"its fingerprint cannot be read ({type(error).__name__}: {error})"], []


def _compared(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    old, new = saved["targets"], now["targets"]
    both = {name: (old[name], new[name]) for name in old if name in new}
    comparable = {n: p for n, p in both.items() if p[0]["shape"] == p[1]["shape"]}
    blind = [n for n, (a, b) in comparable.items() if a["samples"] is None or b["samples"] is None]
    reshaped = [f"{n} {a['shape']}, here {b['shape']}" for n, (a, b) in both.items() if n not in comparable]
    changed = [_contents(n, a, b) for n, (a, b) in comparable.items() if n not in blind and not _same(a, b)]
    differences = [
        *_architecture(saved["architecture"], now["architecture"], now.get("wrappers", [])),
        *_several(len(old), "have no layer of that name", [n for n in old if n not in new]),
        *_several(len(old), "have another shape", reshaped),
        *_several(len(old), "hold other weights", changed),
    ]
    return differences, _several(len(old), "are quantised or computed, then or now, so that their contents cannot be compared", blind)


def _architecture(saved: str | None, now: str | None, wrappers: Sequence[str]) -> list[str]:
    """Files of before wrappers were looked into have a wrapper's own class."""
    return [] if saved == now or saved in wrappers else [f"it was {_an(saved)}, this is {_an(now)}"]


def _an(noun: str | None) -> str:
    return f"{'an' if str(noun)[:1] in 'AEIO' else 'a'} {noun}"


def _several(total: int, what: str, which: Iterable[str]) -> list[str]:
    """As one sentence, "3 of 14 targets have another shape: a, b, c", or nothing."""
    which = list(which)
    more = ", ..." if len(which) > FEW else ""
    return [f"{len(which)} of {total} targets {what}: {', '.join(which[:FEW])}{more}"] if which else []


def _contents(name: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    a, b = next((a, b) for a, b in zip(saved["samples"], now["samples"], strict=True) if not _near(a, b, saved["dtype"], now["dtype"]))
    return f"{name} (e.g. {float(a):.6g}, here {float(b):.6g})"


def _same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return all(_near(a, b, saved["dtype"], now["dtype"]) for a, b in zip(saved["samples"], now["samples"], strict=True))


def _near(a: str, b: str, a_dtype: str, b_dtype: str) -> bool:
    """Whether two values are equal, or can be two roundings of one value to their dtypes."""
    if a == b or a_dtype == b_dtype:
        return a == b
    unit, floor = (sum(pair) for pair in zip(_rounding(a_dtype), _rounding(b_dtype), strict=True))
    x, y = float(a), float(b)
    return abs(x - y) <= unit / (1 - unit) * max(abs(x), abs(y)) + floor


def _rounding(dtype: str) -> tuple[float, float]:
    """(largest relative rounding error, spacing of the subnormals): bfloat16 2^-8, float16 2^-11 and 6e-8, float32 2^-24."""
    limits = torch.finfo(getattr(torch, dtype))
    return limits.eps / 2, limits.smallest_normal * limits.eps
