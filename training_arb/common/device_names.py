"""Checks the device that a command line names."""

from __future__ import annotations

import torch


def checked_device(name: str) -> torch.device:
    """cpu, cuda or cuda:N. Raises ValueError where it is not one of these, or is not found."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} must be cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} must be cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: not found; torch finds {torch.cuda.device_count()} CUDA devices")
    return device
