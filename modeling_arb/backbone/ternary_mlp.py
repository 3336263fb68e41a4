"""Ternary MLP: up, squared ReLU (Primer, So et al. 2021), norm, down."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_linear import TernaryLinear


class TernaryMLP(nn.Module):
    """(B, T, D) -> (B, T, D), added to the residual stream by the caller."""

    def __init__(self, config: ArbConfig, intermediate_size: int, role: str = "mlp"):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.up_proj = TernaryLinear(config.hidden_size, intermediate_size, config, role)
        self.down_proj = TernaryLinear(intermediate_size, config.hidden_size, config, role)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.up_proj(rms_norm(x, self.eps))).square()
        return self.down_proj(rms_norm(hidden, self.eps))
