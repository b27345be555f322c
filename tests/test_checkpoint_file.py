"""A file is the adapter, bit for bit, or an error that says what it is instead; saving leaves the old file or the new one."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite import checkpoint
from lora_lite.checkpoint import (
    CheckpointError,
    Contents,
    check_tensors,
    layout,
    match_names,
    read,
    reading,
    renamed,
    strip_prefixes,
    write,
    writing,
)

pytestmark = pytest.mark.fast

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def contents(seed: int = 0, **changes: Any) -> Contents:
    g = torch.Generator().manual_seed(seed)
    tensors = {t: {"lora_A": torch.randn(2, 5, generator=g), "lora_B": torch.randn(3, 2, generator=g)} for t in (Q, K)}
    made = Contents(
        config=ll.LoRAConfig(r=2, alpha=3.5, targets=("q_proj", "k_proj"), alpha_pattern={"k_proj": 1.0 / 3.0}),
        tensors=tensors,
        also={"score.weight": torch.randn(4, 2, generator=g).to(torch.bfloat16)},
        fingerprint={"architecture": "LlamaForCausalLM", "targets": {Q: {"shape": [3, 5], "samples": None}}},
        metadata={"note": "Grüße, 世界 🌍\n\x1b", "empty": ""},
        diagnostics={"tail_depth": 0.1, "spread": math.inf},
    )
    return dataclasses.replace(made, **changes)


def bits(v: Tensor) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    flat = v.detach().contiguous().reshape(-1)
    return v.dtype, tuple(v.shape), flat.view(torch.uint8).tolist() if v.numel() else []


def image(c: Contents) -> Any:
    """Everything in it, comparable with ==, tensors by their bits."""
    tensors = {t: {f: bits(v) for f, v in fields.items()} for t, fields in c.tensors.items()}
    numbers = {k: repr(v) for k, v in c.diagnostics.items()}  # NaN too
    return c.config, tensors, {n: bits(v) for n, v in c.also.items()}, c.fingerprint, c.metadata, numbers


def file_of(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


def saved(path: Path, **changes: Any) -> bytes:
    write(path, contents(**changes))
    return path.read_bytes()


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 3000
    return str(caught.value)


# --- the round trip ----------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(path: Path):
    first = contents()
    write(path, first)
    again = read(str(path))
    assert image(again) == image(first) and again.source == str(path)
    assert [list(again.tensors), list(again.tensors[Q])] == [[Q, K], ["lora_A", "lora_B"]]  # the order too


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool], ids=str)
def test_every_dtype_keeps_its_bits(path: Path, dtype: torch.dtype):
    values = [0.0, -0.0, 1.0, -1.0, 1 / 3, 5e-324, 6e-8, 1e-40, 1e4] if dtype.is_floating_point else [0, 1, 100, 0, 1, 1, 0, 7, 9]
    v = torch.tensor(values, dtype=torch.float64 if dtype.is_floating_point else torch.int64).to(dtype)
    if dtype.is_floating_point:
        assert v[1].signbit()  # -0.0 is in the data
    variety = {"lora_1d": v, "lora_2d": v.reshape(3, 3).T, "lora_0d": v[2], "lora_none": v[:0].reshape(0, 4), "lora_step": v[::2]}
    first = contents(tensors={Q: variety, K: {"lora_A": torch.ones(3, dtype=torch.float64)}})
    write(path, first)
    assert image(read(path)) == image(first)
    assert all(t.is_contiguous() for t in read(path).tensors[Q].values())


def test_optional_parts_may_be_absent(path: Path):
    bare = Contents(ll.IA3Config(), {"": {"lora_l": torch.ones(3)}})  # a model that is itself the layer has no name
    write(path, bare)
    assert image(read(path)) == image(bare)
    assert parts(path.read_bytes())[0]["__metadata__"].keys() == {"format", "format_version", "library_version", "config", "sha256"}


def test_tensors_that_share_memory_are_saved_whole(path: Path):
    whole = torch.arange(12.0)
    first = contents(tensors={Q: {"lora_A": whole[:6], "lora_B": whole[3:9]}}, also={"x": whole})
    write(path, first)
    assert image(read(path)) == image(first)


def test_parameters_of_any_layout_are_saved_and_left_alone(path: Path):
    p = torch.nn.Parameter(torch.randn(4, 3).T)
    write(path, contents(tensors={Q: {"lora_A": p}}))
    assert p.requires_grad and not p.is_contiguous() and not read(path).tensors[Q]["lora_A"].requires_grad


def test_what_was_read_does_not_depend_on_the_file(path: Path):
    saved(path)
    again = read(path)
    before = image(again)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    path.unlink()
    assert image(again) == before


def test_the_same_contents_give_the_same_bytes(path: Path):
    first = saved(path)
    write(path, read(path))
    assert path.read_bytes() == first
    assert saved(path, seed=1) != first


def test_safetensors_itself_reads_the_file(path: Path):
    first = contents()
    write(path, first)
    loaded = safetensors.torch.load_file(path)
    assert {n: bits(v) for n, v in loaded.items()} == {n: bits(v) for n, v in first.named()}
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["note"] == first.metadata["note"]


def test_a_file_written_by_hand_with_safetensors_is_read(path: Path):
    first = contents(diagnostics={})
    metadata = {"format": "lora_lite", "format_version": "1", "config": first.config.to_json(), "also": '["score.weight"]', "who": "me"}
    safetensors.torch.save_file({n: v.contiguous() for n, v in first.named()}, path, metadata)
    again = read(path)
    assert again.metadata == {"who": "me"} and again.fingerprint is None
    assert {n: bits(v) for n, v in again.named()} == {n: bits(v) for n, v in first.named()}


# --- the golden file: docs/format.md -----------------------------------------------------------------------------------

CONFIG = '{"variant": "lora", "r": 1, "alpha": 2.0}'
SHA256 = "791d62c6c98e8d140feace4e0e5486be9d606566725f1fc1798c1ddd42323179"
GOLDEN_HEADER = (
    '{"__metadata__":{"also":"[\\"head.bias\\"]","config":"{\\"variant\\": \\"lora\\", \\"r\\": 1, \\"alpha\\": 2.0}",'
    '"diagnostics":"{\\"depth\\": 0.5}","fingerprint":"{\\"architecture\\": \\"Tiny\\"}","format":"lora_lite","format_version":"1",'
    '"library_version":"0.0.0","note":"hé","sha256":"' + SHA256 + '"},'
    '"m.0.lora_A":{"dtype":"BF16","shape":[1,3],"data_offsets":[8,14]},"m.0.lora_B":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
    '"head.bias":{"dtype":"F16","shape":[],"data_offsets":[14,16]}}'
)
GOLDEN_DATA = bytes.fromhex(
    "0000803f 00000080  803f 00c0 003f  0035"
)  # B = [1, -0.0] float32; A = [1, -2, .5] bfloat16; bias = .3125 float16


def golden() -> bytes:
    text = GOLDEN_HEADER.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + GOLDEN_DATA


def golden_contents() -> Contents:
    A, B = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.bfloat16), torch.tensor([[1.0], [-0.0]])
    also = {"head.bias": torch.tensor(0.3125, dtype=torch.float16)}
    config = ll.LoRAConfig(r=1, alpha=2.0)
    return Contents(config, {"m.0": {"lora_A": A, "lora_B": B}}, also, {"architecture": "Tiny"}, {"note": "hé"}, {"depth": 0.5})


def test_the_golden_file_is_written_byte_for_byte(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing, "__version__", "0.0.0")
    monkeypatch.setattr(writing, "config_text", lambda config: CONFIG)  # a field added to a config is no change of the format
    write(path, golden_contents())
    assert path.read_bytes() == golden()


def test_the_golden_file_is_read(path: Path):
    path.write_bytes(golden())
    assert image(read(path)) == image(golden_contents())


def test_the_golden_hash_follows_from_the_words_of_the_format():
    """docs/format.md with nothing but struct, json and hashlib, as a reader in another language would."""
    header, data = parts(golden())
    metadata = header.pop("__metadata__")
    total = hashlib.sha256()
    for part in [p.encode() for k, v in sorted(metadata.items()) if k != "sha256" for p in (k, v)]:
        total.update(struct.pack("<Q", len(part)) + part)
    for name, entry in sorted(header.items()):
        lo, hi = entry["data_offsets"]
        for part in (name.encode(), entry["dtype"].encode(), ",".join(map(str, entry["shape"])).encode(), data[lo:hi]):
            total.update(struct.pack("<Q", len(part)) + part)
    assert total.hexdigest() == metadata["sha256"]
    assert struct.unpack("<2f", data[:8]) == (1.0, -0.0) and struct.unpack("<e", data[14:16]) == (0.3125,)


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_single_flipped_bit_is_found(path: Path, bits: int):
    """Nothing in the file is outside the hash. (A letter's case in a JSON escape would be, "\\u001b": the golden file has none.)"""
    rng, data = random.Random(0), golden()
    for i in range(len(data)):
        for bit in rng.sample(range(8), bits):
            path.write_bytes(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :])
            with pytest.raises(CheckpointError):
                read(path)


def test_the_document_names_every_reserved_key():
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    assert all(f"`{key}`" in text for key in (*checkpoint.RESERVED, *checkpoint.DTYPES.values(), *checkpoint.INSIDE))
    assert GOLDEN_DATA.hex(" ") in text and SHA256 in text


# --- what is not saved -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tensors_that_are_not_finite_are_refused_by_name(path: Path, value: float, dtype: torch.dtype):
    old = saved(path)
    c = contents()
    c.tensors[K]["lora_B"] = c.tensors[K]["lora_B"].to(dtype)
    c.tensors[K]["lora_B"][1, 1] = value
    c.also["score.weight"][0, 0] = value
    with pytest.raises(CheckpointError, match=rf"2 keys holding NaN or infinity: {K}\.lora_B, score\.weight"):
        write(path, c)
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]


CANNOT_BE_SAVED = {
    "reserved keys": ({"metadata": {"format": "x", "sha256": "y", "ok": "z"}}, "2 keys reserved .*fingerprint.*: format, sha256"),
    "a number in the metadata": ({"metadata": {"steps": 3, "ok": "z"}}, "json.dumps it.*steps"),
    "a number as a key": ({"metadata": {3: "x"}}, "json.dumps it.*3"),
    "half a surrogate pair": ({"metadata": {"note": "\ud83d"}}, "surrogate pair.*note"),
    "a stray field": ({"tensors": {Q: {"weight": torch.ones(1)}}}, "neither <layer>.lora_<field>.*q_proj.weight"),
    "an adapter's name": ({"tensors": {Q: {"lora_A__brief": torch.ones(1)}}}, "keys carry no adapter's name.*lora_A__brief"),
    "no tensors": ({"tensors": {}}, "holds no adapter's tensors"),
    "a key twice": ({"also": {f"{Q}.lora_A": torch.ones(1)}}, f"given to several tensors: {Q}.lora_A"),
    "safetensors' own name": ({"also": {"__metadata__": torch.ones(1)}}, "safetensors keeps for itself"),
    "a dtype": ({"also": {"z": torch.ones(1, dtype=torch.complex128)}}, r"a dtype the format does not hold: z \(torch.complex128\)"),
    "a name": ({"also": {"\ud83d": torch.ones(1)}}, "that is not Unicode"),
    "a fingerprint of objects": ({"fingerprint": {"model": torch.nn.Linear}}, "fingerprint is not JSON"),
    "a fingerprint that changes": ({"fingerprint": {"shape": (1, 2)}}, "fingerprint changes in JSON"),
    "NaN in a fingerprint": ({"fingerprint": {"x": math.nan}}, "fingerprint is not JSON"),
}


@pytest.mark.parametrize("case", CANNOT_BE_SAVED)
def test_what_could_not_be_read_is_not_saved(path: Path, case: str):
    changes, message = CANNOT_BE_SAVED[case]
    old, bad = saved(path), contents()
    for name, value in changes.items():
        object.__setattr__(bad, name, value)  # past the annotations, which say the same
    with pytest.raises(CheckpointError, match=message):
        write(path, bad)
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]


def test_a_header_that_safetensors_would_refuse_is_not_saved(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layout, "HEADER_LIMIT", 100_000)
    with pytest.raises(CheckpointError, match="safetensors allows 100,000"):
        write(path, contents(metadata={"note": "x" * 100_000}))
    assert not path.exists()


def test_a_config_that_does_not_survive_json_is_not_saved(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ll.LoRAConfig, "to_dict", lambda self: {"variant": "lora", "rank": 3})
    with pytest.raises(CheckpointError, match=r"does not survive JSON.*no fields \['rank'\]"):
        write(path, contents())
    assert not path.exists()


# --- where it is saved -------------------------------------------------------------------------------------------------


def test_folders_are_made_and_nothing_else(tmp_path: Path):
    write(tmp_path / "a" / "b" / "c.safetensors", contents())
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["a", "a/b", "a/b/c.safetensors"]


def test_a_link_is_followed(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "real" / "a")
    write(tmp_path / "latest", contents())
    assert (tmp_path / "latest").is_symlink() and image(read(tmp_path / "real" / "a")) == image(contents())


def test_the_file_has_the_rights_a_new_file_has(path: Path, tmp_path: Path):
    saved(path)
    (tmp_path / "other").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_longest_name_can_be_saved(tmp_path: Path):
    write(tmp_path / ("x" * 255), contents())


@pytest.mark.parametrize("function", [read, lambda path: write(path, contents())], ids=["read", "write"])
def test_only_files_are_files(tmp_path: Path, function: Callable[[Path], object]):
    with pytest.raises(IsADirectoryError, match="is a directory"):
        function(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="device or a pipe"):
        function(tmp_path / "pipe")


def test_a_missing_file_shows_what_is_there(path: Path):
    saved(path)
    with pytest.raises(FileNotFoundError, match=r"no file .*b\.safetensors; .*: a\.safetensors"):
        read(path.with_name("b.safetensors"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read(path.parent / "nowhere" / "b.safetensors")
    with pytest.raises(IsADirectoryError, match=r"holds these .*: a\.safetensors"):
        read(path.parent)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch, fails: str):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    old = saved(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        with pytest.raises(OSError, match="No space left"):
            write(path, contents(seed=1))
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]
    assert saved(path, seed=1) != old


def test_the_file_is_synced_before_it_takes_the_name_and_the_folder_after(path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def replaced(source: Path, target: Path) -> None:
        steps.append("replace")
        assert source.parent == target.parent
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write(path, contents())
    assert steps == ["file", "replace", "folder"]


def test_a_file_replaced_while_it_is_read_is_read_whole(path: Path):
    """Two adapters take turns under one path; every read gives the one or the other."""
    both = [contents(seed=i, metadata={"seed": str(i)}) for i in range(2)]
    images, stop, turns = [image(c) for c in both], threading.Event(), []

    def take_turns() -> None:
        while not stop.is_set():
            write(path, both[len(turns) % 2])
            turns.append(len(turns))

    write(path, both[1])
    writer = threading.Thread(target=take_turns)
    writer.start()
    try:
        for _ in range(200):
            assert image(read(path)) in images
    finally:
        stop.set()
        writer.join()
    assert len(turns) > 2


# --- files of other things ---------------------------------------------------------------------------------------------


def other(keys: dict[str, Tensor], **metadata: str) -> bytes:
    return safetensors.torch.save(keys, metadata or None)


def torch_saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(1)}, buffer)
    return buffer.getvalue()


one = torch.ones(1)
FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "a PEFT adapter": (lambda: other({f"base_model.model.{Q}.lora_A.weight": one}, format="pt"), "PEFT adapter; ll.from_peft"),
    "a PEFT adapter in memory": (lambda: other({f"{Q}.lora_A.default.weight": one}), "PEFT adapter"),
    "a transformers model": (lambda: other({f"{Q}.weight": one}, format="pt"), "a model's weights; AutoModelForCausalLM"),
    "kohya": (lambda: other({"lora_unet_x.lora_down.weight": one}), "kohya or diffusers"),
    "the predecessor": (lambda: other({"A.model__layers__0": one}, kind="lora"), "predecessor"),
    "some tensors": (lambda: other({"x": one}), "the format in its header is None"),
    "torch.save": (torch_saved, "zip or torch.save"),
    "pickle": (lambda: pickle.dumps({"x": 1}), "a pickle"),
    "GGUF": (lambda: b"GGUF\3\0\0\0" + bytes(100), "GGUF"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git lfs pull"),
    "a web page": (lambda: b"<!DOCTYPE html><html></html>", "web page"),
    "JSON": (lambda: b'{"peft_type": "LORA"}', "is JSON"),
    "nothing": (lambda: b"", "is empty"),
    "text": (lambda: b"hello, this is a text of some length", "no safetensors file: it announces a header of"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_file_is_called_what_it_is(path: Path, case: str):
    make, message = FOREIGN[case]
    assert message in refusal(path, make())


def test_our_keys_without_our_header_are_told_from_peft(path: Path):
    assert "its keys are an adapter's, its header is not" in refusal(path, other({f"{Q}.lora_A": one, f"{Q}.lora_B": torch.ones(2)}))


# --- our file, changed -------------------------------------------------------------------------------------------------


def changed(path: Path, keep_hash: bool = False, **metadata: str | None) -> bytes:
    """Our file with other metadata, None to remove a key; by default as if written by hand, without a hash."""
    header, data = parts(saved(path))
    removed = {} if keep_hash else {"sha256": None, "library_version": None}
    entries = header["__metadata__"] | removed | metadata
    return file_of(header | {"__metadata__": {k: v for k, v in entries.items() if v is not None}}, data)


def test_the_control_for_what_follows_reads(path: Path):
    path.write_bytes(changed(path))
    assert image(read(path)) == image(contents())


CHANGED: dict[str, tuple[dict[str, str | None], str]] = {
    "another format version": ({"format_version": "2"}, "format version 2 .* reads version 1: update"),
    "no format version": ({"format_version": None}, "format version None"),
    "no config": ({"config": None}, "config is missing"),
    "a broken config": ({"config": "{"}, r"config \{ cannot be read: JSONDecodeError"),
    "a config that is a list": ({"config": "[]"}, "must be an object, found list"),
    "an unknown variant": ({"config": '{"variant": "nope"}'}, "variant 'nope' is not registered; registered: .*'lora'"),
    "a variant that is a list": ({"config": '{"variant": []}'}, "config .* cannot be read"),
    "an unknown field": ({"config": '{"variant": "lora", "rank": 3}'}, r"LoRAConfig has no fields \['rank'\]"),
    "a bad value": ({"config": '{"variant": "lora", "r": -3}'}, "r must be a positive whole number"),
    "a value of another type": ({"config": '{"variant": "lora", "alpha_pattern": [1]}'}, "config .* cannot be read"),
    "NaN": ({"config": '{"variant": "lora", "alpha": NaN}'}, "NaN is not JSON"),
    "a key twice": ({"config": '{"variant": "lora", "r": 1, "r": 2}'}, "repeated: r"),
    "also, not a list": ({"also": '{"score.weight": 1}'}, "must be a list of different names"),
    "also, not names": ({"also": "[1, []]"}, "must be a list of different names"),
    "also, twice": ({"also": '["score.weight", "score.weight"]'}, "must be a list of different names"),
    "also, not there": ({"also": '["score.weight", "b", "c"]'}, "2 keys listed in `also` and not there: "),
    "also forgotten": ({"also": None}, "1 key neither <layer>.lora_<field> nor listed in `also` .*score.weight"),
    "everything is also": ({"also": json.dumps([n for n, _ in contents().named()])}, "no adapter's tensors"),
    "shared, not keys": ({"shared": '{"a.lora_C": 1}'}, "must be an object of keys by key"),
    "shared, there too": ({"shared": json.dumps({f"{Q}.lora_A": f"{Q}.lora_B"})}, "shared, and there by themselves too: .*lora_A"),
    "shared with nothing": ({"shared": json.dumps({f"{Q}.lora_C": f"{Q}.lora_D"})}, "shared with a tensor that is not there: .*lora_C"),
    "shared with each other": ({"shared": '{"a.lora_C": "a.lora_D", "a.lora_D": "a.lora_C"}'}, "2 keys shared with a tensor that is not"),
    "shared under no key of ours": ({"shared": json.dumps({"a.weight": f"{Q}.lora_A"})}, "neither <layer>.lora_<field> nor listed"),
    "a fingerprint that is a list": ({"fingerprint": "[]"}, "fingerprint .* must be an object"),
    "diagnostics of text": ({"diagnostics": '{"x": "much"}'}, "x is not a number"),
    "diagnostics of lists": ({"diagnostics": '{"x": [1]}'}, "x is not a number"),
    "diagnostics beyond floats": ({"diagnostics": '{"x": 1' + "0" * 400 + "}"}, "diagnostics .* cannot be read"),
    "several at once": ({"config": "{", "also": "3", "fingerprint": "3", "diagnostics": "3"}, "config.*also.*fingerprint.*diagnostics"),
    "a deep config": ({"config": "[" * 100_000}, "config .* cannot be read"),
    "a config of digits": ({"config": "9" * 100_000}, "config .* cannot be read"),
    "a pattern too deep": ({"config": json.dumps({"variant": "lora", "exclude": ["(" * 5000 + ")" * 5000]})}, "config .* cannot be read"),
    "a hash that lost its key": ({"library_version": "0.1.0"}, "library_version alone"),
    "a hash without the version": ({"sha256": "0" * 64}, "sha256 alone"),
    "a wrong hash": ({"library_version": "0.1.0", "sha256": "0" * 64}, "not those that were saved"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_changed_metadata_is_refused(path: Path, case: str):
    changes, message = CHANGED[case]
    assert re.search(message, refusal(path, changed(path, **changes)), re.S)


def test_the_hash_covers_what_the_caller_and_the_config_say(path: Path):
    for change in ({"note": "other"}, {"more": ""}, {"config": contents().config.to_json().replace("3.5", "3.6")}):
        assert "not those that were saved" in refusal(path, changed(path, keep_hash=True, **change))


def test_a_tensor_that_is_not_finite_is_refused_by_name(path: Path):
    c = contents(diagnostics={})
    c.tensors[K]["lora_A"][0, 0] = math.nan
    metadata = {"format": "lora_lite", "format_version": "1", "config": c.config.to_json(), "also": '["score.weight"]'}
    message = refusal(path, safetensors.torch.save({n: v.contiguous() for n, v in c.named()}, metadata))
    assert f"1 key holding NaN or infinity: {K}.lora_A" in message


def test_a_renamed_key_is_found(path: Path):
    assert "not those that were saved" in refusal(path, saved(path).replace(b"q_proj.lora_A", b"q_prog.lora_A"))
    assert "neither <layer>" in refusal(path, changed(path).replace(b"q_proj.lora_A", b"q_proj.vora_A"))


# --- hostile files -----------------------------------------------------------------------------------------------------

META = {"__metadata__": {"format": "lora_lite", "format_version": "1", "config": '{"variant": "lora"}'}}
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
ONE = struct.pack("<f", 1.0)


def entry(**changes: Any) -> dict[str, Any]:
    return META | {"x.lora_A": ENTRY | changes}


def raw_entry(text: str) -> bytes:
    return json.dumps(META)[:-1].encode() + b"," + text.encode() + b"}"


E = json.dumps(ENTRY)
HOSTILE: dict[str, bytes] = {
    "a header of 2^63": file_of(entry(), ONE, 2**63),
    "a header of 2^64-1": file_of(entry(), ONE, 2**64 - 1),
    "a header longer than the file": file_of(entry(), ONE, 10_000),
    "a header beyond the limit": file_of(entry(), ONE, 100_000_001),
    "a header of no length": file_of(entry(), ONE, 0),
    "seven bytes": b"\1\0\0\0\0\0\0",
    "a list": file_of(b"[]"),
    "a number": file_of(b"17"),
    "null": file_of(b"null"),
    "a deep list": file_of(b"[" * 1_000_000),
    "a deep object": file_of(b'{"a":' * 200_000),
    "deep inside an entry": file_of(raw_entry(f'"x.lora_A":{E[:-1]}, "more": {"[" * 200_000}'), ONE),
    "digits": file_of(b"9" * 1_000_000),
    "a name twice": file_of(raw_entry(f'"x.lora_A":{E},"x.lora_A":{E}'), ONE),
    "metadata twice": file_of(json.dumps(META)[:-1].encode() + b"," + json.dumps(META | {"x.lora_A": ENTRY})[1:].encode(), ONE),
    "a metadata key twice": file_of(json.dumps(entry()).replace('"format":', '"format": "lora_lite", "format":').encode(), ONE),
    "metadata a list": file_of(entry() | {"__metadata__": ["format"]}, ONE),
    "metadata of numbers": file_of(entry() | {"__metadata__": META["__metadata__"] | {"x": 1}}, ONE),
    "metadata null": file_of(entry() | {"__metadata__": None}, ONE),
    "half a surrogate pair": file_of(entry() | {"__metadata__": META["__metadata__"] | {"x": "\ud800"}}, ONE),
    "half a surrogate pair under a hash": file_of(
        entry() | {"__metadata__": META["__metadata__"] | {"x": "\ud800", "sha256": "0", "library_version": "0"}}, ONE
    ),
    "not UTF-8": file_of(json.dumps(entry()).encode().replace(b"x.lora", b"\xff.lora"), ONE),
    "a byte order mark": file_of(b"\xef\xbb\xbf" + json.dumps(entry()).encode(), ONE),
    "an entry that is a list": file_of(META | {"x.lora_A": [1]}, ONE),
    "an entry that is null": file_of(META | {"x.lora_A": None}, ONE),
    "a dtype that is a list": file_of(entry(dtype=["F32"]), ONE),
    "an unknown dtype": file_of(entry(dtype="F7"), ONE),
    "float4": file_of(entry(dtype="F4", shape=[8]), ONE),
    "float8 scales": file_of(entry(dtype="F8_E8M0", shape=[4]), ONE),
    "a complex dtype": file_of(entry(dtype="C64", data_offsets=[0, 8]), ONE * 2),
    "a shape that is not one": file_of(entry(shape="1"), ONE),
    "a negative shape": file_of(entry(shape=[-1]), ONE),
    "a broken shape": file_of(entry(shape=[0.5]), ONE),
    "a huge shape": file_of(entry(shape=[2**40, 2**40]), ONE),
    "a shape of digits": file_of(json.dumps(entry()).replace("[1]", "[" + "9" * 5000 + "]").encode(), ONE),
    "a shape beyond torch": file_of(entry(shape=[0, 2**63], data_offsets=[0, 0])),
    "a shape that overflows": file_of(entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0])),
    "too few bytes": file_of(entry(), ONE[:3]),
    "too many bytes": file_of(entry(), ONE + b"\0"),
    "a hole": file_of(entry(data_offsets=[4, 8]), ONE * 2),
    "a range backwards": file_of(entry(data_offsets=[4, 0]), ONE),
    "a range far away": file_of(entry(data_offsets=[2**62, 2**62 + 4]), ONE),
    "one range": file_of(entry(data_offsets=[0]), ONE),
    "two tensors on one range": file_of(entry() | {"y.lora_A": ENTRY}, ONE),
    "no tensors": file_of(META),
    "a key that is a field": file_of(META | {".lora_": ENTRY}, ONE),
    "a long message": file_of(META | {"\x1b[2J" + "x" * 1_000_000: ENTRY}, ONE),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_an_error_of_ours(path: Path, case: str):
    assert refusal(path, HOSTILE[case]).isprintable()


def test_the_control_for_hostile_files_reads(path: Path):
    path.write_bytes(file_of(entry(), ONE))
    assert read(path).tensors["x"]["lora_A"].tolist() == [1.0]


@pytest.mark.parametrize("case", ["a header of 2^64-1", "a huge shape", "a range far away", "a shape that overflows"])
def test_a_hostile_file_costs_no_memory(path: Path, case: str):
    tracemalloc.start()
    try:
        refusal(path, HOSTILE[case])
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_large_foreign_file_is_refused_from_its_header(path: Path):
    """Ten gigabytes of nothing behind a model's header: told from the header alone."""
    size = 10 * 2**30
    path.write_bytes(file_of({"model.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + size)
    with pytest.raises(CheckpointError, match="a model's weights"):
        read(path)


# --- mangled files -----------------------------------------------------------------------------------------------------

Mangle = Callable[[random.Random, bytes, bytes], bytes]


def span(rng: random.Random, data: bytes, most: int = 200) -> tuple[int, int]:
    lo = rng.randrange(len(data))
    return lo, min(len(data), lo + rng.randint(1, most))


def flip(rng: random.Random, data: bytes, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8, 50])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def zero(rng: random.Random, data: bytes, other: bytes) -> bytes:
    lo, hi = span(rng, data)
    return data[:lo] + bytes(hi - lo) + data[hi:]


def splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    lo, hi = span(rng, data)
    at = rng.randrange(len(other))
    return data[:lo] + other[at : at + hi - lo] + data[hi:]


def same_place(rng: random.Random, data: bytes, other: bytes) -> bytes:
    lo, hi = span(rng, data, 2000)
    return data[:lo] + other[lo:hi] + data[hi:]


def swap_header(rng: random.Random, data: bytes, other: bytes) -> bytes:
    n, m = (8 + struct.unpack("<Q", d[:8])[0] for d in (data, other))
    return rng.choice([other[:m] + data[n:], data[:n] + other[m:], data[:8] + other[8:m] + data[n:]])


def drop(rng: random.Random, data: bytes, other: bytes) -> bytes:
    lo, hi = span(rng, data)
    return data[:lo] + data[hi:]


def repeat(rng: random.Random, data: bytes, other: bytes) -> bytes:
    lo, hi = span(rng, data)
    return data[:hi] + data[lo:]


def digit(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Another digit somewhere in the header: what a shape, an offset or a hyperparameter would be."""
    places = [i for i, byte in enumerate(data[8 : 8 + struct.unpack("<Q", data[:8])[0]], 8) if chr(byte).isdigit()]
    at = rng.choice(places)
    return data[:at] + rng.choice("0123456789").encode() + data[at + 1 :]


MANGLES: list[Mangle] = [
    flip, flip, zero, splice, same_place, swap_header, drop, repeat, digit,
    lambda rng, data, other: data[: rng.randrange(len(data))],
    lambda rng, data, other: data + rng.randbytes(rng.randint(1, 20)),
    lambda rng, data, other: rng.randbytes(rng.randint(0, 300)),
]  # fmt: skip


def mangled(seed: int, number: int, data: bytes, other: bytes) -> Iterator[bytes]:
    rng = random.Random(seed)
    for i in range(number):
        yield MANGLES[i % len(MANGLES)](rng, data, other)


def mangled_reads(path: Path, seed: int, number: int) -> tuple[int, int, int]:
    """(refused, read equal, read different) of so many mangled files."""
    other, data = saved(path, seed=1), saved(path)
    original, refused, equal, different = image(contents()), 0, 0, 0
    for bad in mangled(seed, number, data, other):
        if bad == other:  # all that differs was spliced in: whole again
            continue
        path.write_bytes(bad)
        try:
            found = image(read(path))
        except CheckpointError:
            refused += 1
        else:
            equal, different = equal + (found == original), different + (found != original)
    return refused, equal, different


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_mangled_file_is_refused_or_read_as_it_was(path: Path, number: int):
    """Read as it was: where the mangling wrote what was there (a digit over itself, or a letter's case in a JSON escape).

    All else is refused, the caller's own metadata included, since the hash covers every key, value, name and tensor. Only
    a file whose keys `sha256` and `library_version` are both damaged, and nothing else, would read as one without a hash.
    """
    refused, equal, different = mangled_reads(path, number, number)
    assert different == 0
    assert refused > 0.9 * number and equal < 0.05 * number


def test_without_the_hash_mangled_files_would_be_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    """The control: the mangling reaches past what safetensors and the checks of names and values would find."""
    monkeypatch.setattr(reading, "is_damaged", lambda *_: False)
    assert mangled_reads(path, 300, 300)[2] > 20


# --- killed while saving -----------------------------------------------------------------------------------------------

SAVING = """
import os, sys, torch
torch.set_num_threads(1)
import lora_lite as ll
from lora_lite.checkpoint import Contents, write

path, how = sys.argv[1:]
def contents(i):
    tensors = {f"layers.{k}": {"lora_A": torch.full((64, 256), float(i)), "lora_B": torch.full((256, 64), float(i))} for k in range(4)}
    return Contents(ll.LoRAConfig(r=64), tensors, metadata={"i": str(i)})
wholes = {}
def naive(path, contents):  # nearly all its time goes into writing in place
    i = contents.metadata["i"]
    if i not in wholes:
        write(path + ".whole", contents)
        wholes[i] = open(path + ".whole", "rb").read()
    with open(path, "wb", buffering=0) as file:
        for at in range(0, len(wholes[i]), 4096):
            file.write(wholes[i][at : at + 4096])
save = write if how == "ours" else naive
write(path, contents(0))
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        i = 0
        while True:
            i += 1
            save(path, contents(i % 7))
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


def kills(path: Path, number: int, how: str) -> tuple[int, int]:
    """(whole, torn) files after so many kills at random moments of a process that saves over and over."""
    rng, whole, torn = random.Random(number), 0, 0
    command = [sys.executable, "-c", SAVING, str(path), how]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdin and process.stdout
        for _ in range(number):
            process.stdin.write("go\n")
            process.stdin.flush()
            pid = int(process.stdout.readline())
            time.sleep(rng.uniform(0.005, 0.06))
            os.kill(pid, signal.SIGKILL)
            assert process.stdout.readline() == "gone\n"
            try:
                found = read(path)
            except CheckpointError:
                torn += 1
            else:
                values = {float(x) for v in dict(found.named()).values() for x in v.unique()}
                whole += values == {float(found.metadata["i"])} and len(found.tensors) == 4
        process.stdin.close()
    return whole, torn


@pytest.mark.parametrize("number", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_while_saving_leaves_the_old_file_or_the_new_one(path: Path, number: int):
    assert kills(path, number, "ours") == (number, 0)
    assert [p for p in path.parent.iterdir() if p.name.startswith(".lora_lite-")], "no kill came while a file was being written"


def test_a_kill_while_saving_in_place_would_be_seen(path: Path):
    assert kills(path, 60, "naive")[1] > 0  # on a busy machine many of them come before the process runs at all


# --- fitting a model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "module.model.layers.0.q",
        "_orig_mod.model.layers.0.q",
        "base_model.model.model.layers.0.q",
        "module._orig_mod.base_model.model.model.layers.0.q",
        "_orig_mod.module.model.layers._orig_mod.0._orig_mod.q",
        "model.layers.0._checkpoint_wrapped_module.q",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.q",
        "model.layers.0.q",
    ],
)
def test_wrappers_leave_no_trace_in_names(name: str):
    assert strip_prefixes(name) == "model.layers.0.q"


@pytest.mark.parametrize(
    "name", ["my_module.q", "a.module.q", "base_model.q", "base_model.models.q", "module", "a_orig_mod.q", "", "base_model.model"]
)
def test_names_that_only_resemble_wrappers_stay(name: str):
    assert strip_prefixes(name) == name


def test_names_match_under_any_prefix_on_either_side():
    bare, wrapped = ["model.a", "model.b"], ["module._orig_mod.model.a", "module._orig_mod.model.b"]
    assert match_names(wrapped, bare) == dict(zip(wrapped, bare, strict=True))
    assert match_names(bare, wrapped) == dict(zip(bare, wrapped, strict=True))
    assert match_names([f"base_model.model.{n}" for n in bare], wrapped) == {
        f"base_model.model.{n}": w for n, w in zip(bare, wrapped, strict=True)
    }
    assert match_names(["model.a", "module.z"], bare) == {"model.a": "model.a", "module.z": "module.z"}
    assert match_names(["module.a", "a"], ["module.a", "a"]) == {"module.a": "module.a", "a": "a"}  # a model's own names win
    assert match_names(["_orig_mod.a"], ["module.a", "a"]) == {"_orig_mod.a": "_orig_mod.a"}  # two could be meant: neither is


def test_contents_are_renamed_with_their_fingerprint():
    c = contents()
    again = renamed(c, [f"module.{Q}", f"module.{K}"], ["module.score.weight"])
    assert list(again.tensors) == [f"module.{Q}", f"module.{K}"] and list(again.also) == ["module.score.weight"]
    assert again.fingerprint == {"architecture": "LlamaForCausalLM", "targets": {f"module.{Q}": {"shape": [3, 5], "samples": None}}}
    assert list(renamed(again, [Q, K], ["score.weight"]).tensors) == [Q, K]


def test_two_keys_that_mean_one_layer_are_refused():
    c = contents(tensors={n: {"lora_A": one} for n in (Q, f"module.{Q}")}, source="x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: several keys mean one"):
        renamed(c, [Q])
    c = contents(also={n: one for n in ("w", "_orig_mod.w")})
    with pytest.raises(CheckpointError, match="several keys mean one"):
        renamed(c, [Q], ["w"])


def test_a_fitting_file_passes():
    check_tensors(contents(), {t: {"lora_A": (2, 5), "lora_B": (3, 2)} for t in (Q, K)})


def test_everything_that_does_not_fit_is_said_at_once():
    tensors = {f"l.{i}": {"lora_A": torch.ones(2, 5), "lora_C": one} for i in range(7)}
    c = contents(source="x.safetensors", tensors=tensors, fingerprint=None)
    expected = {f"l.{i}": {"lora_A": (2, 4 if i < 6 else 5), "lora_B": (3, 2)} for i in range(7)}
    with pytest.raises(CheckpointError) as caught:
        check_tensors(c, expected)
    message = str(caught.value)
    assert (
        message.startswith("x.safetensors does not fit: 7 keys missing: l.0.lora_B, ")
        and "l.4.lora_B and 2 more; 7 keys unexpected: l.0" in message
    )
    assert "6 keys of another shape: l.0.lora_A (2, 5), expected (2, 4)" in message and "and 1 more." in message


def test_a_folder_that_takes_no_file_is_named_as_it_was_asked_for(closed: Path) -> None:
    adapter = ll.attach(nn.Sequential(nn.Linear(4, 4)), ll.LoRAConfig(r=2))
    sub = ll.SharedSubspace.from_adapters([adapter])
    for save, name in ((adapter.save, "a.safetensors"), (lambda p: ll.to_peft(adapter, p), "folder"), (sub.save, "tasks")):
        with pytest.raises(OSError, match=f"{closed / name} cannot be written in {closed}: ") as found:
            save(closed / name)
        assert found.value.errno and ".tmp" not in str(found.value)
