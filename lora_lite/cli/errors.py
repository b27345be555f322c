"""What can a user get wrong? Anything of this type is told in one line, without a traceback, with exit status 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """The message says what was asked, what was found, what was possible, what to do."""


@contextmanager
def asked_by_user(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Within the block, errors of these kinds come from what the user typed: `with asked_by_user("--model gpt9", OSError):`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {error}") from error
