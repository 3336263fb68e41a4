"""Groups of columns against loops, at sizes that do not divide."""

import pytest
import torch

from arb_kernels.formats.groups import group_lengths, num_groups, split_groups, spread_groups
from support.tensors import assert_same

CASES = [
    pytest.param(rows, columns, size, id=f"{rows}x{columns}-G{size}")
    for rows, columns, size in [
        (1, 1, 1),
        (1, 1, 32),
        (3, 5, 4),
        (3, 5, 5),
        (2, 8, 4),
        (4, 31, 32),
        (4, 33, 32),
        (2, 100, 6),
        (5, 257, 64),
        (2, 333, 128),
    ]
]


@pytest.mark.parametrize("rows, columns, size", CASES)
def test_num_groups_and_lengths(rows, columns, size):
    lengths = [len(range(start, min(start + size, columns))) for start in range(0, columns, size)]
    assert num_groups(columns, size) == len(lengths)
    assert_same("lengths", torch.tensor(lengths).float(), group_lengths(columns, size, torch.device("cpu")))


@pytest.mark.parametrize("rows, columns, size", CASES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_split_groups(rows, columns, size, dtype):
    matrix = torch.randint(-50, 50, (rows, columns)).to(dtype)
    before = matrix.clone()
    expected = torch.zeros(rows, -(-columns // size), size, dtype=dtype)
    for r in range(rows):
        for c in range(columns):
            expected[r, c // size, c % size] = matrix[r, c]
    assert_same("groups", expected, split_groups(matrix, size))
    assert_same("input", before, matrix)


@pytest.mark.parametrize("rows, columns, size", CASES)
def test_spread_groups(rows, columns, size):
    values = torch.randint(-128, 128, (rows, -(-columns // size)), dtype=torch.int8)
    expected = torch.tensor([[values[r, c // size].item() for c in range(columns)] for r in range(rows)])
    spread = spread_groups(values, size, columns)
    assert_same("spread", expected.to(torch.int8), spread.expand(rows, columns))


def test_spread_groups_of_a_whole_row_broadcasts():
    assert spread_groups(torch.ones(7, 1), 100, 100).shape == (7, 1)
