"""Lists the tensors that a ternary matrix keeps under each update rule, for layers, audit and loader."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .groups import num_groups
from .momentum_format import BLOCK, MomentumFormat
from .packing import LARGEST_BYTE, packed_width

CHECKED_VALUES = 1 << 20  # at a time
COUNTER = ((0, torch.iinfo(torch.int64).max),)


@dataclass(frozen=True)
class StateTensor:
    """One persistent tensor: shape, dtype, role, whether inference needs it, and its legal values as closed ranges in
    ascending order; no ranges: every value of the dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str
    inference: bool = False
    legal: tuple[tuple[int, int], ...] = ()

    def count_illegal(self, tensor: torch.Tensor) -> int:
        """How many values lie outside the legal ranges; computed piece by piece."""
        if not self.legal:
            return 0
        return sum(self._count_illegal(piece) for piece in tensor.reshape(-1).split(CHECKED_VALUES))

    def _count_illegal(self, piece: torch.Tensor) -> int:
        least, most = (int(value) for value in piece.aminmax()) if piece.numel() else (0, 0)
        if any(low <= least and most <= high for low, high in self.legal):
            return 0
        illegal = torch.ones_like(piece, dtype=torch.bool)
        for low, high in self.legal:
            illegal &= (piece < low) | (piece > high)
        return int(illegal.sum())


def rule_of_tables(update_rule: str, table_rule: str) -> str:
    """The rule for the touched rows of a large table: sign votes; under `momentum` also momentum, if table_rule is."""
    if update_rule == "correlation":
        return "correlation"
    return "momentum" if update_rule == table_rule == "momentum" else "flip"


def state_layout(
    update_rule: str,
    rows: int,
    columns: int,
    group_size: int,
    momentum_bits: int = 4,
    trits: int = 1,
    votes_by_row: bool = False,
) -> dict[str, StateTensor]:
    """The persistent tensors of a (rows, columns) ternary matrix by name, training state included.

    trits: a weight, 1 or 2; votes and correlations move single trits, so only `momentum` takes 2.
    votes_by_row: `correlation` counts the votes of each row, for tables whose rows are used unequally often.
    """
    assert trits == 1 or update_rule == "momentum", update_rule
    groups = num_groups(columns, group_size)
    layout = {
        "T_packed": StateTensor(
            (rows, packed_width(columns, trits)),
            torch.uint8,
            "packed trits",
            inference=True,
            legal=((0, LARGEST_BYTE),),
        ),
        "E": StateTensor((rows, groups), torch.int8, "scale exponents", inference=True),
    }
    if update_rule == "momentum":
        form = MomentumFormat(momentum_bits)
        layout["accum"] = StateTensor((rows, columns), form.dtype, "residual and momentum", legal=form.legal)
        layout["accum_exp"] = StateTensor((rows, num_groups(columns, BLOCK)), torch.int8, "momentum exponents")
    elif update_rule == "flip":
        layout["T_accum"] = StateTensor((rows, columns), torch.int8, "trit votes")
        layout["E_accum"] = StateTensor((rows, groups), torch.int8, "scale votes")
    elif update_rule == "correlation":
        layout["corr_accum"] = StateTensor((rows, groups), torch.int64, "correlation sums", inference=True)
        counters = (rows, 1) if votes_by_row else ()
        layout["step_counter"] = StateTensor(counters, torch.int64, "vote counter", inference=True, legal=COUNTER)
    else:
        raise ValueError(f"update_rule={update_rule!r} is unknown")
    return layout
