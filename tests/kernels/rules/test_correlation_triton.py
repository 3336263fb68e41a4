"""The correlation rule's Triton kernels: the reference's votes, from dW and from the factors of an exact dW."""

import pytest
import torch

from arb_kernels.formats.groups import num_groups
from arb_kernels.formats.packing import pack_levels
from arb_kernels.formats.rule_states import CorrelationState
from arb_kernels.rules.correlation import naive_correlation_update
from arb_kernels.rules.correlation_triton import triton_correlation_update, triton_correlation_update_from_factors
from support.tensors import assert_same, random_trits

CASES = [
    pytest.param(*case, id="{}x{}-G{}".format(*case))
    for case in [(1, 1, 1), (3, 5, 4), (7, 33, 32), (2, 333, 333), (5, 100, 96), (70, 64, 6), (3, 130, 64)]
]


def fresh_state(rows, columns, group, device):
    corr_accum = torch.randint(-(2**40), 2**40, (rows, num_groups(columns, group)), device=device)
    packed = pack_levels(random_trits(rows, columns)).to(device)
    return CorrelationState(packed, corr_accum, torch.tensor(5, device=device))


def assert_equal(expected, got):
    for name, ref, out in zip(CorrelationState._fields, expected, got, strict=True):
        assert_same(name, ref, out)


@pytest.mark.parametrize("rows, columns, group", CASES)
def test_votes_from_the_gradient(triton_device, rows, columns, group):
    state = fresh_state(rows, columns, group, triton_device)
    for _ in range(4):
        dW = torch.randn(rows, columns, device=triton_device).mul_(torch.rand(rows, columns).to(triton_device) > 0.2)
        expected = naive_correlation_update(state, dW, group)
        triton_correlation_update(state, dW, group)
        assert_equal(expected, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 75])
@pytest.mark.parametrize("rows, columns, group", CASES)
def test_votes_from_the_factors(triton_device, rows, columns, group, tokens, dtype):
    """Small integers: every sum of products is exact, many of them zero."""
    state = fresh_state(rows, columns, group, triton_device)
    grad_y, x = (torch.randint(-3, 4, (tokens, width), device=triton_device).to(dtype) for width in (rows, columns))
    expected = naive_correlation_update(state, grad_y.float().T @ x.float(), group)
    triton_correlation_update_from_factors(state, grad_y, x, group)
    assert_equal(expected, state)
