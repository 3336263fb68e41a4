"""The gradient sum (gradient_sum.py) on Triton: a program adds rows of one block of 64 columns."""

from __future__ import annotations

import torch

from arb_kernels.formats.gradient_sum_format import BEYOND_127, EXPONENT_OFFSET, LARGEST_EXPONENT, LEAST_EXPONENT
from arb_kernels.formats.gradient_sum_format import BLOCK as _BLOCK
from arb_kernels.triton_support import (
    ceil_div,
    clamp,
    constexpr,
    floor_to_int,
    jit,
    launch,
    magnitude_bits,
    random_words,
    signed_word,
    tl,
    uniform_low,
    whole_power_of_two,
)

BLOCK = constexpr(_BLOCK)
_LEAST, _LARGEST = constexpr(LEAST_EXPONENT), constexpr(LARGEST_EXPONENT)
_OFFSET, _BEYOND = constexpr(EXPONENT_OFFSET), constexpr(BEYOND_127)
_TILE_ROWS = 32


@jit
def _tile(codes_ptr, exponents_ptr, dW_ptr, rows, columns, BR: tl.constexpr):
    """This program's rows, columns, mask [BR, 64], pointers to codes, exponents and dW, and the sum of the last two."""
    i_block = tl.program_id(1)
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    column = i_block * BLOCK + tl.arange(0, BLOCK)
    in_rows = row < rows
    mask = in_rows[:, None] & (column < columns)[None, :]
    offset = row[:, None] * columns + column[None, :]
    p_exponent = exponents_ptr + row * tl.cdiv(columns, BLOCK) + i_block
    step = whole_power_of_two(tl.load(p_exponent, mask=in_rows, other=0).to(tl.int32))
    code = tl.load(codes_ptr + offset, mask=mask, other=0).to(tl.float32)
    summed = code * step[:, None] + tl.load(dW_ptr + offset, mask=mask, other=0.0)
    return row, column, in_rows, mask, offset, p_exponent, summed


@jit(do_not_specialize=["key"])
def add_gradient_kernel(codes_ptr, exponents_ptr, dW_ptr, rows, columns, key, BR: tl.constexpr):
    row, column, in_rows, mask, offset, p_exponent, summed = _tile(codes_ptr, exponents_ptr, dW_ptr, rows, columns, BR)
    largest = tl.max(magnitude_bits(summed), axis=1)
    exponent = (largest >> 23) - _OFFSET + ((largest & 0x7FFFFF) > _BEYOND).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, _LEAST), _LARGEST)
    noise = uniform_low(random_words(key, row, column))
    code = floor_to_int(clamp(summed * whole_power_of_two(-exponent)[:, None] + noise, 127.0))
    tl.store(codes_ptr + offset, code.to(tl.int8), mask=mask)
    tl.store(p_exponent, exponent.to(tl.int8), mask=in_rows)


@jit
def add_sum_kernel(dW_ptr, codes_ptr, exponents_ptr, rows, columns, BR: tl.constexpr):
    _, _, _, mask, offset, _, summed = _tile(codes_ptr, exponents_ptr, dW_ptr, rows, columns, BR)
    tl.store(dW_ptr + offset, summed, mask=mask)


def triton_add_gradient(codes: torch.Tensor, exponents: torch.Tensor, dW: torch.Tensor, key: int) -> None:
    """`add_gradient`: codes int8 (N, K) and exponents int8 (N, blocks) in place, dW float32 (N, K)."""
    grid = (ceil_div(dW.shape[0], _TILE_ROWS), exponents.shape[1])
    launch(add_gradient_kernel, grid, codes, exponents, dW, *dW.shape, signed_word(key), BR=_TILE_ROWS)


def triton_add_sum(dW: torch.Tensor, codes: torch.Tensor, exponents: torch.Tensor) -> None:
    """`add_sum`: dW float32 (N, K) in place, codes int8 (N, K), exponents int8 (N, blocks)."""
    grid = (ceil_div(dW.shape[0], _TILE_ROWS), exponents.shape[1])
    launch(add_sum_kernel, grid, dW, codes, exponents, *dW.shape, BR=_TILE_ROWS)
