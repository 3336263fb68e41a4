"""The logistic function in the one form that every caller shares."""

from __future__ import annotations

import torch


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)) of floats (...), in their dtype, as 0.5 + 0.5 * tanh(x / 2).

    On a CPU torch.sigmoid rounds differently where a vector register is not full and where the input is strided, so
    the same value could give another result in another batch; torch.tanh does not. Within 6e-8 of the function.
    """
    return 0.5 + 0.5 * torch.tanh(0.5 * x)
