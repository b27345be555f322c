"""Does a transfer move what it should where the right answer is known, nothing where there is none, and leave both models alone?"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM

import lora_lite as ll
from lora_lite.transfer.alignment import Pairs
from lora_lite.transfer.evaluate import Evaluation
from lora_lite.transfer.parts import Anatomy, by_depth, by_likeness
from tests.models import generator, llama, opt, refill
from tests.twins import batches, effect, permuted, recovered, rotated, trained, widened

ALL = ("reader", "writer")
WRITERS = ("writer",)


def carry(
    adapter: ll.Adapter, source: Any, target: Any, data: Any = None, *rest: Any, roles: Any = ALL, **keywords: Any
) -> ll.TransferResult:
    return ll.transfer_adapter(adapter, source, target, batches() if data is None else data, *rest, roles=roles, progress=False, **keywords)


def update_of(adapter: ll.Adapter) -> dict[str, Tensor]:
    return {name: u.dense().detach().double() for name, u in adapter.factors().items()}


def figures(result: ll.TransferResult) -> list[tuple[float, ...]]:
    return [(r.read_r2 or 0.0, r.write_cos or 0.0, r.norm_ratio or 0.0) for r in result.report]


@pytest.fixture(scope="module")
def source() -> Any:
    return llama()


@pytest.fixture(scope="module")
def adapter(source: Any) -> ll.Adapter:
    return trained(source)


# -- where the right answer is known --------------------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [WRITERS, ALL], ids=str)
@pytest.mark.parametrize("copy_below", [0.1, 0.0], ids=["copied", "mapped"])
def test_on_the_source_itself_the_function_is_the_same(source: Any, roles: Any, copy_below: float) -> None:
    adapter = trained(source, roles)
    result = carry(adapter, source, source, roles=roles, copy_below=copy_below)
    ids = batches(1, seed=99)[0]
    wanted = effect(source, adapter, ids)
    assert float((effect(source, result.adapter, ids) - wanted).norm() / wanted.norm()) < 1e-5
    assert result.counts()["copied" if copy_below else "moved"] == len(adapter.targets)
    if copy_below:
        assert all(torch.equal(a, update_of(adapter)[n]) for n, a in update_of(result.adapter).items())


@pytest.mark.parametrize(("distance", "action"), [(0.05, "copied"), (0.2, "moved")])
def test_an_update_is_copied_where_the_base_has_moved_a_little(source: Any, adapter: ll.Adapter, distance: float, action: str) -> None:
    target, draw = copy.deepcopy(source), generator(4)
    with torch.no_grad():
        for p in target.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * distance * p.square().mean().sqrt())
    assert {r.action for r in carry(adapter, source, target, roles=WRITERS).report if r.target} == {action}


@pytest.mark.parametrize("twin", [rotated, permuted, widened])
@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "sequential"])
def test_a_twin_gets_all_of_it(source: Any, adapter: ll.Adapter, twin: Callable[[Any], Any], sequential: bool) -> None:
    target = twin(source)
    ids = batches(1, seed=99)[0]
    torch.testing.assert_close(target(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-4)  # a twin it is
    result = carry(adapter, source, target, sequential=sequential)
    assert recovered(source, adapter, target, result.adapter) > (0.95 if twin is widened else 0.999)
    assert {r.action for r in result.report} <= {"moved", "copied"}


@pytest.mark.parametrize("method", ["svd", "truncate", "interpolate"])
def test_a_change_of_shape_gets_less_than_a_tenth_of_a_widened_twin(source: Any, adapter: ll.Adapter, method: str) -> None:
    target = widened(source)
    like = carry(adapter, source, target).adapter
    tensors = {}
    for name, u in adapter.factors().items():
        folded = u.folded()
        A, B = ll.DimensionProjector(variance_threshold=1.0).project_adapter(folded.A, folded.B, *like.sizes[name], method)
        tensors[name] = {"lora_A": A, "lora_B": B}
    resized = ll.Adapter(ll.LoRAConfig(r=4, alpha=4.0), tensors, like.sizes, fingerprint=like.fingerprint)
    assert recovered(source, adapter, target, resized) < 0.1


@pytest.mark.parametrize("roles", [WRITERS, ALL], ids=str)
def test_shuffled_tokens_and_unrelated_models_get_nothing(source: Any, roles: Any) -> None:
    adapter, target = trained(source, roles), rotated(source)
    shuffled = [b.flatten()[torch.randperm(b.numel(), generator=generator(1))].view_as(b) for b in batches()]
    wrong = carry(adapter, source, target, batches(), shuffled, roles=roles)
    assert recovered(source, adapter, target, wrong.adapter) < 0.1
    for bad, good in zip(figures(wrong), figures(carry(adapter, source, target, roles=roles)), strict=True):
        assert bad[0] < good[0] - 0.4 and bad[1] < good[1] - 0.4  # what is left is position, which the shuffling keeps
    stranger = llama(seed=5)
    assert recovered(source, adapter, stranger, carry(adapter, source, stranger, roles=roles).adapter) < 0.1


def test_random_maps_get_nothing(source: Any, adapter: ll.Adapter) -> None:
    target = rotated(source)
    moved = carry(adapter, source, target).adapter
    noise = copy.deepcopy(moved)
    with torch.no_grad():
        for fields in noise.tensors().values():  # the same update, turned at random on both sides
            for name, axis in (("lora_A", 1), ("lora_B", 0)):
                p = fields[name]
                Q = torch.linalg.qr(torch.randn(p.shape[axis], p.shape[axis], generator=generator(2)))[0]
                p.copy_(p @ Q if axis else Q @ p)
    assert recovered(source, adapter, target, noise) < 0.1


def test_wide_sites_with_few_tokens_are_solved_by_their_rows() -> None:
    draw = generator(0)
    xs, Q = torch.randn(40, 64, generator=draw).double(), torch.linalg.qr(torch.randn(64, 64, generator=draw).double())[0]
    few, many = Pairs(64, 64), Pairs(64, 64)
    few.add(xs, xs @ Q)
    assert few.rows is not None
    many.rows, many.C, many.G, many.n = None, xs.T @ (xs @ Q), (xs @ Q).T @ (xs @ Q), 40
    A, B = torch.randn(3, 64, generator=draw).double(), torch.randn(64, 3, generator=draw).double()
    torch.testing.assert_close((xs @ Q) @ few.fit.read(A).T, xs @ A.T)  # exact on the tokens seen
    torch.testing.assert_close(few.fit.write(B), many.fit.write(B), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(few.fit.spread(A), many.fit.spread(A))


# -- algebra --------------------------------------------------------------------------------------------------------------


def changed(adapter: ll.Adapter, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> ll.Adapter:
    twin = copy.deepcopy(adapter)
    with torch.no_grad():
        for fields in twin.tensors().values():
            A, B = change(fields["lora_A"].clone(), fields["lora_B"].clone())
            fields["lora_A"].copy_(A)
            fields["lora_B"].copy_(B)
    return twin


G = torch.eye(4) + 0.3 * torch.randn(4, 4, generator=generator(7))
ORDER = [2, 0, 3, 1]


@pytest.mark.parametrize(
    "change",
    [lambda A, B: (G @ A, B @ torch.linalg.inv(G)), lambda A, B: (A[ORDER], B[:, ORDER]), lambda A, B: (-A, -B)],
    ids=["gauge", "permuted ranks", "signs"],
)
def test_how_an_update_is_factored_changes_nothing(source: Any, adapter: ll.Adapter, change: Any) -> None:
    target = llama(seed=5, hidden=96)
    first, again = carry(adapter, source, target), carry(changed(adapter, change), source, target)
    for name, D in update_of(first.adapter).items():
        assert float((update_of(again.adapter)[name] - D).norm() / D.norm()) < 1e-5
    for a, b in zip(figures(first), figures(again), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_twice_the_update_is_twice_the_transfer(source: Any, adapter: ll.Adapter) -> None:
    target = llama(seed=5, hidden=96)
    once, twice = (update_of(carry(a, source, target).adapter) for a in (adapter, changed(adapter, lambda A, B: (A, 2 * B))))
    for name, D in once.items():
        torch.testing.assert_close(twice[name], 2 * D, rtol=1e-5, atol=1e-7)


def test_zero_in_is_exactly_zero_out_with_a_finite_report(source: Any, adapter: ll.Adapter) -> None:
    none = changed(adapter, lambda A, B: (A, torch.zeros_like(B)))
    target = rotated(source)
    result = carry(none, source, target)
    assert not any(D.any() for D in update_of(result.adapter).values())
    assert all(fields["lora_A"].any() for fields in result.adapter.tensors().values())  # so that it can train
    assert all(math.isfinite(v) for row in figures(result) for v in row)
    assert math.isfinite(ll.evaluate_transfer(source, target, none, result.adapter, batches(1)).moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("r", [1, 70], ids=["rank 1", "above the width"])
def test_any_float_and_any_rank(dtype: torch.dtype, r: int) -> None:
    source, target = llama(dtype), llama(dtype, seed=5, hidden=32)
    adapter = ll.attach(source, ll.LoRAConfig(r=r, alpha=2.0 * r, roles=("writer",), dtype=dtype), seed=0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(1)) * 0.05)
    adapter.detach()
    result = carry(adapter, source, target, roles=WRITERS)
    for name, fields in result.adapter.tensors().items():
        A, B = fields["lora_A"], fields["lora_B"]
        assert A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] and (A.shape[1], B.shape[0]) == result.adapter.sizes[name]
        assert A.grad_fn is None and B.grad_fn is None and A.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.isfinite(A).all() and torch.isfinite(B).all()
    with torch.no_grad(), result.adapter(target):
        assert torch.isfinite(target(batches(1)[0]).logits).all()


# -- where things go ------------------------------------------------------------------------------------------------------


def test_depth_maps_pin_both_ends_and_round_halves_up() -> None:
    assert by_depth(4, 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert by_depth(3, 6) == {0: 0, 1: 3, 2: 5}  # 2.5 -> 3
    assert by_depth(5, 3) == {0: 0, 1: 1, 2: 1, 3: 2, 4: 2}  # 0.5 -> 1, 1.5 -> 2
    assert by_depth(1, 5) == {0: 2} and by_depth(4, 1) == dict.fromkeys(range(4), 0)


def test_likeness_maps_never_go_back_up() -> None:
    likeness = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.3, 0.9], [0.95, 0.4, 0.5]])
    assert by_likeness(likeness) == {0: 0, 1: 2, 2: 2}  # 2 -> 0 would be likest, and go back up


def test_several_sources_on_one_target_add_up() -> None:
    """Both blocks' updates go onto one module: their sum, mapped."""
    source, target = llama(layers=2), llama(layers=1, seed=5)
    adapter = trained(source, WRITERS)
    both = update_of(carry(adapter, source, target, roles=WRITERS, layer_map={0: 0, 1: 0}).adapter)
    parts = [update_of(carry(adapter, source, target, roles=WRITERS, layer_map={i: 0}).adapter) for i in (0, 1)]
    for name, D in both.items():
        whole = parts[0][name] + parts[1][name]
        assert float((D - whole).norm() / whole.norm()) < 0.02  # compressed to 99.99 % of the energy


def test_cka_finds_the_twin_of_each_block(source: Any) -> None:
    source = llama(layers=3)
    adapter, target = trained(source), rotated(source)
    result = carry(adapter, source, target, layer_map="cka")
    assert all(r.source == r.target for r in result.report)


def test_maps_by_blocks_and_by_modules(source: Any, adapter: ll.Adapter) -> None:
    target = llama(layers=3, seed=5)
    by_blocks = carry(adapter, source, target, roles=WRITERS, layer_map={1: 2})
    assert set(by_blocks.adapter.targets) == {"model.layers.2.self_attn.o_proj", "model.layers.2.mlp.down_proj"}
    assert [r.why for r in by_blocks.report if "layers.0" in r.source and "o_proj" in r.source] == ["layer_map has no block 0"]
    name = "model.layers.0.mlp.down_proj"
    by_names = carry(adapter, source, target, roles=WRITERS, layer_map={name: "model.layers.1.mlp.down_proj"})
    assert by_names.adapter.targets == ["model.layers.1.mlp.down_proj"]


def test_writers_alone_are_the_default_and_readers_are_listed(source: Any, adapter: ll.Adapter) -> None:
    result = ll.transfer_adapter(adapter, source, llama(seed=5, hidden=96), batches(), progress=False)
    moved = [r for r in result.report if r.action == "moved"]
    assert len(moved) == 4 and all(r.source.endswith(("o_proj", "down_proj")) for r in moved)
    assert all("a reader" in r.why for r in result.report if r.action == "skipped") and len(result.report) == 14


def test_strict_minds_the_roles_asked_for(source: Any, adapter: ll.Adapter) -> None:
    assert carry(adapter, source, llama(seed=5, hidden=96), roles=WRITERS, strict=True).counts() == {"moved": 4, "copied": 0, "skipped": 10}


def test_poor_modules_are_skipped_by_min_r2(source: Any, adapter: ll.Adapter) -> None:
    stranger = llama(seed=5, hidden=96)
    scores = sorted(r.read_r2 or 0.0 for r in carry(adapter, source, stranger).report)
    result = carry(adapter, source, stranger, min_r2=(scores[4] + scores[5]) / 2)
    assert [r.action for r in result.report].count("skipped") == 5
    assert all("below min_r2" in r.why and r.read_r2 is not None for r in result.report if r.action == "skipped")
    with pytest.raises(ValueError, match="no module can be moved"):
        carry(adapter, source, stranger, min_r2=1.0)


def tiny(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=64))
    elif kind == "neox":
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
        )
    else:
        model = Phi3ForCausalLM(
            Phi3Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                       vocab_size=128, pad_token_id=0)
        )  # fmt: skip
    refill(model, seed)
    return model.eval()


@pytest.mark.parametrize("kind", ["gpt2", "neox", "phi3"])
def test_fused_layers_go_part_by_part(kind: str) -> None:
    """On the model itself, mapped part by part, the whole comes out again; and separate layers of another family take the parts."""
    model = tiny(kind)
    adapter = trained(model)
    result = carry(adapter, model, model, copy_below=0.0)
    assert recovered(model, adapter, model, result.adapter) > 0.999
    parts = [r.source.rpartition("[")[2].rstrip("]") for r in result.report if "[" in r.source and ".0." in r.source]
    assert parts == (["q", "k", "v", "gate", "up"] if kind == "phi3" else ["q", "k", "v"])
    other = llama()
    there = carry(adapter, model, other)
    assert {r.target for r in there.report if r.source.endswith("[q]")} == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    back = carry(trained(other), other, model)
    assert {r.target for r in back.report if r.source.endswith("k_proj")} <= {p.name for ps in Anatomy(model).parts.values() for p in ps}


def test_rows_of_per_head_layouts_are_told_apart() -> None:
    (q, k, v) = Anatomy(tiny("neox")).parts["gpt_neox.layers.0.attention.query_key_value"]
    assert q.rows is not None and q.rows.tolist() == [24 * h + i for h in range(4) for i in range(8)]
    assert k.rows is not None and v.rows is not None and k.rows[0] == 8 and v.rows[0] == 16


def test_an_unknown_fused_layout_is_listed_as_skipped() -> None:
    model = tiny("neox")
    model.config.model_type = "falcon"
    result = carry(trained(model), model, model)
    assert all("laid out" in r.why for r in result.report if r.source.endswith("query_key_value")) and result.counts()["skipped"] == 2


def test_flattened_activations_pair_up() -> None:
    model = opt()
    adapter = trained(model)
    result = carry(adapter, model, model, copy_below=0.0)
    assert recovered(model, adapter, model, result.adapter) > 0.999


def test_padding_is_left_out(source: Any, adapter: ll.Adapter) -> None:
    target = llama(seed=5, hidden=96)
    plain = batches(2, rows=4)
    padded = []
    for b in plain:
        ids = torch.cat([b, torch.randint(1, 128, (4, 6), generator=generator(3))], dim=1)
        mask = torch.ones_like(ids)
        mask[:, -6:] = 0
        padded.append({"input_ids": ids, "attention_mask": mask})
    a, b = (carry(adapter, source, target, data) for data in (plain, padded))
    assert a.tokens == b.tokens
    for name, D in update_of(a.adapter).items():
        torch.testing.assert_close(update_of(b.adapter)[name], D, rtol=1e-3, atol=1e-5)


# -- the result -----------------------------------------------------------------------------------------------------------


def test_the_result_is_an_adapter_of_the_target(source: Any, adapter: ll.Adapter, tmp_path: Path) -> None:
    target = llama(seed=5, hidden=96)
    result = carry(adapter, source, target)
    ids = batches(1)[0]
    with torch.no_grad():
        with result.adapter(target):
            visited = target(ids).logits
        attached = ll.attach(target, result.adapter)
        assert torch.equal(target(ids).logits, visited)
        attached.save(tmp_path / "moved.safetensors")
        attached.detach()
        again = ll.load(target, tmp_path / "moved.safetensors")
        assert torch.equal(target(ids).logits, visited)
        again.detach()
    assert result.adapter.variant.name == "lora" and not result.adapter.attached
    with pytest.raises(ValueError, match="other weights"):
        result.adapter.put_on(llama(seed=6, hidden=96))


def test_the_report_prints_as_a_table_and_goes_through_json(source: Any, adapter: ll.Adapter) -> None:
    result = carry(adapter, source, llama(seed=5, hidden=96), roles=WRITERS)
    text = str(result)
    assert all(name in text for name in adapter.targets) and "4 moved, 0 copied, 10 skipped" in text and "read_r2" in text
    assert json.loads(json.dumps(result.to_dict()))["modules"][0]["source"] == result.report[0].source


def test_trained_beside_is_listed(source: Any) -> None:
    adapter = ll.attach(source, ll.LoRAConfig(r=2, roles=("writer",)), train_also=r"model\.norm", seed=0)
    adapter.detach()
    result = carry(adapter, source, source)
    assert [(r.source, r.action) for r in result.report if "train_also" in r.why] == [("model.norm.weight", "skipped")]


# -- both models as they were ---------------------------------------------------------------------------------------------


def state(model: nn.Module) -> tuple[Any, ...]:
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for n, m in model.named_modules()]
    values = [(n, p.requires_grad, p.detach().clone().numpy().tobytes()) for n, p in model.named_parameters()]
    return hooks, values, torch.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize("attached", [False, True], ids=["detached", "attached"])
@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "sequential"])
def test_both_models_come_out_as_they_went_in(attached: bool, sequential: bool) -> None:
    source, target = llama(), llama(seed=5, hidden=96)
    adapter = trained(source)
    source.train()
    target.model.layers[0].train()
    target.lm_head.weight.requires_grad_(False)
    if attached:
        ll.attach(source, adapter)
    before = state(source), state(target)
    result = carry(adapter, source, target, layer_map="cka", sequential=sequential)
    ll.evaluate_transfer(source, target, adapter, result.adapter, batches(1))
    ll.distill_transfer(result, source, target, batches(1), steps=2, progress=False)
    assert (state(source), state(target)) == before
    assert adapter.attached == attached


@pytest.mark.parametrize("attached", [False, True], ids=["detached", "attached"])
def test_an_attached_adapter_gives_what_a_detached_one_gives(source: Any, attached: bool) -> None:
    adapter, target = trained(source), llama(seed=5, hidden=96)
    expected = update_of(carry(adapter, source, target).adapter)
    adapter.put_on(source)
    found = update_of(carry(adapter, source, target).adapter)
    adapter.detach()
    assert all(torch.equal(found[n], D) for n, D in expected.items())


@pytest.mark.parametrize("side", [0, 1], ids=["source", "target"])
def test_also_after_an_exception(side: int) -> None:
    models = llama(), llama(seed=5, hidden=96)
    adapter = trained(models[0])
    models[side].train()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("in the middle")

    handle = models[side].model.layers[1].mlp.register_forward_pre_hook(fail)
    before = [state(m) for m in models]
    data = batches(1)
    dummy = ll.TransferResult(fresh(models[1]), (), adapter, 0)
    for call in (
        lambda: carry(adapter, *models, data),
        lambda: carry(adapter, *models, data, layer_map="cka"),
        lambda: ll.evaluate_transfer(*models, adapter, dummy.adapter, data),
        lambda: ll.distill_transfer(dummy, *models, data, steps=2, progress=False),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
        assert [state(m) for m in models] == before
    handle.remove()


def fresh(model: Any) -> ll.Adapter:
    adapter = ll.attach(model, ll.LoRAConfig(r=2), seed=0)
    adapter.detach()
    return adapter


# -- what cannot be meant -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"batches": []}, "batches holds no batches"),
        ({"batches": iter(())}, "batches holds no batches"),
        ({"batches": "some text"}, "batches is str"),
        ({"batches": [torch.ones(1, 8, dtype=torch.long)]}, r"7 tokens to fit on are too few for model.layers.*A \(4, 64\)"),
        ({"batches": [3.5]}, "found float"),
        ({"target_batches": batches(3)}, "4 batches and 3 target_batches"),
        ({"target_batches": batches(4, length=30)}, r"layers.*the source saw \(256, 64\).*target \(240, 96\)"),
        ({"roles": ("writers",)}, "roles="),
        ({"roles": ()}, "roles="),
        ({"layer_map": "width"}, "layer_map='width'"),
        ({"layer_map": {}}, "layer_map={}"),
        ({"layer_map": {0: 7}}, "layer_map has 7.*target"),
        ({"layer_map": {"model.layers.0.mlp.down": "model.layers.0.mlp.down_proj"}}, "mlp.down'.*source"),
        ({"min_r2": math.nan}, "min_r2"),
        ({"copy_below": -1.0}, "copy_below"),
        ({"roles": ("reader",), "layer_map": {"model.layers.0.mlp.down_proj": "model.layers.0.mlp.down_proj"}}, "no module can be moved"),
        ({"strict": True, "roles": ALL, "layer_map": {0: 1}}, "strict=True.*layers.1.*layer_map has no block 1"),
        ({"strict": True, "roles": ALL, "min_r2": 0.68}, "strict=True.*read_r2"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_what_cannot_be_meant_is_told(source: Any, adapter: ll.Adapter, keywords: dict[str, Any], said: str) -> None:
    given = {"batches": batches(), "roles": WRITERS, "progress": False} | keywords
    with pytest.raises(ValueError, match=said):
        ll.transfer_adapter(adapter, source, llama(seed=5, hidden=96), **given)


@pytest.mark.parametrize("config", [ll.DoRAConfig(r=2), ll.IA3Config(), ll.HRAConfig(r=2)], ids=lambda c: c.variant)
def test_what_is_no_low_rank_update_is_refused(source: Any, config: ll.AdapterConfig) -> None:
    adapter = ll.attach(source, config, seed=0)
    adapter.detach()
    with pytest.raises(ValueError, match=f"{config.variant}.*no low-rank update"):
        carry(adapter, source, source)


def test_other_low_rank_methods_come_out_as_lora(source: Any) -> None:
    adapter = ll.attach(source, ll.PiSSAConfig(r=4), seed=0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator(1)) * 0.05)
    adapter.detach()
    target = rotated(source)
    result = carry(adapter, source, target)
    assert result.adapter.variant.name == "lora" and recovered(source, adapter, target, result.adapter) > 0.999


def test_nan_is_told_with_its_module(source: Any, adapter: ll.Adapter) -> None:
    with pytest.raises(ValueError, match=r"layers.0.*A.*NaN"):
        carry(changed(adapter, lambda A, B: (A * math.nan, B)), source, llama(seed=5))
    sick = llama(seed=5)
    with torch.no_grad():
        sick.model.layers[1].mlp.up_proj.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"target, model.layers.1.mlp.*NaN"):
        carry(adapter, source, sick)


def test_an_adapter_of_another_model_is_told(source: Any, adapter: ll.Adapter) -> None:
    with pytest.raises(ValueError, match=r"q_proj 64 -> 64; the source .* has 96 -> 96"):
        carry(adapter, llama(hidden=96), source)


def test_two_vocabularies_are_never_guessed(source: Any, adapter: ll.Adapter) -> None:
    target = llama(seed=5)
    target.resize_token_embeddings(140)
    with pytest.raises(ValueError, match="vocabulary of 128 and the target of 140"):
        carry(adapter, source, target)
    assert carry(adapter, source, target, batches(), batches()).counts()["moved"] == 14


# -- evaluation and distillation ------------------------------------------------------------------------------------------


def test_an_evaluation_equals_its_parts(source: Any, adapter: ll.Adapter) -> None:
    target, data = widened(source), batches(2, seed=18)  # on which it gains
    moved = carry(adapter, source, target).adapter

    def loss(model: Any, on: ll.Adapter | None = None) -> float:
        total = 0.0
        for ids in data:
            with torch.no_grad():
                if on is None:
                    out = model(ids).logits
                else:
                    with on(model):
                        out = model(ids).logits
            p = out[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])
            total -= float(p.mean())
        return total / len(data)

    found = ll.evaluate_transfer(source, target, adapter, moved, data, own=moved)
    assert (found.source, found.source_adapted) == pytest.approx((loss(source), loss(source, adapter)), rel=1e-5)
    assert (found.target, found.moved) == pytest.approx((loss(target), loss(target, moved)), rel=1e-5)
    assert found.recovery == pytest.approx(1.0) and found.gain_kept == pytest.approx(1.0, abs=1e-3)
    assert found.arithmetic == pytest.approx(found.source_adapted, rel=1e-5)  # the two bases are one function
    assert found.random != pytest.approx(found.moved, rel=0.01)
    assert "logit arithmetic" in str(found) and json.dumps(found.to_dict())


@pytest.mark.parametrize(("source_adapted", "own"), [(5.1, 4.0), (5.0, 4.0), (5.0 - 1e-7, 4.0), (4.0, 5.3), (5.1, 5.3)])
def test_there_is_no_share_of_a_gain_that_is_not_there(source_adapted: float, own: float) -> None:
    found = Evaluation(
        source=5.0, source_adapted=source_adapted, target=5.2, moved=5.15, random=5.2, arithmetic=5.0531, own=own
    )  # moved is better than the target: of a loss that would be a negative share, of two losses a praise
    assert (found.gain_kept is None) == (source_adapted != 4.0) and (found.recovery is None) == (own != 4.0)
    assert found.to_dict()["note"] == found.note and str(found).endswith(found.note or "none")
    assert ("no gain to keep" in (found.note or "")) == (source_adapted != 4.0)
    assert ("target's own adapter gains nothing" in (found.note or "")) == (own != 4.0)
    assert "logit arithmetic     5.0531         -" in str(found) or source_adapted == 4.0


def test_shares_of_a_gain_have_no_note() -> None:
    found = Evaluation(source=5.0, source_adapted=4.0, target=5.2, moved=4.7, random=5.2, arithmetic=None, own=4.2)
    assert (found.gain_kept, found.recovery, found.note) == (pytest.approx(0.5), pytest.approx(0.5), None)


def test_the_random_baseline_has_the_energy_of_the_moved_one(source: Any, adapter: ll.Adapter) -> None:
    from lora_lite.transfer.evaluate import random_like

    noise = random_like(adapter, 0)
    for name, D in update_of(adapter).items():
        other = update_of(noise)[name]
        assert float(other.norm()) == pytest.approx(float(D.norm()), rel=1e-4)
        assert abs(float((other * D).sum()) / float(D.norm() * other.norm())) < 0.2


def test_a_loss_of_ones_own(source: Any, adapter: ll.Adapter) -> None:
    found = ll.evaluate_transfer(source, source, adapter, adapter, batches(2), loss=lambda logits, batch: -logits.double().square().mean())
    assert found.moved == found.source_adapted and found.gain_kept == pytest.approx(1.0)


@pytest.mark.parametrize("teacher", ["arithmetic", "source"])
def test_distillation_comes_nearer_to_its_teacher(source: Any, adapter: ll.Adapter, teacher: str) -> None:
    target = rotated(source)
    start = ll.TransferResult(fresh(target), (), adapter, 0)
    before = update_of(start.adapter)
    better = ll.distill_transfer(start, source, target, batches(1), steps=30, teacher=teacher, lr=5e-3, progress=False)
    assert len(better.distilled) == 30 and better.distilled[-1] < 0.7 * better.distilled[0]
    assert all(torch.equal(update_of(start.adapter)[n], D) for n, D in before.items()) and not better.adapter.attached


@pytest.mark.parametrize(("keywords", "said"), [({"steps": 0}, "steps"), ({"steps": True}, "steps"), ({"teacher": "me"}, "teacher")])
def test_distillation_says_what_it_cannot_do(source: Any, adapter: ll.Adapter, keywords: dict[str, Any], said: str) -> None:
    result = ll.TransferResult(fresh(source), (), adapter, 0)
    with pytest.raises(ValueError, match=said):
        ll.distill_transfer(result, source, source, batches(1), progress=False, **keywords)


def test_distillation_and_evaluation_refuse_what_they_cannot_compare(source: Any, adapter: ll.Adapter) -> None:
    target = llama(seed=5)
    target.resize_token_embeddings(140)
    result = ll.TransferResult(fresh(target), (), adapter, 0)
    with pytest.raises(ValueError, match="one vocabulary"):
        ll.distill_transfer(result, source, target, batches(1), steps=1, target_batches=batches(1), progress=False)
    assert ll.evaluate_transfer(source, target, adapter, result.adapter, batches(1), target_batches=batches(1)).arithmetic is None
    ll.attach(target, result.adapter)
    with pytest.raises(RuntimeError, match="detach"):
        ll.distill_transfer(result, source, target, batches(1), target_batches=batches(1), progress=False)
