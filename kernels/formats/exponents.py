"""Exponents in fractions of an octave, and scale arithmetic that gives the same bits on every backend.

Powers of two come from tables of correctly rounded float32 constants instead of exp2. The inverse, the least exponent
that covers a value, compares mantissa bits instead of taking a logarithm.
"""

from __future__ import annotations

from functools import cache

import torch

EIGHTHS = 8
QUARTERS = 4
SQRT_HALF = 0.5**0.5
HALF_OCTAVE_FRACTION = 0x3504F3  # the fraction bits of float32(SQRT_HALF)


@cache
def power_table(steps_per_octave: int, device: torch.device) -> torch.Tensor:
    """float32 (256,): 2^(e / steps_per_octave) for e in -128..127."""
    return torch.tensor([2.0 ** (e / steps_per_octave) for e in range(-128, 128)], device=device)


def power_of_two(exponent: torch.Tensor, steps_per_octave: int) -> torch.Tensor:
    """int8 (...) -> float32 (...): 2^(exponent / steps_per_octave)."""
    return power_table(steps_per_octave, exponent.device)[exponent.int() + 128]


def quarter_octaves_covering(square: torch.Tensor) -> torch.Tensor:
    """float32 (...) >= 0 -> int8 (...): the least e in [-127, 127] with 2^(e / 4) >= sqrt(square).

    sqrt(square) = 2^(e/4) means square = 2^(e/2): two steps an octave of the square; its mantissa selects the step.
    """
    mantissa, octave = torch.frexp(square)  # square = mantissa * 2^octave, mantissa in [0.5, 1)
    half_octaves = 2 * (octave - 1) + (mantissa > 0.5).int() + (mantissa > SQRT_HALF).int()
    half_octaves = torch.where(square > 0, half_octaves, -127).masked_fill(square.isinf(), 127)
    return half_octaves.clamp(-127, 127).to(torch.int8)


def octave_scale(octave: torch.Tensor) -> torch.Tensor:
    """int32 (...) in [-126, 127] -> float32 (...): 2^octave, built from its bits: ldexp calls pow, which may be
    inexact."""
    return ((octave + 127) << 23).view(torch.float32)


def fixed_point_scale(absmax: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 (...) -> float32 (...): the power of two that brings values up to `absmax` into [-2^bits, 2^bits]."""
    _, octave = torch.frexp(absmax)
    shift = torch.where(absmax > 0, bits - octave, 0).clamp(-126, 126)
    return octave_scale(shift.int())
