"""What does a user hold? An Adapter is a value (config and tensors); attachment is an event; c is a dial."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn import Parameter

from lora_lite import checkpoint, fitting, merge
from lora_lite.attachment import (
    Shared,
    all_hooks,
    check_layers,
    fresh_parameter,
    ledger_of,
    lift,
    refuse_merged,
    targets_by_name,
    unwrapped,
)
from lora_lite.baked import Baked
from lora_lite.base import fingerprint
from lora_lite.config import AdapterConfig
from lora_lite.dial import Block, Coefficient, Dial, Setting, check_float
from lora_lite.hooks import Hook
from lora_lite.lowrank import LowRank
from lora_lite.placement import Placement, put
from lora_lite.variant import Base, Params, ParamSpec, Variant, variant_of
from lora_lite.varied import Schedule, by_layer, limit, scheduled

Path = str | os.PathLike[str]
CValue = Coefficient | str | Mapping[str, Coefficient] | Schedule
WIDTHS = ("r", "block_size", "group_size")
_HANDLES: weakref.WeakKeyDictionary[Shared, weakref.ref[Adapter]] = weakref.WeakKeyDictionary()


class Adapter:
    """A method's tensors for some layers of some model. Made by `ll.attach` and `ll.load`.

        with adapter(model, c=-1.5): model.generate(**inputs)      # up, down, off or negative, for this block

    Attached, its tensors are Parameters on the layers; detached, it keeps them: it can be saved, inspected, baked into a
    history, or put back with `ll.attach(model, adapter)`. It serves one model at a time. Copying or pickling it gives a
    detached adapter with tensors of its own.
    """

    def __init__(
        self,
        config: AdapterConfig,
        tensors: Mapping[str, Mapping[str, Tensor]],
        layer_sizes: Mapping[str, tuple[int, int]],
        *,
        name: str = "default",
        also: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, str] | None = None,
        fingerprint: dict[str, Any] | None = None,
        diagnostics: Mapping[str, float] | None = None,
        calibrated: Mapping[str, Any] | None = None,
        c: CValue = 1.0,
    ) -> None:
        self.config, self.name = config, check_name(name)
        self.metadata, self.diagnostics = dict(metadata or {}), dict(diagnostics or {})
        self._calibrated = dict(calibrated or {})
        self.fingerprint = fingerprint
        self._sizes = dict(layer_sizes)
        self._dial = Dial(self._resting(c), name)
        self._specs = {t: self.variant.param_specs(*size, config.at(t, *size)) for t, size in self._sizes.items()}
        self._held = as_parameters(tensors, self._specs)
        self._also = {n: v if isinstance(v, Parameter) else Parameter(v.detach().clone()) for n, v in (also or {}).items()}
        self._at: Placement | None = None
        self._merged: merge.Merged | None = None

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def variant(self) -> type[Variant]:
        return variant_of(self.config)

    @property
    def targets(self) -> list[str]:
        """Full module names of the adapted layers."""
        return list(self._sizes)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of each adapted layer."""
        return dict(self._sizes)

    @property
    def is_merged(self) -> bool:
        """Whether it acts from inside the weights, by `merge`."""
        return self._merged is not None

    @property
    def attached(self) -> bool:
        """Whether it acts on a model now, by its hooks or merged into the weights."""
        return self._at is not None

    @property
    def model(self) -> nn.Module | None:
        """The model it is attached to, or None."""
        return None if self._at is None else self._at.model

    def tensors(self) -> dict[str, dict[str, Parameter]]:
        """Its tensors by target and field, as they are now: {"model.layers.0.self_attn.q_proj": {"lora_A": ...}}."""
        if self._at is None or self._merged is not None:
            return {t: dict(fields) for t, fields in self._held.items()}
        return self._at.tensors()

    def also(self) -> dict[str, Parameter]:
        """The parameters it trains beside its own (`train_also`), by full name."""
        if self._at is None or self._merged is not None:
            return dict(self._also)
        return self._at.also()

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The trainable tensors under the names they have on the model: "model.layers.0.self_attn.q_proj.lora_A"."""
        suffix = "" if self.name == "default" else f"__{self.name}"
        for target, fields in self.tensors().items():
            for field, p in fields.items():
                if self._specs[target][field].trainable:
                    yield f"{target}.{field}{suffix}", p
        yield from self.also().items()

    def parameters(self) -> Iterator[Parameter]:
        """The trainable tensors, for an optimizer: `AdamW(adapter.parameters(), lr=1e-4)`."""
        return (p for _, p in self.named_parameters())

    def num_parameters(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor, frozen ones too, under the names of the file (free of the adapter's name); shares memory."""
        own = {f"{t}.{f}": p.detach() for t, fields in self.tensors().items() for f, p in fields.items()}
        return own | {name: p.detach() for name, p in self.also().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Adapter:
        """The inverse of `state_dict`, in place: an optimizer goes on. `adapter.load_state_dict(torch.load("run.pt")["adapter"])`

        All, or nothing: raises CheckpointError naming what is missing, unexpected, of another shape or not finite.
        """
        self._refuse_merged("load into it")
        if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
            raise TypeError(f"load_state_dict takes names and tensors, as state_dict() gives them; got {type(state).__name__}")
        own = self.state_dict()
        problems = [
            *checkpoint.problem("missing", [n for n in own if n not in state]),
            *checkpoint.problem("unexpected", [n for n in state if n not in own]),
            *checkpoint.problem("of another shape", [n for n, v in state.items() if n in own and v.shape != own[n].shape]),
            *checkpoint.problem("holding NaN or infinity", checkpoint.non_finite(state)),
        ]
        if problems:
            raise checkpoint.CheckpointError(f"nothing loaded into adapter {self.name!r}: {'; '.join(problems)}")
        for name, p in own.items():
            p.copy_(state[name])
        self.calibrated = {}
        return self

    def factors(self, c: float = 1.0) -> dict[str, LowRank]:
        """The exact weight update at c, by target. Raises TypeError naming the variant where its tensors alone give no low-rank sum."""
        if self.variant.form != "low-rank" and self.variant.exact_low_rank != "by itself":
            raise TypeError(
                f"variant {self.variant.name!r} (form {self.variant.form!r}) has no low-rank factors; adapter.merged(c) has its effect"
            )
        tensors, c = self.tensors(), check_float(c)
        return {t: self._update(t, tensors[t], c) for t in self.targets}

    def _update(self, target: str, p: Params, c: float) -> LowRank:
        size = self._sizes[target]
        cfg, base = self.config.at(target, *size), Base(*size)
        with merge.precisely(next(iter(p.values()))):
            if self.variant.form == "low-rank":
                return self.variant.factors(cfg, p, base).scaled(c)
            return self.variant.low_rank_at(cfg, p, base, c)

    def __repr__(self) -> str:
        c = self._dial.setting().c
        where = f"merged at c={self._merged.c}" if self._merged is not None else f"attached, c={c}" if self.attached else "detached"
        gone = [] if self._at is None else self._at.gone()
        where += f", but {len(gone)} of these layers are no longer in the model, such as {gone[0]}" if gone else ""
        what = " ".join([self.variant.name, *widths(self.config, self._sizes)])
        return f"Adapter({self.name!r}: {what} on {len(self._sizes)} targets, {self.num_parameters():,} trainable, {where})"

    def print_trainable_parameters(self) -> None:
        """One line: trainable, all, and their ratio, counting the model it is attached to."""
        trained = self.num_parameters()
        everything = sum(p.numel() for p in (self.state_dict().values() if self._at is None else self._at.model.parameters()))
        print(f"trainable params: {trained:,} || all params: {everything:,} || trainable%: {100 * trained / max(1, everything):.4f}")

    # -- training ---------------------------------------------------------------------------------------------------

    def requires_grad_(self, flag: bool = True) -> Adapter:
        """Let its trainable tensors train, or not; frozen ones stay frozen."""
        for p in self.parameters():
            p.requires_grad_(flag)
        return self

    def train(self, mode: bool = True) -> Adapter:
        """Dropout as the layer's own mode says (True), or off whatever the model's mode is (False)."""
        self._dial.training = mode
        return self

    def eval(self) -> Adapter:
        return self.train(False)

    def on_step(self, step: int) -> None:
        """`optimizer.step(); adapter.on_step(step); optimizer.zero_grad()`: what a method does between steps, counted from 1.

        AdaLoRA moves its ranks here; the other variants do nothing. The state of a schedule lies in frozen tensors of the
        adapter: in `state_dict()` and in files, so a resumed run goes on as it would have.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"step is a count of optimizer steps, from 1 (or 0, where only sensitivities are taken), got {step!r}")
        if self._at is not None:
            self._at.check(refuse)
        with torch.no_grad():
            self.variant.on_step(self.config, step, self.tensors())

    def aux_loss(self) -> Tensor:
        """`loss = loss + adapter.aux_loss()`: the method's own term, a scalar (AdaLoRA's orthogonality); 0 for the others."""
        return self.variant.aux_loss(self.config, self.tensors())

    # -- c ----------------------------------------------------------------------------------------------------------

    @property
    def c(self) -> Any:
        """The c in force here: the innermost open block's in this context, else the resting value."""
        return self._dial.setting().c

    @c.setter
    def c(self, c: CValue) -> None:
        self._refuse_merged("set c")
        if self._at is not None and not self._at.looks_intact():
            self._at.check(refuse)
        self._dial.turn(self._resting(c))

    def set_coeff(self, c: CValue) -> None:
        """`adapter.c = c`."""
        self.c = c

    @property
    def calibrated(self) -> dict[str, Any]:
        """How far c can go, as `ll.calibrate_c` found it and the file keeps it; empty where it was not asked. c="auto" reads it."""
        return self._calibrated

    @calibrated.setter
    def calibrated(self, found: Mapping[str, Any]) -> None:
        self._calibrated.clear()
        self._calibrated.update(found)

    def _meant(self, c: CValue) -> Any:
        """A number or a tensor as it is; "auto" and "-auto" by what was calibrated; a mapping as the c of each target."""
        if isinstance(c, str):
            return limit(self.name, self._calibrated, c)
        return by_layer(c, self._sizes) if isinstance(c, Mapping) else c

    def _resting(self, c: CValue) -> Any:
        if callable(c) and not isinstance(c, Tensor):
            raise TypeError(f"adapter {self.name!r} cannot rest at a schedule; it holds for a block: with adapter(model, c=schedule)")
        return self._meant(c)

    def __call__(self, model: nn.Module | None = None, c: CValue = 1.0) -> AbstractContextManager[Any]:
        """`with adapter(model, c=-1.5):` c in force for the block, in this context only; attached for the block if it is not.

        c is a number, () or (B,) one per row, or (B, T) one per token of a full forward (a tensor is looked at when it is set:
        give a new one, do not write into it);
        "auto" or "-auto", the largest c that `ll.calibrate_c` found coherent on either side;
        a mapping, by layer: {r"layers\\.3\\.": 2.0, "": 1.0}, regexes searched in the target's name, the first one found wins;
        a schedule, by position: lambda position: 1.5 * (position >= 10), given whole numbers (B, T), the text's first token 0.
        Under a schedule cached keys and values stay as the c of their own token made them. Mappings and schedules run
        uncompiled. Blocks nest: the inner c replaces the outer one and returns. Raises ValueError for another model than
        the one it is attached to.
        """
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"the first argument is the model; write adapter(c={model!r})")
        at = self._at
        if at is None:
            return self._visit(model, c)
        if model is not None and model is not at.model and not any(m is at.model for m in model.modules()):
            raise ValueError(
                f"adapter {self.name!r} is attached to another {type(at.model).__name__} than the {type(model).__name__} given; "
                "a copy of a model carries its own adapters: ll.adapters(copy)"
            )
        self._refuse_merged("change c")
        if not at.looks_intact():
            at.check(refuse)
        return self._block(c)

    def _block(self, c: CValue) -> AbstractContextManager[Any]:
        if type(c) is float:  # most of all, and each other question costs a fraction of a microsecond
            return Block(self._dial, c)
        if callable(c) and not isinstance(c, Tensor):
            assert self._at is not None
            return scheduled(self._at.model, self._dial, c)
        return Block(self._dial, self._meant(c))

    @contextmanager
    def _visit(self, model: nn.Module | None, c: CValue) -> Iterator[None]:
        if model is None:
            raise ValueError(f"adapter {self.name!r} is not attached; say to which model: adapter(model, c=...)")
        self.put_on(model)
        try:
            with self._block(c):
                yield
        finally:
            self.detach()

    # -- on and off a model -----------------------------------------------------------------------------------------

    def put_on(self, model: nn.Module, name: str | None = None, c: Coefficient | None = None, known_base: bool = False) -> Adapter:
        """`ll.attach(model, adapter)`: a detached adapter onto a model that has its layers. All or nothing.

        Raises ValueError for another base than the one it was made on (known_base: that has been looked at).
        """
        model = unwrapped(model)
        if self.attached:
            raise RuntimeError(
                f"adapter {self.name!r} is attached already; one adapter serves one model at a time: detach() it, or copy.deepcopy it"
            )
        targets, previous = targets_by_name(model, self._sizes), (self.name, self._dial.rest)
        try:
            self.name = self._dial.name = check_name(self.name if name is None else name)
            check_layers(model, self.name, targets, self.variant, self._specs)
            if not known_base and self.fingerprint is not None:
                now = fingerprint(model, {t.name: t.module for t in targets})
                fitting.check_base(
                    f"adapter {self.name!r}", self.fingerprint, now, True, "adapter.put_on(model, known_base=True) lets it pass"
                )
            if c is not None:
                self._dial.settle(Setting(c))
            shared = Shared(self.name, self.config, ledger_of(model), self._dial, self.metadata, self.fingerprint, self.diagnostics,
                            self._calibrated)  # fmt: skip
            self._adopt(put(model, shared, targets, self._held, self._also))
            self._held, self._also = {}, {}
        except BaseException:
            self.name = self._dial.name = previous[0]
            self._dial.settle(previous[1])
            raise
        logger.debug("attached {}", self)
        if not self._dial.rest.off:
            say_twice(self, [hook.shared for _, _, hook in all_hooks(model) if isinstance(hook.shared, Baked)])
        return self

    def _adopt(self, at: Placement) -> None:
        self._at = at
        _HANDLES[at.shared] = weakref.ref(self)

    def detach(self) -> None:
        """Take it off: the model is as it was before, bit for bit; the adapter keeps its tensors. Twice is harmless."""
        if self._merged is not None:
            self.unmerge()
        if self._at is None:
            return
        self._at.check(logger.warning)
        held = lift(self._at.model, self._at.shared, self._at.layers)
        self._also = held.pop("", {})
        self._held = {t: held[t] for t in self._sizes if t in held}
        self._at = None

    def _refuse_merged(self, what: str) -> None:
        if self._merged is not None:
            raise RuntimeError(f"adapter {self.name!r} is merged into the weights: cannot {what}; unmerge() first")

    # -- merging ----------------------------------------------------------------------------------------------------

    def merge(self, c: float = 1.0) -> Adapter:
        """Fold it into the weights at c: no hooks, no overhead, a plain model to run or ship. `unmerge()` takes it out.

        The layers are lent new Parameters (their own are kept aside: memory for one more copy of the adapted weights).
        Raises TypeError for quantised layers and for a tensor c, RuntimeError beside other adapters it does not commute with.
        """
        if (at := self._at) is None:
            raise RuntimeError(f"adapter {self.name!r} is not attached; ll.attach(model, adapter) first")
        self._refuse_merged("merge it again")
        refuse_merged(ledger_of(at.model))
        at.check(refuse)
        others = [hook for _, _, hook in all_hooks(at.model) if hook.shared is not at.shared]
        merged = merge.Merged({t: (layer, at.hook(t)) for t, layer in at.layers.items()}, others, c)
        self._held, self._also = self.tensors(), self.also()
        merged.swap_in()
        self._merged = merged
        at.shared.ledger.merged[self.name] = self
        return self

    def unmerge(self) -> Adapter:
        """Put the layers' own Parameters and the hooks back."""
        if self._merged is not None:
            self._merged.swap_out(self._held)
            self._merged, self._held, self._also = None, {}, {}
            assert self._at is not None
            self._at.shared.ledger.merged.pop(self.name, None)
        return self

    @contextmanager
    def merged(self, c: float = 1.0) -> Iterator[Adapter]:
        """`with adapter.merged(c=0.7): model.generate(...)`: merged for the block, restored exactly, also after an exception.

        At this c, whatever block of the adapter's is open around it; as for `merge`, one number."""
        self.merge(c)
        try:
            yield self
        finally:
            self.unmerge()

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file (docs/format.md), atomically. Raises ValueError for non-finite tensors or reserved keys."""
        path = checkpoint.as_path(path, "adapter.save(path, metadata={...})")
        if self._at is not None:
            self._at.check(refuse)
        tensors = {t: {f: p.detach() for f, p in fields.items()} for t, fields in self.tensors().items()}
        also = {n: p.detach() for n, p in self.also().items()}
        contents = checkpoint.Contents(
            self.config, tensors, also, self.fingerprint, {**self.metadata, **(metadata or {})}, self.diagnostics, self._calibrated
        )
        checkpoint.write(path, contents)

    def load(self, path: Path, strict_base: bool = True) -> Adapter:
        """Take a file's values in place, into the same Parameter objects: an optimizer goes on. All, or nothing.

        Raises CheckpointError where the file's method, config at any layer, keys or shapes differ from this adapter's.
        """
        self._refuse_merged("load into it")
        also = self.also()
        contents = fitting.for_adapter(
            path, self.config, self._sizes, {n: tuple(p.shape) for n, p in also.items()}, self.fingerprint, strict_base
        )
        tensors = self.tensors()
        with torch.no_grad():
            for target, fields in contents.tensors.items():
                for field, value in fields.items():
                    tensors[target][field].copy_(value)
            for name, value in contents.also.items():
                also[name].copy_(value)
        self.metadata.clear()
        self.metadata.update(contents.metadata)
        self.calibrated = contents.calibrated
        return self

    @classmethod
    def from_checkpoint(cls, model: nn.Module, path: Path, name: str | None = None, c: CValue = 1.0, strict_base: bool = True) -> Adapter:
        """Attach the adapter in a file. `adapter = ll.load(model, "kind.safetensors")`. Needs no calibration.

        Everything is checked before the model is touched. Raises CheckpointError (a ValueError) listing what does not fit: keys,
        shapes, values, or a base other than the one it was trained on (strict_base=False lets that pass, with a warning).
        """
        model = unwrapped(model)
        contents, layer_sizes, now = fitting.for_model(path, model, strict_base)
        adapter = cls(
            contents.config,
            contents.tensors,
            layer_sizes,
            name=name or "default",
            also=contents.also,
            metadata=contents.metadata,
            fingerprint=now,
            diagnostics=contents.diagnostics,
            calibrated=contents.calibrated,
            c=c,
        )
        return adapter.put_on(model, known_base=True)

    # -- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        here = self.tensors()
        copies = {p: p.detach().clone() for fields in here.values() for p in fields.values()}  # one of a tensor that layers share
        tensors = {t: {f: copies[p] for f, p in fields.items()} for t, fields in here.items()}
        also = {n: p.detach().clone() for n, p in self.also().items()}
        return dict(config=self.config, tensors=tensors, layer_sizes=self._sizes, name=self.name, also=also, metadata=self.metadata,
                    fingerprint=self.fingerprint, diagnostics=self.diagnostics, calibrated=self._calibrated,
                    c=self._dial.rest.c)  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def widths(config: AdapterConfig, layer_sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """What a method is as wide as at the layers, which may have no room for what the config asks: "r=16 (8 on 12 layers)", "r=4..16"."""
    at = [config.at(t, *size) for t, size in layer_sizes.items()]
    return [in_words(n, getattr(config, n), [getattr(cfg, n) for cfg in at]) for n in WIDTHS if hasattr(config, n)]


def in_words(name: str, asked: int, found: list[int]) -> str:
    counts = Counter(found)
    if len(counts) > 2:
        return f"{name}={min(counts)}..{max(counts)}"
    usual = asked if asked in counts or not counts else max(counts, key=counts.__getitem__)
    others = [f" ({n} on {times} layer{'s' * (times > 1)})" for n, times in counts.items() if n != usual]
    return f"{name}={usual}{''.join(others)}"


def check_name(name: str) -> str:
    if not isinstance(name, str) or not name.isidentifier() or "__" in name:
        raise ValueError(f"an adapter's name is an identifier without a double underscore, got {name!r}")
    return name


def refuse(message: str) -> None:
    raise RuntimeError(message)


def marks(adapter: Adapter) -> tuple[float, ...]:
    """A few of its trained numbers, from the first layer and the last: those of two adapters agree where one is a copy of the other."""
    tensors, ends = adapter.tensors(), {adapter.targets[0]: None, adapter.targets[-1]: None}
    trained = [p.detach().flatten() for t in ends for f, p in tensors[t].items() if adapter._specs[t][f].trainable]
    return tuple(number for v in trained for number in v[:: max(1, v.numel() // 4)][:4].double().tolist())


def say_twice(adapter: Adapter, histories: Iterable[Baked]) -> None:
    """Warn of an attached adapter that is in a history on its model too."""
    mine = marks(adapter) if (found := list(dict.fromkeys(histories))) else ()
    for history in found:
        if any(kept.marks == mine and kept.config.variant == adapter.variant.name for kept in history.kept):
            logger.warning(
                "adapter {!r} is attached at c={} and {} on the same model holds it too, so it counts twice: detach() it, set its c to 0, "
                "or take it out of the history", adapter.name, adapter.c, history.name,
            )  # fmt: skip


def as_parameters(
    tensors: Mapping[str, Mapping[str, Tensor]], specs: Mapping[str, Mapping[str, ParamSpec]]
) -> dict[str, dict[str, Parameter]]:
    """Each tensor as a Parameter; one that several layers share stays one."""
    made = {id(v): v for fields in tensors.values() for v in fields.values() if isinstance(v, Parameter)}
    for t, fields in tensors.items():
        for f, v in fields.items():
            if id(v) not in made:
                made[id(v)] = fresh_parameter(v, v, specs[t][f].trainable)
    return {t: {f: made[id(v)] for f, v in fields.items()} for t, fields in tensors.items()}


def handle_of(model: nn.Module, shared: Shared, hooks: Mapping[str, tuple[nn.Module, Hook]]) -> Adapter:
    known = _HANDLES.get(shared)
    if known is not None and (adapter := known()) is not None:
        return adapter
    assert ledger_of(model) is shared.ledger
    layer_sizes = {path: hook.base.sizes[:2] for path, (_, hook) in hooks.items()}
    adapter = Adapter(shared.config, {}, layer_sizes, name=shared.name, fingerprint=shared.fingerprint)
    adapter._dial, adapter.metadata, adapter.diagnostics = shared.dial, shared.metadata, shared.diagnostics
    adapter._calibrated = shared.calibrated
    adapter._adopt(Placement(model, shared, {path: layer for path, (layer, _) in hooks.items()}))
    return adapter
