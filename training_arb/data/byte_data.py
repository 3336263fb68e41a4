"""A run's data: training blocks of byte ids and held-out text, from files, folders, globs and hub datasets.

Documents are joined, with an EOS after each, and cut into blocks of equal length. Small text is held in memory and
shuffled by the Trainer's seeded sampler, so the step number is the position in the data. Larger text, weighted mixtures
and hub datasets are streamed; their position is saved in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from modeling_arb.backbone.byte_head import mask_incomplete_trigrams

from .document_readers import TEXT_COLUMN, read_ids, text_size
from .mixed_stream import MixedStream
from .streamed_data import stream_dataset, stream_files
from .text_files import HELD_OUT_SHARE, collect_files, parse_weights, split_files, standard_library_files

MEGABYTE = 1_000_000


def load_corpus(
    patterns: Sequence[str] | None, ctx: int, text_column: str = TEXT_COLUMN
) -> tuple[np.ndarray, np.ndarray]:
    """Train and held-out ids of the files; None: the standard library.

    If whole files give no useful split (one file, or one much larger than the rest), the end of the text is held out.

    Raises ValueError if a part is shorter than one block of `ctx`.
    """
    files = collect_files(patterns) if patterns else standard_library_files()
    name = " ".join(patterns) if patterns else "standard library"
    files = [path for path in files if path.stat().st_size]
    if not files:
        raise ValueError(f"data={name!r} is empty: 0 bytes")
    train, held_out = (read_ids(part, text_column) for part in split_files(files))
    if len(held_out) < max(ctx, HELD_OUT_SHARE / 2 * len(train)):
        ids = read_ids(files, text_column)
        cut = max(len(ids) - max(int(len(ids) * HELD_OUT_SHARE), ctx), 0)
        train, held_out = ids[:cut], ids[cut:]
    for part, ids in (("training", train), ("held-out", held_out)):
        if len(ids) < ctx:
            raise ValueError(f"ctx={ctx} is longer than the {part} part of data={name!r}: {len(ids)} bytes")
    return train, held_out


class ByteBlocks(Dataset):
    """Block i of `ctx` consecutive ids, int64 (ctx,). `most`: keep so many blocks, evenly spread over the text."""

    def __init__(self, ids: np.ndarray, ctx: int, most: int | None = None):
        self.blocks = ids[: len(ids) // ctx * ctx].reshape(-1, ctx)
        if most is not None and most < len(self.blocks):
            self.blocks = self.blocks[np.linspace(0, len(self.blocks) - 1, most).round().astype(int)]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self.blocks[index].astype(np.int64))}


class Corpus(NamedTuple):
    """Training data and held-out data of a run."""

    train: ByteBlocks | MixedStream
    held_out: np.ndarray  # uint16 (n,)
    name: str
    size: str


def open_corpus(
    data: Sequence[str] | None,
    dataset: str | None,
    ctx: int,
    seed: int,
    text_column: str = TEXT_COLUMN,
    stream_above_mb: int = 1024,
) -> Corpus:
    """A hub dataset, or files by PATH[:WEIGHT] (a weight left out is 1), or the standard library.

    Files are streamed if any has a weight, or if their text is larger than `stream_above_mb`.
    """
    if dataset:
        return Corpus(*stream_dataset(dataset, ctx, seed, text_column), dataset, "a stream")
    if not data:
        train, held_out = load_corpus(None, ctx)
        return Corpus(ByteBlocks(train, ctx), held_out, "Python's standard library", f"{len(train):,} bytes")
    name, items = " ".join(data), parse_weights(data)
    patterns = [pattern for pattern, _ in items]
    weighted = any(weight is not None for _, weight in items)
    size, most = 0, stream_above_mb * MEGABYTE
    for path in collect_files(patterns):
        size += text_size(path, text_column, -1 if weighted else most - size)
    if not weighted and size <= most:
        train, held_out = load_corpus(patterns, ctx, text_column)
        return Corpus(ByteBlocks(train, ctx), held_out, name, f"{len(train):,} bytes")
    sources = [([pattern], weight or 1.0) for pattern, weight in items] if weighted else [(patterns, 1.0)]
    return Corpus(*stream_files(sources, ctx, seed, text_column), name, f"about {size:,} bytes, streamed")


def collate_blocks(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Blocks -> input_ids and labels (B, ctx); labels are -100 at bytes without a full trigram before them."""
    input_ids = torch.stack([example["input_ids"] for example in examples])
    return {"input_ids": input_ids, "labels": mask_incomplete_trigrams(input_ids)}
