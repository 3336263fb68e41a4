"""Two bits a weight in memory, for decoding on a CPU: unpacking 1.6 bits costs more time than its traffic saves.

Blocks of 16 rows of the weight matrix, and in a block chunks of 16 columns in 64 bytes: byte 4 * i + j of a chunk holds
row i at the columns j, 4 + j, 8 + j and 12 + j, lowest bits first, as trit + 1. Four masked shifts of one vector then
give four vectors of 16 rows x 4 columns, the operand of one int8 dot-product instruction. Padding has code 0 and no
effect: padded columns meet zero activations, and padded rows are not written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from arb_kernels.backend import backend_for, instruction_set, uses_triton
from arb_kernels.native_library import native_kernels, native_library, pointer

from .packing import unpack_trits

ROWS, COLUMNS = 16, 16  # of a chunk
HUGE_PAGE = 2 << 20  # bytes


def decoding_form(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """packed uint8 (N, ceil(K / 5)) -> the form that `decode_linear` reads fastest, to be computed once: the decode
    layout for the native kernels, the packed bytes themselves for Triton, trits int8 (N, K) for torch."""
    if _takes_layout(packed.device):
        return to_decode_layout(unpack_trits(packed, columns))
    return packed if uses_triton(packed) else unpack_trits(packed, columns)


def decoding_bytes(num_rows: int, columns: int, device: torch.device) -> int:
    """Bytes of `decoding_form` of a (num_rows, columns) matrix on a device; 0 where it is the packed bytes."""
    if _takes_layout(device):
        return -(-num_rows // ROWS) * -(-columns // COLUMNS) * 4 * ROWS
    return 0 if uses_triton(torch.empty(0, device=device)) else num_rows * columns


def _takes_layout(device: torch.device) -> bool:
    return device.type == "cpu" and backend_for(device) == "native" and instruction_set() > 0


def to_decode_layout(trits: torch.Tensor) -> torch.Tensor:
    """int8 (N, K) in {-1, 0, 1} -> uint8 (ceil(N / 16), ceil(K / 16), 64)."""
    N, K = trits.shape
    codes = F.pad((trits + 1).view(torch.uint8), (0, -K % COLUMNS, 0, -N % ROWS))
    codes = codes.view(-1, ROWS, codes.shape[1] // COLUMNS, 4, 4)  # block, row, chunk, part, column in part
    packed = codes[:, :, :, 0]
    for part in range(1, 4):
        packed = packed | codes[:, :, :, part] << 2 * part
    return in_huge_pages(packed.transpose(1, 2).reshape(len(codes), -1, 4 * ROWS))


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


def from_decode_layout(layout: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The inverse: int8 (N, K)."""
    parts = torch.stack([layout >> 2 * part & 3 for part in range(4)], dim=2)  # block, chunk, part, 64
    codes = parts.unflatten(-1, (ROWS, 4)).permute(0, 3, 1, 2, 4)  # block, row, chunk, part, column in part
    return codes.reshape(len(layout) * ROWS, -1)[:N, :K].to(torch.int8) - 1
