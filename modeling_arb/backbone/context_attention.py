"""Context attention: multi-head latent attention (DeepSeek-V2, section 2.1) with a sigmoid output gate, all ternary.

Keys and values come from one small latent per token, plus one rotary key shared by all heads: the cache keeps only
those. Every ternary matrix reads a normalised input, and queries and keys are normalised per head. windowed_context.py
can limit a query to the last bytes and summaries of earlier ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from arb_kernels.blocks.sigmoid import sigmoid
from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.rotary import rotate
from modeling_arb.layers.ternary_linear import TernaryLinear

from .windowed_context import WindowedContext, summarise_blocks


class ContextAttention(nn.Module):
    """(B, T, D) -> (B, T, D), added to the residual stream by the caller."""

    def __init__(self, config: ArbConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.eps = config.rms_norm_eps
        self.num_heads = config.num_attention_heads
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_dim, self.latent_dim = config.v_head_dim, config.kv_latent_dim
        width, heads = config.hidden_size, config.num_attention_heads
        self.q_proj = TernaryLinear(width, heads * (self.nope_dim + self.rope_dim), config, "attention")
        self.kv_down_proj = TernaryLinear(width, self.latent_dim + self.rope_dim, config, "attention")
        self.kv_up_proj = TernaryLinear(self.latent_dim, heads * (self.nope_dim + self.v_dim), config, "attention")
        self.gate_proj = TernaryLinear(width, heads * self.v_dim, config, "attention")
        self.o_proj = TernaryLinear(heads * self.v_dim, width, config, "attention")

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        angles: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        windowed: WindowedContext | None = None,
    ) -> torch.Tensor:
        """attention_mask: (B, 1, T, P + T) or None for plain causal; angles: cos and sin of the T new positions;
        windowed: the context that replaces the full one."""
        x = rms_norm(x, self.eps)
        query = self._query(x, angles)
        latent, rotary_key = self._latent(x, angles)
        if past_key_values is not None:
            latent, rotary_key = past_key_values.update(latent, rotary_key, self.layer_idx)
        if windowed is not None:
            attention_mask = windowed.mask
            latent, rotary_key = summarise_blocks(windowed, latent, rotary_key, self.eps)
        key, value = self._expand(latent, rotary_key)
        causal = attention_mask is None and query.shape[2] > 1
        exact = past_key_values is not None or not self.training
        mixed = _attend(query, key, value, attention_mask, causal, exact)
        mixed = mixed.transpose(1, 2).flatten(2) * sigmoid(self.gate_proj(x))
        return self.o_proj(rms_norm(mixed, self.eps))

    def _query(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(B, T, D) -> (B, H, T, nope + rope)."""
        query = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        nope, rope = query.split([self.nope_dim, self.rope_dim], dim=-1)
        return torch.cat([rms_norm(nope, self.eps), rotate(rms_norm(rope, self.eps), angles)], dim=-1)

    def _latent(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D) -> the cached tensors: latent (B, 1, T, latent), rotary key (B, 1, T, rope)."""
        down = self.kv_down_proj(x).unsqueeze(1)
        latent, rotary_key = down.split([self.latent_dim, self.rope_dim], dim=-1)
        return rms_norm(latent, self.eps), rotate(rms_norm(rotary_key, self.eps), angles)

    def _expand(self, latent: torch.Tensor, rotary_key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents -> keys (B, H, S, nope + rope), values (B, H, S, v)."""
        up = self.kv_up_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        nope, value = up.split([self.nope_dim, self.v_dim], dim=-1)
        rotary_key = rotary_key.expand(-1, self.num_heads, -1, -1)
        return torch.cat([rms_norm(nope, self.eps), rotary_key], dim=-1), value


def _attend(query, key, value, mask: torch.Tensor | None, causal: bool, exact: bool) -> torch.Tensor:
    """Scaled dot product attention, (B, H, T, v).

    exact: on a CPU, compute in float64. In float32 the last bit depends on the number of queries and keys, and one bit
    can change an int8 code and the choice of an expert: cached decoding would differ from the full forward, and a row
    from the same row in a batch. The caller sets it with a cache or in eval mode. Training does not need it and would
    be slower. It must not depend on whether autograd records, because gradient checkpointing runs a block once without
    and once with autograd.
    """
    dtype = query.dtype
    if exact and query.device.type == "cpu":
        query, key, value = query.double(), key.double(), value.double()
        mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal).to(dtype)
