"""Shared VQ: the hidden state through a narrow bridge to the nearest motif of a book, and back."""

from __future__ import annotations

import torch
from torch import nn

from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_linear import TernaryLinear

from .ternary_codebook import Quantised, TernaryCodebook


class SharedVQ(nn.Module):
    """(B, T, D) -> the addition to the residual stream (B, T, D), and the motifs chosen."""

    def __init__(self, config: ArbConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        dim = config.block("codebook")["dim"]
        self.bridge_in = TernaryLinear(config.hidden_size, dim, config)
        self.book = TernaryCodebook(config.block("codebook"), config)
        self.bridge_out = TernaryLinear(dim, config.hidden_size, config)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Quantised]:
        narrow = rms_norm(self.bridge_in(rms_norm(x, self.eps)), self.eps)
        motifs = self.book(narrow)
        return self.bridge_out(rms_norm(motifs.values, self.eps)), motifs
