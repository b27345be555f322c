"""How is a tensor held in 8 or 4 bits? Real integers and one bfloat16 scale per group, in memory and on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float
from torch import Tensor

LEVELS = {8: 127, 4: 7}
UP = 1 + 2**-7  # a scale is rounded up to bfloat16, so that the largest number of a group is not clipped
# Of four bits' seven levels the largest number of a group deserves less than all: clipping it leaves finer steps to the others.
# The best of these for each group takes 8 to 12% off the error; eight bits have steps to spare.
SHARES = {8: (1.0,), 4: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)}


@dataclass(frozen=True, eq=False)
class Packed:
    """Integers in groups that share a scale: `Packed.of(x, bits=8, group=64).dense()`.

    Rows (the first axis) are packed one by one, so that a row can come or go without a bit of the others changing.
    values  (rows, width) int8, or two 4-bit numbers in each uint8
    scales  (rows, groups) bfloat16: its exponent reaches as far as float32's, a float16 loses groups below 6e-8
    """

    values: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    bits: int
    group: int

    @staticmethod
    def of(x: Tensor, bits: int, group: int) -> Packed:
        flat = x.detach().reshape(x.shape[0], math.prod(x.shape[1:])).float()
        width = flat.shape[1]
        groups = F.pad(flat, (0, -width % group)).reshape(len(flat), -(-width // group), group)
        levels, scales = nearest(groups, bits)
        levels = levels.to(torch.int8).flatten(1)[:, :width]
        return Packed(levels.contiguous() if bits == 8 else nibbles(levels), scales, tuple(x.shape), bits, group)

    def dense(self) -> Tensor:
        """float32 of the original shape."""
        width = math.prod(self.shape[1:])
        levels = (self.values if self.bits == 8 else from_nibbles(self.values)[:, :width]).float()
        scales = self.scales.float().repeat_interleave(self.group, dim=1)[:, :width]
        return (levels * scales).reshape(self.shape)

    def rows(self, which: Tensor) -> Packed:
        return Packed(self.values[which], self.scales[which], (len(which), *self.shape[1:]), self.bits, self.group)

    def joined(self, other: Packed) -> Packed:
        shape = (self.shape[0] + other.shape[0], *self.shape[1:])
        return Packed(torch.cat([self.values, other.values]), torch.cat([self.scales, other.scales]), shape, self.bits, self.group)

    def to(self, device: torch.device | str) -> Packed:
        return Packed(self.values.to(device), self.scales.to(device), self.shape, self.bits, self.group)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.values.device


def nearest(groups: Float[Tensor, "n g size"], bits: int) -> tuple[Float[Tensor, "n g size"], BFloat16[Tensor, "n g"]]:
    """Whole numbers and a scale per group that are nearest to these numbers, of the scales tried."""
    most, found = groups.abs().amax(2) / LEVELS[bits] * UP, None
    for share in SHARES[bits]:
        scales = (most * share).bfloat16()
        each = torch.where(scales == 0, 1.0, scales.float())[..., None]
        levels = (groups / each).round_().clamp_(-LEVELS[bits], LEVELS[bits])
        off = (levels * each - groups).square().sum(2)
        if found is None:
            found = levels, scales, off
        else:
            better = off < found[2]
            found = torch.where(better[..., None], levels, found[0]), torch.where(better, scales, found[1]), torch.minimum(off, found[2])
    assert found is not None
    return found[0], found[1]


def nibbles(levels: Tensor) -> Tensor:
    """-7..7 as 1..15, two to a byte, the first in the low half."""
    codes = F.pad((levels + 8).to(torch.uint8), (0, levels.shape[1] % 2), value=8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def from_nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).to(torch.int8) - 8


Stored = Tensor | Packed


def dense(x: Stored) -> Tensor:
    return x.dense() if isinstance(x, Packed) else x


def wide(x: Stored) -> Tensor:
    """In float64, for algebra."""
    return dense(x).double()


def take(x: Stored, which: Tensor) -> Stored:
    return x.rows(which.to(x.device)) if isinstance(x, Packed) else x[which.to(x.device)]


def append(x: Stored, new: Tensor) -> Stored:
    """Rows after those that are there, held as they are; what was there keeps its bits."""
    return x.joined(Packed.of(new.to(x.device), x.bits, x.group)) if isinstance(x, Packed) else torch.cat([x, new.to(x)])
