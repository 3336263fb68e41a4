"""Packed text that unpacks to a thousand times its size: memory stays that of a piece, and what is read is right."""

import gzip
import json
from contextlib import contextmanager
from itertools import islice

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.fresh_process import fresh_process
from support.scripting import run_script
from training_arb.data.byte_data import open_corpus
from training_arb.data.document_readers import join, read_ids, read_pieces, text_size
from training_arb.data.streamed_data import hold_out
from training_arb.evaluation import eval_documents
from training_arb.evaluation.eval_documents import file_documents, first_bytes
from training_arb.memory.live_memory import peak_memory_mb, reset_peak_memory

MEGABYTE = 1 << 20
LARGE = 48 * MEGABYTE
LINE = b"all work and no play makes jack a dull boy\n"


@contextmanager
def within(megabytes):
    """Peak memory of the block, over what was there before."""
    reset_peak_memory()
    before = peak_memory_mb()
    yield
    assert peak_memory_mb() - before < megabytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 MB of text in 0.2 MB, of each kind."""
    folder = tmp_path_factory.mktemp("packed")
    with gzip.open(folder / "text.gz", "wb", 6) as file:
        for _ in range(LARGE // MEGABYTE):
            file.write(LINE * (MEGABYTE // len(LINE)))
    row = json.dumps({"text": LINE.decode() * 24}).encode() + b"\n"
    with gzip.open(folder / "rows.jsonl.gz", "wb", 6) as file:
        for _ in range(LARGE // MEGABYTE):
            file.write(row * (MEGABYTE // len(row)))
    with gzip.open(folder / "line.jsonl.gz", "wb", 6) as file:
        file.write(b'{"text": "')
        for _ in range(LARGE // MEGABYTE):
            file.write(b"x" * MEGABYTE)
        file.write(b'"}\n{"text": "after"}\n')
    same = pyarrow.array([(LINE * (4 * MEGABYTE // len(LINE))).decode()] * 2).dictionary_encode()
    places = pyarrow.array(np.zeros(64, dtype=np.int32))
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(places, same.dictionary)})
    parquet.write_table(table, folder / "same.parquet", dictionary_pagesize_limit=64 * MEGABYTE)
    huge = pyarrow.table({"text": pyarrow.array(["x" * (2 * LARGE)])})
    parquet.write_table(huge, folder / "huge.parquet", compression="zstd", use_dictionary=False)
    assert all(path.stat().st_size < LARGE / 150 for path in folder.iterdir())
    return folder


@pytest.mark.parametrize("name", ["text.gz", "rows.jsonl.gz", "same.parquet"])
def test_text_is_counted_not_guessed(folder, name):
    with within(60):
        size = text_size(folder / name)
        assert text_size(folder / name, most=MEGABYTE) > MEGABYTE
    assert size > 0.95 * LARGE


@pytest.mark.parametrize("name", ["text.gz", "rows.jsonl.gz", "same.parquet"])
def test_a_run_streams_what_unpacks_to_more_than_the_limit(folder, name):
    with within(120):
        corpus = open_corpus([str(folder / name)], None, 64, 0, stream_above_mb=8)
        blocks = [bytes(block["input_ids"].numpy().astype(np.uint8)) for block in islice(corpus.train, 3)]
    assert "streamed" in corpus.size and len(corpus.held_out) < LARGE / 2
    assert all(b"work" in block for block in blocks)


def test_held_out_text_of_a_small_file_that_unpacks_to_much(folder, tmp_path):
    """It is no longer held out whole, and what is left of it is trained on."""
    for number in range(30):
        (tmp_path / f"{number}.txt").write_bytes(LINE * 8000)
    files = [folder / "text.gz", *sorted(tmp_path.iterdir())]
    with within(60):
        shards, held_out = hold_out(files, 64, MEGABYTE)
    starts = dict(shards)
    assert len(held_out) < 4 * MEGABYTE and starts.get(folder / "text.gz", 0) < 4 * MEGABYTE
    assert starts[folder / "text.gz"] == 0 or held_out.tolist().count(257) > 1


READ = """
import sys
from pathlib import Path
from training_arb.data.document_readers import read_ids
from training_arb.memory.live_memory import peak_memory_mb, reset_peak_memory
reset_peak_memory()
before = peak_memory_mb()
ids = read_ids([Path(sys.argv[1])])
print(len(ids), bytes(ids[:8].tolist()).decode(), peak_memory_mb() - before, sep="|")
"""


def test_in_memory_text_is_there_once(folder, tmp_path):
    """In a process of its own: blocks of this size come from the heap once a script before has set malloc, and how
    much the heap grows then depends on what earlier tests left in it."""
    done = fresh_process(tmp_path, READ, folder / "text.gz")
    assert done.returncode == 0, done.stderr[-3000:]
    length, begins, megabytes = done.stdout.strip().split("|")
    assert int(length) > 0.95 * LARGE and begins == LINE[:8].decode()
    assert float(megabytes) < 3 * LARGE / MEGABYTE


@pytest.mark.parametrize("start", [0, 40])
def test_a_line_without_end_is_refused_or_passed_by(folder, start):
    with within(80):
        if start:
            after = join(ids for _, ids in read_pieces(folder / "line.jsonl.gz", start=start))
            assert after.tolist() == [*b"after", 257]
        else:
            with pytest.raises(ValueError, match="line 1: longer than 16,777,216 bytes"):
                read_ids([folder / "line.jsonl.gz"])


def test_equal_texts_of_parquet_are_not_made_at_once(folder):
    with within(80):
        sizes = [len(ids) for _, ids in read_pieces(folder / "same.parquet")]
    assert len(sizes) == 64 and sum(sizes) > 0.95 * 256 * MEGABYTE


def test_parquet_that_unpacks_beyond_measure_is_refused(folder):
    with within(40), pytest.raises(ValueError, match=r"huge\.parquet'.*more than 200-fold") as refusal:
        read_ids([folder / "huge.parquet"])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["text.gz", "rows.jsonl.gz", "same.parquet"])
def test_evaluation_unpacks_what_it_scores(folder, name):
    with within(60):
        (document,) = first_bytes(file_documents([folder / name], most=100), 100)
    assert document == (LINE * 3)[:100]


def test_evaluation_says_how_much_it_takes(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_documents, "MOST_BYTES", 4 * MEGABYTE)
    ArbForCausalLM(preset_config("arb-tiny")).save_pretrained(tmp_path / "model")
    for name, said in (("text.gz", "a document of more than 4,194,304 bytes"), ("rows.jsonl.gz", "max_bytes=0")):
        with within(80):
            assert run_script("evaluate", tmp_path / "model", "--data", folder / name) == 2
        assert said in capsys.readouterr().err
