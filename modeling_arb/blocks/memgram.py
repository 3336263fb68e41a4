"""MemGram: byte n-grams are hashed to rows of one large ternary table, which are added through a gate."""

from __future__ import annotations

import torch
from torch import nn

from arb_kernels.blocks.ngram_hash import ngram_slots
from arb_kernels.blocks.sigmoid import sigmoid
from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.backbone.byte_embedding import preceded_by
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_linear import TernaryLinear
from modeling_arb.layers.ternary_table import TernaryTable


class MemGram(nn.Module):
    """ids (B, T) and the ids before them -> (B, T, D), added to the residual stream by the caller.

    Each n-gram that ends at a position, one for each length in `orders`, selects a row of width `dim`. The sum of the
    rows is gated by the position's own state and projected to D.
    """

    def __init__(self, config: ArbConfig):
        super().__init__()
        settings = config.block("memgram")
        self.eps, self.pad_token_id = config.rms_norm_eps, config.pad_token_id
        self.orders, self.slots = settings["orders"], settings["slots"]
        self.table = TernaryTable(self.slots, settings["dim"], config)
        self.gate_proj = TernaryLinear(config.hidden_size, settings["dim"], config)
        self.out_proj = TernaryLinear(settings["dim"], config.hidden_size, config)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """x (B, T, D), ids (B, T), history (B, P): the ids before them."""
        slots = [
            ngram_slots(preceded_by(history, ids, order - 1, self.pad_token_id), order, self.slots)
            for order in self.orders
        ]
        memory = self.table(torch.stack(slots, dim=-1), x.dtype).sum(-2)  # (B, T, dim)
        gate = sigmoid(self.gate_proj(rms_norm(x, self.eps)))
        return self.out_proj(rms_norm(memory, self.eps) * gate)
