"""TernaryLSTMCell and TextSequencer: against torch's LSTM, causality, padding, and a text read in pieces."""

import pytest
import torch

from arb_kernels.blocks.lstm_gates import FORGET_BIAS
from configuration_arb import preset_config
from modeling_arb.blocks.ternary_lstm_cell import GATE_SCALE, TernaryLSTMCell
from modeling_arb.blocks.text_sequencer import TextSequencer
from modeling_arb.layers.integer_state import IntegerState
from modeling_arb.layers.norm import rms_norm
from support.gradients import Sink
from support.tensors import assert_same

WIDTH, LENGTH = 64, 13
COMPUTE = ["float", "int8"]


def initialised(module):
    for part in module.modules():
        if isinstance(part, IntegerState):
            part.reset_state()
    return module


def make_sequencer(compute="int8", hidden_size=0):
    config = preset_config("arb-tiny", text_sequencer={"hidden_size": hidden_size}, compute=compute)
    return initialised(TextSequencer(config))


def reference_run(sequencer, x, weights):
    """The same sequence by torch.nn.LSTMCell and float matmuls; gradients reach `weights` by the names of matrices."""
    eps, size = sequencer.eps, sequencer.cell.hidden_size
    cell = torch.nn.LSTMCell(x.shape[-1], size)
    bias = torch.zeros(4 * size)
    bias[size : 2 * size] = FORGET_BIAS
    constants = {"bias_ih": bias, "bias_hh": torch.zeros(4 * size)}
    constants["weight_ih"] = weights["cell.input_proj"] * GATE_SCALE
    constants["weight_hh"] = weights["cell.recurrent_proj"] * GATE_SCALE
    hidden, memory, outputs = torch.zeros(len(x), size), torch.zeros(len(x), size), []
    for step in x.unbind(1):
        inputs = (rms_norm(step, eps), (rms_norm(hidden, eps), memory))
        hidden, memory = torch.func.functional_call(cell, constants, inputs)
        outputs.append(rms_norm(hidden, eps))
    return torch.stack(outputs, 1) @ weights["out_proj"].T, (hidden, memory)


@pytest.mark.parametrize("hidden_size", [0, 7, 100])
def test_forward_and_every_gradient_are_those_of_torch(hidden_size):
    """The recurrent matrix hands over one dW a step but the first, which reads zeros; their sum is the reference's."""
    sequencer = make_sequencer("float", hidden_size)
    assert sequencer.cell.hidden_size == (hidden_size or WIDTH)
    names = ("cell.input_proj", "cell.recurrent_proj", "out_proj")
    matrices = {name: sequencer.get_submodule(name) for name in names}
    handed = {name: [] for name in names}
    for name, matrix in matrices.items():
        matrix.gradient_sink = Sink(lambda _, dW, name=name: handed[name].append(dW.clone()))
    weights = {name: matrix.effective_weight(torch.float32).requires_grad_() for name, matrix in matrices.items()}
    x, grad = torch.randn(3, LENGTH, WIDTH), torch.randn(3, LENGTH, WIDTH)
    expected_x, own_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, expected_state = reference_run(sequencer, expected_x, weights)
    expected.backward(grad)
    y, state = sequencer(own_x)
    y.backward(grad)
    assert_same("y", expected.detach(), y.detach())
    for name, ref, out in zip(("hidden", "cell"), expected_state, state, strict=True):
        assert_same(name, ref.detach(), out.detach())
    assert_same("grad x", expected_x.grad, own_x.grad)
    for name in names:
        assert len(handed[name]) == (LENGTH - 1 if name == "cell.recurrent_proj" else 1)
        assert_same(name, weights[name].grad, sum(handed[name]))


def test_only_the_recurrent_matrix_is_shared():
    sequencer = make_sequencer()
    shared = [name for name, module in sequencer.named_modules() if getattr(module, "shared", False)]
    assert shared == ["cell.recurrent_proj"]


def test_gates_start_with_unit_variance():
    cell = initialised(TernaryLSTMCell(300, 200, preset_config("arb-tiny")))
    projected = cell.project(5 * torch.randn(40, 2, 300))[:, 0]
    recurrent = cell.recurrent_proj(rms_norm(torch.randn(40, 200).tanh(), cell.eps)) * GATE_SCALE
    assert (projected + recurrent).var().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("grad", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("cut", [1, 5, LENGTH - 1])
def test_two_calls_equal_one(cut, grad):
    """Bit for bit: integer sums do not depend on how many steps share a matmul."""
    sequencer, x = make_sequencer(), torch.randn(3, LENGTH, WIDTH)
    with torch.set_grad_enabled(grad):
        whole, end = sequencer(x)
        first, state = sequencer(x[:, :cut])
        second, my_end = sequencer(x[:, cut:], state=state)
    assert torch.equal(whole, torch.cat([first, second], 1))
    assert all(torch.equal(ref, out) for ref, out in zip(end, my_end, strict=True))


@pytest.mark.parametrize("compute", COMPUTE)
def test_no_output_depends_on_later_bytes(compute):
    sequencer, x = make_sequencer(compute), torch.randn(2, LENGTH, WIDTH)
    changed = x.clone()
    changed[:, 6:] = torch.randn(2, LENGTH - 6, WIDTH)
    before, after = sequencer(x)[0], sequencer(changed)[0]
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax((0, 2)).min() > 0


def test_a_position_remembers_earlier_bytes():
    sequencer, x = make_sequencer(), torch.randn(2, LENGTH, WIDTH)
    changed = x.clone()
    changed[:, 0] = torch.randn(2, WIDTH)
    assert (sequencer(x)[0] - sequencer(changed)[0]).abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize("pieces", [[LENGTH + 4], [2, LENGTH + 2], [6, LENGTH - 2]], ids=str)
@pytest.mark.parametrize("compute", COMPUTE)
def test_left_padding_changes_nothing(compute, pieces):
    """Whatever lies under the mask, and wherever a text is cut: before, at or after the first byte."""
    sequencer, x = make_sequencer(compute), torch.randn(1, LENGTH, WIDTH)
    padded = torch.cat([100 * torch.randn(1, 4, WIDTH), x], 1)
    mask = torch.arange(LENGTH + 4)[None] >= 4
    expected, end = sequencer(x)
    outputs, state = [], None
    for piece, piece_mask in zip(padded.split(pieces, 1), mask.split(pieces, 1), strict=True):
        y, state = sequencer(piece, piece_mask, state)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    assert torch.count_nonzero(y[:, :4]) == 0
    assert_same("y", expected.detach(), y[:, 4:].detach())
    for name, ref, out in zip(("hidden", "cell"), end, state, strict=True):
        assert_same(name, ref.detach(), out.detach())


def test_padding_gets_and_gives_no_gradient():
    """A row that starts late hands over the dW of the row alone."""

    def gradients(x, mask):
        sequencer = make_sequencer("float")
        handed = []
        for part in (sequencer.cell.input_proj, sequencer.cell.recurrent_proj, sequencer.out_proj):
            part.gradient_sink = Sink(lambda matrix, dW: handed.append((matrix, dW.clone())))
        x = x.clone().requires_grad_()
        y, _ = sequencer(x, mask)
        y.square().sum().backward()
        matrices = (sequencer.cell.input_proj, sequencer.cell.recurrent_proj, sequencer.out_proj)
        return x.grad, [sum(dW for matrix, dW in handed if matrix is wanted) for wanted in matrices]

    x = torch.randn(1, LENGTH, WIDTH)
    padded = torch.cat([torch.randn(1, 4, WIDTH), x], 1)
    torch.manual_seed(1)
    expected_x, expected = gradients(x, None)
    torch.manual_seed(1)
    grad_x, handed = gradients(padded, torch.arange(LENGTH + 4)[None] >= 4)
    assert torch.count_nonzero(grad_x[:, :4]) == 0
    assert_same("grad x", expected_x, grad_x[:, 4:])
    for ref, out in zip(expected, handed, strict=True):
        assert_same("dW", ref, out)


def test_a_masked_byte_in_the_middle_leaves_the_state():
    sequencer, x = make_sequencer(), torch.randn(2, 3, WIDTH)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    y, (hidden, cell) = sequencer(x, mask)
    alone, (alone_hidden, alone_cell) = sequencer(x[1:, [0, 2]])
    for name, ref, out in (("y", alone[0], y[1, [0, 2]]), ("hidden", alone_hidden, hidden[1:])):
        assert_same(name, ref.detach(), out.detach())
    assert_same("cell", alone_cell.detach(), cell[1:].detach())


def test_half_floats_keep_the_cell_in_float32():
    sequencer = make_sequencer()
    hidden, cell = sequencer.cell.initial_state(torch.zeros(2, 4 * WIDTH, dtype=torch.bfloat16))
    assert (hidden.dtype, cell.dtype) == (torch.bfloat16, torch.float32)
    y, (hidden, cell) = sequencer(torch.randn(2, 3, WIDTH, dtype=torch.bfloat16, requires_grad=True))
    y.sum().backward()
    assert (y.dtype, hidden.dtype, cell.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, (hidden, cell) = sequencer(torch.randn(2, 3, WIDTH), torch.ones(2, 3, dtype=torch.bool))
    assert (y.dtype, hidden.dtype, cell.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_nothing_but_integer_matrices_is_kept():
    sequencer = make_sequencer()
    sequencer(torch.randn(2, 3, WIDTH))
    assert list(sequencer.parameters()) == []
    assert not any(tensor.is_floating_point() for tensor in sequencer.state_dict().values())
