"""TernaryLinear: y = x @ W_eff^T, with a backward that updates the weights and keeps no float."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .ternary_matrix import TernaryMatrix


class TernaryLinearFunction(torch.autograd.Function):
    """Saves only x; W_eff is made again in backward, and dW dies there."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return F.linear(x, layer.effective_weight(x.dtype))

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        grad_x = grad_y @ ctx.layer.effective_weight(grad_y.dtype) if ctx.needs_input_grad[0] else None
        if ctx.layer.armed:
            dW = grad_y.flatten(0, -2).T @ x.flatten(0, -2)
            ctx.layer.hand_over(dW.float())
        return grad_x, None


class TernaryLinear(TernaryMatrix, nn.Linear):
    """(..., in_features) -> (..., out_features), no bias. An nn.Linear without a weight, so that peft finds it."""

    def __init__(self, in_features: int, out_features: int, config):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.setup_state(out_features, in_features, config, init_fan_in=in_features)

    @property
    def qweight(self) -> torch.Tensor:
        """Where peft looks for the device of a quantised layer."""
        return self.T_packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return TernaryLinearFunction.apply(x, self)
