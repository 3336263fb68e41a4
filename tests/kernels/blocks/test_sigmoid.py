"""sigmoid: close to the function, and the same for a value wherever it stands."""

import pytest
import torch

from arb_kernels.blocks.sigmoid import sigmoid


def test_sigmoid_is_the_logistic_function():
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e30, -0.0, 0.0, 1e-30, 1e30, float("inf")])])
    assert (sigmoid(x).double() - torch.sigmoid(x.double())).abs().max() < 1e-7
    assert sigmoid(torch.tensor(float("nan"))).isnan()
    x = torch.randn(100, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sigmoid, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_value_gives_the_same_bits_wherever_it_stands(dtype):
    x = (3 * torch.randn(3, 257)).to(dtype)
    whole = sigmoid(x)
    assert torch.equal(torch.cat([sigmoid(piece) for piece in x.split(1, dim=1)], 1), whole)
    assert torch.equal(sigmoid(x[:, 5:]), whole[:, 5:])
    assert torch.equal(sigmoid(x.T), whole.T)
    assert torch.equal(sigmoid(x[:, ::3]), whole[:, ::3])
