"""The gates of one LSTM step (lstm_gates.py) on Triton: one pass forward, one backward, no saved activations.

Exponentials use the GPU's instruction, so results are compared with the reference by error ratio, not bit by bit.
"""

from __future__ import annotations

import torch

from arb_kernels.triton_support import cast_float, ceil_div, jit, launch, tl

_BLOCK = 512


@jit
def _tanh(x):
    """The exponential never overflows: its argument is not positive. Near zero the quotient would lose the digits of x,
    and two terms of the series are exact to float32."""
    decay = tl.exp(-2.0 * tl.abs(x))
    magnitude = tl.div_rn(1.0 - decay, 1.0 + decay)
    return tl.where(tl.abs(x) < 0.02, x - x * x * x * 0.33333333, tl.where(x < 0, -magnitude, magnitude))


@jit
def _sigmoid(x):
    """In the form of sigmoid.py."""
    return 0.5 + 0.5 * _tanh(0.5 * x)


@jit
def _places(elements, H, BLOCK: tl.constexpr):
    """This program's elements of a (B, H) tensor: mask, offsets, and the offset of their row of gates."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return element < elements, element, element // H * 4 * H + element % H


@jit
def _load_activations(gates_ptr, place, H, mask, FORGET_BIAS: tl.constexpr):
    """The four gates after their non-linearities, float32 [BLOCK] each."""
    input_gate = tl.load(gates_ptr + place, mask=mask, other=0.0).to(tl.float32)
    forget_gate = tl.load(gates_ptr + place + H, mask=mask, other=0.0).to(tl.float32)
    candidate = tl.load(gates_ptr + place + 2 * H, mask=mask, other=0.0).to(tl.float32)
    output_gate = tl.load(gates_ptr + place + 3 * H, mask=mask, other=0.0).to(tl.float32)
    return _sigmoid(input_gate), _sigmoid(forget_gate + FORGET_BIAS), _tanh(candidate), _sigmoid(output_gate)


@jit
def _store(pointers, x, mask):
    """Store float32, rounded to the dtype of the pointers."""
    tl.store(pointers, cast_float(x, pointers.dtype.element_ty), mask=mask)


@jit
def lstm_gates_forward_kernel(
    gates_ptr, cell_ptr, hidden_ptr, new_cell_ptr, elements, H, FORGET_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    mask, element, place = _places(elements, H, BLOCK)
    input_gate, forget_gate, candidate, output_gate = _load_activations(gates_ptr, place, H, mask, FORGET_BIAS)
    b_cell = tl.load(cell_ptr + element, mask=mask, other=0.0)
    new_cell = forget_gate * b_cell + input_gate * candidate
    tl.store(new_cell_ptr + element, new_cell, mask=mask)
    _store(hidden_ptr + element, output_gate * _tanh(new_cell), mask)


@jit
def lstm_gates_backward_kernel(
    gates_ptr,
    cell_ptr,
    new_cell_ptr,
    grad_hidden_ptr,
    grad_new_cell_ptr,
    grad_gates_ptr,
    grad_cell_ptr,
    elements,
    H,
    FORGET_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    mask, element, place = _places(elements, H, BLOCK)
    input_gate, forget_gate, candidate, output_gate = _load_activations(gates_ptr, place, H, mask, FORGET_BIAS)
    b_cell = tl.load(cell_ptr + element, mask=mask, other=0.0)
    squashed = _tanh(tl.load(new_cell_ptr + element, mask=mask, other=0.0))
    b_grad_hidden = tl.load(grad_hidden_ptr + element, mask=mask, other=0.0).to(tl.float32)
    grad_cell = tl.load(grad_new_cell_ptr + element, mask=mask, other=0.0)
    grad_cell += b_grad_hidden * output_gate * (1.0 - squashed * squashed)
    tl.store(grad_cell_ptr + element, grad_cell * forget_gate, mask=mask)
    p_grad = grad_gates_ptr + place
    _store(p_grad, grad_cell * candidate * input_gate * (1.0 - input_gate), mask)
    _store(p_grad + H, grad_cell * b_cell * forget_gate * (1.0 - forget_gate), mask)
    _store(p_grad + 2 * H, grad_cell * input_gate * (1.0 - candidate * candidate), mask)
    _store(p_grad + 3 * H, b_grad_hidden * squashed * output_gate * (1.0 - output_gate), mask)


def _launch(kernel, forget_bias: float, gates: torch.Tensor, cell: torch.Tensor, *others: torch.Tensor) -> None:
    elements, H = cell.numel(), cell.shape[1]
    grid = (ceil_div(elements, _BLOCK),)
    launch(kernel, grid, gates, cell, *others, elements, H, FORGET_BIAS=forget_bias, BLOCK=_BLOCK)


def triton_lstm_gates(gates: torch.Tensor, cell: torch.Tensor, forget_bias: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`lstm_gates`: gates (B, 4H) float32 or half, cell float32 (B, H) -> hidden like gates, new cell like cell."""
    gates, cell = gates.contiguous(), cell.contiguous()
    hidden, new_cell = torch.empty_like(cell, dtype=gates.dtype), torch.empty_like(cell)
    _launch(lstm_gates_forward_kernel, forget_bias, gates, cell, hidden, new_cell)
    return hidden, new_cell


def triton_lstm_gates_backward(
    gates: torch.Tensor,
    cell: torch.Tensor,
    new_cell: torch.Tensor,
    grad_hidden: torch.Tensor,
    grad_new_cell: torch.Tensor,
    forget_bias: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of `triton_lstm_gates`, and the gradients of its outputs -> gradients of gates and cell."""
    inputs = [tensor.contiguous() for tensor in (gates, cell, new_cell, grad_hidden, grad_new_cell)]
    grad_gates, grad_cell = torch.empty_like(inputs[0]), torch.empty_like(inputs[1])
    _launch(lstm_gates_backward_kernel, forget_bias, *inputs, grad_gates, grad_cell)
    return grad_gates, grad_cell
