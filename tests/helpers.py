"""What several test files share: one way to compare tensors, one way to name shapes."""

import pytest
import torch

ERROR_RATIO = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-3}


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


def random_trits(*shape):
    return torch.randint(-1, 2, shape, dtype=torch.int8)
