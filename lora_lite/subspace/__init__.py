"""What do many adapters share? One basis per layer, a few numbers per task, and honest figures about what that loses."""

from lora_lite.subspace.diagnosis import Verdict
from lora_lite.subspace.projection import TaskProjection
from lora_lite.subspace.shared import SharedSubspace, Sides
from lora_lite.subspace.source import Update, source_of
from lora_lite.subspace.training import Trainable

__all__ = ["SharedSubspace", "Sides", "TaskProjection", "Trainable", "Update", "Verdict", "source_of"]
