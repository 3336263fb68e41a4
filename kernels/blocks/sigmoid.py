"""The logistic function, with the same bits on every CPU and for every batch."""

from __future__ import annotations

import torch


class SigmoidFunction(torch.autograd.Function):
    """Saves only its result. Backward uses basic operations, which round the same everywhere."""

    @staticmethod
    def forward(ctx, x):
        wide = x.to(torch.float64 if x.is_cpu else torch.float32, copy=True)
        y = wide.mul_(0.5).tanh_().mul_(0.5).add_(0.5).to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        (y,) = ctx.saved_tensors
        return (1 - y).mul_(y).mul_(grad_y)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)) of floats (...), in their dtype, as 0.5 + 0.5 * tanh(x / 2).

    On a CPU, torch.sigmoid rounds differently in a partly filled vector register and on strided input: the same value
    can give another result in another batch. torch.tanh does not, but in float32 it rounds differently on CPUs of
    different makers. Computed in float64 and rounded, the result is always the same.
    """
    return SigmoidFunction.apply(x)
