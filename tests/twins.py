"""Which targets have a known right answer? A llama written in another basis, in another order, and twice as wide: the same function."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll
from tests.models import VOCABULARY, generator

READERS, WRITERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"), ("o_proj", "down_proj")


def batches(n: int = 4, rows: int = 8, length: int = 32, seed: int = 0) -> list[Tensor]:
    draw = generator(seed)
    return [torch.randint(1, VOCABULARY, (rows, length), generator=draw) for _ in range(n)]


def orthogonal(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=generator(seed), dtype=torch.float64))[0].float()


@torch.no_grad()
def rotated(model: Any, seed: int = 0) -> Any:
    """The same function on a residual stream in another basis (norm weights are one, so that they commute with it)."""
    twin, Q = copy.deepcopy(model), orthogonal(model.config.hidden_size, seed)
    twin.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ Q.T)
    for name, layer in twin.named_modules():
        last = name.rpartition(".")[2]
        if last in READERS:
            layer.weight.copy_(layer.weight @ Q.T)
        elif last in WRITERS:
            layer.weight.copy_(Q @ layer.weight)
            if layer.bias is not None:
                layer.bias.copy_(Q @ layer.bias)
    return twin


@torch.no_grad()
def permuted(model: Any, seed: int = 0) -> Any:
    """The same function with the neurons of each MLP in another order."""
    twin = copy.deepcopy(model)
    for i, block in enumerate(twin.model.layers):
        order = torch.randperm(block.mlp.down_proj.in_features, generator=generator(seed + i))
        for layer in (block.mlp.gate_proj, block.mlp.up_proj):
            layer.weight.copy_(layer.weight[order].clone())
            layer.bias.copy_(layer.bias[order].clone())
        block.mlp.down_proj.weight.copy_(block.mlp.down_proj.weight[:, order].clone())
    return twin


@torch.no_grad()
def widened(model: Any, seed: int = 0) -> Any:
    """Twice as wide, the same function: each feature twice, in a shuffled order, its readers' weights shared out between the two."""
    old = model.config
    kept = {k: v for k, v in old.to_dict().items() if k not in ("hidden_size", "intermediate_size", "head_dim")}
    wide = LlamaForCausalLM(
        LlamaConfig(**kept, hidden_size=2 * old.hidden_size, intermediate_size=2 * old.intermediate_size, head_dim=old.head_dim)
    )
    wide.set_attn_implementation("eager")
    draw = generator(seed)
    (stream, part), (inner, inner_part) = (doubled(d, draw) for d in (old.hidden_size, old.intermediate_size))
    theirs = dict(model.named_parameters())
    for name, p in wide.named_parameters():
        q, last = theirs[name], name.split(".")[-2]
        if last == "embed_tokens":
            q = q[:, stream]
        elif "norm" in last or (last in WRITERS and q.ndim == 1):
            q = q[stream]
        elif last in READERS:
            q = (q[:, stream] * part) if q.ndim == 2 else q
            q = q[inner] if last in ("gate_proj", "up_proj") else q
        else:
            q = q[stream] if last == "o_proj" else q[stream][:, inner] * inner_part
        p.copy_(q)
    return wide.eval()


def doubled(d: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which old feature each new one is, and its part of the sum."""
    first = torch.rand(d, generator=draw)
    order = torch.randperm(2 * d, generator=draw)
    return order % d, torch.cat([first, 1 - first])[order]


def trained(model: Any, roles: tuple[str, ...] = ("reader", "writer"), r: int = 4, seed: int = 0, std: float = 0.1) -> ll.Adapter:
    """A detached adapter whose factors are drawn at random."""
    adapter = ll.attach(model, ll.LoRAConfig(r=r, alpha=2.0 * r, roles=roles), seed=seed)
    draw = generator(seed)
    with torch.no_grad():
        for _, p in sorted(adapter.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=draw) * std)
    adapter.detach()
    return adapter


@torch.no_grad()
def effect(model: nn.Module, adapter: ll.Adapter, ids: Tensor) -> Tensor:
    """What the adapter changes in the logits."""
    before = model(ids).logits.double()
    with adapter(model):
        return model(ids).logits.double() - before


def recovered(source: Any, adapter: ll.Adapter, target: Any, moved: ll.Adapter, seed: int = 99) -> float:
    """1 - |what it does there - what it did here|^2 / |what it did here|^2, on tokens that nothing was fitted on."""
    ids = batches(1, seed=seed)[0]
    wanted = effect(source, adapter, ids)
    return 1 - float((effect(target, moved, ids) - wanted).square().sum() / wanted.square().sum())
