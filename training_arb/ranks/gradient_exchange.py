"""GradientExchange: between backward and update when several ranks train, gradients to owners and new states back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from modeling_arb.layers.ternary_matrix import TernaryMatrix

from .rank_exchange import AveragedGradient, SentState, share_out, this_rank

IN_FLIGHT = 2  # gradients under way between ranks: more of them hide more of a late rank, and hold memory


class SentGradient(NamedTuple):
    """A matrix's gradient of the whole step, its mean over ranks under way."""

    matrix: TernaryMatrix
    average: AveragedGradient


class GradientExchange:
    """Every matrix has an owner, the one rank that updates it.

    A gradient travels to its owner while backward goes on. The owner calls `update` with the mean over ranks, and the
    matrix's new state travels to all other ranks. Every rank must send the same matrices in the same order.

    work: what an update costs, by matrix in the order of backward; owners get nearly equal shares.
    """

    def __init__(self, work: dict[TernaryMatrix, int], update: Callable[[TernaryMatrix, torch.Tensor], None]):
        self.owners = dict(zip(work, share_out(list(work.values())), strict=True))
        self._update = update
        self._gradients: deque[SentGradient] = deque()
        self._states: list[SentState] = []

    def send(self, matrix: TernaryMatrix, dW: torch.Tensor) -> None:
        """Start dW (rows, columns), float32, on its way. It must not be written to before `settle`."""
        self._gradients.append(SentGradient(matrix, AveragedGradient(dW, self.owners[matrix])))
        self._deliver(but=IN_FLIGHT)

    def settle(self) -> None:
        """Wait until every matrix sent has its new state on this rank."""
        self._deliver(but=0)
        for state in self._states:
            state.wait()
        self._states.clear()

    def _deliver(self, but: int) -> None:
        """Complete the gradients sent first, all `but` the last few."""
        while len(self._gradients) > but:
            matrix, average = self._gradients.popleft()
            dW, owner = average.result(), self.owners[matrix]
            if owner == this_rank():
                self._update(matrix, dW)
            self._states.append(SentState([getattr(matrix, name) for name in matrix.layout()], owner))
