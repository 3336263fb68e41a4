"""Constants that every implementation of the momentum rule shares, and how accum holds two numbers a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 64  # columns that share a momentum step
CLIP_RMS = 2.5  # of a block's RMS: the largest momentum that its codes reach
MAX_UPDATE = 2.0  # in RMS of the update
STATISTIC_BITS = 15  # of a row's or column's largest element in fixed point
STATISTIC_OCTAVES = 64  # a column's scale is at most so far from the largest row's
UPDATE_STEPS = 1024.0  # fixed point of the update before it is set to unit RMS
UPDATE_LIMIT = 31.0 * UPDATE_STEPS  # largest magnitude in it


def rate_unit(cell: int, trits: int) -> float:
    """Residual steps that a rate of 1 moves a weight by: one cell for each of its trits."""
    return float(cell * trits)


@dataclass(frozen=True)
class MomentumFormat:
    """How residual and momentum share one integer per weight."""

    bits: int = 4

    @property
    def dtype(self) -> torch.dtype:
        return {4: torch.uint8, 8: torch.int16}[self.bits]

    @property
    def cell(self) -> int:
        """Residual steps per cell: of the latent line, the part that belongs to one level."""
        return 2**self.bits

    @property
    def largest_code(self) -> int:
        """The largest momentum code; the smallest is minus this."""
        return 2 ** (self.bits - 1) - 1

    @property
    def clip(self) -> float:
        """A block's mean square times this is the square of its momentum step."""
        return (CLIP_RMS / self.largest_code) ** 2

    @property
    def legal(self) -> tuple[tuple[int, int], ...]:
        """Ranges of accum's values, in ascending order; a momentum code of -largest_code - 1 is illegal."""
        illegal = -(self.largest_code + 1) << self.bits  # and the cell - 1 after it
        if self.bits == 4:  # read as unsigned
            return ((0, 127), (illegal + 256 + self.cell, 255))
        return ((illegal + self.cell, 32767),)

    def split(self, accum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """accum (N, K) -> residual, momentum code: signed integers (N, K)."""
        signed = accum.view(torch.int8) if self.bits == 4 else accum
        return (signed << self.bits) >> self.bits, signed >> self.bits

    def join(self, residual: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`: accum (N, K)."""
        joined = (momentum << self.bits) | (residual & (self.cell - 1))
        return joined.view(torch.uint8) if self.bits == 4 else joined
