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

    A row (of the first axis) can come or go without a bit of the others changing. Rows much shorter than a group share their scale with
    those beside them: one of each 16 numbers would take an eighth of their bytes again.
    values  (rows, width) int8, or two 4-bit numbers in each uint8
    scales  (rows or runs, groups) bfloat16: its exponent reaches as far as float32's, a float16 loses groups below 6e-8
    runs    how many rows each row of scales is of, uint8; None: one
    """

    values: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    bits: int
    group: int
    runs: Tensor | None = None

    @staticmethod
    def of(x: Tensor, bits: int, group: int) -> Packed:
        flat = x.detach().reshape(x.shape[0], math.prod(x.shape[1:])).float()
        width = flat.shape[1]
        if 0 < width <= group // 2:
            return Packed.short(flat, tuple(x.shape), bits, group)
        groups = F.pad(flat, (0, -width % group)).reshape(len(flat), -(-width // group), group)
        levels, scales = nearest(groups, bits)
        levels = levels.to(torch.int8).flatten(1)[:, :width]
        return Packed(levels.contiguous() if bits == 8 else nibbles(levels), scales, tuple(x.shape), bits, group)

    @staticmethod
    def short(flat: Tensor, shape: tuple[int, ...], bits: int, group: int) -> Packed:
        (n, width), span = flat.shape, group // flat.shape[1]
        levels, scales = nearest(F.pad(flat, (0, 0, 0, -n % span)).reshape(-(-n // span), 1, span * width), bits)
        levels = levels.to(torch.int8).reshape(-1, width)[:n].contiguous()
        return Packed(levels if bits == 8 else nibbles(levels), scales, shape, bits, group, even(n, span).to(flat.device))

    @property
    def is_even(self) -> bool:
        """Whether the runs are those of rows packed together, which follow from the shape."""
        width = math.prod(self.shape[1:])
        return self.runs is not None and bool(width) and torch.equal(self.runs.cpu(), even(self.shape[0], max(1, self.group // width)))

    @property
    def by_row(self) -> Tensor:
        """(rows,): which row of scales is each one's."""
        each = torch.arange(len(self.scales), device=self.scales.device)
        return each if self.runs is None else each.repeat_interleave(self.runs.long())

    def dense(self) -> Tensor:
        """float32 of the original shape."""
        width = math.prod(self.shape[1:])
        levels = (self.values if self.bits == 8 else from_nibbles(self.values)[:, :width]).float()
        scales = self.scales if self.runs is None else self.scales[self.by_row]
        return (levels * scales.float().repeat_interleave(self.group, dim=1)[:, :width]).reshape(self.shape)

    def rows(self, which: Tensor) -> Packed:
        shape, runs = (len(which), *self.shape[1:]), None
        scales = self.by_row[which]
        if self.runs is not None:
            scales, counts = scales.unique_consecutive(return_counts=True)
            runs = counts.to(torch.uint8)
        return Packed(self.values[which], self.scales[scales], shape, self.bits, self.group, runs)

    def joined(self, other: Packed) -> Packed:
        shape = (self.shape[0] + other.shape[0], *self.shape[1:])
        runs = None
        if self.runs is not None or other.runs is not None:  # files of the first format have one scale for each row, however short
            runs = torch.cat([torch.ones(len(x.scales)).to(x.values) if x.runs is None else x.runs for x in (self, other)])
            runs = runs.to(torch.uint8)
        values, scales = torch.cat([self.values, other.values]), torch.cat([self.scales, other.scales])
        return Packed(values, scales, shape, self.bits, self.group, runs)

    def to(self, device: torch.device | str) -> Packed:
        values, scales, runs = (None if x is None else x.to(device) for x in (self.values, self.scales, self.runs))
        assert values is not None and scales is not None
        return Packed(values, scales, self.shape, self.bits, self.group, runs)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + (0 if self.runs is None else self.runs.nbytes)

    @property
    def device(self) -> torch.device:
        return self.values.device


def even(rows: int, span: int) -> Tensor:
    """Runs of `span` rows each, the last of what is left."""
    runs = torch.full((-(-rows // span),), span, dtype=torch.uint8)
    runs[-1:] -= -rows % span
    return runs


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


@dataclass(frozen=True, eq=False)
class Sizes:
    """Squared sizes in a byte each, by their logarithm in steps of 9%: in 32 bits a size and an error would outweigh four bits of a
    diagonal. `Sizes.of(x, up=True)` are no smaller than x, up=False no larger; what is 2^-31 of the largest is taken for that much.

    codes  (n,) uint8: 2^((top - code) / 8), and 255 for none at all
    """

    codes: Tensor
    top: int
    up: bool

    @staticmethod
    def of(x: Tensor, up: bool) -> Sizes:
        steps = 8 * x.double().log2()
        steps = steps.ceil() if up else steps.floor()
        top = int(steps.max()) if bool((x > 0).any()) else 0
        return Sizes(torch.where(x > 0, (top - steps).clamp(0, 254), 255).to(torch.uint8), top, up)

    def double(self) -> Tensor:
        return torch.where(self.codes == 255, 0.0, 2 ** ((self.top - self.codes.double()) / 8))

    def middle(self) -> Tensor:
        """As likely too small as too large."""
        return self.double() * 2 ** (-1 / 16 if self.up else 1 / 16)

    def __getitem__(self, i: int) -> Tensor:
        return self.double()[i]

    def __len__(self) -> int:
        return len(self.codes)

    def taken(self, which: Tensor) -> Sizes:
        return Sizes(self.codes[which.to(self.device)], self.top, self.up)

    def joined(self, value: float) -> Sizes:
        """On the same steps, so that the others stay what they are."""
        new = Sizes.of(torch.tensor([value], device=self.device), self.up)
        empty = bool((self.codes == 255).all())
        top = new.top if empty else self.top if value <= 0 else max(self.top, new.top)
        codes = [torch.where(x.codes == 255, 255, (x.codes.long() + top - x.top).clamp(0, 254)) for x in (self, new)]
        return Sizes(torch.cat(codes).to(torch.uint8), top, self.up)

    def to(self, device: torch.device | str | None = None) -> Sizes:
        return Sizes(self.codes.to(device=device), self.top, self.up)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device


Stored = Tensor | Packed
Sized = Tensor | Sizes


def with_size(x: Sized, value: float) -> Sized:
    return x.joined(value) if isinstance(x, Sizes) else torch.cat([x, x.new_tensor([value])])


def sizes_of(x: Sized, which: Tensor) -> Sized:
    return x.taken(which) if isinstance(x, Sizes) else x[which.to(x.device)]


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
