"""TernaryTable: rows read and updated one by one, the rest of the table untouched."""

import zlib

import pytest
import torch

from arb_kernels.formats.exponents import EIGHTHS, power_of_two
from arb_kernels.formats.groups import spread_groups
from arb_kernels.formats.packing import unpack_levels
from arb_kernels.formats.rule_states import CorrelationState, FlipState, MomentumState
from arb_kernels.random_bits import stream_key
from arb_kernels.rules.correlation import naive_correlation_update
from arb_kernels.rules.flip import naive_flip_update
from arb_kernels.rules.sparse_momentum import naive_sparse_momentum_update
from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from modeling_arb.layers import ternary_matrix
from modeling_arb.layers.ternary_table import TernaryTable
from support.gradients import Sink
from support.tensors import assert_same
from training_arb.optim.integer_optimizer import IntegerOptimizer
from training_arb.optim.integer_rules import TABLE_RATE

RULES = ["momentum", "flip", "correlation"]
ROWS, DIM, THRESHOLD = 50, 20, 2
DIM_OF_MEMORY = 16
DENSE = {
    "flip": (lambda *given: naive_flip_update(*given, THRESHOLD, True)[0], FlipState),
    "correlation": (naive_correlation_update, CorrelationState),
}


def make_table(rule="momentum", group_size=0, rows=ROWS, columns=DIM, **fields):
    table = TernaryTable(rows, columns, preset_config("arb-tiny", update_rule=rule, group_size=group_size, **fields))
    table.reset_state()
    return table


def with_memory(rule, table_rule="votes", trits=1, **settings):
    torch.manual_seed(0)
    config = preset_config(
        "arb-tiny",
        update_rule=rule,
        table_rule=table_rule,
        trits_per_weight={"tables": trits},
        memgram={"slots": 4096, "dim": DIM_OF_MEMORY, "orders": [3]},
    )
    model = ArbForCausalLM(config)
    return model, IntegerOptimizer(model, table_threshold=THRESHOLD, **settings), model.model.memgram.table


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("group_size", [0, 8], ids=["row", "G8"])
@pytest.mark.parametrize("rule", RULES)
def test_rows_are_those_of_the_whole_matrix(rule, group_size):
    table = make_table(rule, group_size)
    if rule == "correlation":
        table.corr_accum.copy_(torch.randint(-40, 40, table.corr_accum.shape))
        table.step_counter.copy_(torch.randint(0, 9, table.step_counter.shape))
    ids = torch.randint(0, ROWS, (3, 4))
    assert_same("rows", table.effective_weight(torch.float32)[ids], table(ids).detach())


def test_backward_hands_over_each_touched_row_once():
    table, handed = make_table(), []
    table.gradient_sink = Sink(lambda *given: handed.append(given))
    ids, gradient = torch.tensor([[7, 3, 7], [49, 3, 7]]), torch.randn(2, 3, DIM)
    table(ids).backward(gradient)
    (source, row_ids, dW), expected = handed[0], torch.zeros(ROWS, DIM)
    expected.index_add_(0, ids.flatten(), gradient.flatten(0, 1))
    assert source is table and row_ids.tolist() == [3, 7, 49]
    assert_same("dW", expected[row_ids], dW)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_the_dense_rule_on_the_touched_rows(rule):
    """Two micro-batches: their rows are joined and their gradients added before the one update."""
    model, optimizer, table = with_memory(rule)
    touched = {}

    def spy(table, row_ids, dW):
        for row, gradient in zip(row_ids.tolist(), dW, strict=True):
            touched[row] = touched.get(row, 0) + gradient

    table.gradient_sink = Sink(spy, then=optimizer)
    for step in range(3):
        touched.clear()
        before = state_of(table)
        for last in (False, True):
            optimizer.begin_micro_batch(last=last)
            ids = torch.randint(97, 103, (2, 12))
            (model(ids, labels=ids).loss / 2).backward()
        assert all(torch.equal(tensor, before[name]) for name, tensor in table.state_dict().items())
        optimizer.step()
        row_ids = torch.tensor(sorted(touched))
        update, form = DENSE[table.table_rule]
        dW = torch.stack([touched[row] for row in row_ids.tolist()])
        state = form(*(before[name][row_ids] for name in form._fields))
        for name, new in zip(form._fields, update(state, dW, DIM_OF_MEMORY), strict=True):
            before[name][row_ids] = new
        for name, tensor in table.state_dict().items():
            assert_same(f"{name} after step {step}", before[name], tensor)


@pytest.mark.parametrize("table_rule, trits", [("votes", 1), ("momentum", 1), ("momentum", 2)])
def test_a_step_moves_levels_in_the_end(table_rule, trits):
    model, optimizer, table = with_memory("momentum", table_rule, trits)
    first = state_of(table)
    ids = torch.randint(97, 100, (4, 32))
    for _ in range(6):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    changed = (table.T_packed != first["T_packed"]).any(1).sum()
    assert 0 < changed <= 27 + 9 + 3  # trigrams of three letters, and those that begin before the text


@pytest.mark.parametrize("trits", [1, 2])
def test_momentum_of_touched_rows(trits):
    """The step's key and rate reach the sparse rule, with micro-batches summed before it."""
    model, optimizer, table = with_memory("momentum", "momentum", trits)
    before, handed = state_of(table), []
    table.gradient_sink = Sink(lambda *given: handed.append(given[1:]), then=optimizer)
    ids = torch.randint(97, 103, (2, 12))
    for last in (False, True):
        optimizer.begin_micro_batch(last=last)
        (model(ids, labels=ids).loss / 2).backward()
    (row_ids, first), (_, second) = handed
    key = stream_key(0, 0, 0, zlib.crc32(b"model.memgram.table"))
    state = MomentumState(*(before[name] for name in MomentumState._fields))
    expected, _ = naive_sparse_momentum_update(state, row_ids, first + second, key, TABLE_RATE * 0.035)
    optimizer.step()
    for tensor, new in zip(state, expected, strict=True):
        tensor[row_ids] = new
    for name, tensor in table.state_dict().items():
        assert_same(name, before[name], tensor)


def test_an_error_names_the_table_and_the_step():
    _, _, table = with_memory("momentum")
    with pytest.raises(FloatingPointError, match=r"step 0: the gradient of model\.memgram\.table is not finite"):
        table(torch.tensor([3])).sum().mul(float("nan")).backward()


@pytest.mark.parametrize("group_size", [0, 8], ids=["row", "G8"])
@pytest.mark.parametrize("rule", RULES)
def test_written_rows_stand_for_their_values(rule, group_size):
    table = make_table(rule, group_size)
    before = state_of(table)
    ids, scale = torch.tensor([4, 0, 33]), 2.0 ** (torch.tensor([-5, 0, 9]) / 8)
    values = scale[:, None] * torch.randint(-1, 2, (3, DIM))
    values[:, ::8] = scale[:, None]  # no group is all zero
    table.write_rows(ids, values)
    assert_same("values", values, table.rows_of(ids))
    others = [row for row in range(ROWS) if row not in ids]
    for name, tensor in table.state_dict().items():
        assert torch.equal(tensor[others], before[name][others])
        if name not in ("T_packed", "E"):
            assert not tensor[ids].any()


def test_small_values_are_written_as_zeros():
    table = make_table()
    table.write_rows(torch.tensor([1]), torch.tensor([[1.0, -1.0, 0.1, -0.1] * 5]))
    assert unpack_levels(table.T_packed[1:2], DIM).tolist() == [[1, -1, 0, 0] * 5]


@pytest.mark.parametrize("group_size", [0, 32], ids=["row", "G32"])
def test_rows_of_two_trits_are_the_nearest_levels(group_size):
    """And no other scale, by a quarter of an octave or more, is better for normal values; nine levels leave 3.07 % of
    their square (Max 1960, table II)."""
    torch.manual_seed(0)
    table = make_table("momentum", group_size, 500, 60, table_rule="momentum", trits_per_weight=2)
    before, ids = state_of(table), torch.arange(1, 499)
    values = torch.randn(len(ids), 60) * 2.0 ** torch.linspace(-9, 3, len(ids))[:, None]
    values[7] = 0
    table.write_rows(ids, values)
    levels, scale = unpack_levels(table.T_packed, 60)[ids], spread_groups(table.scale()[ids], table.group_size, 60)
    assert_same("levels", (values / scale).round().clamp(-4, 4).to(torch.int8), levels)
    assert not levels[7].any() and not table.rows_of(ids[7:8]).any()

    def error(factor):
        off = values - (values / (scale * factor)).round().clamp(-4, 4) * scale * factor
        return (off.norm(dim=1) / values.norm(dim=1).clamp(min=1e-9)).square().mean().item()

    assert error(1) < min(error(2**0.25), error(2**-0.25))
    assert error(1) == pytest.approx(0.0307, rel=0.15)
    for name, tensor in table.state_dict().items():
        assert torch.equal(tensor[[0, 499]], before[name][[0, 499]])
        assert name in ("T_packed", "E") or not tensor[ids].any()


def test_a_large_table_is_drawn_in_pieces(monkeypatch):
    """No temporary of the table's size, and the same trits as in one piece."""
    torch.manual_seed(5)
    whole = make_table().T_packed
    drawn = []
    randint = torch.randint

    def counting(low, high, shape, **kwargs):
        drawn.append(shape.numel())
        return randint(low, high, shape, **kwargs)

    monkeypatch.setattr(torch, "randint", counting)
    monkeypatch.setattr(ternary_matrix, "INIT_CHUNK", 25)
    torch.manual_seed(5)
    pieces = make_table().T_packed
    assert torch.equal(whole, pieces)
    assert len(drawn) > 5 and max(drawn) <= 25


def test_a_row_under_correlation_is_the_same_however_many_are_read():
    """Its scale is a power of two with a fraction, which must not round by its place among others."""
    table, ids = make_table("correlation"), torch.arange(ROWS)
    table.corr_accum.copy_(torch.randint(-400, 400, table.corr_accum.shape))
    table.step_counter.fill_(40)
    whole = table.effective_weight(torch.float32)
    for together in (1, 3, 16, 33):
        assert torch.equal(torch.cat([table.rows_of(part) for part in ids.split(together)]), whole), together
    octaves = 4 * table.corr_accum.double() / (40 * DIM)
    factor = table.scale() / power_of_two(table.E, EIGHTHS)
    assert_same("factor", torch.exp2(octaves).float(), factor)
