"""Groups of neighbouring columns that share one number: a scale, a vote, a momentum step. Rows of any length work."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def num_groups(columns: int, group_size: int) -> int:
    """Groups in a row of `columns` weights; the last one may be shorter."""
    return -(-columns // group_size)


def split_groups(matrix: torch.Tensor, group_size: int) -> torch.Tensor:
    """(N, K) -> (N, groups, group_size), the last group padded with zeros."""
    padding = -matrix.shape[1] % group_size
    return (F.pad(matrix, (0, padding)) if padding else matrix).unflatten(1, (-1, group_size))


def spread_groups(values: torch.Tensor, group_size: int, columns: int) -> torch.Tensor:
    """(N, groups) -> (N, columns): every weight gets its group's value. One group a row stays (N, 1) and broadcasts."""
    if values.shape[1] == 1:
        return values
    return values.unsqueeze(-1).expand(-1, -1, group_size).flatten(1)[:, :columns]


def group_lengths(columns: int, group_size: int, device: torch.device) -> torch.Tensor:
    """float32 (groups,): how many weights each group of a row holds."""
    groups = num_groups(columns, group_size)
    lengths = torch.full((groups,), float(group_size), device=device)
    lengths[-1] = columns - (groups - 1) * group_size
    return lengths
