"""IntegerOptimizer: when weights move, what is random, what is kept, and that it learns."""

import pytest
import torch
from helpers import assert_same, random_text, training_step

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from training_arb.integer_optimizer import IntegerOptimizer
from training_arb.state_audit import state_hash

RULES = ["momentum", "flip", "correlation"]


def make(rule="momentum", seed=0, group_size=0, **settings):
    torch.manual_seed(abs(seed))
    model = ArbForCausalLM(preset_config("arb-tiny", update_rule=rule, group_size=group_size))
    return model, IntegerOptimizer(model, seed=seed, **settings)


@pytest.mark.parametrize("rule", RULES)
def test_same_seed_same_bits_other_seed_other_bits(rule):
    hashes = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = ArbForCausalLM(preset_config("arb-tiny", update_rule=rule, group_size=32))
        optimizer = IntegerOptimizer(model, seed=seed, flip_threshold=2)
        for i in range(3):
            training_step(model, optimizer, random_text(i))
        hashes.append(state_hash(model))
    assert hashes[0] == hashes[1]
    assert (hashes[0] != hashes[2]) == (rule == "momentum")  # the other rules draw no random bits


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("group_size", [0, 32], ids=["row", "G32"])
def test_every_matrix_changes_and_stays_valid(rule, group_size):
    model, optimizer = make(rule, group_size=group_size, flip_threshold=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for i in range(2):
        training_step(model, optimizer, random_text(i))
    moving = {"momentum": "accum", "flip": "T_packed", "correlation": "corr_accum"}[rule]
    after = model.state_dict()
    for name, matrix in model.ternary_matrices().items():
        assert set(matrix.trits().unique().tolist()) <= {-1, 0, 1}
        if not name.startswith("model.byte_embedding"):
            assert not torch.equal(before[f"{name}.{moving}"], after[f"{name}.{moving}"]), name
    fixed = before.keys() if rule == "correlation" else []
    for name in (name for name in fixed if name.endswith(("T_packed", ".E"))):
        assert_same(name, before[name], after[name])


@pytest.mark.parametrize(("rule", "steps", "bound"), [("momentum", 60, 2.6), ("flip", 120, 4.0)])
def test_learns_a_small_alphabet(rule, steps, bound):
    """Text of eight letters: ln 8 = 2.08 nats is the floor, ln 288 = 5.66 a uniform guess."""
    model, optimizer = make(rule, lr=0.05, flip_threshold=8)
    losses = [training_step(model, optimizer, random_text(i, rows=8)) for i in range(steps)]
    assert sum(losses[-5:]) / 5 < bound < losses[0]


def test_backward_moves_a_layer_at_once_and_a_shared_one_at_the_step():
    model, optimizer = make()
    head, shared = model.byte_head.proj, model.model.blocks[0].mlp.up_proj
    shared.shared = True
    before = {matrix: matrix.accum.clone() for matrix in (head, shared)}
    ids = random_text(0)
    model(ids, labels=ids).loss.backward()
    assert not torch.equal(before[head], head.accum)
    assert torch.equal(before[shared], shared.accum)
    optimizer.step()
    assert not torch.equal(before[shared], shared.accum)


def test_a_shared_matrix_used_twice_gets_the_sum_of_its_gradients():
    def accum(uses):
        model, optimizer = make()
        layer = model.model.blocks[0].mlp.up_proj
        layer.shared = True
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        weights = torch.randn(256, generator=torch.Generator().manual_seed(6))
        sum((layer(x * scale) @ weights).sum() for scale in uses).backward()
        optimizer.step()
        return layer.accum

    assert_same("accum", accum([2.0]), accum([1.0, 1.0]))


def test_accumulated_micro_batches_fold_first_and_move_last():
    model, optimizer = make()
    head = model.byte_head.proj
    packed = head.T_packed.clone()
    residual = head.accum & 15
    optimizer.begin_micro_batch(last=False)
    step_ids = random_text(0)
    (model(step_ids, labels=step_ids).loss / 2).backward()
    assert torch.equal(packed, head.T_packed)
    assert torch.equal(residual, head.accum & 15)
    assert (head.accum >> 4).count_nonzero() > 0
    optimizer.begin_micro_batch(last=True)
    (model(step_ids, labels=step_ids).loss / 2).backward()
    optimizer.step()
    assert not torch.equal(residual, head.accum & 15)


def test_accumulation_of_equal_halves_approximates_the_whole():
    """Two micro-batches with half the gradient each leave nearly the momentum of one whole batch."""
    from arb_kernels.exponents import QUARTERS, power_of_two
    from arb_kernels.groups import spread_groups

    def momentum(micro_batches):
        model, optimizer = make(lr=0.0)
        ids = random_text(0, rows=8)
        for i in range(micro_batches):
            optimizer.begin_micro_batch(last=i == micro_batches - 1)
            (model(ids, labels=ids).loss / micro_batches).backward()
        optimizer.step()
        up = model.model.blocks[1].mlp.up_proj
        codes = up.accum.view(torch.int8) >> 4
        return codes * spread_groups(power_of_two(up.accum_exp, QUARTERS), 64, up.columns)

    whole, halves = momentum(1), momentum(2)
    assert (whole - halves).norm() < 0.5 * whole.norm()  # both carry 4-bit rounding noise
    assert torch.nn.functional.cosine_similarity(whole.flatten(), halves.flatten(), dim=0) > 0.9


def test_non_finite_gradient_is_named_and_never_folded():
    model, optimizer = make()
    optimizer.last_checkpoint = "runs/x/checkpoint-7"
    head = model.byte_head.proj
    before = head.accum.clone()
    with pytest.raises(FloatingPointError, match=r"step 0.*byte_head\.proj.*not finite.*runs/x/checkpoint-7"):
        head(torch.full((2, 64), float("nan"), requires_grad=True)).sum().backward()
    assert torch.equal(before, head.accum)


def test_state_dict_round_trip_continues_bit_for_bit():
    model, optimizer = make()
    for i in range(2):
        training_step(model, optimizer, random_text(i))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = optimizer.state_dict()
    assert not any(isinstance(value, torch.Tensor) for value in saved.values())
    training_step(model, optimizer, random_text(2))
    resumed, other = make(seed=3)
    other.seed = 0
    resumed.load_state_dict(weights)
    other.load_state_dict(saved)
    training_step(resumed, other, random_text(2))
    assert state_hash(model) == state_hash(resumed)


def test_detach_disarms():
    model, optimizer = make()
    optimizer.detach()
    before = state_hash(model)
    training_step(model, optimizer, random_text(0))
    assert state_hash(model) == before


def test_flip_rate_is_the_share_of_changed_trits():
    model, optimizer = make(lr=0.2)
    before = torch.cat([m.trits().flatten() for m in model.ternary_matrices().values()])
    training_step(model, optimizer, random_text(0))
    after = torch.cat([m.trits().flatten() for m in model.ternary_matrices().values()])
    assert optimizer.take_flip_rate() == pytest.approx((before != after).float().mean().item())
    assert optimizer.take_flip_rate() == 0.0


def test_model_without_training_state_gets_it(tmp_path):
    model, _ = make()
    model.save_pretrained(tmp_path, training_state=False)
    loaded = ArbForCausalLM.from_pretrained(tmp_path)
    assert not loaded.config.training_state
    optimizer = IntegerOptimizer(loaded)
    assert loaded.config.training_state
    assert loaded.byte_head.proj.accum.count_nonzero() == 0
    training_step(loaded, optimizer, random_text(0))
    assert loaded.byte_head.proj.accum.count_nonzero() > 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"lr": -0.1}, "learning_rate=-0.1"),
        ({"lr": 1.5}, "learning_rate=1.5"),
        ({"beta": 1.0}, "momentum_beta=1.0"),
        ({"flip_threshold": 0}, "flip_threshold=0"),
        ({"flip_threshold": 128}, "flip_threshold=128"),
        ({"seed": -1}, "seed=-1"),
        ({"scale_update_interval": -1}, "scale_update_interval=-1"),
    ],
    ids=str,
)
def test_impossible_settings(settings, field):
    with pytest.raises(ValueError, match=field):
        make(**settings)
