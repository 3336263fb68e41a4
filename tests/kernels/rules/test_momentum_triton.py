"""The momentum rule's Triton kernels, in place: bit for bit the reference over several steps."""

import pytest
import torch

from arb_kernels.rules.momentum import naive_momentum_update
from arb_kernels.rules.momentum_triton import triton_momentum_update
from support.tensors import assert_same, copied, random_gradient, random_momentum_state, shapes

BETA = 0.9
KEYS = (77, 0xFFFFFFFF, 0x80000000, 1, 16, 0)


@pytest.mark.parametrize(
    "rows, columns, bits, trits",
    shapes(
        *((rows, columns, bits, trits) for rows, columns in ((1, 1), (3, 5)) for bits in (4, 8) for trits in (1, 2)),
        *((33, 100, 4, 1), (33, 100, 8, 2), (32, 64, 8, 1), (32, 64, 4, 2), (17, 413, 4, 2), (17, 413, 8, 1)),
    ),
)
def test_in_place_kernels_equal_the_reference(triton_device, rows, columns, bits, trits):
    """Over steps of growing and shrinking gradients, dead rows and columns."""
    state = copied(random_momentum_state(rows, columns, bits, trits), triton_device)
    mine = copied(state)
    for step, key in enumerate(KEYS):
        dW = random_gradient(rows, columns).to(triton_device) * 10.0 ** (3 - 4 * step)
        dW[rows // 2] *= step != 2
        dW[:, columns // 2] *= step != 3
        dW *= step != 4
        state, flips = naive_momentum_update(state, dW, key, 0.3, BETA)
        my_flips = triton_momentum_update(mine, dW, key, 0.3, BETA)
        for name, ref, out in zip(state._fields, state, mine, strict=True):
            assert_same(f"{name} at step {step}", ref, out)
        assert_same("flips", flips, my_flips)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e12, 1e30], ids=str)
def test_extreme_gradients(triton_device, scale):
    """Exponents at both ends of their range, and squares that are not normal numbers."""
    state = copied(random_momentum_state(5, 70), triton_device)
    mine = copied(state)
    dW = random_gradient(5, 70).to(triton_device).clamp(-1e7, 1e7) * scale
    for key in range(2):
        state, flips = naive_momentum_update(state, dW, key, 0.3)
        assert_same("flips", flips, triton_momentum_update(mine, dW, key, 0.3))
        for name, ref, out in zip(state._fields, state, mine, strict=True):
            assert_same(name, ref, out)


def test_a_strided_gradient(triton_device):
    state = copied(random_momentum_state(7, 13), triton_device)
    dW = random_gradient(13, 7).to(triton_device).T
    ref, _ = naive_momentum_update(state, dW, 3, 0.3)
    triton_momentum_update(state, dW, 3, 0.3)
    for expected, out in zip(ref, state, strict=True):
        assert torch.equal(expected, out)
