"""Adaptive computation time (Graves 2016, arXiv:1603.08983, section 2): each position decides how often it iterates.

With h_n the state after iteration n and p_n its halting probability, a position stops at the first N where
p_1 + ... + p_N reaches the threshold, or at the last allowed iteration. The output is sum_{n<N} p_n h_n + R h_N, the
remainder being R = 1 - sum_{n<N} p_n, and the ponder cost is N + R. N has no gradient, R has. Our deviation: positions
that stopped leave the batch, so that an iteration computes only the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def iterate_until_halted(
    h: torch.Tensor,
    step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    halting: Callable[[torch.Tensor], torch.Tensor],
    max_iterations: int,
    halt_threshold: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h (N, D) -> output (N, D), ponder cost float32 (N,).

    step: states (R, D) of the positions int64 (R,) that still run, and these positions -> their next states.
    halting: states (R, D) -> probabilities (R,). Each iteration waits for the device once: how many go on.
    """
    running = torch.arange(len(h), device=h.device)
    spent = torch.zeros(len(h), device=h.device)  # p_1 + ... + p_(n-1), of those running
    output = torch.zeros_like(h)
    ponder = torch.zeros(len(h), device=h.device)
    for iteration in range(1, max_iterations + 1):
        h = step(h, running)
        probability = halting(h).float()
        reached = spent + probability
        remainder = 1 - spent
        halts = reached >= halt_threshold if iteration < max_iterations else torch.ones_like(spent, dtype=torch.bool)
        weight = torch.where(halts, remainder, probability)
        output = output.index_add(0, running, weight[:, None].to(h.dtype) * h)
        ponder = ponder.index_add(0, running, torch.where(halts, iteration + remainder, 0.0))
        if iteration == max_iterations:
            break
        going_on = (~halts).nonzero().squeeze(1)
        if not len(going_on):
            break
        h, spent, running = h[going_on], reached[going_on], running[going_on]
    return output, ponder
