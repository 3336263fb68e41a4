"""MotifGraph: messages against a loop over positions and edges; when and what it learns."""

import pytest
import torch

from configuration_arb import preset_config
from modeling_arb.blocks.motif_graph import DECAY_EVERY, EDGE_TENSORS, MotifGraph
from support.tensors import assert_same

MOTIFS, DIM = 32, 8


def make_graph(motifs=MOTIFS, edges=64, **options):
    moe_graph = {"num_experts": 4, "active_edges": edges, **options}
    graph = MotifGraph(preset_config("arb-tiny", codebook={"size": motifs, "dim": DIM}, moe_graph=moe_graph))
    graph.reset_state()
    graph.observing = True
    return graph.train()


def learn(graph, motif_ids, rows):
    graph(motif_ids, rows)
    graph.apply_observations(*graph.take_observations(), key=0)


@pytest.fixture
def table():
    return torch.randint(-1, 2, (MOTIFS, DIM)) * torch.rand(MOTIFS, 1)


@pytest.fixture
def rows(table):
    return lambda ids: table[ids]


def naive_messages(graph, motif_ids, table):
    edges = list(zip(*(tensor.tolist() for tensor in graph.edges()), strict=True))
    out = torch.zeros(*motif_ids.shape, DIM)
    for b, row in enumerate(motif_ids.tolist()):
        for t, motif in enumerate(row):
            into = sorted((-score, src, sign) for src, dst, sign, score in edges if src >= 0 and dst == motif)
            into = into[: graph.neighbours]
            for falling, src, sign in into:
                out[b, t] += sign * -falling / 127 * table[src] / len(into)
    return out


@pytest.mark.parametrize("neighbours", [1, 3, 50])
def test_messages_are_the_mean_over_incoming_edges(neighbours, table, rows):
    graph = make_graph(neighbours=neighbours)
    for _ in range(3):
        learn(graph, torch.randint(0, 12, (4, 17)), rows)
    motif_ids = torch.randint(0, MOTIFS, (2, 15))
    expected = naive_messages(graph, motif_ids, table)
    assert expected.count_nonzero() and (expected == 0).all(-1).any()
    messages = graph(motif_ids, rows)
    assert_same("messages", expected, messages)
    assert not messages.requires_grad


def test_a_fresh_graph_says_nothing(rows):
    graph = make_graph()
    assert graph.active_edge_src.eq(-1).all() and graph.active_edge_dst.eq(-1).all()
    assert not graph(torch.randint(0, MOTIFS, (2, 5)), rows).any()


def test_rows_give_messages_their_dtype(table):
    graph = make_graph()
    ids = torch.randint(0, MOTIFS, (2, 5))
    learn(graph, ids, lambda ids: table[ids])
    assert graph(ids, lambda ids: table[ids].bfloat16()).dtype == torch.bfloat16


def test_what_is_observed(table, rows):
    graph = make_graph()
    motif_ids = torch.tensor([[1, 2, 2], [5, 1, 2]])
    learn(graph, motif_ids, rows)
    valid = graph.active_edge_src >= 0
    src, dst, sign, score = (tensor[valid].tolist() for tensor in graph.edges())
    assert list(zip(src, dst, score, strict=True)) == [(5, 1, 1), (1, 2, 2), (2, 2, 1)]  # nothing across rows
    agreement = (table[src].sign() * table[dst].sign()).sum(1)
    assert sign == [1 if dot >= 0 else -1 for dot in agreement.tolist()]


def test_signs_come_in_both_kinds():
    table = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.5, -0.5]])
    graph = make_graph()
    learn(graph, torch.tensor([[0, 1, 2, 0]]), lambda ids: table[ids])
    assert graph.active_edge_attr[:3].tolist() == [1, -1, 1]  # (2 -> 0), (0 -> 1), (1 -> 2)


def test_signs_go_by_trits_whatever_their_scales():
    table = torch.tensor([[1.0, 4.0], [1.0, -4.0]])  # groups of one: the trits agree once and disagree once
    graph = make_graph()
    learn(graph, torch.tensor([[0, 1]]), lambda ids: table[ids])
    assert graph.active_edge_attr[0] == 1


def test_edges_move_only_when_observations_are_applied(rows):
    graph = make_graph()
    motif_ids = torch.randint(0, MOTIFS, (2, 9))
    before = [tensor.clone() for tensor in graph.edges()]
    graph(motif_ids, rows)
    for name, ref, out in zip(EDGE_TENSORS, before, graph.edges(), strict=True):
        assert_same(name, ref, out)
    graph.apply_observations(*graph.take_observations(), key=0)
    assert not torch.equal(before[0], graph.active_edge_src)


@pytest.mark.parametrize("how", ["eval", "no_grad", "detached"])
def test_only_training_observes(how, rows):
    graph = make_graph()
    graph.train(how != "eval")
    graph.observing = how != "detached"
    with torch.set_grad_enabled(how != "no_grad"):
        graph(torch.randint(0, MOTIFS, (2, 9)), rows)
    assert graph.take_observations() is None


def test_a_message_depends_on_no_later_motif(rows):
    graph = make_graph()
    learn(graph, torch.randint(0, MOTIFS, (4, 30)), rows)
    motif_ids = torch.randint(0, MOTIFS, (2, 12))
    later = motif_ids.clone()
    later[:, 7:] = torch.randint(0, MOTIFS, (2, 5))
    assert torch.equal(graph(motif_ids, rows)[:, :7], graph(later, rows)[:, :7])


def test_micro_batches_in_any_order_leave_the_same_edges(rows):
    batches = [torch.randint(0, MOTIFS, (2, 20)) for _ in range(3)]

    def edges(order):
        graph = make_graph(edges=16)
        for i in order:
            graph(batches[i], rows)
        graph.apply_observations(*graph.take_observations(), key=0)
        return graph.edges()

    for name, ref, out in zip(EDGE_TENSORS, edges([0, 1, 2]), edges([2, 0, 1]), strict=True):
        assert_same(name, ref, out)


def test_unseen_edges_fade_also_across_a_checkpoint(rows):
    graph = make_graph()
    learn(graph, torch.tensor([[3, 4, 3]]), rows)
    idle = torch.tensor([[7, 7]])
    for step in range(2, DECAY_EVERY + 1):
        assert ((graph.active_edge_src == 3) & (graph.active_edge_dst == 4)).any(), step
        if step == DECAY_EVERY // 2:
            resumed = make_graph()
            resumed.load_state_dict(graph.state_dict())
            graph = resumed
        learn(graph, idle, rows)
    assert set(graph.active_edge_src.tolist()) == {7, -1}
    assert graph.active_edge_score.max() == DECAY_EVERY - 2


def test_ten_million_motifs_cost_what_the_edges_cost():
    graph = make_graph(motifs=10_000_000, edges=1000)
    tensors = {**dict(graph.named_buffers()), **dict(graph.named_parameters())}
    assert set(tensors) == {*EDGE_TENSORS, "edge_steps"}
    assert not any(tensor.is_floating_point() for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) == 1000 * 10 + 8
    motif_ids = torch.randint(0, 10_000_000, (2, 300))
    motif_ids[:, ::2] = torch.tensor([9_999_999, 9_999_998]).repeat(75)

    def rows(ids):
        assert ids.numel() <= 600 * graph.neighbours
        return ids[..., None].expand(*ids.shape, DIM).float().remainder(3) - 1

    for _ in range(2):
        learn(graph, motif_ids, rows)
    assert graph.active_edge_dst.max() == 9_999_999
    assert graph(motif_ids, rows).any()


def test_inference_goes_without_the_step_counter():
    spec = make_graph().layout()
    assert [name for name in spec if spec[name].inference] == list(EDGE_TENSORS)
    assert [spec[name].dtype for name in EDGE_TENSORS] == [torch.int32, torch.int32, torch.int8, torch.int8]
