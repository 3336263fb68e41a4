"""The flip rule of flip_update.py on Triton.

votes: a program takes the groups of some rows, a group at a time, counts the votes on its trits and on its exponent,
and moves the exponent. move: shifts the trits that have reached the threshold, five to
a byte. The votes lie in columns, the bytes in planes, hence two kernels.
"""

from __future__ import annotations

import torch

from arb_kernels.triton_support import ceil_div, clamp, digit_of, jit, launch, power_of_two_from, tl

_GROUP_COLUMNS, _VOTES_ELEMENTS = 128, 2048
_MOVE_ROWS, _MOVE_BYTES = 16, 64


@jit
def flip_votes_kernel(
    packed_ptr,
    E_ptr,
    T_accum_ptr,
    E_accum_ptr,
    dW_ptr,
    new_E_ptr,
    new_T_accum_ptr,
    new_E_accum_ptr,
    units,
    columns,
    width,
    groups,
    group_size,
    threshold,
    SCALE_VOTES: tl.constexpr,
    BU: tl.constexpr,
    BC: tl.constexpr,
):
    """A unit is a group of a row; BU units, BC columns of each at a time."""
    unit = tl.program_id(0).to(tl.int64) * BU + tl.arange(0, BU)
    in_units = unit < units
    row = unit // groups
    first = (unit % groups).to(tl.int32) * group_size
    agreement = tl.zeros([BU], tl.int32)
    for start in range(0, group_size, BC):
        place = start + tl.arange(0, BC)
        column = first[:, None] + place[None, :]
        mask = in_units[:, None] & (place < group_size)[None, :] & (column < columns)
        address = row[:, None] * columns + column
        b_dW = tl.load(dW_ptr + address, mask=mask, other=0.0)
        sign = (b_dW > 0).to(tl.int32) - (b_dW < 0).to(tl.int32)
        b_accum = tl.load(T_accum_ptr + address, mask=mask, other=0).to(tl.int32)
        tl.store(new_T_accum_ptr + address, clamp(b_accum - sign, 127).to(tl.int8), mask=mask)
        if SCALE_VOTES:
            b_packed = tl.load(packed_ptr + row[:, None] * width + column % width, mask=mask, other=0)
            agreement += tl.sum(sign * digit_of(b_packed, column // width), axis=1)
    vote = (agreement > 0).to(tl.int32) - (agreement < 0).to(tl.int32)
    E_accum = clamp(tl.load(E_accum_ptr + unit, mask=in_units, other=0).to(tl.int32) - vote, 127)
    moved = tl.abs(E_accum) >= threshold
    E = tl.load(E_ptr + unit, mask=in_units, other=0).to(tl.int32)
    step = tl.where(moved, tl.where(E_accum > 0, 1, -1), 0)
    new_E = tl.minimum(tl.maximum(E + step, -128), 127)
    tl.store(new_E_ptr + unit, new_E.to(tl.int8), mask=in_units)
    tl.store(new_E_accum_ptr + unit, tl.where(moved, 0, E_accum).to(tl.int8), mask=in_units)


@jit
def flip_move_kernel(
    packed_ptr,
    new_packed_ptr,
    T_accum_ptr,
    flips_ptr,
    rows,
    columns,
    width,
    threshold,
    BR: tl.constexpr,
    BB: tl.constexpr,
):
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    i_byte = tl.program_id(1) * BB + tl.arange(0, BB)
    byte_mask = (row < rows)[:, None] & (i_byte < width)[None, :]
    bytes_of_row = row[:, None] * width + i_byte[None, :]
    old_byte = tl.load(packed_ptr + bytes_of_row, mask=byte_mask, other=0)
    new_byte = tl.zeros([BR, BB], tl.int32)
    flips = tl.zeros([BR, BB], tl.int32)
    for backwards in tl.static_range(5):
        plane = 4 - backwards
        column = plane * width + i_byte
        mask = byte_mask & (column < columns)[None, :]
        p_accum = T_accum_ptr + row[:, None] * columns + column[None, :]
        votes = tl.load(p_accum, mask=mask, other=0).to(tl.int32)
        moved = mask & (tl.abs(votes) >= threshold)
        old_trit = tl.where(mask, digit_of(old_byte, plane), 0)
        trit = clamp(old_trit + tl.where(moved, tl.where(votes > 0, 1, -1), 0), 1)
        tl.store(p_accum, tl.zeros([BR, BB], tl.int8), mask=moved)
        flips += (trit != old_trit).to(tl.int32)
        new_byte = new_byte * 3 + tl.where(trit < 0, 2, trit)
    tl.store(new_packed_ptr + bytes_of_row, new_byte.to(tl.uint8), mask=byte_mask)
    tl.atomic_add(flips_ptr, tl.sum(flips).to(tl.int64), sem="relaxed")


def triton_flip_update(
    packed: torch.Tensor,
    E: torch.Tensor,
    T_accum: torch.Tensor,
    E_accum: torch.Tensor,
    dW: torch.Tensor,
    group_size: int,
    threshold: int = 32,
    scale_votes: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`flip_update`: packed uint8 (N, ceil(K/5)), E and E_accum int8 (N, groups), T_accum int8 (N, K), dW float32
    (N, K) -> the new packed, E, T_accum, E_accum and the number of changed trits, int64 ()."""
    (rows, columns), width, groups = dW.shape, packed.shape[1], E_accum.shape[1]
    packed, E, T_accum, E_accum, dW = (tensor.contiguous() for tensor in (packed, E, T_accum, E_accum, dW))
    new_E, new_T_accum, new_E_accum = map(torch.empty_like, (E, T_accum, E_accum))
    tile_columns = min(power_of_two_from(group_size), _GROUP_COLUMNS)
    tile_units = _VOTES_ELEMENTS // tile_columns
    launch(
        flip_votes_kernel,
        (ceil_div(rows * groups, tile_units),),
        *(packed, E, T_accum, E_accum, dW, new_E, new_T_accum, new_E_accum),
        *(rows * groups, columns, width, groups, group_size, threshold),
        SCALE_VOTES=scale_votes,
        BU=tile_units,
        BC=tile_columns,
    )
    new_packed = torch.empty_like(packed)
    flips = torch.zeros((), dtype=torch.int64, device=dW.device)
    launch(
        flip_move_kernel,
        (ceil_div(rows, _MOVE_ROWS), ceil_div(width, _MOVE_BYTES)),
        *(packed, new_packed, new_T_accum, flips, rows, columns, width, threshold),
        BR=_MOVE_ROWS,
        BB=_MOVE_BYTES,
    )
    return new_packed, new_E, new_T_accum, new_E_accum, flips
