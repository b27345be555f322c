"""How does an adapter become a folder that PEFT, and servers that read PEFT's folders, can load, and come back? docs/peft.md."""

from lora_lite.peft_format.reading import from_peft
from lora_lite.peft_format.writing import to_peft

__all__ = ["from_peft", "to_peft"]
