"""From files, folders, globs and hub datasets to packed blocks of byte ids, with held-out text kept apart.

Documents stand one after the other, an EOS after each, cut into blocks of equal length. The order of blocks is the
Trainer's sampler's (a seed), so a run's position in the data is its step number: a resumed run reads on where it was.
"""

from __future__ import annotations

import glob
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from configuration_arb.configuration_arb import EOS_ID
from modeling_arb.byte_head import mask_incomplete_trigrams

HELD_OUT_SHARE = 0.05
STANDARD_LIBRARY_SUFFIXES = (".py", ".txt", ".rst")
# encodings: character maps, near copies of each other, of which some would be held out
STANDARD_LIBRARY_SKIPS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings"}


def standard_library_files() -> list[Path]:
    """Source and docs of the running Python's own standard library: real text that needs no download."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*") if path.suffix in STANDARD_LIBRARY_SUFFIXES and path.is_file())
    return sorted(path for path in files if not STANDARD_LIBRARY_SKIPS.intersection(path.relative_to(root).parts))


def collect_files(patterns: Sequence[str]) -> list[Path]:
    """Files named by paths, folders (recursively, hidden ones left out) and globs, sorted, each once.

    Raises ValueError naming the pattern that names no file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.is_file())
            files = {p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)}
        elif path.is_file():
            files = {path}
        else:
            files = {Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()}
        if not files:
            raise ValueError(f"data={pattern!r}: no such file, or no file in it")
        found |= {file.resolve() for file in files}
    return sorted(found)


def split_files(files: Sequence[Path], share: float = HELD_OUT_SHARE) -> tuple[list[Path], list[Path]]:
    """Train and held-out files: whole files, chosen by a hash of their names, until they hold `share` of the bytes.

    A file that alone would more than double the share stays in training; held out is then nothing, or less.
    """
    wanted = share * sum(path.stat().st_size for path in files)
    held_out, size = set(), 0
    for path in sorted(files, key=lambda path: zlib.crc32(str(Path(*path.parts[-3:])).encode())):
        if size < wanted and size + path.stat().st_size <= 2 * wanted:
            held_out.add(path)
            size += path.stat().st_size
    return sorted({*files} - held_out), sorted(held_out)


def read_ids(files: Iterable[Path]) -> np.ndarray:
    """uint16 (n,): the files' bytes, an EOS after each. Empty files are left out."""
    return _join(np.fromfile(path, dtype=np.uint8) for path in files)


def _join(documents: Iterable[np.ndarray]) -> np.ndarray:
    """Documents uint8 (n,) -> one uint16 (n,), an EOS after each that is not empty."""
    end = np.array([EOS_ID], dtype=np.uint16)
    parts = [part for document in documents if document.size for part in (document.astype(np.uint16), end)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)


def _document(row: dict, text_column: str) -> np.ndarray:
    """The text of a dataset's row, uint8 (n,); a missing text is an empty one."""
    return np.frombuffer((row[text_column] or "").encode(), dtype=np.uint8)


def load_corpus(patterns: Sequence[str] | None, ctx: int) -> tuple[np.ndarray, np.ndarray]:
    """Train and held-out ids of the files; None: the standard library.

    Where whole files make no fair split (one file, or one that outweighs the rest) the end of the text is held out.

    Raises ValueError when there is too little text for one block of `ctx` in each.
    """
    files = collect_files(patterns) if patterns else standard_library_files()
    name = " ".join(patterns) if patterns else "standard library"
    files = [path for path in files if path.stat().st_size]
    if not files:
        raise ValueError(f"data={name!r} is empty: 0 bytes")
    train, held_out = map(read_ids, split_files(files))
    if len(held_out) < max(ctx, HELD_OUT_SHARE / 2 * len(train)):
        ids = read_ids(files)
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


class StreamedBlocks(IterableDataset):
    """Blocks of `ctx` ids packed from a stream of rows: a streaming `datasets` dataset, or any iterable of dicts."""

    def __init__(self, rows: Iterable[dict], text_column: str, ctx: int):
        self.rows, self.text_column, self.ctx = rows, text_column, ctx

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        pending = np.zeros(0, dtype=np.uint16)
        for row in self.rows:
            pending = np.concatenate([pending, _join([_document(row, self.text_column)])])
            whole = len(pending) // self.ctx * self.ctx
            for block in pending[:whole].reshape(-1, self.ctx):
                yield {"input_ids": torch.from_numpy(block.astype(np.int64))}
            pending = pending[whole:]


def stream_dataset(
    name: str, ctx: int, seed: int, text_column: str = "text", held_out_documents: int = 100
) -> tuple[StreamedBlocks, np.ndarray]:
    """A hub dataset, or a local folder of jsonl/parquet/text, read as a stream: training blocks and held-out ids.

    The first `held_out_documents` are never trained on; the rest is shuffled through a buffer. Raises ValueError when
    the dataset cannot be found or has no such column.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=True)
        first = next(iter(rows), None)
    except (OSError, ValueError, LookupError, StopIteration) as error:
        reason = (str(error).splitlines() or ["no rows in it"])[0]
        raise ValueError(f"dataset={name!r} cannot be read: {reason}") from error
    if first is None:
        raise ValueError(f"dataset={name!r} is empty")
    if not isinstance(first.get(text_column), str):
        raise ValueError(f"text_column={text_column!r} is no text column of dataset={name!r}: {', '.join(first)}")
    held_out = _join(_document(row, text_column) for row in rows.take(held_out_documents))
    if len(held_out) < ctx:
        raise ValueError(f"ctx={ctx} is longer than the held-out part of dataset={name!r}: {len(held_out)} bytes")
    shuffled = rows.skip(held_out_documents).shuffle(seed=seed, buffer_size=1000)
    if next(iter(shuffled), None) is None:
        raise ValueError(f"dataset={name!r} has no more than the {held_out_documents} documents that are held out")
    return StreamedBlocks(shuffled, text_column, ctx), held_out


def collate_blocks(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Blocks -> input_ids and labels (B, ctx); labels leave out what has no full trigram before it."""
    input_ids = torch.stack([example["input_ids"] for example in examples])
    return {"input_ids": input_ids, "labels": mask_incomplete_trigrams(input_ids)}
