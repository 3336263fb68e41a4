"""correlation: fixed trits, scales that follow the correlation of gradient and trit (seed 001, BigInt).

The smallest state and the weakest learner: about 0.48 bytes per weight with groups of 32. State of a matrix (N, K),
beside its packed trits and exponents E (N, groups) int8, both fixed after initialisation:
    corr_accum    (N, groups) int64: minus the sum of sign(dW) * T over the group and over all votes
    step_counter  () int64: how many votes there were
"""

from __future__ import annotations

import torch

from arb_kernels.backend import uses_triton
from arb_kernels.formats.groups import split_groups
from arb_kernels.formats.packing import unpack_trits

from .correlation_triton import triton_correlation_update


def naive_correlation_update(
    packed: torch.Tensor, corr_accum: torch.Tensor, step_counter: torch.Tensor, dW: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    agreement = dW.sign().to(torch.int8) * unpack_trits(packed, dW.shape[1])
    votes = split_groups(agreement, group_size).sum(-1, dtype=torch.int64)
    return corr_accum - votes, step_counter + 1


def correlation_update(
    packed: torch.Tensor, corr_accum: torch.Tensor, step_counter: torch.Tensor, dW: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count one micro-batch's vote. dW: float32 (N, K). Returns the new corr_accum, step_counter."""
    update = triton_correlation_update if uses_triton(packed, corr_accum, dW) else naive_correlation_update
    return update(packed, corr_accum, step_counter, dW, group_size)
