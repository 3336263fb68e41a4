"""Files to byte blocks: what is collected, held apart, packed and streamed."""

import json
import os
import sysconfig
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from training_arb.data.byte_data import (
    ByteBlocks,
    collate_blocks,
    load_corpus,
    open_corpus,
)
from training_arb.data.document_readers import read_ids
from training_arb.data.mixed_stream import MixedStream
from training_arb.data.streamed_data import stream_dataset
from training_arb.data.text_files import collect_files, parse_weights, split_files, standard_library_files

EOS = 257
IGNORE = -100


@pytest.fixture
def folder(tmp_path):
    """Nested files, hidden files and a hidden folder."""
    for name in ("b.txt", "a.py", "deep/er/c.txt", "deep/.hidden", ".git/config", ".env"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def many_files(folder, count=200, size=500):
    """Files of about `size` different bytes."""
    paths = [folder / f"part{i % 7}" / f"{i}.txt" for i in range(count)]
    for i, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"file {i} ".encode() * (size // 8))
    return paths


def documents(ids):
    """Cut at each EOS; the rest after the last."""
    parts, start = [], 0
    for end in np.flatnonzero(ids == EOS):
        parts.append(bytes(ids[start:end].astype(np.uint8)))
        start = end + 1
    return parts, ids[start:]


@pytest.mark.parametrize(
    "patterns, names",
    [
        pytest.param(["b.txt"], ["b.txt"], id="file"),
        pytest.param(["."], ["a.py", "b.txt", "deep/er/c.txt"], id="folder-without-hidden"),
        pytest.param(["*.txt"], ["b.txt"], id="glob"),
        pytest.param(["**/*.txt"], ["b.txt", "deep/er/c.txt"], id="recursive-glob"),
        pytest.param([".env", "deep"], [".env", "deep/er/c.txt"], id="hidden-file-by-name"),
        pytest.param(["b.txt", "*.txt", "deep", "."], ["a.py", "b.txt", "deep/er/c.txt"], id="each-once"),
        pytest.param(["./b.txt", "deep/er/", "b.txt"], ["b.txt", "deep/er/c.txt"], id="other-spellings"),
    ],
)
def test_collect_files(folder, monkeypatch, patterns, names):
    monkeypatch.chdir(folder)
    assert collect_files(patterns) == [folder / name for name in names]


@pytest.mark.parametrize("pattern", ["missing.txt", "*.parquet", "nothing", "d*p"])
def test_collect_files_names_the_pattern_without_files(folder, monkeypatch, pattern):
    """A glob that matches only folders names no file either."""
    monkeypatch.chdir(folder)
    (folder / "nothing").mkdir()
    with pytest.raises(ValueError) as refusal:
        collect_files(["b.txt", pattern])
    assert repr(pattern) in str(refusal.value) and "b.txt" not in str(refusal.value)


def test_collect_files_with_glob_characters_in_the_name(tmp_path):
    path = tmp_path / "notes [1].txt"
    path.write_text("x")
    assert collect_files([str(path)]) == [path]


def test_split_files(tmp_path):
    """Disjoint, complete, about the share asked for, and not the front or the back of the list."""
    files = many_files(tmp_path)
    train, held_out = split_files(files)
    assert sorted(train + held_out) == sorted(files) and not set(train) & set(held_out)
    size = sum(path.stat().st_size for path in held_out) / sum(path.stat().st_size for path in files)
    assert 0.05 <= size < 0.06
    assert len({path.parent for path in held_out}) > 2
    _, half = split_files(files, share=0.5)
    assert 0.5 <= len(half) / len(files) < 0.52


def test_split_files_is_deterministic(tmp_path):
    """The same files in any order, or moved elsewhere as a whole, split the same way."""
    for name in ("here", "there"):
        (tmp_path / name / "data").mkdir(parents=True)
    here, there = (many_files(tmp_path / name / "data") for name in ("here", "there"))
    train, held_out = split_files(here)
    assert split_files(here[::-1]) == (train, held_out)
    assert [path.name for path in split_files(there)[1]] == [path.name for path in held_out]


def test_a_file_that_outweighs_the_rest_is_cut(tmp_path):
    """Whichever way the names hash, neither part may be the small file alone."""
    for i in range(6):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / f"input{i}.txt").write_bytes(b"x" * 10_000)
        (folder / f"README{i}").write_bytes(b"y" * 100)
        (folder / f"empty{i}").touch()
        train, held_out = load_corpus([str(folder)], 64)
        assert len(held_out) == 505 and len(train) + len(held_out) == 10_102


def test_collect_files_lists_a_file_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert len(collect_files(["b.txt", str(folder / "b.txt"), "./b.txt"])) == 1


def test_split_files_keeps_one_file_whole(tmp_path):
    path = tmp_path / "only.txt"
    path.write_text("text")
    assert split_files([path]) == ([path], [])


def test_read_ids(tmp_path):
    contents = [b"", bytes(range(256)), b"\n", b"", b"end"]
    paths = [tmp_path / str(i) for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    ids = read_ids(paths)
    assert ids.dtype == np.uint16
    assert ids.tolist() == [*range(256), EOS, 10, EOS, *b"end", EOS]
    assert read_ids([]).tolist() == [] and read_ids(paths[:1]).tolist() == []


@pytest.mark.parametrize("size, ctx, held_out_size", [(10_000, 64, 500), (10_000, 900, 900), (199, 100, 100)])
def test_load_corpus_cuts_a_single_file(tmp_path, size, ctx, held_out_size):
    """Its last twentieth is held out, or one block where that is more."""
    path = tmp_path / "only.txt"
    path.write_bytes(bytes(i % 251 for i in range(size)))
    train, held_out = load_corpus([str(path)], ctx)
    assert len(held_out) == held_out_size
    assert np.array_equal(np.concatenate([train, held_out]), read_ids([path]))


def test_load_corpus_of_several_files(tmp_path):
    files = many_files(tmp_path)
    train, held_out = load_corpus([str(tmp_path)], 128)
    train_files, held_out_files = split_files(files)
    for ids, paths in ((train, train_files), (held_out, held_out_files)):
        texts, rest = documents(ids)
        assert texts == [path.read_bytes() for path in paths] and not len(rest)


def test_load_corpus_of_nothing(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"data='.*empty\.txt' is empty: 0 bytes"):
        load_corpus([str(tmp_path / "empty.txt")], 64)
    with pytest.raises(ValueError, match="missing"):
        load_corpus([str(tmp_path / "missing")], 64)


@pytest.mark.parametrize("size, ctx, part", [(300, 512, "training"), (1000, 600, "training")])
def test_load_corpus_shorter_than_a_block(tmp_path, size, ctx, part):
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * size)
    with pytest.raises(ValueError, match=rf"ctx={ctx} is longer than the {part} part of data='.*short\.txt'"):
        load_corpus([str(path)], ctx)


def test_load_corpus_with_too_short_a_text(tmp_path):
    many_files(tmp_path, count=40, size=80)
    with pytest.raises(ValueError, match="ctx=2000 is longer than the training part"):
        load_corpus([str(tmp_path)], 2000)


def test_standard_library_files():
    files = standard_library_files()
    root = Path(sysconfig.get_paths()["stdlib"])
    assert len(files) > 300 and files == sorted(files)
    assert root / "argparse.py" in files and root / "json" / "decoder.py" in files
    for path in files:
        parts = set(path.relative_to(root).parts)
        assert not parts & {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
        assert path.suffix in {".py", ".txt", ".rst"}


def test_byte_blocks():
    ids = np.arange(23, dtype=np.uint16)
    blocks = ByteBlocks(ids, 5)
    assert len(blocks) == 4
    stacked = torch.stack([blocks[i]["input_ids"] for i in range(4)])
    assert stacked.dtype == torch.int64 and stacked.flatten().tolist() == list(range(20))


def dataset_folder(folder, rows):
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_stream_dataset(tmp_path):
    """The first documents are held out, the others' blocks come in an order that the seed makes, each once an epoch."""
    texts = [f"document {i} \u00e9" for i in range(60)]
    name = dataset_folder(tmp_path / "data", [{"body": text, "number": 1} for text in texts])
    streams = [stream_dataset(name, 8, seed, "body", held_out_documents=10) for seed in (0, 0, 1)]
    for _, held_out in streams:
        assert bytes(held_out[held_out != EOS].astype(np.uint8)).decode() == "".join(texts[:10])
    packed = [id for text in texts[10:] for id in (*text.encode(), EOS)]
    whole = len(packed) // 8
    orders = []
    for stream, _ in streams:
        blocks = [tuple(block["input_ids"].tolist()) for block in islice(stream, 2 * whole)]
        wanted = sorted(tuple(packed[i * 8 : i * 8 + 8]) for i in range(whole))
        assert sorted(blocks[:whole]) == sorted(blocks[whole:]) == wanted
        assert blocks[:whole] != blocks[whole:]
        orders.append(blocks)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    "rows, message",
    [
        pytest.param(
            [{"body": "some words"}] * 9, "text_column='text' is not a text column .*: body, extra", id="missing"
        ),
        pytest.param([{"text": 7, "body": "words"}] * 9, "text_column='text' is not a text column", id="no-text"),
        pytest.param([{"text": "ab"}] * 9, "ctx=64 is longer than the held-out part .*: ", id="short"),
    ],
)
def test_stream_dataset_refuses(tmp_path, rows, message):
    name = dataset_folder(tmp_path / "data", [{**row, "extra": 0} for row in rows])
    with pytest.raises(ValueError, match=message) as refusal:
        stream_dataset(name, 64, 0, held_out_documents=4)
    assert name in str(refusal.value)


def test_stream_dataset_that_is_not_there(tmp_path):
    name = str(tmp_path / "missing")
    with pytest.raises(ValueError, match="cannot be read") as refusal:
        stream_dataset(name, 64, 0)
    assert f"dataset={name!r}" in str(refusal.value) and "\n" not in str(refusal.value)


def test_stream_dataset_without_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("text\n")
    with pytest.raises(ValueError, match="is empty"):
        stream_dataset(str(tmp_path), 64, 0)


def test_stream_dataset_with_broken_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": \n')
    with pytest.raises(ValueError, match="cannot be read"):
        stream_dataset(str(tmp_path), 64, 0)


def test_stream_dataset_with_an_empty_file(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ValueError, match="cannot be read: no rows in it"):
        stream_dataset(str(tmp_path), 64, 0)


def test_stream_dataset_that_holds_out_everything(tmp_path):
    name = dataset_folder(tmp_path / "data", [{"text": "long enough for a block"}] * 9)
    with pytest.raises(ValueError, match="no more than the 100 documents"):
        stream_dataset(name, 8, 0)


def test_stream_dataset_with_missing_texts(tmp_path):
    rows = [{"text": text} for text in ("first", "held out", None, "third", None, "fifth")]
    stream, held_out = stream_dataset(dataset_folder(tmp_path / "data", rows), 1, 0, held_out_documents=3)
    assert documents(held_out)[0] == [b"first", b"held out"]
    ids = sorted(block["input_ids"].item() for block in islice(stream, 12))
    assert ids == sorted([*b"thirdfifth", EOS, EOS])


def test_collate_blocks():
    """Labels are the ids but for the first three, which no full trigram precedes; the ids stay whole."""
    batch = collate_blocks([{"input_ids": torch.arange(start, start + 9)} for start in (0, 100)])
    assert batch["input_ids"].tolist() == [list(range(9)), list(range(100, 109))]
    assert batch["labels"].tolist() == [[IGNORE] * 3 + list(range(3, 9)), [IGNORE] * 3 + list(range(103, 109))]


@pytest.mark.parametrize("most, first_ids", [(None, [0, 4, 8, 12, 16]), (3, [0, 8, 16]), (9, [0, 4, 8, 12, 16])])
def test_blocks_spread_evenly_when_only_some_are_kept(most, first_ids):
    blocks = ByteBlocks(np.arange(22, dtype=np.uint16), 4, most)
    assert [blocks[i]["input_ids"][0].item() for i in range(len(blocks))] == first_ids


@pytest.mark.parametrize(
    "item, parsed",
    [
        ("a.txt", ("a.txt", None)),
        ("a.txt:0.7", ("a.txt", 0.7)),
        ("missing:3", ("missing", 3.0)),
        ("odd:2", ("odd:2", None)),
        ("odd:2:1e-3", ("odd:2", 1e-3)),
        ("odd:?", ("odd:?", None)),
        ("**/odd:2", ("**/odd:2", None)),
        ("*.txt:2", ("*.txt", 2.0)),
    ],
)
def test_parse_weights(tmp_path, monkeypatch, item, parsed):
    """A path or glob that names something is that, whatever stands behind its colon."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "odd:2"):
        (tmp_path / name).write_text("x")
    assert parse_weights([item]) == [parsed]


@pytest.mark.parametrize("tail", ["", "x", "0", "-1", "nan", "inf", "1,5"])
def test_parse_weights_names_the_item(tail):
    with pytest.raises(ValueError) as refusal:
        parse_weights(["b:1", f"a:{tail}"])
    assert f"data='a:{tail}'" in str(refusal.value) and "\n" not in str(refusal.value)


def test_links_never_lead_in_circles(tmp_path):
    """Two links back to the top would double the walk with each level."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("x")
    for name in ("one", "two", "deep/three"):
        (tmp_path / name).symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    found = [tmp_path / "deep" / "a.txt"]
    for pattern in (str(tmp_path), f"{tmp_path}/**/*.txt", f"{tmp_path}/**", f"{tmp_path}/**/deep/**/*"):
        assert collect_files([pattern]) == found, pattern
    assert parse_weights([f"{tmp_path}/self:2"]) == [(f"{tmp_path}/self", 2.0)]
    with pytest.raises(ValueError, match="no such file"):
        collect_files([str(tmp_path / "self")])


def test_open_corpus_streams_what_is_large_or_weighted(tmp_path):
    for name in ("a", "b"):
        os.makedirs(tmp_path / name)
        many_files(tmp_path / name, size=8000)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    small = open_corpus([a, b], None, 64, 0)
    train, held_out = load_corpus([a, b], 64)
    assert np.array_equal(small.train.blocks, ByteBlocks(train, 64).blocks)
    assert np.array_equal(small.held_out, held_out)
    large = open_corpus([a, b], None, 64, 0, stream_above_mb=3)
    weighted = open_corpus([f"{a}:3", b], None, 64, 0)
    for corpus, sources in ((large, 1), (weighted, 2)):
        assert isinstance(corpus.train, MixedStream) and len(corpus.train.sources) == sources
        assert len(corpus.held_out) >= 64
    assert weighted.name == f"{a}:3 {b}"
    choices = np.concatenate([weighted.train._choices(chunk) for chunk in range(10)])
    assert abs(choices.mean() - 0.25) < 0.01
