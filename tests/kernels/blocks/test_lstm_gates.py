"""The gates of one LSTM step: torch's own cell, autograd for every gradient, and the reference for Triton."""

import pytest
import torch

from arb_kernels.backend import use_backend
from arb_kernels.blocks.lstm_gates import FORGET_BIAS, lstm_gates, naive_lstm_gates
from support.tensors import assert_same, shapes

SIZES = shapes((1, 1), (3, 5), (7, 33), (2, 512), (5, 257))
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("hidden", "new cell", "grad gates", "grad cell")


def random_step(batch, size, dtype=torch.float32, device="cpu"):
    """gates, cell and the gradients of hidden and new cell; some gates far out, some cells near zero."""
    gates = (3 * torch.randn(batch, 4 * size, device=device)).to(dtype)
    cell = torch.randn(batch, size, device=device) ** 3
    return gates, cell, torch.randn(batch, size, device=device).to(dtype), torch.randn(batch, size, device=device)


def results(function, gates, cell, grad_hidden, grad_new_cell):
    """Both results and both gradients."""
    gates, cell = gates.clone().requires_grad_(), cell.clone().requires_grad_()
    hidden, new_cell = function(gates, cell)
    torch.autograd.backward([hidden, new_cell], [grad_hidden, grad_new_cell])
    return hidden.detach(), new_cell.detach(), gates.grad, cell.grad


def assert_results(expected, got):
    for name, ref, out in zip(NAMES, expected, got, strict=True):
        assert_same(name, ref, out)


@pytest.mark.parametrize("batch, size", SIZES)
def test_lstm_gates_are_those_of_torch(batch, size):
    """torch.nn.LSTMCell orders its gates alike, and its bias can hold ours."""
    reference = torch.nn.LSTMCell(3, size)
    torch.nn.init.zeros_(reference.bias_hh)
    torch.nn.init.zeros_(reference.bias_ih)
    reference.bias_ih.data[size : 2 * size] = FORGET_BIAS
    x, hidden, cell = torch.randn(batch, 3), torch.randn(batch, size), torch.randn(batch, size)
    gates = x @ reference.weight_ih.T + hidden @ reference.weight_hh.T
    expected = reference(x, (hidden, cell))
    for name, ref, out in zip(NAMES[:2], expected, lstm_gates(gates, cell), strict=True):
        assert_same(name, ref.detach(), out.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, size", SIZES)
def test_lstm_gates_forward_and_every_gradient(batch, size, dtype):
    """The explicit backward against autograd of the reference."""
    step = random_step(batch, size, dtype)
    with use_backend("torch"):
        assert_results(results(naive_lstm_gates, *step), results(lstm_gates, *step))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, size", SIZES)
def test_triton_lstm_gates(triton_device, batch, size, dtype):
    step = random_step(batch, size, dtype, triton_device)
    with use_backend("triton"):
        got = results(lstm_gates, *step)
    assert_results(results(naive_lstm_gates, *step), got)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e3])
def test_triton_keeps_small_digits_and_overflows_nowhere(triton_device, scale):
    gates, cell, *gradients = random_step(9, 40, device=triton_device)
    step = (gates * scale, cell * scale, *gradients)
    with use_backend("triton"):
        got = results(lstm_gates, *step)
    assert_results(results(naive_lstm_gates, *step), got)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gate_that_is_not_a_number_shows(triton_device, backend):
    gates, cell, *_ = random_step(2, 6, device=triton_device)
    gates[0, 13] = float("nan")
    with use_backend(backend):
        hidden, new_cell = lstm_gates(gates, cell)
    for tensor in (hidden, new_cell):
        assert tensor.isnan().nonzero().tolist() == [[0, 1]]


def test_gradients_of_any_layout(triton_device):
    """An expanded gradient, as .sum() sends it, is read right."""
    gates, cell, *_ = random_step(3, 5, device=triton_device)
    ones = torch.ones((), device=triton_device).expand(3, 5)
    expected = results(naive_lstm_gates, gates, cell, ones, ones)
    for backend in ("torch", "triton"):
        with use_backend(backend):
            assert_results(expected, results(lstm_gates, gates, cell, ones, ones))


def test_only_gates_and_cells_are_saved():
    gates, cell, *_ = random_step(4, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lstm_gates(gates.requires_grad_(), cell)
    assert sum(tensor.numel() for tensor in saved) == 4 * 8 * (4 + 1 + 1)
