"""Every Triton kernel reaches machine code for sm_80 and sm_90, and rounds its floats as the reference does."""

import json
import os
import subprocess
import sys

import pytest

from support.scripting import ROOT

CAPABILITIES = ("80", "90")
DOTS = {"correlation_factors_kernel"}  # float sums of products: only their signs are used


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{kernel: {capability: float instructions that round another way}}"""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = ROOT / "tests" / "support" / "compile_kernels.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles(compiled, capability):
    assert len(compiled) > 10
    assert [name for name, found in compiled.items() if capability not in found] == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_floats_round_one_operation_at_a_time(compiled, capability):
    """No contraction, no flushing to zero, no approximate division: the interpreter would not show them."""
    inexact = {name: found[capability] for name, found in compiled.items() if name not in DOTS}
    assert not any(inexact.values()), inexact
    assert all(compiled[name][capability] for name in DOTS), "the check sees no float dot"
