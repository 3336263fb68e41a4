"""Reads the documents of files or of a dataset as bytes, up to a limit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from configuration_arb.configuration_arb import EOS_ID
from training_arb.data.document_readers import TEXT_COLUMN, document_ids, read_pieces

LONGEST_CHARACTER = 4
MOST_BYTES = 1 << 28
LESS = "--max_bytes says how many to score"


def file_documents(files: Iterable[Path], text_column: str = TEXT_COLUMN, most: int = 0) -> Iterator[bytes]:
    """The documents of files, as `read_pieces` reads them. Empty ones are left out.

    most: a longer document is cut and is the last one; 0: no limit. Raises ValueError on a document longer than
    MOST_BYTES.
    """
    for path in files:
        parts, size = [], 0
        for _, ids in read_pieces(path, text_column):
            for part in np.split(ids, np.flatnonzero(ids == EOS_ID) + 1):
                ended = len(part) > 0 and part[-1] == EOS_ID
                parts.append((part[:-1] if ended else part).astype(np.uint8).tobytes())
                size += len(parts[-1])
                if not most and size > MOST_BYTES:
                    raise ValueError(f"data={str(path)!r}: a document of more than {MOST_BYTES:,} bytes; {LESS}")
                if 0 < most < size - LONGEST_CHARACTER:
                    yield b"".join(parts)
                    return
                if ended:
                    yield b"".join(parts)
                    parts, size = [], 0


def dataset_documents(name: str, config: str | None, split: str, text_column: str = TEXT_COLUMN) -> Iterator[bytes]:
    """The documents of a hub dataset, or of a local folder of jsonl, parquet or text, read lazily.

    Raises ValueError when it cannot be found, or has no such configuration, split or column.
    """
    from datasets import load_dataset

    try:
        for row in load_dataset(name, config, split=split, streaming=True):
            if not isinstance(row.get(text_column), str | None) or text_column not in row:
                raise ValueError(f"text_column={text_column!r} is not a text column; the columns are {', '.join(row)}")
            document = document_ids(row[text_column])[:-1].astype(np.uint8).tobytes()
            if document:
                yield document
    except (OSError, ValueError, LookupError) as error:
        reason = (str(error).splitlines() or ["no rows in it"])[0]
        raise ValueError(f"dataset={name!r}, split={split!r} cannot be read: {reason}") from error


def first_bytes(documents: Iterable[bytes], most: int) -> list[bytes]:
    """Documents up to `most` bytes in total. The last one is cut at a whole character. 0: all. Raises ValueError when
    all are more than MOST_BYTES."""
    if not most:
        return _all_documents(documents)
    taken: list[bytes] = []
    for document in documents:
        cut = len(document)
        if cut > most:
            # a byte 10xxxxxx goes on with a character
            starts = (at for at in range(most, most - LONGEST_CHARACTER, -1) if at >= 0 and document[at] >> 6 != 0b10)
            cut = next(starts, most)
        if cut:
            taken.append(document[:cut])
        most -= len(document)
        if most <= 0:
            break
    return taken


def _all_documents(documents: Iterable[bytes]) -> list[bytes]:
    taken, size = [], 0
    for document in documents:
        taken.append(document)
        size += len(document)
        if size > MOST_BYTES:
            raise ValueError(f"max_bytes=0: there are more than {MOST_BYTES:,} bytes of text; {LESS}")
    return taken


def as_text(documents: Sequence[bytes]) -> tuple[list[bytes], int]:
    """The documents with U+FFFD for whatever is not UTF-8, and how many of them that changes."""
    texts = [document.decode(errors="replace").encode() for document in documents]
    return texts, sum(text != document for text, document in zip(texts, documents, strict=True))
