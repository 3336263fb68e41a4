"""Quantisation to int8 (quantise.py) on Triton, and the scales applied to an integer matmul's sums.

Maxima compare the bits of |x| as integers, which have the same order and put NaN on top. The largest value of a
gradient is the key of its random bits: the first kernel stores it on the device, the second reads it there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from arb_kernels.triton_support import (
    cast_float,
    ceil_div,
    clamp,
    floor_to_int,
    jit,
    launch,
    magnitude_bits,
    power_of_two_from,
    random_words,
    round_half_even,
    tl,
    uniform_high,
    uniform_low,
)

_TOKEN_COLUMNS, _TILE = 2048, 64


@jit
def _scale_of(absmax_bits):
    return absmax_bits.to(tl.float32, bitcast=True) * 0.007874015748031496


@jit
def _inverse_of(absmax_bits):
    """127 / absmax, 0 for a row of zeros and for NaN."""
    absmax = absmax_bits.to(tl.float32, bitcast=True)
    levels = tl.zeros_like(absmax) + 127.0
    return tl.where(absmax > 0, tl.div_rn(levels, tl.where(absmax > 0, absmax, 1.0)), 0.0)


@jit
def _round_to_int8(value, uniform):
    return floor_to_int(clamp(value + uniform, 127.0)).to(tl.int8)


@jit
def quantise_tokens_kernel(values_ptr, codes_ptr, scale_ptr, columns, BC: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BC], tl.int32)
    for start in range(0, columns, BC):
        column = start + tl.arange(0, BC)
        b_values = tl.load(values_ptr + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude_bits(b_values))
    absmax = tl.max(largest, axis=0)
    tl.store(scale_ptr + row, _scale_of(absmax))
    inverse = _inverse_of(absmax)
    for start in range(0, columns, BC):
        column = start + tl.arange(0, BC)
        b_values = tl.load(values_ptr + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        codes = round_half_even(b_values * inverse).to(tl.int32).to(tl.int8)
        tl.store(codes_ptr + row * columns + column, codes, mask=column < columns)


class _Gradient(NamedTuple):
    """What both kernels read, their argument `of`. Without a row factor only the codes by token are made."""

    gradient: torch.Tensor  # (M, N)
    column_factor: torch.Tensor  # float32 (N,)
    row_factor: torch.Tensor | None  # float32 (M,)
    token_max: torch.Tensor  # int32 (M,): bits of each row's largest magnitude, made by the first kernel, as these:
    column_max: torch.Tensor  # int32 (N,)
    key: torch.Tensor  # int32 (1,): the largest of all
    M: int
    N: int


@jit
def _gradient_tile(of, BY_COLUMN: tl.constexpr, B: tl.constexpr):
    """This program's tile: gradient times column factor and times row factor, [B, B] each, and its rows, columns."""
    row = tl.program_id(0) * B + tl.arange(0, B)
    column = tl.program_id(1) * B + tl.arange(0, B)
    mask = (row < of.M)[:, None] & (column < of.N)[None, :]
    address = row.to(tl.int64)[:, None] * of.N + column[None, :]
    b_gradient = tl.load(of.gradient + address, mask=mask, other=0.0).to(tl.float32)
    by_token = b_gradient * tl.load(of.column_factor + column, mask=column < of.N, other=0.0)[None, :]
    by_column = b_gradient
    if BY_COLUMN:
        by_column = b_gradient * tl.load(of.row_factor + row, mask=row < of.M, other=0.0)[:, None]
    return by_token, by_column, row, column, address, mask


@jit
def gradient_maxima_kernel(of, BY_COLUMN: tl.constexpr, B: tl.constexpr):
    by_token, by_column, row, column, _address, _mask = _gradient_tile(of, BY_COLUMN, B)
    token_max = tl.max(magnitude_bits(by_token), axis=1)
    tl.atomic_max(of.token_max + row, token_max, mask=row < of.M, sem="relaxed")
    tl.atomic_max(of.key, tl.max(token_max, axis=0), sem="relaxed")
    if BY_COLUMN:
        column_max = tl.max(magnitude_bits(by_column), axis=0)
        tl.atomic_max(of.column_max + column, column_max, mask=column < of.N, sem="relaxed")


@jit
def quantise_gradient_kernel(
    of,
    token_codes_ptr,
    token_scale_ptr,
    column_codes_ptr,
    column_scale_ptr,
    BY_COLUMN: tl.constexpr,
    B: tl.constexpr,
):
    by_token, by_column, row, column, address, mask = _gradient_tile(of, BY_COLUMN, B)
    words = random_words(tl.load(of.key), row, column)
    token_max = tl.load(of.token_max + row, mask=row < of.M, other=0)
    codes = _round_to_int8(by_token * _inverse_of(token_max)[:, None], uniform_low(words))
    tl.store(token_codes_ptr + address, codes, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(token_scale_ptr + row, _scale_of(token_max), mask=row < of.M)
    if BY_COLUMN:
        column_max = tl.load(of.column_max + column, mask=column < of.N, other=0)
        codes = _round_to_int8(by_column * _inverse_of(column_max)[None, :], uniform_high(words))
        transposed = column.to(tl.int64)[:, None] * of.M + row[None, :]
        tl.store(column_codes_ptr + transposed, tl.trans(codes), mask=tl.trans(mask))
        if tl.program_id(0) == 0:
            tl.store(column_scale_ptr + column, _scale_of(column_max), mask=column < of.N)


@jit
def scale_sums_kernel(
    sums_ptr, row_scale_ptr, column_scale_ptr, out_ptr, R, C, sums_stride, BR: tl.constexpr, BC: tl.constexpr
):
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (row < R)[:, None] & (column < C)[None, :]
    row_64 = row.to(tl.int64)[:, None]
    b_sums = tl.load(sums_ptr + row_64 * sums_stride + column[None, :], mask=mask, other=0)
    out = b_sums.to(tl.float32) * tl.load(row_scale_ptr + row, mask=row < R, other=0.0)[:, None]
    if column_scale_ptr is not None:
        out *= tl.load(column_scale_ptr + column, mask=column < C, other=0.0)[None, :]
    tl.store(out_ptr + row_64 * C + column[None, :], cast_float(out, out_ptr.dtype.element_ty), mask=mask)


def triton_quantise_tokens(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_tokens`: float32 (M, K) -> codes int8 (M, K), scale float32 (M,). Other floats are read as float32."""
    values = values.contiguous()
    codes = torch.empty_like(values, dtype=torch.int8)
    scale = torch.empty(len(values), device=values.device)
    columns = values.shape[1]
    tile = min(power_of_two_from(columns), _TOKEN_COLUMNS)
    launch(quantise_tokens_kernel, (len(values),), values, codes, scale, columns, BC=tile)
    return codes, scale


def triton_quantise_gradient(
    gradient: torch.Tensor, column_factor: torch.Tensor, row_factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`quantise_gradient`: float32 (M, N), factors float32 (N,) and (M,) -> by token int8 (M, N) and scale (M,), by
    column int8 (N, M) and scale (N,). Other floats are read as float32."""
    gradient, column_factor = gradient.contiguous(), column_factor.contiguous()
    (M, N), device = gradient.shape, gradient.device
    by_column = row_factor is not None
    row_factor = row_factor.contiguous() if by_column else None
    maxima = torch.zeros(M + N + 1, dtype=torch.int32, device=device)
    token_max, column_max, key = maxima.split([M, N, 1])
    token_codes, token_scale = torch.empty(M, N, dtype=torch.int8, device=device), torch.empty(M, device=device)
    column_codes = torch.empty(N, M, dtype=torch.int8, device=device) if by_column else None
    column_scale = torch.empty(N, device=device) if by_column else None
    of = _Gradient(gradient, column_factor, row_factor, token_max, column_max, key, M, N)
    grid = (ceil_div(M, _TILE), ceil_div(N, _TILE))
    launch(gradient_maxima_kernel, grid, of, BY_COLUMN=by_column, B=_TILE)
    outputs = (token_codes, token_scale, column_codes, column_scale)
    launch(quantise_gradient_kernel, grid, of, *outputs, BY_COLUMN=by_column, B=_TILE)
    return outputs


def triton_scale_sums(
    sums: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """int32 (R, C), rows at any stride; float32 (R,) and (C,) -> `dtype` (R, C): sums * row_scale * column_scale,
    rounded in float32 after each product and to `dtype` at the end."""
    assert sums.stride(1) == 1 or sums.shape[1] == 1
    R, C = sums.shape
    out = torch.empty(R, C, dtype=dtype, device=sums.device)
    launch(
        scale_sums_kernel,
        (ceil_div(R, _TILE), ceil_div(C, _TILE)),
        *(sums, row_scale.contiguous(), None if column_scale is None else column_scale.contiguous(), out),
        *(R, C, sums.stride(0)),
        BR=_TILE,
        BC=_TILE,
    )
    return out
