"""The choice of implementation: the fastest by default, what was asked for otherwise, and never a crash."""

import subprocess
import sys

import pytest
import torch

from arb_kernels import backend, native_library
from arb_kernels.backend import backend_for, describe_backend, use_backend, uses_native

CPU = torch.device("cpu")
HIDDEN = """
import ctypes
load = ctypes.CDLL
def refuse(name, *args, **kwargs):
    if "arb_native" in str(name):
        raise OSError("cannot load")
    return load(name, *args, **kwargs)
ctypes.CDLL = refuse
import torch
from arb_kernels.backend import describe_backend
from modeling_arb import ArbForCausalLM
from configuration_arb import preset_config
from training_arb.integer_optimizer import IntegerOptimizer
print(describe_backend(torch.device("cpu")))
torch.manual_seed(0)
model = ArbForCausalLM(preset_config("arb-tiny"))
optimizer = IntegerOptimizer(model)
ids = torch.randint(0, 256, (2, 16))
model(ids, labels=ids).loss.backward()
optimizer.step()
"""


def test_an_override_is_temporary():
    before = backend_for(CPU)
    with use_backend("torch"):
        assert backend_for(CPU) == "torch" and not uses_native(torch.zeros(2))
    assert backend_for(CPU) == before


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("ARB_BACKEND", "torch")
    assert backend_for(CPU) == "torch"
    assert describe_backend(CPU) == "torch kernels on cpu"
    monkeypatch.setenv("ARB_BACKEND", "tpu")
    with pytest.raises(ValueError, match="ARB_BACKEND='tpu'"):
        backend_for(CPU)


def test_asking_for_what_was_not_built(monkeypatch):
    monkeypatch.setattr(backend, "native_library", lambda: None)
    assert backend_for(CPU) == "torch"
    with pytest.raises(ValueError, match="not built"), use_backend("native"):
        pass


def test_a_library_of_another_version_is_not_called(monkeypatch):
    monkeypatch.setattr(native_library, "ABI_VERSION", -1)
    assert native_library.native_library.__wrapped__() is None


def test_training_works_without_the_library():
    done = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch kernels on cpu"


def test_strided_tensors_take_the_reference():
    assert not uses_native(torch.zeros(4, 4).T)
