"""Which method, with which hyperparameters, on which layers? Plain frozen data, exact through JSON; never c."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import torch

ROLES = ("reader", "writer")
T = TypeVar("T")

# What a field is called here, for those who come from PEFT, and where that is said which is no field.
CALLED = {
    "lora_alpha": "alpha", "lora_dropout": "dropout", "module_dropout": "dropout", "rank": "r", "lora_r": "r", "lora_rank": "r",
    "target_modules": "targets", "exclude_modules": "exclude", "layers_to_transform": "layers", "use_rslora": "rslora",
    "oft_block_size": "block_size", "feedforward_modules": "feedforward",
}  # fmt: skip
SAID = {
    "modules_to_save": "train_also= of ll.attach",
    "bias": 'train_also=r"bias$" of ll.attach',
    "use_dora": "DoRAConfig",
    "init_lora_weights": "a config of its own, such as PiSSAConfig",
    "seed": "seed= of ll.attach",
    "name": "name= of ll.attach",
    "c": "c= of ll.attach, and `with adapter(model, c=...)`",
    **dict.fromkeys(("task_type", "inference_mode", "fan_in_fan_out", "peft_type"), "nothing: leave it out"),
}
MEANT = {
    "targets": '"all-linear" or regexes',
    "exclude": "regexes, such as ('lm_head',)",
    "layer_range": "two fractions, such as (0.2, 0.8)",
    "layers": "block indices, such as (2,)",
    "roles": f"among {ROLES}",
    "feedforward": "regexes, such as ('down_proj',)",
}


def check_config(config: Any) -> None:
    """Raise TypeError, with what to write, for what is no config: a class of them, a variant's name, an Adapter, a path, a dict."""
    if isinstance(config, AdapterConfig):
        return
    kind = getattr(config, "Config", config) if isinstance(config, type) else named(config)
    if isinstance(kind, type) and issubclass(kind, AdapterConfig):
        said = f"the class {config.__name__}" if isinstance(config, type) else repr(config)
        raise TypeError(
            f"expected a config, got {said}; write {kind.__name__}(), with what is not to be as usual: {kind.__name__}(targets=...)"
        )
    way = (
        "adapter.config is an Adapter's"
        if isinstance(getattr(config, "config", None), AdapterConfig)
        else "ll.load(model, path) reads files"
    )
    raise TypeError(f"expected a config such as LoRAConfig(), got {type(config).__name__}: {str(config)[:80]!r}; {way}")


def named(variant: Any) -> type[AdapterConfig] | None:
    """The config's class that has this variant's name."""
    kinds = [AdapterConfig]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind for kind in kinds if isinstance(variant, str) and variant and kind.variant == variant), None)


def misnamed(kind: type[AdapterConfig], names: Iterable[str]) -> str | None:
    """Which of these are no fields of a config, and what they are called; None where all are."""
    known = [f.name for f in dataclasses.fields(kind)]
    if not (unknown := sorted(set(names) - set(known))):
        return None
    here = [f"{n} is {CALLED[n]} here" for n in unknown if CALLED.get(n) in known] + [f"for {n}, {SAID[n]}" for n in unknown if n in SAID]
    return f"{kind.__name__} has no fields {unknown}{''.join(f'; {hint}' for hint in here)}; it has {sorted(known)}"


def as_tuple(value: Any, what: str) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except TypeError as error:
        raise ValueError(f"{what} must be {MEANT[what]}; got {value!r}") from error


@functools.lru_cache(2**16)
def regex(pattern: str) -> re.Pattern[str]:
    """Compiled once. re itself remembers 512, and an adapter with a rank of its own for every layer has more."""
    return re.compile(pattern)


@functools.lru_cache(2**16)
def literal(pattern: str) -> str | None:
    """The one text that a pattern matches, where it is `re.escape` of one."""
    plain = re.sub(r"\\(.)", r"\1", pattern)
    return plain if re.escape(plain) == pattern else None


@functools.lru_cache(2**16)
def whole(pattern: str) -> str | None:
    """The one text in which it is found, where it says ^ and $ of a literal one."""
    return literal(pattern[1:-1]) if pattern[:1] == "^" and pattern[-1:] == "$" else None


def found_in(pattern: str, name: str) -> bool:
    """Whether a regex is found in a full module name. Names in full, of which an adapter may have thousands, are compared."""
    return name == only if (only := whole(pattern)) is not None else regex(pattern).search(name) is not None


def as_patterns(value: str | Sequence[str], what: str) -> tuple[str, ...]:
    """The regexes in `value`, each one compiled once so that a bad one fails here and says where it was given."""
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        try:
            regex(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{what} holds {pattern!r}, which is not a regular expression: {error}") from error
    return patterns


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Where an adapter goes; each variant's config adds how. `LoRAConfig(r=16, layer_range=(0.2, 0.8))`.

    targets      "all-linear" (every linear but the output embedding, which needs a regex of its own and exclude=()), or one regex, or
                 several, searched in the full module name
    exclude      regexes that win over `targets`
    layer_range  (lo, hi) as fractions of the depth: block i of n is in when int(n*lo) <= i < int(n*hi)
    layers       block indices instead of a range
    roles        "reader" and/or "writer": by which side a linear touches the residual stream
    dtype        of the adapter's tensors; float32 trains, lower precision loses small updates

    Raises ValueError for what cannot be meant, when the config is made.
    """

    variant: ClassVar[str] = ""
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ("vision_tower", "lm_head")
    layer_range: Sequence[float] = (0.0, 1.0)
    layers: Sequence[int] | None = None
    roles: str | Sequence[str] | None = None
    dtype: torch.dtype = torch.float32

    def __new__(cls, *given: Any, **fields: Any) -> Self:
        """A dataclass says "unexpected keyword argument"; here a newcomer learns what the field is called."""
        if given:
            first = "r" if isinstance(given[0], int) and "r" in {f.name for f in dataclasses.fields(cls)} else "targets"
            raise TypeError(f"{cls.__name__} takes its fields by name, such as {cls.__name__}({first}={given[0]!r})")
        if wrong := misnamed(cls, fields):
            raise TypeError(wrong)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("exclude", "layer_range", "layers", "roles"):  # JSON and users bring lists (or a lone string)
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            object.__setattr__(self, name, as_tuple(value, name) if value is not None else None)
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", as_tuple(self.targets, "targets"))
        if not self.targets:
            raise ValueError('targets is empty; give "all-linear" or regexes')
        as_patterns(self.targets, "targets")
        as_patterns(self.exclude, "exclude")
        self._check_band()
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating torch.dtype, got {self.dtype!r}")

    def _check_band(self) -> None:
        if len(self.layer_range) != 2 or not all(isinstance(v, int | float) for v in self.layer_range):
            raise ValueError(f"layer_range must be two fractions (lo, hi), got {self.layer_range!r}")
        lo, hi = self.layer_range
        if not 0.0 <= lo < hi <= 1.0:
            raise ValueError(f"layer_range must satisfy 0 <= lo < hi <= 1, got {self.layer_range!r}")
        if self.layers is not None:
            if self.layer_range != (0.0, 1.0):
                raise ValueError(f"give layers={self.layers!r} or layer_range={self.layer_range!r}, not both")
            bad = [i for i in self.layers if not isinstance(i, int) or isinstance(i, bool) or i < 0]
            if bad or not self.layers:
                raise ValueError(f"layers must be block indices from 0, got {self.layers!r}")
        unknown = [r for r in self.roles or () if r not in ROLES]
        if unknown or self.roles == ():
            raise ValueError(f"roles {self.roles!r} are not among {ROLES}")

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        """The config that holds at one layer; patterns and clamps are resolved here and nowhere else."""
        return self

    def patterns(self) -> dict[str, Mapping[str, Any]]:
        """The per-layer tables by field name; `find_targets` refuses keys that match no target."""
        return {}

    def searched(self) -> dict[str, Sequence[str]]:
        """Further regexes by field name, searched in full module names as `targets` are; `find_targets` refuses idle ones."""
        return {}

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The config where layers go by other names (old -> new), for methods that keep a table by exact name."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON can hold it, with the variant's name first."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"variant": self.variant} | fields | {"dtype": str(self.dtype).removeprefix("torch.")}

    def chosen(self) -> dict[str, Any]:
        """The fields that are not at their defaults: what there is to say of it in a sentence."""
        defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in dataclasses.fields(self)}
        return {name: value for name, default in defaults.items() if (value := getattr(self, name)) != default}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises ValueError naming unknown fields, or a config of another variant."""
        values = dict(values)
        variant = values.pop("variant", cls.variant)
        if variant != cls.variant:
            raise ValueError(f"this is a config of variant {variant!r}, not {cls.variant!r}")
        if wrong := misnamed(cls, values):
            raise ValueError(wrong)
        if isinstance(values.get("dtype"), str):
            values["dtype"] = getattr(torch, values["dtype"], values["dtype"])
        return cls(**values)


def match_pattern(table: Mapping[str, T], target: str, default: T) -> T:
    """The first entry whose key matches the end of the module path, from a dot on (PEFT's rule): "q_proj", "layers\\.1\\..*"."""
    return next((value for key, value in table.items() if ends_in(key, target)), default)


def ends_in(pattern: str, name: str) -> bool:
    """Whether a regex matches the end of a module path, from a dot on."""
    if (end := literal(pattern)) is not None:
        return name == end or name.endswith(f".{end}")
    return regex(rf"^(.*\.)?({pattern})$").match(name) is not None


@dataclass(frozen=True, kw_only=True)
class RankConfig(AdapterConfig):
    """r, and rank_pattern: a regex on the end of a module path to that layer's own r, the first match wins."""

    r: int = 16
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, r in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
                raise ValueError(f"{what} must be a positive whole number, got {r!r}")
        as_patterns(tuple(self.rank_pattern), "rank_pattern")

    def at(self, target: str, d_in: int, d_out: int) -> Self:
        own = self.said_of(target)
        return dataclasses.replace(self, **own) if own else self

    def said_of(self, target: str) -> dict[str, Any]:
        """What the patterns say of one layer, in place of the patterns."""
        return {"r": match_pattern(self.rank_pattern, target, self.r), "rank_pattern": {}} if self.rank_pattern else {}

    def patterns(self) -> dict[str, Mapping[str, Any]]:
        return {"rank_pattern": self.rank_pattern}

    def ranks(self) -> list[int]:
        return [self.r, *self.rank_pattern.values()]

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Keys that are a layer's full name (EVA's and a history's are) follow it; others speak of the end of a path as they did."""
        exact = {re.escape(old): re.escape(new) for old, new in names.items() if old != new}
        tables = {name: {exact.get(key, key): v for key, v in table.items()} for name, table in self.patterns().items()}
        return dataclasses.replace(self, **tables) if tables != self.patterns() else self


@dataclass(frozen=True, kw_only=True)
class RankDropoutConfig(RankConfig):
    """Also dropout on the input of the update, in training only."""

    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")


@dataclass(frozen=True, kw_only=True)
class RankedConfig(RankDropoutConfig):
    """What most low-rank methods share: also alpha (the scale is alpha/r), and alpha_pattern, its exceptions per layer.

    rank_pattern and alpha_pattern match as in PEFT. A rank without an alpha of its own changes the scale.
    rslora=True scales by alpha/sqrt(r) instead (rsLoRA, arXiv:2312.03732).
    """

    alpha: float = 32.0
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, alpha in {"alpha": self.alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}.items():
            if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
                raise ValueError(f"{what} must be a finite number, got {alpha!r}")
        as_patterns(tuple(self.alpha_pattern), "alpha_pattern")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def said_of(self, target: str) -> dict[str, Any]:
        alpha = {"alpha": match_pattern(self.alpha_pattern, target, self.alpha), "alpha_pattern": {}} if self.alpha_pattern else {}
        return super().said_of(target) | alpha

    def patterns(self) -> dict[str, Mapping[str, Any]]:
        return super().patterns() | {"alpha_pattern": self.alpha_pattern}

    def alphas(self) -> list[float]:
        return [self.alpha, *self.alpha_pattern.values()]
