"""The bounded edge list against a dictionary in plain Python."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arb_kernels.blocks.edge_routing import decay_scores, incoming_edges, merge_edges
from support.tensors import assert_same

NAMES = ("src", "dst", "sign", "score")
CASES = [
    pytest.param(*case, id="motifs{}-capacity{}-pairs{}".format(*case))
    for case in [(1, 1, 3), (5, 64, 40), (5, 7, 40), (32, 64, 200), (32, 64, 0), (10_000_000, 50, 90)]
]


def no_edges(capacity):
    ends = torch.full((capacity,), -1, dtype=torch.int32)
    return ends, ends.clone(), torch.zeros(capacity, dtype=torch.int8), torch.zeros(capacity, dtype=torch.int8)


def random_pairs(motifs, count):
    """Some pairs often, ids up to the largest."""
    pairs = torch.randint(0, motifs, (count, 2))
    return pairs[(torch.rand(count) ** 2 * count).long()], torch.randint(0, 2, (count,), dtype=torch.int8) * 2 - 1


def as_dict(edges):
    """(dst, src) -> (score, sign) of the valid edges."""
    src, dst, sign, score = (tensor.tolist() for tensor in edges)
    return {(d, s): (n, g) for s, d, g, n in zip(src, dst, sign, score, strict=True) if s != -1}


def as_tensors(edges, capacity):
    ranked = sorted(edges.items(), key=lambda edge: (-edge[1][0], edge[0]))[:capacity]
    ranked.sort(key=lambda edge: (edge[0][0], -edge[1][0], edge[0][1]))
    out = no_edges(capacity)
    for slot, ((dst, src), (score, sign)) in enumerate(ranked):
        for tensor, value in zip(out, (src, dst, sign, score), strict=True):
            tensor[slot] = value
    return out


def naive_merge(edges, pairs, pair_sign, capacity):
    merged = as_dict(edges)
    seen = [(dst, src) for src, dst in pairs.tolist()]
    votes = Counter()
    for edge, sign in zip(seen, pair_sign.tolist(), strict=True):
        votes[edge] += sign
    for edge, count in Counter(seen).items():
        score = min(127, merged.get(edge, (0, 0))[0] + count)
        merged[edge] = (score, 1 if votes[edge] >= 0 else -1)
    return as_tensors(merged, capacity)


def assert_same_edges(ref, out):
    for name, expected, tensor in zip(NAMES, ref, out, strict=True):
        assert_same(name, expected, tensor)


@pytest.mark.parametrize("motifs, capacity, count", CASES)
def test_merge_edges(motifs, capacity, count):
    edges = no_edges(capacity)
    for _ in range(5):
        pairs, sign = random_pairs(motifs, count)
        given = [tensor.clone() for tensor in edges]
        merged = merge_edges(*edges, pairs, sign, motifs, capacity)
        assert_same_edges(naive_merge(edges, pairs, sign, capacity), merged)
        assert_same_edges(given, edges)
        edges = merged


@pytest.mark.parametrize("motifs, capacity, count", CASES)
def test_the_order_of_pairs_does_not_matter(motifs, capacity, count):
    start = merge_edges(*no_edges(capacity), *random_pairs(motifs, count), motifs, capacity)
    pairs, sign = random_pairs(motifs, count)
    expected = merge_edges(*start, pairs, sign, motifs, capacity)
    for _ in range(3):
        order = torch.randperm(count)
        assert_same_edges(expected, merge_edges(*start, pairs[order], sign[order], motifs, capacity))


def test_scores_stop_at_127_and_the_strongest_edges_stay():
    pairs = torch.tensor([[0, 1]] * 200 + [[3, 0]] * 2 + [[2, 0]] * 2 + [[1, 0]] + [[0, 2]] * 5)
    src, dst, _, score = merge_edges(*no_edges(3), pairs, torch.ones(len(pairs), dtype=torch.int8), 4, 3)
    # (2 -> 0) and (3 -> 0) have the same score: the smaller key stays
    assert (src.tolist(), dst.tolist(), score.tolist()) == ([2, 0, 0], [0, 1, 2], [2, 127, 5])


def test_an_edge_takes_the_sign_of_most_of_its_latest_pairs():
    def merged(edges, *signs):
        pairs = torch.ones(len(signs), 2, dtype=torch.int64)
        return merge_edges(*edges, pairs, torch.tensor(signs, dtype=torch.int8), 2, 4)

    edges = merged(no_edges(4), -1, -1, 1)
    assert edges[2][0] == -1
    assert merged(edges)[2][0] == -1
    assert merged(edges, 1, -1)[2][0] == 1


def test_decay_scores():
    edges = no_edges(40)
    for _ in range(4):
        edges = merge_edges(*edges, *random_pairs(9, 30), 9, 40)
    for _ in range(30):
        kept = {edge: (score - 1, sign) for edge, (score, sign) in as_dict(edges).items() if score > 1}
        edges = decay_scores(*edges)
        assert_same_edges(as_tensors(kept, 40), edges)
    assert_same_edges(no_edges(40), edges)


@pytest.mark.parametrize("neighbours", [1, 3, 100])
@pytest.mark.parametrize("motifs, capacity, count", CASES)
def test_incoming_edges_strongest_first(motifs, capacity, count, neighbours):
    edges = merge_edges(*no_edges(capacity), *random_pairs(motifs, count), motifs, capacity)
    known = as_dict(edges)
    ids = torch.cat([torch.randint(0, motifs, (20,)), edges[1][edges[1] >= 0].long()])
    index, mask = incoming_edges(edges[1], ids, neighbours)
    assert index.shape == mask.shape == (len(ids), neighbours) and index.dtype == torch.int64
    assert index.min() >= 0 and index.max() < capacity
    for motif, row, valid in zip(ids.tolist(), index, mask, strict=True):
        into = sorted(((-score, src) for (dst, src), (score, _) in known.items() if dst == motif))
        assert edges[0][row[valid]].tolist() == [src for _, src in into[:neighbours]]
        assert (edges[1][row[valid]] == motif).all()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation inside gave."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.most = max(self.most, *sizes, 0)
        return out


def test_memory_goes_by_edges_and_pairs_not_by_motifs():
    motifs, capacity, count = 10_000_000, 300, 500
    pairs, sign = random_pairs(motifs, count)
    with LargestTensor() as largest:
        edges = decay_scores(*merge_edges(*no_edges(capacity), pairs, sign, motifs, capacity))
        incoming_edges(edges[1], pairs[:, 1], 8)
    assert 0 < largest.most <= 8 * (capacity + count)
