"""Streamed text: files larger than memory, weighted mixtures, hub datasets.

Held out and never trained on: the first part of files, small ones whole, in the order of a hash of their names, until
HELD_OUT_SHARE of a source or its share of MOST_HELD_OUT bytes is reached; the first documents of a hub dataset.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from arb_kernels.random_bits import stream_key

from .block_windows import FileShards, Pieces, Place, WindowedBlocks, read_windows
from .document_readers import PACKED_RATIO, TEXT_COLUMN, TO_THE_END, cursor_after, document_ids, join, read_front
from .mixed_stream import MixedStream
from .text_files import HELD_OUT_SHARE, by_name_hash, collect_files

MOST_HELD_OUT = 1 << 23
# large files give so many stretches, not one of them all
HELD_OUT_PLACES = 16
HELD_OUT_DOCUMENTS = 100
STRETCH = 1 << 14
ROWS_AT_A_TIME = 64


def stream_files(
    items: Sequence[tuple[Sequence[str], float]], ctx: int, seed: int, text_column: str = TEXT_COLUMN
) -> tuple[MixedStream, np.ndarray]:
    """Blocks of the sources, (paths and globs, weight) each, and held-out ids uint16 (n,) in the same shares.

    Raises ValueError where a file cannot be read, belongs to two sources, or a source is too short for `ctx`.
    """
    total = sum(weight for _, weight in items)
    sources, parts, owners = [], [], {}
    for number, (patterns, weight) in enumerate(items):
        name = " ".join(patterns)
        files = [path for path in collect_files(patterns) if path.stat().st_size]
        if not files:
            raise ValueError(f"data={name!r} is empty: 0 bytes")
        for path in files:
            if owners.setdefault(path, number) != number:
                raise ValueError(f"data={name!r}: {str(path)!r} is in {' '.join(items[owners[path]][0])!r} too")
            if not os.access(path, os.R_OK):
                raise ValueError(f"data={str(path)!r} cannot be read: no permission")
        shards, held_out = hold_out(files, ctx, int(MOST_HELD_OUT * weight / total), text_column)
        pieces = FileShards(shards, stream_key(seed, number), text_column)
        identity = f"data={name!r}: {pieces.identity}"
        sources.append(_checked(pieces, identity, ctx, stream_key(seed, number), held_out))
        parts.append(held_out)
    return MixedStream(sources, [weight for _, weight in items], seed), interleave(parts)


def hold_out(
    files: Sequence[Path], ctx: int, most: int, text_column: str = TEXT_COLUMN
) -> tuple[list[tuple[Path, int]], np.ndarray]:
    """(file, cursor where training begins) of the training part, and the held-out ids uint16 (n,)."""
    wanted = max(min(int(HELD_OUT_SHARE * sum(path.stat().st_size for path in files)), most), 2 * ctx)
    a_place = max(wanted // min(len(files), HELD_OUT_PLACES), 1)
    starts, parts, size = dict.fromkeys(files, 0), [], 0
    for path in by_name_hash(files):
        if size >= wanted:
            break
        whole = path.stat().st_size <= a_place
        size += path.stat().st_size if whole else a_place
        end = TO_THE_END if whole else cursor_after(path, a_place)
        ids, rest = read_front(path, text_column, end, PACKED_RATIO * a_place)
        parts.append(ids)
        if rest is None:
            del starts[path]
        else:
            starts[path] = rest
    return list(starts.items()), join(parts)


def interleave(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The parts' ids uint16 (n,), interleaved so that any prefix holds about each part's share."""
    cut = []
    for part in parts:
        stretches = [part[begin : begin + STRETCH] for begin in range(0, len(part), STRETCH)]
        cut += [((number + 0.5) / len(stretches), stretch) for number, stretch in enumerate(stretches)]
    return join(stretch for _, stretch in sorted(cut, key=lambda item: item[0]))


def stream_dataset(
    name: str, ctx: int, seed: int, text_column: str = TEXT_COLUMN, held_out_documents: int = HELD_OUT_DOCUMENTS
) -> tuple[MixedStream, np.ndarray]:
    """A hub dataset, or a local folder of jsonl/parquet/text, read as a stream: training blocks and held-out ids.

    The first `held_out_documents` are never trained on. Rows keep the dataset's order and blocks are shuffled in seeded
    windows, because the library's shuffle buffer is not restored at a resume. Raises ValueError when the dataset cannot
    be found or has no such column.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=True)
        first = next(iter(rows), None)
    except (OSError, ValueError, LookupError, StopIteration) as error:
        raise _unreadable(name, error) from error
    if first is None:
        raise ValueError(f"dataset={name!r} is empty")
    if not isinstance(first.get(text_column), str):
        raise ValueError(f"text_column={text_column!r} is not a text column of dataset={name!r}: {', '.join(first)}")
    held_out = join(document_ids(row[text_column]) for row in rows.take(held_out_documents))
    if len(held_out) < ctx:
        raise ValueError(f"ctx={ctx} is longer than the held-out part of dataset={name!r}: {len(held_out)} bytes")
    if next(iter(rows.skip(held_out_documents)), None) is None:
        raise ValueError(f"dataset={name!r} has no more than the {held_out_documents} documents that are held out")
    pieces = DatasetRows(name, rows, text_column, held_out_documents)
    source = _checked(pieces, f"dataset={name!r} of {text_column!r}", ctx, stream_key(seed, 0), held_out)
    return MixedStream([source], [1.0], seed), held_out


class DatasetRows:
    """Pieces of a streaming `datasets` dataset after its first `skip` rows; a place is a state dict of that library."""

    def __init__(self, name: str, rows, text_column: str, skip: int):
        self.name, self.rows, self.text_column, self.skip = name, rows, text_column, skip

    def __call__(self, epoch: int, place: Place) -> Iterator[tuple[Place, np.ndarray]]:
        left = self.rows.skip(self.skip)
        here = place or left.state_dict()
        left.load_state_dict(here)
        rows = iter(left)
        while True:
            try:
                ids = [document_ids(row[self.text_column]) for row in islice(rows, ROWS_AT_A_TIME)]
            except (OSError, ValueError, LookupError) as error:
                raise _unreadable(self.name, error) from error
            if not ids:
                return
            yield here, join(ids)
            here = left.state_dict()


def _unreadable(name: str, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or ["no rows in it"])[0]
    return ValueError(f"dataset={name!r} cannot be read: {reason}")


def _checked(pieces: Pieces, identity: str, ctx: int, seed: int, held_out: np.ndarray) -> WindowedBlocks:
    """The source's blocks. Raises ValueError if training or held-out part is shorter than a block."""
    short = [("held-out", len(held_out))] if len(held_out) < ctx else []
    if next(read_windows(pieces(0, None), ctx, 1, 0), None) is None:
        short.append(("training", sum(len(ids) for _, ids in pieces(0, None))))
    for part, size in short:
        raise ValueError(f"ctx={ctx} is longer than the {part} part of {identity}: {size} bytes")
    return WindowedBlocks(pieces, ctx, seed, identity)
