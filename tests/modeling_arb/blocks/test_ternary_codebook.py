"""TernaryCodebook: the nearest row, straight through; usage, fading and renewal; a cost that its size does not set."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from arb_kernels.formats.packing import pack_levels
from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from modeling_arb.blocks import ternary_codebook
from modeling_arb.blocks.ternary_codebook import RENEWED, TernaryCodebook
from support.gradients import Sink
from support.tensors import assert_same
from training_arb.memory.state_audit import audit_model
from training_arb.optim.integer_optimizer import IntegerOptimizer

DIM = 12


def make_book(size=40, dim=DIM, trits=1, **settings):
    settings = {"size": size, "dim": dim, "commitment": 0.25, "hashes": 3, "probes": 4, **settings}
    rule = "momentum" if trits > 1 else "votes"
    book = TernaryCodebook(settings, preset_config("arb-tiny", trits_per_weight=trits, table_rule=rule))
    for module in (book, book.table):
        module.reset_state()
    return book


def distances(book, values):
    return torch.cdist(values.double(), book.table.effective_weight(torch.float32).double())


def test_an_exact_search_finds_the_nearest_row_tile_by_tile(monkeypatch):
    book, values = make_book(), torch.randn(5, 7, DIM)
    monkeypatch.setattr(ternary_codebook, "TILE_SCORES", 3 * 40)
    chosen = book(values)
    assert torch.equal(chosen.ids, distances(book, values.flatten(0, 1)).argmin(1).view(5, 7))
    assert_same("values", book.rows_of(chosen.ids), chosen.values.detach())


@pytest.mark.parametrize("rows, half", [(37, 8), (64, 32), (130, 12)])
def test_of_equally_near_rows_the_first_wins_however_many_inputs_come_together(rows, half):
    """Inputs of two equal halves are as far from a row as from the same row with its halves exchanged."""
    book, values = make_book(2 * rows, 2 * half), torch.randn(33, half).repeat(1, 2)
    trits = torch.randint(-1, 2, (rows, 2 * half), dtype=torch.int8)
    book.table.T_packed.copy_(pack_levels(torch.cat([trits, trits.roll(half, 1)])))
    chosen = book(values).ids
    assert chosen.max() < rows
    assert torch.equal(torch.cat([book(value).ids for value in values.split(1)]), chosen)


def test_candidates_are_searched_and_nothing_else(monkeypatch):
    book, values = make_book(), torch.randn(9, DIM)
    candidates = torch.randint(0, 40, (9, 5))
    monkeypatch.setattr(ternary_codebook, "TILE_SCORES", 2 * 5 * DIM)
    among = distances(book, values).gather(1, candidates)
    assert torch.equal(book(values, candidates).ids, candidates.gather(1, among.argmin(1, keepdim=True))[:, 0])


def test_candidate_rows_follow_the_signs_of_the_input():
    book, values = make_book(size=1 << 15), torch.randn(300, DIM)
    rows = book.candidate_rows(values)
    assert rows.shape == (300, 3 * 4) and rows.min() >= 0 and rows.max() < 1 << 15
    assert torch.equal(rows, book.candidate_rows(3 * values))
    assert torch.equal(rows[7:9], book.candidate_rows(values[7:9]))
    assert rows.unique().numel() > 2000
    close = values + 0.01 * torch.randn_like(values)
    shared = (rows[:, :, None] == book.candidate_rows(close)[:, None]).any(2).float().mean()
    foreign = (rows[:, :, None] == book.candidate_rows(values.flip(0))[:, None]).any(2).float().mean()
    assert shared > 0.9 and foreign < 0.05


def test_gradients_and_loss():
    book, handed = make_book(), []
    book.table.gradient_sink = Sink(lambda table, row_ids, dW: handed.append((row_ids, dW)))
    values = torch.randn(6, DIM, requires_grad=True)
    chosen = book(values)
    rows = book.rows_of(chosen.ids)
    assert_same("loss", 1.25 * F.mse_loss(rows, values.detach()), chosen.loss.detach())
    upstream = torch.randn(6, DIM)
    (chosen.values * upstream).sum().add(chosen.loss).backward()
    assert_same("straight through and commitment", upstream + 0.25 * 2 * (values - rows).detach() / 72, values.grad)
    (row_ids, dW), expected = handed[0], torch.zeros(40, DIM)
    expected.index_add_(0, chosen.ids, 2 * (rows - values.detach()) / 72)
    assert_same("rows", expected[row_ids], dW)


def observed(book, values):
    book.observing = True
    chosen = book.train()(values)
    return chosen.ids, book.take_observations()


def test_usage_counts_and_fades(monkeypatch):
    monkeypatch.setattr(ternary_codebook, "RENEWED", 0)
    monkeypatch.setattr(ternary_codebook, "FADE_STEPS", 4)
    book = make_book()
    book.usage.fill_(8)
    ids, seen = observed(book, torch.randn(50, DIM))
    expected = 8 + torch.bincount(ids, minlength=40)
    for step in range(5):
        book.apply_observations(*seen, key=step)
        faded = torch.arange(10) + 10 * step
        expected[faded % 40] >>= 1
        assert book.usage.tolist() == expected.tolist(), step
        expected += torch.bincount(ids, minlength=40)
    book.usage.fill_(32760)
    book.apply_observations(torch.zeros(100, dtype=torch.int64) + 39, *seen[1:], key=0)
    assert book.usage[39] == 32767


@pytest.mark.parametrize(("trits", "off"), [(1, 0.7), (2, 0.35)])
def test_unused_rows_of_a_small_book_are_given_to_inputs(trits, off):
    book, values = make_book(trits=trits), 3 * torch.randn(200, DIM)
    ids, seen = observed(book, values)
    alive = book.rows_of(ids.unique())
    book.apply_observations(*seen, key=1)
    unused = sorted(set(range(40)) - set(ids.tolist()))
    renewed = unused[:RENEWED]
    assert (book.usage[renewed] == 1).all() and (book.usage[unused[RENEWED:]] == 0).all()
    assert torch.equal(book.rows_of(ids.unique()), alive)
    nearest = torch.cdist(book.rows_of(torch.tensor(renewed)), seen[1]).min(1).values
    assert (nearest < seen[1].norm(dim=1).max() * off).all()
    untouched = make_book()
    assert not untouched.usage.any() and untouched.take_observations() is None


def test_a_large_book_renews_only_rows_that_an_input_could_have_chosen():
    book = make_book(size=1 << 15)
    first = book.table.T_packed.clone()
    _, seen = observed(book, torch.randn(30, DIM))
    book.apply_observations(*seen, key=1)
    changed = (book.table.T_packed != first).any(1).nonzero()[:, 0]
    assert 0 < len(changed) <= RENEWED
    assert set(changed.tolist()) <= set(seen[2].flatten().tolist())


def test_the_same_step_gives_the_same_book():
    books = [make_book(), make_book()]
    books[1].load_state_dict(books[0].state_dict())
    values = torch.randn(90, DIM)
    for book in books:
        for step in range(3):
            book.apply_observations(*observed(book, values)[1], key=step)
    for name, tensor in books[0].state_dict().items():
        assert torch.equal(tensor, books[1].state_dict()[name]), name
    other = make_book()
    other.load_state_dict(books[0].state_dict())
    for book, key in ((books[0], 7), (other, 8)):
        book.usage.zero_()
        book.apply_observations(*observed(book, values)[1], key=key)
    assert not torch.equal(books[0].table.T_packed, other.table.T_packed)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation made anew."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("rule", ["momentum", "correlation"])
def test_a_million_rows_cost_what_is_touched(rule):
    """Seed 004's check: sparse forward, backward and update, no float buffer, nothing of the book's size made."""
    torch.manual_seed(0)
    config = preset_config("arb-tiny", update_rule=rule, codebook={"size": 1_000_000, "dim": 8})
    model = ArbForCausalLM(config)
    optimizer = IntegerOptimizer(model, table_threshold=1)
    assert audit_model(model, optimizer).clean
    table = model.model.shared_vq.book.table
    before = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    ids = torch.randint(0, 256, (2, 16))
    with LargestTensor() as largest:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert largest.elements < 200_000
    changed = torch.zeros(1_000_000, dtype=torch.bool)
    for name, tensor in table.state_dict().items():
        changed |= (tensor != before[name]).flatten(1).any(1)
    assert 0 < changed.sum() <= 32 + RENEWED
    assert audit_model(model, optimizer).clean
