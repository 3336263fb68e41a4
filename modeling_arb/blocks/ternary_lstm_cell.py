"""TernaryLSTMCell: an LSTM step whose two matrices are ternary; its gates are kernels/blocks/lstm_gates.py."""

from __future__ import annotations

import torch
from torch import nn

from arb_kernels.blocks.lstm_gates import lstm_gates
from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_linear import TernaryLinear

# Each matrix gives variance 1 for its normalised input at first; so does then the sum of the two.
GATE_SCALE = 0.5**0.5

LSTMState = tuple[torch.Tensor, torch.Tensor]


class TernaryLSTMCell(nn.Module):
    """One step of H units from D inputs. The caller keeps the state: hidden (B, H) in the activations' dtype and cell
    float32 (B, H)."""

    def __init__(self, input_size: int, hidden_size: int, config: ArbConfig):
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = config.rms_norm_eps
        self.input_proj = TernaryLinear(input_size, 4 * hidden_size, config)
        self.recurrent_proj = TernaryLinear(hidden_size, 4 * hidden_size, config)
        self.recurrent_proj.shared = self.recurrent_proj.keeps_levels = True  # used once a byte

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, 4H): the part of the gates that depends on the input, for all steps."""
        return self.input_proj(rms_norm(x, self.eps)) * GATE_SCALE

    def initial_state(self, projected: torch.Tensor) -> LSTMState:
        """The zero state for an output of `project`."""
        hidden = projected.new_zeros(len(projected), self.hidden_size)
        return hidden, hidden.float()

    def step(self, projected: torch.Tensor, state: LSTMState) -> LSTMState:
        """projected (B, 4H), one step of `project`'s output -> the next state."""
        hidden, cell = state
        recurrent = self.recurrent_proj(rms_norm(hidden, self.eps))
        return lstm_gates(torch.add(projected, recurrent, alpha=GATE_SCALE), cell)
