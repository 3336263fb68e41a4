"""What several test files share: one way to compare tensors, one way to name shapes."""

import pytest
import torch

from arb_kernels.formats.momentum_format import MomentumFormat
from arb_kernels.formats.packing import largest_level, pack_levels
from arb_kernels.formats.rule_states import MomentumState
from arb_kernels.native_library import native_library
from arb_kernels.triton_support import triton_runs_on

NOT_BUILT = pytest.mark.skipif(native_library() is None, reason="the native kernels were not built here")
TRITON_RUNS = triton_runs_on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
NO_TRITON = pytest.mark.skipif(not TRITON_RUNS, reason="triton neither runs nor is interpreted here")
BACKENDS = ["torch", pytest.param("native", marks=NOT_BUILT), pytest.param("triton", marks=NO_TRITON)]
ERROR_RATIO = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def assert_same(name, ref, out):
    """Integers exactly, floats by the ratio of the error's norm to the reference's."""
    assert out.dtype == ref.dtype and out.shape == ref.shape, f"{name}: {out.dtype} {tuple(out.shape)}"
    if not ref.is_floating_point():
        assert torch.equal(ref, out), f"{name}: {(ref != out).sum()} of {ref.numel()} differ"
        return
    ratio = (ref - out).double().norm() / ref.double().norm().clamp_min(1e-30)
    assert ratio < ERROR_RATIO[ref.dtype], f"{name}: error ratio {ratio:.2e}"


def shapes(*sizes):
    """Rows of a shape table for pytest.mark.parametrize, with ids like 33x100."""
    return [pytest.param(*size, id="x".join(map(str, size))) for size in sizes]


def random_levels(*shape, trits=1):
    """Uniform levels of weights of so many trits, int8."""
    return torch.randint(-largest_level(trits), largest_level(trits) + 1, shape, dtype=torch.int8)


def random_trits(*shape):
    return random_levels(*shape)


def random_momentum_state(rows, columns, bits=4, trits=1):
    """MomentumState of a fresh matrix: random levels and residuals, no momentum."""
    form = MomentumFormat(bits)
    residual = torch.randint(0, form.cell, (rows, columns)).to(form.dtype)
    accum_exp = torch.zeros(rows, -(-columns // 64), dtype=torch.int8)
    return MomentumState(pack_levels(random_levels(rows, columns, trits=trits), trits), residual, accum_exp)


def copied(state, device=None):
    """A rule's state with a copy of every tensor."""
    return type(state)(*(tensor.clone().to(device) for tensor in state))


def random_gradient(rows, columns, scale=1.0):
    """Rows and columns of unequal size, some elements zero, some far out."""
    row, column = torch.randn(rows, 1).exp(), torch.randn(columns).exp()
    heavy = torch.randn(rows, columns) ** 3
    return scale * row * column * heavy * (torch.rand(rows, columns) > 0.1)


def random_text(seed, rows=4, ctx=24):
    """int64 (rows, ctx) of eight letters, the same for a seed whatever else draws."""
    return torch.randint(97, 105, (rows, ctx), generator=torch.Generator().manual_seed(seed))


def training_step(model, optimizer, ids):
    """One step on ids; returns its loss."""
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def decode(model, ids, pieces, mask=None):
    """Logits of the pieces one after the other, cached; pieces as torch.split takes them."""
    cache, logits, end = None, [], 0
    for piece in ids.split(pieces, dim=1):
        end += piece.shape[1]
        seen = None if mask is None else mask[:, :end]
        out = model(piece, attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)
