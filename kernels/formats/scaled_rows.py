"""Float weights S * T of a whole matrix or of some of its rows: transients of one matmul or lookup."""

from __future__ import annotations

import torch

from arb_kernels.backend import uses_triton

from .groups import spread_groups
from .packing import trits_per_weight, unpack_levels
from .packing_triton import triton_effective_weight, triton_gather_rows


def effective_weight(
    packed: torch.Tensor, columns: int, scale: torch.Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """packed uint8 (N, bytes), scale float32 (N, groups) -> `dtype` (N, K)."""
    if packed.numel() and uses_triton(packed, scale, trits=trits_per_weight(packed, columns)):
        return triton_effective_weight(packed, columns, scale, group_size, dtype)
    return (unpack_levels(packed, columns, torch.float32) * spread_groups(scale, group_size, columns)).to(dtype)


def gather_rows(
    packed: torch.Tensor,
    ids: torch.Tensor,
    columns: int,
    scale: torch.Tensor,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows `ids` int64 (...) of a packed table, scale float32 (..., groups) of just those rows -> `dtype` (..., K)."""
    if ids.numel() and columns and uses_triton(packed, ids, scale, trits=trits_per_weight(packed, columns)):
        return triton_gather_rows(packed, ids, columns, scale, group_size, dtype)
    flat = effective_weight(packed[ids.flatten()], columns, scale.flatten(0, -2), group_size, dtype)
    return flat.view(*ids.shape, columns)
