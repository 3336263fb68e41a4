"""The correlation rule of correlation_update.py on Triton: votes from dW, or from the two factors of dW.

The second way makes a tile of dW = grad_y^T @ x in registers, takes its signs and drops it: dW is never written. Its
sums over tokens are float32 in an order of their own, so a sign may differ from the one of another matmul's dW where
that dW is all but zero; where the sums are exact, the votes are equal.
"""

from __future__ import annotations

import torch

from arb_kernels.triton_support import ceil_div, digit_of, jit, launch, power_of_two_from, tl

_GROUP_COLUMNS, _VOTES_ELEMENTS = 128, 2048
_TILE_ROWS, _TILE_COLUMNS, _TILE_TOKENS = 64, 64, 32


@jit
def _agreement(packed_ptr, row, column, dW, mask, width):
    """sign(dW) * trit, int32 [R, C], zero outside the mask. row int64 [R, 1], column [R, C] or [1, C]."""
    b_packed = tl.load(packed_ptr + row * width + column % width, mask=mask, other=0)
    sign = (dW > 0).to(tl.int32) - (dW < 0).to(tl.int32)
    return tl.where(mask, sign * digit_of(b_packed, column // width), 0)


@jit
def correlation_votes_kernel(
    packed_ptr,
    corr_ptr,
    dW_ptr,
    new_corr_ptr,
    units,
    columns,
    width,
    groups,
    group_size,
    BU: tl.constexpr,
    BC: tl.constexpr,
):
    """A unit is a group of a row; BU units, BC columns of each at a time."""
    unit = tl.program_id(0).to(tl.int64) * BU + tl.arange(0, BU)
    in_units = unit < units
    row = (unit // groups)[:, None]
    first = (unit % groups).to(tl.int32) * group_size
    votes = tl.zeros([BU], tl.int32)
    for start in range(0, group_size, BC):
        place = start + tl.arange(0, BC)
        column = first[:, None] + place[None, :]
        mask = in_units[:, None] & (place < group_size)[None, :] & (column < columns)
        b_dW = tl.load(dW_ptr + row * columns + column, mask=mask, other=0.0)
        votes += tl.sum(_agreement(packed_ptr, row, column, b_dW, mask, width), axis=1)
    corr = tl.load(corr_ptr + unit, mask=in_units, other=0)
    tl.store(new_corr_ptr + unit, corr - votes.to(tl.int64), mask=in_units)


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
    agreement = _agreement(packed_ptr, row_64, column[None, :], dW, mask, width)
    votes = tl.sum(tl.reshape(agreement, (BN, GROUPS, PLACES)), axis=2)
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)) // parts
    p_corr = corr_ptr + row_64 * groups + group[None, :]
    tl.atomic_add(p_corr, -votes.to(tl.int64), mask=(row < N)[:, None] & (group < groups)[None, :], sem="relaxed")


def triton_correlation_update(
    packed: torch.Tensor, corr_accum: torch.Tensor, step_counter: torch.Tensor, dW: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`correlation_update`: packed uint8 (N, ceil(K/5)), corr_accum int64 (N, groups), step_counter int64 (), dW
    float32 (N, K) -> the new corr_accum, step_counter."""
    (rows, columns), groups = dW.shape, corr_accum.shape[1]
    packed, corr_accum = packed.contiguous(), corr_accum.contiguous()
    new_corr = torch.empty_like(corr_accum)
    tile_columns = min(power_of_two_from(group_size), _GROUP_COLUMNS)
    tile_units = _VOTES_ELEMENTS // tile_columns
    launch(
        correlation_votes_kernel,
        (ceil_div(rows * groups, tile_units),),
        *(packed, corr_accum, dW.contiguous(), new_corr),
        *(rows * groups, columns, packed.shape[1], groups, group_size),
        BU=tile_units,
        BC=tile_columns,
    )
    return new_corr, step_counter + 1


def triton_correlation_update_from_factors(
    packed: torch.Tensor,
    corr_accum: torch.Tensor,
    step_counter: torch.Tensor,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_correlation_update` for dW = grad_y^T @ x, which is never written. grad_y (M, N), x (M, K), of one dtype,
    float32 or a half format -> the new corr_accum, step_counter."""
    grad_y, x = grad_y.contiguous(), x.contiguous()
    (M, N), columns, groups = grad_y.shape, x.shape[1], corr_accum.shape[1]
    new_corr = corr_accum.clone(memory_format=torch.contiguous_format)
    places = min(power_of_two_from(group_size), _TILE_COLUMNS)
    parts = ceil_div(group_size, places)
    tile_groups = _TILE_COLUMNS // places
    launch(
        correlation_factors_kernel,
        (ceil_div(N, _TILE_ROWS), ceil_div(groups * parts, tile_groups)),
        *(packed.contiguous(), new_corr, grad_y, x, M, N, columns, packed.shape[1], groups, group_size, parts),
        BN=_TILE_ROWS,
        BM=_TILE_TOKENS,
        GROUPS=tile_groups,
        PLACES=places,
    )
    return new_corr, step_counter + 1
