"""The check of a GPU, tried without one: what it says, how stages end, and every stage at its smallest on the CPU."""

import importlib
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from arb_scripts.developer.check_gpu import (
    FAILED,
    HUNG,
    LEFT_OUT,
    PASSED,
    TOO_LARGE,
    Stage,
    check,
    file_name,
    run_apart,
    stages,
)
from support.scripting import ROOT, run_script
from training_arb.device_check.bounded_process import run_bounded
from training_arb.device_check.kernel_check import kernel_names, kernel_test_files, run_file, summarise
from training_arb.device_check.kernel_tests import first_difference, runs_kernels
from training_arb.device_check.pytest_stand_in import calls_of, install

WITHOUT_A_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
EASILY_MISSED = ("accelerate", "datasets", "hypothesis", "lm_eval", "matplotlib", "peft", "psutil", "pytest", "triton")
# every stage in one bare process; what a stage prints and its exit code are that process's
BARE = """
import importlib.machinery, runpy, sys
find = importlib.machinery.PathFinder.find_spec
def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in {missing} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_others)
for command in {commands}:
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
"""
A_TEST_FILE = """
import os
import time

import pytest
import torch


@pytest.mark.parametrize("value", [1, 2])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values(backend, value):
    assert torch.equal(torch.tensor([[0, value]]), torch.tensor([[0, 1]])), "value"


def test_dies(triton_device):
    os._exit(3)


@pytest.mark.skipif(True, reason="no such machine")
def test_skipped(triton_device):
    raise AssertionError


def test_follows(triton_device, monkeypatch):
    monkeypatch.setenv("ARB_BACKEND", "torch")
    assert triton_device.type == "cpu"
"""


def stage(tmp_path, code, seconds=20, name="training"):
    """A stage that is this Python code; OUT is where its JSON goes."""
    script = tmp_path / f"{name}.py"
    script.write_text(f"import json, sys, time\nOUT = sys.argv[-1]\n{code}\n")
    return Stage(name, seconds, (str(script),), lambda result: (result["passed"], result["summary"]))


def environment(tmp_path):
    return {"ARB_SCRATCH": str(tmp_path), "PATH": "/usr/bin:/bin"}


def written(passed=True):
    return f"open(OUT, 'w').write(json.dumps({{'passed': {passed}, 'summary': 'found this', 'card': 'A Card'}}))"


@WITHOUT_A_CARD
def test_without_a_card_it_is_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "developer" / "check_gpu.py"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: device='cuda'") and "does not find a GPU" in line


def test_make_gpu_takes_the_python_of_the_machine():
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", "gpu", "ARGS=--tiny"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == ["python3", "scripts/developer/check_gpu.py", "--tiny"]


def test_an_unknown_stage_is_refused(capsys):
    assert run_script("check_gpu", "--only", "kernels,lunch") == 2
    assert "only='lunch' is not one of environment, kernels" in capsys.readouterr().err


def test_the_stages_fit_into_eight_minutes_and_start_with_the_most_telling():
    names = [stage.name for stage in stages("cuda", tiny=False)]
    assert names[:3] == ["environment", "kernels", "training-arb-tiny"]
    assert len(names) == len(set(names)) == len(stages("cpu", tiny=True))
    assert names == [stage.name for stage in stages("cpu", tiny=True)]


def test_a_stage_ends_well(tmp_path):
    row = run_apart(stage(tmp_path, written()), 20, environment(tmp_path))
    assert (row["status"], row["summary"], row["last_lines"]) == (PASSED, "found this", [])
    assert row["result"]["card"] == "A Card"


def test_a_stage_that_found_faults_has_failed(tmp_path):
    row = run_apart(stage(tmp_path, written(False)), 20, environment(tmp_path))
    assert (row["status"], row["summary"]) == (FAILED, "found this")


def test_a_stage_that_hangs_is_killed_with_its_children_and_keeps_what_it_wrote(tmp_path):
    beats = tmp_path / "beats"
    child = f"import time\nwhile True: time.sleep(0.02); open({str(beats)!r}, 'a').write('.')"
    bounded = "from training_arb.device_check.bounded_process import run_bounded"
    starts_it = f"{bounded}\nrun_bounded([sys.executable, '-c', {child!r}], 60, own_group=False)"
    code = f"{written()}\nprint('here', flush=True)\n{starts_it}"
    started = time.monotonic()
    row = run_apart(stage(tmp_path, code), 3, {**environment(tmp_path), "PYTHONPATH": str(ROOT)})
    assert time.monotonic() - started < 15
    size = beats.stat().st_size
    time.sleep(0.5)
    assert beats.stat().st_size == size > 0
    assert row["status"] == HUNG
    assert row["summary"] == "killed after 3 s; found this"
    assert row["last_lines"] == ["here"] and row["result"]["passed"]


def test_a_stage_that_raises_is_told_with_its_last_lines(tmp_path):
    row = run_apart(stage(tmp_path, "print('before')\nraise RuntimeError('no such kernel')"), 20, environment(tmp_path))
    assert (row["status"], row["summary"]) == (FAILED, "RuntimeError: no such kernel")
    assert row["last_lines"][0] == "before" and any("Traceback" in line for line in row["last_lines"])
    assert row["result"] is None


def test_a_stage_that_does_not_fit_says_so(tmp_path):
    said = "error: out of memory (CUDA out of memory): a smaller batch, ctx or model needs less"
    row = run_apart(stage(tmp_path, f"sys.exit({said!r})"), 20, environment(tmp_path))
    assert (row["status"], row["summary"]) == (TOO_LARGE, said)


def test_the_result_is_written_after_each_stage(tmp_path, capsys):
    """The second stage reads what stands there when it starts, and the third never starts."""
    out = tmp_path / "gpu.json"
    before = f"seen = json.load(open({str(out)!r}))\nraise ValueError(seen['stages'][0]['status'])"
    planned = [
        stage(tmp_path, written(), name="environment"),
        stage(tmp_path, written(), name="first"),
        stage(tmp_path, before, name="second"),
        stage(tmp_path, written(), name="third"),
    ]
    args = SimpleNamespace(seconds=60, json=str(out))
    assert check(args, planned, ["first", "second"], environment(tmp_path)) == 1
    report = json.loads(out.read_text())
    assert [row["stage"] for row in report["stages"]] == ["environment", "first", "second", "third"]
    assert [row["status"] for row in report["stages"]] == [PASSED, PASSED, FAILED, LEFT_OUT]
    assert report["stages"][2]["summary"] == "ValueError: passed"
    assert report["card"] == "A Card" and not report["passed"]
    assert str(out) in capsys.readouterr().out.splitlines()[-1]


def test_the_file_is_named_after_the_card():
    assert file_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


def test_a_bounded_command_gives_its_code():
    assert run_bounded([sys.executable, "-c", "raise SystemExit(5)"], 20).code == 5


def test_every_stage_runs_in_a_bare_interpreter(tmp_path):
    """At the smallest sizes, one after the other, where torch and transformers are all that is installed."""
    planned = [stage for stage in stages("cpu", tiny=True) if stage.name != "kernels"]
    once = {stage.command: stage for stage in reversed(planned)}.values()
    outs = {stage.name: tmp_path / f"{stage.name}.json" for stage in once}
    commands = [[*stage.command, "--json", str(outs[stage.name])] for stage in once]
    code = BARE.format(missing=set(EASILY_MISSED), commands=commands)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = {name: json.loads(out.read_text()) for name, out in outs.items()}
    said = {stage.name: stage.summarise(results[stage.name]) for stage in once}
    assert all(good for good, _ in said.values()), said
    assert results["environment"]["card"] == "cpu"
    for training in ("arb-tiny", "two-trits", "arb-tiny-full", "arb-small"):
        compared = results[f"training-{training}"]
        assert compared["states_equal"] and compared["second_run_equal"] and not compared["largest_loss_difference"]
        assert len(compared["losses"]["cpu"]) == compared["steps"] == 2
    assert [(row["config"], row["compute"]) for row in results["speed-arb-14m"]["rows"]] == [("TrueTernary", "bf16")]
    assert [row["batch"] for row in results["generation"]["rows"]] == [1, 1, 2, 2]


def test_the_kernel_stage_runs_without_pytest(tmp_path, monkeypatch):
    out = tmp_path / "kernels.json"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run_script("check_gpu", "--stage", "kernels", "--device", "cpu", "--tiny", "--json", out) == 0
    result = json.loads(out.read_text())
    assert result["passed"] and result["tests"] == {"passed": 15, "failed": 0, "skipped": 0}
    assert result["kernels"] == [{"kernel": "packed_matvec_kernel", "result": "passed", "tests": 15, "failed": 0}]


def test_every_kernel_test_file_is_found():
    names = {path.stem for path in kernel_test_files()}
    triton_files = {path.stem for path in (ROOT / "tests").rglob("test_*_triton.py")}
    assert triton_files | {"test_sparse_momentum", "test_int8_matmul", "test_lstm_gates"} <= names
    assert "momentum_fold_kernel" in kernel_names() and len(kernel_names()) > 10


def test_every_kernel_test_file_is_read_without_pytest(monkeypatch):
    paths = kernel_test_files()
    for folder in {path.parent for path in paths}:
        monkeypatch.syspath_prepend(folder)
    support = [name for name in sys.modules if name.partition(".")[0] == "support"]
    borrowed = ("pytest", *support, *(path.stem for path in paths))
    before = {name: sys.modules.pop(name) for name in borrowed if name in sys.modules}
    try:
        install()
        tests = {path.stem: calls_of(importlib.import_module(path.stem)) for path in paths}
    finally:
        for name in borrowed:
            sys.modules.pop(name, None)
        sys.modules.update(before)
    on_kernels = {name: [test.name for test in found if runs_kernels(test)] for name, found in tests.items()}
    for name, found in on_kernels.items():
        assert len(set(found)) == len(found), name
        assert found or name == "test_momentum_kernels", name
    assert "test_in_place_equals_the_reference[triton-50x33x100-8-2]" in on_kernels["test_sparse_momentum"]


def test_a_broken_test_costs_itself_alone(tmp_path, monkeypatch):
    """A process that dies is followed by another, which goes on behind the test that it died in."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("conftest.py", "helpers.py"):
        (tmp_path / name).symlink_to(ROOT / "tests" / name)
    path = tmp_path / "test_written.py"
    path.write_text(A_TEST_FILE)
    rows = run_file(path, 1, time.monotonic() + 120)
    assert [(row["test"].partition("::")[2], row["result"]) for row in rows] == [
        ("test_values[triton-1]", "passed"),
        ("test_values[triton-2]", "failed"),
        ("test_dies", "failed"),
        ("test_skipped", "skipped"),
        ("test_follows", "passed"),
    ]
    assert "1 of 2 differ, the first at (0, 1): expected 2, got 1" in rows[1]["detail"]
    assert "test_written.py:12" in rows[1]["detail"]
    assert "ended with code 3" in rows[2]["detail"]


def test_a_kernel_that_no_test_launched_has_not_passed():
    rows = [
        {"test": "a", "result": "failed", "detail": "first of 3", "kernels": ["fold_kernel", "move_kernel"]},
        {"test": "b", "result": "passed", "detail": "", "kernels": ["move_kernel"]},
    ]
    result = summarise(["fold_kernel", "move_kernel", "pack_kernel"], rows)
    assert [row["result"] for row in result["kernels"]] == ["failed", "failed", "not run"]
    assert result["kernels"][0]["first_failure"] == {"test": "a", "detail": "first of 3"}
    assert not result["passed"] and result["failures"][0]["test"] == "a"


def test_the_first_difference_in_words():
    expected, got = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [5, 6]])
    assert first_difference(expected, got) == "2 of 4 differ, the first at (1, 0): expected 3, got 5"
    assert "torch.int64 (2, 2), got torch.float32 (4,)" in first_difference(expected, torch.zeros(4))
