"""flip: sign votes move trits, as in TrueTernary. About 1.26 bytes of state per weight with groups of 32.

State of a matrix (N, K), besides its packed trits and group exponents E (N, groups) int8:
    T_accum  (N, K) int8: minus the sum of sign(dW) since the trit last moved
    E_accum  (N, groups) int8: the same for the exponent, on the sign of the group's vote sum(sign(dW) * T)
"""

from __future__ import annotations

import torch

from arb_kernels.backend import uses_triton
from arb_kernels.formats.groups import split_groups
from arb_kernels.formats.packing import pack_levels, unpack_levels
from arb_kernels.formats.rule_states import FlipState, overwrite

from .flip_triton import triton_flip_update


def _vote(accum: torch.Tensor, votes: torch.Tensor) -> torch.Tensor:
    return (accum.to(torch.int16) - votes).clamp_(-127, 127).to(torch.int8)


def naive_flip_update(
    state: FlipState, dW: torch.Tensor, group_size: int, threshold: int = 32, scale_votes: bool = True
) -> tuple[FlipState, torch.Tensor]:
    """`flip_update` as a pure function: returns the new state and the number of changed trits."""
    trits, signs = unpack_levels(state.T_packed, dW.shape[1]), dW.sign().to(torch.int8)
    T_accum, E_accum = _vote(state.T_accum, signs), state.E_accum
    if scale_votes:
        agreement = split_groups(signs * trits, group_size).sum(-1, dtype=torch.int32)
        E_accum = _vote(E_accum, agreement.sign())
    moved = T_accum.abs() >= threshold
    new_trits = torch.where(moved, (trits + T_accum.sign()).clamp_(-1, 1), trits)
    scaled = E_accum.abs() >= threshold
    E = torch.where(scaled, (state.E.to(torch.int16) + E_accum.sign()).clamp_(-128, 127), state.E).to(torch.int8)
    new = FlipState(pack_levels(new_trits), E, T_accum.masked_fill(moved, 0), E_accum.masked_fill(scaled, 0))
    return new, (new_trits != trits).sum()


def flip_update(
    state: FlipState, dW: torch.Tensor, group_size: int, threshold: int = 32, scale_votes: bool = True
) -> torch.Tensor:
    """Count the votes, then move what has reached the threshold by one step and set its accumulator to zero; in place.

    dW: float32 (N, K); threshold in votes, 1..127; scale_votes: whether this step votes on E. Returns the number of
    changed trits, int64 ().
    """
    if uses_triton(*state, dW):
        return triton_flip_update(state, dW, group_size, threshold, scale_votes)
    new, flips = naive_flip_update(state, dW, group_size, threshold, scale_votes)
    overwrite(state, new)
    return flips
