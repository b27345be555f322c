"""Do rounds of steering build on each other, keep by their rule, and survive a kill at any point to the same bytes?"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll
from lora_lite.steering import standing, verdict
from tests.models import llama, token_ids
from tests.references import same_bits

HIGH, LOW = range(32, 60), range(3, 31)  # what chosen and rejected texts are made of


class Numbers:
    """A tokenizer whose texts are its ids."""

    bos_token_id, eos_token_id, pad_token_id = 1, None, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return [self.decode(row) for row in rows]


def pairs(n: int = 40) -> ll.ContrastivePairs:
    draw = random.Random(0)
    return ll.ContrastivePairs(([1], draw.choices(HIGH, k=4), draw.choices(LOW, k=4)) for _ in range(n))


TRAINING = {"steps": 10, "batch_size": 6, "lr": 1e-1, "kl": 0.5, "checks": 2}
CALIBRATION = {"grid": (0.5, 1.0), "doublings": 0, "rounds": 1, "max_new_tokens": 4, "floors": {"perplexity": 1e-3}}
SPECTRAL = ll.PiSSAConfig(r=4, targets="v_proj|up_proj|down_proj", train="spectrum")


def go(folder: Path, config: ll.AdapterConfig = SPECTRAL, model: Any = None, **more: Any) -> ll.steering.Rounds:
    settings = {"rounds": 2, "training": TRAINING, "calibration": CALIBRATION, "progress": False} | more
    asked = settings.pop("pairs", None) or pairs()
    return ll.steering_rounds(model or llama(), config, asked, [[1, 40], [1, 5]], folder, tokenizer=Numbers(), **settings)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ll.steering.Rounds, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("rounds")
    return go(folder), content(folder)


class Killed(BaseException):
    """No `except Exception` of the library sees it, as none would see a SIGKILL."""


# -- what rounds come to --------------------------------------------------------------------------------------------------


def test_rounds_are_kept_by_the_rule_and_the_history_is_what_they_left(whole: Any) -> None:
    found, files = whole
    assert sorted(files) == ["round-1.safetensors", "round-2.safetensors", "state.json"]
    first, second = found.rounds
    assert first.dose == 0.5 and "kept" in first.why and first.before["shift"] == 0.0 and first.trained["shift"] > 0.2
    assert second.before["shift"] > 0.05, "the second round begins where the first one, at its dose, left off"
    assert (first.seed, second.seed) == (0, 1)
    model, ids = llama(), token_ids(2, 6)
    base = model(ids).logits
    history = ll.HistoryBake(model, found.kept())
    assert len(history) == sum(r.dose is not None for r in found.rounds) and not torch.equal(model(ids).logits, base)
    history.remove()
    assert same_bits(model(ids).logits, base)


def test_the_adapters_file_holds_its_calibration(whole: Any) -> None:
    found, _ = whole
    adapter = ll.read(found.folder / found.rounds[0].file)
    assert adapter.calibrated["positive"] == found.rounds[0].calibrated["positive"]
    model = llama()
    with adapter(model, c="auto"):
        assert adapter.c == adapter.calibrated["positive"]


def test_the_report_states_the_rule_and_every_round(whole: Any) -> None:
    found, _ = whole
    said = str(found)
    assert found.rule in said and "at least 0.5 above the size of its null control's" in said and "at most 0.5" in said
    assert all(f"round {r.number}: {r.why}" in said for r in found.rounds)
    assert json.loads(json.dumps(found.to_dict()))["kept"] == [r.number for r in found.rounds if r.dose is not None]


def test_directions_of_kept_rounds_are_left_to_them(whole: Any) -> None:
    found, _ = whole
    one, two = (ll.read(found.folder / r.file).factors() for r in found.rounds)
    for target, kept in one.items():
        overlap = torch.nn.functional.normalize(kept.A, dim=1) @ torch.nn.functional.normalize(two[target].A, dim=1).T
        assert overlap.abs().max() < 1e-4
    assert found.rounds[0].dose is not None


def test_a_trait_that_is_not_there_is_dropped_and_the_next_round_starts_from_the_base(tmp_path: Path) -> None:
    draw = random.Random(1)
    noise = ll.ContrastivePairs(([1], draw.choices(range(3, 60), k=4), draw.choices(range(3, 60), k=4)) for _ in range(24))
    found = go(tmp_path, pairs=noise)
    assert [r.dose for r in found.rounds] == [None, None] and found.kept() == []
    assert all("dropped" in r.why for r in found.rounds)
    assert found.rounds[1].before["shift"] == 0.0


def test_no_coherent_c_is_a_reason_to_drop(tmp_path: Path) -> None:
    found = go(tmp_path, rounds=1, calibration=CALIBRATION | {"floors": {"perplexity": 1e9}})
    assert found.rounds[0].dose is None and "no positive c is coherent" in found.rounds[0].why


def test_the_effect_is_cohens_d_of_what_the_round_adds() -> None:
    before, after = {"shift": 1.0, "effect": 2.0}, {"shift": 4.0, "effect": 4.0}  # spreads 0.5 and 1
    assert verdict.added(before, after) == pytest.approx(3.0 / ((0.5**2 + 1.0**2) / 2) ** 0.5)
    assert verdict.added({"shift": 0.0, "effect": 0.0}, {"shift": 0.0, "effect": 0.0}) == 0.0


def test_the_model_comes_out_as_it_went_in(tmp_path: Path) -> None:
    model = llama().train()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(Killed):
        go(tmp_path, model=model, after=killer_after(2))
    assert all(same_bits(v, before[n]) for n, v in model.state_dict().items()) and model.training
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not ll.adapters(model) and not ll.HistoryBake.of(model)


# -- killed and resumed ---------------------------------------------------------------------------------------------------


def killer_after(steps: int) -> Any:
    seen: list[Any] = []

    def after(done: Any) -> None:
        seen.append(done)
        if len(seen) == steps:
            raise Killed

    return after


def test_killed_after_every_recorded_step_it_comes_to_the_same_bytes(whole: Any, tmp_path: Path) -> None:
    for _ in range(6):  # two rounds of three steps
        with pytest.raises(Killed):
            go(tmp_path, after=killer_after(1))
    found = go(tmp_path)
    assert found.rounds == whole[0].rounds and content(tmp_path) == whole[1]


@pytest.mark.parametrize(("nth", "place"), [(1, "before"), (1, "after"), (2, "before"), (4, "after"), (5, "before"), (9, "after")])
def test_killed_around_any_file_it_comes_to_the_same_bytes(
    nth: int, place: str, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round replaces five files: adapter, state, state, adapter, state."""
    real, seen = os.replace, []

    def replace(source: Any, target: Any) -> None:
        seen.append(target)
        if len(seen) == nth and place == "before":
            (tmp_path / ".lora_lite-0123.tmp").write_bytes(b"half")  # what a SIGKILL leaves; an exception cleans up its own
            raise Killed
        real(source, target)
        if len(seen) == nth:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            go(tmp_path)
    assert go(tmp_path).rounds == whole[0].rounds
    assert content(tmp_path) == whole[1]


def test_a_finished_folder_is_only_read_and_more_rounds_go_on(whole: Any, tmp_path: Path) -> None:
    one = go(tmp_path, rounds=1)
    assert len(one.rounds) == 1
    assert go(tmp_path).rounds == whole[0].rounds and content(tmp_path) == whole[1]
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert go(tmp_path, after=killer_after(1)).rounds == whole[0].rounds
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


# -- refused --------------------------------------------------------------------------------------------------------------


def test_another_jobs_folder_is_refused_with_what_differs(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        go(tmp_path, after=killer_after(1))
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"another job: margin was 0\.5, is 0\.7; .*seed was 0, is 3; .*Give another folder"):
        go(tmp_path, margin=0.7, seed=3)
    with pytest.raises(ValueError, match=r"pairs was .*validation was"):
        go(tmp_path, pairs=pairs(30))
    with pytest.raises(ll.CheckpointError, match="base"):
        go(tmp_path, model=llama(seed=5))
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"job": {}}', '{"job": {}, "rounds": [{"what": 1}]}', '{"format": 9, "job": {}, "rounds": []}']
)
def test_a_state_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state\.json .*give another folder"):
        go(tmp_path)


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with standing.alone_in(tmp_path), pytest.raises(RuntimeError, match="another process is at work"):
        go(tmp_path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"margin": float("nan")}, "margin finite"),
        ({"dose": 0.0}, "dose above 0"),
        ({"training": {"seed": 3}}, r"training holds \['seed'\]"),
        ({"training": {"stepz": 3}}, r"training holds \['stepz'\], which ll.train_steering does not take"),
        ({"calibration": {"tokenizer": None}}, r"calibration holds \['tokenizer'\]"),
        ({"validation": pairs(1)}, "less than 2 pairs"),
        ({"validation": 0.98}, "a null control needs at least 2 pairs to train on"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_anything_is_written(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        go(tmp_path / "never", **more)
    assert not (tmp_path / "never").exists()


# -- what a method does between steps ---------------------------------------------------------------------------------------


@pytest.fixture
def toy() -> Iterator[Any]:
    from tests.test_contract import Toy, ToyConfig

    ll.register(Toy)
    yield ToyConfig
    ll.REGISTRY.pop("toy")


@pytest.mark.parametrize("project", [False, True])
def test_training_makes_the_two_calls_of_a_scheduled_method(toy: Any, project: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, reports = ll.REGISTRY["toy"], []
    for weight in (1.0, 0.0):
        aux = variant.aux_loss
        with monkeypatch.context() as patch:
            patch.setattr(variant, "aux_loss", staticmethod(lambda cfg, layers, weight=weight, aux=aux: weight * aux(cfg, layers)))
            model = llama()
            adapter = ll.attach(model, toy(r=2), seed=0)
            with torch.no_grad():
                for p in adapter.parameters():
                    p.fill_(0.5)
            penalty = adapter.aux_loss().item()
            report = ll.train_steering(model, adapter, pairs(), validation=None, steps=3, lr=1e-3, project=project, progress=False)
        assert all(fields["lora_steps"].item() == 1 + 2 + 3 for fields in adapter.tensors().values())
        reports.append((report.losses[0], penalty, adapter.state_dict()))
    with_it, without = reports
    assert with_it[0] - without[0] == pytest.approx(with_it[1], rel=1e-4) and with_it[1] > 1
    assert any(not torch.equal(v, without[2][k]) for k, v in with_it[2].items()), "its gradient moves the weights"


def test_the_best_weights_come_back_with_their_own_state_of_the_schedule(toy: Any) -> None:
    model = llama()
    adapter = ll.attach(model, toy(r=2), seed=0)
    report = ll.train_steering(model, adapter, pairs(), validation=0.25, steps=6, lr=5.0, checks=3, progress=False)
    assert report.best_step < 6, "a rate this high ends worse than it was on the way"
    assert {fields["lora_steps"].item() for fields in adapter.tensors().values()} == {float(sum(range(report.best_step + 1)))}
