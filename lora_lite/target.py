"""Which linear layers does a config mean? By name, by depth in their stack of blocks, by their side of the residual stream."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from loguru import logger
from torch import nn

from lora_lite.base import is_linear, never_called, sizes
from lora_lite.config import AdapterConfig, check_config, ends_in, found_in

ALL = "all-linear"
FEW = 3  # names shown of a long list


@dataclass(frozen=True)
class Target:
    """A linear layer to adapt.

    depth   its block's index in the stack, of `blocks` in all; None outside any stack
    stack   path of the list of blocks, "model.layers"; "" when the model itself is the list
    role    "reader" or "writer" of the residual stream, None where that cannot be told
    """

    name: str
    module: nn.Module = field(repr=False)
    d_in: int
    d_out: int
    depth: int | None = None
    blocks: int | None = None
    stack: str | None = None
    role: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out), whichever way the layer stores its weight."""
        return self.d_in, self.d_out

    @property
    def routed(self) -> bool:
        """Whether it sits inside an expert, which sees tokens gathered from the batch in an order of its own."""
        return not {"expert", "experts"}.isdisjoint(self.name.split("."))


class Targets(tuple[Target, ...]):
    """The targets in the order of the model; printed, a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        head = ("name", "type", "d_in", "d_out", "block", "role")
        rows = [head, *((t.name, type(t.module).__name__, str(t.d_in), str(t.d_out), _block(t), t.role or "-") for t in self)]
        width = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self)} targets"])


def _block(target: Target) -> str:
    return "-" if target.depth is None else f"{target.depth} of {target.blocks}"


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model comes first, a torch.nn.Module; got {type(model).__name__}: {str(model)[:80]!r}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{type(model).__name__} is TorchScript, whose linears take no Python hooks; attach to the model it was made from")


def find_targets(model: nn.Module, cfg: AdapterConfig) -> Targets:
    """The linear layers that `cfg` means, in the order of the model; `print` shows them as a table. Touches nothing.

        ll.find_targets(model, ll.LoRAConfig(targets=("q_proj", "v_proj"), layer_range=(0.2, 0.8)))

    Linears outside any stack of blocks are kept by a depth band. Raises RuntimeError, all problems in one, where a regex,
    the band, the roles or a key of rank_pattern, alpha_pattern or feedforward leaves nothing, with what was possible instead.
    """
    check_model(model)
    check_config(cfg)
    search = Search(model, cfg)
    if problems := search.problems():
        asked = f"targets={cfg.targets!r}, exclude={cfg.exclude!r}, {band_of(cfg)}, roles={cfg.roles!r}"
        raise RuntimeError(f"{type(model).__name__}: {'; '.join(problems)}. Asked for: {asked}")
    if unknown := search.unknown_roles():
        logger.warning("roles={}: left out {} linears whose role is unknown: {}", cfg.roles, len(unknown), _names(unknown))
    return Targets(search.chosen)


# -- depth ----------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where in a stack of blocks a module is: `depth` of `blocks` in the list at path `stack`."""

    stack: str
    depth: int
    blocks: int


def places(model: nn.Module) -> dict[str, Place | None]:
    """Every module's path -> its place in the outermost stack around it, or None outside. The model's own path is ""."""
    found: dict[str, Place | None] = {"": None}
    for path, module in model.named_modules():  # parents come before their children
        here, stacked = found[path], is_stack(module)
        for i, key in enumerate(module._modules.keys()):  # TorchScript's own dict iterates by number
            found[f"{path}.{key}" if path else key] = here or (Place(path, i, len(module._modules)) if stacked else None)
    return found


def is_stack(module: nn.Module) -> bool:
    """A list of blocks: an nn.ModuleList, or an nn.Sequential of two or more modules of one class that have parts."""
    if isinstance(module, nn.Sequential):
        return len(module) > 1 and len({type(child) for child in module}) == 1 and all(child._modules for child in module)
    return isinstance(module, nn.ModuleList)


def in_band(cfg: AdapterConfig, depth: int, blocks: int) -> bool:
    """Whether block `depth` of `blocks` is asked for: int(n*lo) <= i < int(n*hi), or i in layers."""
    if cfg.layers is not None:
        return depth in cfg.layers
    lo, hi = cfg.layer_range
    return int(blocks * lo) <= depth < int(blocks * hi)


def band_of(cfg: AdapterConfig) -> str:
    return f"layer_range={cfg.layer_range!r}" if cfg.layers is None else f"layers={cfg.layers!r}"


# -- roles ----------------------------------------------------------------------------------------------------------------

# By the last two components of a path, or else the last one, as Hugging Face's families (and timm, nanoGPT) name them.
# Absent on purpose: what reads and writes something else than the stream (DeepSeek's q_b_proj, Mamba's x_proj and dt_proj).
READERS = """
    q k v q_proj k_proj v_proj qkv qkv_proj Wqkv wqkv W_pack wq wk wv query key value query_proj key_proj value_proj query_key_value
    q_lin k_lin v_lin to_q to_k to_v to_kv to_qkv q_attn c_attn att_proj in_proj in_proj_qkvz in_proj_ba in_proj_qkv in_proj_z
    in_proj_a in_proj_b q_a_proj kv_a_proj_with_mqa receptance
    gate up gate_proj up_proj gate_up_proj fc1 fc_in c_fc dense_h_to_4h w1 w3 w12 wi wi_0 wi_1 Wi lin1 linear1 ffn ff_proj pwconv1
    intermediate_dense intermediate.dense shared_expert_gate feed_forward.key
"""
WRITERS = """
    o o_proj wo Wo out_proj out_lin attn_out c_proj to_out to_out.0 attn.proj attention.output
    attention.dense self_attention.dense self_attn.dense output.dense
    down down_proj fc2 fc_out dense_4h_to_h w2 lin2 linear2 ffn_output ff_out pwconv2 output_dense feed_forward.value
"""
ROLE_OF = {name: role for role, table in (("reader", READERS), ("writer", WRITERS)) for name in table.split()}


def named_role(path: str) -> str | None:
    """What the name says: "model.layers.0.mlp.down_proj" is a writer."""
    *_, parent, last = ["", *path.split(".")]
    return ROLE_OF.get(f"{parent}.{last}") or ROLE_OF.get(last)


def width_of(layers: Mapping[str, tuple[int, int]]) -> int | None:
    """The width of the residual stream in one stack: what most known readers take and writers give, or the one size all share."""
    known = [size[0] if role == "reader" else size[1] for path, size in layers.items() if (role := named_role(path))]
    if known:
        return Counter(known).most_common(1)[0][0]
    shared = set.intersection(*map(set, layers.values())) if layers else set()
    return shared.pop() if len(shared) == 1 else None


def role_of(path: str, d_in: int, d_out: int, width: int | None) -> str | None:
    """By name, else by shape where only one side has the stream's width.

    A named writer that cannot write is a reader (Qwen's first MLP has its second gate at w2). The reverse does not hold:
    keys and values of cross-attention read another stream.
    """
    named = named_role(path)
    if width is not None and (d_in == width) != (d_out == width) and named != "reader":
        return "reader" if d_in == width else "writer"
    return named


# -- the search -----------------------------------------------------------------------------------------------------------


class Search:
    """One question to one model, and what each of its conditions left over: asked, allowed, within the band, chosen."""

    def __init__(self, model: nn.Module, cfg: AdapterConfig) -> None:
        self.model, self.cfg = model, cfg
        self.patterns = (cfg.targets,) if isinstance(cfg.targets, str) else cfg.targets
        self.modules = dict(model.named_modules())
        self.linears = list(linear_layers(model))
        self.names = [t.name for t in self.linears]
        self.outputs = output_embeddings(self.modules)
        self.aliases = shared_modules(model, self.modules)
        self.asked = [t for t in self.linears if any(self.meant(p, t) for p in self.patterns)]
        self.allowed = [t for t in self.asked if not self.excluded(t.name)]
        self.within = [t for t in self.allowed if t.depth is None or in_band(cfg, t.depth, t.blocks or 0)]
        self.chosen = [t for t in self.within if cfg.roles is None or t.role in tuple(cfg.roles)]

    def meant(self, pattern: str, target: Target) -> bool:
        if pattern == ALL:
            return not any(target.module is output for output in self.outputs)
        return found_in(pattern, target.name)

    def excluded(self, name: str) -> bool:
        """By any of its names: who excludes the decoder does not want a module changed that the encoder shares with it."""
        return any(found_in(p, n) for p in self.cfg.exclude for n in (name, *self.aliases.get(name, ())))

    def matching(self, pattern: str, among: Iterable[Target]) -> list[Target]:
        return [t for t in among if self.meant(pattern, t)]

    def unknown_roles(self) -> list[Target]:
        """Linears of the blocks that a choice of roles leaves out only because nothing is known of them."""
        return [t for t in self.within if self.cfg.roles and t.role is None and t.depth is not None]

    # -- what went wrong, in words; empty when nothing did

    def problems(self) -> list[str]:
        if empty := self._empty_band():
            return empty
        found = [self._why_nothing(p) for p in self.patterns if not self.matching(p, self.chosen)]
        found += [said for p in self.patterns if self.matching(p, self.chosen) and (said := self._dead(p))]
        return found or self._idle_keys()

    def _stacks(self) -> dict[str, int]:
        return {t.stack: t.blocks for t in self.allowed if t.stack is not None and t.blocks is not None}

    def _empty_band(self) -> list[str]:
        stacks, cfg = self._stacks(), self.cfg
        have = ", ".join(f"{stack or 'the model itself'} has blocks 0 to {n - 1}" for stack, n in stacks.items())
        if cfg.layers is not None and self.allowed:
            beyond = [i for i in cfg.layers if i >= max(stacks.values(), default=0)]
            none = "no linear asked for is in a stack of blocks, so layers= cannot be meant"
            return [f"there is no block {', '.join(map(str, beyond))}: {have}" if stacks else none] if beyond else []
        if stacks and not any(in_band(cfg, i, n) for n in stacks.values() for i in range(n)):
            lo, hi = cfg.layer_range
            spans = ", ".join(f"{int(n * lo)} <= i < {int(n * hi)} in {stack or 'the model itself'} of {n}" for stack, n in stacks.items())
            return [f"{band_of(cfg)} holds no block: int(n*lo) <= i < int(n*hi) is {spans}; widen it, or give layers=(i, ...)"]
        return []

    def _why_nothing(self, pattern: str) -> str:
        """Which condition took away what a regex (or "all-linear") matches."""
        asked, allowed, within = (self.matching(pattern, stage) for stage in (self.asked, self.allowed, self.within))
        if not asked:
            return self._unmatched(pattern)
        if not allowed:
            return f"{pattern!r} matches only what exclude={self.cfg.exclude!r} leaves out: {_names(asked)}"
        if not within:
            found = _few(f"{t.name} (block {_block(t)})" for t in allowed)
            return f"{pattern!r} matches only outside {band_of(self.cfg)}: {found}"
        found = _few(f"{t.name} ({t.role or 'role unknown'})" for t in within)
        return f"{pattern!r} matches no {' or '.join(self.cfg.roles or ())}: {found}; choose by targets instead of roles"

    def _unmatched(self, pattern: str) -> str:
        if pattern == ALL:
            return f"its only linear is the output embedding, {_few(self.names)}" if self.names else self._none_at_all()
        for explain in (self._dead, self._alias, self._other_modules, self._parameters, self._experts):
            if said := explain(pattern):
                return said
        return f"{pattern!r} matches no module; {nearest(pattern, self.names)}"

    def _none_at_all(self) -> str:
        return "it is itself a linear layer, without a name; wrap it in a module" if is_linear(self.model) else "it holds no linear layers"

    def _dead(self, pattern: str) -> str | None:
        """A layer asked for by name that never runs: dropping it would be silent."""
        hits = [n for n, m in self.modules.items() if never_called(m) and pattern != ALL and found_in(pattern, n) and not self.excluded(n)]
        if not hits:
            return None
        return (
            f"{pattern!r} matches {_few(hits)}, which is never called (nn.MultiheadAttention reads its weight itself), so an adapter "
            f"there would do nothing; choose other linears, or add {re.escape(hits[0])!r} to exclude"
        )

    def _alias(self, pattern: str) -> str | None:
        hits = {name: other for name in self.names for other in self.aliases.get(name, ()) if found_in(pattern, other)}
        same = (f"{other}, which is the same module as {name}; use that name" for name, other in hits.items())
        return f"{pattern!r} matches {next(same)}" if hits else None

    def _other_modules(self, pattern: str) -> str | None:
        found = {n: m for n, m in self.modules.items() if n and n not in self.names and found_in(pattern, n)}
        hits = {n: m for n, m in found.items() if n.rpartition(".")[0] not in found}  # the outermost say enough
        if not hits:
            return None
        names = _few(f"{n} ({type(m).__name__}{_thick(m)})" for n, m in hits.items())
        beneath = [n for n in self.names if any(n.startswith(f"{hit}.") for hit in hits)]
        under = f"the linears under it: {_few(beneath)}" if beneath else nearest(pattern, self.names)
        return f"{pattern!r} matches no linear layer, only {names}; {under}"

    def _parameters(self, pattern: str) -> str | None:
        hits = [f"{n} {tuple(p.shape)}" for n, p in self.model.named_parameters() if found_in(pattern, n)]
        if not hits:
            return None
        return f"{pattern!r} matches no linear layer, only parameters: {_few(hits)}, which no linear holds; {nearest(pattern, self.names)}"

    def _experts(self, pattern: str) -> str | None:
        """Names from before transformers 5, when each expert was a module of linears."""
        if "expert" not in pattern:
            return None
        hits = [f"{n} ({type(m).__name__}{held})" for n, m in self.modules.items() if "expert" in n and (held := _thick(m))]
        if not hits:
            return None
        return f"{pattern!r} matches nothing, because the experts hold no linears: {_few(hits)}; adapt the attention instead"

    def _idle_keys(self) -> list[str]:
        """Keys of the per-layer tables, and regexes that tell the targets apart, that match no target, by the rule that applies them."""
        names, found = [t.name for t in self.chosen], []
        for table, entries in self.cfg.patterns().items():
            for key in entries:
                if not any(ends_in(key, n) for n in names):
                    found.append(f"{table} has {key!r}, which matches the end of no target's path; {nearest(key, names)}")
        for table, patterns in self.cfg.searched().items():
            idle = [p for p in patterns if not any(found_in(p, n) for n in names)]
            found += [f"{table} has {p!r}, which matches no target's name; {nearest(p, names)}" for p in idle]
        return found


def linear_layers(model: nn.Module) -> Iterator[Target]:
    """Every linear of the model as a target, with its place and role; a module at two places once, under its first name."""
    place = places(model)
    layers = {n: (m, sizes(m)) for n, m in model.named_modules() if n and is_linear(m)}
    stacks: dict[str, dict[str, tuple[int, int]]] = {}
    for name, (_, size) in layers.items():
        if where := place[name]:
            stacks.setdefault(where.stack, {})[name] = size
    width = {stack: width_of(members) for stack, members in stacks.items()}
    for name, (module, (d_in, d_out)) in layers.items():
        if where := place[name]:
            yield Target(name, module, d_in, d_out, where.depth, where.blocks, where.stack, role_of(name, d_in, d_out, width[where.stack]))
        else:  # beside a stack is what comes before or after the stream: RoBERTa's classifier.out_proj is no writer
            yield Target(name, module, d_in, d_out, role=None if stacks else named_role(name))


def output_embeddings(modules: Mapping[str, nn.Module]) -> list[Any]:
    """The output embeddings of a Hugging Face model, also inside a wrapper of the user's."""
    found = []
    for module in modules.values():
        if ask := getattr(type(module), "get_output_embeddings", None):
            with suppress(AttributeError, NotImplementedError):  # a backbone without
                found.append(ask(module))
    return [output for output in found if output is not None]


def shared_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """First name -> the other names of each module that sits at several places."""
    first = {id(module): name for name, module in modules.items()}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (own := first[id(module)]) != name:
            found.setdefault(own, []).append(name)
    return found


# -- words ----------------------------------------------------------------------------------------------------------------


def nearest(pattern: str, names: list[str]) -> str:
    """The names that a misspelt regex may have meant: by last component, else by full name, else all last components."""
    lasts: dict[str, str] = {}
    for name in names:
        lasts.setdefault(name.rsplit(".", 1)[-1], name)
    for text in _plain(pattern):
        if close := difflib.get_close_matches(text.rsplit(".", 1)[-1], lasts, n=FEW, cutoff=0.6):
            return f"nearest: {', '.join(f'{last} ({lasts[last]})' for last in close)}"
        if full := difflib.get_close_matches(text, names, n=FEW, cutoff=0.6):
            return f"nearest: {', '.join(full)}"
    return f"the linears here are called {_few(lasts, 12)}" if lasts else "there are no linears here"


def _plain(pattern: str) -> list[str]:
    """A regex's alternatives as the text they would match: r"(q_prj|v_prj)$" -> ["q_prj", "v_prj"]."""
    text = re.sub(r"\\d[+*]?|\[[^]]*\][+*]?", "0", pattern).replace(".*", "")
    return [plain for part in re.split(r"[|()]", text) if (plain := re.sub(r"[\\^$?*+]", "", part).strip("."))]


def _thick(module: nn.Module) -> str:
    """Of a module whose weights no linear holds: ", holding its weights as gate_up_proj (4, 64, 32), not as linears"."""
    held = [f"{n} {tuple(p.shape)}" for n, p in module.named_parameters(recurse=False) if p.ndim > 2]
    return f", holding its weights as {_few(held)}, not as linears" if held else ""


def _names(targets: Iterable[Target]) -> str:
    return _few(t.name for t in targets)


def _few(items: Iterable[Any], n: int = FEW) -> str:
    items = list(items)
    return ", ".join(map(str, items[:n])) + (f" and {len(items) - n} more" if len(items) > n else "")
