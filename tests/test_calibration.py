"""Does an observer see exactly the tokens that reach its layer, in every form the data can have, and nothing else change?"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

import lora_lite as ll
from lora_lite import calibration, running
from lora_lite.calibration import inputs as streaming
from lora_lite.calibration.forms import ROWS
from tests import models
from tests.models import normal, token_ids
from tests.references import assert_close, same_bits

pytestmark = pytest.mark.fast


class Seen:
    """An observer that keeps everything, for tests only."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def update(self, x: Tensor, group: str) -> None:
        assert x.ndim == 2 and not torch.is_grad_enabled()
        self.parts.setdefault(group, []).append(x.clone())

    def all(self, group: str = "all") -> Tensor:
        return torch.cat(self.parts[group])


def stream(model: nn.Module, data: Any, only: str = "", make: Callable[[], Any] = Seen, **options: Any) -> dict[str, Any]:
    """What each linear of the model whose name holds `only` saw, by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and only in name and name != "lm_head"}
    observers = {name: make() for name in layers}
    calibration.stream(model, layers, {name: m.in_features for name, m in layers.items()}, observers, data, **options)
    return observers


def inputs(model: nn.Module, *batch: Any, **keywords: Any) -> dict[str, Tensor]:
    """Every linear's whole input in one forward, by hooks of the test's own."""
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught[name] = (args[0] if args else kwargs["input"]).detach().clone()

        return hook

    handles = [m.register_forward_pre_hook(catch(n), with_kwargs=True) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad():
            model(*batch, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    return caught


def left_padded(lengths: list[int], width: int) -> Tensor:
    return (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()


IDS, MASK = token_ids(4, 7, seed=1), left_padded([7, 3, 1, 5], 7)


# --- the forms the data can have --------------------------------------------------------------------------------------

X = normal(24, 12, seed=1)
BATCHES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: list(X.split(5)),
    "dicts": lambda: [{"x": x} for x in X.split(5)],
    "tuples": lambda: [(x,) for x in X.split(5)],
    "lists": lambda: ([x] for x in X.split(5)),
    "generator": lambda: (x for x in X.split(5)),
    "one tensor": lambda: X,
    "one dict": lambda: {"x": X},
    "BatchEncoding": lambda: BatchEncoding({"x": X}),
    "loader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=5),
    "by keyword": lambda: [{"x": x} for x in X.split(5)],
}


@pytest.mark.parametrize("form", BATCHES)
def test_every_form_of_batches_feeds_the_layers_inputs(form: str) -> None:
    model = models.mlp()
    want = inputs(model, X)
    seen = stream(model, BATCHES[form]())
    assert len(seen) == 6
    for name, observer in seen.items():
        assert list(observer.parts) == ["all"]
        assert_close(observer.all(), want[name], name)


@pytest.mark.parametrize("form", BATCHES)
def test_poles_go_to_groups_of_their_own(form: str) -> None:
    model = models.mlp()
    rej = [normal(3, 12, seed=2)]
    want = {"cho": inputs(model, X), "rej": inputs(model, rej[0])}
    seen = stream(model, {"cho": BATCHES[form](), "rej": rej})
    for name, observer in seen.items():
        assert {group: len(observer.all(group)) for group in observer.parts} == {"cho": 24, "rej": 3}
        for group in observer.parts:
            assert_close(observer.all(group), want[group][name], f"{group} at {name}")


def test_activations_are_handed_over_as_they_are() -> None:
    model = models.mlp()
    given = {name: normal(9 + i, x.shape[1], seed=i) for i, (name, x) in enumerate(inputs(model, X).items())}
    assert all(same_bits(observer.all(), given[name]) for name, observer in stream(model, given).items())
    poles = {name: {"cho": x, "rej": x + 1} for name, x in given.items()}
    for name, observer in stream(model, poles).items():
        assert same_bits(observer.all("cho"), given[name]) and same_bits(observer.all("rej"), given[name] + 1)
    for observer in stream(model, {"cho": given, "rej": {name: x + 1 for name, x in given.items()}}).values():
        assert list(observer.parts) == ["cho", "rej"]


def test_an_observers_sums_grow_no_graph() -> None:
    class Total:
        sum: Tensor | float = 0.0

        def update(self, x: Tensor, group: str) -> None:
            self.sum = self.sum + x.sum()

    x = normal(4, 10).requires_grad_()
    for data in ({"linear": x}, [x]):
        total = stream(models.single(), data, make=Total)["linear"].sum
        assert torch.equal(total, x.sum()) and total.grad_fn is None


def test_a_layer_called_by_keyword_is_seen() -> None:
    model = models.single(by_keyword=True)
    x = normal(3, 5, 10)
    assert same_bits(stream(model, [x])["linear"].all(), x.flatten(0, 1))


def test_a_layer_called_twice_is_seen_twice_and_a_vector_is_one_token() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x))

    assert stream(Twice(), [torch.ones(4)])["linear"].all().shape == (2, 4)


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dict", "tuple", "one dict"])
def test_padding_is_left_out(form: str) -> None:
    model = models.llama()
    want = inputs(model, input_ids=IDS, attention_mask=MASK)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    seen = stream(model, {"dict": [batch], "tuple": [(IDS, MASK)], "one dict": batch}[form])
    assert len(seen) == 14
    for name, observer in seen.items():
        assert same_bits(observer.all(), want[name][MASK.bool()])


def test_padded_rows_give_what_the_rows_give_alone_and_counting_the_padding_would_not() -> None:
    model = models.llama()
    alone = [{"input_ids": ids[mask.bool()][None]} for ids, mask in zip(IDS, MASK, strict=True)]
    one, many = stream(model, {"input_ids": IDS, "attention_mask": MASK}), stream(model, alone)
    careless = stream(model, {"input_ids": IDS})
    for name, observer in one.items():
        assert_close(observer.all(), many[name].all(), name)
        assert len(careless[name].all()) == MASK.numel() > len(observer.all())
    assert any(float((careless[name].all().std(0) / one[name].all().std(0) - 1).abs().max()) > 0.1 for name in one)


def test_padding_is_left_out_where_tokens_are_flattened() -> None:
    """OPT's fc1 sees (B*T, d)."""
    model = models.opt()
    want = inputs(model, input_ids=IDS, attention_mask=MASK)
    assert {x.ndim for x in want.values()} == {2, 3}
    for name, observer in stream(model, {"input_ids": IDS, "attention_mask": MASK}).items():
        assert same_bits(observer.all(), want[name].reshape(MASK.numel(), -1)[MASK.flatten().bool()])


def test_a_pooled_vector_counts_once_per_row() -> None:
    """BERT's pooler and classifier see (B, d), which no mask fits."""
    right = MASK.flip(1)
    seen = stream(models.bert(), {"input_ids": IDS, "attention_mask": right})
    counts = {name: len(observer.all()) for name, observer in seen.items()}
    assert {n for name, n in counts.items() if "pooler" in name or "classifier" in name} == {4}
    assert {n for name, n in counts.items() if "encoder" in name} == {int(right.sum())}


def test_padding_may_hold_anything() -> None:
    class Masked(models.MLP):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x)

    x, mask = normal(2, 3, 12), torch.tensor([[1, 1, 0], [0, 1, 1]])
    x[mask == 0] = torch.nan
    model = Masked()
    assert all(len(observer.all()) == 4 and observer.all().isfinite().all() for observer in stream(model, [(x, mask)]).values())
    with pytest.raises(ValueError, match=r"layers\.0\.up: 24 of 72 values are NaN or infinite"):
        stream(model, [(x, torch.ones_like(mask))])


def bart() -> Any:
    config = BartConfig(
        d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, vocab_size=models.VOCABULARY, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("model", [models.t5, bart], ids=["t5", "bart"])
@pytest.mark.parametrize("length", [7, 5], ids=["equal lengths", "different lengths"])
def test_encoder_and_decoder_have_their_own_padding_and_cross_attention_reads_the_encoders(model: Callable[[], Any], length: int) -> None:
    """At equal lengths the shape of an activation does not tell whose it is."""
    net = model()
    right, decoder_mask = MASK.flip(1), left_padded([2, length, 1, 3], length).flip(1)
    batch = {
        "input_ids": IDS,
        "attention_mask": right,
        "decoder_input_ids": token_ids(4, length, seed=2),
        "decoder_attention_mask": decoder_mask,
    }
    want, seen = inputs(net, **batch), stream(net, batch)
    kinds = {"cross": 0, "encoder": 0, "decoder": 0}
    for name, observer in seen.items():
        cross = any(part in name for part in ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k", "encoder_attn.v"))
        own = "cross" if cross else "encoder" if ".encoder." in f".{name}" else "decoder"
        kinds[own] += 1
        assert same_bits(observer.all(), want[name][(decoder_mask if own == "decoder" else right).bool()]), name
    assert kinds["cross"] == 4 and kinds["encoder"] >= 12 and kinds["decoder"] >= 16


def test_a_decoder_without_a_mask_of_its_own_counts_whole_and_not_by_the_encoders() -> None:
    seen = stream(
        models.t5(), {"input_ids": IDS, "attention_mask": MASK.flip(1), "labels": token_ids(4, 7, seed=2)}, only="SelfAttention.q"
    )
    assert {name.split(".")[0]: len(observer.all()) for name, observer in seen.items()} == {"encoder": int(MASK.sum()), "decoder": 28}


def test_states_of_an_encoder_that_ran_before_are_known_again() -> None:
    model = models.t5()
    states = model.encoder(input_ids=IDS, attention_mask=MASK.flip(1))
    batch = {"encoder_outputs": states, "attention_mask": MASK.flip(1), "decoder_input_ids": token_ids(4, 7, seed=2)}
    seen = stream(model, [batch], only="EncDecAttention")
    assert {name.rsplit(".")[-1]: len(observer.all()) for name, observer in seen.items()} == {"q": 28, "k": 16, "v": 16, "o": 28}


def test_an_encoders_states_are_let_go_with_their_batch_and_its_hook_with_the_pass() -> None:
    model, states = models.t5(), list[weakref.ref[Tensor]]()
    handle = model.encoder.register_forward_hook(lambda encoder, args, output: states.append(weakref.ref(output[0])))
    hooks = [len(m._forward_hooks) for m in model.modules()]

    def batches() -> Iterator[dict[str, Tensor]]:
        for seed in range(3):
            assert len(states) == seed and all(ref() is None for ref in states)
            yield {"input_ids": IDS, "decoder_input_ids": token_ids(4, 7, seed=seed)}

    stream(model, batches(), make=Counting)
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    handle.remove()


# --- nothing else changes ---------------------------------------------------------------------------------------------


class Noisy(models.MLP):
    """Dropout, batch norm, and a random number drawn at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == 77).any()):
            raise FloatingPointError("seventy-seven")
        torch.rand(3)
        return super().forward(self.norm(self.dropout(x)))


def state(model: nn.Module) -> Any:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs)) for m in model.modules()]
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    values = [t.clone() for t in model.state_dict().values()]
    return hooks, flags, torch.get_rng_state(), torch.is_grad_enabled(), values


def unchanged(before: Any, after: Any) -> bool:
    same = before[:2] == after[:2] and torch.equal(before[2], after[2]) and before[3] == after[3]
    return same and all(same_bits(a, b) for a, b in zip(before[4], after[4], strict=True))


class Fussy(Seen):
    """An observer that fails on its second batch."""

    def update(self, x: Tensor, group: str) -> None:
        super().update(x, group)
        if len(self.parts[group]) == 2:
            raise KeyError("fussy")


@pytest.mark.parametrize("fault", ["none", "model", "observer", "data", "layer", "interrupt"])
def test_flags_hooks_buffers_and_the_random_state_return_whatever_happens(fault: str) -> None:
    model = Noisy().train()
    model.layers[1].eval()
    model.layers[0].requires_grad_(False)
    before = state(model)

    def batches() -> Iterator[Tensor]:
        for i in range(3):
            torch.rand(2)
            if fault == "interrupt" and i:
                raise KeyboardInterrupt
            yield torch.full((4, 12), 77.0 if fault == "model" and i else 0.5)
            if fault == "data":
                raise LookupError("data")

    expected = {"model": FloatingPointError, "observer": KeyError, "data": LookupError, "interrupt": KeyboardInterrupt, "layer": ValueError}
    if fault == "layer":
        model.get_submodule("layers.0.up").in_features = 11  # type: ignore[assignment]  # what it says and what it is called with differ
    with nullcontext() if fault == "none" else pytest.raises(expected[fault]):
        stream(model, batches(), make=Fussy if fault == "observer" else Seen)
    assert unchanged(before, state(model))


def test_the_check_of_the_state_would_see_a_change() -> None:
    model = Noisy().train()
    for change in (
        lambda: model.layers[1].eval(),
        lambda: torch.rand(1),
        lambda: model(torch.ones(4, 12)),
        lambda: model.get_submodule("layers.0.up").register_forward_pre_hook(lambda *a: None),
    ):
        before = state(model)
        change()
        assert not unchanged(before, state(model))


def test_the_model_runs_in_eval_mode() -> None:
    model = Noisy().train()
    first, second = (stream(model, [X])["layers.2.down"].all() for _ in range(2))
    assert same_bits(first, second)
    assert same_bits(first, inputs(model.eval(), X)["layers.2.down"])
    assert not same_bits(first, inputs(model.train(), X)["layers.2.down"])


def test_what_the_model_raises_says_where_in_the_data_it_was() -> None:
    with pytest.raises(FloatingPointError, match="seventy-seven") as raised:
        stream(Noisy(), {"cho": [X], "rej": [X, torch.full((2, 12), 77.0)]})
    assert raised.value.__notes__ == ["in calibration batch 'rej' 1"]


def test_statistics_keep_their_precision_under_autocast() -> None:
    class Dtype:
        def update(self, x: Tensor, group: str) -> None:
            self.dtype = (x.float() @ x.float().T).dtype

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (X @ X.T).dtype is torch.bfloat16
        seen = stream(models.mlp(), [X], make=Dtype)
    assert {observer.dtype for observer in seen.values()} == {torch.float32}


def test_gradients_are_taken_in_under_no_autocast() -> None:
    class Dtype:
        def update(self, x: Tensor, gradient: Tensor) -> None:
            self.dtype = (x.float() @ x.float().T).dtype

    model = models.mlp()
    layers = {name: m for name, m in model.named_modules() if name.endswith("down")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (X @ X.T).dtype is torch.bfloat16
        calibration.stream_gradients(
            model, layers, dict.fromkeys(layers, seen := Dtype()), [X], lambda output, batch: output.square().mean()
        )
    assert seen.dtype is torch.float32


def test_other_adapters_take_part() -> None:
    """A round of steering is calibrated on the model that the earlier rounds left."""
    model = models.mlp()
    without = stream(model, [X])["layers.2.down"].all()
    adapter = models.randomise(ll.attach(model, ll.LoRAConfig(r=2)))
    assert not same_bits(without, stream(model, [X])["layers.2.down"].all())
    with adapter(model, c=0.0):
        assert same_bits(without, stream(model, [X])["layers.2.down"].all())


def test_a_compiled_model_runs_uncompiled_and_stays_compiled() -> None:
    """Compiled code either does not look for new hooks or traces the observers into graphs of their own."""
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = models.mlp()
    model.compile(backend=backend)
    with torch.no_grad():
        model(X)
        before = len(graphs)
        assert same_bits(stream(model, [X])["layers.0.up"].all(), X + model.offset)
        model(X)
    assert len(graphs) == before > 0


class Pair(NamedTuple):
    x: Tensor
    n: int


def test_batches_go_to_the_models_device() -> None:
    outputs = BaseModelOutput(last_hidden_state=X)  # type: ignore[arg-type]
    batch = BatchEncoding({"input_ids": IDS, "nested": [(MASK, "text")], "outputs": outputs, "n": 3, "none": None})
    moved = running.moved(batch, torch.device("meta"))
    assert moved["input_ids"].is_meta and moved["nested"][0][0].is_meta and moved["nested"][0][1] == "text"
    assert moved["outputs"][0].is_meta and moved["outputs"].last_hidden_state.is_meta and moved["n"] == 3 and moved["none"] is None
    assert batch["input_ids"] is IDS and outputs[0] is X  # the caller's own are left alone
    assert running.moved(Pair(X, 2), torch.device("meta")).x.is_meta


# --- memory -----------------------------------------------------------------------------------------------------------


class Counting:
    """Counts how many of the inputs it was ever handed are still alive at each update."""

    def __init__(self, keep: bool = False) -> None:
        self.given: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []
        self.sizes: list[int] = []
        self.kept: list[Tensor] | None = [] if keep else None

    def update(self, x: Tensor, group: str) -> None:
        self.given.append(weakref.ref(x.untyped_storage()))  # type: ignore[arg-type]
        self.alive.append(sum(ref() is not None for ref in self.given))
        self.sizes.append(len(x))
        if self.kept is not None:
            self.kept.append(x)


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    model, batches = models.llama(), [{"input_ids": token_ids(2, 5, seed=i), "attention_mask": torch.ones(2, 5)} for i in range(40)]
    for observer in stream(model, (b for b in batches), make=Counting).values():
        assert len(observer.alive) == 40 and max(observer.alive) <= 2
    hoarder = stream(model, batches, make=functools.partial(Counting, keep=True))
    assert all(observer.alive == list(range(1, 41)) for observer in hoarder.values())  # the count would show it


def test_batches_that_were_run_are_let_go() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def batches() -> Iterator[Tensor]:
        nonlocal most
        for i in range(20):
            x = normal(3, 12, seed=i)
            alive.append(weakref.ref(x))
            yield x
            del x
            most = max(most, sum(ref() is not None for ref in alive))

    stream(models.mlp(), batches(), make=Counting)
    assert most <= 2


def test_a_large_tensor_is_handed_over_in_pieces() -> None:
    model, x = models.single(), torch.zeros(2 * ROWS + 5, 10)
    for data in ({"linear": x}, [x], [x[None]]):
        assert stream(model, data, make=Counting)["linear"].sizes == [ROWS, ROWS, 5]


# --- what is refused --------------------------------------------------------------------------------------------------


def given() -> dict[str, Any]:
    return {name: normal(5, x.shape[1]) for name, x in inputs(models.mlp(), X).items()}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "missing targets": (
        lambda: {name: x for name, x in given().items() if "up" not in name},
        r"3 of 6 targets have no activations: layers\.0\.up, layers\.1\.up, layers\.2\.up",
    ),
    "an unknown target": (lambda: given() | {"layers.0.upp": X}, r"layers\.0\.upp: neither targets .* near the first: layers\.0\.up"),
    "poles misspelt": (lambda: {"chosen": [X], "rejected": [X]}, r'chosen, rejected: neither .*\{"cho": batches, "rej": batches\}'),
    "poles misspelt per target": (
        lambda: {k: {"chosen": v} for k, v in given().items()},
        r"layers\.0\.up: found a mapping of \['chosen'\], expected",
    ),
    "one wrong width": (
        lambda: given() | {"layers.1.up": normal(5, 11)},
        r"layers\.1\.up: found torch.float32 \(5, 11\), expected .* \(\.\.\., 12\)",
    ),
    "three dimensions": (lambda: given() | {"layers.1.up": normal(5, 2, 12)}, r"layers\.1\.up: found \(5, 2, 12\), expected \(N, 12\)"),
    "one dimension": (lambda: given() | {"layers.1.up": normal(12)}, r"layers\.1\.up: found \(12,\), expected \(N, 12\)"),
    "no rows": (lambda: given() | {"layers.1.up": normal(0, 12)}, r"layers\.1\.up: found \(0, 12\), .* at least one"),
    "whole numbers": (lambda: given() | {"layers.1.up": torch.ones(5, 12).long()}, r"layers\.1\.up: found torch.int64"),
    "not a tensor": (lambda: given() | {"layers.1.up": [[0.0] * 12]}, r"layers\.1\.up: found list, expected a floating tensor"),
    "NaN": (lambda: given() | {"layers.1.up": torch.full((5, 12), torch.nan)}, r"layers\.1\.up: 60 of 60 values are NaN"),
    "inf in one pole": (lambda: given() | {"layers.1.up": {"cho": X, "rej": X / 0}}, r"layers\.1\.up: .* NaN or infinite.*\(in 'rej'\)"),
    "two faults": (lambda: given() | {"layers.1.up": X[:, :3], "layers.2.down": X}, r"layers\.1\.up: (.|\n)*layers\.2\.down: "),
    "an empty list": (lambda: [], "calibration data is an empty list"),
    "an empty generator": (lambda: iter(()), "holds no batches"),
    "an empty pole": (lambda: {"cho": [X], "rej": iter(())}, "calibration data 'rej' holds no batches"),
    "an empty mapping": (lambda: {}, "6 of 6 targets have no activations"),
    "a number": (lambda: 3, "calibration data is int; it can be target -> activations"),
    "text": (lambda: "some text", "calibration data is str"),
    "batches of text": (lambda: ["some", "text"], "found str, expected a tensor, a dict or a tuple"),
    "infinite in a batch": (lambda: [X, X / 0], r"layers\.0\.up: 288 of 288 values are NaN or infinite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_does_not_fit_is_refused_by_name(case: str) -> None:
    make, says = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        stream(models.mlp(), make())


def test_activations_are_all_checked_before_any_is_fed() -> None:
    model, fed = models.mlp(), []

    class Fed:
        def update(self, x: Tensor, group: str) -> None:
            fed.append(group)

    with pytest.raises(ValueError, match=r"layers\.2\.down"):
        stream(model, given() | {"layers.2.down": X}, make=Fed)
    with pytest.raises(ValueError, match=r"layers\.2\.down"):
        stream(model, {"cho": [X], "rej": given() | {"layers.2.down": X}}, make=Fed)
    assert not fed


def test_a_generator_that_was_used_up_says_so() -> None:
    once = (x for x in [X])
    stream(models.mlp(), once)
    with pytest.raises(ValueError, match="read only once"):
        stream(models.mlp(), once)


def test_targets_that_are_never_called_are_named() -> None:
    """nn.MultiheadAttention reads its out_proj's weight and never calls it (FACTS.md T9)."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x)[0])

    with pytest.raises(RuntimeError, match=r"1 of 2 targets were never called .*: attention\.out_proj\. Add them to `exclude`"):
        stream(Attention(), [X[None]])


def test_a_target_that_only_some_batches_reach_is_no_error() -> None:
    class Routed(models.MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x) if x[0, 0] > 0 else self.layers[2](self.layers[1](x))

    seen = stream(Routed(), [X.abs(), -X.abs()])
    assert all(len(observer.all()) == len(X) for observer in seen.values())


# --- progress ---------------------------------------------------------------------------------------------------------


def test_short_runs_show_nothing_long_ones_a_bar_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stream(models.mlp(), {"cho": [X], "rej": [X]})
    assert capsys.readouterr() == ("", "")
    at_once: Mapping[str, Any] = {"delay": 0}
    bar = streaming.tqdm
    monkeypatch.setattr(streaming, "tqdm", lambda data, **options: bar(data, **options | at_once))
    stream(models.mlp(), {"cho": [X], "rej": [X]}, progress=False)
    assert capsys.readouterr() == ("", "")
    stream(models.mlp(), {"cho": [X], "rej": [X]})
    shown = capsys.readouterr()
    assert not shown.out and "calibrating 'cho': 100%" in shown.err and "calibrating 'rej'" in shown.err
