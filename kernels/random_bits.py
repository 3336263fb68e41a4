"""Counter-based random bits: a pure integer hash of (seed, step, tensor id, row, column).

There is no generator state: a run, its resume and another rank draw the same bits for the same element. The mixer is
lowbias32 (C. Wellons, "Prospecting for Hash Functions"), 32-bit arithmetic with wrap-around, so that torch, Triton
and C++ agree bit for bit.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
MIX_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
GOLDEN_STEP = 0x9E3779B9


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return word - (1 << 32) if word & 0x80000000 else word


def _mix_word(word: int) -> int:
    word ^= word >> 16
    word = word * MIX_MULTIPLIERS[0] & _MASK
    word ^= word >> 15
    word = word * MIX_MULTIPLIERS[1] & _MASK
    return word ^ (word >> 16)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """The same mixer over int32 (...), in place. `>>` is arithmetic on int32, so the shifted-in sign bits are
    masked."""
    words ^= (words >> 16) & 0xFFFF
    words *= _signed(MIX_MULTIPLIERS[0])
    words ^= (words >> 15) & 0x1FFFF
    words *= _signed(MIX_MULTIPLIERS[1])
    words ^= (words >> 16) & 0xFFFF
    return words


def stream_key(*counters: int) -> int:
    """One 32-bit key from integers in [0, 2^64), for example (seed, step, micro-batch, tensor id)."""
    key = 0
    for counter in counters:
        assert 0 <= counter < 1 << 64
        for word in (counter & _MASK, counter >> 32):
            key = (_mix_word(key ^ word) + GOLDEN_STEP) & _MASK
    return key


def random_bits_of_rows(key: int, row_ids: torch.Tensor, columns: int) -> torch.Tensor:
    """row_ids int (R,) -> int32 (R, columns): those rows of a stream of 32 random bits an element."""
    row_keys = _mix(row_ids.int() ^ _signed(key))
    steps = torch.arange(columns, dtype=torch.int32, device=row_ids.device) * _signed(GOLDEN_STEP)
    return _mix(row_keys[:, None] + steps)


def random_bits(key: int, rows: int, columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int32 (rows, columns): 32 random bits for each element of a stream."""
    return random_bits_of_rows(key, torch.arange(rows, dtype=torch.int32, device=device), columns)


def uniform_from_low_bits(bits: torch.Tensor) -> torch.Tensor:
    """float32 multiples of 2^-16 in [0, 1) from the low half of each word."""
    return (bits & 0xFFFF).float().mul_(2.0**-16)


def uniform_from_high_bits(bits: torch.Tensor) -> torch.Tensor:
    """float32 multiples of 2^-16 in [0, 1) from the high half of each word, independent of the low half."""
    return ((bits >> 16) & 0xFFFF).float().mul_(2.0**-16)
