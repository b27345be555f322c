"""What does the library know of a layer: is it a linear, how large, how stored, why not, and is it the one of the file?"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from lora_lite.base import compare_fingerprint, dense_weight, fingerprint, is_linear, quantised, refusal, sizes, transposed

pytestmark = pytest.mark.fast


class Wider(nn.Linear):
    """A subclass, as many models have their own."""


class Code(Tensor):
    """A tensor subclass around integer codes that calls itself float32: as torchao's Int8Tensor."""

    codes: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor) -> Code:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(f"{func} on codes")


def linear(d_in: int = 6, d_out: int = 4, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(d_in, d_out, dtype=dtype)


def with_weight(weight: Tensor) -> nn.Linear:
    layer = linear()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def conv1d() -> nn.Module:
    return Conv1D(4, 6)  # (nf, nx)


def four_bit() -> nn.Module:
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")


def eight_bit() -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    return layer.to("cpu")


def codes() -> nn.Linear:
    layer = linear()
    layer._parameters["weight"] = nn.Parameter(Code(torch.ones(4, 6, dtype=torch.int8)), requires_grad=False)
    return layer


def parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(linear())


def shared_hook(*hooks: Any) -> nn.Linear:
    from accelerate.hooks import SequentialHook

    layer: Any = linear()
    layer._hf_hook = SequentialHook(*hooks) if len(hooks) > 1 else hooks[0]
    return layer


def offloaded() -> nn.Linear:
    from accelerate.hooks import AlignDevicesHook

    return shared_hook(AlignDevicesHook(execution_device="cpu", offload=True))


def offloaded_in_sequence() -> nn.Linear:
    from accelerate.hooks import AlignDevicesHook, ModelHook

    return shared_hook(ModelHook(), AlignDevicesHook(execution_device="cpu", offload=True))


def on_its_device() -> nn.Linear:
    from accelerate.hooks import AlignDevicesHook, ModelHook

    return shared_hook(ModelHook(), AlignDevicesHook(execution_device="cpu", offload=False))


def repacked() -> nn.Module:
    layer: Any = four_bit()
    layer.weight.quant_state.packing_format_for_cpu = True  # what its first eval forward does on a CPU with AVX512-BF16
    return layer


# -- what it is -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (linear, True),
        (Wider, True),
        (conv1d, True),
        (four_bit, True),
        (eight_bit, True),
        (parametrised, True),
        (lambda: nn.MultiheadAttention(8, 2).out_proj, False),
        (lambda: nn.MultiheadAttention(8, 2), False),
        (lambda: nn.Conv1d(4, 6, 1), False),
        (lambda: nn.Bilinear(4, 4, 4), False),
        (lambda: nn.Embedding(4, 6), False),
        (lambda: nn.Identity(), False),
        (lambda: nn.LayerNorm(4), False),
    ],
)
def test_what_counts_as_a_linear(make: Callable[..., nn.Module], expected: bool):
    assert is_linear(make(6, 4) if make is Wider else make()) is expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.ao's own
def test_torch_s_dynamically_quantised_linear_is_none():
    [layer] = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear()), {nn.Linear})
    assert callable(layer.weight) and not is_linear(layer)


def test_a_weight_that_is_a_method_is_no_linear():
    class Packed(nn.Linear):
        def weight(self) -> Tensor:  # type: ignore[override]
            return torch.zeros(4, 6)

    layer = Packed.__new__(Packed)
    nn.Module.__init__(layer)
    assert not is_linear(layer)


@pytest.mark.parametrize("make", [linear, conv1d])
def test_sizes_and_dense_weight_say_what_the_layer_computes(make: Callable[[], nn.Module]):
    layer: Any = make()
    x = torch.randn(3, 6)
    assert sizes(layer) == (6, 4) and transposed(layer) == (make is conv1d)
    W = dense_weight(layer)
    assert W.shape == (4, 6)
    torch.testing.assert_close(x @ W.T + layer.bias, layer(x))
    assert W.data_ptr() == layer.weight.data_ptr()  # a view, not a copy


def test_sizes_do_not_come_from_what_is_stored():
    layer: Any = four_bit()
    assert tuple(layer.weight.shape) != (32, 64)  # the control: it is packed
    assert sizes(layer) == (64, 32)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (linear, None),
        (conv1d, None),
        (parametrised, None),
        (lambda: linear(dtype=torch.bfloat16), None),
        (lambda: linear(dtype=torch.float64), None),
        (four_bit, "Linear4bit"),
        (eight_bit, "Linear8bitLt"),
        (codes, "Code"),
        (lambda: with_weight(torch.ones(4, 6, dtype=torch.int8)), "int8 weight"),
        (lambda: with_weight(torch.ones(4, 6).to(torch.float8_e4m3fn)), "float8_e4m3fn weight"),
    ],
)
def test_quantised_weights_are_known_by_type(make: Callable[[], nn.Module], expected: str | None):
    assert quantised(make()) == expected


# -- why not --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded() -> Iterator[nn.Linear]:
    """A linear whose weight is a DTensor over a world of one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = linear()
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        yield layer
    finally:
        dist.destroy_process_group()


EVERY = "every variant"
READING = "variants that read the weight"

REFUSED: list[tuple[str, Callable[[], nn.Module], str, list[str]]] = [
    ("meta", lambda: nn.Linear(6, 4, device="meta"), EVERY, ["Linear 6 -> 4", "on the meta device", "load the weights"]),
    ("offload", offloaded, EVERY, ["offloaded by accelerate", "device_map that fits"]),
    ("offload in sequence", offloaded_in_sequence, EVERY, ["offloaded by accelerate"]),
    ("lazy", lambda: nn.LazyLinear(4), EVERY, ["is lazy", "run one forward"]),
    ("never called", lambda: nn.MultiheadAttention(8, 2).out_proj, EVERY, ["NonDynamicallyQuantizableLinear", "never called"]),
    ("no linear", lambda: nn.LayerNorm(4), EVERY, ["LayerNorm", "never called as y = W x + b"]),
    ("repacked 4-bit", repacked, EVERY, ["repacked", "support_avx512bf16_for_cpu = False"]),
    ("4-bit", four_bit, READING, ["Linear4bit 64 -> 32", "quantised (Linear4bit)", "lora, ia3"]),
    ("8-bit", eight_bit, READING, ["Linear8bitLt 64 -> 32", "quantised (Linear8bitLt)"]),
    ("tensor subclass", codes, READING, ["quantised (Code)"]),
    ("int8", lambda: with_weight(torch.ones(4, 6, dtype=torch.int8)), READING, ["quantised (int8 weight)"]),
    ("parametrised", parametrised, READING, ["computed at each forward (parametrized)"]),
]


@pytest.mark.parametrize(("make", "whom", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_layers_that_cannot_carry_an_adapter_are_refused_by_name(make: Callable[[], nn.Module], whom: str, said: list[str]):
    layer = make()
    reading, other = refusal("model.layers.0.q", layer, True), refusal("model.layers.0.q", layer, False)
    assert reading is not None and reading.startswith("model.layers.0.q (")
    assert (other is not None) == (whom == EVERY)
    for part in said:
        assert part in reading


def test_a_sharded_weight_is_refused(sharded: nn.Linear):
    for reads in (False, True):
        text = refusal("q", sharded, reads)
        assert text is not None and "DTensor (S(0))" in text and "attach first, shard then" in text
    with pytest.raises(TypeError, match="DTensor"):
        dense_weight(sharded)
    assert quantised(sharded) is None
    assert fingerprint(nn.Module(), {"q": sharded})["targets"]["q"]["samples"] is None


def test_a_layer_inside_fully_sharded_data_parallel_is_refused():
    text = refusal("layers.0._fsdp_wrapped_module.q", linear(), False)
    assert text is not None and "attach first, wrap then" in text


@pytest.mark.parametrize("make", [linear, conv1d, on_its_device, lambda: linear(dtype=torch.bfloat16)])
def test_ordinary_layers_are_not_refused(make: Callable[[], nn.Module]):
    assert refusal("q", make(), True) is None and refusal("q", make(), False) is None


@pytest.mark.parametrize("make", [four_bit, eight_bit, codes, parametrised, lambda: nn.Linear(6, 4, device="meta")])
def test_a_weight_that_cannot_be_read_is_refused_with_the_layer(make: Callable[[], nn.Module]):
    layer = make()
    with pytest.raises(TypeError, match=f"{type(layer).__name__} .*its weight is"):
        dense_weight(layer)


def test_a_parametrised_weight_is_not_computed_by_looking():
    calls = []

    class Counting(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(1)
            return weight

    layer = linear()
    parametrize.register_parametrization(layer, "weight", Counting())
    calls.clear()
    assert is_linear(layer) and sizes(layer) == (6, 4) and quantised(layer) is None
    refusal("q", layer, True)
    fingerprint(layer, {"q": layer})
    assert not calls  # spectral_norm steps its power iteration whenever the weight is read


# -- the fingerprint ------------------------------------------------------------------------------------------------------


def counted(d_in: int = 6, d_out: int = 4, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = linear(d_in, d_out, dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(d_in * d_out).view(d_out, d_in) / 8)
    return layer


def test_a_fingerprint_is_this():
    """Golden: it is in every file, so it must not change with the library's version."""
    model = nn.ModuleDict({"a": counted(), "b": nn.Identity(), "c": conv1d()})
    with torch.no_grad():
        model["c"].weight.fill_(0.1)
    assert fingerprint(model, {"a": model["a"], "c": model["c"]}) == {
        "architecture": "ModuleDict",
        "targets": {
            "a": {"shape": [4, 6], "dtype": "float32", "samples": ["0.25", "0.875", "1.5", "2.125"]},
            "c": {"shape": [4, 6], "dtype": "float32", "samples": ["0.10000000149011612"] * 4},
        },
    }


@pytest.mark.parametrize(("d_in", "d_out", "count"), [(1, 1, 1), (1, 2, 2), (3, 1, 3), (2, 2, 4), (5, 1, 4), (64, 64, 4)])
def test_samples_lie_inside_and_apart(d_in: int, d_out: int, count: int):
    layer = counted(d_in, d_out)
    places = [int(float(s) * 8) for s in fingerprint(layer, {"q": layer})["targets"]["q"]["samples"]]
    assert len(set(places)) == count and set(places) <= set(range(d_in * d_out))
    steps = {b - a for a, b in itertools.pairwise(places)}
    assert len(steps) <= 1  # even distances
    assert count < 4 or d_in < 8 or len({p % d_in for p in places}) == 4  # and in different columns


def test_a_weight_that_is_not_contiguous_is_sampled_the_same():
    layer = counted(6, 6)
    strided = copy.deepcopy(layer)
    strided.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert not strided.weight.is_contiguous()
    assert fingerprint(layer, {"q": layer}) == fingerprint(layer, {"q": strided})


def test_a_slice_of_larger_storage_is_sampled_from_its_own_start():
    stored = torch.arange(100.0)
    layer = with_weight(stored[60:84].view(4, 6))
    assert [float(s) for s in fingerprint(layer, {"q": layer})["targets"]["q"]["samples"]] == [62.0, 67.0, 72.0, 77.0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_fingerprint_survives_json_and_equals_that_of_a_copy(name: str):
    from lora_lite.config import AdapterConfig
    from lora_lite.target import find_targets

    model = ARCHITECTURES[name].build()
    layers = {t.name: t.module for t in find_targets(model, AdapterConfig())}
    saved = json.loads(json.dumps(fingerprint(model, layers), allow_nan=False))
    twin = ARCHITECTURES[name].build()
    assert compare_fingerprint(saved, fingerprint(twin, {n: twin.get_submodule(n) for n in layers})) == ([], [])
    other = ARCHITECTURES[name].build(seed=1)
    [difference], warnings = compare_fingerprint(saved, fingerprint(other, {n: other.get_submodule(n) for n in layers}))
    assert f"{len(layers)} of {len(layers)} targets hold other weights" in difference and not warnings


def of(*layers: nn.Module, architecture: str = "LlamaForCausalLM") -> dict[str, Any]:
    made = fingerprint(nn.Module(), {f"l{i}": layer for i, layer in enumerate(layers)})
    return made | {"architecture": architecture}


def spoiled(at: int) -> nn.Linear:
    layer = counted()
    with torch.no_grad():
        layer.weight.view(-1)[at] += 1e-6
    return layer


DIFFERENT: list[tuple[str, dict[str, Any], dict[str, Any], list[str]]] = [
    ("class", of(counted()), of(counted(), architecture="OPTForCausalLM"), ["it was a LlamaForCausalLM, this is an OPTForCausalLM"]),
    ("name", of(counted(), counted()), of(counted()), ["1 of 2 targets have no layer of that name: l1"]),
    ("shape", of(counted()), of(counted(4, 6)), ["1 of 1 targets have another shape: l0 [4, 6], here [6, 4]"]),
    ("content", of(counted()), of(spoiled(2)), ["1 of 1 targets hold other weights: l0 (e.g. 0.25, here 0.250001)"]),
    ("many", of(*[counted()] * 5), of(*[linear()] * 5), ["5 of 5 targets hold other weights", "l2 (e.g.", ", ..."]),
    ("all", of(*[counted()] * 3), of(spoiled(7), counted(4, 6), architecture="M"), ["a M", "shape: l1", "name: l2", "l0 (e.g."]),
    ("unreadable", {"architecture": "M"}, of(counted()), ["its fingerprint cannot be read (KeyError"]),
    ("foreign", {"architecture": "M", "targets": {"l0": None}}, of(counted()), ["its fingerprint cannot be read (TypeError"]),
]


@pytest.mark.parametrize(("saved", "now", "said"), [row[1:] for row in DIFFERENT], ids=[row[0] for row in DIFFERENT])
def test_another_base_is_told_in_words(saved: dict[str, Any], now: dict[str, Any], said: list[str]):
    differences, warnings = compare_fingerprint(saved, now)
    assert not warnings
    for part in said:
        assert part in "; ".join(differences)
    assert compare_fingerprint(now, now) == ([], [])  # the control


def test_layers_the_file_does_not_name_are_no_difference():
    assert compare_fingerprint(of(counted()), of(counted(), linear())) == ([], [])


def test_a_nan_or_a_negative_zero_is_compared_as_it_is():
    def filled(value: float) -> dict[str, Any]:
        return of(with_weight(torch.full((4, 6), value)))

    assert compare_fingerprint(filled(float("nan")), filled(float("nan"))) == ([], [])
    assert compare_fingerprint(filled(float("nan")), filled(1.0))[0]
    assert compare_fingerprint(filled(0.0), filled(-0.0))[0]


@pytest.mark.parametrize("make", [four_bit, eight_bit, codes, parametrised], ids=["4-bit", "8-bit", "codes", "parametrised"])
def test_a_base_whose_content_is_hidden_warns_and_still_differs_in_shape(make: Callable[[], nn.Module]):
    hidden = make()
    d_in, d_out = sizes(hidden)
    for saved, now in ((of(counted(d_in, d_out)), of(hidden)), (of(hidden), of(counted(d_in, d_out))), (of(hidden), of(hidden))):
        differences, [warning] = compare_fingerprint(saved, now)
        assert not differences and "1 of 1 targets are quantised or computed" in warning and "l0" in warning
    [difference], warnings = compare_fingerprint(of(counted(d_in, d_out + 1)), of(hidden))
    assert "another shape" in difference and not warnings


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EXACT = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}  # bits of the significand
cast = st.sampled_from(DTYPES)


def one_value(value: float, *path: torch.dtype) -> dict[str, Any]:
    """A layer that holds `value` after being cast to each dtype of the path in turn."""
    weight = torch.full((4, 6), value, dtype=torch.float64)
    for dtype in path:
        weight = weight.to(dtype)
    return of(with_weight(weight))


@given(value=st.floats(-6e4, 6e4), a=cast, b=cast)
def test_a_change_of_dtype_is_the_same_base(value: float, a: torch.dtype, b: torch.dtype):
    assert compare_fingerprint(one_value(value, a), one_value(value, a, b)) == ([], [])  # model.to(b)
    assert compare_fingerprint(one_value(value, a), one_value(value, b)) == ([], [])  # two files made from one


@given(value=st.floats(1e-3, 1e3), sign=st.sampled_from((-1, 1)), a=cast, b=cast)
def test_a_change_beyond_the_rounding_is_another_base(value: float, sign: int, a: torch.dtype, b: torch.dtype):
    apart = 1 + 4 * 2.0 ** -min(EXACT[a], EXACT[b])
    assert compare_fingerprint(one_value(sign * value, a), one_value(sign * value * apart, b))[0]


def test_within_one_dtype_one_bit_is_another_base():
    value = torch.tensor(0.3)
    above = torch.nextafter(value, torch.tensor(1.0))
    assert compare_fingerprint(of(with_weight(value.expand(4, 6).clone())), of(with_weight(above.expand(4, 6).clone())))[0]


class Transfers(TorchFunctionMode):
    """Counts the calls that bring values from a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in ("cpu", "item", "tolist")
        return func(*args, **(kwargs or {}))


def test_all_samples_of_one_dtype_come_in_one_transfer():
    layers: dict[str, nn.Module] = {f"l{i}": linear() for i in range(50)}
    with Transfers() as few:
        fingerprint(nn.Module(), layers)
    with Transfers() as more:
        fingerprint(nn.Module(), layers | {"half": linear(dtype=torch.float16)})
    assert few.count == 2 and more.count == 4  # cpu() and tolist() of each dtype
