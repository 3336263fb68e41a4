"""The momentum rule for the touched rows of a table: reference and Triton kernel.

The dense rule is not a sum over rows: its norms span the matrix, and it decays and moves the momentum of rows without a
gradient. So this rule is the dense rule applied to the submatrix of the touched rows, as if the table had no others,
with the random bits of the rows' true places. Rows that are not touched keep levels, residuals and momentum. With every
row touched it is the dense rule.

The gradients of micro-batches are summed by row and applied once per step.
"""

from __future__ import annotations

import torch

from arb_kernels.backend import uses_triton
from arb_kernels.formats.rule_states import MomentumState

from .momentum import naive_momentum_update
from .momentum_triton import triton_momentum_update


def naive_sparse_momentum_update(
    state: MomentumState, row_ids: torch.Tensor, dW: torch.Tensor, key: int, lr: float, beta: float = 0.9
) -> tuple[MomentumState, torch.Tensor]:
    """`sparse_momentum_update` as a pure function: returns the touched rows of the new state, in the order of row_ids,
    and the number of changed levels."""
    touched = MomentumState(*(tensor[row_ids] for tensor in state))
    return naive_momentum_update(touched, dW, key, lr, beta, row_ids)


def sparse_momentum_update(
    state: MomentumState, row_ids: torch.Tensor, dW: torch.Tensor, key: int, lr: float, beta: float = 0.9
) -> torch.Tensor:
    """Fold and move the touched rows, in place; no other row is read.

    state: of the whole table, contiguous; row_ids: int64 (R,), each row once; dW: float32 (R, K), the step's mean
    gradient of those rows; lr: cells per step and trit. Returns the number of changed levels, int64 ().
    """
    if not row_ids.numel():
        return torch.zeros((), dtype=torch.int64, device=dW.device)
    if uses_triton(*state, dW, trits=state.trits):
        return triton_momentum_update(state, dW, key, lr, beta, row_ids.contiguous())
    rows, flips = naive_sparse_momentum_update(state, row_ids, dW, key, lr, beta)
    for tensor, new in zip(state, rows, strict=True):
        tensor[row_ids] = new
    return flips
