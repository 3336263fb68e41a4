"""The flip rule against loops over single weights, then by its properties."""

import pytest
import torch

from arb_kernels.formats.packing import pack_levels, unpack_levels
from arb_kernels.formats.rule_states import FlipState
from arb_kernels.rules.flip import flip_update, naive_flip_update
from support.tensors import assert_same, copied, random_trits

CASES = [
    pytest.param(rows, columns, group, threshold, id=f"{rows}x{columns}-G{group}-threshold{threshold}")
    for rows, columns, group, threshold in [
        (1, 1, 1, 1),
        (3, 5, 4, 1),
        (3, 5, 5, 3),
        (7, 33, 32, 3),
        (2, 100, 32, 4),
        (5, 64, 64, 2),
        (4, 31, 4, 5),
    ]
]


class NaiveFlip:
    """Nested lists of integers; one weight, then one group, at a time."""

    def __init__(self, trits, E, group):
        self.T, self.E, self.group = trits.tolist(), E.tolist(), group
        self.T_accum = [[0 for _ in row] for row in self.T]
        self.E_accum = [[0 for _ in row] for row in self.E]

    def fold(self, dW, scale_votes):
        for r, row in enumerate(dW.tolist()):
            agreement = [0] * len(self.E[r])
            for c, g in enumerate(row):
                sign = (g > 0) - (g < 0)
                self.T_accum[r][c] = max(-127, min(127, self.T_accum[r][c] - sign))
                agreement[c // self.group] += sign * self.T[r][c]
            if scale_votes:
                for i, total in enumerate(agreement):
                    vote = (total > 0) - (total < 0)
                    self.E_accum[r][i] = max(-127, min(127, self.E_accum[r][i] - vote))

    def update(self, dW, threshold, scale_votes):
        self.fold(dW, scale_votes)
        flips = 0
        for accums, values, low, high in ((self.T_accum, self.T, -1, 1), (self.E_accum, self.E, -128, 127)):
            for accum, value in zip(accums, values, strict=True):
                for i, votes in enumerate(accum):
                    if abs(votes) >= threshold:
                        moved = max(low, min(high, value[i] + (1 if votes > 0 else -1)))
                        flips += values is self.T and moved != value[i]
                        value[i], accum[i] = moved, 0
        return flips


def fresh_state(rows, columns, group):
    groups = -(-columns // group)
    return FlipState(
        pack_levels(random_trits(rows, columns)),
        torch.randint(-128, 128, (rows, groups), dtype=torch.int8),
        torch.zeros(rows, columns, dtype=torch.int8),
        torch.zeros(rows, groups, dtype=torch.int8),
    )


def biased_gradient(rows, columns):
    """Mostly of one sign per weight, so that thresholds are reached; a fifth of it zero."""
    slope = torch.linspace(-1, 1, rows * columns).view(rows, columns)
    return (torch.randn(rows, columns) + 2 * slope) * (torch.rand(rows, columns) > 0.2)


def as_int8(rows):
    return torch.tensor(rows, dtype=torch.int8)


@pytest.mark.parametrize("rows, columns, group, threshold", CASES)
def test_flip_update(rows, columns, group, threshold):
    """Thirty steps, every third without a vote on the exponents; every tensor equal after each."""
    state = fresh_state(rows, columns, group)
    naive = NaiveFlip(unpack_levels(state.T_packed, columns), state.E, group)
    for step in range(30):
        scale_votes = step % 3 != 2
        dW = biased_gradient(rows, columns)
        flips = flip_update(state, dW, group, threshold, scale_votes)
        assert flips.dtype == torch.int64
        assert flips.item() == naive.update(dW, threshold, scale_votes)
        assert_same(f"trits, step {step}", as_int8(naive.T), unpack_levels(state.T_packed, columns))
        assert_same(f"E, step {step}", as_int8(naive.E), state.E)
        assert_same(f"T_accum, step {step}", as_int8(naive.T_accum), state.T_accum)
        assert_same(f"E_accum, step {step}", as_int8(naive.E_accum), state.E_accum)


@pytest.mark.parametrize("threshold", [1, 3, 32, 127])
@pytest.mark.parametrize("sign", [1, -1])
def test_threshold_counts_votes(threshold, sign):
    """The trit moves at the threshold-th vote, against the gradient, and not before."""
    state = fresh_state(3, 5, 5)
    state.T_packed.zero_()
    dW = torch.full((3, 5), 0.01 * sign)
    for vote in range(1, threshold + 1):
        flips = flip_update(state, dW, 5, threshold)
        assert flips.item() == (15 if vote == threshold else 0)
    assert (unpack_levels(state.T_packed, 5) == -sign).all()
    assert (state.T_accum == 0).all()


@pytest.mark.parametrize("sign, bound", [(1, -128), (-1, 127)], ids=["lowest", "highest"])
def test_exponents_saturate(sign, bound):
    trits = torch.ones(2, 9, dtype=torch.int8)
    E = torch.full((2, 3), bound + sign, dtype=torch.int8)
    state = FlipState(pack_levels(trits), E, torch.zeros_like(trits), torch.zeros_like(E))
    for _ in range(3):
        state.T_packed.copy_(pack_levels(trits))
        state.T_accum.zero_()
        flip_update(state, torch.full((2, 9), float(sign)), 4, 1)
        assert (bound == state.E).all()


def test_a_scale_too_large_gets_smaller():
    """dW agreeing with T says that the group's scale should shrink."""
    trits = random_trits(4, 32)
    trits[:, ::8] = 1
    E, E_accum = torch.zeros(2, 4, 4, dtype=torch.int8)
    flip_update(FlipState(pack_levels(trits), E, torch.zeros_like(trits), E_accum), trits.float(), 8, 1)
    assert (E == -1).all()


def test_no_scale_votes_leave_exponents_alone():
    state = fresh_state(7, 33, 32)
    state.E_accum.fill_(2)
    before = copied(state)
    flip_update(state, biased_gradient(7, 33), 32, 3, False)
    assert_same("E", before.E, state.E)
    assert_same("E_accum", before.E_accum, state.E_accum)
    assert (before.T_accum != state.T_accum).any()


def test_trits_stay_trits():
    state = fresh_state(7, 33, 32)
    for _ in range(40):
        flip_update(state, torch.randn(7, 33), 32, 1)
        assert unpack_levels(state[0], 33).abs().max() <= 1 and state[0].max() <= 242


def test_zero_gradient_changes_nothing():
    state = fresh_state(7, 33, 32)
    before = copied(state)
    flips = flip_update(state, torch.zeros(7, 33), 32, 1)
    for name, kept, tensor in zip(state._fields, before, state, strict=True):
        assert_same(name, kept, tensor)
    assert flips.item() == 0


def test_the_reference_is_pure_and_the_update_in_place():
    state, dW = fresh_state(7, 33, 32), biased_gradient(7, 33)
    before, inputs = (*copied(state), dW.clone()), (*state, dW)
    new, flips = naive_flip_update(state, dW, 32, 1)
    for name, kept, tensor in zip((*state._fields, "dW"), before, inputs, strict=True):
        assert_same(name, kept, tensor)
    assert_same("flips", flips, flip_update(state, dW, 32, 1))
    for name, expected, tensor in zip(state._fields, new, state, strict=True):
        assert_same(name, expected, tensor)


def test_recovers_planted_signs():
    """Noisy gradients towards a planted matrix: most trits end there."""
    target = random_trits(32, 64).float()
    state = fresh_state(32, 64, 64)
    for _ in range(400):
        x = torch.randn(32, 64)
        dW = (x @ (unpack_levels(state[0], 64, torch.float32) - target).T).T @ x / 32 + 0.5 * torch.randn(32, 64)
        flip_update(state, dW, 64, 16)
    assert (unpack_levels(state[0], 64) == target).float().mean() > 0.9
