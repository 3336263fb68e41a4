"""Float baselines of an ARB model: the same blocks and shape with float weights.

`Adam_FP32` trains the weights as they are, `Adam_BF16` does so in bfloat16 autocast. `Adam_STE` is the recipe of BitNet
b1.58 (Ma et al. 2024): float latents, ternary by absmean in the forward, straight through in the backward. Where the
config gives weights two trits, it rounds them to nine levels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from arb_kernels.formats.packing import largest_level
from configuration_arb import ArbConfig
from modeling_arb import ArbForCausalLM

INTEGER_ONLY = ("codebook", "moe_graph")


STEPS = {1: 1.0, 2: 0.675}  # of mean|W| between levels, by trits: BitNet's, and the least squares of a normal W


class AbsmeanLevels(nn.Module):
    """W -> step * clip(round(W / step), -L, L), with the identity's gradient; L is 1 for one trit, 4 for two."""

    def __init__(self, trits: int):
        super().__init__()
        self.step, self.largest = STEPS[trits], largest_level(trits)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        scale = self.step * weight.abs().mean().clamp_min(1e-8)
        rounded = (weight / scale).round().clamp(-self.largest, self.largest) * scale
        return rounded.detach() + (weight - weight.detach())


class FloatEmbedding(nn.Module):
    """A float table with the interface of TernaryEmbedding."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return F.embedding(ids, self.weight).to(dtype)


class FloatLinear(nn.Module):
    """A float matrix with the interface of TernaryLinear."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class ArbFloatBaseline(ArbForCausalLM):
    """ArbForCausalLM with every ternary matrix replaced by a float one of the same shape and initial variance.

    straight_through: rounded to levels in the forward. autocast: products in bfloat16, weights and sums of gradients in
    float32. Raises ValueError for blocks that have integer state besides matrices.
    """

    def __init__(self, config: ArbConfig, straight_through: bool = False, autocast: bool = False):
        for block in INTEGER_ONLY:
            if getattr(config, block) is not None:
                raise ValueError(f"{block}={getattr(config, block)!r}: the float baselines do not have this block")
        super().__init__(config)
        self.autocast = autocast
        for name, matrix in self.ternary_matrices().items():
            weight = torch.randn(matrix.rows, matrix.columns) / matrix.init_fan_in**0.5
            layer = FloatLinear(weight) if isinstance(matrix, nn.Linear) else FloatEmbedding(weight)
            if straight_through:
                parametrize.register_parametrization(layer, "weight", AbsmeanLevels(matrix.trits))
            self.set_submodule(name, layer)

    def forward(self, *args, **kwargs):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return super().forward(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
