"""Causal trigram embedding: position t sees bytes t, t-1 and t-2, each through a ternary table of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .ternary_embedding import TernaryEmbedding

TRIGRAM = 3


class ByteEmbedding(nn.Module):
    """Sum of three ternary tables (288, D), one for each byte of the trigram."""

    def __init__(self, config):
        super().__init__()
        self.pad_token_id = config.pad_token_id
        self.tables = nn.ModuleList(
            TernaryEmbedding(config.vocab_size, config.hidden_size, config) for _ in range(TRIGRAM)
        )

    def forward(self, ids: torch.Tensor, history: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ids (B, T); history (B, P): the ids before them, oldest first. Before the start stands PAD. -> (B, T, D)."""
        length = ids.shape[1]
        context = torch.cat([history[:, -(TRIGRAM - 1) :], ids], dim=1)
        context = F.pad(context, (length + TRIGRAM - 1 - context.shape[1], 0), value=self.pad_token_id)
        return sum(
            table(context[:, TRIGRAM - 1 - back : TRIGRAM - 1 - back + length], dtype)
            for back, table in enumerate(self.tables)
        )
