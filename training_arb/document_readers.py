"""Documents of a file, piece by piece: text of any bytes, .jsonl, either of them as .gz, and .parquet.

A piece has a cursor, and reading again from that cursor goes on with that piece. Cursors count bytes (of the unpacked
text in .gz) or, in .parquet, rows. Memory: a piece, one JSON line, or what one row group takes. Whatever is wrong with
a file is a ValueError of one line that names it.
"""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from configuration_arb.configuration_arb import EOS_ID

TEXT_COLUMN = "text"
TO_THE_END = sys.maxsize
PIECE_BYTES = 1 << 20
LONGEST_LINE = 1 << 26
ROWS_AT_A_TIME = 64
# about what text shrinks to in .gz and .parquet
PACKED_RATIO = 4

Pieces = Iterator[tuple[int, np.ndarray]]


def read_pieces(path: Path, text_column: str = TEXT_COLUMN, start: int = 0, end: int = TO_THE_END) -> Pieces:
    """(cursor, uint16 (n,)) of what stands from cursor `start` on, an EOS after each document that is not empty.

    Lines and rows that begin before `end` are whole; text stops there, as if it were its end.
    """
    kind = _kind(path)
    with _naming(path):
        if kind == ".parquet":
            yield from _parquet_pieces(path, text_column, start, end)
        elif kind == ".jsonl":
            yield from _jsonl_pieces(path, text_column, start, end)
        else:
            yield from _text_pieces(path, start, end)


def read_ids(files: Iterable[Path], text_column: str = TEXT_COLUMN) -> np.ndarray:
    """uint16 (n,): the files' documents, an EOS after each. Empty ones are left out."""
    return join(ids for path in files for _, ids in read_pieces(path, text_column))


def join(pieces: Iterable[np.ndarray]) -> np.ndarray:
    """uint16 (n,): the pieces one after the other; none: n = 0."""
    return np.concatenate([np.zeros(0, dtype=np.uint16), *pieces])


def document_ids(text: str | bytes | None) -> np.ndarray:
    """uint16 (n + 1,): a text's bytes and an EOS; an empty or missing text: (0,)."""
    # half a surrogate pair, which JSON can hold, has no UTF-8
    data = text.encode(errors="replace") if isinstance(text, str) else text
    if not data:
        return np.zeros(0, dtype=np.uint16)
    ids = np.empty(len(data) + 1, dtype=np.uint16)
    ids[:-1] = np.frombuffer(data, dtype=np.uint8)
    ids[-1] = EOS_ID
    return ids


def text_size(path: Path) -> int:
    """Bytes of text in a file, a guess where it is packed."""
    packed = path.suffix.lower() in (".gz", ".parquet")
    return path.stat().st_size * (PACKED_RATIO if packed else 1)


def cursor_after(path: Path, size: int) -> int:
    """The cursor behind about the first `size` bytes of the file on disk."""
    if _kind(path) != ".parquet":
        return size
    with _naming(path):
        rows = _open_parquet(path).metadata.num_rows
        return -(-rows * size // path.stat().st_size)


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    kind = Path(name).suffix
    if kind == ".parquet" and name != path.name.lower():
        raise ValueError(f"data={str(path)!r}: .parquet is packed inside, not as .gz")
    return kind


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"data={str(path)!r} is gone") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"data={str(path)!r} is damaged: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise ValueError(f"data={str(path)!r} cannot be read: {reason}") from error


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _text_pieces(path: Path, start: int, end: int) -> Pieces:
    cursor = start
    with _open(path) as file:
        file.seek(start)
        while data := file.read(min(PIECE_BYTES, end - cursor)):
            yield cursor, np.frombuffer(data, dtype=np.uint8).astype(np.uint16)
            cursor += len(data)
    if cursor:
        yield cursor, np.array([EOS_ID], dtype=np.uint16)


def _jsonl_pieces(path: Path, text_column: str, start: int, end: int) -> Pieces:
    with _open(path) as file:
        cursor = start
        if start:
            file.seek(start - 1)
            cursor += len(file.readline()) - 1
        while cursor < end and (line := file.readline(LONGEST_LINE + 1)):
            if not line.isspace():
                try:
                    ids = _line_ids(line, text_column)
                except ValueError as error:
                    raise ValueError(f"data={str(path)!r}, line {_line_number(path, cursor)}: {error}") from error
                if len(ids):
                    yield cursor, ids
            cursor += len(line)


def _line_ids(line: bytes, text_column: str) -> np.ndarray:
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE:,} bytes")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    if text_column not in row:
        raise ValueError(f"no text_column={text_column!r} among {', '.join(row) or 'none'}")
    if not isinstance(row[text_column], str | None):
        raise ValueError(f"text_column={text_column!r} holds no text")
    return document_ids(row[text_column])


def _line_number(path: Path, cursor: int) -> int:
    with _open(path) as file:
        lines, left = 1, cursor
        while left and (data := file.read(min(PIECE_BYTES, left))):
            lines += data.count(b"\n")
            left -= len(data)
    return lines


def _open_parquet(path: Path):
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"data={str(path)!r} is damaged: {str(error).partition(chr(10))[0]}") from error


def _parquet_pieces(path: Path, text_column: str, start: int, end: int) -> Pieces:
    import pyarrow

    with _open_parquet(path) as file:
        names = file.schema_arrow.names
        if text_column not in names:
            raise ValueError(f"data={str(path)!r}: no text_column={text_column!r} among {', '.join(names)}")
        cursor = 0
        try:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if cursor + rows <= start:
                    cursor += rows
                    continue
                for batch in file.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=[text_column]):
                    first, last = max(start - cursor, 0), min(len(batch), end - cursor)
                    if first < last:
                        texts = batch.column(0)[first:last].cast(pyarrow.large_binary()).to_pylist()
                        yield cursor + first, join(map(document_ids, texts))
                    cursor += len(batch)
                    if cursor >= end:
                        return
        except pyarrow.ArrowNotImplementedError as error:
            kind = file.schema_arrow.field(text_column).type
            raise ValueError(f"data={str(path)!r}: text_column={text_column!r} holds {kind}, no text") from error
        except pyarrow.ArrowException as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"data={str(path)!r} is damaged after row {cursor}: {reason}") from error
