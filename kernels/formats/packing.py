"""Planar base-3 packing: five trits a byte, 0.2 bytes per weight.

A row of K trits takes nb = ceil(K / 5) bytes. Digit j of byte b is column j * nb + b, so unpacking writes five
contiguous planes. A digit is the trit mod 3 (0 -> 0, +1 -> 1, -1 -> 2), so the zero byte is five zero weights and
padding is harmless. Bytes above 242 are invalid. Packing is pure: it never writes its input.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from arb_kernels.backend import uses_native, uses_triton
from arb_kernels.native_library import native_kernels, pointer

from .packing_triton import triton_unpack_trits

TRITS_PER_BYTE = 5
LARGEST_BYTE = 3**TRITS_PER_BYTE - 1


def packed_width(num_trits: int) -> int:
    """Bytes that a row of `num_trits` trits takes."""
    return -(-num_trits // TRITS_PER_BYTE)


@cache
def _digit_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(256, 5): the trits of each byte value; an invalid byte is read as its value mod 243."""
    codes = torch.arange(256, device=device) % (LARGEST_BYTE + 1)
    digits = torch.stack([(codes // 3**j) % 3 for j in range(TRITS_PER_BYTE)], dim=1)
    return torch.where(digits == 2, -1, digits).to(dtype)


def pack_trits(trits: torch.Tensor) -> torch.Tensor:
    """int8 (..., K) in {-1, 0, 1} -> uint8 (..., ceil(K / 5))."""
    width = packed_width(trits.shape[-1])
    padded = F.pad(trits, (0, width * TRITS_PER_BYTE - trits.shape[-1]))
    codes = padded & 3
    planes = (codes - (codes >> 1)).view(torch.uint8).unflatten(-1, (TRITS_PER_BYTE, width))
    packed = planes[..., TRITS_PER_BYTE - 1, :]
    for j in reversed(range(TRITS_PER_BYTE - 1)):
        packed = packed * 3 + planes[..., j, :]
    return packed


def naive_unpack_trits(packed: torch.Tensor, num_trits: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    digits = F.embedding(packed.int(), _digit_table(dtype, packed.device))
    return digits.transpose(-1, -2).flatten(-2)[..., :num_trits]


def unpack_trits(packed: torch.Tensor, num_trits: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """uint8 (..., nb) -> `dtype` (..., num_trits) in {-1, 0, 1}."""
    if packed.numel() and uses_triton(packed):
        return triton_unpack_trits(packed, num_trits, dtype)
    if dtype != torch.int8 or packed.dim() != 2 or not packed.numel() or not uses_native(packed):
        return naive_unpack_trits(packed, num_trits, dtype)
    trits = torch.empty(len(packed), num_trits, dtype=torch.int8)
    native_kernels().arb_unpack_trits(pointer(packed), len(packed), num_trits, pointer(trits))
    return trits
