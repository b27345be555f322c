"""Were these adapters trained on one base? Their fingerprints compared layer by layer, and joined into that of the subspace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lora_lite.base import compare_fingerprint

Fingerprint = Mapping[str, Any]


def restricted(known: Fingerprint | None, targets: Iterable[str]) -> dict[str, Any] | None:
    """What is known of these layers; None where nothing is."""
    layers = {} if known is None else {t: known["targets"][t] for t in targets if t in known["targets"]}
    return {**known, "targets": layers} if known is not None and layers else None


def joined(known: Fingerprint | None, new: Fingerprint | None, task: str) -> dict[str, Any] | None:
    """Both together. Raises ValueError where they are of different bases; adapters without a fingerprint cannot be told."""
    if known is None or new is None:
        return dict(known) if known is not None else None if new is None else dict(new)
    if not isinstance(new.get("targets"), dict):
        raise ValueError(f"adapter {task!r}: the fingerprint of its base cannot be read")
    common = [t for t in known["targets"] if t in new["targets"]]
    sides = [{**f, "targets": {t: f["targets"][t] for t in common}} for f in (known, new)]
    if differences := compare_fingerprint(*sides)[0]:
        raise ValueError(
            f"adapter {task!r} was trained on another base than the others: {'; '.join(differences)}. One subspace serves one base; "
            "adapter.fingerprint = None takes it all the same"
        )
    return {**known, "targets": {**new["targets"], **known["targets"]}}
