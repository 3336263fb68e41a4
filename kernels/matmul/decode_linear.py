"""Quantised activations times ternary weights in their decoding form, for evaluation and generation."""

from __future__ import annotations

import torch

from arb_kernels.backend import instruction_set, uses_native, uses_triton
from arb_kernels.formats.decode_layout import from_decode_layout, layout_trits
from arb_kernels.formats.packing import largest_level, unpack_levels
from arb_kernels.native_library import native_kernels, pointer

from .int8_matmul import int8_matmul, naive_int8_matmul
from .matvec_triton import triton_packed_matvec
from .quantise import quantise_tokens

PACKED_TOKENS = 16  # up to so many, Triton multiplies with the packed bytes as they are
MATVEC_TOKENS = 8  # matvec.h: up to so many the weights are read once, beyond they are unpacked tile by tile
MATVEC_COLUMNS = 1 << 18  # at most: half of them meet codes of up to 8 that are summed in int32 at 16 times their size


def decode_linear(
    values: torch.Tensor, weight: torch.Tensor, num_rows: int, row_scale: torch.Tensor, trits: int = 1
) -> torch.Tensor:
    """Quantised activations times ternary weights: float32 (M, K), a weight of so many trits as `decoding_form` makes
    it, row_scale float32 (N,) -> float32 (M, N)."""
    if weight.dim() == 3:
        return _layout_linear(values, weight, num_rows, row_scale)
    codes, token_scale = quantise_tokens(values)
    if weight.dtype == torch.int8:
        return int8_matmul(codes, weight, token_scale, row_scale, largest=largest_level(trits))
    if len(values) <= PACKED_TOKENS and uses_triton(codes, weight, token_scale, row_scale, trits=trits):
        return triton_packed_matvec(codes, weight, token_scale, row_scale)
    levels = unpack_levels(weight, values.shape[1])
    return int8_matmul(codes, levels, token_scale, row_scale, largest=largest_level(trits))


def _layout_linear(values: torch.Tensor, layout: torch.Tensor, num_rows: int, row_scale: torch.Tensor) -> torch.Tensor:
    M, K = values.shape
    isa = instruction_set()
    fits = M <= MATVEC_TOKENS and 0 < K <= MATVEC_COLUMNS and M > 0
    if not (fits and isa and uses_native(values, layout, row_scale)):
        return layout_matmul(*quantise_tokens(values), layout, num_rows, row_scale)
    out = torch.empty(M, num_rows)
    native_kernels().arb_layout_matvec(
        *(
            isa,
            layout_trits(layout),
            values.data_ptr(),
            layout.data_ptr(),
            M,
            num_rows,
            K,
            row_scale.data_ptr(),
            out.data_ptr(),
        )
    )
    return out


def layout_matmul(
    codes: torch.Tensor, token_scale: torch.Tensor, layout: torch.Tensor, num_rows: int, row_scale: torch.Tensor
) -> torch.Tensor:
    """Outputs of `quantise_tokens`, int8 (M, K) and float32 (M,), times the decode layout -> float32 (M, N)."""
    M, K = codes.shape
    if not codes.numel() or not instruction_set() or not uses_native(codes, token_scale, layout, row_scale):
        levels, largest = from_decode_layout(layout, num_rows, K), largest_level(layout_trits(layout))
        return naive_int8_matmul(codes, levels, token_scale, row_scale, largest=largest)
    out = torch.empty(M, num_rows)
    native_kernels().arb_layout_matmul(
        instruction_set(),
        layout_trits(layout),
        *map(pointer, (codes, layout)),
        *(M, num_rows, K),
        *map(pointer, (token_scale, row_scale, out)),
    )
    return out
