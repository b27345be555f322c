"""What does a tokenizer for the toy models look like? One word for each token, w2 to w127; 0 pads, 1 stands for what is unknown."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import VOCABULARY

PAD, UNKNOWN = "<pad>", "<unknown>"  # not "w0" and "w1": special tokens are found inside words, so w1 would split w17


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = [PAD, UNKNOWN, *(f"w{i}" for i in range(2, VOCABULARY))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token=PAD, unk_token=UNKNOWN, clean_up_tokenization_spaces=False)


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]
