"""One file per method; importing this package registers them all."""

from lora_lite.variants.delora import DeLoRAConfig
from lora_lite.variants.dora import DoRAConfig
from lora_lite.variants.hira import HiRAConfig
from lora_lite.variants.hra import HRAConfig, HRAGSConfig
from lora_lite.variants.ia3 import IA3Config, IA3FFConfig
from lora_lite.variants.lora import LoRAConfig
from lora_lite.variants.lora_xs import LoRAXSConfig
from lora_lite.variants.miss import MiSSConfig
from lora_lite.variants.oft import OFTConfig
from lora_lite.variants.pissa import PiSSAConfig
from lora_lite.variants.road import ROADConfig
from lora_lite.variants.shared import SharedConfig
from lora_lite.variants.vera import VeRAConfig

__all__ = [
    "DeLoRAConfig",
    "DoRAConfig",
    "HRAConfig",
    "HRAGSConfig",
    "HiRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "LoRAConfig",
    "LoRAXSConfig",
    "MiSSConfig",
    "OFTConfig",
    "PiSSAConfig",
    "ROADConfig",
    "SharedConfig",
    "VeRAConfig",
]
