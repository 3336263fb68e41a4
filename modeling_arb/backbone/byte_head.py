"""ByteHead: the 288-way output, and the loss in nats per byte."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_linear import TernaryLinear

from .byte_embedding import TRIGRAM
from .ternary_mlp import TernaryMLP

IGNORE = -100


class ByteHead(nn.Module):
    """(B, T, D) -> logits (B, T, 288), through `head_layers` residual MLPs."""

    def __init__(self, config: ArbConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.layers = nn.ModuleList(
            TernaryMLP(config, config.head_intermediate_size, "head") for _ in range(config.head_layers)
        )
        self.proj = TernaryLinear(config.hidden_size, config.vocab_size, config, "head")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.proj(rms_norm(x, self.eps))


def mask_incomplete_trigrams(labels: torch.Tensor) -> torch.Tensor:
    """labels (B, T), aligned with the ids -> a copy with -100 at bytes that have no full trigram before them."""
    labels = labels.clone()
    labels[:, :TRIGRAM] = IGNORE
    return labels


def next_byte_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy in nats per byte: position t of logits (B, T, V) predicts labels[:, t + 1] of (B, T).

    Mean over the scored bytes, or their sum over `num_items_in_batch` when a Trainer accumulates gradients.
    label_smoothing: share of each target that is spread evenly over all V. It changes the gradient; the returned value
    stays the plain cross-entropy, so that bits per byte stay comparable. Raises ValueError unless it is in [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
    targets = mask_incomplete_trigrams(labels)[:, 1:].flatten()
    predicted = logits[:, :-1].flatten(0, 1).float()
    total = F.cross_entropy(predicted, targets, ignore_index=IGNORE, reduction="sum")
    if label_smoothing:
        smoothed = F.cross_entropy(
            predicted, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
        )
        total = total.detach() + (smoothed - smoothed.detach())
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORE).sum().clamp(min=1)
    return total / num_items_in_batch


def batch_share(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
    """The share of an accumulated step's scored bytes that is in these labels (B, T); 1 without accumulation."""
    if num_items_in_batch is None:
        return 1.0
    return (mask_incomplete_trigrams(labels)[:, 1:] != IGNORE).sum() / num_items_in_batch
