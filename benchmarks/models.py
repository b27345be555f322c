"""On which models is it measured? Llamas of random weights, and trees of modules over one set of weights.

Two trees that share their weights differ in nothing but their modules: not in where the memory lies, which alone made two
deep copies differ by some percent.
"""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll

R, ALPHA, VOCABULARY = 16, 32, 512  # a small vocabulary: the output layer is nobody's target


def llama(layers: int = 24, d: int = 512, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> LlamaForCausalLM:
    """7 linears a layer; frozen, as every base of an adapter is."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=d, intermediate_size=d * 43 // 16, num_hidden_layers=layers, num_attention_heads=max(1, d // 64),
        num_key_value_heads=max(1, d // 64), vocab_size=VOCABULARY, max_position_embeddings=2048, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval().requires_grad_(False)  # type: ignore[arg-type]


def tree(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Modules of its own over the same weights."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def ours(model: LlamaForCausalLM, config: ll.AdapterConfig | None = None, c: float = 1.0) -> tuple[LlamaForCausalLM, ll.Adapter]:
    """A tree over `model` with an adapter whose updates are not zero."""
    twin = tree(model)
    adapter = ll.attach(twin, config or ll.LoRAConfig(r=R, alpha=ALPHA), seed=0, c=c)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for fields in adapter.tensors().values():
            fields["lora_B"].copy_(torch.randn(fields["lora_B"].shape, generator=generator) * 0.01)
    return twin, adapter


def theirs(model: LlamaForCausalLM, like: ll.Adapter | None = None, use_dora: bool = False) -> PeftModel:
    """A tree over `model` in PEFT's hands, with the same factors as `like`; adapters in float32 as PEFT has them by default."""
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", use_dora=use_dora)
    wrapped = get_peft_model(tree(model), config)  # type: ignore[arg-type]
    wrapped.eval()
    if like is not None:
        copy_factors(like, wrapped)
    return wrapped  # type: ignore[return-value]


@torch.no_grad()
def copy_factors(adapter: ll.Adapter, wrapped: PeftModel) -> None:
    """PEFT gets our A and B. Raises RuntimeError where it adapts other layers than we do."""
    layers = {name.removeprefix("base_model.model."): layer for name, layer in wrapped.named_modules() if hasattr(layer, "lora_A")}
    if set(layers) != set(adapter.targets):
        raise RuntimeError(f"PEFT adapts {len(layers)} layers, lora_lite {len(adapter.targets)}; they must be the same for a comparison")
    for target, fields in adapter.tensors().items():
        for name in ("lora_A", "lora_B"):
            getattr(layers[target], name)["default"].weight.copy_(fields[name])


def tokens(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2)).to(device)


@torch.no_grad()
def check_same(a: nn.Module, b: nn.Module, ids: Tensor, tolerance: float) -> None:
    """Refuse to time two things that do not compute the same. Raises RuntimeError with their relative distance."""
    ya, yb = a(input_ids=ids).logits.double(), b(input_ids=ids).logits.double()
    distance = float((ya - yb).norm() / yb.norm())
    if not distance <= tolerance:
        raise RuntimeError(f"the two models to be compared differ by {distance:.2e} of their logits, at most {tolerance:.0e} was expected")
