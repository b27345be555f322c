"""Does find_targets find what a config means in every naming scheme, and say in words why when it finds nothing?"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import ARCHITECTURES
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from lora_lite.config import AdapterConfig, RankedConfig, ends_in, found_in, literal, whole
from lora_lite.target import Target, Targets, find_targets, is_stack, places

pytestmark = pytest.mark.fast


def names(model: nn.Module, **config: Any) -> list[str]:
    return [t.name for t in find_targets(model, RankedConfig(**config))]


def expand(*patterns: str) -> list[str]:
    """ "layers.{0,1}.{q,k}" -> all four names."""
    found: list[str] = []
    for pattern in patterns:
        parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
        found += ["".join(choice) for choice in itertools.product(*parts)]
    return found


def model_of(linears: Mapping[str, tuple[int, int]], lists: Iterable[str] = (), kind: type[nn.Module] = nn.ModuleList) -> nn.Module:
    """A model with these linears at these paths and these paths as lists (of `kind`); what lies between is plain modules."""
    lists = set(lists)

    def part(path: str) -> nn.Module:
        if path in linears:
            return nn.Linear(*linears[path])
        under = f"{path}." if path else ""
        keys = dict.fromkeys(name.removeprefix(under).split(".")[0] for name in linears if name.startswith(under))
        children = {key: part(under + key) for key in keys}
        if path in lists:
            return kind(children.values()) if kind is nn.ModuleList else kind(*children.values())
        module = nn.Module()
        for key, child in children.items():
            module.add_module(key, child)
        return module

    return part("")


def toy(stack: str, blocks: int = 5, inside: str = "attn.q", kind: type[nn.Module] = nn.ModuleList) -> nn.Module:
    """`blocks` blocks in a list at `stack`, a linear at the path `inside` in each; "layer" is a list too, as in T5's blocks."""
    path = f"{stack}." if stack else ""
    inner = {f"{path}{i}.layer" for i in range(blocks)}
    return model_of({f"{path}{i}.{inside}": (2, 2) for i in range(blocks)}, {stack, *inner}, kind)


# -- names on the real families -------------------------------------------------------------------------------------------

LLAMA = "model.layers.{0,1}.{self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,self_attn.o_proj,mlp.gate_proj,mlp.up_proj,mlp.down_proj}"
T5_ENCODER = ["encoder.block.{0,1,2}.layer.0.SelfAttention.{q,k,v,o}", "encoder.block.{0,1,2}.layer.1.DenseReluDense.{wi_0,wi_1,wo}"]
T5_DECODER = [
    "decoder.block.{0,1}.layer.{0.SelfAttention,1.EncDecAttention}.{q,k,v,o}",
    "decoder.block.{0,1}.layer.2.DenseReluDense.{wi_0,wi_1,wo}",
]
BERT = [
    "bert.encoder.layer.{0,1}.attention.self.{query,key,value}",
    "bert.encoder.layer.{0,1}.{attention.output,intermediate,output}.dense",
]
WHISPER = [
    "model.encoder.layers.{0,1}.{self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,self_attn.out_proj,fc1,fc2}",
    "model.decoder.layers.{0,1,2}.{self_attn,encoder_attn}.{q_proj,k_proj,v_proj,out_proj}",
    "model.decoder.layers.{0,1,2}.{fc1,fc2}",
]
ATTENTION = "model.layers.{0,1}.self_attn.{q,k,v,o}_proj"

# (architecture, config) -> the names, in any order. The first sixteen rows are "all-linear" on each family.
FOUND: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {}, [LLAMA]),
    ("llama-bias", {}, [LLAMA]),
    ("qwen3", {}, [LLAMA]),
    ("gemma3", {}, [LLAMA]),
    ("mistral", {}, [LLAMA]),
    ("mixtral", {}, [ATTENTION]),
    ("qwen3-moe", {}, [ATTENTION]),
    ("phi3", {}, ["model.layers.{0,1}.{self_attn.qkv_proj,self_attn.o_proj,mlp.gate_up_proj,mlp.down_proj}"]),
    ("gpt2", {}, ["transformer.h.{0,1}.{attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj}"]),
    ("opt", {}, ["model.decoder.layers.{0,1}.{self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,self_attn.out_proj,fc1,fc2}"]),
    (
        "bloom",
        {},
        ["transformer.h.{0,1}.{self_attention.query_key_value,self_attention.dense,mlp.dense_h_to_4h,mlp.dense_4h_to_h}"],
    ),
    ("t5", {}, [*T5_ENCODER, *T5_DECODER]),
    ("bert", {}, [*BERT, "bert.pooler.dense", "classifier"]),
    ("bert-mlm", {}, [*BERT, "cls.predictions.transform.dense"]),
    ("vit", {}, ["vit.layers.{0,1}.{attention.q_proj,attention.k_proj,attention.v_proj,attention.o_proj,mlp.fc1,mlp.fc2}", "classifier"]),
    ("whisper", {}, WHISPER),
    # regexes: one, several, searched anywhere in the full name
    ("llama", {"targets": "q_proj"}, ["model.layers.{0,1}.self_attn.q_proj"]),
    ("llama", {"targets": ("q_proj", "v_proj$")}, ["model.layers.{0,1}.self_attn.{q,v}_proj"]),
    ("llama", {"targets": r"layers\.0\..*(gate|down)"}, ["model.layers.0.mlp.{gate,down}_proj"]),
    ("llama", {"targets": ("all-linear",), "exclude": ("mlp",)}, [ATTENTION]),
    ("llama", {"targets": ("all-linear", "lm_head"), "exclude": ("mlp",)}, [ATTENTION, "lm_head"]),
    ("llama", {"targets": "lm_head", "exclude": ()}, ["lm_head"]),
    ("llama", {"exclude": ()}, [LLAMA]),  # the output embedding is no target of all-linear even when nothing excludes it
    ("whisper", {"targets": "proj_out"}, ["proj_out"]),
    ("t5", {"exclude": ("decoder",)}, T5_ENCODER),
    # exclude wins
    ("llama", {"targets": "self_attn", "exclude": ("[kv]_proj", r"layers\.1")}, ["model.layers.0.self_attn.{q,o}_proj"]),
    ("llama", {"targets": ["[qv]_proj"], "exclude": "v_proj", "layers": [1], "roles": "reader"}, ["model.layers.1.self_attn.q_proj"]),
    # depth: of each stack's own blocks, and what is outside stays
    ("llama", {"targets": "q_proj", "layer_range": (0.5, 1.0)}, ["model.layers.1.self_attn.q_proj"]),
    ("llama", {"targets": "q_proj", "layers": (0,)}, ["model.layers.0.self_attn.q_proj"]),
    (
        "t5",
        {"targets": "SelfAttention.q", "layer_range": (0.5, 1.0)},
        ["{encoder.block.1,encoder.block.2,decoder.block.1}.layer.0.SelfAttention.q"],
    ),
    ("t5", {"targets": "SelfAttention.q", "layers": (2,)}, ["encoder.block.2.layer.0.SelfAttention.q"]),
    ("whisper", {"targets": "fc1", "layer_range": (0.0, 0.5)}, ["model.{encoder,decoder}.layers.0.fc1"]),
    ("bert", {"targets": ("query", "classifier"), "layer_range": (0.5, 1.0)}, ["bert.encoder.layer.1.attention.self.query", "classifier"]),
    ("bert", {"targets": "classifier", "layer_range": (0.5, 1.0)}, ["classifier"]),
    # roles
    ("llama", {"roles": ("writer",)}, ["model.layers.{0,1}.{self_attn.o_proj,mlp.down_proj}"]),
    ("gpt2", {"roles": ("reader",)}, ["transformer.h.{0,1}.{attn.c_attn,mlp.c_fc}"]),
    ("phi3", {"roles": ("reader",), "layers": (1,)}, ["model.layers.1.{self_attn.qkv_proj,mlp.gate_up_proj}"]),
    ("bloom", {"roles": ("writer",)}, ["transformer.h.{0,1}.{self_attention.dense,mlp.dense_4h_to_h}"]),
    ("bert", {"roles": ("writer",)}, ["bert.encoder.layer.{0,1}.{attention.output,output}.dense"]),
    ("bert", {"roles": ("reader", "writer")}, BERT),
    ("t5", {"targets": "EncDecAttention", "roles": ("reader",)}, ["decoder.block.{0,1}.layer.1.EncDecAttention.{q,k,v}"]),
    ("opt", {"roles": ("writer",)}, ["model.decoder.layers.{0,1}.{self_attn.out_proj,fc2}"]),
]


@pytest.fixture(scope="module")
def built() -> Callable[[str], Any]:
    models: dict[str, Any] = {}

    def get(name: str) -> Any:
        return models[name] if name in models else models.setdefault(name, ARCHITECTURES[name].build())

    return get


@pytest.mark.parametrize(("architecture", "config", "expected"), FOUND, ids=[f"{a}-{c}" for a, c, _ in FOUND])
def test_a_config_means_these_layers(built: Any, architecture: str, config: dict[str, Any], expected: list[str]):
    found = names(built(architecture), **config)
    assert sorted(found) == sorted(expand(*expected))


def test_every_architecture_has_a_row():
    assert {name for name, config, _ in FOUND if config == {}} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_shows_its_stacks_and_the_depth_in_each_name(built: Any, name: str):
    found = find_targets(built(name), RankedConfig())
    assert {(t.stack, t.blocks) for t in found if t.stack is not None} == set(ARCHITECTURES[name].stacks)
    for target in found:
        assert (target.depth is None) == (target.stack is None) == (target.blocks is None)
        if target.stack is not None:
            assert target.name.startswith(f"{target.stack}.{target.depth}.")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_has_roles_for_all_linears_of_its_blocks(built: Any, name: str):
    found = find_targets(built(name), RankedConfig())
    assert {t.role for t in found if t.stack is not None} == {"reader", "writer"}
    assert {t.role for t in found if t.stack is None} <= {None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_are_the_models_own_modules_in_its_order_with_their_features(built: Any, name: str):
    model = built(name)
    modules = dict(model.named_modules())
    found = find_targets(model, RankedConfig())
    assert [t.name for t in found] == [n for n in modules if n in {t.name for t in found}]
    for target in found:
        assert modules[target.name] is target.module
        with torch.no_grad():
            assert target.module(torch.zeros(1, target.d_in)).shape == (1, target.d_out)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_target_is_called_in_a_forward(built: Any, name: str):
    model, calls = built(name), set()
    found = find_targets(model, RankedConfig())
    handles = [t.module.register_forward_hook(lambda *_, n=t.name: calls.add(n)) for t in found]
    try:
        with torch.no_grad():
            model(**ARCHITECTURES[name].inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    assert calls == {t.name for t in found}


def test_finding_touches_nothing(built: Any):
    model = built("llama")
    before = {n: (type(m), list(m.__dict__)) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    find_targets(model, RankedConfig())
    with pytest.raises(RuntimeError):
        find_targets(model, RankedConfig(targets="nothing"))
    assert before == {n: (type(m), list(m.__dict__)) for n, m in model.named_modules()}
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}


# -- depth in every naming scheme -----------------------------------------------------------------------------------------

SCHEMES = {  # path of the stack, what is inside a block
    "model.layers": "self_attn.q_proj",
    "transformer.h": "attn.c_attn",
    "encoder.layer": "attention.self.query",
    "encoder.block": "layer.0.SelfAttention.q",
    "gpt_neox.layers": "attention.dense",
    "model.decoder.layers": "fc1",
    "backbone.layers": "mixer.in_proj",
    "vision.encoder.layers": "mlp.fc1",
    "layers": "q",
    "": "attn.q",
}


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential], ids=["ModuleList", "Sequential"])
@pytest.mark.parametrize("stack", SCHEMES, ids=lambda s: s or "root")
def test_a_band_finds_its_blocks_in_every_naming_scheme(stack: str, kind: type[nn.Module]):
    model = toy(stack, 5, SCHEMES[stack], kind)
    found = find_targets(model, AdapterConfig(layer_range=(0.2, 0.8)))
    path = f"{stack}." if stack else ""
    assert [t.name for t in found] == [f"{path}{i}.{SCHEMES[stack]}" for i in (1, 2, 3)]
    assert [(t.depth, t.blocks, t.stack) for t in found] == [(i, 5, stack) for i in (1, 2, 3)]


def test_gpt_neox_itself():
    config = hf.GPTNeoXConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=16
    )
    found = find_targets(hf.GPTNeoXForCausalLM(config), AdapterConfig(layer_range=(0.5, 0.8)))
    inside = "{attention.query_key_value,attention.dense,mlp.dense_h_to_4h,mlp.dense_4h_to_h}"
    assert sorted(t.name for t in found) == sorted(expand(f"gpt_neox.layers.2.{inside}"))  # embed_out is its output embedding
    assert [t.role for t in found] == ["reader", "writer", "reader", "writer"]


def test_fractions_are_of_the_blocks_and_not_of_the_matched_ones():
    model = toy("model.layers", 10)
    config = AdapterConfig(targets=r"layers\.[5-9]\.", layer_range=(0.0, 0.6))
    assert [t.depth for t in find_targets(model, config)] == [5]


def test_the_outermost_list_is_the_stack():
    model = toy("encoder.block", 3, "layer.0.q")
    assert {p for p in places(model).values() if p} == {("encoder.block", i, 3) for i in range(3)}


def test_a_sequential_is_a_stack_only_when_its_parts_are_blocks_of_one_kind():
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    assert is_stack(nn.Sequential(block(), block()))
    assert not is_stack(nn.Sequential(block()))
    assert not is_stack(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert not is_stack(nn.Sequential(block(), nn.TransformerEncoderLayer(4, 2)))
    assert is_stack(nn.ModuleList([nn.Linear(2, 2)]))
    assert not is_stack(nn.ModuleDict({"0": block(), "1": block()}))


def test_each_stack_has_its_own_depth():
    linears = {f"encoder.layers.{i}.q": (2, 2) for i in range(8)} | {f"decoder.layers.{i}.q": (2, 2) for i in range(4)}
    model = model_of(linears, ("encoder.layers", "decoder.layers"))
    found = names(model, layer_range=(0.5, 0.75))
    assert found == ["encoder.layers.4.q", "encoder.layers.5.q", "decoder.layers.2.q"]


fractions = st.floats(0.0, 1.0)


@given(blocks=st.integers(1, 30), lo=fractions, hi=fractions)
def test_a_band_is_the_formula(blocks: int, lo: float, hi: float):
    assume(lo < hi)
    want = [i for i in range(blocks) if int(blocks * lo) <= i < int(blocks * hi)]
    model, config = toy("model.layers", blocks), AdapterConfig(layer_range=(lo, hi))
    if want:
        assert [t.depth for t in find_targets(model, config)] == want
    else:
        with pytest.raises(RuntimeError, match="holds no block"):
            find_targets(model, config)


@given(blocks=st.integers(2, 30), cut=st.floats(0.01, 0.99))
def test_two_bands_that_meet_share_no_block_and_miss_none(blocks: int, cut: float):
    model = model_of({f"layers.{i}.q": (2, 2) for i in range(blocks)} | {"head": (2, 2)}, ("layers",))
    assume(0 < int(blocks * cut) < blocks)
    below, above = names(model, layer_range=(0.0, cut)), names(model, layer_range=(cut, 1.0))
    assert sorted(below + above) == sorted([*names(model), "head"])  # what is outside the stack is in both


@pytest.mark.parametrize("pattern", ["q_proj", r"layers\.0", "mlp", "[kv]_proj$", "proj"])
def test_exclude_takes_exactly_what_it_matches(built: Any, pattern: str):
    model = built("llama")
    everything = names(model)
    kept = [n for n in everything if not re.search(pattern, n)]
    if kept:
        assert names(model, exclude=(pattern,)) == kept
    else:
        with pytest.raises(RuntimeError, match="matches only what exclude"):
            names(model, exclude=(pattern,))


# -- roles ----------------------------------------------------------------------------------------------------------------


def roles(linears: Mapping[str, tuple[int, int]]) -> dict[str, str | None]:
    model = model_of({f"layers.0.{n}": size for n, size in linears.items()}, ("layers",))
    return {t.name.removeprefix("layers.0."): t.role for t in find_targets(model, AdapterConfig())}


def test_shape_tells_the_role_of_names_never_heard_of():
    found = roles({"q_proj": (8, 8), "into": (8, 20), "from": (20, 8), "mix": (8, 8), "odd": (20, 20)})
    assert found == {"q_proj": "reader", "into": "reader", "from": "writer", "mix": None, "odd": None}


def test_without_any_known_name_the_size_that_all_linears_share_is_the_width():
    assert roles({"a": (8, 20), "b": (20, 8), "mix": (8, 8)}) == {"a": "reader", "b": "writer", "mix": None}
    assert roles({"a": (8, 20), "b": (20, 8)}) == {"a": None, "b": None}  # 8 or 20?


def test_a_writer_by_name_that_reads_by_shape_is_a_reader():
    """Qwen's first MLP: w1 and w2 both go up, c_proj down."""
    found = roles({"c_attn": (8, 24), "w1": (8, 20), "w2": (8, 20), "c_proj": (20, 8)})
    assert found == {"c_attn": "reader", "w1": "reader", "w2": "reader", "c_proj": "writer"}


def test_keys_and_values_of_a_wider_encoder_are_readers():
    found = roles({"q_proj": (8, 8), "k_proj": (32, 8), "v_proj": (32, 8), "fc1": (8, 20), "o_proj": (8, 8), "fc2": (20, 8)})
    assert found["k_proj"] == found["v_proj"] == "reader"


def test_what_reads_a_latent_has_no_role():
    found = roles({"q_a_proj": (16, 4), "q_b_proj": (4, 24), "kv_b_proj": (6, 24), "o_proj": (24, 16)})
    assert found == {"q_a_proj": "reader", "q_b_proj": None, "kv_b_proj": None, "o_proj": "writer"}


def test_a_head_beside_the_stack_is_no_writer():
    model = model_of({"layers.0.q_proj": (8, 8), "classifier.out_proj": (8, 8)}, ("layers",))
    assert [t.role for t in find_targets(model, AdapterConfig())] == ["reader", None]


# -- what "all-linear" and names mean -------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """A user's module around a Hugging Face model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.value = inner, nn.Linear(4, 1)


def test_the_output_embedding_of_a_wrapped_model_is_left_out_too(built: Any):
    whisper = built("whisper")  # its head is not called lm_head, so no default exclude hides a mistake
    found = names(Wrapper(whisper))
    assert "inner.proj_out" not in found and "value" in found
    assert "inner.model.encoder.layers.0.fc1" in found


def test_a_shared_module_is_found_once_under_its_first_name():
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert names(model) == ["a"]
    with pytest.raises(RuntimeError, match="matches b, which is the same module as a; use that name"):
        names(model, targets="b")
    with pytest.raises(RuntimeError, match="leaves out"):
        names(model, exclude=("b",))  # whoever excludes b does not want it changed through a


def test_shared_blocks_count_in_their_stack():
    block = model_of({"q": (2, 2)})
    model = nn.ModuleList([block, block, model_of({"q": (2, 2)})])
    assert [(t.name, t.depth, t.blocks) for t in find_targets(model, AdapterConfig())] == [("0.q", 0, 3), ("2.q", 2, 3)]


@pytest.mark.parametrize(
    ("name", "routed"),
    [
        ("layers.0.mlp.experts.3.w1", True),
        ("layers.0.expert.w1", True),
        ("layers.0.shared_expert.up_proj", False),  # sees every token in its place
        ("layers.0.mlp.up_proj", False),
    ],
)
def test_tokens_are_routed_inside_experts_only(name: str, routed: bool):
    assert Target(name, nn.Linear(2, 3), 2, 3).routed is routed


def test_subclasses_of_linear_count_and_sizes_come_from_features():
    class Packed(nn.Linear):
        """As bitsandbytes': what is stored has another shape."""

        def __init__(self, d_in: int, d_out: int) -> None:
            super().__init__(d_in, d_out)
            self.weight = nn.Parameter(torch.zeros(d_in * d_out // 2, 1))

    [target] = find_targets(nn.ModuleDict({"a": Packed(6, 4)}), AdapterConfig())
    assert (target.d_in, target.d_out) == (6, 4)


def test_printed_it_is_an_aligned_table(built: Any):
    found = find_targets(built("bert"), RankedConfig(targets=("query", "classifier")))
    assert str(found) == repr(found)
    assert str(found).splitlines() == [
        "name                                       type    d_in  d_out  block   role",
        "bert.encoder.layer.0.attention.self.query  Linear  32    32     0 of 2  reader",
        "bert.encoder.layer.1.attention.self.query  Linear  32    32     1 of 2  reader",
        "classifier                                 Linear  32    3      -       -",
        "3 targets",
    ]
    assert isinstance(found, Targets) and isinstance(found[0], Target)


# -- errors ---------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)


EXPERTS_HOLD_NONE = "holding its weights as gate_up_proj (4, 128, 32), down_proj (4, 32, 64), not as linears"

# (architecture or model, config, what the error must say). Every error also repeats what was asked: see the test.
ERRORS: list[tuple[Any, dict[str, Any], list[str]]] = [
    ("llama", {"targets": "q_poj"}, ["'q_poj' matches no module", "nearest: q_proj (model.layers.0.self_attn.q_proj)"]),
    ("llama", {"targets": r"layers\.\d+\.self_attn\.qproj$"}, ["nearest: q_proj"]),
    ("llama", {"targets": "(q_prj|v_prj)"}, ["nearest: q_proj"]),
    ("llama", {"targets": "zzz"}, ["the linears here are called q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"]),
    ("llama", {"targets": ("q_proj", "v_prj", "dwn_proj")}, ["'v_prj' matches no", "'dwn_proj' matches no", "nearest: down_proj"]),
    ("llama", {"targets": "lm_head"}, ["'lm_head' matches only what exclude=('vision_tower', 'lm_head') leaves out: lm_head"]),
    ("llama", {"exclude": ("layers",)}, ["'all-linear' matches only what exclude=('layers',) leaves out", "and 11 more"]),
    (
        "llama",
        {"targets": r"layers\.0\.", "layer_range": (0.5, 1.0)},
        [r"'layers\\.0\\.' matches only outside layer_range=(0.5, 1.0)", "model.layers.0.self_attn.q_proj (block 0 of 2)"],
    ),
    ("llama", {"targets": ("q_proj", r"s\.1\..*v_proj"), "layers": (0,)}, ["matches only outside layers=(0,)", "(block 1 of 2)"]),
    ("llama", {"layer_range": (0.1, 0.3)}, ["layer_range=(0.1, 0.3) holds no block", "0 <= i < 0 in model.layers of 2"]),
    (
        "bert",
        {"layer_range": (0.1, 0.3)},  # although the classifier, outside the stack, would be left
        ["holds no block", "in bert.encoder.layer of 2"],
    ),
    ("t5", {"layer_range": (0.4, 0.45)}, ["1 <= i < 1 in encoder.block of 3", "0 <= i < 0 in decoder.block of 2"]),
    ("t5", {"layers": (2, 3)}, ["there is no block 3", "encoder.block has blocks 0 to 2, decoder.block has blocks 0 to 1"]),
    ("t5", {"layers": (2,), "targets": "EncDec"}, ["there is no block 2", "decoder.block has blocks 0 to 1"]),
    ("bert", {"targets": "classifier", "layers": (0,)}, ["no linear asked for is in a stack of blocks"]),
    (
        "llama",
        {"targets": "self_attn$"},
        ["no linear layer, only model.layers.0.self_attn (LlamaAttention)", "the linears under it: model.layers.0.self_attn.q_proj"],
    ),
    ("llama", {"targets": "layernorm"}, ["matches no linear layer, only model.layers.0.input_layernorm (LlamaRMSNorm)"]),
    ("bert", {"targets": "bert.embeddings.word_embeddings.weight"}, ["only parameters: bert.embeddings.word_embeddings.weight (96, 32)"]),
    ("mixtral", {"targets": "experts"}, ["model.layers.0.mlp.experts (MixtralExperts", EXPERTS_HOLD_NONE]),
    ("mixtral", {"targets": r"experts\.\d+\.w1"}, ["the experts hold no linears", EXPERTS_HOLD_NONE, "adapt the attention instead"]),
    ("mixtral", {"targets": ("q_proj", "gate_up_proj")}, ["only parameters: model.layers.0.mlp.experts.gate_up_proj (4, 128, 32)"]),
    ("qwen3-moe", {"targets": "mlp.experts.0.up_proj"}, ["the experts hold no linears", "Qwen3MoeExperts"]),
    (Attention, {"targets": "out_proj"}, ["'out_proj' matches attn.out_proj, which is never called", r"add 'attn\\.out_proj' to exclude"]),
    (Attention, {"targets": "out"}, ["attn.out_proj, which is never called"]),
    ("llama", {"targets": "down_proj", "roles": ("reader",)}, ["'down_proj' matches no reader: model.layers.0.mlp.down_proj (writer)"]),
    ("bert", {"targets": "classifier", "roles": ("reader", "writer")}, ["matches no reader or writer: classifier (role unknown)"]),
    ("llama", {"rank_pattern": {"q_prj": 4, "v_proj": 2}}, ["rank_pattern has 'q_prj', which matches the end of no target's path"]),
    ("llama", {"targets": "q_proj", "alpha_pattern": {"v_proj": 4.0}}, ["alpha_pattern has 'v_proj'", "nearest: q_proj"]),
    ("llama", {"rank_pattern": {"proj": 4}}, ["rank_pattern has 'proj'"]),  # PEFT's rule: from a dot on, to the end
    (nn.ReLU, {}, ["it holds no linear layers"]),
    (partial(nn.Linear, 2, 2), {}, ["it is itself a linear layer, without a name"]),
]


@pytest.mark.parametrize(("model", "config", "said"), ERRORS, ids=[f"{m if isinstance(m, str) else 'toy'}-{c}" for m, c, _ in ERRORS])
def test_what_cannot_be_found_is_explained(built: Any, model: Any, config: dict[str, Any], said: list[str]):
    model = built(model) if isinstance(model, str) else model()
    cfg = RankedConfig(**config)
    with pytest.raises(RuntimeError) as error:
        find_targets(model, cfg)
    text = str(error.value)
    for part in said:
        assert part in text
    assert text.startswith(type(model).__name__)
    assert repr(cfg.targets) in text and repr(cfg.exclude) in text  # what was asked
    assert len(text) < 1500


def test_a_pattern_that_only_hits_what_never_runs_can_be_narrowed_by_exclude():
    assert names(Attention(), targets="out", exclude=(r"attn\.out_proj",)) == ["out"]
    assert names(Attention()) == ["out"]


def test_keys_that_match_are_no_problem(built: Any):
    """The control of the errors above."""
    keys = {"q_proj": 4, r"layers\.1\.mlp\..*": 2, "model.layers.0.self_attn.k_proj": 3}
    assert len(names(built("llama"), rank_pattern=keys, alpha_pattern={"v_proj": 1.0})) == 14


def test_linears_of_unknown_role_are_named_when_roles_leave_them_out():
    from loguru import logger

    model = model_of({f"layers.0.{n}": (8, 8) for n in ("q_proj", "mix")}, ("layers",))
    heard: list[str] = []
    logger.enable("lora_lite")
    sink = logger.add(lambda message: heard.append(str(message)), level="WARNING")
    try:
        assert names(model, roles=("reader",)) == ["layers.0.q_proj"]
        names(model)
    finally:
        logger.remove(sink)
        logger.disable("lora_lite")
    assert len(heard) == 1 and "layers.0.mix" in heard[0]


PATTERNS = [
    "q_proj", r"layers\.1\..*", r"layers\.1\.q_proj", r"^model\.layers\.1\.q_proj$", r"^layers\.1\.q_proj$", r"^model\.layers\.1\.q_proj",
    r"q_proj$", "^", "$", "^$", "", ".", r"\.", "a|q_proj", r"1\.q_proj|b", r"^(?:model\.layers\.1\.q_proj)$", r"\d", "[q]_proj", r"\\",
    r"layers\.\d+\.q_proj", "q-proj", r"q\-proj", "(?i)Q_PROJ",
]  # fmt: skip
MODULES = [
    "",
    "q_proj",
    "model.layers.1.q_proj",
    "layers.1.q_proj",
    "model.layers.11.q_proj",
    "modelXlayers.1.q_proj",
    "x.q-proj",
    "my_q_proj",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_names_that_are_compared_are_those_a_regex_would_match(pattern: str) -> None:
    """Literal patterns are not run as regexes: an adapter may hold one for each of a thousand layers."""
    for name in MODULES:
        assert found_in(pattern, name) == bool(re.search(pattern, name)), name
        if not pattern.startswith("(?i)"):  # which may stand at the start only
            assert ends_in(pattern, name) == bool(re.match(rf"^(.*\.)?({pattern})$", name)), name
    assert any(literal(p) is not None for p in PATTERNS) and any(whole(p) is not None for p in PATTERNS)
