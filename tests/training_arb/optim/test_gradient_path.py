"""The way of a gradient from a layer's backward to its rule: how many calls, and no waiting for the device."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from arb_kernels.rules.momentum import momentum_update
from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from modeling_arb.layers.ternary_linear import Int8LinearFunction
from support.scripting import ROOT
from support.tensors import random_text, training_step
from training_arb.memory.state_audit import audit_model, state_hash
from training_arb.optim.integer_optimizer import IntegerOptimizer

NOT_A_NUMBER = float("nan")
EXPERTS = {"num_experts": 3}


def make(immediate=True, **config):
    torch.manual_seed(0)
    model = ArbForCausalLM(preset_config("arb-tiny", **config))
    optimizer = IntegerOptimizer(model)
    if not immediate:
        optimizer.immediate_devices = ()  # as on a GPU
    return model, optimizer


def own_calls_below(frame):
    """Names of our own functions on the stack above Int8LinearFunction.backward, the last one called first."""
    names = []
    while frame is not None and frame.f_code is not Int8LinearFunction.backward.__code__:
        if frame.f_code.co_filename.startswith(str(ROOT)) and ".venv" not in frame.f_code.co_filename:
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names if frame is not None else None


def test_four_calls_from_backward_to_the_rule():
    model, _ = make()
    paths = []

    def watch(frame, event, argument):
        if event == "call" and frame.f_code is momentum_update.__code__:
            paths.append(own_calls_below(frame))

    x = torch.randn(3, 64, requires_grad=True)
    loss = model.byte_head.proj(x).sum()
    sys.setprofile(watch)
    try:
        loss.backward()
    finally:
        sys.setprofile(None)
    assert paths == [["momentum_update", "update", "_update", "dense"]]


class Waits(TorchDispatchMode):
    """Counts reads of single values; `tolist` and `cpu`, which it would not see on a CPU, raise."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def refuse(*_):
    raise AssertionError("backward waits for the device")


def waits_in_backward(model, ids, monkeypatch):
    loss = model(ids, labels=ids).loss
    with Waits() as waits, monkeypatch.context() as patched:
        for name in ("tolist", "cpu"):
            patched.setattr(torch.Tensor, name, refuse)
        loss.backward()
    return waits.count


def test_backward_never_waits_for_a_gpu(monkeypatch):
    model, _ = make()
    assert waits_in_backward(model, random_text(0), monkeypatch) > 0, "the check sees no wait"
    model, optimizer = make(immediate=False, moe_graph=EXPERTS)
    model.model.moe_graph.experts.grouped = True
    for last in (False, True):
        optimizer.begin_micro_batch(last)
        assert waits_in_backward(model, random_text(0), monkeypatch) == 0


def test_flags_change_no_finite_gradient():
    hashes = []
    for immediate in (True, False):
        model, optimizer = make(immediate, moe_graph=EXPERTS)
        for step in range(2):
            training_step(model, optimizer, random_text(step))
        hashes.append(state_hash(model))
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("way", ["update", "sum", "shared"])
def test_a_flagged_gradient_moves_its_matrix_as_zeros_do_and_is_named_at_the_step(way):
    """In the second step, in which momentum is not zero."""

    def run(value):
        model, optimizer = make(immediate=False)
        optimizer.last_checkpoint = "runs/x/checkpoint-7"
        training_step(model, optimizer, random_text(0))
        head = model.byte_head.proj
        head.shared = way == "shared"
        before = head.accum.clone()
        optimizer.begin_micro_batch(last=way != "sum")
        optimizer.dense(head, torch.full((head.rows, head.columns), value))
        if way == "update":
            assert not torch.equal(before, head.accum)
        return model, optimizer

    model, optimizer = run(NOT_A_NUMBER)
    with pytest.raises(FloatingPointError, match=r"^step 1: .*byte_head\.proj is not finite; .*runs/x/checkpoint-7$"):
        optimizer.step()
    assert audit_model(model, optimizer).clean
    expected, other = run(0.0)
    other.step()
    assert state_hash(model) == state_hash(expected)


def test_an_error_at_the_step_comes_before_tables_move():
    model, optimizer = make(immediate=False, memgram={"slots": 64, "dim": 8})
    table = model.model.memgram.table
    before = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    optimizer.rows(table, torch.tensor([3, 7]), torch.tensor([[1.0], [NOT_A_NUMBER]]).expand(2, table.columns).clone())
    with pytest.raises(FloatingPointError, match=r"^step 0: the gradient of model\.memgram\.table is not finite"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in table.state_dict().items())


def test_on_a_cpu_the_error_comes_before_the_matrix_moves():
    model, optimizer = make()
    head = model.byte_head.proj
    before = state_hash(model)
    with pytest.raises(FloatingPointError, match=r"^step 0: the gradient of byte_head\.proj is not finite$"):
        head(torch.full((2, 64), NOT_A_NUMBER, requires_grad=True)).sum().backward()
    assert state_hash(model) == before
    optimizer.step()  # the flag does not outlive its error


@pytest.mark.parametrize(("uses", "moves"), [([False, False], False), ([False, True], True), ([True, False], True)])
def test_a_matrix_that_no_token_used_keeps_its_state(uses, moves):
    """Momentum would move it even by a gradient of zeros. What dW holds where it is unused means nothing."""
    model, optimizer = make()
    matrix = model.model.blocks[0].mlp.up_proj
    matrix.shared = True
    training_step(model, optimizer, random_text(0))
    before = matrix.accum.clone()
    for used in uses:
        dW = torch.full((matrix.rows, matrix.columns), 1.0 if used else NOT_A_NUMBER)
        optimizer.dense(matrix, dW, torch.tensor(used))
    optimizer.step()
    assert torch.equal(before, matrix.accum) != moves
