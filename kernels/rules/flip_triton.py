"""The flip rule (flip.py) on Triton.

votes: a program takes the groups of some rows, a group at a time, counts the votes on its trits and on its exponent,
and moves the exponent. move: shifts the trits that have reached the threshold, five to a byte. There are two kernels
because votes are stored by column and bytes by plane.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from arb_kernels.formats.rule_states import FlipState
from arb_kernels.triton_support import ceil_div, clamp, digit_of, jit, launch, tl

from .group_votes_triton import launch_votes, program_units, sign_of, trits_at, unit_columns

_MOVE_ROWS, _MOVE_BYTES = 16, 64


@jit
def flip_votes_kernel(
    packed_ptr,
    E_ptr,
    T_accum_ptr,
    E_accum_ptr,
    dW_ptr,
    shape,  # VoteShape
    threshold,
    SCALE_VOTES: tl.constexpr,
    BU: tl.constexpr,
    BC: tl.constexpr,
):
    """BU units, BC columns of each at a time."""
    unit, in_units, row = program_units(shape, BU)
    agreement = tl.zeros([BU], tl.int32)
    for start in range(0, shape.group_size, BC):
        column, mask = unit_columns(shape, unit, in_units, start, BC)
        address = row * shape.columns + column
        sign = sign_of(tl.load(dW_ptr + address, mask=mask, other=0.0))
        b_accum = tl.load(T_accum_ptr + address, mask=mask, other=0).to(tl.int32)
        tl.store(T_accum_ptr + address, clamp(b_accum - sign, 127).to(tl.int8), mask=mask)
        if SCALE_VOTES:
            agreement += tl.sum(sign * trits_at(packed_ptr, row, column, mask, shape.width), axis=1)
    E_accum = tl.load(E_accum_ptr + unit, mask=in_units, other=0).to(tl.int32)
    E_accum = clamp(E_accum - sign_of(agreement), 127)
    moved = tl.abs(E_accum) >= threshold
    E = tl.load(E_ptr + unit, mask=in_units, other=0).to(tl.int32)
    step = tl.where(moved, tl.where(E_accum > 0, 1, -1), 0)
    new_E = tl.minimum(tl.maximum(E + step, -128), 127)
    tl.store(E_ptr + unit, new_E.to(tl.int8), mask=in_units)
    tl.store(E_accum_ptr + unit, tl.where(moved, 0, E_accum).to(tl.int8), mask=in_units)


@jit
def flip_move_kernel(
    packed_ptr, T_accum_ptr, flips_ptr, rows, columns, width, threshold, BR: tl.constexpr, BB: tl.constexpr
):
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    i_byte = tl.program_id(1) * BB + tl.arange(0, BB)
    byte_mask = (row < rows)[:, None] & (i_byte < width)[None, :]
    p_packed = packed_ptr + row[:, None] * width + i_byte[None, :]
    old_byte = tl.load(p_packed, mask=byte_mask, other=0)
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
    tl.store(p_packed, new_byte.to(tl.uint8), mask=byte_mask)
    tl.atomic_add(flips_ptr, tl.sum(flips).to(tl.int64), sem="relaxed")


def triton_flip_update(
    state: FlipState, dW: torch.Tensor, group_size: int, threshold: int = 32, scale_votes: bool = True
) -> torch.Tensor:
    """`flip_update`, in place on contiguous tensors; dW float32 (N, K). Returns the number of changed trits."""
    assert all(tensor.is_contiguous() for tensor in state)
    dW, groups = dW.contiguous(), state.E.shape[1]
    options = {"threshold": threshold, "SCALE_VOTES": scale_votes}
    launch_votes(flip_votes_kernel, state, dW, groups, group_size, **options)
    (rows, columns), width = dW.shape, state.T_packed.shape[1]
    flips = torch.zeros((), dtype=torch.int64, device=dW.device)
    launch(
        flip_move_kernel,
        (ceil_div(rows, _MOVE_ROWS), ceil_div(width, _MOVE_BYTES)),
        *(state.T_packed, state.T_accum, flips, rows, columns, width, threshold),
        BR=_MOVE_ROWS,
        BB=_MOVE_BYTES,
    )
    increment_version(tuple(state))
    return flips
