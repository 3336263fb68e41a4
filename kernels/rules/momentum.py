"""momentum: the default update rule. 1.2 bytes of integer state per weight, 1.4 with two trits.

State of a matrix (N out, K in), besides its packed levels:
    accum      (N, K) uint8, or int16 with momentum_bits 8: residual in the low half, momentum code in the high half,
               both two's complement, so that zero means zero
    accum_exp  (N, ceil(K / 64)) int8: the step of a block of 64 momentum codes, in quarter octaves

*Fold* adds a weight gradient to the momentum; *move* shifts every weight along its latent line (one cell per level: 3
for one trit a weight, 9 for two; 2^momentum_bits residual steps per cell) against the Nesterov direction, normalised by
its row and column RMS. Both round stochastically. A rate is in cells for each trit of a weight, so that one rate serves
one trit and two. Statistics are summed as integers, or in a fixed tree, so the result does not depend on the order
of summation: every backend gives the same bits for the same dW and key.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from arb_kernels.backend import uses_native, uses_triton
from arb_kernels.formats.exponents import (
    QUARTERS,
    fixed_point_scale,
    octave_scale,
    power_of_two,
    power_table,
    quarter_octaves_covering,
)
from arb_kernels.formats.groups import group_lengths, split_groups, spread_groups
from arb_kernels.formats.momentum_format import (
    BLOCK,
    MAX_UPDATE,
    STATISTIC_BITS,
    STATISTIC_OCTAVES,
    UPDATE_LIMIT,
    UPDATE_STEPS,
    MomentumFormat,
    rate_unit,
)
from arb_kernels.formats.packing import largest_level, pack_levels, unpack_levels
from arb_kernels.formats.rule_states import MomentumState, overwrite
from arb_kernels.native_library import native_kernels, pointer
from arb_kernels.random_bits import random_bits_of_rows, uniform_from_high_bits, uniform_from_low_bits

from .momentum_triton import triton_momentum_update


def _sum_in_tree(blocks: torch.Tensor) -> torch.Tensor:
    """(..., 64) -> (..., 1), halves added to halves: one order of summation for every backend."""
    while blocks.shape[-1] > 1:
        half = blocks.shape[-1] // 2
        blocks = blocks[..., :half] + blocks[..., half:]
    return blocks


def _dequantise(codes: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """codes (N, K), exponent int8 (N, blocks) -> float32 (N, K)."""
    return codes * spread_groups(power_of_two(exponent, QUARTERS), BLOCK, codes.shape[1])


def fold_momentum(
    codes: torch.Tensor,
    exponent: torch.Tensor,
    dW: torch.Tensor,
    uniform: torch.Tensor,
    beta: float,
    form: MomentumFormat,
) -> tuple[torch.Tensor, torch.Tensor]:
    """m <- beta * m + (1 - beta) * dW, requantised.

    codes: signed int (N, K); exponent: int8 (N, blocks); dW: float32 (N, K), the step's mean gradient;
    uniform: float32 (N, K) in [0, 1). Returns the new codes, in their dtype, and exponents.
    """
    columns = codes.shape[1]
    momentum = _dequantise(codes, exponent).mul_(beta).add_(dW * (1 - beta))
    square_sum = _sum_in_tree(split_groups(momentum * momentum, BLOCK)).squeeze(-1)
    mean_square = square_sum / group_lengths(columns, BLOCK, dW.device)
    new_exponent = quarter_octaves_covering(mean_square * form.clip)
    inverse = spread_groups(power_of_two(-new_exponent, QUARTERS), BLOCK, columns)
    scaled = momentum.mul_(inverse).add_(uniform).floor_().clamp_(-form.largest_code, form.largest_code)
    return scaled.to(codes.dtype), new_exponent


def _square_root(total: torch.Tensor) -> torch.Tensor:
    """int64 -> float32 with every step correctly rounded. Computed in float64, because some libraries' float32 square
    roots are not correctly rounded."""
    return total.float().double().sqrt().float()


def _sum_squares(direction: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    """Sums of squares of float32 (N, K) along an axis, as int64 in fixed point with these scales: exact in any
    order."""
    steps = (direction * scale).round_().int()
    return (steps * steps).sum(axis, dtype=torch.int64)


def _octaves_above(least: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """log2(scale / least) of powers of two, int32, at least zero: only a row or column of zeros would be below."""
    return (torch.frexp(scale)[1] - torch.frexp(least)[1]).clamp(min=0)


def normalise(direction: torch.Tensor) -> torch.Tensor:
    """float32 (N, K) -> the update, float32 of unit RMS.

    u_ij = d_ij / sqrt(r_i * c_j / mean(r)), r and c the row and column mean squares of d, clipped to +-2. A row's
    squares are summed in fixed point of 15 bits below that row's largest element, a column's below its own: a small row
    moves as far as a large one, and so does a column down to 2^-64 of the largest.
    """
    row_max, column_max = direction.abs().amax(1), direction.abs().amax(0)
    row_fixed, column_fixed, least = (
        fixed_point_scale(largest, STATISTIC_BITS) for largest in (row_max, column_max, row_max.amax())
    )
    row_sum = _sum_squares(direction, row_fixed[:, None], 1)
    column_sum = _sum_squares(direction, column_fixed, 0)
    row_octaves, column_octaves = _octaves_above(least, row_fixed), _octaves_above(least, column_fixed)
    # the RMS is set to one below, so factors common to all elements may take any value here
    root = _square_root((row_sum >> (2 * row_octaves).clamp(max=63)).sum())
    row_scale = torch.where(row_sum > 0, row_fixed / _square_root(row_sum), 0)
    ratio = torch.where(column_sum > 0, root / _square_root(column_sum), 0)
    column_scale = ratio * octave_scale(column_octaves.clamp(max=STATISTIC_OCTAVES))
    unit = (direction * row_scale[:, None]).mul_(column_scale)
    steps = (unit * UPDATE_STEPS).clamp_(-UPDATE_LIMIT, UPDATE_LIMIT).round_().int()
    power = (steps * steps).sum(dtype=torch.int64)
    inverse_rms = torch.where(power > 0, UPDATE_STEPS * unit.numel() ** 0.5 / _square_root(power), 0)
    return unit.mul_(inverse_rms).clamp_(-MAX_UPDATE, MAX_UPDATE)


def move_weights(
    levels: torch.Tensor,
    residual: torch.Tensor,
    update: torch.Tensor,
    uniform: torch.Tensor,
    lr: float,
    cell: int,
    trits: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift latents by -lr cells for each trit of a weight along the update.

    levels: int8 (N, K) of so many trits; residual: signed int (N, K) in [-cell/2, cell/2); update: float32 (N, K) of
    unit RMS, consumed; uniform: float32 (N, K) in [0, 1). Returns the new levels and residuals, in their dtypes.
    """
    end = (largest_level(trits) + 0.5) * cell
    shift = update.mul_(-lr * rate_unit(cell, trits)).add_(uniform).floor_()
    latent = shift.add_(levels * float(cell)).add_(residual).clamp_(-end, end - 1).to(torch.int16)
    new_levels = (latent + cell // 2) >> (cell.bit_length() - 1)
    return new_levels.to(levels.dtype), (latent - new_levels * cell).to(residual.dtype)


def naive_momentum_update(
    state: MomentumState, dW: torch.Tensor, key: int, lr: float, beta: float = 0.9, row_ids: torch.Tensor | None = None
) -> tuple[MomentumState, torch.Tensor]:
    """`momentum_update` as a pure function: returns the new state and the number of changed levels.

    row_ids: int64 (N,): the rows' places in a larger table, which select their random bits. None: 0 to N - 1.
    """
    form, columns = state.form, dW.shape[1]
    residual, codes = form.split(state.accum)
    row_ids = torch.arange(len(dW), dtype=torch.int32, device=dW.device) if row_ids is None else row_ids
    noise = random_bits_of_rows(key, row_ids, columns)
    codes, exponent = fold_momentum(codes, state.accum_exp, dW, uniform_from_low_bits(noise), beta, form)
    update = normalise(_dequantise(codes, exponent).mul_(beta) + dW * (1 - beta))
    levels, trits = unpack_levels(state.T_packed, columns), state.trits
    uniform = uniform_from_high_bits(noise)
    new_levels, residual = move_weights(levels, residual, update, uniform, lr, form.cell, trits)
    packed = pack_levels(new_levels, trits)
    return MomentumState(packed, form.join(residual, codes), exponent), (new_levels != levels).sum()


def momentum_update(state: MomentumState, dW: torch.Tensor, key: int, lr: float, beta: float = 0.9) -> torch.Tensor:
    """Fold and move, in place.

    dW: float32 (N, K), the step's mean gradient; lr: cells per step and trit; beta: decay of the momentum.
    Returns the number of changed levels, int64 ().
    """
    trits = state.trits
    if state.accum.dtype == torch.uint8 and uses_native(*state, dW, trits=trits):
        flips = native_kernels().arb_momentum_update(
            *map(pointer, (*state, dW)),
            *dW.shape,
            trits,
            key,
            pointer(power_table(QUARTERS, dW.device)),
            beta,
            1 - beta,
            MAX_UPDATE,
            -lr * rate_unit(state.form.cell, trits),
        )
        increment_version(tuple(state))
        return torch.tensor(flips)
    if uses_triton(*state, dW, trits=trits):
        return triton_momentum_update(state, dW, key, lr, beta)
    new, flips = naive_momentum_update(state, dW, key, lr, beta)
    overwrite(state, new)
    return flips
