"""The momentum rule (momentum.py) on Triton: four passes over dW and state, no float temporary beyond a tile.

fold:    requantises the momentum of a block of 64 columns; the largest |direction| of each row and column
squares: sums of the direction's squares by row and column, each in its own fixed point; scales are computed from them
power:   the sum of squares of the update before it is set to unit RMS
move:    moves the latents; works on bytes of five trits, one run of columns after the other

Each pass recomputes the direction from state and dW, which is cheaper than storing it. Sums are integers, so the order
of atomics does not matter. Scalars stay on the device between passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.graph import increment_version

from arb_kernels.formats.exponents import HALF_OCTAVE_FRACTION, QUARTERS, power_table
from arb_kernels.formats.momentum_format import BLOCK as _BLOCK
from arb_kernels.formats.momentum_format import (
    MAX_UPDATE,
    STATISTIC_BITS,
    STATISTIC_OCTAVES,
    UPDATE_LIMIT,
    UPDATE_STEPS,
    rate_unit,
)
from arb_kernels.formats.packing import packed_width
from arb_kernels.formats.rule_states import MomentumState
from arb_kernels.triton_support import (
    ceil_div,
    clamp,
    constexpr,
    floor_to_int,
    jit,
    launch,
    level_of,
    magnitude_bits,
    random_words,
    round_half_even,
    signed_word,
    tl,
    uniform_high,
    uniform_low,
    whole_power_of_two,
)

BLOCK = constexpr(_BLOCK)
_BITS, _OCTAVES, _HALF_OCTAVE = map(constexpr, (STATISTIC_BITS, STATISTIC_OCTAVES, HALF_OCTAVE_FRACTION))
_STEPS, _LIMIT = constexpr(UPDATE_STEPS), constexpr(UPDATE_LIMIT)
_ABSMAX, _TOTAL, _POWER, _FLIPS = map(constexpr, range(4))  # places in the int64 scalars
_TILE_ROWS, _MOVE_ROWS, _MOVE_BYTES, _SCALES = 32, 8, 64, 1024


class _Operands(NamedTuple):
    """What every pass reads, its argument `of`: state, gradient, and the direction m * beta + dW * share."""

    accum: torch.Tensor
    accum_exp: torch.Tensor
    dW: torch.Tensor
    ids: torch.Tensor  # int64 (rows,): which rows of the state dW belongs to, if SPARSE; else anything
    power: torch.Tensor  # float32 (256,): 2^(e / 4) for e from -128
    rows: int  # of dW
    columns: int
    beta: float
    share: float


@jit
def _add_halves(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """[ROWS, 2 * HALF] -> [ROWS, HALF]"""
    low, high = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
    return low + high


@jit
def _sum_in_tree(x, ROWS: tl.constexpr):
    """[ROWS, 64] -> [ROWS], halves added to halves as the reference does."""
    x = _add_halves(x, ROWS, 32)
    x = _add_halves(x, ROWS, 16)
    x = _add_halves(x, ROWS, 8)
    x = _add_halves(x, ROWS, 4)
    x = _add_halves(x, ROWS, 2)
    return tl.reshape(_add_halves(x, ROWS, 1), (ROWS,))


@jit
def _covering_exponent(square):
    """quarter_octaves_covering. Subnormal squares are below the least exponent."""
    bits = square.to(tl.int32, bitcast=True)
    fraction = bits & 0x7FFFFF
    half_octaves = 2 * ((bits >> 23) - 127) + (fraction > 0).to(tl.int32) + (fraction > _HALF_OCTAVE).to(tl.int32)
    return tl.where(square > 0, clamp(half_octaves, 127), -127)


@jit
def _fixed_point_shift(absmax):
    """log2 of `fixed_point_scale`, from the bits of |direction|; subnormal numbers get the largest scale."""
    return tl.where(absmax > 0, clamp(_BITS + 126 - (absmax >> 23), 126), 0)


@jit
def _octaves_above_least(scalars_ptr, shift, limit):
    """By how many octaves a scale is finer than that of the largest row, 0 to `limit`."""
    least = _fixed_point_shift(tl.load(scalars_ptr + _ABSMAX).to(tl.int32))
    return tl.minimum(tl.maximum(shift - least, 0), limit)


@jit
def _state_rows(ids_ptr, local_row, mask, SPARSE: tl.constexpr):
    """Rows of state that the rows of dW belong to, int64."""
    if SPARSE:
        return tl.load(ids_ptr + local_row, mask=mask, other=0)
    else:
        return local_row.to(tl.int64)


@jit
def _momentum(accum, step, BITS: tl.constexpr):
    return ((accum << (32 - 2 * BITS)) >> (32 - BITS)).to(tl.float32) * step


@jit
def _over_root(numerator, total):
    """numerator / sqrt(total), float32 from an int64 total, each step correctly rounded; 0 where the total is 0."""
    return tl.where(total > 0, tl.div_rn(numerator, tl.sqrt_rn(tl.maximum(total, 1).to(tl.float32))), 0.0)


@jit
def _tile(of, SPARSE: tl.constexpr, BR: tl.constexpr):
    """This program's tile of BR rows and 64 columns: local rows, columns, masks of rows and elements, rows of state,
    pointers to accum and accum_exp, and dW."""
    i_block = tl.program_id(1)
    local_row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = i_block * BLOCK + tl.arange(0, BLOCK)
    in_rows = local_row < of.rows
    mask = in_rows[:, None] & (column < of.columns)[None, :]
    row = _state_rows(of.ids, local_row, in_rows, SPARSE)
    p_accum = of.accum + row[:, None] * of.columns + column[None, :]
    p_exp = of.accum_exp + row * tl.cdiv(of.columns, BLOCK) + i_block
    p_dW = of.dW + local_row.to(tl.int64)[:, None] * of.columns + column[None, :]
    return local_row, column, in_rows, mask, row, p_accum, p_exp, tl.load(p_dW, mask=mask, other=0.0)


@jit(do_not_specialize=["key"])
def momentum_fold_kernel(of, maxima_ptr, key, clip, BITS: tl.constexpr, SPARSE: tl.constexpr, BR: tl.constexpr):
    LEVELS: tl.constexpr = 2 ** (BITS - 1) - 1
    local_row, column, in_rows, mask, row, p_accum, p_exp, b_dW = _tile(of, SPARSE, BR)
    b_accum = tl.load(p_accum, mask=mask, other=0).to(tl.int32)
    step = tl.load(of.power + 128 + tl.load(p_exp, mask=in_rows, other=0).to(tl.int32))
    momentum = _momentum(b_accum, step[:, None], BITS) * of.beta + b_dW * of.share
    square_sum = _sum_in_tree(momentum * momentum, BR)
    length = tl.minimum(of.columns - tl.program_id(1) * BLOCK, BLOCK).to(tl.float32)
    exponent = _covering_exponent(tl.div_rn(square_sum, length + tl.zeros_like(square_sum)) * clip)
    inverse = tl.load(of.power + 128 - exponent)
    noise = uniform_low(random_words(key, row, column))
    code = floor_to_int(clamp(momentum * inverse[:, None] + noise, LEVELS * 1.0))
    b_accum = (code << BITS) | (b_accum & (2**BITS - 1))
    tl.store(p_accum, b_accum.to(of.accum.dtype.element_ty), mask=mask)
    tl.store(p_exp, exponent.to(tl.int8), mask=in_rows)
    step = tl.load(of.power + 128 + exponent)
    magnitude = magnitude_bits(_momentum(b_accum, step[:, None], BITS) * of.beta + b_dW * of.share)
    magnitude = tl.where(mask, magnitude, 0)
    tl.atomic_max(maxima_ptr + local_row, tl.max(magnitude, axis=1), mask=in_rows, sem="relaxed")
    in_columns = column < of.columns
    tl.atomic_max(maxima_ptr + of.rows + column, tl.max(magnitude, axis=0), mask=in_columns, sem="relaxed")


@jit
def _direction_tile(of, BITS, SPARSE, BR: tl.constexpr):
    """The direction of this program's tile, float32 [BR, 64], zero outside; local rows, columns and their masks."""
    local_row, column, in_rows, mask, _, p_accum, p_exp, b_dW = _tile(of, SPARSE, BR)
    b_accum = tl.load(p_accum, mask=mask, other=0).to(tl.int32)
    step = tl.load(of.power + 128 + tl.load(p_exp, mask=in_rows, other=0).to(tl.int32))
    direction = _momentum(b_accum, step[:, None], BITS) * of.beta + b_dW * of.share
    return direction, local_row, column, in_rows, column < of.columns


@jit
def _fixed_point_scale(absmax):
    return whole_power_of_two(_fixed_point_shift(absmax))


@jit
def _squares(fixed_point):
    steps = round_half_even(fixed_point).to(tl.int32)
    return (steps * steps).to(tl.int64)


@jit
def momentum_squares_kernel(of, maxima_ptr, sums_ptr, BITS: tl.constexpr, SPARSE: tl.constexpr, BR: tl.constexpr):
    direction, local_row, column, in_rows, in_columns = _direction_tile(of, BITS, SPARSE, BR)
    row_scale = _fixed_point_scale(tl.load(maxima_ptr + local_row, mask=in_rows, other=0))
    column_scale = _fixed_point_scale(tl.load(maxima_ptr + of.rows + column, mask=in_columns, other=0))
    of_rows = tl.sum(_squares(direction * row_scale[:, None]), axis=1)
    of_columns = tl.sum(_squares(direction * column_scale[None, :]), axis=0)
    tl.atomic_add(sums_ptr + local_row, of_rows, mask=in_rows, sem="relaxed")
    tl.atomic_add(sums_ptr + of.rows + column, of_columns, mask=in_columns, sem="relaxed")


@jit
def momentum_row_scales_kernel(maxima_ptr, sums_ptr, scales_ptr, scalars_ptr, rows, B: tl.constexpr):
    """Row sums -> factors of the direction along rows, and the total in the scale of the largest row."""
    row = tl.program_id(0) * B + tl.arange(0, B)
    shift = _fixed_point_shift(tl.load(maxima_ptr + row, mask=row < rows, other=0))
    row_sum = tl.load(sums_ptr + row, mask=row < rows, other=0)
    lost_bits = tl.minimum(2 * _octaves_above_least(scalars_ptr, shift, 126), 63)
    tl.atomic_add(scalars_ptr + _TOTAL, tl.sum(row_sum >> lost_bits.to(tl.int64)), sem="relaxed")
    tl.store(scales_ptr + row, _over_root(whole_power_of_two(shift), row_sum), mask=row < rows)


@jit
def momentum_column_scales_kernel(maxima_ptr, sums_ptr, scales_ptr, scalars_ptr, columns, B: tl.constexpr):
    """The same along columns."""
    column = tl.program_id(0) * B + tl.arange(0, B)
    shift = _fixed_point_shift(tl.load(maxima_ptr + column, mask=column < columns, other=0))
    octaves = _octaves_above_least(scalars_ptr, shift, _OCTAVES)
    root = tl.sqrt_rn(tl.load(scalars_ptr + _TOTAL).to(tl.float32)) + tl.zeros([B], tl.float32)
    ratio = _over_root(root, tl.load(sums_ptr + column, mask=column < columns, other=0))
    tl.store(scales_ptr + column, ratio * whole_power_of_two(octaves), mask=column < columns)


@jit
def momentum_power_kernel(
    of, scalars_ptr, row_scale_ptr, column_scale_ptr, BITS: tl.constexpr, SPARSE: tl.constexpr, BR: tl.constexpr
):
    direction, local_row, column, in_rows, in_columns = _direction_tile(of, BITS, SPARSE, BR)
    row_scale = tl.load(row_scale_ptr + local_row, mask=in_rows, other=0.0)
    column_scale = tl.load(column_scale_ptr + column, mask=in_columns, other=0.0)
    unit = direction * row_scale[:, None] * column_scale[None, :]
    tl.atomic_add(scalars_ptr + _POWER, tl.sum(_squares(clamp(unit * _STEPS, _LIMIT))), sem="relaxed")


@jit(do_not_specialize=["key"])
def momentum_move_kernel(
    packed_ptr,
    of,
    scalars_ptr,
    row_scale_ptr,
    column_scale_ptr,
    width,
    key,
    size_root,
    max_update,
    rate,
    BITS: tl.constexpr,
    TRITS: tl.constexpr,
    SPARSE: tl.constexpr,
    BR: tl.constexpr,
    BB: tl.constexpr,
):
    CELL: tl.constexpr = 2**BITS
    END: tl.constexpr = (3**TRITS * CELL) // 2
    local_row = tl.program_id(0) * BR + tl.arange(0, BR)
    i_byte = tl.program_id(1) * BB + tl.arange(0, BB)
    in_rows = local_row < of.rows
    row = _state_rows(of.ids, local_row, in_rows, SPARSE)
    p_packed = packed_ptr + row[:, None] * (TRITS * width) + i_byte[None, :]
    byte_mask = in_rows[:, None] & (i_byte < width)[None, :]
    old_byte = tl.load(p_packed, mask=byte_mask, other=0)
    old_second = old_byte
    if TRITS == 2:
        old_second = tl.load(p_packed + width, mask=byte_mask, other=0)
    row_scale = tl.load(row_scale_ptr + local_row, mask=in_rows, other=0.0)
    inverse_rms = _over_root(tl.full((), 1.0, tl.float32), tl.load(scalars_ptr + _POWER)) * size_root

    new_byte = tl.zeros([BR, BB], tl.int32)
    new_second = tl.zeros([BR, BB], tl.int32)
    flips = tl.zeros([BR, BB], tl.int32)
    for backwards in tl.static_range(5):
        plane = 4 - backwards
        column = plane * width + i_byte
        in_columns = (column < of.columns) & (i_byte < width)
        mask = in_rows[:, None] & in_columns[None, :]
        p_accum = of.accum + row[:, None] * of.columns + column[None, :]
        b_accum = tl.load(p_accum, mask=mask, other=0).to(tl.int32)
        p_dW = of.dW + local_row.to(tl.int64)[:, None] * of.columns + column[None, :]
        b_dW = tl.load(p_dW, mask=mask, other=0.0)
        p_exp = of.accum_exp + row[:, None] * tl.cdiv(of.columns, BLOCK) + (column // BLOCK)[None, :]
        step = tl.load(of.power + 128 + tl.load(p_exp, mask=mask, other=0).to(tl.int32))
        direction = _momentum(b_accum, step, BITS) * of.beta + b_dW * of.share

        column_scale = tl.load(column_scale_ptr + column, mask=in_columns, other=0.0)
        unit = direction * row_scale[:, None] * column_scale[None, :]
        noise = uniform_high(random_words(key, row, column))
        shift = floor_to_int(clamp(unit * inverse_rms, max_update) * rate + noise)
        old_level = level_of(old_byte, old_second, plane, TRITS)
        residual = (b_accum << (32 - BITS)) >> (32 - BITS)
        latent = tl.minimum(tl.maximum(shift + old_level * CELL + residual, -END), END - 1)
        level = tl.where(mask, (latent + CELL // 2) >> BITS, 0)
        b_accum = (b_accum & -CELL) | ((latent - level * CELL) & (CELL - 1))
        tl.store(p_accum, b_accum.to(of.accum.dtype.element_ty), mask=mask)
        flips += (mask & (level != old_level)).to(tl.int32)
        trit = level
        if TRITS == 2:
            trit = (level + 4) // 3 - 1
            second = level - 3 * trit
            new_second = new_second * 3 + tl.where(second < 0, 2, second)
        new_byte = new_byte * 3 + tl.where(trit < 0, 2, trit)
    tl.store(p_packed, new_byte.to(tl.uint8), mask=byte_mask)
    if TRITS == 2:
        tl.store(p_packed + width, new_second.to(tl.uint8), mask=byte_mask)
    tl.atomic_add(scalars_ptr + _FLIPS, tl.sum(flips).to(tl.int64), sem="relaxed")


def triton_momentum_update(
    state: MomentumState, dW: torch.Tensor, key: int, lr: float, beta: float = 0.9, row_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """`momentum_update`, in place; dW float32 (N, K). Returns the number of changed levels, int64 ().

    row_ids: int64 (R,), each row at most once: dW is (R, K) and belongs to these rows of the state, of a matrix of any
    height; no other row is read or written.
    """
    for tensor in (*state, row_ids):
        assert tensor is None or tensor.is_contiguous()
    dW = dW.contiguous()
    (rows, columns), form, trits = dW.shape, state.form, state.trits
    width = packed_width(columns)
    scalars = torch.zeros(4, dtype=torch.int64, device=dW.device)
    sums = torch.zeros(rows + columns, dtype=torch.int64, device=dW.device)
    maxima = torch.zeros(rows + columns, dtype=torch.int32, device=dW.device)
    scales = torch.empty(rows + columns, device=dW.device)
    ids, power = state.accum if row_ids is None else row_ids, power_table(QUARTERS, dW.device)
    of = _Operands(state.accum, state.accum_exp, dW, ids, power, rows, columns, beta, 1 - beta)
    options = {"BITS": form.bits, "SPARSE": row_ids is not None, "BR": _TILE_ROWS}
    grid = (ceil_div(rows, _TILE_ROWS), state.accum_exp.shape[1])
    launch(momentum_fold_kernel, grid, of, maxima, signed_word(key), form.clip, **options)
    scalars[0] = maxima[:rows].amax()
    launch(momentum_squares_kernel, grid, of, maxima, sums, **options)
    of_rows, of_columns = ([x[part] for x in (maxima, sums, scales)] for part in (slice(rows), slice(rows, None)))
    launch(momentum_row_scales_kernel, (ceil_div(rows, _SCALES),), *of_rows, scalars, rows, B=_SCALES)
    launch(momentum_column_scales_kernel, (ceil_div(columns, _SCALES),), *of_columns, scalars, columns, B=_SCALES)
    launch(momentum_power_kernel, grid, of, scalars, scales[:rows], scales[rows:], **options)
    launch(
        momentum_move_kernel,
        (ceil_div(rows, _MOVE_ROWS), ceil_div(width, _MOVE_BYTES)),
        *(state.T_packed, of, scalars, scales[:rows], scales[rows:], width, signed_word(key)),
        *(UPDATE_STEPS * dW.numel() ** 0.5, MAX_UPDATE, -lr * rate_unit(form.cell, trits)),
        **(options | {"TRITS": trits, "BR": _MOVE_ROWS, "BB": _MOVE_BYTES}),
    )
    increment_version(tuple(state))
    return scalars[-1]
