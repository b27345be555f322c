"""How does an adapter become one safetensors file, and come back whole or not at all? docs/format.md in code; knows no model."""

from lora_lite.checkpoint.contents import FORMAT, RESERVED, CheckpointError, Contents, by_target
from lora_lite.checkpoint.disk import as_path, check_place, in_the_name_of, make_folder, replace
from lora_lite.checkpoint.foreign import check_format
from lora_lite.checkpoint.layout import (
    DTYPES,
    check_entries,
    digest,
    finite,
    header,
    in_place,
    non_finite,
    raw,
    read_header,
    read_tensors,
    strict_json,
)
from lora_lite.checkpoint.names import INSIDE, IS_IT, check_tensors, match_names, misfits, renamed, strip_prefixes
from lora_lite.checkpoint.reading import Findings, aligned, check_whole, is_damaged, look, object_from, read, read_metadata
from lora_lite.checkpoint.words import brief, is_unicode, listed, problem, shown
from lora_lite.checkpoint.writing import as_json, check_metadata, write

__all__ = [
    "CheckpointError", "Contents", "DTYPES", "FORMAT", "Findings", "INSIDE", "IS_IT", "RESERVED", "aligned", "as_json", "as_path",
    "brief", "by_target", "check_entries", "check_format", "check_metadata", "check_place", "check_tensors", "check_whole",
    "digest", "finite", "header", "in_place", "in_the_name_of", "is_damaged", "is_unicode", "listed", "look", "make_folder",
    "match_names", "misfits", "non_finite", "object_from", "problem", "raw", "read", "read_header", "read_metadata",
    "read_tensors", "renamed", "replace", "shown", "strict_json", "strip_prefixes", "write",
]  # fmt: skip
