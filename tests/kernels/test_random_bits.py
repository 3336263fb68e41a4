"""The counter-based hash against Python's arbitrary-precision integers, and its statistics."""

import itertools
import math

import pytest
import torch

from arb_kernels.random_bits import random_bits, stream_key, uniform_from_high_bits, uniform_from_low_bits
from support.tensors import assert_same

WORD = 2**32
KEYS = (0, 1, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF)


def lowbias32(x):
    """C. Wellons' mixer on unsigned words."""
    x = (x ^ x // 2**16) * 0x7FEB352D % WORD
    x = (x ^ x // 2**15) * 0x846CA68B % WORD
    return x ^ x // 2**16


def slow_key(*counters):
    key = 0
    for counter in counters:
        for word in (counter % WORD, counter // WORD):
            key = (lowbias32(key ^ word) + 0x9E3779B9) % WORD
    return key


def slow_bits(key, rows, columns):
    """Rows of unsigned words."""
    return [[lowbias32((lowbias32(r ^ key) + c * 0x9E3779B9) % WORD) for c in range(columns)] for r in range(rows)]


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1].abs().item()


@pytest.mark.parametrize("key", KEYS, ids=hex)
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 70), (41, 5)])
def test_random_bits(key, rows, columns):
    words = torch.tensor(slow_bits(key, rows, columns))
    signed = torch.where(words >= WORD // 2, words - WORD, words).to(torch.int32)
    assert_same("bits", signed, random_bits(key, rows, columns))


@pytest.mark.parametrize("key", KEYS, ids=hex)
def test_uniforms(key):
    words = torch.tensor(slow_bits(key, 7, 9))
    bits = random_bits(key, 7, 9)
    assert_same("low", (words % 2**16).float() / 2**16, uniform_from_low_bits(bits))
    assert_same("high", (words // 2**16).float() / 2**16, uniform_from_high_bits(bits))


@pytest.mark.parametrize(
    "counters",
    [(0,), (1, 2, 3, 4), (0, 0, 0, 0), (2**32 - 1, 7), (2**32, 7), (2**40 + 5, 2**63, 3)],
    ids=lambda counters: "-".join(map(hex, counters)),
)
def test_stream_key(counters):
    key = stream_key(*counters)
    assert key == slow_key(*counters)
    assert 0 <= key < WORD


def test_random_bits_are_deterministic():
    assert_same("bits", random_bits(12345, 30, 40), random_bits(12345, 30, 40))


def test_random_bits_of_an_element_do_not_depend_on_the_shape():
    assert_same("corner", random_bits(9, 50, 60)[:7, :11].contiguous(), random_bits(9, 7, 11))


@pytest.mark.parametrize("position", range(4), ids=["seed", "step", "micro-batch", "tensor-id"])
@pytest.mark.parametrize("value", [2, 3, 2**31, 2**32, 2**32 + 1, 2**63], ids=hex)
def test_stream_key_sees_every_counter(position, value):
    counters = [1, 1, 1, 1]
    counters[position] = value
    changed = random_bits(stream_key(*counters), 64, 64)
    same = (changed == random_bits(stream_key(1, 1, 1, 1), 64, 64)).sum().item()
    assert same <= 1  # 4096 elements, each equal by chance once in 2^32


def test_stream_keys_do_not_collide():
    """20,000 keys among 2^32: 0.05 collisions expected."""
    keys = [stream_key(*counters) for counters in itertools.product(range(10), range(100), range(4), range(5))]
    assert len(keys) - len(set(keys)) <= 1
    assert stream_key(1, 2) != stream_key(2, 1)


@pytest.mark.parametrize("uniform", [uniform_from_low_bits, uniform_from_high_bits])
@pytest.mark.parametrize("key", [0, 1, 0xDEADBEEF], ids=hex)
def test_uniforms_are_uniform(uniform, key):
    """Mean, variance and each sixteenth of [0, 1), within five standard errors over 1e6 draws."""
    draws = uniform(random_bits(key, 1000, 1000)).double()
    n = draws.numel()
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - (0.5 - 2**-17)) < 5 * math.sqrt(1 / 12 / n)
    assert abs(draws.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    shares = torch.histc(draws, 16, 0, 1) / n
    assert (shares - 1 / 16).abs().max() < 5 * math.sqrt(1 / 16 * 15 / 16 / n)


@pytest.mark.parametrize("key", [0, 1, 0xDEADBEEF], ids=hex)
def test_every_bit_is_fair(key):
    bits = random_bits(key, 1000, 1000)
    for position in range(32):
        ones = ((bits >> position) & 1).double().mean().item()
        assert abs(ones - 0.5) < 5 * 0.5 / 1000, f"bit {position}"


@pytest.mark.parametrize("key", [0, 1, 0xDEADBEEF], ids=hex)
def test_halves_and_neighbours_are_uncorrelated(key):
    bits = random_bits(key, 1000, 1000)
    low, high = uniform_from_low_bits(bits), uniform_from_high_bits(bits)
    bound = 5 / 1000
    assert correlation(low, high) < bound
    for half in (low, high):
        assert correlation(half[1:], half[:-1]) < bound
        assert correlation(half[:, 1:], half[:, :-1]) < bound


def test_neighbouring_steps_are_uncorrelated():
    steps = [uniform_from_low_bits(random_bits(stream_key(0, step, 0, 77), 300, 300)) for step in range(6)]
    for a, b in itertools.combinations(steps, 2):
        assert correlation(a, b) < 5 / 300
