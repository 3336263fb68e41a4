"""Documents of a file, piece by piece: text of any bytes, .jsonl, either of them as .gz, and .parquet.

Every piece has a cursor; reading from that cursor starts with that piece. Cursors count bytes (of the decompressed text
in .gz) or, in .parquet, rows. Memory: one piece, one JSON line, or one row group. Every fault of a file is a ValueError
of one line that names the file.

Compressed files may expand a thousandfold. They are decompressed piece by piece; a line of .jsonl has at most
LONGEST_LINE bytes, and a column of a parquet file may expand at most MOST_EXPANSION-fold.
"""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from configuration_arb.configuration_arb import EOS_ID

TEXT_COLUMN = "text"
TO_THE_END = sys.maxsize
PIECE_BYTES = 1 << 20
LONGEST_LINE = 1 << 24
MOST_EXPANSION, SMALL_COLUMN = 200, 1 << 26  # a column of fewer bytes may be anything
ROWS_AT_A_TIME, MOST_AT_A_TIME = 64, 1 << 25  # rows, bytes
# about what text shrinks to in .gz and .parquet
PACKED_RATIO = 4

Pieces = Iterator[tuple[int, np.ndarray]]


def read_pieces(path: Path, text_column: str = TEXT_COLUMN, start: int = 0, end: int = TO_THE_END) -> Pieces:
    """(cursor, uint16 (n,)) of the documents from cursor `start` on, with an EOS after each document that is not empty.

    Lines and rows that begin before `end` are complete; plain text ends there.
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
    joined = bytearray()  # which grows in place: a list of pieces would be there twice when they are joined
    for piece in pieces:
        joined += np.ascontiguousarray(piece).view(np.uint8).data
    return np.frombuffer(joined, dtype=np.uint16)


def document_ids(text: str | bytes | None) -> np.ndarray:
    """uint16 (n + 1,): a text's bytes and an EOS; an empty or missing text: (0,)."""
    # JSON can hold half a surrogate pair, which UTF-8 cannot encode
    data = text.encode(errors="replace") if isinstance(text, str) else text
    if not data:
        return np.zeros(0, dtype=np.uint16)
    ids = np.empty(len(data) + 1, dtype=np.uint16)
    ids[:-1] = np.frombuffer(data, dtype=np.uint8)
    ids[-1] = EOS_ID
    return ids


def text_size(path: Path, text_column: str = TEXT_COLUMN, most: int = TO_THE_END) -> int:
    """Bytes of text in a file; an estimate for compressed files. If the estimate is at most `most`, bytes are counted
    piece by piece until they exceed it."""
    size = path.stat().st_size
    if path.suffix.lower() not in (".gz", ".parquet"):
        return size
    if size * PACKED_RATIO > most:
        return size * PACKED_RATIO
    counted = 0
    for _, ids in read_pieces(path, text_column):
        counted += len(ids)
        if counted > most:
            break
    return counted


def read_front(path: Path, text_column: str, end: int, most: int) -> tuple[np.ndarray, int | None]:
    """uint16 (n,): the documents up to cursor `end`, or until they are more than `most` ids; and the cursor of the
    rest, None if nothing is left."""
    parts, size = [], 0
    for cursor, ids in read_pieces(path, text_column, end=end):
        if size > most and len(ids) > 1:
            text = _kind(path) not in (".jsonl", ".parquet")
            return join([*parts, np.array([EOS_ID] * text, dtype=np.uint16)]), cursor
        parts.append(ids)
        size += len(ids)
    return join(parts), None if end == TO_THE_END else end


def cursor_after(path: Path, size: int) -> int:
    """The cursor after about the first `size` bytes of the file on disk."""
    if _kind(path) != ".parquet":
        return size
    with _naming(path):
        rows = _open_parquet(path).metadata.num_rows
        return -(-rows * size // path.stat().st_size)


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    kind = Path(name).suffix
    if kind == ".parquet" and name != path.name.lower():
        raise ValueError(f"data={str(path)!r}: .parquet.gz is not supported; decompress it")
    return kind


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"data={str(path)!r}: file not found") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"data={str(path)!r} is damaged: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise ValueError(f"data={str(path)!r} cannot be read: {reason}") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


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
            cursor += _rest_of_line(file) - 1
        while cursor < end and (line := file.readline(LONGEST_LINE + 1)):
            if not line.isspace():
                try:
                    ids = _line_ids(line, text_column)
                except ValueError as error:
                    raise ValueError(f"data={str(path)!r}, line {_line_number(path, cursor)}: {error}") from error
                if len(ids):
                    yield cursor, ids
            cursor += len(line)


def _rest_of_line(file: BinaryIO) -> int:
    """Read to the end of a line of any length; returns its number of bytes."""
    size = 0
    while part := file.readline(PIECE_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _line_ids(line: bytes, text_column: str) -> np.ndarray:
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE:,} bytes")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if text_column not in row:
        raise ValueError(f"text_column={text_column!r} not found among {', '.join(row) or 'no columns'}")
    if not isinstance(row[text_column], str | None):
        raise ValueError(f"text_column={text_column!r} does not hold text")
    return document_ids(row[text_column])


def _line_number(path: Path, cursor: int) -> int:
    with _open(path) as file:
        lines, left = 1, cursor
        while left and (data := file.read(min(PIECE_BYTES, left))):
            lines += data.count(b"\n")
            left -= len(data)
    return lines


def _open_parquet(path: Path, coded: Sequence[str] = ()):
    """The file; the columns `coded` come as they are stored, equal texts once."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path, read_dictionary=list(coded))
    except pyarrow.ArrowException as error:
        raise ValueError(f"data={str(path)!r} is damaged: {str(error).partition(chr(10))[0]}") from error


def _parquet_pieces(path: Path, text_column: str, start: int, end: int) -> Pieces:
    import pyarrow

    with _open_parquet(path) as file:
        names = file.schema_arrow.names
    if text_column not in names:
        raise ValueError(f"data={str(path)!r}: text_column={text_column!r} not found among {', '.join(names)}")
    with _open_parquet(path) as file, _open_parquet(path, [text_column]) as coded:
        cursor = 0
        try:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if cursor + rows <= start:
                    cursor += rows
                    continue
                _check_expansion(path, file.metadata.row_group(group), group)
                longest = _longest_shared(coded, group, text_column)
                reader = coded if longest * ROWS_AT_A_TIME > MOST_AT_A_TIME else file
                for batch in reader.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=[text_column]):
                    first, last = max(start - cursor, 0), min(len(batch), end - cursor)
                    if first < last:
                        for behind, ids in _row_pieces(batch.column(0)[first:last]):
                            yield cursor + first + behind, ids
                    cursor += len(batch)
                    if cursor >= end:
                        return
        except pyarrow.ArrowNotImplementedError as error:
            kind = file.schema_arrow.field(text_column).type
            raise ValueError(f"data={str(path)!r}: text_column={text_column!r} holds {kind}, not text") from error
        except pyarrow.ArrowException as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"data={str(path)!r} is damaged after row {cursor}: {reason}") from error


def _longest_shared(coded, group: int, text_column: str) -> int:
    """Bytes of the longest text of a row group that is stored once for any number of rows."""
    import pyarrow
    from pyarrow import compute

    first = next(coded.iter_batches(1, row_groups=[group], columns=[text_column]), None)
    if first is None or not isinstance(first.column(0), pyarrow.DictionaryArray):
        return 0
    texts = first.column(0).dictionary
    if not _is_text(texts.type):
        return 0
    return compute.max(compute.binary_length(texts)).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]


def _is_text(type_) -> bool:
    import pyarrow

    return type_ in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())


def _check_expansion(path: Path, row_group, number: int) -> None:
    for index in range(row_group.num_columns):
        column = row_group.column(index)
        unpacked, packed = column.total_uncompressed_size, column.total_compressed_size
        if unpacked > max(SMALL_COLUMN, MOST_EXPANSION * packed):
            raise ValueError(
                f"data={str(path)!r}: row group {number} unpacks {packed:,} bytes to {unpacked:,}, more than"
                f" {MOST_EXPANSION}-fold: rewrite it without compression, or leave it out"
            )


def _row_pieces(column) -> Pieces:
    """(row, ids) of a batch's column: rows together while they are small."""
    first, size, parts = 0, 0, []
    for row, text in enumerate(_texts(column)):
        parts.append(document_ids(text))
        size += len(parts[-1])
        if size >= PIECE_BYTES:
            yield first, join(parts)
            first, size, parts = row + 1, 0, []
    if parts:
        yield first, join(parts)


def _texts(column) -> Iterator[bytes | None]:
    import pyarrow

    if isinstance(column, pyarrow.DictionaryArray) and _is_text(column.dictionary.type):
        for place in column.indices.to_pylist():
            text = None if place is None else column.dictionary[place].as_buffer()
            yield None if text is None else text.to_pybytes()
    else:
        for text in column.cast(pyarrow.large_binary()):
            yield text.as_py()
