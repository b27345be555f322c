"""Who hears the library's log while a command runs? stderr, past the progress bars."""

from __future__ import annotations

import sys

from loguru import logger
from tqdm import tqdm


def speak() -> None:
    """The library's log goes to stderr, past the progress bars."""
    import transformers

    logger.remove()
    logger.add(lambda line: tqdm.write(line, end="", file=sys.stderr), level="INFO", format="<level>{message}</level>")
    logger.enable("lora_lite")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
