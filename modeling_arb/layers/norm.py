"""RMSNorm without gain: a gain would be a float parameter, and the ternary matrix that follows has its own scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """(..., D) -> (..., D) with unit mean square over the last axis (Zhang & Sennrich 2019, eq. 4, g = 1)."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)
