"""Is every bad input an error that says what is wrong, and is the model untouched by it, bit for bit?"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_lite as ll
from tests.models import VARIANTS, activations, attach, bert, checked_again, llama, mlp, normal, opt, randomise
from tests.references import assert_close, same_bits
from tests.test_laws import changed, mixed_flags, snapshot

X = normal(3, 5, 12, seed=1)
NAN, INF = float("nan"), float("inf")
LORA = VARIANTS["lora"].config
SCORED = VARIANTS["pissa-scored"].config
Call = Callable[[nn.Module, Path], Any]


@dataclasses.dataclass(frozen=True)
class Unheard(ll.AdapterConfig):
    """A config of a variant that nobody registered."""

    variant = "unheard_of"


def lora(**fields: Any) -> ll.LoRAConfig:
    return dataclasses.replace(LORA, **fields)


def calibrated(change: Callable[[dict[str, Any]], Any]) -> Call:
    """Attach with activations that have one thing wrong."""

    def call(model: nn.Module, _: Path) -> None:
        data = activations(model, SCORED)
        replaced = change(data)
        ll.attach(model, SCORED, calibration_data=data if replaced is None else replaced)

    return call


def cut(rows: int) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for poles in data.values():
            poles["rej"] = poles["rej"][:rows]

    return change


def widened(data: dict[str, Any]) -> None:
    data["layers.1.down"]["cho"] = data["layers.1.down"]["cho"][:, :-1]


def spoilt(data: dict[str, Any]) -> None:
    data["layers.1.down"]["cho"][3, 4] = NAN


def of_one(model: nn.Module) -> ll.Adapter:
    return ll.adapters(model)["one"]


def enter(block: Any) -> None:
    with block:
        pass


# The call, on a model that carries the adapter "one"; the kind of error; what it must say.
CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    "no layer matches": (lambda m, _: ll.attach(m, lora(targets="q_prj")), RuntimeError, r"'q_prj' matches no module.*up"),
    "nearest name": (lambda m, _: ll.attach(m, lora(targets="dwon")), RuntimeError, r"nearest: down \(layers\.0\.down\)"),
    "only outside the band": (
        lambda m, _: ll.attach(m, lora(targets=r"s\.0\.", layers=(2,))),
        RuntimeError,
        "only outside layers=.*block 0 of 3",
    ),
    "an empty band": (lambda m, _: ll.attach(m, lora(layer_range=(0.4, 0.5))), RuntimeError, r"holds no block.*1 <= i < 1"),
    "no such block": (lambda m, _: ll.attach(m, lora(layers=(7,))), RuntimeError, r"no block 7.*0 to 2"),
    "everything excluded": (lambda m, _: ll.attach(m, lora(exclude="layers")), RuntimeError, r"exclude=\('layers',\) leaves out"),
    "not a regex": (lambda m, _: ll.attach(m, lora(targets="(")), ValueError, r"targets holds '\(', which is not a regular expression"),
    "an unknown variant": (lambda m, _: ll.attach(m, Unheard()), KeyError, "'unheard_of' is not registered; registered: .*'lora'"),
    "no config": (lambda m, _: ll.attach(m, {"r": 4}), TypeError, "expected a config such as LoRAConfig|dict"),  # type: ignore[arg-type]
    "r = 0": (lambda m, _: ll.attach(m, lora(r=0)), ValueError, "r must be a positive whole number, got 0"),
    "r < 0": (lambda m, _: ll.attach(m, lora(r=-4)), ValueError, "r must be a positive whole number, got -4"),
    "r = 2.0": (lambda m, _: ll.attach(m, lora(r=2.0)), (ValueError, TypeError), "r must be a positive whole number|int"),  # type: ignore[dict-item]
    "a rank_pattern of 0": (
        lambda m, _: ll.attach(m, lora(rank_pattern={"up": 0})),
        ValueError,
        r"rank_pattern\['up'\] must be a positive",
    ),
    "a rank_pattern for nothing": (lambda m, _: ll.attach(m, lora(rank_pattern={"upp": 2})), RuntimeError, "rank_pattern has 'upp'"),
    "alpha = nan": (lambda m, _: ll.attach(m, lora(alpha=NAN)), ValueError, "alpha must be a finite number, got nan"),
    "alpha = inf": (lambda m, _: ll.attach(m, lora(alpha=INF)), ValueError, "alpha must be a finite number, got inf"),
    "dropout = 1": (lambda m, _: ll.attach(m, lora(dropout=1.0)), ValueError, r"dropout must be in \[0, 1\)"),
    "a range upside down": (lambda m, _: ll.attach(m, lora(layer_range=(0.8, 0.2))), ValueError, "0 <= lo < hi <= 1, got .0.8, 0.2"),
    "a range beyond 1": (lambda m, _: ll.attach(m, lora(layer_range=(0.0, 1.5))), ValueError, "0 <= lo < hi <= 1"),
    "an unknown role": (lambda m, _: ll.attach(m, lora(roles="middle")), ValueError, r"roles \('middle',\) are not among"),
    "an integer dtype": (lambda m, _: ll.attach(m, lora(dtype=torch.int8)), ValueError, "dtype must be a floating"),
    "c = nan": (lambda m, _: ll.attach(m, LORA, c=NAN), ValueError, "c must be finite, got nan"),
    "c = a tensor with inf": (lambda m, _: ll.attach(m, LORA, c=torch.tensor([1.0, INF])), ValueError, "c must be finite, got .1.0, inf"),
    "the same name": (lambda m, _: ll.attach(m, LORA, name="one"), ValueError, r"'one' is already attached; attached: \['one'\]"),
    "a name with a dot": (lambda m, _: ll.attach(m, LORA, name="a.b"), ValueError, "identifier.*'a.b'"),
    "a name with __": (lambda m, _: ll.attach(m, LORA, name="a__b"), ValueError, "double underscore, got 'a__b'"),
    "an empty name": (lambda m, _: ll.attach(m, LORA, name=""), ValueError, "identifier"),
    "an attribute in the way": (
        lambda m, _: ll.attach(m, LORA, name="taken"),
        ValueError,
        r"layers\.1\.up already has an attribute 'lora_B__taken'",
    ),
    "train_also nothing": (lambda m, _: ll.attach(m, LORA, train_also="classifier"), RuntimeError, "'classifier' matches no parameter"),
    "train_also no regex": (lambda m, _: ll.attach(m, LORA, train_also="("), ValueError, "train_also holds"),
    "an attached adapter": (lambda m, _: ll.attach(mlp(), of_one(m)), RuntimeError, "attached already"),
    "a seed for a made adapter": (lambda m, _: ll.attach(m, detached(), seed=1), ValueError, "put back as it is"),
    "a made adapter elsewhere": (
        lambda m, _: ll.attach(m, detached(width=16)),
        RuntimeError,
        r"6 of 6 targets do not fit this MLP.*layers\.0\.up",
    ),
    "a made adapter on another base": (lambda m, _: ll.attach(m, detached(seed=5)), (RuntimeError, ValueError), "another base"),  # type: ignore[dict-item]
    "calibration missing, with defaults": (
        lambda m, _: ll.attach(m, ll.CorDAConfig()),
        ValueError,
        "'corda' needs calibration data: attach",
    ),
    "seed = 'a'": (lambda m, _: ll.attach(m, LORA, seed="a"), TypeError, "seed must be a whole number, got str: 'a'"),  # type: ignore[arg-type]
    "seed = 1.5": (lambda m, _: ll.attach(m, LORA, seed=1.5), TypeError, "seed must be a whole number, got float: 1.5"),  # type: ignore[arg-type]
    "shared = a path": (
        lambda m, _: ll.attach(m, ll.SharedConfig(), shared="tasks"),  # type: ignore[arg-type]
        TypeError,
        r"shared must be a SharedSubspace, got str: 'tasks'; ll\.SharedSubspace\.load",
    ),
    "a subspace to a dtype's name": (
        lambda m, _: ll.SharedSubspace.from_adapters([of_one(m)]).to(dtype="float32"),  # type: ignore[arg-type]
        ValueError,
        "dtype must be a floating torch.dtype such as torch.float32, got 'float32'",
    ),
    "calibration missing": (lambda m, _: ll.attach(m, SCORED), ValueError, "needs calibration data"),
    "calibration for nothing": (lambda m, _: ll.attach(m, LORA, calibration_data=[X]), ValueError, "makes no use of calibration data"),
    "calibration too small": (calibrated(cut(1)), ValueError, r"layers\.0\.up: .*at least 2 tokens.*1 of 'rej'"),
    "calibration empty": (calibrated(cut(0)), ValueError, r"layers\.0\.up: .*at least one \(in 'rej'\)"),
    "calibration of another width": (calibrated(widened), ValueError, r"layers\.1\.down: found .*\(32, 19\), expected .*20"),
    "calibration with NaN": (calibrated(spoilt), ValueError, r"layers\.1\.down: 1 of 640 values are NaN"),
    "calibration of some targets": (
        calibrated(lambda d: d.pop("layers.2.up") and None),
        ValueError,
        r"1 of 6 targets have no activations: layers\.2\.up",
    ),
    "calibration without poles": (calibrated(lambda d: {t: v["cho"] for t, v in d.items()}), ValueError, "each of .'cho', 'rej'"),
    "the wrong model": (lambda m, _: enter(of_one(m)(mlp(), c=0.5)), ValueError, "attached to another MLP than the MLP given"),
    "c for the model": (lambda m, _: enter(of_one(m)(0.5)), TypeError, r"the first argument is the model; write adapter\(c=0\.5\)"),  # type: ignore[arg-type]
    "bool c": (lambda m, _: enter(of_one(m)(m, c=True)), TypeError, "c must be a number or a tensor, got bool"),
    "c = '1'": (lambda m, _: enter(of_one(m)(m, c="1")), TypeError, "c must be a number or a tensor"),  # type: ignore[arg-type]
    "c of 3 dimensions": (lambda m, _: enter(of_one(m)(m, c=torch.ones(3, 5, 1))), ValueError, r"got shape \(3, 5, 1\)"),
    "c empty": (lambda m, _: enter(of_one(m)(m, c=torch.ones(0))), ValueError, r"got shape \(0,\)"),
    "c complex": (lambda m, _: enter(of_one(m)(m, c=torch.tensor(1j))), (TypeError, ValueError), "c must"),  # type: ignore[dict-item]
    "resting c = inf": (lambda m, _: setattr(of_one(m), "c", -INF), ValueError, "c must be finite, got -inf"),
    "c of too many rows": (
        lambda m, _: forward_at(m, torch.ones(4)),
        ValueError,
        r"c has shape \(4,\), the activation at layers\.0\.up has \(3, 5, 12\)",
    ),
    "c of too few tokens": (lambda m, _: forward_at(m, torch.ones(3, 4)), ValueError, r"c has shape \(3, 4\).*\(3, 5, 12\).*its 4 tokens"),
    "merge per row": (lambda m, _: of_one(m).merge(torch.tensor([1.0, 2.0])), TypeError, r"one c; got one per row, shape \(2,\)"),  # type: ignore[arg-type]
    "merge at nan": (lambda m, _: of_one(m).merge(NAN), ValueError, "c must be finite, got nan"),
    "merge at inf, for a block": (lambda m, _: enter(of_one(m).merged(c=INF)), ValueError, "c must be finite, got inf"),
    "merge at a mapping": (
        lambda m, _: of_one(m).merge({"up": 1.0}),  # type: ignore[arg-type]
        TypeError,
        "c must be a number.*got dict; a c by layer or by position is for `with adapter|violates type hint",
    ),
    "merge at True": (lambda m, _: of_one(m).merge(True), TypeError, "c must be a number.*got bool"),
    "merge detached": (lambda m, _: detached().merge(), RuntimeError, "not attached"),
    "no file": (lambda m, d: ll.load(m, d / "none.safetensors"), FileNotFoundError, "none.safetensors"),
    "a directory": (lambda m, d: ll.load(m, d), IsADirectoryError, "is a directory; an adapter is one"),
    "save to a directory": (lambda m, d: of_one(m).save(d), IsADirectoryError, "is a directory; give a file"),
    "save a reserved key": (lambda m, d: of_one(m).save(d / "new", {"config": "x"}), ValueError, "'config'. are reserved|reserved"),
    "save a number": (lambda m, d: of_one(m).save(d / "new", {"steps": 3}), (ValueError, TypeError), "str"),  # type: ignore[dict-item]
    "save below a file": (
        lambda m, d: of_one(m).save(d / "good" / "new"),
        NotADirectoryError,
        r"not saved: .*good is a file, so .*good cannot be a folder; save elsewhere",
    ),
    "to_peft below a file": (
        lambda m, d: ll.to_peft(of_one(m), d / "good" / "deeper" / "new"),
        NotADirectoryError,
        r"not saved: .*good is a file, so .*deeper cannot be",
    ),
    "a PEFT folder for a file": (
        lambda m, d: ll.load(m, (peft_folder(d / "f"), d / "f")[1]),
        IsADirectoryError,
        r"is a PEFT adapter's folder; ll\.from_peft\(model, '.*f'\)",
    ),
    "a file for a PEFT folder": (lambda m, d: ll.from_peft(m, d / "good"), ValueError, r"is a file; a PEFT.*ll\.load\(model, '.*good'\)"),
    "a subspace for an adapter": (
        lambda m, d: ll.load(m, subspace_file(d / "f")),
        ValueError,
        r"it is a SharedSubspace; ll\.SharedSubspace\.load",
    ),
    "layers = 2": (lambda m, _: lora(layers=2), ValueError, r"layers must be block indices, such as \(2,\); got 2"),
    "layer_range = 0.5": (lambda m, _: lora(layer_range=0.5), ValueError, r"layer_range must be two fractions, such as .*; got 0\.5"),
    "exclude = 3": (lambda m, _: lora(exclude=3), ValueError, r"exclude must be regexes, such as \('lm_head',\); got 3"),
    "targets = 3": (lambda m, _: lora(targets=3), ValueError, r'targets must be "all-linear" or regexes; got 3'),
    "roles = 3": (lambda m, _: lora(roles=3), ValueError, r"roles must be among .*; got 3"),
    "feedforward = 3": (
        lambda m, _: checked_again(ll.IA3Config(), {"feedforward": 3}),
        ValueError,
        r"feedforward must be regexes, such as \('down_proj',\); got 3",
    ),
    "feedforward = a bad regex": (
        lambda m, _: ll.IA3Config(feedforward="("),
        ValueError,
        r"feedforward holds '\(', which is not a regular",
    ),
    "feedforward that means no target": (
        lambda m, _: ll.attach(m, ll.IA3Config(targets="up", feedforward=("up", "dwn"))),
        RuntimeError,
        r"feedforward has 'dwn', which matches no target's name; .* called up",
    ),
    "feedforward of what excludes it": (
        lambda m, _: ll.attach(m, ll.IA3Config(feedforward="down", exclude="down")),
        RuntimeError,
        "feedforward has 'down', which matches no target's name",
    ),
    "feedforward_modules": (
        lambda m, _: ll.IA3Config(feedforward_modules=["down"]),  # type: ignore[call-arg]
        TypeError,
        "feedforward_modules is feedforward here",
    ),
    "r by its place": (lambda m, _: ll.LoRAConfig(16), TypeError, r"by name, such as LoRAConfig\(r=16\)"),  # type: ignore[call-arg]
    "targets by their place": (lambda m, _: ll.IA3Config("up"), TypeError, r"by name, such as IA3Config\(targets='up'\)"),  # type: ignore[call-arg]
    "PEFT's names": (
        lambda m, _: lora(lora_alpha=3, target_modules=["up"], modules_to_save=["head"]),
        TypeError,
        "lora_alpha is alpha here; target_modules is targets here; for modules_to_save, train_also= of ll.attach; it has .'alpha'",
    ),
    "a name of nobody's": (lambda m, _: lora(rnk=3), TypeError, r"LoRAConfig has no fields \['rnk'\]; it has .*'r'"),
    "another method's name": (lambda m, _: ll.IA3Config(lora_alpha=3), TypeError, r"no fields \['lora_alpha'\]; it has \['dtype'"),  # type: ignore[call-arg]
    "PEFT's names in JSON": (lambda m, _: ll.LoRAConfig.from_dict({"lora_alpha": 3}), ValueError, "lora_alpha is alpha here"),
    "a history of one adapter": (lambda m, _: ll.HistoryBake(m, detached()), TypeError, r"list of \(adapter, c\) pairs.*got Adapter"),
    "a stack of one adapter": (lambda m, _: enter(ll.stack(m, detached())), TypeError, r"list of \(adapter, c\) pairs.*got Adapter"),
    "a history of a number": (lambda m, _: ll.HistoryBake(m, 3), TypeError, r"list of \(adapter, c\) pairs.*got 3"),
    "a history of a pair": (lambda m, _: ll.HistoryBake(m, (detached(), 1.0)), TypeError, r"takes \(adapter, c\) pairs"),
    "adapters of a name": (lambda m, _: ll.adapters("x"), TypeError, "the model comes first, a torch.nn.Module; got str: 'x'"),
    "load's arguments swapped": (lambda m, d: ll.load(d / "good", m), TypeError, "the model comes first.*Path"),
    "attach's arguments swapped": (lambda m, _: ll.attach(LORA, m), TypeError, "the model comes first.*got LoRAConfig"),
    "attach of a config's class": (
        lambda m, _: ll.attach(m, ll.LoRAConfig),  # type: ignore[arg-type]
        TypeError,
        r"expected a config, got the class LoRAConfig; write LoRAConfig\(\)",
    ),
    "attach of a variant's class": (
        lambda m, _: ll.attach(m, ll.REGISTRY["lora"]),  # type: ignore[arg-type]
        TypeError,
        r"got the class LoRA; write LoRAConfig\(\)",
    ),
    "attach of a variant's name": (lambda m, _: ll.attach(m, "pissa"), TypeError, r"got 'pissa'; write PiSSAConfig\(\)"),  # type: ignore[arg-type]
    "attach of a path": (lambda m, d: ll.attach(m, d / "good"), TypeError, r"got \w+Path: .*good'; ll\.load\(model, path\) reads"),  # type: ignore[arg-type]
    "attach of where alone": (lambda m, _: ll.attach(m, ll.AdapterConfig()), TypeError, r"AdapterConfig says where .* such as LoRAConfig"),
    "find_targets of a config's class": (
        lambda m, _: ll.find_targets(m, ll.IA3Config),
        TypeError,
        r"the class IA3Config; write IA3Config\(\)",
    ),  # type: ignore[arg-type]
    "find_targets of a variant's name": (lambda m, _: ll.find_targets(m, "lora"), TypeError, r"got 'lora'; write LoRAConfig\(\)"),  # type: ignore[arg-type]
    "find_targets of an adapter": (
        lambda m, _: ll.find_targets(m, of_one(m)),  # type: ignore[arg-type]
        TypeError,
        r"such as LoRAConfig\(\), got Adapter: .*; adapter\.config is",
    ),
    "load of an adapter": (lambda m, _: ll.load(m, detached()), TypeError, r"expected a path, got Adapter: .*; .*ll\.attach takes"),  # type: ignore[arg-type]
    "load of nothing": (lambda m, _: ll.load(m, None), TypeError, "expected a path, got NoneType"),  # type: ignore[arg-type]
    "read of a model": (lambda m, _: ll.read(m), TypeError, r"expected a path, got MLP: .*; ll\.load\(model, path\) and ll\.read\(path\)"),  # type: ignore[arg-type]
    "load into it of a model": (lambda m, d: of_one(m).load(m, d / "good"), TypeError, "expected a path, got MLP"),  # type: ignore[arg-type]
    "save of a model": (lambda m, d: of_one(m).save(m, d / "new"), TypeError, r"expected a path, got MLP: .*; adapter\.save\(path"),  # type: ignore[arg-type]
    "from_peft of an adapter": (lambda m, _: ll.from_peft(m, detached()), TypeError, r"expected a path, got Adapter: .*; ll\.from_peft\("),  # type: ignore[arg-type]
    "a subspace's file of adapters": (
        lambda m, _: ll.SharedSubspace.load([detached()]),  # type: ignore[arg-type]
        TypeError,
        r"expected a path, got list: .*from_adapters\(\[\.\.\.\]\)",
    ),
    "a stream of adapters": (
        lambda m, _: ll.SharedSubspace.from_adapters_streaming([detached()]),  # type: ignore[list-item]
        TypeError,
        r"expected paths, got 1 Adapters; SharedSubspace\.from_adapters\(",
    ),
    "a path as a state_dict": (lambda m, d: of_one(m).load_state_dict(d / "good"), TypeError, "takes names and tensors.*got Posix"),  # type: ignore[arg-type]
    "numbers as a state_dict": (lambda m, _: of_one(m).load_state_dict({"a": 1.0}), TypeError, "takes names and tensors"),  # type: ignore[dict-item]
    "a stack's arguments swapped": (lambda m, _: enter(ll.stack([(detached(), 1.0)], m)), TypeError, "the model comes first.*got list"),  # type: ignore[arg-type]
    "block_shifts' arguments swapped": (lambda m, _: ll.block_shifts(of_one(m), m, [X]), TypeError, "the model comes first.*got Adapter"),  # type: ignore[arg-type]
    "find_targets without a model": (lambda m, _: ll.find_targets("x", LORA), TypeError, "the model comes first"),
    "a history on no model": (lambda m, _: ll.HistoryBake("x", []), TypeError, "the model comes first"),
    "directions of a name": (lambda m, _: pissa_beside(m, ["x"]), TypeError, r"takes a list of Adapters, such as .ll\.read.*'x'"),
    "directions of one adapter": (lambda m, _: pissa_beside(m, detached()), TypeError, "takes a list of Adapters.*got .Adapter"),
    "directions of a number": (lambda m, _: pissa_beside(m, 3), TypeError, "takes a list of Adapters.*got '3'"),
    "c = a list": (
        lambda m, _: enter(of_one(m)(m, c=[1.0, 2.0])),
        TypeError,
        r"got list; for one number per row write torch\.tensor\(c\)",
    ),
    "c of (3, 1)": (lambda m, _: forward_at(m, torch.ones(3, 1)), ValueError, r"shape \(3, 1\).*one number for each token.*give c\[:, 0\]"),
    "c of (3, 1, 1)": (
        lambda m, _: forward_at(m, torch.ones(3, 1, 1)),
        ValueError,
        r"got shape \(3, 1, 1\); c\.flatten\(\) is one per row",
    ),
    "another config in place": (
        lambda m, d: of_one(m).load(other_file(d / "f", lora(r=3))),
        ValueError,
        r"it was made with r=3 \(here 4\), at layers\.0\.up.* and 1 more",
    ),
    "another method in place": (
        lambda m, d: of_one(m).load(other_file(d / "f", VARIANTS["dora"].config)),
        ValueError,
        r"it was made with variant='dora' \(here 'lora'\), at",
    ),
    "a score without data": (
        lambda m, _: ll.attach(m, SCORED),
        ValueError,
        r"^variant 'pissa' needs calibration data for \{'r': 4, 'train': 'spectrum', 'selection_score': 'cho_rej_min_std'\}: attach",
    ),
    "train_also what is adapted": (
        lambda m, _: ll.attach(m, LORA, train_also=r"1\.up"),
        RuntimeError,
        r"train_also would train \['layers\.1\.up\.weight'\].*get an adapter too.*exclude=\('vision_tower', 'lm_head', 'layers.*1.*up\$'\)",
    ),
    "load the same name": (lambda m, d: ll.load(m, d / "good", name="one"), ValueError, "'one' is already attached"),
    "load at c = nan": (lambda m, d: ll.load(m, d / "good", c=NAN), ValueError, "c must be finite"),
    "load under a bad name": (lambda m, d: ll.load(m, d / "good", name="a-b"), ValueError, "identifier"),
}

# What a type checker would see too: called without the typing hook of the tests, which would speak first.
MISTYPED = {
    "no config", "c for the model", "c = '1'", "merge per row",
    "layers = 2", "layer_range = 0.5", "exclude = 3", "targets = 3", "roles = 3",
    "a history of one adapter", "a stack of one adapter", "a history of a number", "a history of a pair", "adapters of a name",
    "load's arguments swapped", "attach's arguments swapped", "find_targets without a model", "a history on no model",
    "directions of a name", "directions of one adapter", "directions of a number", "c = a list",
    "attach of a config's class", "attach of a variant's class", "attach of a variant's name", "attach of a path",
    "find_targets of a config's class", "find_targets of a variant's name", "find_targets of an adapter",
    "load of an adapter", "load of nothing", "read of a model", "load into it of a model", "save of a model", "from_peft of an adapter",
    "a path as a state_dict", "numbers as a state_dict",
    "a subspace's file of adapters", "a stream of adapters", "a stack's arguments swapped", "block_shifts' arguments swapped",
    "seed = 'a'", "seed = 1.5", "shared = a path", "a subspace to a dtype's name",
}  # fmt: skip
TABLE = [pytest.param(*case, id=key, marks=[pytest.mark.untyped] if key in MISTYPED else []) for key, case in CALLS.items()]


def peft_folder(folder: Path) -> None:
    ll.to_peft(detached(), folder)


def other_file(path: Path, config: ll.AdapterConfig) -> Path:
    adapter = ll.attach(mlp(), config)
    adapter.save(path)
    return path


def subspace_file(path: Path) -> Path:
    ll.SharedSubspace.from_adapters([detached(), detached()], ["a", "b"]).save(path)
    return path


def pissa_beside(model: nn.Module, exclude: Any) -> None:
    ll.attach(model, ll.PiSSAConfig(r=2), name="two", exclude_directions=exclude)


def forward_at(model: nn.Module, c: Tensor) -> None:
    with of_one(model)(model, c=c):
        model(X)


def detached(**size: int) -> ll.Adapter:
    adapter = randomise(ll.attach(mlp(**size), LORA, name="made"))
    adapter.detach()
    return adapter


@pytest.fixture
def carrier(tmp_path: Path) -> Iterator[nn.Module]:
    """A model with an adapter on it and another's file beside it; afterwards everything must be as it was."""
    model = mlp()
    mixed_flags(model)
    randomise(ll.attach(mlp(), LORA)).save(tmp_path / "good")
    model.layers[1].up.lora_B__taken = "the user's"  # type: ignore[assignment]
    one = randomise(ll.attach(model, LORA, name="one", c=0.7))
    before, want, files = snapshot(model), model(X).detach(), sorted(p.name for p in tmp_path.iterdir())
    yield model
    assert not changed(before, snapshot(model))
    assert same_bits(model(X), want) and one.c == 0.7 and one.attached and ll.adapters(model) == {"one": one}
    assert [name for p in sorted(tmp_path.iterdir()) if (name := p.name) != "f"] == files, (
        "nothing is left on the disk"
    )  # f: the call's own


@pytest.mark.parametrize(("call", "kind", "said"), TABLE)
def test_bad_calls_say_so_and_touch_nothing(call: Call, kind: type[Exception], said: str, carrier: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(kind, match=said):
        call(carrier, tmp_path)


def test_the_fixture_would_see_a_touch(tmp_path: Path) -> None:
    model = mlp()
    before = snapshot(model)
    model.layers[2].down.bias.requires_grad_(False)
    assert changed(before, snapshot(model)) == ["layers.2.down"]


# --- layers that cannot carry one ----------------------------------------------------------------------------------------


def test_a_layer_on_the_meta_device_is_refused() -> None:
    model = mlp()
    model.layers[1].up.to("meta")
    for row in VARIANTS.values():
        with pytest.raises(RuntimeError, match=r"layers\.1\.up .*meta device; load the weights"):
            attach(model, row)
        assert not [n for n, _ in model.named_parameters() if "lora_" in n] and not ll.adapters(model)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_refused_by_name_and_passed_by_inside_a_model() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="TorchScript"):
        ll.attach(scripted, ll.LoRAConfig(targets=".*"))
    assert [t.name for t in ll.find_targets(nn.Sequential(nn.Linear(4, 4), scripted), ll.LoRAConfig(targets=".*"))] == ["0"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kept", [False, True])
def test_a_trace_holds_no_c_and_says_so(kept: bool) -> None:
    model = mlp()
    adapter = attach(model, VARIANTS["lora"])
    want = model(X).detach()
    if kept:
        adapter.detach()
        ll.HistoryBake(model, [(adapter, 1.0)])
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match=r"export it merged.*torch\.jit\.trace"):
            torch.jit.trace(model, (X,))
    if not kept:
        with adapter.merged():
            traced = torch.jit.trace(model, (X,))
            assert torch.allclose(traced(X), want, atol=1e-5)


def test_an_offloaded_layer_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate does the offloading that is refused here")
    model = mlp()
    want = model(X)
    accelerate.cpu_offload(model, execution_device="cpu")
    names, hooks = list(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError, match=r"6 of 6 layers .*layers\.0\.up .*offloaded by accelerate"):
        ll.attach(model, LORA)
    assert list(model.state_dict()) == names and [len(m._forward_hooks) for m in model.modules()] == hooks
    assert same_bits(model(X), want)


def test_an_offloaded_model_refuses_a_file_and_a_made_adapter(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate does the offloading that is refused here")
    model, adapter = mlp(), detached()
    adapter.save(tmp_path / "a.safetensors")
    accelerate.cpu_offload(model, execution_device="cpu")
    for put in (lambda: ll.attach(model, adapter), lambda: ll.load(model, tmp_path / "a.safetensors", strict_base=False)):
        with pytest.raises(RuntimeError, match="offloaded by accelerate"):
            put()
        assert not adapter.attached and not [n for n in model.state_dict() if "lora_" in n]


@pytest.fixture
def alone_in_a_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_data_parallel_wrapper_is_refused_and_an_adapter_inside_it_is_found(alone_in_a_group: None, tmp_path: Path) -> None:
    model = mlp()
    made = detached()
    made.save(tmp_path / "a.safetensors")
    wrapped = nn.parallel.DistributedDataParallel(model)
    before = snapshot(model)
    for put in (lambda: ll.attach(wrapped, LORA), lambda: ll.attach(wrapped, made), lambda: ll.load(wrapped, tmp_path / "a.safetensors")):
        with pytest.raises(RuntimeError, match="attach before wrapping in DistributedDataParallel"):
            put()
        assert not changed(before, snapshot(model))
    other = mlp()
    adapter = attach(other, VARIANTS["lora"])
    late = nn.parallel.DistributedDataParallel(other)
    with adapter(late, c=0.5):
        assert adapter.c == 0.5
    assert ll.adapters(late) == {"default": adapter}


# --- files ---------------------------------------------------------------------------------------------------------------


def rewritten(source: Path, target: Path, tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]], **header: str | None) -> None:
    """The file again with other tensors or header entries (None takes one out), as a careless tool would write it."""
    with safe_open(source, "pt") as file:
        metadata = dict(file.metadata())
        held = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 a safe_open is no dict
    for key in ("sha256", "library_version"):  # a file written by hand has neither
        metadata.pop(key)
    metadata.update({k: v for k, v in header.items() if v is not None})
    for key in [k for k, v in header.items() if v is None]:
        metadata.pop(key)
    save_file(tensors(held), target, metadata=metadata)


def same(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["layers.1.up.lora_B"][3, 2] = NAN
    return tensors


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("layers.1.up", "layers.1.upward"): v for k, v in tensors.items()}


def fewer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if k != "layers.1.up.lora_B"}


def reshaped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"layers.1.up.lora_B": torch.zeros(20, 3), "layers.1.up.lora_X": torch.zeros(1)}


Spoil = Callable[[Path, Path], None]
FILES: dict[str, tuple[Spoil, str]] = {
    "truncated": (lambda a, b: b.write_bytes(a.read_bytes()[:-100]) and None, "truncated|cut short|damaged|no(t a)? safetensors"),
    "cut in the header": (lambda a, b: b.write_bytes(a.read_bytes()[:50]) and None, "truncated|cut short|damaged|no(t a)? safetensors"),
    "empty": (lambda a, b: b.write_bytes(b"") and None, "empty|truncated|damaged|not a safetensors"),
    "text": (lambda a, b: b.write_text("dear model, " * 99) and None, "truncated|cut short|damaged|no(t a)? safetensors"),
    "a pickle": (lambda a, b: torch.save({"a": torch.ones(2)}, b), "torch.save file"),
    "foreign": (lambda a, b: save_file({"w": torch.ones(2)}, b), "not .*lora_lite"),
    "a model's": (lambda a, b: save_file(dict(mlp().state_dict()), b), "not .*lora_lite"),
    "PEFT's": (lambda a, b: save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, b), "(?i)peft"),
    "without a config": (lambda a, b: rewritten(a, b, same, config=None), "config"),
    "of an unknown variant": (lambda a, b: rewritten(a, b, same, config=json.dumps({"variant": "unheard_of"})), "unheard_of"),
    "of a later format": (lambda a, b: rewritten(a, b, same, format_version="99"), "99"),
    "NaN": (lambda a, b: rewritten(a, b, with_nan), r"layers\.1\.up\.lora_B"),
    "renamed": (lambda a, b: rewritten(a, b, renamed), r"layers\.1\.upward"),
    "a tensor missing": (lambda a, b: rewritten(a, b, fewer), r"layers\.1\.up\.lora_B"),
    "mis-shaped": (lambda a, b: rewritten(a, b, reshaped), r"layers\.1\.up\.lora_[BX]"),
}


@pytest.mark.parametrize(("spoil", "said"), FILES.values(), ids=FILES)
def test_bad_files_are_refused_whole(spoil: Spoil, said: str, carrier: nn.Module, tmp_path: Path) -> None:
    spoil(tmp_path / "good", tmp_path / "bad")
    one = of_one(carrier)
    state = {n: v.clone() for n, v in one.state_dict().items()}
    with pytest.raises(ll.CheckpointError, match=said):
        ll.load(carrier, tmp_path / "bad", name="two")
    with pytest.raises(ll.CheckpointError):
        one.load(tmp_path / "bad")
    assert all(same_bits(v, state[n]) for n, v in one.state_dict().items()), "half loaded"
    (tmp_path / "bad").unlink()


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = mlp()
    adapter = attach(model, VARIANTS["lora"])
    adapter.save(tmp_path / "a")
    old = (tmp_path / "a").read_bytes()
    with torch.no_grad():
        model.get_parameter("layers.1.down.lora_A")[0, 0] = INF
    with pytest.raises(ValueError, match=r"layers\.1\.down\.lora_A"):
        adapter.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == old and len(list(tmp_path.iterdir())) == 1


# --- another base --------------------------------------------------------------------------------------------------------


def fine_tuned() -> nn.Module:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(1, 7)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another seed": (lambda: llama(seed=1), "hold other weights"),
    "fine-tuned": (fine_tuned, "hold other weights"),
    "another architecture": (opt, "model.layers.0"),
    "without these layers": (bert, "model.layers.0"),
    "fewer layers": (lambda: llama(layers=1), r"model\.layers\.1"),
    "another width": (lambda: llama(hidden=32), r"model\.layers\.0"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "a.safetensors"
    randomise(attach(llama(), VARIANTS["lora"])).save(path)
    return path


@pytest.mark.parametrize(("make", "said"), OTHERS.values(), ids=OTHERS)
def test_a_file_of_another_base_is_refused(make: Callable[[], nn.Module], said: str, saved: Path) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(ll.CheckpointError, match=said):
        ll.load(model, saved)
    assert not changed(before, snapshot(model)) and not ll.adapters(model)


@pytest.mark.parametrize("make", [lambda: llama(seed=1), fine_tuned], ids=["another seed", "fine-tuned"])
def test_another_base_is_taken_when_told_to(make: Callable[[], nn.Module], saved: Path) -> None:
    model = make()
    adapter = ll.load(model, saved, strict_base=False)
    assert len(adapter.targets) == 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_the_same_base(dtype: torch.dtype, saved: Path, tmp_path: Path) -> None:
    model, ids = llama().to(dtype), torch.arange(1, 7)[None]
    adapter = ll.load(model, saved)
    original = llama()
    ll.load(original, saved)
    assert_close(model(input_ids=ids).logits.float(), original(input_ids=ids).logits, tolerance=0.15)
    adapter.save(tmp_path / "b.safetensors")  # and back: a file made on the rounded base, on the unrounded one
    other = llama()
    ll.load(other, tmp_path / "b.safetensors")
    assert same_bits(other(input_ids=ids).logits, original(input_ids=ids).logits)


def test_a_copied_file_is_the_file(saved: Path, tmp_path: Path) -> None:
    """A control for the refusals above: nothing about the place of a file counts."""
    shutil.copy(saved, tmp_path / "copy")
    assert ll.load(llama(), tmp_path / "copy").attached
