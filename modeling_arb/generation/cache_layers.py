"""Cache layers for data beside the attention latents (last bytes, last motif, sequencer state), and static layers.

The side layers follow the attention layers and do not grow with the text: each is a stock sliding window over the last
positions. After `activate_past_recording`, which assisted decoding calls, they can be cropped to an earlier byte like
any other layer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from configuration_arb.configuration_arb import ArbConfig
from configuration_arb.optional_blocks import switched_on
from modeling_arb.backbone.byte_embedding import TRIGRAM


class PreallocatedLayer(DynamicLayer):
    """A static layer that returns only the filled positions. No work is spent on empty positions, and results equal
    those of a dynamic layer bit for bit."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, max_cache_len: int):
        super().__init__()
        self.max_cache_len, self.filled = max_cache_len, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            torch.zeros(*states.shape[:2], self.max_cache_len, states.shape[-1], dtype=states.dtype, device=self.device)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """(B, 1, T, ...) each -> all filled positions, (B, 1, P + T, ...). Raises ValueError if they do not fit."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        if self.filled > self.max_cache_len:
            raise ValueError(f"max_cache_len={self.max_cache_len}: {self.filled} positions do not fit the static cache")
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        self.filled = 0

    def crop(self, tokens_to_remove: int) -> None:
        self.filled -= abs(tokens_to_remove)


class SideLayers:
    """The side layers of a cache, after the attention layers, in a fixed order."""

    def __init__(self, config: ArbConfig):
        self.first = config.num_hidden_layers
        self.reach = {"ids": TRIGRAM - 1}  # how many positions back a layer must tell of
        for block, settings in switched_on(config):
            for name, back in block.cached(settings).items():
                self.reach[name] = max(back, self.reach.get(name, 0))

    def add_to(self, cache: Cache) -> None:
        """Append the side layers to a cache with attention layers only. Raises ValueError if the cache belongs to
        another model."""
        while cache.layer_class_to_replicate is not None and len(cache.layers) < self.first:
            cache.layers.append(cache.layer_class_to_replicate())
        if len(cache.layers) == self.first:
            cache.layers = [_in_place(layer) for layer in cache.layers]
            cache.layers += [DynamicSlidingWindowLayer(back + 1) for back in self.reach.values()]
        expected = self.first + len(self.reach)
        if len(cache.layers) != expected:
            raise ValueError(f"past_key_values has {len(cache.layers)} layers: this model's has {expected}")

    def _index(self, name: str) -> int:
        return self.first + list(self.reach).index(name)

    def append_tokens(self, cache: Cache | None, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens int64 (B, T); returns the tokens kept before, int64 (B, at most the window)."""
        if cache is None:
            return tokens[:, :0]
        kept = tokens.to(torch.int32)[:, None, :, None]
        kept, _ = cache.update(kept, kept[..., :0], self._index(name))
        return kept[:, 0, : -tokens.shape[1], 0].long()

    def read_state(self, cache: Cache | None, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Hidden state and cell (B, H); None at the start."""
        layer: Any = None if cache is None else cache.layers[self._index(name)]
        if layer is None or not layer.get_seq_length():
            return None
        return layer.keys[:, 0, -1], layer.values[:, 0, -1]

    def write_states(self, cache: Cache, name: str, states: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """states: hidden and cell (B, H) after each new position."""
        hidden, cell = (torch.stack(tensors, dim=1)[:, None] for tensors in zip(*states, strict=True))
        cache.update(hidden, cell, self._index(name))


def _in_place(layer):
    """The layer; a stock static layer is replaced by ours of the same length."""
    if not isinstance(layer, StaticLayer):
        return layer
    if layer.get_seq_length():
        raise ValueError("past_key_values: this static cache was filled by another model")
    return PreallocatedLayer(layer.max_cache_len)
