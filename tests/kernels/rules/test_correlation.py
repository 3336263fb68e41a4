"""The correlation rule against loops, and the scale that its votes make."""

import pytest
import torch

from arb_kernels.formats.correlation_scale import STRENGTH, correlation_octaves
from arb_kernels.formats.packing import pack_levels, unpack_levels
from arb_kernels.formats.rule_states import CorrelationState
from arb_kernels.rules.correlation import correlation_update, naive_correlation_update
from support.tensors import assert_same, copied, random_trits

CASES = [
    pytest.param(rows, columns, group, id=f"{rows}x{columns}-G{group}")
    for rows, columns, group in [(1, 1, 1), (3, 5, 4), (3, 5, 5), (7, 33, 32), (2, 100, 32), (4, 31, 4), (2, 333, 333)]
]


def fresh_state(rows, columns, group):
    groups = -(-columns // group)
    zero = torch.zeros((), dtype=torch.int64)
    return CorrelationState(
        pack_levels(random_trits(rows, columns)), torch.zeros(rows, groups, dtype=torch.int64), zero
    )


@pytest.mark.parametrize("rows, columns, group", CASES)
def test_correlation_update(rows, columns, group):
    state = fresh_state(rows, columns, group)
    trits = unpack_levels(state.T_packed, columns).tolist()
    expected = torch.zeros_like(state.corr_accum)
    for step in range(30):
        dW = torch.randn(rows, columns) * (torch.rand(rows, columns) > 0.2)
        for r, row in enumerate(dW.tolist()):
            for c, g in enumerate(row):
                expected[r, c // group] -= ((g > 0) - (g < 0)) * trits[r][c]
        correlation_update(state, dW, group)
        assert_same(f"corr_accum, step {step}", expected, state.corr_accum)
        assert_same(f"step_counter, step {step}", torch.tensor(step + 1), state.step_counter)


@pytest.mark.parametrize("rows, columns, group", CASES)
def test_correlation_octaves(rows, columns, group):
    """strength * corr_accum / (votes * group length), the last group at its own length."""
    corr_accum = torch.randint(-40, 40, (rows, -(-columns // group)))
    octaves = correlation_octaves(corr_accum, torch.tensor(7), columns, group)
    expected = [
        [STRENGTH * total / (7 * min(group, columns - i * group)) for i, total in enumerate(row)]
        for row in corr_accum.tolist()
    ]
    assert STRENGTH == 4.0
    assert_same("octaves", torch.tensor(expected), octaves)


def test_no_votes_add_no_octaves():
    _, corr_accum, step_counter = fresh_state(3, 33, 32)
    assert_same("octaves", torch.zeros(3, 2), correlation_octaves(corr_accum, step_counter, 33, 32))


def test_large_counts_keep_their_precision():
    """Sums beyond 2^24, where float32 can no longer count."""
    corr_accum = torch.tensor([[2**40 + 1, -(2**40) - 1]])
    octaves = correlation_octaves(corr_accum, torch.tensor(2**35), 64, 32)
    assert_same("octaves", torch.tensor([[4.0, -4.0]]), octaves)
    packed = pack_levels(torch.ones(1, 64, dtype=torch.int8))
    correlation_update(CorrelationState(packed, corr_accum, torch.tensor(2**35)), torch.ones(1, 64), 32)
    assert corr_accum.tolist() == [[2**40 - 31, -(2**40) - 33]]


@pytest.mark.parametrize("agreement, octaves", [(1, -4.0), (-1, 4.0)], ids=["too-large", "too-small"])
def test_scale_moves_against_the_gradient(agreement, octaves):
    """A group of weights all too large, dW along T, shrinks by strength octaves; and the reverse."""
    trits = torch.randint(0, 2, (3, 64), dtype=torch.int8) * 2 - 1
    state = fresh_state(3, 64, 32)._replace(T_packed=pack_levels(trits))
    for _ in range(5):
        dW = agreement * trits.float() * torch.rand(3, 64)
        correlation_update(state, dW, 32)
    assert_same("octaves", torch.full((3, 2), octaves), correlation_octaves(*state[1:], 64, 32))


def test_scale_approaches_the_best_one():
    """A single scale learnt by descent on its sign: it falls while S * T overshoots the target, then comes back."""
    trits = random_trits(8, 128)
    state = fresh_state(8, 128, 128)._replace(T_packed=pack_levels(trits))
    target = 0.5 * trits.float()
    for _ in range(60):
        scale = torch.exp2(correlation_octaves(*state[1:], 128, 128))
        dW = scale * trits - target
        correlation_update(state, dW, 128)
    scale = torch.exp2(correlation_octaves(*state[1:], 128, 128))
    assert (scale / 0.5).log2().abs().max() < 0.2


def test_the_reference_is_pure_and_the_update_in_place():
    state, dW = fresh_state(7, 33, 32), torch.randn(7, 33)
    before, inputs = (*copied(state), dW.clone()), (*state, dW)
    new = naive_correlation_update(state, dW, 32)
    correlation_octaves(*state[1:], 33, 32)
    for name, kept, tensor in zip((*state._fields, "dW"), before, inputs, strict=True):
        assert_same(name, kept, tensor)
    correlation_update(state, dW, 32)
    for name, expected, tensor in zip(state._fields, new, state, strict=True):
        assert_same(name, expected, tensor)
