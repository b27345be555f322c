"""Which model families must everything work on? One small random model of each, from a config, offline.

Weights and biases are drawn large enough that a forgotten one shows; dropout is off, attention eager, nothing ends early.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 96
WIDTH, HIDDEN, HEADS, BLOCKS = 32, 64, 4, 2
LENGTH = 7
Inputs = dict[str, Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(rows: int, seed: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator(seed))


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


# -- inputs and losses ----------------------------------------------------------------------------------------------------


def text(model: nn.Module, batch: int, seed: int) -> Inputs:
    ids = tokens(batch, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_to_text(model: nn.Module, batch: int, seed: int) -> Inputs:
    return text(model, batch, seed) | {"decoder_input_ids": tokens(batch, seed + 1, LENGTH - 2)}


def images(model: Any, batch: int, seed: int) -> Inputs:
    return {"pixel_values": noise(batch, 3, model.config.image_size, model.config.image_size, seed=seed)}


def sound(model: Any, batch: int, seed: int) -> Inputs:
    frames = 2 * model.config.max_source_positions
    return {"input_features": noise(batch, model.config.num_mel_bins, frames, seed=seed), "decoder_input_ids": tokens(batch, seed + 1)}


def next_token(model: nn.Module, outputs: Any, inputs: Inputs) -> Tensor:
    """Cross-entropy of each next token of the (decoder's) text."""
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    assert ids is not None
    return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def first_class(model: nn.Module, outputs: Any, inputs: Inputs) -> Tensor:
    """Cross-entropy of the classes 0, 1, 2, ... for the rows."""
    logits = outputs.logits
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])


# -- the table ------------------------------------------------------------------------------------------------------------


def refill(model: nn.Module, seed: int) -> None:
    """Weights N(0, .1), biases N(0, .05), and whatever is left at a constant (norms) is moved off it."""
    draw = generator(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=draw)
            if p.ndim > 1:
                p.copy_(0.1 * values)
            elif name.endswith("bias"):
                p.copy_(0.05 * values)
            else:
                p.add_(0.05 * values)


@dataclass(frozen=True)
class Architecture:
    """One family. `build(seed)` gives the model in eval mode, `inputs` what its forward takes, `loss` a scalar to train on.

    targets    what to adapt in it
    generates  whether `model.generate(**prompt)` writes text, from `inputs` without the decoder's part
    stacks     path of each stack of blocks -> how many blocks it has
    """

    make: Callable[[], Any]
    inputs_of: Callable[[Any, int, int], Inputs] = text
    loss: Callable[[nn.Module, Any, Inputs], Tensor] = next_token
    targets: str = "all-linear"
    generates: bool = True
    stacks: tuple[tuple[str, int], ...] = (("model.layers", BLOCKS),)

    def build(self, seed: int = 0) -> Any:
        with torch.random.fork_rng():
            model = self.make().float()
        refill(model, seed)
        config = getattr(model, "generation_config", None)
        if config is not None:  # random weights must not end a sequence by luck
            config.eos_token_id, config.pad_token_id, config.forced_eos_token_id = None, 0, None
        return model.eval()

    def inputs(self, model: nn.Module, batch: int = 2, seed: int = 0) -> Inputs:
        return self.inputs_of(model, batch, seed)

    def prompt(self, model: nn.Module, batch: int = 2, seed: int = 0) -> Inputs:
        """What `generate` takes: the inputs without the decoder's text."""
        return {k: v for k, v in self.inputs(model, batch, seed).items() if k != "decoder_input_ids"}


def decoder(config: type, model: type, **options: Any) -> Any:
    """A causal language model of the Llama kind."""
    return model(config(**_modern(), **options))


def _modern() -> dict[str, Any]:
    return dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip


def llama(bias: bool = False) -> Any:
    return decoder(hf.LlamaConfig, hf.LlamaForCausalLM, attention_bias=bias, mlp_bias=bias)


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=64, n_inner=HIDDEN,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    ))  # fmt: skip


def opt() -> Any:
    return hf.OPTForCausalLM(hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=HIDDEN, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
        max_position_embeddings=64, word_embed_proj_dim=WIDTH, dropout=0.0, pad_token_id=0, attn_implementation="eager",
    ))  # fmt: skip


def bloom() -> Any:
    return hf.BloomForCausalLM(hf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=BLOCKS, n_head=HEADS, hidden_dropout=0.0, attention_dropout=0.0, pad_token_id=0,
        attn_implementation="eager",
    ))  # fmt: skip


def t5() -> Any:
    """More blocks in the encoder than in the decoder, never fewer: transformers 5.23 sizes the decoder's cache by the encoder."""
    return hf.T5ForConditionalGeneration(hf.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=HIDDEN, d_kv=WIDTH // HEADS, num_layers=BLOCKS + 1, num_decoder_layers=BLOCKS,
        num_heads=HEADS, dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=0, attn_implementation="eager",
    ))  # fmt: skip


def bert(head: type = hf.BertForSequenceClassification) -> Any:
    return head(hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
        max_position_embeddings=64, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    ))  # fmt: skip


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, image_size=16, patch_size=8,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    ))  # fmt: skip


def whisper() -> Any:
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_ffn_dim=HIDDEN, decoder_ffn_dim=HIDDEN, encoder_layers=BLOCKS,
        decoder_layers=BLOCKS + 1, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, num_mel_bins=8, max_source_positions=10,
        max_target_positions=32, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None, attn_implementation="eager",
    ))  # fmt: skip


def gemma3() -> Any:
    """One block with a sliding window shorter than the text, one without."""
    layer_types = ["sliding_attention", "full_attention"]
    return decoder(hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, head_dim=8, sliding_window=4, layer_types=layer_types)


def mixtral() -> Any:
    return decoder(hf.MixtralConfig, hf.MixtralForCausalLM, num_local_experts=4)


def qwen3_moe() -> Any:
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    return decoder(hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, head_dim=8, **experts)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(llama),
    "llama-bias": Architecture(partial(llama, bias=True)),
    "qwen3": Architecture(partial(decoder, hf.Qwen3Config, hf.Qwen3ForCausalLM, head_dim=8)),
    "gemma3": Architecture(gemma3),
    "mistral": Architecture(partial(decoder, hf.MistralConfig, hf.MistralForCausalLM)),
    "phi3": Architecture(partial(decoder, hf.Phi3Config, hf.Phi3ForCausalLM)),
    "mixtral": Architecture(mixtral),
    "qwen3-moe": Architecture(qwen3_moe),
    "gpt2": Architecture(gpt2, stacks=(("transformer.h", BLOCKS),)),
    "opt": Architecture(opt, stacks=(("model.decoder.layers", BLOCKS),)),
    "bloom": Architecture(bloom, stacks=(("transformer.h", BLOCKS),)),
    "t5": Architecture(t5, text_to_text, stacks=(("encoder.block", BLOCKS + 1), ("decoder.block", BLOCKS))),
    "bert": Architecture(bert, loss=first_class, generates=False, stacks=(("bert.encoder.layer", BLOCKS),)),
    "bert-mlm": Architecture(partial(bert, hf.BertForMaskedLM), generates=False, stacks=(("bert.encoder.layer", BLOCKS),)),
    "vit": Architecture(vit, images, first_class, generates=False, stacks=(("vit.layers", BLOCKS),)),
    "whisper": Architecture(whisper, sound, stacks=(("model.encoder.layers", BLOCKS), ("model.decoder.layers", BLOCKS + 1))),
}
