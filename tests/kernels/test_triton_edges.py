"""Kernels with nothing to do: no row, no id, no token. The launchers give empty results of the right form."""

import torch

from arb_kernels.backend import use_backend
from arb_kernels.blocks.lstm_gates import naive_lstm_gates
from arb_kernels.blocks.lstm_gates_triton import triton_lstm_gates
from arb_kernels.formats.packing import naive_unpack_levels, pack_levels
from arb_kernels.formats.packing_triton import triton_gather_rows, triton_unpack_levels
from arb_kernels.formats.rule_states import CorrelationState, FlipState
from arb_kernels.matmul.int8_matmul import int8_matmul
from arb_kernels.matmul.matvec_triton import triton_packed_matvec
from arb_kernels.matmul.quantise_triton import triton_quantise_tokens, triton_scale_sums
from arb_kernels.rules.correlation import naive_correlation_update
from arb_kernels.rules.correlation_triton import triton_correlation_update
from arb_kernels.rules.flip_triton import triton_flip_update
from arb_kernels.rules.sparse_momentum import sparse_momentum_update
from support.tensors import assert_same, copied, random_momentum_state, random_trits

COLUMNS, GROUP = 70, 32


def same(expected, got):
    for ref, out in zip(expected, got, strict=True):
        assert_same("result", ref, out)


def test_no_rows(triton_device):
    trits = torch.empty(0, COLUMNS, dtype=torch.int8, device=triton_device)
    packed = pack_levels(trits)
    same([naive_unpack_levels(packed, COLUMNS)], [triton_unpack_levels(packed, COLUMNS)])
    dW = torch.empty(0, COLUMNS, device=triton_device)
    votes = torch.empty(0, 3, dtype=torch.int8, device=triton_device)
    state = FlipState(packed, votes, trits, votes)
    assert triton_flip_update(state, dW, GROUP, 2).item() == 0
    state = CorrelationState(packed, votes.long(), torch.tensor(4, device=triton_device))
    expected = naive_correlation_update(state, dW, GROUP)
    triton_correlation_update(state, dW, GROUP)
    same(expected, state)


def test_no_tokens(triton_device):
    values = torch.empty(0, COLUMNS, device=triton_device)
    codes, scale = triton_quantise_tokens(values)
    assert codes.shape == (0, COLUMNS) and codes.dtype == torch.int8 and scale.shape == (0,)
    sums = torch.empty(0, COLUMNS, dtype=torch.int32, device=triton_device)
    assert triton_scale_sums(sums, scale).shape == (0, COLUMNS)
    trits = random_trits(5, COLUMNS).to(triton_device)
    row_scale = torch.ones(5, device=triton_device)
    assert triton_packed_matvec(codes, pack_levels(trits), scale, row_scale).shape == (0, 5)
    assert int8_matmul(codes, trits, scale, row_scale, largest=1).shape == (0, 5)
    ids = torch.empty(2, 0, dtype=torch.int64, device=triton_device)
    assert triton_gather_rows(pack_levels(trits), ids, COLUMNS).shape == (2, 0, COLUMNS)
    gates, cell = values[:, :8], values[:, :2]
    same(naive_lstm_gates(gates, cell), triton_lstm_gates(gates, cell, 1.0))


def test_no_touched_rows(triton_device):
    state = copied(random_momentum_state(6, COLUMNS), triton_device)
    before = copied(state)
    ids = torch.empty(0, dtype=torch.int64, device=triton_device)
    dW = torch.empty(0, COLUMNS, device=triton_device)
    with use_backend("triton"):
        flips = sparse_momentum_update(state, ids, dW, 3, 0.3)
    assert flips.item() == 0
    same(before, state)
