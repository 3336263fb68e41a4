"""Bits per byte: what a model needs to write down a text, by a sliding window."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from modeling_arb.byte_embedding import TRIGRAM


def bits_per_byte(
    model: nn.Module, ids: np.ndarray, ctx: int, stride: int, batch_size: int = 16, progress: bool = False
) -> dict[str, float]:
    """Mean cross-entropy of next-id prediction over `ids` (n,), n > 3.

    Windows of `ctx` ids start every `stride`; each scores what the one before did not, so every id but the first three
    is scored once, with at least ctx - stride ids before it (3 with stride = ctx - 3). Returns bits_per_byte,
    nats_per_byte and the number of scored ids, as `bytes`.
    """
    if not ctx > TRIGRAM or not 0 < stride <= ctx - TRIGRAM:
        raise ValueError(f"ctx={ctx}, stride={stride}: need ctx > {TRIGRAM} and 0 < stride <= ctx - {TRIGRAM}")
    if len(ids) <= TRIGRAM:
        raise ValueError(f"bytes={len(ids)}: more than {TRIGRAM} are needed to score any")
    ctx = min(ctx, len(ids))
    last = len(ids) - ctx
    windows = [min(start, last) for start in range(0, last + stride, stride)]
    device = next(iter([*model.parameters(), *model.buffers()])).device
    nats, scored, reached = 0.0, 0, TRIGRAM
    for first in tqdm(range(0, len(windows), batch_size), desc="evaluating", disable=not progress):
        begins = windows[first : first + batch_size]
        block = np.stack([ids[begin : begin + ctx] for begin in begins]).astype(np.int64)
        block = torch.from_numpy(block).to(device)
        with torch.no_grad():
            logits = model(block, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), block[:, 1:], reduction="none").double()
        for begin, row in zip(begins, losses, strict=True):
            new = row[reached - begin - 1 :]  # row[i] is the loss of id begin + i + 1
            nats += new.sum().item()
            scored += len(new)
            reached = begin + ctx
    assert scored == len(ids) - TRIGRAM
    return {"bits_per_byte": nats / scored / math.log(2), "nats_per_byte": nats / scored, "bytes": scored}
