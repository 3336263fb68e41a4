"""TernaryTable: a large packed table; a step reads and updates only the rows looked up, whatever the table's size."""

from __future__ import annotations

import torch

from arb_kernels.formats.exponents import EIGHTHS, power_of_two
from arb_kernels.formats.groups import group_lengths, split_groups
from arb_kernels.formats.packing import largest_level, pack_levels
from arb_kernels.formats.scaled_rows import gather_rows
from arb_kernels.formats.state_layout import StateTensor, rule_of_tables, state_layout
from configuration_arb.configuration_arb import ArbConfig

from .ternary_embedding import TernaryEmbedding, sum_by_row

THRESHOLD = 0.7  # of a group's mean magnitude: smaller values become zero (Ternary Weight Networks, 1605.04711, eq. 6)
STEP_OF_NINE = 0.5338  # of a group's RMS: least squared error of normal values on nine levels (Max 1960, table II)
SMALLEST_SCALE = 2.0**-16


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
        """Set rows ids (R,), each named once, to levels near values (R, columns), their accumulators to zero."""
        groups = split_groups(values, self.group_size)  # (R, groups, group_size)
        lengths = group_lengths(self.columns, self.group_size, values.device)
        levels, exponent = (_three_levels if self.trits == 1 else _nine_levels)(groups, lengths)
        self.T_packed[ids] = pack_levels(levels.flatten(1)[:, : self.columns].to(torch.int8), self.trits)
        self.E[ids] = exponent
        for name, spec in self.layout().items():
            if name not in ("T_packed", "E"):
                getattr(self, name)[ids] = torch.zeros((), dtype=spec.dtype, device=ids.device)

    def pass_on_gradient(self, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """As in an embedding, for the touched rows alone."""
        assert self.gradient_sink is not None
        row_ids, place = ids.unique(return_inverse=True)
        self.gradient_sink.rows(self, row_ids, sum_by_row(place, gradient, len(row_ids)))


def _three_levels(groups: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values float32 (R, groups, G), padded with zeros, and the groups' lengths (groups,) -> -1, 0, 1 in the shape of
    the values, and E int8 (R, groups)."""
    magnitude = groups.abs()
    kept = magnitude > THRESHOLD * (magnitude.sum(-1) / lengths).unsqueeze(-1)
    return groups.sign() * kept, _exponent((magnitude * kept).sum(-1) / kept.sum(-1).clamp(min=1))


def _nine_levels(groups: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with levels -4 to 4: the nearest, with a scale in proportion to a group's RMS."""
    exponent = _exponent(STEP_OF_NINE * (groups.square().sum(-1) / lengths).sqrt())
    largest = largest_level(2)
    return (groups / power_of_two(exponent, EIGHTHS).unsqueeze(-1)).round().clamp(-largest, largest), exponent


def _exponent(scale: torch.Tensor) -> torch.Tensor:
    octaves = torch.log2(scale.clamp(min=SMALLEST_SCALE))
    return (octaves * EIGHTHS).round().clamp(-128, 127).to(torch.int8)
