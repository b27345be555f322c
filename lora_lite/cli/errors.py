"""What can a user get wrong? Anything of this type is told in one line, without a traceback, with exit status 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(Exception):
    """The message says what was asked, what was found, what was possible, what to do."""


@contextmanager
def asked_by_user(what: str, *kinds: type[Exception], words: Mapping[str, str] | None = None) -> Iterator[None]:
    """Within the block, errors of these kinds come from what the user typed: `with asked_by_user("--model gpt9", OSError):`.

    what   stands in front, unless the error begins with it
    words  the library's words for its arguments -> the command line's
    """
    try:
        yield
    except kinds as error:
        text = spoken(error, words or {})
        raise UserError(text if text.startswith(what) else f"{what}: {text}") from error


def spoken(error: Exception, words: Mapping[str, str]) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)  # str() of a KeyError is in quotes
    for ours, theirs in words.items():
        text = text.replace(ours, theirs)
    return text
