"""How does `lora-lite` start? Words in, exit status out: 0 done, 1 a check failed, 2 something was typed wrong."""

from __future__ import annotations

import sys

STOPPED = 130  # the exit status of Ctrl-C


def main() -> None:
    """The entry point of the `lora-lite` command and of `python -m lora_lite`."""
    from lora_lite.cli.app import app
    from lora_lite.cli.errors import UserError
    from lora_lite.cli.leaving import Stopped

    try:
        app()
    except UserError as error:
        print(f"lora-lite: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"lora-lite: stopped; {stopped}", file=sys.stderr)
        sys.exit(STOPPED)
    except SystemExit as left:  # what typer makes of Ctrl-C elsewhere, without a word
        if left.code == STOPPED:
            print("lora-lite: stopped", file=sys.stderr)
        raise


__all__ = ["main"]
