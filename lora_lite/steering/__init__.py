"""How is a trait put on the dial, and how far can the dial go? Contrastive pairs, losses between two poles, training, measuring."""

from lora_lite.steering.calibrate import Calibration, calibrate_c
from lora_lite.steering.losses import completion_nll, margin_nll, pcgrad, reference_kl
from lora_lite.steering.pairs import ContrastivePairs
from lora_lite.steering.report import TrainingReport
from lora_lite.steering.response import DoseResponse, dose_response
from lora_lite.steering.rounds import Round, Rounds, steering_rounds
from lora_lite.steering.rows import Rows
from lora_lite.steering.shifts import block_shifts
from lora_lite.steering.train import null_control, train_steering

__all__ = [
    "Calibration", "ContrastivePairs", "DoseResponse", "Round", "Rounds", "Rows", "TrainingReport", "block_shifts", "calibrate_c",
    "completion_nll", "dose_response", "margin_nll", "null_control", "pcgrad", "reference_kl", "steering_rounds", "train_steering",
]  # fmt: skip
