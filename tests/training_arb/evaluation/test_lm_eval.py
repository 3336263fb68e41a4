"""lm-evaluation-harness on ARB's own tasks, which read nothing from the network; its bits per byte against ours."""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.scripting import ROOT, run_script
from training_arb.evaluation.eval_harness import TASKS_FOLDER, import_installed, own_tasks

HARNESS = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'arb[eval]'")
CTX = 128
TEXT = TASKS_FOLDER / "arb_text.jsonl"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An exported folder of a model whose choices are not all alike."""
    root = tmp_path_factory.mktemp("lm_eval")
    torch.manual_seed(0)
    ArbForCausalLM(preset_config("arb-tiny")).save_pretrained(root / "checkpoint")
    assert run_script("export_hub", root / "checkpoint", root / "export") == 0
    return root / "export"


@pytest.fixture
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def test_own_tasks_are_well_formed():
    assert own_tasks() == ["arb_python", "arb_text"]
    texts = [json.loads(line)["text"] for line in TEXT.read_text().splitlines()]
    assert len(texts) == 8 and any(not text.isascii() for text in texts)
    questions = [json.loads(line) for line in (TASKS_FOLDER / "arb_python.jsonl").read_text().splitlines()]
    assert len({question["code"] for question in questions}) == len(questions) == 32
    for question in questions:
        choices = question["choices"]
        assert len({*choices}) == len(choices) == 4 and 0 <= question["answer"] < 4
        lines = [question["code"] + choice for choice in choices]
        assert all(line.isascii() and not line.startswith(" " * 5) for line in lines)


def test_without_lm_eval_one_line_says_how_to_get_it(export, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_script("evaluate", export, "--lm_eval", "arb_text") == 2
    assert "lm-eval is not installed: pip install 'arb[eval]'" in capsys.readouterr().err


@HARNESS
@pytest.mark.parametrize("start", ["auto", "bos"])
def test_the_harness_agrees_where_windows_are_the_same(export, tmp_path, offline, capsys, start):
    """lm-eval's rolling windows are ours that overlap by one id: it predicts max_length = ctx - 1 ids by each."""
    out = tmp_path / "score.json"
    arguments = ["--data", TEXT, "--ctx", CTX, "--stride", CTX - 1, "--device", "cpu", "--batch", 4, "--json", out]
    assert run_script("evaluate", export, *arguments, "--lm_eval", "arb_text,arb_python", "--start", start) == 0
    scores = json.loads(out.read_text())
    theirs = scores["lm_eval"]
    assert theirs["arb_text"]["bits_per_byte"] == pytest.approx(scores["bits_per_byte"], abs=1e-4)
    assert theirs["arb_text"]["byte_perplexity"] == pytest.approx(2 ** scores["bits_per_byte"], rel=1e-4)
    assert theirs["arb_python"]["acc"] == pytest.approx(right_answers(export) / 32)
    shown = capsys.readouterr().out
    assert f"arb_text  bits_per_byte {theirs['arb_text']['bits_per_byte']:.4f}" in shown


def right_answers(folder):
    """How often the likeliest of the four choices is the right one, each choice by a forward of its own."""
    model, right = ArbForCausalLM.from_pretrained(folder).eval(), 0
    for line in (TASKS_FOLDER / "arb_python.jsonl").read_text().splitlines():
        row = json.loads(line)
        totals = []
        for choice in row["choices"]:
            code, answer = row["code"].rstrip(), row["code"][len(row["code"].rstrip()) :] + choice
            ids = [*code.encode(), *answer.encode()]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            totals.append(sum(logits[at - 1, ids[at]].item() for at in range(len(code), len(ids))))
        right += totals.index(max(totals)) == row["answer"]
    return right


@HARNESS
def test_the_harness_by_itself(export, tmp_path, offline):
    """lm-eval's own command on the exported folder, its code trusted, in a process that imports nothing of ours."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--include_path", TASKS_FOLDER]
    command += ["--model_args", f"pretrained={export},trust_remote_code=True,max_length={CTX - 1},prefix_token_id=257"]
    command += ["--tasks", "arb_text", "--output_path", tmp_path / "out"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [*map(str, command)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["arb_text"]["bits_per_byte,none"]
    arguments = ["--data", TEXT, "--ctx", CTX, "--stride", CTX - 1, "--device", "cpu", "--json", tmp_path / "ours.json"]
    assert run_script("evaluate", export, *arguments) == 0
    assert theirs == pytest.approx(json.loads((tmp_path / "ours.json").read_text())["bits_per_byte"], abs=1e-4)


@HARNESS
def test_a_task_that_nobody_knows(export, capsys):
    assert run_script("evaluate", export, "--lm_eval", "arb_text,no_such_task") == 2
    assert "lm_eval='no_such_task' is not a task; ARB's own are arb_python, arb_text" in capsys.readouterr().err


@HARNESS
def test_the_library_evaluate_is_not_our_script(monkeypatch):
    """`python scripts/evaluate.py` begins its path with scripts/, and metrics of the harness import `evaluate`."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    before = sys.path[:]
    assert find_spec("evaluate").origin == str(ROOT / "scripts" / "evaluate.py")
    library = import_installed("evaluate")
    assert library.__file__.endswith("evaluate/__init__.py") and import_installed("evaluate") is library
    assert sys.path == before and importlib.import_module("evaluate") is library
    with pytest.raises(ImportError):
        import_installed("no_such_library")
