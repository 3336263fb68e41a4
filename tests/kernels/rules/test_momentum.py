"""The momentum rule: bit for bit against a slow numpy statement of it, then by its properties."""

import math

import numpy as np
import pytest
import torch

from arb_kernels.backend import use_backend
from arb_kernels.formats.momentum_format import MomentumFormat
from arb_kernels.formats.packing import pack_levels, packed_width, unpack_levels
from arb_kernels.formats.rule_states import MomentumState
from arb_kernels.random_bits import stream_key
from arb_kernels.rules.momentum import momentum_update, move_weights, naive_momentum_update, normalise
from support.tensors import (
    BACKENDS,
    assert_same,
    copied,
    random_gradient,
    random_levels,
    random_momentum_state,
    shapes,
)

BETA = 0.9
SHAPES = shapes((1, 1), (3, 5), (33, 100), (64, 128), (47, 257), (128, 64))
LARGEST = {1: 1, 2: 4, 3: 13}  # level of a weight of so many trits
TRITS = pytest.mark.parametrize("trits", [1, 2])
f32 = np.float32


def hash_words(x):
    """lowbias32 on uint32 arrays, which wrap around by themselves."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def uniforms(key, rows, columns):
    """Two float32 (rows, columns): from the low and the high half of each word."""
    row_keys = hash_words(np.arange(rows, dtype=np.uint32) ^ np.uint32(key))
    steps = np.arange(columns, dtype=np.uint32) * np.uint32(0x9E3779B9)
    words = hash_words(row_keys[:, None] + steps)
    return (words % 2**16).astype(f32) / f32(2**16), (words // 2**16).astype(f32) / f32(2**16)


class NaiveMomentum:
    """Levels, residuals, momentum codes and exponents of a matrix, unpacked, each an array of wide integers."""

    def __init__(self, levels, residual, bits, trits=1):
        self.T, self.residual = levels.astype(np.int64), residual.astype(np.int64)
        self.codes = np.zeros_like(self.T)
        self.blocks = [range(start, min(start + 64, self.T.shape[1])) for start in range(0, self.T.shape[1], 64)]
        self.exponents = np.zeros((len(self.T), len(self.blocks)), dtype=np.int64)
        self.cell, self.largest_code = 2**bits, 2 ** (bits - 1) - 1
        self.line, self.unit = 3**trits * self.cell, trits * self.cell  # residual steps; the unit of rates

    def momentum(self):
        decoded = np.zeros(self.T.shape, dtype=f32)
        for i, block in enumerate(self.blocks):
            step = (2.0 ** (self.exponents[:, i] / 4)).astype(f32)
            decoded[:, block] = self.codes[:, block].astype(f32) * step[:, None]
        return decoded

    def fold(self, dW, noise):
        m = self.momentum() * f32(BETA) + dW * f32(1 - BETA)
        for i, block in enumerate(self.blocks):
            squares = np.zeros((len(m), 64), dtype=f32)
            squares[:, : len(block)] = m[:, block] * m[:, block]
            while squares.shape[1] > 1:
                left, right = np.split(squares, 2, axis=1)
                squares = left + right
            target = squares[:, 0] / f32(len(block)) * f32((2.5 / self.largest_code) ** 2)
            # the least e with 2^(e/2) >= target: no float32 lies between 2^(e/2) and its float64 rounding
            thresholds = 2.0 ** (np.arange(-127, 127) / 2)
            exponent = np.searchsorted(thresholds, target.astype(np.float64)) - 127
            steps_per_unit = (2.0 ** (-exponent / 4)).astype(f32)
            rounded = np.floor(m[:, block] * steps_per_unit[:, None] + noise[:, block])
            self.codes[:, block] = np.clip(rounded, -self.largest_code, self.largest_code)
            self.exponents[:, i] = exponent

    def update(self, dW, key, lr):
        low, high = uniforms(key, *dW.shape)
        self.fold(dW, low)
        d = self.momentum() * f32(BETA) + dW * f32(1 - BETA)
        shift = np.floor(self.normalised(d) * f32(-lr * self.unit) + high).astype(np.int64)
        latent = np.clip(self.cell * self.T + self.residual + shift, -self.line // 2, self.line // 2 - 1)
        before = self.T
        self.T = (latent + self.cell // 2) // self.cell
        self.residual = latent - self.cell * self.T
        return int((before != self.T).sum())

    @staticmethod
    def normalised(d):
        """Statistics over 15-bit fixed point of each row and column, in Python's integers: in any order."""
        rows, columns = d.shape
        if not d.any():
            return d
        row_sums, row_shifts = zip(*(sum_of_squares(d[r]) for r in range(rows)), strict=True)
        column_sums, column_shifts = zip(*(sum_of_squares(d[:, c]) for c in range(columns)), strict=True)
        least = min(shift for row_sum, shift in zip(row_sums, row_shifts, strict=True) if row_sum)
        total = sum(s // 4 ** max(shift - least, 0) for s, shift in zip(row_sums, row_shifts, strict=True))
        u = d.copy()
        for r, (row_sum, shift) in enumerate(zip(row_sums, row_shifts, strict=True)):
            u[r] = u[r] * (f32(2.0**shift) / np.sqrt(f32(row_sum)) if row_sum else f32(0))
        for c, (column_sum, shift) in enumerate(zip(column_sums, column_shifts, strict=True)):
            octaves = f32(2.0 ** min(shift - least, 64))
            u[:, c] = u[:, c] * (np.sqrt(f32(total)) / np.sqrt(f32(column_sum)) * octaves if column_sum else f32(0))
        power = (np.rint(np.clip(u * f32(1024), -31 * 1024, 31 * 1024)).astype(np.int64) ** 2).sum()
        inverse_rms = f32(1) / np.sqrt(f32(power)) * f32(1024 * (rows * columns) ** 0.5)
        return np.clip(u * inverse_rms, f32(-2), f32(2))


def sum_of_squares(line):
    """(sum, shift): of the numbers times 2^shift, rounded, where shift brings the largest below 2^15."""
    shift = 15 - math.frexp(float(np.abs(line).max()))[1]
    return sum(int(x) ** 2 for x in np.rint(line * f32(2.0**shift))), shift


def random_signs(rows, columns):
    return torch.randint(0, 2, (rows, columns)) * 2.0 - 1


def assert_valid(packed, accum, accum_exp, columns, bits=4, trits=1):
    form = MomentumFormat(bits)
    residual, codes = form.split(accum)
    assert (packed <= 242).all() and unpack_levels(packed, columns).abs().max() <= LARGEST[trits]
    assert residual.min() >= -form.cell // 2 and residual.max() < form.cell // 2
    assert codes.abs().max() <= form.largest_code
    assert (accum_exp >= -127).all()


def latent_of(state, columns):
    return 16 * unpack_levels(state[0], columns).int() + MomentumFormat(4).split(state[1])[0]


def fold(accum, accum_exp, dW, key):
    """New accum, accum_exp after an update that moves no weight."""
    packed = torch.zeros(len(dW), packed_width(dW.shape[1]), dtype=torch.uint8)
    return naive_momentum_update(MomentumState(packed, accum, accum_exp), dW, key, 0.0, BETA)[0][1:]


@pytest.mark.parametrize("columns", [64, 50, 7])
def test_block_sums_follow_one_tree(columns):
    """Blocks whose RMS lies within a few ulps of where the exponent changes: another order of summation shows."""
    dW = torch.randn(3000, columns)
    full_scale = (0.1 * dW.double()).square().mean(1, keepdim=True).sqrt() * 2.5 / 7
    dW = (dW / full_scale).float()
    accum, accum_exp = torch.zeros(3000, columns, dtype=torch.uint8), torch.zeros(3000, 1, dtype=torch.int8)
    naive = NaiveMomentum(np.zeros(dW.shape), np.zeros(dW.shape), 4)
    naive.fold(dW.numpy(), uniforms(1, *dW.shape)[0])
    exponents = fold(accum, accum_exp, dW, 1)[1]
    assert {0, 1} == {*exponents.flatten().tolist()}
    assert_same("exponents", torch.from_numpy(naive.exponents), exponents.long())


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("trits, steps", [(1, 50), (2, 20), (3, 10)])
def test_momentum_update(rows, columns, bits, trits, steps):
    """Every fifth step moves no weight; every tensor equal after each."""
    state = random_momentum_state(rows, columns, bits, trits)
    residual, _ = MomentumFormat(bits).split(state.accum)
    naive = NaiveMomentum(unpack_levels(state.T_packed, columns).numpy(), residual.numpy(), bits, trits)
    for step in range(steps):
        lr = 0.3 * (1 - step / steps) if step % 5 else 0.0
        dW, key = random_gradient(rows, columns, 0.01), stream_key(7, step, 0, 1)
        state, flips = naive_momentum_update(state, dW, key, lr, BETA)
        packed, accum, accum_exp = state
        expected_flips = naive.update(dW.numpy(), key, lr)
        residual, codes = MomentumFormat(bits).split(accum)
        assert_same(f"exponents, step {step}", torch.from_numpy(naive.exponents), accum_exp.long())
        assert_same(f"codes, step {step}", torch.from_numpy(naive.codes), codes.long())
        assert_same(f"levels, step {step}", torch.from_numpy(naive.T), unpack_levels(packed, columns).long())
        assert_same(f"residuals, step {step}", torch.from_numpy(naive.residual), residual.long())
        assert flips.dtype == torch.int64 and flips.item() == expected_flips


def test_rates_are_in_cells_for_each_trit():
    """Without momentum, against a gradient of one size, at 0.25: by 4 of the 16 steps of a cell for each trit."""
    for trits, distance in ((1, 4), (2, 8), (3, 12)):
        state = MomentumState(
            pack_levels(torch.zeros(8, 32, dtype=torch.int8), trits),
            torch.zeros(8, 32, dtype=torch.uint8),
            torch.zeros(8, 1, dtype=torch.int8),
        )
        signs = random_signs(8, 32)
        moved = latent_of(naive_momentum_update(state, signs, 1, 0.25, beta=0.0)[0], 32)
        assert_same(f"{trits} trits", (-distance * signs).int(), moved.int())


@TRITS
@pytest.mark.parametrize("backend", BACKENDS)
def test_latents_stop_at_the_ends_of_the_line(backend, trits):
    """From every level and residual, with steps of half a cell for each trit towards both ends."""
    levels = torch.arange(-LARGEST[trits], LARGEST[trits] + 1, dtype=torch.int8).repeat_interleave(16)
    residual = torch.arange(-8, 8, dtype=torch.int8).repeat(2 * LARGEST[trits] + 1)
    K, end = len(levels), 8 * 3**trits
    signs = torch.tensor([[1.0], [-1.0]]).expand(2, K)
    state = MomentumState(
        pack_levels(levels.expand(2, K), trits),
        (residual & 15).view(torch.uint8).repeat(2, 1),
        torch.zeros(2, -(-K // 64), dtype=torch.int8),
    )
    latents = (16 * levels.int() + residual).expand(2, K)
    assert_same("latents", torch.arange(-end, end, dtype=torch.int32), latents[0])
    expected = (latents - 8 * trits * signs).clamp(-end, end - 1)
    with use_backend(backend):
        flips = momentum_update(state, signs.contiguous(), 3, 0.5, beta=0.0)
    assert_same("moved latents", expected.int(), latent_of(state, K).int())
    assert flips.item() == (unpack_levels(state.T_packed, K) != levels).sum()
    assert_valid(*state, K, trits=trits)


@TRITS
@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_state_stays_valid(rows, columns, bits, trits):
    state = random_momentum_state(rows, columns, bits, trits)
    for step in range(30 // trits):
        scale = 10.0 ** torch.randint(-9, 9, ()).item()
        state, _ = naive_momentum_update(state, random_gradient(rows, columns, scale), step, 0.9, BETA)
        assert_valid(*state, columns, bits, trits)
        assert state[1].dtype == MomentumFormat(bits).dtype and state[2].dtype == torch.int8


@pytest.mark.parametrize("bits", [4, 8])
def test_format_round_trip(bits):
    """Every pair of residual and code; zero means zero."""
    form = MomentumFormat(bits)
    levels = torch.arange(-form.cell // 2, form.cell // 2).to(torch.int8 if bits == 4 else torch.int16)
    residual, codes = torch.meshgrid(levels, levels, indexing="ij")
    split = form.split(form.join(residual, codes))
    assert_same("residual", residual, split[0])
    assert_same("codes", codes, split[1])
    assert form.join(residual, codes).unique().numel() == form.cell**2
    zero = torch.zeros(1, dtype=levels.dtype)
    assert form.join(zero, zero).item() == 0


@pytest.mark.parametrize("bits, trits", [(4, 1), (8, 1), (4, 2)])
def test_recovers_a_planted_matrix(bits, trits):
    """From noisy gradients, as research/momentum_reference.py does."""
    rows, columns, steps = 64, 128, 400
    target = random_levels(rows, columns, trits=trits).float()
    state = random_momentum_state(rows, columns, bits, trits)
    for step in range(steps):
        x = torch.randn(32, columns)
        error = unpack_levels(state[0], columns, torch.float32) - target
        dW = (x @ error.T).T @ x / 32 + 0.5 * torch.randn(rows, columns)
        state, _ = naive_momentum_update(state, dW, stream_key(0, step), 0.05 * (1 - step / steps), BETA)
    assert (unpack_levels(state[0], columns) == target).float().mean() > 0.95


@TRITS
@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_gradient_changes_nothing(rows, columns, bits, trits):
    state = random_momentum_state(rows, columns, bits, trits)
    moved, flips = naive_momentum_update(state, torch.zeros(rows, columns), 3, 0.9, BETA)
    assert_same("levels", state.T_packed, moved.T_packed)
    assert_same("accum", state.accum, moved.accum)
    assert flips.item() == 0


def test_same_key_same_bits_other_key_other_bits():
    state, dW = random_momentum_state(33, 100), random_gradient(33, 100)
    updates = (naive_momentum_update(state, dW, key, 0.5) for key in (5, 5, 6))
    first, again, other = ((*new, flips) for new, flips in updates)
    for name, a, b in zip(("packed", "accum", "accum_exp", "flips"), first, again, strict=True):
        assert_same(name, a, b)
    codes, other_codes = (MomentumFormat(4).split(accum)[1] for accum in (first[1], other[1]))
    assert 0.01 < (codes != other_codes).float().mean() < 0.9
    assert (first[0] != other[0]).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_scale_invariance(bits):
    """1024 times the gradient: exponents 40 quarter octaves higher, everything else equal."""
    small = large = random_momentum_state(47, 257, bits)
    for step in range(20):
        dW = random_gradient(47, 257) + 1e-3
        small, flips = naive_momentum_update(small, dW, step, 0.1, BETA)
        large, large_flips = naive_momentum_update(large, dW * 1024, step, 0.1, BETA)
        assert_same("packed", small[0], large[0])
        assert_same("accum", small[1], large[1])
        assert_same("flips", flips, large_flips)
        assert small[2].min() > -127 and large[2].max() < 127, "the setting saturates"
        assert_same("accum_exp", small[2] + 40, large[2])


@TRITS
@pytest.mark.parametrize("bits", [4, 8])
def test_update_is_pure(bits, trits):
    state, dW = random_momentum_state(33, 100, bits, trits), random_gradient(33, 100)
    before, inputs = [*copied(state), dW.clone()], (*state, dW)
    naive_momentum_update(state, dW, 1, 0.5, BETA)
    for name, kept, tensor in zip(("packed", "accum", "accum_exp", "dW"), before, inputs, strict=True):
        assert_same(name, kept, tensor)


def test_fold_is_unbiased():
    """The mean over keys of the decoded momentum is beta * m + (1 - beta) * dW, where nothing clips."""
    rows, columns, keys = 8, 100, 600
    accum, accum_exp = torch.zeros(rows, columns, dtype=torch.uint8), torch.zeros(rows, 2, dtype=torch.int8)
    flat = torch.rand(rows, columns) * 2 - 1
    accum, accum_exp = fold(accum, accum_exp, flat, 99)
    dW = torch.rand(rows, columns) * 2 - 1

    def decoded(accum, accum_exp):
        step = torch.exp2(accum_exp.double() / 4).repeat_interleave(64, 1)[:, :columns]
        return MomentumFormat(4).split(accum)[1] * step, step

    expected = decoded(accum, accum_exp)[0] * BETA + (1 - BETA) * dW
    folded = [decoded(*fold(accum, accum_exp, dW, key)) for key in range(keys)]
    step = folded[0][1]
    error = (torch.stack([m for m, _ in folded]).mean(0) - expected) / step
    assert error.abs().max() < 5.5 * 0.5 / math.sqrt(keys)
    assert error.mean().abs() < 5 * 0.5 / math.sqrt(keys * error.numel())


def test_move_is_unbiased():
    """A direction of +-1 is its own normalisation: 0.8 of a residual step against it, on average."""
    rows, columns, keys = 16, 32, 300
    direction = random_signs(rows, columns)
    trits = torch.zeros(rows, columns, dtype=torch.int8)
    residual = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    total = torch.zeros(rows, columns)
    for _ in range(keys):
        new_trits, new_residual = move_weights(
            trits, residual, normalise(direction), torch.rand(rows, columns), 0.05, 16
        )
        total += 16 * new_trits + new_residual - residual
    assert (total / keys + 0.8 * direction).abs().max() < 5.5 * 0.5 / math.sqrt(keys)
    assert (total / keys + 0.8 * direction).mean().abs() < 5 * 0.5 / math.sqrt(keys * rows * columns)


def test_momentum_keeps_moving_weights_after_the_gradient_stops():
    packed, accum = (torch.zeros(8, width, dtype=torch.uint8) for width in (13, 64))
    state = MomentumState(packed, accum, torch.zeros(8, 1, dtype=torch.int8))
    for step in range(5):
        state, _ = naive_momentum_update(state, torch.ones(8, 64), stream_key(step), 0.1)
    before = latent_of(state, 64)
    state, _ = naive_momentum_update(state, torch.zeros(8, 64), stream_key(5), 0.1)
    moved = latent_of(state, 64) - before
    assert moved.max() <= 0 and -2 < moved.float().mean() < -1


@TRITS
@pytest.mark.parametrize("rows, columns", shapes((1, 1), (3, 5), (33, 100)))
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e-6, 1e12, 1e30, 1e38], ids=str)
def test_extreme_gradients_keep_the_state_valid(rows, columns, scale, trits):
    """Then, and one ordinary step later. Above the momentum's least step, every weight also moves the right way."""
    state, end = random_momentum_state(rows, columns, trits=trits), 8 * 3**trits
    dW = random_signs(rows, columns) * scale
    before = latent_of(state, columns)
    state, _ = naive_momentum_update(state, dW, stream_key(1), 0.9)
    assert_valid(*state, columns, trits=trits)
    after = latent_of(state, columns)
    if scale > 1e-9:
        at_the_end = (after == -end) | (after == end - 1)
        assert (((before - after) * dW.sign() > 0) | at_the_end).all()
    state, _ = naive_momentum_update(state, random_gradient(rows, columns), stream_key(2), 0.9)
    assert_valid(*state, columns, trits=trits)


@pytest.mark.parametrize("scale, exponent", [(1e-30, -127), (1e-11, -127), (1e12, 127), (1e30, 127)], ids=str)
def test_exponents_saturate(scale, exponent):
    _, accum, accum_exp = random_momentum_state(3, 100)
    assert fold(accum, accum_exp, torch.full((3, 100), scale), 1)[1].eq(exponent).all()
