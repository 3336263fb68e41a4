"""correlation: fixed trits, scales that follow the correlation of gradient and trit.

The rule with the smallest state and the highest loss: about 0.48 bytes per weight with groups of 32. State of a matrix
(N, K), besides its packed trits and exponents E (N, groups) int8, both fixed after initialisation:
    corr_accum    (N, groups) int64: minus the sum of sign(dW) * T over the group and over all votes
    step_counter  () int64: the number of votes
"""

from __future__ import annotations

import torch

from arb_kernels.backend import uses_triton
from arb_kernels.formats.groups import split_groups
from arb_kernels.formats.packing import unpack_levels
from arb_kernels.formats.rule_states import CorrelationState, overwrite

from .correlation_triton import triton_correlation_update


def naive_correlation_update(state: CorrelationState, dW: torch.Tensor, group_size: int) -> CorrelationState:
    """`correlation_update` as a pure function: returns the new state."""
    agreement = dW.sign().to(torch.int8) * unpack_levels(state.T_packed, dW.shape[1])
    votes = split_groups(agreement, group_size).sum(-1, dtype=torch.int64)
    return CorrelationState(state.T_packed, state.corr_accum - votes, state.step_counter + 1)


def correlation_update(state: CorrelationState, dW: torch.Tensor, group_size: int) -> None:
    """Count one vote of every weight, in place. dW: float32 (N, K), the step's mean gradient."""
    if uses_triton(*state, dW):
        triton_correlation_update(state, dW, group_size)
    else:
        overwrite(state[1:], naive_correlation_update(state, dW, group_size)[1:])
