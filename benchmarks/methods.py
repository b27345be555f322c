"""How far does each method get, on the same data with as many numbers to train? `python -m benchmarks.methods [--out FILE.json]`

The demo's model learns a kind of text it has never seen: the standard library's prose in capitals. Every registered method gets
the size nearest to LoRA's budget (where it has a size), the learning rate of a grid that does best on a seed of its own, and then
three seeds, each with its own start and order of data. What counts is the loss on held-out text, in nats per token.

A small model, a short run, one task: it shows that every method trains and where its defaults lie, not which is best elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_lite as ll
from benchmarks.__main__ import environment
from benchmarks.measure import Setup
from lora_lite.cli.corpus import standard_library
from lora_lite.cli.options import SHIPPED
from lora_lite.cli.tiny_lm import RECORD, next_token_loss, stream

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING = 1000  # the seed that learning rates are chosen on
SIZES: dict[str, Sequence[Any]] = {  # the fields that set a method's size, and what they may be; an even r, as HRA starts in pairs
    "r": (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256),
    "block_size": (2, 4, 8, 16, 32),
    "kind": ("road_1", "road_2", "road_4"),
}
EXTRAS: dict[str, dict[str, Any]] = {  # beside every variant's defaults: forms that are methods of their own
    "lora, rslora": {"variant": "lora", "rslora": True},
    "lora, gaussian": {"variant": "lora", "init": "gaussian"},
    "lora, orthogonal": {"variant": "lora", "init": "orthogonal"},
    "pissa, spectrum": {"variant": "pissa", "train": "spectrum"},
    "eva, rho 2": {"variant": "eva", "rho": 2.0},
    "corda, ipm": {"variant": "corda", "mode": "ipm"},
}


@dataclass(frozen=True)
class Task:
    """How long and on what: token streams to train on and to judge by."""

    train: Tensor
    held: Tensor
    steps: int = 50
    rows: int = 8
    length: int = 48

    def batches(self, seed: int) -> Iterator[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        for _ in range(self.steps):
            starts = torch.randint(len(self.train) - self.length, (self.rows,), generator=draw)
            yield self.train[starts[:, None] + torch.arange(self.length)]

    def judged(self) -> Tensor:
        return self.held[: len(self.held) // self.length * self.length].view(-1, self.length)[:128]


@dataclass(frozen=True)
class Result:
    """One method: what it trained, at which rate, and the held-out loss of each seed."""

    name: str
    config: dict[str, Any]
    parameters: int
    rate: float
    losses: list[float]
    tuning: dict[str, float] = field(default_factory=dict)
    seconds_per_step: float = 0.0

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        return max(self.losses) - min(self.losses)


def names() -> dict[str, dict[str, Any]]:
    """Every method under comparison: the fields of its config that are not defaults."""
    alone = [name for name, variant in sorted(ll.REGISTRY.items()) if not variant.needs_shared]
    return {name: {"variant": name} for name in alone} | EXTRAS


def parameters(config: ll.AdapterConfig, layers: Sequence[ll.Target]) -> int:
    specs = ll.REGISTRY[config.variant].param_specs
    each = [specs(t.d_in, t.d_out, config.at(t.name, t.d_in, t.d_out)) for t in layers]
    return sum(math.prod(spec.shape) for fields in each for spec in fields.values() if spec.trainable)


def sized(fields: Mapping[str, Any], budget: int, layers: Sequence[ll.Target], steps: int) -> ll.AdapterConfig:
    """The config nearest to the budget, at a scale alpha/r of 2, its schedule as long as the run."""
    kind = ll.REGISTRY[fields["variant"]].Config
    known = {f.name for f in dataclasses.fields(kind)}
    own = {k: v for k, v in fields.items() if k != "variant"}

    def made(size: Mapping[str, Any]) -> ll.AdapterConfig:
        scale = {"alpha": 2.0 * size["r"]} if "r" in size and "alpha" in known else {}
        schedule = {"total_step": steps, "tinit": steps // 5, "tfinal": steps // 5} if "total_step" in known else {}
        halved = {"target_r": size["r"] // 2} if "target_r" in known else {}
        return kind(**{**scale, **schedule, **halved, **own, **size})

    choices = [made({name: value}) for name, values in SIZES.items() if name in known for value in values if allowed(made, {name: value})]
    choices = choices or [made({})]
    return min(choices, key=lambda config: abs(math.log(parameters(config, layers) / budget)))


def allowed(made: Callable[[Mapping[str, Any]], ll.AdapterConfig], size: Mapping[str, Any]) -> bool:
    try:
        made(size).at("layer", 512, 512)
    except ValueError:  # AntiPaSTO's r holds whole blocks
        return False
    return True


def run(model: Any, config: ll.AdapterConfig, task: Task, rate: float, seed: int) -> tuple[float, int, float]:
    """Train a fresh adapter on the model, which comes back as it was: held-out loss, numbers trained, processor seconds per step."""
    batches = list(task.batches(seed))
    adapter = ll.attach(model, config, seed=seed, **calibration(config, batches))
    try:
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5, (task.steps - step) / task.steps * 2))
        start = time.process_time()
        for step, ids in enumerate(batches, 1):
            (next_token_loss(model, ids) + adapter.aux_loss()).backward()
            optimizer.step()
            adapter.on_step(step)
            optimizer.zero_grad()
            decay.step()
        seconds = (time.process_time() - start) / task.steps
        return held_out(model, task), adapter.num_parameters(), seconds
    finally:
        adapter.detach()


def calibration(config: ll.AdapterConfig, batches: Sequence[Tensor]) -> dict[str, Any]:
    variant = ll.REGISTRY[config.variant]
    if variant.calibration != "required" and not variant.needs_calibration(config):
        return {}
    data: dict[str, Any] = {"calibration_data": batches[:8]}
    if variant.observes == "gradients":
        data["loss"] = lambda output, ids: torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return data


@torch.no_grad()
def held_out(model: Any, task: Task) -> float:
    return float(torch.stack([next_token_loss(model, ids) for ids in task.judged().split(32)]).mean())


def judged(name: str, model: Any, config: ll.AdapterConfig, task: Task, seeds: int) -> Result:
    tuning = {rate: run(model, config, task, rate, TUNING)[0] for rate in RATES}
    rate = min(RATES, key=lambda r: tuning[r] if math.isfinite(tuning[r]) else math.inf)
    runs = [run(model, config, task, rate, seed) for seed in range(seeds)]
    losses, counts, seconds = zip(*runs, strict=True)
    plain = {k: v for k, v in config.to_dict().items() if k not in ("targets", "exclude", "layer_range", "layers", "roles", "dtype")}
    rates = {f"{r:g}": round(loss, 4) for r, loss in tuning.items()}
    return Result(name, plain, counts[0], rate, [round(loss, 4) for loss in losses], rates, round(statistics.median(seconds), 4))


def task_of(tokenizer: Any, steps: int) -> Task:
    kept, held = standard_library().split()
    capitals = [tuple(text.upper() for text in part.prose) for part in (kept, held)]
    return Task(*(stream(tokenizer, part) for part in capitals), steps=steps)


def table(results: Sequence[Result], base: float) -> str:
    lines = [
        f"{'method':18} {'trained':>8} {'rate':>7} {'loss':>7} {'spread':>7} {'ms/step':>8}",
        f"{'(the base)':18} {'':8} {'':7} {base:7.3f}",
    ]
    for r in sorted(results, key=lambda r: r.mean):
        lines.append(f"{r.name:18} {r.parameters:8,} {r.rate:7g} {r.mean:7.3f} {r.spread:7.3f} {1e3 * r.seconds_per_step:8.1f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="a folder in Hugging Face format; left out, the demo's model")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--r", type=int, default=4, help="of the LoRA whose size is the budget")
    parser.add_argument("--only", nargs="+", metavar="METHOD", choices=sorted(names()), help=", ".join(sorted(names())))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, tokenizer = (auto.from_pretrained(options.model) for auto in (AutoModelForCausalLM, AutoTokenizer))
    task = task_of(tokenizer, options.steps)
    layers = ll.find_targets(model, ll.LoRAConfig())
    budget, base = parameters(ll.LoRAConfig(r=options.r), layers), held_out(model, task)
    results = []
    for name in tqdm(options.only or names(), desc="methods"):
        results.append(judged(name, model, sized(names()[name], budget, layers, task.steps), task, options.seeds))
    print(table(results, base))
    if options.out:
        facts = environment(Setup())
        about = {"budget": budget, "base_loss": round(base, 4), "steps": task.steps, "rows": task.rows, "length": task.length}
        about["model"] = json.loads((SHIPPED / RECORD).read_text()) if options.model == SHIPPED else options.model.name
        rows = [{**dataclasses.asdict(r), "mean": round(r.mean, 4), "spread": round(r.spread, 4)} for r in results]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"environment": facts, "task": about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
