"""Carries a model's weights over to a model with another number of trits a weight.

One trit to two: level t becomes 2 t and S is halved, so every weight keeps its value exactly. Where S is too small to
be halved, level t and S stay. Two trits to one: levels below a threshold become zero, the others their sign, and S is
multiplied by the mean magnitude of the others, in eighths of an octave. Each group takes the threshold with the least
squared error.
"""

from __future__ import annotations

import torch

from arb_kernels.formats.exponents import EIGHTHS, power_of_two
from arb_kernels.formats.groups import split_groups, spread_groups
from arb_kernels.formats.momentum_format import MomentumFormat
from arb_kernels.formats.packing import largest_level, pack_levels, unpack_levels
from arb_kernels.formats.scaled_rows import effective_weight
from modeling_arb import ArbForCausalLM
from modeling_arb.layers.ternary_matrix import TernaryMatrix

LEAST_EXPONENT, LARGEST_EXPONENT = -128, 127
CHUNK = 1 << 22  # weights converted at a time


def halve_scale(levels: torch.Tensor, exponent: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels of one trit, int8 (N, K), and E, int8 (N, groups) -> those of two trits with the same weights."""
    halved = exponent >= LEAST_EXPONENT + EIGHTHS
    factor = spread_groups(1 + halved.to(torch.int8), group_size, levels.shape[1])
    return levels * factor, torch.where(halved, exponent - EIGHTHS, exponent)


def round_to_one_trit(
    levels: torch.Tensor, exponent: torch.Tensor, group_size: int, trits: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels of `trits` trits, int8 (N, K), and E, int8 (N, groups) -> those of one trit with the nearest weights."""
    magnitude = torch.arange(1, largest_level(trits) + 1, device=levels.device)  # also the thresholds
    sizes = split_groups(levels.abs(), group_size)
    counts = torch.stack([(sizes == each).sum(-1) for each in magnitude], dim=-1).double()  # (N, groups, thresholds)
    kept, total = (part.flip(-1).cumsum(-1).flip(-1) for part in (counts, counts * magnitude))
    steps = (total / kept).nan_to_num(1.0).log2().mul(EIGHTHS).round()
    steps = torch.minimum(steps, LARGEST_EXPONENT - exponent.double().unsqueeze(-1))
    factor = torch.exp2(steps / EIGHTHS)
    error = factor.square() * kept - 2 * factor * total  # and the sum of squares, whatever the threshold
    best = error.argmin(-1, keepdim=True)
    threshold = spread_groups(magnitude.to(torch.int8)[best.squeeze(-1)], group_size, levels.shape[1])
    chosen = steps.gather(-1, best).squeeze(-1).to(torch.int8)
    return levels.sign() * (levels.abs() >= threshold), exponent + chosen


def carry_over(source: ArbForCausalLM, model: ArbForCausalLM) -> dict[str, object]:
    """Give `model` the state of `source`, a model of the same shape; what `source` does not have becomes zero.

    Returns the number of converted matrices and, relative to the weights' RMS, the RMS error over all of them and the
    largest of one, by its name; empty when none was converted.
    """
    targets = model.ternary_matrices()
    converted = {name: m for name, m in source.ternary_matrices().items() if m.trits != targets[name].trits}
    for tensor in model.state_dict().values():
        tensor.zero_()
    unchanged = {name: t for name, t in source.state_dict().items() if name.rpartition(".")[0] not in converted}
    model.load_state_dict(unchanged, strict=False)
    squares = {name: convert(matrix, targets[name]) for name, matrix in converted.items()}
    if not squares:
        return {}
    errors = {name: _relative(error, power) for name, (error, power) in squares.items()}
    worst = max(errors, key=lambda name: errors[name])
    return {
        "converted_matrices": len(errors),
        "relative_rms_error": _relative(*(sum(column) for column in zip(*squares.values(), strict=True))),
        "largest_error": {"matrix": worst, "relative_rms_error": errors[worst]},
    }


def _relative(error: float, power: float) -> float:
    return (error / power) ** 0.5 if power else 0.0


@torch.no_grad()
def convert(source: TernaryMatrix, target: TernaryMatrix) -> tuple[float, float]:
    """Write the weights of `source` into `target`, whose state is zero. Returns the sums of squares of the weights'
    errors and of the weights.

    Momentum and residuals are copied where `source` has them. When weights are rounded, the residual becomes the place
    of the weight in its new cell, limited to the cell.
    """
    finer, size, columns = target.trits > source.trits, source.group_size, source.columns
    form, error, power = MomentumFormat(target.momentum_bits), 0.0, 0.0
    step = max(1, CHUNK // columns)
    for rows in (slice(first, first + step) for first in range(0, source.rows, step)):
        levels = unpack_levels(source.T_packed[rows], columns)
        if finer:
            levels, target.E[rows] = halve_scale(levels, source.E[rows], size)
        else:
            levels, target.E[rows] = round_to_one_trit(levels, source.E[rows], size, source.trits)
        target.T_packed[rows] = pack_levels(levels, target.trits)
        old_scale, scale = (power_of_two(matrix.E[rows], EIGHTHS) for matrix in (source, target))
        old = effective_weight(source.T_packed[rows], columns, old_scale, size)
        off = old - effective_weight(target.T_packed[rows], columns, scale, size)
        error += off.double().square().sum().item()
        power += old.double().square().sum().item()
        if hasattr(target, "accum"):
            residual, codes = form.split((source if hasattr(source, "accum") else target).accum[rows])
            if not finer:
                place = residual * spread_groups(old_scale / scale, size, columns)
                place += off / spread_groups(scale, size, columns) * form.cell
                residual = place.round().clamp(-form.cell // 2, form.cell // 2 - 1).to(residual.dtype)
            target.accum[rows] = form.join(residual, codes)
    if hasattr(source, "accum_exp"):
        target.accum_exp.copy_(source.accum_exp)
    return error, power
