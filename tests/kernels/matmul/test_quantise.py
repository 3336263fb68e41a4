"""int8 codes: exact against a double-precision naive version, unbiased where they round stochastically."""

import pytest
import torch

from arb_kernels.backend import use_backend
from arb_kernels.matmul.quantise import (
    naive_quantise_gradient,
    naive_quantise_tokens,
    quantise_gradient,
    quantise_tokens,
)
from support.tensors import BACKENDS, assert_same, shapes

SIZES = shapes((1, 1), (3, 7), (65, 130), (200, 64), (63, 257))
SCALES = [1.0, 1e-30, 1e30]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("tokens, width", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantise_tokens(backend, tokens, width, scale):
    values = torch.randn(tokens, width) * scale
    values[tokens // 2] = 0
    with use_backend(backend):
        codes, token_scale = quantise_tokens(values)
    for name, ref, out in zip(("codes", "scale"), naive_quantise_tokens(values), (codes, token_scale), strict=True):
        assert torch.equal(ref, out), name
    error = (codes.double() * token_scale[:, None] - values).abs()
    assert (error <= token_scale[:, None] * 0.5001).all()
    largest = values.abs().amax(1) > 0
    assert torch.equal(codes.abs().amax(1)[largest], torch.full((int(largest.sum()),), 127, dtype=torch.int8))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("tokens, width", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantise_gradient(backend, tokens, width, scale):
    gradient = torch.randn(tokens, width) * scale
    gradient[tokens // 2] = 0
    column_factor, row_factor = torch.rand(width) + 0.5, torch.rand(tokens)
    for factor in (row_factor, None):
        with use_backend(backend):
            out = quantise_gradient(gradient, column_factor, factor)
        for ref, got in zip(naive_quantise_gradient(gradient, column_factor, factor), out, strict=True):
            assert ref is got is None or torch.equal(ref, got)
    by_token, token_scale, by_column, column_scale = quantise_gradient(gradient, column_factor, row_factor)
    assert by_column.shape == (width, tokens)
    for codes, steps, wanted in (
        (by_token, token_scale, gradient.double() * column_factor),
        (by_column, column_scale, (gradient.double() * row_factor[:, None]).T),
    ):
        assert ((codes.double() * steps[:, None] - wanted).abs() <= steps[:, None] * 1.001).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_of_gradients_is_unbiased(backend):
    """Many rows of one value each in sevenths of a step: the mean of their codes is that value."""
    gradient = torch.full((4096, 8), 3 / 7 / 127)
    gradient[:, 0] = 1  # sets every row's step to 1 / 127
    with use_backend(backend):
        codes, scale, *_ = quantise_gradient(gradient, torch.ones(8), None)
    mean = (codes[:, 1:].double() * scale[:, None]).mean()
    assert abs(mean * 127 - 3 / 7) < 5 * (3 / 7 * 4 / 7 / (4096 * 7)) ** 0.5


def test_equal_gradients_round_equally_and_others_do_not():
    gradient = torch.randn(64, 64)
    first, again = (quantise_gradient(gradient, torch.ones(64), None)[0] for _ in range(2))
    assert_same("codes", first, again)
    # the same values one row further down meet other random bits
    shifted = quantise_gradient(gradient.roll(1, 0), torch.ones(64), None)[0].roll(-1, 0)
    assert 0.2 < (shifted != first).float().mean() < 0.8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_that_is_not_finite_shows_in_the_scales(backend, bad):
    """The codes cannot say so; the scales do, and through them the sums that the optimizer checks."""
    gradient = torch.randn(5, 6)
    gradient[2, 3] = bad
    with use_backend(backend):
        _, token_scale, _, column_scale = quantise_gradient(gradient, torch.ones(6), torch.ones(5))
        assert not token_scale[2].isfinite() and not column_scale[3].isfinite()
        assert not quantise_tokens(gradient)[1][2].isfinite()
