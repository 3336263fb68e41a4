"""Causal trigram embedding: position t reads bytes t, t-1 and t-2, each through its own ternary table."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import nn

from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.ternary_embedding import TernaryEmbedding

TRIGRAM = 3


def preceded_by(history: torch.Tensor, ids: torch.Tensor, count: int, pad_token_id: int | None) -> torch.Tensor:
    """(B, count + T): the last `count` ids of history (B, P), then ids (B, T). Positions before the start hold PAD."""
    context = torch.cat([history[:, max(0, history.shape[1] - count) :], ids], dim=1)
    return F.pad(context, (count + ids.shape[1] - context.shape[1], 0), value=pad_token_id)


class ByteEmbedding(nn.Module):
    """Sum of three ternary tables (288, D), one for each byte of the trigram."""

    def __init__(self, config: ArbConfig):
        super().__init__()
        self.pad_token_id = config.pad_token_id
        self.tables = nn.ModuleList(
            TernaryEmbedding(config.vocab_size, config.hidden_size, config) for _ in range(TRIGRAM)
        )

    def forward(self, ids: torch.Tensor, history: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ids (B, T); history (B, P): the preceding ids, oldest first; PAD before the start. -> (B, T, D)."""
        length = ids.shape[1]
        context = preceded_by(history, ids, TRIGRAM - 1, self.pad_token_id)
        parts = (
            table(context[:, TRIGRAM - 1 - back : TRIGRAM - 1 - back + length], dtype)
            for back, table in enumerate(self.tables)
        )
        return reduce(torch.add, parts)
