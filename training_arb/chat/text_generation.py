"""Generates text from many prompts with one model and one set of options, and measures speed and cache."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from modeling_arb import ArbForCausalLM

from .cache_audit import cache_size


class StopOnInterrupt(StoppingCriteria):
    """Ctrl-C ends a text after the current token, with a cache that holds it; a second one raises."""

    def __init__(self):
        self.interrupted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive Ctrl-C within the block; the handler from before is restored after it."""
        self.interrupted = False
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread install handlers
            return
        before = signal.signal(signal.SIGINT, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _receive(self, signum: int, frame) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.interrupted, device=input_ids.device)


class TextGenerator:
    """`options` are `generate`'s. `cache` is what the last call left, None where the next call starts anew."""

    def __init__(self, model: ArbForCausalLM, **options):
        self.model, self.options = model, options
        self.interrupt = StopOnInterrupt()
        self.cache: Cache | None = None
        self.tokens, self.seconds = 0, 0.0
        self._cache_line = "cache: none"

    def __call__(self, ids: list[int], streamer: BaseStreamer | None = None, cache: Cache | None = None) -> list[int]:
        """The new ids after `ids`. cache: a cache of a prefix of them.

        Raises ValueError if ids and max_new_tokens exceed the model's positions.
        """
        room = self.room - len(ids)
        if room < 0:
            positions = self.model.config.max_position_embeddings
            raise ValueError(
                f"max_new_tokens={self.options['max_new_tokens']}: after {len(ids)} tokens of {positions}"
                f" there is room for {max(positions - len(ids), 0)}"
            )
        prompt = torch.tensor([ids], device=self.model.device)
        self.cache, start = None, time.perf_counter()
        with self.interrupt.listening():
            outputs = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([self.interrupt]),
                return_dict_in_generate=True,
                **self.options,
            )
        self.seconds += time.perf_counter() - start
        new = outputs.sequences[0, len(ids) :].tolist()
        self.tokens += len(new)
        self._keep(outputs.past_key_values)
        return new

    @property
    def room(self) -> int:
        """The longest prompt that fits."""
        return self.model.config.max_position_embeddings - self.options["max_new_tokens"]

    def _keep(self, cache: Cache | None) -> None:
        if cache is None:
            return
        self._cache_line = str(cache_size(cache, self.model.config))
        if self.options.get("num_beams", 1) == 1:
            self.cache = cache

    def summary(self) -> str:
        """Two lines: speed with prompts included, and size of the cache."""
        return f"{self.tokens} tokens, {self.tokens / max(self.seconds, 1e-9):.1f} a second\n{self._cache_line}"
