"""Does a PEFT folder do here what it does in PEFT, and ours there what it does here, and is everything else refused in words?"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_lite as ll
from lora_lite.peft_format import folder as folder_module
from lora_lite.peft_format import methods
from lora_lite.peft_format.numbers import At, oft_asked
from tests.models import Row as ModelRow
from tests.models import attach, bert, generator, llama, randomise, token_ids
from tests.references import assert_close, assert_differs, same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Invalid `(oft_block_size|r)`:UserWarning"),
]

EQUAL = 1e-6  # of the largest logit, in float32
NAMES = ["q_proj", "k_proj", "v_proj", "down_proj"]
TARGETS = tuple(rf"\.{name}$" for name in NAMES)
LAYER_1 = r"layers\.1\..*"
PATTERNS: dict[str, Any] = {"rank_pattern": {"k_proj": 3, LAYER_1: 6}, "alpha_pattern": {LAYER_1: 5.0, "v_proj": 2.0}}
IDS = token_ids(2, 9)
ORDERED: dict[str, Any] = {"rank_pattern": {"v_proj": 3, LAYER_1: 6}, "alpha_pattern": {"v_proj": 2.0, LAYER_1: 5.0}}  # not sorted
DOSES = (-1.0, 0.5, 1.0)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Case(NamedTuple):
    """One of our configs. `folds`: whether PEFT's own form can say a c."""

    config: ll.AdapterConfig
    folds: bool = True


CASES = {
    "lora": Case(ll.LoRAConfig(r=4, alpha=6.0, targets=TARGETS)),
    "patterns": Case(ll.LoRAConfig(r=4, alpha=6.0, targets=TARGETS, **PATTERNS)),
    "patterns_by_order": Case(ll.LoRAConfig(r=4, alpha=6.0, targets=TARGETS, **ORDERED)),  # both match layer 1's v_proj
    "rslora": Case(ll.LoRAConfig(r=4, alpha=3.0, rslora=True, targets=TARGETS, **PATTERNS)),
    "dora": Case(ll.DoRAConfig(r=4, alpha=6.0, targets=TARGETS)),
    "dora_rs": Case(ll.DoRAConfig(r=4, alpha=3.0, rslora=True, targets=TARGETS, **PATTERNS)),
    "ia3": Case(ll.IA3Config(targets=TARGETS)),
    "ia3_both": Case(ll.IA3Config(targets=TARGETS, feedforward="down_proj")),
    "ia3_ff": Case(ll.IA3FFConfig(targets=TARGETS)),
    "adalora": Case(ll.AdaLoRAConfig(r=4, alpha=6.0, target_r=2, total_step=9, deltaT=3, targets=TARGETS)),
    "adalora_unscheduled": Case(ll.AdaLoRAConfig(r=4, alpha=6.0, targets=TARGETS)),
    "hra": Case(ll.HRAConfig(r=4, targets=TARGETS), folds=False),
    "hra_gs": Case(ll.HRAGSConfig(r=4, targets=TARGETS), folds=False),
    "oft": Case(ll.OFTConfig(block_size=8, targets=TARGETS)),
    "oft_neumann": Case(ll.OFTConfig(block_size=8, cayley="neumann", targets=TARGETS)),
    "oft_two_terms": Case(ll.OFTConfig(block_size=8, cayley="neumann", terms=2, targets=TARGETS)),
    "oft_clamped": Case(ll.OFTConfig(block_size=40, targets=TARGETS)),  # 32 on 64 inputs
    "road_1": Case(ll.ROADConfig(group_size=8, targets=TARGETS)),
    "road_4": Case(ll.ROADConfig(kind="road_4", group_size=8, targets=TARGETS)),
    "delora": Case(ll.DeLoRAConfig(r=4, init="zeros", targets=TARGETS, rank_pattern={"k_proj": 3})),
    "hira": Case(ll.HiRAConfig(r=4, targets=TARGETS)),
    "miss": Case(ll.MiSSConfig(r=4, targets=TARGETS)),
    "vera": Case(ll.VeRAConfig(r=4, targets=TARGETS)),
}
LOW_RANK = {
    "pissa": ll.PiSSAConfig(r=4, alpha=6.0, targets=TARGETS),
    "pissa_rs": ll.PiSSAConfig(r=4, alpha=3.0, rslora=True, targets=TARGETS),
    "olora": ll.OLoRAConfig(r=4, alpha=6.0, targets=TARGETS),
    "adalora": CASES["adalora"].config,
    "orthogonal": ll.LoRAConfig(r=4, alpha=6.0, init="orthogonal", targets=TARGETS),
    "pissa_spectrum": ll.PiSSAConfig(r=4, train="spectrum", targets=TARGETS),
    "lora": CASES["patterns"].config,
    "rslora": CASES["rslora"].config,
    "delora_paper": ll.DeLoRAConfig(r=4, targets=TARGETS),
    "miss": CASES["miss"].config,
    "vera": CASES["vera"].config,
    "hra": CASES["hra"].config,
    "hra_gs": CASES["hra_gs"].config,
    "antipasto": ll.AntiPaSTOConfig(r=4, rotate="U", targets=TARGETS),
    "ssvd": ll.SSVDConfig(r=4, targets=TARGETS),
}


@lru_cache
def base() -> Any:
    return llama()


def fresh() -> Any:
    return copy.deepcopy(base())


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def in_peft(folder: Path, model: Any = None) -> Tensor:
    return logits(PeftModel.from_pretrained(fresh() if model is None else copy.deepcopy(model), folder).eval())


def made(config: ll.AdapterConfig, std: float = 0.1, **keywords: Any) -> tuple[Any, ll.Adapter]:
    model = fresh()
    return model, randomise(attach(model, ModelRow(config), **keywords), std=std)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({k: v.contiguous() for k, v in change(load_file(folder / TENSORS)).items()}, folder / TENSORS, {"format": "pt"})


# -- ours there -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", DOSES)
@pytest.mark.parametrize("name", CASES)
def test_peft_does_what_ours_does(name: str, c: float, tmp_path: Path) -> None:
    config, folds = CASES[name]
    model, adapter = made(config)
    lost = ll.to_peft(adapter, tmp_path / "new" / "folder", c=c)
    kind = json.loads((tmp_path / "new" / "folder" / CONFIG).read_text())["peft_type"]
    own = next(m.peft_type for m in methods.METHODS if m.variant == config.variant)
    assert kind == (own if folds or c == 1.0 else "LORA")  # what has no word for c is said by the plain LoRA that does the same
    assert lost == dict.fromkeys(adapter.targets, 0.0)
    with adapter(model, c=c):
        want = logits(model)
    assert_differs(want, logits(base()), "the adapter's effect", least=2e-3)
    assert_close(in_peft(tmp_path / "new" / "folder"), want, "PEFT's logits", EQUAL)


@pytest.mark.parametrize("c", DOSES)
@pytest.mark.parametrize("name", LOW_RANK)
def test_one_plain_lora_does_the_same(name: str, c: float, tmp_path: Path) -> None:
    model, adapter = made(LOW_RANK[name])
    assert set(ll.to_peft(adapter, tmp_path, c=c, as_lora=True).values()) == {0.0}
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / TENSORS)
    assert config["lora_alpha"] == config["r"] and not config["rank_pattern"] and not config["alpha_pattern"]
    assert not config["use_rslora"] and not config["use_dora"] and config["bias"] == "none" and config["modules_to_save"] is None
    assert {v.shape[0] if "lora_A" in k else v.shape[1] for k, v in tensors.items()} == {config["r"]}
    with adapter(model, c=c):
        assert_close(in_peft(tmp_path), logits(model), "PEFT's logits", EQUAL)


def test_pissa_is_a_plain_lora_of_twice_the_rank(tmp_path: Path) -> None:
    model, adapter = made(LOW_RANK["pissa"])
    ll.to_peft(adapter, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 8
    assert_close(in_peft(tmp_path), logits(model), "PEFT's logits", EQUAL)


def test_a_detached_adapter_needs_no_model(tmp_path: Path) -> None:
    model, adapter = made(CASES["patterns"].config)
    want = logits(model)
    adapter.detach()
    ll.to_peft(adapter, tmp_path)
    assert_close(in_peft(tmp_path), want, "PEFT's logits", EQUAL)


@pytest.mark.parametrize("name", [n for n, config in LOW_RANK.items() if not n.startswith("hra")])
def test_a_low_rank_form_needs_no_model(name: str, tmp_path: Path) -> None:
    _, adapter = made(LOW_RANK[name])
    ll.to_peft(adapter, tmp_path / "attached", c=-0.7, as_lora=True)
    adapter.detach()
    ll.to_peft(adapter, tmp_path / "detached", c=-0.7, as_lora=True)
    attached, detached = (load_file(tmp_path / at / TENSORS) for at in ("attached", "detached"))
    assert attached.keys() == detached.keys() and all(same_bits(detached[k], v) for k, v in attached.items())


def test_what_needs_the_weight_says_so(tmp_path: Path) -> None:
    _, adapter = made(CASES["dora"].config)
    adapter.merge()
    with pytest.raises(RuntimeError, match="attach the adapter first, unmerged"):
        ll.to_peft(adapter, tmp_path / "x")
    adapter.detach()
    with pytest.raises(RuntimeError, match="attach the adapter first"):
        ll.to_peft(adapter, tmp_path / "x")
    with pytest.raises(RuntimeError, match=r"attach 'default' first"):
        ll.to_peft(adapter, tmp_path / "x", as_lora=True, approximate=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["hra", "lora_xs", "ssvd"])
def test_what_is_written_under_autocast_is_not_rounded(name: str, tmp_path: Path) -> None:
    config = {"hra": ll.HRAConfig(r=4), "lora_xs": ll.LoRAXSConfig(r=4), "ssvd": ll.SSVDConfig(r=4)}[name]
    _, adapter = made(config)
    ll.to_peft(adapter, tmp_path / "plain", as_lora=True)
    with torch.autocast("cpu", torch.bfloat16):
        ll.to_peft(adapter, tmp_path / "cast", as_lora=True)
    assert (tmp_path / "plain" / TENSORS).read_bytes() == (tmp_path / "cast" / TENSORS).read_bytes()


# -- theirs here ------------------------------------------------------------------------------------------------------------


def lora(**more: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": NAMES, **more})


THEIRS: dict[str, Callable[[], Any]] = {
    "lora": lora(),
    "patterns": lora(**PATTERNS),
    "rslora": lora(use_rslora=True, **PATTERNS),
    "dora": lora(use_dora=True, rank_pattern={"k_proj": 3}),
    "dora_rs": lora(use_dora=True, use_rslora=True, rank_pattern={"k_proj": 3}),
    "dropout": lora(lora_dropout=0.3),
    "regex": lora(target_modules=r".*layers\.1\..*(q|v)_proj"),
    "all-linear": lora(target_modules="all-linear"),
    "layers": lora(layers_to_transform=[1]),
    "one layer": lora(layers_to_transform=0, layers_pattern="layers"),
    "excluded": lora(exclude_modules=["layers.0.self_attn.q_proj"]),
    "the head": lora(target_modules=["lm_head", "q_proj"]),
    "gaussian": lora(init_lora_weights="gaussian"),
    "pissa": lora(init_lora_weights="pissa"),
    "pissa_rs": lora(init_lora_weights="pissa", use_rslora=True),
    "ia3 outputs": lambda: peft.IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[]),
    "ia3 inputs": lambda: peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    "ia3 both": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3 both, square ones too": lambda: peft.IA3Config(target_modules=NAMES, feedforward_modules=["q_proj", "down_proj"]),
    "ia3 both, by a regex": lambda: peft.IA3Config(target_modules=NAMES, feedforward_modules=r".*\.(down|0\.self_attn\.q)_proj"),
    "ia3 both, by a regex with a flag": lambda: peft.IA3Config(target_modules=NAMES, feedforward_modules=r"(?i).*\.DOWN_proj"),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=NAMES),
    "hra_gs": lambda: peft.HRAConfig(r=4, target_modules=NAMES, apply_GS=True),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=NAMES),
    "oft_exact": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=NAMES, use_cayley_neumann=False),
    "oft_by_r": lambda: peft.OFTConfig(oft_block_size=0, r=8, target_modules=NAMES[:3]),
    "oft_by_r, the nearest": lambda: peft.OFTConfig(oft_block_size=0, r=3, target_modules=NAMES[:3]),
    "oft_two_terms": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=NAMES, num_cayley_neumann_terms=2),
    "oft_dropout": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=NAMES, module_dropout=0.5),
    "oft_clamped": lambda: peft.OFTConfig(oft_block_size=48, r=0, target_modules=NAMES),
    "road": lambda: peft.RoadConfig(variant="road_2", group_size=8, target_modules=NAMES),
    "delora": lambda: peft.DeloraConfig(r=4, target_modules=NAMES, rank_pattern={"k_proj": 3}),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=NAMES),
    "hira_patterns": lambda: peft.HiraConfig(r=4, target_modules=NAMES, rank_pattern={"k_proj": 3}),  # which PEFT 0.21 passes over
    "miss": lambda: peft.MissConfig(r=8, target_modules=NAMES),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=NAMES),
}


def trained(config: Any, folder: Path, model: Any = None, std: float = 0.05) -> Tensor:
    """PEFT's own save_pretrained of an adapter whose trainable tensors were moved at random; its logits."""
    there = get_peft_model(fresh() if model is None else copy.deepcopy(model), config).eval()
    draw = generator(3)
    with torch.no_grad():
        for _, p in sorted(there.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype) * std)
    there.save_pretrained(folder)
    return logits(there)


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_of_pefts_does_here_what_it_does_there(name: str, tmp_path: Path) -> None:
    std = 0.5 if name == "hra_gs" else 0.05  # equal pairs of columns, hardly moved, leave Gram-Schmidt only rounding to go by
    want = trained(THEIRS[name](), tmp_path, std=std)
    model = fresh()
    adapter = ll.from_peft(model, tmp_path)
    assert_differs(want, logits(base()), "the adapter's effect")
    assert_close(logits(model), want, "logits", EQUAL)
    assert [t.name for t in ll.find_targets(base(), adapter.config)] == adapter.targets  # its config means those layers
    model_2 = fresh()
    adapter.detach()
    assert_close(logits(ll.attach(model_2, adapter).model), want, "put back", EQUAL)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [n for n in THEIRS if not n.startswith("pissa")])
def test_theirs_there_and_back_is_bitwise(name: str, tmp_path: Path) -> None:
    trained(THEIRS[name](), tmp_path / "theirs")
    adapter = ll.from_peft(fresh(), tmp_path / "theirs")
    ll.to_peft(adapter, tmp_path / "back")
    want, got = load_file(tmp_path / "theirs" / TENSORS), load_file(tmp_path / "back" / TENSORS)
    want = {k: v for k, v in want.items() if ".base_layer." not in k}  # the head's own weight, which PEFT adds
    assert got.keys() == want.keys()
    for key, v in want.items():
        assert same_bits(got[key], v), key


@pytest.mark.parametrize("std", [0.1, 1e-3])
@pytest.mark.parametrize("name", CASES)
def test_ours_there_and_back_is_bitwise(name: str, std: float, tmp_path: Path) -> None:
    model, adapter = made(CASES[name].config, std)
    ll.to_peft(adapter, tmp_path)
    model_2 = fresh()
    back = ll.from_peft(model_2, tmp_path)
    assert back.variant is adapter.variant and back.targets == adapter.targets
    mine, theirs = adapter.state_dict(), back.state_dict()
    assert mine.keys() == theirs.keys()
    for key, v in mine.items():
        assert same_bits(theirs[key], v), key
    assert_close(logits(model_2), logits(model), "logits", EQUAL)
    same = ("targets", "exclude", "projection_seed", "feedforward")
    assert {k: v for k, v in back.config.to_dict().items() if k not in same} == {
        k: v for k, v in adapter.config.to_dict().items() if k not in same
    }


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pefts_converted_pissa_is_a_plain_lora(tmp_path: Path) -> None:
    there = get_peft_model(fresh(), lora(init_lora_weights="pissa")()).eval()
    there.peft_config["default"].init_lora_weights = True  # type: ignore[union-attr]
    there.save_pretrained(tmp_path / "start")
    there.peft_config["default"].init_lora_weights = "pissa"
    draw = generator(4)
    with torch.no_grad():
        for _, p in sorted(there.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw) * 0.05)
    there.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = fresh()
    adapter = ll.from_peft(model, tmp_path / "end")
    assert adapter.variant.name == "lora" and adapter.config.r == 8  # type: ignore[attr-defined]
    assert_close(logits(model), logits(there), "logits", 3e-6)  # PEFT's own error against its residual base


def adalora(folder: Path, steps: int) -> Tensor:
    """Trained by PEFT with its schedule, which masks ranks from the third step on and drops them in the file; its logits."""
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=9, target_modules=NAMES, total_step=8, tinit=1, tfinal=2, deltaT=1, lora_dropout=0.0
    )
    there: Any = get_peft_model(fresh(), config)
    draw = generator(6)
    with torch.no_grad():
        for _, p in sorted(there.named_parameters()):
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    for step in range(steps):
        torch.nn.functional.cross_entropy(there(input_ids=IDS).logits.flatten(0, 1), IDS.flatten()).backward()
        there.base_model.update_and_allocate(step)
        there.zero_grad()
    there.save_pretrained(folder)
    return logits(there.eval())


@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape")  # ranks of zero, which are fine
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")  # AdaLoRA's are others than LoRA's
@pytest.mark.parametrize("steps", [0, 8])
def test_what_adalora_left_is_an_adalora(steps: int, tmp_path: Path) -> None:
    want = adalora(tmp_path, steps)
    ranks = {v.shape[0] for k, v in load_file(tmp_path / TENSORS).items() if "lora_A" in k}
    assert ranks == {6} if steps == 0 else min(ranks) < 6
    model = fresh()
    adapter = ll.from_peft(model, tmp_path)
    assert adapter.variant.name == "adalora"
    kept = {t: int(f["lora_kept"].sum()) for t, f in adapter.tensors().items()}
    assert kept == {t: load_file(tmp_path / TENSORS)[f"base_model.model.{t}.lora_A"].shape[0] for t in kept}
    assert_differs(want, logits(base()), "the adapter's effect")
    assert_close(logits(model), want, "logits", EQUAL)
    assert_close(logits(model), in_peft(tmp_path), "PEFT's own reading", EQUAL)
    ll.to_peft(adapter, tmp_path / "back")
    theirs, back = load_file(tmp_path / TENSORS), load_file(tmp_path / "back" / TENSORS)
    assert theirs.keys() == back.keys() and all(same_bits(back[k], v) for k, v in theirs.items())
    assert_close(logits(model), in_peft(tmp_path / "back"), "PEFT's reading of what came back", EQUAL)
    key = f"{FIRST}.lora_E"
    rewrite(tmp_path, lambda tensors: {k: v[:-1] if k == key else v for k, v in tensors.items()})
    with pytest.raises(ll.CheckpointError, match=r"of another shape: .*lora_E"):
        ll.from_peft(fresh(), tmp_path)


@pytest.mark.parametrize(("name", "variant", "feedforward"), [
    ("ia3 outputs", "ia3", ()), ("ia3 inputs", "ia3_ff", ("",)), ("ia3 both", "ia3", ("down_proj$",)),
    ("ia3 both, by a regex", "ia3", (r"^(?:.*\.(down|0\.self_attn\.q)_proj)$",)),
    ("ia3 both, by a regex with a flag", "ia3", tuple(rf"^model\.layers\.{i}\.mlp\.down_proj$" for i in (0, 1))),
])  # fmt: skip
def test_an_ia3_folder_is_one_adapter_in_pefts_own_words(name: str, variant: str, feedforward: tuple[str, ...], tmp_path: Path) -> None:
    trained(THEIRS[name](), tmp_path)
    adapter: Any = ll.from_peft(fresh(), tmp_path)
    assert (adapter.config.variant, adapter.config.feedforward) == (variant, feedforward)


def test_an_ia3_folder_of_both_kinds_is_two_adapters_where_its_parts_are_asked_for(tmp_path: Path) -> None:
    want = trained(peft.IA3Config(target_modules=NAMES, feedforward_modules=["down_proj"]), tmp_path)
    edit(tmp_path, feedforward_modules=["down_proj", "never_there"])
    model = fresh()
    outputs = ll.from_peft(model, tmp_path, name="outputs", part="ia3")
    inputs = ll.from_peft(model, tmp_path, name="inputs", part="ia3_ff")
    assert (len(outputs.targets), len(inputs.targets)) == (6, 2)
    assert_close(logits(model), want, "logits", EQUAL)
    whole = fresh()
    both: Any = ll.from_peft(whole, tmp_path)
    assert len(both.targets) == 8 and both.config.feedforward == ("down_proj$",), "a name that means no layer is left out"
    assert same_bits(logits(whole), logits(model))
    with pytest.raises(ll.CheckpointError, match="no part 'lora'"):
        ll.from_peft(fresh(), tmp_path, part="lora")


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Nested(Inner):
    """A layer whose name ends another's: PEFT takes "fc" for both."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.a = Inner(), nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.a[0](self.head(self.fc(x).tanh()).tanh())


def nested() -> Nested:
    torch.manual_seed(0)
    return Nested()


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "hra_gs", "oft", "road_1", "hira", "adalora"])
@pytest.mark.parametrize("targets", ["^fc$", ("^fc$", r"a\.0")])
def test_a_name_that_ends_anothers_means_one_layer(name: str, targets: Any, tmp_path: Path) -> None:
    model, x = nested(), torch.randn(3, 8, generator=generator(0))
    config = dataclasses.replace(CASES[name].config, targets=targets)
    adapter = randomise(ll.attach(model, config), std=0.1)
    ll.to_peft(adapter, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "|".join(map(re.escape, adapter.targets))
    want = model(x)
    assert_close(PeftModel.from_pretrained(nested(), tmp_path).eval()(x), want, "PEFT", EQUAL)
    back = nested()
    assert ll.from_peft(back, tmp_path).targets == adapter.targets
    assert same_bits(back(x), want)


def test_a_feed_forward_layer_whose_name_ends_anothers_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)})
    for config in (ll.IA3Config(feedforward="^proj"), ll.IA3Config(feedforward="k_proj")):
        adapter = ll.attach(model, config)
        if config.feedforward == ("k_proj",):
            ll.to_peft(adapter, tmp_path / "fine")
        else:
            with pytest.raises(ValueError, match=r"gate the inputs of .*k_proj.* too"):
                ll.to_peft(adapter, tmp_path / "x")
        adapter.detach()
    assert [p.name for p in tmp_path.iterdir()] == ["fine"]


@pytest.mark.parametrize("modules", ["(", "a{99999999999999}", [1]])
def test_feedforward_modules_that_cannot_be_read_are_an_error(modules: Any, tmp_path: Path) -> None:
    trained(THEIRS["ia3 both"](), tmp_path)
    edit(tmp_path, feedforward_modules=modules)
    with pytest.raises(ll.CheckpointError, match="where the adapter goes"):
        ll.from_peft(fresh(), tmp_path)


@pytest.mark.parametrize("c", DOSES)
def test_two_halves_of_ia3_are_one_folder(c: float, tmp_path: Path) -> None:
    model, outputs = made(ll.IA3Config(targets=TARGETS[:3]), name="outputs")
    inputs = randomise(ll.attach(model, ll.IA3FFConfig(targets=TARGETS[3:]), name="inputs"), seed=1, std=0.1)
    ll.to_peft([outputs, inputs], tmp_path / "ours", c=c)
    with outputs(model, c=c), inputs(model, c=c):
        want = logits(model)
    assert_close(in_peft(tmp_path / "ours"), want, "PEFT's logits", EQUAL)
    together = fresh()
    ll.from_peft(together, tmp_path / "ours")
    assert_close(logits(together), want, "as one adapter", EQUAL)
    back = fresh()
    ll.from_peft(back, tmp_path / "ours", name="outputs", part="ia3")
    ll.from_peft(back, tmp_path / "ours", name="inputs", part="ia3_ff")
    assert_close(logits(back), want, "back here", EQUAL)
    with pytest.raises(ll.CheckpointError, match="trained on another base"):
        ll.from_peft(llama(seed=1), tmp_path / "ours", part="ia3_ff")


def test_other_pairs_are_no_folder(tmp_path: Path) -> None:
    model, first = made(ll.IA3Config(targets=TARGETS[:3]), name="first")
    second = attach(model, ModelRow(ll.IA3Config(targets=TARGETS[3:])), name="second")
    overlapping = attach(model, ModelRow(ll.IA3FFConfig(targets=TARGETS[2:])), name="overlapping")
    for pair, words in (([first, second], "one adapter, or IA3"), ([], "one adapter"), ([first, overlapping], "have both")):
        with pytest.raises(ValueError, match=words):
            ll.to_peft(pair, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@lru_cache
def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=32, attn_implementation="eager")
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator(p.numel())) * 0.05)
    return model.eval()


@pytest.mark.parametrize("dora", [False, True])
def test_gpt2s_conv1d(dora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=dora)
    want = trained(config, tmp_path / "theirs", gpt2())
    model = copy.deepcopy(gpt2())
    adapter = ll.from_peft(model, tmp_path / "theirs")
    assert_differs(want, logits(gpt2()), "the adapter's effect")
    assert_close(logits(model), want, "logits", EQUAL)
    ll.to_peft(adapter, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["fan_in_fan_out"] is True
    assert_close(in_peft(tmp_path / "ours", gpt2()), want, "back in PEFT", EQUAL)


@lru_cache
def classifier() -> Any:
    return bert()


def test_modules_to_save_are_trained_also(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    want = trained(config, tmp_path / "theirs", classifier())
    model = copy.deepcopy(classifier())
    adapter = ll.from_peft(model, tmp_path / "theirs")
    assert sorted(adapter.also()) == ["classifier.bias", "classifier.weight"]
    assert_close(logits(model), want, "logits", EQUAL)
    ll.to_peft(adapter, tmp_path / "ours", c=0.5)
    there = PeftModel.from_pretrained(copy.deepcopy(classifier()), tmp_path / "ours").eval()
    with adapter(model, c=0.5):
        assert_close(logits(there), logits(model), "PEFT's logits", EQUAL)
    adapter.detach()
    assert same_bits(logits(model), logits(classifier()))


def test_what_peft_cannot_save_beside_is_refused(tmp_path: Path) -> None:
    _, adapter = made(CASES["lora"].config, train_also=r"layers\.0\.mlp\.down_proj\.bias")
    with pytest.raises(ll.CheckpointError, match=r"modules_to_save cannot hold model\.layers\.0\.mlp\.down_proj\.bias"):
        ll.to_peft(adapter, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def infix(key: str) -> str:
    if key.endswith("lora_magnitude_vector"):
        return f"{key}.default.weight"  # a module in memory
    return key.replace(".weight", ".default.weight") if key.endswith(".weight") else f"{key}.default"


RENAMINGS: dict[str, Callable[[str], str]] = {
    "the adapter's name": infix,
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "a wrapper's": lambda key: f"module.{key}",
    "both": lambda key: infix(key).removeprefix("base_model.model."),
}


@pytest.mark.parametrize("name", ["lora", "dora", "ia3 outputs", "road"])
@pytest.mark.parametrize("how", RENAMINGS)
def test_keys_may_be_written_in_several_ways(name: str, how: str, tmp_path: Path) -> None:
    want = trained(THEIRS[name](), tmp_path)
    rewrite(tmp_path, lambda tensors: {RENAMINGS[how](k): v for k, v in tensors.items()})
    model = fresh()
    ll.from_peft(model, tmp_path)
    assert_close(logits(model), want, "logits", EQUAL)


def test_a_minimal_config_means_what_peft_takes_it_for(tmp_path: Path) -> None:
    trained(lora(r=8, lora_alpha=8)(), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": NAMES}))
    model = fresh()
    ll.from_peft(model, tmp_path)
    assert_close(logits(model), in_peft(tmp_path), "logits", EQUAL)


def test_sixteen_bits_become_thirty_two(tmp_path: Path) -> None:
    trained(lora()(), tmp_path)
    rewrite(tmp_path, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    model = fresh()
    adapter = ll.from_peft(model, tmp_path)
    assert adapter.config.dtype is torch.float32 and {v.dtype for v in adapter.state_dict().values()} == {torch.float32}
    assert_close(logits(model), in_peft(tmp_path), "logits", EQUAL)


# -- mistakes that must show --------------------------------------------------------------------------------------------------


MISTAKES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "alpha dropped": ("lora", lambda folder: edit(folder, lora_alpha=8)),
    "alpha's pattern dropped": ("patterns", lambda folder: edit(folder, alpha_pattern={})),
    "the root dropped": ("rslora", lambda folder: edit(folder, use_rslora=False)),
    "gates around zero": ("ia3", lambda folder: rewrite(folder, lambda tensors: {k: v - 1 for k, v in tensors.items()})),
    "magnitudes around zero": (
        "dora",
        lambda folder: rewrite(folder, lambda tensors: {k: v - 1 if "magnitude" in k else v for k, v in tensors.items()}),
    ),
    "the rotation's sign": ("oft", lambda folder: rewrite(folder, lambda tensors: {k: -v for k, v in tensors.items()})),
    "lambda dropped": (
        "delora",
        lambda folder: rewrite(folder, lambda tensors: {k: v / v if "lambda" in k else v for k, v in tensors.items()}),
    ),
    "the scale of VeRA's A": (
        "vera",
        lambda folder: rewrite(folder, lambda tensors: {k: v * 2 if "vera_A" in k else v for k, v in tensors.items()}),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_does_not_pass(mistake: str, tmp_path: Path) -> None:
    name, spoil = MISTAKES[mistake]
    model, adapter = made(CASES[name].config)
    ll.to_peft(adapter, tmp_path)
    assert_close(in_peft(tmp_path), logits(model), "before the mistake", EQUAL)
    spoil(tmp_path)
    assert_differs(in_peft(tmp_path), logits(model), mistake)
    model_2 = fresh()
    ll.from_peft(model_2, tmp_path)
    assert_close(logits(model_2), in_peft(tmp_path), "and both read the same mistake", EQUAL)


# -- what cannot be said ------------------------------------------------------------------------------------------------------


def test_what_is_no_low_rank_update_is_approximated_on_request_only(tmp_path: Path) -> None:
    _, adapter = made(CASES["ia3"].config)
    with pytest.raises(ValueError, match=r"'ia3' is no low-rank update.*approximate=True"):
        ll.to_peft(adapter, tmp_path / "x", as_lora=True)
    assert not (tmp_path / "x").exists()
    lost = ll.to_peft(adapter, tmp_path / "x", c=0.5, as_lora=True, approximate=True, r=5)
    tensors = load_file(tmp_path / "x" / TENSORS)
    for target, error in lost.items():
        layer, gate = base().get_submodule(target), 0.5 * adapter.state_dict()[f"{target}.lora_l"].double()
        layer.requires_grad_(False)
        whole = torch.cat([layer.weight * gate[:, None], (layer.bias * gate)[:, None]], dim=1).double()
        key = f"base_model.model.{target}"
        said = tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
        gap = whole - torch.nn.functional.pad(said, (0, 1))
        assert 0.1 < error < 1 and abs(error - float(gap.norm() / whole.norm())) < 1e-5


@pytest.mark.parametrize("name", ["dora", "oft", "hira", "ia3_ff"])
def test_an_approximation_of_full_rank_is_exact(name: str, tmp_path: Path) -> None:
    model, adapter = made(CASES[name].config)
    lost = ll.to_peft(adapter, tmp_path, c=-1.0, as_lora=True, approximate=True, r=64)
    assert max(lost.values()) < 1e-6
    with adapter(model, c=-1.0):
        assert_close(in_peft(tmp_path), logits(model), "PEFT's logits", 1e-5)


def test_a_rank_that_is_too_low_is_an_approximation(tmp_path: Path) -> None:
    _, adapter = made(LOW_RANK["pissa"])
    with pytest.raises(ValueError, match=r"asked for r=3; 8 layers have more, as .* with 8: approximate=True"):
        ll.to_peft(adapter, tmp_path, as_lora=True, r=3)
    lost = ll.to_peft(adapter, tmp_path, as_lora=True, r=3, approximate=True)
    tensors = load_file(tmp_path / TENSORS)
    for target, update in adapter.factors().items():
        key = f"base_model.model.{target}"
        gap = update.dense() - tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        assert abs(lost[target] - float((gap.norm() / update.dense().norm()).detach())) < 1e-5
    assert set(ll.to_peft(adapter, tmp_path, as_lora=True, r=11).values()) == {0.0}  # and a higher one is padded
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 11


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_version": None}, "before 0.18"),
        ({"r": 4}, "r=4 beside oft_block_size=8"),
        ({"oft_block_size": 0}, "r=0 beside oft_block_size=0"),
        ({"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms=1: PEFT then turns by nothing"),
        ({"coft": True}, "coft=True"),
        ({"block_share": True}, "block_share=True"),
    ],
)
def test_other_rotations_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    trained(THEIRS["oft"](), tmp_path)
    ll.from_peft(fresh(), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ll.CheckpointError, match=words):
        ll.from_peft(fresh(), tmp_path)


@pytest.mark.parametrize(
    ("name", "field"),
    [("lora", "r"), ("lora", "lora_alpha"), ("oft", "use_cayley_neumann"), ("road", "group_size"), ("delora", "delora_lambda")],
)
def test_null_is_no_default(name: str, field: str, tmp_path: Path) -> None:
    """PEFT fails on these, or (use_cayley_neumann) takes null for no."""
    want = trained(THEIRS[name](), tmp_path)
    edit(tmp_path, **{field: None})
    model = fresh()
    with pytest.raises(ll.CheckpointError, match=f"its {field} is null, "):
        ll.from_peft(model, tmp_path)
    assert same_bits(logits(model), logits(base()))
    with contextlib.suppress(TypeError, ValueError):
        assert_differs(in_peft(tmp_path), want, "what PEFT makes of it")


@pytest.mark.parametrize("kind", ["bat", "mini"])
def test_other_blocks_are_refused(kind: str, tmp_path: Path) -> None:
    trained(THEIRS["miss"](), tmp_path)
    edit(tmp_path, init_weights=kind)
    with pytest.raises(ll.CheckpointError, match=f"init_weights='{kind}' is another method"):
        ll.from_peft(fresh(), tmp_path)


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A:UserWarning")
def test_vera_without_its_projections_is_refused(tmp_path: Path) -> None:
    trained(peft.VeraConfig(r=8, target_modules=NAMES, save_projection=False), tmp_path)
    with pytest.raises(ll.CheckpointError, match="save_projection=False"):
        ll.from_peft(fresh(), tmp_path)
    edit(tmp_path, save_projection=True)
    with pytest.raises(ll.CheckpointError, match=r"missing: .*vera_A"):
        ll.from_peft(fresh(), tmp_path)


UNSAYABLE: dict[str, tuple[ll.AdapterConfig, str]] = {
    "a rank per layer that PEFT would pass over": (ll.HiRAConfig(r=4, rank_pattern={"q_proj": 2}, targets=TARGETS), "HIRA has one r"),
    "groups that differ": (ll.ROADConfig(group_size=64, targets=TARGETS), "ROAD has one group_size for all layers"),
    "three terms": (ll.OFTConfig(block_size=8, cayley="neumann", terms=3, targets=TARGETS), "OFT cannot say terms=3"),
}
SAID_AS_LORA = {
    "a rank per layer": ll.HRAConfig(r=4, rank_pattern={"q_proj": 2}, targets=TARGETS),
    "the paper's start": ll.DeLoRAConfig(r=4, targets=TARGETS),
}


@pytest.mark.parametrize("what", SAID_AS_LORA)
def test_what_only_a_plain_lora_says_is_written_as_one(what: str, tmp_path: Path) -> None:
    model, adapter = made(SAID_AS_LORA[what])
    assert set(ll.to_peft(adapter, tmp_path).values()) == {0.0}
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "LORA"
    assert_close(in_peft(tmp_path), logits(model), "PEFT's logits", EQUAL)


def test_an_approximation_may_be_asked_for_where_the_method_has_words(tmp_path: Path) -> None:
    """Only what cannot be said is approximated; a rank is a plain LoRA's."""
    _, said = made(ll.OFTConfig(block_size=8, targets=TARGETS))
    assert set(ll.to_peft(said, tmp_path / "said", approximate=True).values()) == {0.0}
    with pytest.raises(ValueError, match="r=3 is the rank of a plain LoRA: say as_lora=True"):
        ll.to_peft(said, tmp_path / "r", r=3)
    _, unsaid = made(ll.OFTConfig(block_size=8, cayley="neumann", terms=3, targets=TARGETS))
    assert 0 < max(ll.to_peft(unsaid, tmp_path / "unsaid", approximate=True).values()) < 1
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.config.targets == TARGETS])
def test_layers_that_store_their_weight_transposed(name: str, tmp_path: Path) -> None:
    """On Conv1D PEFT loads what is written, as the method where it has it there, else as a plain LoRA, or nothing is written."""
    base = gpt2()
    config: ll.AdapterConfig = dataclasses.replace(CASES[name].config, targets=r"c_attn$")
    config = dataclasses.replace(config, **{table: {} for table in config.patterns()})  # they name Llama's layers
    if config.searched():
        config = dataclasses.replace(config, targets=("c_attn$", "c_proj$"), feedforward=r"mlp\.c_proj$")
    model = copy.deepcopy(base)
    adapter = randomise(ll.attach(model, config, seed=0), std=0.1)
    try:
        ll.to_peft(adapter, tmp_path / "x")
    except ValueError as error:
        assert "has no Conv1D" in str(error) and not list(tmp_path.iterdir())
        return
    assert_close(in_peft(tmp_path / "x", base), logits(model), "PEFT's logits", EQUAL)


def test_a_part_of_a_module_is_saved_with_all_of_it(tmp_path: Path) -> None:
    """PEFT cannot load a module that lacks its weight."""
    model = fresh()
    adapter = randomise(ll.attach(model, ll.LoRAConfig(r=4, targets="q_proj$"), train_also=r"k_proj\.bias$"), std=0.1)
    ll.to_peft(adapter, tmp_path)
    assert_close(in_peft(tmp_path), logits(model), "PEFT's logits", EQUAL)
    again = fresh()
    assert set(ll.from_peft(again, tmp_path).also()) == {n for n, _ in again.named_parameters() if ".k_proj." in n and "lora_" not in n}
    assert_close(logits(again), logits(model), "and back", EQUAL)


@pytest.mark.parametrize("r", [40, 64])
@pytest.mark.parametrize("root", [False, True])
def test_pissa_of_more_than_a_layers_rank_keeps_its_scale(r: int, root: bool, tmp_path: Path) -> None:
    """PEFT cuts A and B down to the layer's rank and leaves the scale alpha / r."""
    config = peft.LoraConfig(r=r, lora_alpha=8, init_lora_weights="pissa", use_rslora=root, target_modules=["k_proj", "q_proj"])
    want = trained(config, tmp_path, std=0.02)
    model = fresh()
    ll.from_peft(model, tmp_path)
    assert_close(logits(model), want, "logits", EQUAL)


@pytest.mark.parametrize(("field", "value"), [("num_cayley_neumann_terms", 3), ("num_cayley_neumann_terms", 4), ("oft_block_size", 14)])
def test_pefts_own_reading_of_ofts_numbers(field: str, value: int, tmp_path: Path) -> None:
    """Its 3 terms are its 4, and 14 on 64 inputs is the nearest that divides them, 16."""
    config = {"oft_block_size": 8, "r": 0, "target_modules": ["q_proj", "v_proj"]} | {field: value}
    want = trained(peft.OFTConfig(**config), tmp_path, std=0.2)
    model = fresh()
    ll.from_peft(model, tmp_path)
    assert_close(logits(model), want, "logits", EQUAL)


def test_as_many_blocks_whatever_the_width_are_refused_in_words(tmp_path: Path) -> None:
    trained(peft.OFTConfig(oft_block_size=0, r=2, target_modules=["q_proj", "down_proj"]), tmp_path)
    with pytest.raises(ll.CheckpointError, match=r"blocks of several sizes, 80 and 32 \(in model.layers.0.self_attn.q_proj\)"):
        ll.from_peft(fresh(), tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_one_number_from_which_peft_makes_every_layers_blocks_is_found_where_there_is_one(seed: int) -> None:
    """Against PEFT's own rule, and all numbers."""
    theirs, none = peft.tuners.oft.OFTLayer.adjust_oft_parameters, 0
    draw = generator(seed)
    for _ in range(50):
        widths = [4 * int(n) for n in torch.randint(1, 80, (3,), generator=draw)]
        config = ll.OFTConfig(block_size=int(torch.randint(4, 90, (1,), generator=draw)))
        blocks = {d: config.at("layer", d, 8).block_size for d in widths}
        asked = oft_asked(config, {str(d): At(config.at("layer", d, 8), d, 8) for d in widths})
        able = [n for n in range(1, max(widths) + 1) if all(theirs(None, d, n) == b for d, b in blocks.items())]  # type: ignore[arg-type]
        assert asked in able if able else asked is None
        assert config.block_size not in able or asked == config.block_size
        none += not able
    assert 0 < none < 50


def test_blocks_of_which_peft_has_no_number_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(300, 8)})
    with pytest.raises(ValueError, match=r"OFT cannot say blocks of 32 \(in a\), 60 \(in b\) at once: .* of no number"):
        ll.to_peft(ll.attach(model, ll.OFTConfig(block_size=60)), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_ofts_module_dropout_drops_nothing_in_peft(tmp_path: Path) -> None:
    """In training either: if a later PEFT calls it, this is how we hear of it."""
    there = get_peft_model(fresh(), THEIRS["oft_dropout"]())
    with torch.no_grad():
        for p in there.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator(1)) * 0.1)
    still = logits(there.eval())
    assert same_bits(logits(there.train()), still) and same_bits(logits(there), still)


@pytest.mark.parametrize(
    "name",
    ["lora", "dora", "adalora", "ia3_both", "hra", "hra_gs", "oft", "oft_neumann", "road_1", "road_4", "delora", "hira", "miss", "vera"],
)
def test_an_adapter_of_sixteen_bits_is_the_same_there(name: str, tmp_path: Path) -> None:
    """PEFT makes float32 of its tensors: what is computed of them here must not be rounded to 16 bits on the way."""
    model, adapter = made(dataclasses.replace(CASES[name].config, dtype=torch.bfloat16))
    ll.to_peft(adapter, tmp_path)
    assert_close(in_peft(tmp_path), logits(model), "PEFT's logits", EQUAL)


def test_two_terms_are_pefts_in_float64(tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=8, r=0, target_modules=NAMES, num_cayley_neumann_terms=2)
    there = get_peft_model(fresh().double(), config, autocast_adapter_dtype=False).double()
    with torch.no_grad():
        for p in there.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator(1)) * 0.1)
    there.save_pretrained(tmp_path)
    model = fresh().double()
    ll.from_peft(model, tmp_path)
    assert_differs(logits(model), logits(fresh().double()), "the adapter's effect")
    assert_close(logits(model), logits(there), "logits", 1e-12)


@pytest.mark.parametrize("what", UNSAYABLE)
def test_what_peft_has_no_words_for_is_refused_by_name(what: str, tmp_path: Path) -> None:
    config, words = UNSAYABLE[what]
    _, adapter = made(config)
    with pytest.raises(ValueError, match=words):
        ll.to_peft(adapter, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_row_that_vanishes_at_c_is_refused(tmp_path: Path) -> None:
    _, adapter = made(ll.DoRAConfig(r=4, targets=TARGETS))
    with torch.no_grad():
        for fields in adapter.tensors().values():
            fields["lora_B"].zero_()
            fields["lora_m"].zero_()
    name, fields = next(iter(adapter.tensors().items()))
    with torch.no_grad():
        fields["lora_m"][3] = float(base().get_submodule(name).weight[3].norm())  # g = 2, which c = -1 takes to nothing
    ll.to_peft(adapter, tmp_path / "x", c=-0.9)
    with pytest.raises(ValueError, match=r"at c=-1.0 a row of the base vanishes"):
        ll.to_peft(adapter, tmp_path / "y", c=-1.0)


@pytest.mark.parametrize("r", [0, -1, True, np.int64(0)])
def test_a_rank_is_positive(r: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="r must be a positive whole number"):
        ll.to_peft(made(CASES["lora"].config)[1], tmp_path / "x", as_lora=True, r=r)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    ll.to_peft(made(CASES["lora"].config)[1], tmp_path, np.float64(0.5), as_lora=True, r=np.int64(8))
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 8


def test_what_is_no_adapter_is_refused_in_words(tmp_path: Path) -> None:
    to_peft: Any = getattr(ll.to_peft, "__wrapped__", ll.to_peft)  # the tests' type checks would refuse them first
    model, adapter = made(CASES["lora"].config)
    for given, words in (
        (model, r"got LlamaForCausalLM; .* ll.adapters\(model\)"),
        ("a", "got str"),
        ([adapter, 3], "got int"),
    ):
        with pytest.raises(TypeError, match=rf"writes an Adapter, {words}"):
            to_peft(given, tmp_path / "x")


@pytest.mark.parametrize("c", [float("nan"), float("inf"), True, torch.tensor([1.0, 2.0]), "1"])
def test_c_is_one_finite_number(c: Any, tmp_path: Path) -> None:
    _, adapter = made(CASES["lora"].config)
    with pytest.raises((TypeError, ValueError)):
        ll.to_peft(adapter, tmp_path / "x", c=c)
    assert not list(tmp_path.iterdir())


# -- foreign, broken and hostile folders ----------------------------------------------------------------------------------------


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def cut_short(folder: Path) -> None:
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[: len(whole) * 2 // 3])


def without(*keys: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k not in keys})


def adding(key: str, value: Tensor) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {**tensors, key: value})


def saying(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **changes)


def writing(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None  # type: ignore[func-returns-value]


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (cut_short, "damaged or cut short"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "lacks adapter_model.safetensors"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "lacks adapter_config.json"),
    "a pickle": (lambda folder: (folder / TENSORS).rename(folder / "adapter_model.bin"), "is a pickle, which can run code"),
    "config not JSON": (writing(CONFIG, "{"), "not the JSON object"),
    "config a list": (writing(CONFIG, "[]"), "not the JSON object"),
    "config twice": (writing(CONFIG, '{"r": 4, "r": 5}'), "repeated: r"),
    "config nested": (writing(CONFIG, "[" * 100_000), "not the JSON object"),
    "config not text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe{"), "is not text"),
    "tensors are text": (writing(TENSORS, "<html>"), "web page"),
    "a layer missing": (
        without(f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"),
        r"missing: its config names these layers.*0\.self_attn",
    ),
    "a tensor missing": (without(f"{FIRST}.lora_B.weight"), r"1 key missing: model\.layers\.0\.self_attn\.q_proj\.lora_B\.weight"),
    "an unknown key": (adding(f"{FIRST}.lora_C.weight", torch.zeros(2)), r"without a home: .*lora_C\.weight"),
    "a bias": (adding(f"{FIRST}.lora_B.bias", torch.zeros(64)), r"without a home: .*lora_B\.bias"),
    "an embedding": (
        adding("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 128)),
        "of an embedding, and only linear layers",
    ),
    "another model's layer": (adding("base_model.model.h.0.q.lora_A.weight", torch.zeros(4, 64)), "of no linear layer"),
    "a layer nobody named": (
        lambda folder: rewrite(folder, lambda t: t | {k.replace("q_proj", "o_proj"): v.clone() for k, v in t.items() if "q_proj" in k}),
        "unexpected: the file has these layers",
    ),
    "one tensor twice": (adding(f"{FIRST}.lora_A.default.weight", torch.zeros(4, 64)), "that mean one tensor"),
    "another shape": (
        lambda folder: rewrite(folder, lambda tensors: {k: v[:2] if "lora_A" in k else v for k, v in tensors.items()}),
        r"of another shape: .*lora_A\.weight \(2, 64\), expected \(4, 64\)",
    ),
    "NaN": (
        lambda folder: rewrite(folder, lambda tensors: {k: v * float("nan") if k.startswith(FIRST) else v for k, v in tensors.items()}),
        "holding NaN",
    ),
    "whole numbers": (lambda folder: rewrite(folder, lambda tensors: {k: v.long() for k, v in tensors.items()}), "no floats"),
    "an unknown method": (saying(peft_type="LOHA"), r"peft_type 'LOHA'; read are .*LORA"),
    "no method": (saying(peft_type=None), "peft_type None"),
    "a strange method": (saying(peft_type=["LORA"]), "peft_type"),
    "lora_bias": (saying(lora_bias=True), "'lora' here does not have: lora_bias=True"),
    "bias": (saying(bias="all"), "bias='all'"),
    "qalora": (saying(use_qalora=True), "use_qalora=True"),
    "alora": (saying(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "parameters": (saying(target_parameters=["experts.weight"]), "target_parameters"),
    "copied layers": (saying(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "something new": (saying(use_telepathy=0.5), "use_telepathy=0.5"),
    "olora": (saying(init_lora_weights="olora"), "init_lora_weights='olora': PEFT changes the base weights"),
    "pissa by chance": (saying(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
    "dora without its magnitudes": (saying(use_dora=True), "8 keys missing"),
    "r is zero": (saying(r=0), "its config cannot be read"),
    "r is text": (saying(r="4"), "its config cannot be read"),
    "r is huge": (saying(r=10**30), "config asks for"),
    "r is large": (saying(r=10**12), "of another shape"),
    "alpha is text": (saying(lora_alpha="8"), "its config cannot be read"),
    "a pattern that is none": (saying(rank_pattern={"q_proj(": 4}), "its config cannot be read.*not a regular"),
    "a pattern's table is a list": (saying(rank_pattern=["q_proj"]), "its config cannot be read"),
    "targets are a number": (saying(target_modules=5), "does not say where.*target_modules=5"),
    "targets are missing": (saying(target_modules=None), "target_modules=None"),
    "targets are no regex": (saying(target_modules="(q_proj"), "where the adapter goes cannot be read"),
    "targets nowhere": (saying(target_modules=["c_attn"]), "names no linear layer"),
    "depth is text": (saying(layers_to_transform="1"), "layers_to_transform"),
    "modules are text": (saying(modules_to_save="lm_head"), "modules_to_save"),
    "modules are not there": (saying(modules_to_save=["lm_head"]), r"modules_to_save asks for and the file lacks: lm_head\.weight"),
}


def state(model: nn.Module) -> Any:
    modules = [(n, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    return modules, [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()]


@lru_cache
def sound(tmp: str) -> Path:
    trained(lora()(), Path(tmp))
    return Path(tmp)


@pytest.fixture(scope="module")
def folder_of_pefts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound(str(tmp_path_factory.mktemp("sound")))


@pytest.mark.parametrize("what", SPOILED)
def test_a_folder_that_is_not_sound_is_refused_and_the_model_untouched(what: str, folder_of_pefts: Path, tmp_path: Path) -> None:
    spoil, words = SPOILED[what]
    folder = tmp_path / "folder"
    shutil.copytree(folder_of_pefts, folder)
    model = fresh()
    before = state(model)
    spoil(folder)
    with pytest.raises(ll.CheckpointError, match=words):
        ll.from_peft(model, folder)
    assert state(model) == before


def test_a_place_that_is_no_folder(folder_of_pefts: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is fetched from a hub"):
        ll.from_peft(fresh(), "organisation/adapter")
    with pytest.raises(ll.CheckpointError, match="is a file"):
        ll.from_peft(fresh(), folder_of_pefts / TENSORS)
    shutil.copytree(folder_of_pefts, tmp_path / "mine")
    with pytest.raises(ll.CheckpointError, match="subfolder: give mine"):
        ll.from_peft(fresh(), tmp_path)
    with pytest.raises(NotADirectoryError):
        ll.to_peft(made(CASES["lora"].config)[1], folder_of_pefts / TENSORS)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_tied_modules_are_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(gpt2())  # whose head is its embedding
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    trained(config, tmp_path, gpt2())
    with pytest.raises(ll.CheckpointError, match="tied to another"):
        ll.from_peft(model, tmp_path)


def tied() -> Any:
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=128,
                    tie_word_embeddings=True)
    )  # fmt: skip
    return model.eval()


def test_what_peft_would_untie_is_not_written(tmp_path: Path) -> None:
    """PEFT copies the embedding that it saves and leaves the head tied to the old one: another model."""
    model = tied()
    adapter = randomise(ll.attach(model, ll.LoRAConfig(r=4, targets="q_proj"), train_also="embed_tokens"))
    with pytest.raises(ll.CheckpointError, match=r"model\.embed_tokens\.weight \(to lm_head\.weight\).*PEFT unties"):
        ll.to_peft(adapter, tmp_path / "x")
    adapter.detach()
    with pytest.raises(RuntimeError, match=r"trains model\.embed_tokens\.weight beside its own.*attach the adapter first"):
        ll.to_peft(adapter, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    adapter.save(tmp_path / "a")  # our own file can say it
    want = ll.attach(model, adapter) and logits(model)
    adapter.detach()
    ll.load(model, tmp_path / "a")
    assert same_bits(logits(model), want)


def test_train_also_names_the_other_name_of_a_tied_parameter() -> None:
    model = tied()
    with pytest.raises(RuntimeError, match=r"'lm_head' names lm_head\.weight, which is tied to model\.embed_tokens\.weight.*trains both"):
        ll.attach(model, ll.LoRAConfig(r=4), train_also="lm_head")
    with pytest.raises(RuntimeError, match=r"train_also would train \['model\.embed_tokens\.weight'\].*'lm_head\$'"):
        ll.attach(model, ll.LoRAConfig(r=4, targets="lm_head", exclude=()), train_also="embed_tokens")
    assert not ll.adapters(model)
    assert ll.attach(model, ll.LoRAConfig(r=4), train_also="embed_tokens").also()


def test_a_name_in_use_leaves_the_first_alone(folder_of_pefts: Path) -> None:
    model = fresh()
    ll.from_peft(model, folder_of_pefts)
    want = logits(model)
    with pytest.raises(ValueError, match="already attached"):
        ll.from_peft(model, folder_of_pefts)
    assert list(ll.adapters(model)) == ["default"] and same_bits(logits(model), want)


# -- the header, and writing ------------------------------------------------------------------------------------------------------


def test_fingerprint_and_version_survive_in_the_header(tmp_path: Path) -> None:
    _, adapter = made(CASES["lora"].config)
    adapter.metadata["note"] = "kind"
    ll.to_peft(adapter, tmp_path)
    with safe_open(tmp_path / TENSORS, "pt") as file:
        header = file.metadata()
    assert header["format"] == "pt" and header["lora_lite_version"] == ll.__version__
    assert json.loads(header["lora_lite_fingerprint"]) == adapter.fingerprint
    assert ll.from_peft(fresh(), tmp_path).metadata == {"note": "kind"}
    other = llama(seed=1)
    before = state(other)
    with pytest.raises(ll.CheckpointError, match="trained on another base"):
        ll.from_peft(other, tmp_path)
    assert state(other) == before
    assert ll.from_peft(other, tmp_path, strict_base=False).attached


def test_a_wider_tensor_in_the_file_does_not_widen_the_adapter(tmp_path: Path) -> None:
    _, adapter = made(CASES["ia3"].config)
    ll.to_peft(adapter, tmp_path)
    gates = load_file(tmp_path / TENSORS)
    assert {v.dtype for v in gates.values()} == {torch.float64}, "float32 could not say what was learned beside 1"
    assert ll.from_peft(fresh(), tmp_path).config.dtype is torch.float32
    for name, dtype in ((None, torch.float64), ("float64", torch.float64)):
        save_file(gates, tmp_path / TENSORS, {"format": "pt"} | ({"lora_lite_dtype": name} if name else {}))
        assert ll.from_peft(fresh(), tmp_path).config.dtype is dtype
    save_file(gates, tmp_path / TENSORS, {"format": "pt", "lora_lite_dtype": "__class__"})
    with pytest.raises(ll.CheckpointError, match="lora_lite_dtype is '__class__'"):
        ll.from_peft(fresh(), tmp_path)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    _, adapter = made(CASES["dora"].config)
    for name in ("a", "b"):
        ll.to_peft(adapter, tmp_path / name)
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in (CONFIG, TENSORS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [CONFIG, TENSORS]


@pytest.mark.parametrize("at", [TENSORS, CONFIG])
@pytest.mark.parametrize("exists", [False, True])
def test_a_write_that_fails_leaves_no_mixture(at: str, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = made(CASES["lora"].config)
    if exists:
        ll.to_peft(adapter, tmp_path / "x")
        (tmp_path / "x" / "README.md").write_text("mine")
    real = folder_module.replace

    def failing(target: Path, parts: Any) -> None:
        if target.name == at:
            raise OSError("disk full")
        real(target, parts)

    monkeypatch.setattr(folder_module, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        ll.to_peft(adapter, tmp_path / "x", c=0.5)
    assert [p.name for p in tmp_path.iterdir()] == (["x"] if exists else [])
    if exists:
        assert (tmp_path / "x" / "README.md").read_text() == "mine"
        with pytest.raises(ll.CheckpointError, match=r"lacks adapter_config\.json"):  # loud, not half of each
            ll.from_peft(fresh(), tmp_path / "x")


def test_numbers_that_are_none_are_not_written(tmp_path: Path) -> None:
    _, adapter = made(CASES["lora"].config)
    with torch.no_grad():
        next(adapter.parameters()).fill_(float("inf"))
    with pytest.raises(ll.CheckpointError, match="holding NaN or infinity"):
        ll.to_peft(adapter, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_every_method_of_the_table_has_a_case() -> None:
    written = {m.variant for m in methods.METHODS if m.writes}
    assert written == {case.config.variant for case in CASES.values()}
    read = {m.peft_type for m in methods.METHODS} - {"ADALORA"}  # which has a test of its own
    assert read == {getattr(c().peft_type, "value", None) for c in THEIRS.values()}
