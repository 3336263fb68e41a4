"""`arb NAME` is `python scripts/NAME.py`: names, help, exit codes, completion; also from a wheel's packages alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.scripting import ROOT
from training_arb.cli import arb_command as arb

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").rglob("*.py") if path.stem != "__init__")
# Runs `arb` for each line of arguments on standard input, from the packages in the first argument alone.
FROM_A_FOLDER = """
import json, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path = [sys.argv[1], *(path for path in sys.path if "__editable__" not in path)]
from training_arb.cli import arb_command as arb
assert arb.__file__.startswith(sys.argv[1]), arb.__file__
for line in sys.stdin.read().splitlines():
    sys.argv = ["arb", *json.loads(line)]
    try:
        code = arb.main()
    except SystemExit as stop:
        code = stop.code
    print(f"EXIT {code}", flush=True)
"""


def run_arb(monkeypatch, *arguments):
    """`arb ARGUMENTS` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["arb", *map(str, arguments)])
    try:
        return arb.main()
    except SystemExit as stop:
        return stop.code


def test_help_lists_every_script_and_imports_no_torch():
    code = "import sys; from training_arb.cli import arb_command; arb_command.main(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = [line.split() for line in done.stdout.partition("\ncommands:\n")[2].splitlines()]
    assert [words[0] for words in listed] == [*SCRIPTS, "completion"]
    assert all(len(words) > 3 for words in listed)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_a_command_speaks_of_arb(name, capsys, monkeypatch):
    assert run_arb(monkeypatch, name, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: arb {name} ")
    assert f"\n  arb {name} " in shown or f"\n  arb {name}\n" in shown
    assert "scripts/" not in shown.replace("training_arb/bench/build_ggml_peer.sh", "")


@pytest.mark.parametrize(
    ("command", "name"), [("audit", "audit_state"), ("audit-state", "audit_state"), ("pre", "pretrain")]
)
def test_names_can_be_cut(command, name):
    assert arb.resolve(command, ["audit_state", "pretrain", "report"]) == name


def test_a_whole_name_wins_over_a_longer_one():
    assert arb.resolve("pretrain", ["pretrain", "pretrain_bonsai"]) == "pretrain"


@pytest.mark.parametrize(
    ("command", "said"), [("bench", "bench_kernels, bench_"), ("train", "pretrain"), ("", "pretrain")]
)
def test_unknown_or_ambiguous_names_are_refused_in_one_line(command, said, capsys, monkeypatch):
    assert run_arb(monkeypatch, command) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"error: command={command!r}") and said in errors[0]


def test_exit_codes_are_the_scripts(tmp_path, capsys, monkeypatch):
    ArbForCausalLM(preset_config("arb-tiny")).save_pretrained(tmp_path / "model", training_state=False)
    assert run_arb(monkeypatch, "audit", tmp_path / "model", "--json", tmp_path / "audit.json") == 0
    assert json.loads((tmp_path / "audit.json").read_text())["logical_weights"] == 171_008
    assert run_arb(monkeypatch, "audit", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    assert run_arb(monkeypatch, "generate", "--no_such_option") == 2
    assert run_arb(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("arb ")


def test_completion_offers_names_options_choices_and_files(tmp_path, monkeypatch, capsys):
    bash = shutil.which("bash") or pytest.skip("bash is not installed")
    assert run_arb(monkeypatch, "completion") == 0
    (tmp_path / "arb").write_text(capsys.readouterr().out)

    def offered(*words):
        line = " ".join(word or "''" for word in words)
        code = f"source arb; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_arb; echo ${{COMPREPLY[@]}}"
        return subprocess.run([bash, "-c", code], cwd=tmp_path, capture_output=True, text=True).stdout.split()

    assert offered("arb", "rep") == ["report"]
    assert {"bench_kernels", "bench_train"} <= {*offered("arb", "bench")}
    assert offered("arb", "evaluate", "x", "--max") == ["--max_bytes"]
    assert "--update_rule" in offered("arb", "pretrain", "--up")
    assert offered("arb", "evaluate", "x", "--start", "e") == ["eos"]
    (tmp_path / "file.txt").touch()
    assert offered("arb", "evaluate", "fi") == ["file.txt"]
    assert offered("arb", "pretrain", "--data", "fi") == ["file.txt"]
    assert offered("arb", "completion", "") == ["bash", "zsh"]


def test_completion_for_zsh_is_made_from_the_same_parsers(monkeypatch, capsys):
    assert run_arb(monkeypatch, "completion", "zsh") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#compdef arb\n") and all(f"_arb_{name}" in shown for name in SCRIPTS)
    assert "--update_rule" in shown and "--max_new_tokens" in shown
    assert run_arb(monkeypatch, "completion", "csh") == 2
    assert "shell='csh' is not one of bash, zsh" in capsys.readouterr().err


def test_a_wheels_packages_are_enough(tmp_path):
    """The packages as setup.py builds them, in a folder by themselves: every script, and the files it reads."""
    build = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path), "build_py"]
    done = subprocess.run([*build, "--build-lib", str(tmp_path / "lib")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    entry_points = (tmp_path / "arb.egg-info" / "entry_points.txt").read_text()
    assert "arb = training_arb.cli.arb_command:main" in entry_points
    tiny = ["--preset", "arb-tiny", "--max_steps", "1", "--ctx", "16", "--eval_bytes", "50", "--output_dir", "run"]
    commands = [["pretrain", *tiny], ["export_hub", "run/final", "out"], *([name, "--help"] for name in SCRIPTS)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", FROM_A_FOLDER, str(tmp_path / "lib")],
        input="\n".join(map(json.dumps, commands)),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    exits = [line for line in done.stdout.splitlines() if line.startswith("EXIT ")]
    assert exits == ["EXIT 0"] * len(commands), done.stderr[-3000:]
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
