"""Quantisation to int8 with one float scale per row: activations by token, gradients by token and by column.

A weight gradient sums over tokens and an input gradient over outputs, so the two need the gradient quantised with
scales along different axes, each with the other operand's scales folded in: no scale then varies along a sum.
Activations round to nearest (as in SwitchBack and BitNet), gradients stochastically, or small ones would vanish. The
random bits are a hash of the gradient's largest value and the element's place, so a run, its resume and every backend
draw the same bits without a stored counter.
"""

from __future__ import annotations

import torch

from arb_kernels.backend import uses_native, uses_triton
from arb_kernels.native_library import native_kernels, pointer
from arb_kernels.random_bits import random_bits, uniform_from_high_bits, uniform_from_low_bits

from .quantise_triton import triton_quantise_gradient, triton_quantise_tokens

LARGEST_CODE = 127


def _scale(absmax: torch.Tensor) -> torch.Tensor:
    return absmax * (1 / LARGEST_CODE)


def _inverse(absmax: torch.Tensor) -> torch.Tensor:
    return torch.where(absmax > 0, torch.full_like(absmax, LARGEST_CODE) / absmax, 0)


def _round_stochastically(values: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    return (values + uniform).floor_().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)


def naive_quantise_tokens(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = values.abs().amax(1)
    return (values * _inverse(absmax)[:, None]).round_().to(torch.int8), _scale(absmax)


def quantise_tokens(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (M, K) -> codes int8 (M, K), scale float32 (M,): values ~ codes * scale, rounded to nearest."""
    if values.numel() and uses_triton(values):
        return triton_quantise_tokens(values)
    if not uses_native(values) or not values.numel():
        return naive_quantise_tokens(values)
    codes, scale = torch.empty_like(values, dtype=torch.int8), values.new_empty(len(values))
    native_kernels().arb_quantise_tokens(pointer(values), *values.shape, pointer(codes), pointer(scale))
    return codes, scale


def naive_quantise_gradient(
    gradient: torch.Tensor, column_factor: torch.Tensor, row_factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    by_token = gradient * column_factor
    token_max = by_token.abs().amax(1)
    bits = random_bits(int(token_max.amax().view(torch.int32)), len(gradient), gradient.shape[1], gradient.device)
    token_codes = _round_stochastically(by_token * _inverse(token_max)[:, None], uniform_from_low_bits(bits))
    if row_factor is None:
        return token_codes, _scale(token_max), None, None
    by_column = gradient * row_factor[:, None]
    column_max = by_column.abs().amax(0)
    column_codes = _round_stochastically(by_column * _inverse(column_max), uniform_from_high_bits(bits))
    return token_codes, _scale(token_max), column_codes.T.contiguous(), _scale(column_max)


def quantise_gradient(
    gradient: torch.Tensor, column_factor: torch.Tensor, row_factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """float32 (M, N), with factors float32 (N,) and (M,) -> gradient * column_factor as int8 (M, N) with scale (M,),
    and gradient * row_factor as int8 (N, M), transposed, with scale (N,). Without a row_factor the second is None."""
    if gradient.numel() and uses_triton(gradient, column_factor, row_factor):
        return triton_quantise_gradient(gradient, column_factor, row_factor)
    if not uses_native(gradient, column_factor, row_factor) or not gradient.numel():
        return naive_quantise_gradient(gradient, column_factor, row_factor)
    tokens, columns = gradient.shape
    token_codes, token_scale = torch.empty_like(gradient, dtype=torch.int8), gradient.new_empty(tokens)
    column_codes = column_scale = None
    if row_factor is not None:
        column_codes = torch.empty(columns, tokens, dtype=torch.int8)
        column_scale = gradient.new_empty(columns)
    native_kernels().arb_quantise_gradient(
        pointer(gradient),
        tokens,
        columns,
        *map(pointer, (column_factor, row_factor, token_codes, token_scale, column_codes, column_scale)),
    )
    return token_codes, token_scale, column_codes, column_scale
