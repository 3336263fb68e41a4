"""Generation: transformers' own, with a cache whose side layers are there from the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation.utils import GenerationMixin


class ArbGenerationMixin(GenerationMixin):
    """Every mode of `generate` that transformers ships, cached and uncached, dynamic and static."""

    if TYPE_CHECKING:  # transformers types `self` as a protocol that a class with a config of its own does not meet
        model: Any

        def generate(self, *args, **kwargs) -> Any: ...

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """Assisted decoding tells all layers to record their past before the model has run once: they must be there."""
        prepare: Any = super()._prepare_cache_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        prepare(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            self.model.side_layers.add_to(cache)
            if generation_config.is_assistant:
                cache.activate_past_recording()
