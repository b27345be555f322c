"""What do the targets see when the model runs on some data? Streams their inputs to observers, and keeps none of them.

Knows models, targets and observers; no variants. `stream(model, layers, widths, observers, batches)`.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from lora_lite.variant import GradientObserver, Observer

POLES = ("cho", "rej")
FORMS = (
    'target -> activations (N, d_in); target -> {"cho": activations, "rej": activations}; '
    'an iterable of batches, each a tensor, a dict or a tuple; or {"cho": batches, "rej": batches}'
)
ROWS = 4096  # tokens an observer takes at once: it may widen them to float64, whatever the batch


class Watched(NamedTuple):
    """One target: where its input is seen, how wide it should be, who wants it."""

    name: str
    layer: nn.Module
    width: int
    observer: Observer

    def problem(self, x: Any) -> str | None:
        """What keeps x (*batch, d_in) from being this target's input, or None."""
        expected = f"expected a floating tensor (..., {self.width}), this layer's input"
        if not isinstance(x, Tensor):
            found = f"a mapping of {list(x)}" if isinstance(x, Mapping) else type(x).__name__
            return f"{self.name}: found {found}, {expected}"
        if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] != self.width:
            return f"{self.name}: found {x.dtype} {tuple(x.shape)}, {expected}"
        if not bool(torch.isfinite(x).all()):
            return f"{self.name}: {int((~torch.isfinite(x)).sum())} of {x.numel()} values are NaN or infinite, {expected} of finite ones"
        return None

    def feed(self, x: Float[Tensor, "n d_in"], group: str) -> None:
        device = next((p.device for p in self.layer.parameters()), x.device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # statistics keep their own precision
            for start in range(0, len(x), ROWS):
                self.observer.update(x[start : start + ROWS].to(device), group)


def stream(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    widths: Mapping[str, int],
    observers: dict[str, Observer],
    data: Any,
    *,
    progress: bool = True,
    shared: bool = False,
) -> None:
    """Feed every target's inputs to its observer: `update(x (n, d_in), group)`, group "cho" or "rej", or "all" without poles.

    data  target -> activations (N, d_in); target -> {"cho": X, "rej": X}; an iterable of batches (tensor, dict, tuple), or one
          batch; {"cho": batches, "rej": batches}. Padding is left out by `attention_mask`; where no mask fits, all tokens count

    shared  targets that the first batch shows to read one and the same tensor are given one observer, in `observers` too

    Batches run through the model as it is (other adapters too) in eval mode, without gradients and uncompiled; flags, hooks
    and the random state return as they were, also after an exception. Memory does not grow with the data.
    Raises ValueError for data that does not fit, naming targets; RuntimeError naming targets that no batch ever reached.
    """
    watched = {name: Watched(name, layer, widths[name], observers[name]) for name, layer in layers.items()}
    given, batches = [], {}
    for group, part in by_group(data).items():
        if isinstance(part, Mapping) and not is_batch(part, model, watched):
            given += activations(part, group, watched)
        else:
            batches[group] = as_batches(part)
    twins = Twins(shared)
    for target, group, x in tqdm(given, desc="calibrating", unit="tensor", delay=2, disable=not progress):
        if twins.leader(target.name, x) == target.name:
            target.feed(x, group)
    if batches:
        run(model, watched, batches, progress, twins)
    observers.update({name: observers[leader] for name, leader in twins.leaders.items()})


def stream_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    observers: Mapping[str, GradientObserver],
    data: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    progress: bool = True,
) -> None:
    """Feed every target's inputs, and the gradient of a loss at its outputs, to its observer: `update(x (n, d_in), gradient (n, d_out))`.

    data  an iterable of batches (tensor, dict, tuple), or one batch
    loss  (the model's output, the batch) -> scalar; without one the output's own `loss`, which Hugging Face models give when
          the batch holds labels

    All tokens count, padding too: a loss that leaves padding out gives zero gradients there. No parameter gets a gradient; the
    model comes out as from `stream`. Memory grows with a batch (the graph of its forward), not with their number.
    Raises ValueError for data or a loss that does not fit, RuntimeError naming targets that the loss does not depend on.
    """
    if isinstance(data, Mapping) and not is_batch(data, model, {}):
        raise ValueError(f"gradients need batches to run the model on, each a tensor, a dict or a tuple; got a mapping of {list(data)[:5]}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    graph = Graph(layers)
    count = 0
    with undisturbed(model), torch.enable_grad(), ExitStack() as hooks:
        graph.install(hooks)
        for batch in tqdm(as_batches(data), desc="calibrating", unit="batch", delay=2, disable=not progress):
            try:
                graph.batch(model, moved(batch, device), loss, observers)
            except Exception as error:
                error.add_note(f"in calibration batch {count}")
                raise
            count += 1
    if not count:
        raise ValueError("calibration data holds no batches (a generator can be read only once)")
    if silent := [name for name in layers if name not in graph.reached]:
        raise RuntimeError(f"the loss did not depend on {len(silent)} of {len(layers)} targets: {some(silent)}; add them to `exclude`")


# --- which of the forms is it -----------------------------------------------------------------------------------------


def by_group(data: Any) -> dict[str, Any]:
    """The data of each pole, or all of it under "all"."""
    if isinstance(data, Mapping) and data and set(data) <= set(POLES):
        return dict(data)
    return {"all": data}


def is_batch(part: Mapping[Any, Any], model: nn.Module, watched: Mapping[str, Watched]) -> bool:
    """Whether a mapping is one batch: its keys are arguments of the model, none is a target."""
    if not part or any(key in watched for key in part):
        return False
    return "input_ids" in part or set(part) <= set(inspect.signature(model.forward).parameters)


def as_batches(part: Any) -> Iterable[Any]:
    if isinstance(part, Mapping | Tensor):
        return [part]
    if isinstance(part, str | bytes) or not isinstance(part, Iterable):
        raise ValueError(f"calibration data is {type(part).__name__}; it can be {FORMS}")
    if isinstance(part, list | tuple) and not part:
        raise ValueError(f"calibration data is an empty {type(part).__name__}; it can be {FORMS}")
    return part


def activations(part: Mapping[Any, Any], group: str, watched: Mapping[str, Watched]) -> list[tuple[Watched, str, Tensor]]:
    """(target, group, tensor) of a mapping from targets, all of it checked. Raises ValueError listing what does not fit."""
    found, problems = [], misnamed(part, watched)
    for target in (watched[name] for name in watched if name in part):
        for pole, x in (by_group(part[target.name]) if group == "all" else {group: part[target.name]}).items():
            problem = target.problem(x)
            if problem is None and (x.ndim != 2 or not len(x)):
                problem = f"{target.name}: found {tuple(x.shape)}, expected (N, {target.width}), one row per token, at least one"
            problems += [] if problem is None else [problem + ("" if pole == "all" else f" (in {pole!r})")]
            found.append((target, pole, x))
    if problems:
        raise ValueError("calibration data does not fit the targets:\n  " + some(problems, "\n  "))
    return found


def misnamed(part: Mapping[Any, Any], watched: Mapping[str, Watched]) -> list[str]:
    """Targets without activations, and keys without a target."""
    problems = []
    if missing := [name for name in watched if name not in part]:
        problems.append(f"{len(missing)} of {len(watched)} targets have no activations: {some(missing)}")
    if unknown := [str(key) for key in part if key not in watched]:
        near = difflib.get_close_matches(unknown[0], watched, n=3, cutoff=0.0)
        problems.append(
            f"{some(unknown)}: neither targets nor arguments of the model; targets near the first: {some(near)}; the data can be {FORMS}"
        )
    return problems


def some(names: Sequence[str], between: str = ", ", at_most: int = 8) -> str:
    rest = len(names) - at_most
    return between.join([*names[:at_most], *([f"... and {rest} more"] if rest > 0 else [])])


# --- running the model ------------------------------------------------------------------------------------------------


class Twins:
    """Which targets read one and the same tensor, as the first batch shows: q, k and v of a block do."""

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.leaders = wanted, dict[str, str]()
        self._seen: list[tuple[Tensor, str]] = []  # held, so that no other tensor takes its place in memory meanwhile

    def leader(self, name: str, x: Tensor) -> str:
        """The target whose observer is fed for this one: the first that read this tensor, or itself."""
        if self.wanted and name not in self.leaders:
            self.leaders[name] = next((first for seen, first in self._seen if seen is x), name)
            self._seen.append((x, name))
        return self.leaders.get(name, name)

    def settle(self) -> None:
        self._seen.clear()


def run(model: nn.Module, watched: Mapping[str, Watched], parts: Mapping[str, Iterable[Any]], progress: bool, twins: Twins) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    listening = Pass(model, twins)
    with undisturbed(model), ExitStack() as hooks:
        listening.install(watched.values(), hooks)
        for group, batches in parts.items():
            where, count = "" if group == "all" else f" {group!r}", 0
            for batch in tqdm(batches, desc=f"calibrating{where}", unit="batch", delay=2, disable=not progress):
                listening.to(group, moved(batch, device), f"in calibration batch{where} {count}")
                twins.settle()
                count += 1
            if not count:
                raise ValueError(f"calibration data{where} holds no batches (a generator can be read only once)")
    if silent := [name for name in watched if name not in listening.reached]:
        raise RuntimeError(
            f"{len(silent)} of {len(watched)} targets were never called while the model ran on the calibration data, so an adapter "
            f"there would see nothing: {some(silent)}. Add them to `exclude`, or give batches that reach them"
        )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, uncompiled, without gradients; flags and random state return as they were."""
    # Compiled code would not see the hooks. Where nothing can have been compiled, importing torch._dynamo costs 0.9 s for nothing.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with torch.no_grad(), as_it_was(model), eager:
        model.eval()
        yield


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Each module's train or eval flag, and the random state, return as they were."""
    flags = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta", "mps")}  # MPS has no state per device
    kind = next((d.type for d in devices), None)
    with torch.random.fork_rng([d.index for d in devices if d.type == kind], device_type=kind):
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


class Pass:
    """The temporary hooks of one run over the data: what reaches a target goes to its observer, padding left out."""

    def __init__(self, model: nn.Module, twins: Twins) -> None:
        self.model, self.padding, self.twins = model, Padding(model), twins
        self.group, self.reached = "all", set[str]()

    def install(self, targets: Iterable[Watched], hooks: ExitStack) -> None:
        for target in targets:
            hooks.callback(target.layer.register_forward_pre_hook(self.listener(target), with_kwargs=True).remove)
        self.padding.watch(hooks)

    def listener(self, target: Watched) -> Callable[..., None]:
        def listen(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and self.twins.leader(target.name, x) != target.name:
                self.reached.add(target.name)
                return
            kept = self.padding.without(layer, x) if isinstance(x, Tensor) else x  # before the check: padding may well be NaN
            if problem := target.problem(kept):
                raise ValueError(problem)
            self.reached.add(target.name)
            target.feed(kept, self.group)  # type: ignore[arg-type]

        return listen

    def to(self, group: str, batch: Any, where: str) -> None:
        """Run one batch. Whatever is raised gets a note of where in the data it was."""
        self.group = group
        try:
            with self.padding.of(batch):
                called(self.model, batch)
        except Exception as error:
            error.add_note(where)
            raise


def called(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch in any of its forms."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple):
        return model(*batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise ValueError(f"found {type(batch).__name__}, expected a tensor, a dict or a tuple of the model's arguments")


class Graph:
    """The temporary hooks that keep each target's input and output in the graph of one forward."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers, self.reached = layers, set[str]()
        self.calls: list[tuple[str, Tensor, Tensor]] = []

    def install(self, hooks: ExitStack) -> None:
        for name, layer in self.layers.items():
            hooks.callback(layer.register_forward_hook(self.keeper(name), with_kwargs=True).remove)

    def keeper(self, name: str) -> Callable[..., Tensor | None]:
        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            x = args[0] if args else next(iter(kwargs.values()))
            grows = y.requires_grad  # nothing before it does in a frozen model: the graph begins here
            y = y if grows else y.detach().requires_grad_()
            self.calls.append((name, x.detach(), y))
            return None if grows else y.clone()  # what follows may write into it, which a leaf forbids

        return keep

    def batch(
        self, model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor] | None, observers: Mapping[str, GradientObserver]
    ) -> None:
        self.calls = []
        output = called(model, batch)
        value = own_loss(output) if loss is None else loss(output, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value).all()):
            raise ValueError(f"the loss must be one finite number in a tensor, got {value!r}")
        gradients = torch.autograd.grad(value.reshape(()), [y for _, _, y in self.calls], allow_unused=True)
        with torch.no_grad():
            for (name, x, _), gradient in zip(self.calls, gradients, strict=True):
                if gradient is not None:
                    self.reached.add(name)
                    observers[name].update(x.flatten(0, -2), gradient.flatten(0, -2))
        self.calls = []


def own_loss(output: Any) -> Any:
    if not isinstance(found := getattr(output, "loss", None), Tensor):
        raise ValueError(
            f"the model's output ({type(output).__name__}) has no loss; put labels in each batch, or give "
            "attach(..., loss=lambda output, batch: ...)"
        )
    return found


class Padding:
    """Which tokens of the current batch are padding, at a given layer.

    A mask belongs to the activations it has the shape of. An encoder-decoder has two: `attention_mask` for the encoder and for
    whoever reads its states (the k and v of cross-attention), `decoder_attention_mask` for the decoder.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = inspect.signature(model.forward)
        two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and hasattr(model, "get_encoder")
        self.encoder: nn.Module | None = model.get_encoder() if two else None  # type: ignore[operator]
        self.inside = set(self.encoder.modules()) if self.encoder is not None else set[nn.Module]()
        self.masks: dict[str, Tensor] = {}
        self.states: Tensor | None = None

    def watch(self, hooks: ExitStack) -> None:
        """Note the encoder's states of each batch, to know them again in the decoder."""

        def note(encoder: nn.Module, args: Any, output: Any) -> None:
            self.states = output if isinstance(output, Tensor) else output[0]

        if self.encoder is not None:
            hooks.callback(self.encoder.register_forward_hook(note).remove)

    @contextmanager
    def of(self, batch: Any) -> Iterator[None]:
        arguments = batch if isinstance(batch, Mapping) else self.named(batch)
        names = ("attention_mask", "decoder_attention_mask")
        self.masks = {name: arguments[name] != 0 for name in names if isinstance(arguments.get(name), Tensor)}
        if (given := arguments.get("encoder_outputs")) is not None:
            self.states = given[0]
        try:
            yield
        finally:
            self.masks, self.states = {}, None

    def named(self, batch: Any) -> Mapping[str, Any]:
        try:
            return self.parameters.bind_partial(*(batch if isinstance(batch, list | tuple) else [batch])).arguments
        except TypeError:  # too many: the model itself will say so better
            return {}

    def without(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The tokens of x that are not padding (n, d_in); all of them where no mask fits."""
        mask = self.masks.get("attention_mask" if self.encoder is None or self.reads_encoder(layer, x) else "decoder_attention_mask")
        if mask is not None and x.shape[:-1] == mask.shape:
            return x[mask.to(x.device)]
        if mask is not None and x.ndim == 2 and mask.ndim == 2 and len(x) == mask.numel():  # (B*T, d): OPT's fc1, routers
            return x[mask.flatten().to(x.device)]
        return x.flatten(0, -2) if x.ndim > 1 else x[None] if x.ndim == 1 else x

    def reads_encoder(self, layer: nn.Module, x: Tensor) -> bool:
        same = self.states is not None and x.data_ptr() == self.states.data_ptr() and x.shape == self.states.shape
        return layer in self.inside or same


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the model's device; containers keep their types (a model reads its encoder_outputs[0])."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, MutableMapping):
        new = copy.copy(batch)
        for key, value in batch.items():  # a ModelOutput refuses update()
            new[key] = moved(value, device)
        return new
    if isinstance(batch, list | tuple):
        values = [moved(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch
