"""On which small models, and with which small configs, do the laws run? Seeded, offline, a few milliseconds each."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_lite as ll
from lora_lite.base import sizes

VOCABULARY = 128


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table of laws: a config small enough for the toys, and whether attaching needs data (activations, or a loss)."""

    config: ll.AdapterConfig
    calibrated: bool = False


FED_FORWARD = r"down|[02]\.up|linear|o_proj|fc2|wo$|dense|c_proj|^2$"  # some layers of every model, and of the MLP not all

# A new variant adds a row here and runs through every law; test_every_registered_variant_has_a_row fails until it does.
VARIANTS: dict[str, Row] = {
    "lora": Row(ll.LoRAConfig(r=4, alpha=6.0)),
    "lora-gaussian": Row(ll.LoRAConfig(r=4, alpha=6.0, init="gaussian")),
    "lora-orthogonal": Row(ll.LoRAConfig(r=4, alpha=6.0, init="orthogonal")),
    "lora-rs": Row(ll.LoRAConfig(r=4, alpha=3.0, rslora=True)),
    "pissa": Row(ll.PiSSAConfig(r=4, alpha=6.0)),
    "pissa-spectrum": Row(ll.PiSSAConfig(r=4, train="spectrum")),
    "pissa-scored": Row(ll.PiSSAConfig(r=4, train="spectrum", selection_score="cho_rej_min_std"), calibrated=True),
    "olora": Row(ll.OLoRAConfig(r=4, alpha=6.0)),
    "eva": Row(ll.EVAConfig(r=4, alpha=6.0), calibrated=True),
    "corda": Row(ll.CorDAConfig(r=4, alpha=6.0), calibrated=True),
    "corda-ipm": Row(ll.CorDAConfig(r=4, alpha=0.6, mode="ipm"), calibrated=True),  # its B0 is large: an update of 0.2 moves far
    "lora_ga": Row(ll.LoRAGAConfig(r=4, alpha=6.0), calibrated=True),
    "adalora": Row(ll.AdaLoRAConfig(r=4, alpha=6.0, target_r=2, total_step=10)),
    "ia3": Row(ll.IA3Config()),
    "ia3-both": Row(ll.IA3Config(feedforward=FED_FORWARD)),
    "ia3_ff": Row(ll.IA3FFConfig()),
    "dora": Row(ll.DoRAConfig(r=4, alpha=6.0)),
    "dora-rs": Row(ll.DoRAConfig(r=4, alpha=3.0, rslora=True)),
    "hra": Row(ll.HRAConfig(r=4)),
    "hra-gs": Row(ll.HRAGSConfig(r=4)),
    "delora": Row(ll.DeLoRAConfig(r=4, strength=1.5)),
    "delora-zeros": Row(ll.DeLoRAConfig(r=4, strength=1.5, init="zeros")),
    "hira": Row(ll.HiRAConfig(r=4)),
    "miss": Row(ll.MiSSConfig(r=3)),
    "lora-xs": Row(ll.LoRAXSConfig(r=4, alpha=6.0, std=0.1)),
    "vera": Row(ll.VeRAConfig(r=6)),
    "oft": Row(ll.OFTConfig(block_size=8)),
    "oft-neumann": Row(ll.OFTConfig(block_size=8, cayley="neumann")),
    "road": Row(ll.ROADConfig(group_size=4)),
    "road-4": Row(ll.ROADConfig(kind="road_4", group_size=8)),
    "antipasto": Row(ll.AntiPaSTOConfig(r=6, block_size=3)),
    "antipasto-u": Row(ll.AntiPaSTOConfig(r=4, block_size=2, rotate="U", max_angle=0.5)),
    "antipasto-scored": Row(ll.AntiPaSTOConfig(r=4, block_size=2, selection_score="wanda"), calibrated=True),
    "ssvd": Row(ll.SSVDConfig(r=4)),
    "ssvd-first-order": Row(ll.SSVDConfig(r=4, cayley="first-order")),
    "shared": Row(ll.SharedConfig(train="core")),
    "shared-factors": Row(ll.SharedConfig(train="factors", r=3)),
}
each_variant = pytest.mark.parametrize("row", VARIANTS.values(), ids=VARIANTS.keys())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Drawn in float64 and then rounded, so that two dtypes see the same numbers."""
    return (torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * std).to(dtype)


def refill(model: nn.Module, seed: int, weight_std: float = 0.08, bias_std: float = 0.05) -> None:
    """Every weight N(0, .08) and every bias N(0, .05), norms at one (PEFT.md section 5): a zero bias hides gate mistakes."""
    draw = generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * bias_std)
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * weight_std)


def _finished(model: PreTrainedModel, dtype: torch.dtype, seed: int) -> Any:
    """Any, because generate() and keyword forwards are not visible on the union of classes."""
    model = model.double()
    refill(model, seed)
    if model.can_generate():  # random weights must not end a sequence early: lengths would differ by luck
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, hidden: int = 64, layers: int = 2, attention: str = "eager") -> Any:
    """The Llama with biases of PEFT.md section 5: hidden 64, 4 heads on 2, intermediate 160, eager attention."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        attention_bias=True,
        mlp_bias=True,
        attn_implementation=attention,  # type: ignore[call-arg]  # taken by the base class
    )
    return _finished(LlamaForCausalLM(config), dtype, seed)


def opt(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """OPT flattens (B, T, d) to (B*T, d) in front of fc1 and fc2."""
    config = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY, max_position_embeddings=64,
        word_embed_proj_dim=32, dropout=0.0, attn_implementation="eager",
    )  # fmt: skip
    return _finished(OPTForCausalLM(config), dtype, seed)


def bert(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """BERT's pooler and classifier see (B, d): one vector per sequence."""
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY, num_labels=5,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    return _finished(BertForSequenceClassification(config), dtype, seed)


def t5(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Under beams T5's encoder sees B rows and its decoder B * beams, within one call."""
    config = T5Config(
        d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    return _finished(T5ForConditionalGeneration(config), dtype, seed)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class MLP(nn.Module):
    """A stack of residual blocks with a buffer in it: the smallest thing with a depth."""

    offset: Tensor

    def __init__(self, width: int = 12, hidden: int = 20, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        self.register_buffer("offset", torch.linspace(-1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offset
        for layer in self.layers:
            x = layer(x)
        return x


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0, width: int = 12, hidden: int = 20, depth: int = 3) -> MLP:
    model = MLP(width, hidden, depth).double()
    refill(model, seed, weight_std=0.3, bias_std=0.2)
    return model.to(dtype).eval()


class Single(nn.Module):
    """One linear layer and nothing else, so that a law can be stated about the layer. `by_keyword` calls linear(input=x)."""

    def __init__(self, linear: nn.Module, by_keyword: bool = False) -> None:
        super().__init__()
        self.linear: Any = linear
        self.by_keyword = by_keyword

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(input=x) if self.by_keyword else self.linear(x)


def single(d_in: int = 10, d_out: int = 14, dtype: torch.dtype = torch.float32, seed: int = 0, by_keyword: bool = False) -> Single:
    model = Single(nn.Linear(d_in, d_out).double(), by_keyword)
    refill(model, seed, weight_std=0.3, bias_std=0.2)
    return model.to(dtype).eval()


class Odd(nn.Linear):
    """A linear that also lets its first four inputs through untouched: what came in as NaN, inf or -0.0 comes out with its bits."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([input[..., :4], super().forward(input)[..., 4:]], dim=-1)


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator(seed))


def attach(model: nn.Module, row: Row, batch: Any = None, **keywords: Any) -> ll.Adapter:
    """Attach a row of the table, with activations or a batch and a loss where it asks for them.

    Keywords that are config fields go to the config. Gradients are the bare model's: what starts from them does not depend on
    the adapters already there.
    """
    fields = {f.name for f in dataclasses.fields(row.config)}
    config = dataclasses.replace(row.config, **{k: keywords.pop(k) for k in list(keywords) if k in fields})
    keywords.setdefault("seed", 0)
    if row.calibrated and ll.REGISTRY[config.variant].observes == "gradients":
        keywords.setdefault("calibration_data", [batch_of(model) if batch is None else batch])
        keywords.setdefault("loss", some_loss)
        with ll.disabled(model):
            return ll.attach(model, config, **keywords)
    elif row.calibrated:
        keywords.setdefault("calibration_data", activations(model, config))
    if isinstance(config, ll.SharedConfig):
        keywords.setdefault("shared", subspace(model, config))
    return ll.attach(model, config, **keywords)


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    """Arguments for any of the models here, made up."""
    names = list(inspect.signature(model.forward).parameters)
    if "input_ids" not in names:
        first = next(m for m in model.modules() if getattr(m, "weight", None) is not None and not len(list(m.children())))
        dtype: Any = first.weight.dtype  # an integer one is packed
        return {names[0]: normal(3, 4, sizes(first)[0], seed=11, dtype=dtype if dtype.is_floating_point else torch.float32)}
    ids = {"input_ids": token_ids(2, 9)}
    return ids | ({"decoder_input_ids": token_ids(2, 5, seed=1)} if "decoder_input_ids" in names else {})


def some_loss(output: Any, batch: Any) -> Tensor:
    """Of everything the model puts out, each number weighed differently."""
    y = getattr(output, "logits", output).double()
    return (y * torch.linspace(-1, 2, y.shape[-1], dtype=torch.float64)).square().mean()


def subspace(model: nn.Module, config: ll.AdapterConfig) -> ll.SharedSubspace:
    """Four directions per side of each target, fewer where it has fewer: what three made-up LoRAs share."""
    layers, where = ll.find_targets(model, config), {f.name: getattr(config, f.name) for f in dataclasses.fields(ll.AdapterConfig)}
    made = []
    for seed in range(3):
        A = {t.name: normal(4, t.d_in, seed=3 * i + seed, dtype=torch.float64) for i, t in enumerate(layers)}
        B = {t.name: normal(t.d_out, 4, seed=7 * i + seed, dtype=torch.float64) for i, t in enumerate(layers)}
        tensors = {name: {"lora_A": A[name], "lora_B": B[name]} for name in A}
        made.append(ll.Adapter(ll.LoRAConfig(**where, r=4), tensors, {t.name: (t.d_in, t.d_out) for t in layers}))
    return ll.SharedSubspace.from_adapters(made, num_components=4)


def resolved(row: Row, target: str, d_in: int, d_out: int) -> Any:
    """The row's config at one layer, on bases of four directions where it needs some."""
    if isinstance(row.config, ll.SharedConfig):
        k = min(4, d_in), min(4, d_out)
        return dataclasses.replace(row.config, rooms={target: (k[1], k[0], row.config.r, 1.0, 0)})
    return row.config.at(target, d_in, d_out)


def activations(model: nn.Module, config: ll.AdapterConfig, rows: int = 32) -> dict[str, dict[str, Tensor]]:
    """Made-up activations of both poles for every target; each pole has directions of its own, so that a score has something to find."""
    found = ll.find_targets(model, config)
    return {
        target.name: {
            "cho": normal(rows, target.d_in, seed=2 * i) * torch.linspace(0.1, 2.0, target.d_in),
            "rej": normal(rows, target.d_in, seed=2 * i + 1) * torch.linspace(2.0, 0.1, target.d_in),
        }
        for i, target in enumerate(found)
    }


def randomise(adapter: ll.Adapter, seed: int = 0, std: float = 0.2) -> ll.Adapter:
    """Draw every trainable tensor at random, in float64 and then rounded: tensors at zero hide mistakes. Returns the adapter."""
    draw = generator(seed)
    with torch.no_grad():
        for _, parameter in sorted(adapter.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * std)
    return adapter


def tensors_at(model: nn.Module, target: str, name: str = "default") -> dict[str, nn.Parameter]:
    """One adapter's Parameters on one layer, frozen ones too, under the names their variant declares. Empty when it is not there."""
    suffix = "" if name == "default" else f"__{name}"
    named = {key: p for key, p in model.get_submodule(target).named_parameters(recurse=False) if key.startswith("lora_")}
    return {key.removesuffix(suffix): p for key, p in named.items() if (key.endswith(suffix) if suffix else "__" not in key)}


def checked_again(config: ll.AdapterConfig, fields: dict[str, Any]) -> None:
    """As if it had been made with these fields: past the tests' own type check, which users do not have."""
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    config.__post_init__()
