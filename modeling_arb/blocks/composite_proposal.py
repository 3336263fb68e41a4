"""Composite proposal: each pair of successive motifs selects a row of a second book, which is added before the head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from arb_kernels.blocks.ngram_hash import hash_tokens, to_slot
from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_linear import TernaryLinear

from .ternary_codebook import TernaryCodebook

NO_MOTIF = -1  # before the first byte


class CompositeProposal(nn.Module):
    """The pair's hashes select candidate rows, the hidden state the nearest of them, which an MLP widens to D."""

    def __init__(self, config: ArbConfig):
        super().__init__()
        settings = config.block("composite")
        self.eps, self.size, self.hashes = config.rms_norm_eps, settings["size"], settings["hashes"]
        hidden = settings["hidden_size"] or config.hidden_size
        self.query_proj = TernaryLinear(config.hidden_size, settings["dim"], config)
        self.book = TernaryCodebook(settings, config)
        self.up_proj = TernaryLinear(settings["dim"], hidden, config)
        self.down_proj = TernaryLinear(hidden, config.hidden_size, config)

    def forward(
        self, x: torch.Tensor, motif_ids: torch.Tensor, previous_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, T, D), motif_ids and those before them int64 (B, T) -> the addition (B, T, D), the book's loss ()."""
        pairs = torch.stack([previous_ids, motif_ids], dim=-1)
        candidates = [to_slot(hash_tokens(pairs, seed), self.size) for seed in range(self.hashes)]
        query = rms_norm(self.query_proj(rms_norm(x, self.eps)), self.eps)
        chosen = self.book(query, torch.stack(candidates, dim=-1))
        hidden = F.relu(self.up_proj(rms_norm(chosen.values, self.eps))).square()
        return self.down_proj(rms_norm(hidden, self.eps)), chosen.loss
