"""Planar base-3 packing: five trits a byte, and one, two or three trits a weight.

A plane holds one trit of each of a row's K weights in nb = ceil(K / 5) bytes. Digit j of byte b is column j * nb + b,
so unpacking writes five contiguous runs. A digit is the trit mod 3 (0 -> 0, +1 -> 1, -1 -> 2), so the zero byte is five
zero weights and padding is harmless. Bytes above 242 are invalid.

A weight's level is a number in balanced ternary: one trit gives -1 to 1, two trits 3 * a + b give -4 to 4. A packed row
is its planes side by side, the most significant first; its length tells how many there are. Packing is pure: it never
writes its input.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from arb_kernels.backend import uses_native, uses_triton
from arb_kernels.native_library import native_kernels, pointer

from .packing_triton import triton_unpack_levels

TRITS_PER_BYTE = 5
LARGEST_BYTE = 3**TRITS_PER_BYTE - 1


def packed_width(columns: int, trits: int = 1) -> int:
    """Bytes that a row of `columns` weights takes, at `trits` trits a weight."""
    return trits * -(-columns // TRITS_PER_BYTE)


def trits_per_weight(packed: torch.Tensor, columns: int) -> int:
    """Planes in the rows of packed weights (..., bytes) of `columns` columns."""
    return packed.shape[-1] // packed_width(columns) if columns else 1


def largest_level(trits: int) -> int:
    """1, 4 or 13: a weight of so many trits has levels from minus this to this."""
    return (3**trits - 1) // 2


@cache
def _digit_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(256, 5): the trits of each byte value; an invalid byte is read as its value mod 243."""
    codes = torch.arange(256, device=device) % (LARGEST_BYTE + 1)
    digits = torch.stack([(codes // 3**j) % 3 for j in range(TRITS_PER_BYTE)], dim=1)
    return torch.where(digits == 2, -1, digits).to(dtype)


def _pack_plane(trits: torch.Tensor) -> torch.Tensor:
    """int8 (..., K) in {-1, 0, 1} -> uint8 (..., ceil(K / 5))."""
    width = packed_width(trits.shape[-1])
    padded = F.pad(trits, (0, width * TRITS_PER_BYTE - trits.shape[-1]))
    codes = padded & 3
    planes = (codes - (codes >> 1)).view(torch.uint8).unflatten(-1, (TRITS_PER_BYTE, width))
    packed = planes[..., TRITS_PER_BYTE - 1, :]
    for j in reversed(range(TRITS_PER_BYTE - 1)):
        packed = packed * 3 + planes[..., j, :]
    return packed


def pack_levels(levels: torch.Tensor, trits: int = 1) -> torch.Tensor:
    """int8 (..., K) in [-largest_level(trits), largest_level(trits)] -> uint8 (..., trits * ceil(K / 5))."""
    planes = []
    for _ in range(trits - 1):
        above = torch.div(levels + 1, 3, rounding_mode="floor")
        planes.append(_pack_plane(levels - 3 * above))
        levels = above
    return torch.cat([_pack_plane(levels), *planes[::-1]], dim=-1) if planes else _pack_plane(levels)


def naive_unpack_levels(packed: torch.Tensor, columns: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    planes = packed.unflatten(-1, (trits_per_weight(packed, columns), -1)) if columns else packed.unsqueeze(-2)
    digits = F.embedding(planes.int(), _digit_table(dtype, packed.device))  # (..., trits, nb, 5)
    trits = digits.transpose(-1, -2).flatten(-2)[..., :columns]
    levels = trits[..., 0, :]
    for plane in range(1, trits.shape[-2]):
        levels = 3 * levels + trits[..., plane, :]
    return levels


def unpack_levels(packed: torch.Tensor, columns: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """uint8 (..., bytes) -> `dtype` (..., columns): levels of as many trits as a row holds."""
    trits = trits_per_weight(packed, columns)
    if packed.numel() and uses_triton(packed, trits=trits):
        return triton_unpack_levels(packed, columns, dtype)
    if dtype != torch.int8 or packed.dim() != 2 or not packed.numel() or not uses_native(packed, trits=trits):
        return naive_unpack_levels(packed, columns, dtype)
    levels = torch.empty(len(packed), columns, dtype=torch.int8)
    native_kernels().arb_unpack_levels(pointer(packed), len(packed), columns, trits, pointer(levels))
    return levels
