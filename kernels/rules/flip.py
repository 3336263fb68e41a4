"""flip: sign votes move trits (seed 000, TrueTernary). About 1.26 bytes of state per weight with groups of 32.

State of a matrix (N, K), beside its packed trits and group exponents E (N, groups) int8:
    T_accum  (N, K) int8: minus the sum of sign(dW) since the trit last moved
    E_accum  (N, groups) int8: the same for the exponent, on the sign of the group's vote sum(sign(dW) * T)
"""

from __future__ import annotations

import torch

from arb_kernels.backend import uses_triton
from arb_kernels.formats.groups import split_groups
from arb_kernels.formats.packing import pack_trits, unpack_trits

from .flip_triton import triton_flip_update


def _vote(accum: torch.Tensor, votes: torch.Tensor) -> torch.Tensor:
    return (accum.to(torch.int16) - votes).clamp_(-127, 127).to(torch.int8)


def _count_votes(
    packed: torch.Tensor,
    T_accum: torch.Tensor,
    E_accum: torch.Tensor,
    dW: torch.Tensor,
    group_size: int,
    scale_votes: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    signs = dW.sign().to(torch.int8)
    T_accum = _vote(T_accum, signs)
    if scale_votes:
        agreement = signs * unpack_trits(packed, dW.shape[1])
        E_accum = _vote(E_accum, split_groups(agreement, group_size).sum(-1, dtype=torch.int32).sign())
    return T_accum, E_accum


def naive_flip_update(
    packed: torch.Tensor,
    E: torch.Tensor,
    T_accum: torch.Tensor,
    E_accum: torch.Tensor,
    dW: torch.Tensor,
    group_size: int,
    threshold: int = 32,
    scale_votes: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    T_accum, E_accum = _count_votes(packed, T_accum, E_accum, dW, group_size, scale_votes)
    trits = unpack_trits(packed, dW.shape[1])
    moved = T_accum.abs() >= threshold
    new_trits = torch.where(moved, (trits + T_accum.sign()).clamp_(-1, 1), trits)
    scaled = E_accum.abs() >= threshold
    new_E = torch.where(scaled, (E.to(torch.int16) + E_accum.sign()).clamp_(-128, 127), E).to(torch.int8)
    return (
        pack_trits(new_trits),
        new_E,
        T_accum.masked_fill(moved, 0),
        E_accum.masked_fill(scaled, 0),
        (new_trits != trits).sum(),
    )


def flip_update(
    packed: torch.Tensor,
    E: torch.Tensor,
    T_accum: torch.Tensor,
    E_accum: torch.Tensor,
    dW: torch.Tensor,
    group_size: int,
    threshold: int = 32,
    scale_votes: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count the votes, then move what has reached the threshold by one step and restart its accumulator at zero.

    packed: uint8 (N, ceil(K/5)); dW: float32 (N, K); threshold in votes, 1..127; scale_votes: whether this step votes
    on E. Returns the new packed, E, T_accum, E_accum and the number of changed trits, an int64 scalar.
    """
    update = triton_flip_update if uses_triton(packed, E, T_accum, E_accum, dW) else naive_flip_update
    return update(packed, E, T_accum, E_accum, dW, group_size, threshold, scale_votes)
