"""Output router: several projections of the last hidden state, mixed by gates that each position computes."""

from __future__ import annotations

from functools import reduce

import torch
from torch import nn

from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_linear import TernaryLinear


class OutputRouter(nn.Module):
    """(B, T, D) -> (B, T, D), added to the residual stream by the caller."""

    def __init__(self, config: ArbConfig):
        super().__init__()
        self.eps, self.num_heads = config.rms_norm_eps, config.block("output_router")["num_heads"]
        gate_size, width = config.block("output_router")["gate_size"], config.hidden_size
        self.gate_in = TernaryLinear(width, gate_size, config)
        self.gate_out = TernaryLinear(gate_size, self.num_heads, config)
        self.heads = nn.ModuleList(TernaryLinear(width, width, config) for _ in range(self.num_heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = rms_norm(x, self.eps)
        gates = torch.softmax(self.gate_out(rms_norm(self.gate_in(x), self.eps)), dim=-1)  # (B, T, heads)
        gated = (gate * head(x) for gate, head in zip(gates.split(1, dim=-1), self.heads, strict=True))
        return reduce(torch.add, gated)
