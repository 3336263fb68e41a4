"""Generation: transformers' own, with a cache whose side layers are there from the start."""

from __future__ import annotations

from transformers.generation.utils import GenerationMixin


class ArbGenerationMixin(GenerationMixin):
    """Every mode of `generate` that transformers ships, cached and uncached, dynamic and static."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """Assisted decoding tells all layers to record their past before the model has run once: they must be there."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            self.model.side_layers.add_to(cache)
            if generation_config.is_assistant:
                cache.activate_past_recording()
