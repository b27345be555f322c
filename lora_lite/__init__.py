"""Adapters as forward hooks on unmodified PyTorch models: attach, dial c up, down, off or negative, save, merge, detach."""

from loguru import logger

from lora_lite.adapter import Adapter
from lora_lite.checkpoint import CheckpointError
from lora_lite.config import AdapterConfig, RankedConfig
from lora_lite.history import HistoryBake, disabled, stack
from lora_lite.lifecycle import adapters, attach, load
from lora_lite.lowrank import LowRank
from lora_lite.peft_format import from_peft, to_peft
from lora_lite.subspace import SharedSubspace, TaskProjection
from lora_lite.target import Target, find_targets
from lora_lite.transfer import DimensionProjector, TransferResult, distill_transfer, evaluate_transfer, transfer_adapter
from lora_lite.variant import REGISTRY, Base, Identity, Initial, ParamSpec, Variant, register
from lora_lite.variants import (
    DeLoRAConfig,
    DoRAConfig,
    HiRAConfig,
    HRAConfig,
    HRAGSConfig,
    IA3Config,
    IA3FFConfig,
    LoRAConfig,
    LoRAXSConfig,
    MiSSConfig,
    OFTConfig,
    PiSSAConfig,
    ROADConfig,
    VeRAConfig,
)
from lora_lite.version import __version__

logger.disable("lora_lite")  # a library is silent; `logger.enable("lora_lite")` lets it speak, as the command line does

__all__ = [
    "Adapter", "AdapterConfig", "Base", "CheckpointError", "DeLoRAConfig", "DimensionProjector", "DoRAConfig", "HRAConfig",
    "HRAGSConfig", "HiRAConfig", "HistoryBake", "IA3Config", "IA3FFConfig", "Identity", "Initial", "LoRAConfig", "LoRAXSConfig",
    "LowRank", "MiSSConfig", "OFTConfig", "ParamSpec", "PiSSAConfig", "REGISTRY", "ROADConfig", "RankedConfig", "SharedSubspace",
    "Target", "TaskProjection", "TransferResult", "Variant", "VeRAConfig", "__version__", "adapters", "attach", "disabled",
    "distill_transfer", "evaluate_transfer", "find_targets", "from_peft", "load", "register", "stack", "to_peft", "transfer_adapter",
]  # fmt: skip
