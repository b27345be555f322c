"""Which of two kinds of text is this? A judge that knows nothing of the adapter or the model: two character n-gram models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from lora_lite.cli.pairs import Contrast
from lora_lite.steering.pairs import Pair

ORDER = 4  # characters: the one predicted and three before it
PRIOR = 4.0  # how many observations the shorter context counts for
ENOUGH = 400_000  # characters to count, of each kind; more makes the judge slower, not better


class NGrams:
    """p(character | the three before it), each order smoothed with the next shorter one (MacKay and Peto 1995)."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.grams: Counter[str] = Counter()
        self.contexts: Counter[str] = Counter()
        room = ENOUGH
        for text in texts:
            for k in range(ORDER):
                grams = [text[i - k : i + 1] for i in range(k, len(text))]
                self.grams.update(grams)
                self.contexts.update(gram[:-1] for gram in grams)
            room -= len(text)
            if room <= 0:
                break

    def log_likelihood(self, text: str) -> float:
        """Nats, over the whole text."""
        total = 0.0
        for i in range(len(text)):
            p = 1 / 256
            for k in range(min(i + 1, ORDER)):
                p = (self.grams[text[i - k : i + 1]] + PRIOR * p) / (self.contexts[text[i - k : i]] + PRIOR)
            total += math.log(p)
        return total


class Judge:
    """P(chosen) of a text, by Bayes' rule from two equal halves; fitted on the training pairs' own texts."""

    def __init__(self, contrast: Contrast) -> None:
        self.__name__ = f"P({contrast.chosen})"
        self.chosen = NGrams(str(p.chosen) for p in contrast.train)
        self.rejected = NGrams(str(p.rejected) for p in contrast.train)
        self.accuracy = self.accuracy_on(contrast.held)

    def log_odds(self, text: str) -> float:
        return self.chosen.log_likelihood(text) - self.rejected.log_likelihood(text)

    def probability(self, text: str) -> float:
        """P(chosen); a half for a text of no characters."""
        return 1 / (1 + math.exp(-max(-50.0, min(50.0, self.log_odds(text)))))

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """A `score` for `ll.dose_response`."""
        return [self.probability(text) for text in texts]

    def accuracy_on(self, pairs: Sequence[Pair], most: int = 100) -> float:
        """The share of texts it puts on their own side."""
        pairs = pairs[:most]
        right = sum((self.log_odds(str(p.chosen)) > 0) + (self.log_odds(str(p.rejected)) < 0) for p in pairs)
        return right / max(1, 2 * len(pairs))
