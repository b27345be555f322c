"""How does one adapter learn two directions at once? At c = +1 towards the chosen texts, at c = -1 away, near the base in both."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn import Parameter

from lora_lite.adapter import Adapter
from lora_lite.config import AdapterConfig
from lora_lite.lifecycle import attach
from lora_lite.running import as_it_was
from lora_lite.steering.arguments import check_adapter, check_ids
from lora_lite.steering.loop import Recipe, Training
from lora_lite.steering.losses import Aggregate
from lora_lite.steering.pairs import ContrastivePairs
from lora_lite.steering.refusals import refuse_absent, refuse_broken, refuse_few
from lora_lite.steering.report import TrainingReport
from lora_lite.target import check_model


def train_steering(
    model: nn.Module,
    adapter: Adapter,
    pairs: ContrastivePairs,
    tokenizer: Any = None,
    *,
    validation: float | ContrastivePairs | None = 0.1,
    steps: int = 200,
    batch_size: int = 8,
    lr: float = 1e-3,
    warmup: float = 0.1,
    clip: float = 1.0,
    cap: float = 3.0,
    kl: float = 10.0,
    kl_aggregate: Aggregate = "mean",
    kl_top_k: int = 64,
    project: bool = False,
    poles: tuple[float, float] = (1.0, -1.0),
    checks: int = 10,
    keep: Literal["best", "last"] = "best",
    eos: bool = True,
    max_completion: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TrainingReport:
    """Train an attached adapter in place so that its c turns a trait up and down. `examples/steer.py` is the same loop by hand.

        adapter = ll.attach(model, ll.LoRAConfig(r=8), seed=0)
        report = ll.train_steering(model, adapter, ll.ContrastivePairs.from_jsonl("pairs.jsonl"), tokenizer, steps=200)

    Each step sees `batch_size` pairs, both texts of each, at both poles: in one forward with a c per row where the variant allows
    it, in one forward per pole where it does not. loss = margin_nll(cap) + kl * reference_kl, summed over the poles.

    validation    share of the pairs to hold out (one at least; of one there is no effect size, and fewer than ten say little), pairs of
                  their own, or None
    checks, keep  how often to look at the held-out pairs, besides at the start; "best" keeps the weights with the least loss there
                  (without validation, the last), "last" the last
    lr, warmup, clip   AdamW without decay; linear warm-up over a share of the steps, then cosine to 0; norm of the gradient at most
    cap           nats by which a text is pulled up and its counterpart pushed down, at most (losses.margin_nll)
    kl            weight of a nat per completion token from c = 0; kl_aggregate "mean", "rmse" or "p95", over kl_top_k tokens.
                  Without it c becomes a switch: 200 steps on the grammar of examples/two_styles.py made the odds of style exp(9)
                  at c = -1 with 90% valid sentences; with kl=10, exp(3.5) and 94%
    project       PCGrad between the two poles' gradients (losses.pcgrad); twice the backward
    poles         the c of the chosen texts and of the rejected ones
    eos, max_completion   as in `ContrastivePairs.tokenised`

    The reference is the model in eval mode `with adapter(model, c=0)`: the base, with whatever else acts on it there (a history
    whose gate is this adapter is shut). Steps run in train mode: dropout is on, and so is gradient checkpointing if you enabled it.
    Afterwards each module's mode, the random state and every `requires_grad` are as they were; `.grad` of what was trained is None,
    and `adapter.calibrated` is empty, since how far c can go is to be measured anew.
    The same seed, versions, machine and threads give the same weights. An exception or Ctrl-C leaves the best weights so far.

    Raises, before the first step, RuntimeError or ValueError for what would train nothing or the wrong thing: an adapter that is
    not attached here or has no trainables, trainables in bfloat16 or float16, a pole at c = 0, a history whose gate does not open
    at a pole, bad pairs; during training, RuntimeError where the loss or its gradient is not finite.
    """
    check_model(model)
    check_adapter(adapter)
    recipe = Recipe(
        steps=steps, batch_size=batch_size, lr=lr, warmup=warmup, clip=clip, cap=cap, kl=kl, kl_aggregate=kl_aggregate, kl_top_k=kl_top_k,
        project=project, poles=poles, checks=checks, keep=keep, seed=seed,
    )  # fmt: skip
    refuse_broken(model, adapter, poles)
    kept, held = parted(pairs, validation, seed)
    kept, held = (part if part is None else part.tokenised(tokenizer, eos, max_completion) for part in (kept, held))
    if not kept:
        raise ValueError("there are no pairs to train on")
    check_ids(model, (ids for part in (kept, held or ()) for pair in part for ids in pair), "the pairs")  # type: ignore[misc]
    adapter.calibrated = {}  # what was measured of the values before is not true of these: c="auto" asks for a new calibrate_c
    with as_it_was(model), only(adapter, model) as trained, torch.enable_grad():
        torch.manual_seed(seed)
        return Training(model, adapter, trained, recipe, progress).run(kept, held)


def null_control(
    model: nn.Module,
    adapter: Adapter | AdapterConfig,
    pairs: ContrastivePairs,
    tokenizer: Any = None,
    *,
    validation: float | ContrastivePairs | None = 0.1,
    calibration_data: Any = None,
    exclude_directions: Sequence[Adapter] = (),
    seed: int = 0,
    **training: Any,
) -> tuple[Adapter, TrainingReport]:
    """The same training with labels that mean nothing: what remains of an effect here was never the trait's.

        null, report = ll.null_control(model, adapter, pairs, tokenizer, steps=200)      # as train_steering was called
        with null(model, c=1.0): ...                                                     # it is detached; on for the block

    Trains a fresh adapter of the same config on pairs of which exactly half, at random, have chosen and rejected exchanged. The
    held-out pairs have their true labels, so the report's shift and effect are the ones to set beside those of the real training;
    the order of doses proves nothing, a null has one as well. The last weights are kept: the best of a null are its start.
    An attached adapter lends its place (and its part in gates) to the null and has its own values back afterwards, also after an
    exception; a config, or a detached adapter's, is attached for the training. calibration_data, exclude_directions:
    as for `ll.attach`. Raises ValueError where fewer than two pairs are left to train on, and what `train_steering` raises.
    """
    check_model(model)
    if unknown := sorted(set(training) - set(inspect.signature(train_steering).parameters) | {"keep"} & set(training)):
        raise TypeError(f"null_control has no {unknown}; it takes what train_steering does, but keep: the last weights of a null are kept")
    kept, held = parted(pairs, validation, seed)
    refuse_few(kept, held)
    shuffled = kept.balanced_shuffle(seed)
    place = adapter if isinstance(adapter, Adapter) and adapter.attached else None
    config = adapter.config if isinstance(adapter, Adapter) else adapter
    if place is not None:
        refuse_absent(model, place)  # before its values make room
    null = fresh(model, config, place, calibration_data, exclude_directions, seed)
    if place is None:
        null.put_on(model)
        try:
            return null, train_steering(model, null, shuffled, tokenizer, validation=held, keep="last", seed=seed, **training)
        finally:
            null.detach()
    own, calibrated = values(place), dict(place.calibrated)
    try:
        write(place, values(null))
        report = train_steering(model, place, shuffled, tokenizer, validation=held, keep="last", seed=seed, **training)
        write(null, values(place))
    finally:
        write(place, own)
        place.calibrated = calibrated
    return null, report


def fresh(
    model: nn.Module, config: AdapterConfig, place: Adapter | None, calibration_data: Any, exclude: Sequence[Adapter], seed: int
) -> Adapter:
    """A detached adapter with the values a training starts from; the one that trained before is off while they are found."""
    with nullcontext() if place is None else place(model, c=0.0):
        null = attach(model, config, calibration_data, name="null", seed=seed, exclude_directions=exclude)
    null.detach()
    return null


def parted(
    pairs: ContrastivePairs, validation: float | ContrastivePairs | None, seed: int
) -> tuple[ContrastivePairs, ContrastivePairs | None]:
    """(to train on, held out). Raises TypeError for what is neither."""
    for name, given in (("pairs", pairs), ("validation", validation)):
        if not isinstance(given, ContrastivePairs) and (name == "pairs" or isinstance(given, str | Iterable)):
            raise TypeError(
                f"{name} is {type(given).__name__} {given!r:.60}; make it ll.ContrastivePairs(...), or ContrastivePairs.from_jsonl(path)"
            )
    parts = (pairs, validation or None) if validation is None or isinstance(validation, ContrastivePairs) else pairs.split(validation, seed)
    say_copies(*parts)
    return parts


def say_copies(train: ContrastivePairs, held: ContrastivePairs | None) -> None:
    known = {repr(pair) for pair in train} if held else set()
    if copies := sum(repr(pair) in known for pair in held or ()):
        logger.warning(
            "{} of {} held-out pairs are among those trained on too: what they say holds for those texts only; leave repeated pairs out",
            copies, len(held or ()),
        )  # fmt: skip


def values(adapter: Adapter) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in adapter.state_dict().items()}


def write(adapter: Adapter, found: Mapping[str, Tensor]) -> None:
    """In place: the same Parameters."""
    for key, value in adapter.state_dict().items():
        value.copy_(found[key])


@contextmanager
def only(adapter: Adapter, model: nn.Module) -> Iterator[list[Parameter]]:
    """What trains; nothing else on the model takes gradients meanwhile, and no gradient is left behind."""
    trained = [p for p in adapter.parameters() if p.requires_grad]
    others = [p for p in set(model.parameters()) - set(trained) if p.requires_grad]
    try:
        for p in others:
            p.requires_grad_(False)
        yield trained
    finally:
        for p in others:
            p.requires_grad_(True)
        for p in trained:
            p.grad = None
