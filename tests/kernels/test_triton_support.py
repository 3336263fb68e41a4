"""What the Triton kernels share: the random bits and roundings of the reference, and life without triton."""

import os
import subprocess
import sys

import pytest
import torch

from arb_kernels.random_bits import random_bits, uniform_from_high_bits, uniform_from_low_bits
from arb_kernels.triton_support import (
    cast_float,
    floor_to_int,
    jit,
    launch,
    power_of_two_from,
    random_words,
    round_half_even,
    signed_word,
    tl,
    triton_runs_on,
    uniform_high,
    uniform_low,
)
from support.tensors import assert_same, shapes

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from pathlib import Path
import arb_kernels.triton_support as support
for path in Path(support.__file__).parent.glob("*_triton.py"):
    __import__(f"arb_kernels.{path.stem}")
assert not support.triton_runs_on(torch.device("cpu")) and not support.triton_runs_on(torch.device("cuda"))
"""


@jit(do_not_specialize=["key"])
def random_kernel(words_ptr, low_ptr, high_ptr, key, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    row, column = tl.arange(0, BR), tl.arange(0, BC)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    address = row[:, None] * columns + column[None, :]
    words = random_words(key, row, column)
    tl.store(words_ptr + address, words.to(tl.int32, bitcast=True), mask=mask)
    tl.store(low_ptr + address, uniform_low(words), mask=mask)
    tl.store(high_ptr + address, uniform_high(words), mask=mask)


@jit
def round_kernel(x_ptr, even_ptr, floor_ptr, bfloat16_ptr, count, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0)
    tl.store(even_ptr + i, round_half_even(x), mask=i < count)
    tl.store(floor_ptr + i, floor_to_int(x), mask=i < count)
    tl.store(bfloat16_ptr + i, cast_float(x, tl.bfloat16), mask=i < count)


@pytest.mark.parametrize("key", [0, 1, 16, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], ids=hex)
@pytest.mark.parametrize("rows, columns", shapes((1, 1), (5, 33)))
def test_random_words(triton_device, rows, columns, key):
    words = torch.empty(rows, columns, dtype=torch.int32, device=triton_device)
    low, high = (torch.empty(rows, columns, device=triton_device) for _ in range(2))
    launch(random_kernel, (1,), words, low, high, signed_word(key), rows, columns, BR=8, BC=64)
    bits = random_bits(key, rows, columns, triton_device)
    assert_same("words", bits, words)
    assert torch.equal(uniform_from_low_bits(bits), low) and torch.equal(uniform_from_high_bits(bits), high)


def test_roundings(triton_device):
    x = torch.tensor([0.5, 1.5, -0.5, -1.5, 2.4999, -2.5001, 1e-45, -1e-45, -3.0, 32767.5, -0.0], device=triton_device)
    x = torch.cat([x, torch.randn(400, device=triton_device) * 1000])
    even, floor = torch.empty_like(x), torch.empty_like(x, dtype=torch.int32)
    bfloat16 = torch.empty_like(x, dtype=torch.bfloat16)
    launch(round_kernel, (1,), x, even, floor, bfloat16, len(x), B=512)
    assert torch.equal(x.round(), even)
    assert_same("floor", x.floor().int(), floor)
    assert torch.equal(x.bfloat16(), bfloat16)


def test_no_number_stays_none_in_bfloat16(triton_device):
    x = torch.tensor([float("nan"), float("inf"), -float("inf")], device=triton_device)
    even, floor = torch.empty_like(x), torch.empty_like(x, dtype=torch.int32)
    bfloat16 = torch.empty_like(x, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning) if triton_device.type == "cpu" else torch.no_grad():
        launch(round_kernel, (1,), x, even, floor, bfloat16, len(x), B=4)
    assert bfloat16.isnan().tolist() == [True, False, False] and torch.equal(x[1:].bfloat16(), bfloat16[1:])


@pytest.mark.parametrize("word", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], ids=hex)
def test_signed_word(word):
    assert -(2**31) <= signed_word(word) < 2**31 and signed_word(word) % 2**32 == word


def test_power_of_two_from():
    assert [power_of_two_from(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def test_triton_runs_on(triton_device):
    assert triton_runs_on(triton_device)
    assert not triton_runs_on(torch.device("meta"))


def test_every_module_imports_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_interpreter_the_cpu_is_left_alone(triton_device):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = (
        "import torch\nfrom arb_kernels.triton_support import triton_runs_on\n"
        "assert not triton_runs_on(torch.device('cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
