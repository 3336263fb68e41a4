"""Each kind of file: what is read, going on from any cursor, bounded pieces, and faults that name file and line."""

import gzip
import os
import random

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from support.documents import EOS, KINDS, TEXTS, write
from training_arb.data import document_readers
from training_arb.data.document_readers import cursor_after, document_ids, join, read_ids, read_pieces


def packed(path, texts=TEXTS):
    """The ids that the file must give."""
    whole = texts if "parquet" in path.name or "jsonl" in path.name else ["".join(text or "" for text in texts)]
    return [id for text in whole if text for id in (*text.encode(), EOS)]


@pytest.mark.parametrize("kind", KINDS)
def test_read_ids(tmp_path, kind):
    path = write(tmp_path / kind)
    ids = read_ids([path, path])
    assert ids.dtype == np.uint16 and ids.tolist() == packed(path) * 2


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_every_cursor(tmp_path, monkeypatch, kind):
    """Also in the middle of a row group, and in small pieces."""
    monkeypatch.setattr(document_readers, "PIECE_BYTES", 700)
    monkeypatch.setattr(document_readers, "ROWS_AT_A_TIME", 7)
    path = write(tmp_path / kind)
    pieces = list(read_pieces(path))
    assert len(pieces) > 10
    for number in random.Random(0).sample(range(len(pieces)), 10):
        cursor = pieces[number][0]
        rest = [ids for _, ids in read_pieces(path, start=cursor)]
        assert np.array_equal(join(rest), join(ids for _, ids in pieces[number:]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 333, 2000])
def test_two_parts_share_nothing_and_lose_nothing(tmp_path, kind, size):
    """Documents are whole on one side; text is cut, and each side ends with an EOS."""
    path = write(tmp_path / kind)
    cut = cursor_after(path, size)
    front = join(ids for _, ids in read_pieces(path, end=cut)).tolist()
    back = join(ids for _, ids in read_pieces(path, start=cut)).tolist()
    assert front and back
    text = "jsonl" not in kind and "parquet" not in kind
    assert (front[:-1] if text else front) + back == packed(path)


def test_binary_garbage_is_text(tmp_path):
    data = random.Random(0).randbytes(5000)
    (tmp_path / "garbage.bin").write_bytes(data)
    assert read_ids([tmp_path / "garbage.bin"]).tolist() == [*data, EOS]


def test_document_ids():
    assert document_ids("").tolist() == document_ids(None).tolist() == document_ids(b"").tolist() == []
    assert document_ids("\u00e9").tolist() == [0xC3, 0xA9, EOS]
    assert document_ids("a\ud800b").tolist() == [*b"a?b", EOS]


@pytest.mark.parametrize(
    "type_",
    [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.dictionary("int32", "string")],
    ids=str,
)
def test_parquet_types(tmp_path, type_):
    texts = [b"a", None, b"bc"] if type_ == pyarrow.binary() else ["a", None, "bc"]
    parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, type_)}), tmp_path / "x.parquet")
    assert read_ids([tmp_path / "x.parquet"]).tolist() == [*b"a", EOS, *b"bc", EOS]


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"text": "cut', "line 4: not JSON"),
        (b"\xff\xfe\x00", "line 4: not JSON"),
        (b"[" * 100_000, "line 4: not JSON"),
        (b'["text"]', "line 4: not a JSON object"),
        (b'{"body": "x", "id": 1}', "line 4: text_column='text' not found among body, id"),
        (b'{"text": 7}', "line 4: text_column='text' does not hold text"),
        (b'{"text": "' + b"x" * 5000 + b'"}', "line 4: longer than 4,000 bytes"),
    ],
    ids=["cut", "binary", "nested", "list", "column", "number", "long"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_a_bad_line_is_named(tmp_path, monkeypatch, line, said, packed):
    if b"xxx" in line:
        monkeypatch.setattr(document_readers, "LONGEST_LINE", 4000)
    path = tmp_path / ("x.jsonl.gz" if packed else "x.jsonl")
    with (gzip.open if packed else open)(path, "wb") as file:
        file.write(b'{"text": "one"}\n\n{"text": "three"}\n' + line + b'\n{"text": "five"}\n')
    for start in (0, 17):
        with pytest.raises(ValueError) as refusal:
            list(read_pieces(path, start=start))
        assert said in str(refusal.value) and str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def damaged(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[len(data) // 2] ^= 0xFF
    else:
        data = b"no such format" * 9
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("how", ["cut", "flipped", "another"])
@pytest.mark.parametrize("kind", ["text.gz", "text.jsonl.gz", "text.parquet"])
def test_a_damaged_file_is_named(tmp_path, kind, how):
    """Flipped bytes of parquet may pass as other text: there is no checksum by default. Nothing else may."""
    path = damaged(write(tmp_path / kind), how)
    try:
        list(read_pieces(path))
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert kind.endswith("parquet") and how == "flipped"


def test_parquet_without_the_column(tmp_path):
    path = write(tmp_path / "x.parquet", column="body")
    with pytest.raises(ValueError, match=r"x\.parquet'.*text_column='text' not found among id, body"):
        read_ids([path])
    with pytest.raises(ValueError, match=r"x\.parquet'.*text_column='id' holds int64, not text"):
        read_ids([path], "id")
    assert read_ids([path], "body").tolist() == packed(path)


def test_packed_parquet_is_refused(tmp_path):
    (tmp_path / "x.parquet.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"x\.parquet\.gz': \.parquet\.gz is not supported"):
        read_ids([tmp_path / "x.parquet.gz"])


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"gone\.txt': file not found"):
        read_ids([tmp_path / "gone.txt"])
    with pytest.raises(ValueError, match=r"gone\.parquet': file not found"):
        read_ids([tmp_path / "gone.parquet"])
    path = write(tmp_path / "text")
    path.chmod(0)
    if os.getuid() == 0:  # root may read anything
        monkeypatch.setattr(
            document_readers, "_open", lambda _: os.fdopen(os.open("/proc/self/mem", os.O_RDONLY), "rb")
        )
    with pytest.raises(ValueError, match=r"text' cannot be read: "):
        read_ids([path])
