"""Which release is this? The one home of the number: pyproject reads it here, checkpoints write it."""

__version__ = "0.1.0"
