"""Generation by transformers, with a cache that has its side layers from the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation.utils import GenerationMixin


class ArbGenerationMixin(GenerationMixin):
    """Supports every mode of transformers' `generate`, without a cache and with a dynamic or static one."""

    if TYPE_CHECKING:  # transformers types `self` as a protocol that a class with a config of its own does not meet
        model: Any

        def generate(self, *args, **kwargs) -> Any: ...

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """Assisted decoding calls `activate_past_recording` on all layers before the first forward, so they must
        exist."""
        prepare: Any = super()._prepare_cache_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        prepare(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            self.model.side_layers.add_to(cache)
            if generation_config.is_assistant:
                cache.activate_past_recording()
