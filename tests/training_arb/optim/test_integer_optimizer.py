"""IntegerOptimizer: when weights move, what is random, what is kept, and that it learns."""

import pytest
import torch

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.tensors import assert_same, random_text, training_step
from training_arb.memory.state_audit import state_hash
from training_arb.optim.integer_optimizer import IntegerOptimizer

RULES = ["momentum", "flip", "correlation"]


def make(rule="momentum", seed=0, group_size=0, trits=1, **settings):
    torch.manual_seed(abs(seed))
    config = preset_config("arb-tiny", update_rule=rule, group_size=group_size, trits_per_weight=trits)
    model = ArbForCausalLM(config)
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


@pytest.mark.parametrize("rule, trits", [*((rule, 1) for rule in RULES), ("momentum", 2)])
@pytest.mark.parametrize("group_size", [0, 32], ids=["row", "G32"])
def test_every_matrix_changes_and_stays_valid(rule, trits, group_size):
    model, optimizer = make(rule, group_size=group_size, trits=trits, flip_threshold=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for i in range(2):
        training_step(model, optimizer, random_text(i))
    moving = {"momentum": "accum", "flip": "T_packed", "correlation": "corr_accum"}[rule]
    after = model.state_dict()
    for name, matrix in model.ternary_matrices().items():
        assert matrix.levels().abs().max() == matrix.largest_level == (3**trits - 1) / 2
        assert matrix.layout()["T_packed"].count_illegal(matrix.T_packed) == 0
        if not name.startswith("model.byte_embedding"):
            assert not torch.equal(before[f"{name}.{moving}"], after[f"{name}.{moving}"]), name
    fixed = before.keys() if rule == "correlation" else []
    for name in (name for name in fixed if name.endswith(("T_packed", ".E"))):
        assert_same(name, before[name], after[name])


@pytest.mark.parametrize(
    ("rule", "trits", "steps", "bound"), [("momentum", 1, 60, 2.6), ("momentum", 2, 60, 2.6), ("flip", 1, 120, 4.0)]
)
def test_learns_a_small_alphabet(rule, trits, steps, bound):
    """Text of eight letters: ln 8 = 2.08 nats is the floor, ln 288 = 5.66 a uniform guess."""
    model, optimizer = make(rule, trits=trits, lr=0.05, flip_threshold=8)
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


class KeepGradients:
    """A rule that moves nothing and keeps what it was given."""

    def __init__(self, names):
        self.names, self.given = names, {}

    def update(self, matrix, dW, context):
        self.given.setdefault(self.names[matrix], []).append(dW.clone())
        return torch.zeros((), dtype=torch.int64)


def make_keeping(preset="arb-tiny", **config):
    """A model whose matrices keep their gradients, and the rule that has them by name."""
    torch.manual_seed(0)
    model = ArbForCausalLM(preset_config(preset, compute="float", **config))
    optimizer = IntegerOptimizer(model)
    optimizer.rule = KeepGradients({matrix: name for name, matrix in model.ternary_matrices().items()})
    return model, optimizer, optimizer.rule.given


def assert_same_gradients(expected, found, ratio):
    assert expected.keys() == found.keys()
    for name, (whole,) in expected.items():
        (summed,) = found[name]
        assert (summed - whole).norm() < ratio * whole.norm(), name


@pytest.mark.parametrize("rule", RULES)
def test_an_early_micro_batch_changes_no_persistent_state(rule):
    model, optimizer = make(rule, flip_threshold=1)
    before = state_hash(model)
    ids = random_text(0)
    optimizer.begin_micro_batch(last=False)
    (model(ids, labels=ids).loss / 2).backward()
    assert state_hash(model) == before
    optimizer.begin_micro_batch(last=True)
    (model(ids, labels=ids).loss / 2).backward()
    optimizer.step()
    assert state_hash(model) != before


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_hand_over_the_gradient_of_the_whole_batch(micro_batches):
    """Of other bytes each, and once to each matrix."""
    ids = random_text(0, rows=8)

    def gradients(parts):
        model, optimizer, given = make_keeping()
        for i, part in enumerate(ids.chunk(parts)):
            optimizer.begin_micro_batch(last=i == parts - 1)
            (model(part, labels=part).loss / parts).backward()
        optimizer.step()
        return given

    assert_same_gradients(gradients(1), gradients(micro_batches), ratio=0.05)


def test_sums_take_one_byte_a_weight_and_live_only_between_micro_batches():
    model, optimizer = make()
    ids = random_text(0)

    def sums():
        return sum(tensor.nbytes for total in optimizer._sums.values() for tensor in total)

    def backward(last):
        optimizer.begin_micro_batch(last=last)
        model(ids, labels=ids).loss.backward()

    backward(last=True)
    assert sums() == 0
    optimizer.step()
    backward(last=False)
    weights = sum(matrix.logical_weights for matrix in model.ternary_matrices().values())
    assert weights <= sums() <= weights * 1.04  # an exponent for 64 weights; rows of this model are short
    backward(last=True)
    assert sums() == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_their_backwards_give_the_sum(checkpointing):
    """One backward of two losses (DPO), and two backwards after both forwards."""
    halves = random_text(0, rows=8).chunk(2)

    def gradients(run):
        model, optimizer, given = make_keeping()
        if checkpointing:
            model.train().activation_checkpointing_enable()
        run(model)
        optimizer.step()
        return given

    def loss(model, ids):
        return model(ids, labels=ids).loss / 2

    def one_backward(model):
        (loss(model, halves[0]) + loss(model, halves[1])).backward()

    def two_backwards(model):
        for each in [loss(model, ids) for ids in halves]:
            each.backward()

    def whole(model):
        ids = torch.cat(halves)
        (loss(model, ids) * 2).backward()

    expected = gradients(whole)
    for run in (one_backward, two_backwards):
        assert_same_gradients(expected, gradients(run), ratio=0.05)


def test_a_graph_that_never_comes_back_delays_an_update_to_the_step():
    ids = random_text(0)
    model, optimizer, given = make_keeping()
    forgotten = model(ids, labels=ids).loss
    model(ids, labels=ids).loss.backward()
    assert not given
    optimizer.step()
    assert forgotten.requires_grad
    whole, optimizer, expected = make_keeping()
    whole(ids, labels=ids).loss.backward()
    optimizer.step()
    assert_same_gradients(expected, given, ratio=0.05)


def test_a_second_backward_in_a_step_is_refused_by_name():
    """A plain accumulation loop: the second micro-batch would move weights that the first has moved."""
    model, _ = make()
    ids = random_text(0)
    (model(ids, labels=ids).loss / 2).backward()
    loss = model(ids, labels=ids).loss / 2
    with pytest.raises(RuntimeError, match=r"^byte_head\.proj: .* step 0.*begin_micro_batch\(last=False\)"):
        loss.backward()


@pytest.mark.parametrize("rule", ["momentum", "flip"])
def test_a_graph_of_older_weights_is_refused_by_name(rule):
    model, optimizer = make(rule, lr=0.5, flip_threshold=1)
    ids = random_text(0)
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^byte_head\.proj: its weights changed between a forward and its backward"):
        loss.backward()
    optimizer.step()
    late = model(ids, labels=ids).loss
    training_step(model, optimizer, ids)
    with pytest.raises(RuntimeError, match=r"^byte_head\.proj: its weights changed"):
        late.backward()


def test_a_retained_graph_gives_its_gradient_twice_where_nothing_moves_between():
    model, optimizer, given = make_keeping()
    ids = random_text(0)
    optimizer.begin_micro_batch(last=False)
    loss = model(ids, labels=ids).loss / 2
    loss.backward(retain_graph=True)
    loss.backward()
    assert not given
    optimizer.step()
    whole, optimizer, expected = make_keeping()
    whole(ids, labels=ids).loss.backward()
    assert_same_gradients(expected, given, ratio=0.05)


def test_a_matrix_that_only_an_early_micro_batch_uses_moves_too():
    model, optimizer, given = make_keeping(video_head={"latent_dim": 4})
    ids = random_text(0)
    optimizer.begin_micro_batch(last=False)
    model(ids, labels=ids, video_targets=torch.randn(*ids.shape, 4)).loss.backward()
    optimizer.begin_micro_batch(last=True)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert given.keys() == model.ternary_matrices().keys()


def test_zero_grad_drops_what_was_summed():
    model, optimizer = make()
    ids = random_text(0)
    before = state_hash(model)
    optimizer.begin_micro_batch(last=False)
    model(ids, labels=ids).loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    assert state_hash(model) == before


def test_accumulated_steps_learn_as_whole_ones():
    """Eight micro-batches of one row against one batch of eight: within 2 % of its loss after 30 steps."""

    def loss(parts):
        torch.manual_seed(0)
        model = ArbForCausalLM(preset_config("arb-tiny"))
        optimizer = IntegerOptimizer(model, lr=0.05)
        losses = []
        for step in range(30):
            ids = random_text(step, rows=8, ctx=16)
            losses.append(0.0)
            for i, part in enumerate(ids.chunk(parts)):
                optimizer.begin_micro_batch(last=i == parts - 1)
                part_loss = model(part, labels=part).loss / parts
                part_loss.backward()
                losses[-1] += part_loss.item()
            optimizer.step()
        return sum(losses[-10:]) / 10

    assert loss(8) == pytest.approx(loss(1), rel=0.02)


def test_non_finite_gradient_is_named_and_never_folded():
    model, optimizer = make()
    optimizer.last_checkpoint = "runs/x/checkpoint-7"
    head = model.byte_head.proj
    before = head.accum.clone()
    with pytest.raises(FloatingPointError, match=r"step 0.*byte_head\.proj.*not finite.*runs/x/checkpoint-7"):
        head(torch.full((2, 64), float("nan"), requires_grad=True)).sum().backward()
    assert torch.equal(before, head.accum)


@pytest.mark.parametrize("trits", [1, 2])
def test_state_dict_round_trip_continues_bit_for_bit(trits):
    model, optimizer = make(trits=trits)
    for i in range(2):
        training_step(model, optimizer, random_text(i))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = optimizer.state_dict()
    assert not any(isinstance(value, torch.Tensor) for value in saved.values())
    training_step(model, optimizer, random_text(2))
    resumed, other = make(seed=3, trits=trits)
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
    before = torch.cat([m.levels().flatten() for m in model.ternary_matrices().values()])
    training_step(model, optimizer, random_text(0))
    after = torch.cat([m.levels().flatten() for m in model.ternary_matrices().values()])
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
