"""What does `python -m lora_lite` do? The same as the `lora-lite` command."""

from lora_lite.cli import main

if __name__ == "__main__":
    main()
