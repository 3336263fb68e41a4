"""Planar base-3 packing against an independent one, digit by digit."""

import pytest
import torch

from arb_kernels.formats.packing import pack_levels, packed_width, unpack_levels
from arb_kernels.formats.state_layout import state_layout
from support.tensors import assert_same, random_trits, shapes

WIDTHS = (1, 2, 4, 5, 6, 7, 63, 128, 333)


def slow_pack(row):
    """A list of trits -> its bytes, from DESIGN's words: digit j of byte b is column j * nb + b."""
    width = (len(row) + 4) // 5
    packed = [0] * width
    for column, trit in enumerate(row):
        digit, byte = divmod(column, width)
        packed[byte] += (trit % 3) * 3**digit
    return packed


@pytest.mark.parametrize("columns", WIDTHS)
def test_pack_levels_layout(columns):
    trits = random_trits(4, columns)
    expected = torch.tensor([slow_pack(row) for row in trits.tolist()], dtype=torch.uint8)
    assert_same("packed", expected, pack_levels(trits))
    assert packed_width(columns) == expected.shape[1]


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("leading", [(1,), (3,), (2, 3)], ids=str)
def test_round_trip(leading, columns):
    trits = random_trits(*leading, columns)
    assert_same("trits", trits, unpack_levels(pack_levels(trits), columns))


@pytest.mark.parametrize("columns", [5, 7])
def test_packing_is_pure(columns):
    trits = random_trits(3, columns)
    before = trits.clone()
    packed = pack_levels(trits)
    assert_same("input of pack_levels", before, trits)
    packed_before = packed.clone()
    unpack_levels(packed, columns).fill_(1)
    assert_same("input of unpack_levels", packed_before, packed)


def test_pack_levels_of_a_strided_view():
    trits = random_trits(9, 12)
    assert_same("packed columns", pack_levels(trits.T.contiguous()), pack_levels(trits.T))
    assert_same("packed slice", pack_levels(trits[:, 1::2].contiguous()), pack_levels(trits[:, 1::2]))


def test_zero_byte_is_five_zeros():
    assert_same("zeros", torch.zeros(2, 15, dtype=torch.int8), unpack_levels(torch.zeros(2, 3, dtype=torch.uint8), 15))
    assert_same("bytes", torch.zeros(2, 3, dtype=torch.uint8), pack_levels(torch.zeros(2, 13, dtype=torch.int8)))


@pytest.mark.parametrize("columns", [1, 2, 4, 6, 7, 63, 128, 333])
def test_padding_digits_are_zero(columns):
    packed = pack_levels(torch.full((2, columns), -1, dtype=torch.int8))
    whole = unpack_levels(packed, packed.shape[1] * 5)
    assert (whole[:, :columns] == -1).all()
    assert (whole[:, columns:] == 0).all()


def test_every_valid_byte_decodes_to_its_digits():
    packed = torch.arange(243, dtype=torch.uint8).unsqueeze(1)
    trits = unpack_levels(packed, 5)
    digits = [[{0: 0, 1: 1, 2: -1}[code // 3**j % 3] for j in range(5)] for code in range(243)]
    assert_same("digits", torch.tensor(digits, dtype=torch.int8), trits)
    assert_same("bytes", packed, pack_levels(trits))


def test_bytes_that_hold_no_trits_are_counted():
    spec = state_layout("momentum", 2, 10, 10)["T_packed"]
    assert spec.count_illegal(torch.arange(243, dtype=torch.uint8)) == 0
    for byte in range(243, 256):
        assert spec.count_illegal(torch.tensor([[0, byte], [242, 121]], dtype=torch.uint8)) == 1
    assert spec.count_illegal(torch.arange(256).to(torch.uint8)) == 13


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_unpack_levels_dtype(dtype):
    trits = random_trits(3, 17)
    assert_same("trits", trits.to(dtype), unpack_levels(pack_levels(trits), 17, dtype))


@pytest.mark.parametrize("rows, columns", shapes((1, 1), (5, 7), (2, 333)))
def test_gathered_rows_unpack_alone(rows, columns):
    """A lookup may decode only the rows asked for."""
    trits = random_trits(rows, columns)
    ids = torch.randint(0, rows, (2, 3))
    assert_same("rows", trits[ids], unpack_levels(pack_levels(trits)[ids], columns))
