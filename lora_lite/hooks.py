"""What happens when an adapted layer is called? One hook per adapter and layer: read c, cast the small tensors, add.

Knows tensors and callables; no variants, no models. A hook is found again on its layer after deepcopy and pickle, carries
its own handle (so it can be removed there too) and reads the adapter's tensors from the layer it is called with, so that
torch.func, load_state_dict(assign=True) and copies all see their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from lora_lite import compiled
from lora_lite.dial import DIALS, Dial, Setting, current_task, transforming
from lora_lite.lowrank import LowRank, add_narrow
from lora_lite.mixed import Mixed, linear, trains_across_dtypes, wide

LARGE = 2**15  # numbers in y from which writing into it pays for making sure that one may


class Hook:
    """An adapter at one layer. Subclasses say where the hook sits and what it adds; this one decides whether, and how much.

    fields   (name in the variant, name on the layer) of each tensor
    trained  names on the layer of those that train
    shared   whatever the hooks of one adapter share; holds no tensors of the model
    """

    site = "output"
    additive = False  # adds something that does not depend on what other hooks made of y

    def __init__(
        self,
        dial: Dial,
        path: str,
        fields: Mapping[str, str],
        trained: tuple[str, ...],
        variant: Any,
        cfg: Any,
        base: Any,
        routed: bool,
        shared: Any,
    ) -> None:
        self.dial, self.path, self.routed, self.shared = dial, path, routed, shared
        self.fields, self.trained = tuple(fields.items()), trained
        self.variant, self.cfg, self.base = variant, cfg, base
        self.dropout: float = getattr(cfg, "dropout", 0.0)
        self.handle: RemovableHandle | None = None

    def install(self, layer: nn.Module) -> None:
        register = layer.register_forward_pre_hook if self.site == "input" else layer.register_forward_hook
        self.handle = register(self.run, with_kwargs=True)  # type: ignore[arg-type]  # an object that is called takes 0.1 us more
        self.dial.places += 1

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
            self.dial.places += 1

    def suspend(self, layer: nn.Module) -> None:
        """Off the layer with its tensors, remembering the place it had among the layer's hooks."""
        table, place = self._table(layer), list(self._table(layer).values()).index(self.run)
        self._followers = list(table)[place + 1 :]
        self.remove()
        for _, name in self.fields:
            layer._parameters.pop(name)

    def resume(self, layer: nn.Module, tensors: Mapping[str, nn.Parameter]) -> None:
        """Back to the place it had."""
        self.install(layer)
        for key in self._followers:
            if key in self._table(layer):
                self._table(layer).move_to_end(key)
        for field, name in self.fields:
            layer.register_parameter(name, tensors[field])

    def _table(self, layer: nn.Module) -> Any:
        return layer._forward_pre_hooks if self.site == "input" else layer._forward_hooks

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        here = layer._parameters  # 0.04 us a read; layer.lora_A goes through Module.__getattr__, 0.8 us
        return {field: here[name] for field, name in self.fields}  # type: ignore[misc]

    def anchored(self, layer: nn.Module, value: Tensor) -> Tensor | None:
        """At c = 0 without gradients, nothing. With them the value's own bits, and zero gradients for the adapter: a rank
        of DDP at c = 0 must take part in the reduction, and a checkpoint must save as many tensors as its recompute."""
        if "_is_replica" in layer.__dict__:
            raise replicated(self.path)
        if not is_grad_enabled():
            return None
        first = [p.reshape(-1)[0] for name in self.trained if (p := layer._parameters[name]) is not None and p.requires_grad]
        if not first:
            return None
        return torch.where(torch.ones((), dtype=torch.bool, device=value.device), value, sum(first[1:], first[0]).to(value.dtype))

    def dropped(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.dropout and layer.training and self.dial.training:
            return F.dropout(x, self.dropout)
        return x

    def apply(self, layer: nn.Module, x: Tensor, y: Tensor | None, c: float | Tensor) -> Tensor:
        """What comes out of this hook at c: y changed, or x changed at an input site. No zero rule, no ambient state."""
        raise NotImplementedError

    def run(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any = None, y: Tensor | None = None) -> Any:
        """What torch calls: `apply` at the c that is in force, under the zero rule: c = 0 keeps the base's bits (CORE.md section 2).

        While another thread puts the hook on or off, torch may call it as one without kwargs: (layer, args, y).
        """
        if y is None and self.site == "output":
            y, kwargs = kwargs, {}
        if is_dynamo_compiling():  # names of this module: looking them up in torch takes 0.5 us of a layer's 9
            return self.traced(layer, args[0] if args else next(iter(kwargs.values())), y)
        dial = self.dial
        stack = DIALS.get().get(dial)
        setting = stack[-1] if stack else dial.rest
        if setting.task != current_task():
            dial.stale(setting)
        if setting.off and not is_grad_enabled():  # what `anchored` would say, sooner; a thread of nn.DataParallel is in no block
            seen = args[0] if y is None and args else y
            if type(seen) is Tensor and (stack or "_is_replica" not in layer.__dict__):
                return None
        x = args[0] if args else next(iter(kwargs.values()))
        if is_compiling():  # torch.export without Dynamo, whose tensors are fake
            return self.traced(layer, x, y)
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise compiled.holds_no_c(dial, self.path, "torch.jit.trace")
        dial.calls += 1
        try:
            if setting.off:
                return self.anchored(layer, x if y is None else y)
            if setting.tensor:
                return self.varied(layer, x, y, setting.at(self.path))
            return self.apply(layer, x, y, setting.c)  # type: ignore[arg-type]
        except KeyError:
            if "_is_replica" in layer.__dict__:
                raise replicated(self.path) from None
            raise

    def varied(self, layer: nn.Module, x: Tensor, y: Tensor | None, setting: Setting) -> Tensor | None:
        """At a c that differs between layers, rows or tokens."""
        if setting.off:
            return self.anchored(layer, x if y is None else y)
        if not setting.tensor:
            return self.apply(layer, x, y, setting.c)
        c = setting.rows(x, self.routed, self.path)
        new = self.apply(layer, x, y, c)
        return torch.where(c == 0, x if y is None else y, new) if setting.zeros else new

    def traced(self, layer: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
        """The same inside a graph being compiled: c is a tensor there, and no branch may look at it."""
        c, zero = compiled.coefficient(self.dial, x, self.routed, self.path)
        new = self.apply(layer, x, y, c)
        return new if zero is None else torch.where(zero, x if y is None else y, new)


class OutputHook(Hook):
    """form "output": y + delta(x, y)."""

    def apply(self, layer: nn.Module, x: Tensor, y: Tensor | None, c: float | Tensor) -> Tensor:
        assert y is not None
        kept = self.dropped(layer, x)
        if kept is x:
            return self.by(self.variant.added, layer, x, y, c).to(y.dtype)
        return y + self.by(self.variant.delta, layer, kept, layer.forward(kept), c).to(y.dtype)  # its own W·dropout(x), as published

    def by(self, method: Callable[..., Tensor], layer: nn.Module, x: Tensor, y: Tensor | None, c: float | Tensor) -> Tensor:
        """A method of the variant with all it needs: the base as declared, tensors prepared in float32 at least, then cast to x's dtype."""
        base = self.base.read(layer, x.dtype if y is None else y.dtype)
        small = {k: wide(v) for k, v in self.tensors(layer).items()}
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                p = self.variant.prepare(self.cfg, small, base, c)
        else:
            p = self.variant.prepare(self.cfg, small, base, c)
        dtype = x.dtype
        return method(self.cfg, {k: v if v.dtype is dtype else v.to(dtype) for k, v in p.items()}, x, y, base, c)


class InputHook(OutputHook):
    """form "input": the layer is called with x + delta(x)."""

    site = "input"

    def run(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any = None, y: Tensor | None = None) -> Any:
        x = super().run(layer, args, kwargs)
        if x is None or kwargs is None:
            return None if x is None else (x, *args[1:])
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})

    def apply(self, layer: nn.Module, x: Tensor, y: Tensor | None, c: float | Tensor) -> Tensor:
        return self.by(self.variant.added, layer, x, None, c).to(x.dtype)


class LowRankHook(Hook):
    """form "low-rank": y + c B diag(g) A x."""

    additive = True

    def apply(self, layer: nn.Module, x: Tensor, y: Tensor | None, c: float | Tensor) -> Tensor:
        here = layer._parameters
        p = {field: here[name] for field, name in self.fields}
        if self.dropout:
            x = self.dropped(layer, x)
        inplace = type(c) is float and y.numel() > LARGE and self.holds_alone(layer, y)  # type: ignore[union-attr, arg-type]
        if self.variant.narrows:
            h, B, gate = self.variant.narrowed(self.cfg, p, x)
            return add_narrow(y, h.to(y.dtype), B, c, gate, inplace)  # type: ignore[union-attr, arg-type]  # under autocast x may be wider than y
        return add_low_rank(y, x, self.variant.factors(self.cfg, p, self.base.sizes), c, inplace)  # type: ignore[arg-type]

    def holds_alone(self, layer: nn.Module, y: Tensor) -> bool:
        """Whether y is fresh from nn.Linear's own product and nobody has been shown it: then adding may happen in it.

        Whoever could have kept y comes before us or looks from beneath: another hook, a forward put in the place of the
        layer's own, a mode of torch's dispatcher, a transform, a subclass of Tensor. Autograd keeps what went into the
        product, not what came out; but to write into a view is dear there, and y is one where a bias was added in 3-D.
        """
        return (
            type(layer) is nn.Linear
            and "forward" not in layer.__dict__
            and owner(next(iter(layer._forward_hooks.values()), None)) is self
            and not nn.modules.module._global_forward_hooks
            and type(y) is Tensor
            and y.is_contiguous()
            and not (is_grad_enabled() and y._is_view())
            and not watched()
        )


def replicated(path: str) -> RuntimeError:
    return RuntimeError(
        f"{path} runs as a replica of nn.DataParallel, whose threads do not see the c of a `with` block, nor an adapter's parameters; "
        "use DistributedDataParallel (torchrun or accelerate launch), or one device"
    )


def watched() -> bool:
    """Whether a mode or a transform of torch sees every operation here, and may keep what it saw."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()) or transforming()  # type: ignore[reportAttributeAccessIssue]


def add_low_rank(y: Tensor, x: Tensor, update: LowRank, c: float | Tensor, inplace: bool = False) -> Tensor:
    """y + c B diag(g) A x for x (*batch, d_in), y (*batch, d_out), c a float or broadcastable against x.

    The small factors are cast down to x's dtype, never x up: with a bf16 base and float32 factors the backward then keeps
    0.62x of the bytes. Gains that differ by row, token or rank go on the rank axis, computed in their own precision.
    """
    A, B, g = update
    scale = c * g if type(c) is float and type(g) is float else None  # 20 ns; isinstance(c, Tensor) takes 64, in every layer
    if A.dtype is (dtype := x.dtype):
        if scale is not None and x.numel() == A.shape[1] and B.dtype is dtype is y.dtype:  # one row: 5.8 us for 8.0
            return torch.add(y, torch.mv(B, torch.mv(A, x.reshape(-1))), alpha=scale)
        h = F.linear(x, A)
    elif scale is not None and A.requires_grad and x.dtype is y.dtype and trains_across_dtypes(x, A):
        return Mixed.apply(y, x, A, B, scale, inplace)  # type: ignore[return-value]
    else:
        h = linear(x, A)
    return add_narrow(y, h, B, c * g if scale is None else scale, inplace=inplace)


HOOKS: dict[str, type[Hook]] = {"low-rank": LowRankHook, "output": OutputHook, "input": InputHook}


def hooks_on(layer: nn.Module) -> Iterator[Hook]:
    """The hooks of ours on one layer, in the order torch runs them at each site."""
    for table in (layer._forward_pre_hooks, layer._forward_hooks):
        for hook in map(owner, table.values()):
            if isinstance(hook, Hook):
                yield hook


def owner(registered: Any) -> Any:
    """Whose method a layer calls, where it calls one."""
    return getattr(registered, "__self__", registered)
