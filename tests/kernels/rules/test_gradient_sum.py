"""The int8 sum of weight gradients: bit for bit on every backend, unbiased, and within its bound."""

import pytest
import torch

from arb_kernels.backend import use_backend
from arb_kernels.formats.gradient_sum_format import BLOCK
from arb_kernels.rules.gradient_sum import add_gradient, add_sum, naive_add_gradient, naive_value, zero_sum
from support.tensors import BACKENDS, assert_same, random_gradient, shapes

SHAPES = shapes((1, 1), (3, 5), (5, 64), (33, 100), (34, 257))
EXTREMES = [0.0, 1e-44, 1e-38, 1e-30, 1.0, 1e30, 3e38]


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_equal_the_reference(backend, rows, columns):
    for seed in range(2):
        torch.manual_seed(seed)
        expected, mine = zero_sum(rows, columns), zero_sum(rows, columns)
        for addition in range(5):
            dW = random_gradient(rows, columns) * 10.0 ** (addition - 2)
            expected = naive_add_gradient(expected, dW, key=seed * 7 + addition)
            with use_backend(backend):
                add_gradient(mine, dW, key=seed * 7 + addition)
            for name, ref, out in zip(("codes", "exponents"), expected, mine, strict=True):
                assert_same(f"{name} after {addition}", ref, out)
        total = random_gradient(rows, columns)
        summed = total + naive_value(expected)
        with use_backend(backend):
            add_sum(total, mine)
        assert torch.equal(summed, total)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", EXTREMES, ids=str)
def test_extreme_gradients(backend, scale):
    """Both ends of the exponents' range, numbers that are not normal, and the largest number there is."""
    dW = torch.tensor([[1.0, -0.5, 127 / 128, 0.3] * 20]) * scale
    expected, mine = zero_sum(*dW.shape), zero_sum(*dW.shape)
    expected = naive_add_gradient(expected, dW, key=3)
    with use_backend(backend):
        add_gradient(mine, dW, key=3)
    for ref, out in zip(expected, mine, strict=True):
        assert torch.equal(ref, out)
    assert torch.isfinite(naive_value(mine)).all()


def test_a_code_is_within_a_step_and_a_step_is_a_64th_of_the_largest():
    for seed in range(20):
        torch.manual_seed(seed)
        dW = random_gradient(9, 130)
        total = naive_add_gradient(zero_sum(9, 130), dW, key=seed)
        for start in range(0, 130, BLOCK):
            block, found = dW[:, start : start + BLOCK], naive_value(total)[:, start : start + BLOCK]
            largest = block.abs().amax(1)
            step = torch.tensor([2.0**e for e in total.exponents[:, start // BLOCK].tolist()])
            assert (127 * step >= largest).all() and (step <= largest / 63.5).all()
            assert ((found - block).abs() <= step[:, None]).all()


def test_the_step_is_the_least_that_reaches():
    for largest in (127.0, 127.00001, 128.0, 64.0, 63.99):
        dW = torch.full((1, 3), largest)
        (exponent,) = naive_add_gradient(zero_sum(1, 3), dW, key=0).exponents.flatten().tolist()
        assert 127 * 2.0**exponent >= dW[0, 0].item() > 127 * 2.0 ** (exponent - 1)


def test_sums_are_unbiased():
    """The mean of many sums of eight gradients approaches their exact sum as the root of their number."""
    gradients = [random_gradient(4, 70) for _ in range(8)]
    exact, mean, repeats = sum(gradients), torch.zeros(4, 70), 400
    for repeat in range(repeats):
        total = zero_sum(4, 70)
        for i, dW in enumerate(gradients):
            add_gradient(total, dW, key=repeat * 8 + i)
        mean += naive_value(total) / repeats
    largest = torch.stack(gradients).cumsum(0).abs().amax(0)
    bound = torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in largest.split(BLOCK, dim=1)], dim=1) / 64
    # eight roundings of at most a step's half as standard deviation; five of them
    assert ((mean - exact).abs() <= 5 * bound * 0.5 * (8 / repeats) ** 0.5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_versions_tell_that_the_sum_changed(backend):
    total, dW = zero_sum(3, 70), torch.randn(3, 70)
    before = [tensor._version for tensor in (*total, dW)]
    with use_backend(backend):
        add_gradient(total, dW, key=1)
        add_sum(dW, total)
    assert all(tensor._version > old for tensor, old in zip((*total, dW), before, strict=True))
