"""Two bits a weight in memory, for decoding on a CPU: reading 1.6 bits takes more instructions than it saves traffic.

Blocks of 16 rows of the weight matrix, and in a block chunks of 16 columns in 64 bytes: byte 4 * i + j of a chunk holds
row i at the columns j, 4 + j, 8 + j and 12 + j, lowest bits first, as trit + 1. Four masked shifts of one vector then
give four vectors of 16 rows x 4 columns, what one int8 dot-product instruction takes. Padding is the code 0 and is
harmless: columns meet zero activations, and rows are not written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import backend_for, instruction_set, uses_native, uses_triton
from .int8_matmul import int8_matmul, naive_int8_matmul
from .matvec_triton import triton_packed_matvec
from .native_library import native_library, pointer
from .packing import unpack_trits
from .quantise import quantise_tokens

ROWS, COLUMNS = 16, 16  # of a chunk
HUGE_PAGE = 2 << 20  # bytes
PACKED_TOKENS = 16  # up to so many, Triton multiplies with the packed bytes as they are
MATVEC_TOKENS = 8  # matvec.h: up to so many the weights are read once, beyond they are unpacked tile by tile
MATVEC_COLUMNS = 1 << 19  # at most: codes of up to 2 are summed in int32 where they lie in the byte, 64 times as large


def decoding_form(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """packed uint8 (N, ceil(K / 5)) -> what `decode_linear` reads fastest here, to be made once: the decode layout for
    the native kernels, the packed bytes themselves for Triton, trits int8 (N, K) for torch."""
    if _takes_layout(packed.device):
        return to_decode_layout(unpack_trits(packed, columns))
    return packed if uses_triton(packed) else unpack_trits(packed, columns)


def decoding_bytes(num_rows: int, columns: int, device: torch.device) -> int:
    """What `decoding_form` makes of a (num_rows, columns) matrix on a device, in bytes; 0 where packed bytes do."""
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
    """A copy of a contiguous CPU tensor at the start of a huge page, with the system asked for such pages.

    Weights that are streamed from memory once per token wait for address translation otherwise: a matvec of 4 MB took
    1.4 to 1.6 times as long (LOG.md). Tensors under a huge page are returned as they are.
    """
    if tensor.nbytes < HUGE_PAGE or tensor.device.type != "cpu" or native_library() is None:
        return tensor
    room = torch.empty(tensor.nbytes + HUGE_PAGE, dtype=torch.uint8)
    start = -room.data_ptr() % HUGE_PAGE
    aligned = room[start : start + tensor.nbytes]
    native_library().arb_advise_huge_pages(pointer(aligned), tensor.nbytes // HUGE_PAGE * HUGE_PAGE)
    return aligned.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def from_decode_layout(layout: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The inverse: int8 (N, K)."""
    parts = torch.stack([layout >> 2 * part & 3 for part in range(4)], dim=2)  # block, chunk, part, 64
    codes = parts.unflatten(-1, (ROWS, 4)).permute(0, 3, 1, 2, 4)  # block, row, chunk, part, column in part
    return codes.reshape(len(layout) * ROWS, -1)[:N, :K].to(torch.int8) - 1


def decode_linear(values: torch.Tensor, weight: torch.Tensor, num_rows: int, row_scale: torch.Tensor) -> torch.Tensor:
    """Quantised activations times ternary weights: float32 (M, K), a weight as `decoding_form` makes it, row_scale
    float32 (N,) -> float32 (M, N)."""
    if weight.dim() == 3:
        return _layout_linear(values, weight, num_rows, row_scale)
    codes, token_scale = quantise_tokens(values)
    if weight.dtype == torch.int8:
        return int8_matmul(codes, weight, token_scale, row_scale, trits=True)
    if len(values) <= PACKED_TOKENS and uses_triton(codes, weight, token_scale, row_scale):
        return triton_packed_matvec(codes, weight, token_scale, row_scale)
    return int8_matmul(codes, unpack_trits(weight, values.shape[1]), token_scale, row_scale, trits=True)


def _layout_linear(values: torch.Tensor, layout: torch.Tensor, num_rows: int, row_scale: torch.Tensor) -> torch.Tensor:
    M, K = values.shape
    isa = instruction_set()
    fits = M <= MATVEC_TOKENS and 0 < K <= MATVEC_COLUMNS and M > 0
    if not (fits and isa and uses_native(values, layout, row_scale)):
        return layout_matmul(*quantise_tokens(values), layout, num_rows, row_scale)
    out = torch.empty(M, num_rows)
    native_library().arb_two_bit_matvec(
        *(isa, values.data_ptr(), layout.data_ptr(), M, num_rows, K, row_scale.data_ptr(), out.data_ptr())
    )
    return out


def layout_matmul(
    codes: torch.Tensor, token_scale: torch.Tensor, layout: torch.Tensor, num_rows: int, row_scale: torch.Tensor
) -> torch.Tensor:
    """What `quantise_tokens` gave, int8 (M, K) and float32 (M,), times the decode layout -> float32 (M, N)."""
    M, K = codes.shape
    if not codes.numel() or not instruction_set() or not uses_native(codes, token_scale, layout, row_scale):
        return naive_int8_matmul(codes, from_decode_layout(layout, num_rows, K), token_scale, row_scale, trits=True)
    out = torch.empty(M, num_rows)
    native_library().arb_two_bit_matmul(
        instruction_set(),
        *map(pointer, (codes, layout)),
        *(M, num_rows, K),
        *map(pointer, (token_scale, row_scale, out)),
    )
    return out
