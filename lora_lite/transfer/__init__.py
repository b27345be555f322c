"""How does an adapter come to a model of another width or depth? `transfer_adapter`; `DimensionProjector` only changes its shape."""

from lora_lite.transfer.carry import transfer_adapter
from lora_lite.transfer.distill import distill_transfer
from lora_lite.transfer.evaluate import Evaluation, evaluate_transfer
from lora_lite.transfer.projector import DimensionProjector
from lora_lite.transfer.result import Moved, TransferResult

__all__ = ["DimensionProjector", "Evaluation", "Moved", "TransferResult", "distill_transfer", "evaluate_transfer", "transfer_adapter"]
