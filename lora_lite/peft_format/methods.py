"""What is each method called in PEFT: its tensors, its options, its marks? One entry per method, read both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lora_lite.checkpoint import strip_prefixes
from lora_lite.config import found_in
from lora_lite.peft_format import numbers
from lora_lite.peft_format.matching import ends
from lora_lite.peft_format.numbers import At, Convert, Fields, Found, Said, scaled

Config = Mapping[str, Any]


class Option(NamedTuple):
    """A field of our config and of PEFT's; `default` is what PEFT takes where its file says nothing."""

    ours: str
    theirs: str
    default: Any
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


def everywhere(config: Config, name: str) -> bool:
    return True


def nothing(config: Any) -> str | None:
    return None


def unsettled(config: Any, found: Found) -> Any:
    return config


def all_said(config: Any, ats: Mapping[str, At]) -> str | None:
    return None


def as_it_is(config: Any, ats: Mapping[str, At]) -> Any:
    return config


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of PEFT as one of our variants.

    keys      our tensor -> the end of PEFT's key for it
    shared    our tensor -> PEFT's key, where one matrix serves all layers and each takes its corner
    absorbs   shared tensor -> the tensor of a layer that carries its own factor of it
    options   of the two configs
    when      what tells it from others of its peft_type; written as it stands
    says      what else is written; fan_in_fan_out becomes True over layers that store W as (d_in, d_out)
    fixed     fields of ours that PEFT knows with one value only
    alike     fields of ours that PEFT has one value of for all layers
    layers    which of the config's layers are its part (PEFT's IA3 is two of our variants)
    holds_all  whether it can hold the others' parts too
    read      PEFT's tensors, under our names, -> ours;    write  the other way
    turn      (ours, at, c) -> tensors that do at c = 1 what ours do at c; None where the method cannot say a c
    writes    whether ours are written as this method
    refuses   why a config of this kind cannot be read, or None
    inert     what its config may hold beside its options
    settle    (our config, the folder's own and its tensors) -> our config, with what only the layers tell
    unsaid    why a config of ours has no words here over these layers, or None
    said      (our config, the layers) -> our config with PEFT's number where it means another by it
    fill      PEFT's tensors -> the same with what the file may leave out, before their shapes are checked
    drop      the other way, with what the config says of it
    """

    peft_type: str
    variant: str
    keys: Mapping[str, str]
    shared: Mapping[str, str] = field(default_factory=dict)
    absorbs: Mapping[str, str] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    when: Config = field(default_factory=dict)
    says: Config = field(default_factory=lambda: {"init_weights": True})
    fixed: Config = field(default_factory=dict)
    alike: tuple[str, ...] = ()
    layers: Callable[[Config, str], bool] = everywhere
    holds_all: bool = False
    read: Convert = numbers.same
    write: Convert = numbers.same
    turn: Callable[[Fields, At, float], Fields] | None = None
    writes: bool = True
    refuses: Callable[[Config], str | None] = nothing
    inert: frozenset[str] = frozenset()
    settle: Callable[[Any, Found], Any] = unsettled
    unsaid: Callable[[Any, Mapping[str, At]], str | None] = all_said
    said: Callable[[Any, Mapping[str, At]], Any] = as_it_is
    fill: Convert = numbers.same
    drop: Callable[[Fields, At], tuple[Fields, Said]] = numbers.nothing_dropped


# What a config may hold without changing what the adapter computes, beside the options of its method.
INERT = frozenset((
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out",
    "feedforward_modules", "init_weights", "init_lora_weights", "init_ia3_weights", "megatron_core", "qalora_group_size",
    "ensure_weight_tying", "lambda_pattern", "eps", "mini_r", "save_projection", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "velora_config",
))  # fmt: skip
OFF = (None, False, 0, "none", "", [], {})  # values that say "not used"


def method_candidates(config: Mapping[str, Any]) -> list[Method]:
    """The methods a config may mean: the first entries of its peft_type whose marks it has, one per set of marks."""
    of_type = [m for m in METHODS if m.peft_type == config.get("peft_type")]
    fitting = [m for m in of_type if all((config.get(k) or False) == (v or False) for k, v in m.when.items())]
    return [m for m in fitting if m.when == fitting[0].when] if fitting else []


# -- what several entries share ---------------------------------------------------------------------------------------------

R = Option("r", "r", 8)
RANK_PATTERN = Option("rank_pattern", "rank_pattern", {})
RANKED = (
    R,
    RANK_PATTERN,
    Option("alpha", "lora_alpha", 8),
    Option("alpha_pattern", "alpha_pattern", {}),
    Option("rslora", "use_rslora", False),
    Option("dropout", "lora_dropout", 0.0),
)
AB = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
LORA_SAYS = {"init_lora_weights": True, "bias": "none", "fan_in_fan_out": False}
IA3_SAYS = {"init_ia3_weights": True, "fan_in_fan_out": False}
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # the others change the base weight in PEFT


def changes_the_base(config: Config) -> str | None:
    start = config.get("init_lora_weights", True)
    if start in PLAIN_STARTS:
        return None
    return (
        f"init_lora_weights={start!r}: PEFT changes the base weights when it loads this one; in PEFT save it with "
        "path_initial_model_for_weight_conversion, which makes it a plain LoRA of the untouched base"
    )


def feeds_forward(config: Mapping[str, Any], name: str) -> bool:
    """PEFT's rule, which wants no dot in front of the ending."""
    modules = config.get("feedforward_modules") or ()
    return ends(modules, name) if isinstance(modules, str) else any(name.endswith(end) for end in modules)


def gating_inputs(config: Any, found: Found) -> Any:
    """IA3's `feedforward` in PEFT's own words where they tell the same of these layers apart, else with their names in full."""
    layers, modules = list(found.own), found.config.get("feedforward_modules") or ()
    inputs = [name for name in layers if feeds_forward(found.config, strip_prefixes(name))]
    short = [rf"^(?:{modules})$"] if isinstance(modules, str) else [rf"{re.escape(end)}$" for end in modules]
    with suppress(re.error):  # "(?i)" may stand at the start of a regex only
        known = dataclasses.replace(config, feedforward=[p for p in short if any(found_in(p, name) for name in layers)])
        if [name for name in layers if known.gates_input(name)] == inputs:
            return known
    return dataclasses.replace(config, feedforward=[rf"^{re.escape(name)}$" for name in inputs])


def no_alpha(config: Config) -> str | None:
    alpha = config.get("lora_alpha", 8)
    return (
        None if isinstance(alpha, int | float) and alpha > 0 else f"lora_alpha={alpha!r}: PEFT then scales by the rank, which is not read"
    )


def other_blocks(config: Config) -> str | None:
    start = config.get("init_weights", True)
    return f"init_weights={start!r} is another method than MiSS" if start in ("bat", "mini") else None


def no_projection(config: Config) -> str | None:
    if config.get("save_projection", True):
        return None
    return "save_projection=False: the shared matrices are not in the file; load it with PEFT and save it with save_projection=True"


def other_rotations(config: Config) -> str | None:
    """What PEFT itself says of its older files (peft_version is written since 0.18) and of its numbers."""
    if "oft_block_size" not in config:
        return "OFT without oft_block_size is PEFT's before 0.14, another parametrisation"
    if config.get("use_cayley_neumann", True) and not config.get("peft_version"):
        return "use_cayley_neumann without peft_version is PEFT's before 0.18, another parametrisation"
    if bool(r := config.get("r", 0)) == bool(size := config["oft_block_size"]):
        return f"r={r!r} beside oft_block_size={size!r}: PEFT takes one of the two, the other being 0"
    if config.get("use_cayley_neumann", True) and (terms := config.get("num_cayley_neumann_terms", 5)) in (0, 1):
        return f"num_cayley_neumann_terms={terms!r}: PEFT then turns by nothing, whatever the tensors hold"
    return None


NEVER = 2**31 - 1  # PEFT's AdaLoRA wants a total_step, whether it is to be trained or not


def never(steps: Any) -> Any:
    return None if steps == NEVER else steps


def as_cayley(neumann: Any) -> str:
    return "neumann" if neumann else "exact"


METHODS: tuple[Method, ...] = (
    Method(
        peft_type="LORA", variant="dora", keys={**AB, "lora_m": "lora_magnitude_vector"}, options=RANKED, when={"use_dora": True},
        says=LORA_SAYS,
        read=numbers.DORA_MAGNITUDE.read, write=numbers.DORA_MAGNITUDE.write, turn=numbers.dora_turn, refuses=changes_the_base,
    ),
    Method(
        peft_type="LORA", variant="pissa", keys=AB, options=RANKED, when={"init_lora_weights": "pissa"},
        read=numbers.pissa_read, writes=False, settle=numbers.pissa_scales,
    ),
    Method(
        peft_type="LORA", variant="lora", keys=AB, options=RANKED,
        says=LORA_SAYS, turn=scaled("lora_B"), refuses=changes_the_base,
    ),
    Method(  # ranks that the schedule took away are left out of PEFT's file; the schedule's own state is in neither
        peft_type="ADALORA", variant="adalora", keys={"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"},
        options=(
            Option("r", "init_r", 12), Option("alpha", "lora_alpha", 8), Option("dropout", "lora_dropout", 0.0),
            Option("total_step", "total_step", None, never, lambda steps: steps or NEVER),
            *(Option(n, n, d) for n, d in {"target_r": 8, "tinit": 0, "tfinal": 0, "deltaT": 1}.items()),
            *(Option(n, n, d) for n, d in {"beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5}.items()),
        ),
        says=LORA_SAYS, alike=("r", "alpha"), inert=frozenset(("r", "rank_pattern")), turn=scaled("lora_E"),
        fill=numbers.adalora_fill, drop=numbers.adalora_drop, read=numbers.adalora_read, write=numbers.adalora_write, refuses=no_alpha,
    ),
    Method(
        peft_type="IA3", variant="ia3", keys={"lora_l": "ia3_l"}, layers=lambda config, name: not feeds_forward(config, name),
        says=IA3_SAYS, read=numbers.gate_read, write=numbers.gate_write, turn=scaled("lora_l"), holds_all=True, settle=gating_inputs,
    ),
    Method(
        peft_type="IA3", variant="ia3_ff", keys={"lora_l": "ia3_l"}, layers=feeds_forward,
        says=IA3_SAYS, read=numbers.gate_read, write=numbers.gate_write, turn=scaled("lora_l"),
    ),
    Method(peft_type="HRA", variant="hra_gs", keys={"lora_u": "hra_u"}, options=(R,), when={"apply_GS": True}, alike=("r",)),
    Method(peft_type="HRA", variant="hra", keys={"lora_u": "hra_u"}, options=(R,), alike=("r",)),
    Method(
        peft_type="OFT", variant="oft", keys={"lora_Q": "oft_R.weight"}, refuses=other_rotations,
        says={"init_weights": True, "r": 0, "peft_version": "0.18.0"},
        inert=frozenset(("r", "module_dropout")),  # r is the other way to say block_size; PEFT 0.21 makes a dropout and never calls it
        settle=numbers.oft_blocks, unsaid=numbers.oft_unsaid, said=numbers.oft_said,
        options=(
            Option("block_size", "oft_block_size", 32, lambda b: b or 32),  # 0 where r says it: the tensors tell
            Option("cayley", "use_cayley_neumann", True, as_cayley, lambda kind: kind == "neumann"),
            Option("terms", "num_cayley_neumann_terms", 5, lambda n: 4 if n == 3 else n),  # PEFT's 3 has a Q^3, as its 4
        ),
        read=numbers.oft_read, write=numbers.oft_write, turn=scaled("lora_Q"),
    ),
    Method(
        peft_type="ROAD", variant="road", keys={"lora_theta": "road_theta", "lora_alpha": "road_alpha"}, alike=("group_size",),
        options=(Option("kind", "variant", "road_1"), Option("group_size", "group_size", 64)),
        read=numbers.ROAD_STRETCH.read, write=numbers.ROAD_STRETCH.write, turn=scaled("lora_theta", "lora_alpha"),
    ),
    Method(
        peft_type="DELORA", variant="delora", fixed={"init": "zeros"}, turn=scaled("lora_lambda"),
        keys={"lora_A": "delora_A", "lora_B": "delora_B", "lora_lambda": "delora_lambda", "lora_w": "delora_w_norm"},
        options=(R, RANK_PATTERN, Option("strength", "delora_lambda", 15.0), Option("dropout", "module_dropout", 0.0)),
    ),
    Method(  # PEFT 0.21 takes a rank_pattern here and gives every layer r all the same
        peft_type="HIRA", variant="hira", keys={"lora_A": "hira_A", "lora_B": "hira_B"}, turn=scaled("lora_B"),
        says={"init_weights": True, "fan_in_fan_out": False}, alike=("r",), inert=frozenset(("rank_pattern",)),
        options=(R._replace(default=32), Option("dropout", "hira_dropout", 0.0)),
    ),
    Method(
        peft_type="MISS", variant="miss", keys={"lora_M": "miss_block"}, alike=("r",), turn=scaled("lora_M"), refuses=other_blocks,
        options=(R._replace(default=64), Option("dropout", "miss_dropout", 0.0)),
    ),
    Method(
        peft_type="VERA", variant="vera", keys={"lora_b": "vera_lambda_b", "lora_d": "vera_lambda_d"}, alike=("r",),
        shared={"lora_A": "vera_A", "lora_B": "vera_B"}, absorbs={"lora_A": "lora_d", "lora_B": "lora_b"},
        says={"init_weights": True, "fan_in_fan_out": False, "save_projection": True}, turn=scaled("lora_b"), refuses=no_projection,
        settle=numbers.vera_room,
        options=(
            R._replace(default=256), Option("dropout", "vera_dropout", 0.0), Option("d_initial", "d_initial", 0.1),
            Option("projection_seed", "projection_prng_key", 0),
        ),
    ),
)  # fmt: skip
