"""The gate arithmetic of one LSTM step (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).

    new cell = sigmoid(forget + 1) * cell + sigmoid(input) * tanh(candidate)
    hidden   = sigmoid(output) * tanh(new cell)

The caller computes the matmuls that give the gates. Everything is computed in float32, and the cell stays float32
whatever the gates' dtype: it is a sum over the whole text. Backward recomputes the non-linearities from the gates.
"""

from __future__ import annotations

import torch

from arb_kernels.backend import uses_triton

from .lstm_gates_triton import triton_lstm_gates, triton_lstm_gates_backward
from .sigmoid import sigmoid

FORGET_BIAS = 1.0  # fixed: a new cell keeps three quarters of its state (Jozefowicz et al. 2015) without a learned bias


def _activations(gates: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, 4H) -> input, forget, candidate and output gate after their non-linearities, float32 (B, H) each."""
    input_gate, forget_gate, candidate, output_gate = gates.float().chunk(4, dim=1)
    return sigmoid(input_gate), sigmoid(forget_gate + FORGET_BIAS), candidate.tanh(), sigmoid(output_gate)


def naive_lstm_gates(gates: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    input_gate, forget_gate, candidate, output_gate = _activations(gates)
    new_cell = forget_gate * cell + input_gate * candidate
    return (output_gate * new_cell.tanh()).to(gates.dtype), new_cell


def naive_lstm_gates_backward(
    gates: torch.Tensor,
    cell: torch.Tensor,
    new_cell: torch.Tensor,
    grad_hidden: torch.Tensor,
    grad_new_cell: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    input_gate, forget_gate, candidate, output_gate = _activations(gates)
    squashed, grad_hidden = new_cell.tanh(), grad_hidden.float()
    grad_cell = grad_new_cell + grad_hidden * output_gate * (1 - squashed.square())
    grad_gates = (
        grad_cell * candidate * input_gate * (1 - input_gate),
        grad_cell * cell * forget_gate * (1 - forget_gate),
        grad_cell * input_gate * (1 - candidate.square()),
        grad_hidden * squashed * output_gate * (1 - output_gate),
    )
    return torch.cat(grad_gates, dim=1).to(gates.dtype), grad_cell * forget_gate


class LstmGatesFunction(torch.autograd.Function):
    """Saves the gates and both cells; intermediate values are recomputed."""

    @staticmethod
    def forward(ctx, gates, cell):
        on_triton = gates.numel() and uses_triton(gates, cell)
        hidden, new_cell = triton_lstm_gates(gates, cell, FORGET_BIAS) if on_triton else naive_lstm_gates(gates, cell)
        ctx.save_for_backward(gates, cell, new_cell)
        return hidden, new_cell

    @staticmethod
    def backward(ctx, grad_hidden, grad_new_cell):
        gates, cell, new_cell = ctx.saved_tensors
        if grad_hidden.numel() and uses_triton(gates, cell, new_cell):
            return triton_lstm_gates_backward(gates, cell, new_cell, grad_hidden, grad_new_cell, FORGET_BIAS)
        return naive_lstm_gates_backward(gates, cell, new_cell, grad_hidden, grad_new_cell)


def lstm_gates(gates: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gates (B, 4H), float32 or half, in the order input, forget, candidate, output; cell float32 (B, H) -> hidden
    (B, H) in the gates' dtype and the new cell float32 (B, H), both differentiable."""
    return LstmGatesFunction.apply(gates, cell)
