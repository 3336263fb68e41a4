"""TernaryLinear: y = x @ W_eff^T. Backward updates the integer weights and keeps no float tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from arb_kernels.formats.decode_layout import decoding_bytes
from arb_kernels.matmul.decode_linear import decode_linear
from arb_kernels.matmul.int8_matmul import int8_matmul
from arb_kernels.matmul.quantise import quantise_gradient, quantise_tokens
from configuration_arb.configuration_arb import ArbConfig

from .ternary_matrix import DECODED, ROW_SCALES, TernaryMatrix

SCALE_BYTES = 4  # float32
ZERO_ROW_TRACE = 2.0**-20


class FloatLinearFunction(torch.autograd.Function):
    """The float reference. Saves only x; backward computes W_eff again, and frees dW once the sink has it."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer, ctx.use = layer, layer.begin_use()
        return F.linear(x, layer.effective_weight(x.dtype))

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        ctx.layer.end_use(ctx.use)
        grad_x = grad_y @ ctx.layer.effective_weight(grad_y.dtype) if ctx.needs_input_grad[0] else None
        if ctx.layer.armed:
            dW = grad_y.flatten(0, -2).T @ x.flatten(0, -2)
            ctx.layer.gradient_sink.dense(ctx.layer, dW.float())
        return grad_x, None


class Int8LinearFunction(torch.autograd.Function):
    """All three matmuls on int8 with int32 sums. Saves the int8 codes of x, a quarter of the float activations.

    y = (codes @ T^T) * token scale * S dx = (q(dy * S) @ T) * token scale, S is multiplied into dy, because the sum
    runs over the rows dW = (q(dy * x's token scale)^T @ codes) * output scale, the token scale is multiplied in for the
    same reason
    """

    @staticmethod
    def forward(ctx, x, layer):
        codes, token_scale = quantise_tokens(x.flatten(0, -2).float().contiguous())
        ctx.save_for_backward(codes, token_scale)
        ctx.layer, ctx.use = layer, layer.begin_use()
        y = int8_matmul(codes, layer.levels(), token_scale, layer.scale().flatten(), largest=layer.largest_level)
        return y.to(x.dtype).view(*x.shape[:-1], layer.rows)

    @staticmethod
    def backward(ctx, grad_y):
        codes, token_scale = ctx.saved_tensors
        layer = ctx.layer
        layer.end_use(ctx.use)
        gradient, scale = grad_y.flatten(0, -2).float().contiguous(), layer.scale().flatten()
        by_token, by_token_scale, by_output, output_scale = quantise_gradient(
            gradient, scale, token_scale if layer.armed else None
        )
        grad_x = int8_matmul(by_token, layer.levels(), by_token_scale, transposed=True, largest=layer.largest_level)
        if layer.armed:
            assert by_output is not None and output_scale is not None
            layer.gradient_sink.dense(layer, int8_matmul(by_output, codes, output_scale, transposed=True))
        return grad_x.to(grad_y.dtype).view(*grad_y.shape[:-1], layer.columns), None


class TernaryLinear(TernaryMatrix, nn.Linear):
    """(..., in_features) -> (..., out_features), no bias. An nn.Linear without a float weight, so that peft finds it.

    peft reads `qweight`, `W_q` and `dequantize` of a quantised layer: its device, and W_eff for DoRA.
    """

    def __init__(self, in_features: int, out_features: int, config: ArbConfig, role: str = "blocks"):
        nn.Module.__init__(self)
        self.role = role
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)
        self.setup_state(out_features, in_features, config, init_fan_in=in_features)

    @property
    def qweight(self) -> torch.Tensor:
        return self.T_packed

    W_q = qweight

    def dequantize(self) -> torch.Tensor:
        """float32 (out_features, in_features), a temporary. DoRA divides by row norms, so a row of zeros gets a small
        value."""
        weight = self.effective_weight(torch.float32)
        weight[:, 0] += ZERO_ROW_TRACE * (weight == 0).all(1)
        return weight

    def generation_caches(self, device: torch.device) -> dict[str, int]:
        if not self.integer_matmuls:
            return {}
        sizes = {
            DECODED: decoding_bytes(self.rows, self.columns, self.trits, device),
            ROW_SCALES: self.rows * SCALE_BYTES,
        }
        return {name: size for name, size in sizes.items() if size}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not self.integer_matmuls:
            return FloatLinearFunction.apply(x, self)
        return Int8LinearFunction.apply(x, self) if torch.is_grad_enabled() else self._infer(x)

    def _infer(self, x: torch.Tensor) -> torch.Tensor:
        """The same result from weights in their decoding form, for evaluation and generation."""
        weight, scale = self.inference_weight()
        values = x.reshape(-1, self.columns).float()
        y = decode_linear(values, weight, self.rows, scale, self.trits)
        return y.to(x.dtype).view(*x.shape[:-1], self.rows)
