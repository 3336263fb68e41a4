"""scripts/pretrain.py as a user runs it: what it leaves behind, resume bit for bit, kill -9, two ranks, bad input."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from support.pretraining import arguments, final_hash, report, write_corpus
from support.scripting import ROOT, run_script
from training_arb.checkpoints.checkpoint_files import write_checksums


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory)


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    """One uninterrupted run, read by many tests."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run_script("pretrain", *arguments(corpus, output_dir)) == 0
    return output_dir


def test_leaves_what_it_promises(finished, capsys):
    for name in (
        "loss.png",
        "report.json",
        "report.html",
        "latest/run.json",
        "best/checksums.json",
        "final/model.safetensors",
        "final/modeling_arb.py",
        "final/tokenizer.json",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in finished.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 4, 6, 8)}
    assert not list(finished.glob(".*"))
    logs = [entry for entry in report(finished)["history"] if "loss" in entry]
    assert {"bits_per_byte", "flip_rate", "zero_share", "state_bytes", "learning_rate"} <= logs[0].keys()
    assert "grad_norm" not in logs[0]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert any("eval_bits_per_byte" in entry for entry in report(finished)["history"])
    assert report(finished)["audit"]["float_tensors"] == []
    for folder in ("final", "checkpoint-8"):
        assert run_script("audit_state", finished / folder) == 0


def test_same_seed_same_run_other_seed_another(corpus, finished, tmp_path):
    assert run_script("pretrain", *arguments(corpus, tmp_path / "again")) == 0
    assert final_hash(tmp_path / "again") == final_hash(finished)
    assert run_script("pretrain", *arguments(corpus, tmp_path / "other", seed=1)) == 0
    assert final_hash(tmp_path / "other") != final_hash(finished)


@pytest.mark.parametrize("step", [2, 6])
def test_resumed_run_ends_in_the_same_state(corpus, finished, tmp_path, step):
    shutil.copytree(finished / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    assert run_script("pretrain", *arguments(corpus, tmp_path / "run", resume_from_checkpoint="latest")) == 0
    assert final_hash(tmp_path / "run") == final_hash(finished)


def test_resume_with_gradient_accumulation(corpus, tmp_path):
    changes = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}
    assert run_script("pretrain", *arguments(corpus, tmp_path / "whole", **changes)) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    resumed = arguments(corpus, tmp_path / "part", resume_from_checkpoint="auto", **changes)
    assert run_script("pretrain", *resumed) == 0
    assert final_hash(tmp_path / "part") == final_hash(tmp_path / "whole")


@pytest.mark.parametrize("preset", ["arb-tiny", "arb-tiny-full"])
def test_two_ranks_hold_the_same_bits(corpus, tmp_path, preset):
    """Replicas on gloo: dW is averaged before it is folded, and what blocks observe is joined: one hash on both."""
    code = (
        "import sys, torch.distributed as dist\n"
        "sys.argv[0] = 'pretrain.py'\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import pretrain\n"
        "from training_arb.train import trainer_arb\n"
        "from training_arb.memory.state_audit import state_hash\n"
        "train = trainer_arb.ArbTrainer.train\n"
        "def both(self, **k):\n"
        "    out = train(self, **k); h = [None] * dist.get_world_size()\n"
        "    dist.all_gather_object(h, state_hash(self.model)); assert len(h) == 2 and h[0] == h[1], h\n"
        "    print('RANKS AGREE'); return out\n"
        "trainer_arb.ArbTrainer.train = both\n"
        "pretrain.main()\n"
    )
    script = tmp_path / "two_ranks.py"
    script.write_text(code)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    line += map(str, arguments(corpus, tmp_path / "run", max_steps=4, preset=preset))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("RANKS AGREE") == 2


def damage(checkpoint, how):
    """What checksums do not show: they are written anew. test_long_runs.py has damage that they show."""
    weights = checkpoint / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "garbage":
        weights.write_bytes(b"\xff" * 5000)
    else:
        tensors = load_file(weights)
        name = "byte_head.proj.T_packed"
        if how == "no-trits":
            tensors[name][3, 2] = 250
        elif how == "dtype":
            tensors[name] = tensors[name].float()
        elif how == "missing":
            del tensors[name]
        elif how == "shape":
            tensors[name] = tensors[name][:-1].contiguous()
        save_file(tensors, weights, metadata={"format": "pt"})
    write_checksums(checkpoint)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "damaged or truncated"),
        ("garbage", "damaged or truncated"),
        ("no-trits", "byte_head.proj.T_packed holds 1 values outside 0 to 242"),
        ("dtype", "byte_head.proj.T_packed has dtype torch.float32, config.json requires torch.uint8"),
        ("missing", "byte_head.proj.T_packed is missing"),
        ("shape", "byte_head.proj.T_packed has shape (287, 13)"),
    ],
)
def test_damaged_checkpoint_is_refused_in_one_line(corpus, finished, tmp_path, capsys, how, said):
    checkpoint = tmp_path / "run" / "checkpoint-4"
    shutil.copytree(finished / "checkpoint-4", checkpoint)
    damage(checkpoint, how)
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    capsys.readouterr()
    assert run_script("pretrain", *arguments(corpus, tmp_path / "run", resume_from_checkpoint="latest")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert str(checkpoint) in errors[0]
    assert run_script("generate", checkpoint, "--prompt", "a") == 2
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preset": "arb-14m"}, "head_intermediate_size=256, this run 2048"),
        ({"update_rule": "flip"}, "update_rule='momentum', this run 'flip'"),
        ({"ctx": 64}, "ctx=32, this run 64"),
        ({"seed": 5}, "seed=0, this run 5"),
    ],
    ids=["preset", "rule", "ctx", "seed"],
)
def test_resuming_another_run_is_refused(corpus, finished, tmp_path, capsys, changes, said):
    shutil.copytree(finished / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    lines = arguments(corpus, tmp_path / "run", resume_from_checkpoint="latest", **changes)
    assert run_script("pretrain", *lines) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "nowhere.txt"}, "data='nowhere.txt'"),
        ({"preset": "arb-9z"}, "preset='arb-9z'"),
        ({"blocks": "{"}, "blocks='{' is not JSON"),
        ({"blocks": "[1]"}, "blocks='[1]' must be a JSON object"),
        ({"blocks": '{"depth": 3}'}, "blocks: 'depth' is not a field"),
        ({"blocks": '{"update_rule": "flip"}'}, "--update_rule"),
        ({"blocks": '{"memgram": {"dim": 4}}'}, "memgram.slots is missing"),
        ({"table_threshold": 0}, "table_threshold=0"),
        ({"update_rule": "adam"}, "update_rule='adam'"),
        ({"group_size": 5}, "group_size=5"),
        ({"momentum_bits": 3}, "momentum_bits=3"),
        ({"trits_per_weight": "3"}, "trits_per_weight='3' must be 1, 2, or a dict"),
        ({"trits_per_weight": "neck:2"}, "must be a number for some of the roles embedding"),
        ({"blocks": '{"trits_per_weight": 2}'}, "use the option --trits_per_weight"),
        ({"ctx": 20000}, "ctx=20000"),
        ({"ctx": 2}, "ctx=2"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"learning_rate": 2}, "learning_rate=2.0"),
        ({"flip_threshold": 900}, "flip_threshold=900"),
        ({"fp16": "true"}, "fp16=True"),
        ({"optim": "sgd"}, "optim=sgd"),
        ({"resume_from_checkpoint": "latest"}, "has no whole checkpoint"),
        ({"resume_from_checkpoint": "gone/checkpoint-3"}, "resume_from_checkpoint='gone/checkpoint-3'"),
        ({"dataset": "./no_such_dataset", "data": None}, "dataset='./no_such_dataset'"),
        ({"no_such_option": 1}, "no_such_option"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(corpus, tmp_path, capsys, changes, said):
    assert run_script("pretrain", *arguments(corpus, tmp_path / "run", **changes)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert said in errors[0]
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_empty_data_and_finished_folder_are_refused(corpus, finished, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert run_script("pretrain", *arguments(empty, tmp_path / "run")) == 2
    assert "is empty: 0 bytes" in capsys.readouterr().err
    assert run_script("pretrain", *arguments(corpus, finished)) == 2
    assert "already holds a run" in capsys.readouterr().err
    shutil.copytree(finished / "final", tmp_path / "run" / "checkpoint-8")
    assert run_script("pretrain", *arguments(corpus, tmp_path / "run", resume_from_checkpoint="latest")) == 2
    assert "not a whole training checkpoint" in capsys.readouterr().err


def test_streamed_dataset(tmp_path):
    folder = tmp_path / "stories"
    folder.mkdir()
    rows = [json.dumps({"text": f"Story {i}. " + "once upon a time there was a number. " * 3}) for i in range(300)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    lines = arguments(None, tmp_path / "whole", data=None, dataset=folder)
    assert run_script("pretrain", *lines) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    lines = arguments(None, tmp_path / "part", data=None, dataset=folder, resume_from_checkpoint="latest")
    assert run_script("pretrain", *lines) == 0
    assert final_hash(tmp_path / "part") == final_hash(tmp_path / "whole")
