"""Several ranks: the same bits on all, averages on their way during backward, what differs is named."""

import pytest
import torch

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from modeling_arb.layers.ternary_table import TernaryTable
from support.ranks import on_ranks
from training_arb.memory.state_audit import state_hash
from training_arb.optim.integer_optimizer import IntegerOptimizer
from training_arb.ranks.rank_exchange import (
    check_ranks_agree,
    join_ranks,
    lone_process_warning,
    share_out,
    used_on_any_rank,
)

RANKS = 3


def exchange(rank):
    mine = (torch.full((rank, 2), rank), torch.arange(rank)) if rank else None
    joined = join_ranks(mine, torch.device("cpu"))
    used = used_on_any_rank([rank == 1, False, rank == 2], torch.device("cpu"))
    return [tensor.tolist() for tensor in joined], used, join_ranks(None, torch.device("cpu"))


def test_uneven_tensors_are_joined_in_rank_order(tmp_path):
    for joined, used, nothing in on_ranks(RANKS, exchange, tmp_path):
        assert joined == [[[1, 1], [2, 2], [2, 2]], [0, 0, 1]]
        assert used == [True, False, True] and nothing is None


def train(rank, preset, rule, micro_batches):
    """A few steps on other bytes on each rank, one of which also has fewer of them."""
    torch.manual_seed(0)
    model = ArbForCausalLM(preset_config(preset, update_rule=rule))
    optimizer = IntegerOptimizer(model, table_threshold=2, rank_check_steps=1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        for micro_batch in range(micro_batches):
            optimizer.begin_micro_batch(last=micro_batch == micro_batches - 1)
            ids = torch.randint(97, 110, (1 + (rank == 0), 20), generator=generator)
            (model(ids, labels=ids).loss / micro_batches).backward()
        optimizer.step()
    return state_hash(model)


@pytest.mark.parametrize(
    ("preset", "rule", "micro_batches"),
    [("arb-tiny", "momentum", 2), ("arb-tiny-full", "momentum", 1), ("arb-tiny-full", "flip", 2)],
)
def test_ranks_end_with_the_same_bits(tmp_path, preset, rule, micro_batches):
    hashes = on_ranks(RANKS, train, tmp_path, preset, rule, micro_batches)
    assert len(set(hashes)) == 1
    assert hashes[0] != train(0, preset, rule, micro_batches)


def hashes_after_equal_bytes(rank):
    """Of each rule, and of two trits a weight, after steps of two micro-batches, and the share of flips."""
    found = []
    for rule, trits in (("momentum", 1), ("flip", 1), ("correlation", 1), ("momentum", 2)):
        torch.manual_seed(0)
        model = ArbForCausalLM(preset_config("arb-tiny", update_rule=rule, trits_per_weight=trits))
        optimizer = IntegerOptimizer(model, flip_threshold=1)
        ids = torch.arange(97, 121)[None]
        for _ in range(2):
            for last in (False, True):
                optimizer.begin_micro_batch(last)
                (model(ids, labels=ids).loss / 2).backward()
            optimizer.step()
        found.append((state_hash(model), optimizer.take_flip_rate()))
    return found


def test_ranks_with_the_same_bytes_do_what_one_does(tmp_path):
    """A third of a sum of three equal gradients is each of them: nothing is rounded away."""
    alone = hashes_after_equal_bytes(0)
    assert alone[0][1] > 0 and alone[1][1] > 0 and alone[3][1] > 0
    assert on_ranks(RANKS, hashes_after_equal_bytes, tmp_path) == [alone] * RANKS


def part_ways(rank):
    torch.manual_seed(0)
    model = ArbForCausalLM(preset_config("arb-tiny"))
    check_ranks_agree(model, 3)
    if rank == 2:
        model.byte_head.proj.E[5] += 1
    with pytest.raises(RuntimeError) as parted:
        check_ranks_agree(model, 4)
    optimizer = IntegerOptimizer(model)
    optimizer.last_checkpoint = "checkpoint-3"
    ids = torch.arange(97, 121)[None]
    with pytest.raises(FloatingPointError) as not_finite:
        (model(ids, labels=ids).loss * (float("nan") if rank == 1 else 1)).backward()
        optimizer.step()
    return str(parted.value), str(not_finite.value)


def test_what_is_wrong_on_one_rank_is_named_on_every_rank(tmp_path):
    parted = "step 4: rank 2 differs from rank 0 in byte_head.proj.E: their states are not equal"
    for first, second in on_ranks(RANKS, part_ways, tmp_path):
        assert first == parted
        assert second == "step 0: the gradient of model.byte_embedding.tables.0 is not finite; resume from checkpoint-3"


def test_work_is_shared_out_evenly(monkeypatch):
    monkeypatch.setattr("training_arb.ranks.rank_exchange.num_ranks", lambda: 2)
    assert share_out([5, 3, 1, 4, 1]) == [0, 1, 1, 1, 0]


def test_tables_are_nobodys_work(monkeypatch):
    monkeypatch.setattr("training_arb.ranks.rank_exchange.num_ranks", lambda: 2)
    optimizer = IntegerOptimizer(ArbForCausalLM(preset_config("arb-small")))
    totals, sizes = [0, 0], []
    for matrix, owner in optimizer._exchange.owners.items():
        if not isinstance(matrix, TernaryTable):
            totals[owner] += matrix.logical_weights
            sizes.append(matrix.logical_weights)
    assert abs(totals[0] - totals[1]) <= max(sizes)


def test_a_lone_process_of_several_is_noticed():
    launched = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    assert "torchrun --nproc_per_node" in lone_process_warning(launched)
    assert lone_process_warning({**launched, "RANK": "0"}) is None
    assert lone_process_warning({"ACCELERATE_USE_CPU": "True"}) is None
    assert lone_process_warning({"MASTER_ADDR": "127.0.0.1"}) is None
