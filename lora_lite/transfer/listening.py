"""What does a model see at some of its places, batch by batch? It is run as it is, and left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.calibration.padding import Padding
from lora_lite.running import called, moved
from lora_lite.target import Target
from lora_lite.transfer.parts import Anatomy, block_of


class Site(NamedTuple):
    """A place in a model where activations are read.

    where  "input" or "output" of a linear; "stream", the residual stream right after what this linear wrote; "block", the
           stream that enters the block of that path
    kind   of a fused linear's output, the part that is meant; "" for all of it
    """

    module: str
    where: str
    kind: str = ""


class Listener:
    """`Listener(anatomy, sites, "source").run(batch)` -> {site: activations (n, d)}, padding left out.

    Sites that see one tensor (the inputs of q, k and v) give one tensor.
    """

    def __init__(self, anatomy: Anatomy, sites: Iterable[Site], what: str) -> None:
        self.model, self.what = anatomy.model, what
        self.padding = Padding(self.model)
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.wanted: dict[tuple[str, str], list[tuple[Site, Tensor | None]]] = {}
        for site in sites:
            rows = next((p.rows for p in anatomy.parts.get(site.module, ()) if p.kind == site.kind), None)
            self.wanted.setdefault((site.module, site.where), []).append((site, rows))
        linears = [t for t in anatomy.layers.values() if t.depth is not None]
        heard = {module for module, _ in self.wanted}
        self.blocks = {module for module, where in self.wanted if where == "block"}
        self.blocks |= {block_of(anatomy.layers[module]) for module, where in self.wanted if where == "stream"}
        self.linears = [t for t in linears if t.name in heard or (t.role == "writer" and block_of(t) in self.blocks)]

    def run(self, batch: Any) -> dict[Site, Tensor]:
        """One batch through the model; the hooks are there only while it runs."""
        heard = Heard(self)
        given = moved(batch, self.device)
        with ExitStack() as hooks:
            self.padding.watch(hooks)
            for path in self.blocks:
                hooks.callback(self.model.get_submodule(path).register_forward_pre_hook(heard.entering(path), with_kwargs=True).remove)
            for t in self.linears:
                hooks.callback(t.module.register_forward_hook(heard.called(t), with_kwargs=True).remove)
            with self.padding.of(given):
                called(self.model, given)
        silent = [module for (module, _), sites in self.wanted.items() if sites[0][0] not in heard.found]
        if silent:
            raise RuntimeError(f"{self.what}: {silent[0]} was never called on these batches ({len(silent)} such); leave it out")
        return heard.found


class Heard:
    """What one run brings. The stream after a writer is what entered its block plus all that was written there since."""

    def __init__(self, listener: Listener) -> None:
        self.listener, self.found = listener, dict[Site, Tensor]()
        self.streams: dict[str, Tensor] = {}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # by identity, with the tensor itself so that no other can take its id

    def entering(self, path: str) -> Callable[..., None]:
        def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
            if isinstance(x, Tensor):
                self.streams[path] = x
                self.keep(path, "block", block, x)

        return note

    def called(self, t: Target) -> Callable[..., None]:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            self.keep(t.name, "input", layer, args[0] if args else next(iter(kwargs.values())))
            self.keep(t.name, "output", layer, y)
            if t.role == "writer":
                before = self.streams.get(block_of(t))
                after = y if before is None or before.shape != y.shape else before + y
                self.streams[block_of(t)] = after
                self.keep(t.name, "stream", layer, after)

        return note

    def keep(self, module: str, where: str, layer: nn.Module, x: Tensor) -> None:
        for site, rows in self.listener.wanted.get((module, where), ()):
            if id(x) not in self.kept:
                self.kept[id(x)] = (x, self.checked(site, self.listener.padding.without(layer, x).detach()))
            seen = self.kept[id(x)][1]
            self.found[site] = seen if rows is None else seen[:, rows.to(seen.device)]

    def checked(self, site: Site, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            what = f"{self.listener.what}, {site.module}: its {site.where} {tuple(x.shape)}"
            raise ValueError(f"{what} holds NaN or infinite values on the calibration tokens")
        return x
