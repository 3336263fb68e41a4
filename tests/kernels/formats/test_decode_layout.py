"""The decode layout: a round trip at any shape, exact products, and a cache that follows the weights."""

import copy

import pytest
import torch

from arb_kernels.backend import use_backend
from arb_kernels.formats.decode_layout import (
    HUGE_PAGE,
    decoding_bytes,
    decoding_form,
    from_decode_layout,
    in_huge_pages,
    layout_trits,
    to_decode_layout,
)
from arb_kernels.formats.packing import largest_level, pack_levels
from arb_kernels.matmul.decode_linear import MATVEC_COLUMNS, decode_linear
from arb_kernels.matmul.int8_matmul import naive_int8_matmul
from arb_kernels.matmul.quantise import naive_quantise_tokens
from configuration_arb import preset_config
from modeling_arb.layers.ternary_linear import TernaryLinear
from support.tensors import BACKENDS, NO_TRITON, NOT_BUILT, random_levels, random_trits, shapes
from training_arb.optim.integer_rules import MomentumRule, UpdateContext

BACKENDS_AND_INSTRUCTIONS = [
    ("torch", "best"),
    pytest.param("native", "best", marks=NOT_BUILT),
    pytest.param("native", "avx2", marks=NOT_BUILT),
    pytest.param("triton", "best", marks=NO_TRITON),
]
SIZES = (1, 1), (16, 16), (17, 33), (40, 100), (100, 51)
SHAPES, TRITS = shapes(*SIZES), pytest.mark.parametrize("trits", [1, 2])


@TRITS
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_round_trip(rows, columns, trits):
    levels = random_levels(rows, columns, trits=trits)
    layout = to_decode_layout(levels, trits)
    assert layout.shape == (-(-rows // 16), -(-columns // 16), 64 * trits) and layout_trits(layout) == trits
    assert torch.equal(from_decode_layout(layout, rows, columns), levels)


def test_bytes_are_where_the_kernels_look():
    trits = torch.zeros(16, 16, dtype=torch.int8)
    trits[3, 9], trits[3, 1] = 1, -1  # byte 4 * 3 + 1: part 2 holds 1 + 1, part 0 holds 0, the others 1
    assert to_decode_layout(trits)[0, 0, 13] == 0b01_10_01_00


def test_bytes_of_two_trits_are_where_the_kernels_look():
    levels = torch.zeros(16, 16, dtype=torch.int8)
    levels[3, 1], levels[3, 5], levels[3, 9], levels[3, 13] = -4, 3, 4, -1
    chunk = to_decode_layout(levels, 2)[0, 0]
    assert chunk[13] == 0x70  # byte 4 * 3 + 1: column 1 holds -4 + 4 in the low half, column 5 holds 3 + 4 above it
    assert chunk[64 + 13] == 0x38  # the second half: column 9 holds 4 + 4, column 13 holds -1 + 4
    chunk[13] = chunk[77] = 0x44
    assert (chunk == 0x44).all()


@pytest.mark.parametrize("tokens", range(1, 21))
@pytest.mark.parametrize("trits", [1, 2, 3])
@pytest.mark.parametrize("backend, instructions", BACKENDS_AND_INSTRUCTIONS)
def test_decode_linear(monkeypatch, backend, trits, tokens, instructions):
    """Every number of tokens that a kernel takes, and more, with levels in the form that the backend reads fastest."""
    monkeypatch.setenv("ARB_ISA", instructions)
    rows, columns = SIZES[tokens % 5]
    levels = random_levels(rows, columns, trits=trits)
    values, scale = torch.randn(tokens, columns), torch.rand(rows)
    values[tokens // 2] *= tokens == 1  # an all-zero token among others
    with use_backend(backend):
        weight = decoding_form(pack_levels(levels, trits), columns)
        out = decode_linear(values, weight, rows, scale, trits)
        kept = decoding_bytes(rows, columns, trits, values.device)
    assert kept == weight.nbytes or (backend == "triton" and kept == 0)
    codes, token_scale = naive_quantise_tokens(values)
    assert torch.equal(naive_int8_matmul(codes, levels, token_scale, scale), out)


@pytest.mark.parametrize("tokens", [3, 9])
@TRITS
@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_reads_the_layout(backend, rows, columns, trits, tokens):
    levels, values, scale = random_levels(rows, columns, trits=trits), torch.randn(tokens, columns), torch.rand(rows)
    with use_backend(backend):
        out = decode_linear(values, to_decode_layout(levels, trits), rows, scale)
    codes, token_scale = naive_quantise_tokens(values)
    assert torch.equal(naive_int8_matmul(codes, levels, token_scale, scale), out)


def make_layer(trits=1):
    layer = TernaryLinear(70, 50, preset_config("arb-tiny", trits_per_weight=trits))
    layer.reset_state()
    return layer


@TRITS
@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_equals_training_forward(backend, trits):
    layer, x = make_layer(trits), torch.randn(2, 3, 70)
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
@TRITS
def test_kept_weights_are_no_state_and_take_a_quarter_or_half_byte(trits):
    layer = make_layer(trits)
    with torch.no_grad(), use_backend("native"):
        layer(torch.randn(1, 70))
        weight, _ = layer.inference_weight()
    assert set(layer.state_dict()) == set(layer.layout())
    assert weight.numel() == 64 * 80 * trits // 4
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
@pytest.mark.parametrize("instructions", ["best", "avx2"])
@pytest.mark.parametrize("columns, tokens", [(MATVEC_COLUMNS, 1), (MATVEC_COLUMNS, 8), (MATVEC_COLUMNS + 1, 1)])
@TRITS
def test_the_largest_sums_do_not_overflow(monkeypatch, trits: int, columns: int, tokens: int, instructions: str):
    """Levels at both ends and codes of +-127, of one sign and of both."""
    monkeypatch.setenv("ARB_ISA", instructions)
    levels, x = torch.full((3, columns), largest_level(trits), dtype=torch.int8), torch.ones(tokens, columns)
    levels[1] *= -1
    levels[2, ::2] *= -1
    x[tokens // 2 :] *= -1
    product = decode_linear(x, to_decode_layout(levels, trits), 3, torch.ones(3))
    codes, token_scale = naive_quantise_tokens(x)
    assert codes.abs().min() == 127
    assert torch.equal(product, naive_int8_matmul(codes, levels, token_scale, torch.ones(3)))
