"""TernaryExperts: ternary MLPs; each token visits its best few, balanced without an auxiliary loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from arb_kernels.formats.packing import unpack_levels
from arb_kernels.formats.state_layout import StateTensor
from arb_kernels.matmul.int8_matmul import EXACT_SUM
from arb_kernels.matmul.quantise import LARGEST_CODE, quantise_tokens
from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.integer_state import ObservedState
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_embedding import TernaryEmbedding
from modeling_arb.layers.ternary_linear import FloatLinearFunction, Int8LinearFunction, TernaryLinear

BIAS_STEP = 1 / 16  # of a logit
MAX_BIAS = 127
BIASES = ((-MAX_BIAS, MAX_BIAS),)
GROUPED_MULTIPLE = 4  # torch's grouped product needs strides of 16 bytes
GROUPED_BYTES = 1 << 26  # at most, of stacked float32 weights: a larger expert uses a GPU fully by itself


class GroupedLinearFunction(torch.autograd.Function):
    """Multiplies each segment of rows by its own layer's weights: one grouped product in forward and two in backward.

    Codes and levels are small integers, whose float32 sums are exact over as many columns as `_is_grouped` allows, in
    TF32 too: forward equals Int8LinearFunction bit for bit. Backward multiplies float32 gradients without rounding them
    to int8.
    x (M, K), expert int64 (M,), ascending, ends int32 (E,), one past each segment -> (M, N).
    """

    @staticmethod
    def forward(ctx, x, expert, ends, layers):
        codes, token_scale = quantise_tokens(x.float().contiguous())
        ctx.save_for_backward(codes, token_scale, expert, ends)
        ctx.layers, ctx.uses = layers, [layer.begin_use() for layer in layers]
        levels, scale = stacked_weights(layers)
        sums = F.grouped_mm(codes.float(), levels.transpose(1, 2), offs=ends)
        return (sums * token_scale[:, None] * scale[expert]).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        codes, token_scale, expert, ends = ctx.saved_tensors
        for layer, use in zip(ctx.layers, ctx.uses, strict=True):
            layer.end_use(use)
        levels, scale = stacked_weights(ctx.layers)
        gradient = grad_y.float()
        grad_x = F.grouped_mm(gradient * scale[expert], levels, offs=ends)
        if any(layer.armed for layer in ctx.layers):
            by_token = gradient * token_scale[:, None]
            dW = F.grouped_mm(by_token.T, codes.float(), offs=ends)
            visited = ends.diff(prepend=ends.new_zeros(1)) > 0  # stays on the device: backward must not wait for it
            for layer, layer_dW, used in zip(ctx.layers, dW, visited, strict=True):
                if layer.armed:
                    layer.gradient_sink.dense(layer, layer_dW, used)
        return grad_x.to(grad_y.dtype), None, None, None


def stacked_weights(layers: Sequence[TernaryLinear]) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels float32 (E, N, K) and row scales float32 (E, N) of equally large layers: temporaries of one product."""
    packed = torch.cat([layer.T_packed for layer in layers])
    levels = unpack_levels(packed, layers[0].columns, torch.float32)
    levels = levels.contiguous().view(len(layers), -1, levels.shape[1])
    return levels, torch.stack([layer.scale().flatten() for layer in layers])


class TernaryExperts(ObservedState):
    """(N, D) -> (N, D): the gated sum of each token's `top_k` experts, each up, squared ReLU, norm, down.

    logits = rms_norm(x) @ centroids^T / sqrt(D); experts are chosen by logits + bias / 16, and gated by a softmax over
    the chosen logits without the bias (DeepSeek-V3, arXiv:2412.19437, section 2.1.2, eq. 16; there the gates are
    normalised sigmoids). After each step a bias moves by one towards an even load. All matrices are `shared`, because a
    looped core uses them several times per forward.

    grouped: True and False force one product over all experts or a loop over them; None goes by the device and the
    experts' size. Without integer matmuls (one scale a row), with widths that are not a multiple of 4, or with sums
    that float32 does not hold, it is always the loop.
    """

    expert_bias: torch.Tensor
    grouped: bool | None = None

    def __init__(self, config: ArbConfig):
        nn.Module.__init__(self)
        options, width = config.block("moe_graph"), config.hidden_size
        self.num_experts, self.top_k, self.eps = options["num_experts"], options["top_k"], config.rms_norm_eps
        size = options["expert_size"] or 2 * width
        self.centroids = TernaryEmbedding(self.num_experts, width, config, "experts")
        up = [TernaryLinear(width, size, config, "experts") for _ in range(self.num_experts)]
        down = [TernaryLinear(size, width, config, "experts") for _ in range(self.num_experts)]
        self.columns = (width, size)
        self.up_proj, self.down_proj = nn.ModuleList(up), nn.ModuleList(down)
        for matrix in (self.centroids, *up, *down):
            matrix.shared = True
        self.register_state(config.training_state)

    def layout(self) -> dict[str, StateTensor]:
        return {"expert_bias": StateTensor((self.num_experts,), torch.int8, "expert balance", True, BIASES)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = rms_norm(x, self.eps)
        chosen, gates = self.route(x)
        expert, order = chosen.flatten().sort(stable=True)
        counts = (expert[:, None] == torch.arange(self.num_experts, device=x.device)).sum(0)
        self.observe(counts[None])
        y = self._visit(x[order // self.top_k], expert, counts)
        y = y[order.argsort()].view(*chosen.shape, -1)  # a permutation and a sum: no scattered addition
        return (gates[..., None] * y).sum(1)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed x (N, D) -> chosen experts int64 (N, top_k), best first, and their gates in x's dtype."""
        # not a float matmul over looked-up rows: exact sums choose alike however many tokens come together
        linear = Int8LinearFunction if self.centroids.integer_matmuls else FloatLinearFunction
        logits = linear.apply(x, self.centroids).float() * x.shape[-1] ** -0.5
        ranking = logits.detach() + self.expert_bias * BIAS_STEP
        chosen = ranking.argsort(dim=1, descending=True, stable=True)[:, : self.top_k]
        return chosen, logits.gather(1, chosen).softmax(1).to(x.dtype)

    def _visit(self, x: torch.Tensor, expert: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """x (M, D), sorted by expert -> each row through its expert."""
        if self._is_grouped(x):
            ends = counts.cumsum(0).int()
            hidden = GroupedLinearFunction.apply(x, expert, ends, self.up_proj)
            return GroupedLinearFunction.apply(self._activate(hidden), expert, ends, self.down_proj)
        segments = zip(self.up_proj, self.down_proj, x.split(counts.tolist()), strict=True)
        return torch.cat([down(self._activate(up(part))) for up, down, part in segments if len(part)])

    def _activate(self, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(F.relu(hidden).square(), self.eps)

    def _is_grouped(self, x: torch.Tensor) -> bool:
        small = self.num_experts * 4 * self.up_proj[0].logical_weights <= GROUPED_BYTES
        wanted = x.is_cuda and small if self.grouped is None else self.grouped
        aligned = all(columns % GROUPED_MULTIPLE == 0 for columns in self.columns)
        exact = max(self.columns) * LARGEST_CODE * self.centroids.largest_level <= EXACT_SUM
        return wanted and aligned and exact and self.centroids.integer_matmuls

    @torch.no_grad()
    def apply_observations(self, counts: torch.Tensor, *, key: int) -> None:
        """counts int64 (R, E): tokens per expert in R forwards. Each bias moves by one towards an even load."""
        load = counts.sum(0)
        step = (load.sum() - load * self.num_experts).sign()
        self.expert_bias.copy_((self.expert_bias + step).clamp(-MAX_BIAS, MAX_BIAS))
