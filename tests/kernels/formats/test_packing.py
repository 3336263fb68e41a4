"""Planar base-3 packing against an independent one, digit by digit."""

import itertools

import pytest
import torch

from arb_kernels.backend import use_backend
from arb_kernels.formats.packing import largest_level, pack_levels, packed_width, trits_per_weight, unpack_levels
from arb_kernels.formats.state_layout import state_layout
from support.tensors import BACKENDS, assert_same, random_levels, shapes

WIDTHS = (1, 2, 4, 5, 6, 7, 63, 128, 333)
TRITS = (1, 2, 3)


def trits_of(level, trits):
    """The balanced ternary digits of a level, the most significant first, found by trying all."""
    for digits in itertools.product((-1, 0, 1), repeat=trits):
        if sum(digit * 3**power for power, digit in enumerate(reversed(digits))) == level:
            return digits
    raise AssertionError(level)


def slow_pack(row, trits):
    """A list of levels -> its bytes: plane after plane, in which digit j of byte b is column j * nb + b."""
    width = (len(row) + 4) // 5
    packed = [0] * (trits * width)
    for column, level in enumerate(row):
        digit, byte = divmod(column, width)
        for plane, trit in enumerate(trits_of(level, trits)):
            packed[plane * width + byte] += (trit % 3) * 3**digit
    return packed


@pytest.mark.parametrize("trits", TRITS)
@pytest.mark.parametrize("columns", WIDTHS)
def test_pack_levels_layout(columns, trits):
    levels = random_levels(4, columns, trits=trits)
    expected = torch.tensor([slow_pack(row, trits) for row in levels.tolist()], dtype=torch.uint8)
    assert_same("packed", expected, pack_levels(levels, trits))
    assert packed_width(columns, trits) == expected.shape[1]


def test_bytes_of_two_trits_written_by_hand():
    """Seven columns in two bytes a plane: byte b holds the columns b, 2 + b, 4 + b and 6 + b."""
    levels = torch.tensor([[4, -4, 2, -2, 3, 1, -1]], dtype=torch.int8)
    #   3a + b:  a =        1, -1, 1, -1, 1, 0,  0
    #            b =        1, -1, -1, 1, 0, 1, -1
    first = [1 + 3 * 1 + 9 * 1 + 27 * 0, 2 + 3 * 2 + 9 * 0]
    second = [1 + 3 * 2 + 9 * 0 + 27 * 2, 2 + 3 * 1 + 9 * 1]
    packed = torch.tensor([first + second], dtype=torch.uint8)
    assert_same("bytes", packed, pack_levels(levels, 2))
    assert_same("levels", levels, unpack_levels(packed, 7))


@pytest.mark.parametrize("trits", TRITS)
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("leading", [(1,), (3,), (2, 3)], ids=str)
def test_round_trip(leading, columns, trits):
    levels = random_levels(*leading, columns, trits=trits)
    assert_same("levels", levels, unpack_levels(pack_levels(levels, trits), columns))


@pytest.mark.parametrize("trits", TRITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_level_in_every_place(backend, trits):
    """A row for each level, on both sides of zeros."""
    levels = torch.arange(-largest_level(trits), largest_level(trits) + 1, dtype=torch.int8)[:, None].repeat(1, 13)
    levels[:, ::3] = 0
    packed = pack_levels(levels, trits)
    assert packed.max() <= 242 and trits_per_weight(packed, 13) == trits
    with use_backend(backend):
        assert_same("levels", levels, unpack_levels(packed, 13))


@pytest.mark.parametrize("trits", TRITS)
@pytest.mark.parametrize("rows, columns", shapes((3, 0), (0, 7), (0, 0)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_weights(backend, rows, columns, trits):
    levels = torch.empty(rows, columns, dtype=torch.int8)
    packed = pack_levels(levels, trits)
    assert packed.shape == (rows, packed_width(columns, trits))
    with use_backend(backend):
        assert_same("levels", levels, unpack_levels(packed, columns))


@pytest.mark.parametrize("columns", [5, 7])
def test_packing_is_pure(columns):
    levels = random_levels(3, columns, trits=2)
    before = levels.clone()
    packed = pack_levels(levels, 2)
    assert_same("input of pack_levels", before, levels)
    packed_before = packed.clone()
    unpack_levels(packed, columns).fill_(1)
    assert_same("input of unpack_levels", packed_before, packed)


@pytest.mark.parametrize("trits", TRITS)
def test_pack_levels_of_a_strided_view(trits):
    levels = random_levels(9, 12, trits=trits)
    assert_same("packed columns", pack_levels(levels.T.contiguous(), trits), pack_levels(levels.T, trits))
    assert_same("packed slice", pack_levels(levels[:, 1::2].contiguous(), trits), pack_levels(levels[:, 1::2], trits))


def test_zero_byte_is_five_zeros():
    assert_same("zeros", torch.zeros(2, 15, dtype=torch.int8), unpack_levels(torch.zeros(2, 3, dtype=torch.uint8), 15))
    assert_same("bytes", torch.zeros(2, 3, dtype=torch.uint8), pack_levels(torch.zeros(2, 13, dtype=torch.int8)))


@pytest.mark.parametrize("trits", TRITS)
@pytest.mark.parametrize("columns", [1, 2, 4, 6, 7, 63, 128, 333])
def test_padding_digits_are_zero(columns, trits):
    packed = pack_levels(torch.full((2, columns), -largest_level(trits), dtype=torch.int8), trits)
    whole = unpack_levels(packed, packed_width(columns) * 5)
    assert (whole[:, :columns] == -largest_level(trits)).all()
    assert (whole[:, columns:] == 0).all()


def test_every_valid_byte_decodes_to_its_digits():
    packed = torch.arange(243, dtype=torch.uint8).unsqueeze(1)
    trits = unpack_levels(packed, 5)
    digits = [[{0: 0, 1: 1, 2: -1}[code // 3**j % 3] for j in range(5)] for code in range(243)]
    assert_same("digits", torch.tensor(digits, dtype=torch.int8), trits)
    assert_same("bytes", packed, pack_levels(trits))


@pytest.mark.parametrize("trits", [1, 2])
def test_bytes_that_hold_no_trits_are_counted(trits):
    spec = state_layout("momentum", 2, 10, 10, trits=trits)["T_packed"]
    assert spec.shape == (2, 2 * trits)
    assert spec.count_illegal(torch.arange(243, dtype=torch.uint8)) == 0
    for byte in range(243, 256):
        assert spec.count_illegal(torch.tensor([[0, byte], [242, 121]], dtype=torch.uint8)) == 1
    assert spec.count_illegal(torch.arange(256).to(torch.uint8)) == 13


@pytest.mark.parametrize("trits", TRITS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_unpack_levels_dtype(dtype, trits):
    levels = random_levels(3, 17, trits=trits)
    assert_same("levels", levels.to(dtype), unpack_levels(pack_levels(levels, trits), 17, dtype))


@pytest.mark.parametrize("trits", TRITS)
@pytest.mark.parametrize("rows, columns", shapes((1, 1), (5, 7), (2, 333)))
def test_gathered_rows_unpack_alone(rows, columns, trits):
    """A lookup may decode only the rows asked for."""
    levels = random_levels(rows, columns, trits=trits)
    ids = torch.randint(0, rows, (2, 3))
    assert_same("rows", levels[ids], unpack_levels(pack_levels(levels, trits)[ids], columns))
