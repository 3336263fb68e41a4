"""Packing on Triton: the reference's levels of one and two trits, at every dtype, shape and scale layout."""

import pytest
import torch

from arb_kernels.formats.groups import num_groups, spread_groups
from arb_kernels.formats.packing import naive_unpack_levels, pack_levels
from arb_kernels.formats.packing_triton import (
    triton_effective_weight,
    triton_gather_rows,
    triton_unpack_levels,
)
from support.tensors import random_levels, random_trits

WIDTHS = (1, 2, 4, 5, 6, 7, 63, 128, 333)
GROUPED = [
    pytest.param(*case, id="{}x{}-G{}".format(*case)) for case in [(1, 1, 1), (3, 5, 4), (7, 70, 32), (5, 33, 33)]
]
TWO_OR_ONE = pytest.mark.parametrize("trits", [1, 2])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_equal(ref, out):
    assert ref.dtype == out.dtype and torch.equal(ref, out)


@TWO_OR_ONE
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("leading", [(1,), (11,), (2, 3)], ids=str)
def test_round_trip(triton_device, leading, columns, trits):
    levels = random_levels(*leading, columns, trits=trits).to(triton_device)
    assert_equal(levels, triton_unpack_levels(pack_levels(levels, trits), columns))


@TWO_OR_ONE
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, *DTYPES, torch.float64], ids=str)
def test_every_byte_at_every_dtype(triton_device, dtype, trits):
    """Bytes above 242 decode as the reference decodes them, too."""
    plane = torch.arange(256, device=triton_device).to(torch.uint8).view(4, 64)
    packed = torch.cat([plane, *[plane.flip(0, 1)] * (trits - 1)], dim=1)
    assert_equal(naive_unpack_levels(packed, 317, dtype), triton_unpack_levels(packed, 317, dtype))


@TWO_OR_ONE
def test_a_tile_is_not_the_end_of_a_row(triton_device, trits):
    packed = pack_levels(random_levels(6, 2001, trits=trits).to(triton_device), trits)
    assert_equal(naive_unpack_levels(packed, 2001), triton_unpack_levels(packed, 2001))


@TWO_OR_ONE
def test_unpacking_is_pure_and_takes_views(triton_device, trits):
    packed = pack_levels(random_levels(9, 12, trits=trits).to(triton_device), trits)
    before = packed.clone()
    assert_equal(naive_unpack_levels(packed[::2], 12), triton_unpack_levels(packed[::2], 12))
    assert_equal(before, packed)


@TWO_OR_ONE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns, group_size", GROUPED)
def test_effective_weight(triton_device, rows, columns, group_size, dtype, trits):
    packed = pack_levels(random_levels(rows, columns, trits=trits).to(triton_device), trits)
    scale = torch.randn(rows, num_groups(columns, group_size), device=triton_device).exp()
    levels = naive_unpack_levels(packed, columns, torch.float32)
    expected = (levels * spread_groups(scale, group_size, columns)).to(dtype)
    assert_equal(expected, triton_effective_weight(packed, columns, scale, group_size, dtype))


@TWO_OR_ONE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns, group_size", GROUPED)
def test_gather_rows(triton_device, rows, columns, group_size, dtype, trits):
    packed = pack_levels(random_levels(rows, columns, trits=trits).to(triton_device), trits)
    scale = torch.randn(rows, num_groups(columns, group_size), device=triton_device).exp()
    ids = torch.randint(0, rows, (2, 9), device=triton_device)
    levels = naive_unpack_levels(packed[ids], columns, torch.float32)
    assert_equal(levels.to(dtype), triton_gather_rows(packed, ids, columns, dtype=dtype))
    spread = torch.stack([spread_groups(one, group_size, columns) for one in scale[ids]])
    out = triton_gather_rows(packed, ids, columns, scale[ids], group_size, dtype)
    assert_equal((levels * spread).to(dtype), out)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a table beyond 2^31 bytes needs a GPU")
def test_gather_from_a_table_beyond_2_31_bytes(triton_device):
    packed = torch.zeros(2**31 // 64 + 100, 64, dtype=torch.uint8, device=triton_device)
    packed[-1] = pack_levels(random_trits(1, 320).to(triton_device))
    ids = torch.tensor([0, len(packed) - 1], device=triton_device)
    assert_equal(naive_unpack_levels(packed[ids], 320, torch.float32), triton_gather_rows(packed, ids, 320))
