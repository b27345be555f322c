"""What is a file that is no adapter of ours, and what reads it?"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora_lite.checkpoint.contents import FORMAT, FORMAT_VERSION, CheckpointError, is_own
from lora_lite.checkpoint.words import listed, shown
from lora_lite.version import __version__

MAGIC = {
    b"PK\x03\x04": "is a zip or torch.save file; read it with torch.load(..., weights_only=True), save adapters with adapter.save(path)",
    b"\x80": "is a pickle; save adapters with adapter.save(path)",
    b"GGUF": "is a GGUF file of llama.cpp; adapters are loaded from what adapter.save(path) wrote",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository",
    b"<": "is a web page or XML, perhaps a failed download; download the file itself",
    b"{": "is JSON, perhaps a config or an index beside the file meant; give the .safetensors file",
}


def foreign(start: bytes, size: int, length: int) -> str:
    """What a file is that does not begin as safetensors do, from its first bytes."""
    if size == 0:
        return "is empty; was saving it interrupted? Take another copy"
    known = next((words for magic, words in MAGIC.items() if start.startswith(magic)), None)
    broken = f"is cut short or no safetensors file: it announces a header of {length:,} bytes and has {size:,}; take another copy"
    return known or broken


def check_format(source: str, metadata: Mapping[str, str], names: list[str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{source} was not saved by lora_lite: {resembles(metadata, names)} Its keys: {listed(names, 3)}")
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        by = shown(metadata.get("library_version", "unknown"))
        raise CheckpointError(
            f"{source} has format version {shown(str(version))} (written by lora_lite {by}); lora_lite {__version__} reads version "
            f"{FORMAT_VERSION}: update lora_lite, or save the adapter again with the version that made it"
        )


def resembles(metadata: Mapping[str, str], names: list[str]) -> str:
    """What a safetensors file of something else looks like, and what reads it."""
    any_key = lambda pattern: any(re.search(pattern, name) for name in names)  # noqa: E731
    if metadata.get("format") == "lora_lite.subspace":
        return "it is a SharedSubspace; ll.SharedSubspace.load(path) or `lora-lite subspace info` reads it."
    if any_key(r"^base_model\.model\.|\.lora_[AB]\.(\w+\.)?weight$|\.lora_(embedding_[AB]|magnitude_vector)|\.ia3_l"):
        return "it looks like a PEFT adapter; ll.from_peft(model, folder) loads the folder it is in."
    if any_key(r"lora_(down|up)\.weight|^lora_(unet|te)"):
        return "it looks like a LoRA of kohya or diffusers; pipeline.load_lora_weights(file) of diffusers loads it."
    if any_key(r"^(A|B|U|S|Vh|delta_s)\..*__"):
        return "it looks like an adapter of lora-lite's predecessor; load it there, or train it again."
    if all(map(is_own, names)) and names:
        return "its keys are an adapter's, its header is not: perhaps a bare state_dict. docs/format.md says what the header must hold."
    if any_key(r"\.(weight|bias)$"):
        return (
            "it looks like a model's weights; AutoModelForCausalLM.from_pretrained(folder) loads those, adapter.save(path) writes adapters."
        )
    return f"the format in its header is {shown(repr(metadata.get('format')))}; give a file that adapter.save(path) wrote."
