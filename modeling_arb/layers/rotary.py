"""Rotary position (RoFormer, eq. 34), computed from the position ids in every forward, so no table is stored or
loaded."""

from __future__ import annotations

import torch


def rotary_angles(position_ids: torch.Tensor, dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """position_ids (B, T) -> cos, sin float32 (B, 1, T, dim), halves repeated; dim even."""
    steps = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[:, None, :, None].float() * theta ** (-steps / dim)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x (B, H, T, dim) turned by its position's angles, pair (i, i + dim/2) by angle i."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
