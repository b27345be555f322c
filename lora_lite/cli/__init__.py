"""How does `lora-lite` start? Words in, exit status out: 0 done, 1 a check failed, 2 something was typed wrong."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point of the `lora-lite` command and of `python -m lora_lite`."""
    from lora_lite.cli.app import app
    from lora_lite.cli.errors import UserError

    try:
        app()
    except UserError as error:
        print(f"lora-lite: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("lora-lite: stopped", file=sys.stderr)
        sys.exit(130)


__all__ = ["main"]
