"""Files to byte blocks: what is collected, held apart, packed and streamed."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from training_arb.byte_data import (
    ByteBlocks,
    StreamedBlocks,
    collate_blocks,
    collect_files,
    load_corpus,
    read_ids,
    split_files,
    standard_library_files,
    stream_dataset,
)

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


@pytest.mark.parametrize("ctx", [1, 4, 7, 100])
def test_streamed_blocks(ctx):
    """Blocks are the documents that hold something, an EOS after each, cut; only the incomplete end is missing."""
    texts = ["abc", "", "d" * 15, "\u00e9\U0001f600", "x" * 211, "end"]
    packed = [id for text in texts if text for id in (*text.encode(), EOS)]
    stream = StreamedBlocks([{"body": text} for text in texts], "body", ctx)
    blocks = [block["input_ids"] for block in stream]
    assert all(block.dtype == torch.int64 and block.shape == (ctx,) for block in blocks)
    assert torch.cat(blocks).tolist() == packed[: len(packed) // ctx * ctx]
    assert [block["input_ids"].tolist() for block in stream] == [block.tolist() for block in blocks]


def dataset_folder(folder, rows):
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_stream_dataset(tmp_path):
    """The first documents are held out, the others come in an order that the seed makes, each once."""
    texts = [f"document {i} \u00e9" for i in range(60)]
    name = dataset_folder(tmp_path / "data", [{"body": text, "number": 1} for text in texts])
    streams = [stream_dataset(name, 8, seed, "body", held_out_documents=10) for seed in (0, 0, 1)]
    for _, held_out in streams:
        assert bytes(held_out[held_out != EOS].astype(np.uint8)).decode() == "".join(texts[:10])
    orders = []
    for stream, _ in streams:
        ids = torch.cat([block["input_ids"] for block in stream]).numpy()
        orders.append([part.decode() for part in documents(ids)[0]])
    assert set(orders[0]) <= set(texts[10:]) and len(set(orders[0])) == len(orders[0]) >= 49
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    "rows, message",
    [
        pytest.param(
            [{"body": "some words"}] * 9, "text_column='text' is no text column .*: body, extra", id="missing"
        ),
        pytest.param([{"text": 7, "body": "words"}] * 9, "text_column='text' is no text column", id="no-text"),
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
    ids = torch.cat([block["input_ids"] for block in stream]).numpy()
    assert sorted(documents(ids)[0]) == [b"fifth", b"third"]


def test_collate_blocks():
    """Labels are the ids but for the first three, which no full trigram precedes; the ids stay whole."""
    batch = collate_blocks([{"input_ids": torch.arange(start, start + 9)} for start in (0, 100)])
    assert batch["input_ids"].tolist() == [list(range(9)), list(range(100, 109))]
    assert batch["labels"].tolist() == [[IGNORE] * 3 + list(range(3, 9)), [IGNORE] * 3 + list(range(103, 109))]


@pytest.mark.parametrize("most, first_ids", [(None, [0, 4, 8, 12, 16]), (3, [0, 8, 16]), (9, [0, 4, 8, 12, 16])])
def test_blocks_spread_evenly_when_only_some_are_kept(most, first_ids):
    blocks = ByteBlocks(np.arange(22, dtype=np.uint16), 4, most)
    assert [blocks[i]["input_ids"][0].item() for i in range(len(blocks))] == first_ids
