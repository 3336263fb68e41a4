"""The touched rows of a table: kernel against reference, reference against the dense rule and its own words."""

import pytest
import torch

from arb_kernels.backend import use_backend
from arb_kernels.formats.rule_states import MomentumState
from arb_kernels.random_bits import random_bits, random_bits_of_rows
from arb_kernels.rules.momentum import naive_momentum_update
from arb_kernels.rules.sparse_momentum import naive_sparse_momentum_update, sparse_momentum_update
from support.tensors import BACKENDS, assert_same, copied, random_gradient, random_momentum_state, shapes

NAMES = MomentumState._fields


@pytest.mark.parametrize("bits, trits", [(4, 1), (4, 2), (8, 2)])
@pytest.mark.parametrize("rows, touched, columns", shapes((1, 1, 1), (9, 2, 5), (50, 33, 100), (300, 7, 193)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_equals_the_reference(backend, rows, touched, columns, bits, trits):
    """Over steps that touch other rows each time; the others stay as they are."""
    state = random_momentum_state(rows, columns, bits, trits)
    for step in range(4):
        row_ids = torch.randperm(rows)[:touched]
        dW = random_gradient(touched, columns, 10.0 ** (1 - 2 * step))
        expected = copied(state)
        new_rows, flips = naive_sparse_momentum_update(state, row_ids, dW, 0xFFFFFFF0 + step, 0.3)
        for tensor, new in zip(expected, new_rows, strict=True):
            tensor[row_ids] = new
        with use_backend(backend):
            my_flips = sparse_momentum_update(state, row_ids, dW, 0xFFFFFFF0 + step, 0.3)
        for name, ref, out in zip(NAMES, expected, state, strict=True):
            assert_same(f"{name} at step {step}", ref, out)
        assert_same("flips", flips, my_flips)


@pytest.mark.parametrize("bits, trits", [(4, 1), (8, 1), (4, 2)])
def test_touching_every_row_is_the_dense_rule(bits, trits):
    state = random_momentum_state(33, 100, bits, trits)
    dW, order = random_gradient(33, 100), torch.randperm(33)
    dense, flips = naive_momentum_update(state, dW, 5, 0.3)
    rows, my_flips = naive_sparse_momentum_update(state, order, dW[order], 5, 0.3)
    for name, ref, out in zip(NAMES, dense, rows, strict=True):
        assert_same(name, ref[order], out)
    assert_same("flips", flips, my_flips)


def test_rows_keep_the_random_bits_of_their_place():
    row_ids = torch.tensor([7, 0, 40])
    assert_same("bits", random_bits(0x9ABCDEF0, 41, 13)[row_ids], random_bits_of_rows(0x9ABCDEF0, row_ids, 13))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="state beyond 2^31 bytes needs a GPU")
def test_state_beyond_2_31_bytes(triton_device):
    rows, columns = 2**31 // 320 + 50, 320
    state = MomentumState(
        *(
            torch.zeros(rows, width, dtype=dtype, device=triton_device)
            for width, dtype in ((64, torch.uint8), (columns, torch.uint8), (5, torch.int8))
        )
    )
    row_ids = torch.tensor([0, rows - 1, rows // 2], device=triton_device)
    dW = random_gradient(3, columns).to(triton_device)
    new_rows, flips = naive_sparse_momentum_update(state, row_ids, dW, 3, 0.9)
    assert_same("flips", flips, sparse_momentum_update(state, row_ids, dW, 3, 0.9))
    for name, ref, tensor in zip(NAMES, new_rows, state, strict=True):
        assert_same(name, ref, tensor[row_ids])
