"""How fast and how small is lora_lite, beside the bare model and beside PEFT? `python -m benchmarks` measures all of it."""
