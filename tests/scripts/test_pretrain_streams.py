"""scripts/pretrain.py on streamed data: weights, every kind of file, resume, ranks, and bad input in one line."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from support.documents import KINDS, write
from support.scripting import ROOT, run_script

TEXTS = [f"def function_{i}(a, b):\n    return a * {i} + b\n" for i in range(200)]


def arguments(data, output_dir, **changes):
    settings = {
        "preset": "arb-tiny",
        "output_dir": output_dir,
        "ctx": 32,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "eval_steps": 6,
        "save_total_limit": 9,
        "eval_bytes": 200,
        "use_cpu": "true",
        **changes,
    }
    return ["--data", *data, *(part for key, value in settings.items() for part in (f"--{key}", value))]


def final_hash(output_dir):
    return json.loads((output_dir / "report.json").read_text())["state_sha256"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return [f"{write(folder / kind, TEXTS)}:{weight}" for kind, weight in zip(KINDS, (5, 1, 2, 1, 0.5), strict=True)]


def test_a_mixture_of_all_kinds_resumes_in_the_same_state(corpus, tmp_path):
    assert run_script("pretrain", *arguments(corpus, tmp_path / "whole")) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    assert run_script("pretrain", *arguments(corpus, tmp_path / "part", resume_from_checkpoint="latest")) == 0
    assert final_hash(tmp_path / "part") == final_hash(tmp_path / "whole")
    changed = [*corpus[:-1], corpus[-1] + "1"]
    (tmp_path / "part" / "final").rename(tmp_path / "part" / "before")
    assert run_script("pretrain", *arguments(changed, tmp_path / "part", resume_from_checkpoint="latest")) == 2


SEE_DATA = """
import sys, torch, torch.distributed as dist
sys.argv[0] = "pretrain.py"
sys.path.insert(0, {scripts!r})
import pretrain
from training_arb.train import trainer_arb
step, seen = trainer_arb.ArbTrainer.training_step, []
def noted(self, model, inputs, *args):
    seen.append(inputs["input_ids"].cpu())
    return step(self, model, inputs, *args)
trainer_arb.ArbTrainer.training_step = noted
pretrain.main()
torch.save(seen, {out!r} + (str(dist.get_rank()) if dist.is_initialized() else ""))
"""


def test_two_ranks_train_on_what_one_would(corpus, tmp_path):
    """Rank r's batches are disjoint halves of those of one process with a batch twice as large."""
    import torch

    seen = {}
    for ranks, batch in ((1, 8), (2, 4)):
        out = str(tmp_path / f"seen{ranks}-")
        script = tmp_path / f"see{ranks}.py"
        script.write_text(SEE_DATA.format(scripts=str(ROOT / "scripts"), out=out))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if ranks == 2 else []
        changes = {"per_device_train_batch_size": batch, "max_steps": 3}
        line = [sys.executable, *launch, str(script), *map(str, arguments(corpus, tmp_path / f"run{ranks}", **changes))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        files = sorted(tmp_path.glob(f"seen{ranks}-*"))
        assert len(files) == ranks
        seen[ranks] = [torch.cat(step) for step in zip(*map(torch.load, files), strict=True)]
    assert len(seen[1]) == 3
    assert all(torch.equal(one, two) for one, two in zip(seen[1], seen[2], strict=True))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt:x", b"some text", "a.txt:x': no such file, and 'x' is not a weight"),
        ("a.txt:-1", b"some text", "a.txt:-1': must be PATH:WEIGHT"),
        ("a.txt:nan", b"some text", "a.txt:nan': must be PATH:WEIGHT"),
        ("missing:1", b"some text", "missing': no such file"),
        ("a.txt:1", b"", "a.txt' is empty: 0 bytes"),
        ("a.txt:1", b"short", "ctx=32 is longer than the held-out part"),
        ("a.jsonl:1", b'{"text": "x"}\n{"body": 1}', "a.jsonl', line 2: text_column='text' not found among body"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl', line 2: not JSON"),
        ("a.parquet", b"PAR1 no parquet", "a.parquet' is damaged"),
        ("a.txt.gz", b"no gz", "a.txt.gz' is damaged: Not a gzipped file"),
    ],
)
def test_bad_data_is_one_line_and_exit_code_2(tmp_path, capsys, name, content, said):
    if not name.startswith("missing"):
        (tmp_path / name.partition(":")[0]).write_bytes(content)
    assert run_script("pretrain", *arguments([tmp_path / name], tmp_path / "run")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and said in errors[0]
    assert not (tmp_path / "run").exists()


def test_reader_processes_are_refused(corpus, tmp_path, capsys):
    assert run_script("pretrain", *arguments(corpus, tmp_path / "run", dataloader_num_workers=2)) == 2
    assert "dataloader_num_workers=2: streamed data" in capsys.readouterr().err


def test_large_data_is_streamed_without_weights(tmp_path, capsys):
    path = write(tmp_path / "large.jsonl", [f"{i} " + "once upon a time " * 3000 for i in range(40)])
    lines = arguments([path], tmp_path / "run", stream_above_mb=1, max_steps=2)
    assert run_script("pretrain", *lines) == 0
    assert "bytes, streamed" in capsys.readouterr().out
