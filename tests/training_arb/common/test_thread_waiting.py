"""Threads that wait by sleeping soon: what the OpenMP runtime was told, unless the user says otherwise."""

import ast
import os
import subprocess
import sys

import pytest

from support.scripting import ROOT

OF_OTHERS = ("__init__", "arb", "check_gpu")  # import nothing but the standard library; what they start says it itself
SCRIPTS = sorted(
    path for room in ("scripts", "docs") for path in (ROOT / room).rglob("*.py") if path.stem not in OF_OTHERS
)


def spin_count(*command, **environment):
    """What libgomp says it will do, in a process that loads torch."""
    told = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    told |= {"OMP_DISPLAY_ENV": "verbose"} | environment
    shown = subprocess.run([sys.executable, *command], env=told, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = {line.strip() for line in shown.stderr.splitlines() if "GOMP_SPINCOUNT" in line}
    return line.partition("'")[2].rstrip("'")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_say_so_before_torch_is_imported(path):
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports[:2]] == [
        "from __future__ import annotations",
        "import training_arb.common.thread_waiting",
    ]


def test_it_imports_nothing_that_is_slow():
    code = "import training_arb.common.thread_waiting, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


def test_the_runtime_of_a_script_heard_it():
    assert spin_count("scripts/report.py", "--help") == "1000"


def test_what_the_user_set_stands():
    code = "import training_arb.common.thread_waiting, torch"
    assert spin_count("-c", code, GOMP_SPINCOUNT="77") == "77"
    assert spin_count("-c", code, OMP_WAIT_POLICY="active") != "1000"
