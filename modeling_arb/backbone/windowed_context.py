"""Windowed attention: the last W positions one by one, earlier positions as blocks of s.

A block is s consecutive positions of one text and begins at a multiple of s, so padding before the text does not change
the blocks. A query sees a block's summary once the whole block has left its window. The summary's latent is the mean of
the block's, normalised again, so that kv_up_proj reads it like any other latent. Its rotary key is that of its last
position, which encodes its distance and has the same norm as other keys. Keys of a cached text then cost W + P / s rows
of kv_up_proj per byte instead of P; the cache keeps all latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from modeling_arb.layers.norm import rms_norm


class WindowedContext(NamedTuple):
    """The context of the queries of one forward, the same for all layers. S keys, N summaries."""

    start: int  # the first key that lies in any window
    block_ends: torch.Tensor  # int64 (1 or B, N): index of each block's last key; ignored where the mask hides it
    stride: int
    mask: torch.Tensor  # bool (1 or B, 1, T, N + S - start): summaries, then the keys from `start`


def key_positions(position_ids: torch.Tensor, attention_mask: torch.Tensor | None, past: int) -> torch.Tensor:
    """position_ids (B, T) of the new bytes, after `past` cached ones -> positions of all keys, (B, past + T)."""
    if attention_mask is not None and attention_mask.dim() == 2:
        before = attention_mask.long().cumsum(-1)[:, :past] - 1
    else:
        before = position_ids[:, :1] - torch.arange(past, 0, -1, device=position_ids.device)
    return torch.cat([before, position_ids.expand(len(before), -1)], dim=1)


def windowed_context(
    mask: torch.Tensor | None, positions: torch.Tensor, queries: int, window: int, stride: int
) -> WindowedContext:
    """mask (B, 1, T, S), bool or added to scores, None for plain causal; positions of the keys (1 or B, S); the last
    `queries` = T of them are the queries'. window: keys attended to one by one, the query's own included. stride 0: no
    summaries."""
    S = positions.shape[1]
    key = torch.arange(S, device=positions.device)
    query = key[-queries:, None]
    start = max(S - queries - window + 1, 0)
    visible = (key <= query)[None, None] if mask is None else mask if mask.dtype == torch.bool else mask == 0
    near = visible[..., start:] & (query - key[start:] < window)
    ends = _block_ends(positions[:, : max(S - window, 0)], stride)
    far = ends[:, None, None] <= query - window
    ends = ends.clamp(max=S - 1)
    # A masked key has the position of the key before it: of a block's keys only the first can be masked.
    far = far & torch.take_along_dim(visible, (ends - stride + 1)[:, None, None], dim=3)
    return WindowedContext(start, ends, stride, torch.cat([far, near.expand(*far.shape[:-1], -1)], dim=3))


def _block_ends(positions: torch.Tensor, stride: int) -> torch.Tensor:
    """positions (B, P) -> (B, N): indices of the last positions of all complete blocks, ascending; an index out of
    range fills rows with fewer blocks than the maximum."""
    length = positions.shape[1]
    if not stride or length < stride:
        return positions[:, :0]
    first, last = positions[:, : length - stride + 1], positions[:, stride - 1 :]
    complete = (first % stride == 0) & (last - first == stride - 1)
    index = torch.arange(stride - 1, length, device=positions.device)
    beyond = torch.iinfo(index.dtype).max
    return torch.where(complete, index, beyond).sort(dim=1).values[:, : length // stride]


def summarise_blocks(
    context: WindowedContext, latent: torch.Tensor, rotary_key: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All cached latents (B, 1, S, L) and rotary keys (B, 1, S, R) -> those that `context.mask` refers to, N + S -
    start instead of S."""
    near, near_key = latent[:, :, context.start :], rotary_key[:, :, context.start :]
    if not context.block_ends.shape[1]:
        return near, near_key
    B, _, S, _ = latent.shape
    ends = context.block_ends[:, None] + torch.arange(B, device=latent.device)[:, None, None] * S  # of B * S keys
    members = ends[..., None] - torch.arange(context.stride, device=latent.device)
    summary = rms_norm(F.embedding(members, latent.flatten(0, 2)).mean(dim=3), eps)
    key = F.embedding(ends, rotary_key.flatten(0, 2))
    return torch.cat([summary, near], dim=2), torch.cat([key, near_key], dim=2)
