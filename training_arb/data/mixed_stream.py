"""MixedStream: blocks of several sources in proportion to their weights, with a position that a checkpoint stores.

The seed determines one global order. accelerate gives each rank its batches of it (IterableDatasetShard), so any number
of ranks trains on the same blocks, and a position does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from arb_kernels.random_bits import random_bits, stream_key

from .block_windows import WindowedBlocks

CHOICES = 4096


class MixedStream(IterableDataset):
    """Endless `{"input_ids": int64 (ctx,)}`; each block's source is drawn with the weights' odds."""

    def __init__(self, sources: Sequence[WindowedBlocks], weights: Sequence[float], seed: int):
        self.sources, self.seed = sources, seed
        self._bounds = np.cumsum(weights)[:-1] / sum(weights) * 2.0**32
        self._start, self._taken = 0, np.zeros(len(sources), dtype=np.int64)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        if worker is not None:
            raise ValueError(f"dataloader_num_workers={worker.num_workers}: {SINGLE_READER}")
        runs = [iter(source) for source in self.sources]
        self._taken = np.zeros(len(runs), dtype=np.int64)
        for number in count(self._start):
            if number == self._start or number % CHOICES == 0:
                choices = self._choices(number // CHOICES)
            source = choices[number % CHOICES]
            block = torch.from_numpy(next(runs[source]).astype(np.int64))
            self._taken[source] += 1
            yield {"input_ids": block}

    def state_dict(self, blocks: int) -> dict:
        """The position, as JSON, after the first `blocks` blocks since it was loaded, or since the beginning.

        Blocks that were only prefetched do not count: blocks = steps * blocks per step over all ranks.
        """
        first, last = self._start + blocks, self._start + int(self._taken.sum())
        assert first <= last, f"{blocks} blocks of {last - self._start} that were read"
        taken = self._taken.copy()
        for chunk in range(first // CHOICES, -(-last // CHOICES)):
            begin = chunk * CHOICES
            ahead = self._choices(chunk)[max(first - begin, 0) : last - begin]
            taken -= np.bincount(ahead, minlength=len(taken))
        return {
            "blocks": first,
            "sources": [
                {"identity": source.identity, **source.state_dict(int(own))}
                for source, own in zip(self.sources, taken, strict=True)
            ],
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from there at the next iteration. Raises ValueError if the sources differ from those of the
        state."""
        try:
            stored, here = ([s["identity"] for s in state["sources"]], [s.identity for s in self.sources])
            if stored != here:
                raise ValueError(f"data has changed: the checkpoint reads {stored}, this run {here}")
            self._start = int(state["blocks"])
            for source, own in zip(self.sources, state["sources"], strict=True):
                source.load_state_dict(own)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a position of a stream: {str(state)[:80]}") from error
        self._taken[:] = 0

    def _choices(self, chunk: int) -> np.ndarray:
        """int64 (CHOICES,): the sources of blocks chunk * CHOICES on."""
        words = random_bits(stream_key(self.seed, chunk), 1, CHOICES)[0].numpy().view(np.uint32)
        return np.searchsorted(self._bounds, words, side="right")


SINGLE_READER = "streamed data is read by the training process itself, use 0"


def configure_reading(args: TrainingArguments) -> None:
    """Make each rank read its own data instead of rank 0 for all. Raises ValueError on settings that change the
    order."""
    config = args.accelerator_config
    assert isinstance(config, AcceleratorConfig)  # TrainingArguments makes one of whatever it was given
    if config.split_batches:
        raise ValueError("accelerator_config: split_batches=True is not supported with streamed data")
    if args.dataloader_num_workers:
        raise ValueError(f"dataloader_num_workers={args.dataloader_num_workers}: {SINGLE_READER}")
    config.dispatch_batches = False
