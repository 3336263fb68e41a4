"""TernaryTable: a large packed table; a step reads and updates only the rows looked up, whatever the table's size."""

from __future__ import annotations

import torch

from arb_kernels.formats.exponents import EIGHTHS, power_of_two
from arb_kernels.formats.groups import group_lengths, split_groups
from arb_kernels.formats.packing import pack_levels
from arb_kernels.formats.scaled_rows import gather_rows
from arb_kernels.formats.state_layout import StateTensor, rule_of_tables, state_layout
from configuration_arb.configuration_arb import ArbConfig

from .ternary_embedding import TernaryEmbedding, sum_by_row

THRESHOLD, SMALLEST_SCALE = 0.7, 2.0**-16


class TernaryTable(TernaryEmbedding):
    """ids (...) int64 -> (..., columns). Entries have variance 1 at the start.

    Backward hands the touched rows and their gradients to the sink; an optimizer applies them in `step()`. Rows that
    were not touched are neither read nor written.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, config: ArbConfig, role: str = "tables"):
        super().__init__(num_embeddings, embedding_dim, config, role)

    def setup_state(self, rows: int, columns: int, config: ArbConfig, init_fan_in: int) -> None:
        self.table_rule = rule_of_tables(config.update_rule, config.table_rule)
        super().setup_state(rows, columns, config, init_fan_in)

    def layout(self) -> dict[str, StateTensor]:
        return state_layout(
            self.table_rule, self.rows, self.columns, self.group_size, self.momentum_bits, self.trits, votes_by_row=True
        )

    def rows_of(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Decode rows `ids` without autograd: (..., columns)."""
        scale = power_of_two(self.E[ids], EIGHTHS)
        if self.update_rule == "correlation":
            votes, counts = self.corr_accum[ids].flatten(0, -2), self.step_counter[ids].flatten(0, -2)
            scale = scale * self._correlation_factor(votes, counts).view(scale.shape)
        return gather_rows(self.T_packed, ids, self.columns, scale, self.group_size, dtype)

    @torch.no_grad()
    def write_rows(self, ids: torch.Tensor, values: torch.Tensor) -> None:
        """Set rows ids (R,), each named once, to the levels near values (R, columns), their accumulators to zero.

        One trit: by the threshold of Ternary Weight Networks (Li & Liu 2016, eq. 6), 0.7 of a group's mean magnitude.
        Two: the largest value of a group has the largest level.
        """
        groups = split_groups(values, self.group_size)  # (R, groups, group_size)
        magnitude = groups.abs()
        if self.trits == 1:
            lengths = group_lengths(self.columns, self.group_size, values.device)
            kept = magnitude > THRESHOLD * (magnitude.sum(-1) / lengths).unsqueeze(-1)
            scale = ((magnitude * kept).sum(-1) / kept.sum(-1).clamp(min=1)).clamp(min=SMALLEST_SCALE)
            levels = groups.sign() * kept
        else:
            scale = (magnitude.amax(-1) / self.largest_level).clamp(min=SMALLEST_SCALE)
            levels = (groups / scale.unsqueeze(-1)).round()
        exponent = torch.log2(scale) * EIGHTHS
        self.T_packed[ids] = pack_levels(levels.flatten(1)[:, : self.columns].to(torch.int8), self.trits)
        self.E[ids] = exponent.round().clamp(-128, 127).to(torch.int8)
        for name, spec in self.layout().items():
            if name not in ("T_packed", "E"):
                getattr(self, name)[ids] = torch.zeros((), dtype=spec.dtype, device=ids.device)

    def pass_on_gradient(self, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """As in an embedding, for the touched rows alone."""
        assert self.gradient_sink is not None
        row_ids, place = ids.unique(return_inverse=True)
        self.gradient_sink.rows(self, row_ids, sum_by_row(place, gradient, len(row_ids)))
