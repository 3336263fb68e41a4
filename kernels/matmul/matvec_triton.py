"""Matmul of decoding in Triton: a few tokens times packed weights, which are unpacked before the tensor cores.

With at most 16 tokens the time is that of reading W, so W is read as it is stored, at 0.2 bytes a trit, and no dense
matrix is written. The levels are the left operand of the dot, the tokens, padded to 16, the right one. Sums are int32.
"""

from __future__ import annotations

import torch

from arb_kernels.formats.packing import packed_width, trits_per_weight
from arb_kernels.triton_support import ceil_div, jit, launch, level_of, tl

_MATVEC_TOKENS, _MATVEC_ROWS, _MATVEC_BYTES = 16, 32, 64


@jit
def packed_matvec_kernel(
    codes_ptr,
    packed_ptr,
    token_scale_ptr,
    row_scale_ptr,
    out_ptr,
    M,
    N,
    columns,
    width,
    TRITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
):
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    p_packed = packed_ptr + row.to(tl.int64)[:, None] * (TRITS * width)
    p_codes = codes_ptr + token.to(tl.int64)[None, :] * columns
    sums = tl.zeros([BN, BM], tl.int32)
    for start in range(0, width, BB):
        i_byte = start + tl.arange(0, BB)
        byte_mask = (row < N)[:, None] & (i_byte < width)[None, :]
        b_packed = tl.load(p_packed + i_byte[None, :], mask=byte_mask, other=0)
        b_second = b_packed
        if TRITS == 2:
            b_second = tl.load(p_packed + width + i_byte[None, :], mask=byte_mask, other=0)
        for plane in tl.static_range(5):
            column = plane * width + i_byte
            mask = ((i_byte < width) & (column < columns))[:, None] & (token < M)[None, :]
            b_codes = tl.load(p_codes + column[:, None], mask=mask, other=0)
            sums = tl.dot(level_of(b_packed, b_second, plane, TRITS).to(tl.int8), b_codes, sums, out_dtype=tl.int32)
    token_scale = tl.load(token_scale_ptr + token, mask=token < M, other=0.0)
    row_scale = tl.load(row_scale_ptr + row, mask=row < N, other=0.0)
    out = sums.to(tl.float32) * token_scale[None, :] * row_scale[:, None]
    p_out = out_ptr + token.to(tl.int64)[None, :] * N + row[:, None]
    tl.store(p_out, out, mask=(row < N)[:, None] & (token < M)[None, :])


def triton_packed_matvec(
    codes: torch.Tensor, packed: torch.Tensor, token_scale: torch.Tensor, row_scale: torch.Tensor
) -> torch.Tensor:
    """codes int8 (M, K), packed uint8 (N, bytes), scales float32 (M,) and (N,) -> float32 (M, N): equal to
    `naive_int8_matmul(codes, levels, token_scale, row_scale)`. Correct for any M, fast for M <= 16."""
    codes, packed = codes.contiguous(), packed.contiguous()
    (M, K), N = codes.shape, len(packed)
    out = torch.empty(M, N, device=codes.device)
    launch(
        packed_matvec_kernel,
        (ceil_div(N, _MATVEC_ROWS), ceil_div(M, _MATVEC_TOKENS)),
        *(codes, packed, token_scale.contiguous(), row_scale.contiguous(), out, M, N, K, packed_width(K)),
        TRITS=trits_per_weight(packed, K),
        BM=_MATVEC_TOKENS,
        BN=_MATVEC_ROWS,
        BB=_MATVEC_BYTES,
    )
    return out
