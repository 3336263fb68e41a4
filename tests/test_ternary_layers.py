"""TernaryLinear and TernaryEmbedding against float layers with the same effective weight."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same

from configuration_arb import preset_config
from modeling_arb.ternary_embedding import TernaryEmbedding
from modeling_arb.ternary_linear import TernaryLinear

SIZES = [(1, 1), (3, 5), (7, 33), (64, 100), (65, 128)]
GROUPS = [pytest.param(0, id="row"), pytest.param(4, id="G4"), pytest.param(32, id="G32")]
RULES = ["momentum", "flip", "correlation"]


def make_linear(rows, columns, rule="momentum", group_size=0):
    layer = TernaryLinear(columns, rows, preset_config("arb-tiny", update_rule=rule, group_size=group_size))
    layer.reset_state()
    layer.E += torch.randint(-9, 9, layer.E.shape, dtype=torch.int8)
    return layer


def capture(layer):
    """Arm a layer so that it keeps the dW it hands over."""
    seen = []
    layer.update_handler = lambda matrix, dW: seen.append(dW.clone())
    return seen


def naive_weight(layer):
    weight = layer.trits().double()
    for column in range(layer.columns):
        weight[:, column] *= 2.0 ** (layer.E[:, column // layer.group_size].double() / 8)
    return weight.float()


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("rows, columns", SIZES)
def test_effective_weight_is_scale_times_trit(rows, columns, group_size):
    layer = make_linear(rows, columns, group_size=group_size)
    assert_same("W_eff", naive_weight(layer), layer.effective_weight(torch.float32))


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("rows, columns", SIZES)
def test_linear_forward_and_every_gradient(rows, columns, group_size):
    layer = make_linear(rows, columns, group_size=group_size)
    seen = capture(layer)
    x = torch.randn(2, 9, columns, requires_grad=True)
    grad_y = torch.randn(2, 9, rows)
    weight = naive_weight(layer).requires_grad_()
    expected_x = x.detach().clone().requires_grad_()
    expected = F.linear(expected_x, weight)
    expected.backward(grad_y)
    y = layer(x)
    y.backward(grad_y)
    assert_same("y", expected.detach(), y.detach())
    assert_same("grad_x", expected_x.grad, x.grad)
    assert_same("dW", weight.grad, seen[0])


@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.parametrize("group_size", GROUPS)
def test_embedding_forward_and_gradient(tokens, group_size):
    """Fewer ids than rows take the path that decodes only those rows; both give the same rows and dW."""
    table = TernaryEmbedding(17, 45, preset_config("arb-tiny", group_size=group_size))
    table.reset_state()
    table.E += torch.randint(-9, 9, table.E.shape, dtype=torch.int8)
    seen = capture(table)
    ids = torch.randint(0, 17, (2, tokens // 2 + 1))
    weight = naive_weight(table).requires_grad_()
    expected = F.embedding(ids, weight)
    y = table(ids)
    grad_y = torch.randn_like(y)
    expected.backward(grad_y)
    y.backward(grad_y)
    assert_same("rows", expected.detach(), y.detach())
    assert_same("dW", weight.grad, seen[0])


def test_unattached_backward_changes_nothing():
    layer = make_linear(12, 40)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(5, 40, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    for name, tensor in layer.state_dict().items():
        assert_same(name, before[name], tensor)


@pytest.mark.parametrize("rule", RULES)
def test_layer_state_is_integer_and_keeps_no_float(rule):
    layer = make_linear(12, 40, rule)
    capture(layer)
    layer(torch.randn(5, 40, requires_grad=True)).sum().backward()
    tensors = [*layer.parameters(), *layer.buffers()]
    assert tensors
    assert not any(tensor.is_floating_point() for tensor in tensors)


def test_reset_draws_all_three_trits_evenly_and_zero_padding():
    layer = make_linear(500, 203)
    shares = [(layer.trits() == value).float().mean().item() for value in (-1, 0, 1)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.01)
    residual = layer.accum.view(torch.int8)
    assert residual.min() == 0  # momentum nibble is zero, residual nibble uniform over 16 steps
    assert torch.bincount(layer.accum.flatten().long(), minlength=256)[:16].min() > 500 * 203 / 16 * 0.9
    assert torch.count_nonzero(layer.accum > 15) == 0


def test_initial_output_has_unit_variance():
    layer = TernaryLinear(300, 400, preset_config("arb-tiny"))
    layer.reset_state()
    assert layer(torch.randn(200, 300)).var().item() == pytest.approx(1, abs=0.1)


def test_correlation_votes_move_the_scale():
    layer = make_linear(4, 64, "correlation", 32)
    before = layer.scale()
    layer.corr_accum += 32
    layer.step_counter += 4
    assert_same("scale", before * 2.0 ** (4.0 * 32 / (4 * 32)), layer.scale())


def test_bfloat16_activations_stay_bfloat16():
    layer = make_linear(12, 40)
    x = torch.randn(5, 40, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert layer.T_packed.dtype == torch.uint8
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 40)).dtype == torch.bfloat16
