"""GradientExchange: with several ranks, sends gradients to the owners of matrices and new states back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from modeling_arb.layers.ternary_matrix import TernaryMatrix

from .rank_exchange import AveragedGradient, SentState, share_out, this_rank

IN_FLIGHT = 2  # gradients under way between ranks: more of them hide more of a late rank, and hold memory


class SentGradient(NamedTuple):
    """A matrix's gradient of the whole step, while its mean over ranks is computed."""

    matrix: TernaryMatrix
    average: AveragedGradient


class GradientExchange:
    """Every matrix has an owner, the one rank that updates it.

    A gradient is sent to its owner while backward continues. The owner calls `update` with the mean over ranks and
    sends the matrix's new state to all other ranks. Every rank must send the same matrices in the same order.

    work: cost of an update by matrix, in the order of backward; owners get nearly equal shares.
    """

    def __init__(self, work: dict[TernaryMatrix, int], update: Callable[[TernaryMatrix, torch.Tensor], None]):
        self.owners = dict(zip(work, share_out(list(work.values())), strict=True))
        self._update = update
        self._gradients: deque[SentGradient] = deque()
        self._states: list[SentState] = []

    def send(self, matrix: TernaryMatrix, dW: torch.Tensor) -> None:
        """Start sending dW (rows, columns), float32. It must not be changed before `settle`."""
        self._gradients.append(SentGradient(matrix, AveragedGradient(dW, self.owners[matrix])))
        self._deliver(but=IN_FLIGHT)

    def settle(self) -> None:
        """Wait until every matrix sent has its new state on this rank."""
        self._deliver(but=0)
        for state in self._states:
            state.wait()
        self._states.clear()

    def _deliver(self, but: int) -> None:
        """Complete the gradients in the order of sending, except for the last `but`."""
        while len(self._gradients) > but:
            matrix, average = self._gradients.popleft()
            dW, owner = average.result(), self.owners[matrix]
            if owner == this_rank():
                self._update(matrix, dW)
            self._states.append(SentState([getattr(matrix, name) for name in matrix.layout()], owner))
