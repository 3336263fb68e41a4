"""Every Triton kernel reaches machine code for sm_80 and sm_90, and rounds its floats as the reference does."""

import json
import os
import subprocess
import sys

import pytest

from modeling_arb.checkpoints.remote_code import export_code
from support.scripting import ROOT

CAPABILITIES = ("80", "90")
DOTS = {"correlation_factors_kernel"}  # float sums of products: only their signs are used


def compile_all(folder, *arguments):
    """{kernel: {capability: float instructions that round another way}}"""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    command = [sys.executable, ROOT / "tests" / "support" / "compile_kernels.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compile_all(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The same of the kernels in a saved model's folder, from which nothing else can be imported."""
    folder = tmp_path_factory.mktemp("exported")
    export_code(folder)
    return compile_all(folder, folder / "kernels_arb.py")


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


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_of_a_saved_model_compile_alike(compiled, exported, capability):
    assert len(exported) > 5 and exported.keys() < compiled.keys()
    for name, found in exported.items():
        assert found[capability] == compiled[name][capability], name
