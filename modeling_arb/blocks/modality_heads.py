"""VideoHead and TalkerHead: predict the next video latent and the next audio code from a hidden state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_linear import TernaryLinear


class ModalityHead(nn.Module):
    """(B, T, D) -> (B, T, outputs) through one hidden layer."""

    def __init__(self, config: ArbConfig, hidden_size: int, outputs: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        hidden_size = hidden_size or 4 * config.hidden_size
        self.up_proj = TernaryLinear(config.hidden_size, hidden_size, config)
        self.down_proj = TernaryLinear(hidden_size, outputs, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.up_proj(rms_norm(x, self.eps))).square()
        return self.down_proj(rms_norm(hidden, self.eps))


class VideoHead(ModalityHead):
    """(B, T, D) -> latents (B, T, latent_dim)."""

    def __init__(self, config: ArbConfig):
        super().__init__(config, config.block("video_head")["hidden_size"], config.block("video_head")["latent_dim"])

    def loss(self, latents: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean squared error against targets (B, T, latent_dim): position t predicts targets[:, t + 1]."""
        return F.mse_loss(latents[:, :-1].float(), targets[:, 1:].float())


class TalkerHead(ModalityHead):
    """(B, T, D) -> logits over audio codes (B, T, num_codes)."""

    def __init__(self, config: ArbConfig):
        super().__init__(config, config.block("talker_head")["hidden_size"], config.block("talker_head")["num_codes"])

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy against labels (B, T), -100 where not scored: position t predicts labels[:, t + 1]."""
        targets = labels[:, 1:].flatten()
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
        return total / (targets >= 0).sum().clamp(min=1)
