"""What happens at the targets when the model runs on some data? Knows models, targets and observers; no variants."""

from lora_lite.calibration.gradients import stream_gradients
from lora_lite.calibration.inputs import stream

__all__ = ["stream", "stream_gradients"]
