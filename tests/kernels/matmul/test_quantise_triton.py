"""int8 quantisation on Triton: the reference's codes and scales, bit for bit."""

import pytest
import torch

from arb_kernels.matmul.quantise import naive_quantise_gradient, naive_quantise_tokens
from arb_kernels.matmul.quantise_triton import triton_quantise_gradient, triton_quantise_tokens, triton_scale_sums
from support.tensors import assert_same, shapes

SIZES = shapes((1, 1), (3, 7), (65, 130), (33, 257))
SCALES = [1.0, 1e-30, 1e30]


def assert_equal(names, expected, got):
    for name, ref, out in zip(names, expected, got, strict=True):
        assert ref is out is None or (ref.dtype == out.dtype and torch.equal(ref, out)), name


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("tokens, width", [*SIZES, *shapes((2, 5000))])
def test_quantise_tokens(triton_device, tokens, width, scale):
    values = torch.randn(tokens, width, device=triton_device) * scale
    values[tokens // 2] = 0
    assert_equal(("codes", "scale"), naive_quantise_tokens(values), triton_quantise_tokens(values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_floats_are_read_as_float32(triton_device, dtype):
    values = torch.randn(5, 33, device=triton_device).to(dtype)
    assert_equal(("codes", "scale"), naive_quantise_tokens(values.float()), triton_quantise_tokens(values))
    factor = torch.rand(33, device=triton_device)
    expected = naive_quantise_gradient(values.float(), factor, None)
    assert_equal(range(4), expected, triton_quantise_gradient(values, factor, None))


def test_ties_go_to_the_even_code(triton_device):
    values = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], device=triton_device)
    codes, _ = triton_quantise_tokens(values)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("tokens, width", SIZES)
def test_quantise_gradient(triton_device, tokens, width, scale):
    gradient = torch.randn(tokens, width, device=triton_device) * scale
    gradient[tokens // 2] = 0
    column_factor = torch.rand(width, device=triton_device) + 0.5
    row_factor = torch.rand(tokens, device=triton_device)
    for factor in (row_factor, None):
        expected = naive_quantise_gradient(gradient, column_factor, factor)
        got = triton_quantise_gradient(gradient, column_factor, factor)
        assert_equal(("by_token", "token_scale", "by_column", "column_scale"), expected, got)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows_in_the_scales(triton_device, bad):
    gradient = torch.randn(5, 6, device=triton_device)
    gradient[2, 3] = bad
    ones = torch.ones(6, device=triton_device)
    _, token_scale, _, column_scale = triton_quantise_gradient(gradient, ones, ones[:5])
    assert token_scale.isfinite().tolist() == [row != 2 for row in range(5)]
    assert column_scale.isfinite().tolist() == [column != 3 for column in range(6)]
    assert triton_quantise_tokens(gradient)[1].isfinite().tolist() == [row != 2 for row in range(5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, columns", shapes((1, 1), (5, 70), (67, 33)))
def test_scale_sums(triton_device, rows, columns, dtype):
    padded = torch.randint(-(2**31), 2**31, (rows + 3, columns + 5), dtype=torch.int32, device=triton_device)
    sums = padded[:rows, :columns]
    row_scale = torch.rand(rows, device=triton_device)
    column_scale = torch.rand(columns, device=triton_device)
    scaled = sums.float() * row_scale[:, None]
    assert torch.equal(scaled.to(dtype), triton_scale_sums(sums, row_scale, dtype=dtype))
    out = triton_scale_sums(sums, row_scale, column_scale, dtype)
    assert_same("scaled", (scaled * column_scale).to(dtype), out)
    assert torch.equal((scaled * column_scale).to(dtype), out)
