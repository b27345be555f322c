"""One file per method; importing this package registers them all."""

from lora_lite.variants.adalora import AdaLoRAConfig
from lora_lite.variants.antipasto import AntiPaSTOConfig
from lora_lite.variants.corda import CorDAConfig
from lora_lite.variants.delora import DeLoRAConfig
from lora_lite.variants.dora import DoRAConfig
from lora_lite.variants.eva import EVAConfig
from lora_lite.variants.hira import HiRAConfig
from lora_lite.variants.hra import HRAConfig, HRAGSConfig
from lora_lite.variants.ia3 import IA3Config, IA3FFConfig
from lora_lite.variants.lora import LoRAConfig
from lora_lite.variants.lora_ga import LoRAGAConfig
from lora_lite.variants.lora_xs import LoRAXSConfig
from lora_lite.variants.miss import MiSSConfig
from lora_lite.variants.oft import OFTConfig
from lora_lite.variants.olora import OLoRAConfig
from lora_lite.variants.pissa import PiSSAConfig
from lora_lite.variants.road import ROADConfig
from lora_lite.variants.shared import SharedConfig
from lora_lite.variants.ssvd import SSVDConfig
from lora_lite.variants.vera import VeRAConfig

__all__ = [
    "AdaLoRAConfig",
    "CorDAConfig",
    "AntiPaSTOConfig",
    "DeLoRAConfig",
    "DoRAConfig",
    "EVAConfig",
    "HRAConfig",
    "HRAGSConfig",
    "HiRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "LoRAConfig",
    "LoRAGAConfig",
    "LoRAXSConfig",
    "MiSSConfig",
    "OFTConfig",
    "OLoRAConfig",
    "PiSSAConfig",
    "ROADConfig",
    "SSVDConfig",
    "SharedConfig",
    "VeRAConfig",
]
