"""Adapters as forward hooks on unmodified PyTorch models: attach, dial c up, down, off or negative, save, merge, detach."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loguru import logger

from lora_lite.adapter import Adapter
from lora_lite.checkpoint import CheckpointError
from lora_lite.config import AdapterConfig, RankedConfig
from lora_lite.history import HistoryBake, disabled, stack
from lora_lite.lifecycle import adapters, attach, load, read
from lora_lite.lowrank import LowRank
from lora_lite.target import Target, find_targets
from lora_lite.variant import REGISTRY, Base, Identity, Initial, ParamSpec, Variant, register
from lora_lite.variants import (
    AdaLoRAConfig,
    AntiPaSTOConfig,
    CorDAConfig,
    DeLoRAConfig,
    DoRAConfig,
    EVAConfig,
    HiRAConfig,
    HRAConfig,
    HRAGSConfig,
    IA3Config,
    IA3FFConfig,
    LoRAConfig,
    LoRAGAConfig,
    LoRAXSConfig,
    MiSSConfig,
    OFTConfig,
    OLoRAConfig,
    PiSSAConfig,
    ROADConfig,
    SharedConfig,
    SSVDConfig,
    VeRAConfig,
)
from lora_lite.version import __version__

if TYPE_CHECKING:  # rooms that are entered when they are asked for: importing all of them takes twice as long
    from lora_lite.peft_format import from_peft, to_peft
    from lora_lite.steering import (
        ContrastivePairs,
        DoseResponse,
        block_shifts,
        calibrate_c,
        completion_nll,
        dose_response,
        margin_nll,
        null_control,
        pcgrad,
        reference_kl,
        steering_rounds,
        train_steering,
    )
    from lora_lite.subspace import SharedSubspace, TaskProjection
    from lora_lite.transfer import DimensionProjector, TransferResult, distill_transfer, evaluate_transfer, transfer_adapter

logger.disable("lora_lite")  # a library is silent; `logger.enable("lora_lite")` lets it speak, as the command line does

_ROOMS = {
    "from_peft": "peft_format",
    "to_peft": "peft_format",
    "ContrastivePairs": "steering",
    "DoseResponse": "steering",
    "block_shifts": "steering",
    "calibrate_c": "steering",
    "completion_nll": "steering",
    "dose_response": "steering",
    "margin_nll": "steering",
    "null_control": "steering",
    "pcgrad": "steering",
    "reference_kl": "steering",
    "steering_rounds": "steering",
    "train_steering": "steering",
    "SharedSubspace": "subspace",
    "TaskProjection": "subspace",
    "DimensionProjector": "transfer",
    "TransferResult": "transfer",
    "distill_transfer": "transfer",
    "evaluate_transfer": "transfer",
    "transfer_adapter": "transfer",
}


def __getattr__(name: str) -> Any:
    """A public name of a room that nobody has entered yet."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AdaLoRAConfig", "Adapter", "AdapterConfig", "AntiPaSTOConfig", "Base", "CheckpointError", "ContrastivePairs", "CorDAConfig",
    "DeLoRAConfig", "DimensionProjector", "DoRAConfig", "DoseResponse", "EVAConfig", "HRAConfig", "HRAGSConfig", "HiRAConfig",
    "HistoryBake", "IA3Config", "IA3FFConfig", "Identity", "Initial", "LoRAConfig", "LoRAGAConfig", "LoRAXSConfig", "LowRank",
    "MiSSConfig", "OFTConfig", "OLoRAConfig", "ParamSpec", "PiSSAConfig", "REGISTRY", "ROADConfig", "RankedConfig", "SSVDConfig",
    "SharedConfig", "SharedSubspace", "Target", "TaskProjection", "TransferResult", "Variant", "VeRAConfig", "__version__",
    "adapters", "attach", "block_shifts", "calibrate_c", "completion_nll", "disabled", "distill_transfer", "dose_response",
    "evaluate_transfer", "find_targets", "from_peft", "load", "margin_nll", "null_control", "pcgrad", "read", "reference_kl",
    "register", "stack", "steering_rounds", "to_peft", "train_steering", "transfer_adapter",
]  # fmt: skip
