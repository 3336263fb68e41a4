"""StepFlags: flags of matrices that are set on the device during a step and read once at its end."""

from __future__ import annotations

import torch

from modeling_arb.layers.ternary_matrix import TernaryMatrix


class StepFlags:
    """One flag per matrix. Setting it does not wait for the device; `take` waits, once for all flags."""

    def __init__(self) -> None:
        self._known: set[TernaryMatrix] = set()
        self._on_device: dict[TernaryMatrix, torch.Tensor] = {}

    def set_where(self, matrix: TernaryMatrix, flag: torch.Tensor | bool) -> None:
        """Set the matrix's flag if `flag`, bool () on any device, is true."""
        if isinstance(flag, bool):
            self._known |= {matrix} if flag else set()
        else:
            earlier = self._on_device.get(matrix)
            self._on_device[matrix] = flag if earlier is None else earlier | flag

    def take(self) -> set[TernaryMatrix]:
        """The matrices whose flag is set; clears all flags."""
        flags = torch.stack(list(self._on_device.values())).tolist() if self._on_device else []
        found = self._known | {matrix for matrix, is_set in zip(self._on_device, flags, strict=True) if is_set}
        self.clear()
        return found

    def clear(self) -> None:
        """Clear all flags without reading them."""
        self._known, self._on_device = set(), {}
