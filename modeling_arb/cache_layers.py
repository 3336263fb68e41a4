"""What the cache keeps beside latents: the bytes seen, the motifs found, the sequencer's state."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer


class StateLayer(DynamicLayer):
    """A recurrent state, replaced by each update instead of growing: hidden and cell, (B, 1, 1, H) each."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return self.keys, self.values

    def crop(self, max_length: int) -> None:
        raise ValueError(f"max_length={max_length}: text_sequencer's state cannot go back to an earlier byte")


class SideLayers:
    """The layers behind the attention layers of a cache, in a fixed order."""

    def __init__(self, config):
        self.first = config.num_hidden_layers
        kinds = {"ids": DynamicLayer}
        if config.composite is not None:
            kinds["motifs"] = DynamicLayer
        if config.text_sequencer is not None:
            kinds["sequencer"] = StateLayer
        self.kinds = kinds

    def add_to(self, cache: Cache) -> None:
        """Give a cache that has only attention layers the others."""
        if len(cache.layers) == self.first:
            cache.layers.extend(kind() for kind in self.kinds.values())

    def _index(self, name: str) -> int:
        return self.first + list(self.kinds).index(name)

    def append_tokens(self, cache: Cache | None, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 (B, T) join what is kept; returns those before them, int64 (B, P)."""
        if cache is None:
            return tokens[:, :0]
        seen = tokens.to(torch.int32)[:, None, :, None]
        seen, _ = cache.update(seen, seen[..., :0], self._index(name))
        return seen[:, 0, : -tokens.shape[1], 0].long()

    def read_state(self, cache: Cache | None, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Hidden and cell (B, H), or None at the start."""
        layer = None if cache is None else cache.layers[self._index(name)]
        if layer is None or not layer.is_initialized:
            return None
        return layer.keys[:, 0, 0], layer.values[:, 0, 0]

    def write_state(self, cache: Cache | None, name: str, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        if cache is not None:
            hidden, cell = (tensor[:, None, None] for tensor in state)
            cache.update(hidden, cell, self._index(name))
