"""Does what makes a subspace quick to build and to absorb into leave its figures alone? Each short cut beside the long way, in float64."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lora_lite as ll
from lora_lite.checkpoint import raw
from lora_lite.subspace.frame import extended, gain, krylov, outside
from lora_lite.subspace.source import source_of
from tests.models import generator
from tests.subspaces import MODULES, family

pytestmark = pytest.mark.fast

EYE = torch.eye(12, dtype=torch.float64)


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_krylov_step_is_left_out_only_where_it_would_bring_nothing(power: float) -> None:
    X = rows(300, 400, seed=1) * torch.arange(1, 301)[:, None] ** -power
    found = krylov(X, lambda spectrum, total: min(6, len(spectrum)), 6)
    most = torch.linalg.eigvalsh(X @ X.T).flip(0)[:6].sum()
    assert found is not None
    assert -1e-12 < float(1 - (X @ found[0].T).square().sum() / most) < 1e-5


def test_what_a_step_could_gain_is_bounded() -> None:
    """By one direction each at most as strong as the next one found, and coupled by what is left over."""
    values, rest = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64), torch.tensor([0.4, 0.3], dtype=torch.float64)
    whole = torch.diag(torch.tensor([5.0, 3.0, 2.0, 2.0], dtype=torch.float64))
    whole[0, 2] = whole[2, 0] = rest[0]
    whole[1, 3] = whole[3, 1] = rest[1]
    gained = torch.linalg.eigvalsh(whole).flip(0)[:2].sum() - values[:2].sum()
    assert torch.isclose(gain(values, rest), gained)
    assert float(gain(values, 0 * rest)) == 0.0


@pytest.mark.parametrize("weakest", [1.0, 1e-2, 1e-4])
def test_a_basis_is_extended_by_what_lies_outside_it_however_weak(weakest: float) -> None:
    U = torch.linalg.qr(rows(40, 8, seed=2)).Q.T
    U = U + 1e-7 * rows(8, 40, seed=3)  # as float32 holds it
    X = rows(4, 8, seed=4) @ U + torch.logspace(0, 1, 4, dtype=torch.float64)[:, None] / 10 * weakest * rows(4, 40, seed=5)
    W, T = extended(torch.cat([U, X]), 8, noise=1e-6)
    C = torch.linalg.solve_triangular(T, W, upper=False)
    assert torch.equal(W[:8], U) and torch.dist(C @ C.T, EYE) < 1e-12
    assert torch.dist(X @ C.T @ C, X) < 1e-9 * X.norm()
    exact = outside(torch.linalg.qr(U.T).Q.T, X.T, noise=1e-9)
    assert torch.linalg.matrix_norm(exact - exact @ C.T @ C) < 1e-6


def test_a_basis_is_not_extended_by_rounding() -> None:
    U = torch.linalg.qr(rows(40, 8, seed=2)).Q.T
    inside = rows(4, 8, seed=4) @ U + 1e-9 * rows(4, 40, seed=5)
    assert len(extended(torch.cat([U, inside]), 8, noise=1e-6)[0]) == 8
    assert len(extended(torch.cat([U, 0 * inside]), 8, noise=1e-6)[0]) == 8


@pytest.mark.parametrize("peft", [False, True])
def test_a_file_that_changes_under_a_stream_is_refused(tmp_path: Path, peft: bool) -> None:
    """Its header was read once, so what lies at those places must be what was there then."""
    adapter, path = family(1)[0], tmp_path / "a"
    save = (lambda: ll.to_peft(adapter, path)) if peft else (lambda: adapter.save(path))
    save()
    source = source_of("t", path)
    source.read(MODULES[0])
    at = path / "adapter_model.safetensors" if peft else path
    os.utime(at, ns=(1, 1))
    with pytest.raises(ValueError, match="has changed since it was opened"):
        source.read(MODULES[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_raw_is_the_tensor_bit_for_bit(dtype: torch.dtype) -> None:
    v = (100 * rows(3, 4, seed=0)).to(dtype).T
    assert torch.equal(torch.frombuffer(bytearray(raw(v)), dtype=dtype).reshape(4, 3), v)
    assert len(raw(torch.empty(0, 3, dtype=dtype))) == 0
