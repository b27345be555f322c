"""What must a method declare to become an adapter? The contract, and the registry of the methods that keep it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Generator, Tensor

from lora_lite.config import AdapterConfig, check_config
from lora_lite.lowrank import LowRank

Initializer = Callable[[tuple[int, ...], Generator | None], Tensor]


def zeros(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    return torch.ones(shape)


def kaiming(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Kaiming uniform with a = sqrt 5, as nn.Linear and LoRA's A: uniform within 1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


NAMED: dict[str, Initializer] = {"zeros": zeros, "ones": ones, "kaiming": kaiming}


class ParamSpec:
    """One tensor a variant puts on each target: `ParamSpec((r, d_in), init="kaiming", trainable=True)`.

    init is "zeros", "ones", "kaiming" or a callable (shape, generator) -> tensor. Frozen tensors become Parameters with
    requires_grad=False: they move with the model and are saved, but are not trained.
    """

    def __init__(self, shape: tuple[int, ...], init: str | Initializer = "zeros", trainable: bool = True) -> None:
        if isinstance(init, str) and init not in NAMED:
            raise ValueError(f"init {init!r} is not one of {sorted(NAMED)}; pass a callable (shape, generator) -> tensor")
        self.shape, self.trainable = tuple(shape), trainable
        self.init: Initializer = NAMED[init] if isinstance(init, str) else init

    def __repr__(self) -> str:
        return f"ParamSpec({self.shape}, {getattr(self.init, '__name__', self.init)}, trainable={self.trainable})"


class Base(NamedTuple):
    """What a variant may know of the linear it sits on: sizes always, the dense weight and bias when it declares a need."""

    d_in: int
    d_out: int
    weight: Tensor | None = None
    bias: Tensor | None = None


@runtime_checkable
class Observer(Protocol):
    """Streamed statistics of one target's input; memory must not grow with the number of tokens."""

    def update(self, x: Tensor, group: str) -> None:
        """Take in x (n, d_in) of a group: "cho", "rej", or "all" when the data has no poles."""
        ...


@runtime_checkable
class GradientObserver(Protocol):
    """The same for a variant that reads gradients: `observes = "gradients"`."""

    def update(self, x: Tensor, gradient: Tensor) -> None:
        """Take in the inputs x (n, d_in) of one batch, and the loss's gradient at the linear's outputs (n, d_out)."""
        ...


class Group(NamedTuple):
    """What `group_init` settled for all layers together: the config to go on with (ranks per layer in its rank_pattern), and
    tensors by target and field. One tensor object given to several targets becomes one Parameter that they share."""

    config: AdapterConfig
    tensors: Mapping[str, Mapping[str, Tensor]] = {}
    notes: Mapping[str, float] = {}


class Initial(NamedTuple):
    """What `init` found: the tensors it sets, and numbers worth keeping about how it chose them (averaged over targets)."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, float] = {}


class Identity(NamedTuple):
    """How near to the base a fresh adapter is: bitwise, within a relative error, or not at all, with the reason."""

    kind: Literal["bitwise", "close", "none"]
    reason: str = ""


BITWISE = Identity("bitwise")
Params = Mapping[str, Tensor]


class Variant:
    """The maths of one method: tensors and config in, an update out. Never instantiated; every method is static.

    form          "low-rank": `factors` says it all. "output": y + delta. "input": x + delta, before the linear. "either": one of
                  the last two, layer by layer, as `form_at(cfg)` says
    reads_weight  "never", "init" or "step": when `base.weight` is given; otherwise it is None
    calibration   "no", "optional" or "required": whether `observe` is fed before `init`
    observes      what its observers are fed: "inputs" of the layer, or "gradients" of a loss as well
    shares_observers  whether layers that read one tensor (q, k and v do) share one observer; it may not depend on the layer then
    schedule      whether training must call `adapter.on_step(step)` and add `adapter.aux_loss()`; harmless for the others
    identity      how near to the base a fresh adapter is; `identity_of(cfg)` where that is a matter of the config
    chooses_directions  whether `observe` leaves out the directions given by `exclude_directions`
    needs_shared  whether its frozen tensors come from a subspace: `attach(..., shared=sub)`
    linear_in_c   whether one layer's change is c times its change at c = 1
    row_c         whether c may differ between the rows of a batch
    why_not       the reason of each "no" among linear_in_c and row_c
    paper         arXiv id
    parameters    how many numbers train per layer, as a formula in d_in, d_out and the config's fields
    narrows       form "low-rank": whether `narrowed` says the same for less time or memory than the products with `factors`
    exact_low_rank  for other forms than "low-rank": whether `low_rank_at` says the same exactly, "given weight" or "by itself"
    """

    name: ClassVar[str]
    Config: ClassVar[type[AdapterConfig]]
    paper: ClassVar[str] = ""
    form: ClassVar[Literal["low-rank", "output", "input", "either"]] = "low-rank"
    reads_weight: ClassVar[Literal["never", "init", "step"]] = "never"
    calibration: ClassVar[Literal["no", "optional", "required"]] = "no"
    observes: ClassVar[Literal["inputs", "gradients"]] = "inputs"
    shares_observers: ClassVar[bool] = False
    schedule: ClassVar[bool] = False
    identity: ClassVar[Identity] = BITWISE
    chooses_directions: ClassVar[bool] = False
    needs_shared: ClassVar[bool] = False
    linear_in_c: ClassVar[bool] = True
    row_c: ClassVar[bool] = True
    why_not: ClassVar[Mapping[str, str]] = {}
    parameters: ClassVar[str] = ""
    narrows: ClassVar[bool] = False
    exact_low_rank: ClassVar[Literal["no", "given weight", "by itself"]] = "no"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ParamSpec]:
        """Every tensor by its name on the layer ("lora_A"): shape, initialiser, trainable or frozen."""
        raise NotImplementedError

    @classmethod
    def form_at(cls, cfg: Any) -> Literal["low-rank", "output", "input"]:
        """The form at one layer, whose own config this is (`config.at`); defined where `form` is "either"."""
        assert cls.form != "either"  # `register` has seen to that
        return cls.form

    @classmethod
    def identity_of(cls, cfg: Any) -> Identity:
        """How near to the base a fresh adapter of this config is."""
        return cls.identity

    @staticmethod
    def needs_calibration(cfg: Any) -> bool:
        """Whether this config cannot be initialised without calibration data."""
        return False

    @staticmethod
    def observe(cfg: Any, base: Base, exclude: Tensor | None) -> Observer | GradientObserver | None:
        """An observer of this target, made before `init` and handed to it; `exclude` (n, d_in) holds directions in use.

        cfg is the target's own, or the whole adapter's where observers are shared: they serve several targets then.
        """
        return None

    @staticmethod
    def group_init(cfg: Any, sizes: Mapping[str, tuple[int, int]], observed: Mapping[str, Any]) -> Group:
        """What is settled for all layers together, before any `init`: ranks by layer, shared tensors.

        sizes (d_in, d_out) and observers by target, in the model's order; no observers where there was no calibration.
        """
        return Group(cfg)

    @staticmethod
    def init(cfg: Any, base: Base, observed: Any, generator: Generator | None) -> Initial:
        """Values that depend on the weight or on what was observed; tensors not named keep their spec's initialiser."""
        return Initial({})

    @staticmethod
    def check(cfg: Any, notes: Mapping[str, float]) -> str | None:
        """A sentence to warn with, after all targets have been initialised; None when all is well."""
        return None

    @staticmethod
    def factors(cfg: Any, p: Params, base: Base) -> LowRank:
        """form "low-rank": the update at c = 1. The runtime casts it, applies c, merges, bakes and exports it."""
        raise NotImplementedError

    @staticmethod
    def narrowed(cfg: Any, p: Params, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`narrows`: h (*batch, r) in x's dtype, B (d_out, r) and a gate (d_out,) or None; the update of x is gate * (B h)."""
        raise NotImplementedError

    @classmethod
    def low_rank_at(cls, cfg: Any, p: Params, base: Base, c: float = 1.0) -> LowRank:
        """exact_low_rank: the update at c as a low-rank sum; "given weight" with `base.weight` given, "by itself" without."""
        raise NotImplementedError

    @staticmethod
    def directions(p: Params) -> Tensor | None:
        """Other forms: the input directions it uses (n, d_in), for later rounds to leave out; None where it has none of its own."""
        return None

    @staticmethod
    def prepare(cfg: Any, p: Params, base: Base, c: float | Tensor) -> Params:
        """Other forms: what `delta` needs. Given and computed in float32 at least; the runtime casts the result to x's dtype.

        Takes c for methods it enters nonlinearly (a rotation by c·theta): a float, or (*batch, 1) to broadcast against x.
        """
        return p

    @staticmethod
    def delta(cfg: Any, p: Params, x: Tensor, y: Tensor | None, base: Base, c: float | Tensor) -> Tensor:
        """Other forms: what is added to y (form "output") or to x (form "input", y is None).

        x (*batch, d_in), y (*batch, d_out), c a float or a tensor that broadcasts against them, one number per row or token.
        """
        raise NotImplementedError

    @staticmethod
    def on_step(cfg: Any, step: int, layers: Mapping[str, Params]) -> None:
        """`adapter.on_step(step)`: after an optimizer's step, before its zero_grad. May change every layer's tensors in place.

        Runs without gradients. What it must remember it keeps in frozen tensors of `param_specs`, so that files and resumed
        runs have it; `layers` holds the Parameters by target and field, with their `.grad`.
        """

    @staticmethod
    def aux_loss(cfg: Any, layers: Mapping[str, Params]) -> Tensor:
        """`adapter.aux_loss()`: a scalar to add to the task's loss; zero for methods without one."""
        return torch.zeros(())

    @classmethod
    def added(cls, cfg: Any, p: Params, x: Tensor, y: Tensor | None, base: Base, c: float | Tensor) -> Tensor:
        """Other forms: y + delta (form "input": x + delta). Defined instead of `delta` where one kernel does both; no dropout then."""
        onto = x if y is None else y
        return onto + cls.delta(cfg, p, x, y, base, c).to(onto.dtype)


REGISTRY: dict[str, type[Variant]] = {}
V = TypeVar("V", bound=type[Variant])
CHANGES = ("delta", "added")
FORMS: Mapping[str, tuple[tuple[str, ...], ...]] = {  # of each group one method must be defined
    "low-rank": (("factors",),),
    "output": (CHANGES,),
    "input": (CHANGES,),
    "either": (CHANGES, ("form_at",)),
}


def register(cls: V) -> V:
    """Class decorator: put a variant in the registry under its name. Refuses a class that breaks the contract.

    Registering the same file again (reached by another module path) keeps the first class and is harmless.
    """
    if not isinstance(cls, type) or not issubclass(cls, Variant):
        hint = "; its config goes into it, as `Config`" if isinstance(cls, type) and issubclass(cls, AdapterConfig) else ""
        raise TypeError(f"register takes a subclass of Variant, got {cls!r}{hint}")
    known = REGISTRY.get(cls.name)
    if known is not None and (known.__qualname__ != cls.__qualname__ or not _same_file(known, cls)):
        raise ValueError(f"variant {cls.name!r} is already registered by {known.__module__}.{known.__qualname__}")
    if cls.form not in FORMS:
        raise TypeError(f"variant {cls.name!r} has form {cls.form!r}, not one of {sorted(FORMS)}")
    for methods in (("param_specs",), *FORMS[cls.form]):
        if not any(inspect.getattr_static(cls, m) is not inspect.getattr_static(Variant, m) for m in methods):
            raise TypeError(f"variant {cls.name!r} of form {cls.form!r} must define {'() or '.join(methods)}()")
    if not issubclass(cls.Config, AdapterConfig) or cls.Config.variant != cls.name:
        raise TypeError(f"variant {cls.name!r} needs a Config, a subclass of AdapterConfig whose `variant` is {cls.name!r}")
    REGISTRY.setdefault(cls.name, cls)
    return cls


def _same_file(a: type, b: type) -> bool:
    try:
        return inspect.getfile(a) == inspect.getfile(b) or _real(a) == _real(b)
    except (TypeError, OSError):  # defined in a notebook or a shell: there is no file, so the name decides
        return a.__module__ == b.__module__


def _real(cls: type) -> str:
    import os

    return os.path.realpath(inspect.getfile(cls))


def variant_of(config: AdapterConfig) -> type[Variant]:
    """The registered variant a config belongs to. Raises KeyError naming what is registered."""
    check_config(config)
    if not config.variant:
        raise TypeError(f"{type(config).__name__} says where an adapter goes and not which; give a method's own, such as LoRAConfig(...)")
    if config.variant not in REGISTRY:
        raise KeyError(f"variant {config.variant!r} is not registered; registered: {sorted(REGISTRY)}")
    return REGISTRY[config.variant]


def config_from_dict(values: Mapping[str, Any]) -> AdapterConfig:
    """The config that `to_dict` wrote, of whichever variant. Raises KeyError for an unknown one."""
    name = values.get("variant")
    if name not in REGISTRY:
        raise KeyError(f"variant {name!r} is not registered; registered: {sorted(REGISTRY)}")
    return REGISTRY[name].Config.from_dict(values)
