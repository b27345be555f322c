"""What is c here and now? A dial rests at a value; `with` blocks override it in the context they run in, and nowhere else."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor

Coefficient = float | Tensor
Dose = Any  # what a dial can be turned to: a Coefficient, a Varied one, or a history's doses, a tuple (doses.py)

WIDEST = {"mps": torch.float32}  # compiled graphs see c in one dtype whatever it was given in: one graph for all

_KEYS = itertools.count(1)
_BY_KEY: weakref.WeakValueDictionary[int, Dial] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()

# Which backward this thread is in, -1 outside of any. A forward that is recomputed for a checkpointed backward runs with
# a number that differs from the one its setting was stamped with: that is how a c that moved meanwhile is noticed.
current_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)
MOVED = -2  # in place of that number: the adapter's hooks are no longer those of the forward
replaying: ContextVar[bool] = ContextVar("lora_lite.replaying", default=False)


class Setting:
    """One resolved value of c: checked once, when it is set, so that a hook only reads attributes.

    off     nothing to add: every entry is zero and no gradient is asked for
    zeros   some entries are zero (those rows keep the base's bits)
    task    the backward it was set in, -1 outside
    owner   the block that set it, None for a resting value
    cell    c as a tensor, for compiled graphs
    """

    __slots__ = ("_rows", "c", "cell", "off", "owner", "task", "tensor", "zeros")
    varied: ClassVar[bool] = False  # whether c must still be asked for (varied.py)

    def __init__(self, c: Coefficient, owner: object = None) -> None:
        self.c: Coefficient
        self.off = self.zeros = False
        if isinstance(c, Tensor):
            self.c, self.tensor = check_tensor(c), True
            scalar = self.c.numel() == 1
            self.cell = self.c.reshape(() if scalar else self.c.shape).to(WIDEST.get(c.device.type, torch.float64))
            if not self.c.requires_grad and not is_functorch(self.c):
                zero = self.c.detach() == 0
                self.off, self.zeros = bool(zero.all()), bool(zero.any())
        else:
            self.c, self.tensor = check_float(c), False
            self.off = self.c == 0.0
            self.cell = cell_of(self.c)
        self.task, self.owner = current_task(), owner
        self._rows: dict[Any, Tensor] = {}

    def at(self, path: str) -> Setting:
        """What holds at one layer; elsewhere than at the adapter's layers, whether it is on at all."""
        return self

    def stamped(self, task: int) -> Setting:
        """The same value, trusted in the backward `task`."""
        twin = object.__new__(type(self))
        for kind in type(self).__mro__[:-1]:
            for name in kind.__slots__:  # type: ignore[reportAttributeAccessIssue]
                setattr(twin, name, getattr(self, name))
        twin.task = task
        return twin

    def rows(self, x: Tensor, routed: bool, path: str) -> Tensor:
        """c for an activation x (*batch, d): broadcasts against it, in float32 or wider. Kept, as many layers see one shape."""
        assert isinstance(self.c, Tensor)
        if self.c.requires_grad or is_functorch(self.c):  # a kept graph could only be walked backward once
            return rows(self.c, x, routed, path)
        # what inference_mode made cannot be saved for a backward later
        key = (x.shape[:-1], x.device, x.dtype is torch.float64, routed, torch.is_inference_mode_enabled())
        if key not in self._rows:
            self._rows[key] = rows(self.c, x, routed, path)
        return self._rows[key]


_CELLS: dict[float, Tensor] = {}


def cell_of(c: float) -> Tensor:
    """c as a tensor for compiled graphs. Kept, since making one takes a fifth of entering a block; never written into."""
    cell = _CELLS.get(c)
    if cell is None:
        cell = torch.full((), c, dtype=torch.float64)
        if type(cell) is Tensor and not cell.is_inference() and len(_CELLS) < 4096:  # not one made while tracing
            _CELLS[c] = cell
    return cell


class Varied:
    """A c that is not one value (varied.py): it makes its own setting."""

    def setting(self, owner: object = None) -> Setting:
        raise NotImplementedError


def check_float(c: Any) -> float:
    if isinstance(c, bool) or not hasattr(c, "__float__"):
        hint = "; for one number per row write torch.tensor(c)" if isinstance(c, list | tuple) else ""
        if c in ("auto", "-auto"):
            hint = f"; {c!r} is understood by `with adapter(model, c=...)` and `adapter.c = ...`; adapter.c then tells the number"
        if isinstance(c, Mapping) or callable(c):
            hint = "; a c by layer or by position is for `with adapter(model, c=...)` and `adapter.c = ...`"
        raise TypeError(f"c must be a number or a tensor, got {type(c).__name__}{hint}")
    if getattr(c, "ndim", 0):
        raise TypeError(f"c must be a number or a tensor, got {type(c).__name__}; write torch.as_tensor(c)")
    if not math.isfinite(value := float(c)):
        raise ValueError(f"c must be finite, got {value}")
    return value


def check_tensor(c: Tensor) -> Tensor:
    if c.is_complex() or c.dtype is torch.bool:
        raise TypeError(f"c must be a real tensor, got one of {c.dtype}")
    if c.dim() > 2 or c.numel() == 0:
        hint = "; c.flatten() is one per row" if c.numel() and c.numel() == c.shape[0] else ""
        raise ValueError(f"c must be a scalar, one number per row (B,) or one per token (B, T); got shape {tuple(c.shape)}{hint}")
    if not is_functorch(c) and not bool(torch.isfinite(c.detach()).all()):
        raise ValueError(f"c must be finite, got {c.detach().flatten()[:8].tolist()}")
    return c if c.is_floating_point() else c.float()


def is_functorch(c: Tensor) -> bool:
    """Whether c is being transformed by vmap, grad or jvp: then its values cannot be looked at."""
    return torch._C._functorch.is_functorch_wrapped_tensor(c)  # pyright: ignore[reportAttributeAccessIssue]


def transforming() -> bool:
    """Whether torch.func is at work here (vmap, grad, jvp), in which functions with a backward of their own cannot take part."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


def rows(c: Tensor, x: Tensor, routed: bool, path: str) -> Tensor:
    """c () | (B,) | (B, T), spread over x (*batch, d) so that it broadcasts; rows repeat as beams do (repeat_interleave).

    Also where a model flattens (B, T, d) to (B*T, d) as OPT does, or pools to (B, d) as BERT's heads do: both are
    row-major, so consecutive entries belong to one row. Raises ValueError, with both shapes, where no reading is right.
    """
    c = c.to(device=x.device, dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    if c.numel() == 1:
        return c.reshape(())
    n, flat = c.shape[0], x.dim() == 2
    seen = f"c has shape {tuple(c.shape)}, the activation at {path} has {tuple(x.shape)}"
    if routed and flat:
        raise ValueError(f"{seen}: tokens are routed to experts here, so rows cannot be told apart; use a scalar c or exclude it")
    if x.dim() < 2 or x.shape[0] % n:
        raise ValueError(f"{seen}: the number of rows must be 1, or divide the activation's first size")
    if c.dim() == 1:
        return c.repeat_interleave(x.shape[0] // n, 0).view(-1, *[1] * (x.dim() - 1))
    if not flat and x.shape[1] == c.shape[1]:
        return c.repeat_interleave(x.shape[0] // n, 0).view(*x.shape[:2], *[1] * (x.dim() - 2))
    if flat and x.shape[0] == c.numel():  # exactly: more rows could be beams of a one-token step as well as more tokens
        return c.reshape(-1, 1)
    if c.shape[1] == 1:
        raise ValueError(f"{seen}: that is one number for each token of a forward of one token; for one per row give c[:, 0]")
    hint = "; while decoding from a cache a step holds one token: use one c per row there" if x.shape[-2] == 1 else ""
    raise ValueError(f"{seen}: a per-token c needs a full forward of exactly its {c.shape[1]} tokens{hint}")


class Slot:
    """Where compiled code finds c as a tensor: replaced or refilled, never mutated in place (autograd keeps the old one)."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Here(threading.local):
    """This thread's slot of one dial: the innermost open block's, or the resting one."""

    def __init__(self, resting: Slot) -> None:  # run again by each thread that looks
        self.slot = resting


class Dial:
    """The c of one adapter. Shared by its hooks; holds no model and no adapter, so copies of a layer stay small.

    A deepcopied or unpickled dial is another dial, at the same resting value.
    """

    kind: ClassVar[type[Any]] = Setting

    def __init__(self, c: Dose = 1.0, name: str = "default") -> None:
        self.name = name
        self.training = True
        self.moved = False
        self.rest = self.resolved(c)
        self._register()

    def resolved(self, c: Any, owner: object = None) -> Setting:
        """Checked once, here. Raises TypeError or ValueError for what cannot be a c."""
        return c.setting(owner) if isinstance(c, Varied) else self.kind(c, owner)

    def _register(self) -> None:
        self.key = next(_KEYS)
        self.places = self.calls = 0  # how often its hooks were put on or off, and called
        self.slot = Slot(self.rest.cell)
        self.here = _Here(self.slot)
        with _LOCK:
            _BY_KEY[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "training": self.training, "moved": self.moved, "c": self.rest.c}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.name, self.training, self.moved = state["name"], state["training"], state["moved"]
        self.rest = self.resolved(state["c"])
        self._register()

    def setting(self) -> Setting:
        stack = DIALS.get().get(self)
        return stack[-1] if stack else self.rest

    def turn(self, c: Dose) -> None:
        """Set c: this block's inside a `with`, the resting value outside."""
        held = DIALS.get()
        if stack := held.get(self):
            DIALS.set({**held, self: (*stack[:-1], self.resolved(c, stack[-1].owner))})
        else:
            self.settle(self.resolved(c))
        self.moved = True
        self.sync()

    def settle(self, setting: Setting) -> None:
        """Make this the resting value, whatever blocks are open."""
        self.rest, self.slot.tensor = setting, setting.cell

    def sync(self) -> None:
        """Let compiled code on this thread see what the context holds."""
        setting = self.setting()
        self.here.slot = self.slot if setting is self.rest else Slot(setting.cell)

    def stale(self, setting: Setting) -> None:
        """A setting from outside this backward was read inside it. Harmless if c never moved; otherwise a wrong gradient."""
        if setting.task == MOVED or (replaying.get() and setting is self.rest):  # replayed dials have settings of their own
            raise self.displaced()
        if self.moved:
            raise RuntimeError(
                f"adapter {self.name!r}: a forward is being recomputed during backward, and the c it ran with is not known "
                "(c was moved by `with adapter(c=...)` or `adapter.c = ...`). torch.utils.checkpoint carries c by itself; other "
                "recomputing functions must run their backward inside the same `with` block, opened in the backward"
            )

    def displaced(self) -> RuntimeError:
        return RuntimeError(
            f"adapter {self.name!r} was attached, detached or merged between a forward and its recomputation (gradient checkpointing), "
            "which would take other gradients than those of the forward: call backward() before, inside the same `with` block"
        )


DIALS: ContextVar[Mapping[Dial, tuple[Setting, ...]]] = ContextVar("lora_lite.dials", default={})  # noqa: B039 never mutated


class Block:
    """`with Block(dial, c):` c in force here. Blocks nest, and may end in any order: each takes away only its own value."""

    __slots__ = ("_entered", "c", "dial")

    def __init__(self, dial: Dial, c: Dose) -> None:
        self.dial, self.c = dial, c
        self._entered: list[object] = []

    def __enter__(self) -> Block:
        owner = object()
        dial, held = self.dial, DIALS.get()
        setting = dial.resolved(self.c, owner)
        DIALS.set({**held, dial: (*held.get(dial, ()), setting)})
        dial.here.slot = Slot(setting.cell)
        dial.moved = True
        self._entered.append(owner)
        return self

    def __exit__(self, *exception: object) -> None:
        owner, held = self._entered.pop(), dict(DIALS.get())
        stack = held.pop(self.dial, ())
        if stack and stack[-1].owner is owner:
            stack = stack[:-1]
        else:  # blocks may end in any order
            stack = tuple(s for s in stack if s.owner is not owner)
        if stack:
            held[self.dial] = stack
        DIALS.set(held)
        self.dial.sync()


def live() -> list[Dial]:
    with _LOCK:
        return list(_BY_KEY.values())


def by_key(key: int) -> Dial:
    return _BY_KEY[key]
