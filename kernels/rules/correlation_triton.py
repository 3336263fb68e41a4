"""The correlation rule (correlation.py) on Triton: votes from dW, or from the two factors of dW.

The second kernel computes a tile of dW = grad_y^T @ x in registers, takes its signs and drops it: dW is never written.
Its float32 sums over tokens have an order of their own, so where dW is nearly zero a sign may differ from that of
another matmul's dW; where the sums are exact, the votes are equal.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from arb_kernels.formats.rule_states import CorrelationState
from arb_kernels.triton_support import ceil_div, jit, launch, power_of_two_from, tl

from .group_votes_triton import launch_votes, program_units, sign_of, trits_at, unit_columns

_TILE_ROWS, _TILE_COLUMNS, _TILE_TOKENS = 64, 64, 32


@jit
def correlation_votes_kernel(packed_ptr, corr_ptr, dW_ptr, shape, BU: tl.constexpr, BC: tl.constexpr):
    """BU units, BC columns of each at a time. shape: VoteShape."""
    unit, in_units, row = program_units(shape, BU)
    votes = tl.zeros([BU], tl.int32)
    for start in range(0, shape.group_size, BC):
        column, mask = unit_columns(shape, unit, in_units, start, BC)
        sign = sign_of(tl.load(dW_ptr + row * shape.columns + column, mask=mask, other=0.0))
        votes += tl.sum(sign * trits_at(packed_ptr, row, column, mask, shape.width), axis=1)
    corr = tl.load(corr_ptr + unit, mask=in_units, other=0)
    tl.store(corr_ptr + unit, corr - votes.to(tl.int64), mask=in_units)


@jit
def correlation_factors_kernel(
    packed_ptr,
    corr_ptr,
    grad_y_ptr,
    x_ptr,
    M,
    N,
    columns,
    width,
    groups,
    group_size,
    parts,
    BN: tl.constexpr,
    BM: tl.constexpr,
    GROUPS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """A tile of BN rows and GROUPS parts of PLACES columns: a group has `parts` of them, summed by the atomics."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    i_column = tl.arange(0, GROUPS * PLACES)
    i_part = tl.program_id(1) * GROUPS + i_column // PLACES
    place = (i_part % parts) * PLACES + i_column % PLACES
    column = (i_part // parts) * group_size + place
    in_columns = (place < group_size) & (column < columns)
    dW = tl.zeros([BN, GROUPS * PLACES], tl.float32)
    for start in range(0, M, BM):
        token = start + tl.arange(0, BM)
        token_64 = token.to(tl.int64)[:, None]
        gradient_mask = (token < M)[:, None] & (row < N)[None, :]
        b_grad_y = tl.load(grad_y_ptr + token_64 * N + row[None, :], mask=gradient_mask, other=0.0)
        x_mask = (token < M)[:, None] & in_columns[None, :]
        b_x = tl.load(x_ptr + token_64 * columns + column[None, :], mask=x_mask, other=0.0)
        dW = tl.dot(tl.trans(b_grad_y), b_x, dW, input_precision="ieee")
    mask = (row < N)[:, None] & in_columns[None, :]
    row_64 = row.to(tl.int64)[:, None]
    agreement = sign_of(dW) * trits_at(packed_ptr, row_64, column[None, :], mask, width)
    votes = tl.sum(tl.reshape(agreement, (BN, GROUPS, PLACES)), axis=2)
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)) // parts
    p_corr = corr_ptr + row_64 * groups + group[None, :]
    tl.atomic_add(p_corr, -votes.to(tl.int64), mask=(row < N)[:, None] & (group < groups)[None, :], sem="relaxed")


def triton_correlation_update(state: CorrelationState, dW: torch.Tensor, group_size: int) -> None:
    """`correlation_update`, in place on contiguous tensors; dW float32 (N, K)."""
    assert all(tensor.is_contiguous() for tensor in state)
    votes = (state.T_packed, state.corr_accum)
    launch_votes(correlation_votes_kernel, votes, dW.contiguous(), state.corr_accum.shape[1], group_size)
    increment_version(state.corr_accum)
    state.step_counter.add_(1)


def triton_correlation_update_from_factors(
    state: CorrelationState, grad_y: torch.Tensor, x: torch.Tensor, group_size: int
) -> None:
    """`triton_correlation_update` for dW = grad_y^T @ x, which is never written. grad_y (M, N), x (M, K), of one dtype,
    float32 or a half format."""
    assert all(tensor.is_contiguous() for tensor in state)
    grad_y, x = grad_y.contiguous(), x.contiguous()
    (M, N), columns, groups = grad_y.shape, x.shape[1], state.corr_accum.shape[1]
    places = min(power_of_two_from(group_size), _TILE_COLUMNS)
    parts = ceil_div(group_size, places)
    tile_groups = _TILE_COLUMNS // places
    launch(
        correlation_factors_kernel,
        (ceil_div(N, _TILE_ROWS), ceil_div(groups * parts, tile_groups)),
        *(state.T_packed, state.corr_accum, grad_y, x),
        *(M, N, columns, state.T_packed.shape[1], groups, group_size, parts),
        BN=_TILE_ROWS,
        BM=_TILE_TOKENS,
        GROUPS=tile_groups,
        PLACES=places,
    )
    increment_version(state.corr_accum)
    state.step_counter.add_(1)
