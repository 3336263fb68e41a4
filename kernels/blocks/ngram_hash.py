"""Slots of hashed keys: n-grams of bytes, pairs of motifs, sign patterns. Integers only, so all backends agree."""

from __future__ import annotations

import torch

_MULTIPLIER = 0x2545F4914F6CDD1D  # of xorshift64* (Vigna 2016); products wrap in int64
_MASK63 = (1 << 63) - 1


def mix_bits(words: torch.Tensor) -> torch.Tensor:
    """int64 (...) -> int64 (...): every bit of the result depends on every bit of the argument."""
    words = words * _MULTIPLIER
    words = words ^ (words >> 32 & 0xFFFFFFFF)
    words = words * _MULTIPLIER
    return words ^ (words >> 29 & (1 << 35) - 1)


def hash_tokens(tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """int64 (..., n) -> int64 (...): order matters, and so does the number of tokens."""
    state = torch.full_like(tokens[..., 0], seed + 1)
    for i in range(tokens.shape[-1]):
        state = mix_bits(state ^ (tokens[..., i] + 1))
    return state


def to_slot(words: torch.Tensor, slots: int) -> torch.Tensor:
    """int64 (...) -> int64 (...) in [0, slots)."""
    return (words & _MASK63) % slots


def ngram_slots(ids: torch.Tensor, order: int, slots: int) -> torch.Tensor:
    """ids int64 (B, order - 1 + T) -> int64 (B, T): the slot of the `order` ids that end at each of the last T."""
    return to_slot(hash_tokens(ids.unfold(1, order, 1), order), slots)
