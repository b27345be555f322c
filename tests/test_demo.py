"""Does `lora-lite demo` do the main job: train, sweep, check, write? On a model of a few thousand parameters and a made-up corpus."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_lite as ll
from lora_lite.cli import checks, demo, report, tiny_lm, traits
from lora_lite.cli.corpus import Corpus, standard_library
from lora_lite.cli.errors import UserError
from lora_lite.cli.language import Recipe, Sampling, writing_model
from lora_lite.cli.options import SHIPPED, config_of
from lora_lite.cli.pairs import Contrast, code_and_prose
from lora_lite.steering.pairs import Pair

TINY = tiny_lm.Recipe(vocab=300, hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, context=64, steps=60, rows=8, length=24)
RECIPE = Recipe(steps=40, batch_size=6, max_completion=16, lr=2e-2)
SAMPLING = Sampling(samples=10, length=12)


def made_up(n: int = 60) -> Corpus:
    draw = random.Random(0)
    words, names = ["the", "file", "is", "read", "and", "then", "closed", "by", "a", "caller"], ["self", "path", "data", "x", "key"]
    prose = tuple(" ".join(draw.choices(words, k=14)).capitalize() + "." for _ in range(n))
    code = tuple("\n".join(f"{a}.{b} = {a}[{b}]" for a, b in zip(draw.choices(names, k=4), draw.choices(names, k=4))) for _ in range(n))  # noqa: B905
    return Corpus(prose, code)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder to work in, with a model `lm`, the made-up corpus in place of the standard library, and fewer doses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "standard_library", made_up)
        patch.setattr(demo, "DOSES", (-2.0, -1.0, 0.0, 1.0, 2.0))
        patch.setattr(demo, "FINE", 3)
        folder = tmp_path_factory.mktemp("demo")
        tiny_lm.make(folder / "lm", made_up(), TINY)
        yield folder


def job(room: Path, name: str, config: ll.AdapterConfig | None = None, **options: Any) -> demo.Job:
    values = {"model": str(room / "lm"), "recipe": RECIPE, "sampling": SAMPLING} | options
    return demo.Job(config or ll.LoRAConfig(r=4, alpha=8), room / name, **values)


@pytest.fixture(scope="module")
def done(room: Path) -> tuple[demo.Job, dict[str, Any]]:
    first = job(room, "first")
    return first, demo.demo(first)


@pytest.fixture(scope="module")
def small(room: Path) -> tuple[Any, Any]:
    """The model of the room, and its tokenizer."""
    folder = room / "lm"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_everything_is_written_and_the_promises_hold(done: tuple[demo.Job, dict[str, Any]]) -> None:
    asked, summary = done
    assert summary["checks"] == {"c0_bit_identical_to_base": True, "save_load_bit_identical": True, "detach_bit_identical": True}
    assert summary["ok"]
    for file in summary["files"]:
        assert Path(file).stat().st_size > 100, file
    assert (asked.out / "dose_response.png").read_bytes().startswith(b"\x89PNG")
    assert all(key.endswith(("lora_A", "lora_B")) for key in load_file(asked.out / "adapter.safetensors"))
    written = json.loads((asked.out / "report.json").read_text())
    assert written["doses"] == json.loads(json.dumps(summary["doses"]))
    report = (asked.out / "report.md").read_text()
    assert "| c0 bit identical to base | yes |" in report and "| save load bit identical | yes |" in report
    samples = (asked.out / "samples.md").read_text()
    assert all(f"## c = {c:g}\n" in samples for c in demo.DOSES)


def test_c_moves_the_trait_from_one_side_to_the_other(done: tuple[demo.Job, dict[str, Any]]) -> None:
    doses = {d["c"]: d for d in done[1]["doses"]}
    assert doses[1.0]["trait"] > 0.7 and doses[-1.0]["trait"] < 0.3
    assert done[1]["loss"]["last"] < done[1]["loss"]["first"]
    assert done[1]["judge_accuracy"] == 1.0
    low, high = done[1]["gradual_region"] or (-2, 2)
    assert -2 <= low < high <= 2
    assert ("is gradual from" in done[1]["way"]) == bool(done[1]["gradual_region"])
    assert done[1]["way"][1:] in (done[0].out / "report.md").read_text()


def test_the_same_seed_gives_the_same_texts(room: Path, done: tuple[demo.Job, dict[str, Any]]) -> None:
    again = demo.demo(job(room, "again"))
    assert again["doses"] == done[1]["doses"]
    assert (room / "again" / "samples.md").read_text() == (room / "first" / "samples.md").read_text()
    first, second = (load_file(room / name / "adapter.safetensors") for name in ("first", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    other = demo.demo(job(room, "other", sampling=dataclasses.replace(SAMPLING, seed=5)))
    assert other["doses"] != done[1]["doses"]


@pytest.mark.parametrize("variant", sorted(name for name, variant in ll.REGISTRY.items() if not variant.needs_shared))
def test_every_variant_on_a_model_and_pairs_of_ones_own(variant: str, room: Path, done: tuple[demo.Job, dict[str, Any]]) -> None:
    lines = [{"prompt": "the", "chosen": f" file {i} is read", "rejected": f" self.x = {i}"} for i in range(12)]
    pairs = room / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    short = dataclasses.replace(RECIPE, steps=2)
    asked = job(room, variant, config_of(variant, None, short.steps), pairs=pairs, recipe=short)
    summary = demo.demo(asked)
    assert summary["ok"], summary["checks"]
    assert summary["trait"] == "P(chosen)" and variant in summary["title"]


def test_the_checks_notice_what_they_are_for(small: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = small
    inputs = {"input_ids": torch.tensor([[0, 5, 6, 7]] * 4), "attention_mask": torch.ones(4, 4)}
    pristine, base = checks.state(model), checks.logits(model, inputs)
    adapter = ll.attach(model, ll.LoRAConfig(r=2), seed=0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    assert checks.zero_is_base(model, adapter, inputs, base)
    assert not checks.zero_is_base(model, adapter, inputs, base + 1e-6)
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    assert not checks.survives_the_file(model, adapter, tmp_path / "a.safetensors", inputs, pristine)["detach_bit_identical"]
    hook.remove()
    assert checks.state(model) == pristine
    with torch.no_grad():
        flipped = model.model.norm.weight[0].item()
        model.model.norm.weight[0] = math.nextafter(flipped, 2) + 1e-6
    assert checks.state(model) != pristine
    with torch.no_grad():
        model.model.norm.weight[0] = flipped
    assert checks.state(model) == pristine


def test_the_shipped_model_is_small_whole_and_speaks_both_kinds() -> None:
    """What `make` wrote, as `demo` loads it: the parameters of the recipe, and near the loss that its record tells."""
    made = json.loads((SHIPPED / tiny_lm.RECORD).read_text())
    assert made["recipe"] == dataclasses.asdict(tiny_lm.Recipe())
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 4e6
    model, tokenizer = writing_model("tiny")
    assert {p.dtype for p in model.parameters()} == {torch.float32} and len(tokenizer) == made["recipe"]["vocab"]
    held = standard_library().split()[1]
    streams = [tiny_lm.stream(tokenizer, kind[:200]) for kind in (held.prose, held.code)]
    assert tiny_lm.held_out_loss(model, streams, tiny_lm.Recipe()) == pytest.approx(made["held_out_loss"], abs=0.25)
    assert tokenizer.decode(tokenizer("def f(x):\n    return x")["input_ids"]) == f"{tiny_lm.END}def f(x):\n    return x"


def test_the_corpus_is_prose_and_code_in_a_fixed_order(tmp_path: Path) -> None:
    body = '    """Read the whole file, which is then closed, and give back what it holds as one long piece of text."""\n'
    source = (
        f"def read(path, open):\n{body}    # a comment\n"
        + "".join(f"    value_{i} = open('{i}')\n" for i in range(4))
        + "    return value_0\n"
    )
    for name in ("b.py", "a.py", "test/skipped.py", "site-packages/skipped.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source.replace("open", name[0] + "_open"))
    (tmp_path / "template.py").write_text("def {{name}}: pass")
    found = standard_library(tmp_path)
    assert found.prose == ("Read the whole file, which is then closed, and give back what it holds as one long piece of text.",)
    assert [c.splitlines()[0] for c in found.code] == ["value_0 = a_open('0')", "value_0 = b_open('0')"]
    assert not any("comment" in c or '"""' in c for c in found.code)
    assert found.digest() != Corpus(found.code, found.prose).digest()


def test_the_judge_tells_unseen_texts_apart_and_is_undecided_about_nothing() -> None:
    judge = traits.Judge(code_and_prose(made_up(), seed=0))
    assert judge.probability("self.key = data[x]") > 0.95
    assert judge.probability("The caller is closed by a file.") < 0.05
    assert judge.probability("") == 0.5
    same = tuple(Pair("", "one text", "one text") for _ in range(3))
    assert traits.Judge(Contrast(same, same)).probability("self.key") == 0.5


def test_ngrams_are_a_distribution() -> None:
    model = traits.NGrams(["abracadabra"])
    total = sum(math.exp(model.log_likelihood("abra" + chr(i)) - model.log_likelihood("abra")) for i in range(256))
    assert total == pytest.approx(1.0)


def test_a_target_that_is_nowhere_is_the_users_to_know(room: Path, done: tuple[demo.Job, dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="nowhere_proj"):
        demo.demo(job(room, "nowhere", ll.LoRAConfig(targets="nowhere_proj")))


@pytest.mark.parametrize(
    ("mean", "error", "said"),
    [
        (0.456, 0.06, "0.46 ± 0.06"),
        (0.00021, 0.00004, "0.00021 ± 0.00004"),
        (0.0, 0.0, "0.00 (all alike)"),
        (1.0, 1e-9, "1.00 (all within 1e-6)"),
        (0.4, None, "0.40"),
    ],
)
def test_an_error_is_told_in_as_many_digits_as_it_takes(mean: float, error: float | None, said: str) -> None:
    assert report.with_error(mean, error) == said
