"""Votes by group on Triton: what the flip and the correlation rule share. A unit is a group of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch

from arb_kernels.triton_support import ceil_div, digit_of, jit, launch, power_of_two_from, tl

_GROUP_COLUMNS, _ELEMENTS = 128, 2048


class VoteShape(NamedTuple):
    """The shape of a matrix in groups; a kernel's argument `shape`."""

    units: int
    columns: int
    width: int  # bytes of a packed row
    groups: int  # of a row
    group_size: int


@jit
def program_units(shape, BU: tl.constexpr):
    """The BU units of this program: their numbers int64 [BU], a mask, and their rows int64 [BU, 1]."""
    unit = tl.program_id(0).to(tl.int64) * BU + tl.arange(0, BU)
    return unit, unit < shape.units, (unit // shape.groups)[:, None]


@jit
def unit_columns(shape, unit, in_units, start, BC: tl.constexpr):
    """BC columns of each unit, from `start` in its group: int32 [BU, BC], and a mask."""
    place = start + tl.arange(0, BC)
    column = ((unit % shape.groups).to(tl.int32) * shape.group_size)[:, None] + place[None, :]
    return column, in_units[:, None] & (place < shape.group_size)[None, :] & (column < shape.columns)


@jit
def sign_of(x):
    """int32 in {-1, 0, 1}; NaN gives 0."""
    return (x > 0).to(tl.int32) - (x < 0).to(tl.int32)


@jit
def trits_at(packed_ptr, row, column, mask, width):
    """int32 [R, C], zero outside the mask, as all digits of byte 0 are. row int64 [R, 1], column [R, C] or [1, C]."""
    b_packed = tl.load(packed_ptr + row * width + column % width, mask=mask, other=0)
    return digit_of(b_packed, column // width)


def launch_votes(kernel, state: tuple, dW: torch.Tensor, groups: int, group_size: int, **options) -> None:
    """Run kernel(*state, dW, shape, *, BU, BC, options) over the groups of a matrix; state: packed trits first."""
    rows, columns = dW.shape
    tile_columns = min(power_of_two_from(group_size), _GROUP_COLUMNS)
    tile_units = _ELEMENTS // tile_columns
    shape = VoteShape(rows * groups, columns, state[0].shape[1], groups, group_size)
    grid = (ceil_div(shape.units, tile_units),)
    launch(kernel, grid, *state, dW, shape, BU=tile_units, BC=tile_columns, **options)
