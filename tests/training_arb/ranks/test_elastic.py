"""A checkpoint from two ranks goes on with one and with three; a run that only lacks its end gets just that."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from support.pretraining import arguments
from support.scripting import ROOT, run_script

PRETRAIN = ROOT / "scripts" / "pretrain.py"
STEPS = 4


def options(corpus, output_dir, **changes):
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "eval_strategy": "no",
        "eval_steps": None,
        "logging_steps": 1,
        "save_total_limit": None,
        "eval_bytes": 100,
        **changes,
    }
    return [str(word) for word in arguments(corpus, output_dir, **settings)]


def on_ranks(ranks, line):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(PRETRAIN), *line], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def report(output_dir):
    return json.loads((output_dir / "report.json").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_bytes(b"The quick brown fox jumps over the lazy dog. " * 400)
    return path


@pytest.fixture(scope="module")
def of_two_ranks(corpus, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "two"
    on_ranks(2, options(corpus, output_dir))
    return output_dir


@pytest.mark.parametrize("ranks", [1, 3])
def test_other_ranks_go_on(corpus, of_two_ranks, tmp_path, ranks):
    shutil.copytree(of_two_ranks / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    line = options(corpus, tmp_path / "run", resume_from_checkpoint="latest")
    if ranks == 1:
        assert run_script("pretrain", *line) == 0
    else:
        on_ranks(ranks, line)
    steps = [entry["step"] for entry in report(tmp_path / "run")["history"] if "loss" in entry]
    assert steps == [1, 2, 3, 4]


def test_a_run_stopped_just_before_its_end(corpus, tmp_path):
    assert run_script("pretrain", *options(corpus, tmp_path / "whole")) == 0
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{STEPS}", tmp_path / "part" / f"checkpoint-{STEPS}")
    assert run_script("pretrain", *options(corpus, tmp_path / "part", resume_from_checkpoint="auto")) == 0
    whole, part = report(tmp_path / "whole"), report(tmp_path / "part")
    assert (part["state_sha256"], part["steps"]) == (whole["state_sha256"], STEPS)
    assert (tmp_path / "part" / "final" / "model.safetensors").is_file()
