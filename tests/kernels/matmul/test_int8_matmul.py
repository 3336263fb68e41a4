"""int8 matmul: exact sums at any shape, through every instruction set, and the same floats behind the scales."""

import os
import subprocess
import sys

import pytest
import torch

from arb_kernels.backend import instruction_set, use_backend
from arb_kernels.matmul.int8_matmul import ANY_INT8, EXACT_SUM, _cuda_sums, int8_matmul
from support.tensors import BACKENDS, NOT_BUILT, random_trits, shapes

SIZES = shapes(
    (1, 1, 1),
    (9, 5, 1),
    (9, 1, 5),
    (1, 9, 5),
    (5, 17, 3),
    (12, 32, 64),
    (13, 33, 66),
    (100, 47, 129),
    (7, 517, 51),
    (493, 31, 40),
)
LARGEST = pytest.mark.parametrize("largest", [1, 4, 13, ANY_INT8])  # of one, two and three trits; of codes


def operands(R, C, K, largest=ANY_INT8):
    rows = torch.randint(-127, 128, (R, K), dtype=torch.int8)
    columns = torch.randint(max(-largest, -127), min(largest, 127) + 1, (C, K), dtype=torch.int8)
    return rows, columns, torch.rand(R) + 0.5, torch.rand(C) + 0.5


@pytest.mark.parametrize("instructions", ["best", "avx2"])
@LARGEST
@pytest.mark.parametrize("R, C, K", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_matmul(monkeypatch, backend, R, C, K, largest, instructions):
    monkeypatch.setenv("ARB_ISA", instructions)
    rows, columns, row_scale, column_scale = operands(R, C, K, largest)
    sums = (rows.double() @ columns.double().T).float()
    with use_backend(backend):
        scaled = int8_matmul(rows, columns, row_scale, column_scale, largest=largest)
        assert torch.equal(scaled, sums * row_scale[:, None] * column_scale)
        transposed = int8_matmul(rows, columns.T.contiguous(), row_scale, transposed=True, largest=largest)
        assert torch.equal(transposed, sums * row_scale[:, None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_at_the_edge_of_the_codes(backend):
    """All codes at -128 or 127: the unsigned operand's offset comes off exactly."""
    rows = torch.full((3, 1000), -128, dtype=torch.int8)
    columns = torch.full((2, 1000), 127, dtype=torch.int8)
    columns[1] = -128
    with use_backend(backend):
        out = int8_matmul(rows, columns, torch.ones(3))
    assert torch.equal(out, torch.tensor([-128.0 * 127 * 1000, 128.0 * 128 * 1000]).expand(3, 2))


@pytest.mark.parametrize("instructions", ["best", "avx2"])
@LARGEST
@pytest.mark.parametrize("backend", BACKENDS)
def test_full_scale_codes(monkeypatch, backend, largest, instructions):
    """All codes at +-127 and columns as large as they may be, where sums of two products leave 16 bits; seeds of one
    sign and of both, odd shapes, and more columns than float32 sums exactly."""
    monkeypatch.setenv("ARB_ISA", instructions)
    exact = EXACT_SUM // (ANY_INT8 * max(largest, 4))  # one trit takes another path
    shapes = ((9, 5, 7), (48, 48, 333), (5, 9, 2 * exact + 77), (5, 1, exact + 1))
    for seed in range(12):
        R, C, K = shapes[seed % len(shapes)]
        rows, columns = (torch.rand(size, K) < (0.5 if seed % 3 else 1.0) for size in (R, C))
        rows, columns = (
            torch.where(sign, most, -most).to(torch.int8) for sign, most in ((rows, 127), (columns, min(largest, 127)))
        )
        sums = (rows.double() @ columns.double().T).float()
        with use_backend(backend):
            assert torch.equal(int8_matmul(rows, columns, torch.ones(R), largest=largest), sums)
            transposed = columns.T.contiguous()
            assert torch.equal(int8_matmul(rows, transposed, torch.ones(R), transposed=True, largest=largest), sums)


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_cpus_without_vnni(isa):
    """oneDNN's int8 GEMM saturates there; the setting is read when torch is imported, so in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "full_scale or edge"]
    done = subprocess.run(command, env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_sums_are_exact_in_mixed_precision(backend, precision):
    rows, columns, row_scale, column_scale = operands(40, 30, 1500)
    expected = (rows.double() @ columns.double().T).float() * row_scale[:, None] * column_scale
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(int8_matmul(rows, columns, row_scale, column_scale), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@NOT_BUILT
def test_every_thread_count_gives_the_same_bits():
    rows, columns, row_scale, column_scale = operands(700, 300, 129)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = int8_matmul(rows, columns, row_scale, column_scale)
        torch.set_num_threads(3)
        assert torch.equal(one, int8_matmul(rows, columns, row_scale, column_scale))
    finally:
        torch.set_num_threads(threads)


def test_the_lesser_instruction_set_can_be_forced(monkeypatch):
    monkeypatch.setenv("ARB_ISA", "avx2")
    assert instruction_set() <= 1


@pytest.mark.parametrize("by_row", [True, False], ids=["by row", "transposed"])
@pytest.mark.parametrize("R, K, C", shapes((1, 1, 1), (17, 16, 16), (33, 100, 47), (40, 64, 96)))
def test_the_operands_that_a_gpu_gets(monkeypatch, R, K, C, by_row):
    """cuBLAS wants more than 16 rows, round sizes, rows row by row and columns column by column."""
    seen, multiply = [], torch._int_mm

    def spy(left, right):
        seen.append((left.is_contiguous() and right.T.is_contiguous(), *left.shape, right.shape[1]))
        return multiply(left, right)

    monkeypatch.setattr(torch, "_int_mm", spy)
    rows, columns = torch.randint(-127, 128, (R, K), dtype=torch.int8), random_trits(K, C)
    columns = columns if by_row else columns.T.contiguous().T
    assert torch.equal(_cuda_sums(rows, columns).double(), rows.double() @ columns.double())
    ((contiguous, seen_rows, seen_depth, seen_columns),) = seen
    assert contiguous and seen_rows > 16 and seen_depth % 16 == 0 and seen_columns % 16 == 0
