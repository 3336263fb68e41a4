"""The update rules as objects: each takes a matrix and its dW, and writes the matrix's new integer state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from arb_kernels.rules.correlation import correlation_update
from arb_kernels.rules.flip import flip_update
from arb_kernels.rules.momentum import momentum_update
from arb_kernels.rules.sparse_momentum import sparse_momentum_update
from modeling_arb.layers.ternary_matrix import TernaryMatrix
from modeling_arb.layers.ternary_table import TernaryTable


@dataclass(frozen=True)
class UpdateContext:
    """What a rule needs to know beside the matrix and its gradient."""

    step: int
    key: int  # of the random bits of this matrix in this step
    lr: float  # cells per step


class UpdateRule(Protocol):
    """update: moves a matrix by the whole step's mean gradient dW (N, K); returns how many trits changed."""

    def update(self, matrix: TernaryMatrix, dW: torch.Tensor, context: UpdateContext) -> torch.Tensor: ...


def _write(matrix: TernaryMatrix, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        getattr(matrix, name).copy_(tensor)


class TableRule(Protocol):
    """update_rows: the step's mean gradient dW (R, K) of rows row_ids (R,); returns how many trits changed."""

    def update_rows(
        self, table: TernaryTable, row_ids: torch.Tensor, dW: torch.Tensor, context: UpdateContext
    ) -> torch.Tensor: ...


LARGEST_RATE = 1.0  # cells per step
TABLE_RATE = 4.0  # a row is touched by few steps, and goes further in each (LOG.md)


@dataclass(frozen=True)
class MomentumRule:
    """lr in cells per step, TABLE_RATE times that for the rows of tables; beta decays the momentum once per step."""

    beta: float = 0.9

    def update(self, matrix: TernaryMatrix, dW: torch.Tensor, context: UpdateContext) -> torch.Tensor:
        return momentum_update(
            matrix.T_packed,
            matrix.accum,
            matrix.accum_exp,
            dW,
            context.key,
            context.lr,
            self.beta,
            bits=matrix.momentum_bits,
        )

    def update_rows(
        self, table: TernaryTable, row_ids: torch.Tensor, dW: torch.Tensor, context: UpdateContext
    ) -> torch.Tensor:
        return sparse_momentum_update(
            table.T_packed,
            table.accum,
            table.accum_exp,
            row_ids,
            dW,
            context.key,
            min(TABLE_RATE * context.lr, LARGEST_RATE),
            self.beta,
            table.momentum_bits,
        )


@dataclass(frozen=True)
class FlipRule:
    """threshold in votes; scale_update_interval: every how many steps the exponents are voted on (0: never)."""

    threshold: int = 32
    scale_update_interval: int = 1

    def _votes_on_scale(self, context: UpdateContext) -> bool:
        return self.scale_update_interval > 0 and context.step % self.scale_update_interval == 0

    def update(self, matrix: TernaryMatrix, dW: torch.Tensor, context: UpdateContext) -> torch.Tensor:
        packed, E, T_accum, E_accum, flips = flip_update(
            matrix.T_packed,
            matrix.E,
            matrix.T_accum,
            matrix.E_accum,
            dW,
            matrix.group_size,
            self.threshold,
            self._votes_on_scale(context),
        )
        _write(matrix, T_packed=packed, E=E, T_accum=T_accum, E_accum=E_accum)
        return flips

    def update_rows(
        self, table: TernaryTable, row_ids: torch.Tensor, dW: torch.Tensor, context: UpdateContext
    ) -> torch.Tensor:
        tensors = (table.T_packed, table.E, table.T_accum, table.E_accum)
        *rows, flips = flip_update(
            *(tensor[row_ids] for tensor in tensors),
            dW,
            table.group_size,
            self.threshold,
            self._votes_on_scale(context),
        )
        for tensor, new in zip(tensors, rows, strict=True):
            tensor[row_ids] = new
        return flips


@dataclass(frozen=True)
class CorrelationRule:
    """Every step is one vote, and no trit ever moves."""

    def update(self, matrix: TernaryMatrix, dW: torch.Tensor, context: UpdateContext) -> torch.Tensor:
        corr_accum, step_counter = correlation_update(
            matrix.T_packed, matrix.corr_accum, matrix.step_counter, dW, matrix.group_size
        )
        _write(matrix, corr_accum=corr_accum, step_counter=step_counter)
        return torch.zeros((), dtype=torch.int64, device=dW.device)

    def update_rows(
        self, table: TernaryTable, row_ids: torch.Tensor, dW: torch.Tensor, context: UpdateContext
    ) -> torch.Tensor:
        table.corr_accum[row_ids], table.step_counter[row_ids] = correlation_update(
            table.T_packed[row_ids], table.corr_accum[row_ids], table.step_counter[row_ids], dW, table.group_size
        )
        return torch.zeros((), dtype=torch.int64, device=dW.device)
