"""A bounded list of directed edges between motifs: integers only, and never a (motif x motif) tensor.

An edge is src int32, dst int32, sign int8 and score int8, in four tensors (A,). Valid edges come first, in the order
(dst, falling score, src), so that one search finds a motif's incoming edges, strongest first; empty slots have src =
dst = -1. All operations sort unique keys dst * num_motifs + src and add integers: a result depends on which pairs were
seen and how often, not on their order or the device. Counting, decay and eviction follow the "space saving" sketch
(Metwally et al. 2005).
"""

from __future__ import annotations

import torch

Edges = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

MAX_SCORE = 127
EMPTY = -1
_AFTER_ALL = torch.iinfo(torch.int32).max


def _fill_slots(src: torch.Tensor, dst: torch.Tensor, sign: torch.Tensor, score: torch.Tensor, slots: int) -> Edges:
    """The edges in their dtypes, then empty slots."""
    spare = slots - len(src)
    ends = [tensor.to(torch.int32).new_full((spare,), EMPTY) for tensor in (src, dst)]
    zeros = torch.zeros(spare, dtype=torch.int8, device=src.device)
    return (
        torch.cat([src.to(torch.int32), ends[0]]),
        torch.cat([dst.to(torch.int32), ends[1]]),
        torch.cat([sign.to(torch.int8), zeros]),
        torch.cat([score.to(torch.int8), zeros]),
    )


def merge_edges(
    src: torch.Tensor,
    dst: torch.Tensor,
    sign: torch.Tensor,
    score: torch.Tensor,
    pairs: torch.Tensor,
    pair_sign: torch.Tensor,
    num_motifs: int,
    capacity: int,
) -> Edges:
    """Count the pairs (src, dst), int64 (P, 2) with pair_sign int8 (P,) in {-1, 1}, into the list's scores.

    Scores stop at 127. An edge in the pairs takes the majority sign of its pairs (+1 on a tie); other edges keep their
    sign. Beyond `capacity`, edges with the lowest scores are dropped, among equal scores those with the larger key
    (dst, src). Returns four new tensors, (capacity,). Needs memory for A + P keys.
    """
    valid = src != EMPTY
    keys, place = torch.unique(
        torch.cat([dst[valid].long() * num_motifs + src[valid], pairs[:, 1] * num_motifs + pairs[:, 0]]),
        return_inverse=True,
    )
    old, new = place.split([len(place) - len(pairs), len(pairs)])
    zeros = torch.zeros_like(keys)
    counts = zeros.index_add(0, new, torch.ones_like(new))
    votes = zeros.index_add(0, new, pair_sign.long())
    sign = torch.where(counts > 0, 1 - 2 * (votes < 0).long(), zeros.index_add(0, old, sign[valid].long()))
    score = counts.index_add(0, old, score[valid].long()).clamp(max=MAX_SCORE)
    kept = score.argsort(descending=True, stable=True)[:capacity]  # stable: falling scores, then rising keys
    kept = kept[(keys[kept] // num_motifs).argsort(stable=True)]
    return _fill_slots(keys[kept] % num_motifs, keys[kept] // num_motifs, sign[kept], score[kept], capacity)


def decay_scores(src: torch.Tensor, dst: torch.Tensor, sign: torch.Tensor, score: torch.Tensor) -> Edges:
    """Subtract one from all scores and drop the edges that reach zero. Returns four new tensors in the same order."""
    kept = score > 1
    return _fill_slots(src[kept], dst[kept], sign[kept], score[kept] - 1, len(src))


def incoming_edges(dst: torch.Tensor, ids: torch.Tensor, neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the edges into the motifs `ids`, int64 (N,): index int64 and mask bool, (N, neighbours).

    If a motif has more edges than `neighbours`, those with the highest scores. Where the mask is False, the index is
    arbitrary.
    """
    ordered = torch.where(dst == EMPTY, _AFTER_ALL, dst)
    ids = ids.to(torch.int32)
    first = torch.searchsorted(ordered, ids)
    end = torch.searchsorted(ordered, ids, right=True)
    index = first[:, None] + torch.arange(neighbours, device=dst.device)
    return index.clamp(max=len(dst) - 1), index < end[:, None]
