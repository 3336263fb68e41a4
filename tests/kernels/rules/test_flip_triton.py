"""The flip rule's Triton kernels: every tensor equal to the reference's after each of several steps."""

import pytest
import torch

from arb_kernels.formats.groups import num_groups
from arb_kernels.formats.packing import pack_levels
from arb_kernels.formats.rule_states import FlipState
from arb_kernels.rules.flip import naive_flip_update
from arb_kernels.rules.flip_triton import triton_flip_update
from support.tensors import assert_same, copied, random_trits

NAMES = (*FlipState._fields, "flips")
CASES = [
    pytest.param(*case, id="{}x{}-G{}-threshold{}".format(*case))
    for case in [(1, 1, 1, 1), (3, 5, 4, 1), (7, 33, 32, 3), (2, 333, 333, 2), (5, 100, 96, 2), (37, 64, 6, 4)]
]


def fresh_state(rows, columns, group, device):
    groups = num_groups(columns, group)
    E = torch.randint(-128, 128, (rows, groups))
    E[0] = 127  # the end of its range
    votes = (torch.zeros(rows, width, dtype=torch.int8) for width in (columns, groups))
    return copied(FlipState(pack_levels(random_trits(rows, columns)), E.to(torch.int8), *votes), device)


@pytest.mark.parametrize("rows, columns, group, threshold", CASES)
def test_steps_equal_the_reference(triton_device, rows, columns, group, threshold):
    state = fresh_state(rows, columns, group, triton_device)
    mine = copied(state)
    for step in range(6):
        dW = torch.randn(rows, columns, device=triton_device) * (torch.rand(rows, columns) > 0.2).to(triton_device)
        dW += 0.5 * (step % 2)
        scale_votes = step != 3
        state, flips = naive_flip_update(state, dW, group, threshold, scale_votes)
        my_flips = triton_flip_update(mine, dW, group, threshold, scale_votes)
        for name, ref, out in zip(NAMES, (*state, flips), (*mine, my_flips), strict=True):
            assert_same(f"{name} at step {step}", ref, out)
