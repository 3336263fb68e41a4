"""The momentum rule for the touched rows of a table: reference and Triton kernel.

The dense rule is no sum over rows: its norms span the matrix, and it decays and moves the momentum of rows that got
no gradient. So this is a rule of its own: the dense rule applied to the submatrix of the touched rows, as if the table
had no others, with the random bits of the rows' true places. Rows that are not touched keep trits, residuals and
momentum. With every row touched it is the dense rule.

Micro-batches are summed first, by row, and applied once: decay "in the first micro-batch" means nothing for a row
that only the second one touches.
"""

from __future__ import annotations

import torch

from arb_kernels.backend import uses_triton
from arb_kernels.formats.exponents import QUARTERS, power_of_two
from arb_kernels.formats.groups import spread_groups
from arb_kernels.formats.momentum_format import BLOCK, MomentumFormat
from arb_kernels.formats.packing import pack_trits, unpack_trits
from arb_kernels.random_bits import random_bits_of_rows, uniform_from_high_bits, uniform_from_low_bits

from .momentum import fold_momentum, move_weights, normalise
from .momentum_triton import triton_momentum_update


def naive_sparse_momentum_update(
    packed: torch.Tensor,
    accum: torch.Tensor,
    accum_exp: torch.Tensor,
    row_ids: torch.Tensor,
    dW: torch.Tensor,
    key: int,
    lr: float,
    beta: float = 0.9,
    bits: int = 4,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sparse_momentum_update` as a pure function: returns the touched rows of the new packed, accum and
    accum_exp, in the order of row_ids, and the changed trits' number."""
    form = MomentumFormat(bits)
    noise = random_bits_of_rows(key, row_ids, dW.shape[1])
    residual, codes = form.split(accum[row_ids])
    codes, exponent = fold_momentum(codes, accum_exp[row_ids], dW, uniform_from_low_bits(noise), beta, form.levels)
    step = spread_groups(power_of_two(exponent, QUARTERS), BLOCK, dW.shape[1])
    update = normalise((codes * step).mul_(beta) + dW * (1 - beta))
    trits = unpack_trits(packed[row_ids], dW.shape[1])
    new_trits, residual = move_weights(trits, residual, update, uniform_from_high_bits(noise), lr, form.cell)
    return pack_trits(new_trits), form.join(residual, codes), exponent, (new_trits != trits).sum()


def sparse_momentum_update(
    packed: torch.Tensor,
    accum: torch.Tensor,
    accum_exp: torch.Tensor,
    row_ids: torch.Tensor,
    dW: torch.Tensor,
    key: int,
    lr: float,
    beta: float = 0.9,
    bits: int = 4,
) -> torch.Tensor:
    """Fold and move the touched rows, in place; no other row is read.

    packed: uint8 (N, ceil(K/5)), accum: uint8 or int16 (N, K), accum_exp: int8 (N, blocks), all contiguous; row_ids:
    int64 (R,), each row once; dW: float32 (R, K), the step's mean gradient of those rows; lr: cells per step. Returns
    the number of changed trits, int64 ().
    """
    if not row_ids.numel():
        return torch.zeros((), dtype=torch.int64, device=dW.device)
    if uses_triton(packed, accum, accum_exp, dW):
        return triton_momentum_update(packed, accum, accum_exp, dW, key, lr, beta, bits, row_ids.contiguous())
    *rows, flips = naive_sparse_momentum_update(packed, accum, accum_exp, row_ids, dW, key, lr, beta, bits)
    for tensor, new in zip((packed, accum, accum_exp), rows, strict=True):
        tensor[row_ids] = new
    return flips
