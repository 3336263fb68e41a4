"""The sum of a step's weight gradients over its micro-batches: one transient byte a weight.

    codes      (N, K) int8: the sum, in units of its block's step
    exponents  (N, ceil(K / 64)) int8: a block's step is 2^exponent, the least power of two of which 127 cover the
               block's largest sum

Each addition takes the float32 dW of one micro-batch, and rounds the new sum stochastically. A code's rounding error is
at most a 64th of its block's largest sum. The sum has 8 bits where the momentum has 4. Steps are powers of two, so
scaling is exact and every backend gives the same bits for the same dW and key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.graph import increment_version

from arb_kernels.backend import uses_native, uses_triton
from arb_kernels.formats.exponents import octave_scale
from arb_kernels.formats.gradient_sum_format import BEYOND_127, BLOCK, EXPONENT_OFFSET, LARGEST_EXPONENT, LEAST_EXPONENT
from arb_kernels.formats.groups import num_groups, split_groups, spread_groups
from arb_kernels.formats.rule_states import overwrite
from arb_kernels.native_library import native_kernels, pointer
from arb_kernels.random_bits import random_bits, uniform_from_low_bits

from .gradient_sum_triton import triton_add_gradient, triton_add_sum


class GradientSum(NamedTuple):
    """codes int8 (N, K), exponents int8 (N, blocks); `zero_sum` makes one, `add_gradient` changes it in place."""

    codes: torch.Tensor
    exponents: torch.Tensor


def zero_sum(rows: int, columns: int, device: torch.device | str = "cpu") -> GradientSum:
    """The sum of no gradients, for a matrix of (rows, columns)."""
    blocks = (rows, num_groups(columns, BLOCK))
    codes = torch.zeros(rows, columns, dtype=torch.int8, device=device)
    return GradientSum(codes, torch.full(blocks, LEAST_EXPONENT, dtype=torch.int8, device=device))


def _covering_exponent(absmax: torch.Tensor) -> torch.Tensor:
    """float32 (...) >= 0 -> int32 (...): the least exponent with 127 * 2^exponent >= absmax, within the limits."""
    bits = absmax.view(torch.int32)
    exponent = (bits >> 23) - EXPONENT_OFFSET + ((bits & 0x7FFFFF) > BEYOND_127).int()
    return exponent.clamp(LEAST_EXPONENT, LARGEST_EXPONENT)


def naive_value(total: GradientSum) -> torch.Tensor:
    """float32 (N, K): the value of the sum."""
    step = octave_scale(total.exponents.int())
    return total.codes * spread_groups(step, BLOCK, total.codes.shape[1])


def naive_add_gradient(total: GradientSum, dW: torch.Tensor, key: int) -> GradientSum:
    """`add_gradient` as a pure function."""
    summed = naive_value(total).add_(dW)
    exponent = _covering_exponent(split_groups(summed.abs(), BLOCK).amax(-1))
    inverse = spread_groups(octave_scale(-exponent), BLOCK, dW.shape[1])
    uniform = uniform_from_low_bits(random_bits(key, len(dW), dW.shape[1], dW.device))
    codes = summed.mul_(inverse).add_(uniform).floor_().clamp_(-127, 127)
    return GradientSum(codes.to(torch.int8), exponent.to(torch.int8))


def add_gradient(total: GradientSum, dW: torch.Tensor, key: int) -> None:
    """Add dW float32 (N, K) to the sum, in place. key: of this addition's random bits."""
    if uses_native(*total, dW):
        native_kernels().arb_add_gradient(*map(pointer, (*total, dW)), *dW.shape, key)
    elif uses_triton(*total, dW):
        triton_add_gradient(*total, dW, key)
    else:
        overwrite(total, naive_add_gradient(total, dW, key))
        return
    increment_version(tuple(total))


def add_sum(dW: torch.Tensor, total: GradientSum) -> None:
    """Add the value of the sum to dW float32 (N, K), in place."""
    if uses_native(*total, dW):
        native_kernels().arb_add_sum(*map(pointer, (dW, *total)), *dW.shape)
    elif uses_triton(*total, dW):
        triton_add_sum(dW, *total)
    else:
        dW.add_(naive_value(total))
        return
    increment_version(dW)
