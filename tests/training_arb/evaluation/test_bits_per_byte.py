"""The sliding window against scoring one position at a time."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from training_arb.evaluation.bits_per_byte import bits_per_byte


class HistoryModel(nn.Module):
    """Logits that depend on every id seen so far and on their number, so that a wrong window shows."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("table", torch.randn(288, 288, generator=generator))
        self.batches = []

    def forward(self, input_ids, use_cache):
        assert not use_cache and input_ids.dtype == torch.int64 and not torch.is_grad_enabled()
        self.batches.append(tuple(input_ids.shape))
        rows = self.table[input_ids]
        weights = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return SimpleNamespace(logits=(rows * weights).cumsum(1) / weights.square())


def slow_nats(model, ids, ctx, stride):
    """Each id after the third, alone, at the end of the one window that scores it."""
    total, ctx = 0.0, min(ctx, len(ids))
    for target in range(3, len(ids)):
        start = 0
        while start + ctx <= target:
            start += stride
        start = min(start, len(ids) - ctx)
        seen = torch.tensor([ids[start:target].tolist()])
        with torch.no_grad():
            logits = model(seen, use_cache=False).logits[0, -1].double()
        total -= (logits[ids[target]] - logits.logsumexp(0)).item()
    return total


def random_ids(length):
    return np.random.default_rng(length).integers(0, 288, length).astype(np.uint16)


@pytest.mark.parametrize("ctx, stride", [(16, 1), (16, 5), (16, 8), (16, 13), (4, 1), (64, 40), (50, 47)])
@pytest.mark.parametrize("length", [4, 5, 15, 16, 17, 50, 101])
def test_bits_per_byte(length, ctx, stride):
    ids = random_ids(length)
    found = bits_per_byte(HistoryModel(), ids, ctx, stride, batch_size=3)
    nats = slow_nats(HistoryModel(), ids, ctx, stride)
    assert found["bytes"] == length - 3
    assert found["nats_per_byte"] == pytest.approx(nats / (length - 3), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / (length - 3) / math.log(2), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_batches_change_nothing(batch_size):
    model = HistoryModel()
    found = bits_per_byte(model, random_ids(101), 16, 5, batch_size)
    assert found["nats_per_byte"] == pytest.approx(slow_nats(HistoryModel(), random_ids(101), 16, 5) / 98, rel=1e-5)
    assert max(rows for rows, _ in model.batches) == min(batch_size, 18)
    assert sum(rows for rows, _ in model.batches) == 18


def test_a_text_shorter_than_the_window_is_one_window():
    model = HistoryModel()
    bits_per_byte(model, random_ids(20), 1000, 300)
    assert model.batches == [(1, 20)]


def test_a_uniform_model_needs_log2_of_the_vocabulary():
    model = HistoryModel()
    model.table.zero_()
    found = bits_per_byte(model, random_ids(60), 16, 8)
    assert found["bits_per_byte"] == pytest.approx(math.log2(288))
    assert found["nats_per_byte"] == pytest.approx(math.log(288))


@pytest.mark.parametrize("ctx, stride", [(3, 1), (0, 0), (16, 0), (16, -1), (16, 14), (16, 16), (16, 17)])
def test_impossible_windows(ctx, stride):
    with pytest.raises(ValueError, match=f"ctx={ctx}, stride={stride}: "):
        bits_per_byte(HistoryModel(), random_ids(50), ctx, stride)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_too_little_text(length):
    with pytest.raises(ValueError, match=f"bytes={length}: "):
        bits_per_byte(HistoryModel(), random_ids(length), 16, 8)
