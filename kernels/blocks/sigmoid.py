"""The logistic function in the one form that every caller shares."""

from __future__ import annotations

import torch


class SigmoidFunction(torch.autograd.Function):
    """Saves its result alone; the backward is of basic operations, which round alike everywhere."""

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

    On a CPU torch.sigmoid rounds differently where a vector register is not full and where the input is strided, so
    the same value could give another result in another batch; torch.tanh does not, but in float32 it rounds
    differently from one make of CPU to another. Rounded from float64 both are the same.
    """
    return SigmoidFunction.apply(x)
