"""Two or four bits a weight in memory, for decoding on a CPU: unpacking base 3 costs more time than its traffic saves.

Blocks of 16 rows of the weight matrix, and in a block chunks of 16 columns. One trit a weight: a chunk is 64 bytes, and
byte 4 * i + j holds row i at the columns j, 4 + j, 8 + j and 12 + j, lowest bits first, as level + 1. Masked shifts of
one vector then give four vectors of 16 rows x 4 columns, each the operand of one int8 dot-product instruction. Two
trits: a chunk is 128 bytes, the first half for columns j and 4 + j, the second for 8 + j and 12 + j, as level + 4.
Padding has code 0 and no effect: padded columns meet zero activations, and padded rows are not written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from arb_kernels.backend import KERNEL_TRITS, backend_for, instruction_set, uses_triton
from arb_kernels.native_library import native_kernels, native_library, pointer

from .packing import largest_level, trits_per_weight, unpack_levels

ROWS, COLUMNS = 16, 16  # of a chunk
PARTS = 4  # a chunk's columns in fours
BITS = {1: 2, 2: 4}  # of a weight, by its trits
VECTOR_BYTES = 64  # a chunk is one vector with one trit a weight, two with two trits
HUGE_PAGE = 2 << 20  # bytes


def decoding_form(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """packed uint8 (N, bytes) -> the form that `decode_linear` reads fastest, to be computed once: the decode layout
    for the native kernels, the packed bytes themselves for Triton, levels int8 (N, K) for torch."""
    trits = trits_per_weight(packed, columns)
    if _takes_layout(packed.device, trits):
        return to_decode_layout(unpack_levels(packed, columns), trits)
    return packed if uses_triton(packed, trits=trits) else unpack_levels(packed, columns)


def decoding_bytes(num_rows: int, columns: int, trits: int, device: torch.device) -> int:
    """Bytes of `decoding_form` of a (num_rows, columns) matrix on a device; 0 where it is the packed bytes."""
    if _takes_layout(device, trits):
        return layout_bytes(num_rows, columns, trits)
    return 0 if uses_triton(torch.empty(0, device=device), trits=trits) else num_rows * columns


def layout_bytes(num_rows: int, columns: int, trits: int) -> int:
    """Bytes of a (num_rows, columns) matrix in the decode layout."""
    return -(-num_rows // ROWS) * -(-columns // COLUMNS) * ROWS * COLUMNS * BITS[trits] // 8


def _takes_layout(device: torch.device, trits: int) -> bool:
    supported = trits <= KERNEL_TRITS and device.type == "cpu"
    return supported and backend_for(device) == "native" and instruction_set() > 0


def to_decode_layout(levels: torch.Tensor, trits: int = 1) -> torch.Tensor:
    """int8 (N, K) of so many trits a weight -> uint8 (ceil(N / 16), ceil(K / 16), 64 or 128)."""
    N, K = levels.shape
    bits, vectors = BITS[trits], BITS[trits] * PARTS // 8
    codes = F.pad((levels + largest_level(trits)).view(torch.uint8), (0, -K % COLUMNS, 0, -N % ROWS))
    # block, row, chunk, vector, part in vector, column in part
    codes = codes.view(-1, ROWS, codes.shape[1] // COLUMNS, vectors, PARTS // vectors, COLUMNS // PARTS)
    packed = codes[:, :, :, :, 0]
    for part in range(1, PARTS // vectors):
        packed = packed | codes[:, :, :, :, part] << bits * part
    chunks = packed.permute(0, 2, 3, 1, 4)  # block, chunk, vector, row, column in part
    return in_huge_pages(chunks.reshape(len(codes), -1, vectors * VECTOR_BYTES))


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a contiguous CPU tensor, aligned to a huge page and with huge pages requested from the system.

    Without huge pages, weights that are read once per token wait for address translation: a matvec of 4 MB took 1.4 to
    1.6 times as long (LOG.md). Tensors smaller than a huge page are returned unchanged.
    """
    if tensor.nbytes < HUGE_PAGE or tensor.device.type != "cpu" or native_library() is None:
        return tensor
    room = torch.empty(tensor.nbytes + HUGE_PAGE, dtype=torch.uint8)
    start = -room.data_ptr() % HUGE_PAGE
    aligned = room[start : start + tensor.nbytes]
    native_kernels().arb_advise_huge_pages(pointer(aligned), tensor.nbytes // HUGE_PAGE * HUGE_PAGE)
    return aligned.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def layout_trits(layout: torch.Tensor) -> int:
    """Trits a weight of a decode layout."""
    return layout.shape[2] // VECTOR_BYTES


def from_decode_layout(layout: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The inverse: int8 (N, K)."""
    trits = layout_trits(layout)
    bits, vectors = BITS[trits], layout.unflatten(2, (-1, ROWS, COLUMNS // PARTS))
    parts = torch.stack([vectors >> bits * part & (1 << bits) - 1 for part in range(8 // bits)], dim=3)
    codes = parts.permute(0, 4, 1, 2, 3, 5)  # block, row, chunk, vector, part in vector, column in part
    return codes.reshape(len(layout) * ROWS, -1)[:N, :K].to(torch.int8) - largest_level(trits)
