"""How do kept adapters act together? As a history: one hook per layer and site for all of them, each at its own dose.

The order at every layer, however adapters and histories came onto the model:

    1. histories, the older first; then live adapters, in the order they were attached;
    2. within a history: methods that change what the layer takes in (ia3_ff, oft, hra, ia3 where it is fed forward), in stack
       order; the layer; all additive updates at once, as one pair (x A^T * doses) B^T; methods that change what it puts out (ia3
       elsewhere, dora, road), in stack order.

Each acts on what those before it left, so additive histories and live adapters give the same numbers in any order, and two
DoRAs do not commute. (Input sites run before output sites: a live ia3_ff changes what a history at that layer sees.)
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite import compiled, fitting, recompute
from lora_lite.adapter import Adapter, say_twice
from lora_lite.attachment import all_hooks, inner, ledger_of, refuse_merged, targets_by_name, unwrapped
from lora_lite.baked import Baked, Content, HistoryHook, history_hooks
from lora_lite.base import fingerprint, refusal
from lora_lite.dial import DIALS, Block, Coefficient
from lora_lite.doses import DoseDial, Doses
from lora_lite.hooks import HOOKS
from lora_lite.keeping import as_lora, extended, given, kept_of, lora_config, without
from lora_lite.lifecycle import adapters as attached
from lora_lite.target import Target, check_model

Pairs = Sequence[tuple[Adapter, Coefficient]]
Gate = Adapter | Callable[[], Any] | None
_NUMBERING = threading.Lock()


class HistoryBake:
    """Adapters you keep, as one frozen stack on a model. `history = ll.HistoryBake(model, [(kind, 1.0), (brief, 0.5)])`.

    A snapshot: adapters given are cloned, and may be trained, changed or dropped afterwards. Its tensors are frozen Parameters
    on the layers (`lora_A__history__0`); the base's `requires_grad` flags are left as they are. The doses are c's as an
    adapter's: a number, one per row, or one per token of a full forward; one that requires gradients is trained.
    An adapter that is attached beside a history which holds it (or a copy of it, or its file) counts twice: when either comes onto the
    model, at another c than 0, a warning of the log says so. What was trained on since then is another adapter.

    gate  None: always open. An adapter: open where that adapter's c is not 0, row by row. A callable without arguments: asked
          at every hook of every forward, by its truth or, for a tensor of several entries, row by row; `lambda: adapter.c != 0`
          sees the c in force, in a checkpoint's recompute too; whatever else it reads is as it is then. A copied model's
          callable is the same callable; an adapter on the model is copied with it.

    Raises RuntimeError for an adapter that is attached, trains more than its own tensors (`train_also`) or does not fit the
    model's layers, ValueError for tensors that are not finite, CheckpointError for another base (strict_base=False lets it pass).
    """

    def __init__(self, model: nn.Module, adapters: Pairs = (), gate: Gate = None, strict_base: bool = True) -> None:
        self._model = unwrapped(model)
        self._baked = Baked(DoseDial((), "history"), ledger_of(self._model))
        self.set_gate(gate)
        moved = self._baked.dial.moved
        self._extend(as_pairs(adapters), strict_base)
        self._baked.dial.moved = moved  # what it starts with is not a move: Dial.stale

    @classmethod
    def of(cls, model: nn.Module) -> list[HistoryBake]:
        """The histories on a model, the oldest first; also on a copy or an unpickled model, which carries its own."""
        model = inner(model)
        found = dict.fromkeys(hook.shared for _, _, hook in all_hooks(model) if isinstance(hook, HistoryHook))
        return [cls._handle(model, baked) for baked in sorted(found, key=lambda baked: baked.number)]

    @classmethod
    def _handle(cls, model: nn.Module, baked: Baked) -> HistoryBake:
        history = object.__new__(cls)
        history._model, history._baked = model, baked
        return history

    # -- what it is -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._baked.kept)

    @property
    def names(self) -> list[str]:
        """The names the adapters had, in stack order."""
        return [kept.name for kept in self._baked.kept]

    @property
    def coeffs(self) -> tuple[Coefficient, ...]:
        """The doses in force here, in stack order; all 0.0 inside `ll.disabled`."""
        found: Any = self._baked.dial.setting().c
        return found if isinstance(found, tuple) else (0.0,) * len(self)

    def __repr__(self) -> str:
        inside = ", ".join(f"{name!r} at {c}" for name, c in zip(self.names, self.coeffs, strict=True))
        return f"HistoryBake({self._baked.name!r}: {inside or 'empty'})"

    # -- what may change --------------------------------------------------------------------------------------------

    def push(self, adapter: Adapter, c: Coefficient = 1.0, strict_base: bool = True) -> None:
        """Put one more on top, all or nothing."""
        self._refuse_block("push")
        self._extend(as_pairs([(adapter, c)]), strict_base)

    def pop(self) -> None:
        """Take the last one away. Raises IndexError when there is none."""
        self._refuse_block("pop")
        if not self._baked.kept:
            raise IndexError(f"{self._baked.name} is empty: there is nothing to pop")
        last = len(self) - 1
        for layer, hook in self._hooks():
            hook.hold(layer, without(hook, layer, last))
        self._baked.kept.pop()
        self._baked.dial.turn(self.coeffs[:last])
        compiled.notice_hooks()

    def set_coeff(self, i: int, c: Coefficient) -> None:
        """Give the i-th adapter the dose c: in this block where the history is a `stack`, for good otherwise."""
        if not isinstance(self._baked.dial.setting().c, tuple):
            raise RuntimeError(f"{self._baked.name} is switched off in this block by ll.disabled; set doses outside of it")
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self._baked.name} has {len(self)} adapters {self.names}; there is no number {i}")
        doses = list(self.coeffs)
        doses[i] = c
        self._baked.dial.turn(tuple(doses))

    def set_gate(self, gate: Gate) -> None:
        """Say when it acts: None, an adapter, or a callable, as at the top."""
        dial = self._baked.dial
        if not (gate is None or callable(gate)):
            raise TypeError(f"a gate is None, an adapter or a callable without arguments, got {type(gate).__name__}")
        if isinstance(gate, Adapter) and gate.model is not self._model:
            where = "is attached to another model" if gate.attached else "is detached, so nothing turns it on this model"
            raise RuntimeError(f"adapter {gate.name!r} cannot be a gate: it {where}; attach it here first, or give a callable")
        dial.gate = gate._dial if isinstance(gate, Adapter) else gate
        dial.moved |= gate is not None and not isinstance(gate, Adapter)  # what a callable said is not known to a foreign recompute
        compiled.notice_hooks()

    def remove(self) -> None:
        """Take it off: the model is as it was before, bit for bit. Twice is harmless.

        The history is then an empty one on this model, as if it had just been made of nothing: `push` puts it on again.
        """
        for layer, hook in self._hooks():
            hook.hold(layer, Content())
        self._baked.kept.clear()
        self._baked.dial.turn(())
        compiled.notice_hooks()

    def to_adapter(self, name: str = "history") -> Adapter:
        """The stack at the doses in force as one plain LoRA, detached: exact, of all ranks together, without the gate.

        Raises TypeError naming the adapters that are not additive or whose dose is not one number, ValueError when empty.
        """
        kept = self._baked.kept
        if not kept:
            raise ValueError(f"{self._baked.name} is empty: there is nothing to make an adapter of")
        if turning := [f"{k.name!r} ({k.config.variant})" for k in kept if k.form != "low-rank"]:
            raise TypeError(f"{', '.join(turning)} are not additive: no LoRA does what they do; pop them, or merge instead")
        if split := [k.name for k, c in zip(kept, self.coeffs, strict=True) if isinstance(c, Tensor) and c.numel() > 1]:
            raise TypeError(f"the doses of {split} differ by row; an adapter holds one: set_coeff(i, number) first")
        doses = [float(c.detach()) if isinstance(c, Tensor) else c for c in self.coeffs]
        tensors = {hook.path: as_lora(hook, layer, doses) for layer, hook in self._hooks()}
        sizes = {target: size for k in kept for target, size in k.sizes.items() if target in tensors}
        config = lora_config({target: fields["lora_A"].shape[0] for target, fields in tensors.items()}, tensors)
        print_of = fingerprint(self._model, {target: self._model.get_submodule(target) for target in tensors})
        return Adapter(config, tensors, sizes, name=name, fingerprint=print_of)

    # -- how --------------------------------------------------------------------------------------------------------

    def _hooks(self) -> list[tuple[nn.Module, HistoryHook]]:
        found = [(layer, hook) for _, layer, hook in all_hooks(self._model)]
        return [(layer, hook) for layer, hook in found if isinstance(hook, HistoryHook) and hook.shared is self._baked]

    def _extend(self, pairs: Pairs, strict_base: bool) -> None:
        """All or nothing: everything is checked and cloned before a layer is touched."""
        with _NUMBERING:  # two threads that each open a stack on this model must not take one number
            if not self._baked.kept:
                others = [hook.shared.number for _, _, hook in all_hooks(self._model) if isinstance(hook, HistoryHook)]
                self._baked.number = max(others, default=-1) + 1
                self._baked.dial.name = self._baked.name
            self._extend_numbered(pairs, strict_base)
        recompute.install()
        compiled.notice_hooks()

    def _extend_numbered(self, pairs: Pairs, strict_base: bool) -> None:
        baked, before = self._baked, len(self)
        doses = Doses((*self.coeffs, *(c for _, c in pairs)))  # a bad c fails first
        contents: dict[tuple[str, str], tuple[Target, Content]] = {}
        for place, (adapter, _) in enumerate(pairs, before):
            targets, whole = self._targets(adapter, strict_base), given(adapter)
            for target in targets:
                site = HOOKS[adapter.variant.form_at(adapter.config.at(target.name, target.d_in, target.d_out))].site
                known = history_hooks(target.module, baked).get(site)
                now = known.content(target.module) if known else Content()
                _, now = contents.get((target.name, site), (target, now))
                contents[target.name, site] = target, extended(now, baked, target, place, whole)
        baked.kept += [kept_of(adapter) for adapter, _ in pairs]
        baked.dial.turn(doses.c)  # type: ignore[arg-type]
        for (path, site), (target, content) in contents.items():
            hook = history_hooks(target.module, baked).get(site) or HistoryHook(site, path, target.routed, baked)
            hook.hold(target.module, content)
        for live in attached(self._model).values() if pairs else ():
            if not live._dial.setting().off:
                say_twice(live, [dataclasses.replace(baked, kept=baked.kept[before:])])

    def _targets(self, adapter: Adapter, strict_base: bool) -> list[Target]:
        """The adapter's layers on this model, once it is clear that they can carry it."""
        model, name = self._model, adapter.name
        if adapter.attached:
            raise RuntimeError(
                f"adapter {name!r} is attached, and in a history it would count twice; adapter.detach() first: it keeps its tensors"
            )
        if also := adapter.also():
            raise RuntimeError(f"adapter {name!r} also trains {sorted(also)}, which a history cannot hold; attach it instead")
        refuse_merged(ledger_of(model))
        targets = targets_by_name(model, adapter.sizes)
        if problems := [r for t in targets if (r := refusal(t.name, t.module, adapter.variant.reads_weight != "never"))]:
            raise RuntimeError(f"{len(problems)} of {len(targets)} layers cannot carry {name!r}: " + "; ".join(problems[:3]))
        if wrong := [key for key, value in adapter.state_dict().items() if not bool(torch.isfinite(value).all())]:
            raise ValueError(
                f"adapter {name!r} holds NaN or infinite values in {wrong[:3]} ({len(wrong)} tensors); a dose of 0 could not silence them"
            )
        fitting.check_base(f"adapter {name!r}", adapter.fingerprint, fingerprint(model, {t.name: t.module for t in targets}), strict_base)
        return targets

    def _refuse_block(self, what: str) -> None:
        if DIALS.get().get(self._baked.dial):
            raise RuntimeError(
                f"cannot {what} inside the block that sets the doses of {self._baked.name} (ll.stack, ll.disabled); do it outside"
            )


def as_pairs(adapters: Pairs) -> Pairs:
    if isinstance(adapters, Adapter) or not isinstance(adapters, Iterable):
        raise TypeError(f"a history takes a list of (adapter, c) pairs, e.g. [(kind, 1.0), (brief, 0.5)]; got {adapters!r} itself")
    for pair in adapters:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], Adapter):
            raise TypeError(f"a history takes (adapter, c) pairs, e.g. [(kind, 1.0), (brief, 0.5)]; got {pair!r}")
    return [(adapter, c) for adapter, c in adapters]


@contextmanager
def stack(model: nn.Module, adapters: Pairs, gate: Gate = None, strict_base: bool = True) -> Iterator[HistoryBake]:
    """`with ll.stack(model, [(a, 0.8), (b, torch.tensor([0., 1.]))]):` detached adapters on the model for the block.

    Their doses hold in this context only (another thread sees the base) and may be turned inside: `as s: s.set_coeff(0, 1.2)`.
    Doses that differ by row make one matrix (rows x adapters): a batched generate runs every combination at once.
    """
    check_model(model)
    pairs = as_pairs(adapters)
    history = HistoryBake(model, [(adapter, 0.0) for adapter, _ in pairs], gate, strict_base)
    try:
        with Block(history._baked.dial, tuple(c for _, c in pairs)):
            yield history
    finally:
        history.remove()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """`with ll.disabled(model):` the pristine base, bit for bit, whatever is attached: every adapter and history on it at c = 0.

    In this context only, and in the recompute of what is checkpointed inside. What is attached inside the block acts, and so
    does an adapter whose c is set inside. Raises RuntimeError naming adapters that c does not switch off: merged ones, and those
    that train more than their own tensors.
    """
    model = inner(model)
    refuse_merged(ledger_of(model))
    hooks = [hook for _, _, hook in all_hooks(model)]
    if also := {hook.shared.name: sorted(hook.shared.originals) for hook in hooks if hook.shared.originals}:
        raise RuntimeError(f"cannot disable adapters that also train other parameters, which c does not switch off: {also}; detach them")
    with ExitStack() as blocks:
        for dial in dict.fromkeys(hook.dial for hook in hooks):
            blocks.enter_context(Block(dial, 0.0))
        yield
