"""Bits per byte of a model on a text, with sliding windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from modeling_arb.backbone.byte_embedding import TRIGRAM


class ScoredIds(NamedTuple):
    """ids (n,). Those from index `first` on are scored; the ones before are context."""

    ids: np.ndarray
    first: int


class Window(NamedTuple):
    """ids[begin:end] of a sequence; those from index `reached` on are scored."""

    sequence: int
    begin: int
    end: int
    reached: int


def bits_per_byte(
    model: nn.Module, ids: np.ndarray, ctx: int, stride: int, batch_size: int = 16, progress: bool = False
) -> dict[str, float]:
    """Mean cross-entropy of next-id prediction over `ids` (n,), n > 3: one stream of bytes, as training packs it.

    Every id but the first three is scored once, with at least ctx - stride ids before it (3 with stride = ctx - 3).
    Returns bits_per_byte, nats_per_byte and the number of scored ids, as `bytes`.
    """
    check_windows(ctx, stride, TRIGRAM)
    if len(ids) <= TRIGRAM:
        raise ValueError(f"bytes={len(ids)}: more than {TRIGRAM} are needed to score any")
    (nats,) = sequence_nats(model, [ScoredIds(ids, TRIGRAM)], ctx, stride, batch_size, progress)
    return per_byte(nats, len(ids) - TRIGRAM)


def per_byte(nats: float, size: int) -> dict[str, float]:
    """bits_per_byte and nats_per_byte of `size` bytes, and their number as `bytes`."""
    return {"bits_per_byte": nats / size / math.log(2), "nats_per_byte": nats / size, "bytes": size}


def check_windows(ctx: int, stride: int, context: int) -> None:
    """Raises ValueError unless windows of `ctx` every `stride` leave at least `context` ids before a scored one."""
    if not ctx > context or not 0 < stride <= ctx - context:
        raise ValueError(f"ctx={ctx}, stride={stride}: need ctx > {context} and 0 < stride <= ctx - {context}")


def sequence_nats(
    model: nn.Module,
    sequences: Sequence[ScoredIds],
    ctx: int,
    stride: int,
    batch_size: int = 16,
    progress: bool = False,
) -> list[float]:
    """The cost of each sequence's scored ids in nats: the sum of -log p(id | the ids before it in its window).

    Windows of `ctx` ids start every `stride`, and the last begins ctx ids before the end. Each window scores the ids
    that the one before did not. Windows of all sequences share batches, longest first; shorter ones are padded on the
    right, which a causal model does not read. Raises FloatingPointError when a loss is not finite.
    """
    windows = [
        window for number, sequence in enumerate(sequences) for window in plan_windows(number, sequence, ctx, stride)
    ]
    windows.sort(key=lambda window: window.begin - window.end)
    device = next(iter([*model.parameters(), *model.buffers()])).device
    nats = [0.0] * len(sequences)
    for start in tqdm(range(0, len(windows), batch_size), desc="evaluating", disable=None if progress else True):
        batch = windows[start : start + batch_size]
        ids, mask = _stack([sequences[window.sequence].ids[window.begin : window.end] for window in batch])
        padding = {} if mask.all() else {"attention_mask": mask.to(device)}
        ids = ids.to(device)
        with torch.no_grad():
            logits = model(ids, use_cache=False, **padding).logits
        losses = []
        for window, row, targets in zip(batch, logits, ids, strict=True):
            scored = slice(window.reached - window.begin, window.end - window.begin)
            predicting = row[scored.start - 1 : scored.stop - 1].float()  # (scored, vocabulary)
            losses.append(F.cross_entropy(predicting, targets[scored], reduction="none").double().sum())
        for window, loss in zip(batch, torch.stack(losses).tolist(), strict=True):
            nats[window.sequence] += loss
    if not all(map(math.isfinite, nats)):
        raise FloatingPointError(f"the model's loss is {sum(nats)}: its logits are not finite")
    return nats


def plan_windows(number: int, sequence: ScoredIds, ctx: int, stride: int) -> list[Window]:
    """The windows of sequence `number`, in order; empty if nothing is scored."""
    size, reached = len(sequence.ids), sequence.first
    if size <= reached:
        return []
    last, windows = max(size - ctx, 0), []
    for start in range(0, last + stride, stride):
        begin = min(start, last)
        windows.append(Window(number, begin, min(begin + ctx, size), reached))
        reached = windows[-1].end
    return windows


def _stack(rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 (B, T), zeros after a row's end, and int64 (B, T): 1 where ids are the row's own."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
