"""The decode layout: a round trip at any shape, exact products, and a cache that follows the weights."""

import copy

import pytest
import torch

from arb_kernels.backend import use_backend
from arb_kernels.formats.decode_layout import HUGE_PAGE, from_decode_layout, in_huge_pages, to_decode_layout
from arb_kernels.matmul.decode_linear import MATVEC_COLUMNS, decode_linear
from arb_kernels.matmul.int8_matmul import naive_int8_matmul
from arb_kernels.matmul.quantise import naive_quantise_tokens
from configuration_arb import preset_config
from modeling_arb.layers.ternary_linear import TernaryLinear
from support.tensors import BACKENDS, NOT_BUILT, random_trits, shapes
from training_arb.optim.integer_rules import MomentumRule, UpdateContext

SHAPES = shapes((1, 1), (16, 16), (17, 33), (40, 100), (100, 51))


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_round_trip(rows, columns):
    trits = random_trits(rows, columns)
    layout = to_decode_layout(trits)
    assert layout.shape == (-(-rows // 16), -(-columns // 16), 64)
    assert torch.equal(from_decode_layout(layout, rows, columns), trits)


def test_bytes_are_where_the_kernels_look():
    trits = torch.zeros(16, 16, dtype=torch.int8)
    trits[3, 9], trits[3, 1] = 1, -1  # byte 4 * 3 + 1: part 2 holds 1 + 1, part 0 holds 0, the others 1
    assert to_decode_layout(trits)[0, 0, 13] == 0b01_10_01_00


@pytest.mark.parametrize("instructions", ["best", "avx2"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 25])
@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_linear(monkeypatch, backend, rows, columns, tokens, instructions):
    monkeypatch.setenv("ARB_ISA", instructions)
    trits = random_trits(rows, columns)
    layout = to_decode_layout(trits)
    values, scale = torch.randn(tokens, columns), torch.rand(rows)
    values[tokens // 2] *= tokens == 1  # an all-zero token among others
    with use_backend(backend):
        out = decode_linear(values, layout, rows, scale)
    codes, token_scale = naive_quantise_tokens(values)
    assert torch.equal(naive_int8_matmul(codes, trits, token_scale, scale), out)


def make_layer():
    layer = TernaryLinear(70, 50, preset_config("arb-tiny"))
    layer.reset_state()
    return layer


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_equals_training_forward(backend):
    layer, x = make_layer(), torch.randn(2, 3, 70)
    with use_backend(backend):
        trained = layer(x).detach()
        with torch.no_grad():
            assert torch.equal(layer(x), trained)


def change_by_update(layer):
    dW = torch.randn(layer.rows, layer.columns)
    MomentumRule().update(layer, dW, UpdateContext(step=0, key=1, lr=0.9))


def change_by_loading(layer):
    layer.load_state_dict(make_layer().state_dict())


def change_of_scale(layer):
    layer.E += 3


def change_of_buffer(layer):
    layer.T_packed = make_layer().T_packed


@pytest.mark.parametrize("change", [change_by_update, change_by_loading, change_of_scale, change_of_buffer])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kept_weights_follow_every_change(backend, change):
    layer, x = make_layer(), torch.randn(3, 70)
    with use_backend(backend):
        with torch.no_grad():
            before = layer(x)
        change(layer)
        with torch.no_grad():
            after = layer(x)
        assert not torch.equal(before, after)
        assert torch.equal(after, layer(x).detach())


@NOT_BUILT
def test_kept_weights_are_no_state_and_take_a_quarter_byte():
    layer = make_layer()
    with torch.no_grad(), use_backend("native"):
        layer(torch.randn(1, 70))
        weight, _ = layer.inference_weight()
    assert set(layer.state_dict()) == set(layer.layout())
    assert weight.numel() == 64 * 80 // 4
    twin = copy.deepcopy(layer)
    twin.E += 8
    x = torch.randn(1, 70)
    with torch.no_grad():
        assert torch.equal(twin(x), layer(x) * 2)


@NOT_BUILT
def test_large_layouts_start_at_a_huge_page():
    trits = random_trits(2048, 4100)
    layout = to_decode_layout(trits)
    assert layout.data_ptr() % HUGE_PAGE == 0
    assert torch.equal(from_decode_layout(layout, 2048, 4100), trits)
    small = torch.zeros(10)
    assert in_huge_pages(small) is small
    floats = torch.randn(1000, 1000)
    assert torch.equal(in_huge_pages(floats), floats)


@NOT_BUILT
@pytest.mark.parametrize("columns", [MATVEC_COLUMNS, MATVEC_COLUMNS + 1])
def test_the_largest_sums_do_not_overflow(columns: int):
    trits, x = torch.ones(3, columns, dtype=torch.int8), torch.ones(1, columns)
    product = decode_linear(x, to_decode_layout(trits), 3, torch.ones(3))
    codes, token_scale = naive_quantise_tokens(x)
    assert torch.equal(product, naive_int8_matmul(codes, trits, token_scale, torch.ones(3)))
