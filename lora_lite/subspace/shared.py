"""What does a user hold of many adapters at once? A SharedSubspace: one immutable state, and the calls that put another in its place."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from loguru import logger
from torch import Tensor

from lora_lite.adapter import Adapter
from lora_lite.checkpoint import listed
from lora_lite.config import AdapterConfig
from lora_lite.subspace import change, diagnosis, file, live, training
from lora_lite.subspace.apart import Apart
from lora_lite.subspace.bases import restricted
from lora_lite.subspace.build import Progress, build
from lora_lite.subspace.coefficients import FEATURE_KINDS
from lora_lite.subspace.projection import TaskProjection, added, project
from lora_lite.subspace.source import PathLike, Source, check_id, source_of
from lora_lite.subspace.state import Layer, Missing, Policy, State

MISSING = get_args(Missing)


class Default(int):
    """A number that no one gave: another argument may take its place."""


NOT_GIVEN = Default(4)


class Sides(NamedTuple):
    """Something of the output side (b, where B is) and of the input side (a)."""

    b: Any
    a: Any


class SharedSubspace:
    """One basis per layer and side for many adapters of one base, and a few numbers for each.

        sub = ll.SharedSubspace.from_adapters([a0, a1], task_ids=["terse", "kind"], variance_threshold=0.9)
        sub.absorb(a2, "formal"); adapter = sub.reconstruct("kind"); sub.save("tasks.safetensors")

    Readers never wait and see the state before or after a change, never between; writers take turns. A call that raises has
    changed nothing. What it costs and what holds: docs/subspace.md.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._writing = threading.RLock()

    # -- made from ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_adapters(
        cls,
        adapters: Sequence[Adapter | PathLike],
        task_ids: Sequence[str] | None = None,
        variance_threshold: float = 0.6,
        num_components: int | None = None,
        adaptive_k: bool = False,
        *,
        space: Literal["feature", "flat"] = "feature",
        coefficients: Literal["core", "factors", "diag"] = "core",
        budget_bytes: int | None = None,
        missing: Missing = "error",
        dtype: torch.dtype | None = None,
    ) -> SharedSubspace:
        """The basis of these adapters. `from_adapters([a0, a1, a2], task_ids=["x", "y", "z"], num_components=16)`.

        space               "feature": directions of the updates B A, whichever way they are factored. "flat": PCA of flattened factors
        coefficients        "core" (k x k per task), "factors" (r x k twice) or "diag" (k, on a basis that stays); "flat" has its own
        variance_threshold  each layer keeps at least this share of sum |dW|^2 (in "flat": of each side's variance)
        num_components      the same k everywhere instead; adaptive_k=True lets the threshold decide all the same
        budget_bytes        directions go where they explain most per byte until this is spent; a layer whose tasks' own factors, as
                            they are or in int8, lose less at its bytes keeps those instead (`compression_stats` says which)
        missing             layers not in every adapter: "error", "zero" (such an update is zero) or "common" (they are left out)
        dtype               of bases and coefficients: float32 unless an adapter is float64

        Raises ValueError for no adapters, ids that do not match or repeat, NaN, shapes that differ, layers that are missing.
        """
        ids = task_names(task_ids, default_names(adapters))
        policy = checked_policy(space, coefficients, variance_threshold, num_components, adaptive_k, budget_bytes, missing)
        check_dtype(dtype)
        sources = [source_of(t, a) for t, a in zip(ids, adapters, strict=True)]
        return cls(build(sources, "flat" if space == "flat" else coefficients, policy, missing, dtype))

    @classmethod
    def from_adapters_streaming(
        cls,
        paths: Sequence[PathLike],
        task_ids: Sequence[str] | None = None,
        num_components: int | None = NOT_GIVEN,
        *,
        space: Literal["feature", "flat"] = "feature",
        coefficients: Literal["core", "factors", "diag"] = "core",
        variance_threshold: float = 0.6,
        adaptive_k: bool = False,
        budget_bytes: int | None = None,
        missing: Missing = "error",
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> SharedSubspace:
        """The same from files of `adapter.save` and PEFT folders, one layer of all of them in memory at a time: the same numbers.

        Ids are the names of the folders, of the files without ending, or of the files' folders where those repeat, unless given.
        num_components=None leaves k to the threshold; under budget_bytes it is not given. progress(done, of) is called after each layer.
        """
        if made := [p for p in paths if isinstance(p, Adapter)]:
            raise TypeError(f"expected paths, got {len(made)} Adapters; SharedSubspace.from_adapters([...]) takes those")
        ids = task_names(task_ids, file_names(paths))
        k = None if num_components is NOT_GIVEN and budget_bytes is not None else num_components
        policy = checked_policy(space, coefficients, variance_threshold, k, adaptive_k, budget_bytes, missing)
        check_dtype(dtype)
        sources = [source_of(t, p) for t, p in zip(ids, paths, strict=True)]
        return cls(build(sources, "flat" if space == "flat" else coefficients, policy, missing, dtype, progress))

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The state as it is now; it never changes itself, so hold it to read several things of one moment."""
        return self._state

    @property
    def tasks(self) -> list[str]:
        return list(self._state.configs)

    @property
    def layer_names(self) -> list[str]:
        return list(self._state.layers)

    @property
    def components(self) -> dict[str, Sides]:
        """By layer: orthonormal rows (k, d_out) and (k, d_in); in "flat" (k, d_out r) and (k, r d_in)."""
        return {m: Sides(x.b.basis(), x.a.basis()) for m, x in self._state.layers.items()}

    @property
    def means(self) -> dict[str, Sides]:
        """By layer, None in the uncentred space "feature"."""
        return {m: Sides(x.b.centre(), x.a.centre()) for m, x in self._state.layers.items()}

    @property
    def singular_values(self) -> dict[str, Sides]:
        return {m: Sides(x.b.energy.sqrt(), x.a.energy.sqrt()) for m, x in self._state.layers.items()}

    @property
    def nbytes(self) -> int:
        """Of bases, means, coefficients, scales and energies, as they are held."""
        return self._state.nbytes

    def error_bound(self, task_id: str) -> dict[str, float]:
        """By layer: a bound on |dW - reconstructed dW|^2 (in "flat": on the factors'), kept up through every absorb."""
        layers = having(self._state, task_id)
        return {m: float(x.lost[x.index[task_id]]) for m, x in layers.items()}

    def compression_stats(self) -> dict[str, Any]:
        """components_per_layer, total_params_compressed, total_params_original, compression_ratio, num_tasks, num_layers.

        Under budget_bytes a layer's components may be "raw" or "int8": sharing lost more there than the tasks' own factors do."""
        state = self._state
        layers = state.layers
        held = sum(math.prod(x.shape) for layer in layers.values() for x in layer.numbers())
        original = sum(r * (x.d_in + x.d_out) for x in layers.values() for r in x.ranks)
        return {
            "components_per_layer": {m: x.held if isinstance(x, Apart) else Sides(x.b.k, x.a.k) for m, x in layers.items()},
            "total_params_compressed": held,
            "total_params_original": original,
            "compression_ratio": original / max(1, held),
            "num_tasks": len(state.configs),
            "num_layers": len(layers),
        }

    def diagnose(
        self, adapters: Mapping[str, Adapter | PathLike] | None = None, seed: int = 0, progress: Progress | None = None
    ) -> dict[str, diagnosis.Verdict]:
        """By layer, for every layer: does this collection share anything? See `lora_lite.subspace.diagnosis`. Give the adapters by task
        id for figures of the originals; without them there is a verdict only where nothing was let go of a layer.
        Raises ValueError for adapters that are not those of the tasks."""
        return diagnosis.diagnose(self._state, adapters, seed, progress)

    def __repr__(self) -> str:
        state = self._state
        held = f"int{state.bits}" if state.bits else "dense"
        what = f"{len(state.configs)} tasks, {len(state.layers)} layers, {state.space}/{state.kind}, {held}"
        return f"SharedSubspace({what}, {state.nbytes:,} bytes)"

    # -- tasks --------------------------------------------------------------------------------------------------------

    def project(self, adapter: Adapter | PathLike | Source, task_id: str = "projected") -> TaskProjection:
        """Where an adapter lies on the bases as they are; changes nothing. `p.coverage` says how much of it they hold. Layers that
        the subspace lacks hold none of it; a warning names them."""
        p = project(self._state, source_of(task_id, adapter), task_id)
        say_left_out(task_id, p.left_out)
        return p

    def add_task(self, projection: TaskProjection) -> None:
        """Keep a projection. The bases stay, so the part they do not hold is lost; `absorb` makes room for it."""
        with self._writing:
            self._state = added(self._state, projection)

    def absorb(self, adapter: Adapter | PathLike | Source, task_id: str) -> None:
        """Take in an adapter and the directions it brings. Old tasks are carried into the new bases exactly, and lose at most what
        `error_bound` then says; none of it where k has room. Cost does not depend on how the old adapters came in.

        With missing="common" layers that the subspace lacks are left out, and a warning names them; with "zero" they come in."""
        source = source_of(task_id, adapter)
        with self._writing:
            self._state = change.absorb(self._state, source)
            left_out = [m for m in source.modules if m not in self._state.layers]
        say_left_out(task_id, left_out)

    absorb_incremental = absorb

    def reconstruct(self, task_id: str) -> Adapter:
        """The task as a detached LoRA adapter, with its own alpha, ranks and places: `ll.attach(model, sub.reconstruct("kind"))`."""
        state = self._state
        layers = having(state, task_id)
        tensors, sizes = {}, {}
        dtype = next(iter(layers.values())).b.basis().dtype
        dtype = torch.promote_types(dtype, torch.float32)
        for m, layer in layers.items():
            update = layer.update(state.kind, task_id)
            tensors[m] = {"lora_A": update.A.to(dtype).contiguous(), "lora_B": update.B.to(dtype).contiguous()}
            sizes[m] = (layer.d_in, layer.d_out)
        return Adapter(training.with_dtype(state.configs[task_id], dtype), tensors, sizes, fingerprint=restricted(state.base, sizes))

    def remove_task(self, task_id: str) -> None:
        """Forget a task. The bases and the other tasks stay bit for bit. Raises KeyError for an unknown id."""
        with self._writing:
            having(self._state, task_id)
            self._state = change.removed(self._state, task_id)

    # -- training -----------------------------------------------------------------------------------------------------

    def get_trainable_params(self, task_id: str, num_expand: int = 0, seed: int = 0) -> training.Trainable:
        """Parameters for a hand-written loop: `{layer}.loadings_a`/`_b` (a core or a diagonal: `{layer}.loadings`), starting at the
        task. num_expand further directions per side are the trained task's own until `commit`."""
        state = self._state
        training.check_directions(having(state, task_id), num_expand)
        return training.trainable(state, task_id, num_expand, seed)

    def starting(
        self, config: AdapterConfig, sizes: Mapping[str, tuple[int, int]], seed: int | None = None
    ) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]]]:
        """What `ll.attach(model, SharedConfig(...), shared=sub)` asks for: the config with the bases' marks, and tensors by layer."""
        return live.starting(self._state, config, sizes, seed)

    def base_of(self, targets: Sequence[str]) -> dict[str, Any] | None:
        """The fingerprint of the base that the adapters were trained on, as far as it is known of these layers."""
        return restricted(self._state.base, targets)

    def commit(self, trained: Mapping[str, Tensor] | Adapter, task_id: str) -> None:
        """Keep what was trained as the task's coefficients, replacing it if it is there. Raises ValueError when the
        bases moved meanwhile, and for a task that has layers which were not trained."""
        with self._writing:
            if isinstance(trained, Adapter):
                trained = live.as_trainable(self._state, trained, task_id)
            self._state = training.committed(self._state, trained, task_id)

    # -- form ---------------------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SharedSubspace:
        """Bases and coefficients onto a device, in a dtype; a dtype also undoes `quantize`. Returns self."""
        check_dtype(dtype)
        with self._writing:
            self._state = change.moved(self._state, None if device is None else torch.device(device), dtype)
        return self

    def quantize(self, bits: int = 8) -> SharedSubspace:
        """Integers of 8 or 4 bits in memory and on disk, coefficients fitted again to the quantised bases. Returns self."""
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits!r}")
        with self._writing:
            self._state = change.quantised(self._state, bits)
        return self

    def save(self, path: PathLike) -> None:
        """One safetensors file, atomically: at every moment the path holds the old file or the new one, whole."""
        file.write(path, self._state)

    @classmethod
    def load(cls, path: PathLike) -> SharedSubspace:
        """Raises CheckpointError (a ValueError) for a file that is damaged, or of something else."""
        return cls(file.read(path))

    def __getstate__(self) -> dict[str, Any]:
        return {"_state": self._state}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__(values["_state"])


def say_left_out(task: str, modules: Collection[str]) -> None:
    if modules:
        logger.warning("adapter {!r}: left out, since the subspace has no such layers: {}", task, listed(list(modules)))


def having(state: State, task_id: str) -> dict[str, Layer]:
    """The layers a task has. Raises KeyError for an unknown one."""
    if task_id not in state.configs:
        raise KeyError(f"no task {task_id!r} here; there are {list(state.configs)[:20]}")
    return {m: layer for m, layer in state.layers.items() if task_id in layer.index}


def file_names(paths: Sequence[PathLike]) -> list[str]:
    stems = [Path(p).name if Path(p).is_dir() else Path(p).stem for p in paths]
    folders = [Path(p).resolve().parent.name for p in paths]
    return folders if len(set(stems)) < len(stems) == len(set(folders)) else stems


def default_names(adapters: Sequence[Adapter | PathLike]) -> list[str]:
    if isinstance(adapters, Adapter | str | os.PathLike):
        raise TypeError(f"expected a list of adapters or paths, got one {type(adapters).__name__}: write [adapter]")
    paths = [a for a in adapters if isinstance(a, str | os.PathLike)]
    return file_names(paths) if paths and len(paths) == len(adapters) else [f"task_{i}" for i in range(len(adapters))]


def task_names(given: Sequence[str] | None, default: list[str]) -> list[str]:
    ids = default if given is None else list(given)
    if not default:
        raise ValueError("no adapters were given; a subspace needs at least one")
    if len(ids) != len(default):
        raise ValueError(f"{len(ids)} task_ids for {len(default)} adapters")
    for t in ids:
        check_id(t)
    if twice := sorted({t for t in ids if ids.count(t) > 1}):
        raise ValueError(f"task ids must differ; repeated: {twice[:5]}. Give task_ids=")
    return ids


def checked_policy(
    space: str, coefficients: str, threshold: float, k: int | None, adaptive: bool, budget: int | None, missing: str = "error"
) -> Policy:
    if space not in ("feature", "flat"):
        raise ValueError(f'space must be "feature" or "flat", got {space!r}')
    if coefficients not in FEATURE_KINDS:
        raise ValueError(f"coefficients must be one of {FEATURE_KINDS}, got {coefficients!r}")
    if missing not in MISSING:
        raise ValueError(f"missing must be one of {MISSING}, got {missing!r}")
    policy = Policy(threshold, k, budget)
    if budget is not None and k is not None:
        raise ValueError(f"give budget_bytes={budget!r} without num_components={k!r}: a budget chooses k itself")
    return dataclasses.replace(policy, num_components=None if adaptive or k is None else int(k))


def check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating torch.dtype such as torch.float32, got {dtype!r}; quantize(bits=8) makes integers")
