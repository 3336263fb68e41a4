"""Import guard, launcher and shared device functions of the Triton kernels; importable without Triton.

The kernels give the same bits as the torch reference. That needs float operations that round one by one: no
contraction into FMAs (set in `launch`), and division and square root correctly rounded (tl.div_rn, tl.sqrt_rn).
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING

import torch

from .random_bits import GOLDEN_STEP, MIX_MULTIPLIERS

try:
    import triton
    import triton.language as tl
    from triton import knobs
except ImportError:
    if not TYPE_CHECKING:
        triton = tl = knobs = None

INTERPRETED = triton is not None and knobs.runtime.interpret
_LEAST_CAPABILITY = (8, 0)  # int8 tensor cores as the kernels use them


def _leave_uncompiled(function=None, **options):
    return function if function is not None else _leave_uncompiled


jit = triton.jit if triton is not None else _leave_uncompiled
constexpr = tl.constexpr if triton is not None else int  # a global that a kernel may read

_MULTIPLIER_1, _MULTIPLIER_2 = map(constexpr, MIX_MULTIPLIERS)
_GOLDEN = constexpr(GOLDEN_STEP)


def triton_runs_on(device: torch.device) -> bool:
    """Whether the kernels run on `device`: a GPU, or the CPU under TRITON_INTERPRET=1."""
    if triton is None or device.type != "cuda":
        return INTERPRETED and device.type == "cpu"
    return _is_capable(device)


@cache
def _is_capable(device: torch.device) -> bool:
    """Cached: every operation of every layer needs it."""
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def ceil_div(total: int, part: int) -> int:
    """The number of parts of that size that cover the total."""
    return -(-total // part)


def power_of_two_from(least: int) -> int:
    """The least power of two >= `least`, which is at least 1."""
    return 1 << (least - 1).bit_length()


def signed_word(word: int) -> int:
    """The int32 with the bits of a 32-bit word: a kernel argument of one type, whatever its value."""
    return word - (1 << 32) if word >> 31 else word


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Run a kernel on the device of its first argument, with every float operation rounded by itself.

    An argument may be a NamedTuple of tensors and numbers, whose fields the kernel reads by name.
    """
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    device = first.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, enable_fp_fusion=False, **options)


@jit
def mix(word):
    """lowbias32 of random_bits.py on uint32."""
    word = (word ^ (word >> 16)) * _MULTIPLIER_1
    word = (word ^ (word >> 15)) * _MULTIPLIER_2
    return word ^ (word >> 16)


@jit
def random_words(key, row, column):
    """int32 key, rows [R], columns [C] -> uint32 [R, C]: `random_bits` of those elements."""
    row_key = mix(row.to(tl.uint32) ^ key.to(tl.uint32, bitcast=True))
    return mix(row_key[:, None] + (column.to(tl.uint32) * _GOLDEN)[None, :])


@jit
def uniform_low(word):
    return (word & 0xFFFF).to(tl.float32) * 0.0000152587890625


@jit
def uniform_high(word):
    return (word >> 16).to(tl.float32) * 0.0000152587890625


@jit
def whole_power_of_two(octave):
    """int32 in [-126, 127] -> float32: 2^octave from its bits, as in exponents.py."""
    return ((octave + 127) << 23).to(tl.float32, bitcast=True)


@jit
def magnitude_bits(x):
    """float32 -> |x| as the int32 that orders like it, NaN above infinity: maxima then need no float comparison."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def round_half_even(x):
    """float32, |x| < 2^22: to the nearest integer. Adding 1.5 * 2^23 rounds, because floats there are spaced by one."""
    return (x + 12582912.0) - 12582912.0


@jit
def floor_to_int(x):
    """float32, |x| < 2^31 -> int32. tl.floor may take a negative number too small to be normal for zero."""
    towards_zero = x.to(tl.int32)
    return towards_zero - (x < towards_zero.to(tl.float32)).to(tl.int32)


@jit
def clamp(x, limit):
    return tl.minimum(tl.maximum(x, -limit), limit)


@jit
def cast_float(x, dtype: tl.constexpr):  # pyright: ignore[reportInvalidTypeForm]
    """float32 -> dtype, to nearest even. The interpreter truncates to bfloat16, so the value is rounded before."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@jit
def digit_of(code, plane):
    """uint8 or int32 byte of packed trits, digit number 0..4 (a compile-time or a run-time one) -> trit, int32."""
    code = code.to(tl.int32)
    power = tl.where(plane == 0, 1, tl.where(plane == 1, 3, tl.where(plane == 2, 9, tl.where(plane == 3, 27, 81))))
    digit = (code // power) % 3
    return (digit & 1) - (digit >> 1)


@jit
def level_of(code, second, plane, TRITS: tl.constexpr):
    """Level of a weight, int32, from a byte of its first plane and, with two trits, the byte below it of its second."""
    level = digit_of(code, plane)
    if TRITS == 2:
        level = 3 * level + digit_of(second, plane)
    return level
