"""TernaryLinear and TernaryEmbedding against float layers with the same effective weight."""

import pytest
import torch
import torch.nn.functional as F

from arb_kernels.backend import use_backend
from arb_kernels.formats.packing import packed_width
from arb_kernels.matmul.quantise import naive_quantise_gradient, naive_quantise_tokens
from configuration_arb import preset_config
from modeling_arb.layers.ternary_embedding import TernaryEmbedding
from modeling_arb.layers.ternary_linear import TernaryLinear
from support.gradients import Sink
from support.tensors import assert_same

SIZES = [(1, 1), (3, 5), (7, 33), (64, 100), (65, 128)]
GROUPS = [pytest.param(0, id="row"), pytest.param(4, id="G4"), pytest.param(32, id="G32")]
RULES = ["momentum", "flip", "correlation"]
TRITS = pytest.mark.parametrize("trits", [1, 2])


def make_linear(rows, columns, rule="momentum", group_size=0, compute="float", trits=1):
    settings = {"update_rule": rule, "group_size": group_size, "compute": compute, "trits_per_weight": trits}
    config = preset_config("arb-tiny", **settings)
    layer = TernaryLinear(columns, rows, config)
    layer.reset_state()
    layer.E += torch.randint(-9, 9, layer.E.shape, dtype=torch.int8)
    return layer


def capture(layer):
    """Arm a layer so that it keeps the dW it hands over."""
    seen = []
    layer.gradient_sink = Sink(lambda matrix, dW: seen.append(dW.clone()))
    return seen


def naive_weight(layer):
    weight = layer.levels().double()
    for column in range(layer.columns):
        weight[:, column] *= 2.0 ** (layer.E[:, column // layer.group_size].double() / 8)
    return weight.float()


@TRITS
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("rows, columns", SIZES)
def test_effective_weight_is_scale_times_level(rows, columns, group_size, trits):
    layer = make_linear(rows, columns, group_size=group_size, trits=trits)
    assert_same("W_eff", naive_weight(layer), layer.effective_weight(torch.float32))


@TRITS
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("rows, columns", SIZES)
def test_linear_forward_and_every_gradient(rows, columns, group_size, trits):
    layer = make_linear(rows, columns, group_size=group_size, trits=trits)
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


@TRITS
@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.parametrize("group_size", GROUPS)
def test_embedding_forward_and_gradient(tokens, group_size, trits):
    """Fewer ids than rows take the path that decodes only those rows; both give the same rows and dW."""
    table = TernaryEmbedding(17, 45, preset_config("arb-tiny", group_size=group_size, trits_per_weight=trits))
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


@TRITS
def test_reset_draws_all_levels_evenly_and_zero_padding(trits):
    layer = make_linear(500, 203, trits=trits)
    most = layer.largest_level
    shares = [(layer.levels() == value).float().mean().item() for value in range(-most, most + 1)]
    assert shares == pytest.approx([3**-trits] * 3**trits, abs=0.01)
    width = packed_width(203)
    for plane in layer.T_packed.split(width, 1):  # its last two bytes have four digits, the fifth is padding
        assert plane.max() <= 242 and plane[:, -2:].max() <= 80 < plane[:, :-2].max()
    residual = layer.accum.view(torch.int8)
    assert residual.min() == 0  # momentum nibble is zero, residual nibble uniform over 16 steps
    assert torch.bincount(layer.accum.flatten().long(), minlength=256)[:16].min() > 500 * 203 / 16 * 0.9
    assert torch.count_nonzero(layer.accum > 15) == 0


@TRITS
def test_initial_output_has_unit_variance(trits):
    layer = TernaryLinear(300, 400, preset_config("arb-tiny", trits_per_weight=trits))
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


INT8_SIZES = [(1, 1), (3, 5), (17, 33), (64, 100), (65, 128)]


def int8_run(layer, x, grad_y):
    seen = capture(layer)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad_y)
    return y.detach(), x.grad, seen[0]


@TRITS
@pytest.mark.parametrize("rows, columns", INT8_SIZES)
def test_int8_linear_forward_and_every_gradient(rows, columns, trits):
    """Against the same sums in double precision over the codes: only the float scales round."""
    layer = make_linear(rows, columns, compute="auto", trits=trits)
    x, grad_y = torch.randn(2, 9, columns), torch.randn(2, 9, rows)
    y, grad_x, dW = int8_run(layer, x, grad_y)
    levels, scale = layer.levels().double(), layer.scale().flatten()
    codes, token_scale = naive_quantise_tokens(x.flatten(0, 1))
    decoded = codes.double() * token_scale.double()[:, None]
    by_token, by_token_scale, by_output, output_scale = naive_quantise_gradient(
        grad_y.flatten(0, 1), scale, token_scale
    )
    expected_y = decoded @ levels.T * scale.double()
    expected_x = by_token.double() @ levels * by_token_scale.double()[:, None]
    expected_dW = by_output.double() @ codes.double() * output_scale.double()[:, None]
    assert_same("y", expected_y.float().view_as(y), y)
    assert_same("grad_x", expected_x.float().view_as(grad_x), grad_x)
    assert_same("dW", expected_dW.float(), dW)


def test_int8_linear_is_near_the_float_one():
    """Rounding to 8 bits costs under 2 % of each result's norm, and its mean over keys less: it has no bias."""
    layer = make_linear(128, 192, compute="int8")
    reference = make_linear(128, 192)
    reference.load_state_dict(layer.state_dict())
    x, grad_y = torch.randn(4, 64, 192), torch.randn(4, 64, 128)
    for name, ref, out in zip(
        ("y", "grad_x", "dW"), int8_run(reference, x, grad_y), int8_run(layer, x, grad_y), strict=True
    ):
        assert (ref - out).norm() / ref.norm() < 0.02, name


@TRITS
@pytest.mark.parametrize("rows, columns", INT8_SIZES)
def test_int8_linear_gives_the_same_bits_on_every_backend(rows, columns, trits):
    layer = make_linear(rows, columns, compute="auto", trits=trits)
    x, grad_y = torch.randn(2, 9, columns), torch.randn(2, 9, rows)
    with use_backend("torch"):
        expected = int8_run(layer, x, grad_y)
    for name, ref, out in zip(("y", "grad_x", "dW"), expected, int8_run(layer, x, grad_y), strict=True):
        assert torch.equal(ref, out), name


def test_int8_linear_saves_a_quarter_of_the_activations():
    layer = make_linear(8, 256, compute="int8")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(32, 256, requires_grad=True))
    assert sum(t.numel() * t.element_size() for t in saved) == 32 * 256 + 32 * 4


def test_int8_needs_one_scale_a_row(caplog):
    """Said once, however many layers."""
    layers = [make_linear(8, 64, group_size=32, compute="int8") for _ in range(2)]
    assert not any(layer.integer_matmuls for layer in layers)
    assert caplog.text.count("compute='int8' needs one scale a row") == 1 and "group_size=32" in caplog.text


def test_a_frozen_int8_layer_passes_gradients_through():
    layer = make_linear(12, 40, compute="int8")
    x = torch.randn(5, 40, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.norm() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_reaches_dW(bad):
    layer = make_linear(12, 40, compute="int8")
    grad_y = torch.randn(1, 5, 12)
    grad_y[0, 1, 2] = bad
    assert not int8_run(layer, torch.randn(1, 5, 40), grad_y)[2].sum().isfinite()
