"""Input injection of a looped block as a stable linear time-invariant system."""

from __future__ import annotations

import torch


def lti_injection(state: torch.Tensor, source: torch.Tensor, update: torch.Tensor, decay: float) -> torch.Tensor:
    """h <- a h + b e + f(h), all (..., D), with b = 1 - a and the fixed decay 0 < a < 1.

    Without f, iteration brings the state to e at the rate a. With a bounded f the state stays bounded.
    """
    return decay * state + (1 - decay) * source + update
