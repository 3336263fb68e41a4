"""The update rules as objects: each moves a matrix's integer state, in place, by its gradient dW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from arb_kernels.formats.rule_states import CorrelationState, FlipState, MomentumState
from arb_kernels.rules.correlation import correlation_update
from arb_kernels.rules.flip import flip_update
from arb_kernels.rules.momentum import momentum_update
from arb_kernels.rules.sparse_momentum import sparse_momentum_update
from modeling_arb.layers.ternary_matrix import TernaryMatrix
from modeling_arb.layers.ternary_table import TernaryTable


@dataclass(frozen=True)
class UpdateContext:
    """What a rule needs besides the matrix and its gradient."""

    step: int
    key: int  # of the random bits of this matrix in this step
    lr: float  # thirds of the latent line per step


class UpdateRule(Protocol):
    """Moves matrices by their gradients."""

    def update(self, matrix: TernaryMatrix, dW: torch.Tensor, context: UpdateContext) -> torch.Tensor:
        """Move the matrix by the step's mean gradient dW (N, K), in place; returns the number of changed levels,
        int64 ()."""
        ...


class TableRule(Protocol):
    """Moves the touched rows of tables by their gradients."""

    def update_rows(
        self, table: TernaryTable, row_ids: torch.Tensor, dW: torch.Tensor, context: UpdateContext
    ) -> torch.Tensor:
        """Move rows row_ids (R,), each named once, by their mean gradient dW (R, K), in place; returns as `update`."""
        ...


LARGEST_RATE = 1.0  # thirds of the latent line per step
TABLE_RATE = 4.0  # a row is touched by few steps, and goes further in each (LOG.md)


@dataclass(frozen=True)
class MomentumRule:
    """beta: decay of the momentum per step. Rows of tables move at TABLE_RATE times the rate."""

    beta: float = 0.9

    def update(self, matrix: TernaryMatrix, dW: torch.Tensor, context: UpdateContext) -> torch.Tensor:
        state = MomentumState(matrix.T_packed, matrix.accum, matrix.accum_exp)
        return momentum_update(state, dW, context.key, context.lr, self.beta)

    def update_rows(
        self, table: TernaryTable, row_ids: torch.Tensor, dW: torch.Tensor, context: UpdateContext
    ) -> torch.Tensor:
        state = MomentumState(table.T_packed, table.accum, table.accum_exp)
        rate = min(TABLE_RATE * context.lr, LARGEST_RATE)
        return sparse_momentum_update(state, row_ids, dW, context.key, rate, self.beta)


@dataclass(frozen=True)
class FlipRule:
    """threshold in votes; scale_update_interval: steps between votes on the exponents, 0: no votes."""

    threshold: int = 32
    scale_update_interval: int = 1

    def _votes_on_scale(self, context: UpdateContext) -> bool:
        return self.scale_update_interval > 0 and context.step % self.scale_update_interval == 0

    def update(self, matrix: TernaryMatrix, dW: torch.Tensor, context: UpdateContext) -> torch.Tensor:
        state = FlipState(matrix.T_packed, matrix.E, matrix.T_accum, matrix.E_accum)
        return flip_update(state, dW, matrix.group_size, self.threshold, self._votes_on_scale(context))

    def update_rows(
        self, table: TernaryTable, row_ids: torch.Tensor, dW: torch.Tensor, context: UpdateContext
    ) -> torch.Tensor:
        state = FlipState(table.T_packed, table.E, table.T_accum, table.E_accum)
        rows = FlipState(*(tensor[row_ids] for tensor in state))
        flips = flip_update(rows, dW, table.group_size, self.threshold, self._votes_on_scale(context))
        for tensor, new in zip(state, rows, strict=True):
            tensor[row_ids] = new
        return flips


@dataclass(frozen=True)
class CorrelationRule:
    """Every step is one vote; trits do not move."""

    def update(self, matrix: TernaryMatrix, dW: torch.Tensor, context: UpdateContext) -> torch.Tensor:
        state = CorrelationState(matrix.T_packed, matrix.corr_accum, matrix.step_counter)
        correlation_update(state, dW, matrix.group_size)
        return torch.zeros((), dtype=torch.int64, device=dW.device)

    def update_rows(
        self, table: TernaryTable, row_ids: torch.Tensor, dW: torch.Tensor, context: UpdateContext
    ) -> torch.Tensor:
        state = CorrelationState(table.T_packed, table.corr_accum, table.step_counter)
        rows = CorrelationState(*(tensor[row_ids] for tensor in state))
        correlation_update(rows, dW, table.group_size)
        table.corr_accum[row_ids], table.step_counter[row_ids] = rows.corr_accum, rows.step_counter
        return torch.zeros((), dtype=torch.int64, device=dW.device)
