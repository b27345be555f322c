"""How does a loss depend on the targets' outputs? Streams its gradients there to observers, and keeps none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_lite.calibration.forms import as_batches, is_batch, some
from lora_lite.running import called, moved, undisturbed
from lora_lite.variant import GradientObserver


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
    Raises ValueError for data or a loss that does not fit, RuntimeError naming targets that the loss does not depend on, or under
    torch.inference_mode().
    """
    if isinstance(data, Mapping) and not is_batch(data, model, {}):
        raise ValueError(f"gradients need batches to run the model on, each a tensor, a dict or a tuple; got a mapping of {list(data)[:5]}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "the start is taken from a loss's gradients, and inside torch.inference_mode() torch records none: attach outside of it "
            "(torch.no_grad() does no harm)"
        )
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
        with torch.no_grad(), torch.autocast(value.device.type, enabled=False):  # statistics keep their own precision
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
