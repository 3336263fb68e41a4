"""A few tokens against packed levels: the floats of the unpacked matmul, bit for bit."""

import pytest
import torch

from arb_kernels.formats.packing import largest_level, pack_levels
from arb_kernels.matmul.int8_matmul import naive_int8_matmul
from arb_kernels.matmul.matvec_triton import triton_packed_matvec
from support.tensors import random_levels, shapes


@pytest.mark.parametrize("trits", [1, 2])
@pytest.mark.parametrize(
    "M, N, K", shapes((1, 1, 1), (1, 33, 100), (2, 47, 333), (5, 32, 640), (16, 65, 129), (17, 7, 321), (3, 5, 700))
)
def test_packed_matvec(triton_device, M, N, K, trits):
    codes = torch.randint(-128, 128, (M, K), dtype=torch.int8, device=triton_device)
    levels = random_levels(N, K, trits=trits).to(triton_device)
    token_scale, row_scale = (torch.rand(size, device=triton_device) + 0.5 for size in (M, N))
    out = triton_packed_matvec(codes, pack_levels(levels, trits), token_scale, row_scale)
    assert torch.equal(naive_int8_matmul(codes, levels, token_scale, row_scale, largest=largest_level(trits)), out)


def test_digits_that_pad_a_row_do_not_count(triton_device):
    """Two columns in one byte: whatever its other three digits say."""
    packed = torch.tensor([[242], [9 * 2 + 27 + 81], [255]], dtype=torch.uint8, device=triton_device)
    codes = torch.tensor([[3, 5]], dtype=torch.int8, device=triton_device)
    ones = torch.ones(3, device=triton_device)
    assert triton_packed_matvec(codes, packed, ones[:1], ones).tolist() == [[-8.0, 0.0, 5.0]]
