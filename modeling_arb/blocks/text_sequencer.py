"""Text sequencer: a ternary LSTM over the embedded bytes, added to them; the cache keeps its state between calls."""

from __future__ import annotations

import torch
from torch import nn

from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_linear import TernaryLinear

from .ternary_lstm_cell import LSTMState, TernaryLSTMCell


class TextSequencer(nn.Module):
    """(B, T, D) -> (B, T, D), added to the residual stream by the caller. A position depends on itself and earlier
    ones."""

    def __init__(self, config: ArbConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        hidden_size = config.block("text_sequencer")["hidden_size"] or config.hidden_size
        self.cell = TernaryLSTMCell(config.hidden_size, hidden_size, config)
        self.out_proj = TernaryLinear(hidden_size, config.hidden_size, config)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        state: LSTMState | None = None,
        states: list[LSTMState] | None = None,
    ) -> tuple[torch.Tensor, LSTMState]:
        """x (B, T, D); mask bool (B, T), False under padding, where the state stays as it was; state hidden (B, H) and
        cell float32 (B, H), None before the first byte -> the addition (B, T, D), the state after. states: a list that
        receives the state after each position, for decoding that may go back."""
        projected = self.cell.project(x)
        state = self.cell.initial_state(projected) if state is None else state
        outputs = []
        for t, step in enumerate(projected.unbind(1)):
            new_state = self.cell.step(step, state)
            state = new_state if mask is None else _where(mask[:, t, None], new_state, state)
            outputs.append(state[0])
            if states is not None:
                states.append(state)
        return self.out_proj(rms_norm(torch.stack(outputs, dim=1), self.eps)), state


def _where(real: torch.Tensor, new_state: LSTMState, state: LSTMState) -> LSTMState:
    """The new state in rows where `real`, bool (B, 1), is True, the old state in the others."""
    return torch.where(real, new_state[0], state[0]), torch.where(real, new_state[1], state[1])
