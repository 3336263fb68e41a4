"""MoEGraph: against one position at a time, causality, gradients, and what only a step may change."""

import pytest
import torch

from configuration_arb import preset_config
from modeling_arb.blocks.lti_injection import lti_injection
from modeling_arb.blocks.moe_graph import MoEGraph
from modeling_arb.layers.integer_state import IntegerState, ObservedState
from modeling_arb.layers.ternary_matrix import TernaryMatrix
from modeling_arb.pretrained import ArbPreTrainedModel
from support.gradients import Sink
from support.tensors import assert_same
from training_arb.memory.state_audit import state_hash
from training_arb.optim.integer_optimizer import IntegerOptimizer

MOTIFS, DIM, D = 32, 8, 64


class Toy(ArbPreTrainedModel):
    """The block alone, as a model."""

    def __init__(self, config):
        super().__init__(config)
        self.moe_graph = MoEGraph(config)
        self.post_init()

    def forward(self, *args):
        return self.moe_graph(*args)


def make(**options):
    moe_graph = {"num_experts": 4, "active_edges": 64, **options}
    return Toy(preset_config("arb-tiny", codebook={"size": MOTIFS, "dim": DIM}, moe_graph=moe_graph)).train()


@pytest.fixture
def rows():
    table = torch.randn(MOTIFS, DIM)
    return lambda ids: table[ids]


def inputs(batch=2, length=11):
    return torch.randn(batch, length, D), torch.randint(0, MOTIFS, (batch, length))


@torch.enable_grad()
def with_edges(model, rows):
    """A few steps' worth of edges."""
    graph = model.moe_graph.motif_graph
    graph.observing = True
    for _ in range(3):
        graph(inputs(4, 40)[1], rows)
    graph.apply_observations(*graph.take_observations(), key=0)
    graph.observing = False
    return model


def naive(model, x, motif_ids, rows):
    """One position at a time, everything written out."""
    block = model.moe_graph
    out, ponder = torch.zeros_like(x), []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            e = x[b, t] + block.message_proj(block.motif_graph(motif_ids[b : b + 1, t : t + 1], rows))[0, 0]
            h, spent, total = e, 0.0, 0.0
            for n in range(1, block.max_iterations + 1):
                h = 0.9 * h + (1 - 0.9) * e + block.experts(h[None])[0]
                p = block.halting_probability(h[None])[0]
                if spent + p >= 0.99 or n == block.max_iterations:
                    break
                total, spent = total + p * h, spent + p
            out[b, t] = total + (1 - spent) * h - x[b, t]
            ponder.append(n + 1 - spent)
    return out, torch.as_tensor(ponder).mean()


@torch.no_grad()
def test_each_position_as_if_it_were_alone(rows):
    model = with_edges(make(), rows)
    x, motif_ids = inputs()
    expected, expected_ponder = naive(model, x, motif_ids, rows)
    out, ponder = model(x, motif_ids, rows)
    assert_same("addition", expected, out)
    assert_same("ponder", expected_ponder, ponder)
    without = model(x)[0]
    assert (out - without).abs().max() > 1e-3  # the messages arrive


@torch.no_grad()
def test_cached_decoding_gives_the_same_bits(rows):
    model = with_edges(make(), rows).eval()
    x, motif_ids = inputs()
    whole, _ = model(x, motif_ids, rows)
    steps = [model(x[:, t : t + 1], motif_ids[:, t : t + 1], rows)[0] for t in range(x.shape[1])]
    assert torch.equal(whole, torch.cat(steps, dim=1))


def test_no_position_sees_a_later_one(rows):
    model = with_edges(make(), rows)
    for module in model.modules():
        if isinstance(module, ObservedState):
            module.observing = True
    x, motif_ids = inputs()
    before = state_hash(model)
    first, _ = model(x, motif_ids, rows)
    later_x, later_ids = x.clone(), motif_ids.clone()
    later_x[:, 6:], later_ids[:, 6:] = torch.randn(2, 5, D), torch.randint(0, MOTIFS, (2, 5))
    second, _ = model(later_x, later_ids, rows)
    assert torch.equal(first[:, :6], second[:, :6])
    assert not torch.equal(first[:, 6:], second[:, 6:])
    assert state_hash(model) == before


@pytest.mark.parametrize("grouped", [False, True], ids=["looped", "grouped"])
def test_every_matrix_gets_a_finite_gradient(rows, grouped):
    model = with_edges(make(), rows)
    model.moe_graph.experts.grouped = grouped
    seen = {}
    for name, matrix in model.ternary_matrices().items():
        matrix.gradient_sink = Sink(lambda _, dW, name=name: seen.__setitem__(name, seen.get(name, 0) + dW))
    x, motif_ids = inputs(4, 30)
    x.requires_grad_()
    addition, ponder = model(x, motif_ids, rows)
    (addition.square().mean() + 0.01 * ponder).backward()
    assert seen.keys() == model.ternary_matrices().keys()
    for name, dW in {"x": x.grad, **seen}.items():
        assert dW.isfinite().all() and dW.any(), name


def test_only_the_ponder_cost_reaches_the_halting_unit_where_states_do_not_matter():
    model = make(active_edges=0)
    seen = []
    model.moe_graph.halting.gradient_sink = Sink(lambda _, dW: seen.append(dW.clone()))
    model(inputs()[0].requires_grad_())[1].backward()
    assert sum(dW.abs().sum() for dW in seen) > 0


def test_about_two_iterations_at_the_start():
    iterations = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = make()
        calls = []
        model.moe_graph.experts.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(len(args[0])))
        model(torch.randn(8, 64, D))
        assert len(calls) <= 4 and calls[0] == 512
        iterations.append(sum(calls) / 512)
    assert sum(iterations) / 8 == pytest.approx(2, abs=0.3), iterations


def test_max_iterations_one_is_one_injected_step():
    model = make(max_iterations=1)
    x = inputs()[0]
    addition, ponder = model(x)
    flat = x.flatten(0, 1)
    expected = lti_injection(flat, flat, model.moe_graph.experts(flat), 0.9).view_as(x) - x
    assert torch.equal(expected, addition)
    assert ponder == 2  # one iteration and a remainder of one


def test_lti_injection_forgets_its_start_and_keeps_its_source():
    state, source = torch.randn(5, D), torch.randn(5, D)
    for _ in range(200):
        state = lti_injection(state, source, torch.zeros(()), 0.9)
    assert_same("state", source, state)
    once = lti_injection(*torch.tensor([[4.0], [8.0], [1.0]]), 0.75)
    assert_same("one step", torch.tensor([0.75 * 4 + 0.25 * 8 + 1]), once)


def test_without_edges_there_is_no_graph():
    model = make(active_edges=0)
    assert not any("motif_graph" in name or "message_proj" in name for name in model.integer_states())
    assert model(*inputs(), None)[0].isfinite().all()


def test_state_is_integer():
    model = make()
    assert not any(tensor.is_floating_point() for tensor in [*model.parameters(), *model.buffers()])
    assert all(isinstance(module, IntegerState) for module in model.integer_states().values())
    looped = [name for name, matrix in model.ternary_matrices().items() if matrix.shared]
    assert len(looped) == 4 * 2 + 2 and "moe_graph.message_proj" not in looped


def test_bfloat16_activations(rows):
    model = with_edges(make(), rows)
    x, motif_ids = inputs()
    addition, ponder = model(x.bfloat16(), motif_ids, rows)
    assert (addition.dtype, ponder.dtype) == (torch.bfloat16, torch.float32)


def test_a_step_applies_what_was_observed_and_two_runs_agree(rows):
    hashes = []
    for _ in range(2):
        torch.manual_seed(3)
        model = make()
        optimizer = IntegerOptimizer(model)
        for _ in range(3):
            block = model.moe_graph
            edges, bias = block.motif_graph.active_edge_score.clone(), block.experts.expert_bias.clone()
            x, motif_ids = inputs(4, 30)
            addition, ponder = model(x.requires_grad_(), motif_ids, rows)
            (addition.square().mean() + 0.01 * ponder).backward()
            assert torch.equal(edges, block.motif_graph.active_edge_score)
            assert torch.equal(bias, block.experts.expert_bias)
            optimizer.step()
            assert not torch.equal(edges, block.motif_graph.active_edge_score)
            assert not torch.equal(bias, block.experts.expert_bias)
        hashes.append(state_hash(model))
    assert hashes[0] == hashes[1]


def test_it_learns_a_map(rows):
    """Rotate x and take its sign: the error falls by half."""
    model = make()
    optimizer = IntegerOptimizer(model, lr=0.05)
    rotation = torch.linalg.qr(torch.randn(D, D))[0]
    losses = []
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 60)
        x, motif_ids = inputs(8, 32)
        addition, ponder = model(x.requires_grad_(), motif_ids, rows)
        error = (addition - (x @ rotation).sign().detach()).square().mean()
        (error + 0.01 * ponder).backward()
        optimizer.step()
        losses.append(error.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0], losses


@pytest.mark.parametrize("training_state", [True, False])
def test_checkpoint_round_trip(training_state, rows, tmp_path):
    model = with_edges(make(), rows).eval()
    model.save_pretrained(tmp_path, training_state=training_state)
    loaded = Toy.from_pretrained(tmp_path).eval()
    x, motif_ids = inputs()
    with torch.no_grad():
        assert torch.equal(model(x, motif_ids, rows)[0], loaded(x, motif_ids, rows)[0])
    assert hasattr(loaded.moe_graph.motif_graph, "edge_steps") == training_state
    loaded.add_training_state()
    matrices = [module for module in loaded.modules() if isinstance(module, TernaryMatrix)]
    assert all(hasattr(matrix, name) for matrix in matrices for name in matrix.layout())
