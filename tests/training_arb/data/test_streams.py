"""Streams larger than memory: order, exact resume, ranks, mixtures, held-out text and bounded memory."""

import json
import random
import tracemalloc
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader

from support.documents import EOS, KINDS, write
from training_arb.data import block_windows, mixed_stream, streamed_data
from training_arb.data.block_windows import FileShards, WindowedBlocks, read_windows
from training_arb.data.byte_data import ByteBlocks, collate_blocks
from training_arb.data.document_readers import document_ids, join, read_ids
from training_arb.data.mixed_stream import MixedStream, configure_reading
from training_arb.data.streamed_data import hold_out, interleave, stream_dataset, stream_files
from training_arb.train.trainer_arb import ArbTrainer
from training_arb.train.training_args_arb import ArbTrainingArguments

CTX = 16


def texts(mark, count=60):
    return [f"{mark}{i}:" + f"{mark}word " * (i * 5 % 17) for i in range(count)]


@pytest.fixture
def small_windows(monkeypatch):
    """Many windows and pieces in small files."""
    monkeypatch.setattr(WindowedBlocks.__init__, "__defaults__", (CTX * 9,))
    monkeypatch.setattr("training_arb.data.document_readers.PIECE_BYTES", 200)
    monkeypatch.setattr("training_arb.data.document_readers.ROWS_AT_A_TIME", 7)
    monkeypatch.setattr(streamed_data, "ROWS_AT_A_TIME", 5)
    monkeypatch.setattr(mixed_stream, "CHOICES", 50)


def folder_of(path, kind, mark, shards=5):
    path.mkdir()
    for number in range(shards):
        write(path / f"{number}.{kind}", texts(f"{mark}{number}"), row_group_size=20)
    return str(path)


def two_sources(tmp_path, kind, seed=0):
    names = [tmp_path / mark for mark in "ab"]
    for name in names:
        if not name.exists():
            folder_of(name, kind, name.name)
    return stream_files([([str(names[0])], 0.7), ([str(names[1])], 0.3)], CTX, seed)


def take(stream, count):
    return torch.stack([block["input_ids"] for block in islice(stream, count)])


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_holds_each_block_once(tmp_path, small_windows, kind):
    """Shards in an order of the epoch's own, the packed ids of which are cut; none of it held out, all else there."""
    stream, held_out = stream_files([([folder_of(tmp_path / "a", kind, "a")], 1)], CTX, 0)
    (source,) = stream.sources
    blocks = iter(stream)
    orders = []
    for epoch in range(3):
        ids = join(ids for _, ids in source.pieces(epoch, None))
        whole = len(ids) // CTX
        wanted = ids[: whole * CTX].reshape(-1, CTX).tolist()
        got = take(blocks, whole).tolist()
        assert sorted(got) == sorted(wanted) and got != wanted
        orders.append(wanted)
    assert orders[0] != orders[1] != orders[2]
    every_id = np.bincount(read_ids(sorted((tmp_path / "a").iterdir())), minlength=288)
    parts = np.bincount(ids, minlength=288) + np.bincount(held_out, minlength=288)
    cut_text = "jsonl" not in kind and "parquet" not in kind
    assert np.array_equal(parts[:EOS], every_id[:EOS])
    assert parts[EOS] - every_id[EOS] in (range(1, 6) if cut_text else (0,))


@pytest.mark.parametrize("kind", [*KINDS, "hub.jsonl", "hub.parquet"])
def test_resume_at_any_position(tmp_path, small_windows, kind):
    """Through JSON, several times over, across epochs, while the reader is ahead: the same blocks go on."""

    def fresh():
        if kind.startswith("hub"):
            return stream_dataset(str(tmp_path / "a"), CTX, 0, held_out_documents=33)[0]
        return two_sources(tmp_path, kind)[0]

    if kind.startswith("hub"):
        folder_of(tmp_path / "a", kind.removeprefix("hub."), "a")
    whole = take(fresh(), 3500)
    assert fresh().state_dict(0) == {**fresh().state_dict(0), "blocks": 0}
    draw = random.Random(kind)
    for _ in range(4):
        done, state = 0, None
        while done < 2500:
            stream = fresh()
            if state is not None:
                stream.load_state_dict(json.loads(json.dumps(state)))
            steps, ahead = draw.choice([0, 1, draw.randrange(60), draw.randrange(900)]), draw.randrange(40)
            blocks = [block["input_ids"] for block in islice(stream, steps + ahead)]
            assert torch.equal(torch.stack([whole[0], *blocks])[1:], whole[done : done + steps + ahead])
            done, state = done + steps, stream.state_dict(steps)
            assert state["blocks"] == done


def test_resume_reads_one_window_again_and_nothing_before_it(tmp_path, small_windows, monkeypatch):
    path = write(tmp_path / "long.txt", ["x" * 300_000])
    stream, _ = stream_files([([str(path)], 1)], CTX, 0)
    take(stream, 10_000)
    state = stream.state_dict(10_000)
    again, _ = stream_files([([str(path)], 1)], CTX, 0)
    again.load_state_dict(state)
    read = []
    pieces = again.sources[0].pieces

    def counted(epoch, place):
        for here, ids in pieces(epoch, place):
            read.append(len(ids))
            yield here, ids

    again.sources[0].pieces = counted
    take(again, 1)
    assert sum(read) <= CTX * 9 * 2 + 400


@pytest.mark.parametrize("ranks, batch", [(1, 12), (2, 6), (3, 4), (4, 3)])
def test_ranks_share_one_order(tmp_path, small_windows, ranks, batch):
    """What accelerate gives the ranks is disjoint, and together the one stream, whatever their number."""
    whole = take(two_sources(tmp_path, "jsonl")[0], 240)
    loaders = []
    for rank in range(ranks):
        stream, _ = two_sources(tmp_path, "jsonl")
        shard = IterableDatasetShard(stream, batch_size=batch, num_processes=ranks, process_index=rank)
        loaders.append(iter(DataLoader(shard, batch_size=batch, collate_fn=collate_blocks)))
    steps = [torch.cat([next(loader)["input_ids"] for loader in loaders]) for _ in range(20)]
    assert torch.equal(torch.cat(steps), whole)


def test_seeds_make_orders(tmp_path, small_windows):
    streams = [take(two_sources(tmp_path, "text.gz", seed)[0], 200) for seed in (0, 0, 1)]
    assert torch.equal(streams[0], streams[1]) and not torch.equal(streams[0], streams[2])


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 99), (5, 3, 2), (1,)])
def test_mixture(weights):
    """Shares come out within four standard deviations, and evenly over the run."""
    sources = [
        WindowedBlocks(lambda epoch, place, mark=mark: iter([(None, np.full(400, mark, np.uint16))]), 4, 0, "x")
        for mark in range(len(weights))
    ]
    stream = MixedStream(sources, weights, 3)
    marks = take(stream, 20_000)[:, 0]
    for part in (marks[:10_000], marks[10_000:]):
        shares = np.bincount(part, minlength=len(weights)) / len(part)
        odds = np.array(weights) / sum(weights)
        assert (np.abs(shares - odds) <= 4 * np.sqrt(odds * (1 - odds) / len(part))).all(), shares
    assert len(weights) == 1 or len(set(marks[:200].tolist())) > 1


@pytest.mark.parametrize("sizes", [[7], [1] * 100, [64, 1, 130, 5, 0, 16]])
def test_read_windows(sizes):
    """Windows are the ids in order; each begins where its place and skip say."""
    bounds = np.cumsum([0, *sizes])
    ids = np.arange(bounds[-1], dtype=np.uint16)
    pieces = [(number, ids[bounds[number] : bounds[number + 1]]) for number in range(len(sizes))]
    got = [(place, skip, blocks.copy()) for place, skip, blocks in read_windows(pieces, 4, 3, 0)]
    assert np.array_equal(np.concatenate([blocks.ravel() for _, _, blocks in got]), ids[: len(ids) // 4 * 4])
    assert all(blocks.shape == (3, 4) for _, _, blocks in got[:-1])
    for number, (place, skip, _) in enumerate(got):
        again = [blocks.copy() for _, _, blocks in read_windows(pieces[place:], 4, 3, skip)]
        assert all(np.array_equal(a, b) for a, (_, _, b) in zip(again, got[number:], strict=True))


def test_memory_is_a_window_however_large_the_files(tmp_path, monkeypatch):
    """Peak bytes over a 64 MB corpus, with windows of 1 MiB ids: two sources' windows and their pieces."""
    for mark in "ab":
        (tmp_path / mark).mkdir()
        write(tmp_path / mark / "x.jsonl", [f"{i} " + mark * 2000 for i in range(8000)])
        write(tmp_path / mark / "x.txt", [f"{i} " + mark * 2000 for i in range(8000)])
    monkeypatch.setattr(WindowedBlocks.__init__, "__defaults__", (1 << 20,))
    tracemalloc.start()
    stream, _ = stream_files([([str(tmp_path / "a")], 0.5), ([str(tmp_path / "b")], 0.5)], 1024, 0)
    for count, _ in enumerate(stream):
        if count * 1024 > 70_000_000:
            break
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20, f"{peak:,}"


def test_positions_that_are_kept_are_bounded(monkeypatch):
    """A source of one window an epoch does not collect epochs; what is kept reaches LOOK_BACK blocks back."""
    monkeypatch.setattr(block_windows, "LOOK_BACK", 30)
    source = WindowedBlocks(lambda epoch, place: iter([(None, np.arange(12, dtype=np.uint16))]), 4, 0, "x")
    for _ in islice(source, 3000):
        pass
    assert len(source._windows) < 15
    assert source.state_dict(2970)["epoch"] == 990 and source.state_dict(3000)["epoch"] >= 999


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[60], [60] * 8, [1] * 90 + [60] * 3], ids=["one", "large", "small"])
def test_held_out_is_never_trained_on(tmp_path, kind, sizes):
    files = []
    for number, size in enumerate(sizes):
        files.append(write(tmp_path / f"{number}.{kind}", texts(f"<{number}>", size), row_group_size=20))
    shards, held_out = hold_out(files, CTX, 1 << 20)
    train = join(ids for _, ids in FileShards(shards, 0)(0, None))
    both = np.bincount(train, minlength=288) + np.bincount(held_out, minlength=288)
    assert np.array_equal(both[:EOS], np.bincount(read_ids(files), minlength=288)[:EOS])
    assert 2 * CTX <= len(held_out) < 0.6 * len(train)
    assert hold_out(files[::-1], CTX, 1 << 20)[1].tolist() == held_out.tolist()


def test_held_out_is_capped(tmp_path):
    files = [write(tmp_path / f"{i}.txt", ["some text " * 5000]) for i in range(40)]
    shards, held_out = hold_out(files, CTX, 8000)
    assert 8000 <= len(held_out) <= 8100 and len(shards) == 40
    assert sorted(start for _, start in shards) == [0] * 24 + [500] * 16


def test_held_out_text_of_a_mixture_has_its_shares():
    parts = [np.full(size << 14, mark, dtype=np.uint16) for mark, size in enumerate((70, 30))]
    for size in (10, 33, 100):
        front = np.bincount(interleave(parts)[: size << 14]) / (size << 14)
        assert abs(front[1] - 0.3) < 0.1, front


def test_the_same_file_twice_is_refused(tmp_path):
    a, b = folder_of(tmp_path / "a", "jsonl", "a"), str(tmp_path / "a" / "0.jsonl")
    with pytest.raises(ValueError, match=r"0\.jsonl' is in '.*a' too"):
        stream_files([([a], 1), ([b], 1)], CTX, 0)


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty' is empty: 0 bytes"):
        stream_files([([str(tmp_path / "empty")], 1)], CTX, 0)
    path = write(tmp_path / "short.txt", ["x" * 100])
    with pytest.raises(ValueError, match=r"ctx=60 is longer than the training part of data='.*short\.txt'"):
        stream_files([([str(path)], 1)], 60, 0)


def test_another_corpus_is_no_place_to_go_on(tmp_path, small_windows):
    stream, _ = two_sources(tmp_path, "jsonl")
    state = stream.state_dict(0)
    write(tmp_path / "a" / "9.jsonl", texts("new"))
    with pytest.raises(ValueError, match="data has changed"):
        two_sources(tmp_path, "jsonl")[0].load_state_dict(state)
    for broken in ({}, {"blocks": 3}, {**state, "sources": [1, 2]}, [state]):
        with pytest.raises(ValueError, match="not a position of a stream"):
            stream.load_state_dict(broken)
    for source in state["sources"]:
        del source["place"]
    with pytest.raises(ValueError, match="not a position of a stream"):
        stream.load_state_dict(state)
    with pytest.raises(AssertionError, match="1 blocks of 0 that were read"):
        two_sources(tmp_path, "jsonl")[0].state_dict(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_vanishes_is_named(tmp_path, small_windows, kind):
    stream, _ = two_sources(tmp_path, kind)
    take(stream, 1)
    (tmp_path / "b" / f"3.{kind}").unlink()
    with pytest.raises(ValueError, match=rf"b/3\.{kind}': file not found"):
        take(stream, 9000)


def test_reader_processes_are_refused(tmp_path, small_windows):
    stream, _ = two_sources(tmp_path, "jsonl")
    with pytest.raises(ValueError, match="dataloader_num_workers=2: streamed data"):
        configure_reading(ArbTrainingArguments(str(tmp_path / "run"), dataloader_num_workers=2, use_cpu=True))
    with pytest.raises(ValueError, match="split_batches=True"):
        split = {"split_batches": True}
        configure_reading(ArbTrainingArguments(str(tmp_path / "run"), accelerator_config=split, use_cpu=True))
    with pytest.raises(ValueError, match="dataloader_num_workers=1: streamed data"):
        next(iter(DataLoader(stream, num_workers=1)))


class Recorder(ArbTrainer):
    """Notes what each step is trained on, and at each checkpoint the stream's position."""

    def train(self, **kwargs):
        self.seen, self.states = [], {}
        super().train(**kwargs)
        return torch.cat(self.seen)

    def training_step(self, model, inputs, *args):
        self.seen.append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, *args)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        args = self.args
        a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = self.state.global_step - self._initial_global_step
        self.states[self.state.global_step] = json.loads(json.dumps(self.train_dataset.state_dict(steps * a_step)))


def recorder(tmp_path, name, stream, **changes):
    from configuration_arb import preset_config
    from modeling_arb import ArbForCausalLM

    args = ArbTrainingArguments(
        output_dir=str(tmp_path / name),
        max_steps=9,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        save_steps=1,
        save_total_limit=20,
        eval_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **changes,
    )
    configure_reading(args)
    torch.manual_seed(0)
    model = ArbForCausalLM(preset_config("arb-tiny"))
    held_out = ByteBlocks(document_ids("x" * 99), CTX)
    return Recorder(model, args, train_dataset=stream, eval_dataset=held_out, data_collator=collate_blocks)


def test_the_trainer_goes_on_from_a_position(tmp_path, small_windows):
    """A run trains on the stream's blocks in order; resumed twice from positions, on just those that are left."""
    trainer = recorder(tmp_path, "whole", two_sources(tmp_path, "jsonl")[0])
    seen = trainer.train()
    assert torch.equal(seen, take(two_sources(tmp_path, "jsonl")[0], 54))
    states = trainer.states
    for step in (2, 5):
        stream, _ = two_sources(tmp_path, "jsonl")
        stream.load_state_dict(states[step])
        resumed = recorder(tmp_path, f"part{step}", stream, ignore_data_skip=True)
        rest = resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert torch.equal(rest, seen[6 * step :])
        assert resumed.states == {later: states[later] for later in range(step + 1, 10)}
        assert all(
            torch.equal(a, b)
            for a, b in zip(trainer.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
        )
