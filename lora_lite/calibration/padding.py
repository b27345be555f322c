"""Which tokens of a batch are padding, at a given layer?"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


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
