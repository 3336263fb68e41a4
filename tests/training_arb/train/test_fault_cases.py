"""What can be wrong with what a run is given, a row each: the script ends with exit code 2 and one line that names it.

Other faults have rows elsewhere: any bytes of checkpoints in test_hostile_checkpoints.py, files of text in
test_pretrain_streams.py, lost ranks in test_rank_faults.py, kills, signals, full disks and losses in test_long_runs.py.
"""

import json
import os
import shutil
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_arb import ArbForCausalLM
from support.pretraining import TEXT, arguments, write_corpus
from support.scripting import run_script
from training_arb.checkpoints.checkpoint_files import check_checkpoint, write_checksums
from training_arb.cli.command_line import exit_code
from training_arb.data.block_windows import WindowedBlocks
from training_arb.ranks.rank_loss import RanksPartedError
from training_arb.train.trainer_arb import ArbTrainer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory)


def lines(corpus, run, /, **changes):
    """A short run on a stream, so that its checkpoints hold a position too."""
    settings = {
        "data": f"{corpus}:1",
        "output_dir": run,
        "max_steps": 4,
        "disable_tqdm": "true",
        "prompt": "",
        **changes,
    }
    return arguments(settings.pop("data"), settings.pop("output_dir"), **settings)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run_script("pretrain", *lines(corpus, output_dir, max_steps=2)) == 0
    return output_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    """A run's folder with one checkpoint."""
    shutil.copytree(finished / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def sharded(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    ArbForCausalLM.from_pretrained(finished / "final").save_pretrained(folder, max_shard_size="15KB")
    assert len(shards(folder)) > 2
    return folder


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def the_error(capsys):
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    return line.partition("error: ")[2]


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_folder(path):
    path.unlink()
    path.mkdir()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)


def garble(path):
    path.write_bytes(b"\x00\xff garbage" * 9)


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def tensors(act):
    """A fault that is a change of the weights' first packed matrix, in a whole file."""

    def damage(path):
        stored = load_file(path)
        act(stored, next(name for name in sorted(stored) if name.endswith("T_packed")))
        save_file(stored, path, metadata={"format": "pt"})

    return damage


def name_a_gone_file(index):
    stored = json.loads(index.read_text())
    stored["weight_map"][min(stored["weight_map"])] = "model-00009.safetensors"
    index.write_text(json.dumps(stored))


# the file and what happens to it, whether checksums.json shows it, and what is said
CHECKPOINT_FAULTS = {
    "weights-cut": ("model.safetensors", cut, False, "damaged or truncated"),
    "weights-bit": ("model.safetensors", flip, True, "its sha256 is not the one"),
    "weights-gone": ("model.safetensors", Path.unlink, True, "model.safetensors is missing"),
    "weights-shape": ("model.safetensors", tensors(lambda s, n: s.update({n: s[n][1:].clone()})), False, "has shape"),
    "weights-dtype": (
        "model.safetensors",
        tensors(lambda s, n: s.update({n: s[n].float()})),
        False,
        "has dtype torch.float32",
    ),
    "weights-tensor": ("model.safetensors", tensors(lambda s, n: s.pop(n)), False, "is missing"),
    "weights-no-trits": ("model.safetensors", tensors(lambda s, n: s[n].fill_(255)), False, "not packed trits"),
    "header-of-2^60": (
        "model.safetensors",
        lambda path: path.write_bytes(struct.pack("<Q", 1 << 60) + b"{"),
        False,
        "header 1,152,921,504,606,846,976 bytes",
    ),
    "config-gone": ("config.json", Path.unlink, False, "config.json is missing"),
    "config-garbage": ("config.json", garble, False, "config.json: not JSON"),
    "config-version": ("config.json", lambda path: change(path, packing_version=7), False, "packing_version=7 must be"),
    "config-llama": ("config.json", lambda path: change(path, model_type="llama"), False, "model_type='llama' must be"),
    "optimizer": ("optimizer.pt", garble, False, "optimizer.pt: damaged"),
    "scheduler": ("scheduler.pt", cut, False, "scheduler.pt: damaged"),
    "random-numbers": ("rng_state.pth", cut, False, "rng_state.pth: damaged"),
    "state-garbage": ("trainer_state.json", garble, False, "trainer_state.json: not JSON"),
    "state-gone": ("trainer_state.json", Path.unlink, False, "trainer_state.json is missing"),
    "run": ("run.json", cut, False, "run.json: not JSON"),
    "stream-garbage": ("stream.json", garble, False, "stream.json: not JSON"),
    "stream-gone": ("stream.json", Path.unlink, False, "stream.json: no such file; the data's position is lost"),
    "stream-other": ("stream.json", lambda path: path.write_text("{}"), False, "not a position of a stream: {}"),
    "checksums-garbage": ("checksums.json", garble, True, "checksums.json: not JSON"),
    "checksums-wrong": ("checksums.json", lambda path: change(path, **{"run.json": "0"}), True, "run.json: damaged"),
    "checksums-more": ("checksums.json", lambda path: change(path, more="0"), True, "more is missing"),
}


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_a_checkpoint_that_is_no_place_to_go_on(corpus, run_dir, capsys, fault):
    name, damage, summed, said = CHECKPOINT_FAULTS[fault]
    checkpoint = run_dir / "checkpoint-2"
    damage(checkpoint / name)
    if not summed:
        write_checksums(checkpoint)
    before = names_in(run_dir)
    capsys.readouterr()
    assert run_script("pretrain", *lines(corpus, run_dir, resume_from_checkpoint="auto")) == 2
    error = the_error(capsys)
    assert said in error and (str(checkpoint) in error or fault == "stream-other")
    assert names_in(run_dir) == before


MODEL_FAULTS = {
    "shard-gone": (lambda d: shards(d)[1].unlink(), "model-00002-of-00003.safetensors is missing"),
    "shard-cut": (lambda d: cut(shards(d)[1]), "model-00002-of-00003.safetensors: damaged or truncated"),
    "shard-a-folder": (lambda d: make_folder(shards(d)[1]), "model-00002-of"),
    "index-gone": (lambda d: (d / "model.safetensors.index.json").unlink(), "index.json is missing"),
    "index-garbage": (lambda d: garble(d / "model.safetensors.index.json"), "index.json: not JSON"),
    "index-empty": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "index.json: not a shard index"),
    "index-lies": (
        lambda d: name_a_gone_file(d / "model.safetensors.index.json"),
        "model-00009.safetensors is missing",
    ),
    "no-config": (lambda d: (d / "config.json").unlink(), "config.json not found"),
    "gpt2": (lambda d: (d / "config.json").write_text('{"model_type": "gpt2"}'), "model_type='gpt2'"),
    "no-weights": (lambda d: [path.unlink() for path in shards(d)], "model.safetensors not found"),
    "loop": (lambda d: (shutil.rmtree(d), d.symlink_to(d.name)), "no such folder"),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_folder_that_holds_no_model(sharded, tmp_path, capsys, fault):
    damage, said = MODEL_FAULTS[fault]
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    damage(folder)
    assert run_script("generate", folder, "--prompt", "a", "--max_new_tokens", 1) == 2
    error = the_error(capsys)
    assert said in error and str(folder) in error


def test_a_model_in_shards_is_whole(sharded, finished):
    whole, parts = (ArbForCausalLM.from_pretrained(folder).state_dict() for folder in (finished / "final", sharded))
    assert whole.keys() <= parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_damaged_tokenizer_is_found(finished, tmp_path, capsys):
    """Ids are bytes and need no file, but other programs read this one."""
    shutil.copytree(finished / "final", tmp_path / "model")
    garble(tmp_path / "model" / "tokenizer.json")
    assert run_script("export_hub", tmp_path / "model", tmp_path / "export") == 2
    assert "tokenizer.json: damaged, its sha256" in the_error(capsys)
    assert not (tmp_path / "export").exists()


OPTION_FAULTS = [
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
    ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1 must be at least 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
    ({"logging_steps": -3}, "logging_steps=-3 must be positive"),
    ({"eval_steps": 0}, "eval_steps=0 must be positive"),
    ({"save_steps": "nan"}, "save_steps=nan must be positive"),
    ({"eval_blocks": 0}, "eval_blocks=0 must be at least 1"),
    ({"eval_bytes": 3}, "eval_bytes=3 must be at least 4"),
    ({"stream_above_mb": -1}, "stream_above_mb=-1 must be at least 0"),
    ({"prompt": "caf\udce9"}, "prompt='caf\\udce9' is not UTF-8"),
    ({"seed": -1}, "Seed must be between 0 and 2**32 - 1"),
    ({"learning_rate": "nan"}, "learning_rate=nan must be in [0, 1)"),
    ({"learning_rate": "fast"}, "--learning_rate/--learning-rate: invalid float value: 'fast'"),
    ({"warmup_steps": -1}, "warmup_steps = -1.0"),
    ({"stop_loss_factor": 0.5}, "stop_loss_factor=0.5 must be above 1"),
    ({"blocks": '{"hidden_size": "64"}'}, "hidden_size='64' must be a positive integer"),
    ({"blocks": '{"num_hidden_layers": 0}'}, "num_hidden_layers=0 must be a positive integer"),
    ({"blocks": '{"memgram": 3}'}, "memgram=3 must be None or a dict"),
    (
        {"blocks": '{"memgram": {"slots": 2147483647, "dim": 1048576}}'},
        "out of memory (can't allocate memory: you tried to allocate",
    ),
    ({"data": "DIR/loop:1"}, "loop': no such file, or no file in it"),
    ({"data": "DIR/loops"}, "loops': no such file, or no file in it"),
    ({"data": "/dev/zero"}, "data='/dev/zero': no such file, or no file in it"),
    ({"data": ""}, "data='' is empty"),
    ({"data": "DIR/garbage.jsonl"}, "garbage.jsonl', line 1: not JSON"),
    ({"data": "DIR/garbage.gz"}, "garbage.gz' is damaged: Not a gzipped file"),
    ({"data": "DIR/garbage.parquet"}, "garbage.parquet' is damaged"),
    ({"data": None, "dataset": "DIR/dataset"}, "dataset' cannot be read: "),
    ({"output_dir": "DIR/file"}, "file' is not a folder"),
    ({"output_dir": "DIR/loop"}, "loop' is not a folder"),
    ({"output_dir": "DIR/file/run"}, "Not a directory"),
    ({"resume_from_checkpoint": "DIR/loop"}, "loop': no such folder"),
    ({"resume_from_checkpoint": "DIR/file"}, "file': no such folder"),
    ({"resume_from_checkpoint": "best"}, "resume_from_checkpoint='best': no such checkpoint"),
]


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    (folder / "file").write_text("x")
    (folder / "loop").symlink_to("loop")
    (folder / "loops").mkdir()
    (folder / "loops" / "a").symlink_to("a")
    (folder / "loops" / "b").symlink_to(".")
    (folder / "dataset").mkdir()
    for name in ("garbage.jsonl", "garbage.gz", "garbage.parquet", "dataset/train.jsonl"):
        garble(folder / name)
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    OPTION_FAULTS,
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_meant(corpus, odd_files, tmp_path, capsys, options, said):
    options = {key: str(value).replace("DIR", str(odd_files)) if value else value for key, value in options.items()}
    before = names_in(odd_files)
    assert run_script("pretrain", *lines(corpus, tmp_path / "run", **options)) == 2
    assert said in the_error(capsys)
    assert not (tmp_path / "run").exists() or not names_in(tmp_path / "run")
    assert names_in(odd_files) == before


def test_a_measure_that_is_not_taken(corpus, tmp_path, capsys):
    assert run_script("pretrain", *lines(corpus, tmp_path / "run", eval_steps=2, metric_for_best_model="luck")) == 2
    assert "metric_for_best_model='luck' is not one of epoch, eval_bits_per_byte, eval_loss," in the_error(capsys)


DATA_FAULTS = {
    "deleted": (Path.unlink, "file not found"),
    "cut": (cut, "has changed during training: 3,0"),
    "emptied": (lambda path: path.write_bytes(b""), "has changed during training: 0 bytes, 6,"),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_data_that_changes_during_training(tmp_path, monkeypatch, capsys, fault):
    damage, said = DATA_FAULTS[fault]
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT[:6100])
    monkeypatch.setattr(WindowedBlocks.__init__, "__defaults__", (32 * 9,))
    training_step = ArbTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 3 and path.exists():
            damage(path)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(ArbTrainer, "training_step", step)
    changes = {"max_steps": 200, "eval_strategy": "no", "save_steps": 1000}
    assert run_script("pretrain", *lines(path, tmp_path / "run", **changes)) == 2
    error = the_error(capsys)
    assert said in error and str(path) in error


@contextmanager
def as_anybody():
    """Without root's right to read and write everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_what_may_not_be_read_or_written(finished, corpus):
    with tempfile.TemporaryDirectory() as open_folder:
        folder = Path(open_folder)
        folder.chmod(0o755)
        shutil.copytree(finished / "checkpoint-2", folder / "checkpoint-2")
        weights = folder / "checkpoint-2" / "model.safetensors"
        weights.chmod(0)
        with as_anybody(), pytest.raises(PermissionError) as unreadable:
            check_checkpoint(folder / "checkpoint-2")
        assert str(weights) in str(unreadable.value) and exit_code(unreadable.value) == 2
        weights.chmod(0o644)
        folder.chmod(0o555)
        with as_anybody(), pytest.raises(PermissionError) as unwritable:
            (folder / "run").mkdir()
        assert str(folder / "run") in str(unwritable.value) and exit_code(unwritable.value) == 2


def test_exit_codes_tell_kinds_apart():
    assert exit_code(FloatingPointError("step 4: the loss is nan")) == 1
    assert exit_code(RanksPartedError("step 4: rank 1 differs")) == 1
    assert exit_code(MemoryError()) == 2
    assert exit_code(RuntimeError("a bug")) is None and exit_code(KeyError("a bug")) is None
