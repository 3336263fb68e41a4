"""Tables and exponent searches against exact rational arithmetic."""

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch

from arb_kernels.formats.exponents import fixed_point_scale, power_of_two, quarter_octaves_covering
from support.tensors import assert_same

SMALLEST_NORMAL = 2.0**-126
LARGEST = (2 - 2.0**-23) * 2.0**127


def exact(value):
    return Fraction(float(value))


def covers(exponent, square):
    """2^(exponent / 4) >= sqrt(square), raised to the fourth power."""
    return Fraction(2) ** int(exponent) >= exact(square) ** 2


def power_error(value, exponent, steps):
    """|value / 2^(exponent / steps) - 1|, in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        return abs(Decimal(float(value)) / Decimal(2) ** (Decimal(int(exponent)) / steps) - 1)


@pytest.mark.parametrize("steps", [4, 8])
def test_power_of_two_is_correctly_rounded(steps):
    exponents = torch.arange(-128, 128).to(torch.int8)
    powers = power_of_two(exponents, steps)
    assert powers.dtype == torch.float32
    above = torch.nextafter(powers, torch.full_like(powers, torch.inf))
    below = torch.nextafter(powers, torch.zeros_like(powers))
    for e, value, up, down in zip(exponents, powers, above, below, strict=True):
        error = power_error(value, e, steps)
        assert error <= power_error(up, e, steps) and error <= power_error(down, e, steps), f"2^({e}/{steps})"


@pytest.mark.parametrize("steps", [4, 8])
def test_power_of_two_shifts_by_octaves_exactly(steps):
    """Scale invariance of the rules rests on it."""
    exponents = torch.arange(-128, 128 - steps)
    assert torch.equal(power_of_two(exponents + steps, steps), 2 * power_of_two(exponents, steps))


def test_power_of_two_keeps_the_shape():
    exponents = torch.randint(-128, 128, (3, 4, 5), dtype=torch.int8)
    powers = power_of_two(exponents, 4)
    assert_same("powers", torch.exp2(exponents.float() / 4), powers)


def test_quarter_octaves_covering_is_the_least():
    squares = torch.exp2(torch.empty(4000).uniform_(-60, 60))
    exponents = quarter_octaves_covering(squares)
    assert exponents.dtype == torch.int8
    for square, exponent in zip(squares, exponents, strict=True):
        assert covers(exponent, square), f"{exponent} is too small for {square.item()!r}"
        assert not covers(exponent - 1, square), f"{exponent} is not the least for {square.item()!r}"


def test_quarter_octaves_covering_around_every_power():
    """At 2^(e/2) rounded to float32 and at both neighbours, where one bit decides."""
    powers = torch.tensor([2.0 ** (e / 2) for e in range(-126, 127)])
    above = torch.nextafter(powers, torch.full_like(powers, torch.inf))
    below = torch.nextafter(powers, torch.zeros_like(powers))
    for squares in (powers, above, below):
        for square, exponent in zip(squares, quarter_octaves_covering(squares), strict=True):
            assert covers(exponent, square) and not covers(exponent - 1, square), square.item()


@pytest.mark.parametrize("exponent", range(-63, 64))
def test_quarter_octaves_covering_an_exact_power(exponent):
    assert quarter_octaves_covering(torch.tensor(2.0**exponent)).item() == 2 * exponent


@pytest.mark.parametrize(
    "square, exponent",
    [
        pytest.param(0.0, -127, id="zero"),
        pytest.param(2.0**-149, -127, id="denormal"),
        pytest.param(SMALLEST_NORMAL, -127, id="smallest-normal"),
        pytest.param(2.0**-64, -127, id="below-the-range"),
        pytest.param(2.0**-63, -126, id="low-end"),
        pytest.param(2.0**63, 126, id="high-end"),
        pytest.param(2.0**64, 127, id="above-the-range"),
        pytest.param(LARGEST, 127, id="largest"),
        pytest.param(float("inf"), 127, id="infinity"),
    ],
)
def test_quarter_octaves_covering_saturates(square, exponent):
    assert quarter_octaves_covering(torch.tensor([square])).tolist() == [exponent]


@pytest.mark.parametrize("bits", [1, 15, 20])
def test_fixed_point_scale_range(bits):
    """A power of two that brings `absmax` into the top octave below 2^bits."""
    for absmax in torch.exp2(torch.empty(300).uniform_(-100, 100)):
        scale = fixed_point_scale(absmax, bits)
        assert torch.frexp(scale)[0] == 0.5
        assert 2 ** (bits - 1) <= exact(absmax) * exact(scale) <= 2**bits


@pytest.mark.parametrize("octave", range(-110, 127, 9))
def test_fixed_point_scale_of_an_exact_power(octave):
    assert fixed_point_scale(torch.tensor(2.0**octave), 15).item() == 2.0 ** (14 - octave)


@pytest.mark.parametrize("absmax", [0.0, 2.0**-149, SMALLEST_NORMAL, 1e-38, 1e38, LARGEST], ids=str)
def test_fixed_point_scale_stays_finite(absmax):
    scale = fixed_point_scale(torch.tensor(absmax), 15)
    assert SMALLEST_NORMAL <= scale <= 2.0**126
    assert exact(scale) * exact(absmax) <= 2**15


def test_fixed_point_scale_of_zero_is_one():
    assert fixed_point_scale(torch.tensor(0.0), 15).item() == 1.0
