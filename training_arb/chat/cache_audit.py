"""Measures a cache by its own tensors, and compares it with plain multi-head attention's of the same width."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from configuration_arb import ArbConfig


@dataclass(frozen=True)
class CacheSize:
    """Of one row. per_token: bytes each position takes in all layers; fixed: bytes that do not grow with the text;
    plain_per_token: bytes of a key and a value as wide as the model, in every layer and the same dtype."""

    per_token: float
    fixed: float
    plain_per_token: int

    def __str__(self) -> str:
        share = self.per_token / self.plain_per_token
        return (
            f"cache: {self.per_token:,.0f} bytes a token, {share:.1%} of plain multi-head keys and values'"
            f" {self.plain_per_token:,}; {self.fixed:,.0f} bytes beside"
        )


def cache_size(cache: Cache, config: ArbConfig) -> CacheSize:
    """The size of a filled cache. Raises ValueError if it is empty."""
    per_token = fixed = 0.0
    element = 0
    for layer in cache.layers:
        if not isinstance(layer, CacheLayerMixin) or layer.keys is None or layer.values is None:
            raise ValueError("past_key_values is empty, nothing can be measured")
        row = (layer.keys.nbytes + layer.values.nbytes) / len(layer.keys)
        if isinstance(layer, DynamicSlidingWindowLayer):
            fixed += row
        else:
            element = layer.keys.element_size()
            per_token += row / layer.keys.shape[2]
    return CacheSize(per_token, fixed, 2 * config.hidden_size * config.num_hidden_layers * element)
