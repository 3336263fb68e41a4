"""The momentum rule's kernels, in place on every backend: bit for bit the reference over several steps."""

import pytest
import torch

from arb_kernels.backend import use_backend
from arb_kernels.rules.momentum import momentum_update, naive_momentum_update
from arb_kernels.rules.sparse_momentum import naive_sparse_momentum_update, sparse_momentum_update
from support.tensors import BACKENDS, assert_same, copied, random_gradient, random_momentum_state, shapes

BETA = 0.9
SHAPES = shapes((1, 1), (3, 5), (33, 100), (64, 128), (47, 257), (300, 513))


@pytest.mark.parametrize("trits", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS[:2])  # Triton has tests of its own
def test_in_place_kernels_equal_the_reference(backend, rows, columns, bits, trits):
    """Over steps of growing and shrinking gradients, dead rows and columns."""
    state = random_momentum_state(rows, columns, bits, trits)
    mine = copied(state)
    for step in range(6):
        dW = random_gradient(rows, columns) * 10.0 ** (3 - 4 * step)
        dW[rows // 2] *= step != 2
        dW[:, columns // 2] *= step != 3
        dW *= step != 4
        state, flips = naive_momentum_update(state, dW, 77 + step, 0.3, BETA)
        with use_backend(backend):
            my_flips = momentum_update(mine, dW, 77 + step, 0.3, BETA)
        for name, ref, out in zip(state._fields, state, mine, strict=True):
            assert_same(f"{name} at step {step}", ref, out)
        assert_same("flips", flips, my_flips)


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_trits_take_the_reference(backend):
    """Whichever backend is asked for."""
    state = random_momentum_state(9, 70, trits=3)
    mine, dW, ids = copied(state), random_gradient(9, 70), torch.tensor([4, 0])
    expected, flips = naive_momentum_update(state, dW, 5, 0.3)
    rows, row_flips = naive_sparse_momentum_update(expected, ids, dW[ids], 6, 0.3)
    with use_backend(backend):
        assert_same("flips", flips, momentum_update(mine, dW, 5, 0.3))
        for name, ref, out in zip(state._fields, expected, mine, strict=True):
            assert_same(name, ref, out)
        assert_same("flips", row_flips, sparse_momentum_update(mine, ids, dW[ids], 6, 0.3))
    for name, ref, out in zip(state._fields, rows, mine, strict=True):
        assert_same(name, ref, out[ids])


@pytest.mark.parametrize("rows, columns", shapes((3, 5), (33, 100), (64, 385)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_columns_of_every_size(backend, rows, columns):
    """From 1 down to 1e-38 beside each other, a small row and column that meet nothing larger, and rows of zeros."""
    state = random_momentum_state(rows, columns)
    mine = copied(state)
    for step in range(4):
        row, column = (10.0 ** -torch.randint(0, 39 if step % 2 else 13, (size,)) for size in (rows, columns))
        dW = torch.randn(rows, columns) * row[:, None] * column * 1e3
        dW[0], dW[:, 0], dW[0, 0] = 0, 0, 1e-20
        dW[rows // 2] *= step > 2
        state, flips = naive_momentum_update(state, dW, 5 + step, 0.3)
        with use_backend(backend):
            assert_same("flips", flips, momentum_update(mine, dW, 5 + step, 0.3))
        for name, ref, out in zip(state._fields, state, mine, strict=True):
            assert_same(f"{name} at step {step}", ref, out)
