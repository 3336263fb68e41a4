"""The choice of implementation: the fastest by default, what was asked for otherwise, and never a crash."""

import os
import subprocess
import sys

import pytest
import torch

from arb_kernels import backend, native_library
from arb_kernels.backend import backend_for, describe_backend, use_backend, uses_native
from arb_kernels.formats.packing import unpack_levels
from arb_kernels.matmul.int8_matmul import int8_matmul
from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.scripting import ROOT
from support.tensors import BACKENDS, NOT_BUILT, assert_same
from training_arb.optim.integer_optimizer import IntegerOptimizer

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
from training_arb.optim.integer_optimizer import IntegerOptimizer
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
    with pytest.raises(ValueError, match=r"^ARB_BACKEND='native': .*pip install PATH"), use_backend("native"):
        pass


@NOT_BUILT
def test_a_backend_asked_for_fails_on_a_device_it_has_no_kernels_for(monkeypatch):
    elsewhere = torch.zeros(2, 2, dtype=torch.uint8, device="meta")
    assert unpack_levels(elsewhere, 10).is_meta
    for name in ("native", "triton"):
        with pytest.raises(ValueError, match=f"^ARB_BACKEND='{name}': .* meta tensors"), use_backend(name):
            unpack_levels(elsewhere, 10)
        monkeypatch.setenv("ARB_BACKEND", name)
        with pytest.raises(ValueError, match=f"^ARB_BACKEND='{name}': .* meta tensors"):
            unpack_levels(elsewhere, 10)


def test_triton_on_a_cpu_without_the_interpreter_is_refused():
    """In one line, before the first step: the interpreter is chosen when Triton is imported, so in a process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"ARB_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
    smoke = ROOT / "scripts" / "smoke.py"
    command = [sys.executable, smoke, "--preset", "arb-tiny", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "ARB_BACKEND='triton'" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("ARB_ISA", "avx1024")
    codes, scale = torch.ones(1, 4, dtype=torch.int8), torch.ones(1)
    for ask in (lambda: describe_backend(CPU), lambda: int8_matmul(codes, codes, scale)):
        with pytest.raises(ValueError, match=r"^ARB_ISA='avx1024' is not one of best, avx2"):
            ask()


@NOT_BUILT
def test_a_library_of_another_version_is_not_called(monkeypatch):
    monkeypatch.setattr(native_library, "ABI_VERSION", -1)
    library, fault = native_library.find_native_library.__wrapped__()
    assert library is None and fault.endswith("not -1")


def test_training_works_without_the_library():
    done = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch kernels on cpu"
    assert done.stderr.count("pip install PATH") == 1


def test_strided_tensors_take_the_reference():
    assert not uses_native(torch.zeros(4, 4).T)


def train_a_little(rule, group_size):
    """Two accumulated steps, an evaluation and a lookup of few ids: every kernel behind a public name. Under momentum
    embedding, MLP and head have two trits a weight, attention has one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 10, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 12}
    shape |= {"qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 5}
    shape["trits_per_weight"] = {"embedding": 2, "mlp": 2, "head": 2} if rule == "momentum" else 1
    model = ArbForCausalLM(preset_config("arb-tiny", update_rule=rule, group_size=group_size, **shape))
    optimizer = IntegerOptimizer(model, lr=0.3)
    for last in (False, True):
        ids = torch.randint(0, 256, (1, 6))
        optimizer.begin_micro_batch(last=last)
        model(ids, labels=ids).loss.backward()
        if last:
            optimizer.step()
    with torch.no_grad():
        logits = model(torch.randint(0, 256, (1, 4))).logits, model(torch.randint(0, 256, (1, 18))).logits
    return dict(model.state_dict()), logits


@pytest.mark.parametrize("rule, group_size", [("momentum", 0), ("flip", 8), ("correlation", 8), ("flip", 0)])
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_a_model_trains_to_the_same_bits_on_every_backend(name, rule, group_size):
    with use_backend("torch"):
        expected, expected_logits = train_a_little(rule, group_size)
    with use_backend(name):
        state, logits = train_a_little(rule, group_size)
    for tensor in expected:
        assert_same(tensor, expected[tensor], state[tensor])
    for ref, out in zip(expected_logits, logits, strict=True):
        assert torch.equal(ref, out)
