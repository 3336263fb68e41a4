"""What the votes of the correlation rule add to a group's scale (rules/correlation.py counts them)."""

from __future__ import annotations

import torch

from .groups import group_lengths

STRENGTH = 4.0  # octaves that a correlation of one adds


def correlation_octaves(
    corr_accum: torch.Tensor, step_counter: torch.Tensor, columns: int, group_size: int
) -> torch.Tensor:
    """corr_accum int64 (N, groups), step_counter int64 () or broadcast to it -> float32 (N, groups): what is added to
    log2 of the scale, STRENGTH times the mean correlation of gradient sign and trit."""
    votes = step_counter.clamp(min=1) * group_lengths(columns, group_size, corr_accum.device)
    return (STRENGTH * corr_accum.double() / votes).float()
