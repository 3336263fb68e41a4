"""Planar base-3 packing (packing.py) on Triton: unpack, unpack with scales, gather rows of a table. One or two trits a
weight.

A program decodes a tile of bytes once and writes five runs of columns, one per plane. Addresses are 64-bit, because a
table of ten million rows exceeds 2^31 bytes.
"""

from __future__ import annotations

import torch

from arb_kernels.triton_support import cast_float, ceil_div, jit, launch, level_of, power_of_two_from, tl

_TILE_BYTES, _TILE_ELEMENTS = 256, 1024


@jit
def unpack_levels_kernel(
    packed_ptr,
    ids_ptr,
    scale_ptr,
    out_ptr,
    rows,
    columns,
    width,
    groups,
    group_size,
    TRITS: tl.constexpr,
    GATHERS: tl.constexpr,
    SCALES: tl.constexpr,
    BR: tl.constexpr,
    BB: tl.constexpr,
):
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    in_rows = row < rows
    source = row
    if GATHERS:
        source = tl.load(ids_ptr + row, mask=in_rows, other=0)
    i_byte = tl.program_id(1) * BB + tl.arange(0, BB)
    byte_mask = in_rows[:, None] & (i_byte < width)[None, :]
    p_packed = packed_ptr + source[:, None] * (TRITS * width) + i_byte[None, :]
    b_packed = tl.load(p_packed, mask=byte_mask, other=0)
    b_second = b_packed
    if TRITS == 2:
        b_second = tl.load(p_packed + width, mask=byte_mask, other=0)
    for plane in tl.static_range(5):
        column = plane * width + i_byte
        mask = in_rows[:, None] & ((i_byte < width) & (column < columns))[None, :]
        levels = level_of(b_packed, b_second, plane, TRITS)
        if SCALES:
            p_scale = scale_ptr + row[:, None] * groups + (column // group_size)[None, :]
            out = levels.to(tl.float32) * tl.load(p_scale, mask=mask, other=0.0)
            b_out = cast_float(out, out_ptr.dtype.element_ty)
        elif out_ptr.dtype.element_ty.is_floating():
            b_out = levels.to(tl.float32).to(out_ptr.dtype.element_ty)
        else:
            b_out = levels.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * columns + column[None, :], b_out, mask=mask)


def _tiles(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile for a matrix of bytes."""
    tile_bytes = min(power_of_two_from(max(width, 1)), _TILE_BYTES)
    tile_rows = _TILE_ELEMENTS // tile_bytes
    return (ceil_div(rows, tile_rows), ceil_div(width, tile_bytes)), {"BR": tile_rows, "BB": tile_bytes}


def _unpack(packed, ids, columns, dtype, scale, group_size):
    """packed (rows, bytes); ids int64 (R,) or None; scale float32 (R, groups) or None -> (R, columns)."""
    packed = packed.contiguous()
    width = ceil_div(columns, 5)
    rows = len(packed) if ids is None else len(ids)
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    groups = 1 if scale is None else scale.shape[1]
    grid, tile = _tiles(rows, width)
    launch(
        unpack_levels_kernel,
        grid,
        *(packed, ids, None if scale is None else scale.contiguous(), out),
        *(rows, columns, width, groups, columns if groups == 1 else group_size),
        TRITS=packed.shape[-1] // width,
        GATHERS=ids is not None,
        SCALES=scale is not None,
        **tile,
    )
    return out


def triton_unpack_levels(packed: torch.Tensor, columns: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """`unpack_levels`: uint8 (..., bytes) -> `dtype` (..., columns)."""
    out = _unpack(packed.reshape(-1, packed.shape[-1]), None, columns, dtype, None, columns)
    return out.view(*packed.shape[:-1], columns)


def triton_effective_weight(
    packed: torch.Tensor, columns: int, scale: torch.Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 (N, bytes), scale float32 (N, groups) -> `dtype` (N, columns): scale * levels, rounded once. With one group
    a row, group_size is ignored."""
    return _unpack(packed, None, columns, dtype, scale, group_size)


def triton_gather_rows(
    packed: torch.Tensor,
    ids: torch.Tensor,
    columns: int,
    scale: torch.Tensor | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows of a packed table: uint8 (N, bytes), ids int64 (...) -> `dtype` (..., columns).

    scale: float32 (..., groups), of the requested rows (not of the table), as in `triton_effective_weight`.
    """
    flat_scale = None if scale is None else scale.reshape(-1, scale.shape[-1])
    out = _unpack(packed, ids.reshape(-1).contiguous(), columns, dtype, flat_scale, group_size or columns)
    return out.view(*ids.shape, columns)
