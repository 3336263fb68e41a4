"""int8 matmul with exact int32 sums, and one scale per row and column applied to them.

out[r, c] = (sum_k rows[r, k] * columns[c, k]) * row_scale[r] * column_scale[c], in this order of rounding everywhere.

torch's int8 GEMM is exact on GPUs, but not on every CPU: without VNNI or AMX, oneDNN adds 128 to one operand and sums
pairs of products in 16 bits, which saturate. A trit times a code of at most 127 stays below 32767 (255 * 1 * 2 = 510,
or 129 * 127 * 2 = 32766 with the operands exchanged); a level of two trits or a code times a code does not. Those are
multiplied in float32, over as many columns at a time as keep every partial sum an integer that float32 holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from arb_kernels.backend import instruction_set, uses_native, uses_triton
from arb_kernels.native_library import native_kernels, pointer

from .quantise_triton import triton_scale_sums

ANY_INT8 = 128  # the largest magnitude of an int8
EXACT_SUM = 2**24  # float32 holds integers of up to this magnitude
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


def _float_sums(rows: torch.Tensor, columns: torch.Tensor, largest: int) -> torch.Tensor:
    """Exact on any CPU, also when operands are reduced to TF32 or bfloat16: they have eight bits."""
    sums = torch.zeros(len(rows), columns.shape[1], dtype=torch.int32, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):  # it would round the sums
        exact = EXACT_SUM // (ANY_INT8 * largest)  # so many products, summed in any order
        for start in range(0, rows.shape[1], exact):
            part = slice(start, start + exact)
            sums += (rows[:, part].float() @ columns[part].float()).int()
    return sums


def _exact_sums(
    rows: torch.Tensor, columns: torch.Tensor, transposed: bool = False, largest: int = ANY_INT8
) -> torch.Tensor:
    """int32 (R, C). The arguments are those of `int8_matmul`."""
    columns = columns if transposed else columns.T
    if rows.is_cuda:
        return _cuda_sums(rows, columns)
    if largest == 1:
        left, right = _with_own_strides(rows), _with_own_strides(columns)
        return torch._int_mm(left, right)  # pyright: ignore[reportPrivateImportUsage]
    return _float_sums(rows, columns, largest)


def naive_int8_matmul(
    rows: torch.Tensor,
    columns: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None = None,
    transposed: bool = False,
    largest: int = ANY_INT8,
) -> torch.Tensor:
    """`int8_matmul` in torch."""
    sums = _exact_sums(rows, columns, transposed, largest)
    out = sums.float() * row_scale[:, None]
    return out if column_scale is None else out * column_scale


def int8_matmul(
    rows: torch.Tensor,
    columns: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None = None,
    transposed: bool = False,
    largest: int = ANY_INT8,
) -> torch.Tensor:
    """rows int8 (R, K), columns int8 (C, K), or (K, C) if `transposed`; scales float32 (R,) and (C,) -> float32 (R, C).

    largest: magnitude of the columns' values at most: of levels (1, 4 or 13), and then the rows hold no value below
    -127, or 128. Sums must fit int32: K < 2^17.
    """
    if rows.numel() and columns.numel() and uses_triton(rows, columns, row_scale, column_scale):
        sums = _exact_sums(rows, columns, transposed, largest)
        return triton_scale_sums(sums, row_scale, column_scale)
    instructions = instruction_set()
    usable = instructions and rows.numel() and columns.numel()
    if not usable or not uses_native(rows, columns, row_scale, column_scale):
        return naive_int8_matmul(rows, columns, row_scale, column_scale, transposed=transposed, largest=largest)
    R, K, C = *rows.shape, columns.shape[1 if transposed else 0]
    out = torch.empty(R, C)
    native_kernels().arb_int8_matmul(
        instructions,
        pointer(rows),
        pointer(columns),
        int(transposed),
        largest,
        *(R, C, K),
        pointer(row_scale),
        pointer(column_scale),
        pointer(out),
    )
    return out
