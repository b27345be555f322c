"""How is something from a file said in a message? Short, and safe for a terminal."""

from __future__ import annotations

from collections.abc import Iterable


def problem(what: str, which: Iterable[str]) -> list[str]:
    """ "3 keys missing: a, b, c", or nothing."""
    which = list(which)
    return [f"{len(which)} {'key' if len(which) == 1 else 'keys'} {what}: {listed(which)}"] if which else []


def listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more if names else "none"


def shown(text: str, most: int = 160) -> str:
    """Text from a file, short enough and safe for a message: a hostile one may hold megabytes, or control a terminal."""
    text = text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
    return text if text.isprintable() else ascii(text)


def brief(error: BaseException) -> str:
    return shown(f"{type(error).__name__}: {error}".replace("\n", " "), 300)


def is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
