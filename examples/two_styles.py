"""A world small enough to measure exactly: a language of 1536 sentences in two styles, and a tiny Llama that speaks it.

    python examples/two_styles.py         # trains the Llama, puts its style on a dial, prints the table of doses; under a minute

A sentence is valid when its subject and verb agree in number, and when all its words of style are of one style:

    indeed the cats observe the bird , regrettably       formal, plural subject
    hey the cat spots the birds , sadly                   casual, singular subject

All sentences can be listed, so what the model would say at some c needs no sampling: the probability of being valid is a sum
over the list, and so are the odds between the styles, and those between singular and plural subjects, which nobody trained.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll

OPENERS = {"formal": ("indeed", "moreover"), "casual": ("hey", "well")}
VERBS = {"formal": ("observe", "assist", "pursue"), "casual": ("spot", "help", "chase")}
CLOSERS = {"formal": ("regrettably", "fortunately"), "casual": ("sadly", "luckily")}
NOUNS = ("cat", "dog", "bird", "horse")
START, END = "<start>", "<end>"
DOSES = tuple(i / 4 for i in range(-6, 7))


class Sentence(NamedTuple):
    words: tuple[str, ...]
    style: str
    plural: bool


def sentences() -> list[Sentence]:
    """Every valid sentence, the same contents in the same order for both styles: formal ones first, then casual ones."""
    found = []
    for style in OPENERS:
        places = (OPENERS[style], NOUNS, (False, True), VERBS[style], NOUNS, (False, True), CLOSERS[style])
        for opener, who, many, verb, whom, several, closer in itertools.product(*places):
            subject, doing, object_ = who + "s" * many, verb + "s" * (not many), whom + "s" * several
            found.append(Sentence((opener, "the", subject, doing, "the", object_, ",", closer), style, many))
    return found


SENTENCES = sentences()
VOCABULARY = (START, END, *dict.fromkeys(word for s in SENTENCES for word in s.words))
IDS = {word: i for i, word in enumerate(VOCABULARY)}
VALID = {s.words: s for s in SENTENCES}


def parse(ids: list[int]) -> Sentence | None:
    """The sentence that these tokens (up to END) are, or None: the exact validity check, for what was generated."""
    words = [VOCABULARY[i] for i in ids]
    return VALID.get(tuple(words[: words.index(END)])) if END in words else None


def encoded(sentence: Sentence) -> list[int]:
    return [*(IDS[word] for word in sentence.words), IDS[END]]


TABLE = torch.tensor([[IDS[START], *encoded(s)] for s in SENTENCES])  # (1536, 10): every sentence has as many words
FORMAL = torch.tensor([s.style == "formal" for s in SENTENCES])
PLURAL = torch.tensor([s.plural for s in SENTENCES])


def tiny_llama(steps: int = 400, seed: int = 0) -> Any:
    """A Llama of 2 layers, trained on the sentences, all equally likely."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=16, initializer_range=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=1, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    for _ in range(steps):
        ids = TABLE[torch.randint(len(TABLE), (64,))]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def contrast(n: int = 64, seed: int = 0) -> ll.ContrastivePairs:
    """n pairs that say the same: chosen formally, rejected casually. Token ids, so that no tokenizer is needed."""
    half = len(SENTENCES) // 2
    picked = random.Random(seed).sample(range(half), n)
    return ll.ContrastivePairs(([IDS[START]], encoded(SENTENCES[i]), encoded(SENTENCES[half + i])) for i in picked)


class Measured(NamedTuple):
    """style and number: log-odds of formal against casual, of plural against singular, among what is valid; valid: P(valid)."""

    style: float
    number: float
    valid: float


@torch.no_grad()
def measured(model: Any) -> Measured:
    """Exactly, over all that the language can say."""
    logits = model(input_ids=TABLE, use_cache=False).logits[:, :-1].double()
    log_p: Tensor = logits.log_softmax(-1).gather(-1, TABLE[:, 1:, None]).sum((1, 2))
    style, number = (float(log_p[kind].logsumexp(0) - log_p[~kind].logsumexp(0)) for kind in (FORMAL, PLURAL))
    return Measured(style, number, math.exp(log_p.logsumexp(0)))


def sweep(model: Any, adapter: ll.Adapter, cs: tuple[float, ...]) -> dict[float, Measured]:
    found = {}
    for c in cs:
        with adapter(model, c=c):
            found[c] = measured(model)
    return found


def main() -> None:
    torch.set_num_threads(1)
    model, pairs, training = tiny_llama(), contrast(), {"steps": 60, "lr": 3e-3}
    adapter = ll.attach(model, ll.LoRAConfig(r=4, alpha=8), seed=0)
    print("trained:", ll.train_steering(model, adapter, pairs, **training))
    null, report = ll.null_control(model, adapter, pairs, **training)
    print("null:   ", report)
    print(f"\n{'c':>6} {'style':>7} {'number':>7} {'valid':>6}")
    for c, found in sweep(model, adapter, DOSES).items():
        print(f"{c:6.2f} {found.style:7.2f} {found.number:7.2f} {found.valid:6.3f}")
    adapter.detach()
    for c in (-1.0, 1.0):
        with null(model, c=c):
            found = measured(model)
        print(f"{c:6.2f} {found.style:7.2f} {found.number:7.2f} {found.valid:6.3f}  null control")


if __name__ == "__main__":
    main()
