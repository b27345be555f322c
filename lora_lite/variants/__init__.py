"""One file per method; importing this package registers them all."""

from lora_lite.variants.dora import DoRAConfig
from lora_lite.variants.hra import HRAConfig, HRAGSConfig
from lora_lite.variants.ia3 import IA3Config, IA3FFConfig
from lora_lite.variants.lora import LoRAConfig
from lora_lite.variants.pissa import PiSSAConfig

__all__ = ["DoRAConfig", "HRAConfig", "HRAGSConfig", "IA3Config", "IA3FFConfig", "LoRAConfig", "PiSSAConfig"]
