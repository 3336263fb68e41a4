"""TernaryEmbedding: rows of a packed table, looked up and updated without a float table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from arb_kernels.formats.scaled_rows import gather_rows
from configuration_arb.configuration_arb import ArbConfig

from .ternary_matrix import TernaryMatrix


class TernaryEmbeddingFunction(torch.autograd.Function):
    """`anchor`: an empty tensor that requires grad, because ids and integer state do not start autograd."""

    @staticmethod
    def forward(ctx, ids, anchor, layer, dtype):
        ctx.save_for_backward(ids)
        ctx.layer, ctx.use = layer, layer.begin_use()
        return layer.rows_of(ids, dtype)

    @staticmethod
    def backward(ctx, grad_y):
        (ids,) = ctx.saved_tensors
        ctx.layer.end_use(ctx.use)
        if ctx.layer.armed:
            ctx.layer.pass_on_gradient(ids.flatten(), grad_y.flatten(0, -2).float())
        return None, None, None, None


def sum_by_row(ids: torch.Tensor, gradient: torch.Tensor, rows: int) -> torch.Tensor:
    """ids int64 (N,), gradient float32 (N, K) -> float32 (rows, K), summed in the same order on every device."""
    return torch.ops.aten.embedding_dense_backward(gradient, ids, rows, -1, False)


class TernaryEmbedding(TernaryMatrix):
    """ids (...) int64 -> (..., columns). Entries have variance 1 at the start."""

    def __init__(self, num_embeddings: int, embedding_dim: int, config: ArbConfig, role: str = "embedding"):
        nn.Module.__init__(self)
        self.role = role
        self.setup_state(num_embeddings, embedding_dim, config, init_fan_in=1)

    def rows_of(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Decode only the selected rows, unless the whole table is smaller."""
        if ids.numel() >= self.rows:
            return F.embedding(ids, self.effective_weight(dtype))
        return gather_rows(self.T_packed, ids, self.columns, self.scale()[ids], self.group_size, dtype)

    def pass_on_gradient(self, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """ids (N,) and the gradient of the rows looked up, float32 (N, columns): sum by row and pass to the sink."""
        assert self.gradient_sink is not None
        self.gradient_sink.dense(self, sum_by_row(ids, gradient, self.rows))

    def forward(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        anchor = torch.empty(0, device=ids.device, requires_grad=True)
        return TernaryEmbeddingFunction.apply(ids, anchor, self, dtype)
