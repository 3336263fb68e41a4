"""What every implementation of the momentum rule agrees on: its constants, and how accum holds two numbers a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 64
CLIP_RMS = 2.5
MAX_UPDATE = 2.0
STATISTIC_BITS = 15
STATISTIC_OCTAVES = 64
UPDATE_STEPS = 1024.0
UPDATE_LIMIT = 31.0


@dataclass(frozen=True)
class MomentumFormat:
    """How residual and momentum share one integer per weight."""

    bits: int = 4

    @property
    def dtype(self) -> torch.dtype:
        return {4: torch.uint8, 8: torch.int16}[self.bits]

    @property
    def cell(self) -> int:
        """Residual steps per cell of the latent line."""
        return 2**self.bits

    @property
    def levels(self) -> int:
        """Largest momentum code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def legal(self) -> tuple[tuple[int, int], ...]:
        """Ranges of accum's values, in rising order: the momentum code below -levels is none."""
        illegal = -(self.levels + 1) << self.bits  # and the cell - 1 after it
        if self.bits == 4:  # read as unsigned
            return ((0, 127), (illegal + 256 + self.cell, 255))
        return ((illegal + self.cell, 32767),)

    def split(self, accum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """accum (N, K) -> residual, momentum code: signed integers (N, K)."""
        signed = accum.view(torch.int8) if self.bits == 4 else accum
        return (signed << self.bits) >> self.bits, signed >> self.bits

    def join(self, residual: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
        joined = (momentum << self.bits) | (residual & (self.cell - 1))
        return joined.view(torch.uint8) if self.bits == 4 else joined
