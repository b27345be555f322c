"""Where does a language model come from on a machine with no model? One of 1.8 MB is shipped; this made it, from the standard library.

python -m lora_lite.cli.tiny_lm FOLDER      # again, from this machine's Python: half an hour on one slow core
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from loguru import logger
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_lite.cli.corpus import Corpus, standard_library

END = "<|end|>"  # begins and ends every document
RECORD = "made.json"  # beside the weights: the recipe, the corpus's digest, and the loss it reached


@dataclass(frozen=True)
class Recipe:
    """All that decides the model, with the corpus. 0.87M parameters."""

    vocab: int = 1024
    hidden: int = 128
    intermediate: int = 352
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    context: int = 256
    init: float = 0.06  # standard deviation; transformers' 0.02 learns slower at this width: loss 4.88 against 4.40 after 250 steps
    steps: int = 6000
    rows: int = 8  # small batches learn more per second here: the same tokens in 24, 12, 8 rows gave loss 4.31, 4.00, 3.82
    length: int = 128
    lr: float = 6e-3
    warmup: float = 0.05
    seed: int = 0


def make(folder: Path, corpus: Corpus, recipe: Recipe) -> None:
    """Trains the tokenizer and the model, and puts both into the folder as AutoTokenizer and AutoModelForCausalLM load them."""
    tokenizer = train_tokenizer(corpus, recipe.vocab)
    model, loss = train_model(tokenizer, corpus, recipe)
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    # In half precision on disk; config.json still says float32, and that is what from_pretrained(dtype="auto") makes of it.
    save_file({key: value.half() for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    tokenizer.save_pretrained(folder)
    made = {"recipe": asdict(recipe), "corpus": corpus.digest(), "Python": platform.python_version(), "held_out_loss": loss}
    (folder / RECORD).write_text(json.dumps(made, indent=1) + "\n")


def train_tokenizer(corpus: Corpus, vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be written, none is unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    size = min(sum(map(len, kind)) for kind in (corpus.prose, corpus.code))  # as much of one kind as of the other
    bpe.train_from_iterator((d for kind in (corpus.prose, corpus.code) for d in first(kind, size)), trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])  # every prompt begins a document
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, padding_side="left", clean_up_tokenization_spaces=False
    )


def first(documents: tuple[str, ...], size: int) -> Iterator[str]:
    """Documents spread over the whole corpus, about `size` characters of them."""
    step = max(1, sum(map(len, documents)) // max(size, 1))
    return iter(documents[::step])


def stream(tokenizer: PreTrainedTokenizerFast, documents: tuple[str, ...]) -> Tensor:
    """All documents end to end, END between them, in an order of their own: neighbours in a file are alike."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    ids = tokenizer([documents[i] for i in order], add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(END)
    return torch.tensor([t for document in ids for t in (end, *document)] + [end])


def config(recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocab, hidden_size=recipe.hidden, intermediate_size=recipe.intermediate, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.kv_heads, max_position_embeddings=recipe.context,
        tie_word_embeddings=True, initializer_range=recipe.init, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def train_model(tokenizer: PreTrainedTokenizerFast, corpus: Corpus, recipe: Recipe) -> tuple[LlamaForCausalLM, float]:
    """The trained model and its held-out loss in nats per token, over both kinds. Half of each batch is prose, half code."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config(recipe))
    kept, held = corpus.split()
    train = [stream(tokenizer, kept.prose), stream(tokenizer, kept.code)]
    test = [stream(tokenizer, held.prose), stream(tokenizer, held.code)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.steps, pct_start=recipe.warmup, cycle_momentum=False, div_factor=20, final_div_factor=20
    )
    logger.info("tiny model: {:,} parameters, {:,} tokens", model.num_parameters(), sum(map(len, train)))
    model.train()
    with tqdm(range(recipe.steps), desc="train the tiny model", unit="step") as bar:
        for step in bar:
            loss = next_token_loss(model, windows(train, recipe))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.2f}")
    return model.eval(), held_out_loss(model, test, recipe)


def windows(streams: list[Tensor], recipe: Recipe) -> Tensor:
    """(rows, length) tokens, an equal share from each stream, cut at random places."""
    parts = []
    for tokens in streams:
        starts = torch.randint(len(tokens) - recipe.length, (recipe.rows // len(streams),))
        parts.append(tokens[starts[:, None] + torch.arange(recipe.length)])
    return torch.cat(parts)


def next_token_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, streams: list[Tensor], recipe: Recipe) -> float:
    losses = [next_token_loss(model, t[: len(t) // recipe.length * recipe.length].view(-1, recipe.length)[:200]) for t in streams]
    return float(torch.stack(losses).mean())


if __name__ == "__main__":
    make(Path(sys.argv[1]), standard_library(), Recipe())
