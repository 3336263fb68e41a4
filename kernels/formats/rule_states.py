"""The tensors that an update rule works on, by rule: fields have the names of state_layout."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .momentum_format import MomentumFormat
from .packing import trits_per_weight


class MomentumState(NamedTuple):
    """Of a matrix (N, K). accum holds residual and momentum code, accum_exp the step of a block of codes."""

    T_packed: torch.Tensor  # uint8 (N, bytes) levels, of one trit a weight or more
    accum: torch.Tensor  # uint8 (N, K), or int16 with momentum_bits 8
    accum_exp: torch.Tensor  # int8 (N, blocks)

    @property
    def form(self) -> MomentumFormat:
        """How accum holds two numbers a weight."""
        return MomentumFormat({torch.uint8: 4, torch.int16: 8}[self.accum.dtype])

    @property
    def trits(self) -> int:
        """Trits a weight."""
        return trits_per_weight(self.T_packed, self.accum.shape[1])


class FlipState(NamedTuple):
    """Of a matrix (N, K). The accumulators hold minus the sum of the votes since the last move."""

    T_packed: torch.Tensor  # uint8 (N, ceil(K / 5)) trits
    E: torch.Tensor  # int8 (N, groups) scale exponents
    T_accum: torch.Tensor  # int8 (N, K)
    E_accum: torch.Tensor  # int8 (N, groups)


class CorrelationState(NamedTuple):
    """Of a matrix (N, K). Trits do not move."""

    T_packed: torch.Tensor  # uint8 (N, ceil(K / 5)) trits
    corr_accum: torch.Tensor  # int64 (N, groups): minus the sum of sign(dW) * T over the group and over all votes
    step_counter: torch.Tensor  # int64 (), or (N, 1) in a table: how many votes there were


def overwrite(state: tuple[torch.Tensor, ...], new: tuple[torch.Tensor, ...]) -> None:
    """Copy the tensors of a new state over those of a state, in place."""
    for tensor, value in zip(state, new, strict=True):
        tensor.copy_(value)
