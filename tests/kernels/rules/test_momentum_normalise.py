"""The normalisation of the momentum rule's direction: by rows and columns, at any scale, in any order."""

import pytest
import torch

from arb_kernels.formats.momentum_format import MAX_UPDATE, MomentumFormat
from arb_kernels.formats.packing import unpack_levels
from arb_kernels.random_bits import stream_key
from arb_kernels.rules.momentum import move_weights, naive_momentum_update, normalise
from support.tensors import assert_same, random_gradient, random_momentum_state, shapes


@pytest.mark.parametrize("rows, columns", shapes((5, 7), (33, 100), (64, 128)))
def test_direction_is_normalised_by_rows_and_columns(rows, columns):
    """Against the formula of DESIGN in float64, with a cell so fine that rounding takes half a step of 4096."""
    d = torch.randn(rows, columns) * (0.3 * torch.randn(rows, 1)).exp() * (0.3 * torch.randn(columns)).exp()
    d64 = d.double()
    r, c = d64.square().mean(1, keepdim=True), d64.square().mean(0, keepdim=True)
    u = d64 / (r * c / r.mean()).sqrt()
    u = (u / u.square().mean().sqrt()).clamp(-2, 2)
    zeros = torch.zeros(rows, columns, dtype=torch.int16)
    trits, residual = move_weights(zeros, zeros, normalise(d), torch.full((rows, columns), 0.5), 0.4, 4096)
    latent = 4096.0 * trits + residual
    assert (latent / (0.4 * 4096) + u).abs().max() < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_normalisation_does_not_depend_on_order(bits):
    """Rows and columns in another order: the same result, in that order."""
    rows, columns, cell = 47, 257, 2**bits
    row_order, column_order = torch.randperm(rows), torch.randperm(columns)
    packed, accum, _ = random_momentum_state(rows, columns, bits)
    trits, (residual, _) = unpack_levels(packed, columns), MomentumFormat(bits).split(accum)
    direction, noise = random_gradient(rows, columns), torch.rand(rows, columns)
    plain = move_weights(trits, residual, normalise(direction), noise, 0.7, cell)
    trits_, residual_, direction_, noise_ = (a[row_order][:, column_order] for a in (trits, residual, direction, noise))
    permuted = move_weights(trits_, residual_, normalise(direction_), noise_, 0.7, cell)
    assert (plain[0] != trits).float().mean() > 0.05
    for name, a, b in zip(("trits", "residual"), plain, permuted, strict=True):
        assert_same(name, a[row_order][:, column_order], b)


@pytest.mark.parametrize("small, least_distance", [("rows", 0.8), ("blocks", 0.8), ("columns", 0.25)])
@pytest.mark.parametrize("bits", [4, 8])
def test_small_rows_and_columns_move_like_large_ones(small, least_distance, bits):
    """Gradients of 1, 1e-4, 1e-6 and 1e-9 of the largest: as many latents move, and about as far. (Less far where small
    columns share their momentum's block, and so its step, with large ones: they have no momentum to speak of.)"""
    sizes = torch.tensor([1, 1e-4, 1e-6, 1e-9])
    scale = {
        "rows": sizes.repeat(12)[:, None].expand(48, 96),
        "blocks": sizes.repeat_interleave(64).expand(48, 256),
        "columns": sizes.repeat(24).expand(48, 96),
    }[small]
    state, form = random_momentum_state(*scale.shape, bits), MomentumFormat(bits)

    def latents():
        return form.cell * unpack_levels(state[0], scale.shape[1]).int() + form.split(state[1])[0]

    before = latents()
    for step in range(20):
        state, _ = naive_momentum_update(state, torch.randn(scale.shape) * scale, stream_key(step), 0.05)
    distance = (latents() - before).abs().float()
    moved, far = (torch.stack([x[scale == size].mean() for size in sizes]) for x in ((distance > 0).float(), distance))
    assert moved.min() > 0.9 * moved.max() and moved.min() > 0.8, moved
    assert far.min() > least_distance * far.max(), far


@pytest.mark.parametrize("scale", [1e-12, 1e-18], ids=str)
def test_unit_rms_at_any_scale(scale):
    """Each row and column of about unit RMS, columns down to 2^-60 of the largest; lines of zeros stay."""
    small_rows = torch.randn(40, 64) * torch.tensor([1, scale]).repeat(20)[:, None]
    small_columns = torch.randn(64, 40) * torch.tensor([1, max(scale, 2.0**-60)]).repeat(20)
    for direction in (small_rows, small_columns):
        direction[3] = direction[:, 3] = 0
        update = normalise(direction)
        assert update[3].eq(0).all() and update[:, 3].eq(0).all()
        kept = torch.arange(len(direction)) != 3, torch.arange(direction.shape[1]) != 3
        for line_rms in (update[kept[0]].square().mean(1).sqrt(), update[:, kept[1]].square().mean(0).sqrt()):
            assert (line_rms > 0.6).all() and (line_rms < 1.5).all()


def test_a_column_that_only_a_small_row_touches():
    """Its u would be 1e20 before the clip: it moves by the clip, and nothing overflows."""
    direction = torch.randn(40, 64)
    direction[5], direction[:, 7] = 1e-20, 0
    direction[5, 7] = 1e-20
    update = normalise(direction)
    assert update.isfinite().all() and update[5, 7] == MAX_UPDATE
    others = update[torch.arange(40) != 5]
    assert 0.5 < others.square().mean() < 1.1
