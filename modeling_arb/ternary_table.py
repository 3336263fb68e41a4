"""TernaryTable: a packed table of which a step reads and updates few rows, at a cost that its size does not set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from arb_kernels.exponents import EIGHTHS, power_of_two
from arb_kernels.groups import group_lengths, split_groups
from arb_kernels.packing import pack_trits
from arb_kernels.scaled_rows import gather_rows
from arb_kernels.state_layout import StateTensor, rule_of_tables, state_layout

from .ternary_matrix import TernaryMatrix

THRESHOLD, SMALLEST_SCALE = 0.7, 2.0**-16


class TernaryTableFunction(torch.autograd.Function):
    """`anchor` is an empty tensor that requires grad: without a float parameter, nothing else would start autograd."""

    @staticmethod
    def forward(ctx, ids, anchor, table, dtype):
        ctx.save_for_backward(ids)
        ctx.table = table
        return table.rows_of(ids, dtype)

    @staticmethod
    def backward(ctx, grad_y):
        (ids,) = ctx.saved_tensors
        table = ctx.table
        if table.armed:
            row_ids, place = ids.flatten().unique(return_inverse=True)
            gradient = grad_y.flatten(0, -2).float()
            dW = torch.ops.aten.embedding_dense_backward(gradient, place, len(row_ids), -1, False)
            table.update_handler(table, row_ids, dW)
        return None, None, None, None


class TernaryTable(TernaryMatrix):
    """ids (...) int64 -> (..., columns). Entries have variance 1 at the start.

    Backward hands over the touched rows and their gradients, (R,) int64 in ascending order and float32 (R, columns);
    an optimizer applies them in `step()`. Rows that were not touched are neither read nor written.
    """

    update_handler: Callable[[TernaryTable, torch.Tensor, torch.Tensor], None] | None = None

    def __init__(self, num_rows: int, dim: int, config):
        nn.Module.__init__(self)
        self.table_rule = rule_of_tables(config.update_rule, config.table_rule)
        self.setup_state(num_rows, dim, config, init_fan_in=1)

    def layout(self) -> dict[str, StateTensor]:
        return state_layout(
            self.table_rule, self.rows, self.columns, self.group_size, self.momentum_bits, votes_by_row=True
        )

    def rows_of(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Decode the rows asked for, without autograd: (..., columns)."""
        scale = power_of_two(self.E[ids], EIGHTHS)
        if self.update_rule == "correlation":
            votes, counts = self.corr_accum[ids].flatten(0, -2), self.step_counter[ids].flatten(0, -2)
            scale = scale * self._correlation_factor(votes, counts).view(scale.shape)
        return gather_rows(self.T_packed, ids, self.columns, scale, self.group_size, dtype)

    @torch.no_grad()
    def write_rows(self, ids: torch.Tensor, values: torch.Tensor) -> None:
        """Let rows ids (R,), each named once, stand for values (R, columns), their accumulators at zero.

        Trits by the threshold of Ternary Weight Networks (Li & Liu 2016, eq. 6): 0.7 of a group's mean magnitude.
        """
        groups = split_groups(values, self.group_size)  # (R, groups, group_size)
        magnitude = groups.abs()
        lengths = group_lengths(self.columns, self.group_size, values.device)
        kept = magnitude > THRESHOLD * (magnitude.sum(-1) / lengths).unsqueeze(-1)
        scale = (magnitude * kept).sum(-1) / kept.sum(-1).clamp(min=1)
        exponent = torch.log2(scale.clamp(min=SMALLEST_SCALE)) * EIGHTHS
        trits = (groups.sign() * kept).flatten(1)[:, : self.columns]
        self.T_packed[ids] = pack_trits(trits.to(torch.int8))
        self.E[ids] = exponent.round().clamp(-128, 127).to(torch.int8)
        for name, spec in self.layout().items():
            if name not in ("T_packed", "E"):
                getattr(self, name)[ids] = torch.zeros((), dtype=spec.dtype, device=ids.device)

    def forward(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        anchor = torch.empty(0, device=ids.device, requires_grad=True)
        return TernaryTableFunction.apply(ids, anchor, self, dtype)
