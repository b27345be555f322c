"""What does the model write at many c at once? One row per (c, prompt), and no row knows of the others."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from lora_lite.adapter import Adapter
from lora_lite.dial import check_float
from lora_lite.running import undisturbed
from lora_lite.steering.arguments import check_adapter, check_ids, check_list, check_seed, check_whole, is_real, told
from lora_lite.steering.rows import is_text, pad_id
from lora_lite.target import check_model

SAMPLING = ("do_sample", "top_k", "top_p", "num_return_sequences", "streamer", "logits_processor")
STARTS = ("input_ids", "attention_mask", "inputs", "inputs_embeds")


class Prompt(NamedTuple):
    """A prompt as text, for people, and as tokens, for the model."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """What was written after `start`, the prompt of that number, at one c. `ids`: the new tokens, up to and with the end of text."""

    c: float
    prompt: int
    draw: int
    start: tuple[int, ...]
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Writing:
    """How to generate: `samples` continuations of each prompt at each c, at most `max_rows` rows in one batch.

    At temperature 0 greedily (or by beams: keywords={"num_beams": 4}), else by adding Gumbel noise to the logits, which draws
    from their softmax. A row's noise depends on the seed, its prompt and its number alone: what it writes is the same in any
    batch, and a difference between two doses is not one between two draws.
    """

    max_new_tokens: int = 48
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0
    max_rows: int = 256
    progress: bool = True
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole(1, max_new_tokens=self.max_new_tokens, samples=self.samples, max_rows=self.max_rows)
        check_seed(self.seed)
        if not (is_real(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature!r:.60}")
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples={self.samples} at temperature 0 would all be the same; give a temperature, e.g. 0.8")
        if taken := [name for name in SAMPLING if name in self.keywords]:
            raise ValueError(f"{taken} cannot be handed on to generate: rows must not depend on each other; use temperature= and samples=")
        if taken := [name for name in STARTS if name in self.keywords]:
            raise ValueError(f"{taken} are made of the prompts: give those, as texts or as lists of token ids")
        if self.temperature and self.keywords.get("num_beams", 1) != 1:
            raise ValueError(f"num_beams={self.keywords['num_beams']} with temperature={self.temperature}: beams are greedy; choose one")


def as_prompts(given: Sequence[str | Sequence[int]], tokenizer: Any) -> list[Prompt]:
    """Strings as the tokenizer reads them, or tokens as they are (of a chat template, say)."""
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping) and getattr(given, "ndim", 1)
    prompts = list(given) if several else []
    if not prompts:
        raise ValueError(f"prompts is a list of strings or of token lists, at least one; got {given!r:.60}")
    prompts = [p.tolist() if hasattr(p, "tolist") else p for p in prompts]  # type: ignore[attr-defined]
    if wrong := [i for i, p in enumerate(prompts) if not is_text(p)]:
        raise TypeError(
            f"prompts[{wrong[0]}] is {told(prompts[wrong[0]])}, neither a text nor a list of token ids. One prompt's ids are [ids]; of a "
            'chat they are tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]'
        )
    reads = callable(tokenizer) or not any(isinstance(prompt, str) for prompt in prompts)
    if not (reads and hasattr(tokenizer, "decode")):
        said = "None" if tokenizer is None else f"{type(tokenizer).__name__} {tokenizer!r:.60}"
        raise TypeError(f"tokenizer is {said}; what is written has to be read: give the model's, AutoTokenizer.from_pretrained(...)")
    return [as_prompt(prompt, tokenizer) for prompt in prompts]


def as_prompt(prompt: str | Sequence[int], tokenizer: Any) -> Prompt:
    if not isinstance(prompt, str):
        return Prompt(tokenizer.decode(list(prompt)), started(tuple(map(int, prompt)), tokenizer))
    return Prompt(prompt, started(tuple(tokenizer(prompt)["input_ids"]), tokenizer))


def started(ids: tuple[int, ...], tokenizer: Any) -> tuple[int, ...]:
    """Nothing at all cannot be continued: then what begins a text, or else what ends the one before."""
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    if not ids and start is None:
        raise ValueError("a prompt without tokens, and the tokenizer names neither a beginning nor an end of text to start from")
    return ids or (int(start),)  # type: ignore[arg-type]


def check_doses(cs: Sequence[float] | Tensor) -> list[float]:
    """Each dose once, in the order given. Raises ValueError when there is none, as Adapter's c where one is no finite number."""
    check_list("cs", cs, "[-1, -0.5, 0.5, 1]")
    doses = list(dict.fromkeys(check_float(c) + 0.0 for c in cs))  # + 0.0: -0.0 is 0
    if not doses:
        raise ValueError("cs is empty; give the doses to try, e.g. [-1, -0.5, 0.5, 1]")
    return doses


@contextmanager
def on_model(model: nn.Module, adapter: Adapter, guest: str = "steering_guest") -> Iterator[Adapter]:
    """The adapter on the model at c=0; where it is not attached a copy is, for the block, by a name that is not taken.

    The model comes out as it went in: modes, flags, random state.
    """
    check_model(model)
    check_adapter(adapter)
    here = adapter if adapter.attached else copy.deepcopy(adapter)
    if here is not adapter:
        here.name = guest
    with undisturbed(model), here(model, c=0.0):
        yield here


def write(model: Any, adapter: Adapter, tokenizer: Any, prompts: Sequence[Prompt], cs: Sequence[float], how: Writing) -> list[Sample]:
    """All rows in one `generate` where max_rows allows it: by dose, then prompt, then draw. Inside `on_model`."""
    check_ids(model, (p.ids for p in prompts), "the prompts")
    asked = [(c, i, draw) for c in cs for i in range(len(prompts)) for draw in range(how.samples)]
    found = []
    with tqdm(total=len(asked) * how.max_new_tokens, desc=f"generate at {len(cs)} c", unit="token", disable=not how.progress) as bar:
        for part in chunks(asked, adapter.variant.row_c, how.max_rows):
            written = generate(model, adapter, tokenizer, [prompts[i].ids for _, i, _ in part], part, how, bar)
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            found += [Sample(*row, prompts[row[1]].ids, tuple(ids), text) for row, ids, text in zip(part, written, texts, strict=True)]
    return found


Asked = tuple[float, int, int]  # c, prompt, draw


def chunks(asked: Sequence[Asked], row_c: bool, at_most: int) -> Iterator[Sequence[Asked]]:
    """Rows for one generate: as many as allowed, of one c where the variant cannot tell rows apart."""
    groups = [asked] if row_c else [[row for row in asked if row[0] == c] for c in dict.fromkeys(c for c, _, _ in asked)]
    for group in groups:
        yield from (group[i : i + at_most] for i in range(0, len(group), at_most))


def generate(
    model: Any, adapter: Adapter, tokenizer: Any, starts: Sequence[Sequence[int]], part: Sequence[Asked], how: Writing, bar: tqdm
) -> list[list[int]]:
    """What follows each start at that row's c."""
    doses = [c for c, _, _ in part]
    c = doses[0] if len(set(doses)) == 1 else torch.tensor(doses, dtype=torch.float64)
    pad, ends = pad_id(tokenizer), end_ids(model, how.keywords)
    encoded = is_encoder_decoder(model)  # an encoder's positions may be absolute: there padding goes to the right
    ids, mask = padded(starts, pad, left=not encoded)
    device = next(model.parameters()).device
    step = Step(bar, part, how)
    settings = {"do_sample": False, "pad_token_id": pad, "max_new_tokens": how.max_new_tokens, **how.keywords}
    with adapter(model, c=c):
        out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), logits_processor=[step], **settings)
    new = out[:, 1 if encoded else ids.shape[1] :].tolist()
    step.finish()
    return [until_end(tokens, ends) for tokens in new]


class Step:
    """A logits processor that sees every step: it adds the rows' noise, and moves the bar (a streamer would refuse beams)."""

    def __init__(self, bar: tqdm, part: Sequence[Asked], how: Writing) -> None:
        self.bar, self.part = bar, part
        self.left, self.temperature, self.fresh = how.max_new_tokens, how.temperature, True
        streams = [(prompt, draw) for _, prompt, draw in part]
        number = {stream: i for i, stream in enumerate(dict.fromkeys(streams))}
        self.index = torch.tensor([number[stream] for stream in streams])
        self.seeds = [hash((how.seed, *stream)) & 0x7FFFFFFF for stream in number]  # of integers: the same in every process
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Int[Tensor, "n t"], scores: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        if self.fresh:
            self.check(scores)
        self.fresh = False
        self.left -= 1
        self.bar.update(len(self.part))
        return scores / self.temperature + self.noise(scores)[self.index.to(scores.device)] if self.temperature else scores

    def check(self, scores: Float[Tensor, "n v"]) -> None:
        """A model that is out of its depth at a large c is a finding; at c=0 it is a mistake."""
        beams = len(scores) // len(self.part)
        wrong = scores.isnan().any(-1).view(-1, beams).any(-1).tolist()
        if any(nan and c == 0 for nan, (c, _, _) in zip(wrong, self.part, strict=True)):
            raise RuntimeError(
                "the model's logits are NaN at c=0. Where prompts are padded, transformers' eager attention does that in float64: "
                'model.set_attn_implementation("sdpa"), or prompts of one length'
            )

    def noise(self, scores: Float[Tensor, "n v"]) -> Float[Tensor, "streams v"]:
        """-log(E) with E exponential is Gumbel noise; one draw per stream, which all its doses share."""
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        drawn = torch.empty(len(self.generators), scores.shape[-1], dtype=torch.float32, device=scores.device)
        for row, generator in zip(drawn, self.generators, strict=True):
            row.exponential_(generator=generator)
        return -drawn.log().to(scores.dtype)

    def finish(self) -> None:
        """All rows ended early."""
        self.bar.update(len(self.part) * self.left)


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool = False) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
    """Ids and attention mask. On the left, rows end together and continue at one place."""
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    ids = [[pad] * gap + [*row] if left else [*row] + [pad] * gap for row, gap in zip(rows, gaps, strict=True)]
    mask = [[0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def end_ids(model: Any, keywords: Mapping[str, Any]) -> set[int]:
    """Where a text ends: what generate stops at, one token or several."""
    end = keywords.get("eos_token_id", model.generation_config.eos_token_id)
    return set() if end is None else {end} if isinstance(end, int) else set(map(int, end))


def until_end(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]
