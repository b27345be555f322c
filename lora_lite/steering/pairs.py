"""What should c tell apart? Pairs of completions of one prompt."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from lora_lite.checkpoint import listed
from lora_lite.steering.arguments import check_seed, check_whole, is_real, told
from lora_lite.steering.rows import Rows, Text, completion_ids, is_text, packed, pad_id, prompt_ids

FIELDS = ("prompt", "chosen", "rejected")
EXPECTED = '{"prompt": ..., "chosen": ..., "rejected": ...}'
SHOWN = 5  # problems that a message lists


class Pair(NamedTuple):
    """Two completions of one prompt, as texts or as token ids. An empty prompt is the beginning of a text."""

    prompt: Text
    chosen: Text
    rejected: Text


class ContrastivePairs(Sequence[Pair]):
    """What c = +1 should say and c = -1 should not, and the other way round. A sequence; slices of it are ContrastivePairs too.

        pairs = ll.ContrastivePairs.from_jsonl("pairs.jsonl")
        pairs = ll.ContrastivePairs([{"prompt": "How was it? ", "chosen": "Lovely.", "rejected": "Dull."}])
        pairs = ll.ContrastivePairs(zip(prompts, chosen, rejected))
        rows = pairs[:8].encode(tokenizer)         # the 8 chosen rows, then the 8 rejected ones

    Each part is a text or a list of token ids. Ids are taken as they are: nothing is put before or after them (this is how
    `tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]` becomes a prompt).
    Raises ValueError listing every bad pair by its number (from 1; in a file its line), with what was found and expected, and
    where there are no pairs at all; TypeError for what cannot hold pairs.
    """

    def __init__(self, pairs: Iterable[Mapping[str, Any] | Sequence[Any]]) -> None:
        if isinstance(pairs, str | os.PathLike):
            raise TypeError(
                f"ContrastivePairs takes the pairs themselves; ContrastivePairs.from_jsonl({str(pairs)!r}) reads a file of them"
            )
        if isinstance(pairs, Mapping) or not isinstance(pairs, Iterable):
            raise TypeError(f"ContrastivePairs takes a list of pairs, each {EXPECTED}; got {type(pairs).__name__} {shortened(pairs)}")
        self._pairs = checked((f"pair {i}", given) for i, given in enumerate(pairs, 1))
        if not self._pairs:
            raise ValueError(f"there are no pairs; ContrastivePairs takes at least one, {EXPECTED}")

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str]) -> ContrastivePairs:
        """One JSON object per line, {"prompt": ..., "chosen": ..., "rejected": ...}; other keys and empty lines are passed over.

        Raises OSError of the system's own kind for a file that cannot be read, ValueError for one that holds other things.
        """
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"from_jsonl takes a file's path; got {told(path)}. ContrastivePairs(...) takes pairs that are there already")
        name = os.fspath(path)
        try:
            with open(path, encoding="utf-8-sig") as file:
                lines = [(f"{name}, line {n}", line) for n, line in enumerate(file, 1) if line.strip()]
        except OSError as error:
            said = type(error)(f"{name}: {unread(Path(path), error)}; expected JSON lines, each {EXPECTED}")
            said.errno = error.errno
            raise said from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not UTF-8 text ({error})") from error
        if not lines:
            raise ValueError(f"{name}: there are no pairs in it; expected a line for each, {EXPECTED}")
        return cls._of(checked((where, parsed(line)) for where, line in lines))

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> ContrastivePairs: ...
    def __getitem__(self, index: int | slice) -> Pair | ContrastivePairs:
        return self._pairs[index] if isinstance(index, int) else self._of(self._pairs[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ContrastivePairs) and self._pairs == other._pairs

    def __repr__(self) -> str:
        return f"ContrastivePairs({len(self)} pairs)"

    @staticmethod
    def _of(pairs: Sequence[Pair]) -> ContrastivePairs:
        made = object.__new__(ContrastivePairs)
        made._pairs = list(pairs)
        return made

    # -- arranging ----------------------------------------------------------------------------------------------------

    def split(self, share: float, seed: int = 0) -> tuple[ContrastivePairs, ContrastivePairs]:
        """(the rest, a random `share` of the pairs): at least one pair on either side. Raises ValueError where that cannot be."""
        check_seed(seed)
        n = max(1, round(share * len(self))) if is_real(share) else 0
        if not n or not 0 < share < 1 or n >= len(self):
            raise ValueError(f"cannot hold out {share!r:.60} of {len(self)} pairs: a share is between 0 and 1, and both sides need a pair")
        order = random.Random(seed).sample(self._pairs, len(self))
        return self._of(order[n:]), self._of(order[:n])

    def balanced_shuffle(self, seed: int = 0) -> ContrastivePairs:
        """The null control's pairs: in exactly half of them, at random, chosen and rejected change places. A random order.

        Of an odd number one pair, at random, is left out: a null must not lean. Raises ValueError for fewer than two pairs.
        """
        check_seed(seed)
        if len(self) < 2:
            raise ValueError(f"a balanced shuffle needs at least 2 pairs, got {len(self)}")
        draw = random.Random(seed)
        order = draw.sample(self._pairs, len(self) // 2 * 2)
        half = len(order) // 2
        swapped = [Pair(p.prompt, p.rejected, p.chosen) for p in order[:half]]
        return self._of(draw.sample([*swapped, *order[half:]], 2 * half))

    def batches(self, size: int, steps: int, seed: int = 0) -> Iterator[ContrastivePairs]:
        """`steps` batches of `size` pairs (or all there are, if fewer); every pair is seen before any is seen again."""
        check_whole(1, size=size)
        check_whole(0, steps=steps)
        draw, waiting, size = random.Random(seed), [], min(size, len(self))
        for _ in range(steps):
            while len(waiting) < size:
                waiting += draw.sample(self._pairs, len(self))
            yield self._of(waiting[:size])
            waiting = waiting[size:]

    # -- tokens -------------------------------------------------------------------------------------------------------

    def tokenised(self, tokenizer: Any = None, eos: bool = True, max_completion: int | None = None) -> ContrastivePairs:
        """The same pairs as token ids; what is ids already stays (then no tokenizer is needed). `tokenised` twice is once.

        Prompt and completions are tokenised apart and their ids put end to end: the seam is never tokenised again, so that one
        prompt's ids are the same before both completions. A space between them belongs to whichever text has it.

        prompt      as tokenizer(prompt) has it, but without what is put after it (T5's and BERT's end), and without a second BOS
                    where the text has one. An empty prompt is BOS, or EOS where there is no BOS: the end of the text before
        completion  without special tokens, with EOS after it unless eos=False or the tokenizer has none
        max_completion  cuts completions, EOS included, to so many tokens

        Raises ValueError listing the pairs whose prompt or completion comes to no tokens, or whose two completions are the same.
        """
        if max_completion is not None:
            check_whole(1, max_completion=max_completion)
        found = [
            Pair(
                prompt_ids(tokenizer, p.prompt),
                *(completion_ids(tokenizer, text, eos)[:max_completion] for text in (p.chosen, p.rejected)),
            )
            for p in self._pairs
        ]
        complain([f"pair {i}: {problem}" for i, p in enumerate(found, 1) if (problem := unusable(p))])
        return self._of(found)

    def encode(
        self, tokenizer: Any = None, eos: bool = True, max_completion: int | None = None, device: torch.device | str = "cpu"
    ) -> Rows:
        """Both poles in one batch: 2n rows, the chosen texts and then the rejected ones, each after its prompt; see `tokenised`.

        Padded on the right whatever the tokenizer's side is, so that positions count from 0 in every architecture; padding is
        masked out, so that which token fills it does not matter and a tokenizer without a pad token is as good.
        """
        pairs = self.tokenised(tokenizer, eos, max_completion)
        texts: Any = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        return packed(texts, pad_id(tokenizer)).to(device)

    def calibration_data(
        self, tokenizer: Any = None, max_completion: int | None = None, most: int = 64, size: int = 8, labels: bool = False
    ) -> dict[str, list[dict[str, Tensor]]]:
        """The first `most` pairs as `ll.attach(..., calibration_data=...)` takes them: {"cho": batches, "rej": batches}, of `size` rows.

        labels  with the completion's tokens as labels: `["cho"]` is then what a variant takes that reads gradients
        """
        check_whole(1, most=most, size=size)
        parts = [self[i : min(i + size, most)] for i in range(0, min(most, len(self)), size)]
        both = [part.encode(tokenizer, max_completion=max_completion) for part in parts]
        both = [rows.inputs() | ({"labels": rows.ids.masked_fill(~rows.completion, -100)} if labels else {}) for rows in both]
        return {side: [{k: v.chunk(2)[i] for k, v in rows.items()} for rows in both] for i, side in enumerate(("cho", "rej"))}


# --- reading and checking ---------------------------------------------------------------------------------------------


def unread(path: Path, error: OSError) -> str:
    """Why a file of pairs cannot be read, in words."""
    if isinstance(error, FileNotFoundError):
        near = listed(sorted(p.name for p in path.parent.glob("*.jsonl"))) if path.parent.is_dir() else "no such folder"
        return f"there is no such file (.jsonl files in {path.parent}: {near})"
    return "it is a folder" if isinstance(error, IsADirectoryError) else f"it cannot be read ({error.strerror or error})"


def parsed(line: str) -> Any:
    """What a line of JSON holds, or the error, to be told with the others."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


def checked(given: Iterable[tuple[str, Any]]) -> list[Pair]:
    """(where, a mapping or three values) as pairs. Raises ValueError listing what is wrong, and where."""
    found, problems = [], []
    for where, value in given:
        pair = pair_of(value)
        (problems if isinstance(pair, str) else found).append(f"{where}: {pair}" if isinstance(pair, str) else pair)
    complain(problems)
    return found


def complain(problems: Sequence[str]) -> None:
    if problems:
        rest = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(f"{len(problems)} bad pairs; expected {EXPECTED}:\n  " + "\n  ".join(problems[:SHOWN]) + rest)


def pair_of(value: Any) -> Pair | str:
    """A pair, or a sentence on what is wrong with it."""
    if isinstance(value, Exception):
        return f"not JSON ({value})"
    if isinstance(value, Mapping):
        if missing := [f for f in FIELDS if f not in value]:
            return f"{missing} missing; it has {sorted(map(str, value))}"
        value = [value[f] for f in FIELDS]
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != len(FIELDS):
        return f"found {type(value).__name__} {shortened(value)}"
    for field, part in zip(FIELDS, value, strict=True):
        if not is_text(part):
            return f"{field!r} is {type(part).__name__} {shortened(part)}, neither a text nor a list of token ids"
        if field != "prompt" and not (part.strip() if isinstance(part, str) else part):
            return f"{field!r} is empty"
    prompt, chosen, rejected = (part if isinstance(part, str) else [int(i) for i in part] for part in value)
    return "'chosen' and 'rejected' are the same" if chosen == rejected else Pair(prompt, chosen, rejected)


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def unusable(pair: Pair) -> str | None:
    if not pair.prompt:
        return (
            "its prompt has no token to start from, and the tokenizer neither BOS nor EOS: give one of them, or prompts that are not empty"
        )
    if not pair.chosen or not pair.rejected:
        return "a completion comes to no tokens"
    return "its two completions come to the same tokens; max_completion may cut them too short" if pair.chosen == pair.rejected else None
