"""int8 matmul with exact int32 sums, and one scale per row and column applied to them.

out[r, c] = (sum_k rows[r, k] * columns[c, k]) * row_scale[r] * column_scale[c], in this order of rounding everywhere.

torch's int8 GEMM is exact on GPUs, but not on every CPU: without VNNI or AMX, oneDNN adds 128 to one operand and sums
pairs of products in 16 bits, which saturate. A trit times a code of at most 127 stays below 32767 (255 * 1 * 2 = 510,
or 129 * 127 * 2 = 32766 with the operands exchanged); two codes do not. Two codes are multiplied in float32, over as
many columns at a time as keep every partial sum an integer that float32 holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from arb_kernels.backend import instruction_set, uses_native, uses_triton
from arb_kernels.native_library import native_kernels, pointer

from .quantise_triton import triton_scale_sums

TRIT_OFFSET, INT8_OFFSET = 1, 128  # make the column operand unsigned, as the CPU's instructions require
EXACT_COLUMNS = 2**24 // 128**2  # float32 holds the sum of so many products of two int8 codes, in any order
_CUDA_MULTIPLE, _CUDA_LEAST_ROWS = 16, 17  # required by torch._int_mm


def _with_own_strides(matrix: torch.Tensor) -> torch.Tensor:
    """Gives a single row or column of a transposed matrix its own strides. torch treats it as contiguous whatever its
    strides, and the CPU's GEMM would read out of bounds."""
    return matrix.reshape(-1).view(matrix.shape) if 1 in matrix.shape else matrix


def _padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def _cuda_sums(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The vendor's int8 GEMM on padded sizes, in the layout that every cuBLAS accepts: first operand row-major, second
    column-major."""
    (R, K), C = rows.shape, columns.shape[1]
    pad_k = -K % _CUDA_MULTIPLE
    by_row = _padded(rows, max(_CUDA_LEAST_ROWS - R, 0), pad_k).contiguous()
    by_column = _padded(columns.T, -C % _CUDA_MULTIPLE, pad_k).contiguous()
    return torch._int_mm(by_row, by_column.T)[:R, :C]  # pyright: ignore[reportPrivateImportUsage]


def _float_sums(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Exact on any CPU, also when operands are reduced to TF32 or bfloat16: they have eight bits."""
    sums = torch.zeros(len(rows), columns.shape[1], dtype=torch.int32, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):  # it would round the sums
        for start in range(0, rows.shape[1], EXACT_COLUMNS):
            part = slice(start, start + EXACT_COLUMNS)
            sums += (rows[:, part].float() @ columns[part].float()).int()
    return sums


def _exact_sums(
    rows: torch.Tensor, columns: torch.Tensor, transposed: bool = False, trits: bool = False
) -> torch.Tensor:
    """int32 (R, C). The arguments are those of `int8_matmul`."""
    columns = columns if transposed else columns.T
    if rows.is_cuda:
        return _cuda_sums(rows, columns)
    if trits:
        left, right = _with_own_strides(rows), _with_own_strides(columns)
        return torch._int_mm(left, right)  # pyright: ignore[reportPrivateImportUsage]
    return _float_sums(rows, columns)


def naive_int8_matmul(
    rows: torch.Tensor,
    columns: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None = None,
    **form: bool,
) -> torch.Tensor:
    """`int8_matmul` in torch. form: its `transposed` and `trits`."""
    sums = _exact_sums(rows, columns, **form)
    out = sums.float() * row_scale[:, None]
    return out if column_scale is None else out * column_scale


def int8_matmul(
    rows: torch.Tensor,
    columns: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None = None,
    transposed: bool = False,
    trits: bool = False,
) -> torch.Tensor:
    """rows int8 (R, K), columns int8 (C, K), or (K, C) if `transposed`; scales float32 (R,) and (C,) -> float32 (R, C).

    trits: the columns hold only -1, 0 and 1, and the rows no value below -127. Sums must fit int32: K < 2^17.
    """
    if rows.numel() and columns.numel() and uses_triton(rows, columns, row_scale, column_scale):
        sums = _exact_sums(rows, columns, transposed, trits)
        return triton_scale_sums(sums, row_scale, column_scale)
    instructions = instruction_set()
    usable = instructions and rows.numel() and columns.numel()
    if not usable or not uses_native(rows, columns, row_scale, column_scale):
        return naive_int8_matmul(rows, columns, row_scale, column_scale, transposed=transposed, trits=trits)
    R, K, C = *rows.shape, columns.shape[1 if transposed else 0]
    out = torch.empty(R, C)
    native_kernels().arb_int8_matmul(
        instructions,
        pointer(rows),
        pointer(columns),
        int(transposed),
        TRIT_OFFSET if trits else INT8_OFFSET,
        *(R, C, K),
        pointer(row_scale),
        pointer(column_scale),
        pointer(out),
    )
    return out
