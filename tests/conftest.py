"""What every test starts from: a fixed seed, and fresh buffers that hold poison instead of convenient zeros."""

import training_arb.common.thread_waiting  # noqa: F401

import logging
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; read when torch is imported

import pytest
import torch

TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels' modules are imported

POISON = {
    torch.uint8: 0xAA,
    torch.int8: 0x55,
    torch.int16: 0x5555,
    torch.int32: 0x55555555,
    torch.int64: 0x5555555555555555,
}


def _poisoned(allocate):
    def allocate_and_fill(*args, **kwargs):
        fresh = allocate(*args, **kwargs)
        with torch.no_grad():
            if fresh.is_floating_point():
                fresh.fill_(float("nan"))
            elif fresh.dtype in POISON:
                fresh.fill_(POISON[fresh.dtype])
        return fresh

    return allocate_and_fill


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def transformers_warns():
    """A script that ran inside an earlier test or fixture has silenced transformers for the process."""
    logging.getLogger("transformers").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Code that reads a buffer before writing it fails loudly instead of by luck."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def triton_device():
    """Where the Triton kernels run: a GPU, or the CPU through Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    return TRITON_DEVICE


@pytest.fixture(autouse=True)
def tensors_where_the_backend_runs(request):
    """A test of the triton backend makes its tensors on the GPU where there is one."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if "triton" not in parameters.values() or TRITON_DEVICE.type == "cpu":
        yield
        return
    with TRITON_DEVICE:
        yield
